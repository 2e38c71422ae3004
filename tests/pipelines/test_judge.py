"""What the judge says of clips whose captions are known, as they are drawn and as a model might draw them."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from bsa_compile.errors import InputError
from bsa_compile.pipelines.longcat.video import write_video
from bsa_compile.pipelines.small.captions import BACKGROUNDS, Caption, sample_captions
from bsa_compile.pipelines.small.clips import _background, draw_clips
from bsa_compile.pipelines.small.judge import Verdict, judge

HEIGHT, WIDTH = 192, 224
FRAMES = 25  # of 49 the judge looks at every second one: the same ones
ATTRIBUTES = ("colour", "shape", "motion")
NOTHING = Verdict(None, None, None)


def as_frames(video):
    """`[3, T, H, W]` in [-1, 1] -> uint8 `[T, H, W, 3]`."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def draw(caption, seed, frames=FRAMES, height=HEIGHT, width=WIDTH):
    return as_frames(draw_clips([caption], frames, height, width, seed=seed)[0])


@cache
def blurred_and_averaged(side):
    """`[side / 4, side]`: a blur of 1.5 pixels and then the mean of every 4, along one side."""
    places = torch.arange(side) + 0.5
    blur = torch.exp(-(places[:, None] - places).square() / (2 * 1.5**2))
    return (blur / blur.sum(dim=1, keepdim=True)).unflatten(0, (-1, 4)).mean(dim=1)


def degrade(frames, rng):
    """Blurred by 1.5 pixels, averaged over 4x4 pixels, with a cast of up to 5%, and noise of 6 levels."""
    height, width = (blurred_and_averaged(side) for side in frames.shape[1:3])
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    x = height @ (x @ width.T) * torch.from_numpy(rng.uniform(0.95, 1.05, (1, 3, 1, 1))).float()
    x = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    noise = rng.standard_normal((4, *x.shape[1:]), dtype=np.float32)  # the same every 4 frames, to save time
    x += 6 * torch.from_numpy(noise[np.arange(len(x)) % 4])
    return x.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).numpy()


def some_captions():
    """140 as they come, and 20 of small objects."""
    small = [dataclasses.replace(caption, size="small") for caption in sample_captions(20, seed=77)]
    return sample_captions(140, seed=11) + small


@pytest.fixture(scope="module")
def judged():
    """(caption, verdict on its clip, verdict on the clip degraded) of every caption."""
    rng = np.random.default_rng(0)
    rows = []
    for seed, caption in enumerate(some_captions()):
        frames = draw(caption, seed)
        rows.append((caption, judge(frames), judge(degrade(frames, rng))))
    return rows


def rates(pairs):
    """Share that agrees: of each attribute, and in all of them."""
    agrees = np.array([list(verdict.agrees(caption).values()) for caption, verdict in pairs])
    return dict(zip([*ATTRIBUTES, "all"], [*agrees.mean(axis=0), agrees.all(axis=1).mean()], strict=True))


def test_drawn_clips_show_what_their_captions_say(judged):
    found = rates([(caption, clean) for caption, clean, _ in judged])
    assert min(found[name] for name in ATTRIBUTES) >= 0.98, found
    assert found["all"] >= 0.97, found


def test_so_do_degraded_clips(judged):
    found = rates([(caption, degraded) for caption, _, degraded in judged])
    assert min(found.values()) >= 0.95, found


def test_what_is_hard_to_see_is_undecided_rather_than_wrong(judged):
    for caption, *verdicts in judged:
        for verdict in verdicts:
            assert all(getattr(verdict, name) in (None, getattr(caption, name)) for name in ATTRIBUTES), caption


def test_shuffled_captions_agree_by_chance(judged):
    captions = [caption for caption, _, _ in judged]
    random.Random(0).shuffle(captions)
    found = rates(list(zip(captions, (clean for _, clean, _ in judged), strict=True)))
    assert all(abs(found[name] - 1 / 6) < 0.08 for name in ATTRIBUTES), found
    assert found["all"] < 0.05


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [("left", "right"), ("right", "left"), ("up", "down"), ("down", "up"), ("bounce", "bounce"), ("spin", "spin")],
)
def test_backwards_motions_are_reversed(motion, backwards):
    for seed, shape in enumerate(("star", "cross", "triangle", "square")):
        frames = draw(Caption("", "red", shape, motion, "sand"), seed)
        assert judge(frames) == Verdict("red", shape, motion)
        assert judge(frames[::-1]) == Verdict("red", shape, backwards)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_background_shows_nothing(background):
    for seed in range(3):
        ground = _background(background, torch.linspace(0, 1, FRAMES), HEIGHT, WIDTH, random.Random(seed))
        frames = as_frames(ground.expand(3, FRAMES, HEIGHT, WIDTH) * 2 - 1)
        assert judge(frames) == NOTHING
        assert judge(degrade(frames, np.random.default_rng(seed))) == NOTHING


