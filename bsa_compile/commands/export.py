"""`bsa-compile export`: a checkpoint as a file that others run, its self-attention block-sparse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bsa_compile.commands import common, console
from bsa_compile.exporting import export, export_onnx, package, report_of, save
from bsa_compile.files import check_writable
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.report import Report

INPUTS = ("hidden_states", "timestep", "encoder_hidden_states")
OUTPUT = "noise_pred"


def run(args: argparse.Namespace) -> int:
    """Export one call of the model: latents, timestep and text in, predicted noise out."""
    path = check_writable(args.output, "--output")
    folder = common.find_checkpoint(args.checkpoint)
    grid = common.check_grid(args.grid, args.cond)
    device = common.resolve_device(args.device)
    with console.Progress(2) as progress:
        progress("loading the checkpoint")
        model = LongCatVideoTransformer3DModel.from_pretrained(
            folder, torch_dtype=common.DTYPES[args.dtype] if args.dtype else None, device=device
        ).eval()
        policy = common.chosen_policy(args, model)
        inputs = common.model_inputs(model, grid, text_tokens=args.text_tokens)
        # An example batch of 1 would be taken for a constant.
        batch = 2 if args.dynamic_batch else args.batch
        examples = tuple(torch.cat([inputs[name].to(_dtype(model, name))] * batch) for name in INPUTS)
        progress(f"exporting to {args.format}")
        report = _write(args, model, policy, examples, path)
    if args.json:
        print(json.dumps({"output": str(path), "format": args.format, **report.to_dict()}, indent=2))
    else:
        print(report)
        print(f"wrote {path}")
    return 0


def _dtype(model: LongCatVideoTransformer3DModel, name: str) -> torch.dtype:
    return torch.float32 if name == "timestep" else model.dtype


def _write(args: argparse.Namespace, model: Any, policy: Any, examples: tuple[Any, ...], path: Path) -> Report:
    dim = torch.export.Dim("batch")
    kwargs = {"num_cond_latents": args.cond} if args.cond else {}
    shapes = {**{name: {0: dim} for name in INPUTS}, **dict.fromkeys(kwargs)} if args.dynamic_batch else None
    if args.format == "onnx":
        return export_onnx(
            model,
            policy,
            examples,
            path,
            kwargs,
            dynamic_shapes=shapes,
            opset=args.opset,
            input_names=INPUTS,
            output_names=[OUTPUT],
        )
    program = export(model, policy, examples, kwargs, dynamic_shapes=shapes)
    (package if args.format == "aoti" else save)(program, path)
    return report_of(program)
