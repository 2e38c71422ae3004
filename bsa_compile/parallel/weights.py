"""Weights shared out among the ranks of a mesh by FSDP2, and checkpoints of which each rank reads its share alone."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..errors import CheckpointError, UsageError, must
from ..models.longcat import LongCatConfig, LongCatVideoTransformer3DModel
from ..models.longcat.checkpoint import CONFIG_NAME, find_weights, read_weights
from .mesh import check


def shard_weights(model: LongCatVideoTransformer3DModel, mesh: DeviceMesh) -> LongCatVideoTransformer3DModel:
    """Leave each rank a share of every weight; a block's are gathered while it runs, and its gradients averaged.

    Call it before `optimize(model, policy, mesh=mesh)`, whose gradients are made for that mean.

    Args:
        model: on its device; it is changed and returned.
        mesh: the one that `optimize` will be given; all of its ranks share the weights.
    """
    flat = _flat(mesh)
    for block in model.blocks:
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)
    return model


def load_sharded(
    folder: str | PathLike[str],
    mesh: DeviceMesh,
    *,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LongCatVideoTransformer3DModel:
    """Load a checkpoint folder so that each rank reads and holds its share of the weights alone.

    Args:
        folder: as of `LongCatVideoTransformer3DModel.from_pretrained`.
        mesh: the one that `optimize` will be given.
        torch_dtype: a float dtype to cast to; None: that of the files.
        device: where this rank computes; None: that of the mesh.

    Returns:
        The model in evaluation mode, its weights shared out as by `shard_weights`.

    Raises:
        CheckpointError: as `from_pretrained`, on every rank alike.
        UsageError: `torch_dtype` is no float dtype, or the mesh cannot be used.
    """
    path = Path(folder)
    if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise UsageError(must("torch_dtype", "be a float torch.dtype", repr(torch_dtype)))
    if not path.is_dir():
        raise CheckpointError(must("folder", "be an existing checkpoint folder", repr(str(path))))
    flat = _flat(mesh)
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(LongCatConfig.from_file(path / CONFIG_NAME))
    where = find_weights(model, path)
    model.to(torch_dtype or _file_dtype(where))
    shard_weights(model, mesh)
    model.to_empty(device=mesh.device_type if device is None else device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, file in read_weights(where):
            mine, rows = _share(parameters[name], flat)
            if mine.numel():
                mine.copy_(file.get_slice(name)[rows.start : rows.stop])
    return model.eval()


def shares(model: torch.nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name of each weight, the bytes of it that this rank holds, and its bytes in the whole."""
    for name, p in model.named_parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        yield name, local.numel() * local.element_size(), p.numel() * p.element_size()


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of a mesh along one dimension."""
    check(mesh)
    return mesh if mesh.ndim == 1 else mesh._flatten()


def _file_dtype(where: dict[str, Path]) -> torch.dtype:
    """The dtype of the patch embedding's weight, which is the model's."""
    name = "x_embedder.proj.weight"
    return next(file.get_slice(name)[:1].dtype for name, file in read_weights({name: where[name]}))


def _share(parameter: Any, mesh: DeviceMesh) -> tuple[Tensor, slice]:
    """This rank's part of a weight, and which rows of the whole it is."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, parameter.shape[0])
    if tuple(parameter.placements) != (Shard(0),):
        raise AssertionError(f"FSDP2 cut a weight as {parameter.placements}")
    local = parameter.to_local()
    size = -(-parameter.shape[0] // mesh.size())  # as torch.chunk cuts
    first = min(mesh.get_local_rank() * size, parameter.shape[0])
    return local, slice(first, first + len(local))
