"""The `bsa` backend: torch.compile's own door."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import bsa_compile
from bsa_compile.backend import BSABackend
from bsa_compile.errors import PolicyError
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy, Rule

from .support import CountCompiles, make_inputs, make_longcat, relative_error, run_reference

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))
CONFIGURED = BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))
OFF = BSAPolicy(**{**POLICY.to_dict(), "enabled": False})
PARAMS = {"sparsity": 0.5, "chunk_3d_shape_q": [2, 3, 4], "chunk_3d_shape_k": [2, 2, 4]}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("options", [{}, {"mode": "default"}, {"epilogue_fusion": False}], ids=str)
def test_the_backend_by_name_computes_the_reference(longcat, options):
    inputs = make_inputs()
    fast = torch.compile(longcat, backend="bsa", options={"policy": POLICY, **options})
    with torch.no_grad():
        assert relative_error(fast(*inputs), run_reference(longcat, POLICY, *inputs)) < 1e-5
    report = bsa_compile.last_report()
    assert [s.module for s in report.rewritten] == ["blocks.0.attn", "blocks.1.attn"]
    assert {s.grid_source for s in report.rewritten} == {"patch_embedding"}
    assert {s.reason for s in report.dense} == {"cross_attention"}


def door(model, policy=POLICY, **options):
    given = {"compiler": "eager", **options}
    if policy is not None:
        given["policy"] = policy
    return torch.compile(model, backend="bsa", options=given)


def test_the_models_configuration_and_its_switch_count(longcat, caplog):
    longcat.bsa_params = PARAMS
    inputs, fast = make_inputs(), door(longcat, policy=None)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="bsa_compile"):
        sparse = fast(*inputs)
        assert relative_error(sparse, run_reference(longcat, CONFIGURED, *inputs)) < 1e-5
        assert "Enabling Block Sparse Attention (BSA): sparsity=0.5" in caplog.text
        longcat.disable_bsa()
        assert relative_error(fast(*inputs), longcat(*inputs)) < 1e-6
        longcat.enable_bsa()
        assert torch.equal(fast(*inputs), sparse)
        with CountCompiles() as compiles:
            longcat.disable_bsa()
            fast(*inputs)
            longcat.enable_bsa()
            fast(*inputs)
        assert compiles.count == 0


class Wrapper(nn.Module):
    """A model inside another module, beside one that has no say."""

    def __init__(self, model):
        super().__init__()
        self.bystander = make_longcat()
        self.bystander.bsa_params = {"sparsity": 0.9}
        self.inner = model

    def forward(self, *args):
        return self.inner(*args)


class Pipeline:
    """Holds a model without being a module itself."""

    def __init__(self, model):
        self.transformer = model

    def predict(self, *args):
        return self.transformer(*args)


def in_a_function(model):
    return lambda *args: model(*args)


def with_a_graph_break(model):
    """Its blocks are compiled one by one: no compiled code knows the model that they are of."""
    model.blocks[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    return model


def with_a_graph_break_before_attention(model):
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    return model


ROOTS = {
    "wrapper": Wrapper,
    "method": lambda model: model.forward,
    "function": in_a_function,
    "pipeline": lambda model: Pipeline(model).predict,
    "graph_break": with_a_graph_break,
    "graph_break_in_wrapper": lambda model: Wrapper(with_a_graph_break(model)),
    "graph_break_before_attention": with_a_graph_break_before_attention,
}


@pytest.mark.filterwarnings("error:enable_bsa was asked for")  # which says that attention ran dense
@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())
def test_the_model_is_found_where_the_compiled_code_is_not_its_own(longcat, root):
    longcat.bsa_params = PARAMS
    inputs, fast = make_inputs(), door(root(longcat), policy=None, grid=(4, 6, 10))
    with torch.no_grad():
        want, dense = run_reference(longcat, CONFIGURED, *inputs), longcat(*inputs)
        assert relative_error(fast(*inputs), want) < 1e-5
        assert bsa_compile.last_report().notes == []
        longcat.disable_bsa()
        assert relative_error(fast(*inputs), dense) < 1e-6
        longcat.enable_bsa()
        assert relative_error(fast(*inputs), want) < 1e-5
        with CountCompiles() as compiles:
            longcat.disable_bsa()
            assert relative_error(fast(*inputs), dense) < 1e-6
            longcat.enable_bsa()
            assert relative_error(fast(*inputs), want) < 1e-5
        assert compiles.count == 0


def test_models_that_ask_for_different_things_in_one_graph(longcat):
    other = make_longcat(seed=1)
    longcat.bsa_params = PARAMS
    inputs = make_inputs()

    def both(*args):
        return longcat(*args) + other(*args)

    with torch.no_grad():
        door(both, policy=None)(*inputs)
    assert any("LongCatVideoTransformer3DModel counts" in note for note in bsa_compile.last_report().notes)


def test_a_model_that_cannot_be_told_is_reported():
    def attend(q):
        return bsa_compile.attention(q, q, q, grid_q=(2, 2, 2))

    door(attend, policy=None)(torch.randn(1, 1, 8, 16))
    assert any("configuration was not seen" in note for note in bsa_compile.last_report().notes)


@pytest.mark.parametrize(
    ("config", "switch", "policy", "sparse", "said"),
    [
        ({"enable_bsa": True}, None, None, CONFIGURED, ""),
        ({"enable_bsa": False}, None, None, None, "enable_bsa is false in the model's configuration"),
        ({}, None, None, CONFIGURED, ""),
        ({"enable_bsa": False}, "enable_bsa", None, CONFIGURED, "it overrides enable_bsa: false"),
        ({"enable_bsa": False}, None, POLICY, POLICY, "the policy argument overrides enable_bsa: false"),
        ({"enable_bsa": True}, "disable_bsa", POLICY, None, "disable_bsa() was called on the model: it overrides"),
        ({"enable_bsa": True}, None, BSAPolicy.dense(), None, ""),
        ({"enable_bsa": False}, "enable_bsa", OFF, POLICY, "it overrides the policy argument, which is disabled"),
    ],
    ids=[
        "true",
        "false",
        "silent",
        "false, enabled",
        "false, policy",
        "true, disabled, policy",
        "true, dense policy",
        "false, enabled, dense policy",
    ],
)
def test_run_time_calls_over_the_policy_argument_over_the_configuration(
    longcat, config, switch, policy, sparse, said, caplog
):
    model = LongCatVideoTransformer3DModel(dataclasses.replace(longcat.config, **config, bsa_params=PARAMS)).eval()
    model.load_state_dict(longcat.state_dict())
    if switch:
        getattr(model, switch)()
    inputs = make_inputs()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="bsa_compile"):
        out = door(model, policy=policy)(*inputs)
        want = longcat(*inputs) if sparse is None else run_reference(longcat, sparse, *inputs)
    assert relative_error(out, want) < 1e-5
    assert said in caplog.text
    assert ("overrides enable_bsa" in caplog.text) == ("overrides enable_bsa" in said or policy is OFF)


@pytest.mark.parametrize("cond", [1, 4])
@pytest.mark.parametrize("policy", [POLICY, POLICY.to_dict()], ids=["object", "json"])
def test_cond_latents_and_cache_through_the_trace(longcat, policy, cond):
    latents, timestep, text = make_inputs((6, 6, 10))
    per_frame = timestep[:, None].expand(1, 6).clone()
    per_frame[:, :cond] = 0
    fast = door(longcat, policy=policy)
    with torch.no_grad():
        whole = fast(latents, per_frame, text, num_cond_latents=cond)
        assert {s.role for s in bsa_compile.last_report().rewritten} == {"cond", "noise"}
        want = run_reference(longcat, POLICY, latents, per_frame, text, num_cond_latents=cond)
        assert relative_error(whole, want) < 1e-5
        first = latents[:, :, :cond], per_frame[:, :cond], text
        _, cache = fast(*first, return_kv=True, skip_crs_attn=True)
        assert [(s.role, s.reason) for s in bsa_compile.last_report().sites] == [("cond", "rewritten")] * 2
        cached = fast(latents[:, :, cond:], per_frame[:, cond:], text, num_cond_latents=cond, kv_cache_dict=cache)
    assert {s.role for s in bsa_compile.last_report().rewritten} == {"cached"}
    assert relative_error(cached, whole[:, :, cond:]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("cond", [1, 4])
def test_rules_for_cond_frames_meet_their_encoding(longcat, cond, checkpointing):
    policy = BSAPolicy(**{**POLICY.to_dict(), "rules": [Rule(role="cond", sparsity=0.8)]})
    expected = BSAPolicy(**{**POLICY.to_dict(), "sparsity": 0.8})
    longcat.gradient_checkpointing = checkpointing
    latents, timestep, text = make_inputs((cond, 6, 10))
    with torch.set_grad_enabled(checkpointing):
        out, cache = door(longcat, policy=policy)(latents, timestep, text, return_kv=True)
        want, want_cache = run_reference(longcat, expected, latents, timestep, text, return_kv=True)
    sites = [(s.role, s.sparsity, s.detail) for s in bsa_compile.last_report().rewritten]
    assert sites == [("cond", 0.8, "rule 0")] * 2
    assert relative_error(out.detach(), want.detach()) < 1e-5
    assert relative_error(cache[1][0].detach(), want_cache[1][0].detach()) < 1e-5


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_many_grids(longcat, dynamic):
    fast = torch.compile(longcat, backend="bsa", options={"policy": POLICY, "compiler": "eager"}, dynamic=dynamic)
    with torch.no_grad():
        for grid in [(4, 6, 10), (2, 5, 9), (4, 7, 7), (3, 10, 6), (4, 6, 10)]:
            inputs = make_inputs(grid)
            assert relative_error(fast(*inputs), run_reference(longcat, POLICY, *inputs)) < 1e-5, grid
            assert bsa_compile.last_report().rewritten


def test_step_rules_do_not_match_here_and_the_report_says_so(longcat):
    policy = BSAPolicy(**{**POLICY.to_dict(), "dense_steps": 4})
    fast = door(longcat, policy=policy)
    with torch.no_grad(), bsa_compile.step(0, 5):
        out = fast(*make_inputs())
        assert relative_error(out, run_reference(longcat, POLICY, *make_inputs())) < 1e-5
    assert any("step" in note for note in bsa_compile.last_report().notes)


def test_bad_options_are_refused(longcat):
    with pytest.raises(Exception, match="BSAPolicy") as info, torch.no_grad():
        door(longcat, policy=3)(*make_inputs())
    assert isinstance(info.value.inner_exception, PolicyError)
    with pytest.raises(Exception, match="not_an_option"), torch.no_grad():
        torch.compile(longcat, backend="bsa", options={"policy": POLICY, "not_an_option": 1})(*make_inputs())


def test_equal_backends_are_equal_and_others_are_not():
    one = BSABackend(POLICY)
    assert one == BSABackend(BSAPolicy.from_json(POLICY.to_json()))
    assert hash(one) == hash(BSABackend(POLICY))
    others = [
        BSABackend(BSAPolicy()),
        BSABackend(POLICY, mode="max-autotune-no-cudagraphs"),
        BSABackend(POLICY, options={"epilogue_fusion": False}),
        BSABackend(POLICY, dynamic=True),
        BSABackend(POLICY, compiler="eager"),
    ]
    assert all(one != other for other in others)


def run_python(code: str, *, root: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(root), **env},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr


RUN = """
    import json, torch, bsa_compile
    from bsa_compile.policy import BSAPolicy
    from torch._dynamo.utils import counters
    tiles = {{"chunk_3d_shape_q": (2, 2, 2), "chunk_3d_shape_k": (2, 2, 2)}}

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return bsa_compile.attention(q, k, v, grid_q=(4, 4, 8)).sin()

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 128, 16).unbind(0)
    results = []
    for sparsity in {sparsities}:
        policy = BSAPolicy.dense() if sparsity is None else BSAPolicy(sparsity=sparsity, **tiles)
        results.append(float(bsa_compile.optimize(Model(), policy)(q, k, v).double().sum()))
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps([results, hits]))
"""


def test_on_disk_caches_are_right_when_policy_or_sources_change(tmp_path):
    """A cached graph knows an op by its name only; another policy or other sources must not find it."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}

    def run(*sparsities, root=ROOT):
        return json.loads(run_python(RUN.format(sparsities=list(sparsities)), root=root, **cache))

    (first, dense), _ = run(0.5, None)
    (again, other), hits = run(0.5, 0.9)
    assert again == first
    assert hits > 0  # the cache does work, so what follows is worth something
    assert other != pytest.approx(first, abs=1e-3)
    # A copy of the package whose anchor computes something else: composite ops are baked into compiled code.
    for name in ("bsa_compile", "passes", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    edited = 0
    for path in (tmp_path / "tree" / "bsa_compile" / "ops").glob("*.py"):
        text = path.read_text()
        if "F.scaled_dot_product_attention(" in text:
            path.write_text(text.replace("F.scaled_dot_product_attention(", "0.5 * F.scaled_dot_product_attention("))
            edited += 1
    assert edited
    (changed,), _ = run(None, root=tmp_path / "tree")
    assert changed != pytest.approx(dense, abs=1e-3)


def test_torch_logs_shows_each_site():
    code = """
        import torch, bsa_compile
        from bsa_compile.policy import BSAPolicy
        class Model(torch.nn.Module):
            def forward(self, q):
                return bsa_compile.attention(q, q, q, grid_q=(2, 2, 2))
        bsa_compile.optimize(Model(), BSAPolicy(sparsity=0.5), backend="eager")(torch.randn(1, 1, 8, 16))
    """
    text = run_python(code, TORCH_LOGS="+bsa_compile")
    assert "Enabling Block Sparse Attention (BSA): sparsity=0.5" in text
    assert "block-sparse: sparsity 0.5" in text
