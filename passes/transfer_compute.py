"""Transfer rules of operators that compute: what they do to the positions of their operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .calls import Call
from .layout import Layout, Segments, Track
from .modulepath import value
from .sequence import Origin, Rule, State, States, Tracer, expand, resize
from .sizes import Size, of, product, shape
from .transfer_views import RULES as VIEWS
from .transfer_views import index

RULES: dict[str, Rule] = dict(VIEWS)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a transfer rule under operator names."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


# -- positions stay as they are ---------------------------------------------------------------------------------------


@rule("to", "_to_copy", "type_as", "type", "float", "half", "bfloat16", "double", "int", "long", "bool", "cuda", "cpu")
@rule("contiguous", "detach", "alias", "lift_fresh", "requires_grad", "conj", "data", "fill", "zero")
@rule("dropout", "native_dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d")
def _through(t: Tracer, call: Call) -> States:
    """The result may be the operand itself."""
    t.alias(call.node, call.x)
    return _same(t, call)


@rule("clone", "lift_fresh_copy", "pin_memory", "bernoulli")
@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm", "batch_norm")
@rule("instance_norm", "normalize", "softmax", "_softmax", "log_softmax", "cumsum", "cumprod")
@rule("silu", "gelu", "hardswish", "log_sigmoid", "logsigmoid", "tanhshrink", "softsign", "prelu")
def _same(t: Tracer, call: Call) -> States:
    """One tensor goes through; weights and the like have no say. Of a tuple, the items of the operand's shape."""
    example, before, state = value(call.node), t.shape(call.x), t.state(call.x)
    if not isinstance(example, (list, tuple)):
        return state
    lost = t.lose(call.node, state)
    return tuple(state if isinstance(e, torch.Tensor) and t.sizes.all_same(shape(e), before) else lost for e in example)


@rule("view_as_complex", "view_as_real")
def _complex(t: Tracer, call: Call) -> States:
    """The last dimension becomes the two parts of complex numbers, or the other way round."""
    before, after = t.shape(call.x), t.shape(call.node)
    if call.name == "view_as_real":
        return t.each(call, t.state(call.x), lambda track: _append(t, track, after))
    last = len(before) - 1

    def shorter(part: Layout, *_: Any) -> Layout | None:
        return None if t.algebra.moves(part.dims[last]) else Layout(part.dims[:last], part.offset)

    def one(track: Track) -> Track | None:
        at_last = isinstance(track, Segments) and track.dim == last
        return None if at_last else t.algebra.map(track, shorter)

    return t.each(call, t.state(call.x), one)


@rule("glu")
def _glu(t: Tracer, call: Call) -> States:
    out = t.shape(call.node)
    dim = t.dim(call.get(1, "dim", default=-1), len(out))
    return t.each(call, t.state(call.x), lambda track: resize(t.algebra, track, dim, out[dim]))


# -- positions of one dimension are summed over -----------------------------------------------------------------------


@rule("linear", "_scaled_mm")
def _linear(t: Tracer, call: Call) -> States:
    out = t.shape(call.node)
    return t.each(call, t.state(call.x), lambda track: resize(t.algebra, track, len(out) - 1, out[-1]), projected=True)


@rule("matmul", "mm", "bmm", "addmm", "baddbmm")
def _matmul(t: Tracer, call: Call) -> States:
    first = 1 if call.name in ("addmm", "baddbmm") else 0
    a, b = call.get(first, "mat1", "batch1", "input"), call.get(first + 1, "mat2", "batch2", "other")
    out = t.shape(call.node)
    if min(len(t.shape(a)), len(t.shape(b))) < 2:
        return t.lose(call.node, t.state(a), t.state(b))
    left = t.each(call, t.state(a), lambda track: _spread(t, track, len(t.shape(a)), -1, out), projected=True)
    right = t.each(call, t.state(b), lambda track: _spread(t, track, len(t.shape(b)), -2, out), projected=True)
    return _merge(t, call, [left, right])


