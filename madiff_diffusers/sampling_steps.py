# SPDX-License-Identifier: Apache-2.0
"""What a step of MA-Sampling takes from any scheduler, and what it hands to the caller."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils import BaseOutput

from .pipeline_inputs import Callback


def clean_latents(
    scheduler: SchedulerMixin, step: BaseOutput, model_output: torch.Tensor, model_input: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """ẑ_0 of a step: the scheduler's own where it gives one, else ẑ_0 = (z_t − √(1−ᾱ_t)·ε̂) / √ᾱ_t."""
    for name in ("denoised", "pred_original_sample"):
        if getattr(step, name, None) is not None:
            return getattr(step, name)
    # Schedulers that work on scaled latents (Euler's family) still hand the network variance-preserving ones.
    alpha_bar = scheduler.alphas_cumprod.to(t.device)[t.long()].float()
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (model_input - sigma * model_output) / signal
    if prediction_type == "v_prediction":
        return signal * model_input - sigma * model_output
    return model_output


def call_back(
    callback: Callback,
    names: Sequence[str],
    pipeline: DiffusionPipeline,
    step: int,
    timestep: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    batch_size: int,
) -> dict[str, torch.Tensor]:
    """Hand tensors `(T * B, …)` to the callback, frame by frame, and return those that it replaced.

    Args:
        callback: see [`MADiffPipeline.__call__`].
        names: of the tensors that it is handed.
        batch_size: B.

    Raises:
        TypeError: for a callback that returns neither a dictionary nor None.
    """
    parts = {name: list(tensor.split(batch_size)) for name, tensor in tensors.items()}
    replaced = set()
    for number in range(len(parts["latents"])):
        given = {name: parts[name][number] for name in names}
        returned = callback(pipeline, step, timestep, given)
        if not isinstance(returned, (dict, type(None))):
            raise TypeError(
                f"`callback_on_step_end` must return a dict of tensors, or None, but gave a {type(returned).__name__}."
            )
        for name, tensor in (returned or {}).items():
            if name in parts and tensor is not parts[name][number]:
                parts[name][number] = tensor
                replaced.add(name)
    return {name: torch.cat(parts[name]) for name in replaced}


def in_own_dtype(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook before a layer that is handed float32 whatever it computes in, as [`UNet2DModel`] hands it the embedding of an instant."""
    dtype = get_parameter_dtype(module)
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in arguments)
