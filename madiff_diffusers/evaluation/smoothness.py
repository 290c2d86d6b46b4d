"""Evenness of motion: a pan of known speed, frames made between its frames, and the step from each frame to the next."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import cv2
import numpy as np
from skimage.registration import phase_cross_correlation

from ..image_processor import to_uint8
from .methods import Method


PAN_STEP = 12  # pixels a frame, to the left
_SIZE = 192, 320
_WAVES = 60
# Pixels that a step of no length, or backwards, counts as, so that a ratio is a number.
_LEAST_STEP = 0.01


@lru_cache(maxsize=32)
def pan(time: float) -> np.ndarray:
    """Frame `(192, 320, 3)` uint8 of a texture that moves by `PAN_STEP` pixels a unit of time: waves of 9 to 90 pixels, placed
    exactly, also between pixels."""
    random = np.random.default_rng(0)
    y, x = (axis.astype(np.float32) for axis in np.indices(_SIZE))
    image = np.zeros((*_SIZE, 3), np.float32)
    for _ in range(_WAVES):
        number, angle, phase = (
            2 * np.pi / random.uniform(9, 90),
            random.uniform(0, np.pi),
            random.uniform(0, 2 * np.pi),
        )
        wave = np.sin(number * (np.cos(angle) * (x + PAN_STEP * time) + np.sin(angle) * y) + phase)
        image += wave[..., None] * random.uniform(0.3, 1, 3).astype(np.float32)
    return to_uint8(0.5 + image / (4 * np.sqrt(_WAVES / 4)))


def steps(frames: Sequence[np.ndarray]) -> list[float]:
    """Pixels by which each frame `(H, W, 3)` uint8 has moved to the left since the one before, by phase correlation."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in frames]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    windowed = [(each - each.mean()) * window for each in grey]
    # Not normalised: frequencies that the frames do not have tell nothing of where they are.
    shifts = [
        phase_cross_correlation(*pair, upsample_factor=100, normalization=None)[0]
        for pair in zip(windowed, windowed[1:])
    ]
    return [float(shift[1]) for shift in shifts]


def step_ratio(method: Method) -> float:
    """The largest step between consecutive frames of a pan divided by the smallest; 1 where motion is even. Between three given frames,
    a method makes those at thirds, and then those at fifths; the larger ratio counts.

    Raises:
        ValueError: if the method fails.
    """
    given = [pan(time) for time in range(3)]
    pairs = list(zip(given, given[1:]))
    ratios = []
    for parts in (3, 5):
        made = [method(pairs, Fraction(part, parts)) for part in range(1, parts)]
        frames = [
            frame for place, first in enumerate(given[:-1]) for frame in (first, *(each[place] for each in made))
        ]
        moved = steps([*frames, given[-1]])
        ratios.append(max(moved) / max(min(moved), _LEAST_STEP))
    return max(ratios)
