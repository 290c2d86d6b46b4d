# SPDX-License-Identifier: Apache-2.0
"""Motion hints: what is known of how pixels move between the neighbours and the middle frame.

A hint source answers three questions, each with a pair `(hints_prev, hints_next)` of `(B, C, H, W)` float32 tensors:
`start`, what can be said of an instant before there is a guess of its frame; `from_guess`, what such a guess tells; and
`from_neighbours`, what the two neighbours alone tell (for ablations). Frames are RGB, `(B, 3, H, W)` in `[-1, 1]`. An instant is
a time in (0, 1): 0 is the previous frame's, 1 the next one's.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from einops import rearrange

from .tiling import Tiling


HINT_SOURCES = ("events", "flow", "fine_flow", "events+flow", "events+fine_flow", "model", "events+model")

HintPair = tuple[torch.Tensor, torch.Tensor]

FLOW_BYTES, FINE_FLOW_BYTES = 60, 215  # buffers of DIS for each pixel, measured on 2560x1440
MOST_FLOW_BYTES = 2**30  # of all flows at once


class HintSource(Protocol):
    """
    What the pipeline and the training scripts ask of a hint source. Any class that has this can be one, see `docs/hint-sources.md`:
    no base class is needed. A source that takes arguments has them in a `config`, a dictionary that JSON can hold, which a
    checkpoint keeps.
    """

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
    import cv2  # of opencv-python-headless

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

    def __init__(self, i2e: torch.nn.Module, tiling: Tiling | None = None, scale: int = 1):
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
    import cv2  # of opencv-python-headless

    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    arriving = flow
    for _ in range(rounds):
        arriving = cv2.remap(
            flow, x - arriving[..., 0], y - arriving[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    return arriving


class FlowHints:
    """Optical flow by OpenCV's DIS: backward flow from the middle frame to each neighbour, (x, y) in pixels.

    A backward flow is the very offset that a warp needs. Runs on the CPU wherever the frames are, in threads.

    Args:
        fine: search at full resolution and with patches closer together, some four times the work; and start from the
            flow that passes each pixel at the instant, instead of the flow that begins there in a neighbour.
    """

    hint_channels = 2

    def __init__(self, fine: bool = False):
        if importlib.util.find_spec("cv2") is None:
            raise ImportError("optical flow needs a package that is not installed: pip install opencv-python-headless")
        self.fine = fine
        # The latest neighbours and the flow between them, which serves every instant.
        self._between: tuple[weakref.ref, weakref.ref, tuple[int, int], torch.Tensor] | None = None

    def _flows(
        self, frames_from: Sequence[torch.Tensor], frames_to: Sequence[torch.Tensor], patch_stride: int = 2
    ) -> torch.Tensor:
        """Flow `(B, 2, H, W)` such that `from(p) = to(p + flow(p))`; fine flow with patches so many pixels apart."""
        import cv2  # of opencv-python-headless, which nothing but these hints needs

        reference = frames_from[0]
        from_images = [self._to_uint8(frame) for frame in frames_from]
        to_images = [self._to_uint8(frame) for frame in frames_to]

        def one(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            # A DIS object keeps buffers, so each thread needs its own.
            dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            if self.fine:
                dis.setFinestScale(0)
                dis.setPatchStride(patch_stride)
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
        # Half of the way is found as well by fewer patches (training/EXPERIMENTS.md).
        flow = self._flows([*frame_mid, *frame_mid], [*frame_prev, *frame_next], patch_stride=3)
        hints_prev, hints_next = flow.chunk(2)
        return hints_prev, hints_next

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)


class ModelHints:
    """Flow from a network, such as [`MotionHintModel`] or [`RIFEFlowModel`]: backward flow from the middle frame to each neighbour, on
    the frames' device.

    Args:
        model: has `forward(frame_prev, frame_next, time)` and `refine(frame_prev, frame_mid, frame_next, hints)`.
    """

    hint_channels = 2

    def __init__(self, model: torch.nn.Module):
        self.model = model

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

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)


class StackedHints:
    """Several sources' hints side by side, in the order given."""

    def __init__(self, sources: Sequence[HintSource]):
        self.sources = list(sources)
        self.hint_channels = sum(source.hint_channels for source in self.sources)

    @staticmethod
    def _stack(pairs: list[HintPair]) -> HintPair:
        hints_prev, hints_next = zip(*pairs)
        return torch.cat(hints_prev, dim=1), torch.cat(hints_next, dim=1)

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        return self._stack([source.start(frame_prev, frame_next, time) for source in self.sources])

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self._stack([source.from_guess(frame_prev, frame_mid, frame_next) for source in self.sources])

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self._stack([source.from_neighbours(frame_prev, frame_next) for source in self.sources])


