"""Two ranks: sharing the optimiser's state changes no bit, exchanging gradients in bf16 changes little."""

import numpy as np
import pytest
import torch

from spark_fast import build_spark
from spark_fast.run.data_parallel import give_gradients_strides_of_weights
from tests.cli.tiny_run import TINY, losses, pictures, torchrun, train, weights  # noqa: F401


@pytest.mark.parametrize("name", ["resnet10t", "convnext_zepto_rms"])
def test_gradients_have_the_strides_of_their_weights(one_thread, name):
    """Else DDP warns, as it takes a weight with a dimension of 1 for one of another layout."""
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def gradients():
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        model(images).backward()
        return {name: (p, p.grad) for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert any(p.stride() != grad.stride() for p, grad in plain.values())
    give_gradients_strides_of_weights(model)
    for name, (p, grad) in gradients().items():
        assert p.stride() == grad.stride(), name
        assert torch.equal(grad, plain[name][1])


@pytest.mark.slow
def test_zero_is_the_same_to_the_bit_and_its_checkpoint_is_anyones(pictures, tmp_path):  # noqa: F811
    flags = ["name", f"--data_path={pictures}", *TINY, "--bs=8", "--ep=2", "--base_lr=0.01", "--log_every=1"]
    torchrun(*flags, f"--exp_dir={tmp_path / 'plain'}")
    torchrun(*flags, f"--exp_dir={tmp_path / 'zero'}", "--zero", "--max_steps=7")
    torchrun(*flags, f"--exp_dir={tmp_path / 'zero'}", "--resume=auto")  # and on without
    plain, zero = (weights(tmp_path / name) for name in ("plain", "zero"))
    assert all(torch.equal(plain["model"][name], zero["model"][name]) for name in plain["model"])
    moments, others = (state["optimizer"]["state"] for state in (plain, zero))
    assert moments.keys() == others.keys()
    for i in moments:
        assert all(torch.equal(moments[i][name], others[i][name]) for name in ("exp_avg", "exp_avg_sq"))
    torchrun(*flags, f"--exp_dir={tmp_path / 'bf16'}", "--allreduce=bf16")
    both = [losses(tmp_path / name) for name in ("plain", "bf16")]
    np.testing.assert_allclose(*both, rtol=1e-2)
    plain, rounded = (weights(tmp_path / name)["model"]["decoder.proj.weight"] for name in ("plain", "bf16"))
    assert not torch.equal(plain, rounded)
