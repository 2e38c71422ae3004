"""Measures every participant on every case: checked against fp64 first, timed in rounds, saved as it goes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..grid import Shape3
from ..timing import measure
from .participants import BACKWARD_ONLY, OURS, Absent, Participant, back, into, lse_back, participants, reason
from .problem import Problem, Setting, relative_error

# Largest relative error against fp64 of what computes in a dtype; a larger one is a wrong result and is not timed.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
MEASURES = ("forward", "backward", "op_forward", "op_backward")
SWEEPS = ("sparsity", "tokens", "kept")
SPARSITIES = (0.5, 0.75, 0.875, 0.96875)
FRAMES = (0.5, 2.0, 4.0)


@dataclass(frozen=True)
class Case:
    """One setting and what is measured on it.

    Attributes:
        name: shown, and unique in a run.
        setting: the attention.
        dense: whether dense participants take part: their times depend on the tokens alone.
        measures: among `MEASURES`.
        sweep: the sweep that it belongs to, "" for none.
    """

    name: str
    setting: Setting
    dense: bool = False
    measures: tuple[str, ...] = MEASURES
    sweep: str = ""


@dataclass
class Run:
    """How a comparison is run, and what came of it so far.

    Attributes:
        device: where.
        repeats: timed calls of a measurement on a CPU; on a GPU a fixed time is filled.
        rounds: how often every measurement is repeated, in turn; the median of the rounds counts.
        budget: seconds after which nothing new is begun.
        save: called with everything known whenever something was added.
        say: called with what is being done.
        data: what came of it, a JSON object.
    """

    device: torch.device
    repeats: int = 5
    rounds: int = 2
    budget: float = math.inf
    save: Callable[[dict[str, Any]], None] = lambda data: None
    say: Callable[[str], None] = lambda text: None
    data: dict[str, Any] = field(default_factory=lambda: {"cases": []})
    started: float = field(default_factory=time.monotonic)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > self.budget


class Lost(Exception):
    """The GPU cannot be used any more in this process."""


def plan(setting: Setting, tiles: Sequence[Shape3], lists: Sequence[str], sweeps: Sequence[str]) -> list[Case]:
    """The cases of a comparison, the most telling ones first.

    Args:
        setting: the base; its tile and lists are replaced.
        tiles: to compare on.
        lists: `gate`, `random` or both.
        sweeps: among `SWEEPS`: over sparsities; over frames at the same sparsity; over frames with as many selected
            tiles as the base.
    """
    cases: list[Case] = []
    for tile in tiles:
        for kind in lists:
            here = replace(setting, tile=tile, lists=kind)
            cases.append(Case(f"tile {_x(tile)}, {kind} lists", here, dense=not cases))
    forward = ("forward", "op_forward")
    for tile in tiles if "sparsity" in sweeps else ():
        for sparsity in SPARSITIES:
            here = replace(setting, tile=tile, lists=lists[0], sparsity=sparsity)
            name = f"tile {_x(tile)}, {lists[0]} lists, sparsity {sparsity:g}"
            cases.append(Case(name, here, measures=forward, sweep="sparsity"))
    for sweep in ("tokens", "kept"):
        for tile in tiles if sweep in sweeps else ():
            for factor in FRAMES:
                frames = max(1, round(setting.grid[0] * factor / tile[0])) * tile[0]
                here = replace(setting, tile=tile, lists=lists[0], grid=(frames, *setting.grid[1:]))
                if sweep == "kept":
                    kept = replace(setting, tile=tile).kept
                    if kept > here.num_tiles:
                        continue
                    here = replace(here, keep=kept)
                name = f"tile {_x(tile)}, {lists[0]} lists, grid {_x(here.grid)}" + (
                    ", same tiles kept" * (sweep == "kept")
                )
                dense = sweep == "tokens" and tile == tiles[0]
                cases.append(Case(name, here, dense=dense, measures=forward, sweep=sweep))
    return cases


def compare(cases: Sequence[Case], run: Run) -> dict[str, Any]:
    """Measure all cases; what fails is recorded and the rest goes on, unless the GPU is lost."""
    run.data.setdefault("cases", [])
    try:
        for case in cases:
            if run.out_of_time:
                run.data.setdefault("left_out", []).append(case.name)
                continue
            run.say(case.name)
            run.data["cases"].append(entry := describe(case))
            measure_case(case, entry, run)
    except Lost as exc:
        run.data["stopped"] = str(exc)
    run.data.pop("doing", None)
    run.save(run.data)
    return run.data


def describe(case: Case) -> dict[str, Any]:
    """What is known of a case before anything runs."""
    setting = case.setting
    return {
        "name": case.name,
        "sweep": case.sweep,
        "grid": list(setting.grid),
        "tile": list(setting.tile),
        "tokens": setting.tokens,
        "heads": setting.heads,
        "head_dim": setting.head_dim,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "lists": setting.lists,
        "kept_tiles": setting.kept,
        "num_tiles": setting.num_tiles,
        "sparsity": 1 - setting.kept / setting.num_tiles,
        "seed": setting.seed,
        "shared_fraction": None,
        "participants": {},
        "absent": {},
    }


def measure_case(case: Case, entry: dict[str, Any], run: Run) -> None:
    """Fill in the entry of a case."""
    problem = Problem(case.setting, run.device)
    entry["shared_fraction"] = problem.shared
    ready: dict[str, Participant] = {}
    for name, make in participants(run.device, case.dense).items():
        if run.out_of_time:
            entry["absent"][name] = "out of time"
            continue
        if name in BACKWARD_ONLY and "backward" not in case.measures:
            continue
        run.data["doing"] = f"{case.name}: preparing and checking {name}"  # for whoever finds the file of a dead run
        run.save(run.data)
        began = time.monotonic()
        try:
            one = make(problem)
            result: dict[str, Any] = {"order": one.order, "dense": one.dense, "note": one.note}
            result["errors"] = check(problem, one, "backward" in case.measures)
        except Absent as exc:
            entry["absent"][name] = str(exc)
            continue
        except Exception as exc:
            entry["participants"][name] = {"failed": reason(exc)}
            _still_there(run.device, name)
            run.save(run.data)
            continue
        result["prepared_s"] = round(time.monotonic() - began, 2)
        entry["participants"][name] = result
        wrong = [f"{key} {error:.1e}" for key, error in result["errors"].items() if not error < _limit(case)]
        if wrong:
            result["failed"] = f"wrong results, relative errors against fp64: {', '.join(wrong)}"
        else:
            ready[name] = one
        run.save(run.data)
    time_all(case, entry, ready, problem, run)


def check(problem: Problem, one: Participant, backward: bool) -> dict[str, float]:
    """Errors against fp64 on sampled rows, relative but for the LSE's.

    Gradients are those of a loss that only sees the sampled rows, whose dk and dv are compared as a whole.
    """
    with torch.no_grad():
        out, lse = one.forward()
        grads = one.backward(into(problem, problem.sampled_grad, one.order)) if backward and one.backward else None
        out = back(problem, out, one.order)
        lse = None if lse is None else lse_back(problem, lse, one.order)
        grads = None if grads is None else tuple(back(problem, x, one.order) for x in grads)  # type: ignore[assignment]
    worst: dict[str, float] = {}
    for truth in problem.truths(one.dense):
        found = {"out": relative_error(out[0, truth.head, truth.rows], truth.out)}
        if lse is not None:
            found["lse"] = float((lse[0, truth.head, truth.rows].double() - truth.lse).abs().max())
        if grads is not None:
            dq, dk, dv = grads
            found["dq"] = relative_error(dq[0, truth.head, truth.rows], truth.dq)
            found["dk"] = relative_error(dk[0, truth.head], truth.dk)
            found["dv"] = relative_error(dv[0, truth.head], truth.dv)
        for key, error in found.items():
            worst[key] = max(worst.get(key, 0.0), error if math.isfinite(error) else math.inf)
    return worst


def time_all(case: Case, entry: dict[str, Any], ready: dict[str, Participant], problem: Problem, run: Run) -> None:
    """Time all that are ready, in rounds, and add milliseconds, TFLOP/s and the ratios to ours."""
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(run.rounds):
        for name, one in list(ready.items()):
            if run.out_of_time and number:
                break
            run.data["doing"] = f"{case.name}: timing {name}, round {number + 1}"
            try:
                for key, call in calls(problem, one, name, case.measures).items():
                    with torch.no_grad():
                        times.setdefault((name, key), []).append(milliseconds(call, run))
            except Exception as exc:
                entry["participants"][name]["failed"] = reason(exc)
                del ready[name]
                _still_there(run.device, name)
            _summarise(entry, times, problem)
            run.save(run.data)


def calls(problem: Problem, one: Participant, name: str, measures: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """What is timed of a participant."""
    found: dict[str, Callable[[], Any]] = {}
    if "forward" in measures and name not in BACKWARD_ONLY:
        found["forward"] = one.forward
    if "backward" in measures and one.backward is not None:
        backward, grad = one.backward, into(problem, problem.grad, one.order)
        found["backward"] = lambda: backward(grad)
    if "op_forward" in measures and one.op_forward is not None and name not in BACKWARD_ONLY:
        found["op_forward"] = one.op_forward
    if "op_backward" in measures and one.op_backward is not None:
        found["op_backward"] = one.op_backward
    return found


def milliseconds(call: Callable[[], Any], run: Run) -> float:
    """Median time of a call; on a GPU with a cold L2 cache each time (triton's `do_bench`)."""
    if run.device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=25, rep=150, return_mode="median"))
    return 1e3 * measure(call, run.device, run.repeats).median


