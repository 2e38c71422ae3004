"""Which implementations of `bsa::attend` there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError, UsageError, must

NATIVE = "native"


@dataclass(frozen=True)
class AttendImplementation:
    """What serves `bsa::attend` under a name; see `register_attend`."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None
    supports: Callable[..., bool | str] | None


_registered: dict[str, AttendImplementation] = {}


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
        name: any name but `native`.
        forward: `(q, k, v, kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k, scale, layout) -> (out, lse)`,
            as `bsa_compile.reference.attend` does it: out in q's dtype, lse `[B, H, Sq]` in fp32.
        backward: `(grad_out, grad_lse, q, k, v, out, lse, kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k,
            scale, layout) -> (dq, dk, dv)`. Without it, asking for a gradient is an error; to use ours, pass a function
            that calls `torch.ops.bsa.attend_backward` with `implementation="native"`.
        supports: `(q, k, v, grid_q, tile_q, grid_k, tile_k, layout) -> True`, or False or a text that says why not. It
            also sees fake tensors and must not read data.
        replace: whether an implementation of that name may be replaced.

    Raises:
        UsageError: the name is taken, or is `native`.
    """
    if not isinstance(name, str) or not name:
        raise UsageError(must("name", "be a non-empty text", repr(name)))
    if name == NATIVE:
        raise UsageError(must("name", f"not be {NATIVE!r}, which is built in", repr(name)))
    if name in _registered and not replace:
        raise UsageError(must("name", "be free", f"{name!r}, which is registered", "Pass replace=True to replace it."))
    _registered[name] = AttendImplementation(name, forward, backward, supports)


def attend_implementations() -> tuple[str, ...]:
    """Names that `implementation=` and a policy's `attend=` accept."""
    return (NATIVE, *sorted(_registered))


def find_attend(name: str, *case: Any) -> AttendImplementation | None:
    """The implementation of that name, None for the built-in one.

    Args:
        name: what the caller asked for.
        case: q, k, v, grid_q, tile_q, grid_k, tile_k, layout.

    Raises:
        UnsupportedError: there is no such implementation, or it does not support the case.
    """
    if name == NATIVE:
        return None
    found = _registered.get(name)
    if found is None:
        raise UnsupportedError(must("implementation", f"be one of {', '.join(attend_implementations())}", repr(name)))
    answer = True if found.supports is None else found.supports(*case)
    if answer is not True:
        why = f": {answer}" if isinstance(answer, str) else ""
        raise UnsupportedError(
            must(
                "q, k, v, grids and tiles",
                f"be supported by the attend implementation {name!r}{why}",
                _describe(*case),
                f"Choose another of {', '.join(attend_implementations())}.",
            )
        )
    return found


def _describe(q: Tensor, k: Tensor, v: Tensor, *shapes: Sequence[int] | str) -> str:
    return f"q {list(q.shape)} {q.dtype}, k {list(k.shape)}, grids, tiles and layout {shapes}"
