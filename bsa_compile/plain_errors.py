"""Errors as we wrote them: Dynamo wraps whatever is raised while it traces or compiles, and says so at length."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import BSACompileError, UnsupportedError, must

_OPS = Path(__file__).parent / "ops"


@contextmanager
def plain_errors(compiler: str, where: str = "") -> Iterator[None]:
    """Raise our own errors themselves, whatever wraps them; errors that are not ours stay as they are.

    Args:
        compiler: name of the Dynamo backend that compiles.
        where: goes in front of the text, for a graph that knows only its block.

    Raises:
        UnsupportedError: the compiler is known to Dynamo and not installed.
    """
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as exc:
        ours = _ours(exc)
        if ours is not None:
            kind, text = ours
            raise kind(where + text + _user_line(exc)) from None
        cause = getattr(exc, "inner_exception", None)
        if compiler != "inductor" and isinstance(cause, ImportError):
            text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
            raise UnsupportedError(must(f"backend {compiler!r}", "be installed", f"an error: {text}")) from None
        raise


def _ours(exc: BaseException) -> tuple[type[BSACompileError], str] | None:
    """Class and text of the error of ours that an exception wraps: its cause, or that of what it wraps, and so on."""
    todo: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while todo:
        link = todo.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        if isinstance(link, BSACompileError):
            return type(link), str(link)
        if isinstance(link, torch._dynamo.exc.ObservedException):
            observed = _observed(link)
            if observed is not None:
                return observed
        todo += [getattr(link, "inner_exception", None), link.__cause__, link.__context__]
    return None


def _observed(exc: torch._dynamo.exc.ObservedException) -> tuple[type[BSACompileError], str] | None:
    """Class and text of an error that traced code raised: Dynamo only simulates that, so no such object exists."""
    kinds = torch._dynamo.exc.observed_exception_map.items()
    kind = next((k for k, observed in kinds if type(exc) is observed and issubclass(k, BSACompileError)), None)
    if kind is None:
        return None
    quoted = re.search(r"""(["']).*\1""", str(exc), re.DOTALL)  # raised exception InputError('the text')
    try:
        return kind, str(ast.literal_eval(quoted[0])) if quoted else str(exc)  # type: ignore[arg-type, return-value]
    except (SyntaxError, ValueError):  # not a constant, but it says more than Dynamo's own text
        return kind, quoted[0]  # type: ignore[index, return-value]


def _user_line(exc: BaseException) -> str:
    """The traced line at fault, our ops' own code aside."""
    frames = [f for f in getattr(exc, "real_stack", None) or () if _OPS not in Path(f.filename).parents]
    return f" At {frames[-1].filename}:{frames[-1].lineno}." if frames else ""
