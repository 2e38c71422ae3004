"""The backward of block-sparse attention for Hopper: row statistics, load programs, then dq, then dk with dv."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import BoxPlan, Triple
from bsa_compile.kernels.hopper_backward_k import backward_k
from bsa_compile.kernels.hopper_backward_q import backward_q
from bsa_compile.kernels.launch import common_alignment, empty_like_tokens
from bsa_compile.kernels.share import share_lists, share_transposed
from bsa_compile.kernels.tiles import head_pointer, load_rows, tile_tokens
from bsa_compile.kernels.transpose import transpose_selection


@triton.jit
def row_statistics_kernel(
    grad_ptr,
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    statistics_ptr,
    grad_strides,
    out_strides,
    grad_lse_strides,
    scale,
    heads,
    tiles,
    tokens,
    grid,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    SPLIT: tl.constexpr = TILE[0] * TILE[1] * TILE[2] // BLOCK
    pid = tl.program_id(0)
    tile = pid // SPLIT % tiles
    head = pid // SPLIT // tiles % heads
    batch = pid // SPLIT // tiles // heads
    row = tl.arange(0, BLOCK)
    origin, offset, valid = tile_tokens(tile, pid % SPLIT * BLOCK + row, grid, TILE, False)
    grad_ptr = head_pointer(grad_ptr, grad_strides, batch, head, ALIGN)
    out_ptr = head_pointer(out_ptr, out_strides, batch, head, ALIGN)
    grad = load_rows(grad_ptr, grad_strides[2], origin, offset, valid, MASKED, HEAD_DIM, HEAD_DIM, ALIGN)
    out = load_rows(out_ptr, out_strides[2], origin, offset, valid, MASKED, HEAD_DIM, HEAD_DIM, ALIGN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK]
    if HAS_GRAD_LSE:
        grad_lse_ptr = head_pointer(grad_lse_ptr, grad_lse_strides, batch, head, 1)
        token = (origin + offset) * grad_lse_strides[2]
        delta -= tl.load(grad_lse_ptr + token, mask=valid, other=0.0).to(tl.float32)
    lse_ptr += (batch * heads + head).to(tl.int64) * tokens
    lse = tl.load(lse_ptr + origin + offset, mask=valid, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    statistics_ptr += pid.to(tl.int64) * (2 * BLOCK)
    tl.store(statistics_ptr + row, -lse / scale)
    tl.store(statistics_ptr + BLOCK + row, -delta)


def row_statistics(
    grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, grid: Triple, tile: Triple, scale: float
) -> Tensor:
    """What the accumulators of S and dP can begin with: -lse / scale and -delta, delta = rowsum(dout * out) - dlse.

    Returns:
        [B, H, N, V / 64, 2, 64] fp32, for N tiles of V positions, in blocks of 64 rows. The first is -inf for rows
        without keys and positions without a token, which makes P zero.
    """
    batch, heads, tokens, head_dim = grad_out.shape
    tiles, rows = config.num_tiles(grid, tile), config.GLUON_ROWS
    split = config.volume(tile) // rows
    statistics = torch.empty(batch, heads, tiles, split, 2, rows, dtype=torch.float32, device=grad_out.device)
    programs = batch * heads * tiles * split
    if programs:
        row_statistics_kernel[(programs,)](
            grad_out, out, lse, grad_lse, statistics, grad_out.stride()[:3], out.stride()[:3],
            (0, 0, 0) if grad_lse is None else grad_lse.stride(), float(scale), heads, tiles, tokens, tuple(grid),
            TILE=tuple(tile), HEAD_DIM=head_dim, ALIGN=common_alignment(grad_out, out), BLOCK=rows,
            MASKED=not config.divides(grid, tile), HAS_GRAD_LSE=grad_lse is not None,
        )  # fmt: skip
    return statistics


def attend_backward_hopper(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    plans: tuple[BoxPlan, ...],
    *,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in raster order, for the calls that `config.plan_gluon_backward` accepts.

    Args:
        plans: How to read q, k, v and grad_out: the answer of `config.plan_gluon_backward`.
        programs: How many run at once; one per multiprocessor if None.
    """
    rows = config.GLUON_ROWS
    dq, dk, dv = empty_like_tokens(q), empty_like_tokens(k), empty_like_tokens(v)
    kv_num_blocks, kv_indices = kv_num_blocks.contiguous(), kv_indices.contiguous()
    statistics = row_statistics(grad_out, out, lse.contiguous(), grad_lse, grid_q, tile_q, scale)
    tail = (grid_q, tile_q, grid_k, tile_k, scale, plans, programs)

    lists = share_lists(kv_num_blocks, kv_indices, grid_k, tile_k, rows, 2 * rows // config.volume(tile_q), step=1)
    backward_q(q, k, v, grad_out, statistics, lists, dq, *tail)

    offsets, indices = transpose_selection(kv_num_blocks, kv_indices, config.num_tiles(grid_k, tile_k))
    members = 2 * rows // config.volume(tile_k)
    lists = share_transposed(offsets, indices, grid_q, tile_q, rows, members)
    backward_k(q, k, v, grad_out, statistics, lists, offsets, dk, dv, *tail)
    return dq, dk, dv
