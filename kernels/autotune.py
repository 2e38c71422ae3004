"""Launch parameters found by trying: `BSA_AUTOTUNE=1` searches on the first call of a shape and remembers on disk.

Off by default: presets (`config.py`) need no trying. `TRITON_AUTOTUNE_ENABLE=0`, by which LongCat's users skip the
tuning of kernels, wins over it. Only the portable Triton kernels are tuned. What was found is kept per GPU model,
Triton version, sources of the kernels and class of shapes, in `BSA_CACHE_DIR` or the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from bsa_compile.errors import UsageError, must
from bsa_compile.kernels import config
from bsa_compile.kernels.config import Launch, Path, Triple

ASK, REFUSE, FOLDER = "BSA_AUTOTUNE", "TRITON_AUTOTUNE_ENABLE", "BSA_CACHE_DIR"
PORTABLE = ("box", "pointer")  # the paths of the kernels that have launch parameters to tune
BLOCKS = (16, 32, 64, 128)
WARPS = ((4, None), (4, 168), (8, None))  # with the cap on registers that may go with them
STAGES = (1, 2, 3)
WARM_UP_MS, MEASURE_MS = 5, 25

log = logging.getLogger("bsa_compile.kernels")
_found: dict[tuple[str, str], Launch] = {}


def enabled() -> bool:
    """Whether the environment asks for a search and does not forbid it.

    Raises:
        UsageError: `BSA_AUTOTUNE` is neither 0 nor 1.
    """
    asked = os.environ.get(ASK, "")
    if asked not in ("", "0", "1"):
        raise UsageError(must(ASK, "be 0 or 1", repr(asked)))
    return asked == "1" and os.environ.get(REFUSE) != "0"


def shape_class(
    kernel: str,
    path: Path,
    q: Tensor,
    k: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    layout: str,
    capacity: int,
) -> str:
    """What the best launch depends on, as a key: sizes that vary from call to call count by their power of two."""
    facts = {
        "kernel": kernel,
        "path": path.name,
        "dtype": str(q.dtype).removeprefix("torch."),
        "head_dim": q.shape[-1],
        "tiles": f"{_x(tile_q)}/{_x(tile_k)}",
        "partial": f"{int(not config.divides(grid_q, tile_q))}{int(not config.divides(grid_k, tile_k))}",
        "layout": layout,
        "heads": config.next_power_of_two(q.shape[0] * q.shape[1]),
        "group": q.shape[1] // k.shape[1],
        "query_tiles": config.next_power_of_two(config.num_tiles(grid_q, tile_q)),
        "kept": config.next_power_of_two(capacity),
    }
    return " ".join(f"{name}={value}" for name, value in facts.items())


def launch_for(key: str, path: Path, device: torch.device, run: Callable[[Launch], Any]) -> Launch | None:
    """The launch to use instead of the preset: remembered, or searched for now; None for the preset.

    Args:
        key: from `shape_class`.
        path: what the preset chose.
        device: where it runs; nothing is searched for on a CPU or while a CUDA graph is captured.
        run: makes the call with a launch.
    """
    if not enabled() or path.name not in PORTABLE or device.type != "cuda":
        return None
    known = remembered(key, device)
    if known is not None or torch.cuda.is_current_stream_capturing():
        return known
    best, times = search(path.launch, lambda launch: _milliseconds(run, launch))
    if not math.isfinite(times[best]):
        return None  # nothing ran, for want of memory say: another call may search again
    log.info("tuned %s: %s, %.3f ms (preset %.3f ms)", key, best, times[best], times.get(path.launch, float("nan")))
    file = cache_file(device)
    _found[str(file), key] = best
    _remember(file, key, best, times[best], times.get(path.launch))
    return best


def explain(key: str, path: Path, device: torch.device) -> str:
    """Where the launch of a call comes from, in one clause; searches for nothing."""
    if path.name not in PORTABLE:
        return "preset: this kernel has nothing to tune"
    if os.environ.get(REFUSE) == "0":
        return f"preset: {REFUSE}=0"
    if not enabled():
        return f"preset: {ASK}=1 would search"
    known = remembered(key, device)
    return "preset until its first call, which searches" if known is None else f"tuned: {cache_file(device)}"


def remembered(key: str, device: torch.device) -> Launch | None:
    """What was found for a class of shapes, in this process or an earlier one."""
    file = cache_file(device)
    known = _found.get((str(file), key))
    if known is None:
        known = _launch(_read(file).get(key))
        if known is not None:
            _found[str(file), key] = known
    return known


def search(preset: Launch, measure: Callable[[Launch], float | None]) -> tuple[Launch, dict[Launch, float]]:
    """Vary one parameter after the other, starting from the preset, and keep what is fastest.

    Args:
        preset: where to start; it is what comes back if nothing runs.
        measure: milliseconds of a launch, None for one that does not fit the GPU.

    Returns:
        The fastest launch and the times of all that ran.
    """
    times: dict[Launch, float] = {}
    tried: set[Launch] = set()
    best = preset

    def attempt(launches: Iterator[Launch]) -> None:
        nonlocal best
        for launch in launches:
            if launch in tried:
                continue
            tried.add(launch)
            ms = measure(launch)
            if ms is not None:
                times[launch] = ms
                if ms < times.get(best, float("inf")):
                    best = launch

    attempt(iter((preset,)))
    start = best
    blocks = [(q, k) for q in _near(start.block_q) for k in _near(start.block_k)]
    attempt(dataclasses.replace(start, block_q=q, block_k=k) for q, k in blocks)
    start = best
    attempt(dataclasses.replace(start, num_warps=warps, max_registers=cap) for warps, cap in WARPS)
    start = best
    attempt(dataclasses.replace(start, num_stages=stages) for stages in STAGES)
    times.setdefault(best, float("inf"))
    return best, times


@functools.cache
def _cache_file(folder: str, gpu: str) -> File:
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return File(folder) / "autotune" / f"{name}-triton-{config.triton_version() or 'unknown'}-{sources_digest()}.json"


def cache_file(device: torch.device) -> File:
    """Where launches for this GPU model, Triton and these sources are kept."""
    folder = os.environ.get(FOLDER)
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(base, "bsa_compile")
    return _cache_file(folder, torch.cuda.get_device_name(device))


@functools.cache
def sources_digest() -> str:
    """Changes whenever a kernel's source does."""
    digest = hashlib.sha256()
    for file in sorted(File(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _milliseconds(run: Callable[[Launch], Any], launch: Launch) -> float | None:
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(launch), warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median"))
    except Exception as exc:  # too much shared memory, or a block that the kernel cannot be compiled for
        log.debug("%s does not run: %s", launch, exc)
        return None


def _near(block: int) -> list[int]:
    return [b for b in BLOCKS if block // 2 <= b <= 2 * block]


def _read(file: File) -> dict[str, Any]:
    """The file's launches; nothing where it is missing or unreadable, which a search then replaces."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _launch(entry: Any) -> Launch | None:
    try:
        launch = Launch(**entry["launch"])
    except (KeyError, TypeError):
        return None
    sizes: Sequence[Any] = (launch.block_q, launch.block_k, launch.num_warps, launch.num_stages)
    return launch if all(isinstance(size, int) and size > 0 for size in sizes) else None


def _remember(file: File, key: str, launch: Launch, ms: float, preset_ms: float | None) -> None:
    """Add to the file: readers see the old or the new one. A folder that cannot be written is no error, only slow."""
    entry = {"launch": dataclasses.asdict(launch), "ms": ms, "preset_ms": preset_ms}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as out:
                json.dump({**_read(file), key: entry}, out, indent=1)
            os.replace(temporary, file)
        except BaseException:
            File(temporary).unlink(missing_ok=True)
            raise
    except OSError as exc:
        log.warning("tuned launches are not kept for the next process: %s", exc)


def _x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
