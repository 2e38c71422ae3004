"""Gradients through the optimized model, against the fp64 reference inside the same model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bsa_compile
from bsa_compile.policy import BSAPolicy

from .support import make_inputs, make_longcat, relative_error, run_reference

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))


def gradients(model: nn.Module, run) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run().float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_gradients_are_those_of_the_reference(backend, checkpointing, regional):
    if backend == "inductor" and regional != checkpointing:
        pytest.skip("inductor compiles slowly: the two other combinations stand for it")
    model, inputs = make_longcat(), make_inputs()
    want = gradients(model, lambda: run_reference(model, POLICY, *inputs))
    fast = bsa_compile.optimize(model, POLICY, backend=backend, regional=regional)
    fast.gradient_checkpointing = checkpointing
    got = gradients(model, lambda: fast(*inputs))
    assert len(fast.report.rewritten) == 2
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-4, name


def test_training_inside_autocast():
    model, inputs = make_longcat(), make_inputs()

    def run(f):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(*inputs)

    fast = bsa_compile.optimize(model, POLICY, backend="aot_eager")
    got = gradients(model, lambda: run(fast))
    assert len(fast.report.rewritten) == 2
    dense = gradients(model, lambda: run(model))
    exact = gradients(model, lambda: run_reference(model, POLICY, *inputs))
    assert got.keys() == exact.keys()
    for name in exact:  # bf16 rounding can move a tile across the selection's edge, hence the wide bound
        assert got[name].dtype == exact[name].dtype
        assert torch.isfinite(got[name]).all()
    total = [torch.cat([g[n].flatten() for n in exact]) for g in (got, exact, dense)]
    assert relative_error(total[0], total[1]) < 0.15
    assert relative_error(total[0], total[1]) < relative_error(total[2], total[1])


def test_a_step_of_training_lowers_the_loss():
    model, inputs = make_longcat(), make_inputs()
    fast = bsa_compile.optimize(model, POLICY, backend="eager")
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(fast.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (fast(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
