"""Attention over selected tiles on the CPU: really skips the rest, forward and backward.

Query tiles that select equally many key tiles are handled together: the selected keys and values are gathered and
attended to as one batch of small dense problems, a few at a time so that they stay in cache and memory stays bounded.
Slots without a token (padding of a tile, or of a shorter row) gather zeros and are masked, so that what lies in memory
there cannot matter. Everything is computed in fp32 (fp64 for fp64 tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gating import pooled_dtype
from .grid import raster_indices, tile_volume, valid_positions

# What a chunk of query tiles may gather: per thread about its share of the caches, and a limit that bounds memory.
# Smaller chunks would fit caches better, but every chunk makes the threads wait for each other a few times.
CHUNK_BYTES_PER_THREAD = 4 << 20
CHUNK_BYTES = 32 << 20
# Limits on one query tile, which bound memory when tiles or selections are huge: query positions and gathered bytes.
MAX_POSITIONS = 1024
MAX_BYTES = 32 << 20


def token_table(grid: Sequence[int], tile: Sequence[int], layout: str) -> Tensor:
    """`[N, V]` int64: where each position of each tile lies on the token axis, -1 for none."""
    if layout == "raster":
        return raster_indices(grid, tile)
    inside = valid_positions(grid, tile)
    return torch.where(inside, torch.arange(inside.numel()).reshape(inside.shape), -1)


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
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, dtype=pooled_dtype(q.dtype), device=q.device)
    if layout == "tile" or bool((kv_num_blocks <= 0).any()):  # else every position is written below
        out.zero_()
        lse.fill_(-math.inf)
    q_table = token_table(grid_q, tile_q, layout)
    k_table = _with_empty_tile(token_table(grid_k, tile_k, layout))
    row_bytes = 2 * width * lse.element_size() * tile_volume(tile_k)
    scratch = _Scratch(lse.dtype), _Scratch(lse.dtype)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group], v[b, h // group]
            for rows, selected in _chunks(kv_num_blocks[b, h], kv_indices[b, h], len(k_table) - 1, row_bytes):
                slots = k_table[selected].flatten(1)
                for at in q_table[rows].split(MAX_POSITIONS, 1):
                    some = _Gather(at)
                    if some.none:
                        continue
                    result = _attend_slots(some(q[b, h]), keys, values, slots, scale, scratch)
                    some.write(out[b, h], result[0])
                    some.write(lse[b, h], result[1])
    return out, lse


def _attend_slots(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scale: float, scratch: tuple[_Scratch, _Scratch]
) -> tuple[Tensor, Tensor]:
    """Attend q `[R, P, D]` to the tokens `slots` `[R, L]` (-1: none) of `[Sk, D]`; out `[R, P, D]`, LSE `[R, P]`."""
    result: tuple[Tensor, Tensor] | None = None
    for part in slots.split(max(1, MAX_BYTES // (2 * len(slots) * q.shape[-1] * q.element_size())), 1):
        some = _Gather(part)
        if some.none:
            continue
        k, v = some(keys, scratch[0]), some(values, scratch[1])  # [R, L, D]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], attn_mask=some.mask(q.dtype), scale=scale
        )
        out, lse = out[:, 0], lse[:, 0]
        if some.missing is not None:
            lse = lse.masked_fill(some.missing.all(-1, keepdim=True), -math.inf)
        result = (out, lse) if result is None else _merge(*result, out, lse)
    assert result is not None  # every tile has a token
    return result


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys."""
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
        dq, dk, dv in the shapes and dtypes of q, k, v, in memory `[B, S, H, D]`.
    """
    batch, heads, _, width = q.shape
    heads_kv, tokens_k = k.shape[1:3]
    group, dtype = heads // heads_kv, lse.dtype
    dq, dk, dv = (
        torch.zeros(batch, x.shape[2], x.shape[1], width, dtype=x.dtype, device=x.device).transpose(1, 2)
        for x in (q, k, v)
    )
    q_table = token_table(grid_q, tile_q, layout)
    k_table = _with_empty_tile(token_table(grid_k, tile_k, layout))
    positions = min(q_table.shape[1], MAX_POSITIONS)
    row_bytes = (2 * width + positions) * 2 * lse.element_size() * tile_volume(tile_k)
    scratch = _Scratch(dtype), _Scratch(dtype)
    for b in range(batch):
        for kv in range(heads_kv):
            # One row more than there are tokens: slots without a token add to it.
            sums_k, sums_v = (torch.zeros(tokens_k + 1, width, dtype=dtype, device=k.device) for _ in range(2))
            for h in range(kv * group, (kv + 1) * group):
                delta = (grad_out[b, h].to(dtype) * out[b, h].to(dtype)).sum(-1)
                if grad_lse is not None:
                    delta -= grad_lse[b, h]
                for rows, selected in _chunks(kv_num_blocks[b, h], kv_indices[b, h], len(k_table) - 1, row_bytes):
                    slots = k_table[selected].flatten(1)
                    for at in q_table[rows].split(MAX_POSITIONS, 1):
                        some = _Gather(at)
                        if some.none:
                            continue
                        # Positions without a token have p = exp(0 - inf) = 0.
                        grads = _backward_slots(
                            some(q[b, h]) * scale,
                            some(grad_out[b, h]),
                            some(lse[b, h], fill=math.inf),
                            some(delta),
                            k[b, kv],
                            v[b, kv],
                            slots,
                            sums_k,
                            sums_v,
                            scratch,
                        )
                        some.write(dq[b, h], grads * scale)
            dk[b, kv], dv[b, kv] = sums_k[:-1].to(k.dtype), sums_v[:-1].to(v.dtype)
    return dq, dk, dv


def _backward_slots(
    q: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    sums_k: Tensor,
    sums_v: Tensor,
    scratch: tuple[_Scratch, _Scratch],
) -> Tensor:
    """Gradient of scaled q `[R, P, D]`; adds those of keys and values to `sums_k` and `sums_v` `[Sk + 1, D]`."""
    dq = torch.zeros_like(q)
    per_slot = len(slots) * (2 * q.shape[-1] + q.shape[1]) * 2 * q.element_size()
    for part in slots.split(max(1, MAX_BYTES // per_slot), 1):
        some = _Gather(part)
        if some.none:
            continue
        k, v = some(keys, scratch[0]), some(values, scratch[1])  # [R, L, D]
        p = torch.baddbmm(lse[..., None], q, k.transpose(1, 2), beta=-1).exp_()  # [R, P, L]
        if some.missing is not None:
            p.masked_fill_(some.missing[:, None], 0)
        ds = torch.baddbmm(delta[..., None], grad_out, v.transpose(1, 2), beta=-1).mul_(p)
        some.add(sums_v, torch.bmm(p.transpose(1, 2), grad_out))
        some.add(sums_k, torch.bmm(ds.transpose(1, 2), q))
        dq.baddbmm_(ds, k)
    return dq


class _Scratch:
    """Memory that is used again from chunk to chunk: fresh pages would cost as much as the gather that fills them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype)

    def __call__(self, rows: int, width: int) -> Tensor:
        if self._flat.numel() < rows * width:
            self._flat = self._flat.new_empty(rows * width)
        return self._flat[: rows * width].view(rows, width)


