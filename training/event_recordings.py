"""Recorded events, in place of simulated ones: HDF5 files laid out as those of MVSEC (Zhu et al., 2018)."""

import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.event_simulation import event_volume


EVENTS, IMAGES, TIMES = "davis/left/events", "davis/left/image_raw", "davis/left/image_raw_ts"
LAYOUT = (
    f"PATH/*.hdf5, each with {IMAGES} (N, H, W) uint8, {TIMES} (N,) seconds\n"
    f"and {EVENTS} (M, 4) x, y, seconds, polarity (positive: brighter)"
)


class EventRecordings:
    """Pairs of frames of recordings, and the events between them.

    Args:
        path: folder of HDF5 files.
        num_bins: time bins per polarity.
        crop: side of the square crop, in pixels.
        gaps: chances of 1, 2, 3 … pictures from the first frame of a pair to the second.

    Raises:
        ValueError: if h5py is missing, the folder has no such file, or a file lacks one of the datasets.
    """

    def __init__(self, path: str, num_bins: int, crop: int, gaps: Sequence[float]):
        try:
            import h5py
        except ImportError as error:
            raise ValueError("`data` in the format mvsec needs the package h5py.") from error
        self.num_bins, self.crop = num_bins, crop
        found = sorted(each for each in Path(path).glob("*") if each.suffix in (".hdf5", ".h5"))
        self.paths: list[Path] = []
        self.lengths: list[int] = []
        expected = LAYOUT.replace("PATH", path).replace("\n", "\n    ")
        for file_path in found:
            try:
                file = h5py.File(file_path, "r")
            except OSError as error:
                raise ValueError(f"`data`: {file_path} is no HDF5 file that can be read: {error}.") from error
            with file:
                if EVENTS not in file:  # of MVSEC, the files with the truth for other tasks
                    continue
                missing = [name for name in (IMAGES, TIMES) if name not in file]
                if missing:
                    raise ValueError(f"`data`: {file_path} has no {', '.join(missing)}. Expected:\n    {expected}")
                if min(file[IMAGES].shape[1:3]) < crop:
                    raise ValueError(
                        f"`resolution` {crop} is larger than the pictures of {file_path}, {file[IMAGES].shape[1:3]}."
                    )
                self.paths.append(file_path)
                self.lengths.append(len(file[TIMES]))
        if not self.paths:
            reason = f"no HDF5 file in it holds {EVENTS}"
            raise ValueError(f"`data`: {path!r} is not of the format mvsec: {reason}. Expected:\n    {expected}")
        if max(self.lengths) < 2:
            raise ValueError(f"`data`: no recording in {path!r} has two pictures.")
        self.gaps = np.array(gaps) / sum(gaps)
        lengths = np.array(self.lengths, dtype=float)
        self.chances = lengths * (lengths > 1) / (lengths * (lengths > 1)).sum()
        self._open: dict[int, object] = {}
        self._process = -1

    def _file(self, number: int):
        # A handle does not survive a fork: every loader process opens its own.
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        if number not in self._open:
            import h5py

            self._open[number] = h5py.File(self.paths[number], "r")
        return self._open[number]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A pair, cropped and mirrored at random: two frames `(crop, crop)` uint8 and the event volume
        `(2 * num_bins, crop, crop)` float32 between them."""
        number = int(rng.choice(len(self.paths), p=self.chances))
        file, crop = self._file(number), self.crop
        gap = min(1 + int(rng.choice(len(self.gaps), p=self.gaps)), self.lengths[number] - 1)
        first = int(rng.integers(self.lengths[number] - gap))
        start, end = file[TIMES][first], file[TIMES][first + gap]
        if end <= start:
            raise ValueError(
                f"`data`: pictures {first} and {first + gap} of {self.paths[number]} are not in the order of time."
            )
        height, width = file[IMAGES].shape[1:3]
        top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
        images = [file[IMAGES][i, top : top + crop, left : left + crop] for i in (first, first + gap)]

        # The events in between, of the crop, at times from 0 to 1.
        table = file[EVENTS]
        low, high = (bisect_left(range(len(table)), moment, key=lambda i: table[i, 2]) for moment in (start, end))
        x, y, t, polarity = np.asarray(table[low:high]).T
        x, y = x.astype(int) - left, y.astype(int) - top
        inside = (x >= 0) & (x < crop) & (y >= 0) & (y < crop)
        x, y, t, polarity = x[inside], y[inside], (t[inside] - start) / (end - start), polarity[inside] > 0
        if rng.random() < 0.5:
            x, images = crop - 1 - x, [image[:, ::-1] for image in images]
        if rng.random() < 0.5:
            y, images = crop - 1 - y, [image[::-1] for image in images]
        volume = event_volume(x, y, t.astype(np.float32), polarity, crop, crop, self.num_bins)
        return images[0], images[1], volume
