"""Where a node of a traced graph comes from: module path and class, source line, and the shapes it was traced with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .. import ops

# Containers and wrappers that are in the way between a module and the name the user knows it by.
_WRAPPERS = frozenset(
    {"__dict__", "_modules", "_orig_mod", "_export_root", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)
_ROOT = re.compile(r"^[LG]\[(['\"]).*?\1\]")
_TOKEN = re.compile(r"(\w+)")
_FRAME = re.compile(r'^\s*File "(.+?)", line (\d+)', re.MULTILINE)
_NOT_THE_MODEL = tuple(str(Path(module.__file__).resolve().parent) for module in (torch, ops) if module.__file__)
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"


def clean(path: str) -> str:
    """Turn the path that a tracer writes into the one that `named_modules` gives.

    `L['self'].blocks.0.attn`, `L['self'].__dict__['_modules']['blocks'].0.attn`, `L['self']._modules['blocks']['0']`
    and `L['fn']._orig_mod.blocks[0].attn` all become `blocks.0.attn`; a bare root becomes "".
    """
    return ".".join(t for t in _TOKEN.findall(_ROOT.sub("", path)) if t not in _WRAPPERS)


def _stack(node: fx.Node) -> list[tuple[str, Any]]:
    stack = node.meta.get("nn_module_stack") or {}
    return [entry for key, entry in stack.items() if key != _NO_STACK]


def module_path(node: fx.Node, prefix: str = "") -> str:
    """Path of the module whose forward made `node`; "" (or the prefix) where the root itself did.

    The stack is absent at the root of a compiled module, and relative when a part of a model is compiled on its own:
    `prefix` is the path of that part.
    """
    stack = _stack(node)
    path = clean(stack[-1][0]) if stack else ""
    return ".".join(p for p in (prefix.strip("."), path) if p)


def module_class(node: fx.Node) -> str:
    """Qualified name of the class of that module, "" where unknown."""
    stack = _stack(node)
    if not stack:
        return ""
    kind = stack[-1][1]
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost frame outside torch and our anchor, "" where the tracer kept no stack."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [f"{file}:{line}" for file, line in frames if not file.startswith(_NOT_THE_MODEL)]
    return outside[-1] if outside else ""


def value_key(node: fx.Node) -> str | None:
    """The meta key under which this node's tracer keeps its example: `val` (export) or `example_value` (Dynamo)."""
    return next((key for key in ("val", "example_value") if key in node.meta), None)


def fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    """The mode that a graph's example values belong to; Dynamo has entered another one by the time a backend runs."""
    return next((m for n in module.graph.nodes if (m := mode_of(value(n))) is not None), None)


def mode_of(example: Any) -> FakeTensorMode | None:
    """The mode of an example value, None where it is not fake."""
    if isinstance(example, (list, tuple)):
        return next((m for item in example if (m := mode_of(item)) is not None), None)
    return example.fake_mode if isinstance(example, FakeTensor) else None


def value(node: Any) -> Any:
    """The example value of a node, None where the graph was traced without; anything else is its own value."""
    if not isinstance(node, fx.Node):
        return node
    key = value_key(node)
    return None if key is None else node.meta[key]
