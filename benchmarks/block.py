"""One LongCat block of full width, compiled, dense against block-sparse: time and peak memory on a CUDA GPU.

    python benchmarks/block.py --json block.json
    python benchmarks/block.py --grid 24,44,80

The time of a block (hidden 4096, 32 heads of 128, random weights, bf16) is half of what two more blocks add to a model
of two, so that embedding and head do not count. Dense attention is cuDNN's, the fastest in PyTorch on Hopper. Both
sides are the same optimized model, switched. Peak memory is what the model of two blocks allocates beyond its weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import bsa_compile
from bsa_compile.benchmarking.dit import fastest_dense, random_inputs, random_model
from bsa_compile.cli import triple
from bsa_compile.timing import measure as measure_time

GRIDS = ((24, 44, 80), (48, 44, 80))


def run_model(depth: int, grid: tuple[int, int, int], sparsity: float, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds and peak memory of a model of `depth` blocks, by side."""
    device = torch.device("cuda")
    model = random_model(device, depth=depth)
    inputs = random_inputs(model, grid)
    fast = bsa_compile.optimize(model, bsa_compile.BSAPolicy(sparsity=sparsity))
    sides: dict[str, dict[str, float]] = {}
    with torch.no_grad(), fastest_dense():
        for name, switch in (("dense", fast.disable_bsa), ("block_sparse", fast.enable_bsa)):
            switch()
            fast(**inputs)  # compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fast(**inputs)
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            ms = 1e3 * measure_time(lambda: fast(**inputs), device, repeats).median
            sides[name] = {"ms": ms, "peak_gib": peak}
    return sides


def measure(grid: tuple[int, int, int], sparsity: float, repeats: int) -> dict[str, Any]:
    """Both sides at one grid."""
    two, four = (run_model(depth, grid, sparsity, repeats) for depth in (2, 4))
    result: dict[str, Any] = {"grid": list(grid), "tokens": grid[0] * grid[1] * grid[2]}
    for name in two:
        result[name] = {"ms": (four[name]["ms"] - two[name]["ms"]) / 2, "peak_gib": two[name]["peak_gib"]}
    result["speedup"] = result["dense"]["ms"] / result["block_sparse"]["ms"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=triple, action="append", help="T,H,W; may be repeated")
    parser.add_argument("--sparsity", type=float, default=0.9375)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sparsity": options.sparsity,
        "grids": [],
    }
    for grid in options.grid or GRIDS:
        found = measure(grid, options.sparsity, options.repeats)
        results["grids"].append(found)
        dense, sparse = found["dense"], found["block_sparse"]
        print(
            f"{found['tokens']:,} tokens: dense {dense['ms']:.1f} ms, {dense['peak_gib']:.2f} GiB; "
            f"block-sparse {sparse['ms']:.1f} ms, {sparse['peak_gib']:.2f} GiB; {found['speedup']:.2f}x",
            flush=True,
        )
        torch.cuda.empty_cache()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
