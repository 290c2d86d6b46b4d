"""Kinds of files that can be written, and the codecs that each can hold."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
from av.video.codeccontext import VideoCodecContext

from .errors import VideoError


class Container(NamedTuple):
    """
    A kind of file.

    Args:
        format: FFmpeg's name of the format.
        codecs: names in `CODECS` of what the file can hold; the first is the usual one.
        steady: whether the file has a single rate, and not a time for each frame.
        turns: whether the file can tell players to turn the picture.
    """

    format: str
    codecs: tuple[str, ...]
    steady: bool = False
    turns: bool = True


# Kinds of files by the endings of their names. A name without an ending stands for a folder of PNG files.
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

FOLDER = Container("", ("png",), steady=True, turns=False)


class Codec(NamedTuple):
    """
    A way to encode pictures.

    Args:
        encoder: FFmpeg's name of the encoder.
        crf: the usual quality; less is better and larger. None for an encoder without such a setting.
        worst: the worst quality; the best is 0.
        presets: names of presets; empty for an encoder without them.
        preset: the usual preset.
        options: options that are always set.
        quality: the encoder's own name for what `crf` sets.
        pace: the encoder's own name for what `preset` sets.
        standard: for an encoder of a chip, the name in `CODECS` of the same kind of pictures encoded by the processor; else None.
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
    # With its macroblock tree, x264 would make other bytes of the same frames from one run to the next.
    "h264": Codec("libx264", 18, 51, _X26X, "medium", {"mbtree": "0"}),
    "hevc": Codec("libx265", 20, 51, _X26X, "medium", {"x265-params": "log-level=none"}),
    "vp9": Codec("libvpx-vp9", 24, 63, tuple("876543210"), "2", {"b:v": "0", "row-mt": "1"}, pace="cpu-used"),
    "av1": Codec("libsvtav1", 24, 63, tuple("13 12 11 10 9 8 7 6 5 4 3 2 1 0".split()), "8"),
    "prores": Codec("prores_ks"),
    "ffv1": Codec("ffv1", options={"level": "3", "g": "1", "slicecrc": "1"}),
    "raw": Codec("rawvideo"),
    # Frames are kept without loss until the file is written, when each gets its palette.
    "gif": Codec("ffv1", options={"level": "3", "g": "1"}),
    "png": Codec("png"),
}

# Encoders of graphics cards and other chips. Each has a scale of its own for `crf`.
_NVENC = Codec("nvenc", 0, 51, tuple(f"p{number}" for number in range(1, 8)), "p5", {"rc": "vbr", "b:v": "0"}, "cq")
_QSV = Codec("qsv", 0, 51, _X26X[2:], "medium", quality="global_quality")
_VAAPI = Codec("vaapi", 0, quality="qp")
_VIDEOTOOLBOX = Codec("videotoolbox", options={"allow_sw": "0"})  # It takes a rate in bits, not a quality.

for _standard, _chips in {
    "h264": (_NVENC, _QSV, _VAAPI, _VIDEOTOOLBOX),
    "hevc": (_NVENC, _QSV, _VAAPI, _VIDEOTOOLBOX),
    "av1": (_NVENC, _QSV, _VAAPI),
    "vp9": (_QSV, _VAAPI),
}.items():
    for _chip in _chips:
        _name = f"{_standard}_{_chip.encoder}"
        _crf = None if _chip.crf is None else CODECS[_standard].crf
        CODECS[_name] = _chip._replace(encoder=_name, crf=_crf, standard=_standard)

MOST_GIF_RATE = 50  # Frames a second that players keep; see `gif.LEAST_DELAY`.


def container_of(output: Path) -> Container:
    """
    The kind of file that a name stands for.

    Raises:
        VideoError: if the ending of the name stands for nothing that can be written.
    """
    suffix = output.suffix.lower()
    if not output.name:
        raise VideoError(f"the output must be the name of a file or folder, but is {str(output)!r}")
    if not suffix:
        return FOLDER
    if suffix not in CONTAINERS:
        raise VideoError(
            f"a video's name must end in {', '.join(CONTAINERS)}, or in nothing for a folder of PNG files, but is {str(output)!r}"
        )
    return CONTAINERS[suffix]


def check_encoding(
    output: Path,
    codec: str | None,
    crf: int | None,
    preset: str | None,
    fps: Fraction | None,
    usual: Sequence[str],
) -> None:
    """
    Refuse settings that are wrong whatever the source is.

    Args:
        output: the file or folder.
        codec, crf, preset, fps: the options that were given.
        usual: codecs that may be chosen where none is given.

    Raises:
        VideoError: if the kind of file, codec, quality, preset or rate is impossible, or this machine does not have the encoder.
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
    names = [codec] if codec is not None else usual
    refusals = [refusal for name in names if (refusal := refusal_of(name, crf, preset)) is not None]
    if len(refusals) == len(names):
        raise VideoError(refusals[0])
    if container.format == "gif" and fps is not None and fps > MOST_GIF_RATE:
        raise VideoError(
            f"`fps` for .gif must be at most {MOST_GIF_RATE}, as players show shorter frames slower, but is {float(fps):g}"
        )


def refusal_of(name: str, crf: int | None, preset: str | None) -> str | None:
    """What is wrong with the settings of an encoder, in words; None if nothing is."""
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
    Refuse an encoder that cannot be used.

    Raises:
        VideoError: if FFmpeg was built without the encoder, or it is a chip's and cannot be opened on this machine.
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
    encoder = cast(VideoCodecContext, av.CodecContext.create(kind.encoder, "w"))
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 640, 360, pixel_format, Fraction(1, 25)
    try:
        encoder.open()
    except av.FFmpegError as error:
        raise VideoError(
            f"`codec` {name} cannot be used: this machine has no such chip, or no driver for it ({error.strerror}){instead}"
        ) from error
