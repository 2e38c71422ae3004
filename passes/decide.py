"""Decides every attention site of a graph: rewrite it on which grids with what parameters, or keep it dense and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..errors import GridError, SiteError, must
from ..grid import TokenGrid
from ..ops import registry
from ..policy import BSAPolicy, SitePolicy, Step
from ..report import REASONS, Site
from .grids import Grid, Gridded, Grids, text
from .known_models import marked_role
from .layout import Algebra
from .match import Match
from .modulepath import module_path, source_line, value
from .relation import Relation, relate
from .semantics import obstacle
from .sizes import Size, Sizes, of, product, shape
from .states import Found, Origin
from .symbols import as_int, hint

# Dense by nature or by the policy's own word: nothing that `on_unsupported="error"` should complain about.
_EXPECTED = ("cross_attention", "not_video", "disabled", "image", "dense_step", "rule", "min_tokens")
AUTO = "auto"


@dataclass(frozen=True)
class Lowering:
    """How a site is rewritten. Grids hold ints, expressions, or nodes of the site's graph."""

    grid_q: tuple[Any, ...]
    grid_k: tuple[Any, ...]
    policy: SitePolicy


@dataclass(frozen=True)
class Decision:
    """What becomes of one site."""

    found: Found
    site: Site
    lowering: Lowering | None = None

    def dense(self, reason: str, detail: str) -> Decision:
        """The same site, kept dense after all."""
        return Decision(self.found, replace(self.site, rewritten=False, reason=reason, detail=detail))


@dataclass(frozen=True)
class _Fate:
    role: str
    reason: str = ""
    detail: str = ""
    gridded: Gridded | None = None
    arguments: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None


