"""Videos of the small trained model, block-sparse against dense: PSNR, SSIM, captions that come true, time.

    python benchmarks/quality.py --json quality.json
    python benchmarks/quality.py --sparsity 0.9375 --captions 4 --seeds 1

Every policy makes the same videos: a number of captions, each with a number of seeds. Frames are compared with those of
the dense video of the same caption and seed; a judge that is no network says of every video, dense ones included,
whether colour, shape and motion are what the caption says. Sparsity 0 runs the block-sparse kernels over all tiles: how
far it is from dense is what rounding alone does. How far two dense videos of one caption and different seeds are from
each other is told for comparison.

The JSON is written after every policy. Policies that the file holds already from the same device, versions, captions
and seeds stay, so that several runs fill one file; dense is run each time, as the others are compared with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import bsa_compile
from bsa_compile import BSAPolicy
from bsa_compile.benchmarking import results
from bsa_compile.commands import common, console
from bsa_compile.errors import BSACompileError, UsageError, must
from bsa_compile.files import check_writable
from bsa_compile.grid import num_tiles
from bsa_compile.metrics import psnr, ssim

SPARSITIES = (0.0, 0.5, 0.75, 0.875, 0.9375, 0.96875)
THRESHOLDS = (0.9, 0.95)
DENSE = "dense"
COUNTING = "counting"
COUNTED = 4
"""Videos by which the tiles are counted that a threshold keeps."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    """What one generation gave.

    Attributes:
        frames: uint8 `[T, H, W, 3]`.
        seconds: of the denoising.
        effective_sparsity: share of the pairs of tiles that were skipped; None where it is not known.
        facts: sizes and numbers that all videos have in common.
    """

    frames: Frames
    seconds: float
    effective_sparsity: float | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        captions: objects with a `text`.
        make: (text, seed, policy) -> a video.
        judge: (frames, caption) -> attribute -> whether the video shows it as the caption says.
        base: the policy whose tiles count.
        model: about the model, for the file.
    """

    captions: Sequence[Any]
    make: Callable[[str, int, BSAPolicy], Video]
    judge: Callable[[Frames, Any], Mapping[str, bool]]
    base: BSAPolicy
    model: dict[str, Any]


# -- the small model: the one place that knows its pipeline, its captions and its judge --------------------------------


