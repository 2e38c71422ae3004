"""Finds attention in an ONNX graph: `Attention` nodes, and attention written out as matmul, softmax, matmul.

What exporters and hand-written models differ in is undone here: scales before or after the first product, on queries,
keys or both; keys transposed in place or by another operator's permutation; casts around the softmax; guards against
NaN; heads that share keys. What has no block-sparse form is matched all the same, with an option that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import onnx_constants as constants
from .onnx_constants import axes, integer, operand, scalar, static_shape
from .onnx_function import DOMAIN
from .onnx_operands import Operand, at_precision_of_values, default_or, order, peel, scaled, tidy, ungrouped

if TYPE_CHECKING:
    import onnx_ir as ir

WRITTEN_OUT = "MatMul-Softmax-MatMul"

_MAX_STEPS = 24  # operators between softmax and a product; more is no attention that anyone writes
_MAX_VALUES = 200  # looked at to find the product behind masks and biases


@dataclass(frozen=True)
class Attention:
    """One attention of a graph.

    Attributes:
        op: what was matched, for the report.
        node: the node that gives the result.
        q, k, v: the operands; v is None where the node does not tell.
        heads: (query heads, key heads) where the operands are `[batch, tokens, heads * head_dim]`.
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        options: what has no block-sparse form, by name; nothing where there is no such thing.
        out_perm: permutation from `[.., tokens, head_dim]` to the node's output, None for the identity.
        hidden: whether the operands are inside an operator that cannot be replaced.
        nodes: the node and those that belong to it, the telling ones first.
    """

    op: str
    node: ir.Node
    q: Operand
    k: Operand
    v: Operand | None
    heads: tuple[int, int] | None = None
    scale: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    out_perm: tuple[int, ...] | None = None
    hidden: bool = False
    nodes: tuple[ir.Node, ...] = ()

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


def find(nodes: Sequence[ir.Node]) -> list[Attention]:
    """Every attention among these nodes, in their order."""
    found = []
    for node in nodes:
        if node.domain == "" and node.op_type == "Softmax":
            attention = _written_out(node)
        elif node.domain == "" and node.op_type == "Attention":
            attention = _node(node)
        elif node.domain not in ("", DOMAIN) and "attention" in node.op_type.lower():
            attention = _foreign(node)
        else:
            continue
        if attention is not None:
            found.append(attention)
    known = {n for attention in found for n in (attention.node, *attention.nodes)}
    return [*found, *(a for node in nodes if node not in known and (a := _unknown_form(node, known)) is not None)]


_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Identity", "Expand", "Split", "Slice")
_PRODUCTS = ("MatMul", "Einsum", "Gemm", "MatMulInteger", "QLinearMatMul")


def _factors(node: ir.Node) -> list[ir.Value]:
    """What a product multiplies, apart from weights; nothing for other operators."""
    named = node.op_type in _PRODUCTS if node.domain == "" else "matmul" in node.op_type.lower()
    return [v for v in node.inputs if v is not None and not _stored(v)] if named else []


def _stored(value: ir.Value, depth: int = 8) -> bool:
    """Whether a value is a weight, or made of weights alone: transposed, cast, dequantized."""
    maker = value.producer()
    if constants.is_weight(value) or maker is None or not depth:
        return constants.is_weight(value)
    return all(_stored(v, depth - 1) for v in maker.inputs if v is not None)


def _unknown_form(node: ir.Node, known: set[ir.Node]) -> Attention | None:
    """A product of values with what was made of another product: better reported than overlooked."""
    factors = _factors(node)
    if len(factors) < 2:
        return None
    for factor in factors[:2]:
        waiting, seen = [(factor, "")], set[Any]()
        while waiting and len(seen) < _MAX_VALUES:
            value, between = waiting.pop()
            maker = value.producer()
            if maker is None or maker in seen or maker in known:
                continue
            seen.add(maker)
            scores = _factors(maker)
            if len(scores) >= 2 and between:
                q, k = (Operand(v) for v in scores[:2])
                op = f"{maker.op_type}-{between}-{node.op_type}"
                return Attention(op, node, q, k, None, hidden=True, nodes=(node,))
            if scores or (maker.domain == "" and maker.op_type in ("Conv", "ConvTranspose")):
                continue  # a projection: what lies behind it is another layer
            if maker.domain != "" or maker.op_type not in _LAYOUT:
                between = maker.op_type if not between or maker.op_type in ("Softmax", "Exp") else between
            waiting.extend((v, between) for v in maker.inputs if v is not None and not constants.is_weight(v))
    return None


# -- one node ---------------------------------------------------------------------------------------------------------


def _node(node: ir.Node) -> Attention | None:
    q, k, v, mask, past_key, past_value = (operand(node, i) for i in range(6))
    if q is None or k is None or v is None:
        return None
    options: dict[str, Any] = {}
    if mask is not None:
        options["attn_mask"] = mask.name
    if integer(node, "is_causal", 0):
        options["is_causal"] = True
    if past_key is not None or past_value is not None:
        options["past_key"] = "a cache"
    softcap = _number(node, "softcap")
    if softcap:
        options["softcap"] = softcap
    if integer(node, "softmax_precision", 1) == 11:
        options["softmax_precision"] = "double"
    for position, name in enumerate(("present_key", "present_value", "qk_matmul_output"), start=1):
        if position < len(node.outputs) and _used(node.outputs[position]):
            options[name] = "used"
    heads = (integer(node, "q_num_heads", 0), integer(node, "kv_num_heads", 0))
    return Attention(
        "Attention",
        node,
        Operand(q),
        Operand(k),
        Operand(v),
        heads=heads if all(heads) and len(static_shape(q) or ()) == 3 else None,
        scale=_number(node, "scale"),
        options=options,
        nodes=(node,),
    )


def _foreign(node: ir.Node) -> Attention | None:
    """An attention operator of another domain: better reported than overlooked."""
    tensors = [v for v in node.inputs[:3] if v is not None and not constants.is_weight(v)]
    if not tensors:
        return None
    q, k = tensors[0], tensors[1] if len(tensors) > 2 else tensors[0]
    return Attention(f"{node.domain}::{node.op_type}", node, Operand(q), Operand(k), None, hidden=True, nodes=(node,))


def _number(node: ir.Node, name: str) -> float | None:
    attribute = node.attributes.get(name)
    return None if attribute is None or attribute.is_ref() else attribute.as_float()


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


# -- written out ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A batched matrix product, its dimensions named by letters: MatMul, or an Einsum of two operands."""

    node: ir.Node
    a: ir.Value
    b: ir.Value
    letters_a: str
    letters_b: str
    letters: str


