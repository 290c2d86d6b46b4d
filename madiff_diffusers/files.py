"""Names of files and their order; files that are written whole or not at all; and outputs that are checked before any work, so that they
replace neither an input nor, unless asked to, a file that is there."""

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union


PathLike = Union[str, "os.PathLike[str]"]
Identity = tuple[int, int]

# Image files that can be written, with their formats as Pillow names them.
WRITABLE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".ppm": "PPM",
}

# Frames of a folder that is read as a video.
IMAGE_SUFFIXES = (
    ".bmp",
    ".dpx",
    ".exr",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)

# Files of a folder that are videos, without a look inside.
VIDEO_SUFFIXES = (
    ".avi",
    ".gif",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ts",
    ".webm",
    ".wmv",
    ".y4m",
)


def natural_order(name: str) -> list[int | str]:
    """A sorting key for names, by which frame2 comes before frame10."""
    # Not by isdigit, which is true of a superscript, too.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def is_clutter(name: str) -> bool:
    """Whether a file's name is one that the desktops of macOS and Windows put into folders that are looked at."""
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith("._")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but such files."""
    return all(is_clutter(path.name) for path in folder.iterdir())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write a file under. At the end, the file takes the place of `path`; after an error, it is
    removed, and `path` is as it was."""
    name = os.fsencode(path.name)
    # The longest names leave no room for more letters.
    short = path.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()
    temporary = path.with_name(f".{short}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made if it is not there. Bytes of file names that are no characters are told as
    `\\udc80` and so on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def filled_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill. At the end, it becomes `path`, which is not there before; after an error, it is removed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}.") as folder:
        filled = Path(folder) / "filled"
        filled.mkdir()
        yield filled
        os.replace(filled, path)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """
    Hold a lock for as long as the context lasts, so that no other process does the same. Nothing is held where there are no locks.

    Args:
        path: a file that is there for so long alone.

    Raises:
        BlockingIOError: if another process, or another context of this one, holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            break
        # Whoever held it may have removed it since it was opened.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


class UnwritableError(OSError):
    """A file or folder that cannot be written; the message says which, and why."""


def check_outputs(written: Iterable[tuple[PathLike, bool]], read: Iterable[PathLike], hint: str = "") -> None:
    """
    Refuse outputs that would destroy something, or that cannot be written.

    Files count as the same whatever their names: by links, by hard links, and by names that differ in case alone where the file system
    ignores case.

    Args:
        written: files and folders that will be written, each with whether it may exist already. All that a folder holds counts as
            written.
        read: files that must stay as they are.
        hint: words that the error puts after "is there already".

    Raises:
        ValueError: if an output is also an input, exists but must not, is written twice, or lies in another output.
        UnwritableError: if the folder of an output cannot be written into, or a name is too long.
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
        try:
            path.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise unwritable(path, error) from error
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
    """The error for `path` that stands for one which names no file, or a temporary one. Its `errno` is the system's, if there is one."""
    failure = UnwritableError(f"cannot write {path}: {error.strerror or error}")
    failure.errno = error.errno if error.errno in errno.errorcode else None  # FFmpeg has numbers of its own
    return failure
