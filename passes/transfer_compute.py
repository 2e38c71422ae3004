"""Transfer rules of operators that compute: what they do to the positions of their operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .calls import Call
from .layout import Layout
from .modulepath import value
from .sequence import Rule, Tracer
from .sizes import Size, product, shape
from .states import Origin, State, States
from .tracks import Segments, Track, rank
from .tracks import shape as track_shape
from .transfer_einops import RULES as EINOPS
from .transfer_slices import RULES as SLICES
from .transfer_slices import index
from .transfer_views import RULES as VIEWS

# -- positions stay as they are ---------------------------------------------------------------------------------------


def through(t: Tracer, call: Call) -> States:
    """The result may be the operand itself."""
    t.alias(call.node, call.x)
    return same(t, call)


def same(t: Tracer, call: Call) -> States:
    """One tensor goes through; weights and the like have no say. Of a tuple, the items of the operand's shape."""
    example, before, state = value(call.node), t.shape(call.x), t.state(call.x)
    if not isinstance(example, (list, tuple)):
        return state
    lost = t.lose(call.node, state)
    return tuple(state if isinstance(e, torch.Tensor) and t.sizes.all_same(shape(e), before) else lost for e in example)


def view_as_real(t: Tracer, call: Call) -> States:
    return t.each(call, t.state(call.x), lambda track: t.tracks.append(track, 2))


def view_as_complex(t: Tracer, call: Call) -> States:
    return t.each(call, t.state(call.x), t.tracks.drop_last)


def glu(t: Tracer, call: Call) -> States:
    out = t.shape(call.node)
    dim = t.dim(call.get(1, "dim", default=-1), len(out))
    return t.each(call, t.state(call.x), lambda track: t.tracks.resize(track, [dim], out))


# -- positions of some dimensions are summed over ---------------------------------------------------------------------


def linear(t: Tracer, call: Call) -> States:
    out = t.shape(call.node)
    last = len(out) - 1
    return t.each(call, t.state(call.x), lambda track: t.tracks.resize(track, [last], out), projected=True)


def matmul(t: Tracer, call: Call) -> States:
    """[.., N, K] by [.., K, M]: what is summed over gives way to the other operand's rows or columns."""
    first = 1 if call.name in ("addmm", "baddbmm") else 0
    a, b = call.get(first, "mat1", "batch1", "input"), call.get(first + 1, "mat2", "batch2", "other")
    out = t.shape(call.node)
    if min(len(t.shape(a)), len(t.shape(b))) < 2:
        return t.lose(call.node, t.state(a), t.state(b))

    def spread(track: Track, summed: int) -> Track | None:
        dim = rank(track) + summed
        result = t.tracks.resize(track, [dim], [1] * (dim + 1))
        return None if result is None else t.tracks.expand(result, out)

    left = t.each(call, t.state(a), lambda track: spread(track, -1), projected=True)
    right = t.each(call, t.state(b), lambda track: spread(track, -2), projected=True)
    return _merge(t, call, [left, right])


def einsum(t: Tracer, call: Call) -> States:
    operands = call.rest(1, "operands")
    states = [t.state(o) for o in operands]
    equation = str(call.x).replace(" ", "")
    if "->" not in equation or "." in equation:
        return t.lose(call.node, *states)
    inputs, output = equation.split("->")
    if any(len(set(letters)) != len(letters) for letters in inputs.split(",")):
        return t.lose(call.node, *states)
    sizes = dict(zip(output, t.shape(call.node), strict=True))

    def operand(letters: str, state: State) -> State:
        return t.each(call, state, lambda track: _letters(t, track, letters, sizes), projected=True)

    return _merge(t, call, [operand(ls, s) for ls, s in zip(inputs.split(","), states, strict=True)])


def reduction(t: Tracer, call: Call) -> States:
    """`mean`, `max` and their like, with or without a dimension."""
    other = call.get(1, "other")
    if isinstance(value(other), torch.Tensor):  # torch.max(a, b)
        return t.pointwise(call)
    example = value(call.node)
    items = example if isinstance(example, (list, tuple)) else (example,)
    before, after = t.shape(call.x), shape(items[0])
    given = call.get(2 if "norm" in call.name else 1, "dim", "axis")
    dims = list(given) if isinstance(given, (list, tuple)) else [given]
    if not dims or not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        dims = list(range(len(before)))
    touched = sorted((d % len(before) for d in dims), reverse=True)

    def one(track: Track) -> Track | None:
        result = t.tracks.resize(track, touched, [1] * len(before))
        for dim in touched if len(after) != len(before) else ():
            result = None if result is None else t.tracks.select(result, dim, 0)
        return result

    state = t.each(call, t.state(call.x), one)
    return tuple(state for _ in items) if isinstance(example, (list, tuple)) else state


# -- tokens are made --------------------------------------------------------------------------------------------------


