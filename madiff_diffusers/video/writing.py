"""Frames into files: what each kind of file can hold, and encoding in parts that are put together at the end.

Every part is encoded by an encoder of its own, from a key frame on, so that a part is the same bytes whoever makes it, and whenever.
"""

import io
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from .colour import PLANAR, ColourPath, ColourTags, chroma_of, is_rgb, planar_format
from .reading import Analysis, VideoError


class Container(NamedTuple):
    """
    A kind of file.

    Args:
        format: FFmpeg's name.
        codecs: that it is written with, by our names; the first unless told otherwise.
        steady: whether it holds but one rate, not a time for each frame.
        turns: whether it tells players to turn the picture.
    """

    format: str
    codecs: tuple[str, ...]
    steady: bool = False
    turns: bool = True


# By the ending of a file's name; a name without one is a folder of PNG files.
CONTAINERS = {
    ".mp4": Container("mp4", ("h264", "hevc", "av1", "vp9")),
    ".m4v": Container("mp4", ("h264", "hevc", "av1")),
    ".mov": Container("mov", ("h264", "hevc", "prores")),
    ".mkv": Container("matroska", ("h264", "hevc", "vp9", "av1", "prores", "ffv1")),
    ".webm": Container("webm", ("vp9", "av1"), turns=False),
    ".avi": Container("avi", ("h264", "ffv1"), steady=True, turns=False),
    ".y4m": Container("yuv4mpegpipe", ("raw",), steady=True, turns=False),
    ".gif": Container("gif", ("gif",), turns=False),
}
FOLDER = Container("", ("png",), turns=False)


class Codec(NamedTuple):
    """
    A kind of pictures in it.

    Args:
        encoder: FFmpeg's name.
        crf: quality unless told otherwise; less is better and larger. None where there is no such setting.
        worst: of qualities, the best of which is 0.
        presets: from fast to slow, or the other way about; empty where there are none.
        preset: unless told otherwise.
        options: that are always set.
        quality: the encoder's own name for what `crf` sets.
        pace: the encoder's own name for what `preset` sets.
        standard: another name in `CODECS`, of which this is the same kind of pictures, by a chip; None for what the processor encodes.
    """

    encoder: str
    crf: int | None = None
    worst: int = 51
    presets: tuple[str, ...] = ()
    preset: str | None = None
    options: dict[str, str] = {}
    quality: str = "crf"
    pace: str = "preset"
    standard: str | None = None


_X26X = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
CODECS = {
    # Its macroblock tree makes other bytes of the same frames from one run to the next.
    "h264": Codec("libx264", 18, 51, _X26X, "medium", {"mbtree": "0"}),
    "hevc": Codec("libx265", 20, 51, _X26X, "medium", {"x265-params": "log-level=none"}),
    "vp9": Codec("libvpx-vp9", 24, 63, tuple("876543210"), "2", {"b:v": "0", "row-mt": "1"}, pace="cpu-used"),
    "av1": Codec("libsvtav1", 24, 63, tuple("13 12 11 10 9 8 7 6 5 4 3 2 1 0".split()), "8"),
    "prores": Codec("prores_ks"),
    "ffv1": Codec("ffv1", options={"level": "3", "g": "1", "slicecrc": "1"}),
    "raw": Codec("rawvideo"),
    # Kept without loss until the palettes are known, which only whole frames tell.
    "gif": Codec("ffv1", options={"level": "3", "g": "1"}),
    "png": Codec("png"),
}

# Encoders of graphics cards and other chips. How good a number of `crf` looks is their own matter.
_NVENC = {
    "presets": tuple(f"p{number}" for number in range(1, 8)),
    "preset": "p5",
    "options": {"rc": "vbr", "b:v": "0"},
    "quality": "cq",
}
_QSV = {"presets": _X26X[2:], "preset": "medium", "quality": "global_quality"}
_VIDEOTOOLBOX = {"options": {"allow_sw": "0"}}
_VAAPI = {"quality": "qp"}
for _standard in ("h264", "hevc", "av1", "vp9"):
    _usual = CODECS[_standard].crf
    for _chip, _settings in (("nvenc", _NVENC), ("qsv", _QSV), ("vaapi", _VAAPI)):
        if (_standard, _chip) != ("vp9", "nvenc"):
            CODECS[f"{_standard}_{_chip}"] = Codec(f"{_standard}_{_chip}", _usual, standard=_standard, **_settings)
    if _standard in ("h264", "hevc"):  # which is told a rate in bits, not a quality
        CODECS[f"{_standard}_videotoolbox"] = Codec(f"{_standard}_videotoolbox", standard=_standard, **_VIDEOTOOLBOX)

