"""What each standard operator of ONNX is among the operators that the passes know.

A rule gives the translation of a node's first output, or of all of them; None where the passes know nothing like it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import onnx_constants as constants

if TYPE_CHECKING:
    import onnx_ir as ir

    from .onnx_trace import Trace

aten = torch.ops.aten

_ELEMENTWISE = {
    **{name: getattr(aten, name.lower()).default for name in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Neg")},
    **{name: getattr(aten, name.lower()).default for name in ("Reciprocal", "Round", "Sigmoid", "Sign", "Sin", "Sqrt")},
    **{name: getattr(aten, name.lower()).default for name in ("Tanh", "Relu", "Elu", "Gelu", "Log", "IsNaN", "IsInf")},
    **{name: getattr(aten, name.lower()).Tensor for name in ("Add", "Sub", "Mul", "Div")},
    "Pow": aten.pow.Tensor_Tensor,
    "Where": aten.where.self,
    "Clip": aten.clamp.default,
    "Max": aten.maximum.default,
    "Min": aten.minimum.default,
    "Not": aten.logical_not.default,
    "And": aten.logical_and.default,
    "Or": aten.logical_or.default,
    "Xor": aten.logical_xor.default,
    "Equal": aten.eq.Tensor,
    "Greater": aten.gt.Tensor,
    "GreaterOrEqual": aten.ge.Tensor,
    "Less": aten.lt.Tensor,
    "LessOrEqual": aten.le.Tensor,
    "Mod": aten.remainder.Tensor,
    "Softplus": aten.softplus.default,
    "HardSigmoid": aten.hardsigmoid.default,
    "HardSwish": aten.hardswish.default,
    "LeakyRelu": aten.leaky_relu.default,
    "PRelu": aten.where.self,
    "Mish": aten.mish.default,
    "Swish": aten.sigmoid.default,
    "Sum": aten.add.Tensor,
    "Mean": aten.add.Tensor,
}
# Positions stay where they are; weights, statistics and the like have no say.
_SAME = {
    "Identity": aten.clone.default,
    "Cast": aten._to_copy.default,
    "CastLike": aten._to_copy.default,
    "Dropout": aten.dropout.default,
    "LayerNormalization": aten.layer_norm.default,
    "RMSNormalization": aten.layer_norm.default,
    "GroupNormalization": aten.group_norm.default,
    "InstanceNormalization": aten.layer_norm.default,
    "BatchNormalization": aten.layer_norm.default,
    "SimplifiedLayerNormalization": aten.layer_norm.default,
    "LpNormalization": aten.layer_norm.default,
    "Softmax": aten.softmax.int,
    "LogSoftmax": aten.softmax.int,
    "CumSum": aten.cumsum.default,
    "QuantizeLinear": aten._to_copy.default,
    "DequantizeLinear": aten._to_copy.default,
}
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
# What they give depends on sizes or on nothing: it brings no tokens.
_CONSTANT = ("Constant", "Shape", "Size", "Range", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform")


def constant(t: Trace, node: ir.Node) -> list[fx.Node]:
    for value in node.outputs:
        t.weight(value)
    return [t.of(v) for v in node.outputs]


def elementwise(t: Trace, node: ir.Node) -> fx.Node:
    return t.call(_ELEMENTWISE[node.op_type], tuple(t.inputs(node)), t.example(node.outputs[0]))


def same(t: Trace, node: ir.Node) -> fx.Node:
    return t.call(_SAME[node.op_type], (t.of(node.inputs[0]),), t.example(node.outputs[0]))


def view(t: Trace, node: ir.Node) -> fx.Node:
    return t.call(aten.view.default, (t.of(node.inputs[0]), []), t.example(node.outputs[0]))


def transpose(t: Trace, node: ir.Node) -> fx.Node:
    x = t.of(node.inputs[0])
    attribute = node.attributes.get("perm")
    perm = list(range(len(t.sizes(x))))[::-1] if attribute is None else list(attribute.as_ints())
    return t.call(aten.permute.default, (x, perm), t.example(node.outputs[0]))


def expand(t: Trace, node: ir.Node) -> fx.Node:
    return t.call(aten.expand.default, (t.of(node.inputs[0]), []), t.example(node.outputs[0]))


def tile(t: Trace, node: ir.Node) -> fx.Node | None:
    times = constants.integers(node.inputs[1])
    if times is None:
        return None
    return t.call(aten.repeat.default, (t.of(node.inputs[0]), times), t.example(node.outputs[0]))


def concat(t: Trace, node: ir.Node) -> fx.Node:
    axis, result = constants.integer(node, "axis", 0), t.example(node.outputs[0])
    items = [_item(v, axis) for v in node.inputs]
    if all(item is not None for item in items):
        return t.call(aten.stack.default, ([t.of(item) for item in items], axis), result)
    return t.call(aten.cat.default, (t.inputs(node), axis), result)


def _item(value: ir.Value | None, axis: int) -> ir.Value | None:
    """x where `value` is x with one more dimension at `axis`: a concatenation of such ones is a stack."""
    maker = None if value is None else value.producer()
    if maker is None or (maker.domain, maker.op_type) != ("", "Unsqueeze"):
        return None
    rank = len(constants.static_shape(value) or ())
    return maker.inputs[0] if [a % rank for a in constants.axes(maker) or ()] == [axis % rank] else None


def split(t: Trace, node: ir.Node) -> list[fx.Node] | None:
    pieces = [t.example(v) for v in node.outputs]
    if any(p is None for p in pieces):
        return None
    axis = constants.integer(node, "axis", 0)
    whole = t.call(aten.split_with_sizes.default, (t.of(node.inputs[0]), [], axis), tuple(pieces))
    return [t.call(operator.getitem, (whole, i), p) for i, p in enumerate(pieces)]


def slice_(t: Trace, node: ir.Node) -> fx.Node | None:
    x = t.of(node.inputs[0])
    starts, ends, steps = (constants.integers(constants.operand(node, i)) for i in (1, 2, 4))
    along = constants.integers(constants.operand(node, 3))
    result = t.example(node.outputs[0])
    if starts is None or ends is None or result is None:
        return None
    if constants.operand(node, 3) is None:
        along = list(range(len(starts)))
    if along is None or (steps is None and constants.operand(node, 4) is not None):
        return None
    for i, axis in enumerate(along):
        sizes = t.sizes(x)
        axis %= len(sizes)
        sizes[axis] = result.shape[axis]
        step = 1 if steps is None else steps[i]
        example = t.tensor(sizes, result.dtype)
        if step < 1:
            x = t.call(aten.flip.default, (x, [axis]), example)
        else:
            x = t.call(aten.slice.Tensor, (x, axis, starts[i], ends[i], step), example)
    return x


def gather(t: Trace, node: ir.Node) -> fx.Node | None:
    data, indices = node.inputs
    assert data is not None
    assert indices is not None
    x, axis, result = t.of(data), constants.integer(node, "axis", 0), t.example(node.outputs[0])
    axis %= len(t.sizes(x))
    picked = constants.integers(indices)
    rank = len(constants.static_shape(indices) or ())
    if rank == 0 and picked is not None:
        return t.call(aten.select.int, (x, axis, picked[0]), result)
    if axis == 0 and constants.is_weight(data):
        return t.call(aten.embedding.default, (x, t.of(indices)), result)
    return t.call(aten.index_select.default, (x, axis, t.of(indices)), result) if rank == 1 else None


def matmul(t: Trace, node: ir.Node) -> fx.Node:
    return t.call(aten.matmul.default, tuple(t.inputs(node)), t.example(node.outputs[0]))


def gemm(t: Trace, node: ir.Node) -> fx.Node:
    operands = t.inputs(node)
    for i, name in enumerate(("transA", "transB")):
        if constants.integer(node, name, 0):
            operands[i] = t.permuted(operands[i], (1, 0))
    result = t.example(node.outputs[0])
    product = t.call(aten.matmul.default, tuple(operands[:2]), result)
    return product if len(operands) < 3 else t.call(aten.add.Tensor, (product, operands[2]), result)


def einsum(t: Trace, node: ir.Node) -> fx.Node:
    equation = node.attributes["equation"].as_string()
    return t.call(aten.einsum.default, (equation, t.inputs(node)), t.example(node.outputs[0]))


def convolution(t: Trace, node: ir.Node) -> fx.Node:
    x, weight = t.inputs(node)[:2]
    transposed = node.op_type == "ConvTranspose"
    args: tuple[Any, ...] = (x, weight, None, [], [], [], transposed, [], 1)
    return t.call(aten.convolution.default, args, t.example(node.outputs[0]))


def reduction(t: Trace, node: ir.Node) -> fx.Node | None:
    x = t.of(node.inputs[0])
    given = constants.axes(node)
    if node.op_type.startswith("Arg"):
        given = [constants.integer(node, "axis", 0)]
    if given is None and constants.operand(node, 1) is not None:
        return None
    if not given and constants.integer(node, "noop_with_empty_axes", 0):
        return t.call(aten.clone.default, (x,), t.example(node.outputs[0]))
    dims = given or list(range(len(t.sizes(x))))
    return t.call(aten.mean.dim, (x, dims), t.example(node.outputs[0]))


def pad(t: Trace, node: ir.Node) -> fx.Node | None:
    pads, x = constants.integers(constants.operand(node, 1)), t.of(node.inputs[0])
    rank = len(t.sizes(x))
    if pads is None or len(pads) != 2 * rank or constants.operand(node, 3) is not None:
        return None
    pairs = [p for dim in reversed(range(rank)) for p in (pads[dim], pads[dim + rank])]
    return t.call(aten.constant_pad_nd.default, (x, pairs), t.example(node.outputs[0]))


RULES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(_CONSTANT, constant),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_VIEWS, view),
    **{f"Reduce{name}": reduction for name in _REDUCTIONS},
    "ArgMax": reduction,
    "ArgMin": reduction,
    "Transpose": transpose,
    "Expand": expand,
    "Tile": tile,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "Conv": convolution,
    "ConvTranspose": convolution,
    "Pad": pad,
}
