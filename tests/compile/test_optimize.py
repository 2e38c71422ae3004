"""`optimize`: what the returned model is, computes, and how it is switched."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle

import pytest
import torch

import bsa_compile
from bsa_compile.errors import GridError, InputError, PolicyError, SiteError, UnsupportedError, UsageError
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel, dense_attention
from bsa_compile.policy import BSAPolicy, Rule

from .support import CountCompiles, make_inputs, make_longcat, relative_error, run_reference

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))
REGIONAL = pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@REGIONAL
def test_the_optimized_model_computes_the_reference(longcat, backend, regional):
    inputs = make_inputs()
    fast = bsa_compile.optimize(longcat, POLICY, backend=backend, regional=regional)
    with torch.no_grad():
        out, want, dense = fast(*inputs), run_reference(longcat, POLICY, *inputs), longcat(*inputs)
    assert relative_error(out, want) < 1e-5
    assert relative_error(out, dense) > 1e-3  # it is not the dense result
    report = fast.report
    assert [s.module for s in report.rewritten] == ["blocks.0.attn", "blocks.1.attn"]
    assert {s.grid_source for s in report.rewritten} == {"anchor"}
    assert {s.reason for s in report.dense} == {"cross_attention"}
    assert len(report.dense) == 2


def test_the_model_passed_in_stays_as_it_was(longcat):
    inputs = make_inputs()
    with torch.no_grad():
        before = longcat(*inputs)
        fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
        fast(*inputs)
        assert torch.equal(longcat(*inputs), before)
    assert all(b.attn.attention_fn is dense_attention for b in longcat.blocks)
    assert type(longcat) is LongCatVideoTransformer3DModel


def test_the_result_is_the_model_in_all_that_counts(longcat, tmp_path):
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    assert isinstance(fast, LongCatVideoTransformer3DModel)
    assert list(fast.state_dict()) == list(longcat.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), longcat.parameters(), strict=True))
    assert fast.config is longcat.config
    with torch.no_grad():
        longcat.final_layer.linear.bias.add_(1)
    assert torch.equal(fast.final_layer.linear.bias, longcat.final_layer.linear.bias)
    state = {k: torch.zeros_like(v) for k, v in fast.state_dict().items()}
    fast.load_state_dict(state)
    assert not longcat.x_embedder.proj.weight.any()
    fast.to(torch.bfloat16)
    assert longcat.x_embedder.proj.weight.dtype == torch.bfloat16
    fast.save_pretrained(tmp_path)
    again = LongCatVideoTransformer3DModel.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(longcat.state_dict())


def test_switching_off_is_dense_and_switching_again_compiles_nothing(longcat):
    inputs = make_inputs()
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with torch.no_grad():
        sparse, dense = fast(*inputs), longcat(*inputs)
        fast.disable_bsa()
        assert relative_error(fast(*inputs), dense) < 1e-5
        assert {s.reason for s in fast.report.sites if s.role == "self"} == {"disabled"}
        with CountCompiles() as compiles:
            for _ in range(2):
                fast.enable_bsa()
                assert torch.equal(fast(*inputs), sparse)
                with fast.bsa_disabled():
                    assert relative_error(fast(*inputs), dense) < 1e-5
                assert torch.equal(fast(*inputs), sparse)
                fast.disable_bsa()
                fast(*inputs)
        assert compiles.count == 0


@REGIONAL
def test_going_back_to_a_grid_compiles_nothing(longcat, regional):
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager", regional=regional)
    grids = [(4, 6, 10), (2, 5, 9), (4, 10, 6), (3, 8, 10)]
    with torch.no_grad():
        first = [fast(*make_inputs(g)) for g in grids]
        with CountCompiles() as compiles:
            second = [fast(*make_inputs(g)) for g in grids]
        want = [run_reference(longcat, POLICY, *make_inputs(g)) for g in grids]
    assert compiles.count == 0
    for a, b, c in zip(first, second, want, strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, c) < 1e-5


def test_the_policy_can_be_replaced_and_taken_back(longcat):
    inputs = make_inputs()
    other = BSAPolicy(cdf_threshold=0.5, chunk_3d_shape_q=(1, 3, 5), chunk_3d_shape_k=(1, 3, 5))
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with torch.no_grad():
        first = fast(*inputs)
        fast.set_policy(other)
        assert fast.policy == other
        assert relative_error(fast(*inputs), run_reference(longcat, other, *inputs)) < 1e-5
        assert {s.cdf_threshold for s in fast.report.rewritten} == {0.5}
        with CountCompiles() as compiles:
            fast.set_policy(POLICY)
            assert torch.equal(fast(*inputs), first)
        assert compiles.count == 0
    with pytest.raises(PolicyError, match="BSAPolicy"):
        fast.set_policy({"sparsity": 0.5})


DENSE = BSAPolicy.dense()
OTHER = BSAPolicy(**{**POLICY.to_dict(), "sparsity": 0.2})


@pytest.mark.parametrize(
    ("asked", "policy", "calls", "runs", "says"),
    [
        (None, DENSE, [], DENSE, "off (optimize: the policy is disabled)"),
        (None, DENSE, [("set_policy", OTHER)], OTHER, "sparsity=0.2"),
        (None, DENSE, ["enable_bsa"], BSAPolicy(), "enable_bsa() overrides the policy, which is disabled"),
        (None, POLICY, [("set_policy", DENSE)], DENSE, "off (set_policy: the policy is disabled)"),
        (None, POLICY, ["enable_bsa", ("set_policy", DENSE)], DENSE, "off (set_policy: the policy is disabled)"),
        (None, POLICY, [("set_policy", DENSE), "enable_bsa"], BSAPolicy(), "enable_bsa() overrides the policy"),
        (None, POLICY, [("set_policy", DENSE), ("set_policy", OTHER)], OTHER, "sparsity=0.2"),
        (None, POLICY, ["disable_bsa", ("set_policy", OTHER)], DENSE, "off (set_policy: disable_bsa() stays in force"),
        (None, POLICY, ["disable_bsa", ("set_policy", OTHER), "enable_bsa"], OTHER, "sparsity=0.2"),
        (
            "enable_bsa",
            DENSE,
            [],
            BSAPolicy(),
            "enable_bsa() was called on the model: it overrides the policy argument",
        ),
        ("enable_bsa", POLICY, [], POLICY, "sparsity=0.6"),
        ("disable_bsa", DENSE, [], DENSE, "off (optimize"),
        ("disable_bsa", POLICY, [], DENSE, "disable_bsa() was called on the model: it overrides the policy"),
        ("disable_bsa", POLICY, [("set_policy", OTHER)], DENSE, "disable_bsa() stays in force"),
        ("disable_bsa", DENSE, ["enable_bsa"], BSAPolicy(), "overrides the policy, which is disabled"),
    ],
)
def test_switch_and_policy_in_any_order(longcat, caplog, asked, policy, calls, runs, says):
    if asked:
        getattr(longcat, asked)()
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        fast = bsa_compile.optimize(longcat, policy, backend="eager")
        for call in calls:
            if isinstance(call, str):
                getattr(fast, call)()
            else:
                getattr(fast, call[0])(*call[1:])
    with torch.no_grad():
        fast(*make_inputs())
    assert len(fast.report.rewritten) == (2 if runs.enabled else 0)
    assert {s.sparsity for s in fast.report.rewritten} == ({runs.sparsity} if runs.enabled else set())
    assert fast.report.policy == runs.describe()
    assert says in caplog.text
    switches = [r.getMessage() for r in caplog.records if "(BSA)" in r.getMessage()]
    assert switches[-1].startswith("Enabling") == runs.enabled
    assert fast.bsa_enabled is runs.enabled


def test_a_policy_set_while_switched_off_for_a_block_counts_behind_it(longcat):
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with torch.no_grad(), fast.bsa_disabled():
        fast.set_policy(OTHER)
        fast(*make_inputs())
        assert not fast.report.rewritten
    with torch.no_grad():
        fast(*make_inputs())
    assert {s.sparsity for s in fast.report.rewritten} == {0.2}


def configured(model, **fields):
    """The model as its checkpoint's configuration would have made it."""
    model.config = dataclasses.replace(model.config, **fields)
    model.bsa_enabled = True if fields.get("enable_bsa") else None
    model.bsa_params = fields.get("bsa_params")
    return model


