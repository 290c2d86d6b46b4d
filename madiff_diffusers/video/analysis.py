"""Analysis of a whole video, which must be known before it can be interpolated: times, changes, colours, shape and damage."""

from array import array
from collections.abc import Callable
from fractions import Fraction
from statistics import median
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace
from PIL import ExifTags, Image

from ..properties import pixel_aspect
from ..scene_cuts import change
from .colour import ColourTags, chroma_of, is_rgb, opacity
from .decoding import Source, main_stream
from .errors import VideoError
from .ffmpeg import display_matrix, exact, turn
from .options import LONGEST_PAUSE


MOST_SHOWING_RATE = 120  # Frames a second; of screens that are recorded as they change, some are a millisecond apart.


class Analysis(NamedTuple):
    """
    The properties of a whole video. Times count from the first frame, in units of `unit`.

    Args:
        starts: when each frame begins, strictly increasing from 0.
        end: when the last frame ends.
        unit: seconds.
        origin: the first frame's time in the file, in seconds.
        rate: frames a second: the rate on whose grid all frames lie, or else the mean rate.
        regular: whether all frames lie on the grid of a rate.
        changes: how much each frame differs from the one before it; see `scene_cuts`. That of the first is 0.
        block_changes: the same for the block of 8x8 pixels that differs most.
        size: height and width.
        pixel_format: FFmpeg's name of the format; where frames have several, of the one with most colours and bits.
        tags: the tags of the colours of such frames.
        is_transparent: whether any pixel of any frame is not opaque.
        pixel_aspect: the width of a pixel by its height; None where that is 1 or not told.
        matrix: the matrix by which players turn the frames, as FFmpeg's nine numbers; None if they do not.
        mirrored, rotation: the same turn: whether left and right change places first, and then degrees against the clock.
        interlaced: whether any frame is marked as one of two fields.
        damage: what could not be decoded, in words.
        notes: what else was left out, in words.
    """

    starts: array
    end: int
    unit: Fraction
    origin: Fraction
    rate: Fraction
    regular: bool
    changes: array
    block_changes: array
    size: tuple[int, int]
    pixel_format: str
    tags: ColourTags
    is_transparent: bool
    pixel_aspect: Fraction | None
    matrix: list[int] | None
    mirrored: bool
    rotation: int
    interlaced: bool
    damage: list[str]
    notes: list[str]

    def duplicates(self, threshold: float, most: int) -> tuple[list[int], list[int]]:
        """
        Find frames that only repeat the one before them.

        Args:
            threshold: the greatest change, from 0 to 255, of any block of 8x8 pixels of a duplicate.
            most: the greatest number of duplicates in a row that are motion sampled less often; more of them are a still picture.

        Returns:
            the numbers of duplicates to be left out, so that frames are made across them; and those of still frames, after which no
            frames need be made.
        """
        dropped: list[int] = []
        still: list[int] = []
        run: list[int] = []
        for index, size in [*enumerate(self.block_changes), (len(self.starts), float("inf"))]:
            if 0 < index < len(self.starts) and size <= threshold:
                run.append(index)
                continue
            if len(run) > most or (run and index == len(self.starts)):
                still += [number - 1 for number in run]
            else:
                dropped += run
            run = []
        return dropped, still

    @property
    def showing_rate(self) -> Fraction:
        """
        Frames a second of a result that has but one rate: the source's own, or where its frames come at times of their own, one at
        which at least three of four of them last for a frame or nearly so, up to `MOST_SHOWING_RATE` unless they come faster in the mean.
        """
        if self.regular:
            return self.rate
        boundaries = [*self.starts, self.end]
        lengths = sorted(b - a for a, b in zip(boundaries, boundaries[1:]))
        quick = 1 / (lengths[len(lengths) // 4] * self.unit)
        if abs(quick - round(quick)) < quick / 100:  # as of a camera whose 30 frames a second are not quite even
            quick = Fraction(round(quick))
        return max(self.rate, min(quick, MOST_SHOWING_RATE)).limit_denominator(1000)


def analyse(
    source: Source,
    *,
    blocks: bool = False,
    skip_damage: bool = False,
    keep_good: bool = False,
    progress: Callable[[], object] | None = None,
) -> Analysis:
    """
    Decode a whole video once, and keep a few numbers for each frame.

    Args:
        source: the video.
        blocks: whether to compare frames block by block, as `duplicates` needs.
        skip_damage: whether to go on behind damaged places; see `Source.frames`.
        keep_good: whether to end at the first damaged place without an error; `damage` tells of it.
        progress: called once for each frame.

    Raises:
        VideoError: if the video has no frames, or is damaged.
    """
    starts, changes, block_changes = array("q"), array("f"), array("f")
    seen: dict[str, Any] = {}
    try:
        for start, frame in source.frames(skip_damage):
            if not starts:
                seen.update(_first_frame(frame))
            if frame.format.name != seen["pixel_format"] and _wealth(frame.format) > _wealth(
                av.VideoFormat(seen["pixel_format"])
            ):
                seen.update(pixel_format=frame.format.name, tags=ColourTags.of(frame))
            # Frames can be compared by any matrix, and the scaler does not know some rare matrices of files.
            matrix = {} if is_rgb(frame.format) else {"src_colorspace": Colorspace.ITU709}
            small = (
                frame.reformat(width=64, height=36, format="rgb24", interpolation="AREA", **matrix)
                .to_ndarray()
                .astype(np.int16)
            )
            grey = (
                frame.reformat(width=seen["size"][1], height=seen["size"][0], format="gray", **matrix).to_ndarray()
                if blocks
                else None
            )
            changes.append(change(seen["small"], small) if starts else 0.0)
            block_changes.append(block_change(seen["grey"], grey) if starts and grey is not None else float("inf"))
            starts.append(start)
            seen["is_transparent"] = seen.get("is_transparent", False) or opacity(frame) is not None
            seen.update(
                small=small,
                grey=grey,
                duration=frame.duration,
                interlaced=seen.get("interlaced") or frame.interlaced_frame,
            )
            if progress is not None:
                progress()
    except VideoError:
        if not (keep_good and starts):
            raise
    if not starts:
        raise VideoError(f"{source.path} has no frames that can be decoded")
    damage, notes = list(source.damage), []
    if source.late:
        notes.append(
            f"{source.late} frames of {source.path} are not later than the ones before them, and are left out"
        )
    first, unit = starts[0], source.time_base
    steps = array("q", (b - a for a, b in zip(starts, starts[1:])))
    usual = median(steps) if steps else 0
    # Frames tell how long they last in the order of decoding, so that the end of the stream is more reliable.
    last_step = 0 if source.end is None or source.late else source.end - starts[-1]
    if not 0 < last_step <= 2 * max(steps, default=last_step):
        last_step = seen["duration"] or round(usual) or round(1 / (source.rate or 25) / unit) or 1
    told = starts[-1] if source.told_end is None else source.told_end
    missing = told - starts[-1] - max(last_step, seen["duration"] or 0)
    if missing * unit > max(Fraction(1, 2), 2 * max(steps, default=0) * unit) and not source.late:
        notes.append(
            f"the pictures of {source.path} end at {float((starts[-1] + last_step) * unit):.2f} s, though it tells that they last until "
            f"{float(told * unit):.2f} s: its end may be missing"
        )
    relative = array("q", (start - first for start in starts))
    end = relative[-1] + last_step
    longest = max(last_step, max(steps, default=0))
    if longest * unit > LONGEST_PAUSE:
        raise VideoError(
            f"{source.path} must have no pause of more than {LONGEST_PAUSE} s between frames, but has one of {float(longest * unit):.0f} s"
        )
    mean_rate = Fraction(len(starts)) / (end * unit)
    grid = _on_grid(relative, end, unit, source.rate)
    if grid is not None:
        relative, end, unit = grid
    return Analysis(
        starts=relative,
        end=end,
        unit=unit,
        origin=first * source.time_base,
        rate=1 / unit if grid is not None else mean_rate.limit_denominator(100000),
        regular=grid is not None,
        changes=changes,
        block_changes=block_changes,
        damage=damage,
        notes=notes,
        **{
            name: seen[name]
            for name in (
                "size",
                "pixel_format",
                "tags",
                "is_transparent",
                "matrix",
                "mirrored",
                "rotation",
                "interlaced",
            )
        },
        pixel_aspect=_pixel_aspect(source),
    )


def _first_frame(frame: av.VideoFrame) -> dict[str, Any]:
    matrix = display_matrix(frame)
    mirrored, rotation = turn(matrix)
    return {
        "size": (frame.height, frame.width),
        "pixel_format": frame.format.name,
        "tags": ColourTags.of(frame),
        "matrix": matrix,
        "mirrored": mirrored,
        "rotation": rotation,
    }


def _wealth(pixel_format: av.VideoFormat) -> tuple[int, ...]:
    """The order of formats by how much they hold: colours, bits, transparency, fineness of colours."""
    across, down = chroma_of(pixel_format)
    has_colours = is_rgb(pixel_format) or len(pixel_format.components) >= 3
    return (
        has_colours,
        max(component.bits for component in pixel_format.components),
        len(pixel_format.components),
        -across * down,
    )


def _pixel_aspect(source: Source) -> Fraction | None:
    if source.images is not None:
        try:
            with Image.open(source.images[0]) as image:
                aspect, is_on_its_side = pixel_aspect(image), image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                return 1 / aspect if aspect and is_on_its_side else aspect
        except Exception:  # Pillow raises errors of any kind at unknown files, which FFmpeg has read or told of.
            return None
    with source.open() as container:
        aspect = exact(main_stream(container, source.path).sample_aspect_ratio)
    return aspect if aspect and aspect != 1 else None


def _on_grid(starts: array, end: int, unit: Fraction, rate: Fraction | None) -> tuple[array, int, Fraction] | None:
    """Times counted in frames of a rate, if they are whole numbers of them but for the rounding of the file's clock; else None."""
    if not rate or unit * rate > Fraction(1, 4):
        # A rate that is no more than the file's clock is a rate of frames only where most follow each other in it.
        followed = sum(b - a == 1 for a, b in zip(starts, starts[1:]))
        is_steady = rate is not None and unit * rate == 1 and 2 * followed >= len(starts) - 1
        return (starts, end, unit) if is_steady else None
    tick = unit * rate
    numbers = array("q", (round(start * tick) for start in starts))
    if any(abs(start * tick - number) > tick for start, number in zip(starts, numbers)) or any(
        a >= b for a, b in zip(numbers, numbers[1:])
    ):
        return None
    return numbers, max(numbers[-1] + 1, round(end * tick)), 1 / rate


def block_change(prev: np.ndarray, next_: np.ndarray) -> float:
    """The greatest mean difference, from 0 to 255, of any block of 8x8 pixels of two frames `(H, W)` uint8."""
    difference = cv2.absdiff(prev, next_)
    height, width = difference.shape
    return float(
        np.max(cv2.resize(difference, (max(1, width // 8), max(1, height // 8)), interpolation=cv2.INTER_AREA))
    )
