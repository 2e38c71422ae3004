"""Mean of each tile's tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.launch import common_alignment, needs_mask
from bsa_compile.kernels.tiles import head_pointer, load_rows, parts, tile_origin, tile_tokens


@triton.jit
def _pool(
    x_ptr,
    pooled_ptr,
    strides,
    heads,
    tiles,
    grid,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Mean of one tile of one head: pooled [B * H, tiles, HEAD_DIM]."""
    pair = tl.program_id(0) // tiles  # (batch, head)
    tile = tl.program_id(0) % tiles
    x_ptr = head_pointer(x_ptr, strides, pair // heads, pair % heads, ALIGN)
    total = tl.zeros([BLOCK_D], tl.float32)
    for part in range(0, parts(TILE, BLOCK)):
        position = part * BLOCK + tl.arange(0, BLOCK)
        origin, offset, valid = tile_tokens(tile, position, grid, TILE, TILED)
        rows = load_rows(x_ptr, strides[2], origin, offset, valid, MASKED, HEAD_DIM, BLOCK_D, ALIGN)
        total += tl.sum(rows.to(tl.float32), 0)
    t, h, w = tile_origin(tile, grid, TILE)
    count = tl.minimum(TILE[0], grid[0] - t) * tl.minimum(TILE[1], grid[1] - h) * tl.minimum(TILE[2], grid[2] - w)
    column = tl.arange(0, BLOCK_D)
    target = pooled_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + column
    tl.store(target, total / count.to(tl.float32), mask=column < HEAD_DIM)


def pool(x: Tensor, grid: Triple, tile: Triple, layout: str = "raster") -> Tensor:
    """Mean over the tokens of each tile, summed in fp32.

    Args:
        x: [B, H, S, D], any strides with a unit last one.
        layout: Order of the token axis: "raster", or "tile" (padded tile order, S = N * volume; padding is not read).

    Returns:
        [B, H, N, D] fp32, contiguous.
    """
    batch, heads, _, head_dim = x.shape
    tiles = config.num_tiles(grid, tile)
    pooled = torch.empty(batch, heads, tiles, head_dim, dtype=torch.float32, device=x.device)
    block, warps = config.pool_launch(config.volume(tile), head_dim * x.element_size())
    if pooled.numel():
        _pool[(batch * heads * tiles,)](
            x, pooled, x.stride()[:3], heads, tiles, tuple(grid),
            TILE=tuple(tile),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, config.next_power_of_two(head_dim)),
            ALIGN=common_alignment(x),
            BLOCK=block,
            TILED=layout == "tile",
            MASKED=needs_mask(grid, tile, block),
            num_warps=warps,
        )  # fmt: skip
    return pooled
