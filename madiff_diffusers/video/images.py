"""Images as the frames of a video: their names and order, and each of them decoded."""

import re
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from ..files import IMAGE_SUFFIXES, natural_order
from ..image_io import upright
from ..image_processor import rgb_of_image, rgba_of_transparent
from .colour import opacity
from .errors import VideoError
from .ffmpeg import display_matrix, open_file, reason, turn


# The most pixels of a frame, 8192x8192, so that a damaged header cannot fill the memory.
MOST_PIXELS = 2**26


def find_images(path: Path) -> tuple[list[Path] | None, list[Path]]:
    """
    Find the images that a folder or pattern stands for.

    Returns:
        the images in the order of the numbers in their names, or None for a single file; and the other files that the folder or pattern
        stands for, which are no images.

    Raises:
        VideoError: if there are no images, or there is no such folder.
    """
    folder, pattern = (path, None) if path.is_dir() else (path.parent, path.name)
    if pattern is not None and (path.is_file() or not re.search(r"%\d*d|[*?]", pattern)):
        return None, []
    if not folder.is_dir():
        raise VideoError(f"there is no folder {folder}")
    named = [
        each
        for each in folder.iterdir()
        if not each.name.startswith(".") and not each.is_dir() and (pattern is None or is_named(each.name, pattern))
    ]
    images = [each for each in named if each.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise VideoError(
            f"there are no images ({', '.join(IMAGE_SUFFIXES)}) {'in' if pattern is None else 'named'} {path}"
        )
    return sorted(images, key=lambda each: natural_order(each.name)), sorted(set(named) - set(images))


def is_named(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern with `%d`, `%05d`, `*` or `?`. As where such names are written, a number may have more digits than that."""
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    digits = r"(?:\d{{{0}}}|[1-9]\d{{{0},}})"
    expression = re.sub(r"%0?(\d*)d", lambda match: digits.format(match[1]) if match[1] else r"\d+", expression)
    return re.fullmatch(expression, name) is not None


def image_frame(path: Path) -> av.VideoFrame:
    """
    Decode an image file, turned upright, to a frame of RGB, or of RGBA if something is not opaque, of 8 or 16 bits.

    Raises:
        VideoError: if the file cannot be read, or has more than 8192x8192 pixels.
    """
    try:
        with Image.open(path) as image:
            _check_image_size(path, *image.size)
            if not _is_for_ffmpeg(image):
                return _frame_of(upright(image), path)
    except UnidentifiedImageError:
        pass  # FFmpeg knows more kinds of images.
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot read {path} as an image: {reason(error)}") from error
    try:
        with open_file(path) as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration) as error:
        raise VideoError(f"cannot read {path} as an image: {reason(error)}") from error
    _check_image_size(path, frame.width, frame.height)
    mirrored, rotation = turn(display_matrix(frame))
    if mirrored or rotation:
        pixel_format = "rgb48le" if opacity(frame) is None else "rgba64le"
        array: np.ndarray = frame.to_ndarray(format=pixel_format)
        array = np.rot90(array[:, ::-1] if mirrored else array, rotation // 90)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=pixel_format)
    return frame


def _check_image_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise VideoError(f"{path} must have at most 8192x8192 pixels, but has {width}x{height}")


def _is_for_ffmpeg(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow would cut colours of more than 8 bits to 8 bits; of grey, it keeps 16 bits."""
    if image.mode[0] in "IF":
        return False
    settings = [tile[3] for tile in image.tile]  # a plain tuple before Pillow 11
    # Of a PPM file whose values Pillow scales down, it tells the greatest value.
    is_scaled = image.format == "PPM" and any(
        isinstance(each, tuple) and isinstance(each[-1], int) and each[-1] > 255 for each in settings
    )
    return ";16" in str(settings) or is_scaled


def _frame_of(image: Image.Image, path: Path) -> av.VideoFrame:
    if image.mode[0] in "IF":
        return av.VideoFrame.from_ndarray(
            (rgb_of_image(image, str(path)) * 65535).round().astype(np.uint16), format="rgb48le"
        )
    transparent = rgba_of_transparent(image)
    if transparent is not None:
        return av.VideoFrame.from_ndarray(np.array(transparent), format="rgba")
    return av.VideoFrame.from_ndarray(np.array(image.convert("RGB")), format="rgb24")
