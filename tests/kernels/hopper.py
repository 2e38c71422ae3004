"""Compiles the launchers' kernels for a GPU on a machine without one and prints their resources as JSON.

`python -m tests.kernels.hopper [capability]`, 90 if not given, in a process whose Triton is not interpreting. Triton
asks its driver for the target; this driver names it, and every launch stops after compilation. The tensors are on the
meta device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bsa_compile.kernels import config
from bsa_compile.kernels.attend_backward import attend_backward
from bsa_compile.kernels.attend_forward import attend_forward
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.hopper_backward import attend_backward_hopper
from bsa_compile.kernels.hopper_forward import attend_forward_hopper
from bsa_compile.kernels.pool import pool
from bsa_compile.kernels.score import Scorer
from bsa_compile.kernels.select import select
from bsa_compile.kernels.share import share_lists

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Others speak another Gluon, and the Hopper kernels are not taken with them.
HAS_GLUON = tuple(int(n) for n in triton.__version__.split(".")[:2]) in config.GLUON_TRITON
compiled: list[tuple[str, Any]] = []


class Driver:
    """Stands in for Triton's CUDA driver."""

    launcher_cls = utils = None

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def only_compile(capability: int = 90) -> None:
    """From here on a launch compiles its kernel for that GPU, notes it in `compiled`, and runs nothing."""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(Driver(capability))
    config.has_boxes = lambda device: capability >= 90
    JITFunction.run = compile_only


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack (spills), shared memory and the instructions that tell which path it is.

    `waits` counts the products that end a group of asynchronous ones: as many as products where ptxas serialises them.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([CUOBJDUMP.with_name("nvdisasm"), "-c", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "waits": len(re.findall(r"HGMMA.*gsb0", code)),
    }


def compile_all(
    grid: Triple,
    tile: Triple,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "raster",
    path: str | None = None,
    fused: bool = False,
    cdf: float | None = None,
) -> dict[str, dict[str, int]]:
    """Resources of every kernel of one call, forward and backward, by name."""
    compiled.clear()
    heads, tiles = 8, config.num_tiles(grid, tile)
    tokens = tiles * config.volume(tile) if layout == "tile" else config.volume(grid)
    q = torch.empty(1, heads, tokens, head_dim, dtype=dtype, device="meta")
    if fused:
        q = torch.empty(1, tokens, 3, heads, head_dim, dtype=dtype, device="meta")[:, :, 0].transpose(1, 2)
    pooled = pool(q, grid, tile, layout)
    counts, lists = select(pooled, pooled, max(1, tiles // 16), cdf, head_dim**-0.5)
    if cdf is not None:  # the other kernels do not depend on the criterion
        return {name: resources(kernel) for name, kernel in compiled}
    tail = (grid, tile, grid, tile, head_dim**-0.5, layout)
    out, lse = attend_forward(q, q, q, counts, lists, *tail, path=path)
    plans = config.plan_gluon(q, q, q, *tail)
    plans_backward = config.plan_gluon_backward(q, q, q, out, *tail)
    if capability() != 90:
        share_lists(counts, lists, grid, tile, 64, 2)
    elif path is None and HAS_GLUON and not isinstance(plans, str) and not isinstance(plans_backward, str):
        scorer = Scorer(pooled, pooled, config.row_layout(tiles), launch=config.HOPPER_SCORE)
        scorer(torch.empty(heads * tiles * scorer.layout.width, device="meta"), 0, heads, 0, tiles)
        attend_forward_hopper(q, q, q, counts, lists, *tail[:5], plans, programs=132)
        attend_backward_hopper(out, None, q, q, q, out, lse, counts, lists, *tail[:5], plans_backward, programs=132)
    attend_backward(out, None, q, q, q, out, lse, counts, lists, *tail, path=path)
    return {name: resources(kernel) for name, kernel in compiled}


def capability() -> int:
    return triton.runtime.driver.active.get_current_target().arch


PRODUCTION: dict[str, dict[str, Any]] = {
    "24x44x80": {"grid": (24, 44, 80), "tile": (4, 4, 4)},
    "24x45x80, fused qkv": {"grid": (24, 45, 80), "tile": (4, 4, 4), "fused": True},
    "24x44x80, 128": {"grid": (24, 44, 80), "tile": (4, 4, 8)},
    "24x44x80 by pointers": {"grid": (24, 44, 80), "tile": (4, 4, 4), "path": "pointer"},
    "24x44x80, mass": {"grid": (24, 44, 80), "tile": (4, 4, 4), "cdf": 0.5},
    # Triton makes a constant of an argument that is 1, which is no tensor then.
    "one tile": {"grid": (4, 4, 4), "tile": (4, 4, 4)},
    "one tile, mass": {"grid": (4, 4, 4), "tile": (4, 4, 4), "cdf": 0.5},
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "24x44x80": {"grid": (24, 44, 80), "tile": (4, 4, 4)},
}

if __name__ == "__main__":
    only_compile(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
    cases = PRODUCTION if capability() == 90 else ELSEWHERE
    print(json.dumps({name: compile_all(**options) for name, options in cases.items()}))
