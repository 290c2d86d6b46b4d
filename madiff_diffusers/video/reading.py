"""Video files and images in order, read frame by frame; and what must be known of a video before it can be interpolated."""

import re
from array import array
from collections.abc import Iterator
from fractions import Fraction
from math import atan2, degrees
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace
from PIL import ExifTags, Image, UnidentifiedImageError

from ..image_io import upright
from ..image_processor import rgb_of_image, rgba_of_transparent
from ..properties import pixel_aspect
from ..scene_cuts import change
from .colour import ColourTags, chroma_of, is_rgb, opacity


IMAGE_SUFFIXES = (
    ".bmp",
    ".dpx",
    ".exr",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)
VIDEO_SUFFIXES = (
    ".avi",
    ".gif",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ts",
    ".webm",
    ".wmv",
    ".y4m",
)

IMAGE_RATE = Fraction(24)

# What a damaged header must not make us hold: 8192x8192 pixels, and frames that are shown for hours.
MOST_PIXELS = 2**26
LONGEST_PAUSE = 600  # seconds

# FFmpeg's number of a display matrix among kinds of side data, and more numbers than it has kinds.
_DISPLAY_MATRIX, _SIDE_DATA_KINDS = 6, 64

# Seconds by which a frame may be earlier than the one before it, as a fault of the file; more is another recording glued on.
LONGEST_RETURN = 1


class VideoError(ValueError):
    """A video that cannot be read, or written as asked."""


