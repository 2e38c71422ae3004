"""`select` against the fp64 reference: counts, softmax mass, ties, NaN and infinities, rows in blocks, scratch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsa_compile import reference
from bsa_compile.kernels import select as module
from bsa_compile.kernels.config import HOPPER_SCORE, RowLayout, ScoreLaunch
from bsa_compile.kernels.score import Scorer
from bsa_compile.kernels.select import select
from tests.attention_cases import INT32_MAX, scores_as_pooled, unpack

pytestmark = pytest.mark.usefixtures("poisoned")


def select_scores(
    scores: Tensor,
    count: int | None,
    mass: float | None,
    scale: float,
    device: torch.device,
    layout: RowLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Counts and the mask of what was chosen, of given `[B, H, Nq, Nk]` scores; checks what is always true."""
    q, k = scores_as_pooled(scores)
    counts, lists = (x.cpu() for x in select(q.to(device), k.to(device), count, mass, scale, layout=layout))
    num_k = scores.shape[-1]
    assert counts.dtype == lists.dtype == torch.int32
    assert lists.shape == (*scores.shape[:3], num_k if mass is not None else count)
    mask = unpack(counts, lists, num_k)  # fails on repeats, disorder and indices out of bounds
    tail = torch.arange(lists.shape[-1]) >= counts[..., None]
    assert bool((lists[tail] == INT32_MAX).all()), "the tail was written"
    assert bool((counts >= max(1, count or 1)).all())
    return counts, mask


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """Mask of so many best scores, ties to the lower index."""
    rank = torch.sort(scores, dim=-1, descending=True, stable=True).indices.argsort(-1)
    return rank < counts[..., None]


def mass_counts(scores: Tensor, mass: float, scale: float) -> Tensor:
    rows = [reference.mass_count(sorted(row, reverse=True), mass, scale) for row in scores.flatten(0, -2).tolist()]
    return torch.tensor(rows).reshape(scores.shape[:-1])


def random_scores(shape: tuple[int, ...], seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator) * 4
    return {"real": scores, "ties": scores.round(), "equal": torch.ones(shape), "peaked": scores * 30}[kind]


quick = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(
    st.tuples(st.just(1), st.integers(1, 2), st.integers(1, 3), st.integers(1, 21)),
    st.one_of(st.tuples(st.integers(1, 24), st.none()), st.tuples(st.none() | st.integers(1, 9), st.floats(0.01, 1.0))),
    st.sampled_from(["real", "ties", "equal", "peaked"]),
    st.integers(0, 9999),
)
@example((1, 1, 1, 10), (None, 0.8), "equal", 0)
@example((1, 1, 2, 20), (None, 0.95), "peaked", 1)
def test_the_best_tiles_are_chosen_and_no_more(device, shape, criteria, kind, seed):
    (count, mass), num_k = criteria, shape[-1]
    count = None if count is None else min(count, num_k)
    scores = random_scores(shape, seed, kind)
    counts, mask = select_scores(scores, count, mass, 0.3, device)
    assert torch.equal(mask, best(scores, counts))
    expected = torch.full(shape[:3], count or 1)
    if mass is not None:
        expected = torch.maximum(expected, mass_counts(scores, mass, 0.3))
    if not torch.equal(counts, expected):
        # Within 1e-6 of the threshold either is right.
        p = (scores.double() * 0.3).softmax(-1).sort(dim=-1, descending=True).values.cumsum(-1)
        at = torch.minimum(counts, expected).long() - 1
        assert bool(((p.gather(-1, at[..., None])[..., 0] - mass).abs() < 1e-6)[counts != expected].all())


@pytest.mark.parametrize(
    ("count", "mass"), [(40, None), (None, 0.7), (150, 0.4), (None, 1.0)], ids=["count", "mass", "both", "all"]
)
@pytest.mark.parametrize("layout", [RowLayout(32, 3), RowLayout(64, 2), RowLayout(32, 1, 3)], ids=str)
def test_rows_of_several_groups_warps_and_segments(count, mass, layout, device):
    scores = random_scores((1, 1, 2, 300), 5, "ties")
    counts, mask = select_scores(scores, count, mass, 0.2, device, layout)
    assert torch.equal(mask, best(scores, counts))
    expected = torch.full((1, 1, 2), 300 if mass == 1.0 else count or 1)
    if mass is not None:
        expected = torch.maximum(expected, mass_counts(scores, mass, 0.2))
    assert torch.equal(counts, expected)


