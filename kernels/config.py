"""Which path and which block sizes the kernels take. Nothing here is tuned at run time.

Needs neither Triton nor a GPU, so a report can ask for the path of a call that it does not make.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Triple = tuple[int, int, int]

POINTER, BOX_MERGED, BOX_HEADS, BOX_FRAMES = 0, 1, 2, 3  # the constants of the same names in tiles.py


@dataclass(frozen=True)
class Launch:
    """Block sizes and launch options of one attention kernel.

    Attributes:
        block_q: Query rows that a program handles at a time.
        block_k: Keys that a program handles at a time.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline over the inner loop; 1 switches it off.
        max_registers: Cap on the registers of a thread, where that lets one more program run on a multiprocessor.
    """

    block_q: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None


@dataclass(frozen=True)
class BoxPlan:
    """How to read a tensor's tiles as boxes of a tensor descriptor.

    Attributes:
        access: Which dimensions the descriptor has: BOX_MERGED [b*h*t, H, W, D], BOX_HEADS [b*h, t, H, W, D] or
            BOX_FRAMES [h, b*t, H, W, D].
        shape: Extent of each dimension.
        strides: Element stride of each dimension.
        block: Extent of the box that one load brings.
    """

    access: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """The path that a kernel takes and why.

    Attributes:
        name: "gluon" (the kernels written for Hopper), "box" (tensor descriptors read tiles straight from the token
            order) or "pointer".
        reason: One clause for people.
        launch: Block sizes and launch options that go with it; those of "gluon" are fixed.
        plans: With "gluon", how its kernels read q, k, v and, in the backward, grad_out.
    """

    name: str
    reason: str
    launch: Launch
    plans: tuple[BoxPlan, ...] = ()


def volume(tile: Triple) -> int:
    """Positions in a tile."""
    return math.prod(tile)


def tile_counts(grid: Triple, tile: Triple) -> Triple:
    """Tiles along t, h and w, partial ones included."""
    return tuple(-(-size // side) for size, side in zip(grid, tile, strict=True))  # type: ignore[return-value]


def num_tiles(grid: Triple, tile: Triple) -> int:
    """Tiles of a grid, partial ones included."""
    return math.prod(tile_counts(grid, tile))


def divides(grid: Triple, tile: Triple) -> bool:
    """Whether the tile divides the grid, so that no tile is partial."""
    return all(size % side == 0 for size, side in zip(grid, tile, strict=True))


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def has_boxes(device: torch.device) -> bool:
    """Whether tensor descriptors are hardware there. On a CPU, Triton's interpreter emulates them."""
    return device.type != "cuda" or _has_boxes(device.index)


@functools.cache
def _has_boxes(index: int | None) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


@functools.cache
def triton_version() -> str:
    """Version of the installed Triton, whatever its distribution is called; empty if unknown."""
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


GLUON_TRITON = ((3, 6), (3, 7))  # releases whose Gluon compiles the kernels as they were measured


def _why_no_gluon(device: torch.device) -> str:
    """Why the kernels for Hopper do not run on a device; empty if they do."""
    return _why_no_gluon_on(device.index) if device.type == "cuda" else "it needs a CUDA device"


@functools.cache
def _why_no_gluon_on(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or (major, minor) != (9, 0):
        return f"it is written for compute capability 9.0 and this GPU has {major}.{minor}"
    version = triton_version()
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) not in GLUON_TRITON:
        return f"it is checked with triton 3.6 and 3.7, and this is {version or 'unknown'}"
    return ""


