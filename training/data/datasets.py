"""Datasets of samples that are drawn at random from sources of clips, read from recordings, or streamed.

Every drawn sample follows from (seed, number) alone, so that a run that is resumed, or spread over other processes, sees
the same samples in the same order.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from training.data.sources import (
    Clips,
    NoWindow,
    StillClips,
    Unreadable,
    decode_triplet,
    load_dataset,
    parse_sources,
    read_source,
    report,
    without_decoding,
)
from training.data.transforms import Augmentation, EventTransform, Sample, SampleTransform
from training.event_recordings import EventRecordings
from training.options import RunOptions
from training.random_motion import MovingScene


def with_unreadable(sample: Sample, count: int = 0) -> Sample:
    """A sample with the number of files that could not be read before it was found."""
    return {**sample, "unreadable": torch.tensor(count)}


def change(frames: np.ndarray) -> float:
    """How much the last of frames `(T, H, W, 3)` uint8 differs from the first."""
    return float(np.abs(frames[0].astype(np.int16) - frames[-1]).mean())


class ClipDataset(Dataset):
    """Samples drawn at random from sources of clips; sample n is the same whenever it is asked for.

    Args:
        sources: clips, and the share of the samples that each gets.
        transform: makes a sample of a window of frames.
        options: crop, gaps, candidates, colour_jitter, random_motion_share, seed and on_unreadable are read.

    Raises:
        ValueError: if no clip has as many frames as a window.
    """

    def __init__(self, sources: Sequence[tuple[Clips, float]], transform: SampleTransform, options: RunOptions):
        self.transform, self.options = transform, options
        self.augmentation = Augmentation(options.resolution, options.colour_jitter)
        self.gaps = np.array(options.gaps) / sum(options.gaps)
        self.sources, self.chances, self.numbers, shares = [], [], [], []
        for clips, share in sources:
            least = 1 if isinstance(clips, StillClips) else transform.frames
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
        unreadable = 0
        last: Unreadable | str = "scene cuts only"
        for _ in range(100):
            try:
                return with_unreadable(self._draw(rng), unreadable)
            except NoWindow:
                continue
            except Unreadable as error:
                report(error, self.options.on_unreadable)
                unreadable, last = unreadable + 1, error
        raise Unreadable(f"`data`: 100 draws in a row met nothing that can be used, the last: {last}")

    def _draw(self, rng: np.random.Generator) -> Sample:
        source = rng.choice(len(self.sources), p=self.shares)
        moves = isinstance(self.sources[source], StillClips)
        if moves or rng.random() < self.options.random_motion_share:
            count = 2 + rng.binomial(3, 0.4)
            stills = [self._still(source, rng) for _ in range(count)]
            return self.transform.from_scene(
                MovingScene(stills, self.options.resolution, self.options.resolution, rng), rng
            )
        windows = [self.augmentation.place(self._window(source, rng), rng) for _ in range(self.options.candidates)]
        best = max(windows, key=change) if len(windows) > 1 else windows[0]
        return self.transform(self.augmentation(best, rng), rng)

    def _clip(self, source: int, rng: np.random.Generator) -> int:
        return int(self.numbers[source][np.searchsorted(self.chances[source], rng.random(), side="right")])

    def _still(self, source: int, rng: np.random.Generator) -> np.ndarray:
        number = self._clip(source, rng)
        first = int(rng.integers(self.sources[source].lengths[number]))
        return self.sources[source].read(number, range(first, first + 1))[0]

    def _window(self, source: int, rng: np.random.Generator) -> np.ndarray:
        number = self._clip(source, rng)
        length, steps = int(self.sources[source].lengths[number]), self.transform.frames - 1
        gap = min(1 + int(rng.choice(len(self.gaps), p=self.gaps)), (length - 1) // steps)
        first = int(rng.integers(length - gap * steps))
        return self.sources[source].read(number, range(first, first + gap * steps + 1, gap))


class RecordedEventDataset(Dataset):
    """What `EventTransform` makes, from recorded events; `"thresholds"` are NaN, since a recording does not tell them."""

    def __init__(self, recordings: EventRecordings, seed: int):
        self.recordings, self.seed = recordings, seed

    def __getitem__(self, index: int) -> Sample:
        drawn = self.recordings.draw(np.random.default_rng((self.seed, index)))
        return with_unreadable(EventTransform.from_events(*drawn, (np.nan, np.nan)))


class StreamedDataset(IterableDataset):
    """Samples from a streamed Hugging Face dataset of triplets, shuffled anew in every epoch.

    In an epoch, each triplet comes once on one of the processes. A process whose run is resumed reads the stream up to
    where it was, without decoding. Use at most one loader process, and the same number all along: the order depends on it.

    Args:
        path: what `datasets.load_dataset` takes.
        transform: makes a sample of the three frames.
        options: columns, crop, colour_jitter, seed and on_unreadable are read.
    """

    shuffle_buffer = 1000

    def __init__(self, path: str, transform: SampleTransform, options: RunOptions):
        self.path, self.transform, self.options = path, transform, options
        if transform.frames != 3 or options.random_motion_share:
            raise ValueError(
                f"`data` datasets-stream gives triplets: `window` must be 3 and `random_motion_share` 0, but are {transform.frames} and "
                f"{options.random_motion_share}."
            )
        self.columns = options.columns.split(",")
        self.augmentation = Augmentation(options.resolution, options.colour_jitter)
        self.table = without_decoding(load_dataset(path, streaming=True), path, self.columns)
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
            raise Unreadable(f"`dataloader_num_workers` must be 0 or 1 with a stream, but is {worker.num_workers}.")
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
                    frames = decode_triplet(row, self.columns, f"a row of {self.path}")
                    frames = self.augmentation(self.augmentation.place(frames, rng), rng)
                except Unreadable as error:
                    report(error, self.options.on_unreadable)
                    unreadable += 1
                    continue
                yield with_unreadable(self.transform(frames, rng), unreadable)
                unreadable = 0
            if not found:
                raise Unreadable(f"`data`: process {self.process} of {self.processes} gets no row of {self.path!r}.")
            epoch += 1


def build_dataset(
    options: RunOptions, transform: SampleTransform
) -> ClipDataset | StreamedDataset | RecordedEventDataset:
    """The samples that `options.data` asks for.

    Raises:
        ValueError: if a source is not what its format says, or a stream is mixed with others.
    """
    sources = parse_sources(options.data)
    composes = options.random_motion_share > 0 or any(name == "stills" for name, *_ in sources)
    if options.any_time and options.window == 3 and not composes:
        raise ValueError(
            "`any_time` needs a `window` of more than 3 frames, since 3 have one instant between them, or composed scenes (stills in `data`, "
            f"`random_motion_share`), but is {options.any_time}."
        )
    streams = [path for name, path, _ in sources if name == "datasets-stream"]
    recordings = [path for name, path, _ in sources if name == "mvsec"]
    if len(sources) > 1 and (streams or recordings):
        raise ValueError(
            "`data` can hold one datasets-stream or mvsec and nothing else, or several of the other formats."
        )
    if streams:
        return StreamedDataset(streams[0], transform, options)
    if recordings:
        if not isinstance(transform, EventTransform):
            raise ValueError("`data` in the format mvsec has events and grey pictures: it is for train_i2e alone.")
        if options.random_motion_share:
            raise ValueError(
                f"`random_motion_share` must be 0 with mvsec, whose events are recorded ones, but is {options.random_motion_share}."
            )
        recorded = EventRecordings(recordings[0], transform.num_bins, options.resolution, options.gaps)
        return RecordedEventDataset(recorded, options.seed)
    return ClipDataset(
        [(read_source(name, path, options), weight) for name, path, weight in sources], transform, options
    )
