"""Which policy a stage runs under: one place that decides, and says who was overruled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bsa_compile.adapters import Request
from bsa_compile.errors import PolicyError, UsageError, must
from bsa_compile.pipelines.longcat.config import STAGES, LongCatPipelineConfig
from bsa_compile.policy import BSAPolicy


@dataclass(frozen=True)
class StagePolicy:
    """What a stage runs under.

    Attributes:
        policy: disabled where the stage runs dense.
        source: who asked for it.
        overruled: who asked for something else, with what they asked for.
    """

    policy: BSAPolicy
    source: str
    overruled: tuple[str, ...] = ()

    def describe(self) -> str:
        """The effective parameters and where they come from, in one line."""
        return f"{self.policy.describe()}, {self.by}"

    @property
    def by(self) -> str:
        """Who asked for it, and who was overruled."""
        return f"by {self.source}" + (f"; overrules {' and '.join(self.overruled)}" if self.overruled else "")


def as_argument(policy: object) -> Mapping[str, BSAPolicy]:
    """The policy argument by stage: one policy counts for all of them.

    Raises:
        PolicyError: it holds something else than policies.
        UsageError: it names an unknown stage.
    """
    if policy is None:
        return {}
    by_stage: dict[Any, Any] = dict(policy) if isinstance(policy, Mapping) else dict.fromkeys(STAGES, policy)
    for stage, value in by_stage.items():
        if stage not in STAGES:
            raise UsageError(must("policy", f"be given for {' or '.join(STAGES)}", repr(stage)))
        if not isinstance(value, BSAPolicy):
            raise PolicyError(must("policy", "be a BSAPolicy, or one for each stage", type(value).__name__))
    return by_stage


def choose_policy(
    stage: str,
    height: int,
    width: int,
    num_frames: int,
    *,
    switched: bool | None,
    argument: Mapping[str, BSAPolicy],
    config: LongCatPipelineConfig,
    checkpoint: Request,
) -> StagePolicy:
    """Decide one stage: run-time switch over policy argument over pipeline configuration over `config.json`.

    Args:
        stage: `base` or `refine`.
        height, width, num_frames: of the stage's video, in pixels and frames.
        switched: what `enable_bsa()` or `disable_bsa()` asked for; None when nobody did.
        argument: policies of the call by stage.
        config: the pipeline's.
        checkpoint: what the transformer's `config.json` asks for.
    """
    rule = next((r for r in config.policies if r.matches(stage, min(height, width))), None)
    wanted: list[tuple[str, BSAPolicy]] = []

    def switched_on() -> BSAPolicy:
        """Parameters of whoever gives some, the strongest first."""
        given = (argument.get(stage), rule.policy if rule else None, config.parameters, checkpoint.policy)
        chosen = next((p for p in given if p is not None and p != BSAPolicy.dense()), None)
        return dataclasses.replace(chosen or recommended(stage, height, width, num_frames), enabled=True)

    if switched is not None:
        name = "enable_bsa()" if switched else "disable_bsa()"
        wanted.append((name, switched_on() if switched else BSAPolicy.dense()))
    if stage in argument:
        wanted.append(("the policy argument", argument[stage]))
    if rule is not None:
        wanted.append(("policies of the pipeline configuration", rule.policy))
    if config.enable_bsa is not None:
        policy = switched_on() if config.enable_bsa else BSAPolicy.dense()
        wanted.append((f"enable_bsa: {str(config.enable_bsa).lower()} of the pipeline configuration", policy))
    by_checkpoint = None
    if checkpoint.configured is not None:
        policy = switched_on() if checkpoint.configured else BSAPolicy.dense()
        by_checkpoint = (f"enable_bsa: {str(checkpoint.configured).lower()} of the checkpoint's config.json", policy)
    # The released file holds `enable_bsa: false`, and yet its refinement was trained block-sparse.
    mixed_refine = config.strategy == "mixed" and stage == "refine"
    if mixed_refine:
        wanted.append(("the mixed strategy", switched_on()))
    if by_checkpoint is not None:
        wanted.append(by_checkpoint)
    wanted.append((f"the {config.strategy} strategy", BSAPolicy.dense()))

    source, policy = wanted[0]
    said = wanted[1 : len(wanted) - 1]  # the last is what runs where nobody says anything
    overruled = tuple(f"{who} ({p.describe()})" for who, p in said if p.digest != policy.digest)
    return StagePolicy(policy, source, overruled)


def recommended(stage: str, height: int, width: int, num_frames: int) -> BSAPolicy:
    """Parameters for a stage that is to run block-sparse while nobody gave any.

    The refinement runs with those it was trained with, the base stage with the recommendation for its resolution.
    """
    if stage == "refine":
        return BSAPolicy()
    advised = BSAPolicy.for_resolution(height, width, num_frames)
    return advised if advised.enabled else BSAPolicy()
