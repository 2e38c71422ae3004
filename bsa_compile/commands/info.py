"""`bsa-compile info`: versions, devices, and which implementation would serve each op here."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from bsa_compile.commands import common, console
from bsa_compile.grid import Shape3, num_tiles
from bsa_compile.policy import DEFAULT_SPARSITY, keep_count

EXTRAS = {
    "viz": ("matplotlib",),
    "longcat": ("diffusers", "transformers", "av", "ftfy"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "peers": ("flash-attn-4", "nvidia-cudnn-frontend"),
}
DEVICE_FACTS = {
    "threads": "{} threads",
    "compute_capability": "compute capability {}",
    "memory_gib": "{} GiB",
    "multiprocessors": "{} multiprocessors",
}
# Grids to ask the kernels about: one that the tile divides, and one that it does not.
SAMPLE_GRIDS = ((8, 8, 8), (8, 10, 12))
SAMPLE_TILES, SAMPLE_HEAD_DIM = ((4, 4, 4), (4, 4, 8)), 128


def run(args: argparse.Namespace) -> int:
    """Print what is here."""
    grids = SAMPLE_GRIDS if args.grid is None else (common.check_grid(args.grid).shape,)
    data = collect(grids, SAMPLE_TILES if args.tile is None else (args.tile,))
    if args.json:
        console.put_json(data, "-")
    else:
        print(as_text(data))
    return 0


def collect(grids: Sequence[Shape3], tiles: Sequence[Shape3]) -> dict[str, Any]:
    """Everything that `info` tells, as a JSON object; the kernels are asked about these grids and tiles."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": common.versions(),
        "devices": [common.describe_device(device) for device in devices],
        "ops": [serving(device, grids, tiles) for device in devices],
        "attend_implementations": attend_implementations(),
        "libraries": libraries(),
        "extras": {extra: {name: common.installed_version(name) for name in names} for extra, names in EXTRAS.items()},
    }


def attend_implementations() -> list[str]:
    """Names that `BSAPolicy(attend=...)` may hold."""
    from bsa_compile import ops

    return sorted(ops.attend_implementations())


def libraries() -> dict[str, str | None]:
    """Installed version of each library that has an adapter to attend, None for one that is not installed."""
    from bsa_compile.ops import registry

    return {lib.name: common.installed_version(lib.distribution) for lib in registry.declared() if lib.distribution}


def serving(device: torch.device, grids: Sequence[Shape3], tiles: Sequence[Shape3]) -> dict[str, Any]:
    """Which implementation of the ops runs on a device, why, and on a GPU which path sample calls take."""
    found: dict[str, Any] = {"device": str(device), "implementation": "none", "reason": "", "paths": []}
    if device.type != "cuda":
        return {**found, "implementation": "vectorised PyTorch", "reason": "the device is a CPU"}
    if common.installed_version("triton") is None:
        return {**found, "reason": "Triton is not installed"}
    try:
        for grid in grids:
            for tile in tiles:
                found["paths"] += sample_paths(device, grid, tile)
    except Exception as exc:  # a broken GPU set-up is what `info` is there to show
        return {**found, "implementation": "unknown", "reason": f"{type(exc).__name__}: {exc}"}
    return {**found, "implementation": "Triton kernels", "reason": "a CUDA device and Triton are here"}


def sample_paths(device: torch.device, grid: Shape3, tile: Shape3) -> list[dict[str, Any]]:
    """Which kernel a sample call takes, forward and backward, with what launch, and why; what `auto` would choose."""
    from bsa_compile.kernels import autotune, config
    from bsa_compile.ops import registry

    x = torch.empty(1, 8, math.prod(grid), SAMPLE_HEAD_DIM, dtype=torch.bfloat16, device=device)
    where, scale = (grid, tile, tile, "raster"), SAMPLE_HEAD_DIM**-0.5
    paths = {
        "forward": config.forward_path(x, x, x, grid, tile, grid, tile, scale, "raster"),
        "backward_q": config.backward_q_path(x, x, x, *where),
        "backward_k": config.backward_k_path(x, x, *where),
    }
    hopper = config.backward_path(x, x, x, x, grid, tile, grid, tile, scale, "raster")
    for kernel in ("backward_q", "backward_k"):
        portable = paths[kernel]
        if isinstance(hopper, str):
            paths[kernel] = dataclasses.replace(portable, reason=f"{portable.reason}; not the Hopper kernels: {hopper}")
        else:
            paths[kernel] = hopper
    kept = keep_count(num_tiles(grid, tile), DEFAULT_SPARSITY)
    found = []
    for kernel, path in paths.items():
        key = autotune.shape_class(kernel, path, x, x, grid, tile, grid, tile, "raster", kept)
        call = f"{kernel}, bfloat16, head_dim {SAMPLE_HEAD_DIM}, tile {console.shape(tile)}, grid {console.shape(grid)}"
        launch = dataclasses.asdict(path.launch)
        origin = autotune.explain(key, path, device)
        tuned = autotune.remembered(key, device) if origin.startswith("tuned") else None
        found.append(
            {
                "call": call,
                "path": path.name,
                "reason": path.reason,
                "launch": launch if tuned is None else dataclasses.asdict(tuned),
                "launch_from": origin,
            }
        )
    choice = registry.choose(registry.AUTO, x, x, x, grid, tile, grid, tile, "raster")
    found[0]["auto"] = f"{choice.name} ({choice.reason})"
    return found


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
        for path in served["paths"]:
            lines.append(f"    {path['call']}: {path['path']} path ({path['reason']})")
            launch = ", ".join(f"{name} {value}" for name, value in path["launch"].items() if value is not None)
            lines.append(f"      {launch} ({path['launch_from']})")
            lines += [f'      attend="auto": {path["auto"]}'] if "auto" in path else []
    lines.append(f"attend implementations\n  {', '.join(data['attend_implementations'])}")
    for name, version in data["libraries"].items():
        lines.append(f"  {name}: {'not installed (extra peers)' if version is None else f'version {version}'}")
    lines.append("optional extras")
    rows = []
    for extra, modules in data["extras"].items():
        missing = [name for name, version in modules.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in modules.items() if version is not None)
        todo = f"missing {', '.join(missing)}: pip install 'bsa-compile[{extra}]'" if missing else ""
        rows.append((extra, "; ".join(filter(None, (have, todo)))))
    lines.append(console.table(rows))
    return "\n".join(lines)
