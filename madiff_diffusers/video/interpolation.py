"""Interpolation between frames of a stream, each of which the networks encode once for all frames that are made beside it."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import cast

import numpy as np
import torch

from ..pipeline_madiff import EncodedFrames, MADiffPipeline, MADiffPipelineOutput


MOST_TOGETHER = 7  # Frames between two that may be held at once.


class FrameInterpolator:
    """
    Maker of frames between two.

    Args:
        pipeline: the pipeline that makes them.
        steps: sampling steps; the checkpoint's own if not given.
        seed: the seed of the noise, which is the same for all frames, so that it does not flicker.
        frames_per_batch: the number of frames between two that are made at once.
    """

    def __init__(self, pipeline: MADiffPipeline, steps: int | None = None, seed: int = 0, frames_per_batch: int = 1):
        self._pipeline, self._steps, self._seed, self._frames_per_batch = pipeline, steps, seed, frames_per_batch

    def between(self, prev: "SourceFrame", next_: "SourceFrame", times: Sequence[Fraction]) -> Iterator[np.ndarray]:
        """
        Make the frames at some instants between two.

        Args:
            prev, next_: the two frames.
            times: the instants, in their order, between 0 and 1.

        Yields:
            one frame for each instant, `(H, W, 3)` float32 RGB in [0, 1].
        """
        # Middles of middles are asked for together, unless they are so many that they would take too much memory.
        recursive = self._pipeline.config.default_recursive and len(times) <= MOST_TOGETHER
        at_once = len(times) if recursive else self._frames_per_batch
        for first in range(0, len(times), at_once or 1):
            chosen = list(times[first : first + at_once])
            encoded = prev.encoded(self._pipeline), next_.encoded(self._pipeline)
            assert encoded[0].latents is not None  # `encode_frames` has made them.
            generator = torch.Generator().manual_seed(self._seed)
            noise = torch.randn(1, 1, *encoded[0].latents.shape[1:], generator=generator)
            made = self._pipeline(
                *encoded,
                times=chosen,
                frames_per_batch=self._frames_per_batch,
                recursive=recursive,
                num_inference_steps=self._steps,
                generator=generator,
                latents=noise.expand(1, len(chosen), -1, -1, -1),
                output_type="np",
            )
            yield from cast(np.ndarray, cast(MADiffPipelineOutput, made).frames)[0]


class SourceFrame:
    """
    A frame of the source, with what the networks make of it.

    Args:
        frame: `(H, W, 3)` float32 RGB in [0, 1].
    """

    def __init__(self, frame: np.ndarray):
        self.frame = frame
        self._encoded: EncodedFrames | None = None

    def encoded(self, pipeline: MADiffPipeline) -> EncodedFrames:
        """The frame as the networks encode it; they do so once."""
        if self._encoded is None:
            self._encoded = pipeline.encode_frames(np.clip(self.frame, 0, 1))
        return self._encoded


class FrameWindow:
    """
    A window of the latest two frames of a stream.

    Args:
        frames: pairs of a place and a frame, the places increasing.
    """

    def __init__(self, frames: Iterable[tuple[int, np.ndarray]]):
        self._frames = iter(frames)
        self._held: deque[tuple[int, SourceFrame]] = deque(maxlen=2)

    def get(self, place: int) -> SourceFrame:
        """The frame of a place that is not before the window."""
        while not self._held or self._held[-1][0] < place:
            found, frame = next(self._frames)
            self._held.append((found, SourceFrame(frame)))
        return next(neighbour for found, neighbour in self._held if found == place)
