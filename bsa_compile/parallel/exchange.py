"""What ranks exchange within one call of the transformer, in functional collectives that `torch.compile` traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from ..ops.ring_share import finish_gather, start_gather
from .mesh import Line
from .split import starts


def to_heads(x: Tensor, frames: int, heads: Sequence[int], counts: Sequence[int], line: Line) -> Tensor:
    """Some tokens of all heads become all tokens of some heads; the first half, with the exchange under way.

    Heads lie outermost while they travel: a contiguous `[H, B, S, D]` needs no packing, and what arrives is in pieces
    that `from_pieces` joins.

    Args:
        x: `[B, H, frames * n, D]`, this rank's tokens.
        frames: latent frames.
        heads: of each rank.
        counts: positions in a frame of each rank; n is this one's.
        line: the ranks.

    Returns:
        `[sum of pieces, D]`; whatever is not contiguous in it waits for the exchange.
    """
    batch, _, tokens, width = x.shape
    packed = x.transpose(0, 1).reshape(-1, width)
    here = heads[line.index]
    sent = [h * batch * tokens for h in heads]
    received = [here * batch * frames * n for n in counts]
    return _all_to_all(packed, received, sent, line)


def from_pieces(
    pieces: Tensor, batch: int, frames: int, heads: Sequence[int], counts: Sequence[int], line: Line
) -> Any:
    """What `to_heads` brought, as one `[B, heads[index], frames * n, D]` with n positions of the whole region."""
    here, width = heads[line.index], pieces.shape[-1]
    parts = pieces.split([here * batch * frames * n for n in counts])
    shaped = [p.view(here, batch, frames, n, width) for p, n in zip(parts, counts, strict=True)]
    return torch.cat(shaped, dim=3).flatten(2, 3).transpose(0, 1)


def to_tokens(x: Tensor, frames: int, heads: Sequence[int], counts: Sequence[int], line: Line) -> Tensor:
    """All tokens of some heads become some tokens of all heads.

    Args:
        x: `[B, heads[index], frames * n, D]` with n positions of the whole region.
        frames, heads, counts, line: as in `to_heads`.

    Returns:
        `[B, H, frames * counts[index], D]`.
    """
    batch, here, _, width = x.shape
    mine = counts[line.index]
    by_frame = x.transpose(0, 1).unflatten(2, (frames, sum(counts)))  # [H_here, B, T, n, D]
    ends = starts(counts)
    packed = torch.cat([by_frame[:, :, :, a : a + n].reshape(-1, width) for a, n in zip(ends, counts, strict=False)])
    sent = [here * batch * frames * n for n in counts]
    received = [h * batch * frames * mine for h in heads]
    arrived = _all_to_all(packed, received, sent, line)
    return arrived.reshape(sum(heads), batch, frames * mine, width).transpose(0, 1)


def _all_to_all(x: Tensor, received: list[int], sent: list[int], line: Line) -> Tensor:
    """Rows of x to each rank and from each rank, so many."""
    group: Any = line.group  # a name: its type is one of its own in some releases
    return collectives.all_to_all_single_autograd(x, received, sent, group)


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
