"""The policy: which attention runs block-sparse, and with what parameters.

A `BSAPolicy` is immutable and validated when it is made. Parameters bear LongCat-Video's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .errors import BSACompileError, GridError, PolicyError, must
from .grid import Shape3, as_shape3, num_tokens

DEFAULT_SPARSITY = 0.9375
ROLES = ("self", "cond", "noise", "cached")
ON_UNSUPPORTED = ("keep_dense", "error")

_PARAMETERS = ("sparsity", "cdf_threshold", "chunk_3d_shape_q", "chunk_3d_shape_k")


def keep_fraction(sparsity: float) -> Fraction:
    """`1 - sparsity`, exactly as the decimal number that `repr(sparsity)` shows."""
    return 1 - Fraction(repr(float(sparsity)))


def keep_count(num_kv_tiles: int, sparsity: float) -> int:
    """Key tiles that each query tile keeps: `max(1, floor((1 - sparsity) * N))`; N may be symbolic."""
    keep = keep_fraction(sparsity)
    count = num_kv_tiles * keep.numerator // keep.denominator
    if isinstance(count, int):
        return max(1, count)
    import torch

    return torch.sym_max(1, count)


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> float | None:
    if value is None:
        return None
    constraint = f"be a number in {'(' if low_open else '['}{low:g}, {high:g}]"
    try:
        number = math.nan if isinstance(value, bool) or not hasattr(value, "__float__") else float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # a huge integer, an array of several numbers
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
        raise PolicyError(must(name, constraint, repr(value)))
    return number + 0.0  # -0.0 means 0.0 and must not give another digest


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PolicyError(must(name, "be an integer >= 0", repr(value)))
    return value


def _chunk(name: str, value: Any) -> Shape3:
    try:
        return as_shape3(name, value)
    except GridError as exc:
        raise PolicyError(str(exc)) from None


def refuse_unknown(what: str, given: Any, known: Sequence[str], error: type[BSACompileError] = PolicyError) -> None:
    """Refuse keys of a JSON object that mean nothing.

    Args:
        what: what to call the object in an error.
        given: the object.
        known: the keys that it may hold.
        error: class of the error.

    Raises:
        BSACompileError: an `error`; `given` is no object or holds another key, and the nearest known one is suggested.
    """
    if not isinstance(given, Mapping):
        raise error(must(what, "be a JSON object", repr(given)))
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise error(must(what, "hold only known keys", repr(key), hint))


@dataclass(frozen=True)
class Step:
    """Where a denoising run stands: step `index` of `total`."""

    index: int
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Overrides a policy's parameters where all given conditions hold.

    Conditions:
        module: glob over the module path, for example `blocks.0.attn` or `blocks.*`.
        role: one role or several of `self`, `cond`, `noise`, `cached`.
        resolution: `(low, high)`: short side in pixels, low <= side < high; None leaves a bound open.
        steps: `(start, stop)`: denoising step index, start <= index < stop, None likewise; needs `bsa_compile.step`.

    Overrides:
        dense: True keeps the site dense (no other override may be given).
        sparsity, cdf_threshold: replace both of the policy's criteria when one of them is given.
        chunk_3d_shape_q, chunk_3d_shape_k: replace the tile.

    `name` is shown in reports and has no other meaning.
    """

    module: str | None = None
    role: tuple[str, ...] | None = None
    resolution: tuple[int | None, int | None] | None = None
    steps: tuple[int | None, int | None] | None = None
    dense: bool = False
    sparsity: float | None = None
    cdf_threshold: float | None = None
    chunk_3d_shape_q: Shape3 | None = None
    chunk_3d_shape_k: Shape3 | None = None
    name: str = ""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if self.module is not None and not isinstance(self.module, str):
            raise PolicyError(must("rule module", "be a glob over module paths", repr(self.module)))
        if self.role is not None:
            if not isinstance(self.role, (str, Sequence)):
                raise PolicyError(must("rule role", "be one role or a list of roles", repr(self.role)))
            roles = (self.role,) if isinstance(self.role, str) else tuple(self.role)
            for role in roles:
                if role not in ROLES:
                    raise PolicyError(must("rule role", f"be among {', '.join(ROLES)}", repr(role)))
            if not roles:
                raise PolicyError(must("rule role", "name at least one role", repr(self.role)))
            set_(self, "role", tuple(sorted(set(roles), key=ROLES.index)))
        for name in ("resolution", "steps"):
            set_(self, name, _range(f"rule {name}", getattr(self, name)))
        if self.resolution == (0, None):  # every resolution, while the same steps still ask for a known step
            set_(self, "resolution", None)
        if not isinstance(self.dense, bool):
            raise PolicyError(must("rule dense", "be true or false", repr(self.dense)))
        set_(self, "sparsity", _number("rule sparsity", self.sparsity, 0, 1))
        set_(self, "cdf_threshold", _number("rule cdf_threshold", self.cdf_threshold, 0, 1, low_open=True))
        for name in ("chunk_3d_shape_q", "chunk_3d_shape_k"):
            if getattr(self, name) is not None:
                set_(self, name, _chunk(f"rule {name}", getattr(self, name)))
        if not isinstance(self.name, str):
            raise PolicyError(must("rule name", "be a text", repr(self.name)))
        overrides = any(getattr(self, name) is not None for name in _PARAMETERS)
        if self.dense == overrides:
            raise PolicyError(
                must(
                    "rule", "either be dense or override a parameter", f"dense={self.dense} with overrides={overrides}"
                )
            )

    @property
    def unconditional(self) -> bool:
        return all(getattr(self, name) is None for name in ("module", "role", "resolution", "steps"))

    def matches(self, module: str, role: str, short_side: int, step: Step | None) -> bool:
        """Whether every given condition holds; a `steps` condition never holds while the step is unknown."""
        if self.steps is not None and (step is None or not _inside(step.index, self.steps)):
            return False
        if self.module is not None and not fnmatch.fnmatchcase(module, self.module):
            return False
        if self.role is not None and role not in self.role:
            return False
        return self.resolution is None or _inside(short_side, self.resolution)

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the fields that are set."""
        return {
            f.name: _plain(value) for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """Inverse of `to_dict`; unknown keys are refused."""
        refuse_unknown("rule", data, [f.name for f in dataclasses.fields(cls)])
        return cls(**data)


def _range(name: str, value: Any) -> tuple[int | None, int | None] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise PolicyError(must(name, "be a pair (low, high)", repr(value)))
    low, high = value
    for bound in (low, high):
        if bound is not None:
            _count(f"{name} bound", bound)
    if low is not None and high is not None and low >= high:
        raise PolicyError(must(name, "have low < high", repr(value)))
    if low is None and high is None:
        raise PolicyError(must(name, "have at least one bound", repr(value)))
    return (None if low == 0 and high is not None else low, high)  # one spelling, or equal rules would differ


def _inside(value: int, bounds: tuple[int | None, int | None]) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value < high)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class SitePolicy:
    """What the policy says of one attention site.

    `dense` is None for a block-sparse site, else the reason (a code of `report.REASONS`) why it stays dense.
    """

    sparsity: float | None
    cdf_threshold: float | None
    chunk_3d_shape_q: Shape3
    chunk_3d_shape_k: Shape3
    attend: str
    dense: str | None = None
    detail: str = ""


def reachable(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules up to the first that always matches."""
    found: list[Rule] = []
    for rule in rules:
        found.append(rule)
        if rule.unconditional:
            break
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class BSAPolicy:
    """Parameters of LongCat block sparse attention and where they apply.

    Args:
        sparsity: fraction of key tiles that each query tile skips, in [0, 1].
        cdf_threshold: softmax mass that the kept key tiles must reach, in (0, 1].
            With neither, sparsity is 0.9375; with one, only that one counts; with both, the larger set.
        chunk_3d_shape_q: query tile (t, h, w) in tokens.
        chunk_3d_shape_k: key tile (t, h, w) in tokens.
        min_tokens: attention over fewer keys stays dense.
        dense_steps: the first denoising steps that stay dense; needs `bsa_compile.step`.
        rules: overrides, the first match wins.
        pixels_per_token: pixels along a token's side (8 of the VAE times a patch of 2); turns a grid into pixels.
        attend: which implementation attends: `native` (our own), `auto` (ours unless an installed library was measured
            to be faster for the case), or the name of a library's adapter or of what `register_attend` put in.
        on_unsupported: `keep_dense` or `error`, for a site that cannot be rewritten.
        enabled: False keeps everything dense.

    Raises:
        PolicyError: a value is out of range.
    """

    sparsity: float | None = None
    cdf_threshold: float | None = None
    chunk_3d_shape_q: Shape3 = (4, 4, 4)
    chunk_3d_shape_k: Shape3 = (4, 4, 4)
    min_tokens: int = 0
    dense_steps: int = 0
    rules: tuple[Rule, ...] = ()
    pixels_per_token: int = 16
    attend: str = "native"
    on_unsupported: str = "keep_dense"
    enabled: bool = True

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "sparsity", _number("sparsity", self.sparsity, 0, 1))
        set_(self, "cdf_threshold", _number("cdf_threshold", self.cdf_threshold, 0, 1, low_open=True))
        if self.sparsity is None and self.cdf_threshold is None:
            set_(self, "sparsity", DEFAULT_SPARSITY)
        for name in ("chunk_3d_shape_q", "chunk_3d_shape_k"):
            set_(self, name, _chunk(name, getattr(self, name)))
        for name in ("min_tokens", "dense_steps"):
            set_(self, name, _count(name, getattr(self, name)))
        if _count("pixels_per_token", self.pixels_per_token) < 1:
            raise PolicyError(must("pixels_per_token", "be an integer >= 1", repr(self.pixels_per_token)))
        if isinstance(self.rules, (str, bytes, Mapping)) or not isinstance(self.rules, Sequence):
            raise PolicyError(must("rules", "be a list of rules", repr(self.rules)))
        set_(self, "rules", tuple(r if isinstance(r, Rule) else Rule.from_dict(r) for r in self.rules))
        if not isinstance(self.attend, str) or not self.attend:
            raise PolicyError(must("attend", "be the name of an implementation", repr(self.attend)))
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise PolicyError(
                must("on_unsupported", f"be one of {', '.join(ON_UNSUPPORTED)}", repr(self.on_unsupported))
            )
        if not isinstance(self.enabled, bool):
            raise PolicyError(must("enabled", "be true or false", repr(self.enabled)))

    # -- where policies come from -------------------------------------------------------------------------------

    @classmethod
    def dense(cls) -> BSAPolicy:
        """A policy that keeps everything dense."""
        return cls(enabled=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BSAPolicy:
        """Read `enable_bsa` and `bsa_params` of a LongCat-Video `config.json`.

        Without `enable_bsa: true` the policy is disabled and still holds the parameters of `bsa_params`.

        Raises:
            PolicyError: `enable_bsa` is no boolean, or `bsa_params` has unknown keys or values out of range.
        """
        if not isinstance(config, Mapping):
            raise PolicyError(must("config", "be a JSON object", type(config).__name__))
        enabled = config.get("enable_bsa")
        if enabled is not None and not isinstance(enabled, bool):
            raise PolicyError(must("enable_bsa", "be true or false", repr(enabled)))
        params = config.get("bsa_params")
        params = {} if params is None else params
        refuse_unknown("bsa_params", params, _PARAMETERS)
        return cls(enabled=bool(enabled), **{k: v for k, v in params.items() if v is not None})

    @classmethod
    def for_resolution(cls, height: int, width: int, num_frames: int) -> BSAPolicy:
        """Recommended parameters by the short side of the video.

        704 pixels and more: sparsity 0.9375, chunks [4,4,4]; 480 to 703: 0.875, [4,4,8]; below, or a single frame:
        dense.

        Args:
            height, width: pixels.
            num_frames: video frames.
        """
        for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
            if _count(name, value) < 1:
                raise PolicyError(must(name, "be an integer >= 1", repr(value)))
        short = min(height, width)
        if num_frames == 1 or short < 480:
            return cls.dense()
        if short < 704:
            return cls(sparsity=0.875, chunk_3d_shape_q=(4, 4, 8), chunk_3d_shape_k=(4, 4, 8))
        return cls(sparsity=0.9375)

    # -- what it says -------------------------------------------------------------------------------------------

    def resolve(
        self,
        *,
        module: str,
        role: str,
        grid_q: Sequence[int],
        grid_k: Sequence[int],
        step: Step | None = None,
        is_image: bool = False,
    ) -> SitePolicy:
        """Decide one site.

        Args:
            module: path of the module that attends.
            role: one of `ROLES`.
            grid_q, grid_k: token grids of queries and keys.
            step: the denoising step, where known.
            is_image: one latent frame, without cond latents, cache or `return_kv`.
        """
        base = SitePolicy(self.sparsity, self.cdf_threshold, self.chunk_3d_shape_q, self.chunk_3d_shape_k, self.attend)
        if not self.enabled:
            return dataclasses.replace(base, dense="disabled")
        if is_image:
            return dataclasses.replace(base, dense="image")
        if step is not None and step.index < self.dense_steps:
            return dataclasses.replace(base, dense="dense_step", detail=f"step {step.index} < {self.dense_steps}")
        # Sizes may be symbolic: comparing them puts a guard into the compiled code, so only where a rule asks.
        by_resolution = any(rule.resolution is not None for rule in self.rules)
        short_side = min(grid_q[1], grid_q[2]) * self.pixels_per_token if by_resolution else 0
        for position, rule in enumerate(self.rules):
            if not rule.matches(module, role, short_side, step):
                continue
            label = rule.name or f"rule {position}"
            if rule.dense:
                return dataclasses.replace(base, dense="rule", detail=label)
            given = {n: getattr(rule, n) for n in _PARAMETERS if getattr(rule, n) is not None}
            if "sparsity" in given or "cdf_threshold" in given:
                given = {"sparsity": None, "cdf_threshold": None, **given}
            base = dataclasses.replace(base, detail=label, **given)
            break
        if self.min_tokens and num_tokens(grid_k) < self.min_tokens:
            return dataclasses.replace(base, dense="min_tokens", detail=f"{num_tokens(grid_k)} < {self.min_tokens}")
        return base

    @property
    def needs_step(self) -> bool:
        """Whether the denoising step changes anything."""
        return self.enabled and (self.dense_steps > 0 or any(r.steps is not None for r in self.rules))

    def at_step(self, step: Step | None) -> BSAPolicy:
        """The policy of one step, free of step conditions; with None, step conditions never match."""
        if not self.needs_step:
            return self
        rules = []
        if step is not None and step.index < self.dense_steps:
            rules.append(Rule(dense=True, name=f"the first {self.dense_steps} steps are dense"))
        for position, rule in enumerate(self.rules):
            if rule.steps is not None:
                if step is None or not _inside(step.index, rule.steps):
                    continue
                rule = dataclasses.replace(rule, steps=None)
            rules.append(dataclasses.replace(rule, name=rule.name or f"rule {position}"))
        return dataclasses.replace(self, dense_steps=0, rules=reachable(rules))

    # -- JSON and digest ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON object with every field."""
        data = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        data["rules"] = [rule.to_dict() for rule in self.rules]
        return data

    def to_json(self) -> str:
        """JSON text that `from_json` turns into an equal policy."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BSAPolicy:
        """Inverse of `to_dict`; unknown keys are refused and the nearest known one is suggested."""
        refuse_unknown("policy", data, [f.name for f in dataclasses.fields(cls)])
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> BSAPolicy:
        """Inverse of `to_json`.

        Raises:
            PolicyError: the text is no JSON, or has unknown keys or values out of range.
        """
        try:
            data = json.loads(text)
        except ValueError as exc:
            raise PolicyError(must("policy", "be valid JSON", f"an error: {exc}")) from None
        return cls.from_dict(data)

    @functools.cached_property  # asked for by guards, at every call of compiled code
    def digest(self) -> str:
        """16 hex digits that change exactly when the policy's meaning does (names of rules have none)."""
        if not self.enabled:
            canonical: dict[str, Any] = {"enabled": False}
        else:
            canonical = self.to_dict()
            rules = [rule.to_dict() for rule in reachable(self.rules)]
            canonical["rules"] = [{k: v for k, v in rule.items() if k != "name"} for rule in rules]
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The effective parameters in one line."""
        if not self.enabled:
            return "dense (disabled)"
        parts = []
        if self.sparsity is not None:
            parts.append(f"sparsity={self.sparsity:g}")
        if self.cdf_threshold is not None:
            parts.append(f"cdf_threshold={self.cdf_threshold:g}")
        parts.append(f"chunk_3d_shape_q={list(self.chunk_3d_shape_q)}")
        parts.append(f"chunk_3d_shape_k={list(self.chunk_3d_shape_k)}")
        for name in ("min_tokens", "dense_steps"):
            if getattr(self, name):
                parts.append(f"{name}={getattr(self, name)}")
        if self.rules:
            parts.append(f"rules={len(self.rules)}")
        parts.append(f"attend={self.attend}")
        return ", ".join(parts)