class Decider:
    """Applies the policy to the sites of one graph.

    Args:
        policy: what to rewrite, and how.
        grids: where grids come from.
        sizes: what is known of symbolic sizes.
        step: the denoising step.
        prefix: path of the graph's root in the whole model.
    """

    def __init__(self, policy: BSAPolicy, grids: Grids, sizes: Sizes, step: Step | None, prefix: str) -> None:
        self.policy = policy
        self.grids = grids
        self.sizes = sizes
        self.step = step
        self.prefix = prefix
        self.notes: list[str] = []

    def decide(self, sites: Sequence[Found]) -> list[Decision]:
        """One decision per site.

        Raises:
            GridError: sources of a grid disagree, or a grid does not fit its sequence.
        """
        algebra = Algebra(self.sizes)
        relations = [relate(found, algebra) for found in sites]
        whole = [r.origin for r in relations if r.kind in ("tokens", "cached") and r.origin is not None]
        video = any(o.grid for o in whole)
        fitting = set() if video else self._fitting(sites, relations)
        fates = (self._fate(*known, video, fitting) for known in zip(sites, relations, strict=True))
        return [self._decision(found, _marked(found, fate)) for found, fate in zip(sites, fates, strict=True)]

    def complain(self, decisions: Sequence[Decision]) -> None:
        """Raise if the policy wants an error for a site that stays dense against its will.

        Raises:
            SiteError: naming every such site.
        """
        if self.policy.on_unsupported != "error" or not self.policy.enabled:
            return
        failed = [d.site for d in decisions if not d.site.rewritten and d.site.reason not in _EXPECTED]
        failed = [s for s in failed if s.role != "cross"]
        if failed:
            lines = "; ".join(
                f"{s.module or '<root>'} [{s.op}] at {s.source or 'an unknown line'}: {REASONS[s.reason]}"
                + (f" ({s.detail})" if s.detail else "")
                for s in failed
            )
            todo = 'Change the model, add a rule that keeps these sites dense, or set on_unsupported="keep_dense".'
            raise SiteError(must("attention", "be rewritable at every site", lines, todo))

    # -- details --------------------------------------------------------------------------------------------------

    def _fitting(self, sites: Sequence[Found], relations: Sequence[Relation]) -> set[Origin]:
        """Of the graph's inputs that attend to themselves, those that have as many tokens as the given grid."""
        fitting = set()
        for found, relation in zip(sites, relations, strict=True):
            given = [*(g.shape for _, g in self.grids.given), *(g for _, g in self._own(found.match))]
            origin = relation.origin
            if given and origin is not None and origin.grid is None:
                tokens, extent = hint(product(given[0]), self.grids.known), hint(origin.extent, self.grids.known)
                if tokens is not None and tokens == extent:
                    fitting.add(origin)
        return fitting

    def _own(self, match: Match) -> list[tuple[str, Grid]]:
        """The grid that `latent_grid` put on a plain attention call."""
        if not match.anchor or match.role != AUTO:
            return []
        return [("context", _sizes(match.grid_q))]

    def _fate(self, found: Found, relation: Relation, video: bool, fitting: set[Origin]) -> _Fate:
        match, node = found.match, found.node
        if match.anchor and match.role != AUTO:
            return self._anchored(found, relation)
        if relation.kind == "cross":
            return _Fate("cross", "cross_attention", relation.detail)
        other = relation.origin is not None and relation.origin.grid is None
        if video and (other or not relation.video) and relation.kind != "unknown":
            return _Fate("self", "not_video", f"they come from {relation.origin}" if other else relation.detail)
        if video and not relation.video and (found.q.tokens or found.q.lost):
            return _Fate("self", "not_video", relation.detail)
        if found.sealed:
            return _Fate("self", "opaque", "inside an operator whose backward is not derived from its body")
        issue = obstacle(match, value(node), self.sizes)
        if issue is not None:
            return _Fate("self", *issue)
        if relation.kind in ("mixed", "unknown"):
            reason = "mixed_sequence" if relation.kind == "mixed" else "unknown_grid"
            return _Fate("self", reason, relation.detail)
        if other and len(fitting) > 1:
            names = " and ".join(sorted(str(o) for o in fitting))
            return _Fate("self", "unknown_grid", f"{names} have as many tokens as the grid; use bsa_compile.attention")
        if other and fitting and relation.origin not in fitting:
            return _Fate("self", "not_video", f"they come from {relation.origin}")
        return self._gridded(found, relation)

    def _gridded(self, found: Found, relation: Relation) -> _Fate:
        key_tokens = shape(value(found.match.k))[found.match.k_dim]
        try:
            gridded = self.grids.of_tokens(relation, key_tokens, self._own(found.match), self._where(found.node))
        except GridError:
            if not self.policy.enabled:
                return _Fate("self", "disabled")
            raise
        if gridded is None:
            detail = f"no patch embedding (Conv3d) leads to {relation.origin}; give grid= or use bsa_compile.attention"
            return _Fate("self", "unknown_grid", detail)
        if not gridded.role:
            return _Fate("self", "frame_range", gridded.detail)
        return _Fate(gridded.role, gridded=gridded)

    def _anchored(self, found: Found, relation: Relation) -> _Fate:
        """Role and grids are what the anchor says; what else knows the grid must not contradict."""
        match = found.match
        if match.role == "cross":
            return _Fate("cross", "cross_attention", "the anchor says so")
        issue = (
            ("opaque", "inside an operator whose backward is not derived from its body")
            if found.sealed
            else obstacle(match, value(found.node), self.sizes)
        )
        if issue is not None:
            return _Fate(match.role, *issue)
        gridded = Gridded(match.role, _sizes(match.grid_q), _sizes(match.grid_k), "anchor")
        if self.policy.enabled:
            self._check_anchor(found, relation, gridded)
        return _Fate(match.role, gridded=gridded, arguments=(match.grid_q, match.grid_k))

    def _check_anchor(self, found: Found, relation: Relation, said: Gridded) -> None:
        match, where = found.match, self._where(found.node)
        for name, operand, dim, grid in (
            ("grid_q", match.q, match.q_dim, said.grid_q),
            ("grid_k", match.k, match.k_dim, said.grid_k),
        ):
            tokens, here = shape(value(operand))[dim], match.here(grid)
            if not self.sizes.same(product(here), tokens) and not self._same_hint(product(here), tokens):
                got = f"{text(here)} for {tokens} tokens"
                raise GridError(
                    must(name, f"hold as many tokens as its tensor {where}", got, "Check the anchor's grids.")
                )
        others: list[tuple[str, Grid]] = []
        for source, given in self.grids.given:
            # A given grid is that of all the tokens: of the queries, or with noise queries of the keys.
            whole = {"self": said.grid_q, "noise": said.grid_k, "cached": said.grid_q}.get(said.role)
            others.append((source, given.shape if whole is not None else (said.grid_q[0], *given.shape[1:])))
        checks = [(s, g, said.grid_k if said.role == "noise" else said.grid_q) for s, g in others]
        if relation.kind in ("tokens", "cached") and relation.origin is not None and relation.origin.grid is not None:
            bare = Grids(self.sizes, self.grids.known, (), self.grids.guards)
            traced = bare.of_tokens(relation, shape(value(match.k))[match.k_dim], (), where)
            if traced is not None and traced.role:
                checks += [
                    ("patch_embedding", traced.grid_q, said.grid_q),
                    ("patch_embedding", traced.grid_k, said.grid_k),
                ]
        for source, theirs, mine in checks:
            if not self.grids.agree(theirs, mine):
                got = f"{text(mine)} (anchor) and {text(theirs)} ({source})"
                raise GridError(must("grid", f"be the same from every source {where}", got, "Correct one of them."))

    def _same_hint(self, a: Size, b: Size) -> bool:
        x = hint(a, self.grids.known)
        return not (isinstance(a, int) and isinstance(b, int)) and x is not None and x == hint(b, self.grids.known)

    def _decision(self, found: Found, fate: _Fate) -> Decision:
        site = self._site(found, fate)
        if fate.gridded is None:
            if not self.policy.enabled and fate.reason not in _EXPECTED:
                site = replace(site, reason="disabled", detail="")
            return Decision(found, site)
        gridded = fate.gridded
        same = self.sizes.same
        image = gridded.role == "self" and same(gridded.grid_q[0], 1) and same(gridded.grid_k[0], 1)
        chosen = self.policy.resolve(
            module=site.module,
            role=gridded.role,
            grid_q=self._comparable(gridded.grid_q),
            grid_k=self._comparable(gridded.grid_k),
            step=self.step,
            is_image=image,
        )
        if chosen.dense is not None:
            return Decision(found, replace(site, reason=chosen.dense, detail=chosen.detail))
        site = replace(
            site,
            rewritten=True,
            reason="rewritten",
            detail=chosen.detail,
            tile_q=chosen.chunk_3d_shape_q,
            tile_k=chosen.chunk_3d_shape_k,
            sparsity=chosen.sparsity,
            cdf_threshold=chosen.cdf_threshold,
            attend=chosen.attend,
            attend_reason="" if chosen.attend == registry.NATIVE else "asked for",
        )
        if chosen.attend == registry.AUTO:
            served = registry.choose(chosen.attend, *self._case(found.match, gridded, chosen))
            site = replace(site, attend=served.name, attend_reason=f"auto: {served.reason}")
        grid_q, grid_k = fate.arguments or (gridded.grid_q, gridded.grid_k)
        return Decision(found, site, Lowering(grid_q, grid_k, chosen))

    def _case(self, match: Match, gridded: Gridded, chosen: SitePolicy) -> tuple[Any, ...]:
        """What `bsa::attend` will be called with, for the choice of an implementation."""
        q, k, v = (value(x) for x in (match.q, match.k, match.v))
        if match.layout == "BSHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        tiles = (chosen.chunk_3d_shape_q, chosen.chunk_3d_shape_k)
        return q, k, v, match.here(gridded.grid_q), tiles[0], match.here(gridded.grid_k), tiles[1], "raster"

    def _comparable(self, grid: Grid) -> tuple[int, ...]:
        """A grid that the policy may compare. Where it compares symbolic sizes the code is guarded on the outcome."""
        compares = self.policy.min_tokens or any(rule.resolution is not None for rule in self.policy.rules)
        if not compares:
            return tuple(g if isinstance(g, int) else 2 for g in grid)  # the numbers have no say
        if not self.grids.guards and not all(isinstance(g, int) for g in grid):
            note = "symbolic sizes: the policy's resolution and min_tokens were decided for the sizes exported with"
            if note not in self.notes:
                self.notes.append(note)
        sizes = [as_int(g, self.grids.known) for g in grid]
        return tuple(2 if size is None else size for size in sizes)

    def _site(self, found: Found, fate: _Fate) -> Site:
        match, gridded = found.match, fate.gridded
        q, k = ((shape(e) if isinstance(e := value(x), torch.Tensor) else ()) for x in (match.q, match.k))
        four = len(q) == 4 and match.layout
        return Site(
            module=module_path(found.node, self.prefix),
            role=fate.role,
            rewritten=False,
            reason=fate.reason,
            detail=fate.detail,
            source=source_line(found.node),
            op=match.op,
            batch=_shown(q[match.layout.index("B")]) if four else None,
            heads=_shown(q[match.layout.index("H")]) if four else None,
            head_dim=_shown(q[match.layout.index("D")]) if four else None,
            tokens_q=_shown(q[match.q_dim]) if len(q) > match.q_dim else None,
            tokens_k=_shown(k[match.k_dim]) if len(k) > match.k_dim else None,
            grid_q=tuple(map(_shown, gridded.grid_q)) if gridded else None,
            grid_k=tuple(map(_shown, gridded.grid_k)) if gridded else None,
            grid_source=gridded.source if gridded else "",
        )

    def _where(self, node: fx.Node) -> str:
        path, line = module_path(node, self.prefix) or "<root>", source_line(node)
        return f"at {path}" + (f" ({line})" if line else "")


def _marked(found: Found, fate: _Fate) -> _Fate:
    """Tokens that attend among themselves are cond frames where the model says so: the trace cannot tell."""
    said = found.match.anchor and found.match.role != AUTO
    if said or fate.role != "self" or marked_role(found.node) != "cond":
        return fate
    return replace(fate, role="cond", gridded=fate.gridded and replace(fate.gridded, role="cond"))


def given_grids(argument: Any, context: Any) -> Iterator[tuple[str, TokenGrid]]:
    """The grids that a caller gave, in the order of precedence."""
    for name, grid in (("argument", argument), ("context", context)):
        if grid is not None:
            yield name, TokenGrid.of(grid)


def _sizes(items: Sequence[Any]) -> Grid:
    t, h, w = (of(value(g)) for g in items)
    return (t, h, w)


def _shown(size: Size) -> int | str:
    return size if isinstance(size, int) else str(size)
