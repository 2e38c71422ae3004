"""Grids and tiles, block selections, reports."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsa_compile.errors import GridError, SelectionError
from bsa_compile.grid import (
    TokenGrid,
    from_tiles,
    num_tiles,
    raster_indices,
    tile_volume,
    to_tiles,
    valid_positions,
)
from bsa_compile.policy import keep_count
from bsa_compile.report import REASONS, Report, Site
from bsa_compile.selection import BlockSelection

sides = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))
tiles = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@pytest.mark.parametrize("bad", [(1, 2), (0, 1, 1), (1, 2, -3), (1.0, 2, 3), (True, 2, 3), "abc", None], ids=str)
def test_a_grid_is_three_positive_integers(bad):
    with pytest.raises(GridError, match="three positive integers"):
        TokenGrid.of(bad)


@given(sides, tiles)
def test_tiles_hold_each_token_once_where_its_coordinates_say(grid, tile):
    indices, valid = raster_indices(grid, tile), valid_positions(grid, tile)
    assert indices.shape == (num_tiles(grid, tile), tile_volume(tile))
    assert torch.equal(indices >= 0, valid)
    assert sorted(indices[valid].tolist()) == list(range(grid[0] * grid[1] * grid[2]))
    counts = [-(-g // s) for g, s in zip(grid, tile, strict=True)]
    for n, row in enumerate(indices.tolist()):
        where = (n // (counts[1] * counts[2]), n // counts[2] % counts[1], n % counts[2])
        for token in (t for t in row if t >= 0):
            at = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
            assert all(a // s == w for a, s, w in zip(at, tile, where, strict=True))


@given(sides, tiles)
def test_from_tiles_undoes_to_tiles(grid, tile):
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 3)
    padded = to_tiles(x, grid, tile, pad_value=float("nan"))
    assert torch.equal(from_tiles(padded, grid, tile), x)


def test_a_selection_knows_what_is_wrong_with_it():
    counts = torch.tensor([[[2]]], dtype=torch.int32)
    good = BlockSelection(counts, torch.tensor([[[[0, 2, 99]]]], dtype=torch.int32), 3)
    good.validate()
    assert good.to_dense().tolist() == [[[[True, False, True]]]]
    for row, text in (([2, 0, 0], "ascend"), ([0, 3, 0], r"\[0, 3\)"), ([-1, 0, 0], r"\[0, 3\)")):
        with pytest.raises(SelectionError, match=text):
            BlockSelection(counts, torch.tensor([[[row]]], dtype=torch.int32), 3).validate()
    with pytest.raises(SelectionError, match=r"\[0, 1\]"):
        BlockSelection(counts, torch.zeros(1, 1, 1, 1, dtype=torch.int32), 3).validate()
    with pytest.raises(SelectionError, match="int32"):
        BlockSelection(counts.long(), torch.zeros(1, 1, 1, 1, dtype=torch.int32), 3)
    with pytest.raises(SelectionError, match="Kmax"):
        BlockSelection(counts, torch.zeros(1, 1, 2, 1, dtype=torch.int32), 3)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_dense_and_packed_selections_agree_also_transposed(n_q, n_k, seed):
    mask = torch.rand(2, 3, n_q, n_k, generator=torch.Generator().manual_seed(seed)) < 0.5
    selection = BlockSelection.from_dense(mask)
    selection.validate()
    assert torch.equal(selection.to_dense(), mask)
    assert torch.equal(selection.transposed().to_dense(), mask.transpose(-1, -2))
    assert selection.density == pytest.approx(float(mask.double().mean()))


def site(**changes):
    known = {
        "module": "blocks.0.attn",
        "role": "self",
        "rewritten": True,
        "reason": "rewritten",
        "batch": 1,
        "heads": 8,
        "head_dim": 128,
        "tokens_q": 84480,
        "tokens_k": 84480,
        "grid_q": (24, 44, 80),
        "grid_k": (24, 44, 80),
        "grid_source": "anchor",
        "tile_q": (4, 4, 4),
        "tile_k": (4, 4, 4),
        "sparsity": 0.9375,
        "attend": "native",
    }
    return Site(**{**known, **changes})


def test_a_site_counts_its_work():
    one = site()
    assert one.dense_flops == 4 * 8 * 84480**2 * 128
    assert one.flops == 8 * (4 * 84480 * keep_count(1320, 0.9375) * 64 * 128 + 2 * 1320**2 * 128)
    assert one.effective_sparsity == pytest.approx(1 - 82 / 1320)
    assert site(cdf_threshold=0.9).flops is None  # data decides
    assert site(grid_q=("s0", 44, 80)).effective_sparsity is None
    assert site(rewritten=False, reason="mask").flops == one.dense_flops


def test_a_report_names_every_site_and_reason():
    report = Report(policy="p")
    assert "nothing compiled" in str(report)
    sites = [site(), *(site(rewritten=False, reason=r, module=f"m.{r}") for r in REASONS if r != "rewritten")]
    report.add(sites, ["a note"])
    report.add(sites, ["a note"])  # the same graph compiled again adds nothing
    assert (len(report.rewritten), len(report.dense), report.graphs) == (1, len(REASONS) - 1, 2)
    text = str(report)
    assert f"1 of {len(REASONS)} attention sites block-sparse" in text
    assert "a note" in text
    for reason, words in REASONS.items():
        assert words in text or reason == "rewritten"
    assert len(json.loads(report.to_json())["sites"]) == len(REASONS)
