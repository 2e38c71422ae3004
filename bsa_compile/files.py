"""Files that are either complete or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UsageError, must


def check_writable(path: str | os.PathLike[str], name: str = "output") -> Path:
    """Say now, before long work, whether a file can be written there later; nothing is left behind.

    Args:
        path: the file; folders above it may be missing.
        name: what to call it in an error.

    Raises:
        UsageError: it is a folder, or lies where nothing can be written.
    """
    path = Path(path)
    if path.is_dir() or path.name in ("", ".."):
        raise UsageError(must(name, "be a file", f"the folder {str(path)!r}"))
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise UsageError(must(name, "lie in a folder", f"{str(path)!r}, where {str(above)!r} is a file"))
    try:
        with tempfile.TemporaryFile(dir=above):  # permissions alone do not tell of all that can be in the way
            return path
    except OSError as exc:
        got = f"{str(path)!r} ({exc.strerror})"
        raise UsageError(must(name, "lie in a folder that can be written", got)) from None


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that readers see the old content or all of the new; missing folders are made.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def staged(path: str | os.PathLike[str], beside: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write a file of this name into, and others beside it; all take their places when the block ends well.

    Nothing is left of it when the block or a move fails, and what was there stays. Missing folders are made.

    Args:
        path: the file. It is put in place last.
        beside: names of files that belong to it: those of before that the block did not make are removed.

    Raises:
        UsageError: `path` is a folder or cannot be written.
        OSError: a file cannot be made or moved.
    """
    path = check_writable(path, "path")
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield folder
        _take_places(folder, path, beside)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # another has put something there meanwhile
                parent.rmdir()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_places(folder: Path, path: Path, beside: Sequence[str]) -> None:
    """Move what lies in a folder to its places; where one move fails, everything is as before."""
    names = sorted({*(file.name for file in folder.iterdir()), *beside}, key=lambda name: name == path.name)
    old = Path(tempfile.mkdtemp(dir=folder))
    moved: list[tuple[Path, Path]] = []
    try:
        for name in names:
            place = path.parent / name
            if name != path.name and place.is_file():
                os.replace(place, old / name)
                moved.append((old / name, place))
            if (folder / name).exists():
                os.replace(folder / name, place)
                moved.append((place, folder / name))
    except BaseException:
        for now, before in reversed(moved):
            os.replace(now, before)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask
