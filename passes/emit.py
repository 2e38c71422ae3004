"""Inserts the block-sparse ops in place of one attention call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import strides
from .decide import Decision
from .modulepath import mode_of, value, value_key
from .symbols import Symbols

# What a tracer notes of the node that was, and would be untrue of the nodes that replace it.
_NOT_INHERITED = frozenset(
    ["val", "example_value", "tensor_meta", "source_fn_stack", "torch_fn", "original_aten", "unbacked_bindings"]
)


class Emitter:
    """Replaces one attention call of a copied graph; `nodes` maps the original's nodes to the copy's."""

    def __init__(self, graph: fx.Graph, nodes: dict[fx.Node, fx.Node], decision: Decision, symbols: Symbols) -> None:
        self.graph = graph
        self.nodes = nodes
        self.node = node = nodes[decision.found.node]
        self.decision = decision
        self.symbols = symbols
        self.key = value_key(node) or "val"
        self.match = decision.found.match
        self.original = _output(decision.found.node, self.match.tuple_result)
        self.output = None if self.original is None else nodes[self.original]
        self.meta = {k: v for k, v in node.meta.items() if k not in _NOT_INHERITED}

    def replace(self) -> None:
        """Insert the block-sparse ops and erase the call."""
        node, output = self.node, self.output
        if self.original is not None and output is not None:
            with self.graph.inserting_before(node):
                new = self._attend(output)
            output.replace_all_uses_with(new)
            self.nodes[self.original] = new  # the operand of a later site, perhaps
        for user in list(node.users):
            self.graph.erase_node(user)
        self.graph.erase_node(node)
        if output is not None and self.key == "val":
            new.name = output.name  # an export's signature goes by name

    def _attend(self, output: fx.Node) -> fx.Node:
        lowering, match = self.decision.lowering, self.match
        assert lowering is not None
        policy, example = lowering.policy, value(output)
        grid_q, grid_k = ([self._size(size) for size in grid] for grid in (lowering.grid_q, lowering.grid_k))
        tile_q, tile_k = list(policy.chunk_3d_shape_q), list(policy.chunk_3d_shape_k)
        q, k, v = (self._operand(self._copied(x), example.dtype) for x in (match.q, match.k, match.v))
        scale = float(match.scale) if match.scale is not None else value(q).shape[3] ** -0.5
        ops, detach = torch.ops.bsa, torch.ops.aten.detach.default
        gate_q, gate_k = self._call(detach, q), self._call(detach, k)  # the selection gets no gradient
        grids = (grid_q, tile_q, grid_k, tile_k)
        criteria = (policy.sparsity, policy.cdf_threshold, scale)
        if match.ring:
            selected = self._call(ops.ring_select.default, gate_q, gate_k, *grids, *match.ring, *criteria)
            counts, indices = (self._call(operator.getitem, selected, i) for i in (0, 1))
            options = (*grids, *match.ring, scale, policy.attend)
            attended = self._call(ops.ring_attend.default, q, k, v, counts, indices, *options)
            return self._call(operator.getitem, attended, 0)
        # The kernels read tiles straight from raster order: reordering tokens would cost a copy of each operand.
        pooled_q = self._call(ops.pool.default, gate_q, grid_q, tile_q, "raster")
        pooled_k = self._call(ops.pool.default, gate_k, grid_k, tile_k, "raster")
        selected = self._call(ops.select.default, pooled_q, pooled_k, *criteria)
        counts, indices = (self._call(operator.getitem, selected, i) for i in (0, 1))
        options = (*grids, scale, "raster", policy.attend)
        attended = self._call(ops.attend.default, q, k, v, counts, indices, *options)
        out = self._call(operator.getitem, attended, 0)
        if match.layout == "BSHD":
            out = self._call(torch.ops.aten.transpose.int, out, 1, 2)
        if strides.relied_upon(output, value(out)):
            out = self._restride(out, strides.order(example))
        return out

    def _operand(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`[B, H, S, D]` in the dtype that the attention computes in, with a unit last stride."""
        if self.match.layout == "BSHD":
            x = self._call(torch.ops.aten.transpose.int, x, 1, 2)
        if value(x).dtype != dtype:
            x = self._call(torch.ops.aten.to.dtype, x, dtype)
        if not (isinstance(value(x).stride(-1), int) and value(x).stride(-1) == 1):
            x = self._call(torch.ops.aten.contiguous.default, x)
        return x

    def _restride(self, x: fx.Node, order: tuple[int, ...] | None) -> fx.Node:
        rank = value(x).dim()
        full = list(order or ())
        full = [d for d in range(rank) if d not in full] + full
        back = [full.index(d) for d in range(rank)]
        if full != list(range(rank)):
            x = self._call(torch.ops.aten.permute.default, x, full)
        x = self._call(torch.ops.aten.clone.default, x, memory_format=torch.contiguous_format)
        return x if full == list(range(rank)) else self._call(torch.ops.aten.permute.default, x, back)

    def _copied(self, original: fx.Node | None) -> fx.Node:
        """The copy, in the new graph, of an operand of the original call."""
        assert original is not None
        return self.nodes[original]

    def _size(self, size: Any) -> Any:
        return self._copied(size) if isinstance(size, fx.Node) else self.symbols.argument(size, self.node)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call with the metadata of the site and an example value of its own."""
        new = self.graph.call_function(target, args, kwargs)
        examples = fx.map_arg(args, value)
        mode = mode_of(value(self.node))
        with mode if mode is not None else torch.no_grad(), torch.no_grad():
            example = target(*examples, **kwargs)
        new.meta = {**self.meta, self.key: example}
        return new


def _output(node: fx.Node, tuple_result: bool) -> fx.Node | None:
    """The node that holds the attention's result, None if nothing uses it."""
    return next((u for u in node.users if u.args == (node, 0)), None) if tuple_result else node
