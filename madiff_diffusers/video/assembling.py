"""The last step of a video: its parts in one file, beside what the source has besides pictures."""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any

import av
from PIL import Image

from .reading import Analysis, Source, file_url, main_stream
from .writing import Encoding, joined_packets, read_index


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
_AUDIO_ENCODERS = {"aac": "aac", "opus": "libopus", "vorbis": "libvorbis", "mp3": "libmp3lame"}

# Seconds of a hole in the sound: shorter ones are rounding, longer ones a fault in its times.
LEAST_SILENCE, MOST_SILENCE = Fraction(1, 20), 600

# Seconds of sound that codecs decode before what is heard.
PRIMING = Fraction(1, 10)

LEAST_DELAY = 2  # hundredths of a second that players show a frame of a GIF for; less than that, they make ten

# How often a GIF is shown again, as FFmpeg takes it.
FOR_EVER, NEVER = 0, -1

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
        write_pictures(output, encoding, parts, end, _loops(source))
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
            carrier = _Carrier(file, container, encoding, slow_motion, audio, anew)
            try:
                carrier.add_streams(kinds, main_stream(container, source.path))
            except (av.FFmpegError, ValueError):
                if not kinds:
                    raise
                continue
            carrier.write(parts, end, analysis, is_partial)
            return carrier.notes


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
        _assemble_gif(output, encoding, parts, end, loops)
        return
    with _open(output, encoding) as file:
        for _, _, packets in _video_packets(encoding.add_stream(file), encoding, parts, end, Fraction(0)):
            file.mux(packets)


def _loops(source: Source) -> int:
    """How often a GIF is shown again; other kinds of files do not tell."""
    if source.images is None:
        with suppress(OSError, SyntaxError), Image.open(source.path) as image:
            if image.format == "GIF":
                return image.info.get("loop", NEVER)
    return FOR_EVER


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


