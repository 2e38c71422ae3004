"""Files of videos and pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bsa_compile.errors import UsageError
from bsa_compile.pipelines.longcat import video as files

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clip():
    """Smooth and colourful, so that a lossy codec keeps it."""
    t, y, x = np.meshgrid(np.arange(12), np.linspace(0, 1, 48), np.linspace(0, 1, 64), indexing="ij")
    return (np.stack([x, y, (t / 11)], axis=-1) * 255).astype(np.uint8)


@pytest.mark.parametrize("fps", [15, 30])
def test_mp4_is_h264_with_frames_and_colours_kept(tmp_path, clip, fps):
    import av

    path = tmp_path / "made" / "out.mp4"
    files.write_video(path, clip, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.colorspace == files.BT709
    frames, read_fps = files.read_video(path)
    assert read_fps == fps
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(int) - clip).mean() < 6
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]


def test_the_same_frames_give_the_same_file_whatever_memory_held_before(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from bsa_compile.pipelines.longcat.video import write_video\n"
        "y, x = np.mgrid[:96, :112]\n"
        "disc = lambda t: 40 * ((x - 30 - t) ** 2 + (y - 48) ** 2 < 400)\n"
        "frames = [(x + 3 * t) * (y // 8 + 1) + disc(t) for t in range(30)]\n"
        "write_video(sys.argv[1], np.stack([np.stack([f % 256] * 3, -1) for f in frames]).astype(np.uint8), 15)\n"
    )
    written = []
    for filling in ("0", "85"):  # glibc fills memory that is allocated with it
        path = tmp_path / f"{filling}.mp4"
        command = [sys.executable, "-c", code, str(path)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "MALLOC_PERTURB_": filling}, check=True, timeout=120)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_gif_lasts_as_long_as_the_video(tmp_path, clip):
    files.write_video(tmp_path / "out.gif", clip, 15)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == len(clip)
        total = 0
        for index in range(gif.n_frames):
            gif.seek(index)
            total += gif.info["duration"]
    assert total == pytest.approx(1000 * len(clip) / 15, abs=10)


def test_gif_keeps_colours_and_writes_what_does_not_change_once(tmp_path):
    frames = np.full((20, 64, 64, 3), (220, 30, 40), np.uint8)
    frames[:, 20:40, 20:40] = (10, 200, 90)
    files.write_video(tmp_path / "out.gif", frames, 15)
    read, _ = files.read_video(tmp_path / "out.gif")
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).max() <= 2
    one = tmp_path / "one.gif"
    files.write_video(one, frames[:1], 15)
    assert (tmp_path / "out.gif").stat().st_size < 3 * one.stat().st_size


def test_what_fails_leaves_the_old_file(tmp_path, clip):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="even sides"):
        files.write_video(path, clip[:, :47], 15)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("name", ["out.avi", "out"])
def test_other_formats_are_refused(tmp_path, clip, name):
    with pytest.raises(UsageError, match=r"end in .mp4 or .gif"):
        files.write_video(tmp_path / name, clip, 15)


def test_the_end_of_a_video_is_enough(tmp_path, clip):
    files.write_video(tmp_path / "out.mp4", clip, 30)
    frames, _ = files.read_video(tmp_path / "out.mp4", last_seconds=0.1)
    assert len(frames) == 4


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    for read in (files.read_video, files.read_image):
        for name in ("x.mp4", "absent"):
            with pytest.raises(UsageError, match="must be a readable"):
                read(tmp_path / name)


def test_frames_come_in_many_forms(clip):
    pictures = [Image.fromarray(frame) for frame in clip]
    for form in (clip, list(clip), pictures):
        assert np.array_equal(files.as_frames(form, "video"), clip)
    assert files.as_frames(pictures[0], "image").shape == (1, 48, 64, 3)
    with pytest.raises(UsageError, match="one size"):
        files.as_frames([clip[0], clip[0, :40]], "video")
