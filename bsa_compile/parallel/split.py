"""Which token positions each rank holds: arithmetic alone, the same on every rank.

Every rank holds all latent frames and a share of the positions of each frame, so whatever the transformer does per
frame (timesteps, modulation, cond frames, KV cache) is the same on a share as on the whole. The ring cuts the frame
into regions of whole tiles along h or w; inside a region the Ulysses ranks take runs of its raster, as even as can be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def even(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` shares that differ by one at most, the larger ones first; some are 0 if there are too few."""
    least, more = divmod(total, parts)
    return tuple(least + (i < more) for i in range(parts))


def starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each share begins, and where the last one ends."""
    return tuple(itertools.accumulate(sizes, initial=0))


def ring_bounds(extent: int, unit: int, parts: int) -> tuple[int, ...]:
    """Cut `extent` tokens into `parts` shares of whole units; the last unit may be partial."""
    return tuple(min(extent, n * unit) for n in starts(even(-(-extent // unit), parts)))


@dataclass(frozen=True)
class FrameSplit:
    """How the positions of a latent frame are shared among `ring` x `ulysses` ranks.

    Attributes:
        height, width: token rows and columns of a frame.
        axis: along which the ring cuts, 1 for h and 2 for w, as in a grid (t, h, w).
        bounds: where the regions of the ring's members begin along it, and the end.
        ulysses: ranks that share a region.
    """

    height: int
    width: int
    axis: int
    bounds: tuple[int, ...]
    ulysses: int

    @classmethod
    def of(cls, height: int, width: int, ring: int, ulysses: int, units: tuple[int, int] = (1, 1)) -> FrameSplit:
        """The more even of the two ways to cut a frame.

        Args:
            height, width: of a frame, in tokens.
            ring, ulysses: ranks.
            units: tokens along h and w of which every region but the last holds a multiple: those of a tile.
        """
        cuts = []
        for axis, extent, other in ((1, height, width), (2, width, height)):
            bounds = ring_bounds(extent, units[axis - 1], ring)
            largest = max(b - a for a, b in itertools.pairwise(bounds)) * other
            cuts.append((largest, axis, bounds))
        _, axis, bounds = min(cuts)
        return cls(height, width, axis, bounds, ulysses)

    @property
    def ring(self) -> int:
        """Members of the ring."""
        return len(self.bounds) - 1

    def region(self, member: int) -> tuple[int, int]:
        """(h, w) of a ring member's region."""
        size = self.bounds[member + 1] - self.bounds[member]
        return (size, self.width) if self.axis == 1 else (self.height, size)

    def counts(self, member: int) -> tuple[int, ...]:
        """Positions of each Ulysses rank in the region of a ring member."""
        rows, columns = self.region(member)
        return even(rows * columns, self.ulysses)

    def take(self, x: Tensor, member: int, index: int) -> Tensor:
        """The tokens of one rank.

        Args:
            x: `[..., frames * height * width, C]` in raster order.
            member: index in the ring.
            index: index among the Ulysses ranks.

        Returns:
            `[..., frames * n, C]`, contiguous.
        """
        rows, columns = self.region(member)
        sizes = self.counts(member)
        x = x.unflatten(-2, (-1, self.height, self.width))
        if self.ring > 1:
            x = x.narrow(-3 if self.axis == 1 else -2, self.bounds[member], rows if self.axis == 1 else columns)
        x = x.flatten(-3, -2).narrow(-2, starts(sizes)[index], sizes[index])
        return x.flatten(-3, -2).contiguous()

    def join_frame(self, regions: Sequence[Tensor]) -> Tensor:
        """Regions `[..., frames, n_i, C]` of the ring's members to `[..., frames, height * width, C]`."""
        if len(regions) == 1:
            return regions[0]
        shaped = [r.unflatten(-2, self.region(i)) for i, r in enumerate(regions)]
        return torch.cat(shaped, dim=-3 if self.axis == 1 else -2).flatten(-3, -2)
