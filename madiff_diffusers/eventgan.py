# SPDX-License-Identifier: Apache-2.0
"""I2E: the image-to-event generator that turns two frames into a volume of brightness-change events.

The network follows the generator of EventGAN (Zhu et al., "EventGAN: Leveraging Large Scale Image Datasets for Event
Cameras", 2019), which MADiff (arXiv 2404.13534) uses as its source of motion hints.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .components import CheckpointComponent


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


class EventGANModel(CheckpointComponent, ModelMixin, ConfigMixin):
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
        _, bias = self.conv_out.parameters()
        nn.init.constant_(bias, 0.1)
        self.gradient_checkpointing = False

    def forward(
        self, frame_first: torch.Tensor, frame_second: torch.Tensor, return_dict: bool = True
    ) -> EventGANOutput | tuple[torch.Tensor]:
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
            return self._gradient_checkpointing_func(_CountedOnce(block), hidden_states)
        return block(hidden_states)


class _CountedOnce:
    """A block that is run again in the backward pass, when its batch norms have counted the batch already."""

    def __init__(self, block: nn.Module):
        self.block, self.again = block, False

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norms = [each for each in self.block.modules() if isinstance(each, nn.BatchNorm2d)] if self.again else []
        momenta, self.again = [each.momentum for each in norms], True
        for each in norms:
            each.momentum = 0.0
        try:
            return self.block(hidden_states)
        finally:
            for each, momentum in zip(norms, momenta):
                each.momentum = momentum
                if each.training and each.num_batches_tracked is not None:
                    each.num_batches_tracked -= 1
