"""Which tokens a site's queries and keys are, and how the two relate: the same video, ranges of it, or something else.

Never from sizes: a text as long as the video must not pass for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .known_models import cache_holds_frames
from .layout import Algebra, Layout
from .sizes import Size, Sizes, of
from .states import Found, Origin, State
from .tracks import Segments

_SUMS = ("linear", "conv", "matmul", "addmm", "bmm", "scaled_dot_product_attention", "rms_norm")

Range = tuple[Size, Size]
"""First token and count."""


@dataclass(frozen=True)
class Relation:
    """How a site's keys relate to its queries.

    Attributes:
        kind: `tokens` (both are ranges of one origin), `cached` (the keys are other tokens, then the queries'),
            `cross`, `mixed` or `unknown`.
        origin: where the queries' tokens come from, for `tokens` and `cached`.
        q, k: ranges of its tokens; for `cached`, k is the range of the new keys.
        detail: what to tell the user.
        video: whether the queries depend on a patch embedding.
    """

    kind: str
    origin: Origin | None = None
    q: Range = (0, 0)
    k: Range = (0, 0)
    detail: str = ""
    video: bool = False


@dataclass
class _Side:
    """One operand's origins, by what its sequence dimension holds of them."""

    state: State
    runs: dict[Origin, Range] = field(default_factory=dict)
    pieces: dict[Origin, Segments] = field(default_factory=dict)
    scattered: set[Origin] = field(default_factory=set)

    def ancestors(self) -> set[Origin]:
        """Every origin that had any influence."""
        return set(self.state.tokens) | set(self.state.lost)

    def holds(self, origins: Iterable[Origin]) -> bool:
        """Whether the sequence is made of these origins' tokens, in whatever order; not merely influenced by them."""
        here = {*self.runs, *self.pieces, *self.scattered}
        elsewhere = self.runs or self.pieces
        return any(o in here or (o in self.state.lost and not elsewhere) for o in origins)

    def lost(self, origins: Iterable[Origin]) -> str:
        """Where the order of these origins was lost, "" if it was not."""
        texts = [self.state.lost[o] for o in sorted(origins, key=_rank) if o in self.state.lost]
        # Channels end in linear maps as a matter of course; what moved tokens is of more interest.
        return min(texts, key=lambda text: text.startswith(_SUMS), default="")


def _rank(origin: Origin) -> tuple[bool, str, int]:
    return (origin.grid is None, origin.name, origin.dim)


def relate(found: Found, algebra: Algebra) -> Relation:
    """Compare the tokens of a site's queries and keys."""
    q, k = _side(found.q, found.match.q_dim, algebra), _side(found.k, found.match.k_dim, algebra)
    video = {o for o in q.ancestors() if o.grid}
    here = {*q.runs, *q.pieces, *q.scattered}
    if any(o.grid for o in here) or (video and not q.runs and not q.pieces):
        related = _of_video(found, q, k, algebra.sizes)
    else:
        related = _of_inputs(found, q, k, algebra.sizes)
    return replace(related, video=bool(video))


def _side(state: State, dim: int, algebra: Algebra) -> _Side:
    side = _Side(state)
    for origin, track in state.tokens.items():
        if isinstance(track, Segments):
            if track.dim == dim:
                side.pieces[origin] = track
            elif origin.grid:
                side.scattered.add(origin)
        elif dim < len(track.dims) and (run := algebra.run(track, dim)) is not None:
            if track.dims[dim] or origin.grid:
                side.runs[origin] = run
        elif _touches(track, dim, algebra) or (origin.grid and any(algebra.moves(d) for d in track.dims)):
            side.scattered.add(origin)
    return side


def _touches(layout: Layout, dim: int, algebra: Algebra) -> bool:
    return dim < len(layout.dims) and algebra.moves(layout.dims[dim])


def _of_video(found: Found, q: _Side, k: _Side, sizes: Sizes) -> Relation:
    runs = {o: r for o, r in q.runs.items() if o.grid}
    theirs = {o: r for o, r in k.runs.items() if o.grid}
    if runs and set(runs) == set(theirs):
        return _ranges(runs, theirs, sizes)
    return _different(found, q, k, set(runs), {o for o in q.ancestors() if o.grid}, sizes)


def _of_inputs(found: Found, q: _Side, k: _Side, sizes: Sizes) -> Relation:
    if any(o.grid for o in {*k.runs, *k.pieces, *k.scattered}):
        return Relation("cross", detail=f"queries come from {_names(q.runs) or 'elsewhere'}, keys from the video")
    runs = set(q.runs)
    if runs and runs == set(k.runs) and not runs & set(k.pieces):
        return _ranges(q.runs, k.runs, sizes)
    if runs and k.runs and not (q.state.projected or k.state.projected):
        detail = "the graph begins at q, k and v: call bsa_compile.attention(..., grid_q=..., role=...) instead"
        return Relation("unknown", detail=detail)
    mine = runs | set(q.pieces) | q.scattered or q.ancestors()
    if not mine and not k.runs and not k.pieces:
        return Relation("unknown", detail="the tokens come from no input of the graph")
    return _different(found, q, k, runs, mine, sizes)


def _different(found: Found, q: _Side, k: _Side, runs: set[Origin], mine: set[Origin], sizes: Sizes) -> Relation:
    """The keys are not plain ranges of the queries' tokens.

    Args:
        found: the site.
        q, k: its operands.
        runs: origins whose tokens the queries are, in order.
        mine: origins whose tokens the queries are, in whatever order.
        sizes: what is known of sizes.
    """
    behind = [o for o in sorted(runs, key=_rank) if o in k.pieces]
    if behind:
        return _behind_others(found, behind[0], q.runs[behind[0]], k.pieces[behind[0]], sizes)
    apart = runs - set(k.runs)  # a RoPE table given as an input may be common to queries and keys of any kind
    if not k.holds(apart or mine):
        return _cross(k)
    if runs and not apart:
        return Relation("unknown", detail=f"queries come from {_names(runs)}, keys from {_names(k.runs)}")
    if not runs and any(o in q.pieces or o in k.pieces for o in mine):
        return Relation("mixed", detail=_pieces(q, k))
    if runs:
        where = found.k_changed if k.scattered & runs else k.lost(runs)
        which = "keys"
    else:
        where = found.q_changed if q.scattered & mine else q.lost(mine)
        which = "queries"
    detail = f"token order of the {which} is lost at {where}" if where else "each row attends to a part of the tokens"
    return Relation("unknown", detail=detail)


def _ranges(q: dict[Origin, Range], k: dict[Origin, Range], sizes: Sizes) -> Relation:
    """Both sides are ranges of the same origins; those must agree on which ranges."""
    origins = sorted(q, key=_rank)
    # A table that is longer than the sequence has the same ranges, and another extent: prefer what is covered whole.
    whole = [o for o in origins if sizes.same(k[o][0], 0) and sizes.same(k[o][1], o.extent)]
    origin = (whole or origins)[0]
    for other in origins:
        if not sizes.all_same((*q[other], *k[other]), (*q[origin], *k[origin])):
            return Relation("unknown", detail=f"{origin} and {other} give the tokens different positions")
    return Relation("tokens", origin, q[origin], k[origin])


def _behind_others(found: Found, origin: Origin, q: Range, pieces: Segments, sizes: Sizes) -> Relation:
    """Keys that begin with other tokens: a KV cache where the model class is known to keep whole frames there."""
    parts = [part for _, part in pieces.parts]
    last_size, last = pieces.parts[-1]
    if len(parts) == 2 and parts[0] is None and last is not None and cache_holds_frames(found.node):
        k = (last.offset, last_size)
        if sizes.all_same(q, k):
            return Relation("cached", origin, q, k)
    return Relation("mixed", detail=_pieces(None, pieces))


def _pieces(q: _Side | None, k: _Side | Segments) -> str:
    if isinstance(k, Segments):
        lengths = [str(size) for size, _ in k.parts]
        return f"the keys are a concatenation of {' + '.join(lengths)} tokens"
    assert q is not None
    which = "queries and keys are" if q.pieces and k.pieces else "the queries are" if q.pieces else "the keys are"
    pieces = next(iter((q.pieces or k.pieces).values()))
    return f"{which} a concatenation of {' + '.join(str(of(size)) for size, _ in pieces.parts)} tokens"


def _cross(k: _Side) -> Relation:
    names = _names(k.runs or k.pieces)
    return Relation("cross", detail=f"keys come from {names}" if names else "")


def _names(origins: Iterable[Origin]) -> str:
    return " and ".join(str(o) for o in sorted(origins, key=_rank))
