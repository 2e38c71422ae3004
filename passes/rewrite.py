"""The pass: self-attention over a known token grid becomes block-sparse; everything else stays, and is reported."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from ..errors import UsageError, must
from ..grid import TokenGrid
from ..policy import BSAPolicy, Step
from ..report import Report
from . import lint, strides
from .copying import copy_graph, set_submodule
from .decide import Decider, Decision, given_grids
from .grids import Grids
from .modulepath import fake_mode, mode_of, value, value_key
from .regions import Body, region
from .sequence import Tracer
from .sizes import Sizes
from .symbols import Symbols, symints
from .transfer_compute import RULES

Graph = TypeVar("Graph", fx.GraphModule, torch.export.ExportedProgram)

LAYOUTS = ("raster",)
# What a tracer notes of the node that was, and would be untrue of the nodes that replace it.
_NOT_INHERITED = frozenset(
    ["val", "example_value", "tensor_meta", "source_fn_stack", "torch_fn", "original_aten", "unbacked_bindings"]
)
_STEP_NOTE = "rules with steps / dense_steps did not apply: no bsa_compile.step is active"


def rewrite(
    graph_module: Graph,
    policy: BSAPolicy,
    grid: TokenGrid | Sequence[int] | None = None,
    *,
    context_grid: TokenGrid | Sequence[int] | None = None,
    step: Step | None = None,
    module_prefix: str = "",
    layout: str = "raster",
) -> tuple[Graph, Report]:
    """Make the self-attention of a captured graph block-sparse.

    Args:
        graph_module: a Dynamo graph (as a backend gets it), or a `torch.export` program or its graph module, before
            `run_decompositions()`. It is not modified.
        policy: what runs block-sparse, and how.
        grid: (T, H, W) of the tokens that the model attends over, where the graph does not tell.
        context_grid: the same, from the surrounding code.
        step: the denoising step, for rules that depend on it.
        module_prefix: path of the captured module in the whole model.
        layout: memory order in which the ops get their tokens.

    Returns:
        The rewritten graph, or the very same object if nothing was rewritten; and what was done at every site.

    Raises:
        GridError: sources of the grid disagree, or a grid does not fit its sequence.
        SiteError: the policy wants an error for a site that cannot be rewritten.
        UsageError: `layout` is unknown.
    """
    if layout not in LAYOUTS:
        raise UsageError(must("layout", f"be one of {', '.join(LAYOUTS)}", repr(layout)))
    given = list(given_grids(grid, context_grid))
    return BlockSparseAttention(policy, given, step=step, module_prefix=module_prefix, layout=layout)(graph_module)


class BlockSparseAttention:
    """Replaces attention over a known grid by pool, select and attend.

    Before::

        scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention(q, k, v)

    After::

        detach = torch.ops.aten.detach.default(q)
        detach_1 = torch.ops.aten.detach.default(k)
        pool = torch.ops.bsa.pool.default(detach, [4, 6, 10], [4, 4, 4], 'raster')
        pool_1 = torch.ops.bsa.pool.default(detach_1, [4, 6, 10], [4, 4, 4], 'raster')
        select = torch.ops.bsa.select.default(pool, pool_1, 0.9375, None, 0.25)
        getitem = select[0]
        getitem_1 = select[1]
        attend = torch.ops.bsa.attend.default(
            q, k, v, getitem, getitem_1, [4, 6, 10], [4, 4, 4], [4, 6, 10], [4, 4, 4], 0.25, 'raster', 'native'
        )
        getitem_2 = attend[0]

    `[B, S, H, D]` operands are transposed around it; operands of another dtype than the result (autocast) are cast;
    symbolic grids are nodes. Subgraphs are rewritten in place of their originals. A second run changes nothing.

    Args:
        policy: what runs block-sparse, and how.
        given: grids that the caller gave, by source, in the order of precedence.
        step: the denoising step.
        module_prefix: path of the captured module in the whole model.
        layout: memory order of the ops' tokens.
    """

    def __init__(
        self,
        policy: BSAPolicy,
        given: Sequence[tuple[str, TokenGrid]] = (),
        *,
        step: Step | None = None,
        module_prefix: str = "",
        layout: str = "raster",
    ) -> None:
        self.policy = policy
        self.given = tuple(given)
        self.step = step
        self.module_prefix = module_prefix
        self.layout = layout

    def uuid(self) -> tuple[Any, ...]:
        """What the result depends on besides the graph."""
        return (self.policy.digest, self.given, self.step, self.module_prefix, self.layout)

    def __call__(self, graph: Graph) -> tuple[Graph, Report]:
        """Rewrite a graph; see `rewrite`."""
        if isinstance(graph, torch.export.ExportedProgram):
            signature = graph.graph_signature
            weights = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
            module, report = self._run(graph.graph_module, frozenset(weights))
            if module is graph.graph_module:
                return graph, report
            return graph._update(module, signature), report
        return self._run(graph, _weights_by_name(graph))

    def _run(self, module: fx.GraphModule, weights: frozenset[str]) -> tuple[fx.GraphModule, Report]:
        mode = fake_mode(module)
        sizes = Sizes(None if mode is None else mode.shape_env)
        tracer = Tracer(module, sizes, RULES, weights=weights)
        tracer.run()
        grids = Grids(sizes, symints(module), self.given, guards=not _exported(module))
        decider = Decider(self.policy, grids, sizes, self.step, self.module_prefix)
        decisions = self._possible(decider.decide(tracer.sites))
        decider.complain(decisions)
        result = _Builder(decisions, self.layout).build(module, ())
        if result is not module:
            lint.check(result, [d.found.node.name for d in decisions if d.lowering is not None and not d.found.path])
        report = Report(policy=self.policy.describe(), digest=self.policy.digest)
        notes = list(decider.notes)
        if self.policy.needs_step and self.step is None:
            notes.append(_STEP_NOTE)
        report.add([], notes)
        report.sites.extend(d.site for d in decisions)
        return result, report

    def _possible(self, decisions: list[Decision]) -> list[Decision]:
        """Keep a site dense whose subgraph cannot compute the sizes of its grid."""
        symbols: dict[fx.Graph, Symbols] = {}
        result = []
        for decision in decisions:
            node, lowering = decision.found.node, decision.lowering
            if lowering is not None:
                known = symbols.setdefault(node.graph, Symbols(node.graph))
                if not all(known.reachable(size, node) for size in (*lowering.grid_q, *lowering.grid_k)):
                    decision = decision.dense("unknown_grid", "its symbolic sizes do not reach this subgraph")
            result.append(decision)
        return result


class _Builder:
    """Builds the rewritten graph modules from the decisions."""

    def __init__(self, decisions: Sequence[Decision], layout: str) -> None:
        self.decisions = decisions
        self.layout = layout

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
                _Site(result.graph, nodes, decision, symbols, self.layout).replace()
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


class _Site:
    """Replaces one attention call of a copied graph; `nodes` maps the original's nodes to the copy's."""

    def __init__(
        self, graph: fx.Graph, nodes: dict[fx.Node, fx.Node], decision: Decision, symbols: Symbols, layout: str
    ) -> None:
        self.graph = graph
        self.nodes = nodes
        self.node = node = nodes[decision.found.node]
        self.decision = decision
        self.symbols = symbols
        self.layout = layout
        self.key = value_key(node) or "val"
        self.match = decision.found.match
        self.output = next((u for u in node.users if u.args == (node, 0)), None) if self.match.tuple_result else node
        self.meta = {k: v for k, v in node.meta.items() if k not in _NOT_INHERITED}

    def replace(self) -> None:
        """Insert the block-sparse ops and erase the call."""
        node, output = self.node, self.output
        if output is not None:
            with self.graph.inserting_before(node):
                new = self._attend(output)
            output.replace_all_uses_with(new)
        for user in list(node.users):
            self.graph.erase_node(user)
        self.graph.erase_node(node)
        if output is not None and self.key == "val":
            new.name = output.name  # an export's signature goes by name

    def _attend(self, output: fx.Node) -> fx.Node:
        lowering, match = self.decision.lowering, self.match
        assert lowering is not None
        policy, example = lowering.policy, value(output)
        q, k, v = (self._operand(self._copied(x), example.dtype) for x in (match.q, match.k, match.v))
        grid_q, grid_k = ([self._size(size) for size in grid] for grid in (lowering.grid_q, lowering.grid_k))
        tile_q, tile_k = list(policy.chunk_3d_shape_q), list(policy.chunk_3d_shape_k)
        scale = float(match.scale) if match.scale is not None else value(q).shape[3] ** -0.5
        ops, detach = torch.ops.bsa, torch.ops.aten.detach.default
        gate_q, gate_k = self._call(detach, q), self._call(detach, k)  # the selection gets no gradient
        pooled_q = self._call(ops.pool.default, gate_q, grid_q, tile_q, self.layout)
        pooled_k = self._call(ops.pool.default, gate_k, grid_k, tile_k, self.layout)
        selected = self._call(ops.select.default, pooled_q, pooled_k, policy.sparsity, policy.cdf_threshold, scale)
        counts, indices = (self._call(operator.getitem, selected, i) for i in (0, 1))
        options = (grid_q, tile_q, grid_k, tile_k, scale, self.layout, policy.attend)
        attended = self._call(ops.attend.default, q, k, v, counts, indices, *options)
        out = self._call(operator.getitem, attended, 0)
        if match.layout == "BSHD":
            out = self._call(torch.ops.aten.transpose.int, out, 1, 2)
        if strides.relied_upon(output, value(out)):
            out = self._restride(out, strides.order(example))
        return out

    def _operand(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`[B, H, S, D]` in the dtype that the attention computes in, with a unit last stride."""
        if self.match.layout == "BSHD":
            x = self._call(torch.ops.aten.transpose.int, x, 1, 2)
        if value(x).dtype != dtype:
            x = self._call(torch.ops.aten.to.dtype, x, dtype)
        if not (isinstance(value(x).stride(-1), int) and value(x).stride(-1) == 1):
            x = self._call(torch.ops.aten.contiguous.default, x)
        return x

    def _restride(self, x: fx.Node, order: tuple[int, ...] | None) -> fx.Node:
        rank = value(x).dim()
        full = list(order or ())
        full = [d for d in range(rank) if d not in full] + full
        back = [full.index(d) for d in range(rank)]
        if full != list(range(rank)):
            x = self._call(torch.ops.aten.permute.default, x, full)
        x = self._call(torch.ops.aten.clone.default, x, memory_format=torch.contiguous_format)
        return x if full == list(range(rank)) else self._call(torch.ops.aten.permute.default, x, back)

    def _copied(self, original: fx.Node | None) -> fx.Node:
        """The copy, in the new graph, of an operand of the original call."""
        assert original is not None
        return self.nodes[original]

    def _size(self, size: Any) -> Any:
        return self._copied(size) if isinstance(size, fx.Node) else self.symbols.argument(size, self.node)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call with the metadata of the site and an example value of its own."""
        new = self.graph.call_function(target, args, kwargs)
        examples = fx.map_arg(args, value)
        mode = mode_of(value(self.node))
        with mode if mode is not None else torch.no_grad(), torch.no_grad():
            example = target(*examples, **kwargs)
        new.meta = {**self.meta, self.key: example}
        return new


def _exported(module: fx.GraphModule) -> bool:
    return any("val" in n.meta for n in module.graph.nodes if n.op == "placeholder")


def _weights_by_name(module: fx.GraphModule) -> frozenset[str]:
    """Placeholders of an export's graph that hold weights, by export's naming; a wrong guess only costs a label."""
    if not _exported(module):
        return frozenset()
    names = (n.name for n in module.graph.nodes if n.op == "placeholder")
    return frozenset(n for n in names if n.startswith(("p_", "b_", "c_")))
