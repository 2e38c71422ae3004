"""Keeps the memory order of an attention's output where what follows relies on it.

`out.view(...)` works on the strides that the traced attention had; the block-sparse op always writes `[B, S, H, D]`.
Where a view could fail, or the tensor leaves the graph, the original order is restored by a copy; elsewhere that
would be waste.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .calls import call_of
from .modulepath import mode_of, value

_VIEWS = frozenset(
    {"transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem", "slice"}
) | {"select", "narrow", "chunk", "split", "unbind", "movedim", "t", "expand", "detach", "alias", "view_as"}
_READ_STRIDES = frozenset(
    {"as_strided", "stride", "is_contiguous", "data_ptr", "untyped_storage", "set", "view_as_complex"}
)


def order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Dimensions from slowest to fastest in memory; None where strides are symbolic beyond comparison."""
    dims = [d for d in range(tensor.dim()) if not _is_one(tensor.shape[d])]
    strides = [_hint(tensor.stride(d)) for d in dims]
    if any(s is None for s in strides):
        return None
    return tuple(d for _, d in sorted(zip(strides, dims, strict=True), key=lambda item: (-item[0], item[1])))  # type: ignore


def relied_upon(node: fx.Node, new: torch.Tensor) -> bool:
    """Whether something after `node` needs its strides, and `new` has others.

    Args:
        node: the attention (or the item of its result) that will be replaced.
        new: example value of the replacement.
    """
    old = value(node)
    if order(old) is not None and order(old) == order(new):
        return False
    pending: list[tuple[fx.Node, Any]] = [(node, new)]
    while pending:
        at, example = pending.pop()
        for user in at.users:
            call = call_of(user)
            if user.op == "output" or (call is not None and call.name in _READ_STRIDES):
                return True
            if call is None or call.name not in _VIEWS:
                continue
            result = _evaluate(user, at, example)
            if result is None:
                return True
            if isinstance(result, (list, tuple)) or order(result) != order(value(user)):
                pending.append((user, result))
    return False


def _evaluate(user: fx.Node, changed: fx.Node, example: Any) -> Any:
    """The user's value on the new strides; None if it cannot be computed on them."""
    args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: example if n is changed else value(n))
    mode = mode_of(value(changed))
    try:
        with mode if mode is not None else torch.no_grad(), torch.no_grad():
            if user.op == "call_method":
                return getattr(args[0], str(user.target))(*args[1:], **kwargs)
            return user.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError):  # fake tensors raise the latter
        return None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _hint(stride: Any) -> int | None:
    return stride if isinstance(stride, int) else stride.node.hint