class _Gather:
    """Moves rows between a token axis and `[R, L]` slots of which some (-1) have no token."""

    def __init__(self, slots: Tensor) -> None:
        missing = slots < 0
        any_missing = bool(missing.any())
        self.none = any_missing and bool(missing.all())
        self.missing = missing if any_missing else None
        self.shape = slots.shape
        self.index = slots.flatten().clamp(min=0) if any_missing else slots.flatten()

    def __call__(self, source: Tensor, into: _Scratch | None = None, fill: float = 0.0) -> Tensor:
        """`[S, ...]` to `[R, L, ...]` in fp32 (fp64); slots without a token hold `fill`."""
        if into is None:
            rows = source.index_select(0, self.index).to(pooled_dtype(source.dtype))
        else:
            rows = into(len(self.index), source.shape[1])
            if rows.dtype == source.dtype:
                torch.index_select(source, 0, self.index, out=rows)
            else:
                rows.copy_(source.index_select(0, self.index))
        rows = rows.unflatten(0, self.shape)
        if self.missing is not None:
            rows[self.missing] = fill
        return rows

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """`[R, 1, 1, L]`: -inf where there is no token; None where there is one everywhere."""
        if self.missing is None:
            return None
        return torch.zeros(self.shape, dtype=dtype).masked_fill_(self.missing, -math.inf)[:, None, None]

    def write(self, target: Tensor, rows: Tensor) -> None:
        """`[R, L, ...]` to `[S, ...]`; slots without a token are dropped."""
        if self.missing is None:
            target.index_copy_(0, self.index, rows.flatten(0, 1).to(target.dtype))
        else:
            target.index_copy_(0, self.index[~self.missing.flatten()], rows[~self.missing].to(target.dtype))

    def add(self, target: Tensor, rows: Tensor) -> None:
        """Add `[R, L, D]` to `[S + 1, D]`; slots without a token add to the last row."""
        index = self.index
        if self.missing is not None:
            index = index.masked_fill(self.missing.flatten(), target.shape[0] - 1)
        target.index_add_(0, index, rows.flatten(0, 1))


def _with_empty_tile(table: Tensor) -> Tensor:
    """Append a tile without tokens, for lists to be padded with."""
    return torch.cat([table, table.new_full((1, table.shape[1]), -1)])


def _chunks(counts: Tensor, indices: Tensor, empty: int, bytes_per_tile: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut one head's query tiles into chunks of similar counts.

    Args:
        counts: `[Nq]`.
        indices: `[Nq, Kmax]`.
        empty: the tile that pads a shorter list.
        bytes_per_tile: what one selected tile costs a query tile.

    Yields:
        rows `[R]` and their selected tiles `[R, K]`, int64.
    """
    order = counts.argsort(stable=True)
    sizes = counts[order].clamp(0, indices.shape[1]).tolist()
    budget = min(CHUNK_BYTES, CHUNK_BYTES_PER_THREAD * torch.get_num_threads())
    stop = len(sizes)
    while stop > 0 and sizes[stop - 1] > 0:
        width = sizes[stop - 1]
        start = max(0, stop - max(1, budget // (width * bytes_per_tile)))
        while sizes[start] == 0 or 2 * sizes[start] < width:  # a short list is not padded to twice its length
            start += 1
        rows = order[start:stop]
        selected = indices[rows, :width].long()
        if sizes[start] < width:
            used = torch.arange(width) < torch.tensor(sizes[start:stop])[:, None]
            selected = torch.where(used, selected, empty)
        yield rows, selected
        stop = start