class DenoisingClock:
    """Told a pipeline's progress, it takes the time of the denoising loops, whatever else a stage does."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._began = 0.0

    def __call__(self, progress: Any) -> None:
        if progress is None or not progress.total or progress.done not in (0, progress.total):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if progress.done:
            self.seconds += now - self._began
        self._began = now


def small_model(
    folder: Path, device: torch.device, captions: int, caption_seed: int, config: Any, options: Mapping[str, Any]
) -> Subject:
    """The small model's folder with its captions and its judge.

    Args:
        folder: in LongCat's layout.
        device: where to run.
        captions, caption_seed: how many are drawn, and by what.
        config: a `LongCatPipelineConfig`.
        options: of every call, besides prompt, seed and policy.
    """
    from bsa_compile.pipelines.longcat import LongCatPipeline
    from bsa_compile.pipelines.small.captions import sample_captions
    from bsa_compile.pipelines.small.judge import judge

    pipe = LongCatPipeline.from_pretrained(folder, config, device=device)

    def make(text: str, seed: int, policy: BSAPolicy) -> Video:
        clock = DenoisingClock(device)
        made = pipe(prompt=text, seed=seed, policy=policy, progress=clock, **options)
        stages, asked = made.report["stages"], made.report["request"]
        skipped = {stage["effective_sparsity"] for stage in stages if stage["block_sparse_sites"]}
        facts = {
            **dict(zip(("frames", "height", "width"), made.frames.shape, strict=False)),
            "fps": made.fps,
            "steps": asked["num_inference_steps"],
            "guidance_scale": asked["guidance_scale"],
        }
        known = skipped.pop() if len(skipped) == 1 else None
        return Video(made.frames, clock.seconds, known if policy.enabled else 0.0, facts)

    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    return Subject(
        sample_captions(captions, caption_seed),
        make,
        lambda frames, caption: judge(frames).agrees(caption),
        pipe.transformer.checkpoint.policy or BSAPolicy(),
        {"folder": folder.resolve().name, "parameters": parameters, "caption_seed": caption_seed},
    )


# -- what is measured --------------------------------------------------------------------------------------------------


def policies(base: BSAPolicy, sparsities: Sequence[float], thresholds: Sequence[float]) -> dict[str, BSAPolicy]:
    """Name -> policy, the dense one first; the others have the tiles of `base`."""
    by_sparsity = {f"sparsity {s:g}": {"sparsity": s, "cdf_threshold": None} for s in sparsities}
    by_mass = {f"CDF threshold {p:g}": {"sparsity": None, "cdf_threshold": p} for p in thresholds}
    made = {n: dataclasses.replace(base, enabled=True, **by) for n, by in {**by_sparsity, **by_mass}.items()}
    return {DENSE: BSAPolicy.dense(), **made}


def order(entry: Mapping[str, Any]) -> tuple[int, float]:
    """Where a policy stands in the file: dense, then by sparsity, then by threshold."""
    policy = entry["policy"]
    if entry["name"] == DENSE:
        return 0, 0.0
    return (1, policy["sparsity"]) if policy["cdf_threshold"] is None else (2, policy["cdf_threshold"])


@dataclass
class KeptTiles:
    """Counts what block-sparse attention keeps, as an implementation of attend that has ours do the work."""

    kept: list[Tensor] = field(default_factory=list)
    pairs: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, *rest: Any) -> Any:
        """As `register_attend` wants it."""
        grid_k, tile_k = rest[2:4]
        self.kept.append(counts.sum(dtype=torch.int64))  # no synchronisation here
        self.pairs += counts.numel() * num_tiles(grid_k, tile_k)
        return torch.ops.bsa.attend(q, k, v, counts, indices, *rest, implementation="native")

    @property
    def effective_sparsity(self) -> float | None:
        """Share of all pairs of tiles that were skipped, None before the first call."""
        return 1 - sum(map(int, self.kept)) / self.pairs if self.pairs else None


@contextlib.contextmanager
def counting() -> Iterator[KeptTiles]:
    """Count in policies with `attend="counting"`."""
    tiles = KeptTiles()
    bsa_compile.register_attend(COUNTING, tiles.attend, replace=True)
    yield tiles


def counted_sparsity(subject: Subject, policy: BSAPolicy, jobs: Sequence[tuple[int, int]]) -> float | None:
    """Effective sparsity over the first videos once more, for a policy of which only the data tell."""
    with counting() as tiles:
        for caption, seed in jobs[:COUNTED]:
            subject.make(subject.captions[caption].text, seed, dataclasses.replace(policy, attend=COUNTING))
    return tiles.effective_sparsity


def measure(
    subject: Subject,
    name: str,
    policy: BSAPolicy,
    jobs: Sequence[tuple[int, int]],
    dense: dict[tuple[int, int], Frames],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make all videos of a policy.

    Args:
        subject: what is measured.
        name: of the policy.
        policy: what runs.
        jobs: index of a caption and seed of each video.
        dense: frames by job; filled by the dense policy, compared with by the others.
        say: told what is being done.

    Returns:
        The policy's entry in the file, and what all videos have in common.
    """
    say(f"{name}: compiling")
    first, seed = jobs[0]
    video = subject.make(subject.captions[first].text, seed, policy)  # not counted: it compiles
    seconds, ratios, similarities = [], [], []
    right: dict[str, list[bool]] = {}
    said = time.monotonic()
    for number, job in enumerate(jobs, 1):
        caption = subject.captions[job[0]]
        video = subject.make(caption.text, job[1], policy)
        seconds.append(video.seconds)
        if policy.enabled:
            ratios.append(psnr(video.frames, dense[job]))
            similarities.append(ssim(video.frames, dense[job]))
        else:
            dense[job] = video.frames
        agrees = subject.judge(video.frames, caption)
        for attribute, answer in {**agrees, "all": all(agrees.values())}.items():
            right.setdefault(attribute, []).append(bool(answer))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"{name}: {number} of {len(jobs)} videos")
    skipped = video.effective_sparsity
    if policy.enabled and skipped is None:
        say(f"{name}: counting the tiles that it keeps")
        skipped = counted_sparsity(subject, policy, jobs)
    entry = {
        "name": name,
        "policy": policy.to_dict(),
        "effective_sparsity": skipped,
        "psnr": results.spread(ratios) if policy.enabled else None,
        "ssim": results.spread(similarities) if policy.enabled else None,
        "same_as_dense": ratios.count(float("inf")),
        "accuracy": {attribute: results.share(sum(found), len(found)) for attribute, found in right.items()},
        "seconds": results.spread(seconds),
        "videos": {
            "psnr": ratios,
            "ssim": similarities,
            "seconds": seconds,
            "right": {attribute: "".join("01"[answer] for answer in found) for attribute, found in right.items()},
        },
    }
    return entry, video.facts


def other_seed(dense: Mapping[tuple[int, int], Frames]) -> dict[str, Any] | None:
    """How far dense videos of one caption and two seeds are from each other; None where each has one seed."""
    pairs = [(a, b) for a, b in itertools.combinations(sorted(dense), 2) if a[0] == b[0]]
    if not pairs:
        return None
    metrics = (("psnr", psnr), ("ssim", ssim))
    return {name: results.spread([metric(dense[a], dense[b]) for a, b in pairs]) for name, metric in metrics}


