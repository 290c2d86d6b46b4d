"""Whole videos: planned once, made part by part, put together at the end; stopped, resumed and shared among processes."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from .. import __version__
from ..files import UnwritableError, check_outputs, unwritable
from ..image_io import image_format, write_image
from ..pipeline_madiff import MADiffPipeline
from ..properties import lost
from ..scene_cuts import cuts_of_changes
from ..terminal import bar_settings
from .assembling import assemble, write_pictures
from .colour import ColourPath, ColourTags, chroma_of, is_rgb
from .found import found_in_video, hdr10_of
from .frame_times import ShownFrame, Timeline
from .middles import FrameMaker, Neighbour, tile_pixels_for
from .options import VideoOptions
from .reading import Source, VideoError, analyse
from .writing import (
    FOLDER,
    MOST_GIF_RATE,
    PartWriter,
    check_encoding,
    choose_encoding,
    container_of,
    is_complete,
    told_tags,
    write_json,
)


PART_SECONDS = 2  # of the result, which a part holds about: what is lost when work is killed, and how far apart its key frames are
QUEUE = 2  # frames that are decoded ahead, and that wait to be encoded
MOST_NOTES = 5  # of damaged places
PREVIEW_FRAMES, PREVIEW_HEIGHT = 8, 180

T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]


class VideoResult(NamedTuple):
    """
    Args:
        path: of the file or folder.
        frames: that it shows.
        made: of them, by the pipeline.
        notes: what is not as in the source, in words.
    """

    path: Path
    frames: int
    made: int
    notes: list[str]


class Part(NamedTuple):
    """
    Args:
        first, last: kept source frames, by their place in `Timeline.kept`, whose time the part fills; without the last.
        number: of its first frame in the result.
        count: frames.
    """

    first: int
    last: int
    number: int
    count: int


class VideoJob:
    """
    One video to be made. Every process of a launch has the same one.

    Args:
        pipeline: what makes the frames.
        source, output: files or folders; see `reading.Source` and `writing.CONTAINERS`.
        options: see [`VideoOptions`].
        keep_partial: make do with what is good of a damaged source.
        progress: called once for each frame of the source while that is looked through.

    Raises:
        VideoError: if the source cannot be read, or the output not be written as asked.
    """

    def __init__(
        self,
        pipeline: MADiffPipeline,
        source: str | Path,
        output: str | Path,
        options: VideoOptions,
        keep_partial: bool = False,
        progress: Callable[[], None] | None = None,
    ):
        self.pipeline, self.options, self.output = pipeline, options.checked(), Path(output)
        check_output(self.output, self.options)
        container = container_of(self.output)
        self.source = Source(source, self.options.image_fps)
        self.analysis = analyse(
            self.source,
            blocks=self.options.dedup,
            skip_damage=self.options.skip_damage,
            keep_good=keep_partial,
            progress=progress,
        )
        self.found = found_in_video(self.source, self.analysis)
        self.is_cut_short = bool(self.analysis.damage) and keep_partial and not self.options.skip_damage
        self.timeline = self._timeline(container.steady)
        slowed = self.analysis.rate / self.options.slow_motion
        rate = self.timeline.rate or (slowed * self.options.factor).limit_denominator(10**5)
        self.encoding = choose_encoding(
            self.output,
            self.analysis,
            self.timeline.time_base,
            rate,
            self.options.codec,
            self.options.crf,
            self.options.preset,
            hdr10_of(self.source),
        )
        self._colours: dict[ColourTags, ColourPath] = {}
        self.written_colour = ColourPath(self.encoding.tags, self.analysis.size[0])
        self.parts = self._parts()
        self.folder = parts_folder(self.output)

    def _timeline(self, steady: bool) -> Timeline:
        options, analysis = self.options, self.analysis
        dropped, still = analysis.duplicates(options.dedup_threshold, options.dedup_run) if options.dedup else ([], [])
        gone = set(dropped)
        kept = [index for index in range(len(analysis.starts)) if index not in gone]
        # A cut that falls on a frame which is left out is one before the next that is kept.
        cuts = set(cuts_of_changes(analysis.changes[1:], options.cut_threshold, options.cut_ratio))
        held = {a for a, b in zip(kept, kept[1:]) if not cuts.isdisjoint(range(a + 1, b + 1))}
        held |= {
            a
            for a, b in zip(kept, kept[1:])
            if (analysis.starts[b] - analysis.starts[a]) * analysis.unit > options.max_gap
        }
        rate = options.fps
        if rate is None and steady:  # a file that has but one rate
            rate = analysis.rate / options.slow_motion * options.factor
        if rate is None and container_of(self.output).format == "gif":
            times = analysis.starts
            shortest = (
                min((later - time for time, later in zip(times, times[1:])), default=analysis.end)
                * analysis.unit
                * options.slow_motion
                / options.factor
            )
            if shortest < Fraction(
                1, MOST_GIF_RATE
            ):  # all frames of one length, of whole hundredths of a second, as near as players keep
                wanted = analysis.rate / options.slow_motion * options.factor
                rate = Fraction(100, max(100 // MOST_GIF_RATE, ceil(100 / wanted)))
        return Timeline(
            analysis.starts,
            analysis.end,
            analysis.unit,
            factor=options.factor if rate is None else None,
            rate=rate,
            slow_motion=options.slow_motion,
            dropped=dropped,
            held=held | set(still),
        )

    def _parts(self) -> list[Part]:
        """Of about `PART_SECONDS` each; the same for every process, and every time."""
        kept = len(self.timeline.kept)
        seconds = float(self.timeline.duration * self.timeline.time_base)
        each = max(1, round(kept * PART_SECONDS / seconds))
        parts, number = [], 0
        for first in range(0, kept, each):
            last = min(first + each, kept)
            count = self.timeline.count(first, last)
            if count:
                parts.append(Part(first, last, number, count))
            number += count
        return parts

    def path(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:08d}"

    def done(self) -> list[Part]:
        return [part for part in self.parts if is_complete(self.path(part))]

    def identity(self) -> dict[str, Any]:
        """What makes two jobs the same, so that one can go on with what the other did."""
        options = {name: str(value) for name, value in asdict(self.options).items() if name != "max_memory"}
        return {
            "version": __version__,
            "source": self._source_digest(),
            "checkpoint": pipeline_digest(self.pipeline),
            "encoding": str(self.encoding),
            **options,
        }

    def _source_digest(self) -> str:
        digest = hashlib.sha256()
        for path in self.source.images or [self.source.path]:
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest.update(f"{path.name if self.source.images else ''} {size}".encode())
                digest.update(file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read())
        return digest.hexdigest()

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """
        Make the folder of parts, or take up the one that is there. One process does that for all.

        Raises:
            VideoError: if something is there that must not be lost.
        """
        if self.output.exists() and not overwrite and not (self.output.is_dir() and not any(self.output.iterdir())):
            raise VideoError(f"{self.output} is there already; `overwrite` replaces it")
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise VideoError(f"{self.folder} is needed for parts, but is no folder")
        plan = self.folder / "job.json"
        identity = self.identity()
        if plan.is_file() and (resume or not overwrite):
            before = json.loads(plan.read_text(encoding="utf-8"))
            others = [name for name, value in identity.items() if before.get(name) != value]
            if others and self.done() and not overwrite:
                raise VideoError(
                    f"{self.folder} holds unfinished work of another job ({', '.join(others)} differ); `overwrite` or delete it"
                )
            if not resume and self.done():
                raise VideoError(
                    f"{self.folder} holds {len(self.done())} of {len(self.parts)} parts of this job; `resume` goes on with them, `overwrite` begins anew"
                )
            if not others:
                for leftover in self.folder.glob("*.tmp"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                return
        elif not plan.is_file() and any(path.suffix != ".tmp" for path in self.folder.glob("*")):
            raise VideoError(f"{self.folder} is needed for parts, but holds something else")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        pixels = self.analysis.size[0] * self.analysis.size[1]
        try:
            write_json(
                plan,
                {
                    **identity,
                    "tile_pixels": tile_pixels_for(self.pipeline, pixels, self.options.max_memory, self.options.steps),
                },
            )
            self._try_encoding()
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def _try_encoding(self) -> None:
        """Write a file of one frame, to find before the work what an encoder or a kind of file refuses."""
        with tempfile.TemporaryDirectory(dir=self.folder, suffix=".tmp") as folder:
            part = Path(folder) / "part"
            writer = PartWriter(part, self.encoding, self.written_colour, 0)
            try:
                writer.write(np.zeros((*self.analysis.size, 3), np.float32), 0)
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            if self.encoding.codec != "png":
                write_pictures(Path(folder) / f"whole{self.output.suffix}", self.encoding, [part], 1)

    def make_parts(
        self, parts: list[Part], preview: Path | None = None, advance: Callable[[int], None] = lambda count: None
    ) -> int:
        """
        Make parts that are not there yet: frames are decoded ahead and encoded behind while the pipeline works.

        Args:
            parts: in order.
            preview: image file for the latest frames side by side, written with each part.
            advance: called with 1 for each frame.

        Returns:
            frames that the pipeline made.
        """
        todo = [part for part in parts if not is_complete(self.path(part))]
        tile_pixels = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))["tile_pixels"]
        maker = FrameMaker(self.pipeline, self.options.steps, self.options.seed)
        made = 0
        strip: deque[tuple[str, Image.Image]] = deque(maxlen=PREVIEW_FRAMES)
        with (
            _tiled(self.pipeline, tile_pixels),
            _ahead(self._decoded(todo), QUEUE) as decoded,
            _Behind(QUEUE) as encoder,
        ):
            supply = _Supply(decoded)
            for part in todo:
                writer = PartWriter(self.path(part), self.encoding, self.written_colour, part.number)
                try:
                    for place, shown in zip(range(part.first, part.last), self.timeline.shown(part.first, part.last)):
                        for frame, array in self._frames_of(place, shown, supply, maker):
                            encoder.do(writer.write, array, frame.time)
                            made += bool(frame.position)
                            if preview is not None:
                                strip.append((self._caption(frame), _small(self._upright(array))))
                            advance(1)
                    encoder.wait()
                    writer.close()
                except BaseException:
                    encoder.cancel()
                    writer.abandon()
                    raise
                if preview is not None:
                    write_strip(list(strip), preview)
        return made

    def _decoded(self, parts: list[Part]) -> Iterator[tuple[int, np.ndarray]]:
        """The source frames that parts need, in order, by their places in `Timeline.kept`."""
        kept = self.timeline.kept
        needed = {place for part in parts for place in range(part.first, min(part.last + 1, len(kept)))}
        if not needed:
            return
        places, last = {kept[place]: place for place in needed}, kept[max(needed)]
        for index, (_, frame) in enumerate(self.source.frames(self.options.skip_damage)):
            if index in places:
                yield places[index], self._to_rgb(frame)
            if index == last:
                return
        raise VideoError(f"{self.source.path} has changed: it ends before frame {last + 1}")

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """By what the frame tells of itself: others before it may have told something else."""
        tags = told_tags(ColourTags.of(frame), frame.format.name)
        if tags not in self._colours:
            self._colours[tags] = ColourPath(tags, frame.height)
        return self._colours[tags].to_rgb(frame)

    def _frames_of(
        self, place: int, shown: list[ShownFrame], supply: "_Supply", maker: FrameMaker
    ) -> Iterator[tuple[ShownFrame, np.ndarray]]:
        index, positions = self.timeline.kept[place], [frame.position for frame in shown if frame.position]
        made = maker.between(supply.get(place), supply.get(place + 1), positions) if positions else iter(())
        for frame in shown:
            if frame.position:
                yield frame, next(made)
            else:
                yield frame, supply.get(place if frame.index == index else place + 1).frame

    def _upright(self, array: np.ndarray) -> np.ndarray:
        return np.rot90(array[:, ::-1] if self.analysis.mirrored else array, self.analysis.rotation // 90)

    def _caption(self, frame: ShownFrame) -> str:
        return f"{float(frame.time * self.timeline.time_base):.3f} s {'made' if frame.position else 'source'}"

    def finish(self) -> list[str]:
        """Put the parts together, and remove them. Returns what is not as in the source."""
        notes = self._assemble(self.parts, self.timeline.duration, self.output, is_partial=False)
        shutil.rmtree(self.folder)
        damage = self.analysis.damage
        more = [f"{len(damage) - MOST_NOTES} more places are damaged"] if len(damage) > MOST_NOTES else []
        names = ", ".join(path.name for path in self.source.left_out)
        more += [f"left out, for they are no images: {names}"] if names else []
        return [*damage[:MOST_NOTES], *more, *self.analysis.notes, *self._notes(), *notes]

    def _notes(self) -> list[str]:
        notes, analysis, encoding = [], self.analysis, self.encoding
        coded, source = av.VideoFormat(encoding.pixel_format), av.VideoFormat(analysis.pixel_format)
        if analysis.interlaced:
            notes.append(
                f"{self.source.path} is interlaced: frames are made of both fields at once; deinterlace it first"
            )
        if max(part.bits for part in source.components) > max(part.bits for part in coded.components):
            notes.append(
                f"{encoding.codec} keeps {coded.components[0].bits} bits of the source's {source.components[0].bits} ({coded.name})"
            )
        (across, down), (own_across, own_down) = chroma_of(coded), chroma_of(source)
        if across * down > own_across * own_down and (len(source.components) >= 3 or is_rgb(source)):
            notes.append(f"{encoding.codec} keeps one colour for {across}x{down} pixels ({coded.name})")
        notes += lost(self.found, encoding.container.format or "folder", encoding.codec)
        upright = analysis.size[::-1] if encoding.turned in (90, 270) else analysis.size
        if encoding.size != tuple(upright):
            notes.append(
                f"{encoding.codec} has no odd sizes: {upright[1]}x{upright[0]} is {encoding.size[1]}x{encoding.size[0]}, the edge repeated"
            )
        if encoding.codec == "gif" and encoding.rate != self.options.fps and self.timeline.rate is not None:
            wanted = float(analysis.rate / self.options.slow_motion * self.options.factor)
            notes.append(
                f"GIF players keep delays of 2/100 s and more: {float(encoding.rate):.2f} frames a second are shown in the place of {wanted:.2f}"
            )
        return notes

    def save_partial(self) -> Path | None:
        """A playable file of the parts that are done from the beginning on; None if there are none."""
        done = [part for part in self.parts if is_complete(self.path(part))]
        first = [part for part, other in zip(self.parts, done) if part == other]
        if not first:
            return None
        if len(first) == len(self.parts):
            end = self.timeline.duration
        else:
            end = next(frame.time for shown in self.timeline.shown(self.parts[len(first)].first) for frame in shown)
        output = partial_path(self.output)
        self._assemble(first, end, output, is_partial=True)
        return output

    def _assemble(self, parts: list[Part], end: int, output: Path, is_partial: bool) -> list[str]:
        paths = [self.path(part) for part in parts]
        if self.encoding.codec == "png":
            whole = self.folder / "frames"
            whole.mkdir(exist_ok=True)
            for path in paths:
                for image in path.iterdir():
                    shutil.copyfile(image, whole / image.name)
            if output.exists():
                shutil.rmtree(output)
            os.replace(whole, output)
            return []
        joined = self.folder / f"joined{output.suffix}"
        try:
            notes = assemble(
                joined,
                self.encoding,
                paths,
                end,
                self.source,
                self.analysis,
                self.options.slow_motion,
                self.options.audio,
                is_partial,
            )
            os.replace(joined, output)
        finally:
            joined.unlink(missing_ok=True)
        return notes


def check_output(output: Path, options: VideoOptions) -> None:
    """
    Refuse what can be known to fail before a source is read.

    Args:
        output: file or folder.
        options: checked.

    Raises:
        VideoError: for a place that cannot be written to, and for what `writing.check_encoding` refuses.
    """
    is_folder = container_of(output) is FOLDER
    if not output.absolute().parent.is_dir():
        raise VideoError(f"there is no folder {output.parent} to write into")
    if output.exists() and output.is_dir() != is_folder:
        raise VideoError(f"{output} is {'a folder' if output.is_dir() else 'a file'} already")
    if is_folder and (output.is_symlink() or os.path.ismount(output)):
        raise VideoError(
            f"{output} is a link or a mounted disk, which cannot be replaced as a whole; name a folder inside it"
        )
    if output.is_dir() and not all(re.fullmatch(r"\d{8}\.png", path.name) for path in output.iterdir()):
        raise VideoError(f"{output} holds other files than frames that were written before")
    check_encoding(output, options.codec, options.crf, options.preset, options.fps)


def parts_folder(output: Path) -> Path:
    """Where parts lie until an output is complete."""
    return output.with_name(output.name + ".parts")


def partial_path(output: Path) -> Path:
    """What is written of an output that cannot be completed, if that is asked for."""
    return output.with_name(f"{output.stem}.partial{output.suffix}")


def outputs_of(
    output: Path, resume: bool, overwrite: bool, keep_partial: bool, preview: Path | None = None
) -> list[tuple[Path, bool]]:
    """All that making a video writes, and whether each may be there already, for `check_outputs`. What is in folders that are there is
    looked at by `VideoJob.prepare`."""
    may_be_there = overwrite or (resume and (parts_folder(output) / "job.json").is_file())
    written = [(output, overwrite or output.is_dir()), (parts_folder(output), True)]
    written += [(partial_path(output), may_be_there)] if keep_partial else []
    return written + ([] if preview is None else [(preview, may_be_there)])


def check_places(
    source: str | Path,
    output: Path,
    options: VideoOptions,
    resume: bool,
    overwrite: bool,
    keep_partial: bool,
    preview: Path | None,
) -> None:
    """
    Refuse, before anything is decoded, what would be written over, and what `check_output` refuses.

    Args:
        options: checked; the others are as in `interpolate_video`.

    Raises:
        VideoError: if something would be lost, or cannot be written as asked.
        ValueError: if `preview` is no image file's name.
    """
    read = Source(source, options.image_fps)
    if preview is not None:
        image_format(preview)
        if not preview.absolute().parent.is_dir():
            raise VideoError(f"there is no folder {preview.parent} for `preview`")
    try:
        check_outputs(
            outputs_of(output, resume, overwrite, keep_partial, preview),
            read.images or [read.path],
            "; `overwrite` replaces it",
        )
    except ValueError as error:
        raise VideoError(str(error)) from error
    if preview is not None and read.takes(preview):
        raise VideoError(f"`preview` {preview} would become one of the images of {source}")
    check_output(output, options)


def interpolate_video(
    pipeline: MADiffPipeline,
    source: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_partial: bool = False,
    preview: str | Path | None = None,
    progress: bool | Progress = True,
    processes: Any = None,
    **options,
) -> VideoResult:
    """
    Interpolate a video file into another, with its sound, subtitles, chapters, metadata and rotation.

    While it works, finished parts lie in the folder `OUTPUT.parts`; the output is there once it is complete. If the work is
    stopped or fails, the parts stay, unless there are none.

    Args:
        pipeline: what makes the frames.
        source: a video file, a folder of images, or images by a pattern (`%05d`, `*`).
        output: a file (.mp4, .m4v, .mov, .mkv, .webm, .avi, .gif, .y4m), or a folder, which gets PNG files.
        resume: go on with the parts that are there.
        overwrite: replace an output, and parts, that are there; with `resume`, parts only if they are of other work.
        keep_partial: when the work is stopped or fails, or the source is damaged, write what is good as `NAME.partial.ENDING`.
        preview: image file to write the latest frames into, side by side, with each part.
        progress: whether to show a bar; or what is called instead, with "reading" or the output's name, frames that are done, and all
            of them if that is known. What it raises stops the work.
        processes: an `accelerate.PartialState`; its processes share the work, and all call this.
        options: the fields of [`VideoOptions`].

    Returns:
        [`VideoResult`]; `made` counts this process's frames.

    Raises:
        VideoError: for what cannot be read, or not be written as asked; nothing is left then.
        OSError: if a disk is full, or a file cannot be written.
    """
    output, preview = Path(output), None if preview is None else Path(preview)
    check_places(source, output, VideoOptions(**options).checked(), resume, overwrite, keep_partial, preview)
    if processes is not None:
        processes.wait_for_everyone()  # one that looks later would find what others have made
    return make_video(
        pipeline,
        source,
        output,
        resume=resume,
        overwrite=overwrite,
        keep_partial=keep_partial,
        preview=preview,
        progress=progress,
        processes=processes,
        **options,
    )


def make_video(
    pipeline: MADiffPipeline,
    source: str | Path,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    keep_partial: bool,
    preview: Path | None,
    progress: bool | Progress = True,
    processes: Any = None,
    **options,
) -> VideoResult:
    """`interpolate_video` without its look at what would be written over, for callers that have looked at all of several videos."""
    count, rank = (1, 0) if processes is None else (processes.num_processes, processes.process_index)
    wait = (lambda: None) if processes is None else processes.wait_for_everyone
    show = progress if rank == 0 else False
    with _bar(show, desc="reading") as bar:
        job = VideoJob(pipeline, source, output, VideoOptions(**options), keep_partial, bar.update)
    if rank == 0:
        with _naming(job.output):
            job.prepare(resume, overwrite)
    wait()
    made = 0
    try:
        mine = job.parts[rank::count]
        finished = sum(part.count for part in mine if is_complete(job.path(part)))
        with _bar(show, desc=job.output.name, total=sum(part.count for part in mine), initial=finished) as bar:
            made = job.make_parts(mine, None if rank else preview, bar.update)
        wait()
        if rank == 0 and job.is_cut_short:
            partial = job.save_partial()
            shutil.rmtree(job.folder)
            raise VideoError(f"{job.analysis.damage[0]}; what is good is in {partial}")
        notes = job.finish() if rank == 0 else []
    except BaseException as error:
        if rank == 0 and job.folder.exists():
            if keep_partial and not isinstance(error, VideoError):
                with suppress(OSError, av.FFmpegError):  # the disk may be full; the parts stay
                    job.save_partial()
            if not job.done():
                shutil.rmtree(job.folder, ignore_errors=True)
        with _naming(job.output):
            raise
    wait()
    return VideoResult(job.output, len(job.timeline), made, notes)


def pipeline_digest(pipeline: MADiffPipeline) -> str:
    """Of everything that decides on what a pipeline makes."""
    digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            digest.update(json.dumps(dict(component.config), sort_keys=True, default=str).encode())
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    """Makes errors that name no file, as a full disk's, name the output."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, UnwritableError) or (
            error.filename is not None and not isinstance(error, av.FFmpegError)
        ):
            raise
        raise unwritable(output, error) from error


