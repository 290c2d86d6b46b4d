"""What a window of frames becomes: a crop, augmented, and the sample that a stage learns from."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from training.data.sources import Unreadable
from training.event_simulation import EventCamera, event_volume, upsample_frames
from training.random_motion import MovingScene


MOST_MOMENTS = 12  # frames between two, at most, that events are simulated from: more cost time, and change little

Sample = dict[str, torch.Tensor]


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
        frames = np.rot90(frames, int(rng.integers(4)), axes=(1, 2))
        if self.colour_jitter:
            brightness, contrast, saturation = 1 + rng.uniform(-self.colour_jitter, self.colour_jitter, 3)
            values: np.ndarray = frames.astype(np.float32)
            grey = values @ np.array([0.299, 0.587, 0.114], np.float32)[:, None]
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
            raise Unreadable(f"Frames of {height}x{width} pixels are smaller than `resolution` {self.crop}.")
        top, left = rng.integers(height - self.crop + 1), rng.integers(width - self.crop + 1)
        return frames[:, top : top + self.crop, left : left + self.crop]


@dataclass
class TripletTransform:
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
class EventTransform:
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


SampleTransform = TripletTransform | EventTransform
