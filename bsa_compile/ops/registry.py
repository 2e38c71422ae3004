"""Which implementations of `bsa::attend` there are, by name.

`native`, our own kernels, is built in and needs nothing; `auto` is native unless a measurement says that an installed
library is faster (`wins.py`). Libraries declare themselves in `libraries.py` and are imported when they first run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError, UsageError, must
from . import wins

NATIVE = "native"
AUTO = "auto"


@dataclass(frozen=True)
class AttendImplementation:
    """What serves `bsa::attend` under a name; see `register_attend`.

    Attributes:
        distribution: the installed package that it needs, "" for none.
        extra: the optional extra of this package that brings it.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None
    supports: Callable[..., bool | str] | None
    distribution: str = ""
    extra: str = ""

    @property
    def installed(self) -> bool:
        return not self.distribution or installed_version(self.distribution) is not None

    def objection(self, *case: Any) -> str | None:
        """Why it does not serve q, k, v, grid_q, tile_q, grid_k, tile_k, layout; None if it does."""
        if not self.installed:
            return f"{self.distribution} is not installed"
        answer = True if self.supports is None else self.supports(*case)
        return None if answer is True else answer if isinstance(answer, str) else ""


@dataclass(frozen=True)
class Choice:
    """Which implementation serves a case, and why.

    Attributes:
        name: `native` or a registered name.
        reason: one clause for people.
        implementation: None for the built-in one.
    """

    name: str
    reason: str
    implementation: AttendImplementation | None


_registered: dict[str, AttendImplementation] = {}


@functools.cache
def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def register_attend(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
    *,
    supports: Callable[..., bool | str] | None = None,
    replace: bool = False,
) -> None:
    """Put in another implementation of attend, to be chosen by `implementation=name` or a policy's `attend=name`.

    Args:
        name: any name but `native` and `auto`.
        forward: `(q, k, v, kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k, scale, layout) -> (out, lse)`,
            as `bsa_compile.reference.attend` does it: out in q's dtype, lse `[B, H, Sq]` in fp32.
        backward: `(grad_out, grad_lse, q, k, v, out, lse, kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k,
            scale, layout) -> (dq, dk, dv)`. Without it, asking for a gradient is an error; to use ours, pass a function
            that calls `torch.ops.bsa.attend_backward` with `implementation="native"`.
        supports: `(q, k, v, grid_q, tile_q, grid_k, tile_k, layout) -> True`, or False or a text that says why not. It
            also sees fake tensors and must not read data.
        replace: whether an implementation of that name may be replaced.

    Raises:
        UsageError: the name is taken, or is `native` or `auto`.
    """
    if not isinstance(name, str) or not name:
        raise UsageError(must("name", "be a non-empty text", repr(name)))
    if name in (NATIVE, AUTO):
        raise UsageError(must("name", f"not be {name!r}, which is built in", repr(name)))
    if name in _registered and not replace:
        raise UsageError(must("name", "be free", f"{name!r}, which is registered", "Pass replace=True to replace it."))
    _registered[name] = AttendImplementation(name, forward, backward, supports)


def declare(implementation: AttendImplementation) -> None:
    """Register what this package brings an adapter for; it counts as there while its distribution is installed."""
    _registered[implementation.name] = implementation


def declared() -> tuple[AttendImplementation, ...]:
    """Everything registered, adapters of libraries that are not installed included."""
    return tuple(_registered[name] for name in sorted(_registered))


def attend_implementations() -> tuple[str, ...]:
    """Names that `implementation=` and a policy's `attend=` accept here: libraries count where they are installed."""
    return (NATIVE, AUTO, *(found.name for found in declared() if found.installed))


def how_to_get(name: str) -> str:
    """What to do about a name that `attend_implementations` does not list."""
    found = _registered.get(name)
    if found is not None and not found.installed:
        return f"{found.distribution} is not installed. Run: pip install 'bsa-compile[{found.extra}]'."
    missing = [known for known in declared() if not known.installed]
    if not missing:
        return "Others are put in by bsa_compile.register_attend."
    names = " and ".join(known.name for known in missing)
    return (
        f"Others are put in by bsa_compile.register_attend; {names} by pip install 'bsa-compile[{missing[0].extra}]'."
    )


def choose(name: str, *case: Any, backward: bool = False) -> Choice:
    """The implementation that serves a case.

    Args:
        name: what the caller asked for; `auto` takes a library only where a measurement says that it is faster.
        case: q, k, v, grid_q, tile_q, grid_k, tile_k, layout.
        backward: choose for the backward pass, which `auto` decides by itself.

    Raises:
        UnsupportedError: there is no such implementation, or it does not support the case.
    """
    if name == NATIVE:
        return Choice(NATIVE, "built in", None)
    if name == AUTO:
        return _measured(*case, backward=backward)
    found = _registered.get(name)
    if found is None or not found.installed:
        known = ", ".join(attend_implementations())
        raise UnsupportedError(must("implementation", f"be one of {known}", repr(name), how_to_get(name)))
    objection = found.objection(*case)
    if objection is not None:
        raise UnsupportedError(
            must(
                "q, k, v, grids and tiles",
                f"be supported by the attend implementation {name!r}{objection and f': {objection}'}",
                _describe(*case),
                f"Choose another of {', '.join(attend_implementations())}.",
            )
        )
    return Choice(name, "asked for", found)


def find_attend(name: str, *case: Any, backward: bool = False) -> AttendImplementation | None:
    """As `choose`; the implementation alone, None for the built-in one."""
    return choose(name, *case, backward=backward).implementation


def _measured(*case: Any, backward: bool) -> Choice:
    """Native, or the first library of the table of wins that is installed and serves the case."""
    if case[0].device.type == "meta":
        return Choice(NATIVE, "the device that runs it decides", None)
    why = "no library was measured to be faster for this case"
    for win in wins.matching(*case, backward=backward):
        found = _registered.get(win.implementation)
        if found is None:
            continue
        objection = found.objection(*case)
        if objection is None and (found.backward is not None or not backward):
            return Choice(found.name, f"measured to be faster for this case ({win.evidence})", found)
        why = f"{win.implementation} was measured to be faster, but does not serve this case"
        why += f": {objection}" if objection else ""
    return Choice(NATIVE, why, None)


def _describe(q: Tensor, k: Tensor, v: Tensor, *shapes: Sequence[int] | str) -> str:
    return f"q {list(q.shape)} {q.dtype}, k {list(k.shape)}, grids, tiles and layout {shapes}"
