"""Draw the losses of the small model's training, dense and block-sparse.

    python examples/plot_losses.py work/losses.json losses.png

One panel for each phase of the transformer: the loss of single batches, and on clips that training never saw that of
both kinds of attention. Needs the extra `viz`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from bsa_compile.errors import BSACompileError, UsageError, must, require_extra
from bsa_compile.files import check_writable, write_bytes

VALIDATION = {
    "validation_dense": ("dense, unseen clips", "#b4451f"),
    "validation_block_sparse": ("block-sparse, unseen clips", "#16437e"),
}


def read_phases(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Phase -> what was logged, in the order of the steps; without the autoencoder's.

    Raises:
        UsageError: the file cannot be read, or tells of no step of the transformer.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        phases = {name: list(found) for name, found in itertools.groupby(entries, key=lambda entry: entry["phase"])}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        got = f"{type(exc).__name__}: {exc}"
        raise UsageError(must(str(path), "be the losses.json of examples/train_tiny.py", got)) from None
    phases.pop("autoencoder", None)
    if not phases:
        raise UsageError(must(str(path), "tell of steps of the transformer", "none"))
    return phases


def figure(phases: dict[str, list[dict[str, Any]]]) -> Any:
    """A `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("matplotlib", "viz")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4 * len(phases), 3.2), layout="constrained")
    panels = drawn.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for panel, (name, entries) in zip(panels, phases.items(), strict=True):
        panel.plot(*_points(entries, "loss"), color="#b9c3d4", linewidth=0.8, label="batches of training")
        for key, (label, colour) in VALIDATION.items():
            steps, losses = _points(entries, key)
            if steps:
                panel.plot(steps, losses, color=colour, marker="o", markersize=3, label=label)
        panel.set(title=name, xlabel="step", yscale="log")
    panels[0].set_ylabel("loss")
    panels[-1].legend(frameon=False)
    return drawn


def _points(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[key]) for entry in entries if key in entry]
    return [step for step, _ in found], [loss for _, loss in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", type=Path, help="losses.json of examples/train_tiny.py")
    parser.add_argument("picture", type=Path, help=".png or another format of matplotlib's")
    args = parser.parse_args()
    check_writable(args.picture, "picture")
    buffer = io.BytesIO()
    figure(read_phases(args.losses)).savefig(buffer, format=args.picture.suffix.lstrip(".") or "png", dpi=150)
    write_bytes(args.picture, buffer.getvalue())


if __name__ == "__main__":
    try:
        main()
    except BSACompileError as error:
        sys.exit(str(error))
