"""`madiff demo`: interpolation in a browser (Gradio); also what a Space of the Hub runs."""

import base64
import html
import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import gradio as gr
import torch
from PIL import Image

from .image_io import open_image
from .image_processor import rgb_of_image, to_uint8
from .pipeline_madiff import MADiffPipeline
from .video.decoding import Source, main_stream
from .video.errors import VideoError
from .video.jobs import interpolate_video
from .video.memory import lacks_memory
from .video.progress import Progress


POLL_SECONDS = 0.3  # between looks at how far the work is
CLEAN_SECONDS = 600  # between looks for old uploads and results
KEEP_SECONDS = 3600  # that these stay; those of a page that is closed, too

SINGLE = "one at a time"  # the pipeline's, whatever page asks it

# FFmpeg's names of files that name others, which it opens wherever on this machine they are.
LISTS = ("concat", "dash", "hls", "imf", "sdp", "webm_dash_manifest")

UNFINISHED = '<span class="madiff-unfinished"></span>'  # in every status of work that is not done
WAITING = f"{UNFINISHED}Waiting …"

EXAMPLE = [Path(__file__).parent / "examples" / f"{name}.jpg" for name in ("prev", "next")]

INTRO = """# MADiff
Frames between frames, by [motion-aware latent diffusion](https://arxiv.org/abs/2404.13534)."""


@dataclass(frozen=True)
class Limits:
    """
    Limits on what the demo takes on.

    Args:
        pixels: pixels of a frame.
        seconds: seconds of an uploaded video.
        frames: frames that one request makes.
        upload: size of an uploaded file, as Gradio takes it, such as "200mb".
        waiting: requests in the queue.
    """

    pixels: int = 1920 * 1088
    seconds: float = 20.0
    frames: int = 2000
    upload: str = "200mb"
    waiting: int = 20


class Stopped(Exception):
    """The user stopped the work; nothing failed."""


class Work:
    """
    Work in a thread, whose progress a page can show, and which it can stop.

    Args:
        make: function that does the work; it is called with a function to report progress, which raises [`Stopped`] after `stop`.
        turn: held while the work is done. One that was stopped may take a while to end, and nobody waits for that but the next.
        tidy: called once the work has ended and nobody asks for its result any more.
    """

    def __init__(self, make: Callable[[Progress], Any], turn: threading.Lock, tidy: Callable[[], Any] = lambda: None):
        self.failure: BaseException | None = None
        self._turn, self._tidy, self._ending, self._ended = turn, tidy, threading.Lock(), False
        self.result: Any = None
        self._make, self._stop, self._begun, self._first = make, threading.Event(), time.monotonic(), 0
        self._told: tuple[str, int, int | None] = ("", 0, None)
        self._thread = threading.Thread(target=self._run, name="madiff work")
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._turn:
                self.result = self._make(self._tell)
        except BaseException as error:
            self.failure = error
        with self._ending:
            self._ended = True
            if self._stop.is_set():
                self._tidy()

    def _tell(self, name: str, done: int, total: int | None) -> None:
        if self._stop.is_set():
            raise Stopped
        if name != self._told[0]:
            self._begun, self._first = time.monotonic(), done
        self._told = name, done, total

    def stop(self) -> None:
        """Have the work end where it reports progress next, and what it leaves be tidied up."""
        with self._ending:
            self._stop.set()
            if self._ended:
                self._tidy()

    def updates(self) -> Iterator[str]:
        """Progress as HTML until the work ends; then raises what the work raised, if it did."""
        while self._thread.is_alive():
            yield self._html()
            self._thread.join(POLL_SECONDS)
        if self.failure is not None:
            raise self.failure

    def _html(self) -> str:
        name, done, total = self._told
        if total is None:
            return UNFINISHED + (f"Reading: {done} frames …" if done else "Beginning …")
        gone, left = time.monotonic() - self._begun, ""
        if done > self._first:
            seconds = round(gone / (done - self._first) * (total - done))
            left = f", {seconds // 60}:{seconds % 60:02} left"
        return f'{UNFINISHED}<progress max="{total}" value="{done}" style="width:100%;accent-color:#f97316"></progress> {done} of {total} frames{left}'


