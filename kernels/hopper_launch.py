"""What the launchers of the Hopper kernels share: descriptors, tile statistics, pair lists."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.tiles import head_pointer, load_rows, tile_tokens

ROWS, WIDTH = 64, 128
# Two consumer warpgroups and a padded warpgroup of producers share 65,536 registers: 168 a thread on entry, and
# `setmaxnreg` then gives 240 to the consumers and 24 to the producers.
ENTRY_REGISTERS, CONSUMER_REGISTERS = 168, 240


def describe(x: Tensor, grid: Triple, tile: Triple, layout: str = "raster") -> tuple[TensorDescriptor, int]:
    """Descriptor of the tiles of `x` [B, H, S, D], and how it is addressed (`ACCESS`).

    Raises:
        ValueError: the tiles of `x` are no boxes; `config.plan_boxes` says why.
    """
    plan = config.plan_boxes(x, grid, tile, layout, ROWS)
    if isinstance(plan, str):
        raise ValueError(plan)
    shared = NVMMASharedLayout(128, 16, len(plan.block))
    return TensorDescriptor(x, list(plan.shape), list(plan.strides), list(plan.block), shared), plan.access


def programs_on(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def common_arguments(tile: Triple, grid: Triple) -> dict[str, Any]:
    counts = config.tile_counts(grid, tile)
    return {
        "tiles": config.num_tiles(grid, tile),
        "tiles_h": counts[1],
        "tiles_w": counts[2],
        "TILE": tuple(tile),
    }


@triton.jit
def _statistics_kernel(
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
    HAS_GRAD_LSE: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    batch = pid // tiles // heads
    row = tl.arange(0, BLOCK)
    origin, offset, valid = tile_tokens(tile, row, grid, TILE, False)
    grad_ptr = head_pointer(grad_ptr, grad_strides, batch, head, ALIGN)
    out_ptr = head_pointer(out_ptr, out_strides, batch, head, ALIGN)
    grad = load_rows(grad_ptr, grad_strides[2], origin, offset, valid, True, HEAD_DIM, HEAD_DIM, ALIGN)
    out = load_rows(out_ptr, out_strides[2], origin, offset, valid, True, HEAD_DIM, HEAD_DIM, ALIGN)
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


def tile_statistics(
    grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, grid: Triple, tile: Triple, scale: float
) -> Tensor:
    """[B*H, N, 2, 64] fp32: -lse / scale (-inf for a row without keys) and -delta of the rows of each tile.

    delta = rowsum(dout * out) - dlse. These are what the accumulators of S and dP can begin with.
    """
    batch, heads, tokens, head_dim = grad_out.shape
    tiles = config.num_tiles(grid, tile)
    statistics = torch.empty(batch * heads, tiles, 2, ROWS, dtype=torch.float32, device=grad_out.device)
    _statistics_kernel[(batch * heads * tiles,)](
        grad_out, out, lse, grad_lse, statistics, grad_out.stride()[:3], out.stride()[:3],
        (0, 0, 0) if grad_lse is None else grad_lse.stride(), float(scale), heads, tiles, tokens, tuple(grid),
        TILE=tuple(tile), HEAD_DIM=head_dim, ALIGN=8, BLOCK=ROWS, HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip
    return statistics
