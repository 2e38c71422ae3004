"""Remembers where tokens stopped lying in raster order, so that a message can name the operator."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import fx

from .sizes import Sizes, product
from .states import Origin, State, where
from .tracks import Segments, Track


class Changes:
    """Per node and origin, the operator that changed the order; nothing where it is as it was."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._at: dict[fx.Node, dict[Origin, str]] = {}

    def of(self, node: fx.Node | None) -> dict[Origin, str]:
        """The changes behind a node."""
        return {} if node is None else self._at.get(node, {})

    def text(self, node: fx.Node | None) -> str:
        """The change to report of an operand: that of a patch embedding's tokens, if there is one."""
        return next((t for _, t in sorted(self.of(node).items(), key=lambda item: item[0].grid is None)), "")

    def inherit(self, node: fx.Node, changes: dict[Origin, str]) -> None:
        """Take over what is known of the operand that a placeholder stands for."""
        if changes:
            self._at[node] = changes

    def note(self, node: fx.Node, states: Iterable[State], inputs: Sequence[tuple[fx.Node, State]]) -> None:
        """Compare the order in a node's results with that in its inputs."""
        notes: dict[Origin, str] = {}
        for origin, track in (item for state in states for item in state.tokens.items()):
            if self._in_order(track):
                continue
            earlier = next((self._at[n][origin] for n, _ in inputs if origin in self._at.get(n, {})), None)
            if any(origin in state.tokens and self._in_order(state.tokens[origin]) for _, state in inputs):
                notes[origin] = where(node)
            elif earlier is not None:
                notes[origin] = earlier
        if notes:
            self._at[node] = notes

    def _in_order(self, track: Track) -> bool:
        """Whether the dimensions, as they stand, list the tokens in raster order."""
        if isinstance(track, Segments):
            return True
        moving = [f for dim in track.dims for f in dim if not self.sizes.same(f[1], 0)]
        if moving and not self.sizes.same(moving[-1][1], 1):
            return False
        return all(self.sizes.same(a[1], product(b)) for a, b in itertools.pairwise(moving))
