"""Transfer rule of `einops.rearrange`, which older einops leaves in Dynamo graphs as one node."""

from __future__ import annotations

import re

from .calls import Call
from .sequence import Rule, Tracer
from .sizes import Size, product
from .states import States
from .tracks import Track

_GROUP = re.compile(r"\(([^()]*)\)|(\S+)")


def rearrange(t: Tracer, call: Call) -> States:
    """View to one dimension per name, permute, view to the result's shape."""
    left, arrow, right = str(call.get(1, "pattern")).partition("->")
    before, after = t.shape(call.x), t.shape(call.node)
    groups, names = _groups(left), [name for group in _groups(right) for name in group]
    sizes = _named_sizes(t, call, groups, before) if arrow and "..." not in call.get(1, "pattern") else None
    if sizes is None or sorted(names) != sorted(sizes):
        return t.lose(call.node, t.state(call.x))
    order = [list(sizes).index(name) for name in names]
    apart = list(sizes.values())

    def one(track: Track) -> Track | None:
        result = t.tracks.view(track, before, apart)
        result = None if result is None else t.tracks.permute(result, order)
        return None if result is None else t.tracks.view(result, [apart[i] for i in order], after)

    t.alias(call.node, call.x)
    return t.each(call, t.state(call.x), one)


def _groups(side: str) -> list[list[str]]:
    """The names of each dimension; a literal 1 names nothing."""
    return [[n for n in (inner or single).split() if n != "1"] for inner, single in _GROUP.findall(side)]


def _named_sizes(t: Tracer, call: Call, groups: list[list[str]], before: tuple[Size, ...]) -> dict[str, Size] | None:
    """Size of every name on the left, in order; at most one per dimension is left for division."""
    if len(groups) != len(before):
        return None
    sizes: dict[str, Size] = {}
    for group, size in zip(groups, before, strict=True):
        given = {n: t.size(call.node.kwargs[n]) for n in group if n in call.node.kwargs}
        open_ = [n for n in group if n not in given]
        if len(open_) > 1:
            return None
        rest = t.sizes.quotient(size, product(given.values()))
        if rest is None:
            return None
        sizes.update({n: given.get(n, rest) for n in group})
    return sizes


RULES: dict[str, Rule] = {"rearrange": rearrange}
