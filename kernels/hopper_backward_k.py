"""dk and dv on Hopper: a warp-specialised persistent kernel in Gluon. `hopper_ring` tells how two blocks share a ring.

Each consumer owns a block of keys: k and v [64, 128] lie in shared memory as the left operands of S^T = k q^T and
dP^T = v dout^T, dk and dv in registers. The ring brings q and dout with lse and delta of their rows, and P^T and dS^T
go from registers into dv += P^T dout and dk += dS^T q. With grouped query heads the lists of the heads of a group are
walked one after the other.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import BoxPlan, Triple
from bsa_compile.kernels.hopper_blocks import LOG2_E, ROWS, block_origin, describe, load_box, processors
from bsa_compile.kernels.hopper_ring import (
    BLOCK_BYTES,
    STATISTICS,
    WIDTH,
    acquire,
    fill_lists,
    init_ring,
    next_fill,
    store_rows,
)

# Twelve warps start with 168 registers a thread; the consumers take from the loaders. With 232 ptxas runs one wgmma
# after the other (C7512).
CONSUMER_REGISTERS = 240
LOADER_REGISTERS = 24
STAGES = 4  # of 32.5 KB, beside 64 KB of keys and values


@gluon.jit
def _load_own(
    k_box, v_box, k_own, v_own, own_full, own_empty,
    groups, groups_per_head, tiles_k, heads_kv, grid_k,
    TILE_K: gl.constexpr, TILES: gl.constexpr, ACCESS: gl.constexpr, part: gl.constexpr,
):  # fmt: skip
    """Bring k and v of one consumer's blocks, each as soon as the consumer is done with the one before."""
    phase = 0
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        pair = index // groups_per_head
        t, h, w = block_origin(
            index % groups_per_head, part, tiles_k, grid_k[1], grid_k[2], TILE_K[0], TILE_K[1], TILE_K[2], TILES
        )
        batch = pair // heads_kv
        head = pair % heads_kv
        bar = own_full.index(part)
        mbarrier.wait(own_empty.index(part), phase ^ 1)
        mbarrier.expect(bar, 2 * BLOCK_BYTES)
        load_box(k_box, batch, head, heads_kv, grid_k[0], t, h, w, bar, k_own.index(part), ACCESS[0])
        load_box(v_box, batch, head, heads_kv, grid_k[0], t, h, w, bar, v_own.index(part), ACCESS[1])
        phase ^= 1


@gluon.jit
def _load(
    q_box, grad_box, statistics_box, a_ring, b_ring, statistics_ring, full, empty,
    programs, plans, offsets, capacity, groups, groups_per_head, tiles_k, heads_kv, grid_q,
    TILE_Q: gl.constexpr, TILES: gl.constexpr, MEMBERS: gl.constexpr, STAGES: gl.constexpr, ACCESS: gl.constexpr,
):  # fmt: skip
    """Fill the ring with q, dout and their statistics for every group of this program."""
    SPLIT: gl.constexpr = TILE_Q[0] * TILE_Q[1] * TILE_Q[2] // ROWS
    position = 0
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        pair = index // groups_per_head
        group = index % groups_per_head
        for member in range(MEMBERS):
            row = pair * MEMBERS + member  # of (batch, query head)
            begin = offsets + row.to(gl.int64) * (tiles_k + 1) + group * TILES
            blocks = programs + row.to(gl.int64) * capacity
            blocks_0 = blocks + gl.load(begin).to(gl.int64) * SPLIT
            blocks_1 = blocks + gl.load(begin + TILES - 1).to(gl.int64) * SPLIT
            position = fill_lists(
                position, blocks_0, blocks_1, plans + (row * groups_per_head + group) * 4,
                pair // heads_kv, pair % heads_kv * MEMBERS + member, heads_kv * MEMBERS, grid_q,
                q_box, grad_box, a_ring, b_ring, full, empty, statistics_box, statistics_ring, TILE_Q,
                STAGES, ACCESS[2], ACCESS[3],
            )  # fmt: skip