def test_heads_that_share_keys(device):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 3, 24, generator=generator)
    k = torch.randn(2, 2, 7, 24, generator=generator)
    counts, lists = (x.cpu() for x in select(q.to(device), k.to(device), 3, None, 1.0))
    scores = reference.scores(q, k)
    assert torch.equal(unpack(counts, lists, 7), best(scores, counts))


def test_keys_are_ordered_for_the_quads_of_the_hopper_kernel(device):
    """A plain product in its place: what each of its threads holds, put side by side, is the portable kernel's row."""
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(1, 1, n, 32, generator=generator).to(device) for n in (3, 300))
    layout = RowLayout(32, 3)
    expected = torch.empty(3, layout.width, device=device)
    Scorer(q, k, layout, launch=ScoreLaunch(16, 64, 1, 4, 1))(expected, 0, 1, 0, 3)
    scorer = Scorer(q, k, layout, launch=replace(HOPPER_SCORE, block_q=16))
    rows = scorer.parts.float().sum(0) * scorer.factors[:, None]
    product = rows[:3] @ rows[scorer.first_k :][: layout.width].T
    quads = product.reshape(3, -1, 2, 4, 2).transpose(2, 3).reshape(3, -1)
    torch.testing.assert_close(quads.nan_to_num(-math.inf), expected, rtol=1e-5, atol=1e-5)


def test_minus_zero_ties_with_zero(device):
    scores = torch.tensor([-0.0, 0.0, -1.0, 0.0, -0.0, -2.0]).expand(1, 1, 1, 6)
    _, mask = select_scores(scores, 3, None, 1.0, device)
    assert mask.flatten().tolist() == [True, True, False, True, False, False]


def one_row(scores: list[float], count: int | None, mass: float | None, device: torch.device, scale: float = 1.0):
    """Chosen tiles of one row of scores that the product with a one-hot matrix would spread over the row."""
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, len(scores), 16)
    k[..., 0] = torch.tensor(scores)
    counts, lists = (x.cpu() for x in select(q.to(device), k.to(device), count, mass, scale))
    return lists[0, 0, 0, : int(counts)].tolist()


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("scores", "count", "mass", "expected"),
    [
        ([1, NAN, 3, 2], 2, None, [2, 3]),
        ([NAN, NAN, NAN], 2, None, [0, 1]),
        ([NAN, -INF, 1, -INF], 2, None, [0, 2]),
        ([INF, 1, INF, 2], 1, None, [0]),
        ([INF, 1, INF, 2], 3, None, [0, 2, 3]),
        ([-INF, -INF, -INF, -INF], 3, None, [0, 1, 2]),
        ([3e38, -3e38, 1e-45, 0], 3, None, [0, 2, 3]),
        ([1, NAN, 1, 1], None, 0.6, [0, 2]),
        ([1, INF, 5, INF], None, 0.5, [1]),
        ([1, INF, 5, INF], None, 0.6, [1, 3]),
        ([NAN, NAN, NAN, NAN], None, 0.6, [0, 1, 2]),
        ([-INF, -INF, 0, -INF], None, 0.99, [2]),
        ([0, 100, 0], None, 0.999999, [1]),
    ],
    ids=str,
)
def test_rows_with_nan_infinities_and_extremes(scores, count, mass, expected, device):
    assert one_row(scores, count, mass, device) == expected


@pytest.mark.parametrize("scale", [0.0, -1.0, INF, NAN], ids=str)
def test_odd_scales_stay_in_bounds(scale, device):
    chosen = one_row([1, INF, -2, NAN, 0], None, 0.7, device, scale)
    assert chosen == sorted(set(chosen))
    assert chosen
    assert set(chosen) <= set(range(5))


@pytest.mark.parametrize("entries", [128, 2 * 3 * 128], ids=["rows at a time", "heads at a time"])
def test_scratch_is_bounded(entries, device, monkeypatch):
    scores = random_scores((2, 2, 3, 5), 7, "real")
    whole = select_scores(scores, 2, None, 1.0, device)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 4 * entries)
    pieces = select_scores(scores, 2, None, 1.0, device)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)


def test_scores_are_not_rounded_to_tf32(device):
    """Scores that differ by 2**-20 of their size are told apart."""
    k = 1 + torch.arange(8.0).mul(2.0**-20)
    counts, lists = (
        x.cpu() for x in select(torch.ones(1, 1, 1, 1, device=device), k.reshape(1, 1, 8, 1).to(device), 3, None, 1.0)
    )
    assert lists[0, 0, 0].tolist() == [5, 6, 7]
    assert counts.item() == 3
