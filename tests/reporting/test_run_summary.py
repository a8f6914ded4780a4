"""What is told of a run at its start, and when it is doubted."""

from dataclasses import replace

import pytest

from spark_fast.reporting.run_summary import RunSummary, long_warmup, nothing_learned

PUBLISHED = RunSummary(
    device="cuda:0 (NVIDIA H100)", precision="bf16", ranks=8, network="resnet50", parameters=(23_500_000, 20_100_000),
    drop_path=0.05, grid=(7, 7), patch=(32, 32), masked=29, images=1_281_167, batch_size=4096, steps_per_epoch=312,
    epochs=1600, step=0, warmup_epochs=40, warmup_is_chosen=False, peak_lr=0.0032,
    method="spark", masks=1,
)  # fmt: skip


def test_everything_that_decides_whether_it_learns_is_told():
    assert PUBLISHED.text().splitlines() == [
        "  device      cuda:0 (NVIDIA H100), bf16, 8 ranks",
        "  method      spark",
        "  network     resnet50: 23.5 M parameters in the encoder, 20.1 M in the decoder; stochastic depth 0.05",
        "  patches     7x7 of 32x32 px, 29 of 49 masked",
        "  images      1281167, 4096 per step",
        "  steps       499200 (1600 epochs of 312)",
        "  warm-up     12480 steps, 40 epochs by default; --warmup_epochs sets it",
        "  peak rate   0.0032",
    ]
    assert "steps       499200 (1600 epochs of 312), of which 9 are done" in replace(PUBLISHED, step=9).text()
    knn = replace(PUBLISHED, evaluation="k-NN of 5 images among 20 of a", eval_every=1)
    assert "  evaluation  k-NN of 5 images among 20 of a; before step 1, every epoch and after the last" in knn.text()
    assert "before step 1, every 7 epochs and after the last" in replace(knn, eval_every=7).text()
    assert "  method      fcmae, 4 masks per image" in replace(PUBLISHED, method="fcmae", masks=4).text()


def test_the_published_run_is_not_doubted():
    assert PUBLISHED.doubts() == []


# 720 images, --ep 4 --wp_ep 1
SHORT = replace(PUBLISHED, images=720, batch_size=32, steps_per_epoch=22, epochs=4, warmup_epochs=1,
                warmup_is_chosen=True, peak_lr=2.5e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("summary", "doubts"),
    [
        (SHORT, ["88 steps are few"]),
        (replace(SHORT, warmup_epochs=2), ["warm-up takes 44 of the 88 steps", "88 steps are few"]),
        (replace(PUBLISHED, warmup_epochs=1600), ["warm-up takes 499200 of the 499200 steps"]),
        (replace(PUBLISHED, grid=(3, 3), masked=5), ["an image has 9 patches, of which 5 are masked"]),
        (replace(PUBLISHED, grid=(2, 5), masked=5), []),
        (replace(PUBLISHED, epochs=1, steps_per_epoch=1000, warmup_epochs=0.1), []),
        (replace(PUBLISHED, epochs=1, steps_per_epoch=999, warmup_epochs=0.1), ["999 steps are few"]),
    ],
)
def test_what_speaks_against_it_is_said(summary, doubts):
    found = summary.doubts()
    assert [text[: len(start)] for text, start in zip(found, doubts, strict=True)] == doubts


@pytest.mark.parametrize(("loss", "said"), [(1.0068, True), (0.981, True), (0.98, False), (0.7, False)])
def test_a_loss_of_predicting_the_mean_is_named_at_the_end(loss, said):
    assert bool(nothing_learned(loss)) is said
    assert not nothing_learned(float("nan"))


def test_a_warm_up_as_long_as_half_of_the_run_is_doubted():
    assert long_warmup(49, 100) == ""
    assert long_warmup(500.0, 100).startswith("warm-up takes 100 of the 100 steps")
