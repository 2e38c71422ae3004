"""A step of the LongCat DiT on one GPU and on several, block-sparse and compiled: times, and peak memory with FSDP2.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --json parallel.json
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --mesh ring --depth 8 --grid 24,44,80

Full width (hidden 4096, 32 heads of 128), random weights, bf16. Every rank first runs the model by itself, all at once;
then they share each call. "attention" is the self-attention of one block on inputs with the structure of video, from
q, k, v of a rank's tokens to its output. Peak memory is all that a rank allocates, weights included.
"""

from __future__ import annotations

import argparse
import json
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
from bsa_compile.cli import triple
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.parallel import shard_weights
from bsa_compile.parallel.mesh import resolve, tile_units
from bsa_compile.parallel.plan import Plan, overlapping_groups
from bsa_compile.parallel.split import FrameSplit
from bsa_compile.structured import structured_qkv

GRIDS = ((24, 44, 80), (48, 44, 80))
HEADS, WIDTH, TEXT_TOKENS = 32, 128, 512
Grid = tuple[int, int, int]


def measure(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median time of a call on the device, the slowest rank's, and peak memory of the largest."""
    call()  # compiles
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    found = torch.tensor([statistics.median(times), torch.cuda.max_memory_allocated() / 2**30], device="cuda")
    dist.all_reduce(found, "max")
    return {"ms": float(found[0]), "peak_gib": float(found[1])}


def make_model(depth: int) -> LongCatVideoTransformer3DModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LongCatVideoTransformer3DModel(depth=depth).eval()
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def step(grid: Grid, depth: int, mesh: DeviceMesh, policy: bsa_compile.BSAPolicy, repeats: int) -> dict[str, Any]:
    """One call of the model, alone, shared, and shared with sharded weights."""
    frames, height, width = grid
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, dtype=torch.bfloat16, device="cuda"),
        "timestep": torch.full((1,), 500.0, device="cuda"),
        "encoder_hidden_states": torch.randn(1, 1, TEXT_TOKENS, 4096, dtype=torch.bfloat16, device="cuda"),
    }
    model = make_model(depth)
    results: dict[str, Any] = {}
    with torch.no_grad():
        fast = bsa_compile.optimize(model, policy, dynamic=False)
        results["one"] = measure(partial(fast, **inputs), repeats)
        expected = fast(**inputs)
        fast = bsa_compile.optimize(model, policy, dynamic=False, mesh=mesh)
        results["shared"] = measure(partial(fast, **inputs), repeats)
        results["relative_difference"] = float((fast(**inputs) - expected).norm() / expected.norm())
        del fast, expected
        fast = bsa_compile.optimize(shard_weights(model, mesh), policy, dynamic=False, mesh=mesh)
        del model
        torch.cuda.empty_cache()
        results["sharded_weights"] = measure(partial(fast, **inputs), repeats)
    return results


def attention(grid: Grid, mesh: DeviceMesh, policy: bsa_compile.BSAPolicy, repeats: int) -> dict[str, Any]:
    """Self-attention alone."""
    ranks = resolve(mesh, HEADS)
    units = tile_units([policy.chunk_3d_shape_q, policy.chunk_3d_shape_k])
    split = FrameSplit.of(grid[1], grid[2], ranks.ring.size, ranks.ulysses.size, units)
    plan = Plan(split, ranks, HEADS, overlapping_groups(HEADS, ranks.ulysses.size))
    q, k, v = structured_qkv(grid, heads=HEADS, head_dim=WIDTH, dtype=torch.bfloat16, device="cuda")
    mine = [plan.take(x) for x in (q, k, v)]

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return bsa_compile.attention(q, k, v, grid_q=grid)

    def several(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plan.attend(q, k, v, grid_q=plan.share(grid), grid_k=plan.share(grid), role="self")

    options = {"backend": "bsa", "options": {"policy": policy}, "dynamic": False, "fullgraph": True}
    with torch.no_grad():
        alone, shared = torch.compile(one, **options), torch.compile(several, **options)
        return {"one": measure(lambda: alone(q, k, v), repeats), "shared": measure(lambda: shared(*mine), repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=triple, action="append", help="T,H,W; may be repeated")
    parser.add_argument("--depth", type=int, default=8, help="blocks; the released model has 48")
    parser.add_argument("--mesh", choices=("context", "ulysses", "ring"), default="context")
    parser.add_argument("--sparsity", type=float, default=0.9375)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or "WORLD_SIZE" not in os.environ:
        sys.exit("this benchmark needs CUDA GPUs: start it with torchrun, one process per GPU")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=(options.mesh,))
    policy = bsa_compile.BSAPolicy(sparsity=options.sparsity)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "mesh": options.mesh,
        "depth": options.depth,
        "sparsity": options.sparsity,
        "grids": [],
    }
    for grid in options.grid or GRIDS:
        found = {"grid": list(grid), "attention": attention(grid, mesh, policy, options.repeats)}
        found["step"] = step(grid, options.depth, mesh, policy, options.repeats)
        results["grids"].append(found)
        if dist.get_rank() == 0:
            for what in ("attention", "step"):
                one, shared = found[what]["one"], found[what]["shared"]
                print(f"{grid} {what}: {one['ms']:.1f} ms, shared {shared['ms']:.1f}: {one['ms'] / shared['ms']:.2f}x")
            sharded, one = found["step"]["sharded_weights"], found["step"]["one"]
            share = sharded["peak_gib"] / one["peak_gib"]
            print(f"  sharded weights: {sharded['ms']:.1f} ms, {sharded['peak_gib']:.1f} GiB, {share:.0%} of one GPU's")
            print(f"  relative difference of the outputs: {found['step']['relative_difference']:.1e}", flush=True)
        torch.cuda.empty_cache()
    if options.json and dist.get_rank() == 0:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
