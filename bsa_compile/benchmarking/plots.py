"""Pictures of a comparison: time against sparsity, with what skipping would ideally give, and time against tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import require_extra
from ..files import write_bytes
from .tables import heading

Line = list[tuple[float, float]]


def save(data: Mapping[str, Any], path: str, measure: str = "forward") -> None:
    """Write a PNG with two panels.

    Args:
        data: what `compare` gave.
        path: the file.
        measure: which time is drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = io.BytesIO()
    figure(data, measure).savefig(picture, format="png", dpi=130)
    write_bytes(path, picture.getvalue())


def figure(data: Mapping[str, Any], measure: str = "forward") -> Any:
    """As `save`; a `matplotlib.figure.Figure`."""
    require_extra("matplotlib", "viz")
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    cases = data["cases"]
    base = cases[0] if cases else None
    if base is not None:
        picture.suptitle(f"attend {measure.replace('_', ' ')}: {data['device']['name']}\n{heading(base)}", fontsize=9)
    at_base = [case for case in cases if base is not None and case["grid"] == base["grid"] and _first_lists(case, base)]
    dense = [(case, found) for case in at_base for found in case["participants"].values() if found.get("dense")]
    for name, line in lines(at_base, measure, lambda case: case["sparsity"], dense=False).items():
        left.plot(*zip(*line, strict=True), marker="o", label=name)
    fastest = min((found[f"{measure}_ms"] for _, found in dense if f"{measure}_ms" in found), default=None)
    if fastest is not None:
        ends = (0.0, max(case["sparsity"] for case in at_base))
        points = [ends[0] + (ends[1] - ends[0]) * i / 100 for i in range(101)]
        ideal = [fastest * (1 - x) for x in points]
        left.plot(points, ideal, "k--", label="fastest dense x (1 - s): a speed-up of 1/(1 - s)")
    left.set(xlabel="sparsity s", ylabel="ms", yscale="log")
    grown = [
        case for case in cases if base is not None and case["sweep"] in ("", "tokens") and _first_lists(case, base)
    ]
    for name, line in lines(grown, measure, lambda case: case["tokens"], dense=True).items():
        right.plot(*zip(*line, strict=True), marker="o", label=name)
    right.set(xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return picture


def lines(
    cases: Sequence[Mapping[str, Any]], measure: str, along: Callable[[Mapping[str, Any]], float], dense: bool
) -> dict[str, Line]:
    """Points of every participant and tile, by name, in ascending order."""
    found: dict[str, dict[float, float]] = {}
    for case in cases:
        for name, one in case["participants"].items():
            if f"{measure}_ms" in one and (dense or not one["dense"]):
                label = name if one["dense"] else f"{name}, tile {'x'.join(map(str, case['tile']))}"
                found.setdefault(label, {}).setdefault(along(case), one[f"{measure}_ms"])
    return {name: sorted(points.items()) for name, points in found.items()}


def _first_lists(case: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return bool(case["lists"] == base["lists"])