def _product(node: ir.Node | None) -> _Product | None:
    if node is None or node.domain != "" or len(node.inputs) != 2 or None in node.inputs:
        return None
    a, b = node.inputs
    assert a is not None
    assert b is not None
    if node.op_type == "MatMul":
        sizes = static_shape(a), static_shape(b)
        if any(s is None or len(s) < 2 for s in sizes) or len(sizes[0] or ()) != len(sizes[1] or ()):
            return None
        lead = "ABCDEFGH"[: len(sizes[0] or ()) - 2]
        return _Product(node, a, b, f"{lead}ik", f"{lead}kj", f"{lead}ij")
    if node.op_type == "Einsum":
        equation = node.attributes["equation"].as_string().replace(" ", "")
        terms, arrow, out = equation.partition("->")
        first, comma, second = terms.partition(",")
        if not arrow or not comma or "." in equation or any(len(set(t)) != len(t) for t in (first, second, out)):
            return None
        return _Product(node, a, b, first, second, out)
    return None


def _written_out(softmax: ir.Node) -> Attention | None:
    """Scores, softmax over keys, weighted sum of values: from the softmax both ways."""
    after, before = _weighted_sum(softmax), _scores(softmax.inputs[0], set())
    if after is None or before is None:
        return None
    summed, options = after
    product = before.product
    rank = len(product.letters)
    if integer(softmax, "axis", -1) not in (-1, rank - 1):
        return None
    options = {**before.options, **options}
    query, key = product.letters[-2], product.letters[-1]
    lead = product.letters[:-2]
    common = (set(product.letters_a) & set(product.letters_b)) - set(product.letters)
    if len(common) != 1:
        return None
    channel = common.pop()
    if set(product.letters_a) != {*lead, query, channel} or set(product.letters_b) != {*lead, key, channel}:
        return None
    # The second product in the letters of the first: the weights' dimensions are the scores'.
    names = dict(zip(summed.letters_a, product.letters, strict=True)) if len(summed.letters_a) == rank else {}
    column = set(summed.letters_b) - set(summed.letters_a)
    if not names or len(column) != 1:
        return None
    names[column.pop()] = "_"
    letters_v, letters_o = ("".join(names.get(x, "?") for x in t) for t in (summed.letters_b, summed.letters))
    if set(letters_v) != {*lead, key, "_"} or set(letters_o) != {*lead, query, "_"}:
        return None
    q, factor_q = peel(product.a, order(product.letters_a, f"{lead}{query}{channel}"))
    k, factor_k = peel(product.b, order(product.letters_b, f"{lead}{key}{channel}"))
    v = tidy(summed.b, order(letters_v, f"{lead}{key}_"))
    q, k = at_precision_of_values(q, k, v)
    k, v = ungrouped(k, v)
    scale = before.factor * factor_q * factor_k
    out = order(f"{lead}{query}_", letters_o)
    return Attention(
        WRITTEN_OUT,
        summed.node,
        q,
        k,
        v,
        scale=default_or(scale, q),
        options=options,
        out_perm=None if out == tuple(range(rank)) else out,
        nodes=(softmax, summed.node, product.node),
    )