class Source:
    """
    What can be decoded frame by frame.

    Args:
        path: a video file; a folder of images; or several images, named by a pattern with `%d`, `%05d`, `*` or `?`. Images are
            taken in the order of the numbers in their names.
        image_rate: frames a second of images, `IMAGE_RATE` if not given; a video file has its own.

    Raises:
        VideoError: if there is no such thing, or nothing that can be read.
    """

    def __init__(self, path: str | Path, image_rate: Fraction | None = None):
        self.path = Path(path)
        self.images, self.left_out = find_images(self.path)
        if self.images is None and not self.path.is_file():
            raise VideoError(f"there is no file {self.path}")
        if self.images is None and self.path.stat().st_size == 0:
            raise VideoError(f"{self.path} is empty")
        if self.images is None and image_rate is not None:
            raise VideoError(
                f"`image_fps` is for images, but {self.path} is a video file, which has a rate of its own"
            )
        # Seconds that times are counted in, and the rate that the file tells, if it does.
        self.rate = None if self.images is None else image_rate or IMAGE_RATE
        self.time_base = Fraction(1) if self.rate is None else 1 / self.rate
        # When the stream ends, where the file tells.
        self.end: int | None = None
        self.damage: list[str] = []
        self.late = 0

    def takes(self, path: Path) -> bool:
        """Whether a file, if it were there, would be one of the images."""
        if self.images is None or path.absolute().parent.resolve() != self.images[0].absolute().parent.resolve():
            return False
        return path.suffix.lower() in IMAGE_SUFFIXES and (self.path.is_dir() or _is_named(path.name, self.path.name))

    def open(self) -> av.container.InputContainer:
        """
        Raises:
            VideoError: if it cannot be read.
        """
        try:
            return av.open(file_url(self.path), metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot read {self.path} as a video: {reason(error)}") from error

    def frames(self, skip_damage: bool = False) -> Iterator[tuple[int, av.VideoFrame]]:
        """
        All frames, with the times when they begin in units of `time_base`; each later than the one before. Frames that are not are
        left out, and counted in `late`. All have the size of the first one.

        Raises:
            VideoError: where nothing can be decoded, or the size changes; with `skip_damage`, `damage` grows instead.
        """
        self.damage, self.late = [], 0
        last, step, returned = None, 1, False
        size, is_other = None, False
        for start, frame in (
            self._image_frames(skip_damage) if self.images is not None else self._file_frames(skip_damage)
        ):
            if start is None:
                start = 0 if last is None else last + step
            size, was_other = size or (frame.width, frame.height), is_other
            is_other = (frame.width, frame.height) != size
            if is_other:
                if self.images is not None or not was_other:
                    where = (
                        f"{self.path} behind {float((last or 0) * self.time_base):.2f} s"
                        if self.images is None
                        else str(self.images[start])
                    )
                    self._damaged(
                        f"{where} has frames of {frame.width}x{frame.height}, but of {size[0]}x{size[1]} before",
                        skip_damage,
                    )
                continue
            if last is not None and start <= last:
                if (last - start) * self.time_base > LONGEST_RETURN and not returned:
                    returned = True
                    self._damaged(
                        f"the times of {self.path} jump back by {float((last - start) * self.time_base):.1f} s",
                        skip_damage,
                    )
                self.late += 1
                continue
            step = max(1, frame.duration or (0 if last is None else start - last))
            last = start
            yield start, frame

    def _file_frames(self, skip_damage: bool) -> Iterator[tuple[int | None, av.VideoFrame]]:
        with self.open() as container:
            stream = main_stream(container, self.path)
            self.time_base = stream.time_base
            self.rate = stream.guessed_rate or stream.average_rate
            self.end = None if stream.duration is None else (stream.start_time or 0) + stream.duration
            stream.thread_type = "AUTO"
            packets, last = container.demux(stream), None
            is_avi, ahead = container.format.name == "avi", None
            while True:
                try:
                    packet = next(packets, None)
                    decoded = [] if packet is None else packet.decode()
                except av.error.EOFError:
                    return
                except (av.FFmpegError, ValueError) as error:
                    where = "its beginning" if last is None else f"{float(last * self.time_base):.2f} s"
                    self._damaged(f"{self.path} is damaged behind {where}: {reason(error)}", skip_damage)
                    continue
                if packet is None:
                    return
                for frame in decoded:
                    if frame.width * frame.height > MOST_PIXELS:
                        raise VideoError(
                            f"{self.path} must have frames of at most 8192x8192 pixels, but has {frame.width}x{frame.height}"
                        )
                    start = frame.pts
                    if is_avi:  # which tells times of decoding alone; the last frames have none
                        ahead = (frame.dts or 0) - (stream.start_time or 0) if ahead is None else ahead
                        start = None if frame.dts is None else frame.dts - ahead
                    last = start if start is not None else last
                    if frame.is_corrupt:  # the decoder has filled in what it could not read
                        where = "" if last is None else f" at {float(last * self.time_base):.2f} s"
                        self._damaged(f"{self.path} is damaged: its frame{where} cannot be decoded whole", skip_damage)
                        continue
                    yield start, frame

    def _image_frames(self, skip_damage: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        for number, path in enumerate(self.images):
            try:
                frame = image_frame(path)
            except VideoError as error:
                self._damaged(str(error), skip_damage)
                continue
            frame.duration = 1
            yield number, frame

    def _damaged(self, message: str, skip: bool) -> None:
        self.damage.append(message)
        # A file that is nothing but damage could go on for ever.
        if not skip or len(self.damage) > 10000:
            raise VideoError(message)


class Analysis(NamedTuple):
    """
    What a whole video is like; times are in units of `unit`, from the first frame.

    Args:
        starts: when each frame begins, strictly increasing from 0.
        end: when the last one ends.
        unit: seconds.
        origin: of the first frame in the file's own time, in seconds.
        rate: frames a second, where they all lie on its grid, else the mean rate.
        regular: whether they all do.
        changes: how much each frame differs from the one before it; see `scene_cuts`. The first's is 0.
        block_changes: the same of the block of 8x8 pixels that differs most.
        size: height and width.
        pixel_format: FFmpeg's name; where frames have several, of the one with most colours and bits.
        tags: of colours of such frames.
        is_transparent: whether something in some frame is not opaque.
        pixel_aspect: width of a pixel by its height, where it is not told 1.
        matrix: how players turn the frames, as FFmpeg's nine numbers; None if not at all.
        mirrored, rotation: the same: whether left and right change places first, and then degrees against the clock.
        interlaced: whether frames say that they hold two fields.
        damage: what could not be decoded, in words.
        notes: what else was left out.
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
        Frames that only repeat the one before them.

        Args:
            threshold: a frame is a duplicate if no block of 8x8 pixels changes by more, of 255.
            most: duplicates in a row that stand for motion which was sampled less often; more of them are a still picture.

        Returns:
            numbers of those to be left out, so that frames are made across them; and of still ones, after which none need be made.
        """
        dropped, still, run = [], [], []
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


def analyse(
    source: Source, *, blocks: bool = False, skip_damage: bool = False, keep_good: bool = False, progress: Any = None
) -> Analysis:
    """
    Decode a whole video once, and keep a few numbers of each frame.

    Args:
        source: the video.
        blocks: whether to compare frames block by block, as `duplicates` needs.
        skip_damage: go on behind damaged places; see `Source.frames`.
        keep_good: end at the first damaged place, with a note in `damage`.
        progress: called once a frame.

    Raises:
        VideoError: if it has no frames, or is damaged.
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
            # Any matrix does to compare frames; the scaler does not know the file's own if it is a rare one.
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
            block_changes.append(block_change(seen["grey"], grey) if starts and blocks else float("inf"))
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
    # What frames tell of how long they last is of the order in which they are decoded; the stream's end is surer.
    last_step = 0 if source.end is None or source.late else source.end - starts[-1]
    if not 0 < last_step <= 2 * max(steps, default=last_step):
        last_step = seen["duration"] or round(usual) or round(1 / (source.rate or 25) / unit) or 1
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
    mirrored, rotation = _turn(matrix)
    return {
        "size": (frame.height, frame.width),
        "pixel_format": frame.format.name,
        "tags": ColourTags.of(frame),
        "matrix": matrix,
        "mirrored": mirrored,
        "rotation": rotation,
    }


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """How players turn a frame, as FFmpeg's nine numbers; None if not at all."""
    data = side_data(frame, _DISPLAY_MATRIX)
    return None if data is None else np.frombuffer(data, dtype=np.int32).tolist()


def side_data(frame: av.VideoFrame, kind: int) -> bytes | None:
    """
    What a frame carries besides pixels.

    PyAV fails at kinds that it does not know (EXIF), and frees colour profiles twice, as soon as it is asked for any kind. So it
    gets to see the frame with none but the one.

    Args:
        kind: FFmpeg's number, of its AVFrameSideDataType.
    """
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1))]
    nodes += [graph.add("sidedata", f"mode=delete:type={other}") for other in range(_SIDE_DATA_KINDS) if other != kind]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    return next((bytes(data) for data in graph.pull().side_data), None)


