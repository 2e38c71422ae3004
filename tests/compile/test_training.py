"""Gradients through the optimized model, against the fp64 reference inside the same model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bsa_compile
from bsa_compile.errors import UsageError
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


class Block(nn.Module):
    """Attends over tokens whose grid it does not know."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.options = nn.Linear(32, 32), nn.ModuleList([Block(), Block()]), options

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, **self.options)
        return x


GRID, X = (2, 6, 4), torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(0))
NON_REENTRANT, REENTRANT = {"use_reentrant": False}, {"use_reentrant": True}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize(
    ("regional", "options"),
    [(False, NON_REENTRANT), (False, REENTRANT), (True, NON_REENTRANT)],
    ids=["whole", "whole-reentrant", "regional"],
)
def test_latent_grid_reaches_checkpointed_blocks(backend, inside, regional, options):
    """Dynamo hides a checkpoint from the mode, and autograd repeats a block where the mode is gone."""
    model = Checkpointed(**options)
    told = bsa_compile.optimize(model, POLICY, grid=GRID, backend=backend, regional=regional)
    want = gradients(model, lambda: told(X))
    fast = bsa_compile.optimize(model, POLICY, backend=backend, regional=regional)
    model.zero_grad(set_to_none=True)
    with bsa_compile.latent_grid(*GRID):
        loss = fast(X).square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert [(s.reason, s.grid_source) for s in fast.report.sites] == [("rewritten", "context")] * 2
    for name, p in model.named_parameters():
        assert relative_error(p.grad, want[name]) < 1e-6, name


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_a_repeated_block_runs_as_it_did_whatever_is_said_since(regional):
    model, inputs = make_longcat(), make_inputs()
    late = BSAPolicy(**{**POLICY.to_dict(), "sparsity": 0.2})
    policy = BSAPolicy(**{**POLICY.to_dict(), "rules": [{"steps": [1, None], "sparsity": 0.2}]})
    want = gradients(model, lambda: run_reference(model, late, *inputs))
    fast = bsa_compile.optimize(model, policy, backend="aot_eager", regional=regional)
    fast.gradient_checkpointing = True
    model.zero_grad(set_to_none=True)
    with bsa_compile.step(1):
        loss = fast(*inputs).square().mean()
    fast.disable_bsa()
    loss.backward()
    for name, p in model.named_parameters():
        if name in want:
            assert relative_error(p.grad, want[name]) < 1e-4, name
    fast.enable_bsa()
    assert fast.report.notes == []  # the backward pass is no call without a step


def test_a_reentrant_checkpoint_under_another_state_is_an_error():
    fast = bsa_compile.optimize(Checkpointed(**REENTRANT), POLICY, backend="eager", regional=True)
    with bsa_compile.latent_grid(*GRID):
        loss = fast(X).square().mean()
    with pytest.raises(UsageError, match=r"latent_grid must be those of the forward pass .*use_reentrant=False"):
        loss.backward()
    told = bsa_compile.optimize(Checkpointed(**REENTRANT), POLICY, grid=GRID, backend="eager", regional=True)
    told(X).square().mean().backward()
    assert len(told.report.rewritten) == 2


def test_through_torch_compile_a_checkpoint_that_latent_grid_does_not_reach_is_noted():
    model = Checkpointed(**NON_REENTRANT)
    fast = torch.compile(model, backend="bsa", options={"policy": POLICY, "compiler": "eager"})
    with bsa_compile.latent_grid(*GRID):
        fast(X)
    report = bsa_compile.last_report()
    assert [s.reason for s in report.sites] == ["unknown_grid"] * 2
    assert any("only in a model made by optimize does latent_grid reach it" in note for note in report.notes)


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
