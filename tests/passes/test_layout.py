"""The algebra of views against brute force: claimed token ids must be those that the operators give on real data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bsa_compile.passes.layout import Algebra, Layout
from bsa_compile.passes.sequence import Tracer
from bsa_compile.passes.sizes import Sizes
from bsa_compile.passes.states import Origin, State
from bsa_compile.passes.tracks import Segments
from bsa_compile.passes.transfer_compute import RULES

GRID = (2, 3, 4)
VIDEO = Origin("video", -1, 24, GRID)
OTHER = -1.0
Step = Callable[[Any], Any]


def claimed(layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The ids that a layout claims."""
    ids = torch.full((), float(layout.offset))
    for dim in layout.dims:
        part = torch.zeros(1)
        for size, stride in dim:
            part = (part[:, None] + torch.arange(size) * stride).reshape(-1)
        ids = ids[..., None] + part
    return ids.expand(shape)


def check(state: State, real: Tensor) -> bool:
    """Whether every claim is true; gives back whether there was one."""
    track = state.tokens.get(VIDEO)
    if track is None:
        return False
    if isinstance(track, Layout):
        assert torch.equal(claimed(track, tuple(real.shape)), real)
        return True
    assert isinstance(track, Segments)
    start = 0
    for length, part in track.parts:
        piece = real.narrow(track.dim, start, length)
        start += length
        if part is None:
            assert (piece == OTHER).all()
        else:
            assert torch.equal(claimed(part, tuple(piece.shape)), piece)
    assert start == real.shape[track.dim]
    return True


