"""One step of LongCat's whole DiT, compiled, dense against block-sparse: time and peak memory on a CUDA GPU.

    python benchmarks/dit_step.py --json dit_step.json
    python benchmarks/dit_step.py --grid 24,44,80 --sparsity 0.9375 --json dit_step.json

The model has its full size (48 blocks, 13.6 B parameters, 25.3 GiB in bf16) and random weights, made on the GPU. All
cells run the same optimized model, switched, and compiled for each grid's sizes; its blocks are compiled once for each
policy and grid, not once each. Dense attention is cuDNN's, the fastest in PyTorch on Hopper.

The JSON is written after every cell. Cells that the file holds already from the same device and versions stay, so that
several runs, one grid each for example, fill one file. What the refinement would take is extrapolated, not measured:
its number of steps times the time of one.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import bsa_compile
from bsa_compile.benchmarking import results
from bsa_compile.benchmarking.dit import TEXT_TOKENS, WEIGHTS, dense_kernel, fastest_dense, random_inputs, random_model
from bsa_compile.cli import triple
from bsa_compile.commands import common, console
from bsa_compile.errors import BSACompileError, UsageError, must
from bsa_compile.files import check_writable
from bsa_compile.pipelines.longcat import sampling
from bsa_compile.timing import measure, timed

GRIDS = ((24, 44, 80), (48, 44, 80))
SPARSITIES = (0.875, 0.9375, 0.96875)
SCHEDULE_STEPS = 50
GIB = 2**30


class Schedule:
    """What `sampling` needs of diffusers' `FlowMatchEulerDiscreteScheduler` to tell the steps of a run.

    Args:
        shift: the scheduler's setting: how far its noise levels are moved towards noise; 1 leaves them even.
    """

    class config:
        num_train_timesteps = 1000

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift
        self.timesteps = self.sigmas = torch.empty(0)

    def set_timesteps(self, steps: int, *, sigmas: Sequence[float], device: str) -> None:
        """Take noise levels and shift them."""
        levels = torch.tensor(sigmas, dtype=torch.float32, device=device)
        self.sigmas = self.shift * levels / (1 + (self.shift - 1) * levels)
        self.timesteps = self.sigmas * self.config.num_train_timesteps


def refine_steps(shift: float = 1.0) -> int:
    """Steps of the refinement: t = 0.5 and the part of a schedule of 50 steps below it."""
    schedule = Schedule(shift)
    sampling.set_schedule(schedule, sampling.base_sigmas(SCHEDULE_STEPS))
    sampling.start_at(schedule)
    return len(schedule.timesteps)


def derive(data: dict[str, Any]) -> None:
    """Add to every cell what follows from the times: dense over its own, and the refinement's time, extrapolated."""
    dense = {tuple(cell["grid"]): cell["median_s"] for cell in data["cells"] if cell["sparsity"] is None}
    for cell in data["cells"]:
        reference = dense.get(tuple(cell["grid"]))
        cell["dense_takes"] = None if reference is None else reference / cell["median_s"]
        cell["refine_extrapolated_s"] = data["refine"]["steps"] * cell["median_s"]


def put(data: dict[str, Any], cell: dict[str, Any]) -> None:
    """Add a cell, or replace the one of the same grid and sparsity; the smallest grids and dense come first."""

    def key(one: dict[str, Any]) -> tuple[int, list[int], float]:
        return one["tokens"], one["grid"], -1.0 if one["sparsity"] is None else one["sparsity"]

    data["cells"] = results.put_row(data["cells"], cell, key)
    derive(data)


