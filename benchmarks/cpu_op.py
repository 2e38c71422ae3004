"""Block-sparse attention on the CPU against torch's dense attention: raster order in and out, both in one run.

python benchmarks/cpu_op.py [--grid 8 32 32] [--heads 4] [--head-dim 64] [--sparsity 0.9375] [--backward] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from bsa_compile.ops import block_sparse_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def interleaved_medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds per call; the calls take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run the comparison that the arguments describe."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    tokens = args.grid[0] * args.grid[1] * args.grid[2]
    shape = (args.batch, tokens, args.heads, args.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(DTYPES[args.dtype]).transpose(1, 2) for _ in range(4))

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = block_sparse_attention(
            q, k, v, grid_q=args.grid, tile_q=args.tile, sparsity=args.sparsity, cdf_threshold=args.cdf_threshold
        )
        assert isinstance(out, torch.Tensor)
        return out

    calls: dict[str, Callable[[], object]] = {"dense": lambda: dense(q, k, v), "bsa": lambda: sparse(q, k, v)}
    if args.backward:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        for name, op in (("dense backward", dense), ("bsa backward", sparse)):
            out = op(*leaves)
            calls[name] = lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # type: ignore[misc]
    times = interleaved_medians(calls, args.repeats)
    result: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "grid": args.grid,
        "tile": args.tile,
        "batch": args.batch,
        "heads": args.heads,
        "head_dim": args.head_dim,
        "dtype": args.dtype,
        "sparsity": args.sparsity,
        "cdf_threshold": args.cdf_threshold,
        "repeats": args.repeats,
        "milliseconds": {name: round(value, 2) for name, value in times.items()},
        "ratio": round(times["dense"] / times["bsa"], 2),
    }
    if args.backward:
        result["ratio_backward"] = round(times["dense backward"] / times["bsa backward"], 2)
    return result


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=[8, 32, 32], metavar=("T", "H", "W"))
    parser.add_argument("--tile", type=int, nargs=3, default=[4, 4, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--sparsity", type=float, default=None, help="default 0.9375 unless --cdf-threshold is given")
    parser.add_argument("--cdf-threshold", type=float, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backward", action="store_true", help="also time the backward passes")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    args = parser.parse_args(argv)
    if args.sparsity is None and args.cdf_threshold is None:
        args.sparsity = 0.9375
    result = measure(args)
    for key, value in result.items():
        print(f"{key}: {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
