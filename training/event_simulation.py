"""Events simulated from frames: the truth that the image-to-event generator learns from.

The camera model is that of ESIM (Rebecq et al., 2018) and v2e (Hu et al., 2021): each pixel follows its log-intensity,
taken as piecewise-linear in time through the frames, and fires an event whenever it has moved by a contrast threshold
since the last one. No event falls into the refractory period after another at the same pixel.
"""

from typing import Tuple

import cv2
import numpy as np

from madiff_diffusers.motion_hints import single_threaded_opencv

LOG_EPS = 0.03  # added to intensities in [0, 1] before the logarithm: a sensor's dark noise bounds the contrast of black


def simulate_events(
    frames: np.ndarray,
    threshold: float,
    rng: np.random.Generator,
    threshold_mismatch: float = 0.03,
    refractory: float = 0.02,
) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Events that frames at evenly spaced times would cause.

    Args:
        frames (`(T, H, W)` uint8): linear-in-time samples of a grey video, the first at time 0 and the last at time 1.
        threshold: change of log-intensity that fires an event.
        rng: draws each pixel's own thresholds and its state at time 0.
        threshold_mismatch: standard deviation of the pixels' thresholds, absolute.
        refractory: time after an event in which a pixel stays silent, as a share of the whole interval.

    Returns:
        `(x, y, t, polarity)`: int, int, float in [0, 1] and bool (True: brighter) arrays, in no particular order.
    """
    log = np.log(frames.astype(np.float32) / 255 + LOG_EPS)
    height, width = log.shape[1:]
    thresholds = np.maximum(threshold + threshold_mismatch * rng.standard_normal((2, height, width)), 0.01)
    thresholds = thresholds.astype(np.float32)  # [2,H,W]: decreases, increases
    # A pixel enters the interval up to half a threshold away from where its last event left it.
    phase = rng.uniform(-0.5, 0.5, (height, width)).astype(np.float32)
    reference = log[0] + phase * np.where(phase > 0, thresholds[0], thresholds[1])
    last = np.full((height, width), -np.inf, dtype=np.float32)
    rows, columns = np.mgrid[:height, :width]
    dt = 1 / (len(log) - 1)
    out = []
    for step in range(len(log) - 1):
        before, after = log[step], log[step + 1]
        slope = after - before
        rising = slope > 0
        sign = np.where(rising, np.float32(1), np.float32(-1))
        size = np.where(rising, thresholds[1], thresholds[0])
        while True:
            crossing = reference + sign * size
            fired = np.where(rising, after >= crossing, after <= crossing) & (slope != 0)
            if not fired.any():
                break
            share = np.clip((crossing - before) / np.where(slope == 0, 1, slope), 0, 1)
            time = ((step + share) * dt).astype(np.float32)
            seen = fired & (time - last >= refractory)
            out.append((columns[seen], rows[seen], time[seen], rising[seen]))
            last = np.where(seen, time, last)
            reference = np.where(fired, crossing, reference)
    if not out:
        empty = np.zeros(0)
        return empty.astype(int), empty.astype(int), empty.astype(np.float32), empty.astype(bool)
    x, y, t, polarity = (np.concatenate(parts) for parts in zip(*out))
    return x, y, t, polarity


def event_volume(
    x: np.ndarray, y: np.ndarray, t: np.ndarray, polarity: np.ndarray, height: int, width: int, num_bins: int = 9
) -> np.ndarray:
    """Events at times in [0, 1] as a volume `(2 * num_bins, H, W)` float32: increases first, then decreases.

    Each event is shared between the two time bins around it by a linear kernel: bin b gets `max(0, 1 - |b - t*|)` with
    `t* = (num_bins - 1) t` (Zhu et al., 2019).
    """
    volume = np.zeros(2 * num_bins * height * width, dtype=np.float32)
    position = t * (num_bins - 1)
    lower = np.minimum(np.floor(position).astype(int), num_bins - 2)
    upper_share = (position - lower).astype(np.float32)
    first = np.where(polarity, 0, num_bins)
    for bins, share in ((lower, 1 - upper_share), (lower + 1, upper_share)):
        index = ((first + bins) * height + y) * width + x
        volume += np.bincount(index, weights=share, minlength=volume.size).astype(np.float32)
    return volume.reshape(2 * num_bins, height, width)


def upsample_frames(frames: np.ndarray, factor: int) -> np.ndarray:
    """`(T, H, W)` uint8 to `((T - 1) * factor + 1, H, W)`, with frames between neighbours moved along optical flow.

    Blending would turn motion into a fade, whose events are spread evenly in time; frames moved along the flow make an
    edge pass a pixel at one moment, as it does in the world.
    """
    if factor == 1:
        return frames
    flow_maker = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    height, width = frames.shape[1:]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    out = [frames[0]]
    for before, after in zip(frames[:-1], frames[1:]):
        # Flow of each frame towards the other, scaled to the moment in between (linear motion).
        with single_threaded_opencv():
            to_after, to_before = flow_maker.calc(before, after, None), flow_maker.calc(after, before, None)
        for i in range(1, factor):
            s = i / factor
            from_before = cv2.remap(before, grid + s * to_before, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            from_after = cv2.remap(
                after, grid + (1 - s) * to_after, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            out.append(cv2.addWeighted(from_before, 1 - s, from_after, s, 0))
        out.append(after)
    return np.stack(out)
