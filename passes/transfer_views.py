"""Transfer rules of operators that give a tensor another shape, repeat it or move positions about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .calls import Call
from .modulepath import value
from .sequence import Rule, Tracer
from .sizes import of
from .states import EMPTY, State, States
from .tracks import Track

RULES: dict[str, Rule] = {}


def view(t: Tracer, call: Call) -> States:
    """Any reinterpretation of the row-major order: the result's sizes say which."""
    if isinstance(call.get(1, "dtype"), torch.dtype):
        return t.lose(call.node, t.state(call.x))
    t.alias(call.node, call.x)
    before, after = t.shape(call.x), t.shape(call.node)
    return t.each(call, t.state(call.x), lambda track: t.tracks.view(track, before, after))


def permute(t: Tracer, call: Call) -> States:
    rank = len(t.shape(call.x))
    return _reorder(t, call, [d % rank for d in call.rest(1, "dims")])


def transpose(t: Tracer, call: Call) -> States:
    order = list(range(len(t.shape(call.x))))
    a, b = (t.dim(call.get(i, f"dim{i - 1}", f"axis{i - 1}"), len(order)) for i in (1, 2))
    order[a], order[b] = order[b], order[a]
    return _reorder(t, call, order)


def last_two(t: Tracer, call: Call) -> States:
    order = list(range(len(t.shape(call.x))))
    return _reorder(t, call, order[:-2] + order[-2:][::-1])


def attribute(t: Tracer, call: Call) -> States:
    """`x.T`, `x.mT`, `x.data`; anything else is no tensor."""
    order = list(range(len(t.shape(call.x))))
    name = call.get(1)
    if name == "T":
        return _reorder(t, call, order[::-1])
    if name == "mT":
        return last_two(t, call)
    return t.state(call.x) if name == "data" else EMPTY


def movedim(t: Tracer, call: Call) -> States:
    rank = len(t.shape(call.x))
    source, destination = (
        [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
        for given in (call.get(1, "source"), call.get(2, "destination"))
    )
    rest = iter(d for d in range(rank) if d not in source)
    moved = dict(zip(destination, source, strict=True))
    return _reorder(t, call, [moved[i] if i in moved else next(rest) for i in range(rank)])


def expand(t: Tracer, call: Call) -> States:
    t.alias(call.node, call.x)
    out = t.shape(call.node)
    return t.each(call, t.state(call.x), lambda track: t.tracks.expand(track, out))


def repeat(t: Tracer, call: Call) -> States:
    before, out = t.shape(call.x), t.shape(call.node)
    times = [t.size(r) for r in call.rest(1, "repeats", "dims")]
    times = [1] * (len(out) - len(times)) + times

    def one(track: Track) -> Track | None:
        result: Track | None = t.tracks.expand(track, [1] * (len(out) - len(before)) + list(before))
        for dim, count in enumerate(times):
            result = None if result is None or count is None else t.tracks.repeat(result, dim, count)
        return result

    return t.each(call, t.state(call.x), one)


def repeat_interleave(t: Tracer, call: Call) -> States:
    count, dim = t.size(call.get(1, "repeats")), call.get(2, "dim")
    if count is None or dim is None:
        return t.lose(call.node, t.state(call.x))
    at = t.dim(dim, len(t.shape(call.x)))
    return t.each(call, t.state(call.x), lambda track: t.tracks.repeat(track, at, count, interleave=True))


def flip(t: Tracer, call: Call) -> States:
    return _shuffle(t, call, call.rest(1, "dims"))


def roll(t: Tracer, call: Call) -> States:
    return _shuffle(t, call, call.rest(2, "dims"))


def index_select(t: Tracer, call: Call) -> States:
    return _shuffle(t, call, [call.get(1, "dim")])


def sort(t: Tracer, call: Call) -> States:
    return _shuffle(t, call, [call.get(2 if call.name == "topk" else 1, "dim", default=-1)])


def pad(t: Tracer, call: Call) -> States:
    out, rank = t.shape(call.node), len(t.shape(call.x))
    pads = list(call.get(1, "pad") or ())
    touched = {rank - 1 - i // 2 for i, p in enumerate(pads) if isinstance(p, fx.Node) or p != 0}
    return t.each(call, t.state(call.x), lambda track: t.tracks.resize(track, sorted(touched), out))


def _shuffle(t: Tracer, call: Call, dims: Sequence[Any]) -> States:
    """Positions change places along some dimensions; origins that do not lie there keep their layout."""
    out = value(call.node)
    first = out[0] if isinstance(out, (list, tuple)) else out
    rank = len(t.shape(call.x))
    if not dims or not all(isinstance(d, int) for d in dims) or first.dim() != rank:
        result = t.lose(call.node, t.state(call.x))
    else:
        sizes = [of(s) for s in first.shape]
        touched = [d % rank for d in dims]
        result = t.each(call, t.state(call.x), lambda track: t.tracks.resize(track, touched, sizes))
    return tuple(result for _ in out) if isinstance(out, (list, tuple)) else result


def _reorder(t: Tracer, call: Call, order: Sequence[int]) -> State:
    t.alias(call.node, call.x)
    return t.each(call, t.state(call.x), lambda track: t.tracks.permute(track, order))


for _name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"):
    RULES[_name] = view
RULES |= {
    "_unsafe_view": view,
    "permute": permute,
    "transpose": transpose,
    "t": last_two,
    "adjoint": last_two,
    "getattr": attribute,
    "movedim": movedim,
    "expand": expand,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "flip": flip,
    "roll": roll,
    "index_select": index_select,
    "sort": sort,
    "argsort": sort,
    "topk": sort,
    "pad": pad,
}
