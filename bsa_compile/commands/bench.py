"""`bsa-compile bench`: dense against block-sparse; attention alone, beside its peers if asked, or the whole model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsa_compile import ops
from bsa_compile.api import optimize
from bsa_compile.capture import AttentionInputs, select_tiles
from bsa_compile.commands import bench_peers, common, console
from bsa_compile.errors import PolicyError, must
from bsa_compile.files import check_writable
from bsa_compile.grid import Shape3
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.ops.validate import check_head_dim
from bsa_compile.selection import BlockSelection
from bsa_compile.structured import shared_fraction
from bsa_compile.timing import Timing, measure, timed

TEXT_TOKENS = 16
# Sizes of attention where nothing is said: the tiny checkpoint's heads on a CPU, a quarter of LongCat's on a GPU.
CPU_DEFAULTS: dict[str, Any] = {"heads": 2, "head_dim": 64, "dtype": "float32"}
CUDA_DEFAULTS: dict[str, Any] = {"heads": 8, "head_dim": 128, "dtype": "bfloat16"}


def run(args: argparse.Namespace) -> int:
    """Time, print, and write JSON where asked."""
    if args.json not in (None, "-"):
        check_writable(args.json, "--json")
    device = common.resolve_device(args.device)
    if args.what == "attention" and args.peers:
        return bench_peers.run(args, attention_sizes(args, device), device)
    bench = {"attention": bench_attention, "model": bench_model}[args.what]
    data = {
        "what": args.what,
        "versions": common.versions(),
        "device": common.describe_device(device),
        "repeats": args.repeats,
        **bench(args, device),
    }
    if args.json is not None:
        console.put_json(data, args.json)
    if args.json != "-":
        print(as_text(data, device))
    return 0


def bench_attention(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Dense SDPA against pool, select and attend, on random q, k, v."""
    sizes = attention_sizes(args, device)
    check_head_dim(sizes["head_dim"])
    grid, dtype = common.check_grid(args.grid or common.GRIDS[device.type]), common.DTYPES[sizes["dtype"]]
    policy = common.chosen_policy(args)
    site = policy.resolve(module="", role="self", grid_q=grid.shape, grid_k=grid.shape)
    if site.dense:
        raise PolicyError(must("policy", "make attention block-sparse", f"a dense one ({site.dense})"))
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes["heads"], grid.num_tokens, sizes["head_dim"])
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    inputs = AttentionInputs(q, k, grid.shape, grid.shape, "self")
    selection = select_tiles(inputs, site)

    tile_q, tile_k = site.chunk_3d_shape_q, site.chunk_3d_shape_k

    def block_sparse() -> Any:
        return ops.block_sparse_attention(
            q,
            k,
            v,
            grid_q=grid,
            tile_q=tile_q,
            tile_k=tile_k,
            sparsity=site.sparsity,
            cdf_threshold=site.cdf_threshold,
            implementation=site.attend,
        )

    def attend() -> Any:
        lists, scale = (selection.kv_num_blocks, selection.kv_indices), q.shape[-1] ** -0.5
        where = (grid.shape, tile_q, grid.shape, tile_k)
        return torch.ops.bsa.attend(q, k, v, *lists, *where, scale, "raster", site.attend)

    sides: dict[str, Callable[[], Any]] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
    if device.type == "cuda":
        sides["dense (cuDNN)"] = lambda: _cudnn(q, k, v)
    sides["block-sparse"] = block_sparse
    sides["  pool and select"] = lambda: select_tiles(inputs, site)
    sides["  attend"] = attend
    times: dict[str, Timing] = {}
    unavailable: dict[str, str] = {}
    with console.Progress(len(sides)) as progress, torch.no_grad():
        for name, call in sides.items():
            progress(f"timing {name.strip()}")
            try:
                times[name] = measure(call, device, args.repeats, args.warmup)
            except RuntimeError as exc:
                if name != "dense (cuDNN)":
                    raise
                unavailable[name] = str(exc).splitlines()[0]
    return {
        "grid": list(grid.shape),
        "tokens": grid.num_tokens,
        "heads": sizes["heads"],
        "head_dim": sizes["head_dim"],
        "dtype": sizes["dtype"],
        "policy": policy.to_dict(),
        "kept": selection.density,
        "shared_fraction": shared(selection, grid.shape, tile_q),
        **summary(times),
        "unavailable": unavailable,
    }


