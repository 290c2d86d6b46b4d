"""Interpolation between frames of a stream, each of which the networks encode once for all frames that are made beside it."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple, cast

import numpy as np
import torch

from ..pipeline_madiff import EncodedFrames, MADiffPipeline, MADiffPipelineOutput


MOST_TOGETHER = 7  # Frames between two that may be held at once.


class Pair(NamedTuple):
    """Two frames of a source, and the instants between them, from 0 to 1, at which frames are made, in their order."""

    prev: "SourceFrame"
    next: "SourceFrame"
    times: Sequence[Fraction]


@contextmanager
def without_bar(pipeline: MADiffPipeline) -> Iterator[None]:
    """Without the pipeline's own progress bar, of which there would be one for each pair of frames."""
    before = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**(before or {}))


class FrameInterpolator:
    """
    Maker of frames between two.

    Args:
        pipeline: the pipeline that makes them.
        steps: sampling steps; the checkpoint's own if not given.
        seed: the seed of the noise, which is the same for all frames, so that it does not flicker.
        at_once: the number of pairs of frames that the networks see at once; where many frames are made between two, that of instants.
    """

    def __init__(self, pipeline: MADiffPipeline, steps: int | None = None, seed: int = 0, at_once: int = 1):
        self._pipeline, self._steps, self._seed, self._at_once = pipeline, steps, seed, at_once

    def between(self, pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
        """
        Make frames between neighbours.

        Args:
            pairs: `at_once` pairs or fewer. Those between which frames are made at the same instants are made together.

        Yields:
            pair by pair, one frame for each instant, `(H, W, 3)` float32 RGB in [0, 1].
        """
        alike: dict[tuple[Fraction, ...], list[int]] = {}
        for number, pair in enumerate(pairs):
            if 0 < len(pair.times) <= MOST_TOGETHER:
                alike.setdefault(tuple(pair.times), []).append(number)
        made: dict[int, np.ndarray] = {}
        for times, numbers in alike.items():
            recursive = self._pipeline.config.default_recursive
            made.update(zip(numbers, self._made([pairs[number] for number in numbers], times, recursive)))
        for number, pair in enumerate(pairs):
            if number in made:
                yield from made.pop(number)
                continue
            # Middles of middles are not asked for here: together, they would take too much memory.
            for first in range(0, len(pair.times), self._at_once):
                (frames,) = self._made([pair], pair.times[first : first + self._at_once], recursive=False)
                yield from frames

    def _made(self, pairs: Sequence[Pair], times: Sequence[Fraction], recursive: bool) -> np.ndarray:
        """Frames `(B, F, H, W, 3)` of pairs whose instants are the same."""
        encode_together([frame for pair in pairs for frame in (pair.prev, pair.next)], self._pipeline)
        prev, next_ = (
            EncodedFrames.together([each.encoded for each in side]) for side in zip(*(p[:2] for p in pairs))
        )
        vqvae = self._pipeline.vqvae
        channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
        height, width = (side // vqvae.downsample_factor for side in prev.frames.shape[-2:])
        generators = [torch.Generator().manual_seed(self._seed) for _ in pairs]
        noise = [torch.randn(1, 1, channels, height, width, generator=generator) for generator in generators]
        with without_bar(self._pipeline):
            made = self._pipeline(
                prev,
                next_,
                times=times,
                frames_per_batch=max(1, self._at_once // len(pairs)),
                recursive=recursive,
                num_inference_steps=self._steps,
                generator=generators,
                latents=torch.cat(noise).expand(-1, len(times), -1, -1, -1),
                output_type="np",
            )
        return cast(np.ndarray, cast(MADiffPipelineOutput, made).frames)


class SourceFrame:
    """
    A frame of the source, with what the networks make of it.

    Args:
        frame: `(H, W, 3)` float32 RGB in [0, 1].
    """

    def __init__(self, frame: np.ndarray):
        self.frame = frame
        self._encoded: EncodedFrames | None = None

    @property
    def encoded(self) -> EncodedFrames:
        """What `encode_together` made of the frame."""
        assert self._encoded is not None, "encoded"
        return self._encoded


def encode_together(frames: Sequence[SourceFrame], pipeline: MADiffPipeline) -> None:
    """Encode those of some frames that are not encoded yet."""
    left = list({id(frame): frame for frame in frames if frame._encoded is None}.values())
    if left:
        encoded = pipeline.encode_frames([np.clip(frame.frame, 0, 1) for frame in left])
        for frame, own in zip(left, encoded.one_by_one()):
            frame._encoded = own


class FrameWindow:
    """
    A window of the latest frames of a stream.

    Args:
        frames: pairs of a place and a frame, the places increasing.
        count: of frames that the window holds.
    """

    def __init__(self, frames: Iterable[tuple[int, np.ndarray]], count: int = 2):
        self._frames = iter(frames)
        self._held: deque[tuple[int, SourceFrame]] = deque(maxlen=count)

    def get(self, place: int) -> SourceFrame:
        """The frame of a place that is not before the window."""
        while not self._held or self._held[-1][0] < place:
            found, frame = next(self._frames)
            self._held.append((found, SourceFrame(frame)))
        return next(neighbour for found, neighbour in self._held if found == place)
