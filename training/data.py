"""Training data: many kinds of sources, one kind of sample.

A source of clips says how many frames each clip has and reads some of them; `read_source` makes one from
`FORMAT:PATH`. `DrawnSamples` draws windows of frames from clips, crops and augments them; `StreamedSamples` does the same
with a stream of triplets. What a stage learns from a window is made by a maker: `TripletMaker` or `EventMaker`.

Every drawn sample follows from (seed, number) alone, so that a run that is resumed, or spread over other processes, sees
the same samples in the same order.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from madiff_diffusers.scene_cuts import find_cuts
from training.event_recordings import LAYOUT, EventRecordings
from training.event_simulation import EventCamera, event_volume, upsample_frames
from training.options import RunOptions
from training.random_motion import MovingScene


VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".y4m")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

MOST_MOMENTS = 12  # frames between two, at most, that events are simulated from: more cost time, and change little

Sample = dict[str, torch.Tensor]


class Unreadable(ValueError):
    """A file that holds no picture, or not the pictures that it should."""


class NoWindow(Exception):
    """There is a scene cut in a window of frames, or the clip ends in it: another is to be drawn."""


def report(error: Unreadable, on_unreadable: str) -> None:
    """What happens with a file that cannot be read: stop ("error"), or say so and go on ("skip")."""
    if on_unreadable == "error":
        raise error
    print(f"left out: {error}", file=sys.stderr, flush=True)


class Clips(Protocol):
    """A source of clips.

    Attributes:
        lengths (`np.ndarray`): number of frames of each clip.
    """

    lengths: np.ndarray

    def read(self, number: int, times: range) -> np.ndarray:
        """Frames `(len(times), H, W, 3)` uint8 RGB of a clip.

        Raises:
            Unreadable: naming the file.
            NoWindow: if these frames are no sample of motion.
        """


# ---- sources ----


def read_image(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8 RGB.

    Raises:
        Unreadable: if the file holds no picture.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise Unreadable(f"No picture can be read from {path}.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def natural_order(path: Path) -> list:
    """Sorting key: frame2 comes before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def images_in(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES), key=natural_order)


class ImageClips:
    """Clips whose frames are image files."""

    def __init__(self, clips: Sequence[Sequence[Path]]):
        self.clips = clips
        self.lengths = np.array([len(clip) for clip in clips])

    def read(self, number: int, times: range) -> np.ndarray:
        frames = [read_image(self.clips[number][time]) for time in times]
        for time, frame in zip(times, frames):
            if frame.shape != frames[0].shape:
                raise Unreadable(f"{self.clips[number][time]} is not of the size of the frames beside it.")
        return np.stack(frames)


