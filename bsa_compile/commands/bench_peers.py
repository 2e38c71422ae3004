"""`bsa-compile bench attention --peers`: ours beside whatever peers are installed."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import torch

from bsa_compile.benchmarking import plots, tables
from bsa_compile.benchmarking.compare import Run, compare, plan
from bsa_compile.benchmarking.problem import LISTS, Setting
from bsa_compile.commands import common, console
from bsa_compile.errors import UsageError, must, require_extra
from bsa_compile.files import check_writable
from bsa_compile.ops import registry
from bsa_compile.ops.validate import check_head_dim

TILES = ((4, 4, 4), (4, 4, 8))


def run(args: argparse.Namespace, sizes: dict[str, Any], device: torch.device) -> int:
    """Compare, print as it goes, write JSON after every measurement and the plot at the end."""
    if args.plot is not None:
        require_extra("matplotlib", "viz")
        check_writable(args.plot, "--plot")
    if args.cdf_threshold is not None or args.policy is not None:
        raise UsageError(must("--peers", "go with --sparsity and --tile", "--policy or --cdf-threshold"))
    check_head_dim(sizes["head_dim"])
    grid = common.check_grid(args.grid or common.GRIDS[device.type])
    base = Setting(
        grid.shape,
        TILES[0],
        sizes["heads"],
        sizes["head_dim"],
        common.DTYPES[sizes["dtype"]],
        common.chosen_policy(args).sparsity or 0.0,
        seed=args.seed,
    )
    data: dict[str, Any] = {
        "what": "attention beside its peers",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["bsa-compile", *(Path(word).name for word in args.argv)]),
        "versions": {**common.versions(), **library_versions()},
        "device": common.describe_device(device),
        "legend": tables.LEGEND,
        "cases": [],
    }

    def save(now: dict[str, Any]) -> None:
        if args.json not in (None, "-"):
            console.put_json(now, args.json)

    def say(what: str) -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)

    cases = plan(base, (args.tile,) if args.tile else TILES, args.lists or LISTS, args.sweep or ())
    compare(cases, Run(device, args.repeats, args.rounds, args.budget, save, say, data))
    if args.json == "-":
        console.put_json(data, "-")
    else:
        print(as_text(data, device))
    if args.plot is not None:
        plots.save(data, args.plot)
    return 1 if "stopped" in data or any(_ours_failed(case) for case in data["cases"]) else 0


def library_versions() -> dict[str, str | None]:
    """Of the peers that are packages, and of what they are built on."""
    names = [library.distribution for library in registry.declared() if library.distribution]
    return {name: common.installed_version(name) for name in (*names, "nvidia-cutlass-dsl")}


def as_text(data: dict[str, Any], device: torch.device) -> str:
    """For people."""
    lines = [common.device_line(device), data["legend"]]
    for entry in data["cases"]:
        lines += ["", tables.heading(entry)]
        body = tables.rows(entry)
        lines.append(console.table(body) if len(body) > 1 else "  nothing was timed")
        faster = tables.speedups(data, entry)
        if faster:
            lines.append("  whole op against " + ", ".join(f"{name}: {ratio:.2f}x" for name, ratio in faster.items()))
    remarks = dict.fromkeys(remark for entry in data["cases"] for remark in tables.remarks(entry))
    lines += ["", *remarks]
    lines += [f"left out, the time was up: {name}" for name in data.get("left_out", ())]
    if "stopped" in data:
        lines.append(f"stopped: {data['stopped']}")
    return "\n".join(lines)


def _ours_failed(case: dict[str, Any]) -> bool:
    return any("failed" in found for name, found in case["participants"].items() if name.startswith("bsa_compile"))
