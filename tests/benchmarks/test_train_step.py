"""The benchmark of a step, on a small network."""

import json

import pytest
import torch


@pytest.fixture
def train_step():
    import train_step

    return train_step


def options(train_step, **changes):
    small = {"models": ("resnet10t",), "batches": (2,), "size": 64, "width": 64, "repeats": 1, "threads": 1}
    return train_step.Options(**(small | changes))


@pytest.fixture
def rates(train_step, monkeypatch):
    """What matrix products are measured at."""
    rates = {torch.float32: 1e11, torch.bfloat16: 2e11}
    monkeypatch.setattr(train_step, "matmul_rate", lambda device, dtype: rates[dtype])
    return rates


@pytest.mark.slow
@pytest.mark.usefixtures("rates")
def test_every_way_is_measured_and_kept_with_its_machine(train_step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("measuring.RESULTS", tmp_path)
    train_step.main(options(train_step))
    kept = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["candidate"] for row in kept["rows"]] == list(train_step.CANDIDATES)
    assert all(0 < row["optimizer"] < row["step"] and row["encoder"] > 0 for row in kept["rows"])
    assert kept["machine"]["billion multiply-adds a second in a matrix product"] == {"fp32": 50, "bf16": 100}
    shown = capsys.readouterr().out
    assert "1.00x" in shown
    assert "published decoder" in shown


@pytest.mark.parametrize(("asked", "measured"), [({}, {"fp32"}), ({"candidates": ("packed bf16",)}, {"bf16"})])
def test_bf16_is_left_out_where_it_is_emulated_unless_asked_for(
    train_step, rates, tmp_path, monkeypatch, capsys, asked, measured
):
    rates[torch.bfloat16] = 1e10
    monkeypatch.setattr("measuring.RESULTS", tmp_path)
    train_step.main(options(train_step, parts=("encoder",), **asked))
    kept = json.loads((tmp_path / "train_step.json").read_text())
    assert {train_step.CANDIDATES[row["candidate"]].precision for row in kept["rows"]} == measured
    assert ("without bf16" in capsys.readouterr().out) == (not asked)


def test_the_encoder_alone(train_step):
    shape = train_step.Shape("resnet10t", 64, 0.6, 2, 64)
    only = options(train_step, parts=("encoder",), candidates=("masked fp32", "packed fp32"))
    rows = train_step.measure(shape, only)
    assert [row["step"] for row in rows] == [0.0, 0.0]
    assert all(row["encoder"] > 0 for row in rows)


def test_a_way_that_is_none_is_named(train_step):
    with pytest.raises(SystemExit, match="no such candidate: dense; there are masked fp32 NCHW"):
        train_step.main(options(train_step, candidates=("dense",)))