class VideoClips:
    """Scenes of video files. As many files as fit into `cache_gib` are decoded once and kept; of others, what is drawn
    is decoded when it is drawn, and given up where it goes across a cut."""

    def __init__(self, paths: Sequence[Path], cache_gib: float, on_unreadable: str):
        self.scenes: list[np.ndarray | Path] = []
        lengths, room = [], cache_gib * 2**30
        for path in paths:
            try:
                count, size = measure(path)
                if size <= room:
                    frames = self._decode(path, 0, count, whole=True)
                    room -= frames.nbytes
                    for scene in np.split(frames, find_cuts(frames)):
                        self.scenes.append(scene)
                        lengths.append(len(scene))
                else:
                    self.scenes.append(path)
                    lengths.append(count)
            except Unreadable as error:
                report(error, on_unreadable)
        self.lengths = np.array(lengths, dtype=int)

    def read(self, number: int, times: range) -> np.ndarray:
        scene = self.scenes[number]
        if isinstance(scene, np.ndarray):
            return scene[times.start : times.stop : times.step]
        frames = self._decode(scene, times.start, times[-1] - times.start + 1)
        if len(frames) <= times[-1] - times.start or find_cuts(frames):
            raise NoWindow
        return frames[:: times.step]

    def _decode(self, path: Path, first: int, count: int, whole: bool = False) -> np.ndarray:
        """Frames in one array; of a `whole` file as many as there are, whatever `count` its header told."""
        frames, found = None, 0
        for frame in decode(path, first, threads=whole):  # loaders, which read parts, are parallel already
            if frames is None:
                frames = np.empty((count, *frame.shape), np.uint8)
            if frame.shape != frames.shape[1:]:
                raise Unreadable(f"The frames of {path} change their size.")
            if found == len(frames):
                frames = np.concatenate([frames, np.empty_like(frames[: found // 4 + 1])])
            frames[found] = frame
            found += 1
            if found == count and not whole:
                break
        if frames is None and first > 0:  # a header may tell of more frames than there are
            raise NoWindow
        if frames is None:
            raise Unreadable(f"The video file {path} gives no frame.")
        return frames[:found]


def measure(path: Path) -> tuple[int, float]:
    """Frames of a video file, as its header says, and bytes that they take decoded.

    Raises:
        Unreadable: if the file holds no video.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count = stream.frames
            if not count and (stream.duration or container.duration):
                seconds = float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6
                count = round(seconds * float(stream.average_rate or 25))
            count = count or sum(1 for _ in container.decode(stream))
            return count, float(count) * stream.width * stream.height * 3
    except (av.FFmpegError, IndexError, OSError) as error:
        raise Unreadable(f"No video can be read from {path}: {error}.") from error


def decode(path: Path, first: int, threads: bool) -> Iterator[np.ndarray]:
    """Frames of a video file from number `first` on, by their times; without a frame rate, by counting.

    Raises:
        Unreadable: if the file cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO" if threads else "NONE"
            start, number = 0.0, 0
            if first and stream.average_rate:
                start = first / float(stream.average_rate) - 0.5 / float(stream.average_rate)
                offset = stream.start_time or 0
                container.seek(int(start / stream.time_base) + offset, stream=stream)
                start += float(offset * stream.time_base)
            for frame in container.decode(stream):
                if (number >= first) if not stream.average_rate else (frame.time is None or frame.time >= start):
                    yield frame.to_ndarray(format="rgb24")
                number += 1
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise Unreadable(f"The video file {path} cannot be decoded: {error}.") from error


class DatasetClips:
    """Triplets in a Hugging Face dataset on disk, with a column for each frame."""

    def __init__(self, path: str, columns: Sequence[str]):
        self.table = _without_decoding(_load_dataset(path, streaming=False), path, columns)
        self.path, self.columns = path, columns
        self.lengths = np.full(len(self.table), 3)

    def read(self, number: int, times: range) -> np.ndarray:
        return _decode_triplet(self.table[number], self.columns, f"row {number} of {self.path}")[list(times)]


def _load_dataset(path: str, streaming: bool):
    import datasets

    if (Path(path) / "state.json").is_file():
        table = datasets.load_from_disk(path)
        return table.to_iterable_dataset() if streaming else table
    try:
        return datasets.load_dataset(path, split="train", streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = f"it is no dataset with a split `train` ({error})"
        raise _wrong_layout("datasets-stream" if streaming else "datasets", path, reason) from error


def _without_decoding(table, path: str, columns: Sequence[str]):
    """The table with pictures left as bytes, so that what is not drawn is not decoded."""
    import datasets

    known = table.column_names or list(next(iter(table), {}))  # a stream may not know its columns beforehand
    if len(columns) != 3 or not set(columns) <= set(known):
        raise ValueError(
            f"`columns` must name three image columns of {path!r}, which has {known}, but is {list(columns)}."
        )
    for column in columns:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _decode_triplet(row: dict, columns: Sequence[str], where: str) -> np.ndarray:
    frames = []
    for column in columns:
        try:
            content = row[column]["bytes"] or Path(row[column]["path"]).read_bytes()
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        except (TypeError, OSError, cv2.error):  # an empty cell, or a file that is not there
            image = None
        if image is None:
            raise Unreadable(f"No picture can be read from column {column} of {where}.")
        frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    if len({frame.shape for frame in frames}) > 1:
        raise Unreadable(f"The pictures in {where} differ in size.")
    return np.stack(frames)


class StillClips:
    """Still pictures, to be set in random motion; a clip is one picture."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        self.lengths = np.ones(len(paths), dtype=int)

    def read(self, number: int, times: range) -> np.ndarray:
        return read_image(self.paths[number])[None]


# What a format's folder looks like, for the message about one that does not.
LAYOUTS = {
    "videos": "PATH/*.mp4 (or {})".format(", ".join(VIDEO_SUFFIXES[1:])),
    "frames": "PATH/CLIP/*.png: a folder for each clip, with its frames in the order of their names",
    "vimeo-triplet": "PATH/tri_trainlist.txt\nPATH/sequences/00001/0001/im1.png, im2.png, im3.png",
    "vimeo-septuplet": "PATH/sep_trainlist.txt\nPATH/sequences/00001/0001/im1.png … im7.png",
    "bvi-dvc": "PATH/quintuplets/00000/: five frames in the order of their names",
    "datasets": "PATH: a dataset saved by save_to_disk, or what datasets.load_dataset takes, with three image columns",
    "datasets-stream": "PATH: what datasets.load_dataset(streaming=True) takes, with three image columns",
    "mvsec": LAYOUT,
    "stills": "PATH/*.png (or .jpg …): photographs, of which moving scenes are composed",
}


def _wrong_layout(name: str, path: str, reason: str) -> ValueError:
    tree = LAYOUTS[name].replace("PATH", path).replace("\n", "\n    ")
    return ValueError(f"`data`: {path!r} is not of the format {name}: {reason}. Expected:\n    {tree}")


def parse_sources(data: str) -> list[tuple[str, str, float]]:
    """`FORMAT:PATH[@WEIGHT],…` as `(format, path, weight)`. Without a format, videos are meant.

    Raises:
        ValueError: on an unknown format or a weight that is no positive number.
    """
    sources = []
    for item in data.split(","):
        name, path, weight = re.fullmatch(r"(?:([a-z-]+):)?(.*?)(?:@([^@/]*))?", item.strip(), re.DOTALL).groups()
        if not path or (name or "videos") not in LAYOUTS:
            raise ValueError(f"`data` must be FORMAT:PATH with a format of {', '.join(LAYOUTS)}, but is {item!r}.")
        try:
            share = float(weight or 1)
        except ValueError:
            share = 0.0
        if share <= 0:
            raise ValueError(f"`data`: the weight behind @ must be a positive number, but is {weight!r}.")
        sources.append((name or "videos", path, share))
    return sources


def read_source(name: str, path: str, options: RunOptions, split: str = "train") -> Clips:
    """The clips of a folder in one of the formats in `LAYOUTS`; of Vimeo-90K those of the list of a `split`, train or test.

    Raises:
        ValueError: if the folder does not have that layout, showing the one that it should have.
        Unreadable: with `on_unreadable` "error", if a video file cannot be decoded.
    """
    root = Path(path)
    if name == "datasets":
        return DatasetClips(path, options.columns.split(","))
    if not root.is_dir():
        raise _wrong_layout(name, path, "there is no such folder")
    if name == "videos":
        paths = sorted((p for p in root.glob("*") if p.suffix.lower() in VIDEO_SUFFIXES), key=natural_order)
        if not paths:
            raise _wrong_layout(name, path, "there is no video file in it")
        clips = VideoClips(paths, options.cache_gib, options.on_unreadable)
        if not len(clips.lengths):
            raise Unreadable(f"`data`: none of the {len(paths)} video files in {path!r} can be read.")
        return clips
    if name == "stills":
        if not images_in(root):
            raise _wrong_layout(name, path, "there is no picture in it")
        return StillClips(images_in(root))
    if name in ("frames", "bvi-dvc"):
        parent = root / "quintuplets" if name == "bvi-dvc" else root
        folders = sorted((p for p in parent.glob("*") if p.is_dir()), key=natural_order)
        lists = [frames for frames in map(images_in, folders) if frames]
        if not lists:
            raise _wrong_layout(name, path, f"there is no folder with pictures in {str(parent)!r}")
        wrong = [frames[0].parent for frames in lists if len(frames) != 5]
        if name == "bvi-dvc" and wrong:
            raise _wrong_layout(name, path, f"{wrong[0]} does not hold five pictures")
        return ImageClips(lists)
    prefix, count = ("tri", 3) if name == "vimeo-triplet" else ("sep", 7)
    list_file = root / f"{prefix}_{split}list.txt"
    if not list_file.is_file():
        raise _wrong_layout(name, path, f"there is no {list_file.name}")
    names = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
    folders = [root / "sequences" / each for each in names]
    if not folders or not folders[0].is_dir():
        raise _wrong_layout(name, path, f"{list_file.name} is empty" if not folders else f"there is no {folders[0]}")
    return ImageClips([[folder / f"im{i + 1}.png" for i in range(count)] for folder in folders])


# ---- samples ----


@dataclass
class Augmentation:
    """Random crop, mirroring, quarter turns, time reversal and colour changes, the same for all frames of a window."""

    crop: int
    colour_jitter: float = 0.0

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Everything but the crop, to frames `(T, crop, crop, 3)` uint8."""
        if rng.random() < 0.5:
            frames = frames[::-1]
        if rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        frames = np.rot90(frames, rng.integers(4), axes=(1, 2))
        if self.colour_jitter:
            brightness, contrast, saturation = 1 + rng.uniform(-self.colour_jitter, self.colour_jitter, 3)
            values = frames.astype(np.float32)
            grey = values @ np.float32([0.299, 0.587, 0.114])[:, None]
            values = grey + (values - grey) * np.float32(saturation)
            values = (values - grey.mean()) * np.float32(contrast) + grey.mean() * np.float32(brightness)
            frames = np.clip(values.round(), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(frames)

    def place(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A crop at a random place.

        Raises:
            Unreadable: if the frames are smaller than the crop.
        """
        height, width = frames.shape[1:3]
        if min(height, width) < self.crop:
            raise Unreadable(f"Frames of {height}x{width} pixels are smaller than `crop` {self.crop}.")
        top, left = rng.integers(height - self.crop + 1), rng.integers(width - self.crop + 1)
        return frames[:, top : top + self.crop, left : left + self.crop]


@dataclass
class TripletMaker:
    """`{"frame_prev", "frame_mid", "frame_next"}`, each `(3, H, W)` float32 in [-1, 1], and `"time"`, the instant of the
    middle frame between the others, 0.5 half-way.

    Args:
        frames: of a window, an odd number; its first and last are the neighbours.
        any_time: share of samples whose middle frame is any of those between, or, of a moving scene, at any instant in
            [0.1, 0.9]; that of the others is half-way.
    """

    frames: int = 3
    any_time: float = 0.0

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Sample:
        mid = len(frames) // 2
        if self.any_time and rng.random() < self.any_time:
            mid = int(rng.integers(1, len(frames) - 1))
        return self._sample(frames[[0, mid, -1]], mid / (len(frames) - 1))

    def from_scene(self, scene: MovingScene, rng: np.random.Generator) -> Sample:
        exposure = float(rng.uniform(0, 0.8)) if rng.random() < 0.5 else 0.0  # half of all cameras are fast enough
        time = float(rng.uniform(0.1, 0.9)) if self.any_time and rng.random() < self.any_time else 0.5
        return self._sample(np.stack([scene.render(moment, exposure) for moment in (-1, 2 * time - 1, 1)]), time)

    @staticmethod
    def _sample(frames: np.ndarray, time: float) -> Sample:
        tensors = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {
            "frame_prev": tensors[0],
            "frame_mid": tensors[1],
            "frame_next": tensors[2],
            "time": torch.tensor(time),
        }


@dataclass
class EventMaker:
    """`{"frame_first", "frame_second"}`, `(1, H, W)` float32 grey in [-1, 1], the simulated `"events"`
    `(2 * num_bins, H, W)`, and `"thresholds"` `(2,)`: contrast that fires a decrease, and an increase.

    The events come from the frames in between too, which the network never sees: moved along optical flow, or for a
    moving scene rendered at the very moments.
    """

    num_bins: int
    frames: int

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Sample:
        # A pair's gap varies from one step to the whole window.
        last = int(rng.integers(1, len(frames)))
        grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[: last + 1]])
        return self._simulate(*upsample_frames(grey, most=MOST_MOMENTS), rng)

    def from_scene(self, scene: MovingScene, rng: np.random.Generator) -> Sample:
        count = int(np.clip(np.ceil(scene.largest_shift), 2, MOST_MOMENTS)) + 1
        times = np.linspace(-1, 1, count)
        grey = np.stack([cv2.cvtColor(scene.render(time), cv2.COLOR_RGB2GRAY) for time in times])
        return self._simulate(grey, (times + 1) / 2, rng)

    def _simulate(self, grey: np.ndarray, times: np.ndarray, rng: np.random.Generator) -> Sample:
        camera = EventCamera.draw(rng)
        height, width = grey.shape[1:]
        events = camera.simulate(grey, rng, times)
        return self.from_events(
            grey[0],
            grey[-1],
            event_volume(*events, height=height, width=width, num_bins=self.num_bins),
            (camera.threshold_decrease, camera.threshold_increase),
        )

    @staticmethod
    def from_events(
        first: np.ndarray, second: np.ndarray, volume: np.ndarray, thresholds: tuple[float, float]
    ) -> Sample:
        frames = [torch.from_numpy(frame.copy()).float()[None] / 127.5 - 1 for frame in (first, second)]
        return {
            "frame_first": frames[0],
            "frame_second": frames[1],
            "events": torch.from_numpy(volume),
            "thresholds": torch.tensor(thresholds, dtype=torch.float32),
        }


Maker = TripletMaker | EventMaker


def with_unreadable(sample: Sample, count: int = 0) -> Sample:
    """A sample with the number of files that could not be read before it was found."""
    return {**sample, "unreadable": torch.tensor(count)}


class DrawnSamples(Dataset):
    """Samples drawn at random from sources of clips; sample n is the same whenever it is asked for.

    Args:
        sources: clips, and the share of the samples that each gets.
        maker: makes a sample of a window of frames.
        options: crop, gaps, candidates, colour_jitter, random_motion_share, seed and on_unreadable are read.

    Raises:
        ValueError: if no clip has as many frames as a window.
    """

    def __init__(self, sources: Sequence[tuple[Clips, float]], maker: Maker, options: RunOptions):
        self.maker, self.options = maker, options
        self.augmentation = Augmentation(options.crop, options.colour_jitter)
        self.gaps = np.array(options.gaps) / sum(options.gaps)
        self.sources, self.chances, self.numbers, shares = [], [], [], []
        for clips, share in sources:
            least = 1 if isinstance(clips, StillClips) else maker.frames
            numbers = np.flatnonzero(clips.lengths >= least)
            if not len(numbers):
                raise ValueError(
                    f"`data`: no clip has the {least} frames that a sample needs; the longest has {max(clips.lengths)}."
                )
            # Long clips have more to show, but should not drown short ones.
            chances = np.cumsum(np.sqrt(clips.lengths[numbers]))
            self.sources.append(clips)
            self.numbers.append(numbers)
            self.chances.append(chances / chances[-1])
            shares.append(share)
        self.shares = np.array(shares) / sum(shares)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.options.seed, index))
        unreadable, last = 0, "scene cuts only"
        for _ in range(100):
            try:
                return with_unreadable(self._draw(rng), unreadable)
            except NoWindow:
                continue
            except Unreadable as error:
                report(error, self.options.on_unreadable)
                unreadable, last = unreadable + 1, error
        raise ValueError(f"`data`: 100 draws in a row met nothing that can be used, the last: {last}")

    def _draw(self, rng: np.random.Generator) -> Sample:
        source = rng.choice(len(self.sources), p=self.shares)
        moves = isinstance(self.sources[source], StillClips)
        if moves or rng.random() < self.options.random_motion_share:
            count = 2 + rng.binomial(3, 0.4)
            stills = [self._still(source, rng) for _ in range(count)]
            return self.maker.from_scene(MovingScene(stills, self.options.crop, self.options.crop, rng), rng)
        best, best_change = None, -1.0
        for _ in range(self.options.candidates):
            frames = self.augmentation.place(self._window(source, rng), rng)
            if self.options.candidates == 1:
                best = frames
                break
            change = float(np.abs(frames[0].astype(np.int16) - frames[-1]).mean())
            if change > best_change:
                best, best_change = frames, change
        return self.maker(self.augmentation(best, rng), rng)

    def _clip(self, source: int, rng: np.random.Generator) -> int:
        return int(self.numbers[source][np.searchsorted(self.chances[source], rng.random(), side="right")])

    def _still(self, source: int, rng: np.random.Generator) -> np.ndarray:
        number = self._clip(source, rng)
        first = int(rng.integers(self.sources[source].lengths[number]))
        return self.sources[source].read(number, range(first, first + 1))[0]

    def _window(self, source: int, rng: np.random.Generator) -> np.ndarray:
        number = self._clip(source, rng)
        length, steps = int(self.sources[source].lengths[number]), self.maker.frames - 1
        gap = min(1 + int(rng.choice(len(self.gaps), p=self.gaps)), (length - 1) // steps)
        first = int(rng.integers(length - gap * steps))
        return self.sources[source].read(number, range(first, first + gap * steps + 1, gap))


class RecordedSamples(Dataset):
    """What `EventMaker` makes, from recorded events; `"thresholds"` are NaN, since a recording does not tell them."""

    def __init__(self, recordings: EventRecordings, seed: int):
        self.recordings, self.seed = recordings, seed

    def __getitem__(self, index: int) -> Sample:
        drawn = self.recordings.draw(np.random.default_rng((self.seed, index)))
        return with_unreadable(EventMaker.from_events(*drawn, (np.nan, np.nan)))


class StreamedSamples(IterableDataset):
    """Samples from a streamed Hugging Face dataset of triplets, shuffled anew in every epoch.

    In an epoch, each triplet comes once on one of the processes. A process whose run is resumed reads the stream up to
    where it was, without decoding. Use at most one loader process, and the same number all along: the order depends on it.

    Args:
        path: what `datasets.load_dataset` takes.
        maker: makes a sample of the three frames.
        options: columns, crop, colour_jitter, seed and on_unreadable are read.
    """

    shuffle_buffer = 1000

    def __init__(self, path: str, maker: Maker, options: RunOptions):
        self.path, self.maker, self.options = path, maker, options
        if maker.frames != 3 or options.random_motion_share:
            raise ValueError("`data` datasets-stream gives triplets: `frames` must be 3 and `random_motion_share` 0.")
        self.columns = options.columns.split(",")
        self.augmentation = Augmentation(options.crop, options.colour_jitter)
        self.table = _without_decoding(_load_dataset(path, streaming=True), path, self.columns)
        self.start(0, 1, 1, 0)

    def start(self, process: int, processes: int, batch_size: int, batches: int) -> None:
        """Whose share is read, and how many of its batches were read before."""
        self.process, self.processes, self.skipped = process, processes, batch_size * batches

    def rows(self, epoch: int) -> Iterator[dict]:
        """This process's rows of an epoch, pictures as bytes."""
        from datasets.distributed import split_dataset_by_node

        seed = int(np.random.SeedSequence((self.options.seed, epoch)).generate_state(1)[0])
        shuffled = self.table.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        yield from split_dataset_by_node(shuffled, rank=self.process, world_size=self.processes)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"`workers` must be 0 or 1 with a stream, but is {worker.num_workers}.")
        place, epoch, unreadable = 0, 0, 0
        while True:
            found = 0
            for row in self.rows(epoch):
                found += 1
                place += 1
                # Rows that were left out count among the skipped, so that after them as many samples come again.
                if place <= self.skipped:
                    continue
                rng = np.random.default_rng((self.options.seed, self.process, place))
                try:
                    frames = _decode_triplet(row, self.columns, f"a row of {self.path}")
                    frames = self.augmentation(self.augmentation.place(frames, rng), rng)
                except Unreadable as error:
                    report(error, self.options.on_unreadable)
                    unreadable += 1
                    continue
                yield with_unreadable(self.maker(frames, rng), unreadable)
                unreadable = 0
            if not found:
                raise ValueError(f"`data`: process {self.process} of {self.processes} gets no row of {self.path!r}.")
            epoch += 1


def build_samples(options: RunOptions, maker: Maker) -> DrawnSamples | StreamedSamples | RecordedSamples:
    """The samples that `options.data` asks for.

    Raises:
        ValueError: if a source is not what its format says, or a stream is mixed with others.
    """
    sources = parse_sources(options.data)
    streams = [path for name, path, _ in sources if name == "datasets-stream"]
    recordings = [path for name, path, _ in sources if name == "mvsec"]
    if len(sources) > 1 and (streams or recordings):
        raise ValueError(
            "`data` can hold one datasets-stream or mvsec and nothing else, or several of the other formats."
        )
    if streams:
        return StreamedSamples(streams[0], maker, options)
    if recordings and not isinstance(maker, EventMaker):
        raise ValueError("`data` in the format mvsec has events and grey pictures: it is for train_i2e alone.")
    if recordings:
        recorded = EventRecordings(recordings[0], maker.num_bins, options.crop, options.gaps)
        return RecordedSamples(recorded, options.seed)
    return DrawnSamples([(read_source(name, path, options), weight) for name, path, weight in sources], maker, options)
