"""The proof of learning, in its form of seconds: every part runs, goes on where it was, and fills the table."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from spark_fast.encoder import VisiblePatches

LITTLE = ("--parts", "sweep", "main", "decoder", "--seeds", "1")


@pytest.fixture
def learning(monkeypatch, tmp_path):
    import learning
    import measuring

    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results")
    return learning


@pytest.fixture
def learning_runs(learning):
    import learning_runs

    return learning_runs


@pytest.fixture
def learning_methods(learning):
    import learning_methods

    return learning_methods


@pytest.fixture
def pictures(tmp_path):
    """Two classes, told apart by their brightness."""
    random = np.random.default_rng(0)
    for split, label, number in [(s, c, i) for s, n in (("train", 10), ("test", 2)) for c in (0, 1) for i in range(n)]:
        path = tmp_path / "pictures" / split / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 100 + 100 * label, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.slow
def test_every_part_runs_once_and_is_told(learning, pictures, tmp_path, one_thread, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- learning: the table -->\nold\n<!-- learning: its end -->\nafter\n")
    words = ["--form", "smoke", "--data", str(pictures), "--out", str(tmp_path / "out"), "--write", str(page), *LITTLE]
    learning.main(learning.parse(words))
    lines = (tmp_path / "out" / "runs.jsonl").read_text()
    kept = json.loads((tmp_path / "results" / "learning_smoke.json").read_text())
    arms = {"scratch", "pre-trained", "scratch swept", "pre-trained swept", "as published", "decoder 16"}
    assert {row["arm"] for row in kept["rows"]} == arms
    assert set(kept["seconds_per_step"]) == {"16", "8"}
    table = page.read_text()
    assert table.startswith("before\n")
    assert table.endswith("after\n")
    assert "old" not in table
    assert "| small_convnext | 50% |" in table
    learning.main(learning.parse(words))
    assert (tmp_path / "out" / "runs.jsonl").read_text() == lines, "what is done is not done again"
    with pytest.raises(SystemExit, match="other settings"):
        learning.main(learning.parse([*words, "--batch", "4"]))


@pytest.fixture
def more_pictures(pictures):
    """As many of each class as k-NN needs neighbours."""
    for label in (0, 1):
        folder = pictures / "train" / f"class{label}"
        for i in range(10, 26):
            shutil.copy(folder / f"{i % 10}.jpg", folder / f"{i}.jpg")
    return pictures


@pytest.mark.drill
def test_every_arm_of_the_evidence_is_tuned_pretrained_and_finetuned(learning, more_pictures, tmp_path, one_thread):
    import learning_plan

    words = ["--form", "smoke", "--parts", "evidence", "--data", str(more_pictures), "--out", str(tmp_path / "out")]
    options = learning.parse([*words, "--pretrainings", "2"])
    learning.main(options)
    rows = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(rows) - 1 == learning_plan.expected(options)
    arms = {arm.name for group in learning_plan.arms(options) for arm in group}
    assert len(arms) == 11
    finetuned = [row for row in rows if row.get("arm") in arms and "top1" in row]
    assert {row["arm"] for row in finetuned} == arms
    assert all(row["run"]["seed"] == row["run"]["before"]["seed"] for row in finetuned if row["run"]["before"])
    pretrained = [row for row in rows if row.get("arm") in arms and "loss" in row]
    assert {(row["arm"], row["run"]["seed"]) for row in pretrained} == {
        (a, s) for a in arms - {"scratch"} for s in (0, 1)
    }
    assert {len(row["knn"]) for row in pretrained if row["run"]["epochs"] == 1} == {2}, (
        "before the first step and after"
    )
    four = next(row["run"] for row in pretrained if row["arm"] == "FCMAE x 4")
    assert (four["variant"], four["masks"], four["mask"]) == ("FCMAE", 4, 0.75)


@pytest.mark.slow
def test_images_of_one_channel_of_16_bits_go_the_same_way(learning, tmp_path, one_thread):
    import learning_report
    import learning_scans
    from learning_queue import read_rows

    learning_scans.make(learning_scans.Options(tmp_path / "scans", train=13, test=2, processes=1))
    words = ["--form", "smoke", "--parts", "evidence", "--networks", "small_convnext_grey", "--channels", "1"]
    words += ["--mean", "0.5", "--std", "0.094", "--arms", "scratch", "as published", "--seeds", "1"]
    options = learning.parse(
        [*words, "--pretrainings", "1", "--data", str(tmp_path / "scans"), "--out", str(tmp_path / "out")]
    )
    learning.main(options)
    rows = read_rows(tmp_path / "out" / "runs.jsonl")
    assert len(rows) == 1 + 1 + 2 + 2 * 1 + 1 + 2, "settings, step, trials, sweeps, pre-training, fine-tunings"
    assert "| as published |" in learning_report.markdown(options, rows)


@pytest.mark.slow
def test_with_the_images_in_memory_the_same_runs_are_done(learning, more_pictures, tmp_path, one_thread):
    import learning_report
    from learning_queue import read_rows

    def rows(name, *more):
        words = ["--form", "smoke", "--parts", "evidence", "--arms", "scratch", "as published", "--seeds", "1"]
        words += ["--pretrainings", "1", "--pretrain_lr", "1e-3", "--epochs", "2", "--data", str(more_pictures)]
        options = learning.parse([*words, "--out", str(tmp_path / name), *more])
        learning.main(options)
        found = read_rows(options.out / "runs.jsonl")
        assert "| as published |" in learning_report.markdown(options, found)
        return found

    decoded, held = rows("decoded"), rows("held", "--in_memory")
    assert not (tmp_path / "decoded" / "decoded").exists()
    assert len(list((tmp_path / "held" / "decoded").glob("*.npy"))) == 9, "each set of images that is read"
    assert [row["key"] for row in held.values()] == [row["key"] for row in decoded.values()]
    for key, row in held.items():
        if "loss" in row:
            assert row["steps"] == decoded[key]["steps"]
            assert [step for step, _ in row["knn"]] == [step for step, _ in decoded[key]["knn"]]
            assert row["knn"][0][1] == pytest.approx(decoded[key]["knn"][0][1], abs=25), "one image of four"
        if row.get("arm") == "as published tuned":  # one pass: pixels differ by their rounding alone
            assert row["loss"] == pytest.approx(decoded[key]["loss"], rel=1e-3)


@pytest.mark.slow
def test_an_interrupted_pretraining_goes_on_and_ends_as_one_that_was_not(
    learning_runs, more_pictures, tmp_path, one_thread, monkeypatch
):
    from learning_forms import parse

    def bench(name):
        options = parse(["--form", "smoke", "--data", str(more_pictures), "--out", str(tmp_path / name)])
        images = learning_runs.Images(options.data, options.out)
        images.link_neighbours(1.0)
        return learning_runs.Bench(images, options.out, torch.device("cpu"), options)

    run = learning_runs.Pretraining("small_convnext", 2, 8, judged="test", points=2)
    whole, stopped = bench("whole"), bench("stopped")
    expected = whole.pretrain(run)
    assert [step for step, _ in expected["knn"]] == [0, 6, 12]
    settings = stopped._settings(run)
    settings.run.max_steps = 8  # of this process, as if it was told to stop then, in the middle of the second pass
    with monkeypatch.context() as patched:
        patched.setattr(stopped, "_settings", lambda run: settings)
        with pytest.raises(KeyboardInterrupt):
            stopped.pretrain(run)
    assert [path.name for path in (stopped.weights(run).parent / "checkpoints").glob("*8.pth")] == ["step_00000008.pth"]
    resumed = stopped.pretrain(run)
    assert {**resumed, "loss": None} == {**expected, "loss": None}, "the loss is the mean since the stop"
    weights = [load_file(each.weights(run)) for each in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def seen():
    """Images, and the mask of each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    mask = torch.rand(2, 64, generator=generator).argsort(1)[:, :26].sort(1).values
    return images, mask


def spark(methods, variant):
    torch.manual_seed(0)
    return methods.build(methods.Pretraining("small_resnet", 1, 8, variant))


def test_each_variant_changes_what_it_says(learning, learning_methods, seen, one_thread):
    images, mask = seen
    models = {name: spark(learning_methods, name) for name in learning_methods.VARIANTS}
    levels = {name: len(model.densify_projs) for name, model in models.items()}
    assert levels == {"as published": 2, "zero-outing": 2, "no hierarchy": 1, "loss on all patches": 2}
    losses = {name: model(images, mask).item() for name, model in models.items()}
    assert len(set(losses.values())) == 4
    changes = learning.changed(learning.parse(["--form", "smoke", "--data", "x", "--out", "y"]))
    assert set(changes) == {*learning_methods.VARIANTS, "mask 0.9", "decoder 16"}
    zeroed, here = models["zero-outing"], VisiblePatches(mask, (8, 8))
    dense = zeroed.encoder.network(images * here.cells(64))[-1]
    torch.testing.assert_close(zeroed.encode(images, mask)[-1], dense * here.cells(8))
