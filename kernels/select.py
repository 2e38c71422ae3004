"""Choose the key tiles of each query tile from the pooled queries and keys.

Scores become int32 keys in the same order, so that the k-th best of a row is found by bisection on integers: exact,
independent of the order of summation, and safe for infinities. No sort. A NaN score counts as -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.tiles import LOG2_E

SCRATCH_BYTES = 256 * 2**20

_NO_KEY = tl.constexpr(-(2**31))  # below the key of every score
_FLIP = tl.constexpr(2**31 - 1)
_SIGN = tl.constexpr(2**31)
_UNIT = tl.constexpr(float(2**40))  # a softmax weight of 1 as an integer
MASS_BITS = 30


@triton.jit
def _to_keys(score):
    """int32 in the order of the fp32 scores; -0 equals 0 and NaN equals -inf."""
    score = tl.where(score == score, score, float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _FLIP, bits)


@triton.jit
def _to_logits(keys, scale):
    """Scores of `_to_keys`, times `scale`, in base 2; a missing key comes back as -inf."""
    score = tl.where(keys < 0, keys ^ _FLIP, keys).to(tl.float32, bitcast=True)
    return tl.where(keys == _NO_KEY, float("-inf"), score * (scale * LOG2_E))


@triton.jit
def _to_weights(keys, best, scale):
    """Softmax weights relative to the row's best logit, as integers in units of 2**-40: their sums are exact."""
    logits = _to_logits(keys, scale)
    weight = tl.where(logits >= best, 1.0, tl.exp2(logits - best))
    weight = tl.where((keys == _NO_KEY) | (weight != weight), 0.0, weight)
    return (weight * _UNIT).to(tl.int64)