def _summarise(entry: dict[str, Any], times: dict[tuple[str, str], list[float]], problem: Problem) -> None:
    setting = problem.setting
    for (name, key), rounds in times.items():
        found = entry["participants"][name]
        ms = statistics.median(rounds)
        found[f"{key}_ms"], found[f"{key}_rounds_ms"] = ms, rounds
        work = 4 * setting.head_dim * problem.pairs(found["dense"]) * (2.5 if "backward" in key else 1)
        found[f"{key}_tflops"] = work / ms / 1e9
    ours = entry["participants"].get(OURS, {})
    for name, found in entry["participants"].items():
        for key in MEASURES:
            mine = ours.get(f"{key}_ms", ours.get(f"{key.removeprefix('op_')}_ms"))  # our backward reads raster order
            theirs = found.get(f"{key}_ms")
            if key.startswith("op_") and theirs is None and found.get("dense"):
                theirs = found.get(f"{key.removeprefix('op_')}_ms")
            if name != OURS and mine and theirs:
                found[f"{key}_ratio"] = theirs / mine


def _limit(case: Case) -> float:
    return TOLERANCES[case.setting.dtype]


def _still_there(device: torch.device, name: str) -> None:
    """After an error: an illegal access by a kernel makes every later call fail.

    Raises:
        Lost: it does.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as exc:
        raise Lost(f"{name} left the GPU unusable: {reason(exc)}") from exc


def _x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
