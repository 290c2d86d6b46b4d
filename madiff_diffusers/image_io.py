"""Reading and writing image files."""

import os
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 8
                image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {path} as an image: {error}") from error


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
