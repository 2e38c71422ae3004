"""Procedurally drawn clips: coloured shapes that move, turn and bounce over textured backgrounds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_compile.pipelines.small.captions import COLOURS, ROUND, SIZES, Caption

PALETTES = {
    "grass": ((70, 100, 55), (100, 125, 75)),
    "sand": ((185, 165, 125), (205, 187, 150)),
    "water": ((75, 115, 130), (105, 145, 158)),
    "bricks": ((112, 76, 64), (150, 140, 130)),
    "wood": ((105, 78, 55), (135, 104, 78)),
    "stone": ((88, 88, 92), (122, 122, 126)),
}
"""Background -> the two colours between which its texture mixes. Dull, so that no shape's colour is near."""

OFF_CENTRE = 0.1
"""How far from the middle a shape may be on an axis that it does not move along, as a share of the room there."""

WAY = 0.4
"""How far a shape moves in a clip, or how high it bounces, as a share of that side of the picture."""

TURN = 1.5 * math.pi
"""Angle by which a shape that turns or rolls has turned at the end of a clip."""

BOUNCES = 1.5
"""Bounces in a clip."""


def draw_clips(
    captions: Sequence[Caption],
    num_frames: int,
    height: int,
    width: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one clip for each caption.

    Args:
        captions: what to draw; where they leave something open, the seed chooses.
        num_frames: of each clip.
        height, width: in pixels.
        seed: of place, size, speed and texture.
        device: where to draw. Textures differ in their last bits from device to device.

    Returns:
        `Float32[Tensor, "b 3 t h w"]` in [-1, 1].
    """
    rng = random.Random(seed)
    return torch.stack([draw_clip(c, num_frames, height, width, rng, device=device)[0] for c in captions])


def draw_clip(
    caption: Caption,
    num_frames: int,
    height: int,
    width: int,
    rng: random.Random,
    *,
    frames: slice = slice(None),
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw one clip, or some frames of it.

    Args:
        caption, num_frames, height, width, device: as in `draw_clips`.
        rng: chooses what the caption leaves open.
        frames: which of the frames to draw.

    Returns:
        `Float32[Tensor, "3 t h w"]` in [-1, 1], and how much of each pixel the shape covers,
        `Float32[Tensor, "t h w"]`.
    """
    device = torch.device(device)
    low, high = SIZES[caption.size]
    radius = rng.uniform(low, high) * min(height, width)  # in pixels, as all that follows
    time = torch.linspace(0, 1, num_frames, device=device)
    centre, angle = (values[frames] for values in _path(caption, time, radius, height, width, rng))
    ys = torch.arange(height, device=device).view(1, -1, 1) + 0.5
    xs = torch.arange(width, device=device).view(1, 1, -1) + 0.5
    dy, dx = ys - centre[:, 0].view(-1, 1, 1), xs - centre[:, 1].view(-1, 1, 1)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius
    outside = distance(caption.shape, u, v) * radius  # [T, H, W], negative inside
    mask = (0.5 - outside).clamp(0, 1)
    # Lighter at the upper left, darker at the rim: a shape stands out from its background.
    light = 1 - 0.05 * (dx + dy) / radius - 0.25 * (1 + outside / 3).clamp(0, 1)
    colour = _colour(COLOURS[caption.colour], device)
    background = _background(caption.background, time[frames], height, width, rng)
    video = background * (1 - mask) + (colour * light).clamp(0, 1) * mask
    return video * 2 - 1, mask


def _path(
    caption: Caption, time: Tensor, radius: float, height: int, width: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Centres `[T, 2]` (y, x) in pixels and angles `[T]`.

    What no caption tells varies little: shapes start upright, near the middle of the axis they do not move along, all
    move and turn equally fast, one way round, and bounce from the ground. Were all of that free, noise would have to
    settle it, and a model of this size settles it halfway: two places become one wide shape, two angles a shape with
    twice the corners.
    """

    def place(side: int) -> float:
        return side / 2 + rng.uniform(-OFF_CENTRE, OFF_CENTRE) * (side - 2 * radius)

    y, x = (torch.full_like(time, place(side)) for side in (height, width))
    turn = torch.zeros_like(time)
    motion = caption.motion
    if motion in ("left", "right", "up", "down"):
        side = width if motion in ("left", "right") else height
        room = side - 2 * radius
        way = WAY * side
        start = radius + rng.uniform(0.25, 0.75) * (room - way)
        line = start + way * time
        if motion in ("left", "up"):
            line = side - line
        if motion in ("left", "right"):
            x = line
            if caption.rolls:
                turn = (1 if motion == "right" else -1) * TURN * time
        else:
            y = line
    elif motion == "bounce":
        phase = (time * BOUNCES) % 1
        y = height - radius - WAY * height * 4 * phase * (1 - phase)
    else:
        turn = TURN * time
    if caption.shape in ROUND:
        turn = torch.zeros_like(turn)
    return torch.stack([y, x], dim=1), turn


def distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to a shape of radius 1, negative inside; near its rim exact up to a small factor."""
    r = (u.square() + v.square()).sqrt()
    if shape == "ball":
        return r - 0.95
    if shape == "ring":
        return (r - 0.74).abs() - 0.26
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.8
    if shape == "cross":
        arms = [torch.maximum(a.abs() - 1.0, b.abs() - 0.32) for a, b in ((u, v), (v, u))]
        return torch.minimum(*arms)
    corners = {"triangle": 3, "star": 5}[shape]
    step = 2 * math.pi / corners
    # The corner at angle 0 of the sector that the pixel is in; the shape is symmetric about it.
    sector = torch.atan2(v, u)
    local = (sector + step / 2) % step - step / 2
    along, across = r * local.cos(), r * local.sin().abs()
    inner = 0.5 if shape == "triangle" else 0.45
    # The side from the corner (1, 0) to the notch between two corners.
    end = (inner * math.cos(step / 2), inner * math.sin(step / 2))
    edge = (end[0] - 1, end[1])
    length = math.hypot(*edge)
    return ((along - 1) * edge[1] - across * edge[0]) / length


def _background(name: str, time: Tensor, height: int, width: int, rng: random.Random) -> Tensor:
    """`Float32[Tensor, "3 1|t h w"]` in [0, 1], at times `[T]` in [0, 1]."""
    device = time.device
    scale = min(height, width)
    ys = torch.arange(height, device=device).view(1, -1, 1) / scale
    xs = torch.arange(width, device=device).view(1, 1, -1) / scale
    noise = _noise(height, width, rng, device)
    phase = rng.uniform(0, 1)
    if name == "grass":
        mix = 0.5 + 0.5 * noise + 0.25 * torch.sin(2 * math.pi * (14 * xs + 2.0 * noise + phase))
    elif name == "sand":
        mix = 0.5 + 0.5 * torch.sin(2 * math.pi * (6 * ys + 0.8 * noise + phase))
    elif name == "water":
        waves = 5 * ys + 0.35 * torch.sin(4 * xs + phase) + noise + time.view(-1, 1, 1)
        mix = 0.5 + 0.5 * torch.sin(2 * math.pi * waves)
    elif name == "bricks":
        row = (ys * 7 + phase).floor()
        joint_y = ((ys * 7 + phase) % 1 - 0.5).abs()
        joint_x = ((xs * 3.5 + 0.5 * (row % 2)) % 1 - 0.5).abs()
        mix = torch.maximum((joint_y - 0.42) * 12, (joint_x - 0.46) * 24).clamp(0, 1) + 0.15 * noise
    elif name == "wood":
        mix = 0.5 + 0.5 * torch.sin(2 * math.pi * (5 * xs + 1.2 * noise + phase)) * (1 + 0 * ys)
    else:
        mix = 0.5 + 0.9 * noise
    dark, bright = (_colour(c, device) for c in PALETTES[name])
    return dark + (bright - dark) * mix.clamp(0, 1)


def _colour(rgb: tuple[int, int, int], device: torch.device) -> Tensor:
    """`Float32[Tensor, "3 1 1 1"]` in [0, 1], without waiting for the device."""
    return (torch.tensor(rgb).view(3, 1, 1, 1) / 255).to(device, non_blocking=True)


def _noise(height: int, width: int, rng: random.Random, device: torch.device) -> Tensor:
    """Smooth noise `[1, H, W]` of about unit range around 0, of two octaves; drawn on the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    total = torch.zeros(1, height, width, device=device)
    for cells, weight in ((4, 0.6), (9, 0.4)):
        rows = max(2, round(cells * height / min(height, width)))
        columns = max(2, round(cells * width / min(height, width)))
        coarse = torch.rand(1, 1, rows, columns, generator=generator).to(device, non_blocking=True) * 2 - 1
        total += weight * F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
    return total