@triton.jit(do_not_specialize=["first_list", "first_row"])
def _score(
    q_ptr,
    k_ptr,
    keys_ptr,
    first_list,
    first_row,
    rows,
    group,
    tiles_q,
    tiles_k,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys of the scores of query tiles first_row..first_row+rows for the (batch, head) pairs from first_list on."""
    blocks_k = tl.cdiv(tiles_k, BLOCK_K)
    blocks_q = tl.cdiv(rows, BLOCK_Q)
    pid = tl.program_id(0)
    block_k = pid % blocks_k
    block_q = pid // blocks_k % blocks_q
    local = pid // blocks_k // blocks_q
    pair = (first_list + local).to(tl.int64)  # (batch, head); those of one key head are neighbours
    row = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tile_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_D)
    q_row = pair * tiles_q + first_row + row
    k_row = (pair // group) * tiles_k + tile_k
    scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        inside = start + column < HEAD_DIM
        q = tl.load(
            q_ptr + (q_row * HEAD_DIM)[:, None] + start + column[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        k = tl.load(
            k_ptr + (k_row * HEAD_DIM)[:, None] + start + column[None, :],
            mask=(tile_k < tiles_k)[:, None] & inside[None, :],
            other=0.0,
        )
        # Three tf32 products are as exact as one in fp32 (measured: 2e-7 against 5e-7) and run on the tensor cores.
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    target = keys_ptr + ((local.to(tl.int64) * rows + row) * tiles_k)[:, None] + tile_k[None, :]
    tl.store(target, _to_keys(scores), mask=(row < rows)[:, None] & (tile_k < tiles_k)[None, :])


@triton.jit
def _load_keys(row_ptr, start, tiles_k, BLOCK: tl.constexpr):
    tile_k = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + tile_k, mask=tile_k < tiles_k, other=_NO_KEY)


@triton.jit
def _measure(
    keys,
    weights,
    row_ptr,
    threshold,
    best,
    scale,
    tiles_k,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Number, or weight, of the keys of a row that are >= threshold; `keys` and `weights` hold all of them if WHOLE."""
    if WHOLE:
        if WEIGHT:
            total = tl.sum(tl.where(keys >= threshold, weights, 0))
        else:
            total = tl.sum((keys >= threshold).to(tl.int32)).to(tl.int64)
    else:
        total = tl.full([], 0, tl.int64)
        for start in range(0, tiles_k, BLOCK):
            part = _load_keys(row_ptr, start, tiles_k, BLOCK)
            if WEIGHT:
                total += tl.sum(tl.where(part >= threshold, _to_weights(part, best, scale), 0))
            else:
                total += tl.sum((part >= threshold).to(tl.int32))
    return total


@triton.jit
def _bisect(
    keys, weights, row_ptr, target, best, scale, tiles_k, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """A threshold such that the keys >= it reach `target` and those > it do not, or the former number just `target`."""
    found = tl.full([], 0, tl.uint32)  # in offset binary, bit by bit from the highest
    bit = tl.full([], 1, tl.uint32) << 31
    while bit > 0:
        candidate = found | bit
        threshold = (candidate ^ _SIGN).to(tl.int32, bitcast=True)
        total = _measure(keys, weights, row_ptr, threshold, best, scale, tiles_k, WEIGHT, BLOCK, WHOLE)
        if total >= target:
            found = candidate
        # Equal numbers cannot be told apart further; equal weights may hide tiles of weight 0.
        done = (total == target) & (not WEIGHT)
        bit = tl.where(done, 0, bit >> 1)
    return (found ^ _SIGN).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["first_list", "first_row", "count", "mass"])
def _choose(
    keys_ptr,
    counts_ptr,
    lists_ptr,
    first_list,
    first_row,
    rows,
    tiles_q,
    tiles_k,
    capacity,
    count,
    mass,
    scale,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write the list of one query tile: the `count` best keys, or more if `mass` (in units of 2**-30) needs more."""
    local = tl.program_id(0)
    row_ptr = keys_ptr + local.to(tl.int64) * tiles_k
    output = (first_list + local // rows).to(tl.int64) * tiles_q + first_row + local % rows
    keys = _load_keys(row_ptr, 0, tiles_k, BLOCK)
    weights = keys.to(tl.int64)
    best = tl.max(_to_logits(keys, scale))
    wanted = count.to(tl.int64)
    if BY_MASS:
        if not WHOLE:
            for start in range(BLOCK, tiles_k, BLOCK):
                best = tl.maximum(best, tl.max(_to_logits(_load_keys(row_ptr, start, tiles_k, BLOCK), scale)))
        weights = _to_weights(keys, best, scale)
        everything = _measure(keys, weights, row_ptr, _NO_KEY + 1, best, scale, tiles_k, True, BLOCK, WHOLE)
        target = (everything.to(tl.float64) * mass.to(tl.float64) * (1.0 / 2**30)).to(tl.int64)
        target = tl.maximum(target, 1)
        last = _bisect(keys, weights, row_ptr, target, best, scale, tiles_k, True, BLOCK, WHOLE)
        # Of the tiles that tie at `last`, as many as the mass still needs.
        heavier = _measure(keys, weights, row_ptr, last + 1, best, scale, tiles_k, True, BLOCK, WHOLE)
        above = _measure(keys, weights, row_ptr, last + 1, best, scale, tiles_k, False, BLOCK, WHOLE)
        weight = tl.maximum(tl.max(_to_weights(tl.full([1], 0, tl.int32) + last, best, scale)), 1)
        needed = above + (target - heavier + weight - 1) // weight
        wanted = tl.maximum(wanted, tl.minimum(tl.maximum(needed, 1), tiles_k))
    last = _bisect(keys, weights, row_ptr, wanted, best, scale, tiles_k, False, BLOCK, WHOLE)
    surplus = _measure(keys, weights, row_ptr, last, best, scale, tiles_k, False, BLOCK, WHOLE) - wanted
    ties = wanted - _measure(keys, weights, row_ptr, last + 1, best, scale, tiles_k, False, BLOCK, WHOLE)

    tl.store(counts_ptr + output, wanted.to(tl.int32))
    lists_ptr += output * capacity
    ties_before = tl.full([], 0, tl.int32)
    written = tl.full([], 0, tl.int32)
    for start in range(0, tiles_k, BLOCK):
        if not WHOLE:
            keys = _load_keys(row_ptr, start, tiles_k, BLOCK)
        chosen = keys >= last
        if surplus > 0:  # of those equal to the last, only the first ones
            tie = (keys == last).to(tl.int32)
            chosen = (keys > last) | ((tie == 1) & (ties_before + tl.cumsum(tie, 0) <= ties))
            ties_before += tl.sum(tie)
        slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(lists_ptr + slot, start + tl.arange(0, BLOCK), mask=chosen)
        written += tl.sum(chosen.to(tl.int32))


def select(
    q_pooled: Tensor,
    k_pooled: Tensor,
    count: int | None,
    cdf_threshold: float | None,
    scale: float,
    *,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose key tiles by score, by count, by softmax mass, or the larger set of the two.

    Args:
        q_pooled: [B, H, Nq, D] fp32.
        k_pooled: [B, Hkv, Nk, D] fp32, H a multiple of Hkv.
        count: Number of best scores to choose, 1..Nk; or None.
        cdf_threshold: The fewest best scores whose softmax(score * scale) mass reaches it, in (0, 1]; 1 chooses all; or
            None.
        block: Columns of a row that are looked at at a time, a power of two (for tests).

    Returns:
        kv_num_blocks [B, H, Nq] int32 and kv_indices [B, H, Nq, Kmax] int32, ascending and left-packed; Kmax is
        `count`, or Nk when there is a `cdf_threshold`. What lies beyond a row's count is not written. Equal scores go
        to the lower index; NaN counts as -inf.
    """
    batch, heads, tiles_q, head_dim = q_pooled.shape
    heads_kv, tiles_k = k_pooled.shape[1:3]
    q_pooled, k_pooled = q_pooled.contiguous(), k_pooled.contiguous()
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

    launch = config.score_launch(head_dim)
    block = block or min(config.SELECT_BLOCK, config.next_power_of_two(tiles_k))
    # The scratch holds whole (batch, head) pairs, or some rows of one of them.
    pairs = batch * heads
    rows = max(1, min(tiles_q, SCRATCH_BYTES // (4 * tiles_k)))
    pairs_at_once = max(1, min(pairs, SCRATCH_BYTES // (4 * tiles_k * rows))) if rows == tiles_q else 1
    keys = torch.empty(pairs_at_once * rows * tiles_k, dtype=torch.int32, device=device)
    for first_list in range(0, pairs, pairs_at_once):
        these = min(pairs_at_once, pairs - first_list)
        for first_row in range(0, tiles_q, rows):
            some = min(rows, tiles_q - first_row)
            blocks = triton.cdiv(some, launch.block_q) * triton.cdiv(tiles_k, launch.block_k)
            _score[(these * blocks,)](
                q_pooled, k_pooled, keys, first_list, first_row, some, heads // heads_kv, tiles_q, tiles_k,
                HEAD_DIM=head_dim, BLOCK_Q=launch.block_q, BLOCK_K=launch.block_k,
                BLOCK_D=config.SCORE_BLOCK_D, PRECISION=config.score_precision(device),
                num_warps=launch.num_warps,
            )  # fmt: skip
            _choose[(these * some,)](
                keys, kv_num_blocks, kv_indices, first_list, first_row, some, tiles_q, tiles_k, capacity,
                min(count or 1, tiles_k), mass, float(scale),
                BY_MASS=cdf_threshold is not None, BLOCK=block, WHOLE=block >= tiles_k,
                num_warps=max(1, min(8, block // 1024)),
            )  # fmt: skip
    return kv_num_blocks, kv_indices
