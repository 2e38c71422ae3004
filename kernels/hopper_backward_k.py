"""dk and dv on Hopper: a warp-specialised persistent kernel in Gluon. `hopper_ring` tells how two tiles share a ring.

Each consumer warpgroup owns a key tile: k and v [64, 128] lie in shared memory as the left operands of S^T = k q^T and
dP^T = v dout^T, dk and dv in registers. The ring brings q and dout blocks with lse and delta of their rows, and P^T and
dS^T go from registers into dv += P^T dout and dk += dS^T q.
"""

from __future__ import annotations

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
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.hopper_launch import (
    CONSUMER_REGISTERS,
    ENTRY_REGISTERS,
    common_arguments,
    describe,
    programs_on,
)
from bsa_compile.kernels.hopper_ring import (
    CONSUMERS,
    LOG2_E,
    ROWS,
    STATISTICS,
    WIDTH,
    acquire,
    copy_box,
    init_ring,
    origin_of,
    pack,
    produce,
    store_tile,
)


@gluon.jit
def _bring_tiles(
    k_desc,
    v_desc,
    k_own,
    v_own,
    own_full,
    own_empty,
    groups,
    heads,
    frames,
    tiles,
    tiles_h,
    tiles_w,
    TILE: gl.constexpr,
    ACCESS: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Bring k and v of one consumer's tiles, each as soon as the consumer is done with the one before."""
    phase = 0
    for group in range(gl.program_id(0), groups, gl.num_programs(0)):
        tile = group * CONSUMERS + WHICH
        row = tile // tiles
        t, h, w = origin_of(tile % tiles, tiles_h, tiles_w, TILE)
        entry = pack(t, h, w)
        barrier = own_full.index(WHICH)
        mbarrier.wait(own_empty.index(WHICH), phase ^ 1)
        mbarrier.expect(barrier, 2 * ROWS * WIDTH * 2)
        head = row % heads
        batch = row // heads
        copy_box(k_desc, row, head, batch, heads, frames, entry, barrier, k_own.index(WHICH), ACCESS[0])
        copy_box(v_desc, row, head, batch, heads, frames, entry, barrier, v_own.index(WHICH), ACCESS[1])
        phase ^= 1


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
def _consume(
    k_own,
    v_own,
    own_full,
    own_empty,
    a_ring,
    b_ring,
    statistics_ring,
    full,
    empty,
    common_ptr,
    counts_ptr,
    dk_ptr,
    dv_ptr,
    strides,
    scale,
    groups,
    heads,
    tiles,
    tiles_h,
    tiles_w,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
    WHICH: gl.constexpr,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    scale_log2 = scale * LOG2_E
    start = 0
    uses = 0
    phase = 0
    k = k_own.index(WHICH)
    v = v_own.index(WHICH)
    for group in range(gl.program_id(0), groups, gl.num_programs(0)):
        tile = group * CONSUMERS + WHICH
        common = gl.load(common_ptr + group)
        count = gl.load(counts_ptr + tile)
        other = gl.load(counts_ptr + group * CONSUMERS + (1 - WHICH)) - common
        both = gl.minimum(count - common, other)
        mbarrier.wait(own_full.index(WHICH), phase)
        dk = gl.zeros([ROWS, WIDTH], gl.float32, RESULT)
        dv = gl.zeros([ROWS, WIDTH], gl.float32, RESULT)
        zero = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
        if OVERLAP:
            # The dk product of a block runs before the scores of the next, its dv product with its own dS.
            if count > 0:
                slot, uses = acquire(0, start, common, both, uses, full, WHICH, STAGES)
                s, dp = _scores(k, v, a_ring, b_ring, statistics_ring, slot, zero)
                s = warpgroup_mma_wait(1, [s])
                p = gl.exp2(s * scale_log2)
                weights = gl.convert_layout(p.to(a_ring.dtype), WEIGHTS)
                dv_next = warpgroup_mma(weights, b_ring.index(slot), dv, is_async=True)
                dp = warpgroup_mma_wait(1, [dp])
                ds = (p * dp).to(a_ring.dtype)
                dv, ds = warpgroup_mma_wait(0, [dv_next, ds])
                for step in range(1, count):
                    before = slot
                    slot, uses = acquire(step, start, common, both, uses, full, WHICH, STAGES)
                    left = gl.convert_layout(ds, WEIGHTS)
                    dk_next = warpgroup_mma(left, a_ring.index(before), dk, is_async=True)
                    s, dp = _scores(k, v, a_ring, b_ring, statistics_ring, slot, zero)
                    s, dk = warpgroup_mma_wait(1, [s, dk_next])
                    p = gl.exp2(s * scale_log2)
                    weights = gl.convert_layout(p.to(a_ring.dtype), WEIGHTS)
                    dv_next = warpgroup_mma(weights, b_ring.index(slot), dv, is_async=True)
                    dp = warpgroup_mma_wait(1, [dp])
                    ds = (p * dp).to(a_ring.dtype)
                    dv, ds = warpgroup_mma_wait(0, [dv_next, ds])
                    # An arrival makes Triton put a barrier of the warpgroup before itself and before whatever touches
                    # shared memory next: one of each in a step.
                    mbarrier.arrive(empty.index(before), count=1)
                mbarrier.arrive(own_empty.index(WHICH), count=1)
                left = gl.convert_layout(ds, WEIGHTS)
                dk_next = warpgroup_mma(left, a_ring.index(slot), dk, is_async=True)
                dk = warpgroup_mma_wait(0, [dk_next])
                mbarrier.arrive(empty.index(slot), count=1)
            else:
                mbarrier.arrive(own_empty.index(WHICH), count=1)
        else:
            for step in range(count):
                slot, uses = acquire(step, start, common, both, uses, full, WHICH, STAGES)
                s, dp = _scores(k, v, a_ring, b_ring, statistics_ring, slot, zero)
                s = warpgroup_mma_wait(1, [s])
                p = gl.exp2(s * scale_log2)
                weights = gl.convert_layout(p.to(a_ring.dtype), WEIGHTS)
                dv_next = warpgroup_mma(weights, b_ring.index(slot), dv, is_async=True)
                dp = warpgroup_mma_wait(1, [dp])
                ds = gl.convert_layout((p * dp).to(a_ring.dtype), WEIGHTS)
                dk_next = warpgroup_mma(ds, a_ring.index(slot), dk, is_async=True)
                dv, dk = warpgroup_mma_wait(0, [dv_next, dk_next])
                mbarrier.arrive(empty.index(slot), count=1)
            mbarrier.arrive(own_empty.index(WHICH), count=1)
        start += count + other
        phase ^= 1
        store_tile(dv_ptr, strides, tile, tiles, tiles_h, tiles_w, heads, dv, TILE)
        store_tile(dk_ptr, strides, tile, tiles, tiles_h, tiles_w, heads, dk * scale, TILE)


@gluon.jit
def hopper_backward_k_kernel(
    k_desc,
    v_desc,
    q_desc,
    grad_desc,
    statistics_desc,
    dk_ptr,
    dv_ptr,
    entries_ptr,
    starts_ptr,
    common_ptr,
    counts_ptr,
    strides,
    scale,
    capacity,
    groups,
    heads,
    frames,
    tiles,
    tiles_h,
    tiles_w,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
    ACCESS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """dk and dv of all tiles.

    Args:
        k_desc: Descriptors of k, v, q and dout (grad): boxes of one tile, [.., th, tw, WIDTH].
        statistics_desc: 1-D descriptor of [B*H, N, 2, ROWS] fp32: -lse / scale and -delta; a box is one tile's.
        entries_ptr: int32 packed tile origins: for each key tile the query tiles that selected it, common ones first.
        starts_ptr: [B*H*N]: where the list of a tile begins, or None for one every `capacity`.
        common_ptr: [B*H*N/2] int32; counts_ptr: [B*H*N] int32.
        ACCESS: Kinds of the first four descriptors.
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_own = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, ROWS, WIDTH], LAYOUT)
    v_own = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, ROWS, WIDTH], LAYOUT)
    a_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    b_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    statistics_ring = gl.allocate_shared_memory(gl.float32, [STAGES, STATISTICS], statistics_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    own_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    init_ring(full, empty, STAGES)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(own_full.index(i), count=1)
        mbarrier.init(own_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    k_own, v_own, own_full, own_empty, a_ring, b_ring, statistics_ring, full, empty,
                    common_ptr, counts_ptr, dk_ptr, dv_ptr, strides, scale,
                    groups, heads, tiles, tiles_h, tiles_w, TILE, STAGES, OVERLAP, 0,
                ),
            ),
            (
                _consume,
                (
                    k_own, v_own, own_full, own_empty, a_ring, b_ring, statistics_ring, full, empty,
                    common_ptr, counts_ptr, dk_ptr, dv_ptr, strides, scale,
                    groups, heads, tiles, tiles_h, tiles_w, TILE, STAGES, OVERLAP, 1,
                ),
            ),
            (
                produce,
                (
                    None, None, q_desc, grad_desc, statistics_desc, a_ring, b_ring, statistics_ring, full, empty,
                    entries_ptr, starts_ptr, common_ptr, counts_ptr, capacity, groups, heads, frames,
                    tiles, tiles_h, tiles_w, TILE, STAGES, ACCESS,
                ),
            ),
            (
                _bring_tiles,
                (
                    k_desc, v_desc, k_own, v_own, own_full, own_empty, groups, heads, frames,
                    tiles, tiles_h, tiles_w, TILE, ACCESS, 0,
                ),
            ),
            (
                _bring_tiles,
                (
                    k_desc, v_desc, k_own, v_own, own_full, own_empty, groups, heads, frames,
                    tiles, tiles_h, tiles_w, TILE, ACCESS, 1,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [REGISTERS, 24, 24, 24],
    )  # fmt: skip


def backward_k(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    entries: Tensor,
    common: Tensor,
    counts: Tensor,
    dk: Tensor,
    dv: Tensor,
    grid: Triple,
    tile: Triple,
    scale: float,
    *,
    starts: Tensor | None = None,
    stages: int = 5,
    overlap: bool = True,
) -> None:
    """Fill `dk` and `dv`. q, k, v, grad_out, dk, dv: [B, H, S, 128] over one grid of whole tiles.

    dk and dv have the same strides.
    """
    assert dk.stride() == dv.stride()
    batch, heads = q.shape[:2]
    described = [describe(x, grid, tile) for x in (k, v, q, grad_out)]
    flat = statistics.view(-1)
    row = TensorDescriptor(flat, [flat.numel()], [1], [2 * 64], gl.NVMMASharedLayout(0, 32, 1))
    groups = batch * heads * config.num_tiles(grid, tile) // 2
    hopper_backward_k_kernel[(min(groups, programs_on(q.device)),)](
        *(desc for desc, _ in described), row, dk, dv, entries, starts, common, counts,
        dk.stride()[:3], scale, entries.shape[-1], groups, heads, grid[0],
        **common_arguments(tile, grid),
        STAGES=stages,
        OVERLAP=overlap,
        ACCESS=tuple(access for _, access in described),
        REGISTERS=CONSUMER_REGISTERS,
        num_warps=4,
        maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
