"""What a caller can say around a call: the denoising step, and the token grid.

`step` is read by `optimize`d models before they enter compiled code, so that every step finds the code of its own
policy. `latent_grid` is read by the traced code itself, so that Dynamo guards on the three numbers: a ContextVar read
while compiling would be baked in and never looked at again. `optimize`d models read it as well before they enter
compiled code, because Dynamo does not show it to what activation checkpointing hides in a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .errors import PolicyError, must
from .grid import TokenGrid
from .policy import Step

_STEP: ContextVar[Step | None] = ContextVar("bsa_compile_step", default=None)


@contextmanager
def step(index: int, total: int | None = None) -> Iterator[None]:
    """Say which denoising step runs inside the block, for `dense_steps` and rules with `steps`.

    Args:
        index: 0 for the first step; a Python int, never a tensor.
        total: number of steps, where known.

    Raises:
        PolicyError: `index` is no integer >= 0, or not below `total`.
    """
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise PolicyError(must("step index", "be an integer >= 0", repr(index)))
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total <= index):
        raise PolicyError(must("step total", f"be an integer > {index}", repr(total)))
    token = _STEP.set(Step(index, total))
    try:
        yield
    finally:
        _STEP.reset(token)


def current_step() -> Step | None:
    """The step of the innermost `step` block, or None."""
    return _STEP.get()


def _plain_attention_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | None] | None:
    """q, k, v and scale of a `scaled_dot_product_attention` call without mask, causality or dropout, else None."""
    if attn_mask is not None or is_causal or dropout_p != 0.0:
        return None
    return query, key, value, scale


def current_grid() -> TokenGrid | None:
    """The grid of the innermost `latent_grid` block, or None."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, latent_grid):
            return TokenGrid(mode.t, mode.h, mode.w)
    return None


class latent_grid(TorchFunctionMode):
    """Say the token grid of the video inside the block: `with latent_grid(t, h, w): model(...)`.

    Every plain scaled-dot-product attention inside the block is traced as the anchor op `bsa::attention` with role
    `auto`; the pass then rewrites self-attention and leaves cross-attention alone. Compiled code is guarded on the
    three numbers. Without a pass the result is the dense one.

    Args:
        t, h, w: latent frames, token rows and token columns.

    Raises:
        GridError: not three positive integers.
    """

    def __init__(self, t: int, h: int, w: int) -> None:
        grid = TokenGrid(t, h, w)
        super().__init__()
        self.t, self.h, self.w = grid.shape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            plain = _plain_attention_arguments(*args, **kwargs)
            if plain is not None and plain[0].dim() == 4:
                query, key, value, scale = plain
                grid = [self.t, self.h, self.w]
                return torch.ops.bsa.attention(query, key, value, grid, grid, "auto", scale)
        return func(*args, **kwargs)
