"""Completes the shapes of an ONNX graph where a file holds none, or sizes that its exporter left to be computed.

onnx's own inference gives up at views whose shape is computed from other shapes, which older exporters write for every
layer. Here such a computation is followed, named dimensions included, and what it gives is carried on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..passes.sizes import Size, Sizes, of, product
from . import onnx_constants as constants
from .onnx_function import DOMAIN
from .onnx_names import all_nodes
from .onnx_sizes import size_of

if TYPE_CHECKING:
    import onnx_ir as ir

Shape = list[Any]
"""Sizes; None for an unknown one."""

_SIZES = Sizes()
_LIKE_FIRST = [
    "Identity",
    "Cast",
    "CastLike",
    "Dropout",
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "BatchNormalization",
    "SimplifiedLayerNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
    "CumSum",
    "Abs",
    "Ceil",
    "Cos",
    "Erf",
    "Exp",
    "Floor",
    "Neg",
    "Reciprocal",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sqrt",
    "Tanh",
    "Relu",
    "Elu",
    "Gelu",
    "Log",
    "IsNaN",
    "Clip",
    "Softplus",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mish",
    "Swish",
    "Not",
]
_BROADCAST = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Where",
    "Max",
    "Min",
    "Mod",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "And",
    "Or",
    "Xor",
    "PRelu",
    "Sum",
    "Mean",
]


def complete(graph: ir.Graph, make_shape: Callable[[list[Any]], ir.Shape]) -> None:
    """Fill in shapes and sizes, in the order of execution; what is a number already stays.

    Args:
        graph: the graph.
        make_shape: makes a shape of ints, texts and None.
    """
    for node in all_nodes(graph):
        rule = _RULES.get(node.op_type) if node.domain in ("", DOMAIN) else None
        if rule is None or all(v.shape is not None and v.shape.is_static() for v in node.outputs):
            continue
        try:
            found = rule(node)
        except (IndexError, TypeError, ValueError):  # a file whose nodes contradict each other: nothing is learnt
            continue
        for value, shape in zip(node.outputs, found or [], strict=False):
            _set(value, shape, make_shape)


def _set(value: ir.Value, shape: Shape | None, make_shape: Callable[[list[Any]], ir.Shape]) -> None:
    if shape is None:
        return
    before = list(value.shape) if value.shape is not None else [None] * len(shape)
    if len(before) != len(shape):
        return
    merged: list[Any] = []
    for old, new in zip(before, shape, strict=True):
        if isinstance(old, int) or new is None:
            merged.append(old)
        else:
            merged.append(new if isinstance(new, int) else str(new))
    value.shape = make_shape(merged)


def _sizes(value: ir.Value | None) -> Shape:
    if value is None or value.shape is None:
        raise ValueError("unknown rank")
    return [size_of(d) for d in value.shape]


def _like_first(node: ir.Node) -> list[Shape]:
    return [_sizes(node.inputs[0])]


def _broadcast(node: ir.Node) -> list[Shape]:
    return [_together([_sizes(v) for v in node.inputs if v is not None])]


def _together(shapes: Sequence[Shape]) -> Shape:
    rank = max(len(s) for s in shapes)
    wide = [[1] * (rank - len(s)) + s for s in shapes]
    return [_one(sizes) for sizes in zip(*wide, strict=True)]


def _one(sizes: Sequence[Size | None]) -> Size | None:
    wide = [s for s in sizes if s != 1]
    if not wide:
        return 1
    known = next((s for s in wide if isinstance(s, int)), wide[0])
    same = all(s is not None and _SIZES.same(s, known) for s in wide if s is not known)
    return known if isinstance(known, int) or (known is not None and same) else None


def _transpose(node: ir.Node) -> list[Shape]:
    x = _sizes(node.inputs[0])
    attribute = node.attributes.get("perm")
    perm = list(range(len(x)))[::-1] if attribute is None else list(attribute.as_ints())
    return [[x[p] for p in perm]]


def _reshape(node: ir.Node) -> list[Shape] | None:
    target = constants.sizes(node.inputs[1])
    if target is None:
        return None
    x = None if node.inputs[0] is None or node.inputs[0].shape is None else _sizes(node.inputs[0])
    if 0 in target and not constants.integer(node, "allowzero", 0):
        target = [None if x is None else x[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 in target:
        others = [size for size in target if size != -1]
        known = x is not None and None not in x and None not in others
        rest = _SIZES.quotient(product(x), product(others)) if known else None  # type: ignore[arg-type]
        target = [rest if size == -1 else size for size in target]
    return [target]


def _unsqueeze(node: ir.Node) -> list[Shape] | None:
    x, axes = _sizes(node.inputs[0]), constants.axes(node)
    if axes is None:
        return None
    rank = len(x) + len(axes)
    rest, new = iter(x), {a % rank for a in axes}
    return [[1 if i in new else next(rest) for i in range(rank)]]


def _squeeze(node: ir.Node) -> list[Shape] | None:
    x, axes = _sizes(node.inputs[0]), constants.axes(node)
    if axes is None:
        return None if not all(isinstance(s, int) for s in x) else [[s for s in x if s != 1]]
    gone = {a % len(x) for a in axes}
    return [[s for i, s in enumerate(x) if i not in gone]]


def _flatten(node: ir.Node) -> list[Shape] | None:
    x, axis = _sizes(node.inputs[0]), constants.integer(node, "axis", 1)
    parts = x[:axis], x[axis:]
    return [[None if None in part else product(part) for part in parts]]


def _expand(node: ir.Node) -> list[Shape] | None:
    target = constants.sizes(node.inputs[1])
    return None if target is None else [_together([_sizes(node.inputs[0]), target])]


def _concat(node: ir.Node) -> list[Shape]:
    parts = [_sizes(v) for v in node.inputs]
    axis = constants.integer(node, "axis", 0) % len(parts[0])
    along = [p[axis] for p in parts]
    result = [_one(sizes) for sizes in zip(*parts, strict=True)]
    result[axis] = None if None in along else of(sum(along))
    return [result]


def _split(node: ir.Node) -> list[Shape] | None:
    x = _sizes(node.inputs[0])
    axis = constants.integer(node, "axis", 0) % len(x)
    given, count = constants.integers(constants.operand(node, 1)), len(node.outputs)
    if given is None:
        given = [x[axis] // count] * count if isinstance(x[axis], int) and x[axis] % count == 0 else None
    return None if given is None else [[*x[:axis], size, *x[axis + 1 :]] for size in given]


def _slice(node: ir.Node) -> list[Shape] | None:
    x = _sizes(node.inputs[0])
    starts, ends, axes, steps = (constants.integers(constants.operand(node, i)) for i in range(1, 5))
    axes = list(range(len(starts or ()))) if constants.operand(node, 3) is None else axes
    if axes is None:
        return None
    for i, axis in enumerate(axes):
        size = x[axis]
        bounds = (starts, ends, [1] * len(axes) if constants.operand(node, 4) is None else steps)
        if isinstance(size, int) and None not in bounds:
            start, end, step = (bound[i] for bound in bounds if bound is not None)
            x[axis] = len(range(size)[start:end:step])
        else:
            x[axis] = None
    return [x]


def _gather(node: ir.Node) -> list[Shape]:
    x, indices = _sizes(node.inputs[0]), _sizes(node.inputs[1])
    axis = constants.integer(node, "axis", 0) % len(x)
    return [[*x[:axis], *indices, *x[axis + 1 :]]]


def _matmul(node: ir.Node) -> list[Shape] | None:
    a, b = _sizes(node.inputs[0]), _sizes(node.inputs[1])
    if len(a) < 2 or len(b) < 2:
        return None
    return [[*_together([a[:-2], b[:-2]]), a[-2], b[-1]] if max(len(a), len(b)) > 2 else [a[-2], b[-1]]]


def _gemm(node: ir.Node) -> list[Shape]:
    a, b = _sizes(node.inputs[0]), _sizes(node.inputs[1])
    return [[a[constants.integer(node, "transA", 0)], b[1 - constants.integer(node, "transB", 0)]]]


def _attention(node: ir.Node) -> list[Shape] | None:
    q, v = _sizes(node.inputs[0]), _sizes(node.inputs[2])
    if len(q) == 4:
        return [[*q[:-1], v[-1]]]
    heads, kv_heads = (constants.integer(node, f"{which}_num_heads", 0) for which in ("q", "kv"))
    width = v[-1] * heads // kv_heads if isinstance(v[-1], int) and kv_heads else None
    return [[*q[:-1], width]]


_RULES: dict[str, Callable[[Any], list[Shape] | None]] = {
    **dict.fromkeys(_LIKE_FIRST, _like_first),
    **dict.fromkeys(_BROADCAST, _broadcast),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Attention": _attention,
    "GatedBlockSparseAttention": _attention,
}
