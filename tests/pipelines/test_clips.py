"""The clips that the small model is trained on."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_compile.pipelines.small.captions import MOTIONS, draw_caption, parse_caption
from bsa_compile.pipelines.small.clips import draw_clip
from bsa_compile.pipelines.small.dataset import ClipDataset


def test_a_clip_is_the_same_in_every_batch():
    clips = ClipDataset("test", 9, 48, 56)
    batch = clips.batch(3, 3)
    assert batch.video.shape == (3, 3, 9, 48, 56)
    one = clips.batch(4, 1)
    assert torch.equal(one.video[0], batch.video[1])
    assert one.captions[0] == batch.captions[1]
    assert not torch.equal(ClipDataset("other", 9, 48, 56).batch(4, 1).video, one.video)


def test_a_window_is_a_piece_of_the_clip():
    window = ClipDataset("test", 9, 48, 56, window=5).batch(0, 4)
    assert window.video.shape == (4, 3, 5, 48, 56)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([(48, 56), (96, 112), (64, 40)]))
def test_shapes_stay_in_the_picture(seed, size):
    rng = random.Random(seed)
    caption = draw_caption(rng)
    video, mask = draw_clip(caption, 9, *size, rng)
    assert video.abs().max() <= 1
    rim = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], dim=1)
    assert (rim > 0.5).float().mean(1).max() < 0.1  # at most a corner of a square leaves it


@pytest.mark.parametrize(("phrase", "turns"), [("slides to the left", False), ("rolls to the left", True)])
def test_what_rolls_turns_and_what_slides_does_not(phrase, turns):
    caption = parse_caption(f"a red star {phrase} over grass")
    _, mask = draw_clip(caption, 25, 96, 112, random.Random(0))
    boxes = []
    for frame in mask > 0.5:
        ys, xs = frame.nonzero().unbind(1)
        boxes.append(frame[ys.min() : ys.min() + 36, xs.min() : xs.min() + 36].float())
    first, later = boxes[0], boxes[8]  # 90 degrees later, no symmetry of a star
    same = (first * later).sum() / torch.maximum(first, later).sum()
    assert (same < 0.75) == turns


@pytest.mark.parametrize("motion", MOTIONS)
def test_shapes_move_as_the_caption_says(motion):
    rng = random.Random(motion)
    caption = draw_caption(rng)
    while caption.motion != motion:
        caption = draw_caption(rng)
    _, mask = draw_clip(caption, 25, 96, 112, rng)
    weight = mask.sum((1, 2))
    y = (mask.sum(2) * torch.arange(96)).sum(1) / weight
    x = (mask.sum(1) * torch.arange(112)).sum(1) / weight
    way_y, way_x = (y[-1] - y[0]).item(), (x[-1] - x[0]).item()
    if motion in ("left", "right"):
        assert abs(way_y) < 8
        assert (way_x if motion == "right" else -way_x) > 30
    elif motion in ("up", "down"):
        assert abs(way_x) < 2
        assert (way_y if motion == "down" else -way_y) > 25
    elif motion == "bounce":
        assert y.max() - y.min() > 25
        assert x.max() - x.min() < 2
    else:
        assert max(y.max() - y.min(), x.max() - x.min()) < 8