# What holds the samples of a planar format in fewer planes: all that some chips take.
_INTERLEAVED = {"yuv420p": "nv12", "yuv420p10le": "p010le"}

MOST_GIF_RATE = 50  # frames a second that players keep; see `assembling.LEAST_DELAY`


class Hdr10(NamedTuple):
    """
    What an HDR video tells of the display that it was made on, and of its light.

    Args:
        colours: CIE x and y of red, green, blue and white.
        darkest, brightest: light of the display, in candela to the square metre.
        most, most_mean: light of the brightest pixel, and of the brightest frame; 0 for not told.
    """

    colours: tuple[Fraction, ...]
    darkest: Fraction
    brightest: Fraction
    most: int
    most_mean: int

    def options(self, codec: str) -> str:
        """As the encoder of "hevc" or "av1" takes them."""

        def written(first: Fraction, second: Fraction, unit: int) -> str:
            return ",".join(
                str(round(each * unit)) if codec == "hevc" else f"{float(each):.5f}" for each in (first, second)
            )

        red, green, blue, white = (
            written(*self.colours[i : i + 2], 50000) for i in range(0, 8, 2)
        )  # HEVC counts in such parts
        display = f"G({green})B({blue})R({red})WP({white})L({written(self.brightest, self.darkest, 10000)})"
        named = ("master-display", "max-cll") if codec == "hevc" else ("mastering-display", "content-light")
        return f"{named[0]}={display}" + (
            f":{named[1]}={self.most},{self.most_mean}" if self.most or self.most_mean else ""
        )


# What takes them, and under what name.
_HDR10_OPTIONS = {"hevc": "x265-params", "av1": "svtav1-params"}


class Encoding(NamedTuple):
    """
    How a video is written.

    Args:
        container: of the file.
        codec: a name in `CODECS`.
        options: of the encoder.
        pixel_format: FFmpeg's name.
        size: height and width as coded.
        tags: of colours.
        time_base: seconds that times are counted in.
        rate: frames a second, on average.
        pixel_aspect, matrix: see [`Analysis`].
        mirrored, turned: whether left and right change places, and then degrees against the clock by which frames are turned, before
            they are written.
    """

    container: Container
    codec: str
    options: dict[str, str]
    pixel_format: str
    size: tuple[int, int]
    tags: ColourTags
    time_base: Fraction
    rate: Fraction
    pixel_aspect: Fraction | None
    matrix: list[int] | None
    mirrored: bool
    turned: int

    @property
    def standard(self) -> str:
        """The kind of pictures, whoever encodes them: a name in `CODECS`."""
        return CODECS[self.codec].standard or self.codec

    def add_stream(self, output: av.container.OutputContainer) -> av.video.stream.VideoStream:
        """A stream that encodes in this way, and says so in the file's header."""
        os.environ.setdefault("SVT_LOG", "1")  # or the AV1 encoder tells its settings on stderr
        stream = output.add_stream(CODECS[self.codec].encoder, rate=self.rate, options=dict(self.options))
        context = stream.codec_context
        context.height, context.width = self.size
        context.pix_fmt = self.pixel_format
        context.time_base = stream.time_base = self.time_base
        context.color_range, context.colorspace = self.tags.range, self.tags.matrix
        context.color_primaries, context.color_trc = self.tags.primaries, self.tags.transfer
        if self.pixel_aspect is not None:
            context.sample_aspect_ratio = self.pixel_aspect
        if self.matrix is not None:
            stream.set_display_matrix(self.matrix)
        if self.standard == "hevc" and self.container.format in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # what Apple's players know it by
        return stream

    def unwritten_stream(self) -> tuple[av.container.OutputContainer, av.video.stream.VideoStream]:
        """The same in a file that is never written to, which tells the encoder what the real one will."""
        output = av.open(io.BytesIO(), "w", format="matroska" if self.codec == "gif" else self.container.format)
        return output, self.add_stream(output)


def told_tags(tags: ColourTags, pixel_format: str) -> ColourTags:
    """With the range that formats have without saying so: of grey, and of what has a J in its name, the full one."""
    is_full = pixel_format.startswith("yuvj") or (tags.range == 0 and pixel_format.startswith(("gray", "ya", "mono")))
    return tags._replace(range=2) if is_full else tags