@gluon.jit
def _scores(k, v, a_ring, b_ring, statistics_ring, slot, zero):
    """Start S^T - lse / scale and dP^T - delta: the accumulators begin with the row statistics of the query block."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    statistics = statistics_ring.index(slot)
    s, _ = gl.broadcast(statistics.slice(0, ROWS).load(COLUMN)[None, :], zero)
    s = warpgroup_mma(k, a_ring.index(slot).permute((1, 0)), s, is_async=True)
    dp, _ = gl.broadcast(statistics.slice(ROWS, ROWS).load(COLUMN)[None, :], zero)
    dp = warpgroup_mma(v, b_ring.index(slot).permute((1, 0)), dp, is_async=True)
    return s, dp


@gluon.jit
def _weigh(s, dp, dv, b_ring, slot, scale_log2, WEIGHTS: gl.constexpr):
    """dS^T and dv + P^T dout, from products under way; what must live until another one is done is given to `_scores`.

    The caller has waited for `s`.
    """
    p = gl.exp2(s * scale_log2)
    weights = gl.convert_layout(p.to(b_ring.dtype), WEIGHTS)
    product = warpgroup_mma(weights, b_ring.index(slot), dv, is_async=True)
    dp = warpgroup_mma_wait(1, [dp])
    ds = (p * dp).to(b_ring.dtype)
    # The product reads the registers of its weights until it is done, so they must live as long.
    dv, ds, weights = warpgroup_mma_wait(0, [product, ds, weights])
    return ds, dv


@gluon.jit
def _consume(
    k_own, v_own, own_full, own_empty, a_ring, b_ring, statistics_ring, full, empty,
    plans, dk_ptr, dv_ptr, scale, groups, groups_per_head, tiles_k, heads_kv, grid_k,
    TILE_K: gl.constexpr, TILES: gl.constexpr, MEMBERS: gl.constexpr, STAGES: gl.constexpr,
    BOX_K_H: gl.constexpr, BOX_K_W: gl.constexpr, part: gl.constexpr,
):  # fmt: skip
    """dk and dv of one of the two blocks of each group."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    scale_log2 = scale * LOG2_E
    start = 0
    phases = 0
    phase = 0
    k = k_own.index(part)
    v = v_own.index(part)
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        pair = index // groups_per_head
        group = index % groups_per_head
        mbarrier.wait(own_full.index(part), phase)
        phase ^= 1
        dk = gl.zeros([ROWS, WIDTH], gl.float32, RESULT)
        dv = gl.zeros([ROWS, WIDTH], gl.float32, RESULT)
        zero = gl.zeros([ROWS, ROWS], gl.float32, S)
        for member in range(MEMBERS):
            plan = plans + ((pair * MEMBERS + member) * groups_per_head + group) * 4
            common = gl.load(plan)
            alone = gl.load(plan + 1 + part)
            other = gl.load(plan + 2 - part)
            steps = common + alone
            rounds = gl.minimum(alone, other)
            stride = common // (rounds + 1)
            # The dk product of a step runs before the scores of the next one, its dv product with its own dS.
            if steps > 0:
                at, single, place, turn, since = next_fill(0, 0, 0, 0, common, rounds, stride, part)
                slot, phases = acquire(start + at, single, phases, full, part, STAGES)
                s, dp = _scores(k, v, a_ring, b_ring, statistics_ring, slot, zero)
                s = warpgroup_mma_wait(1, [s])
                ds, dv = _weigh(s, dp, dv, b_ring, slot, scale_log2, WEIGHTS)
                for step in range(1, steps):
                    before = slot
                    at, single, place, turn, since = next_fill(step, place, turn, since, common, rounds, stride, part)
                    slot, phases = acquire(start + at, single, phases, full, part, STAGES)
                    left = gl.convert_layout(ds, WEIGHTS)
                    product = warpgroup_mma(left, a_ring.index(before), dk, is_async=True)
                    s, dp = _scores(k, v, a_ring, b_ring, statistics_ring, slot, zero)
                    s, dk, left = warpgroup_mma_wait(1, [s, product, left])
                    ds, dv = _weigh(s, dp, dv, b_ring, slot, scale_log2, WEIGHTS)
                    # An arrival makes Triton put a barrier of the warpgroup before itself and before whatever touches
                    # shared memory next: one of each in a step.
                    mbarrier.arrive(empty.index(before), count=1)
                left = gl.convert_layout(ds, WEIGHTS)
                product = warpgroup_mma(left, a_ring.index(slot), dk, is_async=True)
                dk, left = warpgroup_mma_wait(0, [product, left])
                mbarrier.arrive(empty.index(slot), count=1)
            start += steps + other
        mbarrier.arrive(own_empty.index(part), count=1)
        t, h, w = block_origin(
            group, part, tiles_k, grid_k[1], grid_k[2], TILE_K[0], TILE_K[1], TILE_K[2], TILES
        )  # fmt: skip
        batch = pair // heads_kv
        head = pair % heads_kv
        real = group * 2 + part < tiles_k * (2 // TILES)
        store_rows(dv_ptr, batch, head, heads_kv, t, h, w, grid_k, real, dv, BOX_K_H, BOX_K_W)
        store_rows(dk_ptr, batch, head, heads_kv, t, h, w, grid_k, real, dk * scale, BOX_K_H, BOX_K_W)


@gluon.jit
def hopper_backward_k_kernel(
    k_box, v_box, q_box, grad_box, statistics_box, dk_ptr, dv_ptr, programs, plans, offsets, capacity, scale,
    groups, groups_per_head, tiles_k, heads_kv, grid_q, grid_k,
    TILE_Q: gl.constexpr, TILE_K: gl.constexpr, TILES: gl.constexpr, MEMBERS: gl.constexpr, STAGES: gl.constexpr,
    BOX_K_H: gl.constexpr, BOX_K_W: gl.constexpr,
    ACCESS: gl.constexpr, REGISTERS: gl.constexpr, REGISTERS_LOADER: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_own = gl.allocate_shared_memory(k_box.dtype, [2, ROWS, WIDTH], LAYOUT)
    v_own = gl.allocate_shared_memory(k_box.dtype, [2, ROWS, WIDTH], LAYOUT)
    a_ring = gl.allocate_shared_memory(k_box.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    b_ring = gl.allocate_shared_memory(k_box.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    statistics_ring = gl.allocate_shared_memory(gl.float32, [STAGES, STATISTICS], statistics_box.layout)
    full = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    own_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    init_ring(full, empty, STAGES)
    for i in gl.static_range(2):
        mbarrier.init(own_full.index(i), count=1)
        mbarrier.init(own_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    k_own, v_own, own_full, own_empty, a_ring, b_ring, statistics_ring, full, empty,
                    plans, dk_ptr, dv_ptr, scale, groups, groups_per_head, tiles_k, heads_kv, grid_k,
                    TILE_K, TILES, MEMBERS, STAGES, BOX_K_H, BOX_K_W, 0,
                ),
            ),
            (
                _consume,
                (
                    k_own, v_own, own_full, own_empty, a_ring, b_ring, statistics_ring, full, empty,
                    plans, dk_ptr, dv_ptr, scale, groups, groups_per_head, tiles_k, heads_kv, grid_k,
                    TILE_K, TILES, MEMBERS, STAGES, BOX_K_H, BOX_K_W, 1,
                ),
            ),
            (
                _load,
                (
                    q_box, grad_box, statistics_box, a_ring, b_ring, statistics_ring, full, empty,
                    programs, plans, offsets, capacity, groups, groups_per_head, tiles_k, heads_kv, grid_q,
                    TILE_Q, TILES, MEMBERS, STAGES, ACCESS,
                ),
            ),
            (
                _load_own,
                (
                    k_box, v_box, k_own, v_own, own_full, own_empty, groups, groups_per_head, tiles_k, heads_kv,
                    grid_k, TILE_K, TILES, ACCESS, 0,
                ),
            ),
            (
                _load_own,
                (
                    k_box, v_box, k_own, v_own, own_full, own_empty, groups, groups_per_head, tiles_k, heads_kv,
                    grid_k, TILE_K, TILES, ACCESS, 1,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [REGISTERS, REGISTERS_LOADER, REGISTERS_LOADER, REGISTERS_LOADER],
    )  # fmt: skip


def backward_k(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    lists: tuple[Tensor, Tensor],
    offsets: Tensor,
    dk: Tensor,
    dv: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    plans: tuple[BoxPlan, ...],
    programs: int | None = None,
) -> None:
    """Fill `dk` and `dv`, whose memory is a contiguous [B, S, H, D].

    Args:
        statistics: Of `hopper_backward.row_statistics`.
        lists: Load programs and plans of `share.share_transposed`, made of lists at these `offsets`.
        plans: How to read q, k, v and grad_out.
        programs: How many run at once; one per multiprocessor if None.
    """
    blocks, steps = lists
    tiles_k = config.num_tiles(grid_k, tile_k)
    tiles = 2 * config.GLUON_ROWS // config.volume(tile_k)  # of a group
    groups_per_head = triton.cdiv(tiles_k, tiles)
    batch, heads_kv = k.shape[:2]
    groups = batch * heads_kv * groups_per_head
    if not groups:
        return
    plan_q, plan_k, plan_v, plan_grad = plans
    flat = statistics.view(-1)
    statistics_box = TensorDescriptor(flat, [flat.numel()], [1], [STATISTICS.value], gl.NVMMASharedLayout(0, 32, 1))
    hopper_backward_k_kernel[(min(groups, programs or processors(q.device.index)),)](
        describe(k, plan_k), describe(v, plan_v), describe(q, plan_q), describe(grad_out, plan_grad), statistics_box,
        dk, dv, blocks, steps, offsets, blocks.shape[-1], float(scale),
        groups, groups_per_head, tiles_k, heads_kv, tuple(grid_q), tuple(grid_k),
        TILE_Q=tuple(tile_q), TILE_K=tuple(tile_k), TILES=tiles, MEMBERS=q.shape[1] // heads_kv, STAGES=STAGES,
        BOX_K_H=plan_k.block[-3], BOX_K_W=plan_k.block[-2],
        ACCESS=(plan_k.access, plan_v.access, plan_q.access, plan_grad.access),
        REGISTERS=CONSUMER_REGISTERS, REGISTERS_LOADER=LOADER_REGISTERS,
        num_warps=4, maxnreg=config.GLUON_LAUNCH.max_registers,
    )  # fmt: skip
