"""Files of images and videos."""

from __future__ import annotations

import math
from collections import deque
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from bsa_compile.errors import UsageError, must, require_extra
from bsa_compile.files import check_writable, staged
from bsa_compile.pipelines.longcat.latents import Frames

FORMATS = (".mp4", ".gif")
BT709 = 1  # its number in H.264's headers, for colour space, primaries and transfer


def check_output(path: str | PathLike[str], name: str = "output") -> Path:
    """Say now whether a video can be written there later.

    Raises:
        UsageError: no format that is known, or nothing can be written there.
    """
    path = check_writable(path, name)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(must(name, f"end in {' or '.join(FORMATS)}", repr(str(path))))
    return path


def write_video(path: str | PathLike[str], frames: Frames, fps: float) -> None:
    """Write H.264 in MP4, or an animated GIF; the file is complete or not there.

    Args:
        path: ends in .mp4 or .gif.
        frames: uint8 `[T, H, W, 3]`.
        fps: frames per second.

    Raises:
        UsageError: the format is unknown, or the sides are odd (MP4).
        MissingExtraError: PyAV is not installed.
    """
    path = check_output(path)
    with staged(path) as folder:
        (_write_gif if path.suffix.lower() == ".gif" else _write_mp4)(folder / path.name, frames, fps)


def _write_mp4(path: Path, frames: Frames, fps: float) -> None:
    from fractions import Fraction

    av: Any = require_extra("av", "longcat")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UsageError(must("frames", "have even sides for MP4", f"{height}x{width}", "Write a GIF."))
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without mbtree: with it x264 reads memory that it never wrote, and the same frames give other files.
        stream.options = {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: Frames, fps: float) -> None:
    """By FFmpeg's filters: one palette for all frames, so that what does not change need not be written again."""
    from fractions import Fraction

    av: Any = require_extra("av", "longcat")
    rate = Fraction(fps).limit_denominator(1001)
    height, width = frames.shape[1:3]
    graph = av.filter.Graph()
    size = f"video_size={width}x{height}:pix_fmt=rgb24:time_base={1 / rate}:pixel_aspect=1/1"
    source, copies, sink = graph.add("buffer", size), graph.add("split"), graph.add("buffersink")
    palette, mapped = graph.add("palettegen"), graph.add("paletteuse")
    source.link_to(copies)
    copies.link_to(mapped, 0, 0)
    copies.link_to(palette, 1, 0)
    palette.link_to(mapped, 0, 1)
    mapped.link_to(sink)
    graph.configure()
    for number, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = number, 1 / rate
        source.push(frame)
    source.push(None)
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for _ in frames:
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode())


def read_image(path: str | PathLike[str]) -> Frames:
    """One image as a video of one frame, upright as its EXIF data says.

    Raises:
        UsageError: it cannot be read.
    """
    require_extra("PIL", "longcat")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None].copy()
    except (OSError, UnidentifiedImageError) as exc:
        raise UsageError(must("image", "be a readable picture", f"{str(path)!r} ({exc})")) from None


def read_video(path: str | PathLike[str], last_seconds: float | None = None) -> tuple[Frames, float]:
    """Frames and frames per second of a video file.

    Args:
        path: any format that FFmpeg reads.
        last_seconds: keep only so much of its end; of a slow video as many frames as one of 30 fps would have there.

    Raises:
        UsageError: it cannot be read, or holds no video.
    """
    av: Any = require_extra("av", "longcat")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UsageError(must("video", "hold a video stream", repr(str(path))))
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            if not fps:
                raise UsageError(must("video", "tell its frames per second", repr(str(path))))
            keep = None if last_seconds is None else math.ceil(last_seconds * max(fps, 30)) + 1
            frames = deque((f.to_ndarray(format="rgb24") for f in container.decode(stream)), maxlen=keep)
    except (OSError, av.error.FFmpegError) as exc:
        raise UsageError(must("video", "be a readable video", f"{str(path)!r} ({exc})")) from None
    if not frames:
        raise UsageError(must("video", "hold at least one frame", repr(str(path))))
    return np.stack(list(frames)), fps


def as_frames(value: Any, name: str) -> Frames:
    """A picture or frames in any common form as uint8 `[T, H, W, 3]`.

    Args:
        value: uint8 array `[H, W, 3]` or `[T, H, W, 3]`, a PIL image, or a list of either.
        name: what to call it in an error.

    Raises:
        UsageError: it is something else.
    """
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    parts = [np.asarray(item.convert("RGB") if hasattr(item, "convert") else item) for item in items]
    parts = [part[None] if part.ndim == 3 else part for part in parts]
    for part in parts:
        if part.ndim != 4 or part.shape[-1] != 3 or part.dtype != np.uint8 or 0 in part.shape:
            want = "hold uint8 frames [T, H, W, 3] or pictures"
            raise UsageError(must(name, want, f"{part.dtype} {list(part.shape)}"))
    if not parts or len({part.shape[1:] for part in parts}) > 1:
        raise UsageError(must(name, "hold frames of one size", [list(part.shape) for part in parts]))
    return np.ascontiguousarray(np.concatenate(parts))
