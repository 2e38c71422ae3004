"""What every selection must satisfy, whatever the scores."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsa_compile import gating, reference
from tests.attention_cases import INT32_MAX, Case, assert_identical, cases, scores_as_pooled, select, unpack

sizes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4), st.integers(1, 24))
sparsities = st.integers(0, 1000).map(lambda n: n / 1000)
thresholds = st.integers(1, 1000).map(lambda n: n / 1000)
seeds = st.integers(0, 2**20)
criteria = st.one_of(
    st.tuples(sparsities, st.none()), st.tuples(st.none(), thresholds), st.tuples(sparsities, thresholds)
)
quick = settings(max_examples=60)


def random_scores(shape: tuple[int, ...], seed: int, std: float = 1.5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def distinct_scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """Each row a permutation of 0, 1, 2, ...: no ties, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).argsort(-1).float()


def expected_count(num_kv: int, sparsity: float) -> int:
    return max(1, math.floor((1 - Decimal(repr(sparsity))) * num_kv))


@quick
@given(sizes, criteria, seeds, st.sampled_from(["finite", "nan", "inf", "equal", "all nan", "all -inf"]))
def test_rows_ascend_in_bounds_and_have_the_promised_count(shape, both, seed, kind):
    scores = random_scores(shape, seed)
    some = random_scores(shape, seed + 1) > 0.5
    fills = {"nan": math.nan, "inf": math.inf, "equal": 1.0, "all nan": math.nan, "all -inf": -math.inf}
    if kind in fills:
        scores = torch.where(some | torch.tensor(kind.startswith("all")), fills[kind], scores)
    # The scores themselves cannot hold NaN through a matrix product with zeros, so this enters below it.
    counts, indices = gating_select(scores, *both)
    num_kv, (sparsity, cdf) = shape[-1], both
    unpack(counts, indices, num_kv)  # fails on repeats, disorder and indices out of bounds
    assert counts.dtype == indices.dtype == torch.int32
    least = 1 if sparsity is None else expected_count(num_kv, sparsity)
    assert bool((counts >= least).all())
    assert bool((counts <= num_kv).all())
    if cdf is None:
        assert bool((counts == least).all())
        assert indices.shape[-1] == least
    elif cdf == 1:
        assert bool((counts == num_kv).all())
    assert int(indices.min()) >= 0
    assert int(indices.max()) < num_kv  # the unused tail too
    again = gating_select(scores, *both)
    assert torch.equal(counts, again[0])
    assert torch.equal(indices, again[1])


def gating_select(scores: Tensor, sparsity: float | None, cdf: float | None) -> tuple[Tensor, Tensor]:
    """Selection from scores with NaN or Inf: one pooled dimension per score row would spread them over the row."""
    batch, heads, num_q, num_kv = scores.shape
    rows = [
        gating.select(torch.ones(1, 1, 1, 1), s.reshape(1, 1, num_kv, 1), sparsity, cdf, 1.0)
        for s in scores.reshape(-1, num_kv)
    ]
    counts, indices = (torch.cat([r[i] for r in rows], 2) for i in (0, 1))
    return counts.reshape(batch, heads, num_q), indices.reshape(batch, heads, num_q, -1)


@quick
@given(sizes, criteria, seeds)
@example((1, 1, 1, 10), (0.9, None), 0)  # 1 - 0.9 is below 0.1 in floats
@example((1, 1, 1, 5), (0.8, None), 0)
@example((1, 1, 1, 20), (0.9, None), 0)
@example((1, 1, 1, 15), (0.9375, None), 0)
def test_small_integer_scores_select_as_the_reference_does_ties_included(shape, both, seed):
    scores = random_scores(shape, seed).round()  # mostly ties
    sparsity, cdf = both
    counts, indices = select(scores, sparsity, cdf)
    expected = reference.select(*scores_as_pooled(scores), sparsity, cdf, 1.0)
    assert torch.equal(counts, expected[0])
    assert torch.equal(unpack(counts, indices, shape[-1]), unpack(*expected, shape[-1]))


@quick
@given(sizes, sparsities, seeds)
def test_sparsity_keeps_the_best_scores(shape, sparsity, seed):
    scores = distinct_scores(shape, seed)
    kept = unpack(*select(scores, sparsity), shape[-1])
    assert torch.equal(kept, scores >= shape[-1] - expected_count(shape[-1], sparsity))


@quick
@given(sizes, thresholds, seeds, st.sampled_from([0.05, 0.3, 1.0]))
@example((1, 1, 1, 10), 0.8, 0, 0.0)  # ten equal masses: eight reach 0.8
def test_the_kept_mass_reaches_the_threshold_and_not_a_tile_more(shape, p, seed, scale):
    scores = random_scores(shape, seed, std=3.0)
    kept = unpack(*select(scores, None, p, scale), shape[-1])
    mass = (scores.double() * scale).softmax(-1)
    reached = (mass * kept).sum(-1)
    assert bool((reached >= p - 1e-6).all())
    lightest = mass.masked_fill(~kept, math.inf).amin(-1)
    if p < 1:
        assert bool(((reached - lightest < p + 1e-6) | (kept.sum(-1) == 1)).all())
        heaviest_dropped = mass.masked_fill(kept, 0).amax(-1)
        assert bool((heaviest_dropped <= lightest + 1e-6).all())
    else:
        assert bool(kept.all())


