"""Puts the block-sparse node in the place of an attention of an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import require_extra
from ..passes.decide import Lowering
from .onnx_constants import static_shape
from .onnx_function import DOMAIN, NODE, node_attributes
from .onnx_match import Attention
from .onnx_operands import Operand

if TYPE_CHECKING:
    import onnx_ir as ir


class Emitter:
    """Replaces attention by `ai.bsa::GatedBlockSparseAttention`.

    Before::

        scores = MatMul (q, k_transposed)
        scaled = Mul (scores, scale)
        weights = Softmax <axis = -1> (scaled)
        out = MatMul (weights, v)

    After::

        k = Transpose <perm = [0, 1, 3, 2]> (k_transposed)        # only where no such value is there already
        out = ai.bsa.GatedBlockSparseAttention <grid_q, tile_q, ..> (q, k, v)

    Operands of another rank or layout are reshaped around the node; `out` keeps its name.

    Args:
        attention: the attention.
        lowering: grids and parameters.
        replaced: outputs of attention that was replaced before, and what stands for them now; this one is added.
    """

    def __init__(self, attention: Attention, lowering: Lowering, replaced: dict[ir.Value, ir.Value]) -> None:
        self.ir: Any = require_extra("onnx_ir", "onnx")
        self.attention = attention
        self.lowering = lowering
        self.replaced = replaced
        self._count = 0

    def replace(self) -> None:
        """Put the node in; what only the old attention needed is removed."""
        attention, policy = self.attention, self.lowering.policy
        assert attention.v is not None
        q, k, v = (self._four(operand, which) for which, operand in enumerate((attention.q, attention.k, attention.v)))
        v = self._cast(v, q.dtype)
        scale = attention.scale
        if scale is None:
            scale = 1 / math.sqrt(static_shape(q)[-1])  # type: ignore[index, arg-type]
        attributes = node_attributes(
            self.lowering.grid_q,
            policy.chunk_3d_shape_q,
            self.lowering.grid_k,
            policy.chunk_3d_shape_k,
            policy.sparsity,
            policy.cdf_threshold,
            scale,
        )
        result = self._node(NODE, [q, k, v], attributes, domain=DOMAIN, like=q)
        result = self._cast(self._back(result), attention.output.dtype)
        self._take_over(result)

    # -- around the node ------------------------------------------------------------------------------------------

    def _four(self, operand: Operand, which: int) -> ir.Value:
        """An operand as [batch, heads, tokens, head_dim]."""
        value = self.replaced.get(operand.value, operand.value)
        if operand.perm is not None:
            value = self._transpose(value, operand.perm)
        if self.attention.heads:
            heads = self.attention.heads[which > 0]
            width = (static_shape(value) or [0])[-1] or 0
            sizes = [*list(value.shape or ())[:2], heads, width // heads]
            # 0 keeps a dimension as it is, whatever it is.
            by_head = self._node(
                "Reshape", [value, self._integers([0, 0, heads, width // heads])], sizes=sizes, like=value
            )
            return self._transpose(by_head, (0, 2, 1, 3))
        missing = 4 - len(value.shape or ())
        if missing == 0:
            return value
        lead = list(value.shape or ())[:-2]
        axes = list(range(len(lead), len(lead) + missing))
        sizes = [*lead, *([1] * missing), *list(value.shape or ())[-2:]]
        return self._node("Unsqueeze", [value, self._integers(axes)], sizes=sizes, like=value)

    def _back(self, result: ir.Value) -> ir.Value:
        """The node's output in the layout of the old one."""
        attention = self.attention
        old = attention.output
        if attention.heads:
            by_token = self._transpose(result, (0, 2, 1, 3))
            width = attention.heads[0] * int(static_shape(result)[-1])  # type: ignore[index, arg-type]
            return self._node("Reshape", [by_token, self._integers([0, 0, width])], sizes=old.shape, like=by_token)
        rank = len(attention.q.value.shape or ())
        if rank < 4:
            axes = list(range(rank - 2, 2))
            sizes = [s for i, s in enumerate(result.shape or ()) if i not in axes]
            result = self._node("Squeeze", [result, self._integers(axes)], sizes=sizes, like=result)
        return result if attention.out_perm is None else self._transpose(result, attention.out_perm)

    def _transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        producer = value.producer()
        if producer is not None and producer.domain == "" and producer.op_type == "Transpose":
            attribute = producer.attributes.get("perm")
            inner = attribute.as_ints() if attribute is not None else list(range(len(perm)))[::-1]
            if producer.inputs[0] is not None and [inner[p] for p in perm] == list(range(len(perm))):
                return producer.inputs[0]
        sizes = list(value.shape or ())
        return self._node("Transpose", [value], {"perm": list(perm)}, sizes=[sizes[p] for p in perm], like=value)

    def _cast(self, value: ir.Value, dtype: Any) -> ir.Value:
        if dtype is None or value.dtype == dtype:
            return value
        result = self._node("Cast", [value], {"to": int(dtype)}, like=value)
        result.dtype = dtype
        return result

    def _integers(self, values: Sequence[int]) -> ir.Value:
        tensor = self.ir.tensor(np.asarray(values, dtype=np.int64))
        result = self._node("Constant", [], {"value": tensor}, sizes=[len(values)])
        result.dtype = self.ir.DataType.INT64
        return result

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        sizes: Any = None,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """Insert a node before the old one; its type is that of `like`, and so is its shape unless `sizes` tells."""
        old = self.attention.node
        node = self.ir.node(op_type, inputs, attributes, domain=domain, metadata_props=dict(old.metadata_props))
        result = node.outputs[0]
        # Names of our own: what onnx_ir would choose may be taken in a graph around this one.
        self._count += 1
        result.name = f"{self.attention.output.name}/block_sparse_{self._count}"
        node.name = f"{old.name or self.attention.output.name}/{op_type}_{self._count}"
        shape = sizes if sizes is not None else like.shape if like is not None else None
        if shape is not None:
            result.shape = self.ir.Shape(list(shape))
        if like is not None and like.dtype is not None:
            result.dtype = like.dtype
        assert old.graph is not None
        old.graph.insert_before(old, node)
        return result

    # -- the old one ----------------------------------------------------------------------------------------------

    def _take_over(self, result: ir.Value) -> None:
        old, node = self.attention.output, self.attention.node
        name, shape, dtype = old.name, old.shape, old.dtype
        if shape is not None:
            result.shape = shape
        if dtype is not None:
            result.dtype = dtype
        result.metadata_props.update(old.metadata_props)
        self.ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        old.name, result.name = None, name
        self.replaced[old] = result
        _remove_unused(node)


def _remove_unused(node: ir.Node) -> None:
    """Remove a node that nothing uses, and then what only it used."""
    pending = [node]
    while pending:
        candidate = pending.pop()
        graph = candidate.graph
        if graph is None or any(v.uses() or v.is_graph_output() for v in candidate.outputs):
            continue
        producers = [v.producer() for v in candidate.inputs if v is not None]
        weights = [v for v in candidate.inputs if v is not None and v.is_initializer()]
        graph.remove(candidate, safe=True)
        for value in weights:
            kept = value.uses() or value.is_graph_output() or value.is_graph_input()
            if not kept and value.graph is not None and value.name is not None:
                value.graph.initializers.pop(value.name)
        pending.extend(p for p in producers if p is not None)
