"""Checks a rewritten graph, so that a mistake of the pass shows here and not in a kernel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from .calls import qualified_name
from .modulepath import value
from .regions import region
from .sizes import shape


def check(module: fx.GraphModule, gone: Iterable[str] = ()) -> None:
    """Check a graph module and the subgraphs it calls.

    Args:
        module: what the pass made.
        gone: names of the nodes of `module` itself that the pass says it replaced.

    Raises:
        AssertionError: the graph is malformed, a `bsa` op has no example value or one of the wrong shape, or a replaced
            attention is still there.
    """
    module.graph.lint()
    gone = set(gone)
    for node in module.graph.nodes:
        inside = region(module, node)
        for body in inside.bodies if inside is not None else ():
            check(body.module)
        if node.op != "call_function":
            continue
        name = qualified_name(node.target)
        assert not (name == "bsa::attention" and node.name in gone), (
            f"anchor {node.name} was lowered and is still there"
        )
        if name in ("bsa::pool", "bsa::select", "bsa::attend"):
            _check_op(node, name)


def _check_op(node: fx.Node, name: str) -> None:
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.name}: {node.target} is no OpOverload"
    example = value(node)
    assert example is not None, f"{node.name} has no example value"
    operands = [value(a) for a in node.all_input_nodes]
    assert all(o is not None for o in operands), f"an operand of {node.name} has no example value"
    if name == "bsa::attend":
        q, out = value(node.args[0]), example[0]
        assert shape(q) == shape(out), f"{node.name}: q is {tuple(q.shape)}, the output {tuple(out.shape)}"
        assert q.dtype == out.dtype, f"{node.name}: q is {q.dtype}, the output {out.dtype}"
    if name == "bsa::select":
        counts, pooled = example[0], value(node.args[0])
        assert shape(counts) == shape(pooled)[:3], f"{node.name}: counts are {tuple(counts.shape)}"
