"""How the operators of batch norms cut the work; their values: `batch_norm_cases`."""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from spark_fast.encoder.conv.kernels import batch_norm_operators as bn


def test_tiles_and_runs_cover_all_rows_and_no_run_is_empty():
    for rows in (2, 63, 64, 65, 4096, 327_680, 2**30 - 1):
        for channels in (1, 7, 33, 64, 200, 2048):
            tile_rows, tile, tiles, runs = bn._runs(rows, channels, 3)
            assert runs * -(-channels // tile) <= 3 * bn.PROCESSORS
            assert (runs - 1) * tiles * tile_rows < rows <= runs * tiles * tile_rows
            assert tile_rows * tile == bn.TILE


def test_more_rows_than_can_be_numbered_are_refused():
    with pytest.raises(ValueError, match="too many for the GPU kernels"):
        bn.map_rows(torch.empty(2**20, 1, 32, 32, device="meta"))
