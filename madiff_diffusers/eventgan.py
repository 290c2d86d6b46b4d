# SPDX-License-Identifier: Apache-2.0
"""I2E: the image-to-event generator that turns two frames into a volume of brightness-change events.

The network follows the generator of EventGAN (Zhu et al., "EventGAN: Leveraging Large Scale Image Datasets for Event
Cameras", 2019), which MADiff (arXiv 2404.13534) uses as its source of motion hints. This file imports nothing else
from the package, so that it can travel with a checkpoint.
"""

import json
import os
import shutil
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download


@dataclass
class EventGANOutput(BaseOutput):
    """
    Args:
        events (`torch.Tensor` of shape `(B, 2 * num_bins, H, W)`):
            Expected number of events per pixel and time bin, non-negative. The first `num_bins` channels count
            brightness increases, the last `num_bins` decreases; bins run from the first frame to the second.
    """

    events: torch.Tensor


class EventConv(nn.Module):
    """Convolution, BatchNorm (unless `norm=False`), LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, norm: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(out_channels, momentum=0.01) if norm else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.norm(self.conv(hidden_states)), 0.01)


class EventResBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and ReLU around a skip connection, at constant width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.norm1(self.conv1(hidden_states)))
        return F.relu(hidden_states + self.norm2(self.conv2(residual)))


class EventGANModel(ModelMixin, ConfigMixin):
    r"""
    Generates the events that a camera would have seen between two frames (`f_I2E` of MADiff).

    An event volume has `num_bins` time bins per polarity: event `i` at time `t_i` adds
    `max(0, 1 - |b - t*_i|)` to bin `b`, where `t*_i = (num_bins - 1) (t_i - t_first) / (t_last - t_first)`, and the frames
    were taken at `t_first` and `t_last`. (The original EventGAN puts the first and the last event there.)

    Args:
        num_bins (`int`, defaults to 9): time bins per polarity.
        base_channels (`int`, defaults to 32): width of the stem; every encoder doubles it.
        num_encoders (`int`, defaults to 4): stride-2 convolutions, and as many decoders.
        num_residual_blocks (`int`, defaults to 2): residual blocks at the coarsest scale.
    """

    _supports_gradient_checkpointing = True
    _auto_class = "AutoModel"

    @register_to_config
    def __init__(
        self, num_bins: int = 9, base_channels: int = 32, num_encoders: int = 4, num_residual_blocks: int = 2
    ):
        super().__init__()
        widths = [base_channels * 2**i for i in range(num_encoders + 1)]
        self.conv_in = EventConv(2, base_channels, norm=False)
        self.down_blocks = nn.ModuleList(EventConv(a, b, stride=2) for a, b in zip(widths[:-1], widths[1:]))
        self.mid_blocks = nn.ModuleList(EventResBlock(widths[-1]) for _ in range(num_residual_blocks))
        # Each decoder sees the upsampled map of width b beside a skip of width a = b / 2.
        self.up_blocks = nn.ModuleList(EventConv(a + b, a) for a, b in reversed(list(zip(widths[:-1], widths[1:]))))
        self.conv_out = nn.Conv2d(base_channels, 2 * num_bins, 1)
        # Above zero, so that no channel starts on the flat side of the final ReLU.
        nn.init.constant_(self.conv_out.bias, 0.1)
        self.gradient_checkpointing = False

    # The class travels with its weights. What follows stands in every component, since each must be a file that needs no other.

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # the code of a subclass is not in this file

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Union[str, os.PathLike], **kwargs) -> "EventGANModel":
        """As [`~ModelMixin.from_pretrained`], from safetensors alone.

        Raises:
            ValueError: for `use_safetensors=False`, an index that names other files, or a folder that lacks weights of this class.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors` must not be False: pickled weights are not read.")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            names = ("cache_dir", "local_files_only", "revision", "token")
            hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns="*.index*.json", **hub))
        for index in (folder / (kwargs.get("subfolder") or "")).glob("*.index*.json"):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if not all(str(shard).endswith(".safetensors") for shard in shards):
                raise ValueError(f"{index} must name .safetensors files alone: pickled weights are not read.")
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs)
        if info["missing_keys"]:  # which would be left as they were drawn
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} does not hold the weights of this {cls.__name__}: it lacks {missing[0]}"
                + (f" and {len(missing) - 1} more." if missing[1:] else ".")
            )
        return (model, info) if asked else model

    @wraps(ModelMixin.save_pretrained, assigned=())  # its signature, in which pipelines look for `variant`
    def save_pretrained(
        self,
        save_directory: Union[str, os.PathLike],
        is_main_process: bool = True,
        save_function: Optional[Callable] = None,
        safe_serialization: bool = True,
        *others,
        **kwargs,
    ) -> None:
        """As [`~ModelMixin.save_pretrained`], with this class's code beside the weights: `AutoModel` loads the folder, with
        `trust_remote_code=True`, where the package is not installed.

        Raises:
            ValueError: for `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: weights are never written as pickles.")
        super().save_pretrained(save_directory, is_main_process, save_function, True, *others, **kwargs)

    def save_config(self, save_directory: Union[str, os.PathLike], **kwargs) -> None:
        if self._auto_class is not None:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)
        super().save_config(save_directory, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a place on this machine
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict: Dict[str, Any], **kwargs) -> Tuple[Dict[str, Any], ...]:
        # What `AutoModel` reads would be reported as an argument that nobody expected.
        return super().extract_init_dict({key: value for key, value in config_dict.items() if key != "auto_map"}, **kwargs)

    def forward(
        self, frame_first: torch.Tensor, frame_second: torch.Tensor, return_dict: bool = True
    ) -> Union[EventGANOutput, Tuple[torch.Tensor]]:
        """
        Args:
            frame_first, frame_second (`torch.Tensor` of shape `(B, 1, H, W)`): grey frames in `[-1, 1]`, any size.
            return_dict (`bool`): whether to return an [`EventGANOutput`] or a plain tuple.

        Returns:
            [`EventGANOutput`] with `events` of shape `(B, 2 * num_bins, H, W)`, non-negative.
        """
        if frame_first.shape != frame_second.shape or frame_first.ndim != 4 or frame_first.shape[1] != 1:
            raise ValueError(
                "`frame_first` and `frame_second` must both have shape (B, 1, H, W), but are "
                f"{tuple(frame_first.shape)} and {tuple(frame_second.shape)}."
            )
        # 1. stem and encoders
        hidden_states = self.conv_in(torch.cat([frame_first, frame_second], dim=1))  # [B,C,H,W]
        skips = []
        for block in self.down_blocks:
            skips.append(hidden_states)
            hidden_states = self._run(block, hidden_states)  # [B,C*2^i,H/2^i,W/2^i]

        # 2. residual blocks
        for block in self.mid_blocks:
            hidden_states = self._run(block, hidden_states)

        # 3. decoders
        for block in self.up_blocks:
            skip = skips.pop()
            hidden_states = F.interpolate(hidden_states, size=skip.shape[-2:], mode="nearest")
            hidden_states = self._run(block, torch.cat([hidden_states, skip], dim=1))

        # 4. counts of events cannot be negative
        events = F.relu(self.conv_out(hidden_states))  # [B,2*num_bins,H,W]
        return EventGANOutput(events=events) if return_dict else (events,)

    def _run(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states)
        return block(hidden_states)
