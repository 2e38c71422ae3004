"""The clips that the small model is trained on."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_compile.pipelines.small.captions import MOTIONS, draw_caption
from bsa_compile.pipelines.small.clips import draw_clip
from bsa_compile.pipelines.small.dataset import ClipDataset


def test_a_clip_is_the_same_in_every_batch():
    clips = ClipDataset("test", 9, 48, 56)
    batch = clips.batch(3, 3)
    assert batch.video.shape == (3, 3, 9, 48, 56)
    assert batch.cover.shape == (3, 3, 12, 14)
    one = clips.batch(4, 1)
    assert torch.equal(one.video[0], batch.video[1])
    assert one.captions[0] == batch.captions[1]
    assert not torch.equal(ClipDataset("other", 9, 48, 56).batch(4, 1).video, one.video)


def test_a_window_is_a_piece_of_the_clip():
    window = ClipDataset("test", 9, 48, 56, window=5).batch(0, 4)
    assert window.video.shape == (4, 3, 5, 48, 56)
    assert window.cover.shape[1] == 2


def test_cover_tells_where_the_shape_is():
    batch = ClipDataset("test", 5, 48, 56).batch(0, 8)
    assert batch.cover.min() >= 0
    assert batch.cover.max() <= 1
    assert (batch.cover.flatten(2).amax(-1) == 1).all()  # in every latent frame some latent lies within the shape


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([(48, 56), (96, 112), (64, 40)]))
def test_shapes_stay_in_the_picture(seed, size):
    rng = random.Random(seed)
    caption = draw_caption(rng)
    video, mask = draw_clip(caption, 9, *size, rng)
    assert video.abs().max() <= 1
    rim = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], dim=1)
    assert (rim > 0.5).float().mean(1).max() < 0.1  # at most a corner of a square leaves it


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
