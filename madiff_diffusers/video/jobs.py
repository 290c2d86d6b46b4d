"""Whole videos: planned once, made part by part, put together at the end; stopped, resumed and shared among processes."""

import itertools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np

from ..files import UnwritableError, held, is_empty, unwritable, write_text
from ..pipeline_madiff import MADiffPipeline
from .analysis import analyse
from .colour import ColourPath, ColourTags
from .decoding import Source
from .destinations import check_folder, check_output, check_places, partial_path, parts_folder, read_plan
from .encoding import choose_encoding, told_tags
from .errors import VideoError
from .formats import container_of
from .frame_times import ShownFrame
from .interpolation import FrameInterpolator, FrameWindow, Pair
from .memory import USUAL_MEMORY, freed_memory_kept, pairs_that_fit, tile_pixels_for, tiled
from .muxing import assemble, write_pictures
from .notes import notes_on_pictures, notes_on_source
from .options import VideoOptions
from .parts import PartWriter, is_complete
from .planning import Part, plan_parts, plan_timeline, work_identity
from .preview import PreviewStrip
from .progress import Progress, progress_bar
from .queues import CallQueue, prefetch_queue
from .source_properties import found_in_video, hdr10_of


if TYPE_CHECKING:
    from accelerate import PartialState


QUEUE = 2  # Frames that are decoded ahead, and frames that wait to be encoded.


class VideoResult(NamedTuple):
    """
    A video that was made.

    Args:
        path: the file or folder.
        frames: the number of its frames.
        made: how many of them the pipeline made.
        notes: what is not as in the source, in words.
    """

    path: Path
    frames: int
    made: int
    notes: list[str]


