"""Defects of the public system that a model's user meets, beyond selection and attention themselves."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest
import torch

import bsa_compile
from bsa_compile import cpu
from bsa_compile.kernels import autotune
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy
from tests.compile.support import make_inputs, make_longcat, relative_error, run_reference

ROOT = Path(__file__).resolve().parents[2]
POLICY = BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(2, 3, 2), chunk_3d_shape_k=(2, 3, 2))


# -- q, k, v and o were copied to chunk order and back in every layer -------------------------------------------------


@pytest.fixture
def spy():
    """An implementation of attend that notes what it is given, and computes as ours does."""
    calls = []

    def forward(q, k, v, *rest):
        out, lse = cpu.attend(q, k, v, *rest)
        calls.append((v, out, rest[-1]))
        return out, lse

    bsa_compile.register_attend("spy of the copies", forward, replace=True)
    return calls


def test_no_layer_copies_its_tokens_into_chunk_order(spy):
    model, inputs = make_longcat(), make_inputs()
    qkv, projected = [], []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, out: qkv.append(out))
        block.attn.proj.register_forward_hook(lambda module, args, out: projected.append(args[0]))
    policy = BSAPolicy(**{**POLICY.to_dict(), "attend": "spy of the copies"})
    fast = bsa_compile.optimize(model, policy, backend="eager", regional=False)
    with torch.no_grad():
        fast(*inputs)
    assert len(spy) == len(qkv) == len(projected) == len(model.blocks)
    for (v, out, layout), fused, after in zip(spy, qkv, projected, strict=True):
        batch, heads, tokens, width = v.shape
        assert layout == "raster"
        # v is a view of the fused projection, where the model left it.
        assert v.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
        assert torch.equal(v, fused.view(batch, tokens, 3, heads, width)[:, :, 2].transpose(1, 2))
        # The output projection reads what attention wrote.
        assert after.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


def test_the_pass_gives_attention_the_very_tensors_that_the_model_made():
    model, graphs = make_longcat(), []

    def backend(graph, _):
        graphs.extend((graph, bsa_compile.rewrite(graph, POLICY)[0]))
        return graphs[-1].forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*make_inputs())
    before, after = ([n for n in g.graph.nodes if n.op == "call_function"] for g in graphs)
    # The first of each block's two is self-attention, the other is to the text.
    dense = [n for n in before if n.target is torch.nn.functional.scaled_dot_product_attention][::2]
    sparse = [n for n in after if n.target is torch.ops.bsa.attend.default]
    assert len(dense) == len(sparse) == len(model.blocks)
    for old, new in zip(dense, sparse, strict=True):
        assert [a.name for a in new.args[:3]] == [a.name for a in old.args[:3]]
        (out,) = (u for u in new.users if u.args[1] == 0)
        assert [u.name for u in out.users] == [u.name for u in old.users]


# -- one layer of configuration overrode another without a word -------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose configuration asks for block sparse attention."""
    make_longcat().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tiles = {"chunk_3d_shape_q": [2, 3, 2], "chunk_3d_shape_k": [2, 3, 2]}
    config = {**json.loads(path.read_text()), "enable_bsa": True, "bsa_params": {"sparsity": 0.5, **tiles}}
    path.write_text(json.dumps(config))
    return tmp_path


def runs(fast) -> set[float | None]:
    """Sparsities that a call runs with."""
    with torch.no_grad():
        fast(*make_inputs())
    return {s.sparsity for s in fast.report.rewritten}


def test_what_the_configuration_asks_for_is_not_undone(checkpoint, caplog):
    # `enable_bsa: true` in config.json was switched off again by the pipeline.
    model = LongCatVideoTransformer3DModel.from_pretrained(checkpoint)
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        fast = bsa_compile.optimize(model, backend="eager")
    assert "Enabling Block Sparse Attention (BSA): sparsity=0.5" in caplog.text
    assert runs(fast) == {0.5}
    inputs = make_inputs()
    with torch.no_grad():
        assert relative_error(fast(*inputs), run_reference(model, POLICY, *inputs)) < 1e-5


def test_layers_of_configuration_override_in_one_order_and_aloud(checkpoint, caplog):
    model = LongCatVideoTransformer3DModel.from_pretrained(checkpoint)
    argument, later = (BSAPolicy(**{**POLICY.to_dict(), "sparsity": s}) for s in (0.75, 0.25))
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        fast = bsa_compile.optimize(model, argument, backend="eager")
        assert "the policy argument overrides the model's configuration (sparsity=0.5" in caplog.text
        assert runs(fast) == {0.75}
        fast.set_policy(later)  # at run time, the strongest
        assert runs(fast) == {0.25}
        fast.disable_bsa()
        assert runs(fast) == set()
        caplog.clear()
        fast.set_policy(argument)
        assert "is off (set_policy: disable_bsa() stays in force" in caplog.text
        assert runs(fast) == set()
        fast.enable_bsa()
        assert runs(fast) == {0.75}
    assert fast.policy == argument


# -- a variable that should have skipped autotuning was misspelt and did nothing --------------------------------------


@pytest.mark.parametrize(
    ("variables", "searches"),
    [({}, False), ({"BSA_AUTOTUNE": "1"}, True), ({"BSA_AUTOTUNE": "1", "TRITON_AUTOTUNE_ENABLE": "0"}, False)],
    ids=["nothing asked for", "asked for", "forbidden"],
)
def test_the_variable_that_switches_autotuning_off_does(variables, searches, monkeypatch):
    for name in ("BSA_AUTOTUNE", "TRITON_AUTOTUNE_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert autotune.enabled() is searches


def test_kernels_are_tuned_by_the_module_that_the_variable_governs_alone():
    # Anything else that searched, Triton's own decorators say, would not ask it.
    sources = [path for path in (ROOT / "kernels").glob("*.py") if path.name != "autotune.py"]
    assert sources
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                of = getattr(node.value, "id", "")
                assert (of, node.attr) not in {("triton", "autotune"), ("triton", "heuristics")}, (
                    f"{path}:{node.lineno}"
                )
                assert node.attr not in ("environ", "getenv"), f"{path}:{node.lineno} reads the environment"
