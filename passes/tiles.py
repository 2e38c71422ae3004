"""Nodes that bring tokens from raster order into tiles and back: views around one copy, which a compiler can fuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import fx

from ..grid import tile_counts

_aten = torch.ops.aten
Insert: TypeAlias = Callable[..., fx.Node]


def enter(call: Insert, x: fx.Node, grid: Sequence[int], tile: Sequence[int]) -> fx.Node:
    """From raster order into padded tile order::

        raster     [B, H, T*H*W, D]
        unflatten  [B, H, T, H, W, D]
        pad        [B, H, nt*tt, nh*th, nw*tw, D]        only where a tile does not divide the grid
        unflatten  [B, H, nt, tt, nh, th, nw, tw, D]
        permute    [B, H, nt, nh, nw, tt, th, tw, D]
        flatten    [B, H, N*V, D]                        the copy

    Args:
        call: inserts a call of an operator.
        x: the `[B, H, S, D]` node.
        grid, tile: sizes.
    """
    counts = tile_counts(grid, tile)
    x = call(_aten.unflatten.int, x, 2, list(grid))
    t, h, w = (n * s - g for n, s, g in zip(counts, tile, grid, strict=True))
    if t or h or w:
        x = call(_aten.constant_pad_nd.default, x, [0, 0, 0, w, 0, h, 0, t])
    for axis in (2, 1, 0):
        x = call(_aten.unflatten.int, x, 2 + axis, [counts[axis], tile[axis]])
    x = call(_aten.permute.default, x, [0, 1, 2, 4, 6, 3, 5, 7, 8])
    return call(_aten.flatten.using_ints, x, 2, 7)


def leave(call: Insert, x: fx.Node, grid: Sequence[int], tile: Sequence[int]) -> fx.Node:
    """Back into raster order, without the padding."""
    counts = tile_counts(grid, tile)
    x = call(_aten.unflatten.int, x, 2, [*counts, *tile])
    x = call(_aten.permute.default, x, [0, 1, 2, 5, 3, 6, 4, 7, 8])
    for axis in (2, 1, 0):
        x = call(_aten.flatten.using_ints, x, 2 + 2 * axis, 3 + 2 * axis)
    for axis, (n, s, g) in enumerate(zip(counts, tile, grid, strict=True)):
        if n * s != g:
            x = call(_aten.slice.Tensor, x, 2 + axis, 0, g)
    return call(_aten.flatten.using_ints, x, 2, 4)
