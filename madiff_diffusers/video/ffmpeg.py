"""FFmpeg by way of PyAV: files and their names, reasons of errors, and the side data of frames."""

from fractions import Fraction
from math import atan2, degrees
from pathlib import Path
from typing import Any

import av
import numpy as np


# Settings of files by which tags that are not UTF-8 keep their bytes, as lone surrogates. From PyAV 19 on, they do by themselves.
TAG_SETTINGS: dict[str, Any] = {"metadata_errors": "surrogateescape"} if int(av.__version__.split(".")[0]) < 19 else {}

# FFmpeg's number of the display matrix among the kinds of side data; and a number that is greater than those of all kinds.
_DISPLAY_MATRIX, _SIDE_DATA_KINDS = 6, 64


def file_url(path: Path) -> str:
    """The URL by which FFmpeg opens a file whatever its name is; a name with a colon alone would mean a protocol."""
    return f"file:{path}"


def open_file(path: Path) -> av.container.InputContainer:
    """
    Open a file to read, whatever its name is and in whichever encoding its tags are.

    Raises:
        av.FFmpegError, OSError, ValueError: if FFmpeg cannot.
    """
    return av.open(file_url(path), **TAG_SETTINGS)


def exact(ratio: Any) -> Fraction | None:
    """A ratio of PyAV's as a fraction; None if FFmpeg does not know it. From PyAV 19 on, ratios are of a type whose products are rounded."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else None


def reason(error: Exception) -> str:
    """The reason of an error in words, without the numbers and names that FFmpeg's errors begin and end with."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """The matrix by which players turn a frame, as FFmpeg's nine numbers; None if they do not."""
    data = side_data(frame, _DISPLAY_MATRIX)
    return None if data is None else np.frombuffer(data, dtype=np.int32).tolist()


def turn(matrix: list[int] | None) -> tuple[bool, int]:
    """The turn of a display matrix: whether left and right change places first, and then degrees against the clock."""
    a, b, c, d = (1, 0, 0, 1) if matrix is None else (matrix[0], matrix[1], matrix[3], matrix[4])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(-degrees(atan2(b, a)) / 90) * 90 % 360


def side_data(frame: av.VideoFrame, kind: int) -> bytes | None:
    """
    The side data of one kind that a frame carries, or None.

    PyAV, asked for any kind, fails at kinds that it does not know (EXIF) and frees colour profiles twice. So a filter removes all other
    kinds before PyAV is asked.

    Args:
        frame: the frame.
        kind: FFmpeg's number of the kind, an AVFrameSideDataType.
    """
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))]
    nodes += [graph.add("sidedata", f"mode=delete:type={other}") for other in range(_SIDE_DATA_KINDS) if other != kind]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    found: Any = graph.pull().side_data  # PyAV's annotations do not tell that it has an order
    return bytes(found[0]) if len(found) else None


def has_side_data(frame: av.VideoFrame, kind: int) -> bool:
    """
    Whether a frame carries side data of a kind. As in `side_data`, a filter of FFmpeg finds out.

    Args:
        frame: the frame.
        kind: FFmpeg's number of the kind, an AVFrameSideDataType.
    """
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    graph.link_nodes(source, graph.add("sidedata", f"mode=select:type={kind}"), graph.add("buffersink")).configure()
    graph.push(frame)
    try:
        graph.pull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return False
    return True
