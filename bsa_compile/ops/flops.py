"""Flop formulas for `torch.utils.flop_counter`, which counts matrix products only: a multiply-add is two flops.

What is counted is the work on selected tiles. Where data decides how many there are (`cdf_threshold`), the count is the
upper bound of a row that selects all Kmax = Nk tiles.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ..grid import num_tokens, tile_volume

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


def _register(flop_counter: ModuleType) -> None:
    formulas = {
        torch.ops.bsa.pool: pool_flops,
        torch.ops.bsa.select: select_flops,
        torch.ops.bsa.attend: attend_flops,
        torch.ops.bsa.attend_backward: attend_backward_flops,
    }
    for op, formula in formulas.items():
        flop_counter.register_flop_formula(op)(formula)


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when the flop counter is imported.

    Importing it ourselves would import Triton, which whoever imports this package may not want or have.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _FLOP_COUNTER in sys.modules:
    _register(sys.modules[_FLOP_COUNTER])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
