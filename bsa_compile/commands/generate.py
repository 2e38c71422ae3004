"""`bsa-compile generate`: a video from a prompt, a picture or a video."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bsa_compile.commands import common, console
from bsa_compile.errors import PolicyError, UsageError, must
from bsa_compile.files import check_writable
from bsa_compile.pipelines.longcat import GenerationResult, LongCatPipeline, LongCatPipelineConfig
from bsa_compile.pipelines.longcat.pipeline import Job
from bsa_compile.pipelines.longcat.policies import as_argument
from bsa_compile.pipelines.longcat.request import BASE_FPS, COND_FRAMES, request_for
from bsa_compile.pipelines.longcat.resume import clear_folder, kept_files
from bsa_compile.pipelines.longcat.video import check_output, read_image, read_video
from bsa_compile.policy import BSAPolicy

# Options of the command that go to the pipeline as they are; one that is not given keeps the pipeline's default.
_PASSED = (
    "task",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "refine",
    "refine_steps",
    "distill",
    "fps",
    "num_segments",
    "num_cond_frames",
)


def run(args: argparse.Namespace) -> int:
    """Check everything, load the model, run it, and write the video and its report."""
    output = check_output(args.output, "--output")
    report_path = check_writable(output.with_suffix(".json"), "--output")
    checkpoint = output.with_name(f"{output.name}.checkpoint")
    if not args.resume and kept_files(checkpoint):
        todo = "Add --resume to go on, or delete it to begin anew."
        raise UsageError(must(str(checkpoint), "be resumed or deleted", "an interrupted run's steps in it", todo))
    device = common.resolve_device(args.device)
    backend, note = common.resolve_backend(args.backend, device)
    config = LongCatPipelineConfig() if args.config is None else LongCatPipelineConfig.from_file(args.config)
    config = configured(config, args, backend)
    policy = load_policies(args.policy)
    options = {name: value for name in _PASSED if (value := getattr(args, name)) is not None}
    given = load_given(args)
    folder = common.model_folder(args.model)
    frames = given.get("image", given.get("video"))
    aspect = None if frames is None else frames.shape[1] / frames.shape[2]
    asked = request_for(folder, aspect=aspect, prompt=args.prompt, **options)

    with _processes(device, config) as (mesh, speaks):
        several = {} if mesh is None else {"mesh": mesh}
        pipe = LongCatPipeline.from_pretrained(
            folder,
            config,
            device=device,
            torch_dtype=common.DTYPES.get(args.dtype),
            loras=tuple(asked.loras),
            **several,
        )
        job = pipe.prepare(args.prompt, policy=policy, **given, **options)
        if speaks:
            return _make(pipe, job, args, output, report_path, checkpoint, note)
        pipe.run(job, checkpoint=checkpoint, resume=args.resume, keep_checkpoint=True, progress=lambda _: None)
        return 0


@contextmanager
def _processes(device: torch.device, config: LongCatPipelineConfig) -> Iterator[tuple[Any, bool]]:
    """The mesh of the processes that torchrun started, None for one; and whether this one prints and writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None, True
        return
    from bsa_compile.parallel import launch

    with launch.started(device, cfg_groups=config.cfg_groups, timeout=config.mesh_timeout) as mesh:
        yield mesh, launch.is_main()


def _make(
    pipe: LongCatPipeline,
    job: Job,
    args: argparse.Namespace,
    output: Path,
    report_path: Path,
    checkpoint: Path,
    note: str | None,
) -> int:
    """Run a prepared job, and write its video and report."""
    if not args.json:
        print("\n".join([*job.describe(), *([note] if note else [])]), flush=True)
    if args.log_level is None:
        logging.getLogger("bsa_compile").setLevel(logging.INFO)  # from here on: what each stage runs
    try:
        result = pipe.run(job, checkpoint=checkpoint, resume=args.resume, keep_checkpoint=True)
    except KeyboardInterrupt:
        if checkpoint.is_dir():
            print(f"kept in {checkpoint}: repeat the command with --resume to go on", file=sys.stderr)
        raise
    result.save(output)
    report = {"output": str(output), "notes": [note] if note else [], **result.report}
    console.put_json(report, str(report_path))
    clear_folder(checkpoint)  # only now: a full disk must not cost the whole job
    if args.json:
        console.put_json(report, "-")
    else:
        print(as_text(result))
        print(f"wrote {output}, {report_path}")
    return 0


def configured(config: LongCatPipelineConfig, args: argparse.Namespace, backend: str) -> LongCatPipelineConfig:
    """The configuration with what the command line says over it."""
    changes: dict[str, Any] = {"low_memory": True} if args.low_memory else {}
    # `auto` decides only where the configuration's file does not.
    if args.backend != "auto" or args.config is None:
        changes["compile_backend"] = backend
    if args.mode is not None:
        changes["compile_mode"] = args.mode
    return dataclasses.replace(config, **changes)


def load_policies(path: str | None) -> BSAPolicy | Mapping[str, BSAPolicy] | None:
    """Read `--policy`: JSON of a BSAPolicy, or an object with one for `base`, `refine` or both.

    Raises:
        UsageError: the file cannot be read, or names an unknown stage.
        PolicyError: it holds no policy.
    """
    if path is None:
        return None
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(must("--policy", "be a readable JSON file", f"{path!r} ({exc})")) from None
    except ValueError as exc:
        raise PolicyError(must("--policy", "be valid JSON", f"an error: {exc}")) from None
    if isinstance(data, Mapping) and data and all(isinstance(value, Mapping) for value in data.values()):
        return as_argument({stage: BSAPolicy.from_dict(value) for stage, value in data.items()})
    return BSAPolicy.from_dict(data)


def load_given(args: argparse.Namespace) -> dict[str, Any]:
    """The picture or video of the task, as the pipeline takes it."""
    wanted = {"i2v": "image", "continuation": "video"}.get(args.task)
    for name in ("image", "video"):
        if (getattr(args, name) is not None) != (name == wanted):
            want = f"be {'given' if name == wanted else 'left out'} for --task {args.task}"
            raise UsageError(must(f"--{name}", want, repr(getattr(args, name))))
    if args.image is not None:
        return {"image": read_image(args.image)}
    if args.video is not None:
        looked_at = (args.num_cond_frames or COND_FRAMES) / BASE_FPS
        frames, fps = read_video(args.video, last_seconds=looked_at + 1)
        return {"video": frames, "video_fps": fps}
    return {}


def as_text(result: GenerationResult) -> str:
    """The result for people."""
    rows = [("stage", "size", "steps", "time", "attention")]
    for stage in result.report["stages"]:
        sparsity = stage["effective_sparsity"]
        attention = "dense"
        if stage["block_sparse_sites"]:
            attention = "block-sparse" + ("" if sparsity is None else f", {console.percent(sparsity)} of tiles skipped")
        if stage["from_checkpoint"]:
            attention = "from the checkpoint"
        size = f"{stage['num_frames']}x{stage['height']}x{stage['width']}"
        rows.append((stage["name"], size, str(stage["steps"]), console.seconds(stage["seconds"]), attention))
    peak = max(stage["peak_memory_bytes"] for stage in result.report["stages"]) / 2**30
    count, height, width = result.frames.shape[:3]
    total = console.seconds(result.report["seconds"])
    return (
        f"{console.table(rows)}\n{count} frames of {height}x{width} at {result.fps} fps in {total}, peak {peak:.1f} GiB"
    )
