"""Muxing, the last step of a video: its parts go into one file, beside what the source has besides pictures."""

import heapq
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from math import gcd
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.stream import AttachmentStream, Stream
from av.video.stream import VideoStream

from .analysis import Analysis
from .decoding import Source, main_stream
from .encoding import Encoding
from .ffmpeg import TAG_SETTINGS, file_url
from .gif import FOR_EVER, assemble_gif, loops_of
from .parts import joined_packets
from .streams import AudioTranscoder, StreamRemuxer


# Beginnings of the keys of metadata that files write by themselves, or that are not true any more.
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
    "timecode",  # whose last number counts frames of the source's rate
)

# Of the stereo modes of Matroska.
_WEBM_STEREO = ("mono", "left_right", "bottom_top", "top_bottom", "right_left")

TRIED_PACKETS = 50  # of a stream that a file may refuse

# Errors of FFmpeg that tell that a file does not take what it is given; a full disk is another.
_REFUSALS = (av.error.ArgumentError, av.error.InvalidDataError, av.error.PatchWelcomeError)

# Packets to be written, with what orders them: their time in seconds, and 0 for pictures, 1 for the rest.
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
        output: the file.
        encoding: how the parts are encoded.
        parts: the parts, in order.
        end: when the last frame ends, in units of the encoding's `time_base`.
        source, analysis: the source, from which everything else comes.
        slow_motion: how many times as long as the source the result lasts.
        audio: what becomes of sound: "keep", "stretch" or "drop".
        is_partial: whether sound and the rest end with the last frame of the parts, and not of the source.

    Returns:
        notes on what of the source is not in the file.

    Raises:
        av.FFmpegError, OSError: if the file cannot be written.
    """
    if encoding.codec == "gif" or source.images is not None:
        write_pictures(output, encoding, parts, end, loops_of(source))
        return []
    copies = audio == "keep" and slow_motion == 1
    for kinds, anew in _attempts(output, source, encoding, copies):
        with suppress(*(_REFUSALS if kinds else ())), source.open() as container, _open(output, encoding) as file:
            muxer = Muxer(file, container, encoding, analysis, slow_motion, audio, anew, end if is_partial else None)
            try:
                muxer.add_streams(kinds, main_stream(container, source.path))
            except (av.FFmpegError, ValueError):
                if not kinds:
                    raise
                continue
            muxer.write(parts, end)
            file.close()  # what the file is refused for at its end, it is refused for here
            return muxer.notes
    raise AssertionError("the last attempt returns or raises")


def _attempts(
    output: Path, source: Source, encoding: Encoding, copies: bool
) -> Iterator[tuple[tuple[str, ...], Collection[int]]]:
    """Kinds of streams to carry over, and the numbers of the streams of sound that are encoded anew, from most that may be kept to least: some
    streams are refused only when the header is written, or at the end, mostly sound of some flavour of a codec."""
    everything = ("audio", "subtitle", "attachment", "video")
    yield everything, ()
    with source.open() as container:
        sounds = [stream.index for stream in container.streams.audio]
    refused = [index for index in sounds if copies and not _takes(output, source, index, encoding)]
    if refused:
        yield everything, refused
    yield ("audio", "subtitle"), ()
    yield ("audio", "subtitle"), sounds
    yield ("audio",), sounds
    yield (), ()


def _takes(output: Path, source: Source, index: int, encoding: Encoding) -> bool:
    """Whether a file takes the beginning of a stream of sound as it is, or has it encoded anew in any case: one is written beside the output."""
    tried = output.with_name(f"tried{output.suffix}")
    try:
        with source.open() as container, _open(tried, encoding) as file:
            stream = container.streams[index]
            copy = StreamRemuxer(
                file.add_stream_from_template(stream, opaque=True),
                Fraction(0),
                Fraction(1),
                stream.type,
                encoding.container.format,
            )
            for packet in itertools.islice(container.demux(stream), TRIED_PACKETS):
                file.mux(copy(packet))
    except _REFUSALS:
        return False
    except ValueError:  # PyAV's own, for a codec that this kind of file does not hold
        return True
    finally:
        tried.unlink(missing_ok=True)
    return True


def write_pictures(output: Path, encoding: Encoding, parts: Sequence[Path], end: int, loops: int = FOR_EVER) -> None:
    """
    Write a file of nothing but pictures.

    Args:
        output, encoding, parts, end: see `assemble`.
        loops: how often a GIF is shown again.

    Raises:
        av.FFmpegError, OSError: if the file cannot be written.
    """
    if encoding.codec == "gif":
        assemble_gif(output, encoding, parts, end, loops)
        return
    with _open(output, encoding) as file:
        for _, _, packets in _video_packets(encoding.add_stream(file), encoding, parts, end, Fraction(0)):
            file.mux(packets)


def _open(output: Path, encoding: Encoding) -> av.container.OutputContainer:
    # Without "bitexact", Matroska files would have random numbers, and the same work would give other bytes.
    options = {"fflags": "+bitexact"}
    if encoding.container.format == "yuv4mpegpipe":  # More than 8 bits are called experimental.
        options["strict"] = "-1"
    if encoding.container.format in ("mp4", "mov"):
        options["movflags"] = "+faststart"
    # AVI has no times, but would begin with empty frames if sound begins before 0.
    if encoding.container.format == "avi":
        options["avoid_negative_ts"] = "disabled"
    return av.open(file_url(output), "w", format=encoding.container.format, container_options=options, **TAG_SETTINGS)


class Muxer:
    """
    Writer of the parts into a file, and of what the source has besides pictures.

    Args:
        file: the file to be written.
        container: the source.
        encoding: how the parts are encoded.
        analysis: the source's.
        slow_motion, audio: see `assemble`.
        anew: numbers of the streams of sound that are encoded anew.
        end: when all that is written ends, in units of the encoding's `time_base`, where that is before the source's end.
    """

    def __init__(
        self,
        file: av.container.OutputContainer,
        container: av.container.InputContainer,
        encoding: Encoding,
        analysis: Analysis,
        slow_motion: Fraction,
        audio: str,
        anew: Collection[int],
        end: int | None,
    ):
        self.notes: list[str] = []
        self._file, self._container, self._encoding = file, container, encoding
        self._slow_motion, self._audio, self._anew = slow_motion, audio, anew
        # Time 0 of the result is where the source's first stream begins.
        self._begin = Fraction(container.start_time or 0, av.time_base)
        self._length = analysis.origin + analysis.end * analysis.unit - self._begin  # until its pictures end
        self._offset = Fraction(0) if encoding.container.steady else (analysis.origin - self._begin) * slow_motion
        self._until = None if end is None else self._offset + end * encoding.time_base  # in seconds of the result
        # By the numbers of streams in the source.
        self._carried: dict[int, StreamRemuxer | AudioTranscoder] = {}

    def add_streams(self, kinds: Sequence[str], main: VideoStream) -> None:
        """
        Add all streams, and write the file's header.

        Args:
            kinds: kinds of streams that are carried over.
            main: the stream of the source's pictures.

        Raises:
            av.FFmpegError, ValueError: if the file refuses the streams.
        """
        file, container = self._file, self._container
        if self._encoding.container.format == "yuv4mpegpipe":
            kinds = ()
        self._video = self._encoding.add_stream(file)
        self._video.metadata.update(carried_metadata(main.metadata))
        stereo = self._video.metadata.get("stereo_mode", "mono")
        if self._encoding.container.format == "webm" and stereo not in _WEBM_STEREO:
            del self._video.metadata["stereo_mode"]
            self.notes.append(f"stereo mode {stereo} cannot be kept in webm")
        self._video.disposition = main.disposition
        file.metadata.update(carried_metadata(container.metadata))
        if any(key.startswith("com.") for key in file.metadata) and self._encoding.container.format in ("mp4", "mov"):
            file.container_options["movflags"] = "+faststart+use_metadata_tags"
        chapters = container.chapters()
        for chapter in chapters:
            assert chapter["time_base"] is not None  # FFmpeg's chapters have one.
            begin = self._begin / chapter["time_base"]
            # Matroska's would begin before the file where its first picture is not at 0.
            chapter["start"] = max(0, round((chapter["start"] - begin) * self._slow_motion))
            chapter["end"] = round((chapter["end"] - begin) * self._slow_motion)
            if self._until is not None:
                until = round(self._until / chapter["time_base"])
                # One that begins behind it ends before it begins.
                chapter["end"] = min(chapter["end"], until) if chapter["start"] < until else 0
        file.set_chapters([chapter for chapter in chapters if chapter["end"] > 0])
        for stream in container.streams:
            if stream.index != main.index and stream.type != "data":  # Chapters are data too.
                self._add(stream, kinds, main)
        file.start_encoding()

    def _add(self, stream: Stream, kinds: Sequence[str], main: VideoStream) -> None:
        file, format_name = self._file, self._encoding.container.format
        codec = stream.codec_context.name if stream.codec_context else "of an unknown codec"
        name = f"stream {stream.index} ({stream.type}, {codec})"
        if stream.type == "audio" and self._audio == "drop":
            self.notes.append(f"{name} is left out, as asked")
            return
        if isinstance(stream, AttachmentStream) and stream.type in kinds and format_name == "matroska":
            attached = file.add_attachment("attachment", stream.mimetype or "application/octet-stream", stream.data)
            # Afterwards, for as an argument PyAV takes no name whose bytes are not UTF-8.
            attached.metadata["filename"] = stream.metadata.get("filename", "attachment")
            return
        slowed = self._slow_motion != 1
        if (
            stream.type not in kinds
            or stream.type == "attachment"
            or stream.codec_context is None
            or (stream.type == "video" and (slowed or format_name != "mp4"))  # a cover picture
        ):
            self.notes.append(f"{name} cannot be kept in {format_name}")
            return
        carried: StreamRemuxer | AudioTranscoder | None = None
        if stream.type != "audio" or not (slowed or stream.index in self._anew):
            # PyAV raises ValueError for a codec that this kind of file does not hold.
            with suppress(ValueError):
                carried = StreamRemuxer(
                    file.add_stream_from_template(stream, opaque=True),
                    self._begin,
                    self._slow_motion,
                    stream.type,
                    format_name,
                )
        if carried is None:
            if not isinstance(stream, AudioStream):
                self.notes.append(f"{name} cannot be kept in {format_name}")
                return
            carried = AudioTranscoder(file, stream, self._begin, self._slow_motion, self._length)
            if not slowed:
                self.notes.append(
                    f"{name} is encoded anew as {carried.stream.codec_context.name}, because {format_name} does not hold it"
                )
            before, now = stream.codec_context.layout.nb_channels, carried.stream.codec_context.layout.nb_channels
            if before != now:
                self.notes.append(f"{name} has {before} channels, of which {now} are made")
        carried.stream.metadata.update(carried_metadata(stream.metadata))
        carried.stream.disposition = stream.disposition
        self._carried[stream.index] = carried
        begins = Fraction(stream.start_time or 0) * (stream.time_base or 0)
        apart = abs(begins - Fraction(main.start_time or 0) * (main.time_base or 0))
        if format_name == "avi" and stream.type == "audio" and apart > Fraction(1, 20):
            self.notes.append(
                f"AVI cannot tell that {name} begins {float(apart):.2f} s apart from the pictures: choose another kind of file"
            )

    def write(self, parts: Sequence[Path], end: int) -> None:
        """Write all packets in the order of their times; see `assemble`."""
        pictures = _video_packets(self._video, self._encoding, parts, end, self._offset)
        for _, _, packets in heapq.merge(pictures, self._other_packets(), key=lambda timed: timed[:2]):
            self._file.mux(packets)

    def _other_packets(self) -> Iterator[Timed]:
        if not self._carried:
            return
        time = Fraction(0)
        for packet in self._container.demux([self._container.streams[index] for index in self._carried]):
            if packet.dts is not None:
                time = max(time, (packet.dts * packet.time_base - self._begin) * self._slow_motion)
            if self._until is None or time < self._until or packet.size == 0:
                yield time, 1, self._carried[packet.stream.index](packet)


def carried_metadata(tags: dict[str, str]) -> dict[str, str]:
    """Metadata without what files write by themselves, or what is not true any more."""
    return {key: value for key, value in tags.items() if not key.lower().startswith(_OWN_METADATA)}


def _video_packets(
    stream: VideoStream, encoding: Encoding, parts: Sequence[Path], end: int, offset: Fraction
) -> Iterator[Timed]:
    """The packets of all parts, for a stream and its encoding, moved by an offset in seconds."""
    unit = encoding.time_base
    if offset:  # A finer unit makes times and offset whole numbers, unless it is too fine for files.
        finer = Fraction(
            gcd(unit.numerator * offset.denominator, offset.numerator * unit.denominator),
            unit.denominator * offset.denominator,
        )
        unit = finer if finer.denominator <= 10_000_000 else unit
    scale, shift = int(encoding.time_base / unit), round(offset / unit)
    for packet, time in joined_packets(parts, end):
        decoded = time.decoded * scale + shift
        packet.pts, packet.dts, packet.duration = time.shown * scale + shift, decoded, time.duration * scale
        packet.time_base, packet.stream = unit, stream
        yield decoded * unit, 0, [packet]
