"""Every exception that the package raises for bad input.

One class per kind, all under `BSACompileError`. Every message reads
``<argument> must <constraint>, got <value>. <what to do next>``; `must` builds it.
"""

from __future__ import annotations


class BSACompileError(Exception):
    """Base of every error that bsa_compile raises on purpose."""


class GridError(BSACompileError, ValueError):
    """A token grid or tile is malformed, or two sources of the grid disagree."""


class PolicyError(BSACompileError, ValueError):
    """A policy holds an unknown key or a value out of range."""


class SelectionError(BSACompileError, ValueError):
    """A block selection is malformed, or a BlockMask cannot be expressed as one."""


class InputError(BSACompileError, ValueError):
    """A tensor given to an op has the wrong shape, dtype, device or stride."""


class UnsupportedError(BSACompileError, RuntimeError):
    """The input is well-formed but no implementation can serve it here."""


class SiteError(BSACompileError, RuntimeError):
    """An attention site could not be rewritten and the policy asks for an error."""


class CheckpointError(BSACompileError, ValueError):
    """A checkpoint is missing, corrupt, or does not fit the model."""


class ExportError(BSACompileError, RuntimeError):
    """A model cannot be exported, or an exported file cannot be used here."""


class MissingExtraError(BSACompileError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""


class UsageError(BSACompileError, ValueError):
    """A command-line or API argument is wrong."""


class ParallelError(BSACompileError, RuntimeError):
    """Ranks that work on one video ask for different things, or one of them is lost; the message names it."""


def must(argument: str, constraint: str, got: object, todo: str = "") -> str:
    """Format an error text: ``<argument> must <constraint>, got <got>. <todo>``."""
    text = f"{argument} must {constraint}, got {got}."
    return f"{text} {todo}" if todo else text  # no string methods: Dynamo traces this with symbolic sizes in the text


def one_line(exc: BaseException) -> str:
    """What somebody else's exception says, short enough to stand in an error of ours."""
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:400]


def require_extra(module: str, extra: str) -> object:
    """Import the optional `module`, or raise naming the extra that provides it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingExtraError(
            must(module, "be installed for this feature", "no such module", f"Run: pip install 'bsa-compile[{extra}]'.")
        ) from exc
