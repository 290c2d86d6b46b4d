# SPDX-License-Identifier: Apache-2.0
"""Motion hints: what is known of how pixels move between the neighbours and the middle frame.

A hint source answers three questions, each with a pair `(hints_prev, hints_next)` of `(B, C, H, W)` float32 tensors:
`start`, what can be said of an instant before there is a guess of its frame; `from_guess`, what such a guess tells; and
`from_neighbours`, what the two neighbours alone tell (for ablations). Frames are RGB, `(B, 3, H, W)` in `[-1, 1]`. An instant is
a time in (0, 1): 0 is the previous frame's, 1 the next one's.
"""

import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Iterator, List, Optional, Protocol, Sequence, Tuple

import cv2  # of opencv-python-headless
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from .tiling import Tiling

HINT_SOURCES = ("events", "flow", "fine_flow", "events+flow", "events+fine_flow")

HintPair = Tuple[torch.Tensor, torch.Tensor]

FLOW_BYTES, FINE_FLOW_BYTES = 60, 215  # buffers of DIS for each pixel, measured on 2560x1440
MOST_FLOW_BYTES = 2**30  # of all flows at once


class HintSource(Protocol):
    """What the pipeline and the training scripts ask of a hint source."""

    hint_channels: int

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair: ...

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair: ...

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair: ...


def to_grey(frames: torch.Tensor) -> torch.Tensor:
    """RGB `(B, 3, H, W)` to luma `(B, 1, H, W)` (BT.601), in the range of the input."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device, dtype=frames.dtype)
    return (frames * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


# The number of OpenCV's threads is one for the process: the first to enter sets it, the last to leave sets it back.
_opencv = {"lock": Lock(), "users": 0, "threads": 0}


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """OpenCV's DIS cuts an image into as many stripes as there are threads, and its result depends on the cut: with one
    stripe, the same frames give the same flow on every machine. Any number of threads may be inside at once."""
    with _opencv["lock"]:
        if _opencv["users"] == 0:
            _opencv["threads"] = cv2.getNumThreads()
            cv2.setNumThreads(1)
        _opencv["users"] += 1
    try:
        yield
    finally:
        with _opencv["lock"]:
            _opencv["users"] -= 1
            if _opencv["users"] == 0:
                cv2.setNumThreads(_opencv["threads"])


class EventHints:
    """Event volumes from an [`EventGANModel`]: `m_prev = f_I2E(prev, mid)`, `m_next = f_I2E(mid, next)` (MADiff).

    Args:
        i2e: the model.
        tiling: runs it by tiles, which frames must then be multiples of.
        scale: the model sees frames this many times smaller, whose events are then spread over as many pixels.
    """

    def __init__(self, i2e: torch.nn.Module, tiling: Optional[Tiling] = None, scale: int = 1):
        self.i2e, self.tiling, self.scale = i2e, tiling, scale
        self.hint_channels = 2 * i2e.config.num_bins

    def _events(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> HintPair:
        first, second = to_grey(torch.cat(list(first))), to_grey(torch.cat(list(second)))
        if self.scale > 1:
            first, second = F.avg_pool2d(first, self.scale), F.avg_pool2d(second, self.scale)
        pair = first.to(self.i2e.dtype), second.to(self.i2e.dtype)
        if self.tiling is None:
            events = self.i2e(*pair).events
        else:
            (events,) = self.tiling(lambda first, second: [self.i2e(first, second).events], pair, *first.shape[-2:])
        events = events.float()
        if self.scale > 1:
            events = F.interpolate(events, scale_factor=float(self.scale), mode="nearest")
        hints_prev, hints_next = events.chunk(2)
        return hints_prev, hints_next

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        """Null hints: there is no middle frame to see events towards yet."""
        batch, _, height, width = frame_prev.shape
        null = frame_prev.new_zeros((batch, self.hint_channels, height, width), dtype=torch.float32)
        return null, null.clone()

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self._events((frame_prev, frame_mid), (frame_mid, frame_next))

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self._events((frame_prev, frame_prev), (frame_next, frame_next))


def _seen_from_the_end(flow: np.ndarray, rounds: int = 3) -> np.ndarray:
    """A flow `(H, W, 2)` as it arrives: at every pixel `p` the flow of the pixel `q` from which it leads there, `q + flow(q) = p`,
    found by fixed-point iteration."""
    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    arriving = flow
    for _ in range(rounds):
        arriving = cv2.remap(flow, x - arriving[..., 0], y - arriving[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return arriving


class FlowHints:
    """Optical flow by OpenCV's DIS: backward flow from the middle frame to each neighbour, (x, y) in pixels.

    A backward flow is the very offset that a warp needs. Runs on the CPU wherever the frames are, in threads.

    Args:
        fine: search at full resolution and with patches closer together, some three times the work; and start from the
            flow that passes each pixel at the instant, instead of the flow that begins there in a neighbour.
    """

    hint_channels = 2

    def __init__(self, fine: bool = False):
        self.fine = fine
        # The latest neighbours and the flow between them, which serves every instant.
        self._between: Optional[Tuple[weakref.ref, weakref.ref, Tuple[int, int], torch.Tensor]] = None

    def _flows(self, frames_from: Sequence[torch.Tensor], frames_to: Sequence[torch.Tensor]) -> torch.Tensor:
        """Flow `(B, 2, H, W)` such that `from(p) = to(p + flow(p))`."""
        reference = frames_from[0]
        from_images = [self._to_uint8(frame) for frame in frames_from]
        to_images = [self._to_uint8(frame) for frame in frames_to]

        def one(pair: Tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            # A DIS object keeps buffers, so each thread needs its own.
            dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            if self.fine:
                dis.setFinestScale(0)
                dis.setPatchStride(3)
            return dis.calc(pair[0], pair[1], None)

        # Parallelism comes from the pairs, as many at once as fit; a frame alone may take more.
        needed = from_images[0].size * (FINE_FLOW_BYTES if self.fine else FLOW_BYTES)
        workers = max(1, min(len(from_images), cv2.getNumThreads(), MOST_FLOW_BYTES // needed))
        with single_threaded_opencv(), ThreadPoolExecutor(max_workers=workers) as pool:
            flows = list(pool.map(one, zip(from_images, to_images)))
        flow = rearrange(torch.from_numpy(np.stack(flows)), "b h w c -> b c h w").contiguous()
        return flow.to(reference.device)

    @staticmethod
    def _to_uint8(frame: torch.Tensor) -> np.ndarray:
        grey = to_grey(frame[None].detach().float())[0, 0]
        return ((grey.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        """`time` and `1 - time` of the flow between the neighbours, each seen from the other; with `fine`, seen from the instant."""
        flow = self._between_neighbours(frame_prev, frame_next)
        # Flow that leads from the next frame back to the instant, and from the previous frame on to it: [B,2,H,W] each.
        arriving = [(1 - time) * flow[: len(frame_next)], time * flow[len(frame_next) :]]
        if self.fine:
            arriving = [self._passing(each) for each in arriving]
        # What is left of the way is as much longer as more time is left.
        return arriving[0] * (time / (1 - time)), arriving[1] * ((1 - time) / time)

    def _between_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> torch.Tensor:
        """Flow `(2B, 2, H, W)` from the next frames to the previous ones, then from the previous to the next; computed once for
        frames of which several instants are asked for."""
        if frame_prev.is_inference() or frame_next.is_inference():  # whether they changed since cannot be told
            return self._flows([*frame_next, *frame_prev], [*frame_prev, *frame_next])
        versions = (frame_prev._version, frame_next._version)
        between = self._between
        if between is not None:
            prev, next_, known, flow = between
            if prev() is frame_prev and next_() is frame_next and known == versions:
                return flow
        flow = self._flows([*frame_next, *frame_prev], [*frame_prev, *frame_next])

        def forget(_) -> None:
            self._between = None

        self._between = (weakref.ref(frame_prev, forget), weakref.ref(frame_next, forget), versions, flow)
        return flow

    @staticmethod
    def _passing(flow: torch.Tensor) -> torch.Tensor:
        seen = np.stack([_seen_from_the_end(each) for each in rearrange(flow, "b c h w -> b h w c").cpu().numpy()])
        return rearrange(torch.from_numpy(seen), "b h w c -> b c h w").contiguous().to(flow.device)

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        hints_prev, hints_next = self._flows([*frame_mid, *frame_mid], [*frame_prev, *frame_next]).chunk(2)
        return hints_prev, hints_next

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)


class StackedHints:
    """Several sources' hints side by side, in the order given."""

    def __init__(self, sources: Sequence[HintSource]):
        self.sources = list(sources)
        self.hint_channels = sum(source.hint_channels for source in self.sources)

    @staticmethod
    def _stack(pairs: List[HintPair]) -> HintPair:
        hints_prev, hints_next = zip(*pairs)
        return torch.cat(hints_prev, dim=1), torch.cat(hints_next, dim=1)

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        return self._stack([source.start(frame_prev, frame_next, time) for source in self.sources])

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self._stack([source.from_guess(frame_prev, frame_mid, frame_next) for source in self.sources])

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self._stack([source.from_neighbours(frame_prev, frame_next) for source in self.sources])


