"""What one member of a ring holds of a token grid, and how its members pass tensors on.

A grid (t, h, w) is cut along h or w into one part per member; tiles are never cut. Tensors travel in functional
collectives, whose result is waited for where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, must
from ..grid import Shape3, num_tokens, tile_counts

_collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ring:
    """One member's view of the ring.

    Attributes:
        axis: which axis of a grid (t, h, w) is cut: 1 or 2.
        bounds: token at which each member's part begins, and the end.
        index: which member this process is.
        group: name of the process group.
    """

    axis: int
    bounds: tuple[int, ...]
    index: int
    group: str

    @classmethod
    def of(cls, axis: int, bounds: Sequence[int], index: int, group: str) -> Ring:
        return cls(axis, tuple(bounds), index, group)

    @property
    def size(self) -> int:
        return len(self.bounds) - 1

    def grid(self, whole: Sequence[int], member: int | None = None) -> Shape3:
        """(t, h, w) of a member's part, by default this one's; the cut axis may be 0."""
        member = self.index if member is None else member
        t, h, w = (
            self.bounds[member + 1] - self.bounds[member] if axis == self.axis else size
            for axis, size in enumerate(whole)
        )
        return t, h, w

    def tokens(self, whole: Sequence[int], member: int | None = None) -> int:
        """Tokens of a member's part, by default this one's."""
        return num_tokens(self.grid(whole, member))

    def tiles(self, whole: Sequence[int], tile: Sequence[int], member: int) -> Shape3:
        """Tiles of a member's part along t, h, w; the cut axis may have none."""
        return tile_counts(self.grid(whole, member), tile)

    def check_tiles(self, name: str, tile: Sequence[int]) -> None:
        """Refuse tiles that a bound would cut.

        Raises:
            InputError: one would.
        """
        cuts = [b for b in self.bounds if b < self.bounds[-1]]
        if any(b % tile[self.axis] for b in cuts):
            want = f"have a size along axis {self.axis} that divides where the ring is cut, {cuts}"
            raise InputError(must(name, want, list(tile), "Split the frame under the policy that runs."))

    def pass_on(self, x: Tensor, received: int) -> Tensor:
        """Send a flat tensor to the next member and start to receive `received` elements from the one before."""
        sent, got = [0] * self.size, [0] * self.size
        sent[(self.index + 1) % self.size], got[(self.index - 1) % self.size] = x.numel(), received
        return _collectives.all_to_all_single(x, got, sent, self.group)


def wait(x: Tensor) -> Tensor:
    """What a collective gave, once it has arrived."""
    return _collectives.wait_tensor(x)


def start_gather(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    """Start to gather shares of different sizes along `dim`; `finish_gather` waits for them.

    Args:
        x: this rank's share.
        dim: axis that is shared out.
        sizes: of everybody's share.
        group: name of the process group.
    """
    moved = x.movedim(dim, 0)
    padded = moved.new_zeros((max(sizes), *moved.shape[1:]))  # collectives of equal sizes work on every backend
    padded[: len(moved)] = moved
    return _collectives.all_gather_into_tensor(padded, len(sizes), group)


def finish_gather(pending: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
    """The shares that `start_gather` asked for."""
    everyone = wait(pending).unflatten(0, (len(sizes), max(sizes)))
    return [everyone[i, :n].movedim(0, dim) for i, n in enumerate(sizes)]


def owned(
    kv_num_blocks: Tensor, kv_indices: Tensor, ring: Ring, whole: Sequence[int], tile: Sequence[int], member: int
) -> tuple[Tensor, Tensor]:
    """The part of a selection that lies in a member's part of the keys.

    Args:
        kv_num_blocks: `[B, H, Nq]` int32, over all key tiles.
        kv_indices: `[B, H, Nq, Kmax]` int32, ascending.
        ring: who owns what.
        whole: grid of all keys.
        tile: of the keys.
        member: whose part; it holds a tile at least.

    Returns:
        The same over the member's own tiles, in its own numbering; a row may have none.
    """
    first = ring.bounds[member] // tile[ring.axis]
    part = ring.tiles(whole, tile, member)
    _, rows, columns = tile_counts(whole, tile)
    index = kv_indices.long()
    at = [index // (rows * columns), index // columns % rows, index % columns]
    at[ring.axis] = at[ring.axis] - first
    inside = (at[ring.axis] >= 0) & (at[ring.axis] < part[ring.axis])
    inside &= torch.arange(index.shape[-1], device=index.device) < kv_num_blocks[..., None]
    here = (at[0] * part[1] + at[1]) * part[2] + at[2]
    capacity = min(index.shape[-1], math.prod(part))
    # Left-packed and still ascending; what is not here goes to a slot beyond, which is cut off.
    slot = torch.where(inside, inside.cumsum(-1) - 1, capacity)
    lists = torch.zeros(*index.shape[:-1], capacity + 1, dtype=torch.int32, device=index.device)
    lists.scatter_(-1, slot, here.int())
    return inside.sum(-1, dtype=torch.int32), lists[..., :capacity].contiguous()


def everything(q: Tensor, num_q: int, num_k: int) -> tuple[Tensor, Tensor]:
    """The selection of all of `num_k` tiles by each of `num_q` query tiles of q `[B, H, S, D]`."""
    rows = (q.shape[0], q.shape[1], num_q)
    counts = torch.full(rows, num_k, dtype=torch.int32, device=q.device)
    return counts, torch.arange(num_k, dtype=torch.int32, device=q.device).expand(*rows, num_k).contiguous()
