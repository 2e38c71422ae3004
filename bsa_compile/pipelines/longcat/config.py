"""What a user can set once for all videos of a pipeline."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsa_compile.errors import UsageError, must
from bsa_compile.policy import BSAPolicy, refuse_unknown

STAGES = ("base", "refine")
STRATEGIES = ("mixed", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class StageRule:
    """A policy, and the stages and resolutions that it is for.

    Args:
        policy: what runs there; `BSAPolicy.dense()` keeps the stage dense.
        stage: `base` or `refine`; None: both.
        resolution: `(low, high)`: short side in pixels, low <= side < high; None leaves a bound open.

    Raises:
        UsageError: a field is out of range.
    """

    policy: BSAPolicy
    stage: str | None = None
    resolution: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.policy, Mapping):
            object.__setattr__(self, "policy", BSAPolicy.from_dict(self.policy))
        if not isinstance(self.policy, BSAPolicy):
            raise UsageError(must("policies: policy", "be a BSAPolicy", type(self.policy).__name__))
        if self.stage is not None and self.stage not in STAGES:
            raise UsageError(must("policies: stage", f"be one of {', '.join(STAGES)}", repr(self.stage)))
        if self.resolution is not None:
            object.__setattr__(self, "resolution", _bounds(self.resolution))

    def matches(self, stage: str, short_side: int) -> bool:
        """Whether the rule is for this stage at this short side in pixels."""
        low, high = self.resolution or (None, None)
        return (
            self.stage in (None, stage) and (low is None or short_side >= low) and (high is None or short_side < high)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        resolution = list(self.resolution) if self.resolution else None
        return {"stage": self.stage, "resolution": resolution, "policy": self.policy.to_dict()}

    @classmethod
    def from_dict(cls, data: Any) -> StageRule:
        """Inverse of `to_dict`; unknown keys are refused."""
        refuse_unknown("policies", data, [f.name for f in dataclasses.fields(cls)], UsageError)
        if "policy" not in data:
            raise UsageError(must("policies", "give each rule a policy", sorted(data)))
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class LongCatPipelineConfig:
    """Settings of a pipeline; JSON both ways.

    Args:
        enable_bsa: False keeps every stage dense, True runs every stage block-sparse where no rule of `policies` says
            otherwise; None leaves it to `strategy`.
        bsa_params: parameters in LongCat's names (`sparsity`, `cdf_threshold`, `chunk_3d_shape_q`, `chunk_3d_shape_k`)
            wherever a stage runs block-sparse without a policy of its own.
        strategy: what runs where nothing else is said. `mixed`: the refinement block-sparse, the base stage dense
            unless the checkpoint's `config.json` says `enable_bsa: true`. `checkpoint`: all as `config.json` says.
        policies: policies by stage and resolution, the first match wins.
        offload: keep the text encoder and the VAE in host memory while they are not needed.
        low_memory: also move the transformer out while they run, keep the KV cache in host memory, tile the VAE, and
            run the two passes of guidance one after the other.
        vae_tiling: encode and decode in spatial tiles; None: with `low_memory`.
        kv_cache: encode the given frames once per segment of the base stage, not in every step.
        offload_kv_cache: keep that cache in host memory.
        enhance_hf: continuations without distillation spend ten even steps below t = 0.5.
        max_text_tokens: tokens that a prompt is padded or cut to; never more than the tokenizer says.
        checkpoint_every: steps between two checkpoints of a job that writes them.
        compile_backend: `inductor`, `eager` or another of torch.compile's.
        compile_mode, compile_options, dynamic: as in `torch.compile`; a size of its own for every stage by default.
        cfg_groups: with several GPUs: groups of them that share out the two passes of guidance; 2 or 1.
        shard_weights: with several GPUs: each keeps a share of the transformer's weights (FSDP2).
        mesh_timeout: with several GPUs: seconds that they wait for one that died or hangs.

    Raises:
        UsageError: a field is out of range.
        PolicyError: `bsa_params` or a policy is malformed.
    """

    enable_bsa: bool | None = None
    bsa_params: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    strategy: str = "mixed"
    policies: tuple[StageRule, ...] = ()
    offload: bool = True
    low_memory: bool = False
    vae_tiling: bool | None = None
    kv_cache: bool = True
    offload_kv_cache: bool = False
    enhance_hf: bool = True
    max_text_tokens: int = 512
    checkpoint_every: int = 5
    compile_backend: str = "inductor"
    compile_mode: str | None = None
    compile_options: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    dynamic: bool | None = False
    cfg_groups: int = 1
    shard_weights: bool = False
    mesh_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("offload", "low_memory", "kv_cache", "offload_kv_cache", "enhance_hf", "shard_weights"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(must(name, "be true or false", repr(getattr(self, name))))
        for name in ("enable_bsa", "vae_tiling", "dynamic"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise UsageError(must(name, "be true, false or null", repr(value)))
        for name in ("max_text_tokens", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(must(name, "be an integer >= 1", repr(value)))
        if isinstance(self.cfg_groups, bool) or self.cfg_groups not in (1, 2):
            raise UsageError(must("cfg_groups", "be 1 or 2", repr(self.cfg_groups)))
        timeout = self.mesh_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise UsageError(must("mesh_timeout", "be a number of seconds > 0", repr(timeout)))
        if self.shard_weights and self.low_memory:
            todo = "Sharded weights stay on the GPUs."
            raise UsageError(must("shard_weights", "be false with low_memory", True, todo))
        if self.strategy not in STRATEGIES:
            raise UsageError(must("strategy", f"be one of {', '.join(STRATEGIES)}", repr(self.strategy)))
        for name in ("compile_backend", "compile_mode"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "compile_mode" and value is None):
                raise UsageError(must(name, "be a text", repr(value)))
        for name in ("bsa_params", "compile_options"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise UsageError(must(name, "be an object or null", repr(value)))
            object.__setattr__(self, name, copy.deepcopy(dict(value)) if value is not None else None)
        if isinstance(self.policies, (str, bytes, Mapping)) or not isinstance(self.policies, Sequence):
            raise UsageError(must("policies", "be a list of rules", repr(self.policies)))
        rules = tuple(r if isinstance(r, StageRule) else StageRule.from_dict(r) for r in self.policies)
        object.__setattr__(self, "policies", rules)
        _ = self.parameters  # refuses malformed ones now

    @property
    def parameters(self) -> BSAPolicy | None:
        """The policy of `bsa_params`, None where none are given."""
        if self.bsa_params is None:
            return None
        return BSAPolicy.from_config({"enable_bsa": True, "bsa_params": self.bsa_params})

    @property
    def tiles_vae(self) -> bool:
        """Whether the VAE runs in tiles."""
        return self.low_memory if self.vae_tiling is None else self.vae_tiling

    @property
    def cache_on_cpu(self) -> bool:
        """Whether the KV cache stays in host memory."""
        return self.offload_kv_cache or self.low_memory

    def to_dict(self) -> dict[str, Any]:
        """JSON object with every field."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["policies"] = [rule.to_dict() for rule in self.policies]
        return copy.deepcopy(data)

    def to_json(self) -> str:
        """JSON text that `from_json` turns into an equal configuration."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LongCatPipelineConfig:
        """Inverse of `to_dict`; unknown keys are refused and the nearest known one is suggested."""
        refuse_unknown("pipeline configuration", data, [f.name for f in dataclasses.fields(cls)], UsageError)
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> LongCatPipelineConfig:
        """Inverse of `to_json`.

        Raises:
            UsageError: the text is no JSON, or has unknown keys or values out of range.
        """
        try:
            data = json.loads(text)
        except ValueError as exc:
            raise UsageError(must("pipeline configuration", "be valid JSON", f"an error: {exc}")) from None
        return cls.from_dict(data)

    @classmethod
    def from_file(cls, path: str | Path) -> LongCatPipelineConfig:
        """Read a JSON file.

        Raises:
            UsageError: it cannot be read, or `from_json` refuses it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(must("pipeline configuration", "be a readable JSON file", f"{path} ({exc})")) from None
        return cls.from_json(text)


def _bounds(value: Any) -> tuple[int | None, int | None]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise UsageError(must("policies: resolution", "be a pair (low, high)", repr(value)))
    for bound in value:
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
            raise UsageError(must("policies: resolution", "hold integers >= 0 or null", repr(value)))
    low, high = value
    if low is not None and high is not None and low >= high:
        raise UsageError(must("policies: resolution", "have low < high", repr(value)))
    return low, high
