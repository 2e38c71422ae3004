"""A comparison in words: tables for a terminal and for Markdown, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .participants import OURS

# measure, heading of its time
COLUMNS = (
    ("forward", "forward"),
    ("backward", "backward"),
    ("op_forward", "whole op"),
    ("op_backward", "whole backward"),
)
LEGEND = (
    "Times in ms. forward, backward: the kernel on inputs in its own order of tokens (raster order for ours; for the "
    "others tile order, made beforehand). whole op, whole backward: raster tensors in and out, with selection and all "
    "reordering. x: the time over ours. TF: TFLOP/s on selected blocks. Errors are relative, against fp64."
)


def heading(entry: Mapping[str, Any]) -> str:
    """What was measured, in one line, with the share of blocks that neighbours have in common."""
    share = entry["shared_fraction"]
    shared = "" if share is None else f", w-neighbours share {100 * share:.0f}% of their blocks"
    sizes = f"{entry['tokens']:,} tokens ({joined(entry['grid'])}), {entry['heads']} heads of {entry['head_dim']}"
    kept = f"{entry['kept_tiles']} of {entry['num_tiles']} tiles kept"
    return f"tile {joined(entry['tile'])}, {entry['lists']} lists{shared}; {sizes}, {entry['dtype']}, {kept}"


def rows(entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and one row for each participant that was timed; empty columns are left out."""
    timed = {name: found for name, found in entry["participants"].items() if _timed(found)}
    used = [(key, title) for key, title in COLUMNS if any(f"{key}_ms" in found for found in timed.values())]
    header = ("", *(text for _, title in used for text in (title, "x")), "forward TF", "backward TF", "largest error")
    lines = [header]
    for name, found in timed.items():
        cells = [name]
        for key, _ in used:
            cells.append(_number(found.get(f"{key}_ms"), "{:.2f}"))
            cells.append(_number(found.get(f"{key}_ratio"), "{:.2f}"))
        cells += [_number(found.get(f"{key}_tflops"), "{:.0f}") for key in ("forward", "backward")]
        cells.append(_number(max(found["errors"].values(), default=None), "{:.0e}"))
        lines.append(tuple(cells))
    return lines


def remarks(entry: Mapping[str, Any]) -> list[str]:
    """Who failed, who was absent, and what to know about the figures."""
    lines = [f"{name}: absent ({why})" for name, why in entry["absent"].items()]
    for name, found in entry["participants"].items():
        if "failed" in found:
            lines.append(f"{name}: failed ({found['failed']})")
        elif found.get("note"):
            lines.append(f"{name}: {found['note']}")
    return lines


def speedups(data: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, float]:
    """Times of dense attention, measured in the same run on as many tokens, over that of our whole op."""
    ours = entry["participants"].get(OURS, {}).get("op_forward_ms")
    found: dict[str, float] = {}
    for other in data["cases"] if ours else ():
        if all(other[key] == entry[key] for key in ("tokens", "heads", "head_dim", "dtype")):
            for name, one in other["participants"].items():
                if one.get("dense") and "forward_ms" in one:
                    found.setdefault(name, one["forward_ms"] / ours)
    return found


def markdown(data: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """A case as a Markdown table with what stands beside it."""
    text = [f"**{heading(entry)}**", "", markdown_rows(rows(entry))]
    faster = speedups(data, entry)
    if faster:
        text += ["", "Whole op against " + ", ".join(f"{name}: {ratio:.1f}x" for name, ratio in faster.items()) + "."]
    return "\n".join(text)


def markdown_rows(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the header first; the first `left` columns are text, the rest are figures."""
    header, *body = rows
    rule = "|---" * left + "|---:" * (len(header) - left) + "|"
    return "\n".join([_line(header), rule, *map(_line, body)])


def joined(sizes: Sequence[int]) -> str:
    """4x4x8."""
    return "x".join(map(str, sizes))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _timed(found: Mapping[str, Any]) -> bool:
    return "failed" not in found and any(f"{key}_ms" in found for key, _ in COLUMNS)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
