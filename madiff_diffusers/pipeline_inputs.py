# SPDX-License-Identifier: Apache-2.0
"""Arguments of MA-Sampling, checked: each message names the argument, what it is and what is allowed."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin

from .image_processor import OUTPUT_TYPES
from .motion_hints import SCALES


HINT_POLICIES = ("sampling", "damped", "start")

LEAST_TIME = 1e-30  # of an instant

# Tensors that a callback can be handed.
CALLBACK_TENSORS = ("latents", "hints_prev", "hints_next")


Callback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class Sampling(NamedTuple):
    """How every frame of a call is made; see [`MADiffPipeline.__call__`]."""

    num_inference_steps: int
    hint_policy: str
    hint_interval: int
    generator: torch.Generator | list[torch.Generator] | None
    force_not_quantize: bool
    callback: Callback | None
    callback_inputs: Sequence[str]


def check_count(value: Any, name: str) -> None:
    """Refuse what is no positive integer; NumPy's integers are some, too."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, but is {value!r}.")


def check_scheduler(scheduler: Any) -> None:
    needed = ("scale_model_input", "init_noise_sigma", "alphas_cumprod")
    if not all(hasattr(scheduler, name) for name in needed) or "prediction_type" not in scheduler.config:
        raise ValueError(
            "`scheduler` must be one of Diffusers' with a noise schedule in `alphas_cumprod` and a `prediction_type`, such as DDIMScheduler, "
            f"but is {type(scheduler).__name__}; flow matching needs a network trained for it."
        )
    if scheduler.config.prediction_type == "flow_prediction" or scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"`scheduler` must not be of flow matching, which needs a network trained for it, but is {type(scheduler).__name__} with "
            f"`prediction_type` {scheduler.config.prediction_type!r} and `use_flow_sigmas` {scheduler.config.get('use_flow_sigmas')!r}."
        )


def check_settings(
    guess_scale: Any,
    event_scale: Any,
    default_num_inference_steps: Any,
    default_hint_interval: Any,
    default_hint_policy: Any,
) -> None:
    """See the pipeline's constructor."""
    for name, scale in (("guess_scale", guess_scale), ("event_scale", event_scale)):
        if not isinstance(scale, int) or scale not in SCALES:
            raise ValueError(f"`{name}` must be 1, 2, 4 or 8, but is {scale!r}.")
    for name, value in (
        ("default_num_inference_steps", default_num_inference_steps),
        ("default_hint_interval", default_hint_interval),
    ):
        check_count(value, name)
    if default_hint_policy not in HINT_POLICIES:
        raise ValueError(
            f"`default_hint_policy` must be one of {', '.join(HINT_POLICIES)}, but is {default_hint_policy!r}."
        )


def check_instants(num_frames: Any, times: Any) -> None:
    """Refuse numbers of frames and instants that are none, and both together.

    Raises:
        ValueError: if they are.
    """
    check_count(num_frames, "num_frames")
    if times is None:
        return
    if num_frames != 1:
        raise ValueError(f"Either `num_frames` or `times` can be given, but both are: {num_frames!r} and {times!r}.")
    listed = (
        times.ndim > 0 if isinstance(times, np.ndarray) else isinstance(times, Sequence) and not isinstance(times, str)
    )
    given = list(times) if listed else []

    def is_instant(time: Any) -> bool:
        # The networks are told it in float32, and the odds of it, which must be finite; NaN fails, too. What is far out of the range may be
        # too large for a float.
        return isinstance(time, Real) and bool(
            time < 1 and not time <= 0 and LEAST_TIME <= np.float32(float(time)) < 1
        )

    if not given or not all(map(is_instant, given)):
        raise ValueError(
            f"`times` must be a list of numbers between 0 and 1, both excluded, from {LEAST_TIME:g} to what float32 tells from 1, but is {times!r}."
        )
    if len(set(map(float, given))) < len(given):
        raise ValueError(f"`times` must not repeat an instant, but is {times!r}.")


def check_inputs(
    sampling: Sampling, num_frames: Any, times: Any, frames_per_batch: Any, output_type: str, batch_size: int
) -> None:
    """See [`MADiffPipeline.__call__`]."""
    for name, value in (
        ("num_inference_steps", sampling.num_inference_steps),
        ("hint_interval", sampling.hint_interval),
        ("frames_per_batch", frames_per_batch),
    ):
        check_count(value, name)
    check_instants(num_frames, times)
    if sampling.hint_policy not in HINT_POLICIES:
        raise ValueError(f"`hint_policy` must be one of {', '.join(HINT_POLICIES)}, but is {sampling.hint_policy!r}.")
    if output_type not in (*OUTPUT_TYPES, "latent"):
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, latent, but is {output_type!r}.")
    generator = sampling.generator
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` as a list must hold one generator per pair ({batch_size}), but holds {len(generator)}."
        )
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for each in generators:
        if not isinstance(each, torch.Generator):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, but is {generator!r}.")
    if sampling.callback is not None and not callable(sampling.callback):
        raise TypeError(f"`callback_on_step_end` must be a function, but is {sampling.callback!r}.")
    if isinstance(sampling.callback_inputs, str) or not isinstance(sampling.callback_inputs, Sequence):
        raise TypeError(
            f"`callback_on_step_end_tensor_inputs` must be a list of names, but is {sampling.callback_inputs!r}."
        )
    unknown = [name for name in sampling.callback_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be among {[*CALLBACK_TENSORS]}, but has {unknown}."
        )


def check_latents(
    latents: torch.Tensor | None, num_frames: int, frames: torch.Tensor, vqvae: ModelMixin
) -> list[torch.Tensor | None]:
    """Noise to start from for each of the F frames, `(B, C, h, w)` float32 on the device of the padded frames `(B, 3, H, W)`."""
    if latents is None:
        return [None] * num_frames
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"`latents` must be a tensor, but is a {type(latents).__name__}.")
    channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
    height, width = (side // vqvae.downsample_factor for side in frames.shape[-2:])
    shape = (len(frames), num_frames, channels, height, width)
    if num_frames == 1 and latents.ndim == 4:
        latents = latents[:, None]
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` must have shape {shape}, but has {tuple(latents.shape)}.")
    return list(latents.to(device=frames.device, dtype=torch.float32).unbind(dim=1))


def neighbours_of(times: list[Fraction], recursive: bool) -> dict[Fraction, tuple[Fraction, Fraction]]:
    """The two instants between whose frames each instant's frame is made, in an order in which both are there: 0 and 1 are given."""
    plan: dict[Fraction, tuple[Fraction, Fraction]] = {}

    def add(time: Fraction) -> None:
        if time in plan or time in (0, 1):
            return
        between = (Fraction(0), Fraction(1))
        if recursive and time.denominator in (4, 8):
            step = Fraction(1, time.denominator)
            between = (time - step, time + step)
        for neighbour in between:
            add(neighbour)
        plan[time] = between

    for time in times:
        add(time)
    return plan
