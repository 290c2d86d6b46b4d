# SPDX-License-Identifier: Apache-2.0
"""Motion hints: what is known of how pixels move between the neighbours and the middle frame.

A hint source answers two questions, each with a pair `(hints_prev, hints_next)` of `(B, C, H, W)` float32 tensors:
`start`, what can be said of an instant before there is a guess of its frame, and `from_guess`, what such a guess tells. Frames
are RGB, `(B, 3, H, W)` in `[-1, 1]`. An instant is a time in (0, 1): 0 is the previous frame's, 1 the next one's.
"""

import importlib.util
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from einops import rearrange

from .motion_search import search_flow
from .optical_flow import dis_flow, seen_from_the_end, single_threaded_opencv
from .tiling import Tiling
from .warping import halves


HintPair = tuple[torch.Tensor, torch.Tensor]

SCALES = (1, 2, 4, 8)  # how many times smaller frames may be seen for events, or for guesses
FLOW_BYTES, FINE_FLOW_BYTES = 60, 215  # buffers of DIS for each pixel, measured on 2560x1440
SLICES = 64  # of a bin of events, over which its events are summed up where it is cut
MOST_FLOW_BYTES = 2**32  # of all flows at once: two of 3840x2160


class HintSource(Protocol):
    """
    What the pipeline and the training scripts ask of a hint source. Any class that has this can be one, see `docs/hint-sources.md`:
    no base class is needed. A source that takes arguments has them in a `config`, a dictionary that JSON can hold, which a
    checkpoint keeps. One that makes hints on the frames' device, and never waits for what it computed there, says so by
    `device_bound = True`.
    """

    hint_channels: int

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair: ...

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair: ...


