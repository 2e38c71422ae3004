"""The anchors: attention that is dense until a pass lowers it, and that carries its token grid through tracing.

`bsa::attention`, and `bsa::ring_attention` for tokens that the members of a ring share, stay one node in Dynamo's and
`torch.export`'s graphs. They are defined by what they are composed of (`CompositeImplicitAutograd`), so that where no
pass lowers them AOTAutograd sees plain scaled-dot-product attention, or the dense form of the ring's op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import TokenGrid
from .validate import check_anchor

_library = torch.library.Library("bsa", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, SymInt[] grid_q, SymInt[] grid_k, str role='self', float? scale=None)"
    " -> Tensor"
)
_library.define(
    "ring_attention(Tensor q, Tensor k, Tensor v, SymInt[] grid_q, SymInt[] grid_k, SymInt axis, SymInt[] bounds,"
    " SymInt index, str group, str role='self', float? scale=None) -> Tensor"
)
_DENSE_TILE = [4, 4, 4]  # any: all tiles are attended to


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    role: str = "self",
    scale: float | None = None,
) -> Tensor:
    check_anchor(q, k, v, grid_q, grid_k, role, scale)
    grouped = bool(q.shape[1] != k.shape[1])  # the heads may be symbolic
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)


def _dense_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    axis: int,
    bounds: Sequence[int],
    index: int,
    group: str,
    role: str = "self",
    scale: float | None = None,
) -> Tensor:
    grids = (grid_q, _DENSE_TILE, grid_k, _DENSE_TILE)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ring = (axis, bounds, index, group)
    return torch.ops.bsa.ring_attend.default(q, k, v, None, None, *grids, *ring, scale)[0]


_library.impl("attention", _dense, "CompositeImplicitAutograd")
_library.impl("ring_attention", _dense_ring, "CompositeImplicitAutograd")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_q: TokenGrid | Sequence[int],
    grid_k: TokenGrid | Sequence[int] | None = None,
    role: str = "self",
    scale: float | None = None,
) -> Tensor:
    """Dense attention over a known token grid, for a pass to make block-sparse.

    Args:
        q: `[B, H, Sq, D]`, tokens in raster order of `grid_q`.
        k, v: `[B, Hkv, Sk, D]`, tokens in raster order of `grid_k`; H a multiple of Hkv.
        grid_q: `(T, H, W)` of the queries.
        grid_k: that of the keys; `grid_q` where not given.
        role: what the attention is in its model: `self`, `cond`, `noise` or `cached`.
        scale: factor of the scores, by default `D ** -0.5`.

    Returns:
        `[B, H, Sq, D]`.

    Raises:
        GridError: a grid is malformed or does not hold as many tokens as its tensor.
        InputError: shapes, devices or the role do not fit.
    """
    grid_q = as_list(grid_q)
    return torch.ops.bsa.attention.default(q, k, v, grid_q, grid_q if grid_k is None else as_list(grid_k), role, scale)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    axis: int,
    bounds: Sequence[int],
    index: int,
    group: str,
    role: str = "self",
    scale: float | None = None,
) -> Tensor:
    """`attention` of tokens that are cut along one axis among the members of a ring.

    Args:
        q: `[B, H, Sq, D]`, this member's part of `grid_q` in raster order; it may be empty.
        k, v: `[B, Hkv, Sk, D]`, this member's part of `grid_k`.
        grid_q, grid_k: (T, H, W) of all queries and keys.
        axis: that is cut, 1 for H or 2 for W.
        bounds: where each member's part begins along it, and the end.
        index: which member this process is.
        group: name of the process group; all members call together.
        role, scale: as in `attention`.

    Returns:
        `[B, H, Sq, D]`.
    """
    ring = (axis, list(bounds), index, group)
    return torch.ops.bsa.ring_attention.default(q, k, v, list(grid_q), list(grid_k), *ring, role, scale)


def as_list(grid: TokenGrid | Sequence[int]) -> list[int]:
    """A grid or tile as an op takes it; the op checks it."""
    return list(grid.shape) if isinstance(grid, TokenGrid) else list(grid)
