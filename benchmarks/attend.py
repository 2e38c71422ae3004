"""Times the attention kernels on a CUDA GPU against dense attention, all in one run.

    python benchmarks/attend.py --json attend.json
    python benchmarks/attend.py --grid 48,44,80 --memory fused
    python benchmarks/attend.py --sweep          # other block sizes, warps and pipeline depths, for setting the presets

Before anything is timed, sampled query tiles and their gradients are compared with fp64; a mismatch ends the run.
TFLOP/s count the work on selected blocks only: 4 * Sq * selected keys * D * H forward, 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from bsa_compile.cli import triple
from bsa_compile.kernels import config
from bsa_compile.kernels.attend_backward import attend_backward
from bsa_compile.kernels.attend_forward import attend_forward
from bsa_compile.kernels.config import Launch
from bsa_compile.kernels.pool import pool
from bsa_compile.kernels.select import select
from bsa_compile.kernels.transpose import transpose_selection
from bsa_compile.structured import shared_fraction, structured_qkv

DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FLASH": SDPBackend.FLASH_ATTENTION}
TOLERANCE = 1e-2  # relative error of bf16 results against fp64


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=triple, default=(24, 44, 80), help="T,H,W")
    parser.add_argument("--tile", type=triple, default=(4, 4, 4), help="t,h,w")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sparsity", default="0.9375", help="fraction of the key tiles that is skipped")
    parser.add_argument(
        "--memory",
        choices=["heads-first", "tokens-first", "fused"],
        default="heads-first",
        help="memory order of q, k, v: contiguous [B, H, S, D], [B, S, H, D], or views of [B, S, 3, H, D]",
    )
    parser.add_argument(
        "--inputs",
        choices=["structured", "random"],
        default="structured",
        help="q, k, v smooth in space and time, as of video, or random ones",
    )
    parser.add_argument("--lists", choices=["selected", "random"], default="selected", help="where the lists come from")
    parser.add_argument("--path", choices=["box", "pointer"], help="refuse the faster paths")
    parser.add_argument("--no-dense", action="store_true", help="skip dense attention")
    parser.add_argument("--sweep", action="store_true", help="also time other launches of each kernel")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    return parser.parse_args(arguments)


class Problem:
    """Inputs of one self-attention and what is done with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.grid, self.tile = options.grid, options.tile
        tokens, heads, width = math.prod(self.grid), options.heads, options.head_dim
        self.scale = width**-0.5
        torch.manual_seed(0)
        new = {"dtype": torch.bfloat16, "device": "cuda"}
        if options.inputs == "structured":
            self.qkv = structured_qkv(self.grid, heads, width, seed=0, **new)
        else:
            self.qkv = tuple(torch.randn(1, heads, tokens, width, **new) for _ in range(3))
        if options.memory == "tokens-first":
            self.qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in self.qkv)
        elif options.memory == "fused":
            self.qkv = tuple(x.transpose(1, 2) for x in torch.stack(self.qkv, 2).transpose(1, 3).contiguous().unbind(2))
        self.grad = torch.randn(1, tokens, heads, width, **new).transpose(1, 2)
        self.tiles = config.num_tiles(self.grid, self.tile)
        self.keep = max(1, math.floor((1 - Decimal(options.sparsity)) * self.tiles))
        self.counts, self.lists = self.choose()
        self.out, self.lse = self.attend()

    @property
    def tail(self) -> tuple[Any, ...]:
        return (self.grid, self.tile, self.grid, self.tile, self.scale, "raster")

    def choose(self) -> tuple[Tensor, Tensor]:
        if self.options.lists == "selected":
            return self.select(*self.pool())
        shape = (self.tiles, self.tiles)
        rows = [
            torch.rand(shape, device="cuda").topk(self.keep).indices.sort(-1).values
            for _ in range(self.qkv[0].shape[1])
        ]
        return torch.full((1, len(rows), self.tiles), self.keep, dtype=torch.int32, device="cuda"), torch.stack(rows)[
            None
        ].int()

    def pool(self) -> tuple[Tensor, Tensor]:
        return pool(self.qkv[0], self.grid, self.tile), pool(self.qkv[1], self.grid, self.tile)

    def select(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return select(q, k, self.keep, None, self.scale)

    def attend(self, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
        return attend_forward(*self.qkv, self.counts, self.lists, *self.tail, launch=launch, path=self.options.path)

    def whole(self) -> tuple[Tensor, Tensor]:
        counts, lists = self.select(*self.pool())
        return attend_forward(*self.qkv, counts, lists, *self.tail, path=self.options.path)

    def backward(self, grad: Tensor | None = None, **launches: Launch) -> tuple[Tensor, Tensor, Tensor]:
        grad = self.grad if grad is None else grad
        saved = (*self.qkv, self.out, self.lse, self.counts, self.lists)
        return attend_backward(grad, None, *saved, *self.tail, path=self.options.path, **launches)

    def selected_keys(self) -> float:
        """Keys per query, on average: tiles at the edges may be partial."""
        sizes = self.tile_sizes().double()
        listed = torch.arange(self.lists.shape[-1], device="cuda") < self.counts[..., None]
        keys = torch.where(listed, sizes[torch.where(listed, self.lists, 0).long()], 0).sum(-1)
        return float((keys * sizes).sum() / sizes.sum() / keys.shape[1])

    def tile_sizes(self) -> Tensor:
        return (self.table() >= 0).sum(-1)

    def table(self) -> Tensor:
        """`[N, V]`: token of each position of each tile, -1 for none."""
        counts = config.tile_counts(self.grid, self.tile)
        padded = [n * side for n, side in zip(counts, self.tile, strict=True)]
        token = torch.full(padded, -1, device="cuda")
        token[tuple(slice(size) for size in self.grid)] = torch.arange(math.prod(self.grid), device="cuda").reshape(
            self.grid
        )
        split = [size for pair in zip(counts, self.tile, strict=True) for size in pair]
        return token.reshape(split).permute(0, 2, 4, 1, 3, 5).reshape(self.tiles, -1)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(problem: Problem, samples: int = 6) -> dict[str, float]:
    """Relative errors against fp64: of sampled query tiles, and of the gradients that reach these tiles alone.

    Raises:
        SystemExit: one is too large or not a number.
    """
    table = problem.table()
    heads = problem.qkv[0].shape[1]
    worst: dict[str, float] = {}
    for head in sorted({0, heads - 1}):
        q, k, v = (x[0, head].double().requires_grad_() for x in problem.qkv)
        grad = torch.zeros_like(problem.grad)
        loss, outs, rows_of = 0.0, [], []
        for tile in torch.linspace(0, problem.tiles - 1, samples).long().unique().tolist():
            rows = table[tile][table[tile] >= 0]
            columns = table[problem.lists[0, head, tile, : int(problem.counts[0, head, tile])].long()].flatten()
            columns = columns[columns >= 0]
            out = (q[rows] @ k[columns].T * problem.scale).softmax(-1) @ v[columns]
            grad[0, head, rows] = problem.grad[0, head, rows]
            loss = loss + (out * grad[0, head, rows]).sum()
            outs.append(out.detach())
            rows_of.append(rows)
        wanted = torch.autograd.grad(loss, (q, k, v))
        errors = {"out": relative_error(problem.out[0, head, torch.cat(rows_of)], torch.cat(outs))}
        for name, got, want in zip(("dq", "dk", "dv"), problem.backward(grad), wanted, strict=True):
            errors[name] = relative_error(got[0, head], want)
        for name, error in errors.items():
            worst[name] = error if math.isnan(error) else max(error, worst.get(name, 0.0))
    text = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    if not all(error < TOLERANCE for error in worst.values()):
        sys.exit(f"wrong results, nothing is timed: relative errors against fp64: {text}")
    print(f"relative errors against fp64 on sampled tiles: {text}")
    return worst


def milliseconds(call: Callable[[], Any]) -> float:
    return do_bench(call, warmup=50, rep=300, return_mode="median")


def dense_times(problem: Problem) -> dict[str, float]:
    """Dense forward and backward of each backend that runs here."""
    times: dict[str, float] = {}
    for name, backend in DENSE.items():
        q, k, v = (x.detach().contiguous().requires_grad_() for x in problem.qkv)
        grad = problem.grad.contiguous()
        try:
            with sdpa_kernel(backend):
                times[f"dense {name} forward"] = milliseconds(
                    lambda q=q, k=k, v=v: scaled_dot_product_attention(q.detach(), k.detach(), v.detach())
                )
                out = scaled_dot_product_attention(q, k, v)
            times[f"dense {name} backward"] = milliseconds(
                lambda out=out, q=q, k=k, v=v, grad=grad: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
            )
        except RuntimeError as exc:
            print(f"dense {name} is not available here: {str(exc).splitlines()[0]}")
    return times


def our_times(problem: Problem) -> dict[str, float]:
    pooled = problem.pool()
    return {
        "pool q and k": milliseconds(problem.pool),
        "select": milliseconds(lambda: problem.select(*pooled)),
        "attend forward": milliseconds(problem.attend),
        "whole op forward": milliseconds(problem.whole),
        "transpose": milliseconds(lambda: transpose_selection(problem.counts, problem.lists, problem.tiles)),
        "attend backward": milliseconds(problem.backward),
    }


def sweep(problem: Problem) -> dict[str, list[dict[str, Any]]]:
    """Times of other launches, best first. Those that do not fit the GPU are left out."""
    positions = math.prod(problem.tile)
    blocks = [block for block in (64, 128) if block <= positions] or [32]
    runs: dict[str, Callable[[Launch], Any]] = {
        "attend forward": lambda launch: problem.attend(launch),
        "attend backward, dq launch": lambda launch: problem.backward(launch_q=launch),
        "attend backward, dk and dv launch": lambda launch: problem.backward(launch_k=launch),
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        found = []
        for block_q, block_k, warps, stages, registers in itertools.product(
            blocks, blocks, (4, 8), (1, 2, 3), (None, 168)
        ):
            launch = Launch(block_q, block_k, warps, stages, registers)
            if registers is not None and warps == 8:
                continue
            try:
                run(launch)
                ms = do_bench(partial(run, launch), warmup=10, rep=60, return_mode="median")
                found.append({"ms": ms, **asdict(launch)})
            except Exception as exc:  # too much shared memory, or a block that a kernel cannot be compiled for
                print(f"  {name} {launch}: {type(exc).__name__}")
        results[name] = sorted(found, key=lambda entry: entry["ms"])
        print(f"{name}: best launches")
        for entry in results[name][:8]:
            print(
                "  "
                + ", ".join(f"{key} {value:.3f}" if key == "ms" else f"{key} {value}" for key, value in entry.items())
            )
    return results


def report(problem: Problem, times: dict[str, float]) -> dict[str, dict[str, float]]:
    """Print the table; returns its numbers."""
    heads, tokens, width = problem.qkv[0].shape[1:]
    keys = problem.selected_keys()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':24}{'ms':>10}{'TFLOP/s':>10}{'x cuDNN':>10}")
    for name, ms in times.items():
        row = {"ms": ms}
        way = "backward" if "backward" in name else "forward" if "forward" in name else None
        if way:
            work = 4 * tokens * (tokens if name.startswith("dense") else keys) * width * heads
            row["tflops"] = work * (2.5 if way == "backward" else 1) / ms / 1e9
            if f"dense cuDNN {way}" in times:
                row["speedup"] = times[f"dense cuDNN {way}"] / ms
        rows[name] = row
        cells = [f"{row['ms']:10.3f}"] + [
            f"{row[key]:10.{digits}f}" if key in row else f"{'':10}" for key, digits in (("tflops", 0), ("speedup", 2))
        ]
        print(f"{name:24}{''.join(cells)}")
    return rows


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    problem = Problem(options)
    path = config.forward_path(*problem.qkv, *problem.tail, path=options.path)
    setting = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "grid": problem.grid,
        "tile": problem.tile,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "sparsity": options.sparsity,
        "kept_tiles": f"{problem.keep} of {problem.tiles}",
        "memory": options.memory,
        "inputs": options.inputs,
        "lists": options.lists,
        "shared": shared_fraction(problem.counts, problem.lists, problem.grid, problem.tile),  # with w-neighbours
        "path": f"{path.name}: {path.reason}",
        "launch": asdict(path.launch),
    }
    for name, value in setting.items():
        print(f"{name:12}{value}")
    errors = check(problem)
    times = {} if options.no_dense else dense_times(problem)
    times.update(our_times(problem))
    results: dict[str, Any] = {"setting": setting, "errors": errors, "times": report(problem, times)}
    if options.sweep:
        results["sweep"] = sweep(problem)
    if options.json:
        target = Path(options.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
