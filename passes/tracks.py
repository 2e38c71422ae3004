"""Where one origin's tokens lie in a tensor that may be a concatenation, and what operators do to that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .layout import Algebra, Layout
from .sizes import Size, Sizes, of, product, total

Stretch: TypeAlias = "tuple[Size, Layout | None]"
"""Length and layout; None where the origin has no tokens."""


@dataclass(frozen=True)
class Segments:
    """A tensor that holds tokens of the origin in some stretches of one dimension, and something else in others.

    Attributes:
        dim: the dimension that was concatenated.
        parts: its stretches.
    """

    dim: int
    parts: tuple[Stretch, ...]

    @property
    def rank(self) -> int:
        return len(next(part for _, part in self.parts if part is not None).dims)


Track: TypeAlias = Layout | Segments


def rank(track: Track) -> int:
    """Number of dimensions."""
    return track.rank if isinstance(track, Segments) else len(track.dims)


def shape(track: Track) -> list[Size]:
    """Sizes of the dimensions."""
    one = track if isinstance(track, Layout) else next(part for _, part in track.parts if part is not None)
    sizes = [product(size for size, _ in dim) for dim in one.dims]
    if isinstance(track, Segments):
        sizes[track.dim] = total(size for size, _ in track.parts)
    return sizes


class Tracks:
    """The operations on tracks. None means that the result is no track: the order is lost.

    Attributes:
        one: the operations on plain layouts.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.one = Algebra(sizes)

    def map(self, track: Track, apply: Callable[[Layout], Layout | None], dim: int | None = None) -> Track | None:
        """Apply a rule that leaves the concatenated dimension alone to every stretch.

        Args:
            track: what to apply it to.
            apply: the rule.
            dim: where the concatenated dimension ends up; by default where it was.
        """
        return self._map(track, lambda layout, _: apply(layout), dim)

    def _map(
        self, track: Track, apply: Callable[[Layout, Size | None], Layout | None], dim: int | None = None
    ) -> Track | None:
        if isinstance(track, Layout):
            return apply(track, None)
        parts: list[Stretch] = []
        for size, part in track.parts:
            done = None if part is None else apply(part, size)
            if part is not None and done is None:
                return None
            parts.append((size, done))
        return self.coalesce(track.dim if dim is None else dim, parts)

    # -- views --------------------------------------------------------------------------------------------------

    def view(self, track: Track, before: Sequence[Size], after: Sequence[Size]) -> Track | None:
        """Another shape; a concatenated dimension must survive as it is."""
        if isinstance(track, Layout):
            return self.one.view(track, after)
        front, size = product(before[: track.dim]), before[track.dim]
        same = self.sizes.same
        dim = next((i for i, s in enumerate(after) if same(s, size) and same(product(after[:i]), front)), None)
        if dim is None:
            return None
        return self._map(track, lambda part, length: self.one.view(part, _put(after, dim, length)), dim)

    def permute(self, track: Track, order: Sequence[int]) -> Track | None:
        """Reorder dimensions: result dimension i is `order[i]`."""
        dim = order.index(track.dim) if isinstance(track, Segments) else None
        return self.map(track, lambda part: self.one.permute(part, order), dim)

    def expand(self, track: Track, out: Sequence[Size]) -> Track:
        """Broadcast to the shape `out`."""
        if isinstance(track, Layout):
            return self.one.expand(track, out)
        dim = track.dim + len(out) - track.rank
        parts = [(n, None if part is None else self.one.expand(part, _put(out, dim, n))) for n, part in track.parts]
        return Segments(dim, tuple(parts))

    def repeat(self, track: Track, dim: int, times: Size, *, interleave: bool = False) -> Track | None:
        """Repeat along a dimension, as a whole or each position."""
        if isinstance(track, Segments) and track.dim == dim:
            return track if self.sizes.same(times, 1) else None
        return self.map(track, lambda part: self.one.repeat(part, dim, times, interleave=interleave))

    def resize(self, track: Track, dims: Sequence[int], out: Sequence[Size]) -> Track | None:
        """Give dimensions without tokens the sizes they have in `out`."""
        if isinstance(track, Segments) and track.dim in dims:
            return None

        def one(part: Layout) -> Layout | None:
            result: Layout | None = part
            for dim in dims:
                result = None if result is None else self.one.resize(result, dim, out[dim])
            return result

        return self.map(track, one)

    def select(self, track: Track, dim: int, index: Size) -> Track | None:
        """Take one index of a dimension and drop the dimension."""
        if isinstance(track, Segments) and track.dim == dim:
            return None
        after = track.dim - (track.dim > dim) if isinstance(track, Segments) else None
        return self.map(track, lambda part: self.one.select(part, dim, index), after)

    def append(self, track: Track, size: Size) -> Track | None:
        """Add a last dimension without tokens."""
        new = () if self.sizes.same(size, 1) else ((size, 0),)
        return self.map(track, lambda part: Layout((*part.dims, new), part.offset))

    def drop_last(self, track: Track) -> Track | None:
        """Remove the last dimension, if it is without tokens."""
        last = rank(track) - 1
        shorter = self.resize(track, [last], [1] * (last + 1))
        return None if shorter is None else self.select(shorter, last, 0)

    def cut(self, track: Track, dim: int, start: Size, length: Size, step: Size = 1) -> tuple[Track | None, bool]:
        """Take a range of a dimension.

        Returns:
            The track, and whether the origin has no tokens there at all.
        """
        if isinstance(track, Layout) or track.dim != dim:
            return self.map(track, lambda part: self.one.narrow(part, dim, start, length, step)), False
        if not self.sizes.same(step, 1):
            return None, False
        end, position = of(start + length), of(0)
        kept: list[Stretch] = []
        for size, part in track.parts:
            stop = of(position + size)
            low, high = self.larger(start, position), self.smaller(stop, end)
            if low is None or high is None:
                return None, False
            count = of(high - low)
            if not self.sizes.at_least(0, count):
                if not self.sizes.at_least(count, 1):
                    return None, False
                piece = None if part is None else self.one.narrow(part, dim, of(low - position), count)
                if part is not None and piece is None:
                    return None, False
                kept.append((count, piece))
            position = stop
        if all(part is None for _, part in kept):
            return None, True
        return self.coalesce(dim, kept), False

    def larger(self, a: Size, b: Size) -> Size | None:
        """The larger of two sizes, None where that is not known."""
        first = self.sizes.at_least(a, b)
        return None if first is None else a if first else b

    def smaller(self, a: Size, b: Size) -> Size | None:
        """The smaller of two sizes, None where that is not known."""
        first = self.sizes.at_least(a, b)
        return None if first is None else b if first else a

    # -- joining ------------------------------------------------------------------------------------------------

    def coalesce(self, dim: int, parts: Sequence[Stretch]) -> Track | None:
        """Merge neighbouring stretches; a single one is a layout, one without tokens is None."""
        merged: list[Stretch] = []
        for size, part in parts:
            if merged:
                last_size, last = merged[-1]
                both = self.one.cat([last, part], dim) if last is not None and part is not None else None
                if both is not None or (last is None and part is None):
                    merged[-1] = (of(last_size + size), both)
                    continue
            merged.append((size, part))
        if len(merged) == 1:
            return merged[0][1]
        return Segments(dim, tuple(merged))

    def stack(self, tracks: Sequence[Track], dim: int) -> Track | None:
        """Stack along a new dimension."""
        layouts = [track for track in tracks if isinstance(track, Layout)]
        if len(layouts) == len(tracks):
            return self.one.stack(layouts, dim)
        first, *others = (track for track in tracks if isinstance(track, Segments))
        unlike = any(o.dim != first.dim or len(o.parts) != len(first.parts) for o in others)
        if unlike or len(others) + 1 != len(tracks):
            return None
        parts: list[Stretch] = []
        for stretches in zip(*(track.parts for track in (first, *others)), strict=True):
            size = stretches[0][0]
            held = [part for _, part in stretches if part is not None]
            joined = self.one.stack(held, dim) if len(held) == len(tracks) else None
            if any(not self.sizes.same(size, n) for n, _ in stretches) or (joined is None and held):
                return None
            parts.append((size, joined))
        return self.coalesce(first.dim + (dim <= first.dim), parts)

    def combine(self, a: Track, b: Track) -> Track | None:
        """The track of a result of which a and b are both true; None where they contradict each other."""
        if isinstance(a, Layout) and isinstance(b, Layout):
            return a if self.one.equal(a, b) else None
        if isinstance(a, Layout):
            a, b = b, a
        assert isinstance(a, Segments)
        others = self._split(b, a) if isinstance(b, Layout) else b.parts
        if others is None or (isinstance(b, Segments) and b.dim != a.dim) or len(others) != len(a.parts):
            return None
        parts: list[Stretch] = []
        for (size, x), (other_size, y) in zip(a.parts, others, strict=True):
            if not self.sizes.same(size, other_size):
                return None
            if x is not None and y is not None and not self.one.equal(x, y):
                return None
            parts.append((size, y if x is None else x))
        return self.coalesce(a.dim, parts)

    def _split(self, layout: Layout, like: Segments) -> tuple[Stretch, ...] | None:
        """Cut a layout into the stretches of another track."""
        start: Size = 0
        parts: list[Stretch] = []
        for size, _ in like.parts:
            part = self.one.narrow(layout, like.dim, start, size)
            if part is None:
                return None
            parts.append((size, part))
            start = of(start + size)
        return tuple(parts)


def _put(sizes: Sequence[Size], dim: int, size: Size | None) -> list[Size]:
    return [*sizes[:dim], size, *sizes[dim + 1 :]]