def test_a_disabled_policy_argument_overrides_the_configuration_and_says_so(longcat, caplog):
    model = configured(longcat, enable_bsa=True, bsa_params={"sparsity": 0.5})
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        fast = bsa_compile.optimize(model, DENSE, backend="eager")
    assert "overrides enable_bsa: true of the model's configuration" in caplog.text
    assert not fast.policy.enabled
    fast.set_policy(OTHER)
    with torch.no_grad():
        fast(*make_inputs())
    assert len(fast.report.rewritten) == 2


@pytest.mark.parametrize("cond", [1, 4])
@REGIONAL
def test_cond_latents_run_block_sparse_and_cached_equals_uncached(longcat, cond, regional):
    grid = (8, 6, 10)
    latents, timestep, text = make_inputs(grid)
    per_frame = timestep[:, None].expand(1, grid[0]).clone()
    per_frame[:, :cond] = 0
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager", regional=regional)
    with torch.no_grad():
        whole = fast(latents, per_frame, text, num_cond_latents=cond)
        roles = {s.role for s in fast.report.rewritten}
        assert roles == {"cond", "noise"}
        _, cache = fast(latents[:, :, :cond], per_frame[:, :cond], text, return_kv=True, skip_crs_attn=True)
        cached = fast(latents[:, :, cond:], per_frame[:, cond:], text, num_cond_latents=cond, kv_cache_dict=cache)
        want = run_reference(longcat, POLICY, latents, per_frame, text, num_cond_latents=cond)
    assert relative_error(whole, want) < 1e-5
    assert relative_error(cached, whole[:, :, cond:]) < 1e-5
    assert {s.role for s in fast.report.rewritten} == {"cond", "noise", "cached"}
    assert all(s.reason == "cross_attention" for s in fast.report.dense)