def release(device: torch.device) -> None:
    """Give memory that nobody uses back to the device, so that no cell sees another's fragments."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_step(model: Any, inputs: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """Seconds and peak memory of a step of the model as it is switched now; the first call compiles.

    Returns:
        JSON object. `first_call_s` holds compilation and one step; `graphs_compiled` is 1 where the blocks share their
        code, and 0 where it was there already. Memory is in GiB, None on a CPU; `beyond_weights_gib` is what the step
        allocates beside weights and inputs.
    """
    device = model.device
    release(device)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first, out = timed(lambda: model(**inputs), device)
    found: dict[str, Any] = {
        "first_call_s": first,
        "graphs_compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "finite": bool(torch.isfinite(out).all()),
        "peak_gib": None,
        "beyond_weights_gib": None,
    }
    del out
    release(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    # The first call was the warm-up.
    seconds = measure(lambda: model(**inputs), device, repeats, warmup=0).seconds
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        found |= {"peak_gib": peak / GIB, "beyond_weights_gib": (peak - before) / GIB}
    return {"median_s": statistics.median(seconds), "seconds": list(seconds), **found}


def describe_model(model: Any) -> dict[str, Any]:
    """What was measured."""
    parameters = list(model.parameters())
    return {
        "depth": model.config.depth,
        "hidden_size": model.config.hidden_size,
        "parameters": sum(p.numel() for p in parameters),
        "weights_gib": sum(p.numel() * p.element_size() for p in parameters) / GIB,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": WEIGHTS,
    }


def run(
    data: dict[str, Any],
    model: Any,
    grids: Sequence[tuple[int, int, int]],
    policies: Sequence[bsa_compile.BSAPolicy],
    path: Path | None,
) -> None:
    """Measure all cells, grid after grid, dense first; say so and write the JSON after each.

    Args:
        data: what will be written; cells are added to it.
        model: as `bsa_compile.optimize` gave it.
        grids: (t, h, w) of the tokens.
        policies: of the block-sparse cells; they differ in sparsity.
        path: the JSON file, if any.
    """
    with torch.no_grad(), fastest_dense():
        for grid in grids:
            inputs = random_inputs(model, grid, data["text_tokens"])
            tokens = grid[0] * grid[1] * grid[2]
            for policy in (None, *policies):
                sparsity = None if policy is None else policy.sparsity
                name = f"{'x'.join(map(str, grid))}, {'dense' if sparsity is None else f'sparsity {sparsity:g}'}"
                print(f"{name}: compiling and measuring ...", flush=True)
                if policy is None:
                    model.disable_bsa()
                else:
                    model.set_policy(policy)
                    model.enable_bsa()
                cell: dict[str, Any] = {"grid": list(grid), "tokens": tokens, "sparsity": sparsity}
                if sparsity is None:
                    cell["dense_kernel"] = dense_kernel(model, tokens)
                cell |= measure_step(model, inputs, data["repeats"])
                put(data, cell)
                if path is not None:
                    console.put_json(data, str(path))
                print(f"{name}: {told(cell)}", flush=True)
            del inputs


def told(cell: dict[str, Any]) -> str:
    """A cell in one line."""
    parts = [f"{cell['median_s']:.2f} s a step"]
    if cell["dense_takes"] is not None and cell["sparsity"] is not None:
        parts.append(f"dense takes {cell['dense_takes']:.2f}x")
    if cell["peak_gib"] is not None:
        parts.append(f"peak {cell['peak_gib']:.1f} GiB ({cell['beyond_weights_gib']:.1f} beyond weights)")
    parts.append(f"first call {cell['first_call_s']:.0f} s, {cell['graphs_compiled']} graphs compiled")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=triple, action="append", help="T,H,W; may be repeated")
    parser.add_argument("--sparsity", type=float, action="append", help="may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a cell (default: 3)")
    parser.add_argument("--depth", type=int, default=48, help="blocks (default: 48, the released model's)")
    parser.add_argument("--shift", type=float, default=1.0, help="of the scheduler; decides the refinement's steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.repeats < 1:
        raise UsageError(must("--repeats", "be at least 1", options.repeats))
    chosen = [bsa_compile.BSAPolicy(sparsity=s) for s in options.sparsity or SPARSITIES]
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    if options.json is not None:
        check_writable(options.json, "--json")
    device = torch.device("cuda")
    print(f"{common.device_line(device)}; making the model ...", flush=True)
    plain = random_model(device, depth=options.depth)
    data: dict[str, Any] = {
        **results.header("dit_step", device),
        "model": describe_model(plain),
        "text_tokens": TEXT_TOKENS,
        "repeats": options.repeats,
        "refine": {"schedule_steps": SCHEDULE_STEPS, "shift": options.shift, "steps": refine_steps(options.shift)},
        "note": "dense_takes: dense's time over this one's. refine_extrapolated_s: no measurement but refine.steps "
        "times a step, without VAE and text encoder.",
        "cells": [],
    }
    results.keep_earlier(data, options.json, "cells", ("model", "text_tokens", "refine", "repeats"))
    # Sizes are static, as in the pipeline: a second grid would be compiled for symbolic ones otherwise.
    model = bsa_compile.optimize(plain, bsa_compile.BSAPolicy(), dynamic=False)
    run(data, model, options.grid or GRIDS, chosen, options.json)


if __name__ == "__main__":
    try:
        main()
    except BSACompileError as error:
        sys.exit(str(error))
