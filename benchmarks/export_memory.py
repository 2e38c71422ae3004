"""Peak memory of `bsa-compile export --format onnx` on a checkpoint too large to copy without notice.

python benchmarks/export_memory.py [--hidden 1536] [--depth 12] [--json FILE]

Linux tells the memory of a process apart: anonymous pages are copies that the process made, file pages are the
checkpoint itself, mapped. An export that copied the weights once would show them among the anonymous pages.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from bsa_compile.models.longcat import LongCatVideoTransformer3DModel

ROOT = Path(__file__).resolve().parent.parent
GIB_IN_KIB = 1 << 20


def make_checkpoint(folder: Path, hidden: int, depth: int) -> int:
    """Write random weights of the DiT's layout; returns their bytes."""
    model = LongCatVideoTransformer3DModel(
        hidden_size=hidden, depth=depth, num_heads=hidden // 128, caption_channels=512, text_tokens_zero_pad=True
    )
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def peak_memory(command: list[str]) -> dict[str, float]:
    """GiB at their highest, each by itself, while a command runs."""
    peaks = {"RssAnon": 0.0, "RssFile": 0.0}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for name in peaks:
            found = re.search(rf"{name}:\s+(\d+)", status)
            if found:
                peaks[name] = max(peaks[name], int(found[1]) / GIB_IN_KIB)
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"the export ended with status {process.returncode}")
    return {"anonymous_gib": round(peaks["RssAnon"], 2), "file_gib": round(peaks["RssFile"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tiny = ROOT / "bsa_compile" / "data" / "tiny_longcat"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_checkpoint(folder / "large", args.hidden, args.depth)

        def export(checkpoint: Path) -> dict[str, float]:
            output = folder / "out" / "model.onnx"
            options = ["--grid", "4,8,8", "--text-tokens", "16", "--output", str(output)]
            return peak_memory([sys.executable, "-m", "bsa_compile", "export", str(checkpoint), *options])

        result = {
            "torch": torch.__version__,
            "weights_gib": round(size / 2**30, 2),
            "export": export(folder / "large"),
            "export_of_the_tiny_checkpoint": export(tiny),
        }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
