"""`export`: the same numbers as `optimize`, in a program that others load."""

from __future__ import annotations

import pytest
import torch

import bsa_compile
from bsa_compile.errors import ExportError, GridError, PolicyError, UsageError
from bsa_compile.policy import BSAPolicy, Rule

from ..compile.support import make_inputs, make_longcat, relative_error, run_reference
from .support import CALLS, GRID, POLICIES, call, run_python, tensors

POLICY = POLICIES["count"]


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.fixture(scope="module")
def model():
    return make_longcat()


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_computes_the_reference(model, name):
    args, kwargs = call(model, name)
    program = bsa_compile.export(model, POLICY, args, kwargs)
    expected = tensors(run_reference(model, POLICY, *args, **kwargs))
    got = tensors(program.module()(*args, **kwargs))
    assert len(got) == len(expected)
    assert max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5
    assert targets(program).count("bsa.attend.default") == (4 if name == "cond" else 2)
    assert not any(t.startswith("bsa.attention") for t in targets(program))


@pytest.mark.parametrize("criterion", POLICIES)
@torch.no_grad()
def test_computes_what_optimize_computes(model, criterion):
    args, kwargs = call(model, "plain")
    program = bsa_compile.export(model, POLICIES[criterion], args, kwargs)
    fast = bsa_compile.optimize(model, POLICIES[criterion], backend="eager")
    assert relative_error(program.module()(*args), fast(*args)) < 1e-6
    report = bsa_compile.report_of(program)
    assert [s.module for s in report.rewritten] == ["blocks.0.attn", "blocks.1.attn"]
    seen = [(s.module, s.role, s.reason, s.grid_q, s.effective_sparsity) for s in report.sites]
    assert seen == [(s.module, s.role, s.reason, s.grid_q, s.effective_sparsity) for s in fast.report.sites]


@torch.no_grad()
def test_any_batch(model):
    args, _ = call(model, "plain")
    batch = torch.export.Dim("batch")
    program = bsa_compile.export(model, POLICY, args, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for size in (1, 2, 3):
        inputs = make_inputs(GRID, size, seed=size)
        assert relative_error(program.module()(*inputs), run_reference(model, POLICY, *inputs)) < 1e-5


def test_shares_the_weights(model):
    program = bsa_compile.export(model, POLICY, call(model, "plain")[0])
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in program.parameters()} == own


@torch.no_grad()
def test_a_dense_policy_leaves_plain_attention(model):
    args, _ = call(model, "plain")
    program = bsa_compile.export(model, BSAPolicy.dense(), args)
    assert not any("bsa" in t for t in targets(program))
    assert targets(program).count("aten.scaled_dot_product_attention.default") == 4
    assert relative_error(program.module()(*args), model(*args)) < 1e-6
    switched_off = make_longcat()
    switched_off.disable_bsa()
    assert not bsa_compile.report_of(bsa_compile.export(switched_off, POLICY, args)).rewritten


@torch.no_grad()
def test_rules_and_steps_hold(model):
    args, _ = call(model, "plain")
    policy = BSAPolicy(sparsity=0.7, rules=[Rule(module="blocks.0.*", dense=True)], dense_steps=1)
    with bsa_compile.step(1, 4):
        report = bsa_compile.report_of(bsa_compile.export(model, policy, args))
    assert [s.module for s in report.rewritten] == ["blocks.1.attn"]
    with bsa_compile.step(0, 4):
        assert not bsa_compile.report_of(bsa_compile.export(model, policy, args)).rewritten


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_saved_and_loaded_elsewhere(model, name, tmp_path):
    args, kwargs = call(model, name)
    program = bsa_compile.export(model, POLICY, args, kwargs)
    torch.export.save(program, tmp_path / "model.pt2")
    expected = tensors(program.module()(*args, **kwargs))
    torch.save((args, kwargs, expected), tmp_path / "case.pt")
    loaded = """
import sys, torch, bsa_compile
program = torch.export.load(sys.argv[1])
args, kwargs, expected = torch.load(sys.argv[2])
got = [x for x in torch.utils._pytree.tree_leaves(program.module()(*args, **kwargs)) if isinstance(x, torch.Tensor)]
assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
print(bsa_compile.report_of(program))
"""
    printed = run_python(loaded, tmp_path / "model.pt2", tmp_path / "case.pt")
    assert str(bsa_compile.report_of(program)) == printed.rstrip("\n")
    assert "block-sparse: sparsity 0.7" in printed


def test_export_changes_nothing_of_the_model(model):
    before = {name: type(m) for name, m in model.named_modules()}
    functions = [b.attn.attention_fn for b in model.blocks]
    bsa_compile.export(model, POLICY, call(model, "plain")[0])
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert [b.attn.attention_fn for b in model.blocks] == functions


class Untraceable(torch.nn.Module):
    def forward(self, x):
        return x + 1 if float(x.sum()) > 0 else x


def test_bad_input(model):
    args, _ = call(model, "plain")
    with pytest.raises(UsageError, match="model must be as it was before optimize"):
        bsa_compile.export(bsa_compile.optimize(model, POLICY), POLICY, args)
    with pytest.raises(UsageError, match=r"model must be an nn.Module"):
        bsa_compile.export(lambda x: x, POLICY, args)
    with pytest.raises(PolicyError, match="policy must be a BSAPolicy"):
        bsa_compile.export(model, {"sparsity": 0.5}, args)
    with pytest.raises(ExportError, match=r"model must be traceable by torch.export, got .*\. Check example_inputs"):
        bsa_compile.export(Untraceable(), POLICY, (torch.ones(3),))
    with pytest.raises(ExportError, match=r"missing a required argument|required positional argument"):
        bsa_compile.export(model, POLICY, args[:1])
    with pytest.raises(UsageError, match=r"program must come from bsa_compile.export"):
        bsa_compile.report_of(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)))


def test_a_dynamic_grid_is_refused(model):
    args, _ = call(model, "plain")
    height = torch.export.Dim("height", min=2, max=16)
    shapes = ({3: 2 * height}, None, None)
    with pytest.raises(GridError, match="dynamic_shapes must leave frames, height and width fixed, got the grid 4x"):
        bsa_compile.export(model, POLICY, args, dynamic_shapes=shapes)
