"""One self-attention to be measured: its tensors, its lists, and the truth on sampled query tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import UsageError, must
from ..grid import Shape3, divides, num_tiles, num_tokens, raster_indices, tile_volume
from ..policy import keep_count
from ..structured import shared_fraction, structured_qkv

assert ops  # registers torch.ops.bsa
LISTS = ("gate", "random")
SAMPLED_TILES = 4  # query tiles that are compared with fp64, in the first and the last head


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        grid, tile: in tokens; queries and keys share them.
        heads, head_dim, dtype: of q, k and v; one batch element.
        sparsity: fraction of key tiles that each query tile skips.
        lists: `gate`: chosen by pool, score and select from structured q and k; `random`: drawn, from random q and k.
        keep: selected tiles of a row instead of what the sparsity says, None for that.
        seed: of everything that is drawn.
    """

    grid: Shape3
    tile: Shape3
    heads: int
    head_dim: int
    dtype: torch.dtype
    sparsity: float
    lists: str = "gate"
    keep: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lists not in LISTS:
            raise UsageError(must("lists", f"be one of {', '.join(LISTS)}", repr(self.lists)))
        if not 0 < self.kept <= self.num_tiles:
            raise UsageError(must("keep", f"lie in [1, {self.num_tiles}], the tiles of the grid", self.kept))

    @property
    def num_tiles(self) -> int:
        return num_tiles(self.grid, self.tile)

    @property
    def kept(self) -> int:
        """Selected key tiles of each query tile."""
        return keep_count(self.num_tiles, self.sparsity) if self.keep is None else self.keep

    @property
    def tokens(self) -> int:
        return num_tokens(self.grid)

    @property
    def volume(self) -> int:
        return tile_volume(self.tile)

    @property
    def whole_tiles(self) -> bool:
        return divides(self.tile, self.grid)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Truth:
    """fp64 results of one head on sampled query tiles, and the gradients that reach these alone.

    Attributes:
        head: which one.
        rows: `[R]` the sampled tokens, in raster order of the grid.
        out: `[R, D]`.
        lse: `[R]`, natural logarithm.
        dq: `[R, D]`, for the gradient that `Problem.sampled_grad` holds.
        dk, dv: `[S, D]`, likewise.
    """

    head: int
    rows: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Problem:
    """Tensors of a setting on a device; q, k, v and the gradient are `[1, H, S, D]`, raster order, contiguous."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        shape = (1, setting.heads, setting.tokens, setting.head_dim)
        draw = torch.Generator(device).manual_seed(setting.seed + 1)
        new: dict[str, Any] = {"generator": draw, "device": device, "dtype": setting.dtype}
        if setting.lists == "gate":
            sizes = (setting.grid, setting.heads, setting.head_dim)
            self.qkv = structured_qkv(*sizes, seed=setting.seed, dtype=setting.dtype, device=device)
        else:
            q, k, v = (torch.randn(shape, **new) for _ in range(3))
            self.qkv = q, k, v
        self.grad = torch.randn(shape, **new)
        self.counts, self.lists = self.select() if setting.lists == "gate" else self._drawn(draw)

    @property
    def grids(self) -> tuple[Shape3, Shape3, Shape3, Shape3]:
        setting = self.setting
        return setting.grid, setting.tile, setting.grid, setting.tile

    def select(self) -> tuple[Tensor, Tensor]:
        """The gate: pool, score, keep the best."""
        setting = self.setting
        pooled = (torch.ops.bsa.pool(x, setting.grid, setting.tile) for x in self.qkv[:2])
        # Half a tile more than is kept, as a sparsity: the count comes out as asked for.
        sparsity = setting.sparsity if setting.keep is None else 1 - (setting.keep + 0.5) / setting.num_tiles
        return torch.ops.bsa.select(*pooled, max(0.0, sparsity), None, setting.scale)

    def _drawn(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        tiles, kept = self.setting.num_tiles, self.setting.kept
        rows = []
        for _ in range(self.setting.heads):
            scores = torch.rand(tiles, tiles, generator=draw, device=self.device)
            rows.append(scores.topk(kept, sorted=False).indices.sort(-1).values.int())
        counts = torch.full((1, len(rows), tiles), kept, dtype=torch.int32, device=self.device)
        return counts, torch.stack(rows)[None]

    @functools.cached_property
    def shared(self) -> float | None:
        """Share of their lists that neighbours along w have in common; None for a grid one tile wide."""
        setting = self.setting
        if setting.grid[2] <= setting.tile[2]:
            return None
        return shared_fraction(self.counts, self.lists, setting.grid, setting.tile)

    @functools.cached_property
    def table(self) -> Tensor:
        """`[N, V]` token of each position of each tile, -1 for none."""
        return raster_indices(self.setting.grid, self.setting.tile, self.device)

    @functools.cached_property
    def selected_pairs(self) -> int:
        """Pairs of a query and a selected key, of all heads."""
        sizes = (self.table >= 0).sum(-1)  # [N]
        listed = torch.arange(self.lists.shape[-1], device=self.device) < self.counts[..., None]
        keys = torch.where(listed, sizes[torch.where(listed, self.lists, 0).long()], 0).sum(-1)
        return int((keys * sizes).sum())

    def pairs(self, dense: bool) -> int:
        return self.setting.heads * self.setting.tokens**2 if dense else self.selected_pairs

    @functools.cached_property
    def sampled(self) -> list[int]:
        last = self.setting.num_tiles - 1
        return sorted({last * i // max(1, SAMPLED_TILES - 1) for i in range(SAMPLED_TILES)})

    @functools.cached_property
    def sampled_grad(self) -> Tensor:
        """The gradient of the output, zero but for the sampled rows."""
        grad = torch.zeros_like(self.grad)
        for head in self._heads():
            rows = torch.cat([self._tokens(tile) for tile in self.sampled])
            grad[0, head, rows] = self.grad[0, head, rows]
        return grad

    def truths(self, dense: bool) -> Sequence[Truth]:
        """fp64 on the sampled query tiles, over the selected key tiles or over all keys."""
        return self._dense_truths if dense else self._sparse_truths

    @functools.cached_property
    def _dense_truths(self) -> Sequence[Truth]:
        return tuple(self._truths(True))

    @functools.cached_property
    def _sparse_truths(self) -> Sequence[Truth]:
        return tuple(self._truths(False))

    def _heads(self) -> list[int]:
        return sorted({0, self.setting.heads - 1})

    def _tokens(self, tile: int) -> Tensor:
        return self.table[tile][self.table[tile] >= 0]

    def _truths(self, dense: bool) -> Iterator[Truth]:
        for head in self._heads():
            q, k, v = (x[0, head].double().requires_grad_() for x in self.qkv)
            outs, lses, rows, loss = [], [], [], torch.zeros((), dtype=torch.float64, device=self.device)
            with torch.enable_grad():
                for tile in self.sampled:
                    mine = self._tokens(tile)
                    keys, values = (k, v) if dense else (x[self._columns(head, tile)] for x in (k, v))
                    scores = q[mine] @ keys.T * self.setting.scale
                    out = scores.softmax(-1) @ values
                    loss = loss + (out * self.grad[0, head, mine].double()).sum()
                    outs.append(out.detach())
                    lses.append(scores.detach().logsumexp(-1))
                    rows.append(mine)
                dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
            where = torch.cat(rows)
            yield Truth(head, where, torch.cat(outs), torch.cat(lses), dq[where], dk, dv)

    def _columns(self, head: int, tile: int) -> Tensor:
        listed = self.lists[0, head, tile, : int(self.counts[0, head, tile])].long()
        columns = self.table[listed].flatten()
        return columns[columns >= 0]


def relative_error(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|`, Frobenius; NaN where got is not finite."""
    size = float(want.norm())
    return float((got.double() - want).norm()) / size if size else math.inf