def test_an_image_stays_dense(longcat):
    inputs = make_inputs((1, 6, 10))
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with torch.no_grad():
        assert relative_error(fast(*inputs), longcat(*inputs)) < 1e-6
    assert {s.reason for s in fast.report.sites} == {"image", "cross_attention"}


PER_LAYER = BSAPolicy(
    sparsity=0.6,
    chunk_3d_shape_q=(2, 3, 4),
    chunk_3d_shape_k=(2, 2, 4),
    rules=[
        Rule(module="blocks.0.*", dense=True),
        Rule(module="blocks.3.attn", dense=True),
        Rule(module="blocks.2.attn", sparsity=0.2),
    ],
)


def test_per_layer_rules_are_right_whole_and_regional():
    model, inputs = make_longcat(depth=4), make_inputs()
    expected = [None, POLICY, BSAPolicy(**{**POLICY.to_dict(), "sparsity": 0.2}), None]
    with torch.no_grad():
        want = run_reference(model, expected, *inputs)
        for regional in (False, True):
            fast = bsa_compile.optimize(model, PER_LAYER, backend="eager", regional=regional)
            assert relative_error(fast(*inputs), want) < 1e-5
            assert [s.module for s in fast.report.rewritten] == ["blocks.1.attn", "blocks.2.attn"]
            assert sorted(s.module for s in fast.report.dense if s.reason == "rule") == [
                "blocks.0.attn",
                "blocks.3.attn",
            ]


def test_equal_blocks_share_one_compilation():
    model, inputs = make_longcat(depth=4), make_inputs()
    fast = bsa_compile.optimize(model, POLICY, backend="eager", regional=True)
    with torch.no_grad(), CountCompiles() as compiles:
        fast(*inputs)
    assert compiles.count == 1
    assert len(fast.report.rewritten) == 4
    rules = [Rule(module="blocks.0.*", dense=True), Rule(module="blocks.3.*", dense=True)]
    fast.set_policy(BSAPolicy(sparsity=0.6, rules=rules))
    with torch.no_grad(), CountCompiles() as compiles:
        fast(*inputs)
    assert compiles.count == 2  # {0, 3} and {1, 2}


