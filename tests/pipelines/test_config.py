"""The pipeline's configuration, and who decides over block-sparse attention."""

from __future__ import annotations

import dataclasses

import pytest

from bsa_compile import BSAPolicy
from bsa_compile.adapters import Request
from bsa_compile.errors import PolicyError, UsageError
from bsa_compile.pipelines.longcat import LongCatPipelineConfig, StageRule
from bsa_compile.pipelines.longcat.policies import as_argument, choose_policy

SPARSE = BSAPolicy(sparsity=0.75)
FULL = LongCatPipelineConfig(
    enable_bsa=True,
    bsa_params={"sparsity": 0.5, "chunk_3d_shape_q": [4, 4, 8]},
    strategy="checkpoint",
    policies=(StageRule(policy=SPARSE, stage="refine", resolution=(None, 704)), StageRule(policy=BSAPolicy.dense())),
    low_memory=True,
    vae_tiling=False,
    compile_options={"max_autotune": True},
)


@pytest.mark.parametrize("config", [LongCatPipelineConfig(), FULL], ids=["default", "full"])
def test_json_both_ways(config):
    assert LongCatPipelineConfig.from_json(config.to_json()) == config


def test_unknown_keys_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'low_memory'"):
        LongCatPipelineConfig.from_dict({"low_memroy": True})
    with pytest.raises(UsageError, match="Did you mean 'resolution'"):
        LongCatPipelineConfig.from_dict({"policies": [{"policy": {}, "resolutoin": [1, 2]}]})
    with pytest.raises(PolicyError, match="Did you mean 'sparsity'"):
        LongCatPipelineConfig(bsa_params={"sparsty": 0.5})


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_bsa": "yes"},
        {"low_memory": 1},
        {"strategy": "best"},
        {"checkpoint_every": 0},
        {"max_text_tokens": True},
        {"policies": {"stage": "base"}},
        {"policies": [{"stage": "base"}]},
        {"policies": [{"stage": "first", "policy": {}}]},
        {"policies": [{"resolution": [5, 5], "policy": {}}]},
        {"compile_backend": None},
        {"bsa_params": 3},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(UsageError, match=next(iter(fields))):
        LongCatPipelineConfig.from_dict(fields)


def test_a_config_is_immutable_and_keeps_its_own_copies():
    params = {"sparsity": 0.5}
    config = LongCatPipelineConfig(bsa_params=params)
    params["sparsity"] = 2
    assert config.parameters == BSAPolicy(sparsity=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.low_memory = True


def choose(stage="refine", size=(720, 1280), *, switched=None, argument=None, checkpoint=None, **config):
    return choose_policy(
        stage,
        *size,
        93,
        switched=switched,
        argument=as_argument(argument),
        config=LongCatPipelineConfig(**config),
        checkpoint=checkpoint or Request(),
    )


def test_the_mixed_strategy_is_the_default():
    assert not choose("base", (480, 832)).policy.enabled
    refine = choose("refine")
    assert refine.policy == BSAPolicy()
    assert refine.source == "the mixed strategy"


def test_the_released_checkpoints_false_does_not_undo_the_refinement_and_is_told():
    chosen = choose(checkpoint=Request(configured=False))
    assert chosen.policy == BSAPolicy()
    assert "enable_bsa: false of the checkpoint's config.json" in chosen.overruled[0]


def test_a_checkpoint_that_says_true_is_not_undone():
    chosen = choose("base", (480, 832), checkpoint=Request(configured=True, policy=SPARSE))
    assert chosen.policy == SPARSE
    assert "checkpoint" in chosen.source


def test_the_checkpoint_strategy_follows_it():
    assert not choose(strategy="checkpoint").policy.enabled
    assert not choose(strategy="checkpoint", checkpoint=Request(configured=False)).policy.enabled
    assert choose("base", strategy="checkpoint", checkpoint=Request(configured=True)).policy.enabled


def test_each_layer_overrules_the_next():
    """Run-time call over policy argument over pipeline configuration over config.json; who lost is named."""
    checkpoint = Request(configured=True, policy=BSAPolicy(sparsity=0.1))
    config = {"policies": [StageRule(policy=BSAPolicy(sparsity=0.2))]}
    argument = BSAPolicy(sparsity=0.3)
    assert choose(checkpoint=checkpoint, **config).policy.sparsity == 0.2
    chosen = choose(checkpoint=checkpoint, argument=argument, **config)
    assert chosen.policy.sparsity == 0.3
    assert "sparsity=0.2" in chosen.overruled[0]
    off = choose(checkpoint=checkpoint, argument=argument, switched=False, **config)
    assert not off.policy.enabled
    assert off.source == "disable_bsa()"
    assert "sparsity=0.3" in off.overruled[0]
    on = choose("base", checkpoint=checkpoint, argument=BSAPolicy.dense(), switched=True, **config)
    assert on.policy.sparsity == 0.2  # the parameters of the strongest that gives any


def test_the_pipeline_configuration_overrules_config_json():
    assert not choose(enable_bsa=False, checkpoint=Request(configured=True)).policy.enabled
    assert choose("base", enable_bsa=True, bsa_params={"sparsity": 0.5}).policy.sparsity == 0.5
    assert choose("refine", bsa_params={"sparsity": 0.5}).policy.sparsity == 0.5


def test_rules_pick_by_stage_and_resolution():
    rules = [
        StageRule(policy=BSAPolicy(sparsity=0.5), stage="refine", resolution=(None, 704)),
        StageRule(policy=BSAPolicy(sparsity=0.75), stage="refine"),
    ]
    assert choose(size=(480, 832), policies=rules).policy.sparsity == 0.5
    assert choose(size=(704, 1280), policies=rules).policy.sparsity == 0.75
    assert not choose("base", policies=rules).policy.enabled


def test_switched_on_without_parameters_the_base_stage_takes_the_recommended_ones():
    assert choose("base", (480, 832), switched=True).policy == BSAPolicy.for_resolution(480, 832, 93)
    assert choose("base", (64, 64), switched=True).policy == BSAPolicy()


def test_one_policy_or_one_for_each_stage():
    assert choose("base", argument=SPARSE).policy == SPARSE
    assert not choose("base", argument={"refine": SPARSE}).policy.enabled
    with pytest.raises(UsageError, match="base or refine, got 'refin'"):
        as_argument({"refin": SPARSE})
    with pytest.raises(PolicyError, match="BSAPolicy"):
        as_argument({"refine": 0.5})
