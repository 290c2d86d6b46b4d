"""Training samples: crops of consecutive frames from a folder of video clips.

Every sample follows from (seed, index) alone, so that a run that is resumed, or spread over other processes, sees the
same samples in the same order.
"""

from pathlib import Path
from typing import List, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from training.event_simulation import event_volume, simulate_events, upsample_frames

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


def read_clip(path: Path) -> np.ndarray:
    """All frames of a video file, `(T, H, W, 3)` uint8 RGB.

    Raises:
        ValueError: if the file holds no frame that can be read.
    """
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        ok, frame = capture.read()
        if not ok:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    if not frames:
        raise ValueError(f"No frame can be read from the video file {path}.")
    return np.stack(frames)


def read_clips(root: str) -> List[np.ndarray]:
    """The clips of a folder, in the order of their names.

    Raises:
        ValueError: if the folder is missing or holds no video file.
    """
    folder = Path(root)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not paths:
        raise ValueError(f"`data` must be a folder of video files ({', '.join(VIDEO_SUFFIXES)}), but {root!r} has none.")
    return [read_clip(path) for path in paths]


class ClipSamples(Dataset):
    """Random space-time crops of clips.

    Args:
        clips: what `read_clips` gave.
        crop: side of the square crop, in pixels.
        frames: frames per sample, an odd number for triplets.
        gaps: chances of a gap of 1, 2, 3 … source frames between two frames of a sample.
        candidates: crops that are drawn per sample, of which the one that changes most is taken; 1 takes any.
        length: number of samples.
        seed: of every draw.
    """

    def __init__(
        self,
        clips: List[np.ndarray],
        crop: int,
        frames: int,
        gaps: Sequence[float],
        candidates: int,
        length: int,
        seed: int,
    ):
        self.clips, self.crop, self.frames, self.candidates = clips, crop, frames, candidates
        self.length, self.seed = length, seed
        self.gaps = np.array(gaps, dtype=float) / sum(gaps)
        for i, clip in enumerate(clips):
            if len(clip) < frames or min(clip.shape[1:3]) < crop:
                raise ValueError(
                    f"Clip {i} has {len(clip)} frames of {clip.shape[1]}x{clip.shape[2]} pixels; samples of {frames} "
                    f"frames and `crop` {crop} need more."
                )
        # Long clips have more to show, but should not drown short ones.
        weights = np.sqrt([len(clip) for clip in clips])
        self.weights = weights / weights.sum()

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int) -> Tuple[np.ndarray, np.random.Generator]:
        """The crop `(frames, crop, crop, 3)` uint8 of a sample, augmented, and the generator for what follows."""
        rng = np.random.default_rng((self.seed, index))
        best, best_change = None, -1.0
        for _ in range(self.candidates):
            clip = self.clips[rng.choice(len(self.clips), p=self.weights)]
            gap = 1 + rng.choice(len(self.gaps), p=self.gaps)
            gap = min(gap, (len(clip) - 1) // (self.frames - 1))
            first = rng.integers(len(clip) - gap * (self.frames - 1))
            top, left = (rng.integers(side - self.crop + 1) for side in clip.shape[1:3])
            times = slice(first, first + gap * (self.frames - 1) + 1, gap)
            sample = clip[times, top : top + self.crop, left : left + self.crop]
            change = float(np.abs(sample[0].astype(np.int16) - sample[-1]).mean())
            if change > best_change:
                best, best_change = sample, change
        if rng.random() < 0.5:
            best = best[::-1]
        if rng.random() < 0.5:
            best = best[:, ::-1]
        if rng.random() < 0.5:
            best = best[:, :, ::-1]
        if rng.random() < 0.5:
            best = best.transpose(0, 2, 1, 3)
        return np.ascontiguousarray(best), rng


class TripletSamples(ClipSamples):
    """`{"frame_prev", "frame_mid", "frame_next"}`, each `(3, crop, crop)` float32 in [-1, 1]."""

    def __init__(self, clips: List[np.ndarray], **kwargs):
        super().__init__(clips, frames=3, **kwargs)

    def __getitem__(self, index: int) -> dict:
        sample, _ = self.draw(index)
        frames = torch.from_numpy(sample).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"frame_prev": frames[0], "frame_mid": frames[1], "frame_next": frames[2]}


class EventSamples(ClipSamples):
    """`{"frame_first", "frame_second"}`, `(1, crop, crop)` float32 grey in [-1, 1], and the simulated `"events"`.

    The events come from the frames in between too, which the network never sees: real ones, upsampled along optical
    flow, or for a share of `moved_still_share` of the samples one frame moved along a path that is known exactly.
    """

    def __init__(
        self, clips: List[np.ndarray], num_bins: int, frames: int, upsampling: int, moved_still_share: float, **kwargs
    ):
        super().__init__(clips, frames=frames, **kwargs)
        self.num_bins, self.upsampling, self.moved_still_share = num_bins, upsampling, moved_still_share

    def __getitem__(self, index: int) -> dict:
        sample, rng = self.draw(index)
        if rng.random() < self.moved_still_share:
            grey = move_still(cv2.cvtColor(sample[0], cv2.COLOR_RGB2GRAY), 2 * self.upsampling + 1, rng)
        else:
            # A pair's gap varies from one step to the whole sample.
            last = int(rng.integers(1, self.frames))
            grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in sample[: last + 1]])
            grey = upsample_frames(grey, self.upsampling)
        threshold = float(rng.uniform(0.1, 0.3))
        events = simulate_events(grey, threshold, rng)
        first, second = (torch.from_numpy(frame).float()[None] / 127.5 - 1 for frame in (grey[0], grey[-1]))
        volume = event_volume(*events, height=self.crop, width=self.crop, num_bins=self.num_bins)
        return {
            "frame_first": first,
            "frame_second": second,
            "events": torch.from_numpy(volume),
            "threshold": torch.tensor(threshold),
        }


def move_still(still: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """`(frames, H, W)` uint8: a grey picture under a smooth similarity motion of up to some pixels, edges mirrored."""
    height, width = still.shape
    shift = rng.normal(size=2) * rng.uniform(0.5, 5)
    angle, zoom = rng.normal() * 2, rng.normal() * 0.02
    out = []
    for time in np.linspace(-0.5, 0.5, frames):
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle * time, 1 + zoom * time)
        matrix[:, 2] += shift * time
        out.append(cv2.warpAffine(still, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))
    return np.stack(out)