class NullHints:
    """Zeros, whatever is asked."""

    def __init__(self, hint_channels: int):
        self.hint_channels = hint_channels

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        batch, _, height, width = frame_prev.shape
        null = frame_prev.new_zeros((batch, self.hint_channels, height, width), dtype=torch.float32)
        return null, null.clone()

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)

    def from_neighbours(self, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)


def damp_hints(hints: HintPair, refined: HintPair, number: int) -> HintPair:
    """Hints moved by the `number`-th extraction, counted from 1: by 1 / `number`! of the way to it.

    The first takes the place of the hints, the second counts as much as the first, and every further one changes less,
    so that the errors of extractions add up to less than twice that of one, however many follow.
    """
    if number == 1:
        return refined
    hints_prev, hints_next = (torch.lerp(old, new, 1 / math.factorial(number)) for old, new in zip(hints, refined))
    return hints_prev, hints_next


# Files of this package that a checkpoint holds, by their stems.
TRAVELLING = (
    "eventgan",
    "hub_repository",
    "image_processor",
    "model_cards",
    "motion_flow",
    "motion_hints",
    "pipeline_madiff",
    "precision",
    "tiling",
    "vq_magan",
)

_OWN = ("events", "flow", "fine_flow", "model")
# What the parts of a hint source's name stand for; `events` needs the pipeline's `i2e`, and `model` its `hint_model`.
_SOURCES: dict[str, Callable[..., HintSource]] = {"flow": FlowHints, "fine_flow": partial(FlowHints, fine=True)}
_METHODS = ("start", "from_guess", "from_neighbours")


def register_hint_source(name: str, kind: type) -> None:
    """
    Make a class known as a hint source: by a name for `hint_source`, and by `FILE:CLASS`, which a checkpoint says.

    Args:
        name: letters, digits and underscores; or `MODULE:CLASS`.
        kind: a class that has what [`HintSource`] has. A class of the same name before it gives way.

    Raises:
        ValueError: for a name that is taken by this package, or has other characters.
        TypeError: if it is no such class.
    """
    if name in _OWN or not all(each.isidentifier() for each in name.replace(":", ".", 1).split(".")):
        raise ValueError(
            f"`name` must be letters, digits and underscores, and none of {', '.join(_OWN)}, but is {name!r}."
        )
    _check_kind(kind, "`kind`")
    _SOURCES[name] = kind
    try:
        _SOURCES[saved_name(kind)] = kind
    except ValueError:
        pass  # it cannot be saved, as is said where somebody tries


def is_registered(name: str) -> bool:
    """Whether each part of a hint source's name is known without importing anything."""
    return all(part in _OWN or part in _SOURCES for part in name.split("+"))


def _check_kind(kind: Any, what: str) -> None:
    missing = [each for each in _METHODS if not callable(getattr(kind, each, None))]
    if not isinstance(kind, type) or missing:
        raise TypeError(
            f"{what} must be a class with the methods {', '.join(_METHODS)}, but {kind!r} lacks {', '.join(missing) or 'a constructor'}."
        )


