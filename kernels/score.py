"""Scores of query tiles against key tiles, by fp16 tensor cores, as exact as one product in fp32.

A pooled row becomes two rows of fp16: the row times a power of two, rounded, and what the rounding left. Two of fp16's
11 bits of significand hold 22 to 23 of fp32's 24, and hi x hi + hi x lo + lo x hi leaves out only lo x lo, 2**-22 of
the product: the precision of three tf32 products at half their cost, and the operands need no conversion on their way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import RowLayout, ScoreLaunch

_SPLIT_ROWS = 16
_LARGEST = tl.constexpr(6)  # exponent of the largest element of a scaled row: far from fp16's limits on both sides


@triton.jit
def column_of(position, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """Column, within its segment, that lies at a position of a score row; see `config.RowLayout`."""
    return position // 4 % THREADS * (4 * GROUPS) + position // (4 * THREADS) * 4 + position % 4


@triton.jit
def quad_position(row):
    """Position within its 16 that a row of the tensor cores' product gets, where a thread's two pairs become one quad.

    A thread of theirs has columns 2 * t, 2 * t + 1, 8 + 2 * t and 9 + 2 * t of each 16, and thus positions 4 * t to
    4 * t + 3.
    """
    return row // 16 * 16 + row // 2 % 4 * 4 + row // 8 % 2 * 2 + row % 2


@triton.jit
def _split(
    q_ptr,
    k_ptr,
    parts_ptr,
    factors_ptr,
    rows_q,
    blocks_q,
    lists_k,
    tiles_k,
    width,
    part_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Write hi and lo of all query rows, then of all key rows in the order of a score row (with QUADS, see there).

    parts [2, rows, BLOCK_D] fp16, factors [rows] fp32: row = (hi + lo) * factor; the factor of padding is NaN.
    """
    pid = tl.program_id(0)
    target = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    if pid < blocks_q:
        x_ptr = q_ptr
        source = target
        valid = target < rows_q
    else:
        x_ptr = k_ptr
        row = target - blocks_q * ROWS
        position = row % width
        if QUADS:
            position = quad_position(position)
        segment = position // (4 * GROUPS * THREADS) * (4 * GROUPS * THREADS)
        tile = segment + column_of(position - segment, GROUPS, THREADS)
        source = row // width * tiles_k + tile
        valid = (tile < tiles_k) & (row // width < lists_k)
    x = tl.load(
        x_ptr + (source * HEAD_DIM)[:, None] + column[None, :],
        mask=valid[:, None] & (column < HEAD_DIM)[None, :],
        other=0.0,
    )
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 1)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.minimum(_LARGEST - exponent, 126)  # both 2**shift and 2**-shift are normal numbers
    x *= ((shift + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    hi = x.to(tl.float16)
    lo = tl.where(tl.abs(x) < float("inf"), x - hi.to(tl.float32), 0.0).to(tl.float16)
    offset = (target * BLOCK_D)[:, None] + column[None, :]
    tl.store(parts_ptr + offset, hi)
    tl.store(parts_ptr + part_stride + offset, lo)
    factor = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    tl.store(factors_ptr + target, tl.where(valid, factor, float("nan")))


@triton.jit(do_not_specialize=["first_list", "first_row", "blocks_at_once"])
def _score(
    parts_ptr,
    factors_ptr,
    scores_ptr,
    first_list,
    first_row,
    rows,
    group,
    tiles_q,
    first_k,
    width,
    part_stride,
    blocks_at_once,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of query tiles first_row..first_row+rows for the (batch, head) pairs from first_list on.

    A program takes BLOCK_Q query tiles and `blocks_at_once` blocks of BLOCK_K positions of their rows of `width`.
    """
    blocks_k = width // BLOCK_K
    programs_k = tl.cdiv(blocks_k, blocks_at_once)
    programs_q = tl.cdiv(rows, BLOCK_Q)
    pid = tl.program_id(0)
    first_block = pid % programs_k * blocks_at_once
    block_q = pid // programs_k % programs_q
    local = pid // programs_k // programs_q
    pair = (first_list + local).to(tl.int64)  # (batch, head); those of one key head are neighbours
    row = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, BLOCK_D)
    # Rows beyond the last are those of other heads, or of keys: they are read, and never written.
    q_row = pair * tiles_q + first_row + row
    q_offset = (q_row * BLOCK_D)[:, None] + column[None, :]
    q_hi = tl.load(parts_ptr + q_offset)
    q_lo = tl.load(parts_ptr + part_stride + q_offset)
    q_factor = tl.load(factors_ptr + q_row)
    target = scores_ptr + ((local.to(tl.int64) * rows + row) * width)[:, None]
    k_list = first_k + (pair // group) * width
    for block in tl.range(first_block, tl.minimum(first_block + blocks_at_once, blocks_k), num_stages=STAGES):
        position = block * BLOCK_K + tl.arange(0, BLOCK_K)
        k_offset = ((k_list + position) * BLOCK_D)[:, None] + column[None, :]
        k_hi = tl.load(parts_ptr + k_offset)
        k_lo = tl.load(parts_ptr + part_stride + k_offset)
        scores = tl.dot(q_lo, tl.trans(k_hi))
        scores = tl.dot(q_hi, tl.trans(k_lo), scores)
        # An infinity makes an infinity or NaN of any sign here; the product of the high parts alone is right then.
        scores = tl.where(tl.abs(scores) < float("inf"), scores, 0.0)
        scores = tl.dot(q_hi, tl.trans(k_hi), scores)
        scores *= q_factor[:, None] * tl.load(factors_ptr + k_list + position)[None, :]
        scores = tl.where(scores == scores, scores, float("-inf"))
        tl.store(target + position[None, :], scores, mask=(row < rows)[:, None])


class Scorer:
    """Computes any range of score rows of pooled queries and keys, after splitting them once.

    Args:
        q_pooled: [B, H, Nq, D] fp32, contiguous.
        k_pooled: [B, Hkv, Nk, D] fp32, contiguous, H a multiple of Hkv.
        layout: Order and width of the score rows.
        launch: Instead of the preset (for benchmarks and tests).
    """

    def __init__(
        self, q_pooled: Tensor, k_pooled: Tensor, layout: RowLayout, *, launch: ScoreLaunch | None = None
    ) -> None:
        batch, heads, self.tiles_q, head_dim = q_pooled.shape
        lists_k, tiles_k = batch * k_pooled.shape[1], k_pooled.shape[2]
        self.group = heads // k_pooled.shape[1]
        self.layout = layout
        self.launch = launch or config.score_launch(head_dim, q_pooled.device)
        self.block_d = max(16, config.next_power_of_two(head_dim))
        rows_q = batch * heads * self.tiles_q
        blocks_q = triton.cdiv(rows_q, _SPLIT_ROWS)
        self.first_k = blocks_q * _SPLIT_ROWS
        # `_score` reads whole blocks of queries: at least one block must follow the first query of the last one.
        blocks_k = triton.cdiv(max(lists_k * layout.width, self.launch.block_q), _SPLIT_ROWS)
        rows = (blocks_q + blocks_k) * _SPLIT_ROWS
        device = q_pooled.device
        self.parts = torch.empty(2, rows, self.block_d, dtype=torch.float16, device=device)
        self.factors = torch.empty(rows, dtype=torch.float32, device=device)
        _split[(blocks_q + blocks_k,)](
            q_pooled, k_pooled, self.parts, self.factors, rows_q, blocks_q, lists_k, tiles_k, layout.width,
            rows * self.block_d,
            HEAD_DIM=head_dim, BLOCK_D=self.block_d, GROUPS=layout.groups, THREADS=layout.threads, ROWS=_SPLIT_ROWS,
            QUADS=self.launch.gluon, num_warps=4,
        )  # fmt: skip

    def __call__(self, scores: Tensor, first_list: int, pairs: int, first_row: int, rows: int) -> None:
        """Write scores [pairs, rows, width] fp32, NaN as -inf and -inf in the padding.

        They are those of query tiles first_row..first_row+rows of the (batch, head) pairs first_list..first_list+pairs.
        """
        launch, width = self.launch, self.layout.width
        blocks_k = width // launch.block_k
        blocks_q = pairs * triton.cdiv(rows, launch.block_q)
        at_once = launch.at_once(blocks_q, blocks_k)
        programs = blocks_q * triton.cdiv(blocks_k, at_once)
        place = first_list, first_row, rows, self.group, self.tiles_q, self.first_k
        if launch.gluon:
            from bsa_compile.kernels import hopper_score  # Gluon is not in every Triton

            hopper_score._score_hopper[(programs,)](
                hopper_score.key_box(self.parts), self.parts, self.factors, scores, *place,
                self.parts.shape[1], width, at_once, SLOTS=launch.num_stages,
                num_warps=launch.num_warps, maxnreg=hopper_score.MAX_REGISTERS,
            )  # fmt: skip
            return
        _score[(programs,)](
            self.parts, self.factors, scores, *place, width, self.parts.stride(0), at_once,
            BLOCK_D=self.block_d, BLOCK_Q=launch.block_q, BLOCK_K=launch.block_k, STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )  # fmt: skip
