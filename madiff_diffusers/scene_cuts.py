"""Scene cuts: two neighbouring frames show different scenes, so that there is no motion from one to the other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


LEAST_CHANGE = 0.08  # The least mean absolute difference of thumbnails, from 0 to 1, that may be a cut.
CHANGE_ALONE = 0.25  # The same where there are no frames around to compare with.
RATIO = 3.0  # How many times as much as the frames around it a cut changes, at least.
REACH = 2  # The number of changes on each side that a cut is compared with.
REPEATED = 0.002  # Half a grey level: a frame that changes less repeats the one before it.
MOST_REPEATS = 3  # So many repetitions in a row, as of animation drawn on fours, are motion sampled less often; more are a still picture.
# The number of frames behind a cut that may decide on it, and of those before it.
LOOK_AHEAD = REACH * (MOST_REPEATS + 1)


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
    import cv2  # the numbers above are asked for where OpenCV is not

    return cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA).astype(np.int16)


def change(prev: np.ndarray, next_: np.ndarray) -> float:
    """The mean absolute difference of two thumbnails, from 0 to 1."""
    return float(np.abs(next_ - prev).mean()) / 255


def cuts_of_changes(changes: Sequence[float], least: float = LEAST_CHANGE, ratio: float = RATIO) -> list[int]:
    """
    Numbers of the frames that start a new scene.

    A cut changes thumbnails of 64×36 pixels by at least `least`, and `ratio` times as much as the mean change between the frames
    around it. Fast motion changes them as much, but does so for many frames in a row, or for every second, third or fourth of them, whose
    few repetitions are not compared with. Between these, what changes by `CHANGE_ALONE` is a cut all the same.

    Args:
        changes: the change from each frame to the next; see `change`.
        least: the least change of a cut, from 0 to 1.
        ratio: how many times as much as the frames around it a cut changes, at least.
    """
    cuts = []
    for i, size in enumerate(changes):
        if size < least:
            continue
        before = changes_around(changes[max(0, i - LOOK_AHEAD) : i][::-1])
        after = changes_around(changes[i + 1 : i + 1 + LOOK_AHEAD])
        around = [*before.changes, *after.changes]
        alone = size >= max(least, CHANGE_ALONE)
        is_repeated = before.has_repeats or after.has_repeats
        if (size >= ratio * float(np.mean(around))) or is_repeated and alone if around else alone:
            cuts.append(i + 1)
    return cuts


class Around(NamedTuple):
    """
    What a change is compared with on one side of it.

    Args:
        changes: the nearest `REACH` changes that are no repetitions, fewer where the frames end; those of a still picture count.
        has_repeats: whether repetitions were left out between them.
    """

    changes: list[float]
    has_repeats: bool


def changes_around(changes: Sequence[float]) -> Around:
    """What a change is compared with on one side, of the changes there, the nearest first; `LOOK_AHEAD` of them are enough."""
    found: list[float] = []
    has_repeats, number = False, 0
    while number < len(changes) and len(found) < REACH:
        run = 0
        while run <= MOST_REPEATS and number + run < len(changes) and changes[number + run] < REPEATED:
            run += 1
        if run > MOST_REPEATS:
            found += changes[number : number + REACH - len(found)]
            break
        has_repeats = has_repeats or run > 0
        number += run
        found += changes[number : number + 1]
        number += 1
    return Around(found, has_repeats)
