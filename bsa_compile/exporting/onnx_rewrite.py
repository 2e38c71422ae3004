"""`rewrite_onnx`: self-attention in ONNX files made by others becomes block-sparse."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, GridError, UsageError, must, require_extra
from ..files import check_writable, staged
from ..grid import TokenGrid
from ..passes.decide import Decider, Decision, given_grids
from ..passes.grids import Grids
from ..passes.sequence import Tracer
from ..passes.sizes import Sizes
from ..passes.transfer_compute import RULES
from ..policy import BSAPolicy
from ..report import Report
from . import onnx_files, onnx_function
from .onnx_emit import Emitter
from .onnx_match import Attention, find
from .onnx_names import all_nodes
from .onnx_program import REPORT_KEY, add_functions
from .onnx_shapes import complete
from .onnx_trace import Trace

if TYPE_CHECKING:
    import onnx_ir as ir

# From these to the node's own opset hardly more than types were added to operators; further below, meanings changed.
_CONVERTED = range(18, onnx_function.OPSETS.start)
_STEP_NOTE = "rules with steps / dense_steps did not apply: an ONNX file knows no denoising step"


def rewrite_onnx(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    policy: BSAPolicy,
    grid: TokenGrid | Sequence[int],
) -> Report:
    """Make the self-attention in an ONNX file block-sparse.

    Finds `Attention` nodes and attention written out as MatMul, Softmax, MatMul, decides each one by the policy as
    `rewrite` does for a torch graph, and puts `ai.bsa::GatedBlockSparseAttention` in its place. Everything else stays
    as it is and is reported. Where nothing is rewritten the result is a copy of the file.

    Args:
        path_in: the ONNX file; opset 18 to 23 (18 and 19 become 20). Weights beside it are read only when written.
        path_out: the file to write, which may be the same. Weights of 256 MiB and more go to `<path_out>.data`.
        policy: what runs block-sparse, and how. Rules go by the module paths that the exporter wrote into the file.
        grid: (T, H, W) of the tokens that the model attends over.

    Returns:
        What was done at every attention site; `source` is the name of the ONNX node.

    Raises:
        UsageError: `path_in` is no ONNX file, `path_out` cannot be written, or the opset is not supported.
        GridError: `grid` does not fit the self-attention, or is not that of the file's own patch embedding.
        SiteError: the policy wants an error for a site that cannot be rewritten.
        ExportError: writing failed; what was there before stays.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnx_ir", "onnxscript"):
        require_extra(module, "onnx")
    path_in, path_out = Path(path_in), check_writable(path_out, "path_out")
    given = list(given_grids(grid, None))
    if not given:
        raise GridError(must("grid", "be given", "None", "Give (T, H, W) of the tokens that the model attends over."))
    model = load(path_in)
    notes = _prepare(model, path_in)
    found = find(list(all_nodes(model.graph)))
    trace = Trace(model.graph, found)
    decider, decisions = _decide(trace, found, policy, given)
    decider.complain(decisions)
    by_node = {a.node: a for a in found}
    lowered = [(by_node[trace.node_of(d.found.node)], d.lowering) for d in decisions if d.lowering is not None]
    report = Report(policy=policy.describe(), digest=policy.digest)
    steps = [_STEP_NOTE] if policy.needs_step else []
    report.add([], [*(notes if lowered else []), *steps, *decider.notes])
    report.sites.extend(d.site for d in decisions)
    if lowered:
        replaced: dict[ir.Value, ir.Value] = {}
        for attention, lowering in lowered:
            Emitter(attention, lowering, replaced).replace()
        add_functions(model, onnx_function.functions(model.opset_imports[""]))
        model.ir_version = max(model.ir_version, 8)  # the first that knows functions
        model.metadata_props[REPORT_KEY] = report.to_json()
        onnx_files.save(model, path_out)
    else:
        _copy(path_in, path_out)
    return report


# -- the file ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> ir.Model:
    """Read an ONNX file; large weights stay on disk, mapped into memory.

    Raises:
        UsageError: it is missing, no ONNX file, or weights that it names are missing.
    """
    ir: Any = require_extra("onnx_ir", "onnx")
    if not path.is_file():
        raise UsageError(must("path_in", "be an ONNX file", f"no file {str(path)!r}"))
    try:
        model = ir.load(path)
    except Exception as exc:  # whatever the parsers of onnx's formats say of a damaged file
        raise UsageError(must("path_in", "be an ONNX file", f"{str(path)!r} ({_first_line(exc)})")) from exc
    if "" not in model.opset_imports or not len(model.graph):
        raise UsageError(must("path_in", "be an ONNX file", f"{str(path)!r}, which holds no operators"))
    _map_weights(model, ir, path)
    return model