def _block(positions: int, largest: int) -> int:
    """Block that covers a tile of `positions` with least waste; a block costs its width and a fixed 32 more."""
    sizes = [b for b in (16, 32, 64, 128) if b <= largest]
    return min(sizes, key=lambda b: (-(-positions // b) * (b + 32), b))


def forward_launch(volume_q: int, volume_k: int, head_dim: int, dtype: torch.dtype, boxes: bool) -> Launch:
    """Preset of the forward kernel, for reading keys and values through boxes or by pointers."""
    if dtype == torch.float32:
        return Launch(_block(volume_q, 32), _block(volume_k, 32), 8, 2)
    block_q = _block(volume_q, 128 if head_dim <= 128 else 64)
    block_k = _block(volume_k, 64 if boxes or head_dim <= 128 else 32)
    warps = 8 if block_q == 128 or head_dim > 128 else 4
    if boxes:
        # 168 registers let three programs of four warps share a multiprocessor: they hide each other's waits. H100,
        # triton 3.6, 64x64, head_dim 128: 4.29 ms with two stages, 4.65 with one, 4.60 with two and no cap.
        return Launch(block_q, block_k, warps, *((2, 168) if warps == 4 and head_dim > 64 else (1, None)))
    return Launch(block_q, block_k, warps, 1 if head_dim > 128 else 2)


def backward_q_launch(volume_q: int, volume_k: int, head_dim: int, dtype: torch.dtype, boxes: bool) -> Launch:
    """Preset of the kernel that computes dq."""
    if dtype == torch.float32:
        return Launch(_block(volume_q, 32), _block(volume_k, 32), 8, 2)
    if head_dim > 128:
        return Launch(_block(volume_q, 64 if boxes else 32), _block(volume_k, 32), 8, 1)
    # H100, triton 3.6, head_dim 128: two stages take 0.8 ms off the backward.
    return Launch(_block(volume_q, 64), _block(volume_k, 64), 4, 2 if boxes and head_dim > 64 else 1)


def backward_k_launch(volume_q: int, volume_k: int, head_dim: int, dtype: torch.dtype, boxes: bool) -> Launch:
    """Preset of the kernel that computes dk and dv."""
    if dtype == torch.float32:
        return Launch(_block(volume_q, 32 if head_dim <= 128 else 16), _block(volume_k, 32), 8, 2)
    if head_dim > 128:
        return Launch(_block(volume_q, 32), _block(volume_k, 32), 8, 1)
    # H100, triton 3.6, head_dim 128: the backward takes 13.9 ms with 4 warps and two stages, 15.7 with one, 27 with 8.
    stages = 2 if boxes and head_dim > 64 else 1
    return Launch(_block(volume_q, 64), _block(volume_k, 64), 4 if boxes or head_dim <= 64 else 8, stages)


@dataclass(frozen=True)
class RowLayout:
    """Where the columns of a score row lie, so that a program reads it coalesced and each thread gets a run of columns.

    A row is `segments` segments of `threads` x `groups` x 4 columns. Thread t has the columns from 4 * groups * t on,
    in groups of 4; the g-th groups of all threads lie together: position (g * threads + t) * 4 + i holds column
    t * 4 * groups + 4 * g + i. So ranks within a row are sums within threads and one scan over threads.

    Attributes:
        threads: Threads of the program that reads a row.
        groups: Groups of 4 columns that a thread holds in registers.
        segments: Segments of a row; with more than one, the row does not stay in registers.
    """

    threads: int
    groups: int
    segments: int = 1

    @property
    def width(self) -> int:
        """Columns of a row, padding included: a multiple of 128."""
        return 4 * self.threads * self.groups * self.segments


SELECT_GROUPS = 16  # 64 scores in the registers of a thread


def row_layout(tiles_k: int) -> RowLayout:
    """Layout of score rows over so many key tiles: the fewest warps that hold a row, or 8 that read it in segments."""
    for threads in (32, 64, 128, 256):
        if tiles_k <= 4 * threads * SELECT_GROUPS:
            return RowLayout(threads, max(1, -(-tiles_k // (4 * threads))))
    return RowLayout(256, SELECT_GROUPS, -(-tiles_k // (4 * 256 * SELECT_GROUPS)))


SCORE_PROGRAMS = 264  # two for each of an H100's multiprocessors


@dataclass(frozen=True)
class ScoreLaunch:
    """Launch of the score kernel.

    Attributes:
        block_q: Query tiles of a program.
        block_k: Key tiles that it takes at a time.
        most_at_once: How many blocks of key tiles it takes at most, one after the other.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline over the blocks of keys.
        gluon: Whether it is the kernel written for Hopper, whose blocks and warps are fixed.
    """

    block_q: int
    block_k: int
    most_at_once: int
    num_warps: int
    num_stages: int
    gluon: bool = False

    def at_once(self, blocks_q: int, blocks_k: int) -> int:
        """Blocks of keys for each program: few enough that there is work for the whole GPU."""
        return max(1, min(self.most_at_once, blocks_k, -(-blocks_q * blocks_k // SCORE_PROGRAMS)))


HOPPER_SCORE = ScoreLaunch(128, 64, 8, 8, 3, gluon=True)


def pool_launch(positions: int, row_bytes: int) -> tuple[int, int]:
    """Preset of the pooling kernel: rows of a tile that are read at once, and warps. A warp holds at most 16 KB."""
    block = _block(positions, 64)
    # H100, triton 3.6, 64 rows of 256 bytes: 134 us for 346 MB with one warp, 136 with two, 142 with four.
    return block, min(8, max(1, next_power_of_two(block * row_bytes) // 2**14))


def score_launch(head_dim: int, device: torch.device) -> ScoreLaunch:
    """Preset of the score kernel."""
    if device.type == "cuda" and 64 < head_dim <= 128 and not _why_no_gluon(device):
        return HOPPER_SCORE
    if has_boxes(device) and head_dim <= 128:
        # H100, triton 3.6, 8 x 1320 x 1320, head_dim 128: 52 us; two stages leave room for one program only, 62.
        return ScoreLaunch(128, 64, 8, 8, 1)
    return ScoreLaunch(64, 32, 8, 4, 1) if head_dim <= 128 else ScoreLaunch(32, 32, 8, 4, 1)


def plan_boxes(x: Tensor, grid: Triple, tile: Triple, layout: str, block: int) -> BoxPlan | str:
    """Plan to read `block` positions of a tile of `x` [B, H, S, D] as one box, or the reason why that cannot be."""
    batch, heads, tokens, head_dim = x.shape
    if not is_power_of_two(head_dim):
        return f"head_dim {head_dim} is not a power of two"
    if head_dim * x.element_size() == 128:
        # Seen on an H100 with triton 3.6: query boxes of head_dim 64 in fp16 and bf16 give wrong scores, while rows of
        # 32, 64, 256 and 512 bytes are right, and so are pointers (tests/gpu holds them to it).
        return "triton 3.6 computes wrongly on boxes with rows of 128 bytes"
    if not all(is_power_of_two(side) for side in tile):
        return f"tile {tile} has a side that is not a power of two"
    if block > volume(tile):
        return f"tile {tile} has fewer than {block} positions"
    if layout == "tile":
        if not divides(grid, tile):
            return f"tile {tile} does not divide grid {grid} and tile order keeps the padding in memory"
        grid, tile = (num_tiles(grid, tile), 1, volume(tile)), (1, 1, volume(tile))
    frames, height, width = grid

    stride_b, stride_h, stride_s, _ = x.stride()
    per_batch = tokens * stride_s
    if heads == 1:
        stride_h = stride_b if batch > 1 else per_batch
    if batch == 1:
        stride_b = heads * stride_h
    heads_merge = heads == 1 or stride_b == heads * stride_h
    whole_frames = frames % tile[0] == 0 or batch * heads == 1
    leading: tuple[int, ...]
    strides: tuple[int, ...]
    if whole_frames and heads_merge and stride_h == per_batch:
        access, leading, strides = BOX_MERGED, (batch * heads * frames,), ()
    elif heads_merge:
        access, leading, strides = BOX_HEADS, (batch * heads, frames), (stride_h,)
    elif stride_b == per_batch and whole_frames:
        access, leading, strides = BOX_FRAMES, (heads, batch * frames), (stride_h,)
    elif stride_b == per_batch:
        return f"tile {tile} does not divide the {frames} frames and the next batch element follows them"
    else:
        return "batch, heads and frames do not merge into the five dimensions of a descriptor"

    strides = (*strides, height * width * stride_s, width * stride_s, stride_s)
    size = x.element_size()
    if x.data_ptr() % 16 or any(stride * size % 16 for stride in strides):
        return "base or strides are not aligned to 16 bytes"
    if not all(0 < stride * size < 2**40 for stride in strides):
        return "a stride is 0 or too large"
    tw = min(tile[2], block)
    th = min(tile[1], block // tw)
    box: tuple[int, ...] = (block // (tw * th), th, tw, head_dim)
    if access != BOX_MERGED:
        box = (1, *box)
    return BoxPlan(access, (*leading, height, width, head_dim), (*strides, 1), box)


GLUON_ROWS = 64  # queries of a consumer, and keys of a block
GLUON_GRID = (1 << 10, 1 << 11, 1 << 10)  # a block's coordinates share an int32
GLUON_MOST_KEYS = 1024  # of a key tile: its blocks' coordinates stay within GLUON_GRID, and `share` unrolls over them
GLUON_LAUNCH = Launch(2 * GLUON_ROWS, 2 * GLUON_ROWS, 12, 3, 168)


def _why_not_shaped(
    q: Tensor, grids: tuple[Triple, Triple], tile_q: Triple, tile_k: Triple, scale: float, layout: str
) -> str:
    """Why the kernels for Hopper do not take a call, but for how they read its tensors; empty if nothing is against."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] != 128:
        return f"it takes head_dim 128, not {q.shape[-1]}"
    if layout != "raster":
        return "it reads raster order"
    if not scale > 1e-30:  # -lse / scale must be finite in fp32
        return f"it takes a positive scale above 1e-30, not {scale}"
    if volume(tile_q) not in (GLUON_ROWS, 2 * GLUON_ROWS):
        return f"it takes query tiles of 64 or 128 positions, not {volume(tile_q)}"
    if volume(tile_k) % GLUON_ROWS or volume(tile_k) > GLUON_MOST_KEYS:
        return f"it takes key tiles of a multiple of 64 positions, {GLUON_MOST_KEYS} at most, not {volume(tile_k)}"
    for name, grid in zip(("query", "key"), grids, strict=True):
        if any(size > limit for size, limit in zip(grid, GLUON_GRID, strict=True)):
            return f"the {name} grid {grid} is beyond {GLUON_GRID}"
    return ""


def _plan_all(
    operands: tuple[tuple[Tensor, Triple, Triple], ...], block: int = GLUON_ROWS
) -> tuple[BoxPlan, ...] | str:
    """How the kernels for Hopper read (tensor, grid, tile), or why one of them cannot be read by boxes of `block`."""
    plans = []
    for x, grid, tile in operands:
        plan = plan_boxes(x, grid, tile, "raster", block)
        if isinstance(plan, str):
            return plan
        plans.append(plan)
    return tuple(plans)


def plan_gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    layout: str,
) -> tuple[BoxPlan, ...] | str:
    """How the forward kernel for Hopper reads q, k and v, or the reason why it does not take the call."""
    why_not = _why_not_shaped(q, ((1, 1, 1), grid_k), tile_q, tile_k, scale, layout)
    # Tiles of 128 are read whole: one product of 128 keys takes 3% less time than two of 64.
    whole = volume(tile_q) == 2 * GLUON_ROWS and volume(tile_k) % (2 * GLUON_ROWS) == 0
    operands = ((q, grid_q, tile_q), (k, grid_k, tile_k), (v, grid_k, tile_k))
    return why_not or _plan_all(operands, 2 * GLUON_ROWS if whole else GLUON_ROWS)


def plan_gluon_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    layout: str,
) -> tuple[BoxPlan, ...] | str:
    """How the backward kernels for Hopper read q, k, v and grad_out, or the reason why they do not take the call."""
    if grad_out.dtype != q.dtype:
        return f"it takes grad_out in the dtype of q, not {str(grad_out.dtype).removeprefix('torch.')}"
    if q.shape[0] * q.shape[1] * num_tiles(grid_q, tile_q) * volume(tile_q) >= 2**30:
        return "the statistics of its rows are beyond int32 coordinates"
    if volume(tile_k) not in (GLUON_ROWS, 2 * GLUON_ROWS):
        return f"it takes key tiles of 64 or 128 positions, not {volume(tile_k)}"
    why_not = _why_not_shaped(q, (grid_q, grid_k), tile_q, tile_k, scale, layout)
    return why_not or _plan_all(
        ((q, grid_q, tile_q), (k, grid_k, tile_k), (v, grid_k, tile_k), (grad_out, grid_q, tile_q))
    )


def _path(
    tensors: tuple[Tensor, Tensor],
    grid: Triple,
    tile: Triple,
    layout: str,
    presets: tuple[Launch, Launch],
    side: str,
    forced: str | None,
) -> Path:
    """Path by which a kernel reads tiles of `tensors` [B, H, S, D], both over the same grid, in its inner loop.

    `presets` are those for boxes and for pointers; `side` names the block size that goes with the tensors.
    """
    boxes, pointers = presets
    if forced == "pointer":
        return Path("pointer", "asked for", pointers)
    if not has_boxes(tensors[0].device):
        return Path("pointer", "the GPU has no tensor memory accelerator (compute capability below 9.0)", pointers)
    if tensors[0].dtype == torch.float32:
        return Path("pointer", "fp32 has no tensor cores here and boxes would cost it registers", pointers)
    for x in tensors:
        plan = plan_boxes(x, grid, tile, layout, getattr(boxes, side))
        if isinstance(plan, str):
            return Path("pointer", plan, pointers)
    return Path("box", "tile sides, head_dim, strides and alignment suit tensor descriptors", boxes)


def forward_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    layout: str,
    *,
    launch: Launch | None = None,
    path: str | None = None,
) -> Path:
    """Path that `attend_forward` takes for these inputs, and the reason. It reads k and v in its inner loop.

    A `launch` or a `path` other than "gluon" asks for the portable kernel.
    """
    why_not = "other launch parameters were asked for" if launch else ""
    if launch is None and path in (None, "gluon"):
        why_not = _why_no_gluon(q.device)
        if not why_not:
            plans = plan_gluon(q, k, v, grid_q, tile_q, grid_k, tile_k, scale, layout)
            if not isinstance(plans, str):
                reason = "Hopper, bf16 or fp16, head_dim 128: neighbouring query tiles load what both selected once"
                return Path("gluon", reason, GLUON_LAUNCH, plans)
            why_not = plans
    args = volume(tile_q), volume(tile_k), q.shape[-1], q.dtype
    presets = launch or forward_launch(*args, True), launch or forward_launch(*args, False)
    found = _path((k, v), grid_k, tile_k, layout, presets, "block_k", path)
    if path in (None, "gluon") and why_not:
        found = replace(found, reason=f"{found.reason}; not the Hopper kernel: {why_not}")
    return found


def backward_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    layout: str,
    *,
    launches: bool = False,
    path: str | None = None,
) -> Path | str:
    """The path "gluon" of `attend_backward`, or why it goes by `backward_q_path` and `backward_k_path`.

    Args:
        launches: Whether launch parameters were asked for, which are those of the portable kernels.
    """
    if launches:
        return "other launch parameters were asked for"
    if path not in (None, "gluon"):
        return f"the path {path!r} was asked for"
    plans = _why_no_gluon(q.device) or plan_gluon_backward(
        q, k, v, grad_out, grid_q, tile_q, grid_k, tile_k, scale, layout
    )
    if isinstance(plans, str):
        return plans
    reason = "Hopper, bf16 or fp16, head_dim 128: neighbouring tiles load what both lists name once"
    return Path("gluon", reason, GLUON_LAUNCH, plans)


def backward_q_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_k: Triple,
    tile_q: Triple,
    tile_k: Triple,
    layout: str,
    *,
    launch: Launch | None = None,
    path: str | None = None,
) -> Path:
    """As `forward_path`, for the kernel that computes dq. It reads k and v in its inner loop."""
    args = volume(tile_q), volume(tile_k), q.shape[-1], q.dtype
    presets = launch or backward_q_launch(*args, True), launch or backward_q_launch(*args, False)
    return _path((k, v), grid_k, tile_k, layout, presets, "block_k", path)


def backward_k_path(
    q: Tensor,
    grad_out: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    tile_k: Triple,
    layout: str,
    *,
    launch: Launch | None = None,
    path: str | None = None,
) -> Path:
    """As `forward_path`, for the kernel that computes dk and dv. It reads q and grad_out in its inner loop."""
    args = volume(tile_q), volume(tile_k), q.shape[-1], q.dtype
    presets = launch or backward_k_launch(*args, True), launch or backward_k_launch(*args, False)
    return _path((q, grad_out), grid_q, tile_q, layout, presets, "block_q", path)