def container_of(output: Path) -> Container:
    """
    Raises:
        VideoError: if the ending of the name stands for nothing that can be written.
    """
    suffix = output.suffix.lower()
    if not suffix:
        return FOLDER
    if suffix not in CONTAINERS:
        raise VideoError(
            f"a video's name must end in {', '.join(CONTAINERS)}, or in nothing for a folder of PNG files, but is {str(output)!r}"
        )
    return CONTAINERS[suffix]


def check_encoding(
    output: Path,
    codec: str | None = None,
    crf: int | None = None,
    preset: str | None = None,
    fps: Fraction | None = None,
) -> None:
    """
    Refuse, before anything of a source is read, what no source could make right.

    Args:
        output: file or folder.
        codec, crf, preset, fps: as they were given.

    Raises:
        VideoError: for a kind of file, codec, quality or rate that cannot be, and for an encoder that this machine has not.
    """
    container = container_of(output)
    if codec is not None:
        able = [name for name, kind in CODECS.items() if (kind.standard or name) in container.codecs]
        if codec not in able:
            built = [name for name in able if CODECS[name].encoder in av.codecs_available]
            raise VideoError(
                f"`codec` for {output.suffix or 'a folder'} must be one of {', '.join(built)}, but is {codec!r}"
            )
        _check_encoder(codec)
    refusals = [_refusal(name, crf, preset) for name in ([codec] if codec is not None else container.codecs)]
    if all(refusals):
        raise VideoError(refusals[0])
    if container.format == "gif" and fps is not None and fps > MOST_GIF_RATE:
        raise VideoError(
            f"`fps` for .gif must be at most {MOST_GIF_RATE}, as players show shorter frames slower, but is {float(fps):g}"
        )


def _refusal(name: str, crf: int | None, preset: str | None) -> str | None:
    """What is wrong with settings of an encoder, in words."""
    kind = CODECS[name]
    if crf is not None and kind.crf is None:
        return f"`crf` cannot be set for {name}"
    if crf is not None and not 0 <= crf <= kind.worst:
        return f"`crf` for {name} must be from 0 (best) to {kind.worst}, but is {crf}"
    if preset is not None and preset not in kind.presets:
        return f"`preset` for {name} must be one of {', '.join(kind.presets) or 'none'}, but is {preset!r}"
    return None


