"""What FFmpeg is told and tells: names of files, reasons of errors, and what frames carry besides pixels."""

from fractions import Fraction
from math import atan2, degrees
from pathlib import Path

import av
import numpy as np


# FFmpeg's number of a display matrix among kinds of side data, and more numbers than it has kinds.
_DISPLAY_MATRIX, _SIDE_DATA_KINDS = 6, 64


def file_url(path: Path) -> str:
    """What FFmpeg takes for a file whatever its name; a colon in it would mean a protocol."""
    return f"file:{path}"


def reason(error: Exception) -> str:
    """What went wrong, without the numbers and names that FFmpeg's errors begin and end with."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """How players turn a frame, as FFmpeg's nine numbers; None if not at all."""
    data = side_data(frame, _DISPLAY_MATRIX)
    return None if data is None else np.frombuffer(data, dtype=np.int32).tolist()


def turn(matrix: list[int] | None) -> tuple[bool, int]:
    """Whether left and right change places first, and then degrees against the clock."""
    a, b, c, d = (1, 0, 0, 1) if matrix is None else (matrix[0], matrix[1], matrix[3], matrix[4])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(-degrees(atan2(b, a)) / 90) * 90 % 360


def side_data(frame: av.VideoFrame, kind: int) -> bytes | None:
    """
    What a frame carries besides pixels.

    PyAV fails at kinds that it does not know (EXIF), and frees colour profiles twice, as soon as it is asked for any kind. So it
    gets to see the frame with none but the one.

    Args:
        kind: FFmpeg's number, of its AVFrameSideDataType.
    """
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1))]
    nodes += [graph.add("sidedata", f"mode=delete:type={other}") for other in range(_SIDE_DATA_KINDS) if other != kind]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    return next((bytes(data) for data in graph.pull().side_data), None)


def has_side_data(frame: av.VideoFrame, kind: int) -> bool:
    """
    Whether a frame carries something of a kind; asked of FFmpeg by a filter, as `reading.side_data` does.

    Args:
        kind: FFmpeg's number, of its AVFrameSideDataType.
    """
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1))
    graph.link_nodes(source, graph.add("sidedata", f"mode=select:type={kind}"), graph.add("buffersink")).configure()
    graph.push(frame)
    try:
        graph.pull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return False
    return True
