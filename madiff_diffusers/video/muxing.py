"""The last step of a video: its parts in one file, beside what the source has besides pictures."""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any

import av

from .analysis import Analysis
from .decoding import Source, main_stream
from .encoding import Encoding
from .ffmpeg import file_url
from .gif import FOR_EVER, assemble_gif, loops_of
from .parts import joined_packets
from .streams import AudioTranscoder, StreamRemuxer


# What containers write by themselves, or what is not true any more.
_OWN_METADATA = (
    "major_brand",
    "minor_version",
    "compatible_brands",
    "encoder",
    "rotate",
    "duration",
    "bps",
    "number_of_",
    "_statistics_",
    "alpha_mode",
)

Timed = tuple[Fraction, int, list[av.Packet]]


def assemble(
    output: Path,
    encoding: Encoding,
    parts: Sequence[Path],
    end: int,
    source: Source,
    analysis: Analysis,
    slow_motion: Fraction,
    audio: str,
    is_partial: bool = False,
) -> list[str]:
    """
    Write a file from parts.

    Args:
        output: to be written.
        encoding: of the parts.
        parts: in order.
        end: when the last frame ends, in units of the encoding's `time_base`.
        source, analysis: where everything else comes from.
        slow_motion: times that the result lasts longer than the source.
        audio: "keep", or "stretch" or "drop" for slow motion.
        is_partial: whether sound and the rest end with the last frame, not with the source's.

    Returns:
        what of the source is not in the file, in words.

    Raises:
        av.FFmpegError, OSError: if it cannot be written.
    """
    if encoding.codec == "gif" or source.images is not None:
        write_pictures(output, encoding, parts, end, loops_of(source))
        return []
    # What a file refuses shows when its header is written: a codec's flavour of sound, mostly, which can be encoded anew.
    attempts = [
        (("audio", "subtitle", "attachment", "video"), False),
        (("audio", "subtitle"), False),
        (("audio", "subtitle"), True),
        (("audio",), True),
        ((), False),
    ]
    for kinds, anew in attempts:
        with source.open() as container, _open(output, encoding) as file:
            muxer = Muxer(file, container, encoding, slow_motion, audio, anew)
            try:
                muxer.add_streams(kinds, main_stream(container, source.path))
            except (av.FFmpegError, ValueError):
                if not kinds:
                    raise
                continue
            muxer.write(parts, end, analysis, is_partial)
            return muxer.notes


def write_pictures(output: Path, encoding: Encoding, parts: Sequence[Path], end: int, loops: int = FOR_EVER) -> None:
    """
    Write a file of nothing but pictures.

    Args:
        output, encoding, parts, end: see `assemble`.
        loops: of a GIF: how often it is shown again.

    Raises:
        av.FFmpegError, OSError: if it cannot be written.
    """
    if encoding.codec == "gif":
        assemble_gif(output, encoding, parts, end, loops)
        return
    with _open(output, encoding) as file:
        for _, _, packets in _video_packets(encoding.add_stream(file), encoding, parts, end, Fraction(0)):
            file.mux(packets)


def _open(output: Path, encoding: Encoding) -> av.container.OutputContainer:
    # "bitexact": without it, Matroska files have random numbers, and the same work gives other bytes.
    options = {"fflags": "+bitexact"}
    if encoding.container.format == "yuv4mpegpipe":  # which calls more than 8 bits experimental
        options["strict"] = "-1"
    if encoding.container.format in ("mp4", "mov"):
        options["movflags"] = "+faststart"
    if (
        encoding.container.format == "avi"
    ):  # it has no times, but would begin with empty frames for sound that begins before 0
        options["avoid_negative_ts"] = "disabled"
    return av.open(file_url(output), "w", format=encoding.container.format, container_options=options)


