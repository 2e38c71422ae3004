"""Split the lists of neighbouring query tiles into what they share and what each has alone.

The Hopper kernels let two query tiles attend side by side and load a key block that both selected once. For that, the
two lists are written again as programs of loads: first the blocks that both want, in pairs, then those of each tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.tiles import tile_origin

# A key block as the load programs name it: the (t, h, w) token coordinates of its first position in one int32, with the
# sign bit for a block of a tile that sticks out of the grid.
T_SHIFT, H_SHIFT = tl.constexpr(21), tl.constexpr(10)
MAX_GRID = (1 << 10, 1 << 11, 1 << 10)
PLAN = tl.constexpr(4)  # int32 per group: steps of both, steps of the first, steps of the second, odd ends (bits 0, 1)


@triton.jit
def _position_in(list_ptr, count, wanted, inside, BITS: tl.constexpr):
    """How many entries of an ascending list are below `wanted`, and whether the next one equals it."""
    below = tl.zeros_like(wanted)
    for bit in tl.static_range(BITS):
        candidate = below + (1 << (BITS - 1 - bit))
        entry = tl.load(list_ptr + candidate - 1, mask=inside & (candidate <= count), other=2**31 - 1)
        below = tl.where(entry < wanted, candidate, below)
    entry = tl.load(list_ptr + below, mask=inside & (below < count), other=-1)
    return entry == wanted


@triton.jit
def _write_blocks(
    program_ptr, slot, tile, inside, grid, TILE: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr
):
    """Write the SPLIT blocks of BLOCK_K positions of each tile at `slot * SPLIT`."""
    t, h, w = tile_origin(tile, grid, TILE)
    for part in tl.static_range(SPLIT):
        start = part * BLOCK_K
        packed = (
            ((t + start // (TILE[1] * TILE[2])) << T_SHIFT)
            | ((h + start // TILE[2] % TILE[1]) << H_SHIFT)
            | (w + start % TILE[2])
        )
        partial = (t + TILE[0] > grid[0]) | (h + TILE[1] > grid[1]) | (w + TILE[2] > grid[2])
        packed = tl.where(partial, packed | (-(2**31)), packed)
        tl.store(program_ptr + slot * SPLIT + part, packed, mask=inside)


@triton.jit
def _share(
    counts_ptr,
    lists_ptr,
    programs_ptr,
    plans_ptr,
    tiles_q,
    groups_per_head,
    capacity,
    length,
    grid,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    pair = group // groups_per_head
    first = (group % groups_per_head) * ROWS
    row = (pair * tiles_q + first).to(tl.int64)
    count_a = tl.load(counts_ptr + row)
    list_a = lists_ptr + row * capacity
    program_a = programs_ptr + group.to(tl.int64) * ROWS * length
    lane = tl.arange(0, BLOCK)
    if ROWS == 1:
        # Both halves of one tile want the same blocks.
        for start in range(0, count_a, BLOCK):
            inside = start + lane < count_a
            tile = tl.load(list_a + start + lane, mask=inside, other=0)
            _write_blocks(program_a, start + lane, tile, inside, grid, TILE, BLOCK_K, SPLIT)
        common = count_a * SPLIT
        alone_a = 0
        alone_b = 0
        last_a = tl.load(list_a + count_a - 1, mask=count_a > 0, other=0)
        odd = tl.where(common % 2 == 1, 3, 0)
        _write_blocks(program_a, count_a, last_a, (common % 2 == 1), grid, TILE, BLOCK_K, SPLIT)
    else:
        count_b = tl.load(counts_ptr + row + 1, mask=first + 1 < tiles_q, other=0)
        list_b = list_a + capacity
        program_b = program_a + length
        shared = 0
        for start in range(0, count_a, BLOCK):
            inside = start + lane < count_a
            tile = tl.load(list_a + start + lane, mask=inside, other=0)
            shared += tl.sum((_position_in(list_b, count_b, tile, inside, BITS) & inside).to(tl.int32))
        if SPLIT % 2 == 1:
            shared = shared // 2 * 2  # a step takes two blocks; both tiles load the last one themselves
        common = shared * SPLIT
        for side in tl.static_range(2):
            mine = list_a if side == 0 else list_b
            count_mine = count_a if side == 0 else count_b
            other = list_b if side == 0 else list_a
            count_other = count_b if side == 0 else count_a
            program = program_a if side == 0 else program_b
            seen = 0
            for start in range(0, count_mine, BLOCK):
                inside = start + lane < count_mine
                tile = tl.load(mine + start + lane, mask=inside, other=0)
                both = (_position_in(other, count_other, tile, inside, BITS) & inside).to(tl.int32)
                rank = seen + tl.cumsum(both, 0) - both
                both = tl.where(rank < shared, both, 0)
                before = tl.minimum(rank, shared)  # shared tiles that stand before this one in the list
                slot = tl.where(both == 1, rank, shared + (start + lane - before))
                _write_blocks(program, slot, tile, inside, grid, TILE, BLOCK_K, SPLIT)
                seen += tl.sum(both)
            # An odd end is filled with a block that the kernel loads and masks.
            last = tl.load(mine + count_mine - 1, mask=count_mine > 0, other=0)
            _write_blocks(program, count_mine, last, count_mine * SPLIT % 2 == 1, grid, TILE, BLOCK_K, SPLIT)
        alone_a = count_a * SPLIT - common
        alone_b = count_b * SPLIT - common
        odd = (alone_a % 2) | ((alone_b % 2) << 1)
    plan = plans_ptr + group.to(tl.int64) * PLAN
    tl.store(plan, (common + 1) // 2)
    tl.store(plan + 1, (alone_a + 1) // 2)
    tl.store(plan + 2, (alone_b + 1) // 2)
    tl.store(plan + 3, odd)


def share_lists(
    kv_num_blocks: Tensor, kv_indices: Tensor, grid_k: Triple, tile_k: Triple, block_k: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Load programs of groups of query tiles.

    Args:
        kv_num_blocks: [B, H, Nq] int32.
        kv_indices: [B, H, Nq, Kmax] int32, ascending.
        block_k: Keys of a block; the volume of `tile_k` is a multiple of it.
        rows: Query tiles of a group: 2 neighbours, or 1 of which two halves attend side by side.

    Returns:
        programs [B * H * groups, rows, L] int32: blocks by the coordinates of their first token (T_SHIFT, H_SHIFT), the
        shared ones first; what lies beyond is not written. plans [B * H * groups, 4] int32: steps of two blocks that
        both take, steps of the first and of the second alone, and whose last step has only one block (bits 0 and 1).
    """
    batch, heads, tiles_q, capacity = kv_indices.shape
    groups_per_head = triton.cdiv(tiles_q, rows)
    groups = batch * heads * groups_per_head
    split = config.volume(tile_k) // block_k
    length = triton.cdiv(capacity * split + 2, 4) * 4 + 4  # room for an odd end and for reading ahead
    device = kv_indices.device
    programs = torch.empty(groups, rows, length, dtype=torch.int32, device=device)
    plans = torch.empty(groups, PLAN.value, dtype=torch.int32, device=device)
    if groups:
        _share[(groups,)](
            kv_num_blocks, kv_indices, programs, plans, tiles_q, groups_per_head, capacity, length, tuple(grid_k),
            TILE=tuple(tile_k), ROWS=rows, BLOCK_K=block_k, SPLIT=split,
            BITS=max(1, capacity.bit_length()), BLOCK=max(16, min(1024, config.next_power_of_two(capacity))),
            num_warps=1 if capacity <= 256 else 4,
        )  # fmt: skip
    return programs, plans