class FinishingSource(HintSource, Protocol):
    """A hint source that goes half of the way, is told what motion a decoder makes of that (`guess_motion`), and goes on from there. What
    `begin` gives, and the `motion` that `finish` takes, are `(B, C, h, w)` of a size that the frames' is a power of two larger than, offsets
    in pixels of that size."""

    def begin(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair: ...

    def finish(
        self, frame_prev: torch.Tensor, frame_next: torch.Tensor, motion: HintPair, time: float = 0.5
    ) -> HintPair: ...


def to_grey(frames: torch.Tensor) -> torch.Tensor:
    """RGB `(B, 3, H, W)` to luma `(B, 1, H, W)` (BT.601), in the range of the input."""
    red, green, blue = frames.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # numbers: a tensor of them would be copied to a GPU


def null_hints(frames: torch.Tensor, channels: int) -> HintPair:
    """Zeros for frames `(B, 3, H, W)`."""
    batch, _, height, width = frames.shape
    shape = (batch, channels, height, width)
    return frames.new_zeros(shape, dtype=torch.float32), frames.new_zeros(shape, dtype=torch.float32)


class EventHints:
    """Event volumes from an [`EventGANModel`]: `m_prev = f_I2E(prev, mid)`, `m_next = f_I2E(mid, next)` (MADiff).

    Args:
        i2e: the model.
        tiling: runs the model by tiles; heights and widths of frames must then be multiples of its `multiple`.
        scale: the model sees frames this many times smaller; their events are then spread over as many pixels.
        between: before there is a guess, give the events between both neighbours, cut at the instant, in the place of zeros.

    Raises:
        ValueError: if `between` is neither true nor false.
    """

    device_bound = True

    def __init__(self, i2e: ModelMixin, tiling: Tiling | None = None, scale: int = 1, between: bool = False):
        if type(between) is not bool:
            raise ValueError(f"`between` must be true or false, but is {between!r}.")
        self.i2e, self.tiling, self.scale, self.between = i2e, tiling, scale, between
        self.config = {"between": between}
        self.hint_channels: int = 2 * i2e.config.num_bins

    def events(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> HintPair:
        """Events from two batches of first frames to two of second frames, towards the previous and the next neighbour."""
        return halves(self._volume(torch.cat(list(first)), torch.cat(list(second))))

    def _volume(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        pair = [to_grey(frames) for frames in (first, second)]
        if self.scale > 1:
            pair = [F.avg_pool2d(frames, self.scale) for frames in pair]
        pair = [frames.to(self.i2e.dtype) for frames in pair]
        if self.tiling is None:
            events = self.i2e(*pair).events
        else:
            height, width = pair[0].shape[-2:]
            (events,) = self.tiling(lambda _, first, second: [self.i2e(first, second).events], pair, height, width)
        events = events.float()
        if self.scale > 1:
            events = F.interpolate(events, scale_factor=float(self.scale), mode="nearest")
        return events

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        """Null hints, since there is no middle frame to see events towards yet; or, `between` the neighbours, their events before the instant
        and after it."""
        if not self.between:
            return null_hints(frame_prev, self.hint_channels)
        volume = self._volume(frame_prev, frame_next)
        return cut_events(volume, 0.0, time), cut_events(volume, time, 1.0)

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.events((frame_prev, frame_mid), (frame_mid, frame_next))


def cut_events(volume: torch.Tensor, begin: float, end: float) -> torch.Tensor:
    """The part of an event volume `(B, 2 * bins, H, W)`, see [`EventGANModel`], between two of its instants in [0, 1], as a volume of its own:
    as many bins, from `begin` to `end`. Between the middles of bins, events come as often as linear interpolation says."""
    bins = volume.shape[1] // 2
    if bins == 1:
        return volume * (end - begin)
    number = torch.arange(bins, device=volume.device, dtype=volume.dtype)
    slices = torch.arange(SLICES * (bins - 1), device=volume.device, dtype=volume.dtype)
    places = (slices + 0.5) / SLICES  # in new bins
    new, old = (
        (1 - (each - number[:, None]).abs()).clamp(min=0)
        for each in (places, begin * (bins - 1) + (end - begin) * places)
    )
    # The first and the last bin count half of the time that others do.
    time = torch.ones_like(number)
    time[:1], time[-1:] = 0.5, 0.5
    cut = new @ old.T * ((end - begin) / SLICES) / time  # [new,old]
    return torch.einsum("no,bpohw->bpnhw", cut, volume.unflatten(1, (2, bins))).flatten(1, 2)


class FlowHints:
    """Optical flow by OpenCV's DIS: backward flow from the middle frame to each neighbour, (x, y) in pixels.

    A backward flow is the very offset that a warp needs. Runs on the CPU wherever the frames are, in threads.

    Args:
        fine: search at full resolution and with patches closer together, some four times the work; and start from the
            flow that passes each pixel at the instant, instead of the flow that begins there in a neighbour.
    """

    hint_channels = 2
    device_bound = False

    def __init__(self, fine: bool = False):
        if importlib.util.find_spec("cv2") is None:
            raise ImportError("optical flow needs a package that is not installed: pip install opencv-python-headless")
        self.fine = fine
        self.config = {"fine": fine}
        self.one_by_one = False  # flows are found one after the other, in half of the memory
        # The latest neighbours and the flow between them, which serves every instant.
        self._between: tuple[weakref.ref, weakref.ref, tuple[int, int], torch.Tensor] | None = None

    def _flows(
        self, frames_from: Sequence[torch.Tensor], frames_to: Sequence[torch.Tensor], patch_stride: int = 2
    ) -> torch.Tensor:
        """Flow `(B, 2, H, W)` such that `from(p) = to(p + flow(p))`; fine flow with patches so many pixels apart."""
        import cv2  # which a pipeline with other hints does without

        reference = frames_from[0]
        from_images = [self._to_uint8(frame) for frame in frames_from]
        to_images = [self._to_uint8(frame) for frame in frames_to]
        flow_of = partial(dis_flow, finest_scale=0, patch_stride=patch_stride) if self.fine else dis_flow

        # Parallelism comes from the pairs, as many at once as fit; a frame alone may take more.
        needed = from_images[0].size * (FINE_FLOW_BYTES if self.fine else FLOW_BYTES)
        workers = max(1, min(len(from_images), cv2.getNumThreads(), MOST_FLOW_BYTES // needed))
        if self.one_by_one:
            workers = 1
        with single_threaded_opencv(), ThreadPoolExecutor(max_workers=workers) as pool:
            flows = list(pool.map(flow_of, from_images, to_images))
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
        """Flow `(2B, 2, H, W)` from the next frames to the previous ones, then from the previous to the next; computed once,
        though several instants between the same frames are asked for."""
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
        seen = np.stack([seen_from_the_end(each) for each in rearrange(flow, "b c h w -> b h w c").cpu().numpy()])
        return rearrange(torch.from_numpy(seen), "b h w c -> b c h w").contiguous().to(flow.device)

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        # Half of the way is found as well by fewer patches (training/EXPERIMENTS.md).
        flow = self._flows([*frame_mid, *frame_mid], [*frame_prev, *frame_next], patch_stride=3)
        hints_prev, hints_next = flow.chunk(2)
        return hints_prev, hints_next


class SearchHints:
    """Flow by search on the frames' device, without weights (`motion_search.py`): backward flow from the middle frame to each neighbour,
    (x, y) in pixels. Before there is a guess, both lie on one straight path.

    Args:
        finest_scale: halvings of the frames at which the search ends; 0 is full resolution, some four times the work.
        polish: whether what was found is fitted to the frames at full resolution, which takes nearly as long as the search of half of it.

    Raises:
        ValueError: if `finest_scale` is negative, or either is of another type.
    """

    hint_channels = 2
    device_bound = True

    def __init__(self, finest_scale: int = 1, polish: bool = True):
        if type(finest_scale) is not int or finest_scale < 0:
            raise ValueError(f"`finest_scale` must be a whole number, 0 or more, but is {finest_scale!r}.")
        if type(polish) is not bool:
            raise ValueError(f"`polish` must be true or false, but is {polish!r}.")
        self.finest_scale, self.polish = finest_scale, polish
        self.config = {"finest_scale": finest_scale, "polish": polish}

    def _search(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        time: float | torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return search_flow(self._grey(first), self._grey(second), time, start, self.finest_scale, self.polish)

    @staticmethod
    def _grey(frames: torch.Tensor) -> torch.Tensor:
        return (to_grey(frames.float()).clamp(-1, 1) + 1) / 2

    @staticmethod
    def _both_ways(flow: torch.Tensor, time: float | torch.Tensor) -> HintPair:
        share = time.to(flow).view(-1, 1, 1, 1) if isinstance(time, torch.Tensor) else time
        return -share * flow, (1 - share) * flow

    @torch.no_grad()
    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float | torch.Tensor = 0.5) -> HintPair:
        return self._both_ways(self._search(frame_prev, frame_next, time), time)

    @torch.no_grad()
    def begin(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float | torch.Tensor = 0.5) -> HintPair:
        """Hints of the scale before the finest, of its size `(B, 2, h, w)` and in its pixels: as far as the search goes before it is told
        what a decoder makes of them."""
        first, second = (self._grey(frames) for frames in (frame_prev, frame_next))
        flow = search_flow(first, second, time, finest_scale=self.finest_scale + 1, polish=False, whole=False)
        return self._both_ways(flow, time)

    @torch.no_grad()
    def finish(
        self,
        frame_prev: torch.Tensor,
        frame_next: torch.Tensor,
        motion: HintPair,
        time: float | torch.Tensor = 0.5,
    ) -> HintPair:
        """Hints that are found from what a decoder made of those of `begin`: offsets of any size of the pyramid, in its pixels."""
        return self._both_ways(self._search(frame_prev, frame_next, time, motion[1] - motion[0]), time)

    @torch.no_grad()
    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        both = self._search(torch.cat([frame_mid, frame_mid]), torch.cat([frame_prev, frame_next]), 0.0)
        return halves(both)


class ModelHints:
    """Flow from a network, such as [`MotionHintModel`] or [`RIFEFlowModel`]: backward flow from the middle frame to each neighbour, on
    the frames' device.

    Args:
        model: has `forward(frame_prev, frame_next, time)` and `refine(frame_prev, frame_mid, frame_next, hints)`.
    """

    hint_channels = 2

    def __init__(self, model: ModelMixin):
        self.model = model

    @property
    def device_bound(self) -> bool:
        """RIFE's network looks at its first flow to choose scales, if `adaptive`."""
        return not getattr(self.model.config, "adaptive", False)

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        return self.model(frame_prev, frame_next, time)

    def from_guess(
        self,
        frame_prev: torch.Tensor,
        frame_mid: torch.Tensor,
        frame_next: torch.Tensor,
        hints: HintPair | None = None,
    ) -> HintPair:
        """Flow that a guess tells, found from the `hints` on that were known before, where they are given."""
        return self.model.refine(frame_prev, frame_mid, frame_next, hints)


class StackedHints:
    """Several sources' hints side by side, in the order given."""

    def __init__(self, sources: Sequence[HintSource]):
        self.sources = list(sources)
        self.hint_channels = sum(source.hint_channels for source in self.sources)

    @property
    def device_bound(self) -> bool:
        return all(getattr(source, "device_bound", False) for source in self.sources)

    def _stack(self, ask: Callable[[HintSource, slice], HintPair]) -> HintPair:
        """What is asked of each source, given the channels that are its own."""
        ends = [*itertools.accumulate((source.hint_channels for source in self.sources), initial=0)]
        channels = [slice(*each) for each in itertools.pairwise(ends)]
        # The last is asked first: flow, which comes last in checkpoints, needs most memory on its way and leaves least.
        pairs = [ask(*each) for each in reversed([*zip(self.sources, channels)])][::-1]
        hints_prev, hints_next = zip(*pairs)
        return torch.cat(hints_prev, dim=1), torch.cat(hints_next, dim=1)

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        return self._stack(lambda source, _: source.start(frame_prev, frame_next, time))

    def from_guess(
        self,
        frame_prev: torch.Tensor,
        frame_mid: torch.Tensor,
        frame_next: torch.Tensor,
        hints: HintPair | None = None,
    ) -> HintPair:
        """Each source's hints, from those on that were known before where they are given and it goes on from hints."""

        def ask(source: HintSource, channels: slice) -> HintPair:
            known = () if hints is None or not goes_on(source) else ((hints[0][:, channels], hints[1][:, channels]),)
            return source.from_guess(frame_prev, frame_mid, frame_next, *known)

        return self._stack(ask)


class NullHints:
    """Zeros, whatever is asked."""

    device_bound = True

    def __init__(self, hint_channels: int):
        self.hint_channels = hint_channels

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        return null_hints(frame_prev, self.hint_channels)

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)


def goes_on(source: HintSource) -> bool:
    """Whether a source finds hints of a guess from those on that were known before, as networks do: its `from_guess` takes them, too."""
    return isinstance(source, ModelHints) or isinstance(source, StackedHints) and any(map(goes_on, source.sources))


def finishes(source: HintSource) -> TypeGuard[FinishingSource]:
    """Whether a source can be told what a decoder makes of the hints that it begins with."""
    return hasattr(source, "begin") and hasattr(source, "finish")


def together(pairs: Sequence[HintPair]) -> HintPair:
    """Several batches of hints in one, in the order given."""
    if len(pairs) == 1:
        return pairs[0]
    hints_prev, hints_next = zip(*pairs)
    return torch.cat(hints_prev), torch.cat(hints_next)


def damp_hints(hints: HintPair, refined: HintPair, number: int) -> HintPair:
    """Hints moved by the `number`-th extraction, counted from 1: by 1 / `number`! of the way to it.

    The first takes the place of the hints, the second counts as much as the first, and every further one changes less,
    so that the errors of extractions add up to less than twice that of one, however many follow.
    """
    if number == 1:
        return refined
    hints_prev, hints_next = (torch.lerp(old, new, 1 / math.factorial(number)) for old, new in zip(hints, refined))
    return hints_prev, hints_next
