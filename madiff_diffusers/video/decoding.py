"""Video files and images in order, decoded frame by frame."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av

from ..files import IMAGE_SUFFIXES
from .errors import VideoError
from .ffmpeg import exact, open_file, reason
from .images import MOST_PIXELS, find_images, image_frame, is_named


IMAGE_RATE = Fraction(24)  # Frames a second of images, unless told otherwise.

# Of files that hold a picture, which FFmpeg opens as videos of one frame: AVIF and HEIF.
STILL_BRANDS = ("avif", "heic", "heix", "mif1")

# Seconds by which a frame may be earlier than the one before it through a fault of the file. By more, recordings were glued together.
LONGEST_RETURN = 1


class Source:
    """
    A source of frames: a video file, or images.

    Args:
        path: a video file; a folder of images; or several images, named by a pattern with `%d`, `%05d`, `*` or `?`. Images are
            taken in the order of the numbers in their names.
        image_rate: frames a second of images, `IMAGE_RATE` if not given. A video file has a rate of its own.

    Raises:
        VideoError: if there is no such file or folder, or it is empty.
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
        # The rate that the file tells, if it does, and the seconds that times are counted in.
        self.rate = None if self.images is None else image_rate or IMAGE_RATE
        self.time_base = Fraction(1) if self.rate is None else 1 / self.rate
        # When the stream ends, if the file tells.
        self.end: int | None = None
        self.told_end: int | None = None  # the same, or what Matroska's tags tell
        self.damage: list[str] = []
        self.late = 0

    def takes(self, path: Path) -> bool:
        """Whether a file, once it is there, is one of the images."""
        if self.images is None or path.absolute().parent.resolve() != self.images[0].absolute().parent.resolve():
            return False
        return path.suffix.lower() in IMAGE_SUFFIXES and (self.path.is_dir() or is_named(path.name, self.path.name))

    def open(self) -> av.container.InputContainer:
        """
        Open the video file.

        Raises:
            VideoError: if it cannot be read.
        """
        try:
            return open_file(self.path)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot read {self.path} as a video: {reason(error)}") from error

    def frames(self, skip_damage: bool = False) -> Iterator[tuple[int, av.VideoFrame]]:
        """
        Decode all frames.

        Args:
            skip_damage: whether to go on behind damaged places, which are told in `damage`.

        Yields:
            the time when a frame begins, in units of `time_base`, and the frame. Each is later than the one before, and has the size of
            the first. Frames that are not later are left out, and counted in `late`.

        Raises:
            VideoError: without `skip_damage`, where nothing can be decoded or the size changes.
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
        with self.open() as container, closing_decoder(main_stream(container, self.path)) as stream:
            self.time_base = exact(stream.time_base) or Fraction(1)
            self.rate = exact(stream.guessed_rate or stream.average_rate)
            self.end = None if stream.duration is None else (stream.start_time or 0) + stream.duration
            self.told_end = self.end
            if self.end is None and (
                told := re.fullmatch(r"(\d+):(\d\d):([\d.]+)", stream.metadata.get("DURATION", ""))
            ):  # Matroska
                hours, minutes, seconds = map(Fraction, told.groups())
                self.told_end = round((3600 * hours + 60 * minutes + seconds) / self.time_base)
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
                    if is_avi:  # AVI tells times of decoding alone, and the last frames have none.
                        ahead = (frame.dts or 0) - (stream.start_time or 0) if ahead is None else ahead
                        start = None if frame.dts is None else frame.dts - ahead
                    last = start if start is not None else last
                    if frame.is_corrupt:  # The decoder has filled in what it could not read.
                        where = "" if last is None else f" at {float(last * self.time_base):.2f} s"
                        self._damaged(f"{self.path} is damaged: its frame{where} cannot be decoded whole", skip_damage)
                        continue
                    yield start, frame

    def _image_frames(self, skip_damage: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        for number, path in enumerate(self.images or []):
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


def main_stream(container: av.container.InputContainer, path: Path) -> av.video.stream.VideoStream:
    """
    The first video stream that is no cover picture.

    Raises:
        VideoError: if there is none, or it cannot be decoded.
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


@contextmanager
def closing_decoder(stream: av.video.stream.VideoStream) -> Iterator[av.video.stream.VideoStream]:
    """
    Have a stream's decoder stop its threads in the end, as PyAV frees it only with the GIL held.

    A thread that is decoding then and has an error to log, where `av.logging` has a level (torchvision before 0.26 sets one when it is
    imported), waits for the GIL while PyAV waits for the thread, forever.
    """
    try:
        yield stream
    finally:
        stream.codec_context.flush_buffers()  # releases the GIL


def is_video(path: Path) -> bool:
    """Whether FFmpeg finds moving pictures in a file, whatever its name is."""
    try:
        with open_file(path) as container:
            # FFmpeg reads images and text too.
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                return False
            if container.metadata.get("major_brand") in STILL_BRANDS:
                return False
            main_stream(container, path)
            return True
    except (av.FFmpegError, OSError, ValueError):
        return False
