"""Say of generated videos whether they show what their prompts ask for: colour, shape and motion.

Takes what `bsa-compile generate` writes: videos, each with its report beside it (`out.mp4` and `out.json`). The prompts
must be captions such as the small model was trained on, "a red ball rolls to the left over grass".

Run: python examples/judge_videos.py FILE_OR_FOLDER ... [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bsa_compile.commands import console
from bsa_compile.errors import BSACompileError, UsageError, must
from bsa_compile.pipelines.longcat.video import FORMATS, read_video
from bsa_compile.pipelines.small.captions import parse_caption
from bsa_compile.pipelines.small.judge import judge

ATTRIBUTES = ("colour", "shape", "motion")


def videos(paths: Iterable[Path]) -> list[Path]:
    """The files, and those of the folders that are videos and have a report.

    Raises:
        UsageError: a path is neither.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in FORMATS)
            found += [f for f in files if f.with_suffix(".json").is_file()]
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(must("path", "be a video or a folder of videos", repr(str(path))))
    return found


def judge_file(path: Path) -> dict[str, Any]:
    """The verdict on one video, against the prompt of its report.

    Raises:
        UsageError: a file cannot be read, or the prompt is no caption.
    """
    report = path.with_suffix(".json")
    try:
        prompt = json.loads(report.read_text(encoding="utf-8"))["request"]["prompt"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        got = f"{type(exc).__name__}: {exc}"
        raise UsageError(must(str(report), "be a report of `bsa-compile generate`", got)) from None
    caption = parse_caption(prompt)
    verdict = judge(read_video(path)[0])
    return {"video": str(path), "prompt": prompt, **dataclasses.asdict(verdict), "agrees": verdict.agrees(caption)}


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each video, and how many agree."""
    table = [("video", *ATTRIBUTES, "prompt")]
    for row in rows:
        seen = (f"{row[name] or 'undecided'}{'' if row['agrees'][name] else ' (!)'}" for name in ATTRIBUTES)
        table.append((Path(row["video"]).name, *seen, row["prompt"]))
    counts = [f"{name} {sum(row['agrees'][name] for row in rows)}" for name in ATTRIBUTES]
    counts.append(f"all three {sum(all(row['agrees'].values()) for row in rows)}")
    return f"{console.table(table)}\nof {len(rows)} videos as asked: {', '.join(counts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge all that can be judged; 1 if something could not be, 2 if nothing could."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    rows, failed = [], False
    try:
        for path in videos(args.paths):
            try:
                rows.append(judge_file(path))
            except BSACompileError as exc:
                failed = True
                print(f"{path}: {exc}", file=sys.stderr)
        if not rows:
            raise UsageError(must("path", "hold a video that can be judged", ", ".join(map(str, args.paths))))
    except UsageError as exc:
        print(exc, file=sys.stderr)
        return 2
    if args.json:
        console.put_json(rows, "-")
    else:
        print(as_text(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