class Demo:
    """
    The page.

    Args:
        pipeline: pipeline that makes the frames.
        limits: limits on what it takes on.
        name: name of the checkpoint on the page.
    """

    def __init__(self, pipeline: MADiffPipeline, limits: Limits, name: str):
        self.pipeline, self.limits, self.name = pipeline, limits, name
        pipeline.set_progress_bar_config(disable=True)
        self._works: dict[str | None, Work] = {}  # by the page that waits for it
        self._turn = threading.Lock()

    def build(self) -> gr.Blocks:
        limits = self.limits
        with gr.Blocks(title="MADiff", analytics_enabled=False, delete_cache=(CLEAN_SECONDS, KEEP_SECONDS)) as page:
            gr.Markdown(f"{INTRO} Checkpoint: `{self.name}`, on {self.pipeline.device}.")
            with gr.Tab("Two frames"):
                with gr.Row():
                    prev = picture_file(label="Previous frame", elem_id="prev", height=240)
                    next_ = picture_file(label="Next frame", elem_id="next", height=240)
                with gr.Row():
                    count = gr.Slider(1, 15, value=3, step=1, label="Frames to make", elem_id="count")
                    make = gr.Button("Make", variant="primary", elem_id="make-pair")
                    cancel_pair = gr.Button("Cancel", elem_id="cancel-pair")
                pair_status = gr.HTML(elem_id="pair-status", min_height=40)
                frames = gr.State([], time_to_live=KEEP_SECONDS)
                instant = gr.Slider(
                    0,
                    1,
                    value=0.5,
                    step=0.01,
                    label="Instant: 0 is the previous frame, 1 the next",
                    elem_id="instant",
                    visible=False,
                )
                with gr.Row():
                    shown = gr.HTML(elem_id="shown")
                    compare = gr.ImageSlider(
                        label="Left: both frames mixed. Right: made.",
                        elem_id="compare",
                        interactive=False,
                        visible=False,
                    )
                gr.Examples([[str(path) for path in EXAMPLE]], [prev, next_], label="Example", elem_id="pair-example")
            with gr.Tab("Video"):
                with gr.Row():
                    video = gr.Video(
                        label=f"Video, of at most {limits.seconds:g} seconds",
                        sources=["upload"],
                        elem_id="video-in",
                        height=320,
                    )
                    result = gr.Video(label="Result", interactive=False, elem_id="video-out", height=320)
                with gr.Row():
                    fps = gr.Slider(
                        0,
                        120,
                        value=0,
                        step=1,
                        label="Frames a second (0: twice as many, or as many as slow motion asks for)",
                        elem_id="fps",
                    )
                    slow = gr.Slider(
                        1, 8, value=1, step=0.5, label="Slow motion: times that it lasts longer", elem_id="slow"
                    )
                with gr.Row():
                    smooth = gr.Button("Make it smooth", variant="primary", elem_id="make-video")
                    cancel_video = gr.Button("Cancel", elem_id="cancel-video")
                    download = gr.DownloadButton("Download", elem_id="download", interactive=False)
                video_status = gr.HTML(elem_id="video-status", min_height=40)

            one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": SINGLE, "show_progress": "hidden"}
            wait = f"() => {json.dumps(WAITING)}"
            pair_work = make.click(None, outputs=pair_status, js=wait).then(
                self._make_pair, [prev, next_, count], [frames, pair_status, shown, compare, instant], **one
            )
            moved: dict[str, Any] = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
            instant.input(show_instant, [frames, instant], [shown, compare], **moved)
            video_work = smooth.click(None, outputs=video_status, js=wait).then(
                self._make_video, [video, fps, slow], [result, download, video_status], **one
            )
            # Gradio takes what waits out of the queue, and closes what runs, which stops the work.
            for cancel, status, work in (
                (cancel_pair, pair_status, pair_work),
                (cancel_video, video_status, video_work),
            ):
                cancel.click(stopped, status, status, queue=False, cancels=[work], show_progress="hidden")
                work.failure(failed, status, status, queue=False, show_progress="hidden")
            page.unload(self._stop)
        return page.queue(max_size=limits.waiting)

    def _stop(self, request: gr.Request) -> None:
        if request.session_hash in self._works:
            self._works[request.session_hash].stop()

    def _follow(
        self, request: gr.Request, make: Callable[[Progress], Any], tidy: Callable[[], Any] = lambda: None
    ) -> Iterator[tuple[str | None, Any]]:
        """Messages for the page, each with None; at the end None with the result."""
        work = self._works[request.session_hash] = Work(make, self._turn, tidy)
        try:
            for said in work.updates():
                yield said, None
            yield None, work.result
        finally:  # also of a page that is gone, or whose user cancelled: Gradio waits for this, and everybody for Gradio
            if self._works.get(request.session_hash) is work:
                del self._works[request.session_hash]
            work.stop()

    def _make_pair(self, prev: str | None, next_: str | None, count: int, request: gr.Request) -> Iterator[list[Any]]:
        try:
            if prev is None or next_ is None:
                raise ValueError("Both frames are needed: upload the previous and the next one.")
            for path in (prev, next_):
                # By what the file says: a small one may take gigabytes to be decoded. What cannot be read, `open_image` tells.
                with suppress(OSError, SyntaxError, Image.DecompressionBombError), Image.open(path) as image:
                    self._check_size(*image.size)
            pair = rgb_of_image(open_image(prev).image, prev), rgb_of_image(open_image(next_).image, next_)
            if pair[0].shape != pair[1].shape:
                sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in pair]
                raise ValueError(f"Both frames must have the same size, but have {sizes[0]} and {sizes[1]}.")

            def make(tell: Progress) -> list[Image.Image]:
                steps = 0

                def step(pipe: MADiffPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> None:
                    nonlocal steps
                    steps += 1
                    tell("frames", steps * count // pipe.num_timesteps, count)

                tell("frames", 0, count)
                frames = self.pipeline(
                    *pair, num_frames=int(count), generator=torch.Generator().manual_seed(0), callback_on_step_end=step
                ).frames[0]
                first, last = (Image.fromarray(to_uint8(array)) for array in pair)
                return [first, *frames, last]

            for said, frames in self._follow(request, make):
                yield (
                    [gr.skip(), said, *[gr.skip()] * 3]
                    if said is not None
                    else [
                        frames,
                        f"{count} made.",
                        *show_instant(frames, 0.5),
                        gr.update(visible=True, value=0.5, step=1 / (len(frames) - 1)),
                    ]
                )
        except Exception as error:
            yield [
                [],
                message_of(error, prev, next_),
                "",
                gr.update(visible=False, value=None),
                gr.update(visible=False),
            ]

    def _make_video(self, path: str | None, fps: float, slow: float, request: gr.Request) -> Iterator[list[Any]]:
        nothing = [gr.update(value=None), gr.update(value=None, interactive=False)]
        try:
            if path is None:
                raise ValueError("A video is needed: upload one.")
            source = Path(path)
            rate = Fraction(int(fps)) if fps else None
            self._check_video(source, rate, Fraction(str(slow)))
            yield [*nothing, f"{UNFINISHED}Beginning …"]
            # Gone once the page has its copy, or the work has ended without one.
            folder = Path(tempfile.mkdtemp(prefix="madiff-demo-"))
            output = folder / f"{source.stem[:50]}-smooth.mp4"

            def make(tell: Progress) -> Any:
                return interpolate_video(
                    self.pipeline, source, output, fps=rate, slow_motion=Fraction(str(slow)), progress=tell
                )

            for said, made in self._follow(request, make, lambda: shutil.rmtree(folder, ignore_errors=True)):
                if said is not None:
                    yield [gr.skip(), gr.skip(), said]
                    continue
                notes = "".join(f"<br>Note: {html.escape(note)}" for note in made.notes)
                done = f"{made.frames} frames, {made.made} of them made.{notes}"
                yield [str(output), gr.update(value=str(output), interactive=True), done]
        except Exception as error:
            yield [*nothing, message_of(error, path)]

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise ValueError(
                f"Frames may have at most {self.limits.pixels} pixels here, but have {width}x{height} = {width * height}."
            )

    def _check_video(self, path: Path, rate: Fraction | None, slow: Fraction) -> None:
        """
        Check a video by its packets, without decoding it.

        Raises:
            ValueError: if it is no video, or beyond the limits.
        """
        with Source(path).open() as container:
            if container.format.name in LISTS:
                raise VideoError(f"{path} is a list of other files, which are not here, and no video")
            stream = main_stream(container, path)
            self._check_size(stream.codec_context.width, stream.codec_context.height)
            times, end = [], Fraction(0)
            for packet in container.demux(stream):
                if packet.pts is not None:
                    times.append(packet.pts * packet.time_base)
                    # The last frame may be a long one.
                    end = max(end, times[-1] + (packet.duration or 0) * packet.time_base)
                if times and end - times[0] > self.limits.seconds:
                    raise ValueError(
                        f"Videos may last at most {self.limits.seconds:g} seconds here; this one is longer."
                    )
        if not times:
            raise VideoError(f"cannot read {path} as a video: it has no pictures")
        seconds = max((max(times) - min(times)) * len(times) / max(1, len(times) - 1), end - min(times))
        frames = int(seconds * slow * rate) if rate else len(times) * (2 if slow == 1 else int(-(-slow // 1)))
        if frames > self.limits.frames:
            raise ValueError(
                f"At most {self.limits.frames} frames are made here at once, but these would be {frames}."
            )


def picture_file(**settings: Any) -> gr.Image:
    """An image input that gives the uploaded file, readable or not; Gradio's own would refuse unreadable files with its own message."""
    picture = gr.Image(type="filepath", sources=["upload", "clipboard"], **settings)
    # On the object, not in a subclass, for which Gradio writes files beside the code.
    setattr(picture, "preprocess", lambda payload: None if payload is None else payload.path)
    return picture


def stopped(status: str | None) -> Any:
    """What a status becomes where the work is cancelled; one of work that is done stays."""
    return "Stopped." if UNFINISHED in (status or "") else gr.skip()


def failed(status: str | None) -> Any:
    """What a status becomes where Gradio took no work, or the work failed by what its user cannot mend; one that tells of an error stays."""
    if status == WAITING:
        return message_of(ValueError("Not taken: too many wait already. Try again in a minute."))
    return message_of(ValueError("This failed on the server.")) if UNFINISHED in (status or "") else gr.skip()


def show_instant(frames: list[Image.Image], instant: float) -> tuple[Any, Any]:
    """The frame nearest to an instant as a picture, and a comparison of it with a mixture of both ends."""
    if not frames:
        return gr.skip(), gr.skip()
    number = round(instant * (len(frames) - 1))
    share = number / (len(frames) - 1)
    mixed = Image.blend(frames[0], frames[-1], share)
    file = io.BytesIO()
    frames[number].save(file, "PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode()
    label = "previous frame" if number == 0 else "next frame" if number == len(frames) - 1 else f"made, at {share:.2f}"
    return (
        f'<figure><img src="data:image/png;base64,{data}" style="max-width:100%" alt="{label}"><figcaption>{label}</figcaption></figure>',
        gr.update(value=(mixed, frames[number]), visible=True),
    )


def message_of(error: BaseException, *paths: str | None) -> str:
    """An error as one line for the page, without folders of the server. Errors that the user cannot mend are raised again."""
    if isinstance(error, Stopped):
        return "Stopped."
    if not (isinstance(error, (OSError, ValueError, TypeError, av.FFmpegError)) or lacks_memory(error)):
        raise error
    text = " ".join(str(error).split())
    for path in filter(None, paths):
        text = text.replace(str(path), Path(path).name)
    return f'<span class="madiff-error" style="color:#c00">{html.escape(text)}</span>'


def serve(demo: Demo, host: str, port: int | None) -> None:
    """
    Show the page until the process is stopped. Uploads and results lie in a folder that goes with it.

    Raises:
        OSError: if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="madiff-demo-files-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when components are made
        page = demo.build()
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=demo.limits.upload,
            show_error=True,
            footer_links=[],
            ssr_mode=False,
        )
