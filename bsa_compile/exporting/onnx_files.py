"""ONNX files that are either complete or not there, with large weights in a second file that is written as a stream."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ExportError, must, require_extra
from ..files import staged

# Protobuf refuses files over 2 GiB; far below it, one file is handier than two.
EXTERNAL_FROM_BYTES = 256 << 20
# Tensors below this stay in the model file also when there is a second one: shapes, scales, small biases.
SMALL_TENSOR_BYTES = 1 << 10


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write an `onnx_ir.Model`, its large weights beside it in `<name>.data` when they are many.

    Tensors are written one after the other from where they lie, so saving needs no second copy of the weights.

    Args:
        model: what to write. Of one that was loaded, weights that lie in files of their own may be read into memory.
        path: the model file. Missing folders are made.

    Raises:
        UsageError: `path` is a folder or cannot be written.
        ExportError: writing failed; what was there before stays.
        MissingExtraError: onnx is not installed.
    """
    ir: Any = require_extra("onnx_ir", "onnx")
    name = Path(path).name
    size = sum(tensor.nbytes for tensor in _tensors(model))
    data = f"{name}.data" if size >= EXTERNAL_FROM_BYTES else None
    if data is None:  # tensors of a loaded model may lie in files whose paths hold for its own folder only
        model = ir.external_data.load_to_model(model)
    try:
        with staged(path, stale_data(path)) as folder:
            ir.save(model, folder / name, external_data=data, size_threshold_bytes=SMALL_TENSOR_BYTES)
    except OSError as exc:
        raise ExportError(must("path", "be a file that can be written", f"{str(path)!r} ({exc})")) from exc


def stale_data(path: str | os.PathLike[str]) -> list[str]:
    """Name of the second file of the model that lies at `path` now, to be removed with it; empty if it has none."""
    path = Path(path)
    data = f"{path.name}.data"
    if not (path.parent / data).is_file() or not path.is_file() or not path.stat().st_size:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [data] if content.find(data.encode()) >= 0 else []


def _tensors(model: Any) -> Iterator[Any]:
    for graph in model.graphs():
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
