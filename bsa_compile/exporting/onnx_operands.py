"""The operands of written-out attention: what an exporter did to q, k and v on their way into the products, undone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .onnx_constants import scalar, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_STEPS = 24  # scales and views in a row; more is nothing that anyone writes
_HALVES = ("FLOAT16", "BFLOAT16")
_SCALE_TOLERANCE = 1e-6  # square roots of a scale, multiplied again


@dataclass(frozen=True)
class Operand:
    """A value that, transposed, is `[.., tokens, head_dim]`.

    Attributes:
        value: the value.
        perm: the permutation; None where it is the identity.
    """

    value: ir.Value
    perm: tuple[int, ...] | None = None


def scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The operand and the factor of a multiplication by a positive constant."""
    if node.domain != "" or node.op_type not in ("Mul", "Div") or None in node.inputs:
        return None
    a, b = node.inputs
    assert a is not None
    assert b is not None
    factor, rest = scalar(b), a
    if factor is None and node.op_type == "Mul":
        factor, rest = scalar(a), b
    if factor is None or not math.isfinite(factor) or factor <= 0:
        return None
    shapes = static_shape(node.outputs[0]), static_shape(rest)
    if shapes[0] is not None and shapes[1] is not None and len(shapes[0]) != len(shapes[1]):
        return None  # the constant has more dimensions than what it scales
    return rest, factor if node.op_type == "Mul" else 1.0 / factor


def order(have: str, want: str) -> tuple[int, ...]:
    return tuple(have.index(letter) for letter in want)


def tidy(value: ir.Value, perm: Sequence[int]) -> Operand:
    perm = tuple(perm)
    return Operand(value, None if perm == tuple(range(len(perm))) else perm)


def peel(value: ir.Value, perm: tuple[int, ...]) -> tuple[Operand, float]:
    """Take scales and transpositions off an operand.

    Args:
        value: the operand as the product gets it.
        perm: its permutation to `[.., tokens, head_dim]`.

    Returns:
        The operand without what was taken off, and the factor.
    """
    factor, identity = 1.0, tuple(range(len(perm)))
    best = value, perm, factor
    for _ in range(_MAX_STEPS):
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
            break
        by_constant = scaled(node)
        if by_constant is not None:
            value, factor = by_constant[0], factor * by_constant[1]
        elif node.op_type == "Identity":
            value = node.inputs[0]
        elif node.op_type == "Transpose":
            inner = _permutation(node, len(perm))
            value, perm = node.inputs[0], tuple(inner[p] for p in perm)
        elif (straight := _transposed_in_three(value)) is not None:
            last = len(perm) - 1
            swap = {last: last - 1, last - 1: last}
            value, perm = straight, tuple(swap.get(p, p) for p in perm)
        else:
            break
        if perm == identity or best[1] != identity or factor != best[2]:  # a permutation is not worth taking off alone
            best = value, perm, factor
    return tidy(best[0], best[1]), best[2]


def _permutation(node: ir.Node, rank: int) -> list[int]:
    attribute = node.attributes.get("perm")
    return list(range(rank))[::-1] if attribute is None else list(attribute.as_ints())


def _transposed_in_three(value: ir.Value) -> ir.Value | None:
    """x where `value` is x with its last two dimensions exchanged by Reshape to 3-D, Transpose, Reshape."""
    back = _made_by(value, "Reshape")
    swap = _made_by(back.inputs[0], "Transpose") if back is not None else None
    if swap is None or _permutation(swap, 3) != [0, 2, 1]:
        return None
    inner = swap.inputs[0]
    front = _made_by(inner, "Reshape")
    x = inner if front is None else front.inputs[0]
    return next((c for c in (x, inner) if c is not None and _last_two_exchanged(c, inner, value)), None)


def _last_two_exchanged(x: ir.Value, middle: ir.Value | None, value: ir.Value) -> bool:
    before, between, after = static_shape(x), static_shape(middle), static_shape(value)
    if before is None or between is None or after is None or len(before) != len(after) or len(between) != 3:
        return False
    if None in before[-2:] or before[-2:] != after[-2:][::-1] or between[-2:] != before[-2:]:
        return False
    lead = list(zip(x.shape or (), value.shape or (), strict=True))[:-2]
    # Views keep the number of elements: where all dimensions but one agree, that one does too.
    return sum(not _same_size(a, b) for a, b in lead) <= 1


def _same_size(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions are known to be the same."""
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a.value is not None and a.value == b.value


def at_precision_of_values(q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand]:
    """Queries and keys before they were cast up for the scores, where both had the values' type."""
    narrow = v.value.dtype
    before = [_made_by(x.value, "Cast") for x in (q, k)]
    sources = [cast.inputs[0] for cast in before if cast is not None]
    if len(sources) < 2 or narrow is None or narrow.name not in _HALVES:
        return q, k
    first, second = sources
    wide = [x.value.dtype.name for x in (q, k) if x.value.dtype is not None]
    if first is None or second is None or wide != ["FLOAT", "FLOAT"] or not first.dtype == second.dtype == narrow:
        return q, k
    return replace(q, value=first), replace(k, value=second)


def ungrouped(k: Operand, v: Operand) -> tuple[Operand, Operand]:
    """Keys and values before each of their heads was repeated for several query heads."""
    once = _before_repeat(k), _before_repeat(v)
    if once[0] is None or once[1] is None:
        return k, v
    groups = [(static_shape(x.value) or [None, None])[1] for x in once if x is not None]
    if groups[0] is None or groups[0] != groups[1]:
        return k, v
    return once[0], once[1]


def _before_repeat(x: Operand) -> Operand | None:
    """`Reshape(Expand(Unsqueeze(x, 2)))`, `[B, G, S, D]` to `[B, G * n, S, D]`."""
    if x.perm is not None:
        return None
    reshape = _made_by(x.value, "Reshape")
    expand = _made_by(reshape.inputs[0], "Expand", "Tile") if reshape is not None else None
    unsqueeze = _made_by(expand.inputs[0], "Unsqueeze", "Reshape") if expand is not None else None
    if expand is None or unsqueeze is None:
        return None
    source = unsqueeze.inputs[0]
    sizes = [static_shape(v) for v in (source, unsqueeze.outputs[0], expand.outputs[0], x.value)]
    if source is None or [len(s or ()) for s in sizes] != [4, 5, 5, 4]:
        return None
    (_, *plain), (_, *spread), (_, *copies), (_, *result) = (s or [] for s in sizes)
    if None in (*plain, *spread, *copies, *result):
        return None
    heads, tokens, dim = plain
    times = copies[1]
    wanted = [heads, 1, tokens, dim], [heads, times, tokens, dim], [heads * times, tokens, dim]  # type: ignore[operator]
    return replace(x, value=source) if (spread, copies, result) == wanted else None


def _made_by(value: ir.Value | None, *names: str) -> ir.Node | None:
    """The node that gives a value, if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in names and node.inputs else None


def default_or(scale: float, q: Operand) -> float | None:
    """The factor; None where it is 1 / sqrt(head_dim)."""
    shape = static_shape(q.value) or []
    dim = shape[q.perm[-1] if q.perm else -1] if shape else None
    return None if dim and abs(scale * math.sqrt(dim) - 1) < _SCALE_TOLERANCE else scale
