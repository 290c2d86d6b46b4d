"""Kinds of files that can be written, and the codecs that each can hold."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from .errors import VideoError


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

MOST_GIF_RATE = 50  # frames a second that players keep; see `gif.LEAST_DELAY`


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
    refusals = [refusal_of(name, crf, preset) for name in ([codec] if codec is not None else container.codecs)]
    if all(refusals):
        raise VideoError(refusals[0])
    if container.format == "gif" and fps is not None and fps > MOST_GIF_RATE:
        raise VideoError(
            f"`fps` for .gif must be at most {MOST_GIF_RATE}, as players show shorter frames slower, but is {float(fps):g}"
        )


def refusal_of(name: str, crf: int | None, preset: str | None) -> str | None:
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
