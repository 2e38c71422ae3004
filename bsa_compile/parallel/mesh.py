"""The ranks of a `DeviceMesh`, and what each of its dimensions is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import UsageError, must

CONTEXT, RING, ULYSSES, CFG = "context", "ring", "ulysses", "cfg"
_KINDS = ((CONTEXT,), (ULYSSES,), (RING,), (RING, ULYSSES))


@dataclass(frozen=True)
class Line:
    """The ranks along one dimension of the mesh, as one of them sees it.

    Attributes:
        size: how many.
        index: which of them this process is.
        group: name of the process group; functional collectives and ops take it.
    """

    size: int = 1
    index: int = 0
    group: str = ""


@dataclass(frozen=True)
class Ranks:
    """What this process is in each dimension.

    Attributes:
        ring: ranks that pass keys and values round.
        ulysses: ranks that exchange heads for tokens.
        cfg: ranks that hold the same tokens of other samples of the batch.
    """

    ring: Line = Line()
    ulysses: Line = Line()
    cfg: Line = Line()

    @property
    def total(self) -> int:
        """All ranks of the mesh."""
        return self.ring.size * self.ulysses.size * self.cfg.size

    @property
    def lines(self) -> tuple[Line, ...]:
        """The dimensions that more than one rank shares."""
        return tuple(line for line in (self.cfg, self.ring, self.ulysses) if line.size > 1)


def factor(ranks: int, heads: int) -> tuple[int, int]:
    """(ring, ulysses) for a plain context dimension: Ulysses as far as the heads go, the rest a ring."""
    ulysses = max(d for d in range(1, min(ranks, heads) + 1) if ranks % d == 0)
    return ranks // ulysses, ulysses


def check(mesh: Any) -> tuple[str, ...]:
    """Names of a mesh's dimensions.

    Raises:
        UsageError: it is no `DeviceMesh`, has other dimensions than `resolve` knows, or leaves this process out.
    """
    if not isinstance(mesh, DeviceMesh):
        todo = "Make it by torch.distributed.device_mesh.init_device_mesh."
        raise UsageError(must("mesh", "be a DeviceMesh", type(mesh).__name__, todo))
    names = mesh.mesh_dim_names or ((CONTEXT,) if mesh.ndim == 1 else ())
    kind = tuple(n for n in names if n != CFG)
    if kind not in _KINDS or names not in (kind, (CFG, *kind)):
        want = f"have dimensions named '{CONTEXT}', or '{RING}', '{ULYSSES}' or both, after an optional '{CFG}'"
        raise UsageError(must("mesh", want, names))
    if mesh.get_coordinate() is None:
        raise UsageError(must("mesh", "hold this process", f"rank {dist.get_rank()} outside of it"))
    return names


def resolve(mesh: DeviceMesh, heads: int) -> Ranks:
    """This process's place in a mesh.

    Args:
        mesh: with dimensions named `context`; or `ring`, `ulysses` or both; and maybe `cfg` before them. One unnamed
            dimension counts as `context`.
        heads: attention heads, of which each Ulysses rank needs one.

    Raises:
        UsageError: as `check`, or more Ulysses ranks are asked for than there are heads.
    """
    names = check(mesh)
    sizes = dict(zip(names, mesh.mesh.shape, strict=True))
    if CONTEXT in names:
        ring, ulysses = factor(sizes[CONTEXT], heads)
    else:
        ring, ulysses = sizes.get(RING, 1), sizes.get(ULYSSES, 1)
    if ulysses > heads:
        todo = f"Name the dimension '{CONTEXT}', or give a mesh with a '{RING}' dimension."
        raise UsageError(must("mesh", f"have at most as many Ulysses ranks as heads ({heads})", ulysses, todo))
    lines = {name: _line(mesh.get_group(dim)) for dim, name in enumerate(names)}
    whole = lines.pop(CONTEXT, None)
    if whole is not None and ring == 1:
        lines[ULYSSES] = whole
    elif whole is not None:
        table = mesh.mesh.reshape(-1, ring, ulysses)[lines[CFG].index if CFG in lines else 0]
        member, index = divmod(whole.index, ulysses)
        lines[RING] = _subgroup(table[:, index])
        lines[ULYSSES] = _subgroup(table[member])
    return Ranks(**lines)


def _line(group: dist.ProcessGroup) -> Line:
    return Line(dist.get_world_size(group), dist.get_rank(group), group.group_name)


def _subgroup(ranks: torch.Tensor) -> Line:
    if len(ranks) == 1:
        return Line()
    # Only its members take part, so that other parts of the job need not know.
    return _line(dist.new_group(ranks.tolist(), use_local_synchronization=True))


def tile_units(tiles: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens along h and w of which every tile's size is a divisor."""
    return (math.lcm(*(t[1] for t in tiles)), math.lcm(*(t[2] for t in tiles)))
