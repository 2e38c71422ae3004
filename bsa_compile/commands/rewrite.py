"""`bsa-compile rewrite`: an ONNX file made by others, its self-attention block-sparse."""

from __future__ import annotations

import argparse
import json

from bsa_compile.commands import common
from bsa_compile.exporting import rewrite_onnx


def run(args: argparse.Namespace) -> int:
    """Rewrite the file and print what was done at every attention site."""
    report = rewrite_onnx(args.input, args.output, common.chosen_policy(args), args.grid)
    if args.json:
        print(json.dumps({"output": args.output, **report.to_dict()}, indent=2))
    else:
        print(report)
        print(f"wrote {args.output}")
    return 0