def test_steps_choose_the_policy_of_the_step(longcat):
    inputs = make_inputs()
    policy = BSAPolicy(**{**POLICY.to_dict(), "dense_steps": 2, "rules": [{"steps": [3, 4], "sparsity": 0.2}]})
    fast = bsa_compile.optimize(longcat, policy, backend="eager")
    late = BSAPolicy(**{**POLICY.to_dict(), "sparsity": 0.2})
    want = {0: longcat, 2: POLICY, 3: late}
    with torch.no_grad():
        for index, expected in want.items():
            with bsa_compile.step(index, 5):
                out = fast(*inputs)
            ref = longcat(*inputs) if expected is longcat else run_reference(longcat, expected, *inputs)
            assert relative_error(out, ref) < 1e-5, index
        with CountCompiles() as compiles:
            for index in (0, 1, 2, 3, 4):
                with bsa_compile.step(index, 5):
                    fast(*inputs)
        assert compiles.count == 0
        assert not any("outside bsa_compile.step" in n for n in fast.report.notes)
        assert relative_error(fast(*inputs), run_reference(longcat, POLICY, *inputs)) < 1e-5
    assert any("outside bsa_compile.step" in n for n in fast.report.notes)
    fast.set_policy(POLICY)  # of which that is not true
    with torch.no_grad():
        fast(*inputs)
    assert fast.report.notes == []


def test_a_report_tells_every_site_and_its_own_reason_at_every_step(longcat):
    rule = bsa_compile.Rule(module="blocks.0.*", dense=True)
    policy = BSAPolicy(**{**POLICY.to_dict(), "dense_steps": 2, "rules": [rule]})
    first, second = "the first 2 steps are dense", "rule 0"

    def told(fast):
        return {(s.module, s.detail if s.reason == "rule" else s.reason) for s in fast.report.sites if s.role == "self"}

    fast, inputs = bsa_compile.optimize(longcat, policy, backend="eager"), make_inputs()
    with torch.no_grad():
        with bsa_compile.step(0, 5):
            fast(*inputs)
        assert told(fast) == {("blocks.0.attn", first), ("blocks.1.attn", first)}
        assert "0 of 4 attention sites" in str(fast.report)
        with bsa_compile.step(2, 5), CountCompiles() as compiles:
            fast(*inputs)
    assert compiles.count == 1  # dense code is there already, whatever the reason for it is called
    later = {("blocks.0.attn", second), ("blocks.1.attn", "rewritten")}
    assert told(fast) == {("blocks.0.attn", first), ("blocks.1.attn", first)} | later
    assert "1 of 4 attention sites" in str(fast.report)


def test_a_report_tells_of_code_that_another_step_compiled(longcat):
    rules = [bsa_compile.Rule(dense=True, steps=(i, i + 1), name=f"step {i}") for i in range(2)]
    policy = BSAPolicy(**{**POLICY.to_dict(), "rules": rules})
    fast = bsa_compile.optimize(longcat, policy, backend="eager", dynamic=False)
    small, large = make_inputs(), make_inputs((4, 6, 12))
    with torch.no_grad():
        for index, inputs in ((0, small), (1, large), (1, small)):  # the last runs what step 0 compiled
            with bsa_compile.step(index, 5):
                fast(*inputs)
    told = {(s.module, s.grid_q, s.detail) for s in fast.report.sites if s.role == "self"}
    assert {(f"blocks.{i}.attn", (4, 6, 10), f"step {step}") for i in range(2) for step in range(2)} <= told
    assert {(f"blocks.{i}.attn", (4, 6, 12), "step 1") for i in range(2)} <= told


def test_a_report_does_not_deny_the_step_that_is_active(longcat):
    fast = torch.compile(longcat, backend="bsa", options={"policy": BSAPolicy(dense_steps=2), "compiler": "eager"})
    with torch.no_grad(), bsa_compile.step(0, 5):
        fast(*make_inputs())
    (note,) = (n for n in bsa_compile.last_report().notes if "step" in n)
    assert note == "dense_steps and rules with steps did not apply: no denoising step was given"


def test_lora_and_masks_work_through_the_optimized_model(longcat, tmp_path):
    from safetensors.torch import save_file

    name = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj"
    torch.manual_seed(3)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 32),
        f"{name}.lora_up.weight": torch.randn(32, 4),
        f"{name}.alpha_scale": torch.tensor(0.5),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    latents, timestep, text = make_inputs(batch=2)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with torch.no_grad():
        plain = fast(latents, timestep, text, mask)
        assert relative_error(plain, run_reference(longcat, POLICY, latents, timestep, text, mask)) < 1e-5
        fast.load_lora(tmp_path / "lora.safetensors", "style")
        fast.enable_loras(["style"])
        styled = fast(latents, timestep, text, mask)
        fast.disable_all_loras()
        assert torch.equal(fast(latents, timestep, text, mask), plain)
        longcat.enable_loras(["style"])  # what was loaded is there for both; what is active is each one's own
        want = run_reference(longcat, POLICY, latents, timestep, text, mask)
    assert relative_error(styled, want) < 1e-5
    assert relative_error(styled, plain) > 1e-3


