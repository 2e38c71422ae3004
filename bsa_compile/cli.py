"""The command line: parsing and dispatch. Each command is a module of `bsa_compile.commands`."""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bsa_compile import __version__
from bsa_compile.errors import BSACompileError

PROG = "bsa-compile"
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141

LOG_LEVELS = ("debug", "info", "warning", "error")
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PROMPT = "a red ball rolls to the left over grass"
GRIDS = "12,30,36 on a CPU, 24,44,80 on a GPU"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        Exit status: 0, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
        args.argv = list(sys.argv[1:] if argv is None else argv)
    except SystemExit as exc:  # argparse has said why on stderr, or printed help on stdout
        return exc.code if isinstance(exc.code, int) else 0
    try:
        with _logging(args.log_level or "warning"):
            status: int = importlib.import_module(f"bsa_compile.commands.{args.command}").run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except BSACompileError as exc:
        return _refuse(str(exc))
    except OSError as exc:
        return _refuse(f"{exc.strerror or exc}: {exc.filename}" if exc.filename else str(exc))
    except (MemoryError, RuntimeError) as exc:
        if not _out_of_memory(exc):
            raise
        return _refuse(f"out of memory: {str(exc).splitlines()[0] if str(exc) else 'a smaller grid needs less'}")


def _refuse(text: str) -> int:
    print(f"{PROG}: error: {text}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _out_of_memory(exc: BaseException) -> bool:
    """Torch has one class for a GPU's memory and none for the host's."""
    return isinstance(exc, MemoryError) or "OutOfMemory" in type(exc).__name__ or "can't allocate memory" in str(exc)


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """Log records of this package on stderr while a command runs."""
    logger = logging.getLogger("bsa_compile")
    handler = logging.StreamHandler(sys.stderr)
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the line of progress
    handler.setFormatter(logging.Formatter(f"{clear}%(name)s: %(levelname)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="Block-sparse attention for video diffusion transformers: try it, explain it, time it."
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="default: warning; info while a video is made")
    logged = argparse.ArgumentParser(add_help=False)  # the same option after the command; unset, it leaves the first
    logged.add_argument("--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[logged])

    _add_info(command("info", "versions, devices, and which kernels would run"))
    _add_explain(command("explain", "which attention sites of a checkpoint run block-sparse, why, and what it saves"))
    _add_bench(command("bench", "time dense against block-sparse"))
    _add_show(command("show", "draw a block mask, one panel per head"))
    _add_export(command("export", "write a checkpoint as a block-sparse ONNX file, torch.export program or package"))
    _add_rewrite(command("rewrite", "make the self-attention of an ONNX file block-sparse"))
    _add_generate(command("generate", "make a video from a prompt, a picture or a video"))
    _add_compare(command("compare", "make a video dense and block-sparse, side by side, and compare"))
    return parser


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", type=triple, metavar="T,H,W", help="ask the kernels about this token grid")
    parser.add_argument("--tile", type=triple, metavar="T,H,W", help="and about this tile")
    _add_json(parser)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, or with dit/config.json")
    parser.add_argument("--grid", type=triple, required=True, metavar="T,H,W", help="token grid: latent size / patch")
    parser.add_argument("--cond", type=_count, default=0, metavar="N", help="latent frames given as condition")
    parser.add_argument("--step", type=_count, metavar="I", help="denoising step, for policies that depend on it")
    _add_policy(parser)
    _add_json(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    attention = kinds.add_parser("attention", help="attention alone, on random q, k, v")
    model = kinds.add_parser("model", help="one call of the whole model")
    for kind, dtype in ((attention, "float32"), (model, "the checkpoint's")):
        kind.add_argument("--grid", type=triple, metavar="T,H,W", help=f"token grid (default: {GRIDS})")
        kind.add_argument("--dtype", choices=DTYPES, help=f"default: {dtype} on a CPU, bfloat16 on a GPU")
        kind.add_argument("--repeats", type=_positive, default=5, metavar="N", help="the median counts (default: 5)")
        kind.add_argument("--warmup", type=_count, default=1, metavar="N", help="calls not counted (default: 1)")
        _add_policy(kind)
        _add_device(kind)
        kind.add_argument("--json", metavar="PATH", help="write JSON to a file, or to stdout for -")
        kind.add_argument("--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    attention.add_argument("--heads", type=_positive, metavar="N", help="default: 2 on a CPU, 8 on a GPU")
    attention.add_argument("--head-dim", type=_positive, metavar="D", help="default: 64 on a CPU, 128 on a GPU")
    peers = attention.add_argument_group("beside other kernels")
    peers.add_argument("--peers", action="store_true", help="compare with dense and block-sparse kernels that are here")
    peers.add_argument("--lists", type=_among("gate", "random"), metavar="L,...", help="gate, random (default: both)")
    sweeps = ("sparsity", "tokens", "kept")
    peers.add_argument("--sweep", type=_among(*sweeps), metavar="S,...", help=f"also vary {', '.join(sweeps)}")
    peers.add_argument("--rounds", type=_positive, default=2, metavar="N", help="of all measurements (default: 2)")
    peers.add_argument("--budget", type=_positive, default=math.inf, metavar="SECONDS", help="begin nothing later")
    peers.add_argument("--plot", metavar="FILE", help="PNG of time against sparsity and tokens")
    peers.add_argument("--seed", type=_seed, default=0, metavar="N", help="of what is drawn (default: 0)")
    model.add_argument("--checkpoint", metavar="DIR", help="default: a tiny DiT with random weights")
    _add_backend(model)
    model.set_defaults(heads=None, head_dim=None)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", type=triple, default=(12, 30, 36), metavar="T,H,W", help="default: 12,30,36")
    parser.add_argument("--output", default="block_mask.png", metavar="FILE", help="PNG (default: block_mask.png)")
    parser.add_argument("--checkpoint", metavar="DIR", help="take q and k from this model instead of random ones")
    parser.add_argument("--block", type=_count, default=0, metavar="I", help="of the checkpoint (default: 0)")
    parser.add_argument("--heads", type=_positive, default=4, metavar="N", help="of random q and k (default: 4)")
    parser.add_argument("--head-dim", type=_positive, default=64, metavar="D", help="likewise (default: 64)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    _add_policy(parser)
    _add_device(parser)
    _add_json(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, or with dit/config.json")
    parser.add_argument("--grid", type=triple, required=True, metavar="T,H,W", help="token grid: latent size / patch")
    parser.add_argument(
        "--format",
        choices=("onnx", "pt2", "aoti"),
        default="onnx",
        help="onnx (default), pt2: a torch.export program, aoti: compiled by AOTInductor for this machine",
    )
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--cond", type=_count, default=0, metavar="N", help="latent frames given as condition")
    parser.add_argument("--text-tokens", type=_positive, default=512, metavar="N", help="default: 512")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--batch", type=_positive, default=1, metavar="N", help="default: 1")
    sizes.add_argument("--dynamic-batch", action="store_true", help="any batch")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument("--opset", type=_positive, default=23, metavar="N", help="of ONNX, 20 to 23 (default: 23)")
    _add_policy(parser)
    parser.add_argument("--device", default="cpu", help="where to export, and what aoti compiles for (default: cpu)")
    _add_json(parser)


def _add_rewrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="ONNX file")
    parser.add_argument("--grid", type=triple, required=True, metavar="T,H,W", help="token grid of its self-attention")
    parser.add_argument("--output", required=True, metavar="FILE", help="ONNX file; may be the input")
    _add_policy(parser)
    _add_json(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser)
    add("--prompt", required=True, help="what is to be seen")
    add("--negative-prompt", help="what is not, for guidance")
    add("--output", "--output-path", required=True, metavar="FILE", help=".mp4 or .gif, with its report in .json")
    add("--task", choices=("t2v", "i2v", "continuation"), default="t2v", help="default: t2v")
    add("--image", metavar="FILE", help="the first frame, for i2v")
    add("--video", metavar="FILE", help="what to continue, for continuation")
    _add_size(parser)
    _add_sampling(parser)
    add("--refine", action="store_true", help="make a smaller video and refine it, block-sparse")
    add("--refine-steps", type=_positive, metavar="N", help="schedule whose part below 0.5 runs (default: the model's)")
    add("--distill", action="store_true", help="the distilled model: few steps, no guidance")
    add("--fps", type=_positive, metavar="N", help="15 (default), or with --refine 30: refine in time as well")
    add("--num-segments", type=_positive, metavar="N", help="continue the video N - 1 times (default: 1)")
    add("--num-cond-frames", type=_positive, metavar="N", help="frames a continuation looks at (default: 13)")
    add("--policy", metavar="FILE", help='JSON of a BSAPolicy, or of one for "base", "refine" or both')
    add("--config", metavar="FILE", help="JSON of a LongCatPipelineConfig")
    add("--low-memory", action="store_true", help="keep on the device only what runs; tile the VAE")
    add("--resume", action="store_true", help="go on from an interrupted run of the same command")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, bfloat16 on a GPU)")
    _add_device(parser)
    _add_backend(parser)
    _add_json(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser)
    add("--prompt", default=PROMPT, help=f"what is to be seen (default: {PROMPT})")
    add("--output", default="compare_output", metavar="DIR", help="default: compare_output")
    _add_size(parser)
    _add_sampling(parser)
    _add_criteria(parser)
    _add_device(parser)
    _add_backend(parser)
    _add_json(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "--model-path",
        metavar="FOLDER",
        help="LongCat-Video's (default: the small model that comes with the package)",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--height", type=_positive, metavar="PIXELS", help="of the result (default: what the model was trained at)")
    add("--width", type=_positive, metavar="PIXELS", help="likewise")
    add(
        "--num-frames", type=_positive, metavar="N", help="at 15 per second, 1 + a multiple of 4 (default: the model's)"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--num-inference-steps", type=_positive, metavar="N", help="default: the model's, 50 of LongCat-Video")
    add("--guidance-scale", type=float, metavar="G", help="of CFG-zero* (default: the model's, 4 of LongCat-Video)")
    add("--seed", type=_seed, metavar="N", help="of the noise (default: 0)")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="JSON of a BSAPolicy (default: the checkpoint's configuration, else sparsity 0.9375)",
    )
    _add_criteria(parser)


def _add_criteria(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sparsity", type=float, metavar="S", help="share of key tiles to skip, in [0, 1]")
    parser.add_argument("--cdf-threshold", type=float, metavar="P", help="softmax mass to keep, in (0, 1]")
    parser.add_argument("--tile", type=triple, metavar="T,H,W", help="of queries and keys")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="auto",
        help="inductor, eager or another of torch.compile's (default: inductor if it can run)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="of inductor; reduce-overhead replays CUDA graphs (default: none; `compare` "
        "takes them for the small model on a GPU)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _among(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Names among `known`, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {name!r}")
        return names

    return parse


def _integer(text: str, low: int, constraint: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"must be {constraint}, got {text!r}")
    return value


def _positive(text: str) -> int:
    return _integer(text, 1, "an integer >= 1")


def _count(text: str) -> int:
    return _integer(text, 0, "an integer >= 0")


def _seed(text: str) -> int:
    value = _count(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text!r}")
    return value


def triple(text: str) -> tuple[int, int, int]:
    """8,30,36 or 8x30x36."""
    parts = text.lower().replace("x", ",").split(",")
    try:
        t, h, w = (_positive(part) for part in parts)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"must be three positive integers t,h,w, got {text!r}") from None
    return t, h, w
