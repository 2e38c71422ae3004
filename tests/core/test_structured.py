"""The generator of structured q, k, v and the share that benchmarks print."""

from __future__ import annotations

import pytest
import torch

from bsa_compile import gating
from bsa_compile.errors import GridError
from bsa_compile.selection import BlockSelection
from bsa_compile.structured import shared_fraction, structured_qkv

GRID, TILE = (24, 44, 80), (4, 4, 4)


def test_neighbours_share_70_to_80_percent_of_their_blocks():
    q, k, _ = structured_qkv(GRID, 1, 128, seed=0)
    pooled = (gating.pool(x, GRID, TILE) for x in (q, k))
    assert 0.7 <= shared_fraction(*gating.select(*pooled, 0.9375, None, 128**-0.5), GRID, TILE) <= 0.8


def test_values_are_standard_normal_smooth_and_reproducible():
    q, k, v = structured_qkv((8, 16, 16), 2, 64, seed=3, dtype=torch.float32)
    again = structured_qkv((8, 16, 16), 2, 64, seed=3, dtype=torch.float32)
    other = structured_qkv((8, 16, 16), 2, 64, seed=4, dtype=torch.float32)
    for x, same, different in zip((q, k, v), again, other, strict=True):
        assert x.shape == (1, 2, 8 * 16 * 16, 64)
        assert x.is_contiguous()
        assert torch.equal(x, same)
        assert not torch.equal(x, different)
        assert abs(float(x.mean())) < 0.1
        assert abs(float(x.std()) - 1) < 0.1
        field = x.reshape(2, 8, 16, 16, 64)
        for dim in (1, 2, 3):  # half of the variance is the field's, which hardly changes from a token to the next
            size = field.shape[dim] - 1
            products = field.narrow(dim, 0, size) * field.narrow(dim, 1, size)
            assert 0.4 < float(products.mean()) < 0.6
    assert not torch.equal(q[:, 0], q[:, 1])


def test_shared_fraction_of_lists_made_by_hand():
    mask = torch.zeros(1, 1, 4, 5, dtype=torch.bool)  # two rows of two tiles
    mask[0, 0, 0, :3] = True
    mask[0, 0, 1, 1:4] = True  # shares 2 of 3 with its neighbour
    mask[0, 0, 2, 4] = True
    mask[0, 0, 3, [0, 3, 4]] = True  # shares 1 of (1 + 3) / 2
    lists = BlockSelection.from_dense(mask)  # unused entries hold 5
    counts, indices = lists.kv_num_blocks, lists.kv_indices
    assert shared_fraction(counts, indices, (1, 8, 8), (1, 4, 4)) == 2 * 3 / 10
    assert (
        shared_fraction(counts[..., :1].expand(1, 1, 4), indices[:, :, :1].expand(1, 1, 4, 5), (1, 8, 8), (1, 4, 4))
        == 1
    )
    assert shared_fraction(torch.zeros_like(counts), indices, (1, 8, 8), (1, 4, 4)) == 0


def test_shared_fraction_names_a_grid_that_does_not_fit():
    counts, indices = torch.ones(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    with pytest.raises(GridError, match="at least two tiles along w"):
        shared_fraction(counts, indices, (4, 4, 4), (1, 4, 4))
    with pytest.raises(GridError, match="have 4 tiles"):
        shared_fraction(counts, indices, (1, 8, 16), (1, 4, 4))
