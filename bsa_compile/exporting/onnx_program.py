"""`export_onnx`: a model as an ONNX file in which every block-sparse attention is one node."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import BSACompileError, ExportError, UsageError, must, one_line, require_extra
from ..files import check_writable
from ..grid import TokenGrid
from ..passes.copying import no_copy_warnings, with_module
from ..policy import BSAPolicy
from ..report import Report
from . import onnx_files, onnx_function
from .program import export, report_of

# Where an ONNX file keeps its report, as JSON, among the model's metadata.
REPORT_KEY = "bsa_compile"


def export_onnx(
    model: nn.Module,
    policy: BSAPolicy | None,
    example_inputs: Sequence[Any],
    path: str | os.PathLike[str],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    grid: TokenGrid | Sequence[int] | None = None,
    opset: int = 23,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Report:
    """Write a model with block-sparse self-attention as an ONNX file.

    Every rewritten attention is one node `ai.bsa::GatedBlockSparseAttention`. What it computes travels in the file as
    a function of standard operators, so onnxruntime runs it as it is; a runtime with a kernel of its own binds the
    node. Attention that stays dense becomes `Attention` (opset 23) or MatMul-Softmax-MatMul.

    Args:
        model, policy, example_inputs, example_kwargs, dynamic_shapes, grid: as in `export`.
        path: the file. Weights of 256 MiB and more go to `<path>.data` beside it, straight from where they lie.
        opset: version of the standard operators, 20 to 23.
        input_names, output_names: as in `torch.onnx.export`.

    Returns:
        What was done at every attention site.

    Raises:
        UsageError: `opset` is not supported, `path` cannot be written, or what `export` refuses.
        GridError, PolicyError, SiteError: as in `export`.
        ExportError: torch.export or the ONNX exporter cannot express the model.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnxscript", "onnx_ir"):
        require_extra(module, "onnx")
    functions = onnx_function.functions(opset)  # refuses an unknown opset now
    check_writable(path, "path")
    program = export(model, policy, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes, grid=grid)
    report = report_of(program)
    program = with_nodes(program)
    exported = _to_onnx(program, opset, input_names, output_names)
    _check_types(exported, opset)
    add_functions(exported, functions)
    exported.metadata_props[REPORT_KEY] = report.to_json()
    onnx_files.save(exported, path)
    return report


def with_nodes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program with one symbolic ONNX node in place of each pool, pool, select, attend."""
    module = copy.copy(program.graph_module)
    module.graph = copy.deepcopy(program.graph_module.graph)
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.bsa.attend.default):
        _replace(graph, node)
    graph.eliminate_dead_code()
    module.recompile()
    return with_module(program, module)


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    bound = _arguments(node)
    select = _arguments(bound["kv_num_blocks"].args[0])
    output = next(user for user in node.users if user.args[1] == 0)
    attributes = onnx_function.node_attributes(
        grid_q=bound["grid_q"],
        tile_q=bound["tile_q"],
        grid_k=bound["grid_k"],
        tile_k=bound["tile_k"],
        sparsity=select["sparsity"],
        cdf_threshold=select["cdf_threshold"],
        scale=bound["scale"],
    )
    q, k, v = (bound[name] for name in ("q", "k", "v"))
    with graph.inserting_before(node):
        shape = [_size(graph, q, dim) for dim in range(4)]
        new = graph.call_function(*_symbolic([q, k, v], attributes, output.meta["val"].dtype, shape))
    new.meta = dict(output.meta)
    output.replace_all_uses_with(new)
    name = output.name
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    new.name = name  # an export's signature goes by name


def _arguments(node: Any) -> dict[str, Any]:
    """Arguments of a call by name, defaults included."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {**{a.name: a.default_value for a in schema if a.has_default_value()}, **given, **node.kwargs}


def _size(graph: fx.Graph, x: fx.Node, dim: int) -> Any:
    size = x.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    node = graph.call_function(torch.ops.aten.sym_size.int, (x, dim))
    node.meta["val"] = size
    return node


def _symbolic(
    inputs: list[fx.Node], attributes: Mapping[str, Any], dtype: torch.dtype, shape: list[Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call that `torch.onnx.ops.symbolic` makes, with sizes that may be nodes."""
    from torch.onnx.ops import _dtype_mappings, _symbolic_impl

    encoded = vars(_symbolic_impl.EncodedAttrs.from_dict(dict(attributes)))
    onnx_dtype = next(o for o, t in _dtype_mappings.ONNX_DTYPE_TO_TORCH_DTYPE.items() if t == dtype)
    kwargs = {
        "shape": shape,
        **encoded,
        "metadata_props_keys": [],
        "metadata_props_values": [],
        "domain": onnx_function.DOMAIN,
        "version": onnx_function.VERSION,
    }
    return torch.ops.onnx_symbolic._symbolic.default, (inputs, onnx_function.NODE, onnx_dtype), kwargs


def _to_onnx(
    program: torch.export.ExportedProgram,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Any:
    try:
        with _quiet(), no_copy_warnings():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
    except BSACompileError:
        raise
    except Exception as exc:  # the exporter wraps whatever its translations raise
        raise ExportError(must("model", "be expressible in ONNX", one_line(_cause(exc)))) from exc
    assert made is not None
    found = made.model.opset_imports.get("")
    if found != opset:  # the exporter logs that it could not convert, and goes on
        raise ExportError(must("opset", "be one that the exporter can convert this model to", opset, f"Try {found}."))
    return made.model


def _check_types(model: Any, opset: int) -> None:
    """Refuse element types that an operator of this opset does not take: bfloat16 came to some, Conv for one, in 22."""
    import onnx

    for node in model.graph.all_nodes():
        if node.domain or not onnx.defs.has(node.op_type):
            continue
        schema = onnx.defs.get_schema(node.op_type, opset)
        for value, formal in zip(node.inputs, schema.inputs, strict=False):
            name = None if value is None or value.dtype is None else f"tensor({value.dtype.name.lower()})"
            if name == "tensor(bfloat16)" and name not in formal.types:
                what = f"{opset}, whose {node.op_type} has none"
                raise UsageError(must("opset", "be one with bfloat16 for this model", what, "Try 22 or 23."))


def _cause(exc: BaseException) -> BaseException:
    """What went wrong first: the exporter wraps it in advice for its own developers."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that have nothing to do with this model."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def add_functions(model: Any, functions: Iterable[Any]) -> None:
    """Give an `onnx_ir.Model` the functions behind its `ai.bsa` nodes, if it has any."""
    ir: Any = require_extra("onnx_ir", "onnx")
    if not any(node.domain == onnx_function.DOMAIN for node in model.graph.all_nodes()):
        return
    for proto in functions:
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    model.opset_imports[onnx_function.DOMAIN] = onnx_function.VERSION
