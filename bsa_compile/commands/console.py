"""What commands share to talk: progress on a terminal, JSON, and figures in words."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsa_compile.files import write_text


class Progress:
    """One line on stderr that says what is being done; nothing where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str) -> None:
        """Begin the next of the steps."""
        self._done += 1
        self._write(f"[{self._done}/{self._total}] {what} ...")

    def __exit__(self, *exc: object) -> None:
        self._write("")

    def _write(self, line: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def json_text(data: Any) -> str:
    """JSON that every parser takes: NaN and infinity become null."""
    return json.dumps(_finite(data), indent=2) + "\n"


def put_json(data: Any, target: str) -> None:
    """Write JSON to a file, or to stdout for "-"."""
    if target == "-":
        sys.stdout.write(json_text(data))
    else:
        write_text(Path(target), json_text(data))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def seconds(value: float) -> str:
    """A time with three digits: 1.23 s, 45.6 ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def flops(value: float | None) -> str:
    """A number of floating-point operations with three digits: 1.23 TFLOP."""
    if value is None:
        return "unknown"
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOP"
    return f"{value:.0f} FLOP"


def percent(part: float) -> str:
    return f"{100 * part:.2f}%"


def shape(sizes: Sequence[Any]) -> str:
    """8x30x36."""
    return "x".join(map(str, sizes))
