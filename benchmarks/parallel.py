"""A step of the LongCat DiT on one GPU and on several, block-sparse and compiled: times, memory with FSDP2, overlap.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --json parallel.json
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --mesh ring --depth 8 --grid 24,44,80

Full width (hidden 4096, 32 heads of 128), random weights, bf16. Every rank first runs the model by itself, all at once;
then they share each call. "attention" is the self-attention of one block on inputs with the structure of video, from
q, k, v of a rank's tokens to its output. Times are medians, the slowest rank's. Peak memory is all that a rank
allocates, weights included, the largest rank's. What of the communication passes behind computation is read from a
profiler's trace of one more call on rank 0.

The JSON is written after every grid. Grids that the file holds already from the same device, versions and settings
stay.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import bsa_compile
from bsa_compile.backend import bsa
from bsa_compile.benchmarking import overlap, results
from bsa_compile.benchmarking.dit import TEXT_TOKENS, random_inputs, random_model
from bsa_compile.cli import triple
from bsa_compile.commands import console
from bsa_compile.errors import BSACompileError, UsageError, must
from bsa_compile.files import check_writable
from bsa_compile.parallel import shard_weights
from bsa_compile.parallel.mesh import resolve, tile_units
from bsa_compile.parallel.plan import Plan, overlapping_groups
from bsa_compile.parallel.split import FrameSplit
from bsa_compile.structured import structured_qkv
from bsa_compile.timing import timed

GRIDS = ((24, 44, 80), (48, 44, 80))
HEADS, WIDTH = 32, 128
GIB = 2**30
Grid = tuple[int, int, int]


def measure(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of a call on the device, the slowest rank's, and peak memory of the largest."""
    call()  # compiles
    call()
    torch.cuda.synchronize(device)
    gc.collect()  # models of the grid before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        seconds.append(timed(call, device)[0])
    found = torch.tensor([statistics.median(seconds), torch.cuda.max_memory_allocated(device) / GIB], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return {"median_s": float(found[0]), "peak_gib": float(found[1])}


def traced(call: Callable[[], Any]) -> dict[str, float]:
    """The trace of one call that all ranks begin together, after one in which the profiler gets ready."""
    overlap.traced(call)
    dist.barrier()
    return overlap.traced(call)


def step(
    grid: Grid, depth: int, mesh: DeviceMesh, policy: bsa_compile.BSAPolicy, device: torch.device, repeats: int
) -> dict[str, Any]:
    """One call of the model, alone, shared, and shared with sharded weights."""
    model = random_model(device, depth=depth)
    inputs = random_inputs(model, grid)
    found: dict[str, Any] = {}
    with torch.no_grad():
        fast = bsa_compile.optimize(model, policy, dynamic=False)
        found["one"] = measure(partial(fast, **inputs), device, repeats)
        expected = fast(**inputs).float()
        fast = bsa_compile.optimize(model, policy, dynamic=False, mesh=mesh)
        found["shared"] = measure(partial(fast, **inputs), device, repeats)
        found["overlap"] = traced(partial(fast, **inputs))
        found["relative_difference"] = float((fast(**inputs).float() - expected).norm() / expected.norm())
        del fast, expected
        fast = bsa_compile.optimize(shard_weights(model, mesh), policy, dynamic=False, mesh=mesh)
        del model
        torch.cuda.empty_cache()
        found["sharded_weights"] = measure(partial(fast, **inputs), device, repeats)
        found["overlap_sharded"] = traced(partial(fast, **inputs))
    return found


def attention(
    grid: Grid, mesh: DeviceMesh, policy: bsa_compile.BSAPolicy, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Self-attention alone."""
    ranks = resolve(mesh, HEADS)
    units = tile_units([policy.chunk_3d_shape_q, policy.chunk_3d_shape_k])
    split = FrameSplit.of(grid[1], grid[2], ranks.ring.size, ranks.ulysses.size, units)
    plan = Plan(split, ranks, HEADS, overlapping_groups(HEADS, ranks.ulysses.size))
    q, k, v = structured_qkv(grid, heads=HEADS, head_dim=WIDTH, dtype=torch.bfloat16, device=device)
    mine = [plan.take(x) for x in (q, k, v)]

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return bsa_compile.attention(q, k, v, grid_q=grid)

    def several(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plan.attend(q, k, v, grid_q=plan.share(grid), grid_k=plan.share(grid), role="self")

    options = {"backend": bsa, "options": {"policy": policy}, "dynamic": False, "fullgraph": True}
    with torch.no_grad():
        alone, shared = torch.compile(one, **options), torch.compile(several, **options)
        return {
            "one": measure(lambda: alone(q, k, v), device, repeats),
            "shared": measure(lambda: shared(*mine), device, repeats),
            "overlap": traced(lambda: shared(*mine)),
        }


def told(row: dict[str, Any]) -> str:
    """A grid's results in a few lines."""
    lines = []
    for what in ("attention", "step"):
        one, shared, trace = row[what]["one"], row[what]["shared"], row[what]["overlap"]
        times = f"{1000 * one['median_s']:.1f} ms, shared {1000 * shared['median_s']:.1f}"
        hidden = f"communication {trace['communication_ms']:.1f} ms, hidden {trace['hidden_ms']:.1f}"
        lines.append(f"{row['grid']} {what}: {times}: {one['median_s'] / shared['median_s']:.2f}x; {hidden}")
    one, sharded, trace = row["step"]["one"], row["step"]["sharded_weights"], row["step"]["overlap_sharded"]
    share = f"{sharded['peak_gib']:.1f} GiB, {sharded['peak_gib'] / one['peak_gib']:.0%} of one GPU's"
    hidden = f"communication {trace['communication_ms']:.1f} ms, hidden {trace['hidden_ms']:.1f}"
    lines.append(f"  sharded weights: {1000 * sharded['median_s']:.1f} ms, {share}; {hidden}")
    lines.append(f"  relative difference of the outputs: {row['step']['relative_difference']:.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=triple, action="append", help="T,H,W; may be repeated")
    parser.add_argument("--depth", type=int, default=48, help="blocks (default: 48, the released model's)")
    parser.add_argument("--mesh", choices=("context", "ulysses", "ring"), default="context")
    parser.add_argument("--sparsity", type=float, default=0.9375)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.repeats < 1:
        raise UsageError(must("--repeats", "be at least 1", options.repeats))
    if not torch.cuda.is_available() or "WORLD_SIZE" not in os.environ:
        sys.exit("this benchmark needs CUDA GPUs: start it with torchrun, one process per GPU")
    if options.json is not None:
        check_writable(options.json, "--json")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=(options.mesh,))
    policy = bsa_compile.BSAPolicy(sparsity=options.sparsity)
    data: dict[str, Any] = {
        **results.header("parallel", torch.device("cuda", 0)),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "ranks": dist.get_world_size(),
        "mesh": options.mesh,
        "depth": options.depth,
        "text_tokens": TEXT_TOKENS,
        "sparsity": options.sparsity,
        "repeats": options.repeats,
        "grids": [],
    }
    same = ("nccl", "ranks", "mesh", "depth", "text_tokens", "sparsity", "repeats")
    results.keep_earlier(data, options.json, "grids", same)
    for grid in options.grid or GRIDS:
        row = {
            "grid": list(grid),
            "attention": attention(grid, mesh, policy, device, options.repeats),
            "step": step(grid, options.depth, mesh, policy, device, options.repeats),
        }
        torch.cuda.empty_cache()
        data["grids"] = results.put_row(data["grids"], row, lambda one: one["grid"])
        if dist.get_rank() == 0:
            print(told(row), flush=True)
            if options.json is not None:
                console.put_json(data, str(options.json))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except BSACompileError as error:
        sys.exit(str(error))
