"""Checkpoint folders: `config.json` and safetensors, single or sharded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bsa_compile.errors import CheckpointError, UsageError, must
from bsa_compile.models.longcat.config import read_json_object

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
_SINGLE_NAMES = ("model.safetensors", f"{WEIGHTS_STEM}.safetensors")
_INDEX_SUFFIX = ".safetensors.index.json"
_OUR_NAMES = re.compile(rf"{WEIGHTS_STEM}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHOWN = 8


def load_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype | None, device: Any) -> None:
    """Give a model, typically built on meta, the tensors of a checkpoint folder.

    Tensors are memory-mapped and become the parameters; a cast or a move copies one tensor at a time.

    Args:
        model: Its parameters are replaced.
        folder: Holds `model.safetensors`, `diffusion_pytorch_model.safetensors` or shards with an index.
        dtype: Cast to it; None keeps the file's.
        device: Move there; None keeps the CPU's memory map.

    Raises:
        CheckpointError: No or several sets of weights, a missing or corrupt file, or tensors that do not fit the model;
            every tensor at fault is named in the one error, before any is loaded.
    """
    where = find_weights(model, folder)
    state = {name: file.get_tensor(name).to(device=device, dtype=dtype) for name, file in read_weights(where)}
    model.load_state_dict(state, strict=True, assign=True)


def find_weights(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a model; nothing is read but names, shapes and types.

    Raises:
        CheckpointError: as `load_weights`.
    """
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    where = _locate_tensors(folder)
    problems: dict[str, list[str]] = {"missing": sorted(expected.keys() - where.keys())}
    problems["unexpected"] = sorted(where.keys() - expected.keys())
    problems["wrong shape or type"] = wrong = []
    for name, file in read_weights({n: p for n, p in where.items() if n in expected}):
        part = file.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if shape != expected[name] or not kind.startswith(("F", "BF")):
            wrong.append(f"{name} {kind} {list(shape)} for {list(expected[name])}")
    _raise_if_any(folder, problems)
    return where


def read_weights(where: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Each tensor's name and its open safetensors file.

    `file.get_tensor(name)` maps it into memory, `file.get_slice(name)[a:b]` reads those rows and nothing else.

    Args:
        where: the file of each tensor.
    """
    for path in sorted(set(where.values())):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if where.get(name) == path:
                    yield name, file


def _raise_if_any(folder: Path, problems: dict[str, list[str]]) -> None:
    texts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            texts.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
    if texts:
        raise CheckpointError(must(f"the tensors of {folder}", "be those of the model", "; ".join(texts)))


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    found = _weight_sets(folder)
    if not found:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        todo = "Only safetensors are read, never pickle." if pickles else ""
        raise CheckpointError(must(str(folder), "hold safetensors weights", pickles or "none", todo))
    if len(found) > 1:
        raise CheckpointError(must(str(folder), "hold one set of weights", [p.name for p in found]))
    path = found[0]
    if path.suffix != ".json":
        with _open(path) as file:
            return dict.fromkeys(file.keys(), path)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(must(str(path), "hold a weight_map of tensor names to file names", repr(weight_map)[:80]))
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise CheckpointError(must(str(path), "name files of its own folder", outside[:_SHOWN]))
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(must(str(path), "name shards that exist", f"missing {', '.join(absent[:_SHOWN])}"))
    where: dict[str, Path] = {}
    problems: dict[str, list[str]] = {"in two shards": [], "not in the shard that the index names": []}
    for shard in shards:
        with _open(folder / shard) as file:
            for name in file.keys():  # noqa: SIM118
                if name in where:
                    problems["in two shards"].append(name)
                where[name] = folder / shard
    strayed = (name for name, shard in weight_map.items() if where.get(name, folder / shard) != folder / shard)
    problems["not in the shard that the index names"] += strayed
    _raise_if_any(folder, problems)
    return where


def _weight_sets(folder: Path) -> list[Path]:
    singles = [folder / name for name in _SINGLE_NAMES if (folder / name).is_file()]
    return singles + sorted(folder.glob(f"*{_INDEX_SUFFIX}"))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(
            must(str(path), "be a readable safetensors file", f"{type(exc).__name__}: {exc}")
        ) from exc


def save_checkpoint(model: nn.Module, config: dict[str, Any], folder: Path, max_shard_size: int | str) -> None:
    """Write `config.json` and the weights, sharded when they exceed `max_shard_size`.

    Everything is written under temporary names first and renamed once it is complete: whatever fails while writing
    leaves the folder as it was. Weights of an earlier save into the same folder are replaced.

    Args:
        model: Its `state_dict()` is written, in its dtypes.
        config: The keys of `config.json`.
        folder: Made if absent.
        max_shard_size: Bytes, or text such as "5GB" or "500MiB"; a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: `folder` is a file or holds weights under other names, or the model is on meta.
        UsageError: `max_shard_size` is malformed.
    """
    shards = _split(model.state_dict(), parse_size(max_shard_size))
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(must(str(folder), "be a folder", "a file"))
    foreign = [p.name for p in _weight_sets(folder) if not _OUR_NAMES.fullmatch(p.name)]
    if foreign:
        raise CheckpointError(must(str(folder), "hold no other weights", foreign, "Save to another folder."))
    names = [f"{WEIGHTS_STEM}.safetensors"]
    if len(shards) > 1:
        names = [f"{WEIGHTS_STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    writers: dict[str, Callable[[Path], None]] = {CONFIG_NAME: _json_writer(config)}
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)}
        index = {"metadata": {"total_size": sum(map(_nbytes, model.state_dict().values()))}, "weight_map": weight_map}
        writers[f"{WEIGHTS_STEM}{_INDEX_SUFFIX}"] = _json_writer(index)
    writers.update((name, _shard_writer(shard)) for name, shard in zip(names, shards, strict=True))

    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    temporary = {name: folder / f".{name}.{token}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            # safetensors gives its files mode 0600; the JSON file has what the umask allows.
            shutil.copymode(temporary[CONFIG_NAME], temporary[name])
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if created:
            folder.rmdir()
        raise
    for name in sorted(writers, key=lambda name: name.endswith(".json")):  # what names the weights comes after them
        os.replace(temporary[name], folder / name)
    for path in list(folder.iterdir()):
        if _OUR_NAMES.fullmatch(path.name) and path.name not in writers:
            path.unlink()


def _shard_writer(shard: dict[str, Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        # One shard at a time is on the CPU.
        save_file({k: x.detach().cpu().contiguous() for k, x in shard.items()}, path, metadata={"format": "pt"})

    return write


def _json_writer(value: dict[str, Any]) -> Callable[[Path], None]:
    # Encoded now: a value that JSON cannot hold fails before any file is written.
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _split(state: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Cut the tensors, in their order, into runs of at most `limit` bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, x in state.items():
        if x.is_meta:
            raise CheckpointError(must(name, "hold data", "a meta tensor", "Load or initialise the model first."))
        if shards[-1] and size + _nbytes(x) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += _nbytes(x)
    return shards


def parse_size(size: int | str) -> int:
    """Bytes of `5_000`, "5000", "5GB" or "1.5GiB".

    Raises:
        UsageError: It is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", str(size), re.IGNORECASE)
    if isinstance(size, bool) or not match or match[2].upper() not in _UNITS:
        raise UsageError(must("max_shard_size", 'be bytes or text like "5GB"', repr(size)))
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise UsageError(must("max_shard_size", "be at least 1 byte", repr(size)))
    return value