@contextmanager
def _bar(show: bool | Progress, **settings) -> Iterator[Union[tqdm, "_Told"]]:
    if callable(show):
        yield _Told(show, settings["desc"], settings.get("initial", 0), settings.get("total"))
        return
    with tqdm(disable=not show, **bar_settings("frame", "frames"), **settings) as bar:
        yield bar


class _Told:
    """A caller's own bar."""

    def __init__(self, tell: Progress, name: str, done: int, total: int | None):
        self._tell, self._name, self._done, self._total = tell, name, done, total
        tell(name, done, total)

    def update(self, count: int = 1) -> None:
        self._done += count
        self._tell(self._name, self._done, self._total)


@contextmanager
def _tiled(pipeline: MADiffPipeline, tile_pixels: int | None) -> Iterator[None]:
    """Tiles for as long as they are needed; a pipeline that has others keeps them where none are."""
    before = pipeline.tiling
    if tile_pixels is not None:
        pipeline.enable_tiling(tile_pixels)
    try:
        yield
    finally:
        pipeline.tiling = before


class _Supply:
    """The source frames of a stream, of which the latest two are held.

    Args:
        frames: with their places, increasing.
    """

    def __init__(self, frames: Iterable[tuple[int, np.ndarray]]):
        self._frames = iter(frames)
        self._held: deque[tuple[int, Neighbour]] = deque(maxlen=2)

    def get(self, place: int) -> Neighbour:
        while not self._held or self._held[-1][0] < place:
            found, frame = next(self._frames)
            self._held.append((found, Neighbour(frame)))
        return next(neighbour for found, neighbour in self._held if found == place)


