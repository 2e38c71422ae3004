"""`bsa-compile compare`: one video dense and block-sparse, side by side, with times and how far they are apart."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsa_compile.commands import common, console
from bsa_compile.files import check_writable
from bsa_compile.metrics import Video, psnr, ssim
from bsa_compile.pipelines.longcat import GenerationResult, LongCatPipeline, LongCatPipelineConfig
from bsa_compile.pipelines.longcat.request import request_for
from bsa_compile.pipelines.longcat.video import write_video
from bsa_compile.policy import BSAPolicy

VIDEO, REPORT = "side_by_side.mp4", "report.json"
SINGLE = {"dense": "dense.gif", "block_sparse": "block_sparse.gif"}
GAP = 8
"""Pixels between the two videos."""

_PASSED = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "seed")


def default_mode(small: bool, device: torch.device, backend: str) -> str | None:
    """The mode of torch.compile where none was asked for.

    On a GPU the steps of the small model wait for kernel launches, dense ones too, and times would tell of these alone.

    Args:
        small: whether the model is the package's own.
        device: where it runs.
        backend: what compiles it.
    """
    return "reduce-overhead" if small and device.type == "cuda" and backend == "inductor" else None


def run(args: argparse.Namespace) -> int:
    """Make both videos from the same noise, print and write what came out."""
    folder = Path(args.output)
    for name in (VIDEO, *SINGLE.values(), REPORT):
        check_writable(folder / name, "--output")
    device = common.resolve_device(args.device)
    backend, note = common.resolve_backend(args.backend, device)
    options = {name: value for name in _PASSED if (value := getattr(args, name)) is not None}
    common.with_criteria(BSAPolicy(), args)  # refuses what no policy takes; the folder's own is known when it is loaded
    model = common.model_folder(args.model)
    request_for(model, prompt=args.prompt, **options)
    mode = args.mode or default_mode(args.model is None, device, backend)
    config = LongCatPipelineConfig(compile_backend=backend, compile_mode=mode)
    pipe = LongCatPipeline.from_pretrained(model, config, device=device)
    policy = common.with_criteria(pipe.transformer.checkpoint.policy or BSAPolicy(), args)
    sides = {"dense": BSAPolicy.dense(), "block_sparse": dataclasses.replace(policy, enabled=True)}
    jobs = {name: pipe.prepare(args.prompt, policy=side, **options) for name, side in sides.items()}
    if not args.json:
        compiled = f"; compiled with mode {mode}" if mode else ""
        print(f"{args.prompt!r}; {common.device_line(device)}{compiled}", *[note] * bool(note), sep="\n", flush=True)
    made = {name: pipe.run(job) for name, job in jobs.items()}
    dense, sparse = made["dense"], made["block_sparse"]
    result = {
        "prompt": args.prompt,
        "notes": [note] if note else [],
        "backend": backend,
        "mode": mode,
        **compared(dense, sparse),
        "reports": {name: one.report for name, one in made.items()},
    }

    for name, file in SINGLE.items():
        made[name].save(folder / file)
    write_video(folder / VIDEO, beside(dense.frames, sparse.frames), dense.fps)
    console.put_json(result, str(folder / REPORT))
    if args.json:
        console.put_json(result, "-")
    else:
        print(as_text(result))
        print(f"wrote {', '.join(str(folder / name) for name in (VIDEO, *SINGLE.values(), REPORT))}")
    return 0


def beside(left: Video, right: Video) -> Any:
    """Both videos `UInt8["t h w c"]` in one picture, with a white gap."""
    frames, height, _, channels = left.shape
    return np.concatenate([left, np.full((frames, height, GAP, channels), 255, np.uint8), right], axis=2)


def compared(dense: GenerationResult, sparse: GenerationResult) -> dict[str, Any]:
    """Times of both, and the block-sparse video against the dense one."""
    times = {}
    for name, one in (("dense", dense), ("block_sparse", sparse)):
        stage = one.report["stages"][0]
        times[name] = {
            "first_step_s": stage["step_seconds"][0],
            "median_step_s": statistics.median(stage["step_seconds"][1:] or stage["step_seconds"]),
            "steps": stage["steps"],
            "effective_sparsity": stage["effective_sparsity"],
        }
    return {
        **times,
        "speedup": times["dense"]["median_step_s"] / times["block_sparse"]["median_step_s"],
        "psnr_db": psnr(sparse.frames, dense.frames),
        "ssim": ssim(sparse.frames, dense.frames),
    }


def as_text(result: dict[str, Any]) -> str:
    """The result for people."""
    dense, sparse = result["dense"], result["block_sparse"]
    asked = result["reports"]["dense"]["request"]
    size = f"{asked['num_frames']} frames of {asked['height']}x{asked['width']}"
    skipped = sparse["effective_sparsity"]
    rows = [
        ("", "dense", "block-sparse", ""),
        *(
            (label, console.seconds(dense[key]), console.seconds(sparse[key]), remark)
            for label, key, remark in (
                ("first step", "first_step_s", "compilation included"),
                ("median step", "median_step_s", f"speed-up {result['speedup']:.2f}x"),
            )
        ),
        ("tiles skipped", "0%", "unknown" if skipped is None else console.percent(skipped), ""),
    ]
    apart = f"PSNR {result['psnr_db']:.2f} dB, SSIM {result['ssim']:.4f}"
    return f"{size}\n{console.table(rows)}\nblock-sparse against dense, from the same noise: {apart}"