def _check_encoder(name: str) -> None:
    """
    Raises:
        VideoError: if FFmpeg was built without it, or it is a chip's and cannot be opened on this machine.
    """
    kind = CODECS[name]
    instead = "" if kind.standard is None else f"; {kind.standard} encodes on the processor"
    if kind.encoder not in av.codecs_available:
        raise VideoError(
            f"`codec` {name} cannot be used: this build of PyAV ({av.__version__}) has no {kind.encoder}{instead}"
        )
    if kind.standard is None:
        return
    formats = [each.name for each in av.Codec(kind.encoder, "w").video_formats or []]
    pixel_format = next((each for each in ("yuv420p", "nv12") if each in formats), None)
    if pixel_format is None:
        raise VideoError(
            f"`codec` {name} cannot be used: it takes pictures in the memory of a graphics card alone, where PyAV puts none{instead}"
        )
    encoder = av.CodecContext.create(kind.encoder, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 640, 360, pixel_format, Fraction(1, 25)
    try:
        encoder.open()
    except av.FFmpegError as error:
        raise VideoError(
            f"`codec` {name} cannot be used: this machine has no such chip, or no driver for it ({error.strerror}){instead}"
        ) from error


def choose_encoding(
    output: Path,
    analysis: Analysis,
    time_base: Fraction,
    rate: Fraction,
    codec: str | None = None,
    crf: int | None = None,
    preset: str | None = None,
    hdr10: Hdr10 | None = None,
) -> Encoding:
    """
    How to write a video so that it has what the source has: pixels, colours, shape.

    Args:
        output: file or folder.
        analysis: of the source.
        time_base, rate: of the frames that will be shown.
        codec, crf, preset: if not the usual ones.
        hdr10: what the source tells of it.

    Raises:
        VideoError: for what the file or codec cannot have.
    """
    container = container_of(output)
    source = av.VideoFormat(analysis.pixel_format)
    # The first that keeps ten bits where there are as many, and HDR10's metadata where there are such.
    able = [
        each
        for each in container.codecs
        if _bits(av.VideoFormat(analogous_format(source, each))) >= min(10, _bits(source))
    ]
    able = [each for each in able if hdr10 is not None and each in _HDR10_OPTIONS] or able
    name = codec or (able or container.codecs)[0]
    kind = CODECS[name]
    options = dict(kind.options)
    refusal = _refusal(name, crf, preset)
    if refusal is not None:
        raise VideoError(refusal)
    if kind.crf is not None:
        options[kind.quality] = str(kind.crf if crf is None else crf)
    if kind.preset is not None:
        options[kind.pace] = preset or kind.preset
    if hdr10 is not None and name in _HDR10_OPTIONS:
        place = _HDR10_OPTIONS[name]
        options[place] = ":".join(filter(None, (options.get(place), hdr10.options(name))))
    pixel_format = analogous_format(source, name)
    if name == "prores":
        options["profile"] = "4" if "444" in pixel_format else "3"
    if container.format == "avi" and (kind.standard or name) == "h264":
        options["bf"] = "0"  # AVI cannot tell that frames are decoded in another order than they are shown
    rotation = 0 if container.turns else analysis.rotation
    height, width = analysis.size[::-1] if rotation in (90, 270) else analysis.size
    tags = told_tags(analysis.tags, analysis.pixel_format)
    if is_rgb(source) and not is_rgb(av.VideoFormat(pixel_format)):
        # Limited range and BT.709, what players take for granted, but for what the source says of itself.
        tags = ColourTags(1, 1, *(1 if told == 2 else told for told in (tags.primaries, tags.transfer)))
    elif is_rgb(av.VideoFormat(pixel_format)):
        tags = tags._replace(range=2, matrix=0)
    if (kind.standard or name) in ("h264", "hevc"):  # their 4:2:0 and 4:2:2 have no odd sizes
        across, down = chroma_of(av.VideoFormat(pixel_format))
        width, height = width + -width % across, height + -height % down
    aspect = analysis.pixel_aspect
    return Encoding(
        container=container,
        codec=name,
        options=options,
        pixel_format=pixel_format,
        size=(height, width),
        tags=tags,
        time_base=time_base,
        rate=rate,
        pixel_aspect=1 / aspect if aspect and rotation in (90, 270) else aspect,
        matrix=analysis.matrix if container.turns else None,
        mirrored=analysis.mirrored and not container.turns,
        turned=rotation,
    )


def _bits(pixel_format: av.VideoFormat) -> int:
    return max(component.bits for component in pixel_format.components)


def analogous_format(source: av.VideoFormat, codec: str) -> str:
    """The format of pixels nearest to a source's that a codec encodes: as much colour, as many bits, or the next more or less."""
    bits = _bits(source)
    if codec == "png":
        return "rgb48be" if bits > 8 else "rgb24"
    if codec == "gif":
        return "bgr0"
    encodable = {each.name for each in av.Codec(CODECS[codec].encoder, "w").video_formats or []}
    if codec == "ffv1" and planar_format(source) in encodable - {"gbrpf32le"}:
        return planar_format(source)
    if codec == "ffv1" and is_rgb(source):
        return "bgr0" if bits <= 8 else "gbrp16le"
    if codec == "raw":  # what the file's header can name
        encodable = {f"yuv{chroma}p{depth}" for chroma in ("420", "422", "444") for depth in ("", "10le", "12le")} | {
            "gray",
            "gray10le",
        }
    if len(source.components) < 3 and not is_rgb(source):  # grey, which few players show as such
        families = ["gray", "yuv420p", "yuv422p"] if codec in ("ffv1", "raw") else ["yuv420p", "yuv422p"]
    else:
        own = "yuv420p" if is_rgb(source) else PLANAR.get(chroma_of(source), "yuv444p")
        families = [own, "yuv422p", "yuv444p", "yuv420p"]
    depths = {8: "", 10: "10le", 12: "12le", 16: "16le"}
    wanted = 8 if bits <= 8 else 10 if bits <= 10 or is_rgb(source) else 12 if bits <= 12 else 16
    for depth in sorted(depths, key=lambda depth: abs(depth - wanted) if depth >= wanted else 100 - depth):
        for family in families:
            for pixel_format in (family + depths[depth], _INTERLEAVED.get(family + depths[depth])):
                if pixel_format in encodable:
                    return pixel_format
    raise VideoError(f"{codec} has nothing like the pixels of the source ({source.name})")


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
            write_json(index_path(self.path), self._index)

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


def write_json(path: Path, value: Any) -> None:
    """Whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


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
