"""What was done at every attention site, and why."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .grid import num_tiles, num_tokens, tile_volume
from .policy import keep_count

REASONS = {
    "rewritten": "block-sparse",
    "disabled": "block sparse attention is switched off",
    "image": "a single image: one latent frame without cond latents or cache",
    "dense_step": "the policy keeps this denoising step dense",
    "rule": "a rule of the policy keeps it dense",
    "min_tokens": "fewer keys than the policy's min_tokens",
    "cross_attention": "keys do not come from the video tokens that the queries come from",
    "mixed_sequence": "the sequence mixes video tokens with others",
    "not_video": "the tokens that attend to each other are not the video's",
    "frame_range": "queries and keys are parts of the video that fit no role",
    "unknown_grid": "the (T, H, W) of the tokens is not known",
    "mask": "an attention mask is given",
    "causal": "attention is causal",
    "dropout": "attention has dropout",
    "head_dim": "head_dim is not a multiple of 8 between 16 and 256",
    "dtype": "the dtype is not float32, float16 or bfloat16",
    "shape": "q, k, v are not [batch, heads, tokens, head_dim] with matching sizes",
    "variant": "this entry point was called in a way that has no block-sparse equivalent",
    "opaque": "attention is hidden inside an operator that the pass cannot see into",
}


@dataclass(frozen=True)
class Site:
    """One attention call of a traced graph.

    Attributes:
        module: path of the module that attends, "" for the root.
        role: self, cond, noise, cached or cross.
        rewritten: whether it runs block-sparse.
        reason: a key of `REASONS`.
        detail: what the reason refers to.
        source: file:line of the call, where known.
        op: the entry point that was matched.
        grid_q, grid_k: token grids, where known (symbolic sizes appear as text).
        grid_source: where the grid was found: anchor, argument, context, patch_embedding.
        heads, head_dim, batch: sizes, where static.
        attend: which implementation attends.
        attend_reason: why, where the policy left the choice open or named another than our own.
    """

    module: str
    role: str
    rewritten: bool
    reason: str
    detail: str = ""
    source: str = ""
    op: str = ""
    batch: int | str | None = None
    heads: int | str | None = None
    head_dim: int | str | None = None
    tokens_q: int | str | None = None
    tokens_k: int | str | None = None
    grid_q: tuple[int | str, ...] | None = None
    grid_k: tuple[int | str, ...] | None = None
    grid_source: str = ""
    tile_q: tuple[int, ...] | None = None
    tile_k: tuple[int, ...] | None = None
    sparsity: float | None = None
    cdf_threshold: float | None = None
    attend: str = ""
    attend_reason: str = ""

    @property
    def call(self) -> tuple[Any, ...]:
        """Which attention call, whatever was decided about it."""
        return (
            self.module,
            self.role,
            self.source,
            self.op,
            self.batch,
            self.tokens_q,
            self.tokens_k,
            self.grid_q,
            self.grid_k,
        )

    @property
    def effective_sparsity(self) -> float | None:
        """Fraction of key tiles skipped by the count; None for dense, symbolic or CDF sites, which data decides."""
        if not self.rewritten or self.sparsity is None or self.cdf_threshold is not None or not self._static:
            return None
        total = num_tiles(self.grid_k, self.tile_k)  # type: ignore[arg-type]
        return 1 - keep_count(total, self.sparsity) / total

    @property
    def _static(self) -> bool:
        sizes = (self.batch, self.heads, self.head_dim, *(self.grid_q or ("?",)), *(self.grid_k or ("?",)))
        return all(isinstance(v, int) for v in sizes)

    @property
    def dense_flops(self) -> int | None:
        """Multiply-adds count two: QK^T and PV over all pairs of tokens, forward only."""
        sizes: list[Any] = [self.batch, self.heads, self.tokens_q, self.tokens_k, self.head_dim]
        return 4 * math.prod(sizes) if all(isinstance(v, int) for v in sizes) else None

    @property
    def flops(self) -> int | None:
        """As it runs: the kept tiles plus scoring; the dense count for a dense site; None where data decides."""
        if not self.rewritten:
            return self.dense_flops
        if self.effective_sparsity is None:
            return None
        known: Any = self  # `effective_sparsity` is there, so every size below is an int
        n_q, n_k = num_tiles(known.grid_q, known.tile_q), num_tiles(known.grid_k, known.tile_k)
        keys = min(keep_count(n_k, known.sparsity) * tile_volume(known.tile_k), num_tokens(known.grid_k))
        per_channel = 4 * num_tokens(known.grid_q) * keys + 2 * n_q * n_k
        return known.batch * known.heads * known.head_dim * per_channel

    def to_dict(self) -> dict[str, Any]:
        """JSON object, derived figures included."""
        data = dataclasses.asdict(self)
        data.update(effective_sparsity=self.effective_sparsity, flops=self.flops, dense_flops=self.dense_flops)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Site:
        """What `to_dict` gave; figures that it derived are derived anew."""
        names = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}
        return cls(**values)

    @property
    def outcome(self) -> str:
        """One phrase: block-sparse with its parameters, or dense and why."""
        if not self.rewritten:
            text = REASONS[self.reason]
            return f"dense: {text}" + (f" ({self.detail})" if self.detail else "")
        criteria = [f"sparsity {self.sparsity:g}"] if self.sparsity is not None else []
        if self.cdf_threshold is not None:
            criteria.append(f"cdf {self.cdf_threshold:g}")
        tiles = "x".join(map(str, self.tile_q or ()))
        if self.tile_q != self.tile_k:
            tiles += "/" + "x".join(map(str, self.tile_k or ()))
        by = f" [{self.detail}]" if self.detail else ""
        who = f", attend by {self.attend} ({self.attend_reason})" if self.attend_reason else ""
        return f"block-sparse: {', '.join(criteria)}, tile {tiles}, grid from {self.grid_source}{who}{by}"


def effective_sparsity(sites: Iterable[Site]) -> float | None:
    """Share of all pairs of tiles that block-sparse sites skip; None without any, or where data decides."""
    pairs = skipped = 0.0
    for site in sites:
        if not site.rewritten:
            continue
        if site.effective_sparsity is None:
            return None
        weight = num_tiles(site.grid_q, site.tile_q) * num_tiles(site.grid_k, site.tile_k)  # type: ignore[arg-type]
        pairs += weight
        skipped += weight * site.effective_sparsity
    return skipped / pairs if pairs else None


@dataclass
class Report:
    """Every attention site seen so far under one policy.

    Attributes:
        policy: the policy's one-line description.
        digest: its digest.
        sites: one entry per attention call, in the order of execution; more where denoising steps differ.
        notes: what else a user should know, for example a rule that could not match.
        graphs: how many graphs were rewritten or looked at.
    """

    policy: str = ""
    digest: str = ""
    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 0

    @property
    def rewritten(self) -> list[Site]:
        return [s for s in self.sites if s.rewritten]

    @property
    def dense(self) -> list[Site]:
        return [s for s in self.sites if not s.rewritten]

    def add(self, sites: Iterable[Site], notes: Sequence[str] = ()) -> None:
        """Add one graph's sites; a graph compiled again for the same shapes adds nothing."""
        self.graphs += 1
        new = [s for s in sites if s not in self.sites]
        self.sites.extend(new)
        self.notes.extend(n for n in notes if n not in self.notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON object with all sites."""
        return {
            "policy": self.policy,
            "digest": self.digest,
            "graphs": self.graphs,
            "rewritten": len(self.rewritten),
            "dense": len(self.dense),
            "sites": [s.to_dict() for s in self.sites],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """What `to_dict` gave."""
        kept = {name: data[name] for name in ("policy", "digest", "graphs")}
        return cls(**kept, sites=[Site.from_dict(s) for s in data["sites"]], notes=list(data["notes"]))

    def __str__(self) -> str:
        if not self.graphs:
            return f"bsa_compile report: nothing compiled yet\n  policy: {self.policy}"
        calls, sparse = ({s.call for s in sites} for sites in (self.sites, self.rewritten))
        lines = [
            f"bsa_compile report: {len(sparse)} of {len(calls)} attention sites block-sparse",
            f"  policy: {self.policy}",
        ]
        for site in self.sites:
            q, k = (("x".join(map(str, g)) if g else "?") for g in (site.grid_q, site.grid_k))
            sizes = (
                f"{site.tokens_q} tokens ({q})"
                if (q, site.tokens_q) == (k, site.tokens_k)
                else f"{site.tokens_q} ({q}) over {site.tokens_k} ({k})"
            )
            where = site.module or "<root>"
            lines.append(f"  {where:<24} {site.role:<6} {sizes:<28} {site.outcome}")
            if not site.rewritten and site.source and site.reason not in ("disabled", "cross_attention"):
                lines.append(f"  {'':<24} at {site.source}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
