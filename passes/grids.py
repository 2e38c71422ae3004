"""The token grid of a site: where it may come from, and what is said when two sources disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from ..errors import GridError, must
from ..grid import TokenGrid
from .relation import Range, Relation
from .sizes import Size, Sizes, of, product
from .symbols import as_int, hint

Grid = tuple[Size, Size, Size]


@dataclass(frozen=True)
class Gridded:
    """A site's role and grids.

    Attributes:
        role: self, cond, noise or cached; empty where `detail` tells why the tokens fit none.
        grid_q, grid_k: (T, H, W).
        source: anchor, argument, context or patch_embedding.
        detail: why there is no role.
    """

    role: str
    grid_q: Grid = (1, 1, 1)
    grid_k: Grid = (1, 1, 1)
    source: str = ""
    detail: str = ""


class Grids:
    """Finds grids, in the order anchor, argument, context, patch embedding.

    Args:
        sizes: what is known of symbolic sizes.
        known: a `SymInt` per symbolic size.
        given: grids that the caller gave, by source, in the order of precedence.
        guards: whether a guard on a size holds for the compiled code (Dynamo), or nothing would check it (export).
    """

    def __init__(
        self,
        sizes: Sizes,
        known: dict[sympy.Expr, torch.SymInt],
        given: Sequence[tuple[str, TokenGrid]],
        guards: bool,
    ) -> None:
        self.sizes = sizes
        self.known = known
        self.given = list(given)
        self.guards = guards

    def of_tokens(
        self, relation: Relation, key_tokens: Size, extra: Sequence[tuple[str, Grid]], where: str
    ) -> Gridded | None:
        """Grids of a site whose queries and keys are ranges of one origin; None where no source knows the grid.

        Args:
            relation: which tokens they are.
            key_tokens: number of keys, cached ones included.
            extra: grids that this site brings along, by source.
            where: module path and source line, for messages.

        Raises:
            GridError: two sources disagree, or the grid does not hold as many tokens as there are.
        """
        origin = relation.origin
        assert origin is not None
        sources: list[tuple[str, Grid]] = [*((n, g.shape) for n, g in self.given), *extra]
        if origin.grid is not None:
            sources.append(("patch_embedding", origin.grid))
        if not sources:
            return None
        name, grid = sources[0]
        for other, theirs in sources[1:]:
            if not self.agree(grid, theirs):
                raise GridError(
                    must(
                        "grid",
                        f"be the same from every source {where}",
                        f"{text(grid)} ({name}) and {text(theirs)} ({other})",
                        "Give the grid of the tokens that this model attends over, or none.",
                    )
                )
        if origin.grid is not None:
            grid = origin.grid  # as the graph computes it, also where another source gave the same numbers
        elif not self.holds(grid, origin.extent):
            raise GridError(
                must(
                    f"grid {text(grid)} ({name})",
                    f"hold as many tokens as the self-attention {where}",
                    f"{product(grid)} for a sequence of {origin.extent}",
                    "Give the grid after patch embedding: latent frames, rows and columns over the patch size.",
                )
            )
        if relation.kind == "cached":
            return self._cached(relation, grid, key_tokens, name)
        return self._ranges(relation.q, relation.k, grid, name)

    def agree(self, a: Grid, b: Grid) -> bool:
        """Whether two grids are the same, by what is known or else for the sizes traced with."""
        return all(self.sizes.same(x, y) or self._same_hint(x, y) for x, y in zip(a, b, strict=True))

    def holds(self, grid: Grid, tokens: Size) -> bool:
        """Whether a grid has this many tokens. Where only the traced sizes can tell, the compiled code is guarded."""
        total = product(grid)
        if self.sizes.same(total, tokens):
            return True
        if isinstance(total, int) and isinstance(tokens, int):
            return False
        return self.guards and bool(as_int(total, self.known) == as_int(tokens, self.known))

    def _same_hint(self, a: Size, b: Size) -> bool:
        if isinstance(a, int) and isinstance(b, int):
            return False
        x, y = hint(a, self.known), hint(b, self.known)
        return x is not None and x == y

    def _ranges(self, q: Range, k: Range, grid: Grid, source: str) -> Gridded:
        frames = [self._frames(r, grid) for r in (q, k)]
        for name, found in zip(("queries", "keys"), frames, strict=True):
            if found is None:
                return Gridded("", detail=f"the {name} are not whole latent frames")
        (first_q, count_q), (first_k, count_k) = frames  # type: ignore[misc]
        same, total = self.sizes.same, grid[0]
        whole_k = same(first_k, 0) and same(count_k, total)
        role = ""
        if same(first_q, first_k) and same(count_q, count_k):
            role = "cond" if same(first_q, 0) and not same(count_q, total) else "self"
        elif whole_k and same(first_q + count_q, total):
            role = "noise"
        grid_q, grid_k = (count_q, *grid[1:]), (count_k, *grid[1:])
        if role:
            return Gridded(role, grid_q, grid_k, source)
        spans = " over ".join(
            f"{first}..{of(first + count)}" for first, count in ((first_q, count_q), (first_k, count_k))
        )
        return Gridded("", detail=f"latent frames {spans} fit no role")

    def _cached(self, relation: Relation, grid: Grid, key_tokens: Size, source: str) -> Gridded:
        q = self._frames(relation.q, grid)
        if q is None or not (self.sizes.same(q[0], 0) and self.sizes.same(q[1], grid[0])):
            return Gridded("", detail="the queries are not all of the new latent frames")
        area = product(grid[1:])
        frames = self.sizes.quotient(key_tokens, area)
        if frames is None and not (isinstance(key_tokens, int) and isinstance(area, int)) and self.guards:
            tokens, plane = as_int(key_tokens, self.known), as_int(area, self.known)
            if tokens is not None and plane is not None and tokens % plane == 0:  # guards
                frames = of(tokens // plane)
        if frames is None:
            return Gridded("", detail="the keys are not whole latent frames")
        return Gridded("cached", grid, (frames, *grid[1:]), source)

    def _frames(self, tokens: Range, grid: Grid) -> Range | None:
        area = product(grid[1:])
        first, count = (self.sizes.quotient(t, area) for t in tokens)
        return None if first is None or count is None else (first, count)


def text(grid: Sequence[Size]) -> str:
    """`4x6x10`."""
    return "x".join(str(g) for g in grid)
