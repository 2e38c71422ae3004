"""Gradients of the ops. `bsa::select` has none: the selection is held fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, must
from ..grid import from_tiles, valid_positions
from . import definitions


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.grid, ctx.tile, ctx.layout = inputs
    ctx.dtype = x.dtype


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    inside = valid_positions(ctx.grid, ctx.tile, grad.device)  # [N, V]
    shares = inside / inside.sum(-1, keepdim=True)
    tiles = (grad[..., None, :] * shares[..., None].to(grad.dtype)).to(ctx.dtype)  # [B, H, N, V, D]
    dx = tiles.flatten(2, 3) if ctx.layout == "tile" else from_tiles(tiles, ctx.grid, ctx.tile)
    return dx, None, None, None


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_num_blocks, kv_indices, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, kv_num_blocks, kv_indices)
    ctx.set_materialize_grads(False)


def _attend_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, kv_num_blocks, kv_indices = ctx.saved_tensors
    rest = (None,) * (2 + len(ctx.options))
    if grad_out is None and grad_lse is None:
        return None, None, None, *rest
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.bsa.attend_backward.default(
        grad_out, grad_lse, q, k, v, out, lse, kv_num_blocks, kv_indices, *ctx.options
    )
    return *grads, *rest


def _no_double_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    pass


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise UnsupportedError(
        must(
            "block-sparse attention",
            "be differentiated once only",
            "a second derivative",
            "Use dense attention where gradients of gradients are needed.",
        )
    )


definitions.pool.register_autograd(_pool_backward, setup_context=_pool_setup)
definitions.attend.register_autograd(_attend_backward, setup_context=_attend_setup)
definitions.attend_backward.register_autograd(_no_double_backward, setup_context=_no_double_setup)