@contextmanager
def _ahead(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Items that a thread gets while others are used, at most so many ahead."""
    end, iterator = object(), iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def take() -> Iterator[T]:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item

    try:
        yield take()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if hasattr(iterator, "close"):
            iterator.close()


class _Behind:
    """Calls that a thread makes one after the other, at most so many waiting; what they raise comes with the next one."""

    def __init__(self, depth: int):
        self._depth, self._pool = depth, ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._waiting: deque[Future] = deque()

    def do(self, call: Callable, *arguments: Any) -> None:
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))

    def wait(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def cancel(self) -> None:
        """Forget calls that wait, and let the one that is being made end."""
        for future in self._waiting:
            future.cancel()
        for future in self._waiting:
            if not future.cancelled():
                future.exception()
        self._waiting.clear()

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _small(array: np.ndarray) -> Image.Image:
    image = Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize(
        (max(1, round(image.width * PREVIEW_HEIGHT / image.height)), PREVIEW_HEIGHT), Image.Resampling.BOX
    )


def write_strip(frames: list[tuple[str, Image.Image]], path: Path) -> None:
    """Captioned frames side by side in an image file."""
    width = sum(image.width for _, image in frames)
    strip = Image.new("RGB", (width, PREVIEW_HEIGHT + 14), "white")
    draw, left = ImageDraw.Draw(strip), 0
    for caption, image in frames:
        strip.paste(image, (left, 0))
        draw.text((left + 2, PREVIEW_HEIGHT + 1), caption, fill="black")
        left += image.width
    write_image(strip, path)
