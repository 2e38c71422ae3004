"""Token grids and tiles: how a video's tokens are ordered and grouped.

Tokens of a `(T, H, W)` grid lie in raster order (w fastest). A tile `(tt, th, tw)` groups neighbours; where the
grid is not a multiple of the tile, the tiles at the far edges are partial. *Padded tile order* lists all tiles in
raster order and, inside each, all `tt * th * tw` positions in raster order, the ones beyond the grid included.

The functions take plain tuples and also work on symbolic sizes, so that they can run inside a traced graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GridError, must

Shape3 = tuple[int, int, int]


def as_shape3(name: str, value: Any) -> Shape3:
    """Check that `value` is three positive integers and return them as a tuple.

    Raises:
        GridError: `value` is anything else.
    """
    try:
        items = tuple(value)
    except TypeError:
        items = ()
    if len(items) != 3 or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) or v < 1 for v in items):
        raise GridError(must(name, "be three positive integers (t, h, w)", repr(value), "Give for example (4, 4, 4)."))
    return items


@dataclass(frozen=True)
class TokenGrid:
    """A grid of latent tokens in raster order.

    Attributes:
        t: latent frames.
        h: token rows (latent height / patch height).
        w: token columns.
    """

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        as_shape3("grid", (self.t, self.h, self.w))

    @classmethod
    def of(cls, value: TokenGrid | Sequence[int]) -> TokenGrid:
        """Accept a `TokenGrid` or three positive integers."""
        return value if isinstance(value, TokenGrid) else cls(*as_shape3("grid", value))

    @property
    def shape(self) -> Shape3:
        return (self.t, self.h, self.w)

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


def tile_counts(grid: Sequence[int], tile: Sequence[int]) -> Shape3:
    """Number of tiles along t, h, w, partial ones included."""
    t, h, w = ((g + s - 1) // s for g, s in zip(grid, tile, strict=True))
    return (t, h, w)


def num_tiles(grid: Sequence[int], tile: Sequence[int]) -> int:
    """Number of tiles of the grid, partial ones included."""
    nt, nh, nw = tile_counts(grid, tile)
    return nt * nh * nw


def tile_volume(tile: Sequence[int]) -> int:
    """Token positions in one full tile."""
    return tile[0] * tile[1] * tile[2]


def num_tokens(grid: Sequence[int]) -> int:
    """Tokens of the grid."""
    return grid[0] * grid[1] * grid[2]


def divides(tile: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether the grid has no partial tile."""
    return all(g % s == 0 for g, s in zip(grid, tile, strict=True))


def to_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int], pad_value: float = 0.0) -> Tensor:
    """Reorder tokens from raster order into tiles.

    Args:
        x: `[..., S, D]` with `S = T*H*W` in raster order.
        grid: `(T, H, W)`.
        tile: `(tt, th, tw)`.
        pad_value: what positions beyond the grid hold.

    Returns:
        `[..., N, V, D]`: N tiles of V positions.
    """
    lead, width = x.shape[:-2], x.shape[-1]
    counts = tile_counts(grid, tile)
    x = x.reshape(*lead, *grid, width)
    if not divides(tile, grid):
        pads = [n * s - g for n, s, g in zip(counts, tile, grid, strict=True)]
        x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]), value=pad_value)
    n = len(lead)
    x = x.reshape(*lead, counts[0], tile[0], counts[1], tile[1], counts[2], tile[2], width)
    x = x.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3, n + 5, n + 6)
    return x.reshape(*lead, counts[0] * counts[1] * counts[2], tile_volume(tile), width)


def from_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Inverse of `to_tiles`: `[..., N, V, D]` to `[..., S, D]`; positions beyond the grid are dropped."""
    lead, width = x.shape[:-3], x.shape[-1]
    counts = tile_counts(grid, tile)
    n = len(lead)
    x = x.reshape(*lead, *counts, *tile, width)
    x = x.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2, n + 5, n + 6)
    x = x.reshape(*lead, *(c * s for c, s in zip(counts, tile, strict=True)), width)
    x = x[..., : grid[0], : grid[1], : grid[2], :]
    return x.reshape(*lead, num_tokens(grid), width)


def valid_positions(grid: Sequence[int], tile: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """`[N, V]` bool: which positions of each tile lie inside the grid."""
    axes = []
    for g, s, n in zip(grid, tile, tile_counts(grid, tile), strict=True):
        axes.append((torch.arange(n * s, device=device) < g).reshape(n, s))
    t, h, w = axes
    inside = (
        t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    )  # [nt, nh, nw, tt, th, tw]
    return inside.reshape(num_tiles(grid, tile), tile_volume(tile))


def raster_indices(grid: Sequence[int], tile: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """`[N, V]` int64: the raster index of each position, -1 beyond the grid."""
    tokens = torch.arange(num_tokens(grid), device=device)[:, None]
    return to_tiles(tokens, grid, tile, pad_value=-1)[..., 0]
