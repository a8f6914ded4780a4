"""Drills of a run in one process: kills at any moment, samples that are no numbers, storage that stumbles."""

import json
import math
import random
import re
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from spark_fast import build_spark
from spark_fast.masking import num_visible, sample_visible
from spark_fast.pipelines.sources.bad_images import JUDGED_AFTER
from spark_fast.pipelines.sources.detect import detect_source
from tests.cli.tiny_run import TINY, assert_same_weights, pictures, weights  # noqa: F401
from tests.commands import HANG_SECONDS, run_here
from tests.faults import trainee
from tests.faults.band_kinds import folder_of, image, packed
from tests.pipelines.building import build
from tests.pipelines.pictures import jpeg
from tests.processes import Forked, run_forked

STEPS = 6  # an epoch
FCMAE = "--method=fcmae"
SECOND_METHOD = pytest.param([FCMAE], marks=pytest.mark.slow, id="fcmae")


def run(ledger, plan, *flags, code=0):
    return run_forked(trainee.main, ledger, plan, *flags, code=code)


def here(ledger, plan, *flags, code=0):
    """The same in this process."""
    return run_here(trainee.main, ledger, plan, *flags, code=code)


def samples(ledger):
    """step -> the samples of all ranks, in the order of the ranks; a step begun again must have had the same."""
    parts = {}
    for line in ledger.read_text().splitlines():
        row = json.loads(line)
        assert parts.setdefault((row["step"], row["rank"]), row["ids"]) == row["ids"], "another batch when begun again"
    steps = {}
    for (step, _), ids in sorted(parts.items()):
        steps.setdefault(step, []).extend(ids)
    return steps


def flags_of(pictures, epochs, *more):  # noqa: F811
    return ["name", f"--data_path={pictures}", *TINY, "--bs=8", f"--ep={epochs}", "--base_lr=0.01", "--log_every=1",
            "--picture_every=0", "--save_every=1", *more]  # fmt: skip


def rows(folder):
    """The log points of a run."""
    return [row for row in metrics_of(folder) if "loss" in row]


def evaluations(folder):
    return [(row["step"], row["knn_top1"], row["knn_top5"]) for row in metrics_of(folder) if "knn_top1" in row]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(metrics):
    """Steps that a run has reported."""
    return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "few"),
    [
        ([], 5),
        pytest.param([FCMAE, "--masks_per_image=2", "--eval_every=1"], 2, marks=pytest.mark.drill),
        (["--in_chans=12", "--scale=percentile"], 1),
    ],
    ids=["spark", "fcmae, two masks an image, evaluated", "12 channels of 16 bits"],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(pictures, tmp_path, times, method, few):  # noqa: F811
    """Row 1. Every fourth kill while the process starts, the others somewhere in a step, its loading or its save."""
    kills, rng = times(few, 30), random.Random(1)
    epochs, evaluated = kills + 1, "--eval_every=1" in method
    if "--in_chans=12" in method:
        pictures = folder_of(tmp_path / "bands", [packed(image(i)) for i in range(48)])
    flags = flags_of(pictures, epochs, *method, *([f"--val_path={pictures}"] if evaluated else []))
    started, first_row = time.monotonic(), tmp_path / "whole" / "metrics.jsonl"
    words = [tmp_path / "whole.ledger", "", *flags, f"--exp_dir={tmp_path / 'whole'}"]
    whole = Forked(trainee.main, *words, folder=tmp_path)
    while not (first_row.exists() and first_row.stat().st_size) and whole.poll() is None:
        time.sleep(0.01)
    starting = time.monotonic() - started
    assert whole.wait() == 0
    steps_take = [row["step_seconds"] for row in rows(tmp_path / "whole")]
    words = [*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    for kill in range(kills):
        process = Forked(trainee.main, tmp_path / "run.ledger", "", *words, folder=tmp_path)
        while_starting = kill % 4 == 3
        goal = steps_of(metrics) + 1 if while_starting else STEPS * kill + rng.randrange(STEPS)
        until = time.monotonic() + (starting * rng.uniform(0.1, 0.9) if while_starting else HANG_SECONDS)
        while steps_of(metrics) < goal and time.monotonic() < until:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.002)
        if not while_starting:
            time.sleep(rng.uniform(0, 2 * steps_take[-1]))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    here(tmp_path / "run.ledger", "", *words)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    steps = samples(tmp_path / "run.ledger")
    assert steps == samples(tmp_path / "whole.ledger")
    for epoch in range(epochs):
        ids = [i for step in range(epoch * STEPS, (epoch + 1) * STEPS) for i in steps[step]]
        assert sorted(ids) == list(range(48)), "each sample once an epoch"
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS * epochs + 1))
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert len(evaluations(tmp_path / "run")) == (epochs + 1 if evaluated else 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param([], id="spark"), SECOND_METHOD])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_listed(
    pictures,  # noqa: F811
    tmp_path,
    value,
    method,
):
    """Row 13."""
    flags = flags_of(pictures, 2, *method, f"--exp_dir={tmp_path / 'run'}")
    done = here(tmp_path / "ledger", f"0:4:{value},0:7:{value},0:8:{value}", *flags)
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in bad] == [5, 8, 9]
    steps = samples(tmp_path / "ledger")
    assert [row["samples"] for row in bad] == [steps[4], steps[7], steps[8]]
    assert done.stderr.count("loss or gradient were not finite at step") == 3
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0]
    left = weights(tmp_path / "run")
    assert all(t.isfinite().all() for t in left["model"].values())
    assert left["step"] == 12
    assert math.isfinite(left["loss"])


