"""Time per token of the block-sparse forward as grids grow with the number of selected tiles, and on partial tiles.

    python benchmarks/scaling.py --json scaling.json

Structured q, k, v (`bsa_compile.structured`), lists made by the gate, bf16, 8 heads of 128, tiles 4x4x4, 82 selected
tiles a query tile; 24x45x80 selects as many of its tiles as sparsity 0.9375 does, 90.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from bsa_compile.kernels.attend_forward import attend_forward
from bsa_compile.kernels.pool import pool
from bsa_compile.kernels.select import select
from bsa_compile.structured import shared_fraction, structured_qkv

TILE, HEADS, HEAD_DIM = (4, 4, 4), 8, 128
CASES = (((24, 30, 52), 82), ((24, 44, 80), 82), ((48, 44, 80), 82), ((96, 44, 80), 82), ((24, 45, 80), 90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    rows = []
    for grid, keep in CASES:
        q, k, v = structured_qkv(grid, HEADS, HEAD_DIM, seed=0, dtype=torch.bfloat16, device="cuda")
        scale = HEAD_DIM**-0.5
        lists = select(pool(q, grid, TILE), pool(k, grid, TILE), keep, None, scale)
        ms = do_bench(
            lambda q=q, k=k, v=v, lists=lists, grid=grid: attend_forward(
                q, k, v, *lists, grid, TILE, grid, TILE, HEAD_DIM**-0.5
            ),
            warmup=100,
            rep=500,
            return_mode="median",
        )
        tokens = math.prod(grid)
        row = {"grid": list(grid), "tokens": tokens, "kept": keep, "ms": ms, "ns_per_token": ms / tokens * 1e6}
        row["share"] = shared_fraction(*lists, grid, TILE)
        rows.append(row)
        print(
            f"{'x'.join(map(str, grid)):>9} {tokens:8,} tokens, {keep} tiles kept, neighbours share "
            f"{row['share']:.0%}: {ms:7.3f} ms, {row['ns_per_token']:.1f} ns a token"
        )
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        found = {"device": torch.cuda.get_device_name(), **versions, "cases": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
