"""Jobs with sharded weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bsa_compile.models.longcat import checkpoint
from bsa_compile.parallel import load_sharded, shard_weights
from bsa_compile.parallel.weights import shares
from tests.compile.support import relative_error

from .jobs import Case, alone, call, inputs_of, mesh_of, model_of, optimized


def forward_and_gradients(case: Case) -> tuple[float, dict[str, float]]:
    """Errors of the output and of every weight's gradient."""
    model, given = model_of(case.heads), inputs_of(case)
    with alone(model, case.policy):
        expected = call(model, case, given)
    expected.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    sharded = shard_weights(model_of(case.heads), mesh_of(case))
    fast = optimized(sharded, case)
    out = call(fast, case, given)
    out.square().mean().backward()
    errors = {n: relative_error(p.grad.full_tensor(), gradients[n]) for n, p in sharded.named_parameters()}
    return relative_error(out.detach(), expected.detach()), errors


def load(case: Case, folder: str) -> tuple[float, int, int, int]:
    """Error of the output; bytes of weights that are held, that were read, and in the whole."""
    read = 0
    original = checkpoint.read_weights

    class Counting:
        def __init__(self, file: Any, name: str) -> None:
            self.part = file.get_slice(name)

        def get_slice(self, name: str) -> Any:
            return self

        def __getitem__(self, rows: Any) -> Any:
            nonlocal read
            found = self.part[rows]
            read += found.numel() * found.element_size()
            return found

    from bsa_compile.parallel import weights

    weights.read_weights = lambda where: ((name, Counting(file, name)) for name, file in original(where))
    try:
        model = load_sharded(folder, mesh_of(case))
    finally:
        weights.read_weights = original
    plain, given = model_of(case.heads), inputs_of(case)
    with torch.no_grad():
        with alone(plain, case.policy):
            expected = call(plain, case, given)
        error = relative_error(call(optimized(model, case), case, given), expected)
    sizes = list(shares(model))
    return error, sum(s for _, s, _ in sizes), read, sum(w for _, _, w in sizes)


def load_error(folder: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",))
    try:
        load_sharded(folder, mesh)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""
