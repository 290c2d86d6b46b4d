"""Scene cuts: two neighbouring frames show different scenes, so that there is no motion from one to the other."""

from collections.abc import Sequence

import cv2
import numpy as np


LEAST_CHANGE = 0.08  # The least mean absolute difference of thumbnails, from 0 to 1, that may be a cut.
CHANGE_ALONE = 0.25  # The same where there are no frames around to compare with.
RATIO = 3.0  # How many times as much as the frames around it a cut changes, at least.
REACH = 2  # The number of frames on each side that a cut is compared with.


def find_cuts(frames: Sequence[np.ndarray]) -> list[int]:
    """
    Numbers of the frames that start a new scene; see `cuts_of_changes`.

    Args:
        frames: consecutive frames, each `(H, W, 3)` uint8.
    """
    thumbnails = [thumbnail(frame) for frame in frames]
    return cuts_of_changes([change(a, b) for a, b in zip(thumbnails[:-1], thumbnails[1:])])


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """The thumbnail, `(36, 64, 3)` int16, of a frame `(H, W, 3)` uint8."""
    return cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA).astype(np.int16)


def change(prev: np.ndarray, next_: np.ndarray) -> float:
    """The mean absolute difference of two thumbnails, from 0 to 1."""
    return float(np.abs(next_ - prev).mean()) / 255


def cuts_of_changes(changes: Sequence[float], least: float = LEAST_CHANGE, ratio: float = RATIO) -> list[int]:
    """
    Numbers of the frames that start a new scene.

    A cut changes thumbnails of 64×36 pixels by at least `least`, and `ratio` times as much as the mean change between the frames
    around it. Fast motion changes them as much, but does so for many frames in a row.

    Args:
        changes: the change from each frame to the next; see `change`.
        least: the least change of a cut, from 0 to 1.
        ratio: how many times as much as the frames around it a cut changes, at least.
    """
    cuts = []
    for i, size in enumerate(changes):
        around = [*changes[max(0, i - REACH) : i], *changes[i + 1 : i + 1 + REACH]]
        if size >= (max(least, ratio * float(np.mean(around))) if around else max(least, CHANGE_ALONE)):
            cuts.append(i + 1)
    return cuts
