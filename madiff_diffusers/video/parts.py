"""Parts of a video: encoded one by one, and read again as one stream of packets.

Every part is encoded by an encoder of its own, from a key frame on, so that a part is the same bytes whoever makes it, and whenever.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..files import write_text
from .colour import ColourPath
from .encoding import Encoding


class PartWriter:
    """
    Encodes frames into one part, which is there once it is closed, or not at all.

    Args:
        path: of the part: its packets; `PATH.json` tells where each begins and when it is shown, and is written last. For PNG files,
            a folder.
        encoding: how.
        colour: conversion of the source's pixels.
        first: number of the part's first frame in the video, which names PNG files.
    """

    def __init__(self, path: Path, encoding: Encoding, colour: ColourPath, first: int):
        self.path, self.encoding, self._colour, self._number = path, encoding, colour, first
        self._last: tuple[np.ndarray | None, Any] = (None, None)
        self._index: list[tuple[int, int, bool]] = []
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._is_folder = encoding.codec == "png"
        if self._is_folder:
            self._temporary.mkdir()
        else:
            self._output, self._stream = encoding.unwritten_stream()
            self._file = open(self._temporary, "wb")

    def write(self, array: np.ndarray, time: int) -> None:
        """Add a frame: `(H, W, 3)` float32 RGB in [0, 1], at a time in units of the encoding's `time_base`."""
        if self._last[0] is not array:
            self._last = array, self._converted(array)
        frame = self._last[1]
        if self._is_folder:
            (self._temporary / f"{self._number:08d}.png").write_bytes(png_bytes(frame, self.encoding.pixel_aspect))
            self._number += 1
            return
        frame.pts, frame.time_base = time, self.encoding.time_base
        self._keep(self._stream.encode(frame))

    def _converted(self, array: np.ndarray) -> av.VideoFrame:
        array = np.rot90(array[:, ::-1] if self.encoding.mirrored else array, self.encoding.turned // 90)
        height, width = self.encoding.size
        padding = (height - array.shape[0], width - array.shape[1])
        if any(padding):
            array = np.pad(array, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="edge")
        return self._colour.from_rgb(array, self.encoding.pixel_format)

    def _keep(self, packets: Sequence[av.Packet]) -> None:
        for packet in packets:
            self._file.write(bytes(packet))
            self._index.append(
                (int(packet.pts * packet.time_base / self.encoding.time_base), packet.size, packet.is_keyframe)
            )

    def close(self) -> None:
        """Finish the part."""
        if not self._is_folder:
            self._keep(self._stream.encode(None))
            self._file.close()
        os.replace(self._temporary, self.path)
        if not self._is_folder:
            write_text(index_path(self.path), json.dumps(self._index))

    def abandon(self) -> None:
        """Leave nothing of it."""
        if self._is_folder:
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # of a full disk, which has been told
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def png_bytes(frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> bytes:
    """A PNG file of a frame's own pixels (VideoFrame.save makes 8 bits of them), and of their width by their height."""
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = (
        frame.width,
        frame.height,
        frame.format.name,
        Fraction(1),
    )
    if pixel_aspect is not None:
        encoder.sample_aspect_ratio = (
            1 / pixel_aspect
        )  # FFmpeg writes it where PNG has pixels to the unit, across and down
    frame.pts = None
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def index_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def is_complete(part: Path) -> bool:
    return part.is_dir() or (part.is_file() and index_path(part).is_file())


def joined_packets(parts: Sequence[Path], end: int) -> Iterator[av.Packet]:
    """
    The packets of all parts in the order in which they are decoded, with times of decoding that fit together.

    Args:
        parts: of one video, in order.
        end: when its last frame ends; all times are in units of the encoding's `time_base`.
    """
    delay = 0
    for index in map(read_index, parts):
        ranks = {time: rank for rank, time in enumerate(sorted(time for time, _, _ in index))}
        delay = max([delay, *(place - ranks[time] for place, (time, _, _) in enumerate(index))])
    # A frame is decoded when the one `delay` places before it is shown, and the first ones ahead of all; so far ahead that the times
    # of decoding span what those of showing do, by which some tell how long a file is.
    last_time = read_index(parts[-1])[-1][0]
    tail = deque(_shown_times(parts), maxlen=delay + 1)
    ahead = end - tail[0] - (next((time for time in tail if time > last_time), end) - last_time)
    first = next(_shown_times(parts))
    decoded = chain((first - ahead + place * ahead // delay for place in range(delay)), _shown_times(parts))
    for part, next_part in zip(parts, [*parts[1:], None]):
        index = read_index(part)
        times = sorted(time for time, _, _ in index)
        ends = dict(
            zip(times, [*times[1:], end if next_part is None else min(time for time, _, _ in read_index(next_part))])
        )
        with open(part, "rb") as file:
            for time, size, is_key in index:
                packet = av.Packet(file.read(size))
                packet.pts, packet.dts, packet.duration, packet.is_keyframe = (
                    time,
                    next(decoded),
                    ends[time] - time,
                    is_key,
                )
                yield packet


def _shown_times(parts: Sequence[Path]) -> Iterator[int]:
    for part in parts:
        yield from sorted(time for time, _, _ in read_index(part))


def read_index(part: Path) -> list[tuple[int, int, bool]]:
    """When each packet of a part is shown, how many bytes it has, and whether decoding can begin there."""
    return json.loads(index_path(part).read_text(encoding="utf-8"))
