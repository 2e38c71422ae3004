"""Pictures of block masks. Needs matplotlib (`pip install 'bsa-compile[viz]'`); its global state is left alone."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import Any

from .errors import UsageError, must, require_extra
from .files import write_bytes
from .grid import num_tiles, num_tokens, tile_counts
from .selection import BlockSelection

_PAPER, _INK, _LINE = "#f4f6fa", "#16437e", "#b9c3d4"
_PANEL_INCHES = 3.6
_MAX_TICKS = 8


def block_mask_figure(
    selection: BlockSelection,
    *,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    title: str = "",
    batch: int = 0,
) -> Any:
    """Draw which key tiles each query tile attends to, one panel per head.

    Tiles are numbered in raster order; thin lines part the tiles of different latent frames.

    Args:
        selection: `[B, H, Nq, Nk]` of tile pairs.
        grid_q, tile_q, grid_k, tile_k: what the tiles are tiles of.
        title: put before grid, tile and the kept share in the heading.
        batch: which element of the batch.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the selection does not belong to these grids and tiles.
    """
    require_extra("matplotlib", "viz")
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    heads, rows = selection.kv_num_blocks.shape[1:]
    sizes = (num_tiles(grid_q, tile_q), num_tiles(grid_k, tile_k))
    if (rows, selection.num_kv_tiles) != sizes:
        got = f"{rows} x {selection.num_kv_tiles}"
        raise UsageError(must("selection", f"have {sizes[0]} x {sizes[1]} tiles for these grids", got))
    if not 0 <= batch < selection.kv_num_blocks.shape[0]:
        raise UsageError(must("batch", f"lie in [0, {selection.kv_num_blocks.shape[0]})", batch))
    one = BlockSelection(selection.kv_num_blocks[batch, None], selection.kv_indices[batch, None], sizes[1])
    masks = one.to_dense()[0].cpu()

    widest = 4 if heads <= 16 else math.ceil(math.sqrt(heads))
    lines = math.ceil(heads / widest)
    columns = math.ceil(heads / lines)
    aspect = min(2.0, max(0.5, sizes[0] / sizes[1]))
    width = max(columns * _PANEL_INCHES, 6.4)
    figure = Figure(
        figsize=(width, lines * (_PANEL_INCHES * aspect + 0.3) + 0.9), layout="compressed", facecolor="white"
    )
    colours = LinearSegmentedColormap.from_list("bsa_block_mask", [_PAPER, _INK])
    panels = figure.subplots(lines, columns, squeeze=False)
    for head, axes in enumerate(panels.flat):
        if head >= heads:
            axes.set_axis_off()
            continue
        mask = masks[head]
        axes.imshow(mask.float().numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation_stage="data")
        _mark_frames(axes.xaxis, axes.axvline, grid_k, tile_k)
        _mark_frames(axes.yaxis, axes.axhline, grid_q, tile_q)
        axes.set_box_aspect(aspect)
        axes.set_title(f"head {head}: {_share(mask)} kept", fontsize=9, color=_INK)
        first, last = head % columns == 0, head + columns >= heads
        axes.set_ylabel(f"{sizes[0]:,} query tiles" if first else "", fontsize=8)
        axes.set_xlabel(f"{sizes[1]:,} key tiles" if last else "", fontsize=8)
        axes.tick_params(length=0, labelsize=7, labelleft=first, labelbottom=last)
        for spine in axes.spines.values():
            spine.set_color(_LINE)
    figure.suptitle(_heading(title, grid_q, tile_q, grid_k, tile_k, _share(masks)), fontsize=10)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.15)
    write_bytes(path, buffer.getvalue())


def _share(mask: Any) -> str:
    return f"{100 * float(mask.float().mean()):.2f}%"


def _heading(
    title: str,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    kept: str,
) -> str:
    def times(shape: Sequence[int]) -> str:
        return "x".join(map(str, shape))

    grids, tiles = f"grid {times(grid_q)}", f"tile {times(tile_q)}"
    tokens = f"{num_tokens(grid_q):,} tokens"
    if tuple(grid_k) != tuple(grid_q):
        grids, tokens = f"{grids} over {times(grid_k)}", f"{tokens} over {num_tokens(grid_k):,}"
    if tuple(tile_k) != tuple(tile_q):
        tiles = f"{tiles} over {times(tile_k)}"
    second = f"{grids} ({tokens}), {tiles}: {kept} of tile pairs kept"
    return f"{title}\n{second}" if title else second


def _mark_frames(axis: Any, draw_line: Any, grid: Sequence[int], tile: Sequence[int]) -> None:
    """Part the latent frames by lines, and name them on the axis."""
    slabs, high, wide = tile_counts(grid, tile)
    per_slab = high * wide
    for slab in range(1, slabs):
        draw_line(slab * per_slab - 0.5, color=_LINE, linewidth=0.6)
    shown = range(0, slabs, math.ceil(slabs / _MAX_TICKS))
    names = []
    for slab in shown:
        first, last = slab * tile[0], min(grid[0], (slab + 1) * tile[0]) - 1
        names.append(f"t {first}" if first == last else f"t {first}-{last}")
    axis.set_ticks([(slab + 0.5) * per_slab - 0.5 for slab in shown], names)
