"""Jobs that `torchrun` starts: one process per GPU, a mesh over all of them, one that speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import BSACompileError, UsageError, must
from .mesh import CFG, CONTEXT

T = TypeVar("T")


def world_size() -> int:
    """Processes that `torchrun` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes files: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def started(device: torch.device, *, cfg_groups: int = 1, timeout: float = 600.0) -> Iterator[DeviceMesh | None]:
    """The mesh of the processes that `torchrun` started; None where there is one only.

    Args:
        device: kind of device to compute on; on GPUs each process of a host takes one of its own.
        cfg_groups: groups of ranks that share out the batch, as guidance has one of two.
        timeout: seconds that a collective may take.

    Raises:
        UsageError: there are fewer GPUs than processes on this host, or the ranks make no groups of equal size.
    """
    size = world_size()
    if size == 1:
        yield None
        return
    if size % cfg_groups:
        raise UsageError(must("cfg_groups", "divide the number of processes", f"{cfg_groups} for {size}"))
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            want = f"be at most the GPUs of a host ({count})"
            raise UsageError(must("--nproc-per-node", want, f"process {local + 1} of this host"))
        torch.cuda.set_device(local)
    own = not dist.is_initialized()
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        if cfg_groups > 1:
            yield init_device_mesh(device.type, (cfg_groups, size // cfg_groups), mesh_dim_names=(CFG, CONTEXT))
        else:
            yield init_device_mesh(device.type, (size,), mesh_dim_names=(CONTEXT,))
    finally:
        if own:
            dist.destroy_process_group()


def first_then_others(make: Callable[[], T]) -> T:
    """Run something on rank 0, then on the others, who see what it left in files; all are done when it returns.

    Raises:
        BSACompileError: that of rank 0, on every rank.
    """
    if not dist.is_initialized():
        return make()
    results: list[T] = []
    failed: list[BSACompileError | None] = [None]
    if is_main():
        try:
            results.append(make())
        except BSACompileError as exc:
            failed = [exc]
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]
    if not is_main():
        results.append(make())
    dist.barrier()
    return results[0]
