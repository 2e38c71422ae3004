"""What the warp-specialised Hopper kernels share: the ring of blocks and how a group of two tiles walks its lists.

A group is two w-neighbouring tiles of one head, each handled by one consumer warpgroup. Their lists are split
beforehand into the blocks that both selected (common) and the rest (private). One producer warp fills a ring of slots;
a group's fills come in a fixed order that producer and consumers compute alike:

    [own tile of 0, own tile of 1,] common blocks, then private blocks of 0 and 1 alternately until both lists are spent

A slot has one `empty` mbarrier that counts two arrivals, one a consumer; for a private fill the producer arrives in the
place of the consumer that does not read it. It has three `full` mbarriers, for the common, the first consumer's and the
second's private fills: whoever waits on one sees every phase of it, so a parity never stands for two fills.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)  # tokens of a tile
WIDTH = gl.constexpr(128)  # head_dim
STATISTICS = gl.constexpr(128)  # fp32 numbers of a tile: -lse / scale and then -delta of its rows
CONSUMERS = gl.constexpr(2)
LOG2_E = gl.constexpr(1.4426950408889634)

# A list entry is the first token (t, h, w) of a tile in 10, 11 and 11 bits, so that the producer need not divide.
BITS_H = gl.constexpr(11)
BITS_W = gl.constexpr(11)

BOX_MERGED = gl.constexpr(1)  # config.BOX_MERGED, BOX_HEADS
BOX_HEADS = gl.constexpr(2)


@gluon.jit
def pack(t, h, w):
    return (t << (BITS_H + BITS_W)) | (h << BITS_W) | w


@gluon.jit
def unpack(entry):
    t = (entry >> (BITS_H + BITS_W)) & 1023
    h = (entry >> BITS_W) & ((1 << BITS_H) - 1)
    w = entry & ((1 << BITS_W) - 1)
    return t, h, w


@gluon.jit
def origin_of(tile, tiles_h, tiles_w, TILE: gl.constexpr):
    """First token (t, h, w) of a tile of a head."""
    plane = tile // tiles_w
    return (plane // tiles_h) * TILE[0], (plane % tiles_h) * TILE[1], (tile % tiles_w) * TILE[2]


@gluon.jit
def copy_box(desc, row, head, batch, heads, frames, entry, barrier, target, ACCESS: gl.constexpr):
    """Bring the 4-D or 5-D box of a tile into `target` [ROWS, WIDTH], whose memory is laid out alike."""
    t, h, w = unpack(entry)
    box = target._reinterpret(desc.dtype, desc.block_shape, desc.layout)
    if ACCESS == BOX_MERGED:
        tma.async_copy_global_to_shared(desc, [row * frames + t, h, w, 0], barrier, box)
    elif ACCESS == BOX_HEADS:
        tma.async_copy_global_to_shared(desc, [row, t, h, w, 0], barrier, box)
    else:
        tma.async_copy_global_to_shared(desc, [head, batch * frames + t, h, w, 0], barrier, box)


@gluon.jit
def open_slot(position, full, empty, BYTES: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr):
    """Wait until ring position `position` may be filled. KIND: 0 common, 1 and 2 private. Returns slot and barrier."""
    slot = position % STAGES
    mbarrier.wait(empty.index(slot), ((position // STAGES) & 1) ^ 1)
    if KIND != 0:
        mbarrier.arrive(empty.index(slot), count=1)
    barrier = full.index(slot + KIND * STAGES)
    mbarrier.expect(barrier, BYTES)
    return slot, barrier


@gluon.jit
def acquire(step, start, common, both, uses, full, WHICH: gl.constexpr, STAGES: gl.constexpr):
    """Wait for the block of a consumer's step.

    Args:
        step: Index into the list of the consumer's tile, common blocks first.
        start: Ring position of the first listed block of the group.
        common: Common blocks; both: the smaller number of private blocks of the two tiles.
        uses: Bit i is the parity of the consumer's next wait on full barrier i.

    Returns:
        (slot, uses)
    """
    # Private block i of consumer c lies 2 i + c after the common ones while both have some, then one after the other.
    position = start + step + gl.maximum(gl.minimum(step - common + WHICH, both), 0)
    slot = position % STAGES
    barrier = slot + gl.where(step < common, 0, (1 + WHICH) * STAGES)
    mbarrier.wait(full.index(barrier), (uses >> barrier) & 1)
    return slot, uses ^ (1 << barrier)


@gluon.jit
def init_ring(full, empty, STAGES: gl.constexpr):
    for i in gl.static_range(3 * STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=CONSUMERS)


@gluon.jit
def group_lists(group, starts_ptr, common_ptr, counts_ptr, capacity):
    """Offsets of the two lists of a group, its common count and the two private counts."""
    row = group * CONSUMERS
    if starts_ptr is None:
        first = row.to(gl.int64) * capacity
        second = first + capacity
    else:
        first = gl.load(starts_ptr + row).to(gl.int64)
        second = gl.load(starts_ptr + row + 1).to(gl.int64)
    common = gl.load(common_ptr + group)
    return first, second, common, gl.load(counts_ptr + row) - common, gl.load(counts_ptr + row + 1) - common


@gluon.jit
def token_offsets(t0, h0, w0, tiles_h, tiles_w, stride, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Element offsets of the rows of a tile from the start of its head.  [ROWS] int64"""
    # The assembly hides from the compiler that the rows are the same for every tile: what it would keep of them in
    # registers throughout the kernel is what the products need.
    row = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.arange(0, ROWS, LAYOUT)], dtype=gl.int32, is_pure=False, pack=1
    )
    t = t0 + row // (TILE[1] * TILE[2])
    h = h0 + row // TILE[2] % TILE[1]
    w = w0 + row % TILE[2]
    return ((t.to(gl.int64) * (tiles_h * TILE[1]) + h) * (tiles_w * TILE[2]) + w) * stride


