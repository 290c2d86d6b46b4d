"""Images in order as a source of a video: their names, and each of them as a frame."""

import re
from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from ..files import IMAGE_SUFFIXES, natural_order
from ..image_io import upright
from ..image_processor import rgb_of_image, rgba_of_transparent
from .errors import VideoError
from .ffmpeg import display_matrix, file_url, reason, turn


# What a damaged header must not make us hold: 8192x8192 pixels, and frames that are shown for hours.
MOST_PIXELS = 2**26


def find_images(path: Path) -> tuple[list[Path] | None, list[Path]]:
    """
    The images that a folder or pattern stands for, in the order of the numbers in their names, None for a file; and files beside them
    that are no images.

    Raises:
        VideoError: if there are none, or no such folder.
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
    order = sorted(images, key=lambda each: natural_order(each.name))
    return order, sorted(set(named) - set(images))


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern with `%d`, `%05d`, `*` or `?` stands for a name."""
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    expression = re.sub(r"%(0?)(\d*)d", lambda match: rf"\d{{{match[2]}}}" if match[2] else r"\d+", expression)
    return re.fullmatch(expression, name) is not None


def image_frame(path: Path) -> av.VideoFrame:
    """
    An image file as a frame of RGB, or RGBA where something is not opaque, of 8 or 16 bits, turned upright.

    Raises:
        VideoError: if it cannot be read, or is larger than 8192x8192 pixels.
    """
    try:
        with Image.open(path) as image:
            _check_image_size(path, *image.size)
            if not _is_for_ffmpeg(image):
                return _frame_of(upright(image), path)
    except UnidentifiedImageError:
        pass  # FFmpeg knows some more
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot read {path} as an image: {reason(error)}") from error
    try:
        with av.open(file_url(path)) as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration) as error:
        raise VideoError(f"cannot read {path} as an image: {reason(error)}") from error
    _check_image_size(path, frame.width, frame.height)
    mirrored, rotation = turn(display_matrix(frame))
    if mirrored or rotation:
        array = frame.to_ndarray(format="rgb48le")
        array = np.rot90(array[:, ::-1] if mirrored else array, rotation // 90)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb48le")
    return frame


def _check_image_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise VideoError(f"{path} must have at most 8192x8192 pixels, but has {width}x{height}")


def _is_for_ffmpeg(image: Image.Image) -> bool:
    """Whether Pillow would keep 8 bits of more; of grey, it keeps 16."""
    if image.mode[0] in "IF":
        return False
    settings = [tile.args for tile in image.tile]
    # What Pillow scales down in a PPM file it tells with the greatest value.
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
