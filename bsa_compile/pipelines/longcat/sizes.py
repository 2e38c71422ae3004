"""Sizes of videos: what the VAE can take, and what to choose where nothing is said."""

from __future__ import annotations

import math

from bsa_compile.errors import UsageError, must

# Areas that the released model was trained at, and its default shape. Source: the public LongCat-Video code, whose
# tables of resolutions hold sizes of about these areas in multiples of 32 (base) and 64 (refinement).
BASE_AREA, REFINE_AREA = 627**2, 960**2
BASE_MULTIPLE, REFINE_MULTIPLE = 32, 64
DEFAULT_ASPECT = 480 / 832


def check_side(name: str, value: object, multiple: int) -> int:
    """A height or width in pixels that the VAE can take.

    Raises:
        UsageError: it is no positive multiple; the nearest ones are suggested.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(must(name, "be an integer >= 1", repr(value)))
    if value % multiple:
        below = value // multiple * multiple
        near = [str(v) for v in (below, below + multiple) if v > 0]
        raise UsageError(must(name, f"be a multiple of {multiple}", value, f"Nearest: {' or '.join(near)}."))
    return value


def check_frames(name: str, value: object, temporal: int) -> int:
    """A number of frames that the VAE can take: 1 + a multiple of its temporal factor.

    Raises:
        UsageError: it is none; the nearest ones are suggested.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(must(name, "be an integer >= 1", repr(value)))
    if (value - 1) % temporal:
        below = (value - 1) // temporal * temporal + 1
        todo = f"Nearest: {below} or {below + temporal}."
        raise UsageError(must(name, f"be 1 + a multiple of {temporal}", value, todo))
    return value


def latent_frames(num_frames: int, temporal: int) -> int:
    """Latent frames of a video."""
    return 1 + (num_frames - 1) // temporal


def size_for(aspect: float, area: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels of about this aspect (height / width) and area, in multiples."""
    height = max(1, round(math.sqrt(area * aspect) / multiple)) * multiple
    width = max(1, round(math.sqrt(area / aspect) / multiple)) * multiple
    return height, width


def base_size_for(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Size of the base stage whose video is refined to `height` x `width`.

    The ratio of the areas that the model was trained at, and never more than the base stage's own area.
    """
    area = min(height * width * BASE_AREA / REFINE_AREA, BASE_AREA)
    step = math.lcm(BASE_MULTIPLE, multiple)
    if min(height, width) < 8 * step:  # a small video would lose its shape to coarse steps
        step = multiple
    return size_for(height / width, round(area), step)