class VideoJob:
    """
    One video to be made. Every process of a launch has the same one.

    Args:
        pipeline: the pipeline that makes the frames.
        source, output: files or folders; see `decoding.Source` and `formats.CONTAINERS`.
        options: see [`VideoOptions`].
        keep_partial: whether the part of a damaged source that comes before the damage is enough.
        progress: called once for each frame of the source while the source is analysed.

    Raises:
        VideoError: if the source cannot be read, or the output cannot be written as asked.
    """

    def __init__(
        self,
        pipeline: MADiffPipeline,
        source: str | Path,
        output: str | Path,
        options: VideoOptions,
        keep_partial: bool = False,
        progress: Callable[[], object] | None = None,
    ):
        self.pipeline, self.options, self.output = pipeline, options.checked(), Path(output)
        check_output(self.output, self.options, keep_partial)
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
        self.timeline = plan_timeline(self.options, self.source, self.analysis, container)
        rate = self.timeline.rate or self.options.rate_of(self.analysis.rate).limit_denominator(10**5)
        self.encoding = choose_encoding(
            self.output,
            self.analysis,
            self.timeline.time_base,
            rate,
            self.options,
            hdr10_of(self.source),
        )
        self._colours: dict[ColourTags, ColourPath] = {}
        self.written_colour = ColourPath(self.encoding.tags, self.analysis.size[0])
        self.parts = plan_parts(self.timeline)
        self.folder = parts_folder(self.output)
        # What is not as in the source, as far as it is known before the work.
        self.notes = [
            *notes_on_source(self.source, self.analysis),
            *notes_on_pictures(self.source, self.analysis, self.found, self.encoding, self.options, self.timeline),
        ]
        # Whether what is there may be replaced, as a part of this video that was written before may be.
        self._overwrite = self._has_partial = False

    def path(self, part: Part) -> Path:
        """The file or folder of a part."""
        return self.folder / f"part-{part.number:08d}"

    @property
    def _removed(self) -> Path:
        """Where the folder of parts is while it is being removed."""
        return self.folder.with_name(f".{self.folder.name}.tmp")

    def done(self) -> list[Part]:
        """The parts that are complete."""
        return [part for part in self.parts if is_complete(self.path(part))]

    def prepare(self, resume: bool, overwrite: bool, preview: Path | None = None) -> None:
        """
        Make the folder of parts, or take over the one that is there. One process does so for all.

        Args:
            resume, overwrite, preview: see `interpolate_video`.

        Raises:
            VideoError: if something is there that must not be lost.
        """
        if self.output.exists() and not overwrite and not (self.output.is_dir() and is_empty(self.output)):
            raise VideoError(f"{self.output} is there already; `overwrite` replaces it")
        shutil.rmtree(self._removed, ignore_errors=True)  # of work that was killed just then
        self._overwrite = overwrite
        self._has_partial = partial_path(self.output).exists()
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise VideoError(f"{self.folder} is needed for parts, but is no folder")
        plan = self.folder / "job.json"
        identity = work_identity(self.options, self.source, self.pipeline, self.encoding)
        limits = {"max_memory": self.options.max_memory, "batch": self.options.batch}
        shown = None if preview is None else str(preview.absolute())  # which may be replaced when the job goes on
        if plan.is_file() and (resume or not overwrite):
            try:
                before = read_plan(plan)
            except VideoError:
                if not overwrite:
                    raise
                before = {}  # whosever the parts are, they may go
            others = [name for name, value in identity.items() if before.get(name) != value]
            kept_parts = any(self.folder.glob("part-" + 8 * "[0-9]"))  # whole or not, and such as this job has not
            if others and kept_parts and not overwrite:
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
                kept = before["limits"]
                now = {name: kept[name] if value is None else value for name, value in limits.items()}
                sizes = {} if now == kept else self._sizes(now)  # others, as after memory was too short
                shown = shown or before["preview"]
                if sizes or shown != before["preview"]:
                    write_text(plan, json.dumps({**before, **sizes, "preview": shown}))
                return
        elif not plan.is_file() and any(path.suffix != ".tmp" for path in self.folder.glob("*")):
            raise VideoError(f"{self.folder} is needed for parts, but holds something else")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        try:
            write_text(plan, json.dumps({**identity, **self._sizes(limits), "preview": shown}))
            self._try_encoding()
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def _sizes(self, limits: dict[str, int | None]) -> dict[str, Any]:
        """Tiles and pairs at once, the same for all parts and processes, and the limits that they are chosen by."""
        pixels = self.analysis.size[0] * self.analysis.size[1]
        steps, batch, max_memory = self.options.steps, limits["batch"], limits["max_memory"] or USUAL_MEMORY
        tile_pixels = tile_pixels_for(self.pipeline, pixels, max_memory, steps, batch or 1)
        if batch is None:
            batch = 1 if tile_pixels else pairs_that_fit(self.pipeline, pixels, steps)
        return {"limits": limits, "tile_pixels": tile_pixels, "at_once": batch}

    def _try_encoding(self) -> None:
        """Write a file of one frame, so that what an encoder or a kind of file refuses is found before the work."""
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
        self, parts: list[Part], preview: Path | None = None, advance: Callable[[int], object] = lambda count: None
    ) -> int:
        """
        Make parts that are not there yet: frames are decoded ahead and encoded behind while the pipeline works.

        Args:
            parts: the parts, in order.
            preview: image file for the latest frames side by side, written with each part.
            advance: called with 1 for each frame.

        Returns:
            the number of frames that the pipeline made.
        """
        todo = [part for part in parts if not is_complete(self.path(part))]
        plan = read_plan(self.folder / "job.json")
        tile_pixels, at_once = plan["tile_pixels"], plan["at_once"]
        interpolator = FrameInterpolator(self.pipeline, self.options.steps, self.options.seed, at_once)
        strip = None if preview is None else PreviewStrip(preview)
        made, stop = 0, threading.Event()
        with (
            tiled(self.pipeline, tile_pixels),
            freed_memory_kept(sparing=tile_pixels is not None),  # tiles are for where memory is short
            prefetch_queue(self._decoded(todo, stop), QUEUE, stop) as decoded,
            CallQueue(QUEUE) as encoder,
        ):
            window = FrameWindow(decoded, at_once + 1)
            for part in todo:
                writer = PartWriter(self.path(part), self.encoding, self.written_colour, part.number)
                try:
                    for frame, array in self._frames_of(part, window, interpolator, at_once):
                        encoder.submit(writer.write, array, frame.time)
                        made += bool(frame.position)
                        if strip is not None:
                            strip.add(self._caption(frame), self._upright(array))
                        advance(1)
                    encoder.wait()
                    writer.close()
                except BaseException:
                    encoder.cancel()
                    writer.abandon()
                    raise
                if strip is not None:
                    strip.write()
        return made

    def _decoded(self, parts: list[Part], stop: threading.Event) -> Iterator[tuple[int, np.ndarray]]:
        """The source frames that parts need, in order, with their places in `Timeline.kept`."""
        kept = self.timeline.kept
        # The last frame of a part may be the first of the next.
        places = itertools.groupby(
            place for part in parts for place in range(part.first, min(part.last + 1, len(kept)))
        )
        place = next(places, (None,))[0]
        if place is None:
            return
        for index, (_, frame) in enumerate(self.source.frames(self.options.skip_damage)):
            if stop.is_set():
                return
            if index == kept[place]:
                yield place, self._to_rgb(frame)
                place = next(places, (None,))[0]
                if place is None:
                    return
        raise VideoError(f"{self.source.path} has changed: it ends before frame {kept[place] + 1}")

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame by its own tags, which may differ from those of frames before it."""
        tags = told_tags(ColourTags.of(frame), frame.format.name)
        if tags not in self._colours:
            self._colours[tags] = ColourPath(tags, frame.height)
        return self._colours[tags].to_rgb(frame)

    def _frames_of(
        self, part: Part, window: FrameWindow, interpolator: FrameInterpolator, at_once: int
    ) -> Iterator[tuple[ShownFrame, np.ndarray]]:
        """The frames that are shown in a part, made or not; those between so many source frames and their next are made at once."""
        places = zip(range(part.first, part.last), self.timeline.shown(part.first, part.last))
        while group := list(itertools.islice(places, at_once)):
            pairs = []
            for place, shown in group:
                times = [frame.position for frame in shown if frame.position]
                if times:
                    pairs.append(Pair(window.get(place), window.get(place + 1), times))
            made = interpolator.between(pairs)
            for place, shown in group:
                index = self.timeline.kept[place]
                for frame in shown:
                    if frame.position:
                        yield frame, next(made)
                    else:
                        yield frame, window.get(place if frame.index == index else place + 1).frame

    def _upright(self, array: np.ndarray) -> np.ndarray:
        return np.rot90(array[:, ::-1] if self.analysis.mirrored else array, self.analysis.rotation // 90)

    def _caption(self, frame: ShownFrame) -> str:
        return f"{float(frame.time * self.timeline.time_base):.3f} s {'made' if frame.position else 'source'}"

    def finish(self) -> list[str]:
        """Put the parts together and remove them. Returns further notes on what is not as in the source.

        Raises:
            VideoError: if something came to the output's place during the work, which stays, as the parts do.
        """
        notes = self._assemble(self.parts, self.timeline.duration, self.output, is_partial=False)
        # At once, so that parts of which some are removed are never taken for what can be gone on with.
        os.replace(self.folder, self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)
        return notes

    def _check_place(self, output: Path) -> None:
        """
        Refuse to replace what was not there when the job was prepared, and frames by anything else.

        Raises:
            VideoError: if something would be lost.
        """
        if not output.exists() or output.is_dir() and is_empty(output):
            return
        if output.is_dir():
            check_folder(output)
        if not (self._overwrite or self._has_partial and output != self.output):
            raise VideoError(
                f"{output} came to be during the work; what is done is in {self.folder}, and `resume` goes on with it once {output} is moved away"
            )

    def save_partial(self) -> Path | None:
        """Write a playable file of the complete parts before the first that is missing; None if there are none."""
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
        self._check_place(output)
        if self.encoding.codec == "png":
            whole = self.folder / "frames"
            whole.mkdir(exist_ok=True)
            for path in paths:
                for image in path.iterdir():
                    shutil.copyfile(image, whole / image.name)
            self._check_place(output)
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
            self._check_place(output)
            os.replace(joined, output)
        finally:
            joined.unlink(missing_ok=True)
        return notes


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
    processes: "PartialState | None" = None,
    tell: Callable[[str], object] | None = None,
    **options,
) -> VideoResult:
    """
    Interpolate a video file into another, with its sound, subtitles, chapters, metadata and rotation.

    During the work, finished parts lie in the folder `OUTPUT.parts`; the output appears once it is complete. If the work is
    stopped or fails, the parts stay, unless there are none.

    Args:
        pipeline: the pipeline that makes the frames.
        source: a video file, a folder of images, or images by a pattern (`%05d`, `*`).
        output: a file (.mp4, .m4v, .mov, .mkv, .webm, .avi, .gif, .y4m), or a folder, which gets PNG files.
        resume: whether to go on with the parts that are there.
        overwrite: whether to replace an output and parts that are there; with `resume`, parts only if they are of other work.
        keep_partial: whether, when the work is stopped or fails or the source is damaged, the good part is written as
            `NAME.partial.ENDING`.
        preview: image file that gets the latest frames side by side, with each part.
        progress: whether to show a bar; or a callback that gets "reading" or the output's name, the number of frames that are done, and
            that of all frames if it is known. An exception of the callback stops the work.
        processes: an `accelerate.PartialState`, whose processes share the work. Each of them makes this call.
        tell: called with each note as soon as it is known, mostly before the work; by the main process alone.
        options: the fields of [`VideoOptions`].

    Returns:
        [`VideoResult`]; `made` counts this process's frames.

    Raises:
        VideoError: if the source cannot be read, or the output cannot be written as asked; nothing is left then.
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
        tell=tell,
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
    processes: "PartialState | None" = None,
    tell: Callable[[str], object] | None = None,
    **options,
) -> VideoResult:
    """`interpolate_video` without its check of what would be written over, for callers that have checked all of several videos."""
    count, rank = (1, 0) if processes is None else (processes.num_processes, processes.process_index)
    wait = (lambda: None) if processes is None else processes.wait_for_everyone
    show = progress if rank == 0 else False
    with progress_bar(show, "reading") as bar:
        job = VideoJob(pipeline, source, output, VideoOptions(**options), keep_partial, bar.update)
    with _alone(job) if rank == 0 else nullcontext():
        if rank == 0:
            with _naming(job.output):
                job.prepare(resume, overwrite, preview)
        wait()
        made = 0
        try:
            if tell is not None and rank == 0:
                for note in job.notes:
                    tell(note)
            mine = job.parts[rank::count]
            finished = sum(part.count for part in mine if is_complete(job.path(part)))
            with progress_bar(show, job.output.name, sum(part.count for part in mine), finished) as bar:
                made = job.make_parts(mine, None if rank else preview, bar.update)
            wait()
            if rank == 0 and job.is_cut_short:
                partial = job.save_partial()
                shutil.rmtree(job.folder)
                raise VideoError(f"{job.analysis.damage[0]}; what is good is in {partial}")
            notes = job.finish() if rank == 0 else []
            if tell is not None:
                for note in notes:
                    tell(note)
        except BaseException as error:
            if rank == 0 and job.folder.exists():
                if keep_partial and not isinstance(error, VideoError):
                    with suppress(OSError, VideoError, av.FFmpegError):  # the disk may be full; the parts stay
                        job.save_partial()
                if not job.done():
                    shutil.rmtree(job.folder, ignore_errors=True)
            with _naming(job.output):
                raise
        wait()
        return VideoResult(job.output, len(job.timeline), made, [*job.notes, *notes] if rank == 0 else [])


@contextmanager
def _alone(job: VideoJob) -> Iterator[None]:
    """Keep other processes from making the same output meanwhile.

    Raises:
        VideoError: if one is.
    """
    folder = job.folder
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder.with_name(f".{folder.name}.lock")))
        except BlockingIOError:
            raise VideoError(
                f"{job.output} is being made by another process; let it end, or stop it, and then `resume`"
            ) from None
        except OSError as error:
            raise unwritable(job.output, error) from error
        yield


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    """Name the output in errors that name no file, such as those of a full disk."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, UnwritableError) or (
            error.filename is not None and not isinstance(error, av.FFmpegError)
        ):
            raise
        told = error if isinstance(error, OSError) else OSError(error.errno, error.strerror)
        raise unwritable(output, told) from error
