"""What one call asks for, validated before anything runs, and the stages that it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsa_compile.errors import UsageError, must
from bsa_compile.pipelines.longcat import sizes
from bsa_compile.pipelines.longcat.defaults import GenerationDefaults
from bsa_compile.pipelines.longcat.loading import DISTILL_LORA, REFINE_LORA, check_folder, vae_factors

TASKS = ("t2v", "i2v", "continuation")
BASE_FPS, FULL_FPS = 15, 30
"""Frames per second of the base stage, and of a refinement in space and time. Source: the public LongCat-Video code."""

COND_FRAMES = 13


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video. See `LongCatPipeline.prepare` for the fields; here all of them have values.

    Attributes:
        base_height, base_width: pixels of the base stage; those of the result without a refinement.
    """

    task: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    base_height: int
    base_width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    refine: bool
    refine_steps: int
    distill: bool
    fps: int
    num_segments: int
    num_cond_frames: int

    @property
    def guided(self) -> bool:
        """Whether every step also predicts without the prompt."""
        return self.guidance_scale > 1

    @property
    def frame_factor(self) -> int:
        """Frames of the result per frame of the base stage."""
        return self.fps // BASE_FPS

    @property
    def loras(self) -> list[str]:
        """LoRAs of the model's folder that the stages need."""
        return [DISTILL_LORA] * self.distill + [REFINE_LORA] * self.refine

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Stage:
    """One run over denoising steps.

    Attributes:
        name: for people.
        kind: `base` or `refine`.
        segment: of a long video, from 0.
        height, width: pixels.
        num_frames: of the segment at the stage's frame rate, the given ones included.
        num_cond_frames: given ones.
        lora: of the model's folder, or None.
    """

    name: str
    kind: str
    segment: int
    height: int
    width: int
    num_frames: int
    num_cond_frames: int
    lora: str | None

    @property
    def size(self) -> str:
        """Frames and pixels, for people."""
        return f"{self.num_frames} frames of {self.height}x{self.width}"


def plan(request: GenerationRequest) -> list[Stage]:
    """The stages in the order in which they run: all segments at base size, then all refined."""
    stages = []
    for kind in ("base", "refine") if request.refine else ("base",):
        base = kind == "base"
        factor = 1 if base else request.frame_factor
        for segment in range(request.num_segments):
            given = {"t2v": 0, "i2v": 1, "continuation": request.num_cond_frames * factor}[request.task]
            stages.append(
                Stage(
                    name=kind if request.num_segments == 1 else f"{kind} {segment + 1}/{request.num_segments}",
                    kind=kind,
                    segment=segment,
                    height=request.base_height if base else request.height,
                    width=request.base_width if base else request.width,
                    num_frames=request.num_frames * factor,
                    num_cond_frames=request.num_cond_frames * factor if segment else given,
                    lora=(DISTILL_LORA if request.distill else None) if base else REFINE_LORA,
                )
            )
    return stages


def request_for(folder: Path, *, aspect: float | None = None, **options: Any) -> GenerationRequest:
    """Validate a call against a model's folder, before minutes of loading its weights.

    Args:
        folder: LongCat-Video's, or another in its layout.
        aspect, options: as in `make_request`.

    Raises:
        MissingExtraError, CheckpointError: a library or a file of the folder is missing or malformed.
        UsageError: an argument is out of range, or two of them do not fit each other.
    """
    check_folder(folder)
    spatial, temporal = vae_factors(folder)
    defaults = GenerationDefaults.from_folder(folder)
    return make_request(spatial=spatial, temporal=temporal, aspect=aspect, defaults=defaults, **options)


