"""Reading and writing image files."""

import os
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_processor import rgb_of_image

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

PathLike = Union[str, "os.PathLike[str]"]


def open_image(path: PathLike) -> Image.Image:
    """An image file, loaded, in its own mode, and turned upright where its metadata says so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as an image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such image file: {path}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {path} as an image: {error}") from error


def read_image(path: PathLike) -> Image.Image:
    """An image file as RGB of 8 bits, turned upright where its metadata says so; see `rgb_of_image`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as an image.
    """
    array = rgb_of_image(open_image(path), str(path))
    return Image.fromarray(array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8))


def image_format(path: PathLike) -> str:
    """The format that a file name's ending stands for, as Pillow names it.

    Raises:
        ValueError: if the ending stands for none that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITABLE_FORMATS:
        raise ValueError(f"{str(path)!r} must end in an image format ({', '.join(WRITABLE_FORMATS)}).")
    return WRITABLE_FORMATS[suffix]


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