def _turn(matrix: list[int] | None) -> tuple[bool, int]:
    """Whether left and right change places first, and then degrees against the clock."""
    a, b, c, d = (1, 0, 0, 1) if matrix is None else (matrix[0], matrix[1], matrix[3], matrix[4])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(-degrees(atan2(b, a)) / 90) * 90 % 360


def _wealth(pixel_format: av.VideoFormat) -> tuple[int, ...]:
    """What orders formats by how much they hold: colours, bits, transparency, fineness of colours."""
    across, down = chroma_of(pixel_format)
    has_colours = is_rgb(pixel_format) or len(pixel_format.components) >= 3
    return (
        has_colours,
        max(component.bits for component in pixel_format.components),
        len(pixel_format.components),
        -across * down,
    )


def image_frame(path: Path) -> av.VideoFrame:
    """
    An image file as a frame of RGB, or RGBA where something is not opaque, of 8 or 16 bits, turned upright.

    Raises:
        VideoError: if it cannot be read, or is larger than 8192x8192 pixels.
    """
    try:
        with Image.open(path) as image:
            _check_image_size(path, *image.size)
            if not _is_for_ffmpeg(image):
                return _frame_of(upright(image), path)
    except UnidentifiedImageError:
        pass  # FFmpeg knows some more
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot read {path} as an image: {reason(error)}") from error
    try:
        with av.open(file_url(path)) as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration) as error:
        raise VideoError(f"cannot read {path} as an image: {reason(error)}") from error
    _check_image_size(path, frame.width, frame.height)
    mirrored, rotation = _turn(display_matrix(frame))
    if mirrored or rotation:
        array = frame.to_ndarray(format="rgb48le")
        array = np.rot90(array[:, ::-1] if mirrored else array, rotation // 90)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb48le")
    return frame


def _check_image_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise VideoError(f"{path} must have at most 8192x8192 pixels, but has {width}x{height}")


def _is_for_ffmpeg(image: Image.Image) -> bool:
    """Whether Pillow would keep 8 bits of more; of grey, it keeps 16."""
    if image.mode[0] in "IF":
        return False
    settings = [tile.args for tile in image.tile]
    # What Pillow scales down in a PPM file it tells with the greatest value.
    is_scaled = image.format == "PPM" and any(
        isinstance(each, tuple) and isinstance(each[-1], int) and each[-1] > 255 for each in settings
    )
    return ";16" in str(settings) or is_scaled


def _frame_of(image: Image.Image, path: Path) -> av.VideoFrame:
    if image.mode[0] in "IF":
        return av.VideoFrame.from_ndarray(
            (rgb_of_image(image, str(path)) * 65535).round().astype(np.uint16), format="rgb48le"
        )
    transparent = rgba_of_transparent(image)
    if transparent is not None:
        return av.VideoFrame.from_ndarray(np.array(transparent), format="rgba")
    return av.VideoFrame.from_ndarray(np.array(image.convert("RGB")), format="rgb24")


def _pixel_aspect(source: Source) -> Fraction | None:
    if source.images is not None:
        try:
            with Image.open(source.images[0]) as image:
                aspect, is_on_its_side = pixel_aspect(image), image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                return 1 / aspect if aspect and is_on_its_side else aspect
        except Exception:  # Pillow raises anything at what it does not know, and FFmpeg has read it or told of it
            return None
    with source.open() as container:
        aspect = main_stream(container, source.path).sample_aspect_ratio
    return aspect if aspect and aspect != 1 else None


def _on_grid(starts: array, end: int, unit: Fraction, rate: Fraction | None) -> tuple[array, int, Fraction] | None:
    """Times as whole numbers of a rate's frames, where they are such to within the rounding of the file's clock."""
    if not rate or unit * rate > Fraction(1, 4):
        return (starts, end, unit) if rate and unit * rate == 1 else None
    tick = unit * rate
    numbers = array("q", (round(start * tick) for start in starts))
    if any(abs(start * tick - number) > tick for start, number in zip(starts, numbers)) or any(
        a >= b for a, b in zip(numbers, numbers[1:])
    ):
        return None
    return numbers, max(numbers[-1] + 1, round(end * tick)), 1 / rate


def block_change(prev: np.ndarray, next_: np.ndarray) -> float:
    """The mean difference, of 255, of the block of 8x8 pixels where it is greatest, between two `(H, W)` uint8."""
    difference = cv2.absdiff(prev, next_)
    height, width = difference.shape
    return float(cv2.resize(difference, (max(1, width // 8), max(1, height // 8)), interpolation=cv2.INTER_AREA).max())


def main_stream(container: av.container.InputContainer, path: Path) -> av.video.stream.VideoStream:
    """The first video stream that is no cover picture.

    Raises:
        VideoError: if there is none that can be decoded.
    """
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            context = stream.codec_context
            if context is None:
                raise VideoError(f"{path}: its video is of a kind that FFmpeg cannot decode")
            if context.width * context.height > MOST_PIXELS:
                raise VideoError(
                    f"{path} must have frames of at most 8192x8192 pixels, but has {context.width}x{context.height}"
                )
            return stream
    raise VideoError(f"{path} has no video")


def find_images(path: Path) -> tuple[list[Path] | None, list[Path]]:
    """
    The images that a folder or pattern stands for, in the order of the numbers in their names, None for a file; and files beside them
    that are no images.

    Raises:
        VideoError: if there are none, or no such folder.
    """
    folder, pattern = (path, None) if path.is_dir() else (path.parent, path.name)
    if pattern is not None and (path.is_file() or not re.search(r"%\d*d|[*?]", pattern)):
        return None, []
    if not folder.is_dir():
        raise VideoError(f"there is no folder {folder}")
    named = [
        each
        for each in folder.iterdir()
        if not each.name.startswith(".") and not each.is_dir() and (pattern is None or _is_named(each.name, pattern))
    ]
    images = [each for each in named if each.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise VideoError(
            f"there are no images ({', '.join(IMAGE_SUFFIXES)}) {'in' if pattern is None else 'named'} {path}"
        )
    order = sorted(
        images, key=lambda each: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", each.name)]
    )
    return order, sorted(set(named) - set(images))


def _is_named(name: str, pattern: str) -> bool:
    """Whether a pattern with `%d`, `%05d`, `*` or `?` stands for a name."""
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    expression = re.sub(r"%(0?)(\d*)d", lambda match: rf"\d{{{match[2]}}}" if match[2] else r"\d+", expression)
    return re.fullmatch(expression, name) is not None


def is_video(path: Path) -> bool:
    """Whether FFmpeg finds moving pictures in a file, whatever its name is."""
    try:
        with av.open(file_url(path), metadata_errors="replace") as container:
            if container.format.name.endswith("_pipe") or container.format.name in (
                "image2",
                "tty",
            ):  # images, and text
                return False
            main_stream(container, path)
            return True
    except (av.FFmpegError, OSError, ValueError):
        return False


def file_url(path: Path) -> str:
    """What FFmpeg takes for a file whatever its name; a colon in it would mean a protocol."""
    return f"file:{path}"


def reason(error: Exception) -> str:
    """What went wrong, without the numbers and names that FFmpeg's errors begin and end with."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
