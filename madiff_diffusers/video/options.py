"""Options of a video: their defaults, and how their values are read; the same for Python and the command line."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from numbers import Integral, Rational, Real
from typing import Any

from ..scene_cuts import LEAST_CHANGE, RATIO
from .errors import VideoError


Number = int | float | Fraction | str

LONGEST_PAUSE = 600  # Seconds that a frame is shown at most, so that a damaged file does not make millions of frames.

# Fields that are fractions, with the largest denominators that files and clocks can hold.
_EXACT = {"fps": 10**5, "image_fps": 10**5, "slow_motion": 1000, "max_gap": 1000}
_RATES = ("fps", "image_fps")
_INTEGERS = ("factor", "crf", "dedup_run", "steps", "seed", "batch")
_FLOATS = ("cut_threshold", "cut_ratio", "dedup_threshold")


@dataclass(frozen=True)
class VideoOptions:
    """
    How a video is interpolated. Numbers that are not whole may be fractions, floats or text such as "30000/1001".

    Args:
        factor: the number of frames in the place of each one; by default 2, or as many as `slow_motion` needs.
        fps: frames a second of the result, in the place of `factor`; see `read_rate`.
        slow_motion: how many times as long as the source the result lasts.
        audio: "keep" or "drop"; in slow motion, "stretch" (at the same pitch) or "drop". By default, the first of the two.
        codec, crf, preset: see `formats.CODECS`; by default, what suits the file.
        cut_threshold: the least change of thumbnails, from 0 to 1, that may be a cut; above 1, there are no cuts.
        cut_ratio: how many times as much as the frames around it a cut changes, at least.
        max_gap: the greatest number of seconds between two frames across which frames are made; across more, the first is shown on. By
            default 1, and between images, which are as far apart as `image_fps` says, as many as there may be.
        dedup: whether frames that only repeat the one before are left out, so that motion goes on across them.
        dedup_threshold: the greatest change of a repetition, from 0 to 255, in the block of 8x8 pixels that changes most.
        dedup_run: the greatest number of repetitions in a row that are motion sampled less often; more are a still picture.
        skip_damage: whether to go on behind damaged places of the source.
        image_fps: frames a second of a source that is images; by default 24.
        steps, seed: number of sampling steps (the checkpoint's own by default), and seed of the noise.
        batch: the number of pairs of frames that are made at once; by default 1, and on an NVIDIA GPU as many as fit, 8 at the most.
        max_memory: bytes that the process may take, as far as tiles can limit it, or text such as "6GiB"; by default 8 GiB. On an NVIDIA
            GPU its free memory decides instead.
    """

    factor: int | None = None
    fps: Number | None = None
    slow_motion: Number = Fraction(1)
    audio: str | None = None
    codec: str | None = None
    crf: int | None = None
    preset: str | None = None
    cut_threshold: float = LEAST_CHANGE
    cut_ratio: float = RATIO
    max_gap: Number | None = None
    dedup: bool = False
    dedup_threshold: float = 2.0
    dedup_run: int = 3
    skip_damage: bool = False
    image_fps: Number | None = None
    steps: int | None = None
    seed: int = 0
    batch: int | None = None
    max_memory: int | str | None = None

    def checked(self) -> "CheckedOptions":
        """
        Read all values, and fill in `factor` and `audio`.

        Raises:
            VideoError: for a value that cannot be read or is out of its range.
        """
        # None stands for what is chosen later, where it is the default.
        given = {
            name: value
            for name, value in vars(self).items()
            if value is not None or getattr(VideoOptions, name) is not None
        }
        values = {**vars(self), **{name: _read(name, value) for name, value in given.items()}}
        slow_motion = values["slow_motion"]
        usual = "keep" if slow_motion == 1 else "stretch"
        options = CheckedOptions(**{**values, "audio": values["audio"] or usual})

        def need(name: str, right: bool, what: str) -> None:
            if not right:
                raise VideoError(f"`{name}` must be {what}, but is {getattr(self, name)}")

        factor, fps, image_fps = options.factor, options.fps, options.image_fps
        need("factor", factor is None or 1 <= factor <= 64, "an integer from 1 to 64")
        need("fps", fps is None or Fraction(1, 10) <= fps <= 1000, "from 0.1 to 1000")
        if factor is not None and fps is not None:
            raise VideoError(f"either `factor` or `fps` can be given, but both are: {self.factor} and {self.fps}")
        is_one = slow_motion == 1 and read_number(self.slow_motion) != 1
        need("slow_motion", 1 <= slow_motion <= 64 and not is_one, "1, or from 1001/1000 to 64")
        need(
            "audio",
            options.audio in (usual, "drop"),
            f"{usual} or drop{'' if slow_motion == 1 else ' in slow motion'}",
        )
        need("cut_threshold", options.cut_threshold >= 0, "at least 0")
        need("cut_ratio", options.cut_ratio >= 1, "at least 1")
        need("max_gap", options.max_gap is None or options.max_gap > 0, "more than 0")
        need("dedup_threshold", 0 <= options.dedup_threshold <= 255, "from 0 to 255")
        need("dedup_run", options.dedup_run >= 1, "at least 1")
        need(
            "image_fps",
            image_fps is None or Fraction(1, LONGEST_PAUSE) <= image_fps <= 1000,
            f"from 1/{LONGEST_PAUSE} to 1000",
        )
        need("steps", options.steps is None or options.steps >= 1, "a positive integer")
        need("seed", 0 <= options.seed < 2**63, "in [0, 2^63)")
        need("batch", options.batch is None or 1 <= options.batch <= 64, "an integer from 1 to 64")
        need("max_memory", options.max_memory is None or options.max_memory >= 2**30, "at least 1 GiB")
        if factor is None and fps is None:
            return replace(options, factor=2 if slow_motion == 1 else ceil(slow_motion))
        return options


@dataclass(frozen=True)
class CheckedOptions(VideoOptions):
    """[`VideoOptions`] whose values are read: each is of one type, and in its range. Either `factor` or `fps` is given."""

    fps: Fraction | None = None
    slow_motion: Fraction = Fraction(1)
    audio: str = "keep"
    max_gap: Fraction | None = None
    image_fps: Fraction | None = None
    max_memory: int | None = None

    def longest_gap(self, is_images: bool) -> Fraction:
        """Seconds between two frames of a source, images or a video, across which frames are made at most."""
        if self.max_gap is not None:
            return self.max_gap
        return Fraction(LONGEST_PAUSE if is_images else 1)

    def rate_of(self, rate: Fraction) -> Fraction:
        """Frames a second of a result without `fps`, of a source of some rate."""
        return rate / self.slow_motion * (self.factor or 1)


def _read(name: str, value: Any) -> Any:
    """
    Read a field's value as its own type.

    Raises:
        VideoError: if it cannot be.
    """
    try:
        if name in _EXACT:
            return (read_rate if name in _RATES else read_number)(value).limit_denominator(_EXACT[name])
        if name in _INTEGERS:
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError("an integer")
            return int(value)
        if name in _FLOATS:
            return value if value == float("inf") else float(read_number(value))
        if name == "max_memory":
            return read_size(value)
        return str(value) if name == "preset" else value  # some encoders' presets are numbers
    except ValueError as error:
        raise VideoError(f"`{name}` must be {error}, but is {value!r}") from None
    except OverflowError:
        raise VideoError(f"`{name}` must be a number that floating point can hold, but is {value!r}") from None


def read_number(value: Number) -> Fraction:
    """
    Read a number as a fraction, from any type of number or from text such as "0.5" or "1/3".

    Raises:
        ValueError: if it is no number, or not finite.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        return Fraction(value if isinstance(value, (Rational, str)) or not isinstance(value, Real) else float(value))
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise ValueError("a number or a fraction") from None


def read_rate(value: Number) -> Fraction:
    """
    Read frames a second. Decimals such as broadcasting's 23.976, 29.97 and 59.94 become 24000/1001 and so on; fractions stay as they are.

    Raises:
        ValueError: as `read_number`.
    """
    rate = read_number(value)
    broadcast = Fraction(round(rate) * 1000, 1001)
    is_decimal = not isinstance(value, Rational) and "/" not in str(value) and rate.denominator != 1
    return broadcast if is_decimal and abs(rate - broadcast) < Fraction(1, 200) else rate


def read_size(value: int | str) -> int:
    """
    Read a number of bytes, from a number or from text such as "8GiB" or "6000MB".

    Raises:
        ValueError: if it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", str(value))
    if not match:
        raise ValueError("a size such as 8GiB or 6000MB")
    unit = match[2] or "B"
    return int(float(match[1]) * (1024 if "i" in unit else 1000) ** " KMGT".index(unit[0] if unit != "B" else " "))
