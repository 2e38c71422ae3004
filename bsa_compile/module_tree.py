"""A second module tree over the same parameters, so that `optimize` leaves the user's model as it was."""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any

from torch import nn


def share_tree(module: nn.Module, _seen: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy the modules of a tree, not its tensors.

    Every module object is new; its parameter, buffer and hook tables are the very same dicts. So `to`,
    `load_state_dict` or a hook on either tree reach both, while an attribute set on one (a replaced `forward`, say)
    stays there.
    """
    seen = {} if _seen is None else _seen
    if id(module) in seen:  # a module used in two places is one module in the copy too
        return seen[id(module)]
    twin = _bare_copy(module)
    seen[id(module)] = twin
    twin.__dict__.update({"_parameters": module._parameters, "_buffers": module._buffers})
    twin.__dict__["_modules"] = {
        name: child if child is None else share_tree(child, seen) for name, child in module._modules.items()
    }
    return twin


def _bare_copy(module: nn.Module) -> nn.Module:
    cls = type(module)
    if cls.__new__ is object.__new__:
        return copy.copy(module)
    # FSDP2 gives its modules a class of two bases, itself and the original, whose __new__ builds the original anew,
    # weights and all. What it does around a forward are hooks, which the twin has; its methods know the original alone.
    twin: nn.Module = object.__new__(cls.__bases__[-1])
    twin.__dict__.update(module.__dict__)
    return twin


def with_own_code(function: Any) -> Any:
    """The same function with a code object of its own.

    Dynamo keeps compiled code per code object, and counts recompilations there: two optimized models of one class
    would push each other over the limit.
    """
    if not isinstance(function, FunctionType):
        return function
    own = FunctionType(
        function.__code__.replace(co_name=function.__code__.co_name),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__qualname__ = function.__qualname__
    own.__module__ = function.__module__
    return own


def repeated_blocks(module: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The largest `ModuleList` of two or more modules of one class, by parameters, and its path."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) >= 2 and len({type(m) for m in child}) == 1:
            size = sum(p.numel() for p in child.parameters())
            if best is None or size > best[0]:
                best = (size, name, child)
    return (best[1], best[2]) if best else None
