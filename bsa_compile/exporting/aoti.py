"""AOTInductor packages of exported programs: compiled ahead of time, loaded by a process with the same surroundings."""

from __future__ import annotations

import itertools
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .. import __version__
from .. import ops as ops  # registers torch.ops.bsa, which a package calls
from ..backend import source_digest
from ..errors import ExportError, must, one_line
from ..files import staged
from ..report import Report
from .program import report_of

_KEY = "bsa_compile"
_LIBRARIES, _LIBSTDCXX = "aot_inductor.custom_op_libs", ":libstdc++.so.6"
_MODEL = "model"  # the name that AOTInductor gives to a package's only model


def package(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a program ahead of time with AOTInductor.

    The package holds machine code for the device that the program's weights and inputs lie on. It calls the ops of
    `bsa_compile` by name, so it needs a Python process that imports them: load it with `load_package`, which checks
    that this process has what the package was made for.

    Args:
        program: what `export` returned.
        path: the file, usually `*.pt2`. It appears when it is complete.
        options: of inductor, as in `torch.compile`.

    Returns:
        `path`.

    Raises:
        UsageError: `program` does not come from `export`, or `path` cannot be written.
        ExportError: inductor cannot compile it here (without a C++ compiler, for one), the library that it made for
            CUDA would crash on loading, or the file cannot be written.
    """
    report = report_of(program)
    path = Path(path)
    about = {"version": __version__, "torch": _release(torch.__version__), "report": report.to_dict()}
    configs = {**(options or {}), "aot_inductor.metadata": {_KEY: json.dumps(about)}}
    if platform.system() == "Linux" and any(x.device.type == "cuda" for x in _tensors(program)):
        # By its file name, since a compiler may have no link to find it by and would take the static one: see
        # `_check_linkage`.
        configs[_LIBRARIES] = [*(configs.get(_LIBRARIES) or ()), _LIBSTDCXX]
    tag = f"bsa.{source_digest()}"
    try:
        with staged(path) as folder, torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            made = _compile(program, folder / f"{path.stem}.pt2", configs)
            _check_linkage(made)
            os.replace(made, folder / path.name)
    except OSError as exc:
        raise ExportError(must("path", "be a file that can be written", f"{str(path)!r} ({exc})")) from exc
    return path


def _compile(program: torch.export.ExportedProgram, path: Path, configs: Mapping[str, Any]) -> Path:
    try:
        # Inductor accepts no other ending than .pt2.
        return Path(
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(configs))
        )
    except Exception as exc:  # inductor raises what its code generation and the C++ compiler raise
        raise ExportError(must("program", "compile with AOTInductor", one_line(exc))) from exc


def _tensors(program: torch.export.ExportedProgram) -> Iterator[torch.Tensor]:
    """Weights, constants and example inputs."""
    found = (program.state_dict.values(), program.constants.values(), tree_leaves(program.example_inputs))
    return (x for x in itertools.chain(*found) if isinstance(x, torch.Tensor))


def _check_linkage(path: Path) -> None:
    """Refuse a CUDA package that would crash its loader.

    Where the C++ compiler finds no shared libstdc++ to link, the package's library holds one of its own, whose symbols
    clash with PyTorch's: constructing the CUDA runner then ends in a segmentation fault inside std::regex. Seen on an
    H100 with torch 2.11, for a package of a single nn.Linear as well.

    Raises:
        ExportError: the library does not depend on libstdc++.
    """
    if _metadata(path).get("AOTI_DEVICE_KEY") != "cuda":
        return
    with zipfile.ZipFile(path) as archive:
        if all(_mentions(archive, name, b"libstdc++.so") for name in archive.namelist() if name.endswith(".so")):
            return
    todo = "Install the compiler's libstdc++.so and package again: PyTorch crashes on loading such packages."
    raise ExportError(must("the C++ compiler", "link libstdc++ dynamically", "a library that contains it", todo))


def _mentions(archive: zipfile.ZipFile, name: str, text: bytes) -> bool:
    """Whether a file of an archive holds a text; read piece by piece, since a library holds all weights."""
    tail = b""
    with archive.open(name) as file:
        while piece := file.read(1 << 20):
            if text in tail + piece:
                return True
            tail = piece[-len(text) :]
    return False


def load_package(path: str | os.PathLike[str]) -> Any:
    """Load what `package` wrote, after a check that this process can run it.

    Args:
        path: the file.

    Returns:
        A callable that takes the inputs of the exported call; its `report` tells of every attention site.

    Raises:
        ExportError: the file is missing or not ours, or this process differs from what it was compiled for: release of
            torch, version of bsa_compile, operating system, processor or GPU.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(must("path", "be a file made by bsa_compile.package", repr(str(path))))
    try:
        metadata = _metadata(path)
        about = json.loads(metadata[_KEY])
    except (RuntimeError, KeyError, ValueError) as exc:  # no archive, another's package, another's key
        reason = " ".join(str(exc).split())[:200]
        raise ExportError(must("path", "be a file made by bsa_compile.package", f"{str(path)!r} ({reason})")) from exc
    for what, wanted, have in _requirements(about, metadata):
        if have != wanted:
            todo = "Package the program again for this machine."
            raise ExportError(must(what, f"be {wanted}, for which the package was compiled", have, todo))
    model = torch._inductor.aoti_load_package(str(path))
    return LoadedPackage(model, Report.from_dict(about["report"]))


def _metadata(path: Path) -> dict[str, str]:
    """What stands in a package besides code; nothing is loaded for it."""
    return torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(path), _MODEL)  # type: ignore[attr-defined]


class LoadedPackage:
    """A compiled model; see `load_package`.

    Attributes:
        report: what was done at every attention site.
    """

    def __init__(self, model: Any, report: Report) -> None:
        self._model = model
        self.report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


def _requirements(about: Mapping[str, Any], metadata: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What must agree: name, wanted, present."""
    device = metadata.get("AOTI_DEVICE_KEY", "cpu")
    found = [
        ("torch", about["torch"], _release(torch.__version__)),
        ("bsa_compile", about["version"], __version__),
        ("the operating system", metadata.get("AOTI_PLATFORM", ""), platform.system().lower()),
        ("the processor", metadata.get("AOTI_MACHINE", ""), platform.machine()),
    ]
    if device == "cuda":
        found.append(("the device", "cuda", "cuda" if torch.cuda.is_available() else "cpu"))
        wanted = metadata.get("AOTI_COMPUTE_CAPABILITY", "")
        if wanted and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            found.append(("the GPU's compute capability", wanted, f"{major}{minor}"))
    return [(what, wanted, have) for what, wanted, have in found if wanted]


def _release(version: str) -> str:
    """2.13.0+cpu and 2.13.1 both are 2.13: AOTInductor's interface changes with the minor version."""
    return ".".join(version.split("+")[0].split(".")[:2])
