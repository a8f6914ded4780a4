"""The command: several runs in one picture, read as training writes them."""

import numpy as np
import pytest
from PIL import Image

from spark_fast.cli import plot as plot_run
from spark_fast.reporting.metrics_file import MetricsFile, line_of

matplotlib = pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
pytest.importorskip("matplotlib.figure")


def write_run(folder, losses):
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl", 0)
    for step, loss in enumerate(losses, 1):
        row = {"step": step, "epoch": 1, "loss": loss, "lr": step / 10, "images_per_second": 9.0, "data_wait": 0.1}
        file.point(row, step)
    file.close()
    return folder


def test_every_run_is_a_line_in_every_panel(tmp_path, capsys):
    runs = [write_run(tmp_path / "one", [1.0, float("nan"), 0.5]), write_run(tmp_path / "two", [0.9, 0.8])]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(line_of({"step": 3, "loss": 0.7})[:-4])  # being written
    pictures = []
    for i, chosen in enumerate((runs, runs[:1])):
        assert plot_run.main([*map(str, chosen), "--out", str(tmp_path / f"{i}.png")]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / f"{i}.png").convert("RGB")).astype(int))
    said = capsys.readouterr().out
    assert f"{runs[0]}: 3 log points to step 3, loss 0.5000" in said
    assert f"{runs[1]}: 2 log points to step 2, loss 0.8000" in said
    orange = [(abs(picture - (255, 127, 14)).sum(-1) < 30) for picture in pictures]  # the second line's colour
    height, width = (n // 2 for n in orange[0].shape)
    quarters = [orange[0][y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
    assert all(quarter.any() for quarter in quarters)
    assert not orange[1].any()
    assert not list(tmp_path.glob("*.partial"))


def test_noise_in_the_last_digit_of_a_loss_is_drawn_flat(tmp_path, monkeypatch):
    spans, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: (spans.append(self.axes[0].get_ylim()), save(self, *a, **k)),
    )
    for losses in ([0.99992, 0.99994], [1.0, 0.5]):
        plot_run.draw({"a": [{"step": i, "loss": loss, "lr": 0.1} for i, loss in enumerate(losses)]})
    assert spans[0] == pytest.approx((0.99493, 1.00493))
    assert spans[1][0] < 0.5 < 1 < spans[1][1]
    assert spans[1][1] - spans[1][0] < 0.6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a run folder: nowhere cannot be read"),
        (["empty"], "empty/metrics.jsonl has no log point yet"),
        (["other.jsonl"], "other.jsonl is not the metrics.jsonl of a pre-training run"),
        (["empty", "--out", "a.pdf"], "a.pdf must end with .png"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", [])
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    assert plot_run.main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_k_nn_of_the_runs_that_measured_it_is_a_panel_of_its_own(tmp_path, capsys, monkeypatch):
    axes, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (axes.extend(self.axes), save(self, *a, **k))
    )
    runs = [write_run(tmp_path / "one", [1.0, 0.9]), write_run(tmp_path / "two", [1.0, 0.8])]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        for step, top1 in ((0, 12.5), (2, 37.25)):
            file.write(line_of({"step": step, "epoch": step // 2, "knn_top1": top1, "eval_seconds": 1.0}))
    assert plot_run.main([*map(str, runs), "--out", str(tmp_path / "a.png")]) == 0
    assert [panel.get_title() for panel in axes] == [*plot_run.PANELS.values(), "k-NN top-1, percent"]
    (none, line) = axes[-1].get_lines()
    assert len(none.get_xdata()) == 0
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2], [12.5, 37.25])
    assert line.get_color() == axes[0].get_lines()[1].get_color(), "a run has one colour in all panels"
    said = capsys.readouterr().out
    assert f"{runs[0]}: 2 log points to step 2, loss 0.9000\n" in said
    assert f"{runs[1]}: 2 log points to step 2, loss 0.8000, k-NN top-1 37.25 %\n" in said
