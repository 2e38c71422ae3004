"""Say what a video of the small model shows: the colour, shape and motion of its object, from its pixels alone.

No network is asked, so nothing that was trained on the same clips can share the model's mistakes. What is not clear is
left undecided (None) and agrees with no caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from bsa_compile.errors import InputError, must
from bsa_compile.pipelines.small.captions import COLOURS, SHAPES, Caption
from bsa_compile.pipelines.small.clips import distance
from bsa_compile.pipelines.small.objects import Objects, find_objects

_SEEN = 0.6  # share of the frames in which the object must be found
_ONE = 0.7  # share of the frames in which a colour or shape must be the best, and of a colour's votes

# Shapes: masks in polar coordinates about their centroid, in units of the radius of a disc of their area.
_ANGLES, _RADII, _REACH = 96, 24, 1.8
_FIT = 0.74  # intersection over union with its template that a shape needs
_CLEAR = 0.03  # how much the second best template must be behind
_MIDDLE = 0.2  # up to this radius only a ring has a hole

# Motions, in units of the short side.
_STILL = 0.10  # what stays within this does not move
_MOVED = 0.15  # what goes this far does; between the two it is undecided
_STRAIGHT = 0.5  # the way across, as a share of the way along
_ONE_WAY = 0.8  # share of its way along that a shape ends up away from where it began
_TURNING_BACK = 0.3  # of the whole way: less is no reversal
_TURN = np.pi / 3  # in radians
_STEADY = 0.7  # net turn as a share of the turns of all frames
_CORNERS = (3, 4, 5)  # of the shapes that can be seen to turn
_CORNERED = 0.04  # size of that harmonic, as a share of the area


@dataclass(frozen=True)
class Verdict:
    """What a video shows.

    Attributes:
        colour, shape, motion: keys of the tables of captions; None where nothing is found or nothing is sure.
    """

    colour: str | None
    shape: str | None
    motion: str | None

    def agrees(self, caption: Caption) -> dict[str, bool]:
        """Attribute -> whether the video shows it as the caption says; what is undecided does not."""
        return {name: getattr(self, name) == getattr(caption, name) for name in ("colour", "shape", "motion")}


def judge(frames: NDArray[np.uint8]) -> Verdict:
    """Say what a video shows.

    Args:
        frames: `UInt8[ndarray, "t h w 3"]`, sRGB. Below about 90 pixels a side too little is left of a small shape.

    Raises:
        InputError: other than that.
    """
    if not (isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3):
        got = f"{getattr(frames, 'dtype', type(frames).__name__)} {list(getattr(frames, 'shape', ()))}"
        raise InputError(must("frames", "be a uint8 array [t, h, w, 3]", got))
    if 0 in frames.shape:
        raise InputError(must("frames", "hold pixels", str(list(frames.shape))))
    objects = find_objects(frames)
    if len(objects.masks) < _SEEN * objects.looked_at:
        return Verdict(None, None, None)
    centres = _centroids(objects.masks)
    polar = _polar(objects.masks, centres)
    return Verdict(_colour(objects), _shape(polar), _motion(centres / min(objects.masks.shape[1:]), polar))


def _colour(objects: Objects) -> str | None:
    votes = objects.votes.sum(axis=0)
    best = int(votes.argmax())
    in_frames = (objects.votes.argmax(axis=1) == best) & (objects.votes[:, best] > 0)
    # The rim of a small star is a third of it: pixels of unsure colour may be many, but not most.
    if votes[best] < _ONE * votes.sum() or 2 * votes.sum() < objects.masks.sum():
        return None
    return list(COLOURS)[best] if in_frames.mean() >= _ONE else None


def _centroids(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Centres `[n, 2]` (y, x) in pixels."""
    n, y, x = np.nonzero(masks)
    area = np.bincount(n)
    return np.stack([np.bincount(n, weights=at) / area for at in (y, x)], axis=1)