def damp_hints(hints: HintPair, refined: HintPair, number: int) -> HintPair:
    """Hints moved by the `number`-th extraction, counted from 1: by 1 / `number`! of the way to it.

    The first takes the place of the hints, the second counts as much as the first, and every further one changes less,
    so that the errors of extractions add up to less than twice that of one, however many follow.
    """
    if number == 1:
        return refined
    hints_prev, hints_next = (torch.lerp(old, new, 1 / math.factorial(number)) for old, new in zip(hints, refined))
    return hints_prev, hints_next


def build_hint_source(
    name: str, i2e: Optional[torch.nn.Module] = None, tiling: Optional[Tiling] = None, event_scale: int = 1
) -> HintSource:
    """The hint source of a name in `HINT_SOURCES`; flow stands last in a stack, where decoders look for offsets. `tiling` and
    `event_scale` are for `i2e`; see `EventHints`.

    Raises:
        ValueError: if the name is unknown, or events are asked for without an `i2e` model.
    """
    if name not in HINT_SOURCES:
        raise ValueError(f"`hint_source` must be one of {', '.join(HINT_SOURCES)}, but is {name!r}.")
    if "events" in name and i2e is None:
        raise ValueError(f"`hint_source={name!r}` needs an `i2e` model, but `i2e` is None.")
    sources = {"events": lambda: EventHints(i2e, tiling, event_scale), "flow": FlowHints, "fine_flow": lambda: FlowHints(fine=True)}
    stack = [sources[part]() for part in name.split("+")]
    return stack[0] if len(stack) == 1 else StackedHints(stack)