@rule("einsum")
def _einsum(t: Tracer, call: Call) -> States:
    operands = call.rest(1, "operands")
    states = [t.state(o) for o in operands]
    equation = str(call.x).replace(" ", "")
    if "->" not in equation or "." in equation:
        return t.lose(call.node, *states)
    inputs, output = equation.split("->")
    out = t.shape(call.node)
    results = []
    for letters, state in zip(inputs.split(","), states, strict=True):
        if len(set(letters)) != len(letters):
            return t.lose(call.node, *states)
        results.append(t.each(call, state, lambda track, ls=letters: _letters(t, track, ls, output, out)))  # type: ignore
    return _merge(t, call, results)


@rule("mean", "sum", "nansum", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "logsumexp")
@rule("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "vector_norm", "count_nonzero", "median")
def _reduce(t: Tracer, call: Call) -> States:
    example = value(call.node)
    other = call.get(1, "other")
    if isinstance(other, fx.Node) and isinstance(value(other), torch.Tensor):  # torch.max(a, b)
        return t.pointwise(call)
    items = example if isinstance(example, (list, tuple)) else (example,)
    before, after = t.shape(call.x), shape(items[0])
    given = call.get(2 if "norm" in call.name else 1, "dim", "axis")
    dims = list(given) if isinstance(given, (list, tuple)) else [given]
    if not dims or not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        dims = list(range(len(before)))
    touched = [d % len(before) for d in dims]
    keep = len(after) == len(before)

    def one(track: Track) -> Track | None:
        result: Track | None = track
        for dim in sorted(touched, reverse=True):
            result = None if result is None else resize(t.algebra, result, dim, 1)
            if result is not None and not keep:
                result = _without(t, result, dim)
        return result

    result = t.each(call, t.state(call.x), one)
    return tuple(result for _ in items) if isinstance(example, (list, tuple)) else result


# -- tokens are made -------------------------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(t: Tracer, call: Call) -> States:
    """A convolution that keeps its sizes keeps positions; any other Conv3d is a patch embedding."""
    before, after = t.shape(call.x), t.shape(call.node)
    spatial = {"conv1d": 1, "conv2d": 2, "conv3d": 3}.get(call.name, len(after) - 2)
    transposed = call.name == "convolution" and bool(call.get(6, "transposed", default=False))
    channel = len(after) - spatial - 1
    places = list(range(channel + 1, len(after)))
    kept = t.sizes.all_same([before[p] for p in places], [after[p] for p in places]) and not transposed

    def one(track: Track) -> Track | None:
        result = resize(t.algebra, track, channel, after[channel])
        for place in places if not kept else ():
            result = None if result is None else resize(t.algebra, result, place, after[place])
        return result

    state = t.each(call, t.state(call.x), one, projected=True)
    if spatial != 3 or transposed or any(o.grid for o in state.tokens):
        return state
    grid = (after[places[0]], after[places[1]], after[places[2]])
    origin = Origin("/".join((*t.path, call.node.name)), -1, product(grid), grid)
    return State({**state.tokens, origin: t.algebra.raster(after, places)}, state.lost, True)


@rule("embedding")
def _embedding(t: Tracer, call: Call) -> States:
    """Each index gives one row: rows keep the positions of the indices."""
    both = [a for a in (call.x, call.get(1, "weight", "indices")) if isinstance(a, fx.Node)]
    indices = next((a for a in both if not value(a).is_floating_point()), call.x)
    after = t.shape(call.node)
    return t.each(call, t.state(indices), lambda track: _append(t, track, after), projected=True)


# -- memory is written -----------------------------------------------------------------------------------------------


@rule("setitem")
def _setitem(t: Tracer, call: Call) -> States:
    items = call.get(1)
    region = index(t, call, call.x, items if isinstance(items, tuple) else (items,), None)
    _write(t, call, region, call.get(2))
    return State()


@rule("copy")
def _copy(t: Tracer, call: Call) -> States:
    source = call.get(1, "src", "other")
    if call.inplace:
        _write(t, call, t.state(call.x), source)
        t.alias(call.node, call.x)
        return t.state(call.x)
    return t.join(call.node, [source], t.shape(call.node))


def _write(t: Tracer, call: Call, region: State | None, source: Any) -> None:
    """Tokens of the target that the new content does not agree with are dropped from its memory."""
    if not isinstance(source, fx.Node):
        return  # a number: the positions keep their meaning
    target, new = t.state(call.x), t.state(source)
    if new.constant:
        return
    if region is None:
        t.drop(call.x, target.tokens, call.node)
        return
    gone = []
    for origin in target.tokens:
        there, given = region.tokens.get(origin), new.tokens.get(origin)
        if there is None and given is None and origin not in region.lost:
            continue  # written where the target has no tokens of this origin
        if there is None or given is None:
            gone.append(origin)
            continue
        rank = _rank(there)
        out = _sizes(t, there)
        wide = expand(t.algebra, given, out) if _rank(given) <= rank else given
        if t.algebra.combine(there, wide) is None:
            gone.append(origin)
    t.drop(call.x, gone, call.node)


# -- operations on tracks ---------------------------------------------------------------------------------------------


def _rank(track: Track) -> int:
    return len(next(part for part in _parts(track) if part is not None).dims)


def _parts(track: Track) -> list[Layout | None]:
    return [track] if isinstance(track, Layout) else [part for _, part in track.parts]


def _sizes(t: Tracer, track: Track) -> list[Size]:
    one = next(part for part in _parts(track) if part is not None)
    sizes = [product(size for size, _ in dim) for dim in one.dims]
    if isinstance(track, Segments):
        total: Size = 0
        for size, _ in track.parts:
            total = of(total + size)
        sizes[track.dim] = total
    return sizes


def _append(t: Tracer, track: Track, after: Sequence[Size]) -> Track | None:
    dim = _appended(t, after[-1])
    return t.algebra.map(track, lambda part, _, __: Layout((*part.dims, dim), part.offset))


def _appended(t: Tracer, size: Size) -> Any:
    return () if t.sizes.same(size, 1) else ((size, 0),)


def _without(t: Tracer, track: Track, dim: int) -> Track | None:
    if isinstance(track, Segments) and track.dim == dim:
        return None
    after = track.dim - (track.dim > dim) if isinstance(track, Segments) else None
    return t.algebra.map(track, lambda part, _, __: t.algebra.select(part, dim, 0), after)


def _spread(t: Tracer, track: Track, rank: int, summed: int, out: Sequence[Size]) -> Track | None:
    """One operand of a matmul in the shape of the result: what is summed over gives way to the other operand's."""
    result = resize(t.algebra, track, rank + summed, 1)
    return None if result is None else expand(t.algebra, result, out)


def _letters(t: Tracer, track: Track, letters: str, output: str, out: Sequence[Size]) -> Track | None:
    result: Track | None = track
    for i in reversed(range(len(letters))):
        if letters[i] not in output and result is not None:
            result = resize(t.algebra, result, i, 1)
            result = None if result is None else _without(t, result, i)
    if result is None or isinstance(result, Segments):
        return None
    kept = [letter for letter in letters if letter in output]
    dims = [result.dims[kept.index(o)] if o in kept else _appended(t, out[i]) for i, o in enumerate(output)]
    return Layout(tuple(dims), result.offset)


def _merge(t: Tracer, call: Call, states: Sequence[State]) -> State:
    """Combine operands that are already in the shape of the result; an origin in several of them is lost."""
    tokens: dict[Any, Track] = {}
    lost: dict[Any, str] = {}
    for state in states:
        lost.update(state.lost)
    for origin in dict.fromkeys(o for s in states for o in s.tokens):
        tracks = [s.tokens[origin] for s in states if origin in s.tokens]
        both = tracks[0]
        same: Track | None = both
        for other in tracks[1:]:
            same = None if same is None else t.algebra.combine(same, other)
        if same is None:
            lost.update(t.lose(call.node, State({origin: both})).lost)
        else:
            tokens[origin] = same
    return State(tokens, {o: text for o, text in lost.items() if o not in tokens}, True)