@quick
@given(sizes, sparsities, thresholds, seeds)
def test_both_criteria_keep_the_larger_of_their_sets(shape, sparsity, p, seed):
    scores = random_scores(shape, seed)
    by_count, by_mass = (unpack(*select(scores, *c), shape[-1]) for c in ((sparsity, None), (None, p)))
    assert torch.equal(unpack(*select(scores, sparsity, p), shape[-1]), by_count | by_mass)


@quick
@given(sizes, st.tuples(sparsities, sparsities), st.tuples(thresholds, thresholds), seeds)
def test_more_sparsity_keeps_a_subset_and_more_mass_a_superset(shape, some_sparsities, some_thresholds, seed):
    scores = random_scores(shape, seed)
    few, many = (unpack(*select(scores, s), shape[-1]) for s in sorted(some_sparsities, reverse=True))
    assert not bool((few & ~many).any())
    few, many = (unpack(*select(scores, None, p), shape[-1]) for p in sorted(some_thresholds))
    assert not bool((few & ~many).any())


@quick
@given(sizes, criteria, seeds)
def test_permuted_tiles_heads_and_batch_select_the_permuted(shape, both, seed):
    scores = distinct_scores(shape, seed)
    kept = unpack(*select(scores, *both), shape[-1])
    for axis, size in enumerate(shape):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + axis))
        permuted = unpack(*select(scores.index_select(axis, order), *both), shape[-1])
        assert torch.equal(permuted, kept.index_select(axis, order)), f"axis {axis}"


@quick
@given(cases(cdf_threshold=None, sparsity=0.6, layout="raster"), st.integers(-3, 3))
def test_one_vector_added_to_all_keys_selects_the_same(case, shift):
    # Small integers in tiles of one token: every score is exact, so the shift cannot break or make a tie.
    case = case.but(tile_q=(1, 1, 1), tile_k=(1, 1, 1))
    q, k, _ = (x.mul(2).round() for x in case.qkv())
    direction = torch.arange(case.head_dim) % 3 * shift
    assert_identical(case.select(q, k), case.select(q, k + direction))


@quick
@given(sizes, thresholds, seeds, st.floats(-4, 4))
def test_a_shift_of_all_scores_keeps_the_same_mass(shape, p, seed, shift):
    scores = random_scores(shape, seed)
    mass = scores.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(bool(((mass - p).abs() > 1e-5).all()))  # not so close to the threshold that rounding decides
    assert_identical(select(scores, None, p), select(scores + shift, None, p))


@settings(max_examples=40)
@given(cases())
def test_pooling_is_the_mean_of_the_valid_tokens(case):
    q, k, _ = case.qkv()
    if case.layout == "tile":  # what lies in padding must not show
        hidden = torch.ones(case.tokens("q"), dtype=torch.bool)
        hidden[case.table("q")[case.table("q") >= 0]] = False
        q = q.masked_fill(hidden[:, None], math.nan)
    ours = case.pooled(q, k)
    for got, x, grid, tile in ((ours[0], q, *case.grids[:2]), (ours[1], k, *case.grids[2:])):
        expected = reference.pool(x, grid, tile, case.layout)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40)
@given(cases())
def test_selection_from_q_and_k_agrees_with_the_reference(case):
    q, k, _ = case.qkv()
    counts, indices = case.select(q, k)
    kept = unpack(counts, indices, case.num_k)
    pooled = [reference.pool(x, *g, case.layout) for x, g in ((q, case.grids[:2]), (k, case.grids[2:]))]
    scores = reference.scores(*pooled)
    best = scores.sort(-1, descending=True).values
    # The true score at the boundary: everything clearly above is kept, everything clearly below is not.
    last = best.gather(-1, counts.long()[..., None] - 1)
    assert bool(kept[scores > last + 1e-5].all())
    assert not bool(kept[scores < last - 1e-5].any())
    expected, _ = reference.select(*pooled, case.sparsity, case.cdf_threshold, case.scale)
    if case.cdf_threshold in (None, 1.0):
        assert torch.equal(counts, expected)
    else:
        mass = (best * case.scale).softmax(-1).cumsum(-1)
        assume(bool(((mass - case.cdf_threshold).abs() > 1e-5).all()))
        assert torch.equal(counts, expected)


@pytest.mark.parametrize("kind", ["sparsity", "cdf", "both"])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunks_of_rows_change_nothing(monkeypatch, kind, chunk):
    scores = random_scores((2, 3, 7, 11), 0)
    both = {"sparsity": (0.5, None), "cdf": (None, 0.7), "both": (0.8, 0.5)}[kind]
    whole = select(scores, *both)
    monkeypatch.setattr(gating, "CHUNK_ELEMENTS", chunk)
    assert_identical(whole, select(scores, *both))
    case = Case(grid_q=(5, 5, 6), batch=2, heads=3, heads_kv=3)
    q, k, _ = case.qkv()
    pooled = case.pooled(q, k)
    monkeypatch.undo()
    for a, b in zip(pooled, case.pooled(q, k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_equal_key_tiles_tie_wherever_a_matrix_product_puts_them():
    # A column at the edge of a matrix product is summed in another order than one inside.
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 67, 80, generator=generator)
    k = torch.randn(1, 1, 1, 80, generator=generator).expand(1, 1, 131, 80).contiguous()
    counts, indices = torch.ops.bsa.select(q, k, 0.9, None, 80**-0.5)
    assert torch.equal(indices, torch.arange(13, dtype=torch.int32).expand_as(indices))
    assert INT32_MAX > int(counts.max()) == 13
