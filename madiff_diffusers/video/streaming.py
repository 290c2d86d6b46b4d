"""Interpolation of a stream of frames in Python."""

from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
import PIL.Image
import torch

from ..image_processor import OUTPUT_TYPES
from ..pipeline_inputs import check_count
from ..pipeline_madiff import MADiffPipeline
from ..scene_cuts import LEAST_CHANGE, LOOK_AHEAD, RATIO, REACH, change, changes_around, cuts_of_changes, thumbnail
from .interpolation import FrameInterpolator, Pair, SourceFrame


def interpolate_frames(
    pipeline: MADiffPipeline,
    frames: Iterable[PIL.Image.Image | np.ndarray | torch.Tensor],
    factor: int = 2,
    *,
    steps: int | None = None,
    seed: int = 0,
    cut_threshold: float = LEAST_CHANGE,
    cut_ratio: float = RATIO,
    output_type: str = "pil",
) -> Iterator[PIL.Image.Image | np.ndarray | torch.Tensor]:
    """
    Interpolate a stream of frames, of which only a few are held at a time.

    Args:
        pipeline: the pipeline that makes the frames.
        frames: frames of one size; each as `image_prev` of the pipeline.
        factor: the number of frames in the place of each one.
        steps: sampling steps; the checkpoint's own if not given.
        seed: the seed of the noise, the same for every frame.
        cut_threshold, cut_ratio: see `scene_cuts.cuts_of_changes`; nothing is made across a cut.
        output_type: "pil", "np" (`(H, W, 3)`) or "pt" (`(3, H, W)`); the latter two float32 in [0, 1].

    Yields:
        each frame, and behind it the frames made between it and the next, evenly spaced; before a cut and at the end, the frame is
        repeated instead. Each is a copy, which the caller may change.

    Raises:
        ValueError, TypeError: if an argument is out of its range, or a frame has another size; as soon as frames are asked for.
    """
    check_count(factor, "factor")
    if steps is not None:
        check_count(steps, "steps")
    for name, value, least in (("cut_threshold", cut_threshold, 0), ("cut_ratio", cut_ratio, 1)):
        if not value >= least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value!r}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}.")
    processor, interpolator = pipeline.frame_processor, FrameInterpolator(pipeline, steps, seed)
    factor = int(factor)
    times = [Fraction(number, factor) for number in range(1, factor)]

    def given(frame: np.ndarray) -> PIL.Image.Image | np.ndarray | torch.Tensor:
        if output_type == "np":
            return frame.copy()
        tensor = torch.from_numpy(frame.transpose(2, 0, 1).copy())
        return tensor if output_type == "pt" else processor.postprocess(tensor[None, None] * 2 - 1, "pil")[0][0]

    last: SourceFrame | None = None
    for neighbour, starts_scene in _with_cuts(_neighbours(pipeline, frames), cut_threshold, cut_ratio):
        if last is not None:
            yield given(last.frame)
            made = (
                (last.frame for _ in times) if starts_scene else interpolator.between([Pair(last, neighbour, times)])
            )
            yield from map(given, made)
        last = neighbour
    if last is not None:
        for _ in range(factor):
            yield given(last.frame)


def _neighbours(pipeline: MADiffPipeline, frames: Iterable) -> Iterator[SourceFrame]:
    size = None
    for frame in frames:
        tensor = pipeline.frame_processor.to_tensor(frame, "frames")
        if tensor.shape[0] != 1 or (size or tensor.shape[-2:]) != tensor.shape[-2:]:
            raise ValueError(
                f"`frames` must give single frames of one size, but gives {tuple(tensor.shape)} after {size and tuple(size)}."
            )
        size = tensor.shape[-2:]
        yield SourceFrame((tensor[0].permute(1, 2, 0).contiguous() / 2 + 0.5).clamp(0, 1).detach().cpu().numpy())


def _with_cuts(
    neighbours: Iterable[SourceFrame], threshold: float, ratio: float
) -> Iterator[tuple[SourceFrame, bool]]:
    """Frames, each with whether it starts a new scene. They come as late as frames behind a cut are needed to tell, `LOOK_AHEAD` at most."""
    waiting: deque[SourceFrame] = deque()
    changes: list[float] = []
    small, number = None, 0  # of the frame that is given next

    def starts_scene() -> bool:
        first = max(0, number - 1 - LOOK_AHEAD)
        return number > 0 and number - first in cuts_of_changes(changes[first : number + LOOK_AHEAD], threshold, ratio)

    def is_known() -> bool:
        return len(changes_around(changes[number : number + LOOK_AHEAD]).changes) == REACH

    for neighbour in neighbours:
        before, small = small, thumbnail((neighbour.frame * 255).round().astype(np.uint8))
        if before is not None:
            changes.append(change(before, small))
        waiting.append(neighbour)
        while waiting and is_known():
            yield waiting.popleft(), starts_scene()
            number += 1
            # Streams may have no end, and nothing looks back further than this.
            if number > LOOK_AHEAD + 1:
                del changes[0]
                number -= 1
    while waiting:
        yield waiting.popleft(), starts_scene()
        number += 1
