"""What a step costs on 2 to 64 GPUs, by arithmetic: bytes that each rank sends, what hides behind work, the speed-up.

    python benchmarks/parallel_model.py                      # the table of docs/parallel.md
    python benchmarks/parallel_model.py --grid 48,44,80 --link 45 --across 8

Work is what one GPU was measured to take (benchmarks/results, H100), divided by the ranks' real shares. Links are
assumed, not measured: by default 350 of NVLink's nominal 450 GB/s inside a host, 40 of a 400-Gbit card's 50 across.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from bsa_compile.cli import triple
from bsa_compile.parallel.mesh import factor
from bsa_compile.parallel.plan import overlapping_groups
from bsa_compile.parallel.split import FrameSplit, even

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, HIDDEN, HEADS, BYTES = 48, 4096, 32, 2
BLOCK_BYTES = 13.6e9 * BYTES / BLOCKS
COPY_BANDWIDTH = 2.7e12  # bytes per second that a copy reads and writes together, 80% of an H100's nominal 3.35e12
TILE = (4, 4)


@dataclass(frozen=True)
class Measured:
    """One GPU's milliseconds of one block, and of the self-attention in it."""

    block: float
    attention: float

    @classmethod
    def read(cls, grid: tuple[int, int, int]) -> Measured:
        """From the results that are kept."""
        block = json.loads((ROOT / "benchmarks/results/2026-11-26-h100-block.json").read_text())
        scaling = json.loads((ROOT / "benchmarks/results/2026-11-26-h100-scaling.json").read_text())
        (blocks,) = [g["block_sparse"]["ms"] for g in block["grids"] if tuple(g["grid"]) == grid]
        (eight_heads,) = [c["ms"] for c in scaling["cases"] if tuple(c["grid"]) == grid]
        return cls(blocks, eight_heads * HEADS / 8)


@dataclass(frozen=True)
class Cost:
    """One block on one of several ranks, in milliseconds and bytes."""

    ring: int
    ulysses: int
    sent: float
    ulysses_ms: float
    ulysses_shown: float
    ring_ms: float
    ring_shown: float
    weights_ms: float
    weights_shown: float
    work: float

    @property
    def whole_weights(self) -> float:
        """Of a block whose weights every rank has."""
        return self.work + self.ulysses_shown + self.ring_shown

    @property
    def sharded_weights(self) -> float:
        """Of a block whose weights all ranks share."""
        return self.whole_weights + self.weights_shown


def cost(grid: tuple[int, int, int], ranks: int, one: Measured, link: float, across: float, host: int) -> Cost:
    """Model of one block.

    Args:
        grid: (t, h, w).
        ranks: GPUs.
        one: what one GPU takes.
        link: GB/s that a GPU sends to others of its host.
        across: GB/s that it sends to other hosts.
        host: GPUs of a host.
    """
    ring, ulysses = factor(ranks, HEADS)
    t, h, w = grid
    split = FrameSplit.of(h, w, ring, ulysses, TILE if ring > 1 else (1, 1))
    area = h * w
    regions = [b - a for a, b in itertools.pairwise(split.bounds)]
    region = max(regions) * (w if split.axis == 1 else h) / area  # of all tokens, the largest
    share = max(even(round(region * area), ulysses)) / area
    heads = max(even(HEADS, ulysses)) / HEADS
    tensor = t * area * share * HIDDEN * BYTES  # one of q, k, v, o on a rank
    rate = (link if ranks <= host else across) * 1e6  # bytes per millisecond
    exchanged = 4 * tensor * (ulysses - 1) / ulysses
    copies = 4 * 2 * tensor / (COPY_BANDWIDTH / 1e3) if ulysses > 1 else 0.0
    ulysses_ms = exchanged / rate + copies
    groups = overlapping_groups(HEADS, ulysses)
    # The first group's way there and the last one's back show, and what takes longer than attention to the others.
    transfer, attended = exchanged / rate, one.attention * region * heads
    hidden = min(transfer, attended) * (groups - 1) / groups
    ulysses_shown = ulysses_ms - hidden
    # Keys and values of a region's heads: as many bytes as k and v of one rank's tokens, at every step.
    ring_bytes = 2 * tensor * (ring - 1)
    ring_ms = ring_bytes / rate
    per_step = attended / ring
    ring_shown = sum(max(0.0, ring_ms / (ring - 1) - per_step) for _ in range(ring - 1))
    rest = (one.block - one.attention) * share
    work = rest + attended
    weights_ms = BLOCK_BYTES * (ranks - 1) / ranks / rate
    weights_shown = max(0.0, weights_ms - work - ulysses_shown)  # gathered while the block before runs
    sent = exchanged + ring_bytes  # beside the weights
    return Cost(ring, ulysses, sent, ulysses_ms, ulysses_shown, ring_ms, ring_shown, weights_ms, weights_shown, work)


def table(grid: tuple[int, int, int], link: float, across: float, host: int) -> str:
    """Markdown."""
    one = Measured.read(grid)
    lines = [
        "| ranks | ring x Ulysses | work | exchange, shown | ring, shown | weights, shown "
        "| sent | speed-up | sharded |",
        "|---:|:---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for ranks in (2, 3, 4, 8, 16, 32, 64):
        c = cost(grid, ranks, one, link, across, host)
        lines.append(
            f"| {ranks} | {c.ring} x {c.ulysses} | {c.work:.1f} | {c.ulysses_ms:.1f}, {c.ulysses_shown:.1f} "
            f"| {c.ring_ms:.1f}, {c.ring_shown:.1f} | {c.weights_ms:.1f}, {c.weights_shown:.1f} "
            f"| {c.sent / 1e6:.0f} MB | {one.block / c.whole_weights:.1f} | {one.block / c.sharded_weights:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=triple, default=(24, 44, 80), help="24,44,80 or 48,44,80: what was measured")
    parser.add_argument("--link", type=float, default=350.0, help="GB/s to GPUs of the same host")
    parser.add_argument("--across", type=float, default=40.0, help="GB/s to other hosts, per GPU")
    parser.add_argument("--host", type=int, default=8, help="GPUs of a host")
    options = parser.parse_args()
    print(table(options.grid, options.link, options.across, options.host))


if __name__ == "__main__":
    main()
