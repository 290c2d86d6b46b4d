"""Reading and writing image files."""

import os
from pathlib import Path
from typing import Union

from PIL import Image, ImageOps, UnidentifiedImageError

PathLike = Union[str, "os.PathLike[str]"]


def read_image(path: PathLike) -> Image.Image:
    """An image file as RGB, turned upright where its metadata says so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as an image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such image file: {path}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {path} as an image: {error}") from error


def image_format(path: PathLike) -> str:
    """The format that a file name's ending stands for, as Pillow names it.

    Raises:
        ValueError: if the ending stands for none that can be written.
    """
    extensions = Image.registered_extensions()
    suffix = Path(path).suffix.lower()
    if extensions.get(suffix) not in Image.SAVE:
        raise ValueError(f"Cannot tell an image format from the ending of {str(path)!r}; use .png, for example.")
    return extensions[suffix]


def write_image(image: Image.Image, path: PathLike) -> None:
    """Write an image under a temporary name beside `path`, then rename it: the file is whole or not there.

    Raises:
        ValueError: if the ending of `path` is no image format.
        OSError: if it cannot be written.
    """
    path = Path(path)
    format_name = image_format(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format=format_name)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