@pytest.mark.slow
def test_three_in_a_row_end_the_run_with_the_checkpoint_before_them(pictures, tmp_path):  # noqa: F811
    """Row 13; and the same command goes on where the samples are sound again."""
    flags = flags_of(pictures, 2)
    here(tmp_path / "whole.ledger", "", *flags, f"--exp_dir={tmp_path / 'whole'}")
    words = [*flags, f"--exp_dir={tmp_path / 'run'}"]
    done = here(tmp_path / "ledger", "0:3:nan,0:4:nan,0:5:inf", *words, code=4)
    assert "not finite in 3 steps in a row, the last one step 6" in done.stderr
    assert 1 <= weights(tmp_path / "run")["step"] <= 3  # a save that falls due while another is written is put off
    here(tmp_path / "ledger", "", *words, "--resume=auto")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_failure_in_the_pipeline_shows_its_own_traceback(pictures, tmp_path):  # noqa: F811
    done = run(tmp_path / "ledger", "0:2:raise", *flags_of(pictures, 1, f"--exp_dir={tmp_path / 'run'}"), code=1)
    assert done.stderr.count("ZeroDivisionError: planned") == 1
    assert 1 <= weights(tmp_path / "run")["step"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("method", [[], pytest.param([FCMAE], marks=pytest.mark.drill)], ids=["spark", "fcmae"])
def test_a_run_that_stands_still_ends_with_5(pictures, tmp_path, method):  # noqa: F811
    """Rows 23, 24: the next batch never comes."""
    flags = flags_of(pictures, 1, *method, "--timeout=30", f"--exp_dir={tmp_path}/run")
    done = run(tmp_path / "ledger", "0:2:hang", *flags, code=5)
    told = r"rank 0 has made no progress for \d+ s at step 2, waiting for data \(--timeout 30\)"
    assert re.search(told, done.stderr), done.stderr
    assert "continue with --resume auto" in done.stderr
    assert 1 <= weights(tmp_path / "run")["step"] <= 2


def test_storage_that_stumbles_is_asked_again_and_what_is_lost_is_counted(tmp_path, monkeypatch, times):
    """Row 12: a hundred faults in ten thousand reads, some of which pass, and files that vanish."""
    monkeypatch.setattr("spark_fast.pipelines.sources.source.RETRY_SECONDS", (0.001, 0.002))
    for i in range(250):
        (tmp_path / f"{i:03d}.jpg").write_bytes(jpeg(i, 16, 16))
    source = detect_source(tmp_path)
    pipeline = build(tmp_path, batch_size=50, input_size=32, max_bad_fraction=0.5)
    read, rng, met = type(pipeline._source).read, random.Random(12), Counter()
    vanished = set(rng.sample(range(250), 2))
    epochs = times(8, 40)
    passing = set(rng.sample(range(250 * epochs), 2 * epochs))  # of all reads, in no order: threads take turns

    def stumbling(self, i):
        met["reads"] += 1
        if met["reads"] in passing and i not in vanished:
            met["passing"] += 1
            raise OSError(5, "Input/output error")
        return read(self, i)

    monkeypatch.setattr(type(pipeline._source), "read", stumbling)
    for i in vanished:
        (tmp_path / source.name(i)).unlink()
    for epoch in range(epochs):
        assert len(list(pipeline.epoch(epoch))) == 5
    pipeline.close()
    assert met["passing"] >= epochs
    assert pipeline.bad_images.read == 250 * epochs
    assert pipeline.bad_images.substituted == 2 * epochs, "the vanished ones, each epoch; of the others none"
    assert pipeline.bad_images.read > JUDGED_AFTER


@pytest.mark.slow
def test_masks_at_their_edges_and_constant_patches_have_a_finite_loss(one_thread, times):
    """Row 15: any ratio and any image; the loss normalises each patch by its own spread, which may be nothing."""
    rng = np.random.default_rng(15)
    model = build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32)
    for draw in range(times(50, 1000)):
        images = torch.from_numpy(rng.normal(size=(2, 3, 64, 64)).astype(np.float32))
        images[:, :, : 32 * rng.integers(0, 3)] = float(rng.normal()) * 10 ** float(rng.integers(-3, 4))
        ratio = float(rng.uniform(0.001, 0.999))
        if not 0 < round(4 * (1 - ratio)) < 4:
            with pytest.raises(ValueError, match=r"no patch (visible|masked) of the 2x2 patches"):
                num_visible(model.grid, ratio)
            continue
        keep = num_visible(model.grid, ratio)
        loss = model(images, sample_visible(15, draw, torch.arange(2), model.grid, keep))
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
