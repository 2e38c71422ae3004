"""`pool` against the fp64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from bsa_compile import reference
from bsa_compile.kernels.pool import pool
from tests.attention_cases import Case

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = {
    "even": Case(grid_q=(2, 4, 4), tile_q=(2, 2, 4), head_dim=32),
    "partial on every axis": Case(grid_q=(3, 5, 7), tile_q=(2, 2, 4), head_dim=16),
    "tile 3x5x2": Case(grid_q=(4, 6, 3), tile_q=(3, 5, 2), head_dim=24),
    "tile of 160 tokens, in blocks": Case(grid_q=(4, 5, 9), tile_q=(4, 5, 8), head_dim=40),
    "tile larger than the grid": Case(grid_q=(2, 3, 3), tile_q=(4, 4, 4), head_dim=80),
    "tile of one token": Case(grid_q=(1, 2, 2), tile_q=(1, 1, 1), head_dim=16),
}


@pytest.mark.parametrize("layout", ["raster", "tile"])
@pytest.mark.parametrize("name", CASES)
def test_mean_of_each_tile(name, layout, device):
    case = CASES[name].but(layout=layout, dtype=torch.bfloat16)
    x = case.qkv()[0]
    if layout == "tile":
        x[:, :, (case.table("q") < 0).flatten()] = math.nan
    pooled = pool(x.to(device), case.grid_q, case.tile_q, layout).cpu()
    assert pooled.dtype == torch.float32
    assert pooled.is_contiguous()
    torch.testing.assert_close(
        pooled.double(), reference.pool(x, case.grid_q, case.tile_q, layout), rtol=1e-6, atol=1e-6
    )


def test_strides_and_sums_beyond_half_precision(device):
    """A view of fused qkv, with values whose sum over a tile overflows fp16."""
    fused = torch.randn(2, 2 * 4 * 4, 3, 2, 24).add(6e4).half().clamp(max=6e4)
    x = fused[:, :, 1].transpose(1, 2)
    pooled = pool(x.to(device), (2, 4, 4), (2, 2, 4)).cpu()
    torch.testing.assert_close(pooled.double(), reference.pool(x, (2, 4, 4), (2, 2, 4)), rtol=1e-6, atol=0)


def test_nan_stays_in_its_tile(device):
    x = torch.randn(1, 1, 2 * 4 * 4, 16)
    x[0, 0, 0, 3] = math.nan
    pooled = pool(x.to(device), (2, 4, 4), (2, 2, 4)).cpu()
    expected = torch.zeros_like(pooled, dtype=torch.bool)
    expected[0, 0, 0, 3] = True
    assert torch.equal(torch.isnan(pooled), expected)
