"""What ranks exchange within one call of the transformer, in functional collectives that `torch.compile` traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from ..ops.ring_share import finish_gather, start_gather
from .mesh import Line
from .split import even, starts


@dataclass(frozen=True)
class Exchange:
    """An all-to-all of heads against tokens among the ranks of a line.

    Heads lie outermost while they travel: then pieces are joined by one copy. What `start_*` gives is under way; only
    `join_heads` and `finish_tokens` wait for it. `pack_heads` makes what is sent.

    Attributes:
        line: the ranks.
        heads: (first, number) of the heads that each rank attends with.
        counts: positions in a frame of each rank.
    """

    line: Line
    heads: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]

    @property
    def here(self) -> int:
        """Heads of this rank."""
        return self.heads[self.line.index][1]

    def start_heads(self, packed: Tensor, batch: int, frames: Sequence[int]) -> Tensor:
        """Send this rank's tokens of each rank's heads.

        Args:
            packed: of `pack_heads`.
            batch: B.
            frames: latent frames of each of the tensors that were packed.

        Returns:
            Rows of D that `join_heads` joins.
        """
        rows = batch * sum(frames)
        mine = self.counts[self.line.index]
        received = [self.here * rows * n for n in self.counts]
        return _start(packed, received, [n * rows * mine for _, n in self.heads], self.line)

    def join_heads(self, pending: Tensor, batch: int, frames: Sequence[int]) -> list[Tensor]:
        """Of each tensor `[B, here, frames * n, D]`: this rank's heads, with n positions of the whole region."""
        arrived, width, rows = _finish(pending), pending.shape[-1], self.here * batch
        parts = arrived.split([rows * sum(frames) * n for n in self.counts])
        pieces = [p.split([rows * t * n for t in frames]) for p, n in zip(parts, self.counts, strict=True)]
        joined = [
            torch.cat([of_rank[i].view(self.here, batch, t, -1, width) for of_rank in pieces], dim=3)
            for i, t in enumerate(frames)
        ]
        return [x.flatten(2, 3).transpose(0, 1) for x in joined]

    def start_tokens(self, x: Tensor, frames: int) -> Tensor:
        """Send each rank its tokens of this rank's heads `[B, here, frames * n, D]`."""
        batch, here, _, width = x.shape
        by_frame = x.transpose(0, 1).unflatten(2, (frames, sum(self.counts)))  # [here, B, T, n, D]
        packed = torch.cat([part.reshape(-1, width) for part in by_frame.split(list(self.counts), dim=3)])
        tokens = batch * frames * self.counts[self.line.index]
        sent = [here * batch * frames * n for n in self.counts]
        return _start(packed, [n * tokens for _, n in self.heads], sent, self.line)

    def finish_tokens(self, pending: Tensor, batch: int) -> list[Tensor]:
        """Of each rank's heads `[heads, B, frames * n, D]`, this rank's tokens."""
        arrived, width = _finish(pending), pending.shape[-1]
        heads = sum(n for _, n in self.heads)
        shaped = arrived.view(heads, batch, arrived.shape[0] // (batch * heads), width)
        return list(shaped.split([n for _, n in self.heads]))


def exchanges(line: Line, heads: Sequence[int], counts: Sequence[int], groups: int) -> list[Exchange]:
    """One exchange for each group of heads; every rank has a part of each.

    Args:
        line: the ranks.
        heads: of each rank, at least `groups`.
        counts: positions in a frame of each rank.
        groups: how many.
    """
    parts = [(first, even(number, groups)) for first, number in zip(starts(heads), heads, strict=False)]
    return [
        Exchange(line, tuple((first + sum(sizes[:g]), sizes[g]) for first, sizes in parts), tuple(counts))
        for g in range(groups)
    ]


def pack_heads(groups: Sequence[Exchange], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What each group sends, in one message to each rank: its heads of every tensor.

    Args:
        groups: of `exchanges`.
        tensors: `[B, H, frames * n, D]` of this rank's tokens, all heads; the frames may differ.

    Returns:
        Rows of D for each group.
    """
    by_head, width = [x.transpose(0, 1) for x in tensors], tensors[0].shape[-1]
    if len({number for group in groups for _, number in group.heads}) > 1:
        return [torch.cat([x[a : a + n].reshape(-1, width) for a, n in g.heads for x in by_head]) for g in groups]
    # Heads lie as (rank, group, n). With groups outermost all of them are packed by one copy, into which a compiler
    # fuses what computes the tensors; then these themselves, and what they are views of, take no memory any more.
    shape = (len(groups[0].heads), len(groups), -1)
    by_group = [x.unflatten(0, shape).transpose(0, 1).flatten(2, -2) for x in by_head]
    return list(torch.cat(by_group, dim=2).flatten(1, 2))


def _start(x: Tensor, received: list[int], sent: list[int], line: Line) -> Tensor:
    """Rows of x to each rank and from each rank, so many."""
    group: Any = line.group  # a name: its type is one of its own in some releases
    if torch.is_grad_enabled() and x.requires_grad:
        return collectives.all_to_all_single_autograd(x, received, sent, group)
    # A tracer would let the function above wait at once.
    return torch.ops._c10d_functional.all_to_all_single(x, received, sent, group)


def _finish(x: Tensor) -> Tensor:
    return x if x.requires_grad else torch.ops._c10d_functional.wait_tensor(x)


@torch.library.custom_op("bsa::gather_shares", mutates_args=())
def gather_shares(x: Tensor, dim: int, sizes: Sequence[int], index: int, group: str, gain: float) -> Tensor:
    """Join the shares of all ranks along `dim`; every rank gets the whole.

    Each rank is taken to go on with the whole in the same way, to a loss of its own that equals the others'. So its
    backward pass needs no exchange: a rank's share of the gradient it has itself. `gain` multiplies that share.

    Args:
        x: this rank's share, `sizes[index]` long along `dim`.
        dim: the axis that is shared out.
        sizes: of the shares.
        index: which of them is this rank's.
        group: name of the process group.
        gain: factor of the gradient.
    """
    shares = finish_gather(start_gather(x, dim, sizes, group), dim, sizes)
    return torch.cat(shares, dim=dim)


@gather_shares.register_fake
def _(x: Tensor, dim: int, sizes: Sequence[int], index: int, group: str, gain: float) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(sizes)
    return x.new_empty(shape)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, ctx.sizes, ctx.index, _, ctx.gain = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    share = grad.narrow(ctx.dim, starts(ctx.sizes)[ctx.index], ctx.sizes[ctx.index])
    return share.contiguous() * ctx.gain, None, None, None, None, None


gather_shares.register_autograd(_gather_backward, setup_context=_gather_setup)


class MeanOfGradients(torch.autograd.Function):
    """An input that every rank was given: unchanged, and its gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lines: tuple[Line, ...]) -> Tensor:
        ctx.lines = lines
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        for line in ctx.lines:
            group: Any = line.group
            total = collectives.all_reduce(grad.contiguous(), "sum", group)
            grad = collectives.wait_tensor(total) / line.size
        return grad, None
