"""Choose the key tiles of each query tile from the pooled queries and keys.

No sort: a search for a threshold that the right number of scores, or the right softmax mass, reaches. Each step counts
the row's scores above a guess and interpolates the next guess, five steps on average. The bracket is kept in integers
in the order of the scores, so that it closes after 32 halvings at the latest: exact, independent of the order of
summation, and safe for infinities. A NaN score counts as -inf.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import RowLayout
from bsa_compile.kernels.score import Scorer
from bsa_compile.kernels.tiles import LOG2_E

SCRATCH_BYTES = 32 * 2**20

_FLIP = tl.constexpr(2**31 - 1)
_INF = tl.constexpr(float("inf"))
_UNIT = tl.constexpr(float(2**40))  # a softmax weight of 1 as an integer
_GUESSES = tl.constexpr(8)  # steps of a search after which it halves the bracket instead of interpolating
MASS_BITS = 30


@triton.jit
def _ordered(score):
    """int32 in the order of fp32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _FLIP, bits)


@triton.jit
def _value(ordered):
    """The fp32 score of an `_ordered` integer."""
    return tl.where(ordered < 0, ordered ^ _FLIP, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _load_group(row_ptr, group, THREADS: tl.constexpr):
    """A group of 4 scores of every thread.  [THREADS, 4]"""
    pointer = row_ptr + group * (4 * THREADS)
    return tl.load(pointer + (tl.arange(0, THREADS)[:, None] * 4 + tl.arange(0, 4)[None, :]))


@triton.jit
def _load_segment(row_ptr, segment, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """Scores of a segment, as GROUPS tensors [THREADS, 4]."""
    scores = ()
    for g in tl.static_range(GROUPS):
        scores = scores + (_load_group(row_ptr, segment * GROUPS + g, THREADS),)  # type: ignore[assignment]  # noqa: RUF005 (no stars)
    return scores


@triton.jit
def _columns(segment, g, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """Columns of the g-th group of every thread.  [THREADS, 4]"""
    first = segment * (4 * GROUPS * THREADS) + g * 4
    return first + tl.arange(0, THREADS)[:, None] * (4 * GROUPS) + tl.arange(0, 4)[None, :]


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _largest(x):
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def _mean_and_deviation(scores, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """Of a quarter of the scores, spread over the row: enough for a first guess."""
    sums = tl.zeros([THREADS, 4], tl.float32)
    squares = tl.zeros([THREADS, 4], tl.float32)
    finite = tl.zeros([THREADS, 4], tl.float32)
    for g in tl.static_range(0, GROUPS, 4):
        usual = tl.abs(scores[g]) < _INF
        score = tl.where(usual, scores[g], 0.0)
        finite += tl.where(usual, 1.0, 0.0)
        sums += score
        squares += score * score
    number = _total(finite)
    mean = _total(sums) / number
    return mean, tl.sqrt(_total(squares) / number - mean * mean)


@triton.jit
def _count(scores, row_ptr, threshold, segments, GROUPS: tl.constexpr, THREADS: tl.constexpr, WHOLE: tl.constexpr):
    """Number of scores of a row that reach `threshold`, as fp32; `scores` are all of them if WHOLE."""
    # Floats, because a comparison that yields 1.0 and an addition of floats run on two different pipes.
    count = tl.zeros([THREADS, 4], tl.float32)
    if WHOLE:
        for g in tl.static_range(GROUPS):
            count += tl.where(scores[g] >= threshold, 1.0, 0.0)
    else:
        for segment in range(0, segments):
            part = _load_segment(row_ptr, segment, GROUPS, THREADS)
            for g in tl.static_range(GROUPS):
                count += tl.where(part[g] >= threshold, 1.0, 0.0)
    return _total(count)


@triton.jit
def _weight(score, column, tiles_k, best, scale):
    """Softmax weights relative to the row's best logit, as integers in units of 2**-40: their sums are exact."""
    logit = score * (scale * LOG2_E)
    weight = tl.where(logit >= best, 1.0, tl.exp2(logit - best))
    weight = tl.where((weight == weight) & (column < tiles_k), weight, 0.0)
    return (weight * _UNIT).to(tl.int64)


@triton.jit
def _count_and_mass(
    scores,
    weights,
    row_ptr,
    threshold,
    tiles_k,
    best,
    scale,
    segments,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Number and weight of the scores that reach `threshold`."""
    count = tl.zeros([THREADS, 4], tl.float32)
    mass = tl.zeros([THREADS, 4], tl.int64)
    if WHOLE:
        for g in tl.static_range(GROUPS):
            reached = scores[g] >= threshold
            count += tl.where(reached, 1.0, 0.0)
            mass += tl.where(reached, weights[g], 0)
    else:
        for segment in range(0, segments):
            part = _load_segment(row_ptr, segment, GROUPS, THREADS)
            for g in tl.static_range(GROUPS):
                reached = part[g] >= threshold
                count += tl.where(reached, 1.0, 0.0)
                weight = _weight(part[g], _columns(segment, g, GROUPS, THREADS), tiles_k, best, scale)
                mass += tl.where(reached, weight, 0)
    return _total(count), _total(mass)


@triton.jit
def _best_logit(
    scores, row_ptr, tiles_k, scale, segments, GROUPS: tl.constexpr, THREADS: tl.constexpr, WHOLE: tl.constexpr
):
    best = tl.full([THREADS, 4], float("-inf"), tl.float32)
    if WHOLE:
        for g in tl.static_range(GROUPS):
            inside = _columns(0, g, GROUPS, THREADS) < tiles_k
            best = tl.maximum(best, tl.where(inside, scores[g] * (scale * LOG2_E), float("-inf")))
    else:
        for segment in range(0, segments):
            part = _load_segment(row_ptr, segment, GROUPS, THREADS)
            for g in tl.static_range(GROUPS):
                inside = _columns(segment, g, GROUPS, THREADS) < tiles_k
                best = tl.maximum(best, tl.where(inside, part[g] * (scale * LOG2_E), float("-inf")))
    return _largest(best)


@triton.jit
def _pick(low, high, guess, steps):
    """Ordered integer strictly between `low` and `high` to try next: near the guess, or halfway if guessing fails."""
    halfway = (low & high) + ((low ^ high) >> 1)  # their sum may overflow
    near = tl.minimum(tl.maximum(_ordered(guess), low + 1), high - 1)
    return tl.where((steps >= _GUESSES) | (guess != guess), halfway, near)


@triton.jit
def _search_count(
    scores,
    row_ptr,
    wanted,
    low,
    high,
    count_low,
    count_high,
    guess,
    reach,
    segments,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Narrow low < high, where more scores than `wanted` reach `low` and fewer `high`.

    Ends when just `wanted` reach `high`, or with `low` next to `high`, so that the scores between them are equal.
    `reach` is how far the guess moves for a count twice too large while one end of the bracket is infinite.

    Returns:
        (low, high, count_high), ordered integers and an fp32 number.
    """
    steps = tl.full([], 0, tl.int32)
    while (count_high != wanted) & (low + 1 != high):
        middle = _pick(low, high, guess, steps)
        count = _count(scores, row_ptr, _value(middle), segments, GROUPS, THREADS, WHOLE)
        more = count > wanted
        low = tl.where(more, middle, low)
        high = tl.where(more, high, middle)
        count_low = tl.where(more, count, count_low)
        count_high = tl.where(more, count_high, count)
        below = _value(low)
        span = _value(high) - below
        inner = below + span * ((count_low - wanted + 0.5) / (count_low - count_high + 1.0))
        outer = _value(middle) + reach * tl.log2(tl.maximum(count, 0.5) / wanted)
        guess = tl.where(tl.abs(span) < _INF, inner, outer)
        reach *= 1.5
        steps += 1
    return low, high, count_high


@triton.jit
def _search_mass(
    scores,
    weights,
    row_ptr,
    target,
    everything,
    guess,
    reach,
    tiles_k,
    best,
    scale,
    segments,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Bracket the score at which the mass of the best scores reaches `target`.

    Returns:
        (low, high, count_high, needed): ordered integers between which lies one score, or several equal ones; how many
        reach `high`; how many best scores the mass needs (fp32).
    """
    low = _ordered(tl.full([], float("-inf"), tl.float32))
    high = _ordered(tl.full([], _INF, tl.float32)) + 1
    count_low = tiles_k.to(tl.float32)
    count_high = tl.full([], 0.0, tl.float32)
    mass_low = everything
    mass_high = tl.full([], 0, tl.int64)
    steps = tl.full([], 0, tl.int32)
    while (count_low - count_high > 1.0) & (low + 1 != high):
        middle = _pick(low, high, guess, steps)
        count, mass = _count_and_mass(
            scores, weights, row_ptr, _value(middle), tiles_k, best, scale, segments, GROUPS, THREADS, WHOLE
        )
        enough = mass >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count_low = tl.where(enough, count, count_low)
        count_high = tl.where(enough, count_high, count)
        mass_low = tl.where(enough, mass, mass_low)
        mass_high = tl.where(enough, mass_high, mass)
        below = _value(low)
        span = _value(high) - below
        part = (mass_low - target).to(tl.float32) / (mass_low - mass_high).to(tl.float32)
        margin = 0.5 / (count_low - count_high)
        inner = below + span * tl.minimum(tl.maximum(part, margin), 1.0 - margin)
        outer = _value(middle) + tl.where(enough, reach, -reach)
        guess = tl.where(tl.abs(span) < _INF, inner, outer)
        reach *= 2.0
        steps += 1
    # Of those between, as many as the mass still needs; their weights are equal.
    between = tl.maximum((count_low - count_high).to(tl.int64), 1)
    weight = tl.maximum((mass_low - mass_high) // between, 1)
    needed = count_high.to(tl.int64) + (target - mass_high + weight - 1) // weight
    return low, high, count_high, tl.minimum(tl.maximum(needed, 1), tiles_k).to(tl.float32)


@triton.jit
def _store_list(list_ptr, slot, chosen, segment, g, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """Append the chosen columns of a group to the list, from `slot` [THREADS] on; returns the slots behind them."""
    one = chosen.to(tl.int32)
    target = list_ptr + (slot[:, None] + tl.cumsum(one, 1) - one)
    tl.store(target, _columns(segment, g, GROUPS, THREADS), mask=chosen)
    return slot + tl.sum(one, 1)


@triton.jit
def _list_reached(scores, high, list_ptr, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """List the columns of the scores that reach `high`."""
    total = tl.zeros([THREADS], tl.int32)
    for g in tl.static_range(GROUPS):
        total += tl.sum((scores[g] >= high).to(tl.int32), 1)
    slot = tl.cumsum(total, 0) - total
    for g in tl.static_range(GROUPS):
        slot = _store_list(list_ptr, slot, scores[g] >= high, 0, g, GROUPS, THREADS)


@triton.jit
def _list_with_ties(row_ptr, low, high, ties, list_ptr, segments, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """List the columns of the scores that reach `high`, and the first `ties` of those that reach only `low`.

    Reads the row again, group by group: this path is rare, and the common one needs the registers.
    """
    written = tl.full([], 0, tl.int32)
    for segment in range(0, segments):
        first = segment * GROUPS
        total = tl.zeros([THREADS], tl.int32)
        tied = tl.zeros([THREADS], tl.int32)
        for g in range(0, GROUPS):
            score = _load_group(row_ptr, first + g, THREADS)
            total += tl.sum((score >= high).to(tl.int32), 1)
            tied += tl.sum(((score >= low) ^ (score >= high)).to(tl.int32), 1)
        rank = tl.cumsum(tied, 0) - tied  # ties before those of a thread
        taken = tl.minimum(tl.maximum(ties - rank, 0), tied)
        total += taken
        slot = written + tl.cumsum(total, 0) - total
        for g in range(0, GROUPS):
            score = _load_group(row_ptr, first + g, THREADS)
            tie = ((score >= low) ^ (score >= high)).to(tl.int32)  # `high` is NaN if it is still above infinity
            early = (tie == 1) & (rank[:, None] + tl.cumsum(tie, 1) <= ties)
            rank += tl.sum(tie, 1)
            slot = _store_list(list_ptr, slot, (score >= high) | early, segment, g, GROUPS, THREADS)
        written += tl.sum(total, 0)
        ties -= tl.sum(taken, 0)


@triton.jit(do_not_specialize=["first_list", "first_row", "tiles_k", "count", "mass"])
def _choose(
    scores_ptr,
    counts_ptr,
    lists_ptr,
    first_list,
    first_row,
    rows,
    tiles_q,
    tiles_k,
    capacity,
    count,
    count_z,
    count_reach,
    mass,
    mass_z,
    scale,
    segments,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write the list of one query tile: the `count` best keys, or more if `mass` (in units of 2**-30) needs more."""
    local = tl.program_id(0)
    row_ptr = scores_ptr + local.to(tl.int64) * (4 * GROUPS * THREADS * segments)
    output = (first_list + local // rows).to(tl.int64) * tiles_q + first_row + local % rows
    scores = _load_segment(row_ptr, 0, GROUPS, THREADS)
    mean, deviation = _mean_and_deviation(scores, GROUPS, THREADS)
    low = _ordered(tl.full([], float("-inf"), tl.float32))
    high = _ordered(tl.full([], _INF, tl.float32)) + 1
    count_high = tl.full([], 0.0, tl.float32)
    wanted = tl.full([], 0.0, tl.float32)
    if BY_MASS:
        best = _best_logit(scores, row_ptr, tiles_k, scale, segments, GROUPS, THREADS, WHOLE)
        weights = ()
        if WHOLE:
            for g in tl.static_range(GROUPS):
                weight = _weight(scores[g], _columns(0, g, GROUPS, THREADS), tiles_k, best, scale)
                weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        _, everything = _count_and_mass(
            scores, weights, row_ptr, _value(low), tiles_k, best, scale, segments, GROUPS, THREADS, WHOLE
        )
        target = (everything.to(tl.float64) * mass.to(tl.float64) * (1.0 / 2**30)).to(tl.int64)
        # The mass of normally distributed scores is distributed like them, around a mean that is higher.
        guess = mean + deviation * (deviation * scale + mass_z)
        low, high, count_high, wanted = _search_mass(
            scores, weights, row_ptr, tl.maximum(target, 1), everything, guess, deviation, tiles_k, best, scale,
            segments, GROUPS, THREADS, WHOLE,
        )  # fmt: skip
    if BY_COUNT:  # noqa: SIM102 (one of the two is known at compile time)
        if count > wanted:
            low, high, count_high = _search_count(
                scores, row_ptr, count.to(tl.float32), _ordered(tl.full([], float("-inf"), tl.float32)), high,
                tiles_k.to(tl.float32), count_high, mean + count_z * deviation, count_reach * deviation, segments,
                GROUPS, THREADS, WHOLE,
            )  # fmt: skip
            wanted = count.to(tl.float32)
    tl.store(counts_ptr + output, wanted.to(tl.int32))
    ties = (wanted - count_high).to(tl.int32)
    list_ptr = lists_ptr + output * capacity
    if WHOLE:
        if ties == 0:
            _list_reached(scores, _value(high), list_ptr, GROUPS, THREADS)
        else:
            _list_with_ties(row_ptr, _value(low), _value(high), ties, list_ptr, 1, GROUPS, THREADS)
    else:
        _list_with_ties(row_ptr, _value(low), _value(high), ties, list_ptr, segments, GROUPS, THREADS)


def select(
    q_pooled: Tensor,
    k_pooled: Tensor,
    count: int | None,
    cdf_threshold: float | None,
    scale: float,
    *,
    layout: RowLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose key tiles by score, by count, by softmax mass, or the larger set of the two.

    Args:
        q_pooled: [B, H, Nq, D] fp32.
        k_pooled: [B, Hkv, Nk, D] fp32, H a multiple of Hkv.
        count: Number of best scores to choose, 1..Nk; or None.
        cdf_threshold: The fewest best scores whose softmax(score * scale) mass reaches it, in (0, 1]; 1 chooses all; or
            None.
        layout: Layout of the score rows, by default that of `config.row_layout` (for tests).

    Returns:
        kv_num_blocks [B, H, Nq] int32 and kv_indices [B, H, Nq, Kmax] int32, ascending and left-packed; Kmax is
        `count`, or Nk when there is a `cdf_threshold`. What lies beyond a row's count is not written. Equal scores go
        to the lower index; NaN counts as -inf.

    Memory: the scores (SCRATCH_BYTES at most) and the split operands (4 bytes an element of the pooled tensors) are
    freed on return. The whole op allocates its output after that, so its peak is that of the larger phase: pooled
    tensors, operands, scores and lists, or output, LSE, lists and what `attend` needs. At 24x44x80 tokens, 8 heads,
    bf16 that is 11 + 11 + 34 + 4 MB against 173 + 3 + 4 + 4: only the lists and their load programs, 7 MB and the LSE,
    stand beside the output.
    """
    batch, heads, tiles_q, _ = q_pooled.shape
    tiles_k = k_pooled.shape[2]
    device = q_pooled.device
    capacity = tiles_k if cdf_threshold is not None else min(count or 0, tiles_k)
    if cdf_threshold is not None and cdf_threshold >= 1.0:
        count, cdf_threshold = tiles_k, None
    # Slightly less than asked for (by about 1e-9), so that masses that are equal but for rounding reach it.
    mass = 0 if cdf_threshold is None else max(1, round((cdf_threshold - 1e-9) * 2**MASS_BITS))
    kv_num_blocks = torch.empty(batch, heads, tiles_q, dtype=torch.int32, device=device)
    kv_indices = torch.empty(batch, heads, tiles_q, capacity, dtype=torch.int32, device=device)
    if not kv_indices.numel():
        return kv_num_blocks.zero_(), kv_indices

    count_z, count_reach = _tail(min(count or 1, tiles_k) / tiles_k)
    mass_z, _ = _tail(1.0 if cdf_threshold is None else cdf_threshold)
    layout = layout or config.row_layout(tiles_k)
    scorer = Scorer(q_pooled.contiguous(), k_pooled.contiguous(), layout)
    # The scratch holds whole (batch, head) pairs, or some rows of one of them.
    pairs = batch * heads
    rows = max(1, min(tiles_q, SCRATCH_BYTES // (4 * layout.width)))
    pairs_at_once = max(1, min(pairs, SCRATCH_BYTES // (4 * layout.width * rows))) if rows == tiles_q else 1
    scores = torch.empty(pairs_at_once * rows * layout.width, dtype=torch.float32, device=device)
    for first_list in range(0, pairs, pairs_at_once):
        these = min(pairs_at_once, pairs - first_list)
        for first_row in range(0, tiles_q, rows):
            some = min(rows, tiles_q - first_row)
            scorer(scores, first_list, these, first_row, some)
            _choose[(these * some,)](
                scores, kv_num_blocks, kv_indices, first_list, first_row, some, tiles_q, tiles_k, capacity,
                min(count or 1, tiles_k), count_z, count_reach, mass, mass_z, float(scale), layout.segments,
                BY_COUNT=count is not None, BY_MASS=cdf_threshold is not None,
                GROUPS=layout.groups, THREADS=layout.threads, WHOLE=layout.segments == 1,
                num_warps=layout.threads // 32,
            )  # fmt: skip
    return kv_num_blocks, kv_indices


def _tail(part: float) -> tuple[float, float]:
    """Where the upper `part` of a standard normal distribution begins, and how far off a part twice as large does."""
    normal = NormalDist()
    part = min(max(part, 1e-6), 1 - 1e-6)
    z = normal.inv_cdf(1 - part)
    return z, math.log(2) * part / normal.pdf(z)
