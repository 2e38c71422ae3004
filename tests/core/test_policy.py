"""BSAPolicy: what it accepts, decides, and how it travels."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bsa_compile.errors import PolicyError
from bsa_compile.policy import BSAPolicy, Rule, Step, keep_count

GRID = (24, 44, 80)


def resolve(policy, *, module="blocks.0.attn", role="self", grid_q=GRID, grid_k=GRID, step=None, is_image=False):
    return policy.resolve(module=module, role=role, grid_q=grid_q, grid_k=grid_k, step=step, is_image=is_image)


@pytest.mark.parametrize(
    ("num_tiles", "sparsity", "kept"),
    [
        *[(20, 0.9, 2), (10, 0.8, 2), (1320, 0.9, 132), (10, 0.9, 1), (5, 0.8, 1), (15, 0.9375, 1)],
        *[(1320, 0.9375, 82), (7, 0.0, 7), (7, 1.0, 1), (1, 0.5, 1), (3, 0.3, 2)],
    ],
)
def test_kept_tiles_follow_the_decimal_number_that_is_shown(num_tiles, sparsity, kept):
    assert keep_count(num_tiles, sparsity) == kept


def test_neither_criterion_gives_the_default_and_one_stands_alone():
    assert BSAPolicy().sparsity == 0.9375
    assert BSAPolicy(cdf_threshold=0.9).sparsity is None
    both = BSAPolicy(sparsity=0.5, cdf_threshold=0.9)
    assert (both.sparsity, both.cdf_threshold) == (0.5, 0.9)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sparsity": math.nan},
        {"sparsity": -0.1},
        {"sparsity": 1.1},
        {"sparsity": True},
        {"sparsity": "0.9"},
        {"sparsity": 10**400},
        {"sparsity": np.zeros(2)},
        {"cdf_threshold": 0.0},
        {"cdf_threshold": math.inf},
        {"chunk_3d_shape_q": (4, 4)},
        {"chunk_3d_shape_q": (4, 4, 0)},
        {"chunk_3d_shape_k": (4, 4, 4.0)},
        {"chunk_3d_shape_k": None},
        {"min_tokens": -1},
        {"dense_steps": 1.5},
        {"rules": "blocks"},
        {"rules": [{"modul": "x", "dense": True}]},
        {"attend": ""},
        {"on_unsupported": "ignore"},
        {"enabled": 1},
        {"pixels_per_token": 0},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(kwargs):
    with pytest.raises(PolicyError, match="must"):
        BSAPolicy(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"dense": True, "sparsity": 0.5},
        {"role": "crossed", "dense": True},
        {"role": (), "dense": True},
        {"steps": (3, 3), "dense": True},
        {"steps": (None, None), "dense": True},
        {"resolution": 720, "dense": True},
        {"resolution": "ab", "dense": True},
        {"resolution": {1, 2}, "dense": True},
        {"steps": (1, 2, 3), "dense": True},
        {"steps": (1.5, 3), "dense": True},
        {"module": 3, "dense": True},
        {"role": 5, "dense": True},
        {"role": {"self": 1}, "dense": True},
        {"role": [["self"]], "dense": True},
        {"name": 5, "dense": True},
        {"sparsity": "high"},
        {"chunk_3d_shape_q": 4},
        {"dense": "yes"},
    ],
    ids=str,
)
def test_rules_that_say_nothing_or_nonsense_are_refused(kwargs):
    with pytest.raises(PolicyError, match="must"):
        Rule(**kwargs)


def test_unknown_keys_are_refused_and_the_nearest_is_suggested():
    with pytest.raises(PolicyError, match="'sparsity'"):
        BSAPolicy.from_dict({"sparcity": 0.9})
    with pytest.raises(PolicyError, match="valid JSON"):
        BSAPolicy.from_json("{")


def test_the_first_matching_rule_wins():
    policy = BSAPolicy(rules=[Rule(module="blocks.0.*", dense=True), Rule(module="blocks.*", sparsity=0.5)])
    assert resolve(policy).dense == "rule"
    assert resolve(policy, module="blocks.1.attn").sparsity == 0.5
    assert resolve(policy, module="head").sparsity == 0.9375


def test_a_rule_with_one_criterion_replaces_both():
    policy = BSAPolicy(sparsity=0.9, cdf_threshold=0.95, rules=[Rule(role="cond", cdf_threshold=0.5)])
    site = resolve(policy, role="cond")
    assert (site.sparsity, site.cdf_threshold) == (None, 0.5)


def test_resolution_is_the_short_side_in_pixels():
    policy = BSAPolicy(rules=[Rule(resolution=(None, 480), dense=True), Rule(resolution=(480, 704), sparsity=0.875)])
    assert resolve(policy, grid_q=(24, 29, 52)).dense == "rule"  # 464 pixels
    assert resolve(policy, grid_q=(24, 30, 52)).sparsity == 0.875  # 480
    assert resolve(policy, grid_q=(24, 80, 44)).sparsity == 0.9375  # 704, upright


def test_step_rules_match_only_while_the_step_is_known():
    policy = BSAPolicy(dense_steps=2, rules=[Rule(steps=(5, None), sparsity=0.5)])
    assert resolve(policy).dense is None
    assert resolve(policy, step=Step(1)).dense == "dense_step"
    assert resolve(policy, step=Step(5)).sparsity == 0.5
    assert policy.needs_step
    assert not BSAPolicy().needs_step


@given(index=st.integers(0, 8), dense_steps=st.integers(0, 4), start=st.integers(0, 6), module=st.sampled_from("ab"))
def test_at_step_decides_as_resolve_with_the_step(index, dense_steps, start, module):
    policy = BSAPolicy(
        dense_steps=dense_steps,
        rules=[Rule(module="a", steps=(start, start + 2), sparsity=0.5), Rule(module="a", dense=True)],
    )
    at_step = policy.at_step(Step(index))
    assert not at_step.needs_step
    now, partial = resolve(policy, module=module, step=Step(index)), resolve(at_step, module=module)
    assert (now.dense is None) == (partial.dense is None)
    assert now.dense or now.sparsity == partial.sparsity


def test_an_image_and_short_sequences_stay_dense():
    assert resolve(BSAPolicy(), is_image=True).dense == "image"
    assert resolve(BSAPolicy(min_tokens=10**6)).dense == "min_tokens"
    assert resolve(BSAPolicy.dense()).dense == "disabled"


@pytest.mark.parametrize(
    ("height", "width", "frames", "sparsity", "chunk"),
    [
        *[(704, 1280, 93, 0.9375, (4, 4, 4)), (1280, 704, 93, 0.9375, (4, 4, 4))],
        *[(480, 832, 93, 0.875, (4, 4, 8)), (703, 1280, 93, 0.875, (4, 4, 8))],
        *[(479, 832, 93, None, None), (720, 1280, 1, None, None)],
    ],
)
def test_recommended_parameters_by_resolution(height, width, frames, sparsity, chunk):
    policy = BSAPolicy.for_resolution(height, width, frames)
    if sparsity is None:
        assert not policy.enabled
    else:
        assert (policy.sparsity, policy.chunk_3d_shape_q, policy.chunk_3d_shape_k) == (sparsity, chunk, chunk)


@pytest.mark.parametrize("name", ["resolution", "steps"])
def test_a_bound_of_zero_is_kept_and_one_meaning_has_one_spelling(name):
    everything = Rule(**{name: (0, None)}, sparsity=0.5)
    assert dataclasses.replace(everything, name="again") != everything  # reports tell them apart, digests do not
    assert Rule.from_dict(everything.to_dict()) == everything
    assert Rule(**{name: (0, 3)}, sparsity=0.5) == Rule(**{name: (None, 3)}, sparsity=0.5)
    assert everything.matches("", "self", 0, Step(0))
    # From step 0 on is every known step; from 0 pixels on is every video, which needs no condition.
    assert everything.matches("", "self", 0, None) == (name == "resolution")
    assert everything.unconditional == (name == "resolution")


def test_a_rule_for_the_root_stays_one():
    rule = Rule(module="", dense=True)
    assert Rule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert resolve(BSAPolicy(rules=[rule]), module="").dense == "rule"
    assert resolve(BSAPolicy(rules=[rule]), module="blocks.0.attn").dense is None


def test_a_longcat_config_is_read():
    params = {"sparsity": 0.9, "cdf_threshold": None, "chunk_3d_shape_q": [4, 4, 8], "chunk_3d_shape_k": [4, 4, 4]}
    policy = BSAPolicy.from_config({"enable_bsa": True, "bsa_params": params})
    assert policy == BSAPolicy(sparsity=0.9, chunk_3d_shape_q=(4, 4, 8))
    assert not BSAPolicy.from_config({"bsa_params": params}).enabled
    with pytest.raises(PolicyError, match="sparsity"):
        BSAPolicy.from_config({"enable_bsa": True, "bsa_params": {"sparsty": 0.9}})
    with pytest.raises(PolicyError, match="enable_bsa"):
        BSAPolicy.from_config({"enable_bsa": "yes"})


fractions = st.one_of(st.none(), st.floats(0, 1).map(lambda x: round(x, 6)))
chunks = st.tuples(*[st.integers(1, 9)] * 3)


def bounds(middle: int):
    """Ranges with one bound or both."""
    low, high = st.integers(0, middle), st.integers(middle + 1, 2 * middle)
    return st.one_of(st.tuples(low, high), st.tuples(low, st.none()), st.tuples(st.none(), high))


conditions = st.fixed_dictionaries(
    {},
    optional={
        "module": st.sampled_from(["blocks.0.*", "*", "blocks.[01].attn", ""]),
        "role": st.lists(st.sampled_from(["self", "cond", "noise", "cached"]), min_size=1),
        "resolution": bounds(500),
        "steps": bounds(5),
        "name": st.text("abc", max_size=3),
    },
)
effects = st.one_of(st.just({"dense": True}), chunks.map(lambda c: {"chunk_3d_shape_q": c}), st.just({"sparsity": 0.0}))
rules = st.builds(lambda c, e: Rule(**c, **e), conditions, effects)
policies = st.builds(
    BSAPolicy,
    sparsity=fractions,
    cdf_threshold=st.one_of(st.none(), st.floats(0.001, 1)),
    chunk_3d_shape_q=chunks,
    chunk_3d_shape_k=chunks,
    min_tokens=st.integers(0, 10**6),
    dense_steps=st.integers(0, 50),
    rules=st.lists(rules, max_size=3),
    attend=st.sampled_from(["native", "other"]),
    on_unsupported=st.sampled_from(["keep_dense", "error"]),
    enabled=st.booleans(),
)


@given(policies)
@example(BSAPolicy(rules=[Rule(resolution=(0, None), dense=True)]))
@example(BSAPolicy(rules=[Rule(steps=(0, None), dense=True)]))
def test_json_round_trip(policy):
    again = BSAPolicy.from_json(policy.to_json())
    assert again == policy
    assert again.digest == policy.digest
    assert json.loads(policy.to_json())["rules"] == [r.to_dict() for r in policy.rules]


@given(policies, policies)
def test_equal_digests_mean_equal_policies(a, b):
    if a == b:
        assert a.digest == b.digest
    elif a.digest == b.digest:
        # Only what cannot matter may differ: anything behind `enabled=False` or behind a rule that always matches.
        cut = next((i for i, r in enumerate(a.rules) if r.unconditional), None)
        assert not (a.enabled or b.enabled) or a.rules[: cut + 1] == b.rules[: cut + 1]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(BSAPolicy)])
def test_each_field_changes_the_digest(field):
    other = {
        "sparsity": 0.5,
        "cdf_threshold": 0.5,
        "chunk_3d_shape_q": (1, 2, 3),
        "chunk_3d_shape_k": (1, 2, 3),
        "min_tokens": 1,
        "dense_steps": 1,
        "rules": (Rule(dense=True, role="cond"),),
        "pixels_per_token": 8,
        "attend": "other",
        "on_unsupported": "error",
        "enabled": False,
    }[field]
    assert BSAPolicy(**{field: other}).digest != BSAPolicy().digest


def test_spelling_does_not_change_the_digest():
    same = [
        BSAPolicy(sparsity=0.9375),
        BSAPolicy(sparsity=np.float64(0.9375)),
        BSAPolicy(chunk_3d_shape_q=[4, 4, 4]),
    ]
    assert {p.digest for p in same} == {BSAPolicy().digest}
    named = [BSAPolicy(rules=[Rule(name=n, role="cond", dense=True)]) for n in ("a", "")]
    assert named[0].digest == named[1].digest
    assert BSAPolicy(sparsity=-0.0).digest == BSAPolicy(sparsity=0.0).digest
