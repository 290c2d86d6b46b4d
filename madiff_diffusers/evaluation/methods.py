"""The methods that benchmarks compare: a checkpoint in given settings, the baselines, and any function of two frames."""

import hashlib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import diffusers
import numpy as np
import torch
from PIL import Image

from ..hint_registry import hint_parts, named_parts
from ..hub_repository import weights_kind
from ..image_processor import to_uint8
from ..motion_hints import HintSource, NullHints, StackedHints
from ..optical_flow import dis_flow
from ..pipeline_inputs import HINT_POLICIES
from ..pipeline_madiff import MADiffPipeline
from .hint_policies import ABLATION_POLICIES, NeighbourHints, TrueHints
from .visualization import gate_image, hints_images


BASELINES = ("average", "flow")

# Latents that are decoded: the denoised ones, zeros, noise of variance 1, the denoised ones of the mirrored pair, or the true frame's.
LATENTS = ("denoised", "zero", "noise", "mirrored", "true")

Pair = tuple[np.ndarray, np.ndarray]

MIDDLE = Fraction(1, 2)


class Method(Protocol):
    """A maker of frames between two. `label` is its row in a table, `identity` tells all that its results depend on, and `any_time`
    tells whether it makes others than the middle one."""

    label: str
    identity: dict[str, Any]
    any_time: bool

    def __call__(self, pairs: Sequence[Pair], time: Fraction = MIDDLE) -> list[np.ndarray]:
        """The frame at an instant between 0 (previous) and 1 (next) of each of several pairs of one size; frames are `(H, W, 3)` uint8."""
        ...


class Baseline:
    """`average`: the mean of the two frames. `flow`: both frames warped half-way along OpenCV's DIS optical flow, and averaged.
    At other instants than the middle, the nearer frame counts more and goes less far.

    Raises:
        ValueError: for another name.
    """

    any_time = True

    def __init__(self, name: str):
        if name not in BASELINES:
            raise ValueError(f"`name` must be one of {', '.join(BASELINES)}, but is {name!r}.")
        self.label, self.identity = name, {"method": name}
        self._make = self._average if name == "average" else self._warp

    def __call__(self, pairs: Sequence[Pair], time: Fraction = MIDDLE) -> list[np.ndarray]:
        return [self._make(*pair, np.float32(time)) for pair in pairs]

    @staticmethod
    def _average(prev: np.ndarray, next_: np.ndarray, time: np.float32) -> np.ndarray:
        return to_uint8((1 - time) * (prev / np.float32(255)) + time * (next_ / np.float32(255)))

    @staticmethod
    def _warp(prev: np.ndarray, next_: np.ndarray, time: np.float32) -> np.ndarray:
        grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (prev, next_)]
        height, width = grey[0].shape
        places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
        warped = []
        for image, (here, there), way in ((prev, (1, 0), time), (next_, (0, 1), 1 - time)):
            flow = dis_flow(grey[here], grey[there])
            frame = image.astype(np.float32) / 255
            # None, which OpenCV's types leave out, says that both coordinates are in the array before it.
            way_there = places + way * flow
            warped.append(cv2.remap(frame, way_there, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))  # type: ignore[call-overload]
        return to_uint8((1 - time) * warped[0] + time * warped[1])


