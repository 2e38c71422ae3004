"""Follows tokens through a graph: which dimension of which tensor holds which tokens of which origin, in which order.

A forward abstract interpretation. Origins are patch embeddings (any Conv3d: its output's T, H, W) and, for graphs that
begin later, the dimensions of the graph's inputs. Per node and origin the analysis keeps a `Layout`, or the place where
the order was lost. It adds no guard and never compares sizes to find out what a dimension is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from .calls import Call, call_of, is_pointwise, module_call, qualified_name, schema_of
from .changes import Changes
from .layout import Layout
from .match import Match, match, written_out
from .modulepath import value
from .regions import Body, region
from .sizes import Size, Sizes, of, shape
from .states import EMPTY, Found, Origin, State, States, where
from .tracks import Track, Tracks

_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
Rule: TypeAlias = Callable[["Tracer", Call], States]


class Tracer:
    """Interprets one graph; subgraphs are interpreted by tracers of their own that share the list of sites.

    Args:
        module: the graph.
        sizes: what is known of symbolic sizes.
        rules: transfer rule by operator name.
        path: names of the calls that lead here.
        sites: where attention calls are collected, in the order of execution.
        sealed: whether the graph must not change.
        weights: names of placeholders that hold parameters and buffers, where the graph itself does not say so.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        sizes: Sizes,
        rules: dict[str, Rule],
        path: tuple[str, ...] = (),
        sites: list[Found] | None = None,
        sealed: bool = False,
        weights: frozenset[str] = frozenset(),
    ) -> None:
        self.module = module
        self.sizes = sizes
        self.tracks = Tracks(sizes)
        self.rules = rules
        self.path = path
        self.sites: list[Found] = [] if sites is None else sites
        self.sealed = sealed
        self.weights = weights
        self._states: dict[fx.Node, States] = {}
        self.changes = Changes(sizes)
        self._base: dict[fx.Node, fx.Node] = {}
        self._dropped: dict[fx.Node, dict[Origin, str]] = {}

    def run(self, inputs: Sequence[States] | None = None) -> States:
        """Interpret the graph.

        Args:
            inputs: states of the placeholders; by default each is an origin of its own.

        Returns:
            The state of the output, or one per item of an output tuple.
        """
        placeholders = 0
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                given = None if inputs is None else inputs[placeholders]
                self._states[node] = self._placeholder(node) if given is None else given
                placeholders += 1
            elif node.op == "output":
                result = node.args[0]
                if isinstance(result, (list, tuple)):
                    return tuple(self.state(r) for r in result)
                return self.states(result)
            elif node.op != "get_attr":
                self._states[node] = self._node(node)
                found = self._states[node]
                operands = [(n, self.state(n)) for n in node.all_input_nodes]
                self.changes.note(node, found if isinstance(found, tuple) else (found,), operands)
        return EMPTY

    # -- what rules ask -------------------------------------------------------------------------------------------

    def states(self, node: Any) -> States:
        """The state of a node, a tuple for a node that gives several tensors."""
        found = self._states.get(node, EMPTY) if isinstance(node, fx.Node) else EMPTY
        gone = self._dropped.get(self.base(node)) if isinstance(node, fx.Node) else None
        if not gone or isinstance(found, tuple):
            return found
        tokens = {o: t for o, t in found.tokens.items() if o not in gone}
        lost = found.lost | {o: gone[o] for o in found.tokens if o in gone}
        return State(tokens, lost, found.projected)

    def state(self, node: Any) -> State:
        """The state of a tensor; of a tuple, its first item."""
        found = self.states(node)
        return found if isinstance(found, State) else found[0] if found else EMPTY

    def shape(self, node: Any) -> tuple[Size, ...]:
        """Sizes of a node's tensor; empty where the node holds none."""
        example = value(node)
        return shape(example) if isinstance(example, torch.Tensor) else ()

    def size(self, argument: Any) -> Size | None:
        """An int argument, given as itself or as a node."""
        return of(value(argument))

    def dim(self, argument: Any, rank: int) -> int:
        """A dimension counted from the front."""
        return argument % rank if rank else 0

    def base(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` may be a view of."""
        while node in self._base:
            node = self._base[node]
        return node

    # -- what rules do --------------------------------------------------------------------------------------------

    def each(
        self, call: Call, state: State, rule: Callable[[Track], Track | None], *, projected: bool = False
    ) -> State:
        """Apply `rule` to every origin; where it gives None the order is lost at this operator."""
        tokens, lost = {}, dict(state.lost)
        for origin, track in state.tokens.items():
            done = rule(track)
            if done is None:
                lost[origin] = where(call.node)
            else:
                tokens[origin] = done
        return State(tokens, lost, state.projected or projected)

    def lose(self, node: fx.Node, *states: State) -> State:
        """Nothing is known of the result but what it was made of."""
        lost: dict[Origin, str] = {}
        for state in states:
            lost.update(state.lost)
            lost.update(dict.fromkeys(state.tokens, where(node)))
        return State({}, lost, any(s.projected for s in states))

    def join(self, node: fx.Node, operands: Sequence[Any], out: Sequence[Size]) -> State:
        """An elementwise operator: position i of the result is position i of every operand that has one."""
        states = [(self.state(o), self.shape(o)) for o in operands if isinstance(o, fx.Node)]
        tokens: dict[Origin, Track] = {}
        lost: dict[Origin, str] = {}
        for origin in dict.fromkeys(o for state, _ in states for o in state.tokens):
            tracks = [(s.tokens[origin], size) for s, size in states if origin in s.tokens]
            joined = self._join_tracks(tracks, out)
            if joined is None:
                lost[origin] = where(node)
            else:
                tokens[origin] = joined
        for state, _ in states:
            lost.update((o, text) for o, text in state.lost.items() if o not in tokens and o not in lost)
        return State(tokens, lost, any(s.projected for s, _ in states))

    def drop(self, node: fx.Node, origins: Iterable[Origin], at: fx.Node) -> None:
        """Memory was overwritten: no view of it holds these tokens in order any more."""
        gone = self._dropped.setdefault(self.base(node), {})
        gone.update(dict.fromkeys(origins, where(at)))

    def alias(self, node: fx.Node, of_node: Any) -> None:
        """Note that `node` may be a view of another."""
        if isinstance(of_node, fx.Node):
            self._base[node] = of_node

    # -- details --------------------------------------------------------------------------------------------------

    def _join_tracks(self, tracks: Sequence[tuple[Track, tuple[Size, ...]]], out: Sequence[Size]) -> Track | None:
        wide = []
        for track, size in tracks:
            lead = len(out) - len(size)
            spread = [i for i in range(len(out)) if i < lead or not self.sizes.same(size[i - lead], out[i])]
            wide.append((self.tracks.expand(track, out), spread))
        # An operand that is broadcast along the tokens of another adds the same to all: it says nothing of order.
        telling = [
            track
            for track, spread in wide
            if not any(
                isinstance(other, Layout) and any(self.tracks.one.moves(other.dims[i]) for i in spread)
                for other, _ in wide
                if other is not track
            )
        ]
        result: Track | None = telling[0] if telling else None
        for track in telling[1:]:
            result = None if result is None else self.tracks.combine(result, track)
        return result

    def _placeholder(self, node: fx.Node) -> State:
        example = value(node)
        if not isinstance(example, torch.Tensor) or node.name in self.weights or is_weight(node, example):
            return EMPTY
        sizes = shape(example)
        name = "/".join((*self.path, node.name))
        return State(
            {
                Origin(name, dim, size): self.tracks.one.raster(sizes, [dim])
                for dim, size in enumerate(sizes)
                if not self.sizes.same(size, 1)
            }
        )

    def _node(self, node: fx.Node) -> States:
        inside = region(self.module, node)
        found = match(node) or (None if inside is not None else written_out(node))
        if found is not None:
            self._site(node, found)
        if found is not None and found.op != "matmul-softmax-matmul":
            return self._attention(node, found)
        if inside is not None:
            return self._region(node, inside.bodies, inside.sealed)
        if node.op == "call_function" and qualified_name(node.target) == "bsa::attend":  # a site of an earlier run
            return self._attention(node, Match("attend", *node.args[:3]))  # type: ignore[arg-type]
        if node.op == "call_module":
            call = module_call(node, self.module.get_submodule(str(node.target)))
        else:
            call = call_of(node)
        if call is None:
            return self._unknown(node)
        if isinstance(value(node), _NUMBERS):
            return EMPTY
        rule = self.rules.get(call.name)
        if rule is not None and value(node) is None and call.name != "setitem":
            rule = None  # traced without shapes
        if rule is not None:
            return rule(self, call)
        if is_pointwise(call.name):
            return self.pointwise(call)
        return self._unknown(node, call)

    def pointwise(self, call: Call) -> States:
        """An elementwise operator, in place or not."""
        node = call.node
        operands = list(node.all_input_nodes)
        result = self.join(node, operands, self.shape(node))
        if call.inplace and isinstance(call.x, fx.Node):
            before = self.state(call.x).tokens
            self.drop(call.x, [o for o in before if o not in result.tokens], node)
            self.alias(node, call.x)
        example = value(node)
        return tuple(result for _ in example) if isinstance(example, (list, tuple)) else result

    def _unknown(self, node: fx.Node, call: Call | None = None) -> States:
        states = [self.state(n) for n in node.all_input_nodes]
        writes = [call.x] if call is not None and call.inplace else [node.kwargs.get("out")]
        schema = schema_of(node.target)
        for i, a in enumerate(schema.arguments if schema is not None else ()):
            if a.alias_info is not None and a.alias_info.is_write:
                writes.append(node.args[i] if i < len(node.args) else node.kwargs.get(a.name))
        if node.op == "call_function" and qualified_name(node.target).endswith("::triton_kernel_wrapper_mutation"):
            writes += node.all_input_nodes  # which of them it writes is not told
        for written in writes:
            if isinstance(written, fx.Node):
                self.drop(written, self.state(written).tokens, node)
        result = self.lose(node, *states)
        example = value(node)
        if not isinstance(example, (list, tuple)):
            return result if isinstance(example, torch.Tensor) else EMPTY
        return tuple(result for _ in example)

    def _site(self, node: fx.Node, found: Match) -> None:
        q, k = (self.state(x) if x is not None else EMPTY for x in (found.q, found.k))
        changed = [self.changes.text(x) for x in (found.q, found.k)]
        self.sites.append(Found(self.path, node, found, q, k, changed[0], changed[1], self.sealed))

    def _attention(self, node: fx.Node, found: Match) -> States:
        """Every result position belongs to the query position; the keys are summed over."""
        q, others = self.state(found.q), [self.state(n) for n in node.all_input_nodes if n is not found.q]
        out = value(node)
        first = out[0] if isinstance(out, (list, tuple)) else out
        mixed = self.lose(node, *others)
        alike = isinstance(first, torch.Tensor) and self.sizes.all_same(shape(first)[:-1], self.shape(found.q)[:-1])
        if not (alike and found.like_q):
            result = self.lose(node, q, mixed)
        else:
            last = first.dim() - 1
            sizes = shape(first)
            kept = self.each(Call(node, found.op), q, lambda t: self.tracks.resize(t, [last], sizes))
            lost = {o: text for o, text in (mixed.lost | kept.lost).items() if o not in kept.tokens}
            result = State(kept.tokens, lost, True)
        if not isinstance(out, (list, tuple)):
            return result
        return (result, *(self.lose(node, q, mixed) for _ in out[1:]))

    def _region(self, node: fx.Node, bodies: Sequence[Body], sealed: bool) -> States:
        results: list[States] = []
        for body in bodies:
            inputs = None if body.operands is None else [self.states(o) for o in body.operands]
            path = (*self.path, f"{node.name}.{body.name}")
            inner = Tracer(body.module, self.sizes, self.rules, path, self.sites, self.sealed or sealed)
            placeholders = [n for n in body.module.graph.nodes if n.op == "placeholder"]
            bound = [b for b in zip(placeholders, body.operands or (), strict=False) if isinstance(b[1], fx.Node)]
            for placeholder, operand in bound:
                inner.changes.inherit(placeholder, self.changes.of(operand))
            results.append(inner.run(inputs))
            for placeholder, operand in bound:  # what the body overwrote
                self.drop(operand, inner._dropped.get(placeholder, ()), node)
        example = value(node)
        count = len(example) if isinstance(example, (list, tuple)) else 1
        states = [self.state(n) for n in node.all_input_nodes]
        items = [r if isinstance(r, tuple) else (r,) for r in results]
        if sealed or any(b.operands is None for b in bodies) or any(len(i) != count for i in items):
            merged = tuple(self.lose(node, *states) for _ in range(count))
        else:
            merged = tuple(self._agree(node, [i[n] for i in items]) for n in range(count))
        return merged if isinstance(example, (list, tuple)) or len(items[0]) > 1 else merged[0]

    def _agree(self, node: fx.Node, states: Sequence[State]) -> State:
        """What holds whichever branch runs."""
        first, *others = states
        tokens, lost = {}, {o: text for s in states for o, text in s.lost.items()}
        for origin, track in first.tokens.items():
            result: Track | None = track
            for other in others:
                theirs = other.tokens.get(origin)
                result = None if result is None or theirs is None else self.tracks.combine(result, theirs)
            if result is None:
                lost[origin] = where(node)
            else:
                tokens[origin] = result
        for other in others:
            lost.update(dict.fromkeys((o for o in other.tokens if o not in tokens), where(node)))
        return State(tokens, lost, any(s.projected for s in states))


def is_weight(node: fx.Node, example: torch.Tensor) -> bool:
    """Whether a placeholder is a parameter or buffer of the model: it brings no tokens."""
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return isinstance(example, torch.nn.Parameter) or static is not None
