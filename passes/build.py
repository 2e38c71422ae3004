"""Builds the rewritten graph modules, subgraphs included, from the decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .copying import copy_graph, set_submodule
from .decide import Decision
from .emit import Emitter
from .regions import Body, region
from .symbols import Symbols


class Builder:
    """Builds the rewritten graph modules from the decisions."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = decisions

    def build(self, module: fx.GraphModule, path: tuple[str, ...]) -> fx.GraphModule:
        """`module` with its sites and its subgraphs' sites rewritten; itself if there is none."""
        if not self._plan(path):
            return module
        result, nodes = copy_graph(module)
        calls: dict[str, list[tuple[fx.Node, Body, tuple[str, ...]]]] = {}
        for node in module.graph.nodes:
            inside = region(module, node)
            for body in inside.bodies if inside is not None else ():
                calls.setdefault(body.name, []).append((node, body, (*path, f"{node.name}.{body.name}")))
        for name, users in calls.items():
            self._bodies(result, nodes, name, users)
        symbols = Symbols(result.graph)
        for decision in self.decisions:
            if decision.found.path == path and decision.lowering is not None:
                Emitter(result.graph, nodes, decision, symbols).replace()
        result.recompile()
        return result

    def _plan(self, path: tuple[str, ...]) -> tuple[Any, ...]:
        """What is rewritten at `path` and below, comparable between calls of one subgraph."""
        return tuple(
            (d.found.path[len(path) :], d.found.node, d.lowering)
            for d in self.decisions
            if d.lowering is not None and d.found.path[: len(path)] == path
        )

    def _bodies(
        self,
        result: fx.GraphModule,
        nodes: dict[fx.Node, fx.Node],
        name: str,
        users: Sequence[tuple[fx.Node, Body, tuple[str, ...]]],
    ) -> None:
        """Give every call its body. Calls that share a body and differ in what becomes of it get one each."""
        variants: dict[Any, str] = {}
        plans = [self._plan(path) for _, _, path in users]
        if () in plans:
            variants[()] = name
        for plan, (node, body, path) in zip(plans, users, strict=True):
            if plan not in variants:
                variants[plan] = name if not variants else f"{name}_bsa_{len(variants)}"
                set_submodule(result, variants[plan], self.build(body.module, path))
            if variants[plan] != name:
                self._redirect(result.graph, nodes[node], body, variants[plan])

    def _redirect(self, graph: fx.Graph, call: fx.Node, body: Body, name: str) -> None:
        if body.reference is None:
            call.target = name
            return
        old = next(a for a in call.all_input_nodes if a.op == "get_attr" and a.target == body.name)
        with graph.inserting_before(call):
            new = graph.create_node("get_attr", name)
            new.meta = old.meta.copy()
        call.replace_input_with(old, new)
        if len(call.args) > 1 and isinstance(call.args[1], str):  # invoke_subgraph caches by this identifier
            call.args = (call.args[0], f"{call.args[1]}_{name}", *call.args[2:])
