"""The kernels of batch norms, compiled for a GPU that is not there; their values: `batch_norm_cases`."""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from spark_fast.encoder.conv.kernels import batch_norm_operators as bn
from tests.encoder.conv.test_kernels import Recorder

KERNELS = [name for name in vars(bn) if name.endswith("_kernel")]


@pytest.mark.parametrize("kernel", KERNELS)
def test_they_read_16_bytes_at_a_time_and_spill_nothing(kernel, tmp_path, monkeypatch):
    """Compute capability 9.0 (H100, H200), bf16, 256 channels, with residual and ReLU where the kernel knows them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorders = {name: Recorder(getattr(bn, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(bn, name, recorder)
    x = torch.empty(1280, 256, 8, 8, dtype=torch.bfloat16, device="cpu").to(memory_format=torch.channels_last)
    of_channels = torch.ones(256)
    if kernel in ("statistics_kernel", "merge_kernel"):
        bn.batch_norm_statistics(x, of_channels, of_channels.clone(), torch.tensor(0), 0.1, 1e-5)
    elif kernel == "apply_kernel":
        bn.batch_norm_apply(x, x, *(of_channels,) * 4, "relu")
    elif kernel == "sums_kernel":
        bn.batch_norm_sums(x, x, x, *(of_channels,) * 4, "relu")
    else:
        bn.batch_norm_input_gradient(x, x, *(of_channels,) * 4, torch.ones(2, 256), "relu")
    made = recorders[kernel].compiled()
    ptx = made.asm["ptx"]
    if kernel != "merge_kernel":  # of fp32 statistics, four to a thread
        assert "ld.global.v4" in ptx
    assert "ld.local" not in ptx
    assert "st.local" not in ptx
    assert made.asm["cubin"]
