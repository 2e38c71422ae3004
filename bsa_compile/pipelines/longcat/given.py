"""What a task starts from: the picture or video that the user gives, and the end of the segment before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bsa_compile.errors import UsageError, must
from bsa_compile.pipelines.longcat.latents import Frames, LatentCodec
from bsa_compile.pipelines.longcat.request import BASE_FPS, TASKS, GenerationRequest, Stage
from bsa_compile.pipelines.longcat.video import as_frames

_GIVEN = {"i2v": "image", "continuation": "video"}


def check_given(task: str, image: Any, video: Any, video_fps: Any) -> Frames | None:
    """What the task starts from, at its own size: uint8 `[T, H, W, 3]`, None for text alone.

    Raises:
        UsageError: something is missing, superfluous or malformed.
    """
    wants = _GIVEN.get(task)
    for name, value in (("image", image), ("video", video)):
        if (value is not None) != (name == wants) and task in TASKS:
            want = f"be given for task {task!r}" if name == wants else f"be left out for task {task!r}"
            raise UsageError(must(name, want, "none" if value is None else "one"))
    if isinstance(video_fps, bool) or not isinstance(video_fps, (int, float)) or not 0 < video_fps < float("inf"):
        raise UsageError(must("video_fps", "be a positive number", repr(video_fps)))
    if wants is None:
        return None
    frames = as_frames(image if wants == "image" else video, wants)
    if wants == "image" and len(frames) != 1:
        raise UsageError(must("image", "be one picture", f"{len(frames)} of them"))
    return frames


def stage_given(
    codec: LatentCodec,
    asked: GenerationRequest,
    stage: Stage,
    given: Frames | None,
    given_fps: float,
    made: Mapping[tuple[str, int], Frames],
) -> Tensor | None:
    """The given frames of one stage.

    Args:
        codec: resizes.
        asked: the request.
        stage: whose frames.
        given: what the user gave, at its own size.
        given_fps: its frames per second.
        made: frames of the stages before, by kind and segment.

    Returns:
        `Float32[Tensor, "1 3 t h w"]` in [-1, 1] at the stage's size, or None.
    """
    count = stage.num_cond_frames
    if not count:
        return None
    if stage.segment:
        frames = made[stage.kind, stage.segment - 1][-count:]
    else:
        assert given is not None
        frames = given
        if asked.task == "continuation":
            factor = count // asked.num_cond_frames
            fps = BASE_FPS * factor
            if factor > 1 and not _has_tail(frames, given_fps, fps, count):
                # The video is too slow: what its base frames show is stretched in time, as the base video is.
                shown = tail(frames, given_fps, BASE_FPS, count // factor)
                pixels = codec.resized(shown, stage.height, stage.width)
                size = (count, stage.height, stage.width)
                return F.interpolate(pixels, size=size, mode="trilinear", align_corners=True)
            frames = tail(frames, given_fps, fps, count)
    return codec.resized(frames, stage.height, stage.width)


def tail(frames: Frames, have_fps: float, want_fps: float, count: int) -> Frames:
    """The last `count` frames of a video at another frame rate.

    Raises:
        UsageError: it is too short.
    """
    if not _has_tail(frames, have_fps, want_fps, count):
        stride = _stride(have_fps, want_fps)
        needed = (count - 1) * stride + 1
        todo = "Give a longer video, or fewer num_cond_frames."
        raise UsageError(must("video", f"have at least {needed} frames at {have_fps:g} fps", len(frames), todo))
    return frames[::-1][:: _stride(have_fps, want_fps)][:count][::-1].copy()


def _has_tail(frames: Frames, have_fps: float, want_fps: float, count: int) -> bool:
    too_slow = have_fps < 0.75 * want_fps and want_fps > BASE_FPS
    return not too_slow and len(frames) >= (count - 1) * _stride(have_fps, want_fps) + 1


def _stride(have_fps: float, want_fps: float) -> int:
    """Source: the public LongCat-Video demos take every n-th frame."""
    return max(1, round(have_fps / want_fps))
