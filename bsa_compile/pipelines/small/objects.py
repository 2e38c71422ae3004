"""Where the object of a clip is: told from its background by colour, pixel by pixel, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from bsa_compile.pipelines.small.captions import COLOURS
from bsa_compile.pipelines.small.clips import PALETTES

FRAMES = 25
"""At most so many frames of a video are looked at: at 49 frames every second one, 8 for the fastest hop."""
SIDE = 96
"""About the short side, in pixels, of what is looked at: larger pictures are averaged down, and their noise with it."""

_BITS = 6  # of each channel that the table of colours keeps
_SHADES = (0.7, 1.1)  # how much darker and lighter than its colour a shape is drawn
_SURE = 70.0  # largest distance, in levels of 255, from a colour to what is still called by its name
_AHEAD = 1.3  # how much farther the second nearest colour must be
_AREA = (
    0.008,
    0.35,
)  # of an object, in squares of the short side: half the smallest star to twice the largest ball
_ALONE = 0.5  # a second piece of this share of the largest one, and nobody knows which is meant


@dataclass(frozen=True)
class Objects:
    """The object in each frame where there is just one.

    Attributes:
        masks: `Bool[ndarray, "n h w"]`.
        votes: `Int64[ndarray, "n colours"]`, pixels of the mask that surely have each of `COLOURS`.
        looked_at: frames that were searched.
    """

    masks: NDArray[np.bool_]
    votes: NDArray[np.int64]
    looked_at: int


def find_objects(frames: NDArray[np.uint8]) -> Objects:
    """Find the largest connected piece that is no background, frame by frame.

    Args:
        frames: `UInt8[ndarray, "t h w 3"]`, sRGB.
    """
    picks = np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int)
    names = _colour_table()[_table_index(_shrink(frames[picks]))]
    labels = _components(names > 0)
    masks, votes = [], []
    low, high = (area * min(names.shape[1:]) ** 2 for area in _AREA)
    for label, name in zip(labels, names, strict=True):
        found, sizes = np.unique(label[label > 0], return_counts=True)
        if not sizes.size:
            continue
        first, second = sorted([0, *sizes])[:-3:-1]
        if low <= first <= high and second < _ALONE * first:
            mask = label == found[sizes.argmax()]
            masks.append(mask)
            votes.append(np.bincount(name[mask], minlength=len(COLOURS) + 2)[1 : len(COLOURS) + 1])
    return Objects(
        masks=np.array(masks, dtype=bool).reshape(-1, *names.shape[1:]),
        votes=np.array(votes, dtype=np.int64).reshape(-1, len(COLOURS)),
        looked_at=len(picks),
    )


def _shrink(frames: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Average squares of pixels, so that the short side is about `SIDE`."""
    factor = max(1, round(min(frames.shape[1:3]) / SIDE))
    height, width = (side // factor * factor for side in frames.shape[1:3])
    total = np.zeros((len(frames), height // factor, width // factor, 3), dtype=np.uint32)
    for y in range(factor):
        for x in range(factor):
            total += frames[:, y:height:factor, x:width:factor]
    return (total // factor**2).astype(np.uint16)


def _table_index(pixels: NDArray[np.uint16]) -> NDArray[np.int32]:
    red, green, blue = (pixels[..., i].astype(np.int32) >> (8 - _BITS) for i in range(3))
    return (red << 2 * _BITS) | (green << _BITS) | blue


@cache
def _colour_table() -> NDArray[np.uint8]:
    """What every colour is: 0 background, 1 + i the i-th of `COLOURS`, the last one foreground of unsure colour.

    A shape's colour is a ray from black, of the shades that the light gives it; a background is the line between its
    two colours. The nearer one wins, so the mixed colours at a rim fall to either side, and an error of all colours
    (a cast, a haze) has to be half as large as the way between the two before it counts.
    """
    levels = (np.arange(1 << _BITS, dtype=np.float32) + 0.5) * 2 ** (8 - _BITS)
    points = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    shapes = np.stack([_to_segment(points, *(np.multiply(s, c) for s in _SHADES)) for c in COLOURS.values()])
    grounds = np.min([_to_segment(points, *map(np.array, pair)) for pair in PALETTES.values()], axis=0)
    nearest, second = np.sort(shapes, axis=0)[:2]
    names = 1 + shapes.argmin(axis=0)
    names[(nearest > _SURE) | (second < _AHEAD * nearest)] = len(COLOURS) + 1
    names[nearest >= grounds] = 0
    return names.astype(np.uint8)


def _to_segment(
    points: NDArray[np.float32], start: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Distances `[n]` of points `[n, 3]` to a segment."""
    way = (end - start).astype(np.float32)
    share = ((points - start.astype(np.float32)) @ way / (way @ way)).clip(0, 1)
    return np.linalg.norm(points - start.astype(np.float32) - share[:, None] * way, axis=1)


def _components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Label the connected pieces of every frame, by rows and columns.

    All pixels of a run in a row take the run's largest label, then the same by columns, until nothing changes: a
    few rounds for shapes such as those of the clips.

    Args:
        mask: `Bool[ndarray, "n h w"]`.

    Returns:
        `Int32[ndarray, "n h w"]`, 0 outside; no label is in two frames.
    """
    labels = np.zeros(mask.shape, dtype=np.int32)
    where = np.nonzero(mask)
    if not where[0].size:
        return labels
    n, y, x = where
    rows = _runs((n * mask.shape[1] + y), x)
    order = np.lexsort((y, x, n))  # column after column
    columns = _runs((n * mask.shape[2] + x)[order], y[order])
    values = np.arange(1, n.size + 1, dtype=np.int32)
    while True:
        before = values
        values = _largest_of_run(values, rows)
        values[order] = _largest_of_run(values[order], columns)
        if np.array_equal(values, before):
            labels[where] = values
            return labels


def _runs(line: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where runs start among pixels that are sorted by line, and by place in it."""
    starts = np.ones(line.size, dtype=bool)
    starts[1:] = (np.diff(line) != 0) | (np.diff(place) != 1)
    return np.flatnonzero(starts)


def _largest_of_run(values: NDArray[np.int32], starts: NDArray[np.int64]) -> NDArray[np.int32]:
    lengths = np.diff(starts, append=values.size)
    return np.repeat(np.maximum.reduceat(values, starts), lengths)
