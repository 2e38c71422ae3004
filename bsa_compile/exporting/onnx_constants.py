"""Small constants of an ONNX graph: scales, axes and shapes, also where an exporter left them to be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from ..passes.sizes import Size, Sizes, of
from .onnx_sizes import size_of

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_ELEMENTS = 1024  # axes, shapes and scales are short; weights are never read
_MAX_DEPTH = 32
_SIZES = Sizes()

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Neg": np.negative,
    "Identity": np.asarray,
}


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers that a value holds whatever the inputs are; None where that is unknown, or more than a few numbers.

    Follows what exporters compute scales and shapes from: `Shape` of static dimensions, slices, casts, arithmetic.
    """
    found = _constant(value, _MAX_DEPTH)
    return None if found is None or found.dtype == object else found


def sizes(value: ir.Value | None) -> list[Size | None] | None:
    """A list of sizes that an exporter left to be computed, None for an unknown one; None where nothing is known."""
    found = _constant(value, _MAX_DEPTH)
    if found is None or found.ndim != 1 or found.dtype.kind not in "iuO":
        return None
    plain = [v if isinstance(v, sympy.Expr) else int(v) for v in found]
    return [None if isinstance(v, sympy.Expr) and "?" in map(str, v.free_symbols) else of(v) for v in plain]


def scalar(value: ir.Value | None) -> float | None:
    """The one number that a constant holds, None where it is no constant of one element."""
    found = constant(value)
    return float(found.reshape(())) if found is not None and found.size == 1 and found.dtype.kind != "b" else None


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant list of integers, None where it is none."""
    found = constant(value)
    return [int(v) for v in found.reshape(-1)] if found is not None and found.dtype.kind in "iu" else None


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


def axes(node: ir.Node, position: int = 1, name: str = "axes") -> list[int] | None:
    """Axes given as an attribute (older opsets) or as an input; None where they are not known or not given."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return None if attribute.is_ref() else list(attribute.as_ints())
    return integers(operand(node, position))


