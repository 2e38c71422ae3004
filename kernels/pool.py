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
    tiles_at_once,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Means of `tiles_at_once` neighbouring tiles of one head: what does not depend on the tile is computed once."""
    programs = tl.cdiv(tiles, tiles_at_once)
    pair = tl.program_id(0) // programs  # (batch, head)
    first = tl.program_id(0) % programs * tiles_at_once
    x_ptr = head_pointer(x_ptr, strides, pair // heads, pair % heads, ALIGN)
    column = tl.arange(0, BLOCK_D)
    pooled_ptr += pair.to(tl.int64) * tiles * HEAD_DIM
    for n in range(0, tl.minimum(tiles_at_once, tiles - first)):
        tile = first + n
        total = tl.zeros([BLOCK_D], tl.float32)
        for part in range(0, parts(TILE, BLOCK)):
            position = part * BLOCK + tl.arange(0, BLOCK)
            origin, offset, valid = tile_tokens(tile, position, grid, TILE, TILED)
            rows = load_rows(x_ptr, strides[2], origin, offset, valid, MASKED, HEAD_DIM, BLOCK_D, ALIGN)
            total += tl.sum(rows.to(tl.float32), 0)
        t, h, w = tile_origin(tile, grid, TILE)
        count = tl.minimum(TILE[0], grid[0] - t) * tl.minimum(TILE[1], grid[1] - h) * tl.minimum(TILE[2], grid[2] - w)
        mean = total / count.to(tl.float32)
        tl.store(pooled_ptr + tile.to(tl.int64) * HEAD_DIM + column, mean, mask=column < HEAD_DIM)


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
    launch = config.pool_launch(config.volume(tile))
    if pooled.numel():
        _pool[(batch * heads * triton.cdiv(tiles, launch.tiles_at_once),)](
            x, pooled, x.stride()[:3], heads, tiles, tuple(grid), launch.tiles_at_once,
            TILE=tuple(tile),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, config.next_power_of_two(head_dim)),
            ALIGN=common_alignment(x),
            BLOCK=launch.block,
            TILED=layout == "tile",
            MASKED=needs_mask(grid, tile, launch.block),
            num_warps=launch.num_warps,
        )  # fmt: skip
    return pooled
