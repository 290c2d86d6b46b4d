"""Streams beside the pictures: copied packet by packet, or, of sound, encoded anew."""

import itertools
from fractions import Fraction
from typing import cast

import av
from av.audio.stream import AudioStream
from av.stream import Stream


_AUDIO_ENCODERS = {"aac": "aac", "opus": "libopus", "vorbis": "libvorbis", "mp3": "libmp3lame"}

# What files refuse, though FFmpeg names it among what they hold.
_REFUSED = {("mov", "libopus")}

# Seconds of holes in the sound that are filled. Shorter ones come from rounding, and longer ones, behind the end of the pictures, from faulty
# times.
LEAST_SILENCE, MOST_SILENCE = Fraction(1, 20), 600
SILENT_PIECE = 10  # seconds of silence in memory at once

COARSE_CLOCK = Fraction(1, 1000)  # Matroska's, in seconds: packets of sound may be shorter.

# Seconds of sound that decoders need before the sound that is heard, at least.
PRIMING = Fraction(1, 10)


class StreamRemuxer:
    """
    Copier of the packets of one stream to their times in the result.

    Args:
        stream: the stream that gets them.
        begin: the time in the source, in seconds, that becomes 0.
        slow_motion: how many times as long as the source the result lasts.
        kind: the kind of stream, such as "audio".
        format_name: FFmpeg's name of the kind of file.
    """

    def __init__(self, stream: Stream, begin: Fraction, slow_motion: Fraction, kind: str, format_name: str):
        self.stream, self._begin, self._slow_motion, self._kind, self._format_name = (
            stream,
            begin,
            slow_motion,
            kind,
            format_name,
        )
        # Players of Matroska leave out as much as the file tells. From PyAV 19 on, that is all that an edit list cuts off.
        told = getattr(stream.codec_context, "initial_padding", 0) if format_name in ("matroska", "webm") else 0
        self._priming = max(PRIMING, Fraction(told, getattr(stream.codec_context, "sample_rate", None) or 1))
        # The time of the last packet in the result, and in the source's own units.
        self._last: int | None = None
        self._before: int | None = None

    def __call__(self, packet: "av.Packet[Stream]") -> list[av.Packet]:
        """The packets to write for one of the source: one, or none."""
        if packet.size == 0:
            return []
        # Sound that an edit list cuts off would be heard in files without such lists. What decoders need to begin with stays.
        if (
            packet.is_discard
            and self._kind == "audio"
            and self._format_name not in ("mp4", "mov")
            and packet.pts is not None
        ):
            # AVI, which has no times, begins with it, so that it gets no more than one packet.
            priming = (packet.duration or 0) * packet.time_base if self._format_name == "avi" else self._priming
            if packet.pts * packet.time_base - self._begin < -priming:
                return []
        unit = self.stream.time_base
        assert unit is not None  # The file has set it.

        def moved(time: int | None) -> int:
            return 0 if time is None else round((time * packet.time_base - self._begin) * self._slow_motion / unit)

        # Cover pictures have no time.
        time = packet.dts if packet.dts is not None else packet.pts
        dts = moved(time)
        pts = moved(packet.pts if packet.pts is not None else packet.dts)
        is_short = self._kind == "audio" and packet.time_base >= COARSE_CLOCK and (packet.duration or 0) <= 1
        if is_short and self._last is not None and time is not None and time == self._before:
            # Packets that are shorter than a tick of the clock, as TrueHD's in Matroska, have the time of the one before.
            dts = self._last + (self._format_name not in ("matroska", "webm"))
        elif self._last is not None and (dts < self._last or (dts == self._last and self._kind != "subtitle")):
            return []  # Damaged and glued files have packets that are not later than the one before; no file takes them.
        self._last, self._before = dts, time
        duration = round((packet.duration or 0) * packet.time_base * self._slow_motion / unit)
        packet.time_base, packet.stream = unit, self.stream
        packet.pts, packet.dts, packet.duration = max(dts, pts), dts, duration
        return [packet]