def operand(node: ir.Node, position: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def is_weight(value: ir.Value) -> bool:
    """Whether a value is stored in the file."""
    return value.const_value is not None or value.is_initializer()


def static_shape(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value, None for those that are not numbers; None where not even their count is known."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def _constant(value: ir.Value | None, depth: int) -> np.ndarray | None:
    if value is None or depth == 0:
        return None
    tensor = value.const_value
    if tensor is not None:
        return np.asarray(tensor.numpy()) if tensor.size <= _MAX_ELEMENTS else None
    node = value.producer()
    if node is None or node.domain != "" or value.index() != 0:
        return None
    if node.op_type == "Constant":
        return _stored(node)
    if node.op_type == "Shape":
        return _shape(node)
    if node.op_type not in _ELEMENTWISE and node.op_type not in _RULES:
        return None
    given = [None if v is None else _constant(v, depth - 1) for v in node.inputs]
    if any(g is None and v is not None for g, v in zip(given, node.inputs, strict=True)) or not given:
        return None
    with np.errstate(all="ignore"):
        try:
            rule = _RULES.get(node.op_type)
            result = _ELEMENTWISE[node.op_type](*given) if rule is None else rule(node, *given)
        except (TypeError, ValueError, IndexError, ZeroDivisionError, AttributeError):
            return None
    result = None if result is None else _tidy(np.asarray(result))
    return None if result is None or result.size > _MAX_ELEMENTS else result


def _stored(node: ir.Node) -> np.ndarray | None:
    name, attribute = next(iter(node.attributes.items()), ("", None))
    if attribute is None or attribute.is_ref():
        return None
    if name == "value":
        tensor = attribute.as_tensor()
        return np.asarray(tensor.numpy()) if tensor.size <= _MAX_ELEMENTS else None
    if name in ("value_int", "value_ints"):
        return np.asarray(attribute.value, dtype=np.int64)
    if name in ("value_float", "value_floats"):
        return np.asarray(attribute.value, dtype=np.float32)
    return None


def _shape(node: ir.Node) -> np.ndarray | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    sizes = [size_of(d) for d in value.shape]
    start, end = integer(node, "start", 0), integer(node, "end", len(sizes))
    # A dimension without a name is one unknown number; a slice of the others may still be known.
    unknown = sympy.Symbol("?", integer=True, positive=True)
    return _tidy(np.array([unknown if size is None else size for size in sizes[start:end]], dtype=object))


def _tidy(x: np.ndarray) -> np.ndarray:
    """Numbers as numbers; what depends on named dimensions stays an array of expressions."""
    if x.dtype != object:
        return x
    plain = [of(v) if isinstance(v, sympy.Expr) else v for v in x.reshape(-1)]
    if all(isinstance(v, (int, np.integer)) for v in plain):
        return np.asarray([int(v) for v in plain], dtype=np.int64).reshape(x.shape)
    return x


def _cast(node: ir.Node, x: np.ndarray) -> np.ndarray | None:
    import onnx_ir

    if x.dtype == object:
        return x if onnx_ir.DataType(integer(node, "to", 0)).is_integer() else None
    try:
        return x.astype(onnx_ir.DataType(integer(node, "to", 0)).numpy())
    except (TypeError, ValueError):
        return None


def _div(node: ir.Node, a: np.ndarray, b: np.ndarray) -> Any:
    if object in (a.dtype, b.dtype):
        quotients = [_SIZES.quotient(of(x), of(y)) for x, y in np.broadcast(a, b)]
        shape = np.broadcast(a, b).shape
        return None if None in quotients else np.array(quotients, dtype=object).reshape(shape)
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    quotient = np.abs(a) // np.abs(b)  # ONNX rounds towards zero
    return np.sign(a) * np.sign(b) * quotient


def _gather(node: ir.Node, x: np.ndarray, indices: np.ndarray) -> Any:
    return x[indices.reshape(()) if indices.ndim == 0 else indices] if integer(node, "axis", 0) == 0 else None


def _slice(node: ir.Node, x: np.ndarray, *given: np.ndarray | None) -> Any:
    starts, ends, along, steps = ([] if g is None else g.reshape(-1).tolist() for g in (*given, None, None)[:4])
    if x.ndim != 1 or len(starts) != 1 or along not in ([], [0], [-1]):
        return None
    return x[starts[0] : ends[0] : steps[0] if steps else 1]


def _squeeze(node: ir.Node, x: np.ndarray, *_: Any) -> Any:
    return x.reshape([s for s in x.shape if s != 1]) if x.ndim < 2 else None


def _unsqueeze(node: ir.Node, x: np.ndarray, *_: Any) -> Any:
    return x.reshape(1) if x.ndim == 0 else None


def _reshape(node: ir.Node, x: np.ndarray, shape: np.ndarray) -> Any:
    return x.reshape([int(s) for s in shape])


def _concat(node: ir.Node, *parts: np.ndarray) -> Any:
    return np.concatenate(parts)


def _mod(node: ir.Node, a: np.ndarray, b: np.ndarray) -> Any:
    return None if object in (a.dtype, b.dtype) else np.fmod(a, b) if integer(node, "fmod", 0) else np.mod(a, b)


def _where(node: ir.Node, condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    return np.where(condition.astype(bool), a, b)


def _equal(node: ir.Node, a: np.ndarray, b: np.ndarray) -> Any:
    """Sizes are positive: an expression is never the -1 that exporters compare with."""
    return np.equal(a, b).astype(bool)


def _filled(node: ir.Node, shape: np.ndarray) -> Any:
    attribute = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
    return np.full([int(s) for s in shape], fill[0]) if np.prod(shape) <= _MAX_ELEMENTS else None


def _product(node: ir.Node, x: np.ndarray, *_: Any) -> Any:
    return np.prod(x, keepdims=bool(integer(node, "keepdims", 1))) if x.ndim == 1 else None


_RULES: dict[str, Callable[..., Any]] = {
    "Cast": _cast,
    "Div": _div,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Concat": _concat,
    "Mod": _mod,
    "Where": _where,
    "Equal": _equal,
    "ConstantOfShape": _filled,
    "ReduceProd": _product,
}
