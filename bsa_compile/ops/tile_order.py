"""Between raster order and tile order, for libraries whose blocks are contiguous tokens.

Each way is one copy. Whole tiles only: a partial tile has no contiguous block of its own size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..grid import tile_counts


def blocks_of(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str, heads_first: bool) -> Tensor:
    """Tokens in tile order, contiguous.

    Args:
        x: `[B, H, S, D]` over whole tiles, any strides.
        grid: `(T, H, W)`.
        tile: `(tt, th, tw)`, which divides the grid.
        layout: order of x's tokens, `raster` or `tile`.
        heads_first: whether the result is `[B, H, S, D]`, else `[B, S, H, D]`.
    """
    if layout == "tile":
        return (x if heads_first else x.transpose(1, 2)).contiguous()
    split = x.unflatten(2, _split(grid, tile))  # [B, H, nt, tt, nh, th, nw, tw, D], a view
    order = (2, 4, 6, 3, 5, 7)
    if heads_first:
        return split.permute(0, 1, *order, 8).reshape(x.shape)
    return split.permute(0, *order, 1, 8).reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])


def tokens_of(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str, heads_first: bool) -> Tensor:
    """Inverse of `blocks_of`: `[B, H, S, D]` with the memory order of a contiguous `[B, S, H, D]`."""
    if heads_first:
        x = x.transpose(1, 2)  # [B, S, H, D]
    if layout == "tile":
        return x.contiguous().transpose(1, 2)
    counts = tile_counts(grid, tile)
    split = x.unflatten(1, (*counts, *tile))  # [B, nt, nh, nw, tt, th, tw, H, D]
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).reshape(x.shape).transpose(1, 2)


def lse_blocks(lse: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str) -> Tensor:
    """`[B, H, S]` in tile order, contiguous."""
    return blocks_of(lse[..., None], grid, tile, layout, heads_first=True)[..., 0].contiguous()


def lse_tokens(lse: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str) -> Tensor:
    """`[B, H, S]` back from tile order."""
    if layout == "tile":
        return lse
    split = lse.unflatten(2, (*tile_counts(grid, tile), *tile))
    return split.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(lse.shape)


def _split(grid: Sequence[int], tile: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for pair in zip(tile_counts(grid, tile), tile, strict=True) for n in pair)