def _weighted_sum(softmax: ir.Node) -> tuple[_Product, dict[str, Any]] | None:
    """The product with the values, downstream of the softmax through what does not change the weights."""
    weights, options = softmax.outputs[0], dict[str, Any]()
    for _ in range(_MAX_STEPS):
        guarded = _nan_guard(weights)
        uses = [] if guarded is not None else list(weights.uses())
        if guarded is not None:
            weights = guarded
            continue
        products = [p for u in uses if u.idx == 0 and (p := _product(u.node)) is not None]
        if products:
            if len(uses) > 1 or weights.is_graph_output():
                options["attention_weights"] = "used"
            return products[0], options
        onward = [u.node for u in uses if u.idx == 0 and u.node.domain == ""]
        passing = [n for n in onward if n.op_type in ("Cast", "Identity", "Dropout")]
        if not passing:
            return None
        if len(uses) > 1 or weights.is_graph_output():
            options["attention_weights"] = "used"
        node = passing[0]
        if node.op_type == "Dropout" and _drops(node):
            options["dropout_p"] = "in training mode"
        weights = node.outputs[0]
    return None


def _nan_guard(weights: ir.Value) -> ir.Value | None:
    """`Where(IsNaN(p), 0, p)`, which keeps rows without any key at zero; without a mask there is no such row."""
    nodes = {u.node for u in weights.uses()}
    if {n.op_type for n in nodes} != {"IsNaN", "Where"} or len(nodes) != 2:
        return None
    where = next(n for n in nodes if n.op_type == "Where")
    condition, zero, kept = (operand(where, i) for i in range(3))
    tests = condition is not None and condition.producer() in nodes and condition.producer() is not where
    return where.outputs[0] if tests and scalar(zero) == 0.0 and kept is weights else None


def _drops(node: ir.Node) -> bool:
    """Whether a Dropout may drop anything."""
    training = operand(node, 2)
    if training is None:
        return False
    known = constants.constant(training)
    return known is None or bool(known.any())


@dataclass(frozen=True)
class _Scores:
    """The product of queries and keys behind a softmax.

    Attributes:
        product: the product.
        factor: what it is multiplied by on the way.
        options: what else happens on the way.
        steps: how far away it is.
    """

    product: _Product
    factor: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 0


def _scores(value: ir.Value | None, seen: set[ir.Value]) -> _Scores | None:
    """The nearest product upstream of a softmax, through what may happen to scores."""
    node = None if value is None or value in seen or len(seen) > _MAX_VALUES else value.producer()
    if node is None or value is None:
        return None
    seen.add(value)
    product = _product(node)
    if product is not None:
        return _Scores(product)
    if node.domain != "":
        return None
    by_constant = scaled(node)
    if by_constant is not None:
        rest, factor = by_constant
        return _further(_scores(rest, seen), factor=factor)
    if node.op_type in ("Identity", "Cast"):
        return _further(_scores(node.inputs[0], seen))
    if node.op_type == "Sub" and _is_row_maximum(node.inputs[1], node.inputs[0]):
        return _further(_scores(node.inputs[0], seen))
    kind = _IN_BETWEEN.get(node.op_type)
    if kind is None:
        return None
    found = [(s, v) for v in node.inputs if (s := _scores(v, seen)) is not None]
    if not found:
        return None
    scores, through = min(found, key=lambda item: item[0].steps)
    others = [v for v in node.inputs if v is not None and v is not through]
    if node.op_type in ("Add", "Sub") and all(scalar(v) == 0.0 for v in others):
        return _further(scores)
    what = (others[0].name or node.op_type) if kind == "attn_mask" and others else node.op_type
    return _further(scores, options={kind: what})


def _further(scores: _Scores | None, factor: float = 1.0, options: dict[str, Any] | None = None) -> _Scores | None:
    """The same scores, seen from one step downstream."""
    if scores is None:
        return None
    return _Scores(scores.product, scores.factor * factor, {**scores.options, **(options or {})}, scores.steps + 1)


# What may lie between the scores and the softmax, and what it makes of the attention.
_IN_BETWEEN = {
    "Add": "attn_mask",
    "Sub": "attn_mask",
    "Where": "attn_mask",
    "Mul": "scores",
    "Div": "scores",
    "Tanh": "softcap",
    "Clip": "scores",
    "Max": "scores",
    "Min": "scores",
    "Reshape": "scores",
    "Unsqueeze": "scores",
    "Squeeze": "scores",
    "Transpose": "scores",
    "Expand": "scores",
}


def _is_row_maximum(value: ir.Value | None, scores: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "ReduceMax" or node.inputs[0] is not scores:
        return False
    rank = len(static_shape(scores) or ())
    return axes(node) in ([-1], [rank - 1]) and integer(node, "keepdims", 1) == 1
