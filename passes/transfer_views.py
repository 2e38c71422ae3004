"""Transfer rules of operators that move, cut or join positions without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .calls import Call
from .layout import Layout, Segments, Track
from .modulepath import value
from .sequence import EMPTY, Rule, State, States, Tracer, expand, where
from .sizes import Size, of, product

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a transfer rule under operator names."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


# -- one tensor in, one tensor out ------------------------------------------------------------------------------------


@rule(
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel", "_unsafe_view"
)
def _view(t: Tracer, call: Call) -> States:
    if isinstance(call.get(1, "dtype"), torch.dtype):
        return t.lose(call.node, t.state(call.x))
    t.alias(call.node, call.x)
    before, after = t.shape(call.x), t.shape(call.node)
    return t.each(call, t.state(call.x), lambda track: view(t, track, before, after))


@rule("permute")
def _permute(t: Tracer, call: Call) -> States:
    rank = len(t.shape(call.x))
    return _reorder(t, call, [d % rank for d in call.rest(1, "dims")])


@rule("transpose")
def _transpose(t: Tracer, call: Call) -> States:
    order = list(range(len(t.shape(call.x))))
    a, b = (t.dim(call.get(i, f"dim{i - 1}", f"axis{i - 1}"), len(order)) for i in (1, 2))
    order[a], order[b] = order[b], order[a]
    return _reorder(t, call, order)


@rule("t", "adjoint", "numpy_T")
def _t(t: Tracer, call: Call) -> States:
    order = list(range(len(t.shape(call.x))))
    return _reorder(t, call, order[:-2] + order[-2:][::-1])


@rule("getattr")
def _getattr(t: Tracer, call: Call) -> States:
    order = list(range(len(t.shape(call.x))))
    name = call.get(1)
    if name == "T":
        return _reorder(t, call, order[::-1])
    if name == "mT":
        return _reorder(t, call, order[:-2] + order[-2:][::-1])
    return t.state(call.x) if name == "data" else EMPTY


@rule("movedim")
def _movedim(t: Tracer, call: Call) -> States:
    rank = len(t.shape(call.x))
    source, destination = (
        [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
        for given in (call.get(1, "source"), call.get(2, "destination"))
    )
    rest = iter(d for d in range(rank) if d not in source)
    moved = dict(zip(destination, source, strict=True))
    return _reorder(t, call, [moved[i] if i in moved else next(rest) for i in range(rank)])


@rule("expand")
def _expand(t: Tracer, call: Call) -> States:
    t.alias(call.node, call.x)
    out = t.shape(call.node)
    return t.each(call, t.state(call.x), lambda track: expand(t.algebra, track, out))


@rule("repeat", "tile")
def _repeat(t: Tracer, call: Call) -> States:
    out = t.shape(call.node)
    times = [t.size(r) for r in call.rest(1, "repeats", "dims")]
    times = [1] * (len(out) - len(times)) + times

    def one(track: Track) -> Track | None:
        track = expand(t.algebra, track, [1] * (len(out) - len(t.shape(call.x))) + list(t.shape(call.x)))
        for dim, count in enumerate(times):
            track = _along(t, track, dim, lambda part, d, c=count: t.algebra.repeat(part, d, c))  # type: ignore
            if track is None or count is None:
                return None
        return track

    return t.each(call, t.state(call.x), one)


@rule("repeat_interleave")
def _repeat_interleave(t: Tracer, call: Call) -> States:
    count, dim = t.size(call.get(1, "repeats")), call.get(2, "dim")
    if count is None or dim is None:
        return t.lose(call.node, t.state(call.x))
    at = t.dim(dim, len(t.shape(call.x)))
    each = lambda part, d: t.algebra.repeat(part, d, count, interleave=True)  # noqa: E731
    return t.each(call, t.state(call.x), lambda track: _along(t, track, at, each))


@rule("flip", "roll", "index_select", "sort", "argsort", "topk", "gather")
def _shuffle(t: Tracer, call: Call) -> States:
    """Positions change places along some dimensions; origins that do not lie there keep their layout."""
    position = {"roll": 2, "flip": 1, "topk": 2}.get(call.name, 1)
    dims = call.rest(position, "dims", "dim") if call.name != "index_select" else [call.get(1, "dim")]
    if call.name in ("sort", "argsort", "topk"):
        dims = [call.node.kwargs.get("dim", -1)] if len(call.node.args) <= position else [call.get(position)]
    out = value(call.node)
    first = out[0] if isinstance(out, (list, tuple)) else out
    rank = len(t.shape(call.x))
    if call.name == "gather" or not dims or not all(isinstance(d, int) for d in dims) or first.dim() != rank:
        result = t.lose(call.node, t.state(call.x))
    else:
        sizes = [of(s) for s in first.shape]
        touched = [d % rank for d in dims]
        result = t.each(call, t.state(call.x), lambda track: untouched(t, track, touched, sizes))
    return tuple(result for _ in out) if isinstance(out, (list, tuple)) else result


@rule("pad")
def _pad(t: Tracer, call: Call) -> States:
    out, rank = t.shape(call.node), len(t.shape(call.x))
    pads = list(call.get(1, "pad") or ())
    touched = [rank - 1 - i // 2 for i, p in enumerate(pads) if isinstance(p, fx.Node) or p != 0]
    return t.each(call, t.state(call.x), lambda track: untouched(t, track, touched, out))


# -- cutting ----------------------------------------------------------------------------------------------------------


@rule("slice")
def _slice(t: Tracer, call: Call) -> States:
    dim = t.dim(call.get(1, "dim", default=0), len(t.shape(call.x)))
    bounds = slice(call.get(2, "start"), call.get(3, "end"), call.get(4, "step", default=1))
    return _index(t, call, (*[slice(None)] * dim, bounds))


@rule("narrow")
def _narrow(t: Tracer, call: Call) -> States:
    dim = t.dim(call.get(1, "dim"), len(t.shape(call.x)))
    start = call.get(2, "start")
    end = None if isinstance(start, fx.Node) or start >= 0 else 0  # a bound that only says: not to the end
    return _index(t, call, (*[slice(None)] * dim, slice(start, start if end is None else end, 1)))


@rule("select")
def _select(t: Tracer, call: Call) -> States:
    dim = t.dim(call.get(1, "dim"), len(t.shape(call.x)))
    return _index(t, call, (*[slice(None)] * dim, call.get(2, "index")))


@rule("getitem")
def _getitem(t: Tracer, call: Call) -> States:
    index = call.get(1)
    states = t.states(call.x)
    if isinstance(value(call.x), (list, tuple)):
        t.alias(call.node, call.x)
        return states[index] if isinstance(states, tuple) and isinstance(index, int) and states else EMPTY
    if not isinstance(value(call.x), torch.Tensor):
        return EMPTY
    return _index(t, call, index if isinstance(index, tuple) else (index,))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind")
def _pieces(t: Tracer, call: Call) -> States:
    t.alias(call.node, call.x)
    state, rank = t.state(call.x), len(t.shape(call.x))
    unbind = call.name == "unbind"
    dim = t.dim(call.get(1 if unbind else 2, "dim", default=0), rank)
    start: Size = 0
    results = []
    for i, piece in enumerate(value(call.node)):
        if unbind:
            results.append(t.each(call, state, lambda track, i=i: select(t, track, dim, i)))  # type: ignore[misc]
            continue
        length = of(piece.shape[dim])
        results.append(cut(t, call, state, dim, start, length))
        start = of(start + length)
    return tuple(results)


# -- joining ----------------------------------------------------------------------------------------------------------


@rule("cat")
def _cat(t: Tracer, call: Call) -> States:
    tensors = list(call.x or ())
    dim = t.dim(call.get(1, "dim", "axis", default=0), len(t.shape(call.node)))
    states = [t.state(x) for x in tensors]
    shapes = [t.shape(x) for x in tensors]
    if any(len(s) != len(t.shape(call.node)) for s in shapes):  # torch skips empty 1-D tensors
        return t.lose(call.node, *states)
    tokens: dict[Any, Track] = {}
    lost = t.lose(call.node, *states).lost
    for origin in dict.fromkeys(o for s in states for o in s.tokens):
        parts: list[tuple[Size, Layout | None]] | None = []
        for state, sizes in zip(states, shapes, strict=True):
            track = state.tokens.get(origin)
            if isinstance(track, Segments):
                parts = [*parts, *track.parts] if parts is not None and track.dim == dim else None
            elif parts is not None:
                parts.append((sizes[dim], track))
        joined = None if parts is None else t.algebra.coalesce(dim, parts)
        if joined is not None:
            tokens[origin] = joined
            lost.pop(origin, None)
    return State(tokens, lost, any(s.projected for s in states))


@rule("stack")
def _stack(t: Tracer, call: Call) -> States:
    tensors = list(call.x or ())
    dim = t.dim(call.get(1, "dim", default=0), len(t.shape(call.node)))
    states = [t.state(x) for x in tensors]
    tokens: dict[Any, Track] = {}
    lost = t.lose(call.node, *states).lost
    for origin in dict.fromkeys(o for s in states for o in s.tokens):
        joined = _stacked(t, [s.tokens.get(origin) for s in states], dim)
        if joined is not None:
            tokens[origin] = joined
            lost.pop(origin, None)
    return State(tokens, lost, any(s.projected for s in states))


def _stacked(t: Tracer, tracks: Sequence[Track | None], dim: int) -> Track | None:
    """Tracks of tensors of one shape behind each other along a new dimension; stretches stack one by one."""
    layouts = [track for track in tracks if isinstance(track, Layout)]
    if len(layouts) == len(tracks):
        return t.algebra.stack(layouts, dim)
    segments = [track for track in tracks if isinstance(track, Segments)]
    first = segments[0] if len(segments) == len(tracks) else None
    if first is None or any(s.dim != first.dim or len(s.parts) != len(first.parts) for s in segments):
        return None
    parts: list[tuple[Size, Layout | None]] = []
    for column in zip(*(s.parts for s in segments), strict=True):
        length = column[0][0]
        here = [layout for _, layout in column if layout is not None]
        if not all(t.sizes.same(other, length) for other, _ in column) or len(here) not in (0, len(column)):
            return None
        stacked = t.algebra.stack(here, dim) if here else None
        if here and stacked is None:
            return None
        parts.append((length, stacked))
    return Segments(first.dim + (dim <= first.dim), tuple(parts))


# -- operations on tracks that rules share ----------------------------------------------------------------------------


def view(t: Tracer, track: Track, before: Sequence[Size], after: Sequence[Size]) -> Track | None:
    """Another shape; a concatenated dimension must survive as it is."""
    if isinstance(track, Layout):
        return t.algebra.view(track, after)
    front, size = product(before[: track.dim]), before[track.dim]
    places = (i for i, s in enumerate(after) if t.sizes.same(s, size) and t.sizes.same(product(after[:i]), front))
    dim = next(places, None)
    if dim is None:
        return None

    def one(part: Layout, _: int | None, length: Size | None) -> Layout | None:
        return t.algebra.view(part, [*after[:dim], length, *after[dim + 1 :]])

    return t.algebra.map(track, one, dim)


def select(t: Tracer, track: Track, dim: int, index: Size) -> Track | None:
    """One index of a dimension."""
    if isinstance(track, Segments) and track.dim == dim:
        return None
    after = track.dim - (track.dim > dim) if isinstance(track, Segments) else None
    return t.algebra.map(track, lambda part, _, __: t.algebra.select(part, dim, index), after)


def cut(t: Tracer, call: Call, state: State, dim: int, start: Size, length: Size, step: Size = 1) -> State:
    """A range of a dimension; an origin that has no tokens there is forgotten, not lost."""
    tokens: dict[Any, Track] = {}
    lost = dict(state.lost)
    for origin, track in state.tokens.items():
        if isinstance(track, Layout) or track.dim != dim:
            done = t.algebra.map(track, lambda part, _, __: t.algebra.narrow(part, dim, start, length, step))
            gone = False
        else:
            done, gone = _cut_segments(t, track, start, length) if t.sizes.same(step, 1) else (None, False)
        if done is not None:
            tokens[origin] = done
        elif not gone:
            lost[origin] = where(call.node)
    return State(tokens, lost, state.projected)


def _cut_segments(t: Tracer, track: Segments, start: Size, length: Size) -> tuple[Track | None, bool]:
    end, position = of(start + length), of(0)
    kept: list[tuple[Size, Layout | None]] = []
    for size, part in track.parts:
        stop = of(position + size)
        low = _larger(t, start, position)
        high = _larger(t, stop, end, smaller=True)
        if low is None or high is None:
            return None, False
        count = of(high - low)
        if t.sizes.at_least(0, count):
            position = stop
            continue
        if not t.sizes.at_least(count, 1):
            return None, False
        piece = None if part is None else t.algebra.narrow(part, track.dim, of(low - position), count)
        if part is not None and piece is None:
            return None, False
        kept.append((count, piece))
        position = stop
    if all(part is None for _, part in kept):
        return None, True
    return t.algebra.coalesce(track.dim, kept), False


def untouched(t: Tracer, track: Track, touched: Sequence[int], sizes: Sequence[Size]) -> Track | None:
    """Keep a track if none of the touched dimensions holds its tokens."""
    if isinstance(track, Segments):
        moving = track.dim in touched
        return None if moving else t.algebra.map(track, lambda part, _, __: _resized(t, part, touched, sizes))
    return _resized(t, track, touched, sizes)


def _resized(t: Tracer, part: Layout, touched: Sequence[int], sizes: Sequence[Size]) -> Layout | None:
    result: Layout | None = part
    for dim in touched:
        result = None if result is None else t.algebra.resize(result, dim, sizes[dim])
    return result


def index(t: Tracer, at: Call, operand: fx.Node, items: Sequence[Any], out: Sequence[Size] | None) -> State | None:
    """Basic indexing with ints, slices, None and Ellipsis; None where a tensor or an unknown sign is involved.

    Args:
        t: the tracer.
        at: the indexing call, for messages.
        operand: what is indexed.
        items: the index.
        out: sizes of the result where known; they spare comparing symbolic bounds.
    """
    state, sizes = t.state(operand), t.shape(operand)
    if any(isinstance(i, (list, bool)) or isinstance(value(i), torch.Tensor) for i in items):
        return None
    consumed = sum(i is not None and i is not Ellipsis for i in items)
    full: list[Any] = []
    for item in items:
        full.extend([slice(None)] * (len(sizes) - consumed) if item is Ellipsis else [item])
    dim, remaining = 0, list(sizes)
    for item in full:
        if item is None:
            remaining.insert(dim, 1)
            before, after = [s for i, s in enumerate(remaining) if i != dim], list(remaining)
            state = t.each(at, state, lambda track, b=before, a=after: view(t, track, b, a))  # type: ignore[misc]
            dim += 1
        elif isinstance(item, slice):
            bounds = _bounds(t, item, remaining[dim], None if out is None else out[dim])
            if bounds is None:
                return None
            start, length, step = bounds
            if not (t.sizes.same(length, remaining[dim]) and t.sizes.same(step, 1)):
                state = cut(t, at, state, dim, start, length, step)
                remaining[dim] = length
            dim += 1
        else:
            position = t.size(item)
            position = None if position is None else t.sizes.index(position, remaining[dim])
            if position is None:
                return None
            state = t.each(at, state, lambda track, d=dim, p=position: select(t, track, d, p))  # type: ignore[misc]
            del remaining[dim]
    return state


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
    low = None if low is None else _larger(t, low, 0)
    if low is None:
        return None
    if length is not None:
        return low, length, step
    stop = size if item.stop is None else t.size(item.stop)
    high = None if stop is None else t.sizes.index(stop, size)
    high = None if high is None else _larger(t, high, size, smaller=True)
    if high is None or not t.sizes.at_least(high, low):
        return None
    span = of(high - low)
    whole = -(-span // step) if isinstance(span, int) else t.sizes.quotient(span, step)
    return None if whole is None else (low, whole, step)


def _larger(t: Tracer, a: Size, b: Size, *, smaller: bool = False) -> Size | None:
    first = t.sizes.at_least(a, b)
    if first is None:
        return None
    return (b if first else a) if smaller else (a if first else b)


def _along(t: Tracer, track: Track, dim: int, one: Callable[[Layout, int], Layout]) -> Track | None:
    if isinstance(track, Segments) and track.dim == dim:
        return None
    return t.algebra.map(track, lambda part, _, __: one(part, dim))


def _reorder(t: Tracer, call: Call, order: Sequence[int]) -> State:
    t.alias(call.node, call.x)

    def one(track: Track) -> Track | None:
        dim = order.index(track.dim) if isinstance(track, Segments) else None
        return t.algebra.map(track, lambda part, _, __: t.algebra.permute(part, order), dim)

    return t.each(call, t.state(call.x), one)
