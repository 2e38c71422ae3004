"""What commands share to work: checkpoints, policies, devices, inputs."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import bsa_compile
from bsa_compile.backend import effective_policy
from bsa_compile.errors import CheckpointError, UnsupportedError, UsageError, must
from bsa_compile.grid import TokenGrid
from bsa_compile.models.longcat import LongCatConfig, LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy
from bsa_compile.report import Site, effective_sparsity

_DATA = Path(bsa_compile.__file__).parent / "data"
TINY_CHECKPOINT = _DATA / "tiny_longcat"
"""A DiT with random weights, for commands that show how it runs."""
SMALL_MODEL = _DATA / "small_longcat"
"""A trained model in LongCat-Video's layout, see `examples/train_tiny.py`."""
# What to run where nothing is said: what a CPU does in seconds, and LongCat's 720p refinement on a GPU.
GRIDS = {"cpu": (12, 30, 36), "cuda": (24, 44, 80)}
MAX_TOKENS = 1 << 26  # some hundred times LongCat's longest video; torch cannot hold the sizes of far more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_checkpoint(folder: str | Path) -> Path:
    """The folder that holds `config.json`: the one given, or its `dit`.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in (Path(folder), Path(folder) / "dit"):
        if (candidate / "config.json").is_file():
            return candidate
    raise CheckpointError(
        must("checkpoint", "be a folder that holds config.json or dit/config.json", repr(str(folder)))
    )


def model_folder(given: str | None) -> Path:
    """Of a model to make videos with: the one given, or the small one that comes with the package.

    Raises:
        UsageError: none is given and the small one is not there.
    """
    if given is not None:
        return Path(given)
    if not SMALL_MODEL.is_dir():
        todo = "Pass LongCat-Video's folder, or train the small model: examples/train_tiny.py."
        raise UsageError(must("--model", "be given where the package has no small model", "none", todo))
    return SMALL_MODEL


def load_policy(path: str | None) -> BSAPolicy | None:
    """Read a policy from a JSON file; None for None.

    Raises:
        UsageError: the file cannot be read.
        PolicyError: it holds no policy.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(must("--policy", "be a readable JSON file", f"{path!r} ({exc})")) from None
    return BSAPolicy.from_json(text)


def chosen_policy(args: argparse.Namespace, model: Any = None) -> BSAPolicy:
    """The policy that the options ask for: `--policy`, else the model's configuration, else the default; then
    `--sparsity`, `--cdf-threshold` and `--tile` over it."""
    return with_criteria(effective_policy(load_policy(getattr(args, "policy", None)), model), args)


def with_criteria(policy: BSAPolicy, args: argparse.Namespace) -> BSAPolicy:
    """A policy with `--sparsity`, `--cdf-threshold` and `--tile` over it."""
    changes: dict[str, Any] = {}
    criteria = {name: getattr(args, name, None) for name in ("sparsity", "cdf_threshold")}
    if any(value is not None for value in criteria.values()):
        changes.update(criteria)
    if getattr(args, "tile", None) is not None:
        changes.update(chunk_3d_shape_q=args.tile, chunk_3d_shape_k=args.tile)
    return dataclasses.replace(policy, **changes)


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU.

    Raises:
        UsageError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(must("--device", "be auto, cpu, cuda or cuda:N", repr(name))) from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(must("--device", "exist on this machine", repr(name), f"CUDA devices here: {count}."))
    elif device.type != "cpu":
        raise UsageError(must("--device", "be auto, cpu, cuda or cuda:N", repr(name)))
    return device


def resolve_backend(name: str, device: torch.device) -> tuple[str, str]:
    """`auto` is inductor, or eager where inductor lacks its compiler.

    Returns:
        The name for `optimize`, and a note for the user ("" if there is nothing to say).

    Raises:
        UsageError: Dynamo knows no such backend.
        UnsupportedError: inductor was asked for and lacks its compiler.
    """
    if name not in ("auto", "inductor"):
        if name not in torch._dynamo.list_backends(exclude_tags=()) or name == "bsa":  # which runs inside already
            raise UsageError(must("--backend", "be auto or a backend that torch.compile knows", repr(name)))
        return name, ""
    lacking = _inductor_lacks(device)
    if not lacking:
        return "inductor", ""
    if name == "inductor":
        raise UnsupportedError(must("--backend inductor", f"find {lacking}", "none", "Install it or use eager."))
    return "eager", f"inductor needs {lacking}, which is missing here: both sides run without compilation"


def _inductor_lacks(device: torch.device) -> str:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler"
    return ""


def model_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """What to cast a checkpoint to: by default bfloat16 on a GPU, and nothing (None) on a CPU."""
    if name is not None:
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else None


def check_grid(grid: tuple[int, int, int], cond: int = 0) -> TokenGrid:
    """A validated grid, of which `cond` frames are given."""
    if not 0 <= cond <= grid[0]:
        raise UsageError(must("--cond", f"lie in 0..{grid[0]}, the grid's frames", cond))
    checked = TokenGrid.of(grid)
    if checked.num_tokens > MAX_TOKENS:
        got = f"{checked.num_tokens:,}"
        raise UsageError(must("--grid", f"hold at most {MAX_TOKENS:,} tokens", got, "Give a smaller grid."))
    return checked


def latent_shape(config: LongCatConfig, grid: TokenGrid) -> tuple[int, int, int, int, int]:
    """Shape of the latents `[1, C, T, H, W]` whose tokens lie on the grid."""
    t, h, w = (size * patch for size, patch in zip(grid.shape, config.patch_size, strict=True))
    return (1, config.in_channels, t, h, w)


def model_inputs(
    model: LongCatVideoTransformer3DModel, grid: TokenGrid, *, text_tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random latents and text for one call at timestep 1000, drawn on the CPU so that every device gets the same."""
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden_states": latent_shape(config, grid),
        "encoder_hidden_states": (1, 1, text_tokens, config.caption_channels),
    }
    if device.type == "meta":
        inputs = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    else:
        inputs = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    return {**inputs, "timestep": torch.full((1,), 1000.0, device=device)}


def meta_model(folder: Path) -> LongCatVideoTransformer3DModel:
    """The model that `config.json` describes, without weights."""
    with torch.device("meta"):
        return LongCatVideoTransformer3DModel(LongCatConfig.from_file(folder / "config.json")).eval()


def attention_totals(sites: Iterable[Site]) -> dict[str, Any]:
    """FLOPs of all attention, dense and as it runs, and the effective sparsity of the block-sparse sites.

    A figure is None where the data decides it (`cdf_threshold`).
    """
    sites = list(sites)
    dense = [site.dense_flops for site in sites]
    runs = [site.flops for site in sites]
    total = sum(f for f in dense if f is not None) if None not in dense else None
    running = sum(f for f in runs if f is not None) if None not in runs else None
    return {
        "dense_flops": total,
        "flops": running,
        "saved": 1 - running / total if total and running is not None else None,
        "effective_sparsity": effective_sparsity(sites),
    }


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of what decides how things run."""
    return {
        "bsa_compile": bsa_compile.__version__,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, and what else tells machines apart."""
    if device.type != "cuda":
        return {"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_line(device: torch.device) -> str:
    """Versions and device in one line, to stand beside every figure."""
    about, have = describe_device(device), versions()
    where = f"{about['name']}, {about['threads']} threads" if device.type != "cuda" else about["name"]
    triton = f", triton {have['triton']}" if device.type == "cuda" else ""
    return f"bsa_compile {have['bsa_compile']}, torch {have['torch']}{triton} on {where}"
