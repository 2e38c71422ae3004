"""Result files: what they say of where they were measured, several runs that fill one, and figures over samples."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bsa_compile.commands import common
from bsa_compile.errors import UsageError, must

_Z = statistics.NormalDist().inv_cdf(0.975)


def header(kind: str, device: torch.device) -> dict[str, Any]:
    """What a result file begins with: which one it is, when and where it was measured."""
    return {
        "kind": kind,
        "date": datetime.date.today().isoformat(),
        "device": common.describe_device(device),
        "versions": common.versions(),
    }


def keep_earlier(data: dict[str, Any], path: Path | None, rows: str, same: Sequence[str]) -> None:
    """Take over the rows of an earlier run from the file that will be written, if it is there.

    Args:
        data: the new run's.
        path: the file; None: nothing will be written.
        rows: key of the list of rows.
        same: keys that must be the same in both, besides those of `header` but the date.

    Raises:
        UsageError: the file is no such result, or of something else.
    """
    if path is None or not path.exists():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        known = list(earlier[rows])
    except (ValueError, KeyError, TypeError):
        raise UsageError(must("--json", f"name a new file or results with {rows}", str(path))) from None
    for name in ("kind", "device", "versions", *same):
        if earlier.get(name) != json.loads(json.dumps(data[name])):
            got = f"{path} with {earlier.get(name)!r} instead of {data[name]!r}"
            raise UsageError(must("--json", f"name a new file or one of the same {name}", got))
    data[rows] = known


def put_row(rows: Sequence[Any], row: dict[str, Any], key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """The rows with one added, or put in place of the one of the same key; in the order of their keys."""
    return sorted([*(one for one in rows if key(one) != key(row)), row], key=key)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation of what is finite; None where there is too little of it."""
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(finite) if finite else None,
        "std": statistics.stdev(finite) if len(finite) > 1 else None,
        "n": len(finite),
    }


def share(right: int, of: int) -> dict[str, Any]:
    """A share with its 95% interval.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22(158).
    """
    if not 0 <= right <= of or of == 0:
        raise UsageError(must("right", "lie between 0 and a positive number of trials", f"{right} of {of}"))
    rate, z2 = right / of, _Z**2
    centre = (rate + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(rate * (1 - rate) / of + z2 / (4 * of**2))
    # At 0 and 1 rounding would leave the bound beside where it is.
    low, high = (0.0 if right == 0 else centre - half), (1.0 if right == of else centre + half)
    return {"share": rate, "low": low, "high": high, "right": right, "of": of}
