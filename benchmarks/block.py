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
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import bsa_compile
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel

GRIDS = ((24, 44, 80), (48, 44, 80))
TEXT_TOKENS = 512


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of a call's time on the device."""
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def run_model(depth: int, grid: tuple[int, int, int], sparsity: float, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds and peak memory of a model of `depth` blocks, by side."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LongCatVideoTransformer3DModel(depth=depth).to(torch.bfloat16).eval()
        for parameter in model.parameters():  # random everywhere: the released weights have no zeros either
            torch.nn.init.normal_(parameter, std=0.02)
        frames, height, width = grid
        inputs = {
            "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, dtype=torch.bfloat16),
            "timestep": torch.full((1,), 500.0),
            "encoder_hidden_states": torch.randn(1, 1, TEXT_TOKENS, 4096, dtype=torch.bfloat16),
        }
    fast = bsa_compile.optimize(model, bsa_compile.BSAPolicy(sparsity=sparsity))
    sides: dict[str, dict[str, float]] = {}
    with torch.no_grad(), sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        for name, switch in (("dense", fast.disable_bsa), ("block_sparse", fast.enable_bsa)):
            switch()
            fast(**inputs)  # compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fast(**inputs)
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            sides[name] = {"ms": milliseconds(lambda: fast(**inputs), repeats), "peak_gib": peak}
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
    def triple(text: str) -> tuple[int, int, int]:
        t, h, w = (int(part) for part in text.split(","))
        return t, h, w

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
