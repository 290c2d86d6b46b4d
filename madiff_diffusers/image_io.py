"""Reading and writing image files."""

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from .files import WRITABLE_FORMATS, PathLike, replacing, unwritable
from .image_processor import rgb_of_image, rgba_of_transparent, to_uint8
from .properties import exif_tags, found_in_image, pixel_aspect


# How an image is turned upright, by EXIF's numbers of orientations; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Results are written without loss, or with little.
_SETTINGS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}

# The most pixels per inch that a format has room for; Pillow fails above, or writes another number.
MOST_RESOLUTION = {"JPEG": 65535, "PNG": 5e7, "BMP": 5e7}


class OpenedImage(NamedTuple):
    """
    An image file as it is.

    Args:
        image: loaded, in its own mode, and turned upright where its metadata says so.
        found: keys of `properties.PROPERTIES` for what else the file has.
        profile: colour profile (ICC) for RGB, if it has one.
        resolution: pixels per inch across and down, if it tells them.
    """

    image: Image.Image
    found: set[str]
    profile: bytes | None
    resolution: tuple[float, float] | None


def open_image(path: PathLike) -> OpenedImage:
    """
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as an image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such image file: {path}")
    try:
        with Image.open(path) as file:
            found = found_in_image(file)
            image = upright(file)
            if rgba_of_transparent(image) is not None:
                found.add("transparency")
            profile = file.info["icc_profile"] if "profile" in found else None
            return OpenedImage(image, found, profile, _resolution(file, image.size != file.size))
    except Exception as error:  # which Pillow's readers raise of every kind, at damaged files
        raise ValueError(f"Cannot read {path} as an image: {error}") from error


def _resolution(file: Image.Image, is_on_its_side: bool) -> tuple[float, float] | None:
    if "dpi" in file.info and all(0 < each < math.inf for each in file.info["dpi"]):
        across, down = map(float, file.info["dpi"])  # TIFF's are rationals
    elif (aspect := pixel_aspect(file)) is not None:  # by itself, without inches
        across, down = aspect.denominator, aspect.numerator
    else:
        return None
    return (down, across) if is_on_its_side else (across, down)


def read_image(path: PathLike) -> Image.Image:
    """An image file as RGB of 8 bits, turned upright where its metadata says so; see `rgb_of_image`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as an image.
    """
    return Image.fromarray(to_uint8(rgb_of_image(open_image(path).image, str(path))))


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its metadata says; as it is where they say nothing, or cannot be read."""
    image.load()  # by which some kinds of files are turned already
    orientation = exif_tags(image).get(ExifTags.Base.Orientation)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def image_format(path: PathLike) -> str:
    """The format that a file name's ending stands for, as Pillow names it.

    Raises:
        ValueError: if the ending stands for none that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITABLE_FORMATS:
        raise ValueError(f"{str(path)!r} must end in an image format ({', '.join(WRITABLE_FORMATS)}).")
    return WRITABLE_FORMATS[suffix]


def write_image(
    image: Image.Image, path: PathLike, profile: bytes | None = None, resolution: tuple[float, float] | None = None
) -> None:
    """Write an image, whole or not at all; see `files.replacing`.

    Args:
        profile, resolution: see [`OpenedImage`]; left out where the format has no place for them, or for so large a number.

    Raises:
        ValueError: if the ending of `path` is no image format.
        OSError: if it cannot be written.
    """
    path = Path(path)
    format_name = image_format(path)
    if resolution is not None and max(resolution) > MOST_RESOLUTION.get(format_name, math.inf):
        resolution = None
    settings = {"icc_profile": profile, "dpi": resolution}
    # Not into the file itself: Pillow does not see that a full disk takes only some of the last bytes of a JPEG, BMP, TIFF or PPM.
    whole = io.BytesIO()
    try:
        image.save(
            whole,
            format=format_name,
            **_SETTINGS.get(format_name, {}),
            **{name: value for name, value in settings.items() if value},
        )
        with replacing(path) as temporary:
            temporary.write_bytes(whole.getvalue())
    except (OSError, ValueError) as error:  # of what the format cannot hold, such as more pixels than WEBP's 16383
        raise unwritable(path, error if isinstance(error, OSError) else OSError(str(error))) from error
