"""The ONNX node for block-sparse attention against dense attention, both run by onnxruntime on the CPU.

python benchmarks/onnx_attend.py [--grid 8 32 32] [--heads 4] [--head-dim 64] [--sparsity 0.9375] [--json FILE]
python benchmarks/onnx_attend.py --memory    # peak memory of the node in a process of its own, at 20,480 tokens

Dense is the fastest of the operator `Attention` (opset 23) and of MatMul, Softmax, MatMul; both are printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

MIB = 1 << 20


def build(args: argparse.Namespace) -> dict[str, bytes]:
    """The models to compare, from fp32 q, k, v `[B, H, S, D]` to `[B, H, S, D]`."""
    import onnx
    from onnx import TensorProto, helper

    from bsa_compile.exporting import onnx_function

    scale = args.head_dim**-0.5
    attributes = onnx_function.node_attributes(
        args.grid, args.tile, args.grid, args.tile, args.sparsity, args.cdf_threshold, scale
    )
    sparse = helper.make_node(onnx_function.NODE, ["q", "k", "v"], ["y"], domain=onnx_function.DOMAIN, **attributes)
    plain = [
        helper.make_node("Constant", [], ["scale"], value_float=scale),
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    graphs = {
        "dense Attention": [helper.make_node("Attention", ["q", "k", "v"], ["y"], scale=scale)],
        "dense MatMul-Softmax-MatMul": plain,
        "bsa": [sparse],
    }
    models = {}
    for name, nodes in graphs.items():
        shape = ["B", args.heads, args.grid[0] * args.grid[1] * args.grid[2], args.head_dim]
        q, k, v, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkvy")
        model = helper.make_model(
            helper.make_graph(nodes, "attention", [q, k, v], [y]),
            functions=onnx_function.functions(23),
            opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(onnx_function.DOMAIN, 1)],
            ir_version=11,
        )
        onnx.checker.check_model(model, full_check=True)
        models[name] = model.SerializeToString()
    return models


def session(model: bytes | str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inputs(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """q, k, v from a seeded generator."""
    generator = np.random.default_rng(0)
    shape = (args.batch, args.heads, args.grid[0] * args.grid[1] * args.grid[2], args.head_dim)
    return {name: generator.standard_normal(shape, dtype=np.float32) for name in "qkv"}


def described(args: argparse.Namespace) -> dict[str, object]:
    return {
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "threads": args.threads,
        "grid": args.grid,
        "tile": args.tile,
        "batch": args.batch,
        "heads": args.heads,
        "head_dim": args.head_dim,
        "dtype": "float32",
        "sparsity": args.sparsity,
        "cdf_threshold": args.cdf_threshold,
    }


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Time dense and block-sparse in turns."""
    from cpu_op import interleaved_medians

    feeds = inputs(args)
    calls: dict[str, Callable[[], object]] = {}
    for name, model in build(args).items():
        runner = session(model, args.threads)
        calls[name] = lambda runner=runner: runner.run(None, feeds)  # type: ignore[misc]
    times = interleaved_medians(calls, args.repeats)
    return {
        **described(args),
        "repeats": args.repeats,
        "milliseconds": {name: round(value, 2) for name, value in times.items()},
        "ratio": round(min(value for name, value in times.items() if name != "bsa") / times["bsa"], 2),
    }


def measure_memory(args: argparse.Namespace) -> dict[str, object]:
    """Run the node once in a fresh process that holds numpy, onnxruntime and the inputs alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bsa.onnx"
        path.write_bytes(build(args)["bsa"])
        settings = json.dumps({**vars(args), "json": None})
        command = [sys.executable, __file__, "--child", settings, "--model", str(path)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**described(args), "mib": json.loads(done.stdout)}


def run_child(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Peak memory in MiB: in all, and beyond what imports and inputs take."""
    feeds = inputs(args)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    session(model, args.threads).run(None, feeds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tensor = feeds["q"].nbytes
    sizes = {"peak in all": peak, "peak beyond imports and inputs": peak - before, "one of q, k, v, y": tensor}
    return {name: round(size / MIB, 1) for name, size in sizes.items()}


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=None, metavar=("T", "H", "W"))
    parser.add_argument("--tile", type=int, nargs=3, default=[4, 4, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=None)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=None, help="default 0.9375 unless --cdf-threshold is given")
    parser.add_argument("--cdf-threshold", type=float, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time; Linux")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    parser.add_argument("--child", type=json.loads, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--model", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        print(json.dumps(run_child(argparse.Namespace(**args.child), args.model)))
        return
    args.grid = args.grid or ([20, 32, 32] if args.memory else [8, 32, 32])
    args.heads = args.heads or (8 if args.memory else 4)
    if args.sparsity is None and args.cdf_threshold is None:
        args.sparsity = 0.9375
    result: dict[str, Any] = measure_memory(args) if args.memory else measure(args)
    for key, value in result.items():
        print(f"{key}: {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
