"""What the attention kernels share: from a tile and a position in it to tokens, reads and writes of rows, the dot.

Tiles are numbered in raster order of their (t, h, w) coordinates and positions inside a tile in raster order of the
full tile. A tile that sticks out of the grid has positions without a token: `valid` is false there. `grid` and `TILE`
are (t, h, w) tuples; TILED says that the token axis is in padded tile order instead of raster order; ALIGN is a number
of elements that all strides are known to be multiples of.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter computes a bf16 dot wrongly (triton 3.6 to 3.9), so operands are widened there.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# How a kernel reaches a tensor: by pointers, or by a tensor descriptor (see `config.BoxPlan`).
POINTER = tl.constexpr(0)
BOX_MERGED = tl.constexpr(1)
BOX_HEADS = tl.constexpr(2)
BOX_FRAMES = tl.constexpr(3)


@triton.jit
def dot(a, b, acc=None):
    """`acc + a @ b` in fp32; fp32 operands are never rounded to tf32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def parts(TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks that cover a tile."""
    return (TILE[0] * TILE[1] * TILE[2] + BLOCK - 1) // BLOCK


@triton.jit
def tile_origin(tile, grid, TILE: tl.constexpr):
    """Grid coordinates (t, h, w) of the first position of `tile`."""
    tiles_h = (grid[1] + TILE[1] - 1) // TILE[1]
    tiles_w = (grid[2] + TILE[2] - 1) // TILE[2]
    plane = tile // tiles_w
    return (plane // tiles_h) * TILE[0], (plane % tiles_h) * TILE[1], (tile % tiles_w) * TILE[2]


@triton.jit
def tile_tokens(tile, position, grid, TILE: tl.constexpr, TILED: tl.constexpr):
    """Where the tokens of a tile lie along the token axis.

    Args:
        tile: Tile number, a scalar.
        position: int32 positions inside the tile; those beyond the tile's volume are invalid.

    Returns:
        (origin, offset, valid): the token of `position` is `origin + offset`. `origin` is an int64 scalar and `offset`
        an int64 tensor that does not depend on `tile`, so the compiler can hoist it out of a loop over tiles.
    """
    t0, h0, w0 = tile_origin(tile, grid, TILE)
    it = position // (TILE[1] * TILE[2])
    ih = position // TILE[2] % TILE[1]
    iw = position % TILE[2]
    valid = (it < TILE[0]) & (t0 + it < grid[0]) & (h0 + ih < grid[1]) & (w0 + iw < grid[2])
    if TILED:
        origin = tile.to(tl.int64) * (TILE[0] * TILE[1] * TILE[2])
        offset = position.to(tl.int64)
    else:
        origin = (t0.to(tl.int64) * grid[1] + h0) * grid[2] + w0
        offset = (it.to(tl.int64) * grid[1] + ih) * grid[2] + iw
    return origin, offset, valid


@triton.jit
def head_pointer(pointer, strides, batch, head, ALIGN: tl.constexpr):
    """Pointer to the first row of a head; strides are those of (batch, head, token)."""
    return pointer + tl.multiple_of(batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1], ALIGN)


@triton.jit
def row_pointers(pointer, stride, origin, offset, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the rows `origin + offset`; rows start at multiples of ALIGN elements.  [rows, BLOCK_D]"""
    offset = tl.multiple_of(offset * stride, ALIGN)
    return (pointer + tl.multiple_of(origin * stride, ALIGN)) + (offset[:, None] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_rows(
    pointer,
    stride,
    origin,
    offset,
    valid,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Rows `origin + offset`, zero where `valid` is false and beyond HEAD_DIM.  [rows, BLOCK_D]"""
    pointers = row_pointers(pointer, stride, origin, offset, BLOCK_D, ALIGN)
    inside = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if MASKED:
        if BLOCK_D == HEAD_DIM:
            rows = tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            rows = tl.load(pointers, mask=valid[:, None] & inside, other=0.0)
    else:
        rows = tl.load(pointers) if BLOCK_D == HEAD_DIM else tl.load(pointers, mask=inside, other=0.0)
    return rows


@triton.jit
def box_coordinates(
    batch, head, heads, tile, start, grid, TILE: tl.constexpr, TILED: tl.constexpr, ACCESS: tl.constexpr
):
    """Where position `start` of a tile lies in a tensor descriptor made from a `config.BoxPlan`."""
    t, h, w = tile_origin(tile, grid, TILE)
    frames = grid[0]
    if TILED:
        tiles_t = (grid[0] + TILE[0] - 1) // TILE[0]
        tiles_h = (grid[1] + TILE[1] - 1) // TILE[1]
        tiles_w = (grid[2] + TILE[2] - 1) // TILE[2]
        frames = tiles_t * tiles_h * tiles_w
        t = tile
        h = 0
        w = start
    else:
        t += start // (TILE[1] * TILE[2])
        h += start // TILE[2] % TILE[1]
        w += start % TILE[2]
    if ACCESS == BOX_MERGED:
        coordinates = (batch * heads + head) * frames + t, h, w, 0
    elif ACCESS == BOX_HEADS:
        coordinates = batch * heads + head, t, h, w, 0  # type: ignore[assignment]
    else:
        coordinates = head, batch * frames + t, h, w, 0  # type: ignore[assignment]
    return coordinates


@triton.jit
def load_block(
    source,
    stride,
    batch,
    head,
    heads,
    tile,
    start,
    origin,
    offset,
    valid,
    grid,
    TILE: tl.constexpr,
    TILED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """BLOCK positions of a tile from position `start` on, zero where there is no token.  [BLOCK, BLOCK_D]

    `source` is a pointer to the first row of the head, or a tensor descriptor, as ACCESS says.
    """
    if ACCESS == POINTER:
        block = load_rows(source, stride, origin, offset, valid, MASKED, HEAD_DIM, BLOCK_D, ALIGN)
    else:
        at = box_coordinates(batch, head, heads, tile, start, grid, TILE, TILED, ACCESS)
        block = source.load(at).reshape([BLOCK, BLOCK_D])
    return block


@triton.jit
def store_block(
    target,
    stride,
    batch,
    head,
    heads,
    tile,
    start,
    position,
    origin,
    offset,
    valid,
    rows,
    grid,
    TILE: tl.constexpr,
    TILED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """Write fp32 `rows` to the tokens of a tile, cast; positions of a padded tile order without a token get 0.

    `target` is as `source` in `load_block`.
    """
    if ACCESS == POINTER:
        keep = valid
        if TILED:
            keep = position < TILE[0] * TILE[1] * TILE[2]
            rows = tl.where(valid[:, None], rows, 0.0)
        mask = keep[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        pointers = row_pointers(target, stride, origin, offset, BLOCK_D, ALIGN)
        tl.store(pointers, rows.to(target.dtype.element_ty), mask=mask)
    else:
        at = box_coordinates(batch, head, heads, tile, start, grid, TILE, TILED, ACCESS)
        target.store(at, rows.to(target.dtype).reshape(target.block_shape))