class _Carrier:
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
                carry = _Copy(
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
            carry = _Sound(file, stream, self._begin, self._slow_motion)
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


class _Copy:
    """Packets as they are, at their times in the result."""

    def __init__(self, stream: Any, begin: Fraction, slow_motion: Fraction, kind: str, format_name: str):
        self.stream, self._begin, self._slow_motion, self._kind, self._format_name = (
            stream,
            begin,
            slow_motion,
            kind,
            format_name,
        )
        self._last: int | None = None

    def __call__(self, packet: av.Packet) -> list[av.Packet]:
        if packet.size == 0:
            return []
        # What an edit list leaves out is heard where files have no such lists; but for what codecs need to begin with.
        if (
            packet.is_discard
            and self._kind == "audio"
            and self._format_name not in ("mp4", "mov")
            and packet.pts is not None
        ):
            if packet.pts * packet.time_base - self._begin < -PRIMING:
                return []
        unit = self.stream.time_base

        def moved(time: int) -> int:
            return round((time * packet.time_base - self._begin) * self._slow_motion / unit)

        pts = packet.pts if packet.pts is not None else packet.dts
        dts = packet.dts if packet.dts is not None else pts
        dts, pts = (0, 0) if dts is None else (moved(dts), moved(pts))  # cover pictures have no time
        if self._last is not None and (dts < self._last or (dts == self._last and self._kind != "subtitle")):
            return []  # files take none that is not later than the one before; damaged and glued ones have such
        self._last = dts
        duration = round((packet.duration or 0) * packet.time_base * self._slow_motion / unit)
        packet.time_base, packet.stream = unit, self.stream
        packet.pts, packet.dts, packet.duration = max(dts, pts), dts, duration
        return [packet]


class _Sound:
    """Sound that is decoded and encoded anew: slower at the same pitch, or for a file that does not hold its codec."""

    def __init__(
        self,
        file: av.container.OutputContainer,
        source: av.audio.stream.AudioStream,
        begin: Fraction,
        slow_motion: Fraction,
    ):
        encoder = _AUDIO_ENCODERS.get(
            source.codec_context.name, _AUDIO_ENCODERS.get(file.default_audio_codec, file.default_audio_codec)
        )
        if encoder not in file.supported_codecs:
            encoder = _AUDIO_ENCODERS.get(file.default_audio_codec, file.default_audio_codec)
        rate = source.codec_context.sample_rate
        rate = (
            48000
            if encoder == "libopus" or rate not in (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
            else rate
        )
        self.stream = file.add_stream(encoder, rate=rate)
        # The layouts that every encoder takes; 5.1 has two names for where its back speakers are.
        self.stream.layout = {1: "mono", 6: "5.1"}.get(source.codec_context.layout.nb_channels, "stereo")
        self.stream.time_base = self.stream.codec_context.time_base = Fraction(1, rate)
        self._begin, self._slow_motion = begin, slow_motion
        self._graph: av.filter.Graph | None = None
        self._resampler = av.AudioResampler(self.stream.codec_context.format, self.stream.layout, rate)
        # When the next sample that is decoded is due in the source, and the number of the next that is encoded.
        self._due, self._position = Fraction(0), 0

    def __call__(self, packet: av.Packet) -> list[av.Packet]:
        try:
            frames = packet.decode()
        except (av.FFmpegError, ValueError):
            frames = []  # damaged: silence fills its place
        encoded = []
        for frame in frames:
            time = self._due if frame.pts is None else frame.pts * frame.time_base - self._begin
            if self._graph is None:
                self._graph, self._due = self._tempo(frame), time
                self._position = round(time * self._slow_motion * self.stream.codec_context.sample_rate)
            if LEAST_SILENCE < time - self._due < MOST_SILENCE:
                self._graph.push(_silence(frame, round((time - self._due) * frame.sample_rate)))
                self._due = time
            self._graph.push(frame)
            self._due += Fraction(frame.samples, frame.sample_rate)
            encoded += self._encode_ready()
        if packet.dts is None and packet.size == 0 and self._graph is not None:  # the end
            self._graph.push(None)
            encoded += self._encode_ready()
            encoded += self.stream.encode(None)
        return encoded

    def _tempo(self, frame: av.AudioFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        nodes = [
            graph.add_abuffer(
                sample_rate=frame.sample_rate,
                format=frame.format.name,
                layout=frame.layout.name,
                time_base=Fraction(1, frame.sample_rate),
            )
        ]
        tempo = 1 / self._slow_motion
        while tempo != 1:  # the filter takes 0.5 and more
            step = max(tempo, Fraction(1, 2))
            nodes.append(graph.add("atempo", f"{float(step):.9f}"))
            tempo /= step
        graph.link_nodes(*nodes, graph.add("abuffersink")).configure()
        return graph

    def _encode_ready(self) -> list[av.Packet]:
        packets = []
        while True:
            try:
                frame = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return packets
            for piece in self._resampler.resample(frame):
                piece.pts, piece.time_base = self._position, Fraction(1, piece.sample_rate)
                self._position += piece.samples
                packets += self.stream.encode(piece)


def _silence(like: av.AudioFrame, samples: int) -> av.AudioFrame:
    frame = av.AudioFrame(format=like.format.name, layout=like.layout.name, samples=samples)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size) if "u8" not in like.format.name else b"\x80" * plane.buffer_size)
    frame.sample_rate, frame.pts, frame.time_base = like.sample_rate, None, Fraction(1, like.sample_rate)
    return frame


def _assemble_gif(output: Path, encoding: Encoding, parts: Sequence[Path], end: int, loops: int) -> None:
    """Every frame with a palette of its own."""
    height, width = encoding.size
    unwritten, stream = encoding.unwritten_stream()
    stream.codec_context.open()
    decoder = av.CodecContext.create("ffv1", "r")
    decoder.extradata, decoder.width, decoder.height = stream.codec_context.extradata, width, height
    unwritten.close()
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=encoding.pixel_format, time_base=Fraction(1, 100))
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1:dither=bayer"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    last_time = max(time for time, _, _ in read_index(parts[-1]))
    # Other frames last until the next begins; each is rounded by itself, so that errors do not add up.
    last_delay = max(LEAST_DELAY, _hundredths(end, encoding) - _hundredths(last_time, encoding))
    options = {"loop": str(loops), "final_delay": str(last_delay)}
    with av.open(file_url(output), "w", format="gif", container_options=options) as file:
        video = file.add_stream("gif", rate=encoding.rate)
        video.height, video.width, video.pix_fmt = height, width, "pal8"
        video.codec_context.time_base = video.time_base = Fraction(1, 100)
        if encoding.pixel_aspect is not None:
            video.codec_context.sample_aspect_ratio = encoding.pixel_aspect

        def drain() -> None:
            while True:
                try:
                    frame = graph.pull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    return
                file.mux(video.encode(frame))

        for packet in joined_packets(parts, end):
            for frame in decoder.decode(packet):
                frame.pts, frame.time_base = _hundredths(packet.pts, encoding), Fraction(1, 100)
                graph.push(frame)
                drain()
        graph.push(None)
        drain()
        file.mux(video.encode(None))


def _hundredths(time: int, encoding: Encoding) -> int:
    return round(time * encoding.time_base * 100)
