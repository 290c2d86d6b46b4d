"""Events simulated from frames: the truth that the image-to-event generator learns from.

The camera model is that of ESIM (Rebecq et al., 2018) and v2e (Hu et al., 2021): each pixel follows its log-intensity,
taken as piecewise-linear in time through the frames, and fires an event whenever it has moved by a contrast threshold
since the last one. No event falls into the refractory period after another at the same pixel.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from madiff_diffusers.optical_flow import dis_flow


LOG_EPS = (
    0.03  # added to intensities in [0, 1] before the logarithm: a sensor's dark noise bounds the contrast of black
)

# x, y: int; t: float32 in [0, 1]; polarity: bool, True where it got brighter. In no particular order.
Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class EventCamera:
    """What differs from sensor to sensor. Times are shares of the interval that is simulated.

    Args:
        threshold_decrease, threshold_increase: change of log-intensity that fires an event of either polarity.
        threshold_mismatch: standard deviation of the pixels' own thresholds around these.
        refractory: time after an event in which a pixel stays silent.
        noise: events per pixel that nothing in the scene causes, of both polarities, evenly in time.
        settled: every pixel starts where its last event left it. Otherwise its brightness has wandered since: the
            distance, in thresholds, then has a triangular density on (-1, 1), which is where a random walk that
            starts anew at 0 whenever it comes to -1 or 1 is to be found.
    """

    threshold_decrease: float = 0.2
    threshold_increase: float = 0.2
    threshold_mismatch: float = 0.03
    refractory: float = 0.02
    noise: float = 0.0
    settled: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "EventCamera":
        """A camera as one of many: thresholds between 0.1 and 0.3, one polarity a little more sensitive, some noise."""
        threshold = rng.uniform(0.1, 0.3)
        lean = np.exp(rng.normal() * 0.1)
        return cls(
            threshold_decrease=float(threshold / lean),
            threshold_increase=float(threshold * lean),
            noise=float(rng.uniform(0, 0.01)),
        )

    def simulate(self, frames: np.ndarray, rng: np.random.Generator, times: np.ndarray | None = None) -> Events:
        """Events that a grey video would cause.

        Args:
            frames (`(T, H, W)`): uint8, or float in [0, 1].
            rng: draws the pixels' thresholds, their states at the start, and noise.
            times (`(T,)`): of the frames, rising from 0 to 1; evenly spaced if not given.
        """
        times = np.linspace(0, 1, len(frames)) if times is None else times
        intensity = frames.astype(np.float32) / 255 if frames.dtype == np.uint8 else frames.astype(np.float32)
        log = np.log(intensity + LOG_EPS).reshape(len(frames), -1)  # [T,H*W]
        height, width = frames.shape[1:]
        count = height * width

        # 1. the pixels
        thresholds = np.array([[self.threshold_decrease], [self.threshold_increase]])
        thresholds = np.maximum(thresholds + self.threshold_mismatch * rng.standard_normal((2, count)), 0.01)
        thresholds = thresholds.astype(np.float32)  # [2,H*W]
        reference = log[0].copy()
        if not self.settled:
            wandered = rng.triangular(-1, 0, 1, count).astype(np.float32)
            reference -= wandered * np.where(wandered > 0, thresholds[1], thresholds[0])
        last = np.full(count, -np.inf, dtype=np.float32)

        # 2. crossings between each frame and the next
        found = []
        for before, after, start, end in zip(log[:-1], log[1:], times[:-1], times[1:]):
            slope = after - before
            rising = slope > 0
            crossing = reference + np.where(rising, thresholds[1], -thresholds[0])
            pixels = np.flatnonzero(np.where(rising, after >= crossing, after <= crossing) & (slope != 0))
            while len(pixels):
                up = rising[pixels]
                step = np.where(up, thresholds[1, pixels], -thresholds[0, pixels])
                level = reference[pixels] + step
                share = np.clip((level - before[pixels]) / slope[pixels], 0, 1)
                time = (start + share * (end - start)).astype(np.float32)
                reference[pixels] = level
                seen = time - last[pixels] >= self.refractory
                last[pixels[seen]] = time[seen]
                found.append((pixels[seen], time[seen], up[seen]))
                following = level + step
                pixels = pixels[np.where(up, after[pixels] >= following, after[pixels] <= following)]

        # 3. noise
        spurious = rng.integers(count, size=rng.poisson(self.noise * count))
        time = rng.uniform(0, 1, len(spurious)).astype(np.float32)
        found.append((spurious, time, rng.random(len(spurious)) < 0.5))
        pixels, time, polarity = (np.concatenate(parts) for parts in zip(*found))
        return pixels % width, pixels // width, time, polarity


def event_volume(
    x: np.ndarray, y: np.ndarray, t: np.ndarray, polarity: np.ndarray, height: int, width: int, num_bins: int = 9
) -> np.ndarray:
    """Events at times in [0, 1] as a volume `(2 * num_bins, H, W)` float32: increases first, then decreases.

    Each event is shared between the two time bins around it by a linear kernel: bin b gets `max(0, 1 - |b - t*|)` with
    `t* = (num_bins - 1) t` (Zhu et al., 2019).
    """
    volume = np.zeros(2 * num_bins * height * width, dtype=np.float32)
    position = t * (num_bins - 1)
    lower = np.clip(np.floor(position).astype(int), 0, max(num_bins - 2, 0))
    upper_share = (position - lower).astype(np.float32)
    first = np.where(polarity, 0, num_bins)
    for bins, share in ((lower, 1 - upper_share), (lower + 1, upper_share))[:num_bins]:  # of one bin, all is its own
        index = ((first + bins) * height + y) * width + x
        volume += np.bincount(index, weights=share, minlength=volume.size).astype(np.float32)
    return volume.reshape(2 * num_bins, height, width)


def upsample_frames(frames: np.ndarray, largest_shift: float = 1.0, most: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Frames between neighbours, moved along optical flow: as many as the motion there asks for.

    Blending would turn motion into a fade, whose events are spread evenly in time; frames moved along the flow make an
    edge pass a pixel at one moment, as it does in the world.

    Args:
        frames (`(T, H, W)` uint8): frames at even distances in time.
        largest_shift: how far, in pixels, all but a hundredth of the pixels may move from one frame to the next.
        most: frames made of one, at most.

    Returns:
        The frames `(N, H, W)` uint8, and their times in [0, 1].
    """
    height, width = frames.shape[1:]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    out, times = [frames[0]], [0.0]
    for number, (before, after) in enumerate(zip(frames[:-1], frames[1:])):
        # Flow of each frame towards the other, scaled to the moment in between (linear motion).
        to_after, to_before = dis_flow(before, after, "fast"), dis_flow(after, before, "fast")
        shift = float(np.percentile(np.linalg.norm(to_after, axis=-1), 99))
        factor = int(np.clip(np.ceil(shift / largest_shift), 1, most))
        for i in range(1, factor):
            s = i / factor
            from_before = cv2.remap(
                before, grid + s * to_before, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            from_after = cv2.remap(
                after, grid + (1 - s) * to_after, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            out.append(cv2.addWeighted(from_before, 1 - s, from_after, s, 0))
            times.append(number + s)
        out.append(after)
        times.append(number + 1.0)
    return np.stack(out), np.array(times) / (len(frames) - 1)
