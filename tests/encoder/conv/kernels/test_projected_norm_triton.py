"""The kernels of a norm and its projection, compiled for a GPU that is not there; values: `projected_norm_cases`."""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from spark_fast.encoder.conv.kernels import projected_norm_triton as kernels
from tests.encoder.conv.test_kernels import Recorder


@pytest.mark.parametrize("kernel", ["_project_kernel", "_sums_kernel", "_input_gradient_kernel"])
def test_they_read_16_bytes_at_a_time_and_spill_nothing(kernel, tmp_path, monkeypatch):
    """Compute capability 9.0 (H100, H200), bf16, the end of SparK's decoder: 24 channels to 3."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorder = Recorder(getattr(kernels, kernel))
    monkeypatch.setattr(kernels, kernel, recorder)
    x = torch.empty(2, 24, 64, 64, dtype=torch.bfloat16, device="cpu").to(memory_format=torch.channels_last)
    grad, of_channels, projection = x[:, :3].contiguous(), torch.ones(24), torch.ones(3, 24)
    if kernel == "_project_kernel":
        kernels.projected_norm(x, *(of_channels,) * 4, projection, torch.ones(3))
    elif kernel == "_sums_kernel":
        kernels.projected_norm_sums(grad, x, of_channels, of_channels)
    else:
        kernels.projected_norm_input_gradient(grad, x, *(of_channels,) * 3, projection, torch.ones(2, 24))
    ptx = recorder.compiled().asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "ld.local" not in ptx
    assert "st.local" not in ptx