def trace(steps: list[Step], x: Tensor, axes: list[int]) -> tuple[State, Tensor]:
    """Run `steps` for real and through the tracer; the tokens of `x` lie in raster order over `axes`."""

    class Program(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

    graph = fx.symbolic_trace(Program())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(graph, mode).propagate(x)
    tracer = Tracer(graph, Sizes(), RULES)
    start = State({VIDEO: Algebra(Sizes()).raster(tuple(x.shape), axes)})
    result = tracer.run([start])
    return (result if isinstance(result, State) else result[0]), Program()(x)


def video(batch: int = 2, channels: int = 2) -> Tensor:
    ids = torch.arange(24.0).reshape(1, 1, *GRID)
    return ids.expand(batch, channels, *GRID).contiguous()


# -- programs drawn at random -----------------------------------------------------------------------------------------


def factorisations(n: int) -> list[tuple[int, ...]]:
    pairs = [(a, n // a) for a in range(1, n + 1) if n % a == 0]
    triples = [(a, b, c // b) for a, c in pairs for b in range(1, c + 1) if c % b == 0]
    return [(n,), *pairs, *triples]


KINDS = ["split", "merge", "permute", "transpose", "slice", "select", "unsqueeze", "expand", "repeat", "cat_self"]
KINDS += ["cat_other", "chunk", "stack", "flip", "roll", "pointwise", "narrow", "strided", "unbind", "movedim", "none"]


@st.composite
def steps(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Step, str]:
    """One operator that fits a tensor of this shape."""
    rank = len(shape)
    dim = draw(st.integers(0, rank - 1))
    size = shape[dim]
    kind = draw(st.sampled_from(KINDS))
    if kind == "split":
        sizes = draw(st.sampled_from(factorisations(size)))
        return (lambda x: x.unflatten(dim, sizes)), f"unflatten({dim}, {sizes})"
    if kind == "merge" and rank > 1:
        end = draw(st.integers(dim, rank - 1))
        return (lambda x: x.flatten(dim, end)), f"flatten({dim}, {end})"
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return (lambda x: x.permute(*order).contiguous()), f"permute({order})"
    if kind == "transpose":
        other = draw(st.integers(0, rank - 1))
        return (lambda x: x.transpose(dim, other).reshape(x.transpose(dim, other).shape)), f"transpose({dim}, {other})"
    if kind == "movedim":
        other = draw(st.integers(0, rank - 1))
        return (lambda x: torch.movedim(x, dim, other)), f"movedim({dim}, {other})"
    if kind in ("slice", "narrow"):
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        if kind == "narrow":
            return (lambda x: x.narrow(dim, start, stop - start)), f"narrow({dim}, {start}, {stop - start})"
        start, stop = draw(st.sampled_from([(start, stop), (start - size, stop), (start, stop - size or None)]))
        index = (*[slice(None)] * dim, slice(start, stop))
        return (lambda x: x[index]), f"[{index}]"
    if kind == "strided":
        index = (Ellipsis, slice(draw(st.integers(0, size - 1)), None, draw(st.integers(1, 3))))
        index = (*index, *[slice(None)] * (rank - 1 - dim))
        return (lambda x: x[index]), f"[{index}]"
    if kind == "select" and rank > 2:
        i = draw(st.integers(-size, size - 1))
        return (lambda x: x.select(dim, i)), f"select({dim}, {i})"
    if kind == "unbind" and rank > 2:
        i = draw(st.integers(0, size - 1))
        return (lambda x: operator.getitem(x.unbind(dim), i)), f"unbind({dim})[{i}]"
    if kind == "unsqueeze":
        return (lambda x: x[(*[slice(None)] * dim, None)]), f"[None at {dim}]"
    if kind == "expand" and size == 1:
        return (lambda x: x.expand(*shape[:dim], 3, *shape[dim + 1 :])), f"expand({dim})"
    if kind == "repeat":
        times = [1] * rank
        times[dim] = 2
        return (lambda x: x.repeat(*times)), f"repeat({times})"
    if kind == "cat_self" and size > 1:
        cut = draw(st.integers(1, size - 1))
        swap = draw(st.booleans())

        def both(x: Any) -> Any:
            parts = [x.narrow(dim, 0, cut), x.narrow(dim, cut, size - cut)]
            return torch.cat(parts[::-1] if swap else parts, dim=dim)

        return both, f"cat({cut}, swap={swap}, dim={dim})"
    if kind == "cat_other":
        front = draw(st.booleans())
        other = [*shape[:dim], 2, *shape[dim + 1 :]]

        def mixed(x: Any) -> Any:
            text = torch.full(other, OTHER)
            return torch.cat([text, x] if front else [x, text], dim=dim)

        return mixed, f"cat(other, front={front}, dim={dim})"
    if kind == "chunk" and size > 1:
        order = draw(st.permutations(range(len(torch.empty(size).chunk(3)))))

        def shuffled(x: Any) -> Any:
            parts = x.chunk(3, dim=dim)
            return torch.cat([parts[i] for i in order], dim=dim)

        return shuffled, f"chunks({order}, {dim})"
    if kind == "stack":
        return (lambda x: torch.stack([x, x], dim=dim)), f"stack({dim})"
    if kind in ("flip", "roll"):
        if kind == "flip":
            return (lambda x: x.flip(dim)), f"flip({dim})"
        return (lambda x: x.roll(1, dim)), f"roll(1, {dim})"
    if kind == "pointwise":
        return (lambda x: torch.nn.functional.silu(x) * 0 + x * torch.ones(shape[-1])), "pointwise"
    return (lambda x: x.clone()), "clone"


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], list[str]]:
    x: Tensor = video()
    chosen, names = [], []
    for _ in range(draw(st.integers(1, 6))):
        step, name = draw(steps(tuple(x.shape)))
        y = step(x)
        if not 0 < y.numel() <= 4096:
            continue
        x = y
        chosen.append(step)
        names.append(name)
    return chosen, names


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs())
def test_claims_are_true_of_real_data(program):
    chosen, _ = program
    state, real = trace(chosen, video(), [2, 3, 4])
    check(state, real)


# -- what must be claimed ---------------------------------------------------------------------------------------------

SEQUENCE: list[Step] = [lambda x: x.flatten(2).transpose(1, 2)]  # [B, 24, C]


def claims(*more: Step) -> bool:
    state, real = trace([*SEQUENCE, *more], video(), [2, 3, 4])
    return check(state, real)


def test_frames_split_off_and_merge_back():
    assert claims(lambda x: x.view(2, 2, 12, 2), lambda x: x * 2 - x, lambda x: x.view(2, 24, 2))


def test_windows_undone_are_in_order_again():
    windows = (lambda x: x.view(2, 2, 3, 2, 2, 2), lambda x: x.permute(0, 3, 1, 2, 4, 5).reshape(4, 12, 2))
    back = (lambda x: x.reshape(2, 2, 2, 3, 2, 2), lambda x: x.permute(0, 2, 3, 1, 4, 5).reshape(2, 24, 2))
    state, real = trace([*SEQUENCE, *windows], video(), [2, 3, 4])
    assert check(state, real)
    assert Algebra(Sizes()).run(state.tokens[VIDEO], 1) is None
    state, real = trace([*SEQUENCE, *windows, *back], video(), [2, 3, 4])
    assert check(state, real)
    assert Algebra(Sizes()).run(state.tokens[VIDEO], 1) == (0, 24)


def test_slices_at_frames_and_back():
    state, real = trace([*SEQUENCE, lambda x: x[:, 12:]], video(), [2, 3, 4])
    assert check(state, real)
    assert Algebra(Sizes()).run(state.tokens[VIDEO], 1) == (12, 12)
    assert claims(lambda x: torch.cat([x[:, :12], x[:, 12:]], dim=1))
    assert claims(lambda x: torch.cat([x[:, 12:], x[:, :12]], dim=1))  # two pieces, both still known


def test_the_tail_of_a_concatenation_is_the_video_again():
    front = torch.full((2, 5, 2), OTHER)
    state, real = trace([*SEQUENCE, lambda x: torch.cat([front, x], dim=1), lambda x: x[:, -24:]], video(), [2, 3, 4])
    assert check(state, real)
    assert Algebra(Sizes()).run(state.tokens[VIDEO], 1) == (0, 24)


def test_losing_one_axis_loses_the_origin():
    """Frames in another order: rows and columns alone must not pass for the first frame."""
    state, _ = trace([lambda x: x.flip(2), lambda x: x[:, :, 0]], video(), [2, 3, 4])
    assert VIDEO not in state.tokens
    assert state.lost[VIDEO].startswith("flip")


def test_a_selected_frame_keeps_its_place():
    state, real = trace([lambda x: x[:, :, 1], lambda x: x.flatten(2)], video(), [2, 3, 4])
    assert check(state, real)
    assert Algebra(Sizes()).run(state.tokens[VIDEO], 2) == (12, 12)


# -- einops, which before 0.8.2 stays one node in Dynamo graphs -------------------------------------------------------


def windows(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    return x.reshape(b, c, t, h, 2, w // 2).permute(0, 4, 2, 3, 5, 1).reshape(b * 2, t * h * w // 2, c)


@pytest.mark.parametrize(
    ("pattern", "lengths", "same", "run"),
    [
        ("b c t h w -> b (t h w) c", {}, lambda x: x.flatten(2).transpose(1, 2), (0, 24)),
        ("b c t h (n w) -> (b n) (t h w) c", {"n": 2}, windows, None),
        ("b c t h w -> b (h w t) c", {}, lambda x: x.permute(0, 3, 4, 2, 1).reshape(2, 24, 2), None),
    ],
)
def test_rearrange(pattern, lengths, same, run):
    def rearrange(tensor: Tensor, pattern: str, **lengths: int) -> Tensor:
        return same(tensor)

    rearrange.__module__ = "einops.einops"
    graph = fx.Graph()
    node = graph.call_function(rearrange, (graph.placeholder("x"), pattern), lengths)
    graph.output(node)
    module, x = fx.GraphModule(torch.nn.Module(), graph), video()
    FakeTensorProp(module).propagate(x)
    state = Tracer(module, Sizes(), RULES).run([State({VIDEO: Algebra(Sizes()).raster(tuple(x.shape), [2, 3, 4])})])
    assert check(state, same(x))
    assert Algebra(Sizes()).run(state.tokens[VIDEO], 1) == run
