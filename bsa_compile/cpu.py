"""Attention over selected tiles on the CPU: really skips the rest, forward and backward.

Query tiles that select about equally many key tiles are handled together: the selected keys and values are gathered
and attended to as one batch of small dense problems, as many at a time as fit the caches. Positions without a token
(padding of a tile, or of a shorter list) hold zeros and are masked, so that what lies in memory there cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gating import pooled_dtype
from .grid import raster_indices, valid_positions

# What the query tiles of a chunk may gather: per thread about its share of the caches, and a limit on memory.
# Smaller chunks would fit caches better, but every chunk makes the threads wait for each other a few times.
CHUNK_BYTES_PER_THREAD = 4 << 20
CHUNK_BYTES = 32 << 20
# Limits for huge tiles and lists: positions of a query or key tile handled at once, and bytes gathered at once.
MAX_POSITIONS = 1024
MAX_BYTES = 32 << 20


@torch.no_grad()
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str = "raster",
) -> tuple[Tensor, Tensor]:
    """Attend each query tile to the key tiles in its list.

    Args:
        q: `[B, H, Sq, D]`; k and v `[B, Hkv, Sk, D]` with H a multiple of Hkv.
        kv_num_blocks: `[B, H, Nq]` int32.
        kv_indices: `[B, H, Nq, Kmax]` int32; entries beyond the count are not read.
        grid_q, tile_q, grid_k, tile_k: token grids and tiles of queries and keys.
        scale: factor of the scores.
        layout: order of the token axes, `raster` or `tile`.

    Returns:
        out `[B, H, Sq, D]` in q's dtype, in memory `[B, Sq, H, D]`, and the natural-log LSE `[B, H, Sq]` in fp32 (fp64
        for fp64); 0 and -inf for queries without a key and for padded positions.
    """
    batch, heads, tokens, width = q.shape
    group = heads // k.shape[1]
    # torch's own CPU kernel takes bf16 with fp32 sums, and is fast where the processor has bf16 products; fp16 is slow.
    dtype = q.dtype if q.dtype == torch.bfloat16 else pooled_dtype(q.dtype)
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, dtype=pooled_dtype(q.dtype), device=q.device)
    if layout == "tile" or bool((kv_num_blocks <= 0).any()):  # else every position is written below
        out.zero_()
        lse.fill_(-math.inf)
    q_table = _token_table(grid_q, tile_q, layout)
    tiles = _KeyTiles(_token_table(grid_k, tile_k, layout))
    tile_bytes = 2 * width * dtype.itemsize * tiles.volume
    for b in range(batch):
        for h in range(heads):
            if h % group == 0:
                keys = _Keys(tiles, k[b, h // group], v[b, h // group], dtype)
            for rows, selected in _chunks(kv_num_blocks[b, h], kv_indices[b, h], tiles, tile_bytes):
                for at in q_table[rows].split(MAX_POSITIONS, 1):
                    queries = _Queries(at)
                    if queries.none:
                        continue
                    result = _attend_chunk(queries(q[b, h], dtype), keys, selected, tile_bytes, scale)
                    queries.write(out[b, h], result[0])
                    queries.write(lse[b, h], result[1])
    return out, lse


def _attend_chunk(q: Tensor, keys: _Keys, selected: Tensor, tile_bytes: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend q `[R, P, D]` to the tiles `selected` `[R, K]`; out `[R, P, D]` and LSE `[R, P]`."""
    result: tuple[Tensor, Tensor] | None = None
    for part in selected.split(max(1, MAX_BYTES // (len(selected) * tile_bytes)), 1):
        k, v, missing = keys(part)  # [R, L, D], [R, L]
        mask = None
        if missing is not None:
            mask = q.new_zeros(missing.shape).masked_fill_(missing, -math.inf)[:, None, None]  # [R, 1, 1, L]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
        )
        out, lse = out[:, 0], lse[:, 0]
        if missing is not None:
            lse = lse.masked_fill(missing.all(-1, keepdim=True), -math.inf)
        result = (out, lse) if result is None else merge(*result, out, lse)
    assert result is not None  # a chunk has rows, and a row has tiles
    return result


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys; out becomes fp32 (fp64)."""
    both = torch.logaddexp(lse, other_lse)
    shift = both.masked_fill(both == -math.inf, 0)
    out = out * (lse - shift).exp()[..., None] + other * (other_lse - shift).exp()[..., None]
    return out, both


@torch.no_grad()
def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str = "raster",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with the selection held fixed; bit-equal from call to call.

    Args:
        grad_out: `[B, H, Sq, D]`.
        grad_lse: `[B, H, Sq]` or None.
        out, lse: what `attend` returned; the other arguments are those of `attend`.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v, in memory `[B, S, H, D]`; computed in fp32 (fp64).
    """
    batch, heads, _, width = q.shape
    group, dtype = heads // k.shape[1], lse.dtype
    dq, dk, dv = (
        torch.zeros(batch, x.shape[2], x.shape[1], width, dtype=x.dtype, device=x.device).transpose(1, 2)
        for x in (q, k, v)
    )
    q_table = _token_table(grid_q, tile_q, layout)
    tiles = _KeyTiles(_token_table(grid_k, tile_k, layout))
    positions = min(q_table.shape[1], MAX_POSITIONS)
    tile_bytes = 2 * (2 * width + positions) * dtype.itemsize * tiles.volume
    for b in range(batch):
        for kv in range(k.shape[1]):
            keys = _Keys(tiles, k[b, kv], v[b, kv], dtype)
            sums = torch.zeros(2, len(tiles.index), tiles.volume * width, dtype=dtype)  # of dk and dv, by tile
            for h in range(kv * group, (kv + 1) * group):
                delta = (grad_out[b, h].to(dtype) * out[b, h].to(dtype)).sum(-1)
                if grad_lse is not None:
                    delta -= grad_lse[b, h]
                for rows, selected in _chunks(kv_num_blocks[b, h], kv_indices[b, h], tiles, tile_bytes):
                    for at in q_table[rows].split(MAX_POSITIONS, 1):
                        queries = _Queries(at)
                        if queries.none:
                            continue
                        grads = _backward_chunk(
                            queries(q[b, h], dtype) * scale,
                            queries(grad_out[b, h], dtype),
                            queries(lse[b, h], dtype, fill=math.inf),  # no token: p = exp(0 - inf) = 0
                            queries(delta, dtype),
                            keys,
                            selected,
                            tile_bytes,
                            sums,
                        )
                        queries.write(dq[b, h], grads * scale)
            tiles.write(dk[b, kv], sums[0])
            tiles.write(dv[b, kv], sums[1])
    return dq, dk, dv


def _backward_chunk(
    q: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    keys: _Keys,
    selected: Tensor,
    tile_bytes: int,
    sums: Tensor,
) -> Tensor:
    """Gradient of scaled q `[R, P, D]`; adds those of keys and values to `sums` `[2, N + 1, V * D]`."""
    dq = torch.zeros_like(q)
    for part in selected.split(max(1, MAX_BYTES // (len(selected) * tile_bytes)), 1):
        k, v, missing = keys(part)  # [R, L, D], [R, L]
        p = torch.baddbmm(lse[..., None], q, k.transpose(1, 2), beta=-1).exp_()  # [R, P, L]
        if missing is not None:
            p.masked_fill_(missing[:, None], 0)
        ds = torch.baddbmm(delta[..., None], grad_out, v.transpose(1, 2), beta=-1).mul_(p)
        to = part.flatten()
        sums[1].index_add_(0, to, torch.bmm(p.transpose(1, 2), grad_out).view(len(to), -1))
        sums[0].index_add_(0, to, torch.bmm(ds.transpose(1, 2), q).view(len(to), -1))
        dq.baddbmm_(ds, k)
    return dq


class _Queries:
    """Moves rows between a token axis and the positions `[R, P]` of a chunk, of which some (-1) have no token."""

    def __init__(self, at: Tensor) -> None:
        missing = at < 0
        self.shape = at.shape
        self.missing = missing if bool(missing.any()) else None
        self.none = self.missing is not None and bool(missing.all())
        self.index = at.flatten() if self.missing is None else at.flatten().clamp(min=0)

    def __call__(self, source: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """`[S, ...]` to `[R, P, ...]`; positions without a token hold `fill`."""
        rows = source.index_select(0, self.index).to(dtype).unflatten(0, self.shape)
        if self.missing is not None:
            rows[self.missing] = fill
        return rows

    def write(self, target: Tensor, rows: Tensor) -> None:
        """`[R, P, ...]` to `[S, ...]`; positions without a token are dropped."""
        if self.missing is None:
            target.index_copy_(0, self.index, rows.flatten(0, 1).to(target.dtype))
        else:
            target.index_copy_(0, self.index[~self.missing.flatten()], rows[~self.missing].to(target.dtype))


class _KeyTiles:
    """Where the tokens of each key tile lie; huge tiles are cut into pieces, and a last one has no tokens.

    Attributes:
        index: `[N + 1, V]`, 0 where there is no token.
        missing: `[N + 1, V]`, where there is none.
        pieces: tiles per tile of the grid.
    """

    def __init__(self, table: Tensor) -> None:
        self.pieces = -(-table.shape[1] // MAX_POSITIONS)
        self.volume = -(-table.shape[1] // self.pieces)
        table = torch.nn.functional.pad(table, (0, self.pieces * self.volume - table.shape[1]), value=-1)
        table = table.reshape(-1, self.volume)
        table = torch.nn.functional.pad(table, (0, 0, 0, 1), value=-1)
        self.missing = table < 0
        self.partial = bool(self.missing[:-1].any())
        self.index = table.clamp(min=0)

    @property
    def empty(self) -> int:
        """The tile without tokens, with which shorter lists are padded."""
        return len(self.index) - 1

    def of(self, selected: Tensor) -> Tensor:
        """Tiles of the grid `[R, K]` as tiles of ours."""
        if self.pieces == 1:
            return selected
        return (selected[..., None] * self.pieces + torch.arange(self.pieces)).flatten(1)

    def write(self, target: Tensor, rows: Tensor) -> None:
        """`[N + 1, V * D]` to the tokens `[S, D]`."""
        present = ~self.missing
        target.index_copy_(0, self.index[present], rows.view(*self.index.shape, -1)[present].to(target.dtype))


class _Keys:
    """One head's keys and values, gathered by tile."""

    def __init__(self, tiles: _KeyTiles, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        # The second is memory used again: fresh pages for every gather would cost as much as the gather.
        self.k, self.v = [k, torch.empty(0, dtype=dtype)], [v, torch.empty(0, dtype=dtype)]

    def __call__(self, selected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[R, L, D]` of the tiles `[R, K]`, and where there is no token `[R, L]` (None: nowhere)."""
        index = self.tiles.index[selected].flatten(1)
        missing = None
        if self.tiles.partial or bool((selected == self.tiles.empty).any()):
            missing = self.tiles.missing[selected].flatten(1)
        return self._gather(self.k, index, missing), self._gather(self.v, index, missing), missing

    def _gather(self, of: list[Tensor], index: Tensor, missing: Tensor | None) -> Tensor:
        source, memory = of
        size = index.numel() * source.shape[1]
        if memory.numel() < size:
            memory = of[1] = memory.new_empty(size)
        rows = memory[:size].view(index.numel(), source.shape[1])
        if source.dtype == self.dtype:
            torch.index_select(source, 0, index.flatten(), out=rows)
        else:
            rows.copy_(source.index_select(0, index.flatten()))
        rows = rows.unflatten(0, index.shape)
        if missing is not None:
            rows[missing] = 0
        return rows


def _token_table(grid: Sequence[int], tile: Sequence[int], layout: str) -> Tensor:
    """`[N, V]` int64: where each position of each tile lies on the token axis, -1 for none."""
    if layout == "raster":
        return raster_indices(grid, tile)
    inside = valid_positions(grid, tile)
    return torch.where(inside, torch.arange(inside.numel()).reshape(inside.shape), -1)


def _chunks(counts: Tensor, indices: Tensor, tiles: _KeyTiles, tile_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut one head's query tiles into chunks of similar counts.

    Args:
        counts: `[Nq]`.
        indices: `[Nq, Kmax]`.
        tiles: the key tiles.
        tile_bytes: what one selected tile costs a query tile.

    Yields:
        rows `[R]` and their selected tiles `[R, K]`, int64.
    """
    order = counts.argsort(stable=True)
    sizes = counts[order].clamp(0, indices.shape[1]).tolist()
    budget = min(CHUNK_BYTES, CHUNK_BYTES_PER_THREAD * torch.get_num_threads())
    stop = len(sizes)
    while stop > 0 and sizes[stop - 1] > 0:
        width = sizes[stop - 1]
        start = max(0, stop - max(1, budget // (width * tiles.pieces * tile_bytes)))
        while sizes[start] == 0 or 2 * sizes[start] < width:  # a short list is not padded to twice its length
            start += 1
        rows = order[start:stop]
        selected = tiles.of(indices[rows, :width].long())
        if sizes[start] < width:
            used = torch.arange(width * tiles.pieces) < tiles.pieces * torch.tensor(sizes[start:stop])[:, None]
            selected = torch.where(used, selected, tiles.empty)
        yield rows, selected
        stop = start
