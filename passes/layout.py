"""Where the tokens of one sequence lie in a tensor: an affine map from positions to token ids, and its algebra.

A `Layout` says of every position of a tensor which token of one *origin* (a patch embedding, or a dimension of a graph
input) it belongs to: ``id = offset + sum(index_j * stride_j)`` over the factors of all dimensions, just as strides map
indices to memory. Stride 0 means that the token does not depend on that index (batch, heads, channels).

    conv3d output            [B, C, T, H, W]   ((B,0)) ((C,0)) ((T,HW)) ((H,W)) ((W,1))
    .flatten(2)              [B, C, THW]       ((B,0)) ((C,0)) ((THW,1))
    [..., c*HW:]             [B, C, (T-c)HW]   ((B,0)) ((C,0)) (((T-c)HW,1))                offset c*HW
    windows of h             [.., H/2, T, 2W]  ...     ((H/2,2W)) ((T,HW)) ((2W,1))         not one run: no raster order

Views of all kinds then need one rule each, exact and independent of names; what an affine map cannot express is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from .sizes import Size, Sizes, of, product, total

Factor: TypeAlias = tuple[Size, Size]
"""(size, stride): `size` positions, each `stride` tokens after the one before."""

Dim: TypeAlias = tuple[Factor, ...]
"""The factors of one dimension, slowest first; empty for a dimension of size 1."""


@dataclass(frozen=True)
class Layout:
    """Which token each position holds.

    Attributes:
        dims: the factors of each dimension.
        offset: the token at index 0 of every dimension.
    """

    dims: tuple[Dim, ...]
    offset: Size = 0


class Algebra:
    """The operations on layouts, over sizes that may be symbolic."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    # -- making and comparing -----------------------------------------------------------------------------------

    def raster(self, shape: Sequence[Size], axes: Sequence[int]) -> Layout:
        """Tokens counted in raster order over `axes`, the last fastest."""
        strides = {axis: product(shape[a] for a in axes[i + 1 :]) for i, axis in enumerate(axes)}
        return Layout(tuple(self._merge([(size, strides.get(i, 0))]) for i, size in enumerate(shape)))

    def moves(self, dim: Dim) -> bool:
        """Whether the token depends on the index in this dimension."""
        return any(not self.sizes.same(stride, 0) for _, stride in dim)

    def equal(self, a: Layout, b: Layout) -> bool:
        """Whether two layouts map every position to the same token."""
        return (
            len(a.dims) == len(b.dims)
            and self.sizes.same(a.offset, b.offset)
            and all(self._same_dim(x, y) for x, y in zip(a.dims, b.dims, strict=True))
        )

    def run(self, layout: Layout, dim: int) -> tuple[Size, Size] | None:
        """(first token, count) if `dim` alone holds tokens, consecutive and in order; else None."""
        if any(self.moves(d) for i, d in enumerate(layout.dims) if i != dim):
            return None
        factors = layout.dims[dim]
        if not factors:
            return layout.offset, 1
        if len(factors) == 1 and self.sizes.same(factors[0][1], 1):
            return layout.offset, factors[0][0]
        return None

    # -- views --------------------------------------------------------------------------------------------------

    def view(self, layout: Layout, shape: Sequence[Size]) -> Layout | None:
        """Reinterpret the row-major order of positions in another shape (view, reshape, flatten, squeeze, ...)."""
        pending = list(reversed(self._merge([f for dim in layout.dims for f in dim])))
        dims = []
        for want in shape:
            factors: list[Factor] = []
            while not self.sizes.same(want, 1):
                if not pending:
                    return None
                size, stride = pending.pop()
                if self.sizes.same(size, want):
                    factors.append((size, stride))
                    want = 1
                elif (left := self.sizes.quotient(want, size)) is not None:
                    factors.append((size, stride))
                    want = left
                elif (inner := self.sizes.quotient(size, want)) is not None:
                    factors.append((want, of(stride * inner)))
                    pending.append((inner, stride))
                    want = 1
                else:
                    return None
            dims.append(self._merge(factors))
        return None if pending else Layout(tuple(dims), layout.offset)

    def permute(self, layout: Layout, order: Sequence[int]) -> Layout:
        """Reorder dimensions: result dimension i is `order[i]`."""
        return replace(layout, dims=tuple(layout.dims[i] for i in order))

    def expand(self, layout: Layout, shape: Sequence[Size]) -> Layout:
        """Broadcast to `shape`, new dimensions in front; all copies hold the same token."""
        lead = len(shape) - len(layout.dims)
        dims = [self._merge([(size, 0)]) for size in shape]
        for i, dim in enumerate(layout.dims, start=lead):
            if dim:
                dims[i] = dim
        return replace(layout, dims=tuple(dims))

    def resize(self, layout: Layout, dim: int, size: Size) -> Layout | None:
        """Give a dimension that holds no tokens another size."""
        if self.moves(layout.dims[dim]):
            return None
        return self._with(layout, dim, self._merge([(size, 0)]))

    def repeat(self, layout: Layout, dim: int, times: Size, *, interleave: bool = False) -> Layout:
        """Repeat along a dimension, as a whole or each position."""
        factors = layout.dims[dim]
        copies: Factor = (times, 0)
        return self._with(layout, dim, self._merge([*factors, copies] if interleave else [copies, *factors]))

    def narrow(self, layout: Layout, dim: int, start: Size, length: Size, step: Size = 1) -> Layout | None:
        """Take `length` positions of `dim` from `start`, every `step`-th."""
        factors = layout.dims[dim]
        if not self.moves(factors):
            return self._with(layout, dim, self._merge([(length, 0)]))
        (size, stride), inner = factors[0], product(s for s, _ in factors[1:])
        if self.sizes.same(start, 0) and self.sizes.same(length, size * inner) and self.sizes.same(step, 1):
            return layout
        if len(factors) > 1 and not self.sizes.same(step, 1):
            return None
        first, count = self.sizes.quotient(start, inner), self.sizes.quotient(length, inner)
        if first is None or count is None:
            return None
        kept = self._merge([(count, of(stride * step)), *factors[1:]])
        return self._with(layout, dim, kept, of(layout.offset + first * stride))

    def select(self, layout: Layout, dim: int, index: Size) -> Layout | None:
        """Take one index of `dim` and drop the dimension."""
        factors = layout.dims[dim]
        offset = layout.offset
        if self.moves(factors):
            inner = product(s for s, _ in factors)
            for size, stride in factors:
                inner = self.sizes.quotient(inner, size)
                if self.sizes.same(inner, 1):
                    digit = index
                elif isinstance(index, int) and isinstance(inner, int):
                    digit, index = divmod(index, inner)
                else:
                    return None
                offset = of(offset + digit * stride)
        return Layout(layout.dims[:dim] + layout.dims[dim + 1 :], offset)

    # -- joining ------------------------------------------------------------------------------------------------

    def cat(self, parts: Sequence[Layout], dim: int) -> Layout | None:
        """Concatenate along `dim` where the result is affine again: adjacent ranges, or no tokens along `dim`."""
        first, *others = parts
        for other in others:
            if any(
                not self._same_dim(a, b)
                for i, (a, b) in enumerate(zip(first.dims, other.dims, strict=True))
                if i != dim
            ):
                return None
        sizes = [product(s for s, _ in part.dims[dim]) for part in parts]
        if not any(self.moves(part.dims[dim]) for part in parts) and all(
            self.sizes.same(first.offset, o.offset) for o in others
        ):
            return self._with(first, dim, self._merge([(total(sizes), 0)]))
        # A part of size 1 has no stride of its own; the others must agree on the stride and on what lies inside it.
        shaped = [part.dims[dim] for part in parts if part.dims[dim]]
        inside = shaped[0][1:] if shaped else ()
        stride = shaped[0][0][1] if shaped else of(others[0].offset - first.offset)
        counts = []
        for part in parts:
            factors = part.dims[dim]
            if not factors and inside:
                return None
            if factors and not (self.sizes.same(factors[0][1], stride) and self._same_dim(factors[1:], inside)):
                return None
            counts.append(factors[0][0] if factors else 1)
        expected = first.offset
        for part, count in zip(parts, counts, strict=True):
            if not self.sizes.same(part.offset, expected):
                return None
            expected = of(expected + count * stride)
        return self._with(first, dim, self._merge([(total(counts), stride), *inside]))

    def stack(self, parts: Sequence[Layout], dim: int) -> Layout | None:
        """Stack along a new dimension `dim`."""
        first, *others = parts
        step = of(others[0].offset - first.offset) if others else 0
        for i, other in enumerate(others, start=1):
            moved = replace(other, offset=of(other.offset - i * step))
            if not self.equal(first, moved):
                return None
        dims = (*first.dims[:dim], self._merge([(len(parts), step)]), *first.dims[dim:])
        return replace(first, dims=dims)

    # -- details --------------------------------------------------------------------------------------------------

    def _with(self, layout: Layout, dim: int, factors: Dim, offset: Size | None = None) -> Layout:
        dims = (*layout.dims[:dim], factors, *layout.dims[dim + 1 :])
        return Layout(dims, layout.offset if offset is None else offset)

    def _merge(self, factors: Sequence[Factor]) -> Dim:
        """Drop factors of size 1 and join neighbours whose positions follow one another."""
        merged: list[Factor] = []
        for size, stride in factors:
            if self.sizes.same(size, 1):
                continue
            if merged and self.sizes.same(merged[-1][1], size * stride):
                merged[-1] = (of(merged[-1][0] * size), stride)
            else:
                merged.append((size, stride))
        return tuple(merged)

    def _same_dim(self, a: Dim, b: Dim) -> bool:
        return len(a) == len(b) and all(self.sizes.all_same(x, y) for x, y in zip(a, b, strict=True))
