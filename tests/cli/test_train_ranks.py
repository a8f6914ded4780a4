"""The training command under torchrun: two ranks give what one gives, and stop together."""

import numpy as np
import pytest

from tests.cli.tiny_run import TINY, here, losses, pictures, torchrun, weights  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet10t", pytest.param("convnext_zepto_rms", marks=pytest.mark.drill)])
def test_two_ranks_give_the_losses_of_one(pictures, tmp_path, model):  # noqa: F811
    flags = ["name", f"--data_path={pictures}", *TINY, f"--model={model}", "--bs=8", "--ep=2", "--base_lr=0.01"]
    here(*flags, f"--exp_dir={tmp_path / 'one'}", "--log_every=1")
    torchrun(*flags, f"--exp_dir={tmp_path / 'two'}", "--log_every=1")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = weights(tmp_path / "one")["model"], weights(tmp_path / "two")["model"]
    for name in one:
        # on average: where rounding tips a single ReLU, Adam's direction of that channel differs by more
        assert (two[name] - one[name]).float().abs().mean() < 1e-5 + 1e-3 * one[name].float().abs().mean(), name


@pytest.mark.slow
def test_interrupted_ranks_save_together_and_resume_on_one(pictures, tmp_path):  # noqa: F811
    flags = ["name", f"--data_path={pictures}", *TINY, "--bs=8", "--ep=2", "--base_lr=0.01", "--log_every=1"]
    torchrun(*flags, f"--exp_dir={tmp_path / 'run'}", "--max_steps=5")
    assert weights(tmp_path / "run")["step"] == 5
    here(*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto")
    here(*flags, f"--exp_dir={tmp_path / 'whole'}")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-4)


@pytest.mark.slow
def test_a_planned_stop_is_no_failure_that_torchrun_restarts(pictures, tmp_path):  # noqa: F811
    flags = ["name", f"--data_path={pictures}", *TINY, "--bs=8", "--ep=2", "--log_every=1", "--max_steps=3"]
    done = torchrun(*flags, f"--exp_dir={tmp_path / 'run'}", restarts=3)
    assert len(losses(tmp_path / "run")) == weights(tmp_path / "run")["step"] == 3
    assert done.stderr.count("exit code 0 for torchrun") == 1, "INFO comes from one rank"
