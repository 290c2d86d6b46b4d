"""Properties that a source has besides plain pixels, as keys of `properties.PROPERTIES`; and its metadata of HDR10."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

from ..properties import PROPERTIES, found_in_image
from .analysis import Analysis
from .colour import is_rgb
from .decoding import Source, main_stream
from .encoding import Display, Hdr10
from .ffmpeg import has_side_data, side_data
from .muxing import carried_metadata


# FFmpeg's numbers of side data, of its AVFrameSideDataType.
_MASTERING_DISPLAY, _LIGHT_LEVEL = 11, 14

# Primaries and transfers that are not told, or are those of BT.709 or sRGB, which all players assume.
_USUAL_PRIMARIES, _USUAL_TRANSFERS = (1, 2), (1, 2, 6, 13, 14, 15)


def found_in_video(source: Source, analysis: Analysis) -> set[str]:
    """
    Find the properties of a source.

    Args:
        source: the source.
        analysis: the source's.

    Returns:
        keys of `properties.PROPERTIES`.
    """
    tags, is_yuv = analysis.tags, not is_rgb(av.VideoFormat(analysis.pixel_format))
    usual_matrix = (1,) if analysis.size[0] >= 720 else (5, 6)
    told = {
        "transparency": analysis.is_transparent,
        "orientation": analysis.mirrored or analysis.rotation,
        "pixel aspect": analysis.pixel_aspect is not None,
        "matrix": is_yuv
        and (
            tags.matrix not in (2, *usual_matrix) or (tags.range == 2 and not analysis.pixel_format.startswith("gray"))
        ),
        "primaries": tags.primaries not in _USUAL_PRIMARIES or tags.transfer not in _USUAL_TRANSFERS,
    }
    found = {key for key, is_there in told.items() if is_there}
    return found | (_of_file(source) if source.images is None else _of_images(source))


def _of_images(source: Source) -> set[str]:
    found: set[str] = set()
    for path in source.images or []:
        try:
            with Image.open(path) as image:
                found |= found_in_image(image)
        except Exception:  # Pillow raises errors of any kind at unknown files, which FFmpeg has read or told of.
            continue
    return found - {"orientation"}  # Images are turned when they are read.


def _of_file(source: Source) -> set[str]:
    with source.open() as container:
        main = main_stream(container, source.path)
        others = [stream for stream in container.streams if stream.index != main.index]
        kinds = [stream.type for stream in others]
        chapters = container.chapters()
        # In files of the MP4 family, chapters are a stream of data too.
        data = kinds.count("data") - (bool(chapters) and "mp4" in container.format.name)
        told = {
            "sound": "audio" in kinds,
            "subtitles": "subtitle" in kinds,
            "attached": "attachment" in kinds or "video" in kinds,
            "data": data > 0,
            "chapters": bool(chapters),
            "metadata": bool(carried_metadata(container.metadata)),
            "alpha stream": "1" in (main.metadata.get("alpha_mode"), main.metadata.get("ALPHA_MODE")),
            "timecode": "timecode" in map(str.lower, (*container.metadata, *main.metadata)),
            "stereo tag": "stereo_mode" in main.metadata,
        }
    found = {key for key, is_there in told.items() if is_there}
    frame = _first_frame(source)
    found |= set() if frame is None else found_in_frame(frame)
    return found - {"stereo"} if "stereo tag" in found else found


def _first_frame(source: Source) -> av.VideoFrame | None:
    """The first frame that can be decoded. It is read by another `Source`, so that this one keeps its counts of damage."""
    return next((frame for _, frame in Source(source.path).frames(skip_damage=True)), None)


def hdr10_of(source: Source) -> Hdr10 | None:
    """The metadata of HDR10 that a video begins with, if it has any."""
    if source.images is not None:
        return None
    frame = _first_frame(source)
    if frame is None:
        return None
    display = _display_of(frame)
    light = side_data(frame, _LIGHT_LEVEL) or bytes(8)
    most, most_mean = np.frombuffer(light, np.uint32)[:2].tolist()
    return Hdr10(display, most, most_mean) if display or most or most_mean else None


def _display_of(frame: av.VideoFrame) -> Display | None:
    display = side_data(frame, _MASTERING_DISPLAY)
    if display is None:
        return None
    # The numbers are numerators and denominators of x and y of three primaries and the white point, and of the least and most light; and
    # whether colours and light are told.
    *numbers, has_primaries, has_luminance = np.frombuffer(display, np.int32).tolist()
    if not (has_primaries and has_luminance) or 0 in numbers[1::2]:
        return None
    fractions = [Fraction(*pair) for pair in zip(numbers[::2], numbers[1::2])]
    return Display(tuple(fractions[:8]), fractions[8], fractions[9])


def found_in_frame(frame: av.VideoFrame) -> set[str]:
    """Keys of `properties.PROPERTIES` whose side data a frame carries."""
    return {
        key
        for key, each in PROPERTIES.items()
        if key != "orientation" and any(has_side_data(frame, kind) for kind in each.side_data)
    }
