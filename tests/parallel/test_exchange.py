"""Attention of shared tokens against that of one process, over small grids and splits drawn at random."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bsa_compile.parallel.mesh import factor
from bsa_compile.parallel.split import FrameSplit, even, ring_bounds, starts

from . import exchanges
from .jobs import Case

MESHES = [
    {"ulysses": 2},
    {"ulysses": 3},
    {"ulysses": 4},
    {"ring": 2},
    {"ring": 3},
    {"ring": 4},
    {"ring": 2, "ulysses": 2},
    {"context": 4},
]
CRITERIA = [None, {"sparsity": 0.5}, {"cdf_threshold": 0.6}, {"sparsity": 0.8, "cdf_threshold": 0.3}]


@st.composite
def problems(draw):
    mesh = draw(st.sampled_from(MESHES))
    grid = (draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    heads = draw(st.integers(mesh.get("ulysses", 1), 5))
    case = Case(grid, mesh, heads=heads, batch=draw(st.integers(1, 2)), cond=draw(st.integers(0, grid[0] - 1)))
    tile = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    return case, tile, draw(st.sampled_from(CRITERIA)), draw(st.integers(0, 9)), draw(st.integers(1, 3))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
@example(problem=(Case((4, 5, 6), {"ulysses": 3}, heads=5), (2, 2, 3), {"sparsity": 0.5}, 0))
@example(problem=(Case((3, 4, 5), {"ulysses": 2}, heads=5, batch=2, cond=1), (2, 2, 3), {"sparsity": 0.5}, 0, 2))
# Groups of equally many heads, packed by one copy; 35 and 15 positions are shared unevenly.
@example(problem=(Case((3, 5, 7), {"ulysses": 2}, heads=4, batch=2, cond=1), (2, 2, 3), {"sparsity": 0.5}, 0, 2))
@example(problem=(Case((2, 6, 5), {"ring": 2, "ulysses": 2}, heads=4), (2, 2, 2), {"sparsity": 0.5}, 0, 2))
@example(problem=(Case((2, 1, 1), {"ring": 4}, heads=1), (2, 2, 2), {"sparsity": 0.5}, 0))  # three hold nothing
@example(problem=(Case((2, 1, 1), {"ulysses": 4}, heads=4), (2, 2, 2), None, 0))
@example(problem=(Case((1, 1, 1), {"ring": 2}, heads=1), (1, 1, 1), None, 0))
@example(problem=(Case((3, 7, 5), {"ring": 2, "ulysses": 2}, heads=3, cond=1), (1, 3, 2), {"cdf_threshold": 0.6}, 1))
def test_any_split_gives_what_one_process_does(pool, problem):
    case, *rest = problem
    for errors in pool.run(case.ranks, exchanges.attention, case, *rest):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_member_that_nobody_selects_leaves_no_trace(pool, ranks):
    assert pool.run(ranks, exchanges.merge_is_exact) == [(True, True)] * ranks


@pytest.mark.parametrize("order", [exchanges.order, exchanges.compiled_order])
def test_one_group_travels_while_another_is_attended_with(pool, order):
    for seen in pool.run(2, order):
        first, second = [i for i, word in enumerate(seen) if word == "attend"]
        assert seen[:first].count("start") == 2  # q, k and v of both groups
        assert seen[:first].count("wait") == 1  # for the first one alone
        assert seen[first:second].count("start") == 1  # the first group's output goes home
        assert seen[first:second].count("wait") == 1
        assert seen[second:].count("wait") == 2


def test_opcheck(pool):
    pool.run(2, exchanges.checked)


@given(st.integers(0, 50), st.integers(1, 9))
def test_even_shares(total, parts):
    sizes = even(total, parts)
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 50), st.integers(1, 6), st.integers(1, 9))
def test_ring_bounds_are_at_tiles(extent, unit, parts):
    bounds = ring_bounds(extent, unit, parts)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, extent, parts + 1)
    assert all(a <= b and (b % unit == 0 or b == extent) for a, b in itertools.pairwise(bounds))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_position_has_one_owner(height, width, ring, ulysses, unit):
    split = FrameSplit.of(height, width, ring, ulysses, (unit, unit))
    tokens = torch.arange(2 * height * width)[:, None]  # two frames
    shares = [[split.take(tokens, m, i) for i in range(ulysses)] for m in range(ring)]
    parts = [[x.unflatten(0, (2, n)) for x, n in zip(shares[m], split.counts(m), strict=True)] for m in range(ring)]
    assert torch.equal(split.join_frame([torch.cat(p, dim=-2) for p in parts]).flatten(0, 1), tokens)
    assert [len(p) for p in shares[0]] == [2 * n for n in split.counts(0)]


def test_the_more_even_axis_is_cut():
    assert FrameSplit.of(44, 80, 2, 1, (4, 4)) == FrameSplit(44, 80, 2, (0, 40, 80), 1)  # 11 tile rows, 20 columns
    assert FrameSplit.of(45, 80, 3, 1, (4, 4)) == FrameSplit(45, 80, 2, (0, 28, 56, 80), 1)  # 28 x 45 at most
    assert FrameSplit.of(45, 8, 3, 1, (4, 4)) == FrameSplit(45, 8, 1, (0, 16, 32, 45), 1)
    assert FrameSplit.of(30, 52, 1, 3).counts(0) == (520, 520, 520)


@pytest.mark.parametrize(
    ("ranks", "heads", "expected"),
    [(2, 32, (1, 2)), (3, 32, (1, 3)), (64, 32, (2, 32)), (48, 32, (2, 24)), (4, 3, (2, 2)), (5, 3, (5, 1))],
)
def test_ulysses_as_far_as_the_heads_go(ranks, heads, expected):
    assert factor(ranks, heads) == expected
    assert starts(expected)[-1] == sum(expected)
