"""Translates an ONNX graph into the operators that the passes know, so that the pass itself decides its attention.

The translation is only looked at, never run: it has the ONNX graph's data flow and sizes, and each attention that was
matched stands in it as one `scaled_dot_product_attention`. Its tokens are then followed by the same rules as those of
a torch graph, and what the pass says of a site holds for the ONNX node.

    Transpose(x, perm)       aten.permute(x, perm)
    Split(x), axis 2         aten.split_with_sizes(x, [..], 2), getitem ..
    Foreign::Op(x, y)        a function of that name, of which nothing is known but its inputs
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .onnx_function import DOMAIN, NODE
from .onnx_match import Attention
from .onnx_names import module_class, module_path, subgraphs
from .onnx_operands import Operand
from .onnx_operators import RULES
from .onnx_sizes import Dimensions

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default

_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "BOOL": torch.bool,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT16": torch.int16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
}


class Trace:
    """An `fx` graph that stands for an ONNX graph.

    Args:
        graph: the main graph.
        found: the attention in it.

    Attributes:
        module: the translated graph.
        weights: names of its placeholders that stand for constants.
        names: names of symbolic sizes in the ONNX file, by the symbol that stands for them.
    """

    def __init__(self, graph: ir.Graph, found: Iterable[Attention]) -> None:
        self.shape_env = ShapeEnv()
        self.weights: set[str] = set()
        self._mode = FakeTensorMode(shape_env=self.shape_env)
        self._dimensions = Dimensions(self.shape_env)
        self.names: Mapping[str, str] = self._dimensions.names
        self._examples: dict[Any, torch.Tensor] = {}
        self._graph = fx.Graph()
        self._values: dict[ir.Value, fx.Node] = {}
        self._origin: dict[fx.Node, ir.Node] = {}
        self._attention = {a.node: a for a in found}
        self._at: ir.Node | None = None
        self._add_graph(graph)
        self._graph.output(())
        self.module = fx.GraphModule(torch.nn.Module(), self._graph)

    def node_of(self, node: fx.Node) -> ir.Node:
        """The ONNX node that a node of the translation comes from."""
        return self._origin[node]

    # -- graphs ---------------------------------------------------------------------------------------------------

    def _add_graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            self.weight(value)
        for value in graph.inputs:
            if value not in self._values:
                self._values[value] = self._placeholder(value)
        for node in graph:
            self._at = node
            self._add(node)

    def _add(self, node: ir.Node) -> None:
        for inner in subgraphs(node):
            # What a loop carries, and what a branch sees, is not followed into it: its inputs are sources of their own.
            self._add_graph(inner)
            self._at = node
        attention = self._attention.get(node)
        if attention is not None and not attention.hidden:
            result: Any = self._sdpa(attention)
        elif attention is not None:
            result = self._hidden(attention)
        else:
            rule = RULES.get(node.op_type) if node.domain == "" else None
            if (node.domain, node.op_type) == (DOMAIN, NODE):
                rule = Trace.block_sparse
            known = all(v is None or v.shape is not None for v in (*node.inputs, *node.outputs[:1]))
            result = rule(self, node) if rule is not None and known else None
            result = self._unknown(node) if result is None else result
        outputs = list(node.outputs)
        if isinstance(result, fx.Node):
            if outputs:
                self._values[outputs[0]] = result
            for value in outputs[1:]:
                self._values[value] = self._unknown(node, value)
            return
        self._values.update(zip(outputs, result, strict=False))

    # -- what rules use -------------------------------------------------------------------------------------------

    def of(self, value: ir.Value | None) -> fx.Node:
        """The translation of a value."""
        assert value is not None
        if value not in self._values:
            self.weight(value)
        return self._values[value]

    def inputs(self, node: ir.Node) -> list[fx.Node]:
        """The translations of a node's inputs."""
        return [self.of(v) for v in node.inputs if v is not None]

    def call(self, target: Any, args: tuple[Any, ...], example: Any, **kwargs: Any) -> fx.Node:
        """A call of `target` with the given example as its result."""
        made = self._graph.call_function(target, args, kwargs)
        made.meta["val"] = example
        if self._at is not None:
            self._origin[made] = self._at
        return made

    def site(self, attention: Attention, target: Any, operands: Sequence[fx.Node], example: Any, **kw: Any) -> fx.Node:
        """The call that the pass takes for this attention."""
        made = self.call(target, tuple(operands), example, **kw)
        made.meta["nn_module_stack"] = {"onnx": (module_path(attention.nodes), module_class(attention.nodes))}
        return made

    def sizes(self, node: fx.Node) -> list[Any]:
        """Sizes of a translated value."""
        return list(node.meta["val"].shape)

    def example(self, value: ir.Value | None) -> torch.Tensor | None:
        """A tensor without memory that has a value's sizes and type; None where they are not known."""
        if value is None or value.shape is None:
            return None
        return self.tensor([self._dimensions.of(size) for size in value.shape], _dtype(value))

    def tensor(self, sizes: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without memory. Sizes repeat from layer to layer and symbolic ones are slow to make: kept."""
        key = (*(s if isinstance(s, int) else str(s.node.expr) for s in sizes), dtype)
        if key not in self._examples:
            with self._mode:
                self._examples[key] = torch.empty(tuple(sizes), dtype=dtype, device="meta")
        return self._examples[key]

    # -- sources --------------------------------------------------------------------------------------------------

    def _placeholder(self, value: ir.Value) -> fx.Node:
        name = re.sub(r"\W", "_", value.name or "input")  # fx writes it into Python source
        made = self._graph.placeholder(name if name[0].isalpha() else f"_{name}")
        made.meta["val"] = self.example(value)
        return made

    def weight(self, value: ir.Value) -> None:
        """Translate a value that is the same whatever the inputs are."""
        made = self._placeholder(value)
        self.weights.add(made.name)
        self._values[value] = made

    # -- attention ------------------------------------------------------------------------------------------------

    def _sdpa(self, attention: Attention) -> fx.Node:
        kwargs = dict(attention.options)
        assert attention.v is not None
        operands = []
        for which, operand in enumerate((attention.q, attention.k, attention.v)):
            heads = attention.heads[which > 0] if attention.heads else None
            operands.append(self._four(operand, heads, kwargs))
        q, _, v = operands
        if not all(o.meta["val"] is not None and o.meta["val"].dim() == 4 for o in operands):
            return self.site(attention, _SDPA, operands, self.example(attention.output), **kwargs)
        computed = self.tensor([*self.sizes(q)[:-1], self.sizes(v)[-1]], q.meta["val"].dtype)
        site = result = self.site(attention, _SDPA, operands, computed, **kwargs, enable_gqa=True)
        if attention.heads:
            result = self.permuted(result, (0, 2, 1, 3))
        example = self.example(attention.output)
        if example is None:
            return site
        if attention.out_perm is not None:
            rank = len(attention.out_perm)
            if rank > 4:
                return self.call(_function(attention.node.op_type), (site,), example)
            lead = list(range(4 - rank))
            result = self.permuted(result, (*lead, *(p + 4 - rank for p in attention.out_perm)))
        return self.call(aten.view.default, (result, []), example)

    def _four(self, operand: Operand, heads: int | None, kwargs: dict[str, Any]) -> fx.Node:
        """An operand as [batch, heads, tokens, head_dim]."""
        node = self.of(operand.value)
        if node.meta["val"] is None:
            return node
        if operand.perm is not None:
            node = self.permuted(node, operand.perm)
        sizes, dtype = self.sizes(node), node.meta["val"].dtype
        if heads is not None:
            batch, tokens, width = sizes
            if not isinstance(width, int) or width % heads:
                return node
            by_head = self.tensor((batch, tokens, heads, width // heads), dtype)
            return self.permuted(self.call(aten.view.default, (node, []), by_head), (0, 2, 1, 3))
        if len(sizes) == 4:
            return node
        if len(sizes) > 4:
            kwargs["dimensions"] = len(sizes)
            first = sizes[0]
            for size in sizes[1:-3]:
                first = first * size
            sizes = [first, *sizes[-3:]]
        else:
            # [B, S, D] is one head of each item of the batch.
            sizes = [*sizes[:-2], *([1] * (4 - len(sizes))), *sizes[-2:]]
        return self.call(aten.view.default, (node, []), self.tensor(sizes, dtype))

    def permuted(self, node: fx.Node, perm: Sequence[int]) -> fx.Node:
        """A transposition of a translated value."""
        sizes = self.sizes(node)
        example = self.tensor([sizes[p] for p in perm], node.meta["val"].dtype)
        return self.call(aten.permute.default, (node, list(perm)), example)

    def _hidden(self, attention: Attention) -> fx.Node:
        """An operator that attends inside: the pass reports such a call and looks no further."""
        operands = (self.of(attention.q.value), self.of(attention.k.value), self.of(attention.k.value))
        example = self.example(attention.output)
        if example is None:
            example = operands[0].meta["val"]
        return self.site(attention, torch._native_multi_head_attention, operands, example)

    def block_sparse(self, node: ir.Node) -> fx.Node | None:
        """A node that an earlier run put there: no site, and its tokens are those of its queries."""
        return self.call(torch.ops.bsa.attend.default, tuple(self.inputs(node)[:3]), self.example(node.outputs[0]))

    # -- operators ------------------------------------------------------------------------------------------------

    def _unknown(self, node: ir.Node, value: ir.Value | None = None) -> Any:
        """A call of a function with the operator's name: its result depends on all inputs in an unknown way."""
        inner = [self.of(v) for graph in subgraphs(node) for v in graph.outputs if v is not None]
        args = tuple(dict.fromkeys([*self.inputs(node), *inner]))
        target = _function(node.op_type)
        if value is not None:
            return self.call(target, args, self.example(value))
        return [self.call(target, args, self.example(v)) for v in node.outputs]


def _dtype(value: ir.Value) -> torch.dtype:
    """Types that torch lacks, and unknown ones, are ones that no attention is computed in."""
    return _DTYPES.get(value.dtype.name if value.dtype is not None else "", torch.uint8)


def _function(name: str) -> Callable[..., None]:
    """A function that stands for an operator of which nothing is known but its name."""

    def operator_of_unknown_effect(*_: Any) -> None:
        raise AssertionError("a translated graph is only looked at")

    operator_of_unknown_effect.__name__ = operator_of_unknown_effect.__qualname__ = name
    operator_of_unknown_effect.__module__ = "onnx_operator"
    return operator_of_unknown_effect
