"""The ring of blocks that feeds the two consumers of a Hopper backward kernel, and how a group walks its lists.

A slot holds a block of two tensors (a, b), of keys and values or of queries and output gradients. One loader warp fills
a ring of slots; the fills of two lists come in an order that the loader and the consumers compute alike (`next_fill`,
which the forward shares):

    rounds of `stride` blocks of both, one of the first alone, one of the second alone, until one has none left alone;
    then what is left of both; then what the other one has left alone

A consumer that holds a slot needs the next but one at most to go on, which takes three slots. The blocks of one
consumer lie between those of both to keep the demand on L2 even.

A slot has one `empty` barrier of two arrivals, one a consumer; where the fill is for one consumer, the loader arrives
for the other. It has three `full` barriers: fills for both, for the first, for the second. Whoever waits on one sees
every phase of it, so a parity never stands for two fills.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from bsa_compile.kernels.hopper_blocks import ROWS, load_box, load_numbers, row_tokens, unpack

WIDTH = gl.constexpr(128)  # head_dim
STATISTICS = gl.constexpr(128)  # fp32 numbers of a query block: -lse / scale and then -delta of its rows
BLOCK_BYTES = gl.constexpr(ROWS.value * WIDTH.value * 2)


@gluon.jit
def init_ring(full, empty, STAGES: gl.constexpr):
    for i in gl.static_range(3 * STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=2)


@gluon.jit
def fill(
    position, batch, head, heads, frames, t, h, w, a_box, b_box, a_ring, b_ring, full, empty,
    kind, STAGES: gl.constexpr, ACCESS_A: gl.constexpr, ACCESS_B: gl.constexpr,
    EXTRA_BYTES: gl.constexpr,
):  # fmt: skip
    """Fill the slot of a ring position: `kind` 0 for both consumers, 1 or 2 for one of them. Returns slot, barrier."""
    slot = position % STAGES
    mbarrier.wait(empty.index(slot), ((position // STAGES) & 1) ^ 1)
    if kind != 0:
        mbarrier.arrive(empty.index(slot), count=1)
    bar = full.index(kind * STAGES + slot)
    mbarrier.expect(bar, 2 * BLOCK_BYTES + EXTRA_BYTES)
    load_box(a_box, batch, head, heads, frames, t, h, w, bar, a_ring.index(slot), ACCESS_A)
    load_box(b_box, batch, head, heads, frames, t, h, w, bar, b_ring.index(slot), ACCESS_B)
    return slot, bar


@gluon.jit
def _fill_listed(
    position, block, batch, head, heads, grid, a_box, b_box, a_ring, b_ring, full, empty,
    statistics_box, statistics_ring, TILE: gl.constexpr,
    kind, STAGES: gl.constexpr, ACCESS_A: gl.constexpr, ACCESS_B: gl.constexpr,
):  # fmt: skip
    """Fill the slot of a ring position with a block of a load program, and with the statistics of its rows."""
    t, h, w = unpack(block)
    EXTRA: gl.constexpr = 0 if statistics_box is None else STATISTICS * 4
    slot, bar = fill(
        position, batch, head, heads, grid[0], t, h, w, a_box, b_box, a_ring, b_ring, full, empty,
        kind, STAGES, ACCESS_A, ACCESS_B, EXTRA,
    )  # fmt: skip
    if statistics_box is not None:
        SPLIT: gl.constexpr = TILE[0] * TILE[1] * TILE[2] // 64
        tiles_t = (grid[0] + TILE[0] - 1) // TILE[0]
        tiles_h = (grid[1] + TILE[1] - 1) // TILE[1]
        tiles_w = (grid[2] + TILE[2] - 1) // TILE[2]
        tile = (((batch * heads + head) * tiles_t + t // TILE[0]) * tiles_h + h // TILE[1]) * tiles_w + w // TILE[2]
        part = ((t % TILE[0] * TILE[1] + h % TILE[1]) * TILE[2] + w % TILE[2]) // 64
        load_numbers(statistics_box, (tile * SPLIT + part) * STATISTICS, bar, statistics_ring.index(slot))


@gluon.jit
def fill_lists(
    position, blocks_0, blocks_1, plan, batch, head, heads, grid, a_box, b_box, a_ring, b_ring, full, empty,
    statistics_box, statistics_ring, TILE: gl.constexpr,
    STAGES: gl.constexpr, ACCESS_A: gl.constexpr, ACCESS_B: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the two lists of a group.

    Args:
        blocks_0: Pointer to the load program of the first consumer; blocks_1 that of the second.
        plan: Pointer to the plan of the group.
        grid: (t, h, w) of what is listed, TILE its tile.
        statistics_box: Descriptor of the statistics of the listed rows, or None.

    Returns:
        The ring position that follows.
    """
    common = gl.load(plan)
    alone_0 = gl.load(plan + 1)
    alone_1 = gl.load(plan + 2)
    rounds = gl.minimum(alone_0, alone_1)
    stride = common // (rounds + 1)
    block = gl.load(blocks_0, mask=common > 0, other=0)
    mine = blocks_0 + common
    other = blocks_1 + common
    left = common
    for turn in range(rounds + 1):
        # The loads of a round's blocks are under way before they are needed.
        block_0 = gl.load(mine, mask=turn < rounds, other=0)
        block_1 = gl.load(other, mask=turn < rounds, other=0)
        for _ in range(gl.where(turn < rounds, stride, left)):
            ahead = gl.load(blocks_0 + 1, mask=left > 1, other=0)
            _fill_listed(
                position, block, batch, head, heads, grid, a_box, b_box, a_ring, b_ring, full, empty,
                statistics_box, statistics_ring, TILE, 0, STAGES, ACCESS_A, ACCESS_B,
            )  # fmt: skip
            position += 1
            block = ahead
            blocks_0 += 1
            left -= 1
        if turn < rounds:
            _fill_listed(
                position, block_0, batch, head, heads, grid, a_box, b_box, a_ring, b_ring, full, empty,
                statistics_box, statistics_ring, TILE, 1, STAGES, ACCESS_A, ACCESS_B,
            )  # fmt: skip
            _fill_listed(
                position + 1, block_1, batch, head, heads, grid, a_box, b_box, a_ring, b_ring, full, empty,
                statistics_box, statistics_ring, TILE, 2, STAGES, ACCESS_A, ACCESS_B,
            )  # fmt: skip
            position += 2
            mine += 1
            other += 1
    rest = gl.where(alone_0 > rounds, mine, other)
    kind = gl.where(alone_0 > rounds, 1, 2)
    left = alone_0 + alone_1 - 2 * rounds
    block = gl.load(rest, mask=left > 0, other=0)
    for i in range(left):
        ahead = gl.load(rest + i + 1, mask=i + 1 < left, other=0)
        _fill_listed(
            position, block, batch, head, heads, grid, a_box, b_box, a_ring, b_ring, full, empty,
            statistics_box, statistics_ring, TILE, kind, STAGES, ACCESS_A, ACCESS_B,
        )  # fmt: skip
        position += 1
        block = ahead
    return position


