"""Turns symbolic sizes into what a graph can hold (nodes) and what a policy can compare (`SymInt`s).

s53 : SymInt = placeholder                     the grid (s53, s0//2, s0//2) of a site becomes
s0 : SymInt = placeholder               ->     floordiv = s0 // 2
...                                            pool = bsa.pool(detach, [s53, floordiv, floordiv], [4, 4, 4])
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .modulepath import value, value_key
from .sizes import Size, of


class Symbols:
    """The symbolic sizes that one graph's nodes carry.

    Args:
        graph: the graph; nodes made for sizes are added to it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._made: dict[sympy.Expr, fx.Node] = {}
        self._position: dict[fx.Node, int] = {}
        self._first: dict[sympy.Expr, tuple[fx.Node, int | None]] = {}
        for position, node in enumerate(graph.nodes):
            self._position[node] = position
            example = value(node)
            sizes: tuple[Any, ...] = tuple(example.shape) if isinstance(example, torch.Tensor) else ()
            if isinstance(example, torch.SymInt):
                self._first.setdefault(of(example), (node, None))
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    self._first.setdefault(of(size), (node, dim))

    def reachable(self, size: Size | fx.Node, before: fx.Node) -> bool:
        """Whether `argument` can give this size at a node of the original graph."""
        if isinstance(size, (int, fx.Node)) or self._ahead(size, before):
            return True
        return all(self._ahead(s, before) for s in size.free_symbols)

    def argument(self, size: Size | fx.Node, before: fx.Node) -> int | fx.Node:
        """`size` as an argument of a node inserted at `before`.

        Ints and nodes are arguments already. An expression is the first SymInt node or tensor size ahead of `before`
        that has it, or is computed from symbols that are found so. It is never turned into its hint.
        """
        if isinstance(size, (int, fx.Node)):
            return size
        if size not in self._made:
            if self._ahead(size, before):
                self._made[size] = self._take(size, before)
            else:
                parts = {s: self._take(s, before) for s in sorted(size.free_symbols, key=str)}
                self._made[size] = self._compute(size, parts, before)
        return self._made[size]

    def _ahead(self, size: sympy.Expr, before: fx.Node) -> bool:
        return size in self._first and self._position[self._first[size][0]] < self._position[before]

    def _take(self, size: sympy.Expr, before: fx.Node) -> fx.Node:
        node, dim = self._first[size]
        if dim is None:
            return node
        with self.graph.inserting_before(before):
            made = self.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        self._describe(made, value(node).shape[dim], before)
        return made

    def _compute(self, size: sympy.Expr, parts: dict[Any, Any], before: fx.Node) -> fx.Node:
        known = set(self.graph.nodes)
        with self.graph.inserting_before(before):
            tracer = GraphAppendingTracer(self.graph)
            proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in parts.items()}
            result = sympy_interp(PythonReferenceAnalysis, proxies, size).node
        for node in self.graph.nodes:
            if node not in known:
                args = fx.map_arg(node.args, value)
                self._describe(node, node.target(*args), before)  # type: ignore[operator]
        return result

    def _describe(self, node: fx.Node, example: Any, site: fx.Node) -> None:
        key = value_key(site) or "val"
        node.meta = {k: site.meta[k] for k in ("nn_module_stack", "stack_trace") if k in site.meta} | {key: example}


def symints(module: fx.GraphModule) -> dict[sympy.Expr, torch.SymInt]:
    """A `SymInt` for every symbolic size that a graph's values have."""
    found: dict[sympy.Expr, torch.SymInt] = {}
    for node in module.graph.nodes:
        example = value(node)
        for size in example.shape if isinstance(example, torch.Tensor) else (example,):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, size)
    return found


def as_int(size: Size, known: dict[sympy.Expr, torch.SymInt]) -> Any:
    """`size` as an int or `SymInt`, comparing which adds a guard; None where it cannot be computed."""
    if isinstance(size, int):
        return size
    if size in known:
        return known[size]
    symbols = {s: known[s] for s in size.free_symbols if s in known}
    return sympy_interp(PythonReferenceAnalysis, symbols, size) if len(symbols) == len(size.free_symbols) else None


def hint(size: Size, known: dict[sympy.Expr, torch.SymInt]) -> int | None:
    """The value of `size` for the inputs that the graph was traced with, without a guard; None where there is none."""
    if isinstance(size, int):
        return size
    if size in known:
        return known[size].node.hint
    hints = {s: known[s].node.hint for s in size.free_symbols if s in known}
    if len(hints) != len(size.free_symbols) or any(h is None for h in hints.values()):
        return None
    return int(size.xreplace({s: sympy.Integer(int(h)) for s, h in hints.items()}))
