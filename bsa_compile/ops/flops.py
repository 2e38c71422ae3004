"""Flop formulas for `torch.utils.flop_counter`, which counts matrix products only: a multiply-add is two flops.

What is counted is the work on selected tiles. Where data decides how many there are (`cdf_threshold`), the count is the
upper bound of a row that selects all Kmax = Nk tiles.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ..grid import num_tiles, num_tokens, tile_volume
from . import definitions, ring  # noqa: F401  (they define the ops)

Shape = Sequence[int]

_FLOP_COUNTER = "torch.utils.flop_counter"


def pool_flops(x: Shape, *args: Any, **kwargs: Any) -> int:
    """No matrix product."""
    return 0


def select_flops(q_pooled: Shape, k_pooled: Shape, *args: Any, **kwargs: Any) -> int:
    """The scores of all pairs of tiles."""
    batch, heads, num_q, width = q_pooled
    return 2 * batch * heads * num_q * k_pooled[2] * width


def attend_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    kv_num_blocks: Shape,
    kv_indices: Shape,
    grid_q: Shape,
    tile_q: Shape,
    grid_k: Shape,
    tile_k: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    """QK^T and PV of every query with Kmax tiles of keys, no more keys than there are."""
    batch, heads, _, width = q
    keys = min(kv_indices[3] * tile_volume(tile_k), num_tokens(grid_k))
    return 4 * batch * heads * num_tokens(grid_q) * keys * width


def attend_backward_flops(
    grad_out: Shape, grad_lse: Shape | None, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, *args: Any, **kw: Any
) -> int:
    """Five matrix products where the forward has two."""
    return attend_flops(q, k, v, *args, **kw) * 5 // 2


def ring_select_flops(
    q: Shape, k: Shape, grid_q: Shape, tile_q: Shape, grid_k: Shape, tile_k: Shape, *args: Any, **kwargs: Any
) -> int:
    """The scores of this member's query tiles and all key tiles."""
    batch, heads, tokens, width = q
    num_q = -(-tokens // tile_volume(tile_q))
    return 2 * batch * heads * num_q * num_tiles(grid_k, tile_k) * width


def ring_attend_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    kv_num_blocks: Shape | None,
    kv_indices: Shape | None,
    grid_q: Shape,
    tile_q: Shape,
    grid_k: Shape,
    tile_k: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    """As `attend_flops`, of this member's queries; without lists they attend to all keys."""
    batch, heads, tokens, width = q
    keys = num_tokens(grid_k)
    if kv_indices is not None:
        keys = min(kv_indices[3] * tile_volume(tile_k), keys)
    return 4 * batch * heads * tokens * keys * width


def ring_attend_backward_flops(
    grad_out: Shape, grad_lse: Shape | None, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, *args: Any, **kw: Any
) -> int:
    """Five matrix products where the forward has two."""
    return ring_attend_flops(q, k, v, *args, **kw) * 5 // 2


FORMULAS = {
    torch.ops.bsa.ring_select: ring_select_flops,
    torch.ops.bsa.ring_attend: ring_attend_flops,
    torch.ops.bsa.ring_attend_backward: ring_attend_backward_flops,
    torch.ops.bsa.pool: pool_flops,
    torch.ops.bsa.select: select_flops,
    torch.ops.bsa.attend: attend_flops,
    torch.ops.bsa.attend_backward: attend_backward_flops,
}


def _register(flop_counter: ModuleType) -> None:
    for op, formula in FORMULAS.items():
        flop_counter.register_flop_formula(op)(formula)


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when the flop counter is imported.

    Importing it ourselves would import Triton, and log a warning where that is missing.
    """

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _FLOP_COUNTER or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        # Asking for the spec is no import yet: Dynamo asks for those of many modules.
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        _register(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)


if _FLOP_COUNTER in sys.modules:
    _register(sys.modules[_FLOP_COUNTER])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
