"""Sources of clips: how many frames each clip has, and some of them. `read_source` makes one from `FORMAT:PATH`."""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np

from madiff_diffusers.files import VIDEO_SUFFIXES, natural_order
from madiff_diffusers.scene_cuts import find_cuts
from madiff_diffusers.video.decoding import closing_decoder
from madiff_diffusers.video.ffmpeg import open_file
from training.event_recordings import LAYOUT
from training.options import RunOptions


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # that OpenCV reads in every build


class Unreadable(ValueError):
    """A file that holds no picture, or not the pictures that it should."""


class NoWindow(Exception):
    """There is a scene cut in a window of frames, or the clip ends in it: another is to be drawn."""


def report(error: Unreadable, on_unreadable: str) -> None:
    """Deal with a file that cannot be read: stop ("error"), or say so and go on ("skip")."""
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


def read_image(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8 RGB.

    Raises:
        Unreadable: if the file holds no picture.
    """
    try:  # not by cv2.imread, which on Windows opens no name with other letters than ASCII's
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # not there, or empty
        image = None
    if image is None:
        raise Unreadable(f"No picture can be read from {path}.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def by_name(path: Path) -> list[int | str]:
    return natural_order(path.name)


def shown(folder: Path) -> list[Path]:
    """What a folder holds, without hidden files, such as the `._NAME` that macOS puts beside each NAME on other file systems."""
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


def images_in(folder: Path) -> list[Path]:
    return sorted((path for path in shown(folder) if path.suffix.lower() in IMAGE_SUFFIXES), key=by_name)


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
    """Scenes of video files. Files are decoded once and kept as long as `cache_gib` has room; of the others, a window is
    decoded when it is drawn, and refused where it goes across a cut."""

    def __init__(self, paths: Sequence[Path], cache_gib: float, on_unreadable: str):
        self.scenes: list[np.ndarray | Path] = []
        lengths, room = [], cache_gib * 2**30
        for path in paths:
            try:
                count, size = measure(path)
                if size <= room:
                    frames = self._decode(path, 0, count, whole=True)
                    room -= frames.nbytes
                    for scene in np.split(frames, find_cuts(list(frames))):
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
        if len(frames) <= times[-1] - times.start or find_cuts(list(frames)):
            raise NoWindow
        return frames[:: times.step]

    def _decode(self, path: Path, first: int, count: int, whole: bool = False) -> np.ndarray:
        """Frames as one array; a `whole` file gives all that it has, whatever `count` its header told."""
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
        with open_file(path) as container:
            stream = container.streams.video[0]
            count = stream.frames
            if not count:
                seconds = (container.duration or 0) / 1e6
                if stream.duration and stream.time_base:
                    seconds = float(stream.duration * stream.time_base)
                count = round(seconds * float(stream.average_rate or 25))
            count = count or sum(1 for _ in container.decode(stream))
            return count, float(count) * stream.width * stream.height * 3
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise Unreadable(f"No video can be read from {path}: {error}.") from error


def decode(path: Path, first: int, threads: bool) -> Iterator[np.ndarray]:
    """Frames of a video file from number `first` on, by their times; without a frame rate, by counting.

    Raises:
        Unreadable: if the file cannot be decoded.
    """
    try:
        with open_file(path) as container, closing_decoder(container.streams.video[0]) as stream:
            stream.thread_type = "AUTO" if threads else "NONE"
            start, number = 0.0, 0
            if first and stream.average_rate and stream.time_base:
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

    def __init__(self, path: str, columns: Sequence[str], split: str = "train"):
        table = load_dataset(path, streaming=False, split=split)
        # One that was saved by `save_to_disk` is a whole of its own, whatever split it came from.
        self.split = None if (Path(path) / "state.json").is_file() else str(table.split)
        self.table = without_decoding(table, path, columns)
        self.path, self.columns = path, columns
        self.lengths = np.full(len(self.table), 3)

    def read(self, number: int, times: range) -> np.ndarray:
        return decode_triplet(self.table[number], self.columns, f"row {number} of {self.path}")[list(times)]


def load_dataset(path: str, streaming: bool, split: str = "train"):
    """A dataset in a folder; of a `split` that is not for training, its split `test` or `validation` where it has one."""
    import datasets

    if (Path(path) / "state.json").is_file():
        table = datasets.load_from_disk(path)
        return table.to_iterable_dataset() if streaming else table
    try:
        known = datasets.get_dataset_split_names(path) if split != "train" else ()
        found = next((each for each in ("test", "validation") if each in known), "train")
        return datasets.load_dataset(path, split=found, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = f"it is no dataset with a split `train` ({error})"
        raise _wrong_layout("datasets-stream" if streaming else "datasets", path, reason) from error


def without_decoding(table, path: str, columns: Sequence[str]):
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


def decode_triplet(row: dict, columns: Sequence[str], where: str) -> np.ndarray:
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
    "videos": f"PATH/*.mp4 (or {', '.join(each for each in VIDEO_SUFFIXES if each != '.mp4')})",
    "frames": "PATH/CLIP/*.png: a folder for each clip, with its frames in the order of their names",
    "vimeo-triplet": "PATH/tri_trainlist.txt\nPATH/sequences/00001/0001/im1.png, im2.png, im3.png",
    "vimeo-septuplet": "PATH/sep_trainlist.txt\nPATH/sequences/00001/0001/im1.png … im7.png",
    "bvi-dvc": "PATH/quintuplets/00000/: five frames in the order of their names",
    "datasets": "PATH: a dataset saved by save_to_disk, or what datasets.load_dataset takes, with three image columns",
    "datasets-stream": "PATH: what datasets.load_dataset(streaming=True) takes, with three image columns",
    "mvsec": LAYOUT,
    "stills": "PATH/*.png (or .jpg …): photographs, of which moving scenes are composed",
    "crops": "PATH/crops.json, frames.npy, hints.npy, time.npy: written by training.crop_cache, for train_sampler",
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
        found = re.fullmatch(r"(?:([a-z-]+):)?(.*?)(?:@([^@/]*))?", item.strip(), re.DOTALL)
        name, path, weight = found.groups() if found else (None, "", None)
        if not path or (name or "videos") not in LAYOUTS:
            raise ValueError(f"`data` must be FORMAT:PATH with a format of {', '.join(LAYOUTS)}, but is {item!r}.")
        try:
            share = float(weight or 1)
        except ValueError:
            share = 0.0
        if not 0 < share < math.inf:  # not a number is not more than 0
            raise ValueError(f"`data`: the weight behind @ must be a positive number, but is {weight!r}.")
        sources.append((name or "videos", path, share))
    return sources


def read_source(name: str, path: str, options: RunOptions, split: str = "train") -> Clips:
    """The clips of a folder in one of the formats of `LAYOUTS`; `split`, train or test, chooses the list of Vimeo-90K.

    Raises:
        ValueError: if the folder does not have that layout, showing the one that it should have.
        Unreadable: with `on_unreadable` "error", if a video file cannot be decoded.
    """
    root = Path(path)
    if name == "crops":
        raise ValueError(f"`data`: crops are for train_sampler, and no clips, but `{name}:{path}` is given.")
    if name == "datasets":
        return DatasetClips(path, options.columns.split(","), split)
    if not root.is_dir():
        raise _wrong_layout(name, path, "there is no such folder")
    if name == "videos":
        paths = sorted((p for p in shown(root) if p.suffix.lower() in VIDEO_SUFFIXES), key=by_name)
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
        folders = sorted((p for p in shown(parent) if p.is_dir()), key=by_name)
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