def test_a_disagreeing_grid_is_one_clear_error(longcat):
    for regional, where in ((False, r"blocks\.0\.attn"), (True, r"blocks\.0: .*attn")):
        fast = bsa_compile.optimize(longcat, POLICY, grid=(4, 10, 6), backend="eager", regional=regional)
        with pytest.raises(GridError, match=where), torch.no_grad():
            fast(*make_inputs((4, 6, 10)))


class Plain(torch.nn.Module):
    """Attends over tokens that come from no patch embedding."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + out.transpose(1, 2).flatten(2)


def test_an_unknown_grid_stays_dense_or_is_an_error_as_the_policy_says():
    model, x = Plain(), torch.randn(1, 60, 32)
    fast = bsa_compile.optimize(model, POLICY, backend="eager")
    assert torch.equal(fast(x), model(x))
    (site,) = fast.report.sites
    assert site.reason == "unknown_grid"
    assert "test_optimize.py" in site.source
    strict = bsa_compile.optimize(model, BSAPolicy(on_unsupported="error"), backend="eager")
    with pytest.raises(SiteError, match="not known"):
        strict(x)
    told = bsa_compile.optimize(model, POLICY, grid=(3, 4, 5), backend="eager")
    assert relative_error(told(x), model(x)) > 1e-4
    assert [s.grid_source for s in told.report.rewritten] == ["argument"]


def test_two_grids_of_equal_length_under_latent_grid():
    model, x = Plain(), torch.randn(1, 120, 32)
    fast = bsa_compile.optimize(model, POLICY, backend="eager")
    told = {g: bsa_compile.optimize(model, POLICY, grid=g, backend="eager")(x) for g in [(2, 6, 10), (2, 10, 6)]}
    for _ in range(2):
        for grid, want in told.items():
            with bsa_compile.latent_grid(*grid):
                assert torch.equal(fast(x), want)
    assert relative_error(told[(2, 6, 10)], told[(2, 10, 6)]) > 1e-4
    with bsa_compile.latent_grid(2, 3, 4), pytest.raises(GridError, match="120"):
        fast(x)


def test_too_many_shapes_are_an_error_and_never_a_silent_fallback(monkeypatch):
    monkeypatch.setattr("bsa_compile.runtime.RECOMPILE_LIMIT", 3)
    fast = bsa_compile.optimize(Plain(), POLICY, backend="eager", dynamic=False)
    for tokens in (10, 11, 12):
        fast(torch.randn(1, tokens, 32))
    with pytest.raises(UnsupportedError, match=r"3 under each of 1 policies.*rules.*dynamic=True"):
        fast(torch.randn(1, 13, 32))


def test_policies_do_not_use_up_the_limit_of_shapes(monkeypatch):
    """A block's code serves all blocks: six policies are six entries of Dynamo's, which counts them with the shapes."""
    monkeypatch.setattr("bsa_compile.runtime.RECOMPILE_LIMIT", 2)
    rules = [Rule(module=f"blocks.{i}.*", sparsity=0.1 * (i + 1)) for i in range(6)]
    model, policy = make_longcat(depth=6), BSAPolicy(**{**POLICY.to_dict(), "rules": rules})
    fast = bsa_compile.optimize(model, policy, backend="eager", regional=True, dynamic=False)
    with torch.no_grad():
        for grid in ((2, 6, 10), (3, 6, 10)):
            fast(*make_inputs(grid))
        assert len({s.sparsity for s in fast.report.rewritten}) == 6
        with pytest.raises(UnsupportedError, match="12 ways"):
            fast(*make_inputs((4, 6, 10)))
    whole = bsa_compile.optimize(Plain(), POLICY, grid=(1, 2, 5), backend="eager")
    for sparsity in (0.1, 0.2, 0.3, 0.4):
        whole.set_policy(BSAPolicy(sparsity=sparsity))
        whole(torch.randn(1, 10, 32))


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"backend": "bogus"}, UsageError, r"backend must be one of .*eager, .*inductor, .*, got 'bogus'"),
        ({"backend": "bsa"}, UsageError, "backend must be one of"),
        ({"backend": 5}, UsageError, "backend must be one of"),
        ({"mode": "bogus"}, UsageError, r"mode must be one of default, .*max-autotune.*, got 'bogus'"),
        ({"mode": 5}, UsageError, "mode must be one of"),
        ({"options": 5}, UsageError, "options must be a dict"),
        ({"options": {"bogus": 1}}, UsageError, r"options must hold only options of inductor, got 'bogus'"),
        ({"options": {"epilogue_fusio": 1}}, UsageError, "Did you mean epilogue_fusion"),
        ({"options": {1: 2}}, UsageError, "options must hold only options"),
        ({"options": {"epilogue_fusion": "yes"}}, UsageError, "epilogue_fusion, got str should be bool"),
        ({"policy": BSAPolicy(attend="bogus")}, PolicyError, "attend must be one of native.*register_attend"),
    ],
    ids=str,
)
def test_unknown_names_are_refused_at_once(arguments, kind, says):
    with pytest.raises(kind, match=says):
        bsa_compile.optimize(Plain(), **arguments)


def test_an_unknown_implementation_is_no_policy_to_set(longcat):
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with pytest.raises(PolicyError, match="attend must be one of native"):
        fast.set_policy(BSAPolicy(attend="bogus"))
    assert fast.policy == POLICY


def test_a_backend_that_is_not_installed_is_named():
    fast = bsa_compile.optimize(Plain(), POLICY, backend="openxla")
    with pytest.raises(UnsupportedError, match=r"backend 'openxla' must be installed, got an error: .*torch_xla"):
        fast(torch.randn(1, 10, 32))


class Calls(torch.nn.Module):
    """Runs a function of ours inside a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def anchored(**arguments):
    return lambda x: bsa_compile.attention(x, x, x, **arguments)


