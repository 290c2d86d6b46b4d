"""What a command is about to write, checked before it works: not over what it reads, nor over what is there unless it was told to."""

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Union


PathLike = Union[str, "os.PathLike[str]"]
Identity = tuple[int, int]


class UnwritableError(OSError):
    """Says which file or folder cannot be written, and why."""


def check_outputs(written: Iterable[tuple[PathLike, bool]], read: Iterable[PathLike], hint: str = "") -> None:
    """
    Refuse to write where something would be lost, or nothing can be written.

    Files are compared by what they are, not by their names: links, hard links, and names that differ in case where that makes no
    difference stand for the same file.

    Args:
        written: files and folders that will be written, and of each whether it may be there already. Of a folder, all that it holds
            counts as written.
        read: files that must stay as they are.
        hint: behind "is there already", in the error's words.

    Raises:
        ValueError: if one is read too, is there already but may not be, or is written twice, or into another.
        UnwritableError: if its folder cannot be written into.
    """
    outputs = [(Path(path), may_be_there) for path, may_be_there in written]
    sources = [path for path in map(Path, read) if path.exists()]
    inputs = {_identity(path): path for path in sources}
    # Folders that hold inputs, at any depth, by where these lie and by what they link to.
    folders_of = {
        folder: path for path in sources for place in (path.absolute(), path.resolve()) for folder in place.parents
    }
    holders = {_identity(folder): path for folder, path in folders_of.items()}
    for path, may_be_there in outputs:
        if not os.path.lexists(path):
            continue
        if path.exists():
            source = inputs.get(_identity(path)) or (holders.get(_identity(path)) if path.is_dir() else None)
            if source is not None:
                raise ValueError(f"{path} must not take the place of its source, {source}")
        if not may_be_there:
            raise ValueError(f"{path} is there already{hint}")
    for folder in {path.absolute().parent for path, _ in outputs}:
        while not folder.exists():
            folder = folder.parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise unwritable(folder, error) from error
    _check_different([path for path, _ in outputs])


def _check_different(paths: list[Path]) -> None:
    seen: dict[str, Path] = {}
    places = {path.resolve(): path for path in paths}
    for path in paths:
        for folder in path.resolve().parents:
            if folder in places:
                raise ValueError(f"{path} would be written into {places[folder]}, which is written as a whole")
        other = seen.setdefault(str(path.resolve()).casefold(), path)
        if other is not path and (other.resolve() == path.resolve() or _ignores_case(path.absolute().parent)):
            raise ValueError(f"{path} would be written twice" + (f", as {other}" if other != path else ""))


def _ignores_case(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    with tempfile.NamedTemporaryFile(dir=folder, prefix="madiff") as file:
        name = Path(file.name)
        return name.with_name(name.name.swapcase()).exists()


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def unwritable(path: PathLike, error: OSError) -> UnwritableError:
    """An error that names a file or folder, of one that names none, or a temporary one. Its `errno` is the system's, if there is one."""
    failure = UnwritableError(f"cannot write {path}: {error.strerror or error}")
    failure.errno = error.errno if error.errno in errno.errorcode else None  # FFmpeg has numbers of its own
    return failure
