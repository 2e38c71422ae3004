"""Makes the tables of results in README.md from benchmarks/results/*.json.

    python benchmarks/readme_tables.py           # rewrite what stands between the markers
    python benchmarks/readme_tables.py --check   # exit with 1 if that would change anything

A marker names a file, and a case of it if it is a comparison with peers; files of `attend.py`, `dit_step.py`,
`quality.py` and `parallel.py` have one table each:

    <!-- results: 2026-01-31-h100-peers.json | tile 4x4x4, gate lists -->
    (made by this script)
    <!-- end of results -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from bsa_compile.benchmarking import model_tables, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"(<!-- results: (?P<file>\S+)(?: \| (?P<case>.+?))? -->\n).*?(<!-- end of results -->)", re.DOTALL)


def rewritten(text: str, results: Path = RESULTS) -> str:
    """The text with what stands between its markers made anew.

    Raises:
        SystemExit: there is no marker, or one names a file or case that is not there.
    """
    if not MARKER.search(text):
        sys.exit("the text has no line '<!-- results: FILE -->' followed by '<!-- end of results -->'")
    return MARKER.sub(lambda found: f"{found[1]}{table(results, found['file'], found['case'])}\n{found[4]}", text)


def table(results: Path, file: str, case: str | None) -> str:
    """Markdown of a file of results, or of one case of it."""
    try:
        data = json.loads((results / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        sys.exit(f"a marker names {file!r}, which is not in {results}")
    makers = {"dit_step": model_tables.dit_step, "quality": model_tables.quality, "parallel": model_tables.parallel}
    made = makers.get(data.get("kind"))
    if made is not None:
        return f"{made(data)} {source(data, file)}"
    if "cases" not in data:
        return kernels_table(data, file)
    entry = next((entry for entry in data["cases"] if entry["name"] == case), None)
    if entry is None:
        names = "; ".join(entry["name"] for entry in data["cases"])
        sys.exit(f"a marker names the case {case!r}, which {file!r} has not. Its cases: {names}")
    return f"{tables.markdown(data, entry)}\n\n{data['legend']} {source(data, file)}"


def source(data: dict[str, Any], file: str) -> str:
    """Where, when and with what it was measured."""
    versions = ", ".join(
        f"{name} {v}" for name, v in data["versions"].items() if v and name not in ("platform", "numpy")
    )
    return f"{data['device']['name']}, {data['date']}; {versions} ([figures]({link(file)}))."


def kernels_table(data: dict[str, Any], file: str) -> str:
    """Markdown of what `benchmarks/attend.py` wrote."""
    setting = data["setting"]
    grid, tile = ("x".join(map(str, setting[name])) for name in ("grid", "tile"))
    lines = [("what", "ms", "TFLOP/s", "dense cuDNN takes")]
    for name, row in data["times"].items():
        cells = (f"{row[key]:{form}}" if key in row else "" for key, form in (("tflops", ".0f"), ("speedup", ".1f")))
        tflops, speedup = cells
        lines.append((name, f"{row['ms']:.2f}", tflops, speedup + "x" if speedup else ""))
    about = f"{setting['device']}, torch {setting['torch']}, triton {setting['triton']}; grid {grid}, tile {tile}"
    about += f", {setting['heads']} heads of {setting['head_dim']}, {setting['kept_tiles']} tiles kept"
    return f"{tables.markdown_rows(lines)}\n\n{about} ([figures]({link(file)}))."


def link(file: str) -> str:
    return f"benchmarks/results/{file}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if something would change")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md", help="default: README.md")
    options = parser.parse_args(arguments)
    text = options.file.read_text(encoding="utf-8")
    new = rewritten(text)
    if new == text:
        return 0
    if options.check:
        print(
            f"{options.file.name} is not what its results give: run python benchmarks/readme_tables.py", file=sys.stderr
        )
        return 1
    options.file.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