def sparse(**arguments):
    return lambda x: bsa_compile.block_sparse_attention(x, x, x, sparsity=0.5, **arguments)


def nested(x):
    return sparse(grid_q=(2, 3, 5))(x.sin()).cos()


@pytest.mark.parametrize("fullgraph", [False, True], ids=["partial", "fullgraph"])
@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        (anchored(grid_q=(2, 3, 5)), GridError, "^the token axis of q must hold 30 tokens"),
        (anchored(grid_q=(2, 3)), GridError, "^grid_q must be three positive integers"),
        (anchored(grid_q=(2, 3, 4), role="bogus"), InputError, "^role must be one of"),
        (lambda x: anchored(grid_q=(2, 3, 4))(x[0]), InputError, r"^q must be \[B, H, Sq, D\]"),
        (sparse(grid_q=(2, 3, 5)), GridError, "must hold 30 tokens"),
        (sparse(grid_q=(2, 3, 4), implementation="bogus"), UnsupportedError, "^implementation must be one of"),
        (nested, GridError, "must hold 30 tokens"),
    ],
)
def test_errors_while_tracing_are_our_own(function, kind, says, fullgraph):
    fast = bsa_compile.optimize(Calls(function), POLICY, backend="eager", fullgraph=fullgraph)
    with pytest.raises(kind, match=says) as caught:
        fast(torch.randn(1, 2, 24, 16))
    assert type(caught.value) is kind
    assert "test_optimize.py:" in str(caught.value)  # the line that asked for it, not one inside the package


@pytest.mark.parametrize("fullgraph", [False, True], ids=["partial", "fullgraph"])
@REGIONAL
def test_wrong_inputs_of_a_model_are_our_own_errors(longcat, fullgraph, regional):
    latents, timestep, text = make_inputs()
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager", fullgraph=fullgraph, regional=regional)
    with torch.no_grad(), pytest.raises(InputError, match=r"^hidden_states must have shape"):
        fast(latents[:, :3], timestep, text)
    with torch.no_grad(), pytest.raises(InputError, match="num_cond_latents"):
        fast(latents, timestep, text, num_cond_latents=9)


