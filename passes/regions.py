"""Subgraphs: how a node calls another GraphModule, and which operand becomes which placeholder.

Checkpointing, grad-mode and autocast regions, `cond` and nested compile regions hide part of a model in a GraphModule
that a higher-order operator calls; a pass over the top-level graph alone sees nothing there and silently runs dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .calls import qualified_name

# Their backward, or what runs their body, would not follow a change of the body.
_SEALED = ("autograd_function_apply", "custom_function_call", "flex_attention", "triton_kernel_wrapper")
# Their body runs on slices or on carried values, not on the operands themselves.
_LOOPS = ("scan", "associative_scan", "while_loop", "map", "map_impl")


@dataclass(frozen=True)
class Body:
    """One subgraph that a node calls.

    Attributes:
        name: attribute of the calling module that holds the subgraph.
        module: the subgraph.
        reference: the `get_attr` node that names it, None for `call_module`.
        operands: one argument per placeholder; None where that is not known.
    """

    name: str
    module: fx.GraphModule
    reference: fx.Node | None
    operands: tuple[Any, ...] | None


@dataclass(frozen=True)
class Region:
    """What a node calls.

    Attributes:
        bodies: its subgraphs, in the order of the arguments.
        sealed: whether the bodies must be left as they are.
    """

    bodies: tuple[Body, ...]
    sealed: bool = False


def region(module: fx.GraphModule, node: fx.Node) -> Region | None:
    """The subgraphs that `node`, a node of `module`'s graph, calls; None for an ordinary node."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        if not isinstance(target, fx.GraphModule):
            return None
        operands = _bind(target, node.args) if not node.kwargs else None
        return Region((Body(str(node.target), target, None, operands),))
    if node.op != "call_function":
        return None
    references = [a for a in _flatten(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"]
    found = [(a, sub) for a in references if isinstance(sub := get_attr(module, str(a.target)), fx.GraphModule)]
    if not found:
        return None
    name = qualified_name(node.target).rpartition("::")[2]
    operands = None if name.startswith(_LOOPS) else _operands(node, [a for a, _ in found])
    bodies = tuple(Body(str(a.target), sub, a, None if operands is None else _bind(sub, operands)) for a, sub in found)
    return Region(bodies, sealed=name.startswith(_SEALED))


def get_attr(module: torch.nn.Module, target: str) -> Any:
    """The attribute that a `get_attr` node names, None if there is none."""
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def _operands(node: fx.Node, references: Sequence[fx.Node]) -> tuple[Any, ...] | None:
    positions = [node.args.index(r) for r in references if r in node.args]
    return None if len(positions) != len(references) else node.args[max(positions) + 1 :]


def _bind(body: fx.GraphModule, given: Sequence[Any]) -> tuple[Any, ...] | None:
    """Operands by placeholder. A leading identifier is skipped; `cond` gives its operands as one tuple."""
    count = sum(n.op == "placeholder" for n in body.graph.nodes)
    if len(given) >= 1 and isinstance(given[0], (list, tuple)) and len(given[0]) == count:
        return tuple(given[0])
    if len(given) == count + 1 and (given[0] is None or isinstance(given[0], str)):
        return tuple(given[1:])
    return tuple(given) if len(given) == count else None


def _flatten(args: Any) -> list[Any]:
    if isinstance(args, (list, tuple)):
        return [leaf for item in args for leaf in _flatten(item)]
    return [args]
