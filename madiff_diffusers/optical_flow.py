# SPDX-License-Identifier: Apache-2.0
"""Optical flow by OpenCV's DIS, the same on every machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np


LEAST_SIDE = 16  # pixels: of smaller frames, OpenCV reads outside of its buffers

# The number of OpenCV's threads is one for the process: the first to enter sets it, the last to leave sets it back.
_lock = Lock()
_opencv = {"users": 0, "threads": 0}


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """OpenCV's DIS cuts an image into as many stripes as there are threads, and its result depends on the cut: with one
    stripe, the same frames give the same flow on every machine. Any number of threads may be inside at once."""
    import cv2  # of opencv-python-headless

    with _lock:
        if _opencv["users"] == 0:
            _opencv["threads"] = cv2.getNumThreads()
            cv2.setNumThreads(1)
        _opencv["users"] += 1
    try:
        yield
    finally:
        with _lock:
            _opencv["users"] -= 1
            if _opencv["users"] == 0:
                cv2.setNumThreads(_opencv["threads"])


def dis_flow(
    frame_from: np.ndarray,
    frame_to: np.ndarray,
    preset: str = "medium",
    finest_scale: int | None = None,
    patch_stride: int | None = None,
) -> np.ndarray:
    """Flow `(H, W, 2)` float32, (x, y) in pixels, such that `from(p) = to(p + flow(p))`. Several threads may call this at once.

    Args:
        frame_from, frame_to: grey frames `(H, W)` uint8.
        preset: OpenCV's, `"ultrafast"`, `"fast"` or `"medium"`.
        finest_scale: halvings of the frames at which the search ends; the preset's if not given.
        patch_stride: pixels from one patch to the next; the preset's if not given.
    """
    import cv2  # of opencv-python-headless

    # A DIS object keeps buffers, so each call has its own.
    dis = cv2.DISOpticalFlow.create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset.upper()}"))
    if finest_scale is not None:
        dis.setFinestScale(finest_scale)
    if patch_stride is not None:
        dis.setPatchStride(patch_stride)
    height, width = frame_from.shape
    missing = max(LEAST_SIDE - height, 0), max(LEAST_SIDE - width, 0)
    if any(missing):
        frame_from, frame_to = (
            cv2.copyMakeBorder(frame, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
            for frame in (frame_from, frame_to)
        )
    with single_threaded_opencv():
        # None, which OpenCV's types leave out: a flow in its place would be where the search begins.
        flow = dis.calc(frame_from, frame_to, None)  # type: ignore[call-overload]
    return flow[:height, :width]


def seen_from_the_end(flow: np.ndarray, rounds: int = 3) -> np.ndarray:
    """A flow `(H, W, 2)` as it arrives: at every pixel `p` the flow of the pixel `q` from which it leads there, `q + flow(q) = p`,
    found by fixed-point iteration."""
    import cv2  # of opencv-python-headless

    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    arriving = flow
    for _ in range(rounds):
        arriving = cv2.remap(
            flow, x - arriving[..., 0], y - arriving[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    return arriving