def run(
    data: dict[str, Any],
    subject: Subject,
    chosen: Mapping[str, BSAPolicy],
    path: Path | None,
    say: Callable[[str], None],
) -> None:
    """Measure all policies, dense first; say so and write the JSON after each.

    Args:
        data: what will be written; `captions`, `seeds` and `policies` are there.
        subject: what is measured.
        chosen: name -> policy, the dense one first.
        path: the JSON file, if any.
        say: told what is being done.
    """
    jobs = [(caption, seed) for caption in range(len(subject.captions)) for seed in data["seeds"]]
    dense: dict[tuple[int, int], Frames] = {}
    for name, policy in chosen.items():
        entry, facts = measure(subject, name, policy, jobs, dense, say)
        data["video"] = facts
        if name == DENSE:
            data["other_seed"] = other_seed(dense)
        data["policies"] = results.put_row(data["policies"], entry, order)
        if path is not None:
            console.put_json(data, str(path))
        say(f"{name}: {told(entry)}")


def told(entry: Mapping[str, Any]) -> str:
    """An entry in one line."""
    parts = []
    for name, form in (("psnr", "PSNR {:.2f} dB"), ("ssim", "SSIM {:.4f}")):
        if entry[name] is not None and entry[name]["mean"] is not None:
            parts.append(form.format(entry[name]["mean"]))
    parts += [f"{name} {found['right']}/{found['of']}" for name, found in entry["accuracy"].items()]
    if entry["effective_sparsity"] is not None:
        parts.append(f"skipped {100 * entry['effective_sparsity']:.1f}%")
    return ", ".join([*parts, f"{entry['seconds']['mean']:.2f} s a video"])


def option(text: str) -> tuple[str, Any]:
    """`name=value`, the value in JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must have a JSON value, got {value!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=common.SMALL_MODEL, help="default: the package's small model")
    parser.add_argument("--captions", type=int, default=16, help="how many (default: 16)")
    parser.add_argument("--seeds", type=int, default=2, help="videos of each caption (default: 2)")
    parser.add_argument("--caption-seed", type=int, default=1_000_000, help="draws the captions")
    parser.add_argument("--sparsity", type=float, action="append", help="may be repeated")
    parser.add_argument("--cdf-threshold", type=float, action="append", help="may be repeated")
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
    parser.add_argument("--backend", default="auto", help="as in optimize; default: inductor where it can compile")
    parser.add_argument("--mode", help="of torch.compile, for dense and block-sparse alike; default: none")
    parser.add_argument("--option", type=option, action="append", default=[], help="NAME=VALUE for the pipeline's call")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("captions", "seeds"):
        if getattr(args, name) < 1:
            raise UsageError(must(f"--{name}", "be at least 1", getattr(args, name)))
    if args.json is not None:
        check_writable(args.json, "--json")
    device = common.resolve_device(args.device)

    from bsa_compile.pipelines.longcat import LongCatPipelineConfig

    backend, note = common.resolve_backend(args.backend, device)
    options, config = dict(args.option), LongCatPipelineConfig(compile_backend=backend, compile_mode=args.mode)
    subject = small_model(args.folder, device, args.captions, args.caption_seed, config, options)
    data: dict[str, Any] = {
        **results.header("quality", device),
        "model": subject.model,
        "backend": backend,
        "mode": args.mode,
        "options": options,
        "captions": [caption.text for caption in subject.captions],
        "seeds": list(range(args.seeds)),
        "note": "psnr (dB) and ssim: against the dense video of the same caption and seed. accuracy: videos that show "
        "what the caption says, with a 95% Wilson interval. seconds: of the denoising. videos: one figure per caption "
        "and seed, the seeds of the first caption first.",
        "video": None,
        "other_seed": None,
        "policies": [],
    }
    results.keep_earlier(data, args.json, "policies", ("model", "backend", "mode", "options", "captions", "seeds"))
    # Whoever names sparsities or thresholds wants no others.
    narrowed = args.sparsity is not None or args.cdf_threshold is not None
    sparsities, thresholds = (args.sparsity or (), args.cdf_threshold or ()) if narrowed else (SPARSITIES, THRESHOLDS)
    chosen = policies(subject.base, sparsities, thresholds)
    print(common.device_line(device), *[note] * bool(note), sep="; ", flush=True)
    run(data, subject, chosen, args.json, lambda text: print(text, flush=True))


if __name__ == "__main__":
    try:
        main()
    except BSACompileError as error:
        sys.exit(str(error))