class AudioTranscoder:
    """
    Decoder and encoder of one stream of sound, which becomes slower at the same pitch, or gets a codec that the file can hold.

    Args:
        file: the file that gets the sound.
        source: the stream.
        begin: the time in the source, in seconds, that becomes 0.
        slow_motion: how many times as long as the source the result lasts.
        length: seconds from `begin` to the end of the source's pictures.
    """

    def __init__(
        self,
        file: av.container.OutputContainer,
        source: AudioStream,
        begin: Fraction,
        slow_motion: Fraction,
        length: Fraction,
    ):
        encoder = _AUDIO_ENCODERS.get(
            source.codec_context.name, _AUDIO_ENCODERS.get(file.default_audio_codec, file.default_audio_codec)
        )
        if encoder not in file.supported_codecs or (file.format.name, encoder) in _REFUSED:
            encoder = _AUDIO_ENCODERS.get(file.default_audio_codec, file.default_audio_codec)
        rate = source.codec_context.sample_rate
        rate = (
            48000
            if encoder == "libopus" or rate not in (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
            else rate
        )
        self.stream = cast(AudioStream, file.add_stream(encoder, rate=rate))
        # Every encoder takes these layouts, but MP3's no 5.1, which has two names, by where its back speakers are.
        layouts = {1: "mono"} if encoder == "libmp3lame" else {1: "mono", 6: "5.1"}
        self.stream.layout = layouts.get(source.codec_context.layout.nb_channels, "stereo")
        self.stream.time_base = self.stream.codec_context.time_base = Fraction(1, rate)
        self._begin, self._slow_motion, self._length = begin, slow_motion, length
        self._graph: av.filter.Graph | None = None
        # Sound may change on its way; what follows is made what its beginning is.
        self._first: tuple[str, str, int] | None = None
        self._changed: tuple[tuple[str, str, int], av.AudioResampler] | None = None
        self._resampler = av.AudioResampler(self.stream.codec_context.format, self.stream.layout, rate)
        # The time in the source when the next sample is due, and the number of the next sample to be encoded.
        self._due, self._position = Fraction(0), 0

    def __call__(self, packet: "av.Packet[Stream]") -> list[av.Packet]:
        """The packets to write, by now, after one of the source; an empty one of the source is its end."""
        try:
            frames = [frame for frame in packet.decode() if isinstance(frame, av.AudioFrame)]
        except (av.FFmpegError, ValueError):
            frames = []  # Silence fills the place of what is damaged.
        encoded: list[av.Packet] = []
        for frame in itertools.chain.from_iterable(map(self._as_first, frames)):
            time = self._due
            if frame.pts is not None and frame.time_base is not None:
                time = frame.pts * frame.time_base - self._begin
            if self._graph is None:
                self._graph, self._due = self._tempo(frame), time
                self._position = round(time * self._slow_motion * self.stream.codec_context.sample_rate)
            if LEAST_SILENCE < self._due - time < MOST_SILENCE:
                continue  # Sound whose times are closer together than it lasts would be late by ever more.
            is_right = time - self._due < MOST_SILENCE or time < self._length
            while LEAST_SILENCE < time - self._due and is_right:
                samples = min(round((time - self._due) * frame.sample_rate), SILENT_PIECE * frame.sample_rate)
                self._graph.push(_silence(frame, samples))
                self._due += Fraction(samples, frame.sample_rate)
                encoded += self._encode_ready(self._graph)
            self._graph.push(frame)
            self._due += Fraction(frame.samples, frame.sample_rate)
            encoded += self._encode_ready(self._graph)
        if packet.dts is None and packet.size == 0 and self._graph is not None:  # The end.
            self._graph.push(None)
            encoded += self._encode_ready(self._graph)
            encoded += self.stream.encode(None)
        return encoded

    def _as_first(self, frame: av.AudioFrame) -> list[av.AudioFrame]:
        """A frame in the format, layout and rate of the first one."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._first is None:
            self._first = kind
        if kind == self._first:
            return [frame]
        if self._changed is None or self._changed[0] != kind:
            self._changed = kind, av.AudioResampler(*self._first)
        return self._changed[1].resample(frame)

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
        while tempo != 1:  # The filter takes 0.5 and more.
            step = max(tempo, Fraction(1, 2))
            nodes.append(graph.add("atempo", f"{float(step):.9f}"))
            tempo /= step
        graph.link_nodes(*nodes, graph.add("abuffersink")).configure()
        return graph

    def _encode_ready(self, graph: av.filter.Graph) -> list[av.Packet]:
        packets: list[av.Packet] = []
        while True:
            try:
                frame = cast(av.AudioFrame, graph.pull())
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
