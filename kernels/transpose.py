"""Turn "key tiles of each query tile" into "query tiles of each key tile", in CSR form with a static capacity.

A bit matrix per (batch, head), 32 query tiles to a word, is the intermediate: setting bits commutes, so the result does
not depend on the order in which programs run, and reading a column of bits gives an ascending list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config

SCRATCH_BYTES = 256 * 2**20
_WORD = 32


@triton.jit
def _set_bits(
    counts_ptr, lists_ptr, bits_ptr, tiles_q, tiles_k, capacity, words, WORD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)  # (batch and head, query tile)
    list_row = row // tiles_q
    tile_q = row % tiles_q
    count = tl.load(counts_ptr + row)
    list_ptr = lists_ptr + row.to(tl.int64) * capacity
    word_ptr = bits_ptr + (list_row.to(tl.int64) * words + tile_q // WORD) * tiles_k
    bit = tl.full([BLOCK], 1, tl.int32) << (tile_q % WORD)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tile_k = tl.load(list_ptr + at, mask=at < count, other=0)
        tl.atomic_or(word_ptr + tile_k, bit, mask=at < count, sem="relaxed")


@triton.jit
def _read_bits(
    bits_ptr,
    offsets_ptr,
    lists_ptr,
    tiles_k,
    capacity,
    words,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Count the bits of each column into `offsets_ptr`, or write their row numbers to the lists at these offsets."""
    blocks = tl.cdiv(tiles_k, BLOCK)
    list_row = (tl.program_id(0) // blocks).to(tl.int64)
    tile_k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = tile_k < tiles_k
    bit = tl.arange(0, WORD)
    bits_ptr += list_row * words * tiles_k + tile_k
    offsets_ptr += list_row * (tiles_k + 1) + tile_k
    lists_ptr += list_row * capacity
    end = tl.load(offsets_ptr, mask=keep, other=0) if WRITE else tl.zeros([BLOCK], tl.int32)
    for word in range(0, words):
        value = tl.load(bits_ptr, mask=keep, other=0)
        is_set = (value[:, None] >> bit[None, :]) & 1  # [BLOCK, WORD]
        if WRITE:
            at = end[:, None] + tl.cumsum(is_set, 1) - 1
            tile_q = word * WORD + tl.zeros([BLOCK, WORD], tl.int32) + bit[None, :]
            tl.store(lists_ptr + at, tile_q, mask=is_set == 1)
        end += tl.sum(is_set, 1)
        bits_ptr += tiles_k
    if not WRITE:
        tl.store(offsets_ptr + 1, end, mask=keep)


def transpose_selection(kv_num_blocks: Tensor, kv_indices: Tensor, num_kv_tiles: int) -> tuple[Tensor, Tensor]:
    """List the query tiles that selected each key tile.

    Args:
        kv_num_blocks: [B, H, Nq] int32.
        kv_indices: [B, H, Nq, Kmax] int32; entries beyond the count are not read.
        num_kv_tiles: Nk.

    Returns:
        q_offsets [B, H, Nk + 1] (int32, or int64 when Nq * Kmax needs it) and q_indices [B, H, Nq * Kmax] int32: key
        tile j was selected by the query tiles q_indices[b, h, q_offsets[b, h, j] : q_offsets[b, h, j + 1]], ascending.
        What lies beyond the last offset is not written.
    """
    batch, heads, tiles_q, per_row = kv_indices.shape
    device = kv_indices.device
    rows, capacity = batch * heads, tiles_q * per_row
    counts, lists = kv_num_blocks.contiguous().view(rows, tiles_q), kv_indices.contiguous().view(rows, tiles_q, per_row)
    offset_dtype = torch.int32 if capacity < 2**31 else torch.int64
    q_offsets = torch.zeros(rows, num_kv_tiles + 1, dtype=offset_dtype, device=device)
    q_indices = torch.empty(rows, capacity, dtype=torch.int32, device=device)
    words = triton.cdiv(tiles_q, _WORD)
    block = 16
    blocks = triton.cdiv(num_kv_tiles, block)
    chunk = max(1, min(rows, SCRATCH_BYTES // max(1, 4 * words * num_kv_tiles)))
    for first in range(0, rows if capacity and num_kv_tiles else 0, chunk):
        part = slice(first, min(first + chunk, rows))
        size = part.stop - part.start
        bits = torch.zeros(size, words, num_kv_tiles, dtype=torch.int32, device=device)
        _set_bits[(size * tiles_q,)](
            counts[part], lists[part], bits, tiles_q, num_kv_tiles, per_row, words,
            WORD=_WORD, BLOCK=min(1024, config.next_power_of_two(per_row)), num_warps=1,
        )  # fmt: skip
        for write in (False, True):
            _read_bits[(size * blocks,)](
                bits, q_offsets[part], q_indices[part], num_kv_tiles, capacity, words,
                WORD=_WORD, BLOCK=block, WRITE=write, num_warps=1,
            )  # fmt: skip
            if not write:
                q_offsets[part].cumsum_(-1)
    return q_offsets.view(batch, heads, num_kv_tiles + 1), q_indices.view(batch, heads, capacity)
