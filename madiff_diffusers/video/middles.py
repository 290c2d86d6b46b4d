"""Frames between frames, each source frame encoded once for all that it is next to; and the memory that this takes."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import PIL.Image
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..frame_coding import EncodedFrames
from ..image_processor import OUTPUT_TYPES
from ..pipeline_madiff import MADiffPipeline
from ..scene_cuts import LEAST_CHANGE, RATIO, REACH, change, cuts_of_changes, thumbnail


PROBE = 256  # side of the frame that memory is measured on
BESIDE_TENSORS = 2.5  # what the process grows by for each byte of tensors: convolutions' own buffers, freed memory that is not given back

PROCESS_BYTES = 1.1e9  # of a process that has made no frame: torch, and the weights of a small checkpoint
FRAME_BYTES = 250  # for each pixel: frames that wait to be used or encoded, and the encoder's own
WHOLE_BYTES = 450  # for each pixel, with tiles: motion hints and features of the whole frame


MOST_TOGETHER = 7  # frames between two that are held at once


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it, and the most of them that were there at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return result

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def bytes_per_pixel(pipeline: MADiffPipeline, steps: int | None = None) -> float:
    """Memory that making a frame takes, for each of its pixels; measured on a small frame."""
    frame = torch.zeros(1, 3, PROBE, PROBE)
    with _LiveBytes() as tensors:
        pipeline(frame, frame, num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(0))
    return tensors.most * BESIDE_TENSORS / PROBE**2


class FrameMaker:
    """
    Makes frames between two.

    Args:
        pipeline: what makes them.
        steps: sampling steps; the checkpoint's own if not given.
        seed: of the noise, which is the same for all frames, so that it does not flicker.
        frames_per_batch: frames between two that are made at once.
    """

    def __init__(self, pipeline: MADiffPipeline, steps: int | None = None, seed: int = 0, frames_per_batch: int = 1):
        self._pipeline, self._steps, self._seed, self._frames_per_batch = pipeline, steps, seed, frames_per_batch

    def between(self, prev: "Neighbour", next_: "Neighbour", times: Sequence[Fraction]) -> Iterator[np.ndarray]:
        """
        The frames at some instants between two, in their order.

        Args:
            prev, next_: the two frames.
            times: instants, between 0 and 1.

        Yields:
            `(H, W, 3)` float32 RGB in [0, 1].
        """
        # What is made as middles of middles is asked for together; of more, held at once, the memory would not do.
        recursive = self._pipeline.config.default_recursive and len(times) <= MOST_TOGETHER
        at_once = len(times) if recursive else self._frames_per_batch
        for first in range(0, len(times), at_once or 1):
            chosen = list(times[first : first + at_once])
            encoded = prev.encoded(self._pipeline), next_.encoded(self._pipeline)
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
            yield from made.frames[0]


class Neighbour:
    """
    A frame that others are made next to.

    Args:
        frame: `(H, W, 3)` float32 RGB in [0, 1].
    """

    def __init__(self, frame: np.ndarray):
        self.frame = frame
        self._encoded: EncodedFrames | None = None

    def encoded(self, pipeline: MADiffPipeline) -> EncodedFrames:
        """What the networks make of it on its own; once."""
        if self._encoded is None:
            self._encoded = pipeline.encode_frames(np.clip(self.frame, 0, 1))
        return self._encoded


def tile_pixels_for(pipeline: MADiffPipeline, pixels: int, max_memory: int, steps: int | None = None) -> int | None:
    """
    Pixels of tiles with which frames can be made in a memory; None if they need no tiles.

    Args:
        pipeline: what makes the frames.
        pixels: of a frame.
        max_memory: bytes that the process may take in all.
        steps: of sampling.
    """
    if pixels <= PROBE**2:
        return None
    each = bytes_per_pixel(pipeline, steps)
    left = max_memory - PROCESS_BYTES - pixels * FRAME_BYTES
    if pixels * each <= left:
        return None
    # Hints, features and frames are whole, however small the tiles.
    left -= pixels * WHOLE_BYTES
    return max(1, int(left / each))


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
    Make a stream of frames smoother, holding but a few of them at a time.

    Args:
        pipeline: what makes the frames.
        frames: of one size; each as `image_prev` of the pipeline.
        factor: frames to give for each one.
        steps: sampling steps; the checkpoint's own if not given.
        seed: of the noise, the same for every frame.
        cut_threshold, cut_ratio: see `scene_cuts.cuts_of_changes`; nothing is made across a cut.
        output_type: "pil", "np" (`(H, W, 3)`) or "pt" (`(3, H, W)`); the latter two float32 in [0, 1].

    Yields:
        each frame, and behind it those made towards the next, evenly spaced; before a cut and at the end, the frame again. Each is
        the caller's own.

    Raises:
        ValueError, TypeError: for arguments out of their range, and frames of another size; once frames are asked for.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"`factor` must be a positive integer, but is {factor!r}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}.")
    processor, maker = pipeline.frame_processor, FrameMaker(pipeline, steps, seed)
    times = [Fraction(number, factor) for number in range(1, factor)]

    def given(frame: np.ndarray) -> PIL.Image.Image | np.ndarray | torch.Tensor:
        if output_type == "np":
            return frame.copy()
        tensor = torch.from_numpy(frame.transpose(2, 0, 1).copy())
        return tensor if output_type == "pt" else processor.postprocess(tensor[None, None] * 2 - 1, "pil")[0][0]

    last: Neighbour | None = None
    for neighbour, starts_scene in _with_cuts(_neighbours(pipeline, frames), cut_threshold, cut_ratio):
        if last is not None:
            yield given(last.frame)
            made = (last.frame for _ in times) if starts_scene else maker.between(last, neighbour, times)
            yield from map(given, made)
        last = neighbour
    if last is not None:
        for _ in range(factor):
            yield given(last.frame)


def _neighbours(pipeline: MADiffPipeline, frames: Iterable) -> Iterator[Neighbour]:
    size = None
    for frame in frames:
        tensor = pipeline.frame_processor.to_tensor(frame, "frames")
        if tensor.shape[0] != 1 or (size or tensor.shape[-2:]) != tensor.shape[-2:]:
            raise ValueError(
                f"`frames` must give single frames of one size, but gives {tuple(tensor.shape)} after {size and tuple(size)}."
            )
        size = tensor.shape[-2:]
        yield Neighbour((tensor[0].permute(1, 2, 0).contiguous() / 2 + 0.5).clamp(0, 1).numpy())


def _with_cuts(neighbours: Iterable[Neighbour], threshold: float, ratio: float) -> Iterator[tuple[Neighbour, bool]]:
    """Frames, and whether each starts a new scene; some frames late, because that shows by what comes after it."""
    waiting: deque[Neighbour] = deque()
    changes: list[float] = []
    small, number = None, 0  # of the frame that is given next

    def starts_scene() -> bool:
        first = max(0, number - 1 - REACH)
        return number > 0 and number - first in cuts_of_changes(changes[first : number + REACH], threshold, ratio)

    for neighbour in neighbours:
        before, small = small, thumbnail((neighbour.frame * 255).round().astype(np.uint8))
        if before is not None:
            changes.append(change(before, small))
        waiting.append(neighbour)
        if len(waiting) > REACH:
            yield waiting.popleft(), starts_scene()
            number += 1
    while waiting:
        yield waiting.popleft(), starts_scene()
        number += 1