def convolution(t: Tracer, call: Call) -> States:
    """A convolution that keeps its sizes keeps positions; any other Conv3d is a patch embedding."""
    before, after = t.shape(call.x), t.shape(call.node)
    spatial = {"conv1d": 1, "conv2d": 2, "conv3d": 3}.get(call.name, len(after) - 2)
    transposed = call.name == "convolution" and bool(call.get(6, "transposed", default=False))
    channel = len(after) - spatial - 1
    places = list(range(channel + 1, len(after)))
    kept = t.sizes.all_same([before[p] for p in places], [after[p] for p in places]) and not transposed
    touched = [channel] if kept else [channel, *places]
    state = t.each(call, t.state(call.x), lambda track: t.tracks.resize(track, touched, after), projected=True)
    if spatial != 3 or transposed or any(o.grid for o in state.tokens):
        return state
    grid = (after[places[0]], after[places[1]], after[places[2]])
    origin = Origin("/".join((*t.path, call.node.name)), -1, product(grid), grid)
    return State({**state.tokens, origin: t.tracks.one.raster(after, places)}, state.lost, True)


def embedding(t: Tracer, call: Call) -> States:
    """Each index gives one row: rows keep the positions of the indices."""
    both = [a for a in (call.x, call.get(1, "weight", "indices")) if isinstance(a, fx.Node)]
    indices = next((a for a in both if not value(a).is_floating_point()), call.x)
    last = t.shape(call.node)[-1]
    return t.each(call, t.state(indices), lambda track: t.tracks.append(track, last), projected=True)


# -- memory is written ------------------------------------------------------------------------------------------------


def setitem(t: Tracer, call: Call) -> States:
    items = call.get(1)
    region = index(t, call, call.x, items if isinstance(items, tuple) else (items,), None)
    _write(t, call, region, call.get(2))
    return State()


def copy(t: Tracer, call: Call) -> States:
    source = call.get(1, "src", "other")
    if not call.inplace:
        return t.join(call.node, [source], t.shape(call.node))
    _write(t, call, t.state(call.x), source)
    t.alias(call.node, call.x)
    return t.state(call.x)


def _write(t: Tracer, call: Call, region: State | None, source: Any) -> None:
    """Tokens of the target that the new content does not agree with are dropped from its memory."""
    new = t.state(source)
    if not isinstance(source, fx.Node) or new.constant:
        return  # a number, or what holds no tokens at all: the positions keep their meaning
    target = t.state(call.x)
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
        wide = t.tracks.expand(given, track_shape(there)) if rank(given) <= rank(there) else given
        if t.tracks.combine(there, wide) is None:
            gone.append(origin)
    t.drop(call.x, gone, call.node)


# -- details ----------------------------------------------------------------------------------------------------------


def _letters(t: Tracer, track: Track, letters: str, sizes: dict[str, Size]) -> Track | None:
    """One operand of an einsum, its dimensions named by `letters`, in the result's shape `sizes`."""
    result: Track | None = track
    for i in reversed(range(len(letters))):
        if letters[i] not in sizes and result is not None:
            result = t.tracks.resize(result, [i], [1] * (i + 1))
            result = None if result is None else t.tracks.select(result, i, 0)
    if result is None or isinstance(result, Segments):
        return None
    kept = [letter for letter in letters if letter in sizes]
    dims = [
        result.dims[kept.index(o)] if o in kept else () if t.sizes.same(n, 1) else ((n, 0),) for o, n in sizes.items()
    ]
    return Layout(tuple(dims), result.offset)


def _merge(t: Tracer, call: Call, states: Sequence[State]) -> State:
    """Combine operands that are already in the shape of the result; where they contradict each other, it is lost."""
    tokens: dict[Origin, Track] = {}
    lost: dict[Origin, str] = {}
    for state in states:
        lost.update(state.lost)
    for origin in dict.fromkeys(o for s in states for o in s.tokens):
        first, *others = [s.tokens[origin] for s in states if origin in s.tokens]
        both: Track | None = first
        for other in others:
            both = None if both is None else t.tracks.combine(both, other)
        if both is None:
            lost.update(t.lose(call.node, State({origin: first})).lost)
        else:
            tokens[origin] = both
    return State(tokens, {o: text for o, text in lost.items() if o not in tokens}, True)


_BY_RULE: dict[Rule, str] = {
    through: "to _to_copy type_as type float half bfloat16 double int long bool cuda cpu contiguous detach alias"
    " lift_fresh requires_grad conj data fill zero"
    " dropout native_dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d",
    same: "clone lift_fresh_copy pin_memory bernoulli"
    " empty_like zeros_like ones_like full_like rand_like randn_like"
    " layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm batch_norm instance_norm"
    " normalize softmax _softmax log_softmax cumsum cumprod"
    " silu gelu hardswish log_sigmoid logsigmoid tanhshrink softsign prelu",
    linear: "linear _scaled_mm",
    matmul: "matmul mm bmm addmm baddbmm",
    reduction: "mean sum nansum amax amin max min prod any all argmax argmin logsumexp count_nonzero median"
    " var std var_mean std_mean norm linalg_vector_norm vector_norm",
    convolution: "conv1d conv2d conv3d convolution",
    einsum: "einsum",
    view_as_real: "view_as_real",
    view_as_complex: "view_as_complex",
    glu: "glu",
    embedding: "embedding",
    setitem: "setitem",
    copy: "copy",
}
RULES: dict[str, Rule] = VIEWS | SLICES | EINOPS | {name: r for r, names in _BY_RULE.items() for name in names.split()}
