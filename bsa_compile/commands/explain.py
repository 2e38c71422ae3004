"""`bsa-compile explain`: what would run block-sparse, and what it saves, from `config.json` alone."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bsa_compile.api import optimize
from bsa_compile.commands import common, console
from bsa_compile.context import step
from bsa_compile.report import Report, Site

TEXT_TOKENS = 512


def run(args: argparse.Namespace) -> int:
    """Trace the model on the meta device and print its sites."""
    folder = common.find_checkpoint(args.checkpoint)
    grid = common.check_grid(args.grid, args.cond)
    model = common.meta_model(folder)
    policy = common.chosen_policy(args, model)
    inputs = common.model_inputs(model, grid, text_tokens=TEXT_TOKENS)
    with console.Progress(2) as progress, torch.no_grad():
        progress("counting operations")
        counted = common.meta_model(folder)
        counted.disable_bsa()  # this count runs dense, and is not to warn of it
        with FlopCounterMode(display=False) as counter:
            counted(**inputs, num_cond_latents=args.cond)
        progress("tracing the attention sites")
        fast = optimize(model, policy, backend="eager")
        with nullcontext() if args.step is None else step(args.step):
            fast(**inputs, num_cond_latents=args.cond)
        report: Report = fast.report
    totals = common.attention_totals(report.sites)
    other = counter.get_total_flops() - (totals["dense_flops"] or 0)
    data = {
        "checkpoint": str(folder),
        "grid": list(grid.shape),
        "tokens": grid.num_tokens,
        "num_cond_latents": args.cond,
        "policy": policy.to_dict(),
        "attention": totals,
        "other_flops": other,
        "report": report.to_dict(),
    }
    if args.json:
        console.put_json(data, "-")
    else:
        print(as_text(data, report))
    return 0


def as_text(data: dict[str, Any], report: Report) -> str:
    """For people; equal sites of several blocks share a line."""
    cond = f", {data['num_cond_latents']} of {data['grid'][0]} frames given" if data["num_cond_latents"] else ""
    lines = [
        f"{data['checkpoint']}: grid {console.shape(data['grid'])}, {data['tokens']:,} tokens{cond}",
        f"policy: {report.policy}",
        "",
        f"{len(report.rewritten)} of {len(report.sites)} attention sites block-sparse",
    ]
    rows = [("site", "role", "tokens", "FLOPs each, dense", "as it runs", "skipped", "outcome")]
    for name, site in collapsed(report.sites):
        tokens = f"{site.tokens_q:,}" if site.tokens_q == site.tokens_k else f"{site.tokens_q:,} over {site.tokens_k:,}"
        skipped = "" if site.effective_sparsity is None else console.percent(site.effective_sparsity)
        if site.rewritten and not skipped:
            skipped = "by data"
        dense, runs = console.flops(site.dense_flops), console.flops(site.flops)
        rows.append(
            (name, site.role, tokens, dense, runs if site.flops is not None else "by data", skipped, site.outcome)
        )
    lines.append(console.table(rows))
    lines.extend(f"  note: {note}" for note in report.notes)
    lines.append("")
    lines.extend(totals_text(data["attention"], data["other_flops"]))
    return "\n".join(lines)


def totals_text(attention: dict[str, Any], other: int) -> list[str]:
    """Attention's FLOPs in all sites, and the whole model's."""
    dense, runs = attention["dense_flops"], attention["flops"]
    if runs is None:
        return [
            f"attention of one step: {console.flops(dense)} dense; block-sparse it depends on the data (cdf_threshold)",
            f"all else: {console.flops(other)}",
        ]
    lines = [
        f"attention of one step: {console.flops(dense)} dense, {console.flops(runs)} as it runs: "
        f"{console.percent(attention['saved'])} saved",
        f"whole model: {console.flops(dense + other)} dense, {console.flops(runs + other)} as it runs: "
        f"{(dense + other) / (runs + other):.2f}x fewer",
    ]
    if attention["effective_sparsity"] is not None:
        lines.insert(0, f"effective sparsity: {console.percent(attention['effective_sparsity'])} of tile pairs skipped")
    return lines


def collapsed(sites: Sequence[Site]) -> list[tuple[str, Site]]:
    """Sites that differ only in one block's number, as one: `blocks.0-47.attn`."""
    groups: dict[tuple[str, Site], list[int]] = {}
    for site in sites:
        match = re.search(r"(?<=\.)\d+(?=\.)", site.module)
        if match is None:
            groups[(site.module or "<root>", site)] = []
            continue
        pattern = f"{site.module[: match.start()]}{{}}{site.module[match.end() :]}"
        key = (pattern, dataclasses.replace(site, module=""))
        groups.setdefault(key, []).append(int(match[0]))
    return [
        (pattern.format(ranges(numbers)) if numbers else pattern, site) for (pattern, site), numbers in groups.items()
    ]


def ranges(numbers: Sequence[int]) -> str:
    """0-3,5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