class FunctionMethod:
    """Any `module:function(prev, next) -> mid`: `(H, W, 3)` uint8 RGB arrays in; out the same, or floating point in [0, 1].

    For other instants than the middle, it is called as `function(prev, next, time)`, with a float in (0, 1). The module is
    looked for in the working directory, too.

    Raises:
        ValueError: if there is no such function, or it does not give a frame; the message tells what it did.
    """

    def __init__(self, name: str):
        self.label = name
        module, _, attribute = name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            self.function: Callable = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # whatever somebody else's module does when it is imported
            raise ValueError(f"`method` {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
        if not callable(self.function):
            raise ValueError(f"`method` {name!r} must be a function, but is a {type(self.function).__name__}.")
        self.any_time = _takes(self.function, None, None, 0.5)
        if not self.any_time and not _takes(self.function, None, None):
            raise ValueError(
                f"`method` {name!r} must take (prev, next), or (prev, next, time) for any instant, but takes neither."
            )
        self._always_told = self.any_time and not _takes(self.function, None, None)
        file = getattr(sys.modules[module], "__file__", None)
        code = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        self.identity = {"method": name, "module_sha256": code}

    def __call__(self, pairs: Sequence[Pair], time: Fraction = MIDDLE) -> list[np.ndarray]:
        instant = (float(time),) if time != MIDDLE or self._always_told else ()
        return [self._one(*pair, *instant) for pair in pairs]

    def _one(self, prev: np.ndarray, next_: np.ndarray, *instant: float) -> np.ndarray:
        try:
            result = self.function(prev.copy(), next_.copy(), *instant)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"`method` {self.label!r} failed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            ) from error
        if not isinstance(result, np.ndarray) or result.shape != prev.shape:
            what = f"an array {result.shape}" if isinstance(result, np.ndarray) else f"a {type(result).__name__}"
            raise ValueError(f"`method` {self.label!r} must give an array {prev.shape}, but gave {what}.")
        if result.dtype == np.uint8:
            return result.copy()  # which the next call may write over
        if not np.issubdtype(result.dtype, np.floating) or not (result.min() >= 0 and result.max() <= 1):  # NaN, too
            raise ValueError(
                f"`method` {self.label!r} must give uint8, or floating point in [0, 1], but gave {result.dtype} in "
                f"[{result.min():.4g}, {result.max():.4g}]."
            )
        return to_uint8(result)


def _takes(function: Callable, *arguments: Any) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # of code that is not Python's there is no signature, and its call tells
        return True
    return True


class Settings(NamedTuple):
    """How a checkpoint samples; None stands for the checkpoint's own.

    Args:
        steps: sampling steps.
        hint_policy: see [`MADiffPipeline.__call__`]; or one of `ABLATION_POLICIES`.
        hint_interval: see there.
        hint_source: one part of the checkpoint's: the others' hints are replaced by zeros.
        scheduler: name of a Diffusers scheduler class, configured as the checkpoint's own.
        quantized: whether latents are moved to their nearest codes before they are decoded.
        latents: one of `LATENTS`, which replace the latents after the last step.
    """

    steps: int | None = None
    hint_policy: str | None = None
    hint_interval: int | None = None
    hint_source: str | None = None
    scheduler: str | None = None
    quantized: bool | None = None
    latents: str | None = None

    def label(self) -> str:
        """What differs from the checkpoint's own settings."""
        return " ".join(f"{name}={_plain(value)}" for name, value in self._asdict().items() if value is not None)


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


class MADiffMethod:
    """A checkpoint in given settings.

    Args:
        pipeline: the checkpoint, on its device. Its scheduler and hint source become those of `settings` while frames are made.
        name: name of the checkpoint in the label.
        digest: see `checkpoint_digest`.
        settings: settings of the sampling.
        seed: seed of the noise, the same for every pair.

    Raises:
        ValueError: for a setting out of its range.
    """

    any_time = True

    def __init__(
        self, pipeline: MADiffPipeline, name: str, digest: str, settings: Settings = Settings(), seed: int = 0
    ):
        self.pipeline, self.settings, self.seed = pipeline, settings, seed
        self.label = f"{name} {settings.label()}".strip()
        config = pipeline.config
        policies = (*HINT_POLICIES, *ABLATION_POLICIES)
        if settings.hint_policy not in (None, *policies):
            raise ValueError(f"`hint_policy` must be one of {', '.join(policies)}, but is {settings.hint_policy!r}.")
        for setting in ("steps", "hint_interval"):
            value = getattr(settings, setting)
            if value is not None and value < 1:
                raise ValueError(f"`{setting}` must be a positive integer, but is {value!r}.")
        hint_source = settings.hint_source or config.hint_source
        self.hints: HintSource | None = None  # the pipeline's own
        if hint_source != config.hint_source:
            if hint_source not in hint_parts(config.hint_source):
                raise ValueError(
                    f"`hint_source` must be of the checkpoint's {config.hint_source}, but is {hint_source!r}."
                )
            parts = named_parts(config.hint_source, pipeline.hints)
            self.hints = StackedHints(
                [source if part == hint_source else NullHints(source.hint_channels) for part, source in parts]
            )
        self.hint_policy = settings.hint_policy
        if settings.hint_policy in ABLATION_POLICIES:  # of other hints at the start, which stay
            source = self.hints or pipeline.hints
            if settings.hint_policy == "neighbours":
                self.hints = NeighbourHints(source)
            elif settings.hint_policy == "none":
                self.hints = NullHints(source.hint_channels)
            self.hint_policy = "start"
        self.scheduler = pipeline.scheduler
        if settings.scheduler is not None:
            self._take_scheduler(settings.scheduler)
        self.identity = {
            "method": "madiff",
            "checkpoint": name,
            "checkpoint_sha256": digest,
            "seed": seed,
            "dtype": str(pipeline.vqvae.dtype).removeprefix("torch."),
            "device": pipeline.device.type,
            "steps": settings.steps or config.default_num_inference_steps,
            "hint_policy": settings.hint_policy or config.default_hint_policy,
            "hint_interval": settings.hint_interval or config.default_hint_interval,
            "hint_source": hint_source,
            "scheduler": type(self.scheduler).__name__,
            "quantised": settings.quantized is not False,  # as results have spelled it since their format 1
        }
        code = _code_of(getattr(pipeline.hints, "sources", [pipeline.hints]))
        if code is not None:
            self.identity["hint_code_sha256"] = code
        if settings.latents not in (None, *LATENTS):
            raise ValueError(f"`latents` must be one of {', '.join(LATENTS)}, but is {settings.latents!r}.")
        if settings.latents not in (None, "denoised"):
            self.identity["latents"] = settings.latents
        self.needs_truth = "true" in (settings.latents, settings.hint_policy)

    def _take_scheduler(self, name: str) -> None:
        """Configure a scheduler as the checkpoint's own, and sample once with it.

        Raises:
            ValueError: if there is none of that name, or it cannot sample from this checkpoint.
        """
        kind = getattr(diffusers, name, None)
        is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        if kind is None or not is_scheduler:
            raise ValueError(f"`scheduler` must be the name of a scheduler of Diffusers, but is {name!r}.")
        tiny = np.zeros((64, 64, 3), np.uint8)
        try:
            self.scheduler = kind.from_config(self.pipeline.scheduler.config)
            self._run([(tiny, tiny)])
        except Exception as error:
            # Diffusers does not tell which schedulers take a model. Those that do not show it in their constructor or at their first
            # use, by errors of every kind: a refusal, a method that they lack, an argument that nobody gave.
            raise ValueError(
                f"`scheduler` {name} does not take this checkpoint: {type(error).__name__}: {error}"
            ) from error

    def __call__(
        self, pairs: Sequence[Pair], time: Fraction = MIDDLE, truths: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """See `Method`. `truths` are the true frames, whose latents are decoded, or whose hints are taken, if the settings say so.

        Raises:
            ValueError: if they do, and these are not given.
        """
        if self.needs_truth and truths is None:
            raise ValueError("`truths` must be given for `latents` or `hint_policy` true.")
        arguments: dict[str, Any] = {}
        if self.settings.hint_policy == "true":
            arguments["hints"] = self._true_hints(truths or ())
        if "latents" in self.identity:
            arguments["callback_on_step_end"] = self._replacement(pairs, time, truths)
            arguments["callback_on_step_end_tensor_inputs"] = ["latents", "hints_prev", "hints_next"]
        frames = self._run(pairs, time, **arguments)
        return [np.array(frame) for (frame,) in frames]

    def _true_hints(self, truths: Sequence[np.ndarray]) -> TrueHints:
        frames = self.pipeline.encode_frames([Image.fromarray(truth) for truth in truths]).frames
        return TrueHints(self.hints or self.pipeline.hints, frames)

    def _replacement(
        self, pairs: Sequence[Pair], time: Fraction, truths: Sequence[np.ndarray] | None
    ) -> Callable[..., dict[str, torch.Tensor]]:
        """A callback that replaces the latents of the last step."""
        kind = self.settings.latents
        true_frames = [] if truths is None else truths
        mirrored: torch.Tensor | None = None
        if kind == "mirrored":
            turned = [(prev[:, ::-1], next_[:, ::-1]) for prev, next_ in pairs]
            hints = None
            if self.settings.hint_policy == "true":
                hints = self._true_hints([truth[:, ::-1] for truth in true_frames])
            mirrored = torch.as_tensor(self._run(turned, time, hints, output_type="latent"))[:, 0]

        def replace(
            pipeline: MADiffPipeline, step: int, timestep: Any, tensors: dict[str, torch.Tensor]
        ) -> dict[str, torch.Tensor]:
            latents = tensors["latents"]
            if step < len(pipeline.scheduler.timesteps) - 1:
                return {}
            if kind == "zero":
                return {"latents": torch.zeros_like(latents)}
            if kind == "noise":
                noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(self.seed + 1))
                return {"latents": noise.to(latents).expand_as(latents)}
            if mirrored is not None:
                return {"latents": mirrored}
            vqvae = pipeline.vqvae
            prev, mid, next_ = (
                pipeline.encode_frames([Image.fromarray(frame) for frame in frames])
                for frames in (*zip(*((prev, truth, next_) for (prev, next_), truth in zip(pairs, true_frames))),)
            )
            if mid.latents is not None:
                return {"latents": mid.latents.float()}
            hints = (tensors["hints_prev"], tensors["hints_next"])
            news = vqvae.encode_news(mid.frames, prev.features, next_.features, *hints, time=float(time))
            return {"latents": news * vqvae.config.scaling_factor}

        return replace

    def explain(self, pair: Pair, time: Fraction, truth: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Named pictures `(H, W, 3)` uint8 of the hints and the gate of a pair's last decoding; the true frame is read as in `__call__`.

        The gate is the finest: white where the previous frame was taken, black where the next one.
        """
        seen: dict[str, Any] = {}

        def note_hints(pipeline, step, timestep, tensors):
            seen.update(tensors)
            return {}

        hook = self.pipeline.vqvae.decoder.register_forward_hook(
            lambda module, inputs, output: seen.update(gate=output[2][-1])
        )
        try:
            names = ["hints_prev", "hints_next"]
            hints = self._true_hints([truth]) if self.settings.hint_policy == "true" else None
            self._run([pair], time, hints, callback_on_step_end=note_hints, callback_on_step_end_tensor_inputs=names)
        finally:
            hook.remove()
        height, width = pair[0].shape[:2]
        multiple = self.pipeline.frame_processor.multiple
        padded = (height + -height % multiple, width + -width % multiple)
        pictures = []
        for side, name in (("previous", "hints_prev"), ("next", "hints_next")):
            hints = self.pipeline.vqvae.resize_hints(seen[name], padded)[0, :, :height, :width]
            pictures += [
                (f"{part} to {side}", image)
                for part, image in hints_images(hints, self.pipeline.config.hint_source, self.pipeline.hints)
            ]
        pictures.append(("gate", gate_image(seen["gate"][0], padded)[:height, :width]))
        return pictures

    def _run(
        self,
        pairs: Sequence[Pair],
        time: Fraction = MIDDLE,
        hints: HintSource | None = None,
        **arguments: Any,
    ) -> list[list[Image.Image]] | np.ndarray | torch.Tensor:
        """Frames of the pipeline in these settings; with other `hints`, if they are given."""
        pipeline, settings = self.pipeline, self.settings
        before = pipeline.scheduler, pipeline._hints
        pipeline.scheduler = self.scheduler
        hints = hints or self.hints
        if hints is not None:
            pipeline.hints = hints
        try:
            return pipeline(
                [Image.fromarray(prev) for prev, _ in pairs],
                [Image.fromarray(next_) for _, next_ in pairs],
                num_inference_steps=settings.steps,
                hint_policy=self.hint_policy,
                hint_interval=settings.hint_interval,
                force_not_quantize=settings.quantized is False,
                generator=[torch.Generator().manual_seed(self.seed) for _ in pairs],
                times=[time],
                **arguments,
            ).frames
        finally:
            pipeline.scheduler, pipeline._hints = before


def _code_of(sources: Sequence[HintSource]) -> str | None:
    """SHA-256 of the files of hint sources that are not this package's; None where there are none, or they are in no file."""
    digest, is_known = hashlib.sha256(), False
    for kind in map(type, sources):
        if kind.__module__.partition(".")[0] == __package__.partition(".")[0]:
            continue
        with suppress(OSError, TypeError):  # classes of a session
            digest.update(Path(inspect.getfile(kind)).read_bytes())
            is_known = True
    return digest.hexdigest() if is_known else None


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a saved pipeline's configurations and weights, without variants of the weights, and without what
    else was put into the folder, such as results."""
    digest = hashlib.sha256()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    for path in sorted([folder / "model_index.json", *(path for part in parts for path in folder.glob(f"{part}/*"))]):
        _, variant = weights_kind(path.name) or (None, None)
        if path.suffix in (".json", ".safetensors") and not path.name.startswith(".") and variant is None:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