@pytest.mark.parametrize("shape", ["ball", "square", "triangle", "star", "ring", "cross"])
def test_what_stays_where_it_is_does_not_move(shape):
    frames = draw(Caption("", "green", shape, "left", "wood", "small"), 3)[:1].repeat(FRAMES, axis=0)
    assert judge(frames) == Verdict("green", shape, None)
    assert judge(degrade(frames, np.random.default_rng(0))) == Verdict("green", shape, None)


def test_a_way_there_and_back_or_across_has_no_direction():
    there = draw(Caption("", "blue", "square", "right", "stone"), 0)
    assert judge(np.concatenate([there, there[::-1]])).motion is None
    right = draw(Caption("", "blue", "ball", "right", "stone", "small"), 5, height=WIDTH, width=WIDTH)
    grounds = np.median(right, axis=0).astype(np.uint8)
    slanted = [
        np.roll(np.where(frame[..., 2:] > 180, frame, grounds), 4 * i - 48, axis=0) for i, frame in enumerate(right)
    ]
    assert judge(np.stack(slanted)).motion is None


def test_what_changes_on_the_way_is_undecided():
    red = draw(Caption("", "red", "ball", "right", "grass"), 1)
    blue = draw(Caption("", "blue", "ball", "right", "grass"), 1)
    star = draw(Caption("", "red", "star", "right", "grass"), 1)
    half = FRAMES // 2
    assert judge(np.concatenate([red[:half], blue[half:]])) == Verdict(None, "ball", "right")
    assert judge(np.concatenate([red[:half], star[half:]])) == Verdict("red", None, "right")


def test_two_objects_are_not_one():
    clips = [draw(Caption("", colour, "ball", "up", "sand", "big"), 2, width=112) for colour in ("red", "white")]
    assert judge(np.concatenate(clips, axis=2)) == NOTHING


def test_an_object_that_is_seldom_there_is_none():
    frames = draw(Caption("", "purple", "cross", "left", "bricks", "small"), 4)
    ground = np.concatenate([frames[0, :, : WIDTH // 2], frames[-1, :, WIDTH // 2 :]], axis=1)
    frames[FRAMES // 2 :] = ground
    assert judge(frames) == NOTHING


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(49, 192, 224), (49, 96, 112), (93, 144, 130), (25, 224, 128), (17, 380, 450)]
)
def test_other_sizes_and_lengths(frames, height, width):
    for seed, caption in enumerate(sample_captions(3, seed=frames)):
        assert all(judge(draw(caption, seed, frames, height, width)).agrees(caption).values()), caption


def test_one_frame_shows_no_motion():
    frames = draw(Caption("", "white", "triangle", "down", "water"), 0)[:1]
    assert judge(frames) == Verdict("white", "triangle", None)


@pytest.mark.parametrize(
    "frames", [np.zeros((5, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), [1]], ids=str
)
def test_what_is_no_video_is_refused(frames):
    with pytest.raises(InputError, match="frames must "):
        judge(frames)


@pytest.fixture
def script():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        import judge_videos
    finally:
        sys.path.remove(folder)
    return judge_videos


def test_the_script_judges_files_with_reports(script, tmp_path, capsys):
    def put(name, caption, prompt):
        write_video(tmp_path / name, draw(caption, 0), 15)
        (tmp_path / name).with_suffix(".json").write_text(json.dumps({"request": {"prompt": prompt}}))

    ball = Caption("", "red", "ball", "left", "grass")
    put("a.mp4", ball, "a red ball moves left over grass")
    put("b.gif", ball, "a red star moves right over grass")
    (tmp_path / "stray.mp4").write_bytes(b"")  # no report: not of the command
    assert script.main([str(tmp_path)]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said[1] == "a.mp4 red ball left a red ball moves left over grass"
    assert said[2] == "b.gif red ball (!) left (!) a red star moves right over grass"
    assert said[3] == "of 2 videos as asked: colour 2, shape 1, motion 1, all three 1"

    put("c.gif", ball, "a dog runs")
    assert script.main(["--json", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert [row["agrees"]["shape"] for row in json.loads(out)] == [True, False]
    assert "c.gif: caption must name a colour" in err
    assert script.main([str(tmp_path / "stray.mp4")]) == 2
    assert "stray.json must be a report" in capsys.readouterr().err
    assert script.main([str(tmp_path / "absent")]) == 2