@gluon.jit
def next_fill(step, place, turn, since, common, rounds, stride, part: gl.constexpr):
    """Where the fill for a consumer's step lies in its group's order, and what comes after.

    Args:
        step: Number of the step among the consumer's own.
        place: First fill that the consumer has not passed.
        turn: Blocks of its own that the consumer has had in rounds.
        since: Shared steps since then.

    Returns:
        (the fill, whether it is the consumer's alone, place, turn, since) with the last three for the next step.
    """
    in_round = (turn < rounds) & (since == stride)
    alone = in_round | (step >= common + rounds)
    fill = place + gl.where(in_round, part, 0)
    place += gl.where(in_round, 2, 1)
    since = gl.where(in_round, 0, since + 1)
    turn += gl.where(in_round, 1, 0)
    return fill, alone, place, turn, since


@gluon.jit
def acquire(position, alone, phases, full, part: gl.constexpr, STAGES: gl.constexpr):
    """Wait for the fill at a ring position, which is for this consumer alone or for both.

    Args:
        phases: Bit i is the phase of the consumer's next wait on full barrier i.

    Returns:
        (slot, phases after)
    """
    slot = position % STAGES
    bar = slot + gl.where(alone, (1 + part) * STAGES, 0)
    mbarrier.wait(full.index(bar), (phases >> bar) & 1)
    return slot, phases ^ (1 << bar)


@gluon.jit
def store_rows(pointer, batch, head, heads, t, h, w, grid, real, rows, BOX_H: gl.constexpr, BOX_W: gl.constexpr):
    """Write fp32 `rows` [64, WIDTH] to the tokens of the block at (t, h, w), if it is real, of a [B, S, H, WIDTH]."""
    LAYOUT: gl.constexpr = rows.type.layout
    # The assembly hides from the compiler that the rows are the same for every block: what it would keep of them in
    # registers throughout the kernel is what the products need.
    row = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r",
        [gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    token, valid = row_tokens(row, t, h, w, grid[0], grid[1], grid[2], BOX_H, BOX_W)
    pointer += (batch.to(gl.int64) * (grid[0] * grid[1] * grid[2]) * heads + head) * WIDTH
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    pointers = pointer + ((token * (heads * WIDTH))[:, None] + column[None, :])
    gl.store(pointers, rows.to(pointer.dtype.element_ty), mask=(valid & real)[:, None])