def _kind_of(part: str) -> Callable[..., HintSource]:
    """What a part of a hint source's name other than `events` stands for; `MODULE:CLASS` is imported if need be."""
    if part not in _SOURCES and ":" in part:
        module, _, attribute = part.partition(":")
        try:
            kind = getattr(importlib.import_module(module), attribute)
            _check_kind(kind, "it")
        except Exception as error:  # whatever somebody else's module does when it is imported
            raise ValueError(f"`hint_source` {part!r} cannot be loaded: {type(error).__name__}: {error}") from error
        register_hint_source(part, kind)
    if part not in _SOURCES:
        own = sorted(set(_SOURCES) - set(_OWN))
        known = ", ".join([*HINT_SOURCES, *own])
        raise ValueError(
            f"`hint_source` must be one of {known}, MODULE:CLASS, or several of these joined by +, but is {part!r}."
        )
    return _SOURCES[part]


def hint_parts(name: str) -> list[str]:
    """The parts of a hint source's name, in the order of their channels.

    Raises:
        ValueError: if it is unknown.
    """
    parts = name.split("+") if isinstance(name, str) else []
    if not parts or len(set(parts)) < len(parts) or set(parts) <= set(_OWN) and name not in HINT_SOURCES:
        raise ValueError(
            f"`hint_source` must be one of {', '.join(HINT_SOURCES)}, a registered name or MODULE:CLASS, but is {name!r}."
        )
    for part in parts:
        if part not in ("events", "model"):
            _kind_of(part)
    return parts


def build_hint_source(
    name: str,
    i2e: torch.nn.Module | None = None,
    tiling: Tiling | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    hint_channels: int | None = None,
    event_scale: int = 1,
    hint_model: torch.nn.Module | None = None,
) -> HintSource:
    """
    The hint source of a name: one of `HINT_SOURCES`, a registered one, `MODULE:CLASS`, or several joined by `+`. Flow stands last in a
    stack, where decoders look for offsets.

    Args:
        name: of the source.
        i2e: makes event hints.
        tiling: for `i2e`.
        settings: arguments of the parts' constructors, by the parts' names.
        hint_channels: of all parts together. Where it is given and `i2e` is None, event hints are zeros, unless there would be nothing else.
        event_scale: see [`EventHints`].
        hint_model: see [`ModelHints`].

    Raises:
        ValueError: if the name is unknown, a part cannot be built, or events are asked for without an `i2e` model, or `model` without a
            `hint_model`.
    """
    parts, settings = hint_parts(name), settings or {}
    surplus = sorted(set(settings) - set(parts))
    if surplus:
        raise ValueError(f"`hint_settings` must be for parts of `hint_source` {name!r}, but has {', '.join(surplus)}.")
    stack: dict[str, HintSource] = {}
    for part in parts:
        if part == "events":
            continue
        if part == "model":
            if hint_model is None:
                raise ValueError(f"`hint_source={name!r}` needs a `hint_model`, but it is None.")
            stack[part] = ModelHints(hint_model)
            continue
        try:
            stack[part] = _kind_of(part)(**settings.get(part, {}))
        except Exception as error:  # whatever somebody else's class does
            raise ValueError(f"`hint_source` {part!r} cannot be built: {type(error).__name__}: {error}") from error
        check_hint_source(stack[part], f"`hint_source` {part!r}")
    if "events" in parts:
        left = (hint_channels or 0) - sum(source.hint_channels for source in stack.values())
        if i2e is None and (not stack or left < 1):
            raise ValueError(f"`hint_source={name!r}` needs an `i2e` model, but `i2e` is None.")
        stack["events"] = NullHints(left) if i2e is None else EventHints(i2e, tiling, event_scale)
    sources = [stack[part] for part in parts]
    return sources[0] if len(sources) == 1 else StackedHints(sources)


