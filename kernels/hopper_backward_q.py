"""dq on Hopper: a warp-specialised persistent kernel in Gluon. `hopper_ring` tells how two blocks share a ring.

Each consumer keeps q and dout of its block [64, 128] in registers as the left operands of S = q k^T and
dP = dout v^T; the ring brings keys and values, and dS = P * (dP - delta) goes from registers into dq += dS k.
The two consumers take turns at the tensor cores by themselves: running the dq product of a step under the elementwise
part of the next one gains nothing.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bsa_compile.kernels import config
from bsa_compile.kernels.config import BoxPlan, Triple
from bsa_compile.kernels.hopper_blocks import LOG2_E, ROWS, block_origin, describe, hide, processors
from bsa_compile.kernels.hopper_ring import (
    STATISTICS,
    WIDTH,
    acquire,
    fill,
    fill_lists,
    init_ring,
    next_fill,
    store_rows,
)

# Twelve warps start with 168 registers a thread; the consumers take from the loader.
CONSUMER_REGISTERS = 240
LOADER_REGISTERS = 24
STAGES = 7  # of 32 KB


@gluon.jit
def _load(
    q_box, grad_box, k_box, v_box, a_ring, b_ring, full, empty, programs, plans, length,
    groups, groups_per_head, tiles_q, heads, group_size, grid_q, grid_k,
    TILE_Q: gl.constexpr, TILE_K: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, ACCESS: gl.constexpr,
):  # fmt: skip
    """Fill the ring for every group of this program: q and dout of either consumer, then its keys and values."""
    position = 0
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        pair = index // groups_per_head
        batch = pair // heads
        head = pair % heads
        for part in gl.static_range(2):
            t, h, w = block_origin(
                index % groups_per_head, part, tiles_q, grid_q[1], grid_q[2], TILE_Q[0], TILE_Q[1], TILE_Q[2], TILES
            )
            fill(
                position, batch, head, heads, grid_q[0], t, h, w, q_box, grad_box, a_ring, b_ring, full, empty,
                1 + part, STAGES, ACCESS[0], ACCESS[1], 0,
            )  # fmt: skip
            position += 1
        blocks = programs + gl.cast(index, gl.int64) * (TILES * length)
        position = fill_lists(
            position, blocks, blocks + (TILES - 1) * length, plans + index * 4,
            batch, head // group_size, heads // group_size, grid_k, k_box, v_box, a_ring, b_ring, full, empty,
            None, None, TILE_K, STAGES, ACCESS[2], ACCESS[3],
        )  # fmt: skip


@gluon.jit
def _consume(
    a_ring, b_ring, full, empty, programs, plans, length, statistics_ptr, dq_ptr, scale,
    groups, groups_per_head, tiles_q, heads, grid_q, grid_k,
    TILE_Q: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, MASK_K: gl.constexpr,
    BOX_Q_H: gl.constexpr, BOX_Q_W: gl.constexpr, BOX_K_H: gl.constexpr, BOX_K_W: gl.constexpr,
    part: gl.constexpr,
):  # fmt: skip
    """dq of one of the two blocks of each group."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    scale_log2 = scale * LOG2_E
    start = 0
    phases = 0
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        pair = index // groups_per_head
        group = index % groups_per_head
        plan = plans + index * 4
        common = gl.load(plan)
        alone = gl.load(plan + 1 + part)
        other = gl.load(plan + 2 - part)
        steps = common + alone
        rounds = gl.minimum(alone, other)
        stride = common // (rounds + 1)
        blocks = programs + gl.cast(index, gl.int64) * (TILES * length) + part * (TILES - 1) * length
        own_blocks = tiles_q * (2 // TILES)
        own = pair * own_blocks + gl.minimum(group * 2 + part, own_blocks - 1)
        statistics = statistics_ptr + own.to(gl.int64) * STATISTICS + gl.arange(0, ROWS, ROW)
        lse = -gl.load(statistics) * scale_log2
        delta = -gl.load(statistics + ROWS)

        slot_q = (start + part) % STAGES
        bar = slot_q + (1 + part) * STAGES
        mbarrier.wait(full.index(bar), (phases >> bar) & 1)
        phases ^= 1 << bar
        start += 2

        dq = gl.zeros([ROWS, WIDTH], gl.float32, RESULT)
        if steps == 0:
            mbarrier.arrive(empty.index(slot_q), count=1)
        else:
            q = a_ring.index(slot_q).load(LEFT)
            grad = b_ring.index(slot_q).load(LEFT)
            zero = gl.zeros([ROWS, ROWS], gl.float32, S)
            place = 0
            turn = 0
            since = 0
            for step in range(steps):
                had = gl.where(step >= common + rounds, step - common, turn)
                at, single, place, turn, since = next_fill(step, place, turn, since, common, rounds, stride, part)
                if MASK_K:
                    block = gl.load(blocks + gl.where(single, common + had, step - had))
                slot, phases = acquire(start + at, single, phases, full, part, STAGES)
                s = warpgroup_mma(q, a_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                dp = warpgroup_mma(grad, b_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, [s])
                if MASK_K:
                    s = hide(s, block, grid_k[0], grid_k[1], grid_k[2], S, BOX_K_H, BOX_K_W)
                p = gl.exp2(s * scale_log2 - lse[:, None])
                dp, p = warpgroup_mma_wait(0, [dp, p])
                ds = gl.convert_layout((p * (dp - delta[:, None])).to(a_ring.dtype), WEIGHTS)
                product = warpgroup_mma(ds, a_ring.index(slot), dq, is_async=True)
                # The product reads the registers of dS until it is done, so they must live as long.
                dq, ds = warpgroup_mma_wait(0, [product, ds])
                mbarrier.arrive(empty.index(slot), count=1)
                if step == 0:
                    # Only now have q and dout surely arrived in registers: neither a barrier nor an arrival waits for
                    # loads under way, and the next fill of their slot does not either.
                    mbarrier.arrive(empty.index(slot_q), count=1)
        start += steps + other
        t, h, w = block_origin(
            group, part, tiles_q, grid_q[1], grid_q[2], TILE_Q[0], TILE_Q[1], TILE_Q[2], TILES
        )  # fmt: skip
        real = group * 2 + part < own_blocks
        store_rows(
            dq_ptr, pair // heads, pair % heads, heads, t, h, w, grid_q, real, dq * scale, BOX_Q_H, BOX_Q_W
        )  # fmt: skip


@gluon.jit
def hopper_backward_q_kernel(
    q_box, grad_box, k_box, v_box, dq_ptr, statistics_ptr, programs, plans, length, scale,
    groups, groups_per_head, tiles_q, heads, group_size, grid_q, grid_k,
    TILE_Q: gl.constexpr, TILE_K: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, MASK_K: gl.constexpr,
    BOX_Q_H: gl.constexpr, BOX_Q_W: gl.constexpr, BOX_K_H: gl.constexpr, BOX_K_W: gl.constexpr,
    ACCESS: gl.constexpr, REGISTERS: gl.constexpr, REGISTERS_LOADER: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_ring = gl.allocate_shared_memory(q_box.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    b_ring = gl.allocate_shared_memory(q_box.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    init_ring(full, empty, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    a_ring, b_ring, full, empty, programs, plans, length, statistics_ptr, dq_ptr, scale,
                    groups, groups_per_head, tiles_q, heads, grid_q, grid_k,
                    TILE_Q, TILES, STAGES, MASK_K, BOX_Q_H, BOX_Q_W, BOX_K_H, BOX_K_W, 0,
                ),
            ),
            (
                _consume,
                (
                    a_ring, b_ring, full, empty, programs, plans, length, statistics_ptr, dq_ptr, scale,
                    groups, groups_per_head, tiles_q, heads, grid_q, grid_k,
                    TILE_Q, TILES, STAGES, MASK_K, BOX_Q_H, BOX_Q_W, BOX_K_H, BOX_K_W, 1,
                ),
            ),
            (
                _load,
                (
                    q_box, grad_box, k_box, v_box, a_ring, b_ring, full, empty, programs, plans, length,
                    groups, groups_per_head, tiles_q, heads, group_size, grid_q, grid_k,
                    TILE_Q, TILE_K, TILES, STAGES, ACCESS,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, REGISTERS_LOADER],
    )  # fmt: skip


def backward_q(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    lists: tuple[Tensor, Tensor],
    dq: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    plans: tuple[BoxPlan, ...],
    programs: int | None = None,
) -> None:
    """Fill `dq`, whose memory is a contiguous [B, S, H, D].

    Args:
        statistics: Of `hopper_backward.row_statistics`.
        lists: Load programs and plans of `share.share_lists`, in steps of one block.
        plans: How to read q, k, v and grad_out.
        programs: How many run at once; one per multiprocessor if None.
    """
    blocks, steps = lists
    groups = steps.shape[0]
    if not groups:
        return
    plan_q, plan_k, plan_v, plan_grad = plans
    tiles_q = config.num_tiles(grid_q, tile_q)
    tiles = 2 * config.GLUON_ROWS // config.volume(tile_q)  # of a group
    hopper_backward_q_kernel[(min(groups, programs or processors(q.device.index)),)](
        describe(q, plan_q), describe(grad_out, plan_grad), describe(k, plan_k), describe(v, plan_v),
        dq, statistics, blocks, steps, blocks.shape[-1], float(scale),
        groups, triton.cdiv(tiles_q, tiles), tiles_q, q.shape[1], q.shape[1] // k.shape[1],
        tuple(grid_q), tuple(grid_k),
        TILE_Q=tuple(tile_q), TILE_K=tuple(tile_k), TILES=tiles, STAGES=STAGES,
        MASK_K=not config.divides(grid_k, tile_k),
        BOX_Q_H=plan_q.block[-3], BOX_Q_W=plan_q.block[-2], BOX_K_H=plan_k.block[-3], BOX_K_W=plan_k.block[-2],
        ACCESS=(plan_q.access, plan_grad.access, plan_k.access, plan_v.access),
        REGISTERS=CONSUMER_REGISTERS, REGISTERS_LOADER=LOADER_REGISTERS,
        num_warps=4, maxnreg=config.GLUON_LAUNCH.max_registers,
    )  # fmt: skip