class Muxer:
    """
    Puts the parts into a file, and beside them what the source has besides pictures.

    Args:
        file: to be written.
        container: the source.
        encoding: of the parts.
        slow_motion, audio: see `assemble`.
        anew: whether all sound is encoded anew.
    """

    def __init__(
        self,
        file: av.container.OutputContainer,
        container: av.container.InputContainer,
        encoding: Encoding,
        slow_motion: Fraction,
        audio: str,
        anew: bool,
    ):
        self.notes: list[str] = []
        self._file, self._container, self._encoding, self._slow_motion, self._audio, self._anew = (
            file,
            container,
            encoding,
            slow_motion,
            audio,
            anew,
        )
        # Time 0 of the result is where the source's first stream begins.
        self._begin = Fraction(container.start_time or 0, av.time_base)
        self._carried: dict[int, Any] = {}

    def add_streams(self, kinds: Sequence[str], main: av.video.stream.VideoStream) -> None:
        """
        Write the file's header.

        Args:
            kinds: of streams to carry.
            main: the source's pictures.

        Raises:
            av.FFmpegError, ValueError: if the file refuses them.
        """
        file, container = self._file, self._container
        if self._encoding.container.format == "yuv4mpegpipe":
            kinds = ()
        self._video = self._encoding.add_stream(file)
        self._video.metadata.update(carried_metadata(main.metadata))
        self._video.disposition = main.disposition
        file.metadata.update(carried_metadata(container.metadata))
        if any(key.startswith("com.") for key in file.metadata) and self._encoding.container.format in ("mp4", "mov"):
            file.container_options["movflags"] = "+faststart+use_metadata_tags"
        chapters = container.chapters()
        for chapter in chapters:
            for when in ("start", "end"):
                chapter[when] = round((chapter[when] - self._begin / chapter["time_base"]) * self._slow_motion)
        file.set_chapters(chapters)
        for stream in container.streams:
            if stream.index != main.index and stream.type != "data":  # chapters are data too
                self._add(stream, kinds, main)
        file.start_encoding()

    def _add(self, stream: av.stream.Stream, kinds: Sequence[str], main: av.video.stream.VideoStream) -> None:
        file, format_name = self._file, self._encoding.container.format
        codec = stream.codec_context.name if stream.codec_context else "of an unknown codec"
        name = f"stream {stream.index} ({stream.type}, {codec})"
        if stream.type == "audio" and self._audio == "drop":
            self.notes.append(f"{name} is left out, as asked")
            return
        if stream.type == "attachment" and stream.type in kinds and format_name == "matroska":
            file.add_attachment(
                stream.metadata.get("filename", "attachment"),
                stream.mimetype or "application/octet-stream",
                stream.data,
            )
            return
        slowed = self._slow_motion != 1
        if (
            stream.type not in kinds
            or stream.type == "attachment"
            or stream.codec_context is None
            or (slowed and stream.type == "video")
        ):
            self.notes.append(f"{name} cannot be kept in {format_name}")
            return
        carry: Any = None
        if stream.type != "audio" or not (slowed or self._anew):
            # Not for a codec that this kind of file does not hold.
            with suppress(ValueError):
                carry = StreamRemuxer(
                    file.add_stream_from_template(stream, opaque=True),
                    self._begin,
                    self._slow_motion,
                    stream.type,
                    format_name,
                )
        if carry is None and stream.type != "audio":
            self.notes.append(f"{name} cannot be kept in {format_name}")
            return
        if carry is None:
            carry = AudioTranscoder(file, stream, self._begin, self._slow_motion)
            if not slowed:
                self.notes.append(
                    f"{name} is encoded anew as {carry.stream.codec_context.name}, because {format_name} does not hold it"
                )
        carry.stream.metadata.update(carried_metadata(stream.metadata))
        carry.stream.disposition = stream.disposition
        self._carried[stream.index] = carry
        apart = abs((stream.start_time or 0) * (stream.time_base or 0) - (main.start_time or 0) * main.time_base)
        if format_name == "avi" and stream.type == "audio" and apart > Fraction(1, 20):
            self.notes.append(
                f"AVI cannot tell that {name} begins {float(apart):.2f} s apart from the pictures: choose another kind of file"
            )

    def write(self, parts: Sequence[Path], end: int, analysis: Analysis, is_partial: bool) -> None:
        """Write everything in the order of time."""
        offset = (
            Fraction(0) if self._encoding.container.steady else (analysis.origin - self._begin) * self._slow_motion
        )
        until = offset + end * self._encoding.time_base if is_partial else None
        pictures = _video_packets(self._video, self._encoding, parts, end, offset)
        for _, _, packets in heapq.merge(pictures, self._other_packets(until), key=lambda timed: timed[:2]):
            self._file.mux(packets)

    def _other_packets(self, until: Fraction | None) -> Iterator[Timed]:
        if not self._carried:
            return
        time = Fraction(0)
        for packet in self._container.demux([self._container.streams[index] for index in self._carried]):
            if packet.dts is not None:
                time = max(time, (packet.dts * packet.time_base - self._begin) * self._slow_motion)
            if until is None or time < until or packet.size == 0:
                yield time, 1, self._carried[packet.stream.index](packet)


def carried_metadata(tags: dict[str, str]) -> dict[str, str]:
    """Without what is not true any more, or is what containers write by themselves."""
    return {key: value for key, value in tags.items() if not key.lower().startswith(_OWN_METADATA)}


def _video_packets(
    stream: av.video.stream.VideoStream, encoding: Encoding, parts: Sequence[Path], end: int, offset: Fraction
) -> Iterator[Timed]:
    unit = encoding.time_base
    if offset:  # times of both in whole numbers, if they are not too large for files
        finer = Fraction(
            gcd(unit.numerator * offset.denominator, offset.numerator * unit.denominator),
            unit.denominator * offset.denominator,
        )
        unit = finer if finer.denominator <= 10_000_000 else unit
    scale, shift = int(encoding.time_base / unit), round(offset / unit)
    for packet in joined_packets(parts, end):
        packet.pts, packet.dts, packet.duration = (
            packet.pts * scale + shift,
            packet.dts * scale + shift,
            packet.duration * scale,
        )
        packet.time_base, packet.stream = unit, stream
        yield packet.dts * unit, 0, [packet]