def test_errors_that_are_not_ours_stay_as_they_are():
    def theirs(x):
        raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        bsa_compile.optimize(Calls(theirs), POLICY, backend="eager")(torch.randn(2))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="theirs"):
        bsa_compile.optimize(Calls(theirs), POLICY, backend="eager", fullgraph=True)(torch.randn(2))

    def failing(graph, inputs):
        raise RuntimeError("the compiler's own")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="the compiler's own"):
        bsa_compile.optimize(Calls(torch.sin), POLICY, backend=failing)(torch.randn(2))


def test_one_backend_serves_all_graphs_of_a_model_that_breaks():
    """A graph break cuts the model in two: both parts are rewritten, reported, and switched together."""

    def broken(x):
        x = bsa_compile.attention(x, x, x, grid_q=(2, 3, 4)) * 2
        torch._dynamo.graph_break()
        return bsa_compile.attention(x, x, x, grid_q=(2, 3, 4))

    policy = BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(1, 1, 2), chunk_3d_shape_k=(1, 1, 2))
    other = BSAPolicy(**{**policy.to_dict(), "sparsity": 0.75})

    def want(x, sparsity):
        for factor in (2, 1):
            options = {"grid_q": (2, 3, 4), "tile_q": (1, 1, 2), "sparsity": sparsity}
            x = bsa_compile.block_sparse_attention(x, x, x, **options) * factor
        return x

    x = torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(0))
    fast = bsa_compile.optimize(Calls(broken), policy, backend="aot_eager")
    with CountCompiles() as compiles:
        torch.testing.assert_close(fast(x), want(x, 0.5))
    assert compiles.count == 2
    assert len(fast.report.rewritten) == 2
    fast.set_policy(other)
    torch.testing.assert_close(fast(x), want(x, 0.75))
    assert [s.sparsity for s in fast.report.rewritten] == [0.75, 0.75]
    fast.disable_bsa()
    torch.testing.assert_close(fast(x), broken(x), atol=1e-5, rtol=1e-5)
    with CountCompiles() as compiles:
        fast.enable_bsa()
        fast.set_policy(policy)
        torch.testing.assert_close(fast(x), want(x, 0.5))
    assert compiles.count == 0


def test_bad_arguments_are_refused_at_once(longcat):
    with pytest.raises(UsageError, match=r"nn\.Module"):
        bsa_compile.optimize(lambda x: x, POLICY)
    with pytest.raises(PolicyError, match="BSAPolicy"):
        bsa_compile.optimize(longcat, {"sparsity": 0.9})
    with pytest.raises(GridError, match="three positive integers"):
        bsa_compile.optimize(longcat, POLICY, grid=(1, 2))
    with pytest.raises(UsageError, match="regional"):
        bsa_compile.optimize(Plain(), POLICY, regional=True)
    with pytest.raises(UsageError, match="CUDA graphs"):
        bsa_compile.optimize(longcat, POLICY, mode="reduce-overhead", regional=True)
    with pytest.raises(UsageError, match="mode"):
        bsa_compile.optimize(longcat, POLICY, mode="max-autotune", backend="eager")
    fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    with pytest.raises(UsageError, match="optimized already"):
        bsa_compile.optimize(fast, POLICY)
    with pytest.raises(UsageError):
        copy.deepcopy(fast)
    with pytest.raises(UsageError):
        pickle.dumps(fast)


def test_the_configuration_counts_where_no_policy_is_given(longcat, caplog):
    longcat.bsa_params = {"sparsity": 0.5, "chunk_3d_shape_q": [2, 3, 4], "chunk_3d_shape_k": [2, 2, 4]}
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        fast = bsa_compile.optimize(longcat, backend="eager")
        assert fast.policy == BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))
        assert "Enabling Block Sparse Attention (BSA): sparsity=0.5" in caplog.text
        caplog.clear()
        bsa_compile.optimize(longcat, POLICY, backend="eager")
        assert "overrides the model's configuration (sparsity=0.5" in caplog.text


def test_a_run_time_switch_overrides_the_policy(longcat, caplog):
    longcat.disable_bsa()
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        fast = bsa_compile.optimize(longcat, POLICY, backend="eager")
    assert "disable_bsa() was called on the model" in caplog.text
    inputs = make_inputs()
    with torch.no_grad():
        fast(*inputs)
        assert not fast.report.rewritten
        fast.enable_bsa()
        fast(*inputs)
    assert len(fast.report.rewritten) == 2
