"""Split the lists of neighbouring tiles into what they share and what each has alone.

The Hopper kernels let two tiles work side by side and load a block that both lists name once. For that, the two lists
are written again as programs of loads: first the blocks that both want, then those of each tile. A step of a program
takes two blocks in the forward, one in the backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.tiles import tile_origin

# A block as the load programs name it: the (t, h, w) token coordinates of its first position in one int32, with the
# sign bit for a block of a tile that sticks out of the grid.
T_SHIFT, H_SHIFT = tl.constexpr(21), tl.constexpr(10)
MAX_GRID = config.GLUON_GRID
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
def _list_of(counts_ptr, pair, tile, tiles, capacity, CSR: tl.constexpr):
    """(position of a tile's list from the first list on, its length). Beyond the last tile it is empty."""
    if CSR:
        offset_ptr = counts_ptr + pair.to(tl.int64) * (tiles + 1)
        begin = tl.load(offset_ptr + tl.minimum(tile, tiles)).to(tl.int64)
        count = (tl.load(offset_ptr + tl.minimum(tile + 1, tiles)) - begin).to(tl.int32)
        begin += pair.to(tl.int64) * capacity
    else:
        row = (pair * tiles + tile).to(tl.int64)
        begin = row * capacity
        count = tl.load(counts_ptr + row, mask=tile < tiles, other=0)
    return begin, count


@triton.jit
def _share(
    counts_ptr,
    lists_ptr,
    programs_ptr,
    plans_ptr,
    tiles,
    groups_per_head,
    capacity,
    length,
    grid,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    CSR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    pair = group // groups_per_head
    first = (group % groups_per_head) * ROWS
    begin_a, count_a = _list_of(counts_ptr, pair, first, tiles, capacity, CSR)
    list_a = lists_ptr + begin_a
    program_a = programs_ptr + (begin_a * SPLIT if CSR else group.to(tl.int64) * ROWS * length)
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
        odd = 0
        if SPLIT % STEP != 0:
            last_a = tl.load(list_a + count_a - 1, mask=count_a > 0, other=0)
            odd = tl.where(common % 2 == 1, 3, 0)
            _write_blocks(program_a, count_a, last_a, (common % 2 == 1), grid, TILE, BLOCK_K, SPLIT)
    else:
        begin_b, count_b = _list_of(counts_ptr, pair, first + 1, tiles, capacity, CSR)
        list_b = lists_ptr + begin_b
        program_b = programs_ptr + begin_b * SPLIT if CSR else program_a + length
        shared = 0
        for start in range(0, count_a, BLOCK):
            inside = start + lane < count_a
            tile = tl.load(list_a + start + lane, mask=inside, other=0)
            shared += tl.sum((_position_in(list_b, count_b, tile, inside, BITS) & inside).to(tl.int32))
        if SPLIT % STEP != 0:
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
                seen += tl.sum(both)
                # A list that does not ascend, which is not allowed, gives wrong blocks but no writes beyond it.
                inside = inside & (slot < count_mine)
                _write_blocks(program, slot, tile, inside, grid, TILE, BLOCK_K, SPLIT)
            if SPLIT % STEP != 0:
                # An odd end is filled with a block that the kernel loads and masks.
                last = tl.load(mine + count_mine - 1, mask=count_mine > 0, other=0)
                _write_blocks(program, count_mine, last, count_mine * SPLIT % 2 == 1, grid, TILE, BLOCK_K, SPLIT)
        alone_a = count_a * SPLIT - common
        alone_b = count_b * SPLIT - common
        odd = 0
        if SPLIT % STEP != 0:
            odd = (alone_a % 2) | ((alone_b % 2) << 1)
    plan = plans_ptr + group.to(tl.int64) * PLAN
    tl.store(plan, (common + STEP - 1) // STEP)
    tl.store(plan + 1, (alone_a + STEP - 1) // STEP)
    tl.store(plan + 2, (alone_b + STEP - 1) // STEP)
    tl.store(plan + 3, odd)


def share_lists(
    kv_num_blocks: Tensor, kv_indices: Tensor, grid_k: Triple, tile_k: Triple, block_k: int, rows: int, step: int = 2
) -> tuple[Tensor, Tensor]:
    """Load programs of groups of query tiles.

    Args:
        kv_num_blocks: [B, H, Nq] int32.
        kv_indices: [B, H, Nq, Kmax] int32, ascending.
        block_k: Keys of a block; the volume of `tile_k` is a multiple of it.
        rows: Query tiles of a group: 2 neighbours, or 1 of which two halves attend side by side.
        step: Blocks of a step, 1 or 2.

    Returns:
        programs [B * H * groups, rows, L] int32: blocks by the coordinates of their first token (T_SHIFT, H_SHIFT), the
        shared ones first; what lies beyond is not written. plans [B * H * groups, 4] int32: steps that both take, steps
        of the first and of the second alone, and whose last step has only one of two blocks (bits 0 and 1).
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
            TILE=tuple(tile_k), ROWS=rows, STEP=step, CSR=False, BLOCK_K=block_k, SPLIT=split,
            BITS=max(1, capacity.bit_length()), BLOCK=max(16, min(1024, config.next_power_of_two(capacity))),
            num_warps=1 if capacity <= 256 else 4,
        )  # fmt: skip
    return programs, plans


def share_transposed(
    q_offsets: Tensor,
    q_indices: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    block_q: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Load programs of groups of key tiles, from the lists of `transpose_selection`; a step takes one block.

    Args:
        q_offsets: [B, H, Nk + 1] int32 or int64.
        q_indices: [B, H, L]: the query tiles of key tile j are q_indices[b, h, q_offsets[b, h, j] : ..[j + 1]].
        block_q: Queries of a block; the volume of `tile_q` is a multiple of it.
        rows: Key tiles of a group, 2 or 1.

    Returns:
        programs [B, H, L * split] int32 with blocks as in `share_lists`, `split` of them a tile: that of key tile
        j begins at q_offsets[b, h, j] * split. plans as in `share_lists`.
    """
    batch, heads, capacity = q_indices.shape
    tiles_k = q_offsets.shape[-1] - 1
    groups_per_head = triton.cdiv(tiles_k, rows)
    groups = batch * heads * groups_per_head
    split = config.volume(tile_q) // block_q
    device = q_indices.device
    programs = torch.empty(batch, heads, capacity * split, dtype=torch.int32, device=device)
    plans = torch.empty(groups, PLAN.value, dtype=torch.int32, device=device)
    if groups:
        usual = capacity // tiles_k  # at most, on average
        _share[(groups,)](
            q_offsets, q_indices, programs, plans, tiles_k, groups_per_head, capacity, 0, tuple(grid_q),
            TILE=tuple(tile_q), ROWS=rows, STEP=1, CSR=True, BLOCK_K=block_q, SPLIT=split,
            BITS=config.num_tiles(grid_q, tile_q).bit_length(),
            BLOCK=max(16, min(1024, config.next_power_of_two(usual))), num_warps=1 if usual <= 256 else 4,
        )  # fmt: skip
    return programs, plans