def _polar(masks: NDArray[np.bool_], centres: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Masks `[n, radii, angles]` about their centres; radii in units of their own size."""
    n, height, width = masks.shape
    angle, radius = _polar_grid()
    reach = np.sqrt(masks.sum(axis=(1, 2)) / np.pi)[:, None, None] * radius[:, None]
    y = np.rint(centres[:, 0, None, None] + reach * np.sin(angle)).astype(int)
    x = np.rint(centres[:, 1, None, None] + reach * np.cos(angle)).astype(int)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return masks[np.arange(n)[:, None, None], y.clip(0, height - 1), x.clip(0, width - 1)] & inside


def _polar_grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    angle = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    return angle, (np.arange(_RADII) + 0.5) / _RADII * _REACH


@cache
def _templates() -> NDArray[np.float64]:
    """Every shape as the clips draw it, `[shapes, radii, angles]`, in its own size as `_polar`."""
    side = torch.linspace(-1.1, 1.1, 441)
    cell = float(side[1] - side[0]) ** 2
    angle, radius = (torch.from_numpy(a) for a in _polar_grid())
    drawn = []
    for shape in SHAPES:
        area = float((distance(shape, side[:, None], side) < 0).sum()) * cell
        reach = (area / np.pi) ** 0.5 * radius[:, None]
        drawn.append(distance(shape, reach * angle.cos(), reach * angle.sin()) < 0)
    return torch.stack(drawn).double().numpy()


def _shape(polar: NDArray[np.bool_]) -> str | None:
    """The template with the best intersection over union, each frame at its best angle; mean of the frames."""
    templates = _templates()
    weight = _polar_grid()[1][:, None]  # area of a cell
    # A turn is a shift along the angles, so all of them at once are a correlation.
    ours, theirs = np.fft.rfft(polar * weight), np.fft.rfft(templates)
    both = np.fft.irfft(np.einsum("nrk,srk->nsk", ours, theirs.conj()), n=_ANGLES).max(axis=2)
    union = (polar * weight).sum(axis=(1, 2))[:, None] + (templates * weight).sum(axis=(1, 2)) - both
    scores = both / union  # [n, shapes]
    second, first = np.sort(scores.mean(axis=0))[-2:]
    best = int(scores.mean(axis=0).argmax())
    if first < _FIT or first - second < _CLEAR or (scores.argmax(axis=1) == best).mean() < _ONE:
        return None
    # A disc with a small hole fits a ball well enough, but is none.
    holed = polar[:, _polar_grid()[1] < _MIDDLE].mean() < 0.5
    shape = list(SHAPES)[best]
    return shape if holed == (shape == "ring") else None


def _motion(track: NDArray[np.float64], polar: NDArray[np.bool_]) -> str | None:
    """The motion along a track `[n, 2]` (y, x) in units of the short side."""
    if len(track) < 4:
        return None
    span = np.ptp(track, axis=0)
    if span.max() <= _STILL:
        return "spin" if _turns(polar) else None
    along = int(span.argmax())
    if span[along] < _MOVED or span[1 - along] > _STRAIGHT * span[along]:
        return None
    line = track[:, along]
    reversals = _reversals(line, _TURNING_BACK * span[along])
    if reversals >= 2 and along == 0:
        return "bounce"
    net = line[-1] - line[0]
    if reversals or abs(net) < _ONE_WAY * span[along]:
        return None
    return (("up", "down"), ("left", "right"))[along][int(net > 0)]


def _reversals(line: NDArray[np.float64], least: float) -> int:
    """How often a line turns back by at least so much."""
    count, way, extreme = 0, 0, line[0]
    for value in line[1:]:
        if way == 0:
            if abs(value - line[0]) >= least:
                way, extreme = int(np.sign(value - line[0])), value
        elif (value - extreme) * way > 0:
            extreme = value
        elif (extreme - value) * way >= least:
            count, way, extreme = count + 1, -way, value
    return count


def _turns(polar: NDArray[np.bool_]) -> bool:
    """Whether a shape turns, and one way round: by the phase of the harmonic of as many periods as it has corners."""
    weight = _polar_grid()[1][:, None]
    waves = np.fft.rfft((polar * weight).sum(axis=1))
    sizes = np.abs(waves[:, _CORNERS]).mean(axis=0) / np.abs(waves[:, 0]).mean()
    if sizes.max() < _CORNERED:
        return False
    corners = _CORNERS[int(sizes.argmax())]
    phase = np.angle(waves[:, corners])
    # From frame to frame the shorter way round; in 25 frames that is right up to 2.4 rounds of a star.
    steps = np.angle(np.exp(1j * np.diff(phase))) / corners
    return bool(abs(steps.sum()) >= max(_TURN, _STEADY * np.abs(steps).sum()))
