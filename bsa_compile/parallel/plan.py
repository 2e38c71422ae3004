"""What one call of a transformer does on one rank: which tokens it holds, and how they attend to the others'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import attention, ring_attention
from .exchange import exchanges, gather_shares, pack_heads
from .mesh import Ranks
from .split import FrameSplit, Grid, even

GROUPS, GROUP_HEADS = 4, 4
"""The most groups of heads that overlap, and the fewest heads of one: fewer leave a GPU half empty."""


def overlapping_groups(heads: int, ulysses: int) -> int:
    """Groups into which each Ulysses rank's heads are divided."""
    return max(1, min(GROUPS, heads // ulysses // GROUP_HEADS)) if ulysses > 1 else 1


@dataclass(frozen=True)
class Plan:
    """A frame split among ranks, as one of them sees it; `TokenSplit` and `AttentionFn` of the LongCat DiT.

    Attributes:
        split: which positions each rank holds.
        ranks: this rank's place.
        heads: attention heads.
        groups: into which the heads of each Ulysses rank are divided: one is attended with while others travel.
    """

    split: FrameSplit
    ranks: Ranks
    heads: int
    groups: int = 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Positions in a frame of each Ulysses rank of this rank's region."""
        return self.split.counts(self.ranks.ring.index)

    def share(self, grid: Grid) -> Grid:
        """(t, h, w) of this rank's tokens: a run of each frame's raster has no rows of its own."""
        return grid[0], 1, self.counts[self.ranks.ulysses.index]

    def take(self, x: Tensor) -> Tensor:
        """This rank's tokens of `[..., frames * height * width, C]`."""
        return self.split.take(x, self.ranks.ring.index, self.ranks.ulysses.index)

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        """The whole of what every rank has a share of.

        A rank's gradient counts as many times as there are ranks: their mean, which DDP and FSDP take, is the gradient.

        Args:
            x: `[B, t * n, C]`.
            grid: (t, height, width) of the whole.

        Returns:
            `[B, t * height * width, C]`.
        """
        split, ring, ulysses = self.split, self.ranks.ring, self.ranks.ulysses
        gain = float(ring.size * ulysses.size)
        x = x.unflatten(1, (grid[0], self.counts[ulysses.index]))
        if ulysses.size > 1:
            x, gain = gather_shares(x, 2, list(self.counts), ulysses.index, ulysses.group, gain), 1.0
        if ring.size > 1:
            sizes = [h * w for h, w in map(split.region, range(ring.size))]
            whole = gather_shares(x, 2, sizes, ring.index, ring.group, gain)
            x = split.join_frame(whole.split(sizes, dim=2))
        return x.flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, grid_q: Grid, grid_k: Grid, role: str) -> Tensor:
        """Attention of this rank's queries to everybody's keys.

        Args:
            q: `[B, H, t_q * n, D]`, this rank's tokens.
            k, v: `[B, H, t_k * n, D]`, likewise.
            grid_q, grid_k: (t, 1, n) of them.
            role: as the model says.

        Returns:
            `[B, H, t_q * n, D]`.
        """
        line, batch = self.ranks.ulysses, q.shape[0]
        whole_q, whole_k = [(t, self.split.height, self.split.width) for t in (grid_q[0], grid_k[0])]
        if line.size == 1:
            return self._inner(q, k, v, whole_q, whole_k, role)
        groups = exchanges(line, even(self.heads, line.size), self.counts, self.groups)
        frames = (grid_q[0], grid_k[0], grid_k[0])
        packed = pack_heads(groups, (q, k, v))

        def start(group: int) -> Tensor:
            return groups[group].start_heads(packed[group], batch, frames)

        coming, going = start(0), []
        for index, exchange in enumerate(groups):
            here = coming
            if index + 1 < len(groups):  # on its way while this group is joined and attended with
                coming = start(index + 1)
            q, k, v = exchange.join_heads(here, batch, frames)
            out = self._inner(q, k, v, whole_q, whole_k, role)
            going.append(exchange.start_tokens(out, grid_q[0]))  # while the next group is attended with
        done = [exchange.finish_tokens(x, batch) for exchange, x in zip(groups, going, strict=True)]
        by_rank = [group[rank] for rank in range(line.size) for group in done]
        return torch.cat(by_rank).transpose(0, 1)

    def _inner(self, q: Tensor, k: Tensor, v: Tensor, grid_q: Grid, grid_k: Grid, role: str) -> Tensor:
        """Attention of some heads of this region's tokens."""
        split, line = self.split, self.ranks.ring
        if line.size == 1:
            return attention(q, k, v, grid_q=grid_q, grid_k=grid_k, role=role)
        return ring_attention(
            q,
            k,
            v,
            grid_q=grid_q,
            grid_k=grid_k,
            axis=split.axis,
            bounds=split.bounds,
            index=line.index,
            group=line.group,
            role=role,
        )
