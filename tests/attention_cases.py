"""Attention problems that tests share, strategies that draw them, and the rule by which numbers are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bsa_compile import ops  # registers torch.ops.bsa
from bsa_compile.grid import num_tiles, num_tokens, raster_indices, tile_volume, valid_positions

assert ops
INT32_MAX = 2**31 - 1
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """Structure of one attention problem; its tensors come from a generator seeded with `seed`."""

    grid_q: Triple = (2, 5, 6)
    tile_q: Triple = (2, 2, 3)
    grid_k: Triple = (3, 4, 5)
    tile_k: Triple = (2, 3, 2)
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 16
    sparsity: float | None = 0.5
    cdf_threshold: float | None = None
    layout: str = "raster"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def num_q(self) -> int:
        return num_tiles(self.grid_q, self.tile_q)

    @property
    def num_k(self) -> int:
        return num_tiles(self.grid_k, self.tile_k)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def grids(self) -> tuple[list[int], ...]:
        """grid_q, tile_q, grid_k, tile_k as the ops take them."""
        return tuple(list(g) for g in (self.grid_q, self.tile_q, self.grid_k, self.tile_k))

    @property
    def tail(self) -> tuple[Any, ...]:
        """What follows the index tensors in a call of attend."""
        return (*self.grids, self.scale, self.layout)

    def tokens(self, side: str) -> int:
        grid, tile = (self.grid_q, self.tile_q) if side == "q" else (self.grid_k, self.tile_k)
        return num_tokens(grid) if self.layout == "raster" else num_tiles(grid, tile) * tile_volume(tile)

    def table(self, side: str) -> Tensor:
        """`[N, V]`: token index of each position of each tile, -1 for none."""
        grid, tile = (self.grid_q, self.tile_q) if side == "q" else (self.grid_k, self.tile_k)
        if self.layout == "raster":
            return raster_indices(grid, tile)
        inside = valid_positions(grid, tile)
        return torch.where(inside, torch.arange(inside.numel()).reshape(inside.shape), -1)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def qkv(self, std: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        generator = self.generator()
        shapes = ((self.heads, "q"), (self.heads_kv, "k"), (self.heads_kv, "k"))
        q, k, v = (
            (torch.randn(self.batch, heads, self.tokens(side), self.head_dim, generator=generator) * std).to(self.dtype)
            for heads, side in shapes
        )
        return q, k, v

    def selection(self, density: float = 0.5) -> tuple[Tensor, Tensor]:
        """Random lists with any count from 0 to all; the tails are poisoned."""
        generator = self.generator()
        shape = (self.batch, self.heads, self.num_q, self.num_k)
        per_row = torch.rand(shape[:3], generator=generator)[..., None] * 2 * density
        return pack(torch.rand(shape, generator=generator) < per_row)

    def pooled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        pool = torch.ops.bsa.pool
        return pool(q, *self.grids[:2], self.layout), pool(k, *self.grids[2:], self.layout)

    def select(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.bsa.select(*self.pooled(q, k), self.sparsity, self.cdf_threshold, self.scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.bsa.attend(q, k, v, counts, indices, *self.tail)

    def gradients(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """rest: counts, indices, grad_out, grad_lse."""
        counts, indices, grad_out, grad_lse = rest
        out, lse = self.attend(q, k, v, counts, indices)
        return torch.ops.bsa.attend_backward(grad_out, grad_lse, q, k, v, out, lse, counts, indices, *self.tail)


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Left-packed ascending lists of a `[B, H, Nq, Nk]` mask; the tails are poisoned."""
    columns = torch.arange(mask.shape[-1], dtype=torch.int32)
    packed = torch.where(mask, columns, INT32_MAX).sort(-1).values.int()
    return mask.sum(-1).int(), packed


