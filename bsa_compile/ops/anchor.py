"""The anchor: an attention that is dense until a pass lowers it, and that carries its token grid through tracing.

`bsa::attention` stays one node in Dynamo's and `torch.export`'s graphs. It is defined by what it is composed of
(`CompositeImplicitAutograd`), so that where no pass lowers it AOTAutograd sees plain scaled-dot-product attention.
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


_library.impl("attention", _dense, "CompositeImplicitAutograd")


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


def as_list(grid: TokenGrid | Sequence[int]) -> list[int]:
    """A grid or tile as an op takes it; the op checks it."""
    return list(grid.shape) if isinstance(grid, TokenGrid) else list(grid)
