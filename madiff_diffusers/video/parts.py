"""Parts of a video: encoded one by one, and read again as one stream of packets.

Every part begins with a key frame and has an encoder of its own, so that its bytes are the same whichever process makes it, and when.
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
from typing import NamedTuple

import av
import numpy as np

from ..files import write_text
from .colour import ColourPath
from .encoding import Encoding


class PartWriter:
    """
    Encoder of frames into one part, which appears as a whole when it is closed.

    Args:
        path: the file that gets the part's packets; `PATH.json`, which is written last, tells the time and size of each. For PNG files,
            a folder, of which `PATH.json` tells the same.
        encoding: how frames are encoded.
        colour: the conversion from RGB to the encoded pixels.
        first: number of the part's first frame in the video, by which PNG files are named.
    """

    def __init__(self, path: Path, encoding: Encoding, colour: ColourPath, first: int):
        self.path, self.encoding, self._colour, self._number = path, encoding, colour, first
        self._last: tuple[np.ndarray, av.VideoFrame] | None = None
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
        if self._last is None or self._last[0] is not array:
            self._last = array, self._converted(array)
        frame = self._last[1]
        if self._is_folder:
            size = (self._temporary / f"{self._number:08d}.png").write_bytes(
                png_bytes(frame, self.encoding.pixel_aspect)
            )
            self._index.append((time, size, True))
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
            assert packet.pts is not None  # Encoders give every packet its time.
            time = int(packet.pts * packet.time_base / self.encoding.time_base)
            self._index.append((time, packet.size, packet.is_keyframe))

    def close(self) -> None:
        """Finish the part."""
        if not self._is_folder:
            self._keep(self._stream.encode(None))
            self._file.flush()
            os.fsync(self._file.fileno())  # a rename may reach the disk before the bytes
            self._file.close()
            self._output.close()  # else it and its stream keep each other, and the encoder's memory and threads
        elif self.path.is_dir():  # not complete, as after a power failure
            shutil.rmtree(self.path)
        os.replace(self._temporary, self.path)
        write_text(index_path(self.path), json.dumps(self._index))

    def abandon(self) -> None:
        """Remove what has been written."""
        if self._is_folder:
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # A full disk has raised its error before.
                self._file.close()
            self._output.close()
            self._temporary.unlink(missing_ok=True)


def png_bytes(frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> bytes:
    """The bytes of a PNG file with all bits of a frame's pixels, of which VideoFrame.save would keep 8, and with their aspect."""
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = (
        frame.width,
        frame.height,
        frame.format.name,
        Fraction(1),
    )
    if pixel_aspect is not None:
        # FFmpeg writes the aspect as the numbers of pixels to the unit, across and down.
        encoder.sample_aspect_ratio = 1 / pixel_aspect
    frame.pts = None
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def index_path(part: Path) -> Path:
    """The file that tells the time and size of each packet, or PNG file, of a part."""
    return part.with_name(part.name + ".json")


def is_complete(part: Path) -> bool:
    """Whether a part has been written to its end."""
    try:
        sizes = [each.stat().st_size for each in (part.iterdir() if part.is_dir() else [part])]
        return sum(sizes) == sum(size for _, size, _ in read_index(part)) > 0
    except (OSError, ValueError):  # not there, or cut off, as a power failure leaves what the disk had not got yet
        return False


class PacketTime(NamedTuple):
    """
    The time of a packet, in units of the encoding's `time_base`.

    Args:
        shown: when its frame is shown.
        decoded: when it is decoded.
        duration: how long its frame is shown.
    """

    shown: int
    decoded: int
    duration: int


def joined_packets(parts: Sequence[Path], end: int) -> Iterator[tuple[av.Packet, PacketTime]]:
    """
    The packets of all parts in the order in which they are decoded.

    Args:
        parts: all parts of a video, in order.
        end: when its last frame ends, in units of the encoding's `time_base`.

    Yields:
        a packet, and its time; times of decoding continue from part to part.
    """
    delay = 0
    for index in map(read_index, parts):
        ranks = {time: rank for rank, time in enumerate(sorted(time for time, _, _ in index))}
        delay = max([delay, *(place - ranks[time] for place, (time, _, _) in enumerate(index))])
    # A frame is decoded when the frame `delay` places before it is shown. The first `delay` frames are decoded before any is shown: so long
    # before that the times of decoding span as much as those of showing, since some programs tell the length of a file by them.
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
                packet.is_keyframe = is_key
                yield packet, PacketTime(time, next(decoded), ends[time] - time)


def _shown_times(parts: Sequence[Path]) -> Iterator[int]:
    for part in parts:
        yield from sorted(time for time, _, _ in read_index(part))


def read_index(part: Path) -> list[tuple[int, int, bool]]:
    """For each packet of a part, when its frame is shown, how many bytes it has, and whether it is a key frame."""
    return json.loads(index_path(part).read_text(encoding="utf-8"))
