"""Results of whole models as Markdown, made from their JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .tables import joined, markdown_rows


def dit_step(data: Mapping[str, Any]) -> str:
    """What `benchmarks/dit_step.py` wrote."""
    refine, model = data["refine"], data["model"]
    stage = f"refinement, {refine['steps']} steps (extrapolated)"
    rows = [("grid", "attention", "s a step", "dense takes", "peak GiB", "beyond weights", stage)]
    for cell in data["cells"]:
        ratio, peak, beyond = (cell.get(key) for key in ("dense_takes", "peak_gib", "beyond_weights_gib"))
        rows.append(
            (
                f"{joined(cell['grid'])}, {cell['tokens']:,} tokens",
                "dense" if cell["sparsity"] is None else f"sparsity {cell['sparsity']:g}",
                f"{cell['median_s']:.2f}",
                "" if ratio is None or cell["sparsity"] is None else f"{ratio:.2f}x",
                "" if peak is None else f"{peak:.1f}",
                "" if beyond is None else f"{beyond:.1f}",
                _duration(cell["refine_extrapolated_s"]),
            )
        )
    about = (
        f"One step of a compiled DiT of {model['depth']} blocks, {model['parameters'] / 1e9:.1f} B parameters "
        f"({model['weights_gib']:.1f} GiB, {model['dtype']}; {model['weights']}), {data['text_tokens']} text tokens, "
        f"batch 1; medians of {data['repeats']}. The refinement's time was not measured: it is a step's, times the "
        f"{refine['steps']} steps that it runs of a schedule of {refine['schedule_steps']}, without VAE and text "
        "encoder."
    )
    return f"{markdown_rows(rows, left=2)}\n\n{about}"


def parallel(data: Mapping[str, Any]) -> str:
    """What `benchmarks/parallel.py` wrote."""
    ranks = data["ranks"]
    rows = [("grid", "", "one GPU", f"{ranks} GPUs", "x", "communication", "of it hidden", "peak GiB, each GPU")]
    for row in data["grids"]:
        step = row["step"]
        cells = [
            ("self-attention", row["attention"]["one"], row["attention"]["shared"], row["attention"]["overlap"]),
            ("step", step["one"], step["shared"], step["overlap"]),
            ("step, weights shared out (FSDP2)", step["one"], step["sharded_weights"], step["overlap_sharded"]),
        ]
        for name, one, shared, trace in cells:
            communication = trace["communication_ms"]
            hidden = trace["hidden_ms"] / communication if communication else 0.0
            peak = f"{one['peak_gib']:.1f} → {shared['peak_gib']:.1f} ({shared['peak_gib'] / one['peak_gib']:.0%})"
            rows.append(
                (
                    f"{joined(row['grid'])}, {math.prod(row['grid']):,} tokens",
                    name,
                    _milliseconds(1000 * one["median_s"]),
                    _milliseconds(1000 * shared["median_s"]),
                    f"{one['median_s'] / shared['median_s']:.2f}x",
                    _milliseconds(communication),
                    f"{hidden:.0%}",
                    "" if one is not step["one"] else peak,
                )
            )
    about = (
        f"Mesh dimension `{data['mesh']}`, {data['depth']} blocks of LongCat's width, sparsity {data['sparsity']:g}, "
        f"compiled, batch 1, {data['text_tokens']} text tokens, NCCL {data['nccl']}; medians of {data['repeats']}, the "
        "slowest rank's. Communication and what of it runs beside other kernels are from a trace of one call on rank "
        "0; waiting for the other ranks counts as communication."
    )
    return f"{markdown_rows(rows, left=2)}\n\n{about}"


def quality(data: Mapping[str, Any]) -> str:
    """What `benchmarks/quality.py` wrote."""
    names = list(data["policies"][0]["accuracy"])
    rows = [("attention", "skipped", "PSNR, dB", "SSIM", *names, "s a video")]
    for entry in data["policies"]:
        skipped = entry["effective_sparsity"]
        rows.append(
            (
                entry["name"],
                "" if skipped is None else f"{100 * skipped:.1f}%",
                _spread(entry["psnr"], "{:.1f}"),
                _spread(entry["ssim"], "{:.3f}"),
                *(_share(entry["accuracy"][name]) for name in names),
                _spread(entry["seconds"], "{:.2f}"),
            )
        )
    video, other, count = data["video"], data["other_seed"], len(data["captions"])
    about = (
        f"{count} captions with {len(data['seeds'])} seeds each: {count * len(data['seeds'])} videos of "
        f"{video['frames']} frames of {video['height']}x{video['width']}, {video['steps']} steps, "
        f"{data['model']['parameters'] / 1e6:.1f} M parameters. PSNR and SSIM are against the dense video of the same "
        "caption and seed, mean ± standard deviation over videos; the other columns but the last tell in how many "
        "videos the caption is right, with a 95% Wilson interval. Seconds are those of the denoising."
    )
    if other is not None:
        about += (
            " For comparison, dense videos of the same caption with two seeds: "
            f"PSNR {_spread(other['psnr'], '{:.1f}')} dB, SSIM {_spread(other['ssim'], '{:.3f}')}."
        )
    return f"{markdown_rows(rows)}\n\n{about}"


def _spread(found: Mapping[str, Any] | None, form: str) -> str:
    if found is None or found["mean"] is None:
        return ""
    return form.format(found["mean"]) + ("" if found["std"] is None else f" ± {form.format(found['std'])}")


def _share(found: Mapping[str, Any]) -> str:
    share, low, high = (f"{100 * found[key]:.0f}" for key in ("share", "low", "high"))
    return f"{share}% ({low}–{high})"


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def _duration(seconds: float) -> str:
    """At most two units: 45 s, 5 min 7 s, 1 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if whole >= 10 else f"{seconds:.1f} s"
    big, small, units = (*divmod(whole, 60), "min s") if whole < 3600 else (*divmod(round(whole / 60), 60), "h min")
    first, second = units.split()
    return f"{big} {first} {small} {second}" if small else f"{big} {first}"
