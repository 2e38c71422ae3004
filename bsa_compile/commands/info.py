"""`bsa-compile info`: versions, devices, and which implementation would serve each op here."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bsa_compile.commands import common, console

EXTRAS = {
    "viz": ("matplotlib",),
    "longcat": ("diffusers", "transformers", "av", "ftfy"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
DEVICE_FACTS = {
    "threads": "{} threads",
    "compute_capability": "compute capability {}",
    "memory_gib": "{} GiB",
    "multiprocessors": "{} multiprocessors",
}
# Grids to ask the kernels about: one that the tile divides, and one that it does not.
SAMPLE_GRIDS = ((8, 8, 8), (8, 10, 12))
SAMPLE_TILE, SAMPLE_HEAD_DIM = (4, 4, 4), 128


def run(args: argparse.Namespace) -> int:
    """Print what is here."""
    data = collect()
    if args.json:
        console.put_json(data, "-")
    else:
        print(as_text(data))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `info` tells, as a JSON object."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": common.versions(),
        "devices": [common.describe_device(device) for device in devices],
        "ops": [serving(device) for device in devices],
        "attend_implementations": attend_implementations(),
        "extras": {extra: {name: common.installed_version(name) for name in names} for extra, names in EXTRAS.items()},
    }


def attend_implementations() -> list[str]:
    """Names that `BSAPolicy(attend=...)` may hold."""
    from bsa_compile import ops

    return sorted(ops.attend_implementations())


def serving(device: torch.device) -> dict[str, Any]:
    """Which implementation of the ops runs on a device, why, and on a GPU which path sample calls take."""
    found: dict[str, Any] = {"device": str(device), "implementation": "none", "reason": "", "paths": []}
    if device.type != "cuda":
        return {**found, "implementation": "vectorised PyTorch", "reason": "the device is a CPU"}
    if common.installed_version("triton") is None:
        return {**found, "reason": "Triton is not installed"}
    try:
        from bsa_compile.kernels.config import forward_path

        for grid in SAMPLE_GRIDS:
            tokens = grid[0] * grid[1] * grid[2]
            x = torch.empty(1, 8, tokens, SAMPLE_HEAD_DIM, dtype=torch.bfloat16, device=device)
            path = forward_path(x, x, x, grid, SAMPLE_TILE, grid, SAMPLE_TILE, SAMPLE_HEAD_DIM**-0.5, "raster")
            sample = (
                f"bfloat16, head_dim {SAMPLE_HEAD_DIM}, tile {console.shape(SAMPLE_TILE)}, grid {console.shape(grid)}"
            )
            found["paths"].append({"call": sample, "path": path.name, "reason": path.reason})
    except Exception as exc:  # a broken GPU set-up is what `info` is there to show
        return {**found, "implementation": "unknown", "reason": f"{type(exc).__name__}: {exc}"}
    return {**found, "implementation": "Triton kernels", "reason": "a CUDA device and Triton are here"}


def as_text(data: dict[str, Any]) -> str:
    """For people."""
    lines = ["versions", console.table([(name, value or "-") for name, value in data["versions"].items()])]
    lines.append("devices")
    for device in data["devices"]:
        about = [text.format(device[key]) for key, text in DEVICE_FACTS.items() if key in device]
        lines.append(f"  {device['device']}: {device['name']} ({', '.join(about)})")
    lines.append("ops (bsa::pool, bsa::select, bsa::attend)")
    for served in data["ops"]:
        lines.append(f"  {served['device']}: {served['implementation']} ({served['reason']})")
        lines.extend(f"    {path['call']}: {path['path']} path ({path['reason']})" for path in served["paths"])
    lines.append(f"attend implementations\n  {', '.join(data['attend_implementations'])}")
    lines.append("optional extras")
    rows = []
    for extra, modules in data["extras"].items():
        missing = [name for name, version in modules.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in modules.items() if version is not None)
        todo = f"missing {', '.join(missing)}: pip install 'bsa-compile[{extra}]'" if missing else ""
        rows.append((extra, "; ".join(filter(None, (have, todo)))))
    lines.append(console.table(rows))
    return "\n".join(lines)