def unpack(counts: Tensor, indices: Tensor, num_kv: int) -> Tensor:
    """The `[B, H, Nq, Nk]` mask of lists, row by row; fails on indices that repeat, descend or leave the range."""
    mask = torch.zeros(*counts.shape, num_kv, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).reshape(-1, 3).tolist():
        row = indices[tuple(at)][: int(counts[tuple(at)])].tolist()
        assert row == sorted(set(row)), f"row {at} does not ascend strictly: {row}"
        assert all(0 <= j < num_kv for j in row), f"row {at} is out of bounds: {row}"
        mask[tuple(at)][row] = True
    return mask


def scores_as_pooled(scores: Tensor) -> tuple[Tensor, Tensor]:
    """q_pooled and k_pooled whose scores are exactly these `[B, H, Nq, Nk]`."""
    num_q = scores.shape[-2]
    q = torch.eye(num_q).expand(*scores.shape[:2], num_q, num_q).contiguous()
    return q, scores.transpose(-1, -2).contiguous().float()


def select(
    scores: Tensor, sparsity: float | None = None, cdf_threshold: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`bsa::select` on given `[B, H, Nq, Nk]` scores."""
    return torch.ops.bsa.select(*scores_as_pooled(scores), sparsity, cdf_threshold, scale)


def assert_close(ours: Tensor, torchs: Tensor | None, truth: Tensor, what: str = "", terms: float = 0.0) -> None:
    """Our error against fp64 is at most twice that of torch in the input dtype, plus an ulp of the largest value.

    Args:
        ours: what is judged.
        torchs: the same computation done by torch in the input dtype, None where that is no use.
        truth: the same in fp64.
        what: shown when it fails.
        terms: size of the terms that cancel in the truth, where they are larger than it.
    """
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours), finite), f"{what}: not finite where the truth is, or the reverse"
    assert torch.equal(ours.double()[~finite], truth[~finite]), f"{what}: other infinities than the truth"
    if not bool(finite.any()):
        return
    truth = truth[finite]
    size = max(terms, float(truth.abs().max()))
    allowed = torch.finfo(ours.dtype).eps * size
    if torchs is None:
        allowed *= 16
    else:
        theirs = float((torchs.double()[finite] - truth).abs().max())
        assert theirs <= 0.05 * size + allowed, f"{what}: torch itself is off by {theirs:.3e}: another problem?"
        allowed += theirs
    error = float((ours.double()[finite] - truth).abs().max())
    assert error <= 2 * allowed, f"{what}: error {error:.3e}, allowed {2 * allowed:.3e}"


def assert_identical(ours: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    """Bit-equal, one by one; NaN equals NaN."""
    for i, (a, b) in enumerate(zip(ours, others, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}")


def dense_mask_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked dense attention in the dtype of q: what torch itself makes of the problem; differentiable."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = (q @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True)
    p = logits.masked_fill(empty, 0).softmax(-1).masked_fill(~mask, 0)
    return p @ values, torch.where(empty, -math.inf, logits.masked_fill(empty, 0).logsumexp(-1, keepdim=True))[..., 0]


_side = st.integers(1, 6)
_step = st.integers(1, 4)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any structure small enough for the reference."""
    heads_kv = draw(st.integers(1, 2))
    criteria = draw(st.sampled_from([(0.5, None), (0.9, None), (0.0, None), (None, 0.6), (None, 1.0), (0.7, 0.4)]))
    values: dict[str, Any] = {
        "grid_q": draw(st.tuples(st.integers(1, 4), _side, _side)),
        "tile_q": draw(st.tuples(_step, _step, _step)),
        "grid_k": draw(st.tuples(st.integers(1, 4), _side, _side)),
        "tile_k": draw(st.tuples(_step, _step, _step)),
        "batch": draw(st.integers(1, 2)),
        "heads": heads_kv * draw(st.integers(1, 2)),
        "heads_kv": heads_kv,
        "head_dim": draw(st.sampled_from([16, 24, 40])),
        "sparsity": criteria[0],
        "cdf_threshold": criteria[1],
        "layout": draw(st.sampled_from(["raster", "tile"])),
        "seed": draw(st.integers(0, 2**20)),
    }
    return Case(**{**values, **fixed})