def check_hint_source(source: Any, what: str) -> None:
    """
    Raises:
        ValueError: if an object is no hint source.
    """
    missing = [each for each in _METHODS if not callable(getattr(source, each, None))]
    channels = getattr(source, "hint_channels", None)
    if missing or not isinstance(channels, int) or channels < 1:
        lacks = ", ".join(
            [*missing, *([] if isinstance(channels, int) and channels > 0 else ["a positive `hint_channels`"])]
        )
        raise ValueError(f"{what} must be a hint source, but {type(source).__name__} lacks {lacks}.")


def saved_name(kind: type) -> str:
    """`FILE:CLASS` of a class whose file can travel with a checkpoint.

    Raises:
        ValueError: if it cannot.
    """
    module = sys.modules.get(kind.__module__)
    file = Path(getattr(module, "__file__", None) or "")
    reason = None
    if kind.__module__ == "__main__" or not file.is_file() or file.suffix != ".py":
        reason = "is not in a module of its own"
    elif kind.__qualname__ != kind.__name__ or not file.stem.isidentifier():
        reason = "is not at the top level of its module"
    elif file.stem in TRAVELLING:
        reason = f"is in {file.name}, as a file of this package is called"
    elif get_relative_imports(file):
        reason = f"is in {file.name}, which imports from beside itself"
    if reason is not None:
        raise ValueError(f"A checkpoint cannot hold the hint source {kind.__qualname__}: the class {reason}.")
    return f"{file.stem}:{kind.__name__}"


def describe_hint_source(
    source: HintSource,
    i2e: torch.nn.Module | None,
    known: Sequence[dict[str, Any]] | None = None,
    hint_model: torch.nn.Module | None = None,
) -> tuple[str, dict[str, dict[str, Any]], list[type]]:
    """
    What a checkpoint keeps of a hint source: its name, its parts' settings, and the classes whose code must travel.

    Args:
        source: to be kept.
        i2e: the pipeline's.
        known: settings of each part; each part's own `config` if not given.
        hint_model: the pipeline's.

    Raises:
        ValueError: if it could not be built again from that.
    """
    names, settings, kinds = [], {}, []
    for number, part in enumerate(source.sources if type(source) is StackedHints else [source]):
        kind = type(part)
        if kind is EventHints and part.i2e is i2e or kind is NullHints and i2e is None:
            names.append("events")
        elif kind is ModelHints and part.model is hint_model:
            names.append("model")
        elif kind is FlowHints:
            names.append("fine_flow" if part.fine else "flow")
        else:
            name = saved_name(kind)
            config = dict(getattr(part, "config", None) or {}) if known is None else known[number]
            config = {key: value for key, value in config.items() if not key.startswith("_")}
            try:
                inspect.signature(kind).bind(**config)
                json.dumps(config)
            except TypeError as error:
                raise ValueError(
                    f"A checkpoint cannot hold the hint source {kind.__name__} with the `config` {config!r}: {error}."
                ) from error
            names.append(name)
            kinds.append(kind)
            if config:
                settings[name] = config
    if len(set(names)) < len(names):
        raise ValueError(f"A checkpoint cannot hold the same hint source twice: {', '.join(names)}.")
    return "+".join(names), settings, kinds


def load_hint_code(folder: Path, part: str) -> None:
    """Run the file of a checkpoint that has the class of a hint source `FILE:CLASS`, and register that.

    Raises:
        ValueError: if there is none, or another one of its name is registered already.
    """
    stem, _, attribute = part.partition(":")
    path = folder / f"{stem}.py"
    if not (stem.isidentifier() and attribute.isidentifier() and path.is_file()):
        raise ValueError(f"The checkpoint's hint source is {part!r}, but {folder} has no file {stem}.py.")
    name = f"{stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(
                f"The checkpoint's hint source {part!r} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    kind = getattr(sys.modules[name], attribute, None)
    if part in _SOURCES and _SOURCES[part] is not kind:
        raise ValueError(
            f"Another hint source {part!r} is registered in this process already: the checkpoint's own code cannot take its place."
        )
    try:
        register_hint_source(part, kind)
    except TypeError as error:
        raise ValueError(f"The checkpoint's hint source {part!r} cannot be loaded: {error}") from error
