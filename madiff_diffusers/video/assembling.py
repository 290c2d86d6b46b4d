"""The last step of a video: its parts in one file, beside what the source has besides pictures."""

import heapq
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import av

from .reading import Analysis, Source, main_stream
from .writing import Encoding, joined_packets

# What containers write by themselves, or what is not true any more.
_OWN_METADATA = ("major_brand", "minor_version", "compatible_brands", "encoder", "rotate", "duration", "bps", "number_of_", "_statistics_")
_AUDIO_ENCODERS = {"aac": "aac", "opus": "libopus", "vorbis": "libvorbis", "mp3": "libmp3lame"}

Timed = Tuple[Fraction, int, List[av.Packet]]


def assemble(
    output: Path, encoding: Encoding, parts: Sequence[Path], end: int, source: Source, analysis: Analysis, slow_motion: Fraction, audio: str
) -> List[str]:
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

    Returns:
        what of the source is not in the file, in words.

    Raises:
        av.FFmpegError, OSError: if it cannot be written.
    """
    if encoding.codec == "gif":
        _assemble_gif(output, encoding, parts, end)
        return []
    if source.images is not None:
        with _open(output, encoding) as file:
            for _, _, packets in _video_packets(encoding.add_stream(file), encoding, parts, end, Fraction(0)):
                file.mux(packets)
        return []
    # A file that refuses one kind of stream may still take the others.
    for kinds in (("audio", "subtitle", "attachment", "video"), ("audio", "subtitle"), ("audio",), ()):
        with source.open() as container, _open(output, encoding) as file:
            try:
                return _write(file, container, kinds, encoding, parts, end, source, analysis, slow_motion, audio)
            except _HeaderRefused as error:
                if not kinds:
                    raise error.__cause__ from None


class _HeaderRefused(Exception):
    """A file cannot have the streams that it was given."""


def _open(output: Path, encoding: Encoding) -> av.container.OutputContainer:
    # "bitexact": without it, Matroska files have random numbers, and the same work gives other bytes.
    options = {"fflags": "+bitexact"}
    if encoding.container.format in ("mp4", "mov"):
        options["movflags"] = "+faststart"
    if encoding.container.format == "avi":  # it has no times, but would begin with empty frames for sound that begins before 0
        options["avoid_negative_ts"] = "disabled"
    return av.open(str(output), "w", format=encoding.container.format, container_options=options)


def _write(
    file: av.container.OutputContainer, container: av.container.InputContainer, kinds: Sequence[str], encoding: Encoding,
    parts: Sequence[Path], end: int, source: Source, analysis: Analysis, slow_motion: Fraction, audio: str,
) -> List[str]:
    main, notes = main_stream(container, source.path), []
    # Time 0 of the result is where the source's first stream begins.
    begin = Fraction(container.start_time or 0, av.time_base)
    if encoding.container.format == "yuv4mpegpipe":
        kinds = ()
    video = encoding.add_stream(file)
    video.metadata.update(_metadata(main.metadata))
    video.disposition = main.disposition
    file.metadata.update(_metadata(container.metadata))
    if any(key.startswith("com.") for key in file.metadata) and encoding.container.format in ("mp4", "mov"):
        file.container_options["movflags"] = "+faststart+use_metadata_tags"
    chapters = container.chapters()
    file.set_chapters([{**chapter, **{when: round((chapter[when] - begin / chapter["time_base"]) * slow_motion) for when in ("start", "end")}} for chapter in chapters])

    carried: Dict[int, Callable[[av.Packet], List[av.Packet]]] = {}
    for stream in container.streams:
        name = f"stream {stream.index} ({stream.type}, {stream.codec_context.name if stream.codec_context else 'no codec'})"
        if stream.index == main.index:
            continue
        if stream.type == "audio" and audio == "drop":
            notes.append(f"{name} is left out, as asked")
            continue
        if stream.type not in kinds or (slow_motion != 1 and stream.type == "video"):
            if getattr(stream.codec_context, "name", None) != "bin_data" and stream.type != "data":  # chapters are data too
                notes.append(f"{name} cannot be kept in {encoding.container.format}")
            continue
        if stream.type == "attachment":
            file.add_attachment(stream.metadata.get("filename", "attachment"), stream.mimetype or "application/octet-stream", stream.data)
            continue
        try:
            stretch = slow_motion if stream.type == "audio" and audio == "stretch" else Fraction(1)
            if stretch != 1:
                raise ValueError
            copy = file.add_stream_from_template(stream, opaque=True)
            carry = _Copy(copy, begin, slow_motion)
        except ValueError:  # a codec that this kind of file does not hold, or sound that must last longer
            if stream.type != "audio":
                notes.append(f"{name} cannot be kept in {encoding.container.format}")
                continue
            carry = _Sound(file, stream, begin, slow_motion)
            copy = carry.stream
            if stretch == 1:
                notes.append(f"{name} is encoded anew as {copy.codec_context.name}, because {encoding.container.format} does not hold it")
        copy.metadata.update(_metadata(stream.metadata))
        copy.disposition = stream.disposition
        carried[stream.index] = carry
    try:
        file.start_encoding()
    except (av.FFmpegError, ValueError) as error:
        raise _HeaderRefused from error

    offset = (analysis.origin - begin) * slow_motion
    pictures = _video_packets(video, encoding, parts, end, Fraction(0) if encoding.container.steady else offset)
    for _, _, packets in heapq.merge(pictures, _other_packets(container, carried), key=lambda timed: timed[:2]):
        file.mux(packets)
    return notes


def _metadata(tags: Dict[str, str]) -> Dict[str, str]:
    return {key: value for key, value in tags.items() if not key.lower().startswith(_OWN_METADATA)}


def _video_packets(stream: av.video.stream.VideoStream, encoding: Encoding, parts: Sequence[Path], end: int, offset: Fraction) -> Iterator[Timed]:
    unit = encoding.time_base
    if offset:  # times of both in whole numbers, if they are not too large for files
        finer = Fraction(gcd(unit.numerator * offset.denominator, offset.numerator * unit.denominator), unit.denominator * offset.denominator)
        unit = finer if finer.denominator <= 10_000_000 else unit
    scale, shift = int(encoding.time_base / unit), round(offset / unit)
    for packet in joined_packets(parts, end):
        packet.pts, packet.dts, packet.duration = packet.pts * scale + shift, packet.dts * scale + shift, packet.duration * scale
        packet.time_base, packet.stream = unit, stream
        yield packet.dts * unit, 0, [packet]


def _other_packets(container: av.container.InputContainer, carried: Dict[int, Callable]) -> Iterator[Timed]:
    if not carried:
        return
    time = Fraction(0)
    for packet in container.demux([container.streams[index] for index in carried]):
        if packet.dts is not None:
            time = max(time, packet.dts * packet.time_base)
        yield time, 1, carried[packet.stream.index](packet)


class _Copy:
    """Packets as they are, at their times in the result."""

    def __init__(self, stream: Any, begin: Fraction, slow_motion: Fraction):
        self.stream, self._begin, self._slow_motion = stream, begin, slow_motion
        self._last: Optional[int] = None

    def __call__(self, packet: av.Packet) -> List[av.Packet]:
        if packet.dts is None or packet.size == 0:
            return []
        shift = self._begin / packet.time_base
        pts = packet.dts if packet.pts is None else packet.pts
        dts = round((packet.dts - shift) * self._slow_motion)
        # Files take no packet that is not later than the one before; damaged ones have such.
        dts = dts if self._last is None else max(dts, self._last + 1)
        self._last = dts
        packet.pts, packet.dts = max(dts, round((pts - shift) * self._slow_motion)), dts
        packet.duration = round(packet.duration * self._slow_motion) if packet.duration else 0
        packet.stream = self.stream
        return [packet]


class _Sound:
    """Sound that is decoded and encoded anew: slower at the same pitch, or for a file that does not hold its codec."""

    def __init__(self, file: av.container.OutputContainer, source: av.audio.stream.AudioStream, begin: Fraction, slow_motion: Fraction):
        encoder = _AUDIO_ENCODERS.get(source.codec_context.name, _AUDIO_ENCODERS.get(file.default_audio_codec, file.default_audio_codec))
        if encoder not in file.supported_codecs:
            encoder = _AUDIO_ENCODERS.get(file.default_audio_codec, file.default_audio_codec)
        rate = 48000 if encoder == "libopus" else source.codec_context.sample_rate
        self.stream = file.add_stream(encoder, rate=rate)
        self.stream.layout = source.codec_context.layout
        self.stream.time_base = self.stream.codec_context.time_base = Fraction(1, rate)
        self._source, self._begin, self._slow_motion = source, begin, slow_motion
        self._graph: Optional[av.filter.Graph] = None
        self._resampler = av.AudioResampler(self.stream.codec_context.format, self.stream.layout, rate)
        self._position: Optional[int] = None

    def __call__(self, packet: av.Packet) -> List[av.Packet]:
        try:
            frames = packet.decode()
        except (av.FFmpegError, ValueError):
            frames = []  # a damaged packet is a short silence
        encoded = []
        for frame in frames:
            if self._graph is None:
                self._graph = self._tempo(frame)
                self._position = round((frame.pts * frame.time_base - self._begin) * self._slow_motion * self.stream.codec_context.sample_rate)
            self._graph.push(frame)
            encoded += self._encode_ready()
        if packet.dts is None and self._graph is not None:  # the end
            self._graph.push(None)
            encoded += self._encode_ready()
            encoded += self.stream.encode(None)
        return encoded

    def _tempo(self, frame: av.AudioFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        nodes = [graph.add_abuffer(sample_rate=frame.sample_rate, format=frame.format.name, layout=frame.layout.name, time_base=Fraction(1, frame.sample_rate))]
        tempo = 1 / self._slow_motion
        while tempo != 1:  # the filter takes 0.5 and more
            step = max(tempo, Fraction(1, 2))
            nodes.append(graph.add("atempo", f"{float(step):.9f}"))
            tempo /= step
        graph.link_nodes(*nodes, graph.add("abuffersink")).configure()
        return graph

    def _encode_ready(self) -> List[av.Packet]:
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


def _assemble_gif(output: Path, encoding: Encoding, parts: Sequence[Path], end: int) -> None:
    """Every frame with a palette of its own."""
    height, width = encoding.size
    with av.open(str(output.with_name(output.name + ".unused")), "w", format="matroska") as unwritten:
        decoder = av.CodecContext.create("ffv1", "r")
        stream = encoding.add_stream(unwritten)
        stream.codec_context.open()
        decoder.extradata, decoder.width, decoder.height = stream.codec_context.extradata, width, height
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
    with av.open(str(output), "w", format="gif", container_options={"loop": "0"}) as file:
        video = file.add_stream("gif", rate=encoding.rate)
        video.height, video.width, video.pix_fmt = height, width, "pal8"
        video.codec_context.time_base = video.time_base = Fraction(1, 100)

        def drain() -> None:
            while True:
                try:
                    frame = graph.pull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    return
                file.mux(video.encode(frame))

        for packet in joined_packets(parts, end):
            for frame in decoder.decode(packet):
                frame.pts, frame.time_base = round(packet.pts * encoding.time_base * 100), Fraction(1, 100)
                frame.duration = round((packet.pts + packet.duration) * encoding.time_base * 100) - frame.pts
                graph.push(frame)
                drain()
        graph.push(None)
        drain()
        file.mux(video.encode(None))
