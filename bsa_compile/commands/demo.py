"""`bsa-compile demo`: the tiny checkpoint, a few denoising steps dense and block-sparse."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsa_compile.api import optimize
from bsa_compile.capture import AttentionInputs, capture_attention
from bsa_compile.commands import common, console
from bsa_compile.errors import MissingExtraError, PolicyError
from bsa_compile.files import check_writable
from bsa_compile.grid import TokenGrid
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy
from bsa_compile.report import Report
from bsa_compile.timing import timed

PICTURE, REPORT = "block_mask.png", "report.json"
TEXT_TOKENS = 16


def run(args: argparse.Namespace) -> int:
    """Optimize the tiny checkpoint, denoise both ways, print and write what came out."""
    folder = Path(args.output)
    for name in (PICTURE, REPORT):
        check_writable(folder / name, "--output")
    device = common.resolve_device(args.device)
    backend, note = common.resolve_backend(args.backend, device)
    grid = common.check_grid(args.grid or common.GRIDS[device.type])
    checkpoint = common.TINY_CHECKPOINT
    model = LongCatVideoTransformer3DModel.from_pretrained(
        checkpoint, torch_dtype=common.model_dtype(None, device), device=device
    )
    policy = common.chosen_policy(args, model)
    notes = [note] if note else []

    with console.Progress(4 + 2 * args.steps) as progress:
        measured, report, captured = denoise(model, policy, grid, args.steps, backend, args.seed, progress)
        progress("writing")
        picture: str | None = PICTURE
        try:
            draw(captured, policy, folder / PICTURE)
        except (MissingExtraError, PolicyError) as exc:  # not there to draw with, or nothing sparse to draw
            picture = None
            notes.append(f"no picture: {exc}")
        result = {
            "checkpoint": checkpoint.name,
            "versions": common.versions(),
            "device": common.describe_device(device),
            "backend": backend,
            "notes": notes,
            **measured,
            "picture": picture,
        }
        console.put_json(result, str(folder / REPORT))
    if args.json:
        console.put_json(result, "-")
    else:
        print(as_text(result, report, model, device))
        print(f"wrote {', '.join(str(folder / name) for name in (picture, REPORT) if name)}")
    return 0


def denoise(
    model: LongCatVideoTransformer3DModel,
    policy: BSAPolicy,
    grid: TokenGrid,
    steps: int,
    backend: str,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], Report, AttentionInputs]:
    """Denoise from the same noise dense and block-sparse, step by step in turns.

    Both sides are the same optimized model, compiled the same way, with block sparse attention off and on.

    Returns:
        What was measured, the report of the block-sparse side, and q and k of its first block at the last step.
    """
    fast = optimize(model, policy, backend=backend)
    inputs = common.model_inputs(model, grid, text_tokens=TEXT_TOKENS, seed=seed)
    noise, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    # Flow matching: sigmas from 1 down to 0; the model predicts the flow with the opposite sign.
    sigmas = [*torch.linspace(1, 0.001, steps).tolist(), 0.0]

    def flow(which: Any, latents: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((1,), 1000 * sigma, device=model.device)
        with torch.no_grad():
            return -which(latents, timestep, text)

    sides: dict[str, dict[str, Any]] = {}
    first_flows = {}
    switches = {"dense": fast.disable_bsa, "block_sparse": fast.enable_bsa}
    for name, switch in switches.items():
        progress(f"compiling the {name.replace('_', '-')} model")
        switch()
        seconds, first_flows[name] = timed(lambda: flow(fast, noise, sigmas[0]), model.device)
        sides[name] = {"first_call_s": seconds, "step_s": [], "latents": noise}
    for step in range(steps):
        for name, switch in switches.items():
            progress(f"step {step + 1} of {steps}, {name.replace('_', '-')}")
            switch()
            side = sides[name]
            side["before"] = latents = side["latents"]
            seconds, predicted = timed(lambda x=latents, s=sigmas[step]: flow(fast, x, s), model.device)  # type: ignore[misc]
            side["step_s"].append(seconds)
            side["latents"] = latents + (sigmas[step + 1] - sigmas[step]) * predicted
    report: Report = fast.report
    progress("looking at the last step's queries and keys")
    last = sides["block_sparse"]["before"]
    captured = capture_attention(model, 0, lambda: flow(model, last, sigmas[steps - 1]))
    times = {
        name: {
            "first_call_s": side["first_call_s"],
            "step_s": side["step_s"],
            "median_step_s": statistics.median(side["step_s"]),
        }
        for name, side in sides.items()
    }
    measured = {
        "grid": list(grid.shape),
        "tokens": grid.num_tokens,
        "latents": list(noise.shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "steps": steps,
        "seed": seed,
        "policy": policy.to_dict(),
        **times,
        "speedup": times["dense"]["median_step_s"] / times["block_sparse"]["median_step_s"],
        "relative_error": relative_error(sides["block_sparse"]["latents"], sides["dense"]["latents"]),
        "relative_error_first_flow": relative_error(first_flows["block_sparse"], first_flows["dense"]),
        "attention": common.attention_totals(report.sites),
        "report": report.to_dict(),
    }
    return measured, report, captured


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`||value - reference|| / ||reference||`."""
    return float((value - reference).double().norm() / reference.double().norm())


def draw(captured: AttentionInputs, policy: BSAPolicy, path: Path) -> None:
    """Write the picture of what the policy selects for the captured queries and keys."""
    from bsa_compile.commands.show import save_picture

    save_picture(captured, policy, "blocks.0.attn", "tiny LongCat, block 0, last denoising step", path)


def as_text(result: dict[str, Any], report: Report, model: LongCatVideoTransformer3DModel, device: torch.device) -> str:
    """The result for people."""
    config, dense, sparse = model.config, result["dense"], result["block_sparse"]
    attention = result["attention"]
    how = "eager" if result["backend"] == "eager" else f"compiled by {result['backend']}"
    lines = [
        f"tiny LongCat checkpoint (random weights): {config.depth} blocks, {config.num_heads} heads of "
        f"{config.head_dim}",
        f"latents {console.shape(result['latents'])}: grid {console.shape(result['grid'])}, {result['tokens']:,} "
        f"tokens, {result['dtype']}",
        f"{common.device_line(device)}; both sides {how}",
        *(f"note: {note}" for note in result["notes"]),
        "",
        str(report),
        "",
        console.table(
            [
                ("", "dense", "block-sparse", ""),
                *(
                    (label, console.seconds(dense[key]), console.seconds(sparse[key]), remark)
                    for label, key, remark in (
                        ("first call", "first_call_s", "compilation included"),
                        (
                            f"model step, median of {result['steps']}",
                            "median_step_s",
                            f"speed-up {result['speedup']:.2f}x",
                        ),
                    )
                ),
                (
                    "attention FLOPs a step",
                    console.flops(attention["dense_flops"]),
                    console.flops(attention["flops"]),
                    "" if attention["saved"] is None else f"{console.percent(attention['saved'])} saved",
                ),
            ]
        ),
        "",
        f"relative error against dense: {result['relative_error']:.4f} (latents after the last step), "
        f"{result['relative_error_first_flow']:.4f} (first predicted flow)",
    ]
    return "\n".join(lines)