def _map_weights(model: ir.Model, ir: Any, path: Path) -> None:
    """Turn weights beside the file into tensors that lie in the same mapped memory, wherever the model is written."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            try:
                array = tensor.numpy()
            except (OSError, ValueError) as exc:
                got = f"{str(tensor.path)!r} for {value.name!r} ({_first_line(exc)})"
                todo = f"Put the data files of {path.name} beside it."
                raise UsageError(must("path_in", "have its weights beside it", got, todo)) from exc
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _prepare(model: ir.Model, path: Path) -> list[str]:
    """Convert the opset, inline functions and infer shapes.

    Returns:
        What the user should know of it, if the result is written.

    Raises:
        UsageError: the opset is not supported.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    opset, supported = model.opset_imports[""], onnx_function.OPSETS
    _check_functions(model, path)
    notes = []
    if opset in _CONVERTED:
        from onnxscript import version_converter

        version_converter.convert_version(model, target_version=supported.start)
        notes.append(f"converted from opset {opset} to {supported.start}, the first that the node's function supports")
    elif opset not in supported:
        raise UsageError(
            must(
                "the opset of path_in",
                f"be from {_CONVERTED.start} to {supported.stop - 1}",
                f"{opset} in {str(path)!r}",
                "Convert the file with onnx.version_converter.convert_version, or export it anew.",
            )
        )
    # Attention inside a function is attention at each of its calls.
    passes.InlinePass(criteria=lambda function: function.domain != onnx_function.DOMAIN)(model)
    if any(v.shape is None or v.dtype is None for n in all_nodes(model.graph) for v in n.outputs):
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)  # sees no large weights
    complete(model.graph, ir.Shape)
    return notes


def _check_functions(model: ir.Model, path: Path) -> None:
    """Functions can be inlined only where they use the model's own opsets."""
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            wanted = model.opset_imports.get(domain, version)
            if version != wanted:
                raise UsageError(
                    must(
                        "path_in",
                        "have functions of its own opset",
                        f"{function.name!r} of opset {version} in {str(path)!r} of {wanted}",
                        "Inline them with onnx.inliner.inline_local_functions(model, convert_version=True).",
                    )
                )


def _copy(path_in: Path, path_out: Path) -> None:
    """The same model at another place, bit for bit where one file holds it all."""
    if path_out.exists() and os.path.samefile(path_in, path_out):
        return
    ir: Any = require_extra("onnx_ir", "onnx")
    model = ir.load(path_in)
    weights = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in weights):
        _map_weights(model, ir, path_in)
        onnx_files.save(model, path_out)
        return
    try:
        with staged(path_out, onnx_files.stale_data(path_out)) as folder:
            shutil.copyfile(path_in, folder / path_out.name)
    except OSError as exc:
        raise ExportError(must("path_out", "be a file that can be written", f"{str(path_out)!r} ({exc})")) from exc


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


# -- the sites --------------------------------------------------------------------------------------------------------


def _decide(
    trace: Trace, found: Sequence[Attention], policy: BSAPolicy, given: list[tuple[str, TokenGrid]]
) -> tuple[Decider, list[Decision]]:
    """Let the pass decide about the translated graph, and tell its decisions in terms of the ONNX file."""
    sizes = Sizes(trace.shape_env)
    tracer = Tracer(trace.module, sizes, RULES, weights=frozenset(trace.weights))
    tracer.run()
    # Nothing checks sizes when the file runs: a symbolic size is never taken for a number.
    decider = Decider(policy, Grids(sizes, {}, given, guards=False), sizes, None, "")
    try:
        decisions = decider.decide(tracer.sites)
    except GridError as exc:
        raise GridError(_named(str(exc), trace)) from None
    by_node = {a.node: a for a in found}
    return decider, [_in_onnx(_static(d), trace, by_node) for d in decisions]


def _static(decision: Decision) -> Decision:
    """The node's grids are numbers."""
    lowering = decision.lowering
    if lowering is None or all(isinstance(g, int) for g in (*lowering.grid_q, *lowering.grid_k)):
        return decision
    return decision.dense("unknown_grid", "its sizes are symbolic in the file")


def _in_onnx(decision: Decision, trace: Trace, by_node: dict[ir.Node, Attention]) -> Decision:
    site, fx_node = decision.site, decision.found.node
    node = trace.node_of(fx_node)
    attention = by_node.get(node)
    detail = site.detail
    if attention is not None and attention.hidden:
        detail = attention.op
    elif attention is None and site.reason == "opaque":
        detail = "written out as matmul, softmax, matmul in a form that is not understood"
    shown: dict[str, Any] = {
        name: _named(size, trace)
        for name in ("batch", "heads", "head_dim", "tokens_q", "tokens_k")
        if isinstance(size := getattr(site, name), str)
    }
    site = replace(
        site,
        source=node.name or node.outputs[0].name or "",
        op=attention.op if attention is not None else f"{node.op_type}-Softmax-{node.op_type}",
        detail=_named(detail, trace),
        **shown,
    )
    return replace(decision, site=site)


def _named(text: str, trace: Trace) -> str:
    """Names of the file's own dimensions in place of the symbols that stood for them."""
    return re.sub(r"\bu\d+\b", lambda match: trace.names.get(match.group(), match.group()), text)
