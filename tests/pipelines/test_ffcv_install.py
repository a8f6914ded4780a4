from __future__ import annotations

import sys

import pytest
import torch

from spark_fast.commands import INSTALL_FFCV
from spark_fast.errors import SettingsError
from spark_fast.pipelines.ffcv_install import require_ffcv


def test_without_ffcv_its_purpose_and_the_command_that_installs_it_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(SettingsError, match=r"^reading minds needs FFCV, which cannot be imported \(.*\)") as caught:
        require_ffcv("reading minds")
    assert str(caught.value).endswith(f"Install it with\n  {INSTALL_FFCV}")


@pytest.mark.ffcv
def test_with_ffcv_torch_keeps_its_threads():
    before = torch.get_num_threads()
    require_ffcv("a test")
    assert torch.get_num_threads() == before
