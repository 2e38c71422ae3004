"""The pass: self-attention over a known token grid becomes block-sparse; everything else stays, and is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from ..errors import PolicyError, UsageError, must
from ..grid import TokenGrid
from ..policy import BSAPolicy, Step
from ..report import Report
from . import lint
from .build import Builder
from .copying import with_module
from .decide import Decider, Decision, given_grids
from .grids import Grids
from .modulepath import fake_mode
from .sequence import Tracer
from .sizes import Sizes
from .symbols import Symbols, symints
from .transfer_compute import RULES

Graph = TypeVar("Graph", fx.GraphModule, torch.export.ExportedProgram)

_STEP_NOTE = "dense_steps and rules with steps did not apply: no denoising step was given"
_NESTED_NOTE = (
    "the grid of a nested graph (activation checkpointing, say) is not known: only in a model made by optimize does "
    "latent_grid reach it; else give the grid as an argument"
)


def rewrite(
    graph_module: Graph,
    policy: BSAPolicy,
    grid: TokenGrid | Sequence[int] | None = None,
    *,
    context_grid: TokenGrid | Sequence[int] | None = None,
    step: Step | None = None,
    module_prefix: str = "",
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

    Returns:
        The rewritten graph, or the very same object if nothing was rewritten; and what was done at every site.

    Raises:
        GridError: sources of the grid disagree, or a grid does not fit its sequence.
        PolicyError: `policy` is no BSAPolicy.
        SiteError: the policy wants an error for a site that cannot be rewritten.
        UsageError: `graph_module` is no captured graph.
    """
    if not isinstance(graph_module, (fx.GraphModule, torch.export.ExportedProgram)):
        todo = "Capture the model first, or use bsa_compile.optimize."
        got = graph_module if isinstance(graph_module, type) else type(graph_module)
        raise UsageError(must("graph_module", "be an fx.GraphModule or an ExportedProgram", got.__name__, todo))
    if not isinstance(policy, BSAPolicy):
        raise PolicyError(must("policy", "be a BSAPolicy", type(policy).__name__))
    if step is not None and not isinstance(step, Step):
        raise UsageError(must("step", "be a bsa_compile.policy.Step", repr(step)))
    given = list(given_grids(grid, context_grid))
    return BlockSparseAttention(policy, given, step=step, module_prefix=module_prefix)(graph_module)


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
    """

    def __init__(
        self,
        policy: BSAPolicy,
        given: Sequence[tuple[str, TokenGrid]] = (),
        *,
        step: Step | None = None,
        module_prefix: str = "",
    ) -> None:
        self.policy = policy
        self.given = tuple(given)
        self.step = step
        self.module_prefix = module_prefix

    def uuid(self) -> tuple[Any, ...]:
        """What the result depends on besides the graph."""
        return (self.policy.digest, self.given, self.step, self.module_prefix)

    def __call__(self, graph: Any) -> tuple[Any, Report]:
        """Rewrite a graph; see `rewrite`."""
        if isinstance(graph, fx.GraphModule):
            return self._run(graph, _weights_by_name(graph))
        return self._program(graph)

    def _program(self, program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, Report]:
        signature = program.graph_signature
        weights = frozenset({*signature.inputs_to_parameters, *signature.inputs_to_buffers})
        module, report = self._run(program.graph_module, weights)
        return program if module is program.graph_module else with_module(program, module), report

    def _run(self, module: fx.GraphModule, weights: frozenset[str]) -> tuple[fx.GraphModule, Report]:
        mode = fake_mode(module)
        sizes = Sizes(None if mode is None else mode.shape_env)
        tracer = Tracer(module, sizes, RULES, weights=weights)
        tracer.run()
        grids = Grids(sizes, symints(module), self.given, guards=not _exported(module))
        decider = Decider(self.policy, grids, sizes, self.step, self.module_prefix)
        decisions = self._possible(decider.decide(tracer.sites))
        decider.complain(decisions)
        result = Builder(decisions).build(module, ())
        if result is not module:
            lint.check(result, [d.found.node.name for d in decisions if d.lowering is not None and not d.found.path])
        report = Report(policy=self.policy.describe(), digest=self.policy.digest)
        notes = list(decider.notes)
        if self.policy.needs_step and self.step is None:
            notes.append(_STEP_NOTE)
        if any(d.found.path and d.site.reason == "unknown_grid" for d in decisions):
            notes.append(_NESTED_NOTE)
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
                if node.graph not in symbols:
                    symbols[node.graph] = Symbols(node.graph)
                known = symbols[node.graph]
                if not all(known.reachable(size, node) for size in (*lowering.grid_q, *lowering.grid_k)):
                    decision = decision.dense("unknown_grid", "its symbolic sizes do not reach this subgraph")
            result.append(decision)
        return result


def _exported(module: fx.GraphModule) -> bool:
    return any("val" in n.meta for n in module.graph.nodes if n.op == "placeholder")


def _weights_by_name(module: fx.GraphModule) -> frozenset[str]:
    """Placeholders of an export's graph that hold weights, by export's naming; a wrong guess only costs a label."""
    if not _exported(module):
        return frozenset()
    names = (n.name for n in module.graph.nodes if n.op == "placeholder")
    return frozenset(n for n in names if n.startswith(("p_", "b_", "c_")))