@gluon.jit
def store_tile(pointer, strides, tile_row, tiles, tiles_h, tiles_w, heads, value, TILE: gl.constexpr):
    """Write fp32 `value` [ROWS, WIDTH] to the tokens of a tile; strides are those of (batch, head, token)."""
    LAYOUT: gl.constexpr = value.type.layout
    row = tile_row // tiles
    batch = row // heads
    head = row % heads
    t0, h0, w0 = origin_of(tile_row % tiles, tiles_h, tiles_w, TILE)
    pointer += batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    offset = token_offsets(t0, h0, w0, tiles_h, tiles_w, strides[2], TILE, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    gl.store(pointer + (offset[:, None] + column[None, :]), value.to(pointer.dtype.element_ty))


@gluon.jit
def _fill(
    position,
    entry,
    row,
    heads,
    frames,
    tiles,
    tiles_h,
    tiles_w,
    a_desc,
    b_desc,
    statistics_desc,
    a_ring,
    b_ring,
    statistics_ring,
    full,
    empty,
    TILE: gl.constexpr,
    KIND: gl.constexpr,
    STAGES: gl.constexpr,
    ACCESS_A: gl.constexpr,
    ACCESS_B: gl.constexpr,
):
    """Fill ring position `position` with the tile that `entry` names."""
    BYTES: gl.constexpr = 2 * ROWS * WIDTH * 2 + (0 if statistics_desc is None else STATISTICS * 4)
    slot, barrier = open_slot(position, full, empty, BYTES, KIND, STAGES)
    head = row % heads
    batch = row // heads
    copy_box(a_desc, row, head, batch, heads, frames, entry, barrier, a_ring.index(slot), ACCESS_A)
    copy_box(b_desc, row, head, batch, heads, frames, entry, barrier, b_ring.index(slot), ACCESS_B)
    if statistics_desc is not None:
        t, h, w = unpack(entry)
        tile = row * tiles + (t // TILE[0] * tiles_h + h // TILE[1]) * tiles_w + w // TILE[2]
        tma.async_copy_global_to_shared(
            statistics_desc, [tile * STATISTICS], barrier, statistics_ring.index(slot)
        )  # fmt: skip


@gluon.jit
def produce(
    own_a_desc,
    own_b_desc,
    a_desc,
    b_desc,
    statistics_desc,
    a_ring,
    b_ring,
    statistics_ring,
    full,
    empty,
    entries_ptr,
    starts_ptr,
    common_ptr,
    counts_ptr,
    capacity,
    groups,
    heads,
    frames,
    tiles,
    tiles_h,
    tiles_w,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    ACCESS: gl.constexpr,
):
    """Fill the ring, for every group of this program.

    Args:
        own_a_desc: What brings the tiles of the group itself, own_b_desc too; None if these do not use the ring.
        a_desc: What brings the listed blocks, b_desc and statistics_desc (or None) too.
        ACCESS: Kinds of own_a_desc, own_b_desc, a_desc and b_desc.
    """
    position = 0
    for group in range(gl.program_id(0), groups, gl.num_programs(0)):
        first, second, common, own_0, own_1 = group_lists(group, starts_ptr, common_ptr, counts_ptr, capacity)
        row = group * CONSUMERS // tiles
        if own_a_desc is not None:
            t, h, w = origin_of(group * CONSUMERS % tiles, tiles_h, tiles_w, TILE)
            tile = pack(t, h, w)
            _fill(
                position, tile, row, heads, frames, tiles, tiles_h, tiles_w,
                own_a_desc, own_b_desc, None, a_ring, b_ring, None, full, empty, TILE, 1, STAGES, ACCESS[0], ACCESS[1],
            )  # fmt: skip
            _fill(
                position + 1, tile + TILE[2], row, heads, frames, tiles, tiles_h, tiles_w,
                own_a_desc, own_b_desc, None, a_ring, b_ring, None, full, empty, TILE, 2, STAGES, ACCESS[0], ACCESS[1],
            )  # fmt: skip
            position += 2
        entry = gl.load(entries_ptr + first, mask=common > 0, other=0)
        for i in range(common):
            ahead = gl.load(entries_ptr + first + i + 1, mask=i + 1 < common, other=0)
            _fill(
                position, entry, row, heads, frames, tiles, tiles_h, tiles_w, a_desc, b_desc, statistics_desc,
                a_ring, b_ring, statistics_ring, full, empty, TILE, 0, STAGES, ACCESS[2], ACCESS[3],
            )  # fmt: skip
            position += 1
            entry = ahead
        first += common
        second += common
        entry_0 = gl.load(entries_ptr + first, mask=own_0 > 0, other=0)
        entry_1 = gl.load(entries_ptr + second, mask=own_1 > 0, other=0)
        for i in range(gl.maximum(own_0, own_1)):
            ahead_0 = gl.load(entries_ptr + first + i + 1, mask=i + 1 < own_0, other=0)
            ahead_1 = gl.load(entries_ptr + second + i + 1, mask=i + 1 < own_1, other=0)
            if i < own_0:
                _fill(
                    position, entry_0, row, heads, frames, tiles, tiles_h, tiles_w, a_desc, b_desc, statistics_desc,
                    a_ring, b_ring, statistics_ring, full, empty, TILE, 1, STAGES, ACCESS[2], ACCESS[3],
                )  # fmt: skip
                position += 1
            if i < own_1:
                _fill(
                    position, entry_1, row, heads, frames, tiles, tiles_h, tiles_w, a_desc, b_desc, statistics_desc,
                    a_ring, b_ring, statistics_ring, full, empty, TILE, 2, STAGES, ACCESS[2], ACCESS[3],
                )  # fmt: skip
                position += 1
            entry_0 = ahead_0
            entry_1 = ahead_1
