"""Checkpoints of a job: a folder from which an interrupted generation continues to the same bits.

`latents.safetensors` holds the latents of the stage under way, `stage-NNN.safetensors` the frames of a finished one,
`job.json` for people what the job is. Every file is put in place whole and carries the job that it belongs to, so no
order of kills can mix two jobs or leave half a file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bsa_compile.errors import CheckpointError, must
from bsa_compile.files import check_writable, staged, write_text
from bsa_compile.pipelines.longcat.latents import Frames

LATENTS, JOB = "latents.safetensors", "job.json"
_SHOWN = 6


class JobFolder:
    """The checkpoint folder of one job.

    Args:
        folder: made when something is written.
        job: JSON object of everything that determines the result.
        resume: continue from what is there; else it is removed.
        writes: whether this process keeps the folder, or only reads what another one keeps there.

    Raises:
        CheckpointError: what is there belongs to another job or cannot be read.
        UsageError: nothing can be written there.
    """

    def __init__(self, folder: str | Path, job: Mapping[str, Any], *, resume: bool, writes: bool = True) -> None:
        self.folder = Path(folder)
        check_writable(self.folder / JOB, "checkpoint")
        self._job = json.loads(json.dumps(job))  # as it will be read
        self._writes = writes
        if resume:
            for path in kept_files(self.folder):
                self._check(path)
        else:
            self.clear()

    @property
    def found(self) -> bool:
        """Whether there is anything to continue from."""
        return bool(kept_files(self.folder))

    def frames(self, stage: int) -> Frames | None:
        """Frames of a finished stage, or None."""
        path = self.folder / _stage_file(stage)
        if not path.is_file():
            return None
        with _opened(path) as file:
            return file.get_tensor("frames").numpy()

    def put_frames(self, stage: int, frames: Frames) -> None:
        """Keep a finished stage."""
        self._write(_stage_file(stage), {"frames": torch.from_numpy(frames)}, {})

    def latents(self, stage: int) -> tuple[int, Tensor] | None:
        """Steps done and latents of a stage under way, or None."""
        path = self.folder / LATENTS
        if not path.is_file():
            return None
        with _opened(path) as file:
            about = file.metadata()
            return (int(about["step"]), file.get_tensor("latents")) if int(about["stage"]) == stage else None

    def put_latents(self, stage: int, step: int, latents: Tensor) -> None:
        """Keep a stage under way."""
        about = {"stage": str(stage), "step": str(step)}
        self._write(LATENTS, {"latents": latents.detach().cpu().contiguous()}, about)

    def clear(self) -> None:
        """See `clear_folder`."""
        if self._writes:
            clear_folder(self.folder)

    def _check(self, path: Path) -> None:
        with _opened(path) as file:
            text = (file.metadata() or {}).get("job")
        try:
            stored = json.loads(text or "")
        except ValueError:
            todo = "Give another folder, or remove the file."
            raise CheckpointError(must(str(path), "be a checkpoint of a generation", "another file", todo)) from None
        if stored != self._job:
            differs = "; ".join(_differences(stored, self._job)[:_SHOWN])
            todo = "Repeat the call that wrote it, or start anew without resume."
            raise CheckpointError(must(str(self.folder), "be a checkpoint of this job", f"another: {differs}", todo))

    def _write(self, name: str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        if not self._writes:
            return
        if not (self.folder / JOB).is_file():
            write_text(self.folder / JOB, json.dumps(self._job, indent=2) + "\n")
        with staged(self.folder / name) as folder:
            save_file(tensors, folder / name, metadata={"job": json.dumps(self._job), **about})


def clear_folder(folder: Path) -> None:
    """Remove what a `JobFolder` wrote, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for path in [*kept_files(folder), folder / JOB]:
        path.unlink(missing_ok=True)
    for name in (LATENTS, "stage-*.safetensors", JOB):  # left by a kill while a file was being written
        for left in folder.glob(f".{name}.*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def kept_files(folder: Path) -> list[Path]:
    """Finished stages and latents of a stage under way that a `JobFolder` wrote."""
    return [*sorted(folder.glob("stage-*.safetensors")), *folder.glob(LATENTS)]


def _stage_file(stage: int) -> str:
    return f"stage-{stage:03d}.safetensors"


class _opened:
    """`safe_open` whose errors name the file and say what to do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self._path, framework="pt", device="cpu")
            return self._file.__enter__()
        except (OSError, SafetensorError) as exc:
            todo = "Remove it, or start anew without resume."
            raise CheckpointError(must(str(self._path), "be a readable checkpoint", f"an error: {exc}", todo)) from exc

    def __exit__(self, *exc: Any) -> None:
        self._file.__exit__(*exc)


def _differences(stored: Any, wanted: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, one text each."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(stored.keys() | wanted.keys())
        pairs = ((stored.get(k), wanted.get(k), f"{at}.{k}".strip(".")) for k in keys)
        return [text for old, new, name in pairs if old != new for text in _differences(old, new, name)]
    return [f"{at} {stored!r} instead of {wanted!r}"]
