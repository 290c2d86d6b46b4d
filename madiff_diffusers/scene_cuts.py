"""Scene cuts: places between two frames that show different scenes, across which there is no motion to follow."""

from collections.abc import Sequence

import cv2
import numpy as np


LEAST_CHANGE = 0.08  # mean absolute difference of thumbnails, of the range, below which nothing is a cut
CHANGE_ALONE = 0.25  # … above which two frames are a cut where no other change is there to compare with
RATIO = 3.0  # times that a cut changes more than the frames around it do
REACH = 2  # frames on each side that it is compared with


def find_cuts(frames: Sequence[np.ndarray]) -> list[int]:
    """Numbers of the frames that start a new scene; see `cuts_of_changes`.

    Args:
        frames: consecutive frames, each `(H, W, 3)` uint8.
    """
    thumbnails = [thumbnail(frame) for frame in frames]
    return cuts_of_changes([change(a, b) for a, b in zip(thumbnails[:-1], thumbnails[1:])])


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """A frame `(H, W, 3)` uint8 as `(36, 64, 3)` int16."""
    return cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA).astype(np.int16)


def change(prev: np.ndarray, next_: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails, of the range."""
    return float(np.abs(next_ - prev).mean()) / 255


def cuts_of_changes(changes: Sequence[float], least: float = LEAST_CHANGE, ratio: float = RATIO) -> list[int]:
    """Numbers of the frames that start a new scene.

    A cut changes thumbnails of 64×36 pixels by at least `least`, and `ratio` times as much as the mean change between the frames
    around it; fast motion changes them as much, but for many frames in a row.

    Args:
        changes: from each frame to the next.
    """
    cuts = []
    for i, size in enumerate(changes):
        around = [*changes[max(0, i - REACH) : i], *changes[i + 1 : i + 1 + REACH]]
        if size >= (max(least, ratio * float(np.mean(around))) if around else max(least, CHANGE_ALONE)):
            cuts.append(i + 1)
    return cuts
