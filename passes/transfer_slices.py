"""Transfer rules of operators that cut tensors into pieces or join pieces to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .calls import Call
from .modulepath import value
from .sequence import Rule, Tracer
from .sizes import Size, of
from .states import EMPTY, Origin, State, States, where
from .tracks import Segments, Stretch, Track

# -- cutting ----------------------------------------------------------------------------------------------------------


def slice_(t: Tracer, call: Call) -> States:
    dim = t.dim(call.get(1, "dim", default=0), len(t.shape(call.x)))
    bounds = slice(call.get(2, "start"), call.get(3, "end"), call.get(4, "step", default=1))
    return _index(t, call, (*[slice(None)] * dim, bounds))


def narrow(t: Tracer, call: Call) -> States:
    dim = t.dim(call.get(1, "dim"), len(t.shape(call.x)))
    start = t.size(call.get(2, "start"))
    first = None if start is None else t.sizes.index(start, t.shape(call.x)[dim])
    if first is None:
        return t.lose(call.node, t.state(call.x))
    t.alias(call.node, call.x)
    return cut(t, call, t.state(call.x), dim, first, t.shape(call.node)[dim])


def select(t: Tracer, call: Call) -> States:
    dim = t.dim(call.get(1, "dim"), len(t.shape(call.x)))
    return _index(t, call, (*[slice(None)] * dim, call.get(2, "index")))


def getitem(t: Tracer, call: Call) -> States:
    """An item of a tuple, or basic indexing of a tensor."""
    items, example = call.get(1), value(call.x)
    if isinstance(example, torch.Tensor):
        return _index(t, call, items if isinstance(items, tuple) else (items,))
    states = t.states(call.x)
    t.alias(call.node, call.x)
    return states[items] if isinstance(states, tuple) and isinstance(items, int) and states else EMPTY


def pieces(t: Tracer, call: Call) -> States:
    """`chunk`, `split` and their like: the results' sizes say where the cuts are."""
    t.alias(call.node, call.x)
    state, rank = t.state(call.x), len(t.shape(call.x))
    dim = t.dim(call.get(2, "dim", default=0), rank)
    start: Size = 0
    results = []
    for piece in value(call.node):
        length = of(piece.shape[dim])
        results.append(cut(t, call, state, dim, start, length))
        start = of(start + length)
    return tuple(results)


def unbind(t: Tracer, call: Call) -> States:
    t.alias(call.node, call.x)
    state = t.state(call.x)
    dim = t.dim(call.get(1, "dim", default=0), len(t.shape(call.x)))

    def item(i: int) -> State:
        return t.each(call, state, lambda track: t.tracks.select(track, dim, i))

    return tuple(item(i) for i in range(len(value(call.node))))


def cut(t: Tracer, call: Call, state: State, dim: int, start: Size, length: Size, step: Size = 1) -> State:
    """A range of a dimension; an origin that has no tokens there is forgotten, not lost."""
    tokens: dict[Origin, Track] = {}
    lost = dict(state.lost)
    for origin, track in state.tokens.items():
        done, gone = t.tracks.cut(track, dim, start, length, step)
        if done is not None:
            tokens[origin] = done
        elif not gone:
            lost[origin] = where(call.node)
    return State(tokens, lost, state.projected)


def index(t: Tracer, at: Call, operand: fx.Node, items: Sequence[Any], out: Sequence[Size] | None) -> State | None:
    """Basic indexing with ints, slices, None and Ellipsis; None where a tensor or an unknown sign is involved.

    Args:
        t: the tracer.
        at: the indexing call, for messages.
        operand: what is indexed.
        items: the index.
        out: sizes of the result where known; they spare comparing symbolic bounds.
    """
    state, sizes = t.state(operand), list(t.shape(operand))
    if any(isinstance(i, (list, bool)) or isinstance(value(i), torch.Tensor) for i in items):
        return None
    consumed = sum(i is not None and i is not Ellipsis for i in items)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += len(t.shape(operand)) - consumed
        elif item is None:
            state = _insert(t, at, state, sizes, dim)
            sizes.insert(dim, 1)
            dim += 1
        elif isinstance(item, slice):
            bounds = _bounds(t, item, sizes[dim], None if out is None else out[dim])
            if bounds is None:
                return None
            start, length, step = bounds
            if not (t.sizes.same(length, sizes[dim]) and t.sizes.same(step, 1)):
                state = cut(t, at, state, dim, start, length, step)
                sizes[dim] = length
            dim += 1
        else:
            position = t.size(item)
            position = None if position is None else t.sizes.index(position, sizes[dim])
            if position is None:
                return None
            state = _take(t, at, state, dim, position)
            del sizes[dim]
    return state