def make_request(
    *,
    spatial: int,
    temporal: int,
    aspect: float | None,
    defaults: GenerationDefaults,
    prompt: Any,
    negative_prompt: Any = "",
    task: str = "t2v",
    height: int | None = None,
    width: int | None = None,
    base_size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    refine: bool = False,
    refine_steps: int | None = None,
    distill: bool = False,
    fps: int | None = None,
    num_segments: int = 1,
    num_cond_frames: int | None = None,
) -> GenerationRequest:
    """Validate a call and fill in what it leaves open.

    Args:
        spatial, temporal: pixels and frames per latent.
        aspect: height / width of what is given to the task, None for text alone.
        defaults: the model's, for what is left out.
        others: as in `LongCatPipeline.prepare`.

    Raises:
        UsageError: an argument is out of range, or two of them do not fit each other.
    """
    if task not in TASKS:
        raise UsageError(must("task", f"be one of {', '.join(TASKS)}", repr(task)))
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise UsageError(must(name, "be a text", type(text).__name__))
    if not prompt.strip():
        raise UsageError(must("prompt", "say something", repr(prompt)))
    for name, flag in (("refine", refine), ("distill", distill)):
        if not isinstance(flag, bool):
            raise UsageError(must(name, "be True or False", repr(flag)))
    num_frames = defaults.num_frames if num_frames is None else num_frames
    num_cond_frames = COND_FRAMES if num_cond_frames is None else num_cond_frames
    refine_steps = defaults.refine_steps if refine_steps is None else refine_steps
    default_steps = defaults.distilled_steps if distill else defaults.num_inference_steps
    steps = default_steps if num_inference_steps is None else num_inference_steps
    for name, value in (
        ("num_inference_steps", steps),
        ("refine_steps", refine_steps),
        ("num_segments", num_segments),
    ):
        _integer(name, value, 1)
    if _integer("seed", seed, 0) >= 2**63:
        raise UsageError(must("seed", "be below 2**63", seed))
    sizes.check_frames("num_frames", num_frames, temporal)
    if task == "continuation" or num_segments > 1:
        sizes.check_frames("num_cond_frames", num_cond_frames, temporal)
        if num_cond_frames >= num_frames:
            raise UsageError(must("num_cond_frames", f"be below num_frames ({num_frames})", num_cond_frames))
    if task == "i2v" and num_frames == 1:
        raise UsageError(must("num_frames", f"be at least {1 + temporal} for i2v", num_frames))
    if distill and guidance_scale not in (None, 1, 1.0):
        todo = "The distilled model runs without guidance."
        raise UsageError(must("guidance_scale", "be left out with distill", guidance_scale, todo))
    guidance = (1.0 if distill else defaults.guidance_scale) if guidance_scale is None else guidance_scale
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
        raise UsageError(must("guidance_scale", "be a finite number", repr(guidance)))
    if guidance < 0:
        raise UsageError(must("guidance_scale", "be at least 0", guidance))
    fps = BASE_FPS if fps is None else fps
    if fps not in ((BASE_FPS, FULL_FPS) if refine else (BASE_FPS,)):
        want = f"be {BASE_FPS} or {FULL_FPS}" if refine else f"be {BASE_FPS}"
        todo = "" if refine else f"The refinement makes {FULL_FPS}: pass refine."
        raise UsageError(must("fps", want, repr(fps), todo))
    height, width = _size(height, width, refine, aspect, spatial, defaults)
    base_height, base_width = _base_size(height, width, refine, base_size, spatial)
    return GenerationRequest(
        task=task,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        base_height=base_height,
        base_width=base_width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=float(guidance),
        seed=seed,
        refine=refine,
        refine_steps=refine_steps,
        distill=distill,
        fps=int(fps),
        num_segments=num_segments,
        num_cond_frames=num_cond_frames,
    )


def without_effect(asked: GenerationRequest, options: Mapping[str, Any]) -> list[str]:
    """What was given and changes nothing, and why; for the log.

    Args:
        asked: made of the options.
        options: as given to `make_request`.
    """
    idle = {
        "negative_prompt": (not asked.guided, "without guidance"),
        "refine_steps": (not asked.refine, "without refine"),
        "num_cond_frames": (asked.task != "continuation" and asked.num_segments == 1, "without a continuation"),
    }
    return [f"{name} has no effect {why}" for name, (is_so, why) in idle.items() if is_so and options.get(name)]


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(must(name, f"be an integer >= {low}", repr(value)))
    return value


def _size(
    height: int | None,
    width: int | None,
    refine: bool,
    aspect: float | None,
    spatial: int,
    defaults: GenerationDefaults,
) -> tuple[int, int]:
    if (height is None) != (width is None):
        raise UsageError(must("height and width", "be given both or not at all", f"{height} and {width}"))
    if height is None or width is None:
        area = sizes.REFINE_AREA if refine else sizes.BASE_AREA
        multiple = math.lcm(sizes.REFINE_MULTIPLE if refine else sizes.BASE_MULTIPLE, spatial)
        if defaults.size is not None:
            if aspect is None:
                return defaults.size
            area, multiple = math.prod(defaults.size), spatial
        return sizes.size_for(aspect or sizes.DEFAULT_ASPECT, area, multiple)
    return sizes.check_side("height", height, spatial), sizes.check_side("width", width, spatial)


def _base_size(
    height: int, width: int, refine: bool, base_size: tuple[int, int] | None, spatial: int
) -> tuple[int, int]:
    if base_size is None:
        return sizes.base_size_for(height, width, spatial) if refine else (height, width)
    if not refine:
        raise UsageError(must("base_size", "be given with refine", base_size))
    if not isinstance(base_size, (tuple, list)) or len(base_size) != 2:
        raise UsageError(must("base_size", "be (height, width)", repr(base_size)))
    return sizes.check_side("base height", base_size[0], spatial), sizes.check_side("base width", base_size[1], spatial)