def shared(selection: BlockSelection, grid: Shape3, tile: Shape3) -> float | None:
    """Share of their lists that query tiles have in common with their neighbour along w; None without neighbours."""
    if grid[2] <= tile[2]:
        return None
    return shared_fraction(selection.kv_num_blocks, selection.kv_indices, grid, tile)


def attention_sizes(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """heads, head_dim and dtype: what was said, else the device's defaults."""
    defaults = CUDA_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    return {name: default if getattr(args, name) is None else getattr(args, name) for name, default in defaults.items()}


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def bench_model(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One call of the optimized model with block sparse attention off and on."""
    backend, note = common.resolve_backend(args.backend, device)
    grid = common.check_grid(args.grid or common.GRIDS[device.type])
    folder = common.find_checkpoint(common.TINY_CHECKPOINT if args.checkpoint is None else args.checkpoint)
    dtype = common.model_dtype(args.dtype, device)
    policy = common.chosen_policy(args, common.meta_model(folder))
    model = LongCatVideoTransformer3DModel.from_pretrained(folder, torch_dtype=dtype, device=device)
    inputs = common.model_inputs(model, grid, text_tokens=TEXT_TOKENS)
    fast = optimize(model, policy, backend=backend, mode=args.mode)
    switches = {"dense": fast.disable_bsa, "block-sparse": fast.enable_bsa}
    times: dict[str, Timing] = {}
    first: dict[str, float] = {}
    with console.Progress(2 * len(switches)) as progress, torch.no_grad():
        for name, switch in switches.items():
            switch()
            progress(f"compiling the {name} model")
            first[name] = timed(lambda: fast(**inputs), device)[0]
            progress(f"timing the {name} model")
            times[name] = measure(lambda: fast(**inputs), device, args.repeats, args.warmup)
    return {
        "checkpoint": str(folder) if args.checkpoint is not None else Path(folder).name,
        "grid": list(grid.shape),
        "tokens": grid.num_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": backend,
        "mode": args.mode,
        "notes": [note] if note else [],
        "policy": policy.to_dict(),
        "first_call_s": first,
        **summary(times),
        "attention": common.attention_totals(fast.report.sites),
        "report": fast.report.to_dict(),
    }


def summary(times: dict[str, Timing]) -> dict[str, Any]:
    """All times, and the speed-up over the fastest dense side."""
    dense = min((name for name in times if name.startswith("dense")), key=lambda name: times[name].median)
    return {
        "times": {name.strip(): timing.to_dict() for name, timing in times.items()},
        "fastest_dense": dense,
        "speedup": times[dense].median / times["block-sparse"].median,
    }


def as_text(data: dict[str, Any], device: torch.device) -> str:
    """For people: versions and device stand beside the figures."""
    sizes = [f"grid {console.shape(data['grid'])}", f"{data['tokens']:,} tokens", data["dtype"]]
    if data["what"] == "attention":
        sizes += [f"{data['heads']} heads of {data['head_dim']}", f"{console.percent(data['kept'])} of tile pairs kept"]
        if data["shared_fraction"] is not None:
            sizes.append(f"w-neighbours share {data['shared_fraction']:.0%} of their blocks")
    else:
        sizes += [data["checkpoint"], f"backend {data['backend']}"]
    rows = [("", "median", "min", "max")]
    for name, timing in data["times"].items():
        cells = (console.seconds(timing[key]) for key in ("median_s", "min_s", "max_s"))
        rows.append((name, *cells))
    lines = [f"{data['what']}: {', '.join(sizes)}", common.device_line(device), console.table(rows)]
    lines += [f"  {name}: unavailable ({why})" for name, why in data.get("unavailable", {}).items()]
    lines += [f"  note: {note}" for note in data.get("notes", ())]
    lines.append(
        f"block-sparse is {data['speedup']:.2f}x the speed of {data['fastest_dense']} (median of {data['repeats']})"
    )
    return "\n".join(lines)