def _insert(t: Tracer, at: Call, state: State, sizes: Sequence[Size], dim: int) -> State:
    after = [*sizes[:dim], 1, *sizes[dim:]]
    return t.each(at, state, lambda track: t.tracks.view(track, sizes, after))


def _take(t: Tracer, at: Call, state: State, dim: int, position: Size) -> State:
    return t.each(at, state, lambda track: t.tracks.select(track, dim, position))


def _index(t: Tracer, call: Call, items: Sequence[Any]) -> States:
    t.alias(call.node, call.x)
    found = index(t, call, call.x, items, t.shape(call.node))
    if found is None:
        tensors = [t.state(i) for i in items if isinstance(i, fx.Node)]
        return t.lose(call.node, t.state(call.x), *tensors)
    return found


def _bounds(t: Tracer, item: slice, size: Size, length: Size | None) -> tuple[Size, Size, Size] | None:
    """(start, length, step) of a slice of a dimension of `size`; None where it is not known statically."""
    step = 1 if item.step is None else t.size(item.step)
    if not isinstance(step, int) or step < 1:
        return None
    if length is not None and item.start is None:
        return 0, length, step
    if length is not None and item.stop is None and step == 1:
        return of(size - length), length, step
    start = 0 if item.start is None else t.size(item.start)
    low = None if start is None else t.sizes.index(start, size)
    low = None if low is None else t.tracks.larger(low, 0)
    if low is None:
        return None
    if length is not None:
        return low, length, step
    stop = size if item.stop is None else t.size(item.stop)
    high = None if stop is None else t.sizes.index(stop, size)
    high = None if high is None else t.tracks.smaller(high, size)
    if high is None or not t.sizes.at_least(high, low):
        return None
    span = of(high - low)
    whole = -(-span // step) if isinstance(span, int) else t.sizes.quotient(span, step)
    return None if whole is None else (low, whole, step)


# -- joining ----------------------------------------------------------------------------------------------------------


def cat(t: Tracer, call: Call) -> States:
    """Adjacent ranges of an origin merge; other neighbours are remembered as stretches."""
    tensors = list(call.x or ())
    rank = len(t.shape(call.node))
    dim = t.dim(call.get(1, "dim", "axis", default=0), rank)
    states, shapes = [t.state(x) for x in tensors], [t.shape(x) for x in tensors]
    if any(len(s) != rank for s in shapes):  # torch skips empty 1-D tensors
        return t.lose(call.node, *states)

    def joined(tracks: Sequence[Track | None]) -> Track | None:
        parts: list[Stretch] = []
        for track, sizes in zip(tracks, shapes, strict=True):
            if not isinstance(track, Segments):
                parts.append((sizes[dim], track))
            elif track.dim == dim:
                parts.extend(track.parts)
            else:
                return None
        return t.tracks.coalesce(dim, parts)

    return _per_origin(t, call, states, joined)


def stack(t: Tracer, call: Call) -> States:
    tensors = list(call.x or ())
    dim = t.dim(call.get(1, "dim", default=0), len(t.shape(call.node)))

    def joined(tracks: Sequence[Track | None]) -> Track | None:
        present = [track for track in tracks if track is not None]
        return t.tracks.stack(present, dim) if len(present) == len(tracks) else None

    return _per_origin(t, call, [t.state(x) for x in tensors], joined)


def _per_origin(t: Tracer, call: Call, states: Sequence[State], joined: Any) -> State:
    tokens: dict[Origin, Track] = {}
    lost = t.lose(call.node, *states).lost
    for origin in dict.fromkeys(o for s in states for o in s.tokens):
        result = joined([s.tokens.get(origin) for s in states])
        if result is not None:
            tokens[origin] = result
            lost.pop(origin, None)
    return State(tokens, lost, any(s.projected for s in states))


RULES: dict[str, Rule] = {
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "getitem": getitem,
    "unbind": unbind,
    "cat": cat,
    "stack": stack,
}
for _name in ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"):
    RULES[_name] = pieces
