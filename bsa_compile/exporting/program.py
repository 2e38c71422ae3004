"""`export`: a model as a `torch.export` program whose self-attention is block-sparse."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..adapters import adapter_for
from ..api import OptimizedModel
from ..backend import effective_policy, log_enabled, starts_enabled
from ..context import current_step
from ..errors import BSACompileError, ExportError, GridError, PolicyError, UsageError, must, one_line
from ..files import staged
from ..grid import TokenGrid
from ..module_tree import share_tree
from ..passes.rewrite import rewrite
from ..policy import BSAPolicy
from ..report import Report

# Where a program keeps its report; torch.export.save writes what lies under "custom".
_CUSTOM, _KEY = "custom", "bsa_compile"


def export(
    model: nn.Module,
    policy: BSAPolicy | None = None,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    grid: TokenGrid | Sequence[int] | None = None,
) -> torch.export.ExportedProgram:
    """Export a model with block-sparse self-attention.

    The program computes what `optimize(model, policy)` computes, in ops of the namespace `bsa`: whoever loads it
    (`torch.export.load`) imports `bsa_compile` first. `report_of` reads what was done at every attention site, from a
    loaded program too. The weights are the model's own tensors, not copies.

    Args:
        model: what `optimize` takes, not optimized itself. Best in `eval()` mode.
        policy: what runs block-sparse; by default the model's configuration, else sparsity 0.9375.
        example_inputs: positional inputs of one call.
        example_kwargs: keyword inputs of that call.
        dynamic_shapes: as in `torch.export.export`. The batch may be dynamic (its example must then be at least 2);
            frames, height and width are fixed: one grid a program.
        grid: (t, h, w) of the self-attention's tokens, for a model that does not tell.

    Returns:
        The program, before `run_decompositions`.

    Raises:
        UsageError: `model` is no plain nn.Module or is optimized, or `dynamic_shapes` makes the grid dynamic.
        PolicyError: `policy` is no BSAPolicy.
        GridError: sources of the grid disagree, or a grid does not fit its sequence.
        SiteError: the policy wants an error for a site that cannot be rewritten.
        ExportError: torch.export cannot capture the model with these inputs.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UsageError(must("model", "be an nn.Module that torch.export can trace", type(model).__name__))
    if isinstance(model, OptimizedModel):
        raise UsageError(
            must("model", "be as it was before optimize", type(model).__name__, "Pass the model given to optimize.")
        )
    if policy is not None and not isinstance(policy, BSAPolicy):
        raise PolicyError(must("policy", "be a BSAPolicy", type(policy).__name__))
    policy = effective_policy(policy, model) if starts_enabled(policy, model) else BSAPolicy.dense()
    log_enabled(policy, "export")
    program = _capture(model, tuple(example_inputs), dict(example_kwargs or {}), dynamic_shapes)
    given = None if grid is None else TokenGrid.of(grid)
    program, report = rewrite(program, policy, given, step=current_step())
    _require_static(report)
    _lower_anchors(program.graph_module)
    program.graph_module.meta.setdefault(_CUSTOM, {})[_KEY] = json.dumps(report.to_dict())
    return program


def save(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """`torch.export.save`, so that the file is either complete or not there.

    Raises:
        UsageError: `path` is a folder or cannot be written.
        ExportError: writing failed; what was there before stays.
    """
    try:
        with staged(path) as folder:
            torch.export.save(program, folder / Path(path).name)
    except OSError as exc:
        raise ExportError(must("path", "be a file that can be written", f"{str(path)!r} ({exc})")) from exc


def report_of(program: torch.export.ExportedProgram) -> Report:
    """What `export` did at every attention site of a program, also of one that was saved and loaded.

    Raises:
        UsageError: the program does not come from `export`.
    """
    custom = program.graph_module.meta.get(_CUSTOM) or {}
    if _KEY not in custom:
        raise UsageError(must("program", "come from bsa_compile.export", type(program).__name__))
    return Report.from_dict(json.loads(custom[_KEY]))


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    tree = share_tree(model)
    adapter = adapter_for(tree)
    adapter.install(tree)
    try:
        adapter.before_call(tree, args, kwargs)
        with torch.no_grad():
            return torch.export.export(tree, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except BSACompileError:
        raise
    except Exception as exc:  # torch.export raises whatever the model, Dynamo or the symbolic shapes raise
        todo = "Check example_inputs and dynamic_shapes with torch.export.export itself."
        raise ExportError(must("model", "be traceable by torch.export", one_line(exc), todo)) from exc


def _require_static(report: Report) -> None:
    for site in report.sites:
        sizes = (*(site.grid_q or ()), *(site.grid_k or ()))
        if site.role != "cross" and not all(isinstance(size, int) for size in sizes):
            shown = "x".join(map(str, site.grid_q or ()))
            raise GridError(
                must(
                    "dynamic_shapes",
                    "leave frames, height and width fixed",
                    f"the grid {shown} at {site.module or '<root>'}",
                    "Export one file per resolution; only the batch may be dynamic.",
                )
            )


def _lower_anchors(module: fx.GraphModule) -> None:
    """Turn anchors that stayed dense into plain attention, which every consumer of a program knows."""
    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        graph = graph_module.graph
        for node in graph.find_nodes(op="call_function", target=torch.ops.bsa.attention.default):
            bound = dict(zip(_ANCHOR_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
            q, k = (bound[name].meta["val"] for name in ("q", "k"))
            node.target = torch.ops.aten.scaled_dot_product_attention.default
            node.args = (bound["q"], bound["k"], bound["v"])
            node.kwargs = {"scale": bound.get("scale")}
            if q.shape[1] != k.shape[1]:
                node.kwargs = {**node.kwargs, "enable_gqa": True}
        graph_module.recompile()


_ANCHOR_ARGUMENTS = tuple(argument.name for argument in torch.ops.bsa.attention.default._schema.arguments)
