# SPDX-License-Identifier: Apache-2.0
"""VQ-MAGAN: the vector-quantized autoencoder whose decoder is conditioned on motion.

The middle frame is encoded to a small latent; the decoder rebuilds it from that latent and from the two neighbouring
frames, whose features it warps along offsets that it estimates from motion hints (MA-WARP, MADiff, arXiv 2404.13534).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderOutput, VectorQuantizer
from diffusers.models.autoencoders.vq_model import VQEncoderOutput, VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch.func import functional_call

from .components import CheckpointComponent
from .decoder_inputs import FrameFeatures, HintLayout
from .warping import Origin, correlate, halves, joined, laid_out_as, part_of, warp, window_mean


STRIP_PIXELS = 128 * 1024  # of a strip of rows, see `in_strips`
MOST_LOG_ODDS = math.log(9)  # of the instants 0.1 and 0.9; layers that see them are not trained on nearer ones


@dataclass
class VQMAGANEncoderOutput(VQEncoderOutput):
    """
    Args:
        latents (`torch.Tensor` of shape `(B, latent_channels, H / f, W / f)`): latents before quantization; None with
            `news_latents`, which a frame alone has not.
        features ([`FrameFeatures`]):
            The frame itself, and its feature maps. They depend on the frame alone: compute them once and hand them to every `decode`.
    """

    features: FrameFeatures | None = None


@dataclass
class VQMAGANDecoderOutput(DecoderOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(B, 3, H, W)`): the middle frame, nominally in `[-1, 1]`, not clamped.
        commit_loss (`torch.Tensor` of shape `(B,)`): vector quantization loss; zeros where nothing was quantized.
        offsets (`tuple` of `torch.Tensor` of shape `(B, 4, U, V)`):
            Offsets of each warp from the coarsest to the finest scale, in pixels of that scale: (x, y) from the
            middle frame to the previous frame, then (x, y) to the next.
        gates (`tuple` of `torch.Tensor` of shape `(B, 1, U, V)`):
            Share in `[0, 1]` that the previous frame has in each warp, in the same order.
        code_indices (`torch.Tensor`, *optional*): the codes that the latents were quantized to, flat.
        latents (`torch.Tensor`, *optional*): from `forward` alone, the middle frame's latents before quantization.
    """

    # None by default, as `BaseOutput` wants of every field but the first to be rebuilt from a dictionary.
    offsets: tuple[torch.Tensor, ...] | None = None
    gates: tuple[torch.Tensor, ...] | None = None
    code_indices: torch.Tensor | None = None
    latents: torch.Tensor | None = None


def _upsample_offsets(offsets: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """Offsets of one scale expressed at a `factor` times finer one: resized, and `factor` times as many pixels."""
    return factor * F.interpolate(offsets, scale_factor=factor, mode="bilinear", align_corners=False)


def _at_stride(origin: Origin, stride: int) -> Origin:
    """An origin in pixels as one in those of a feature map."""
    return None if origin is None else (origin[0] // stride, origin[1] // stride)


def in_strips(frames: torch.Tensor) -> bool:
    """Whether full resolution is gone through by strips of rows, which takes less memory: on a CPU, where no gradient is wanted."""
    return (
        frames.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _activation(act_fn: str, in_place: bool = False) -> nn.Module:
    """An activation, `in_place` where nothing else reads what it is given and its gradient does not, either."""
    if act_fn == "silu":
        return nn.SiLU()
    if act_fn == "leaky_relu":
        return nn.LeakyReLU(0.1, inplace=in_place)
    raise ValueError(f"`act_fn` must be 'silu' or 'leaky_relu', but is {act_fn!r}.")


def _norm(num_groups: int | None, channels: int) -> nn.Module:
    return nn.Identity() if num_groups is None else nn.GroupNorm(num_groups, channels, eps=1e-6)


def _zero_init(module: nn.Conv2d) -> nn.Conv2d:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _log_odds(time: float | torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Of the previous frame at the instants of a batch, `(B, 1, 1, 1)` float32."""
    time = torch.as_tensor(time, dtype=torch.float32, device=batch.device).expand(batch.shape[0])
    return torch.log((1 - time) / time).view(-1, 1, 1, 1)


class PartsConv2d(nn.Conv2d):
    """A convolution of several tensors put together along their channels, as the sum of the convolutions of each: what is as large
    as all of them is never made."""

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        weights = self.weight.split([part.shape[1] for part in parts], dim=1)
        result = F.conv2d(parts[0], weights[0], self.bias, padding=self.padding)
        for part, weight in zip(parts[1:], weights[1:]):
            result += F.conv2d(part, weight, padding=self.padding)
        return result


class ComparingConv2d(nn.Conv2d):
    """First layer of f_Ω, of h, a neighbour's features, hints, and with `match` the other neighbour's features, then offsets. It is
    the sum of convolutions of each, so that h is convolved once for both neighbours, and their features once for both parts
    that they play."""

    def __init__(self, channels: int, hint_channels: int, match: bool, offset_channels: int):
        super().__init__(channels * (3 if match else 2) + hint_channels + offset_channels, channels, 3, padding=1)
        self.sizes = [channels, channels, hint_channels, channels * match, offset_channels]

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        """`(2B, C, U, V)` from h `(B, C, U, V)`, features `(2B, C, U, V)`, and hints and offsets in one tensor `(2B, …, U, V)`."""
        hidden_states, features, motion = parts
        batch, channels = hidden_states.shape[:2]
        for_hidden, for_own, for_hints, for_other, for_offsets = self.weight.split(self.sizes, dim=1)
        result = F.conv2d(motion, torch.cat([for_hints, for_offsets], dim=1), self.bias, padding=1)
        if for_other.shape[1]:
            both = F.conv2d(features, torch.cat([for_own, for_other]), padding=1)
            result += both[:, :channels]
            result[:batch] += both[batch:, channels:]
            result[batch:] += both[:batch, channels:]
        else:
            result += F.conv2d(features, for_own, padding=1)
        shared = F.conv2d(hidden_states, for_hidden, padding=1)
        result[:batch] += shared
        result[batch:] += shared
        return result


class ResBlock(nn.Module):
    """(norm, activation, 3×3 convolution) twice around a skip connection; no norm where `norm_num_groups` is None."""

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int | None, act_fn: str):
        super().__init__()
        self.norm1, self.norm2 = _norm(norm_num_groups, in_channels), _norm(norm_num_groups, out_channels)
        self.act, self.act_between = _activation(act_fn), _activation(act_fn, in_place=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(self.act(self.norm1(hidden_states)))
        residual = self.conv2(self.act_between(self.norm2(residual)))
        return self.skip(hidden_states) + residual


class MidBlock(nn.Module):
    """Residual block, optional self-attention, residual block, at the coarsest scale."""

    def __init__(self, channels: int, norm_num_groups: int | None, act_fn: str, add_attention: bool):
        super().__init__()
        self.resnet_in = ResBlock(channels, channels, norm_num_groups, act_fn)
        self.attention = None
        if add_attention:
            self.attention = Attention(
                channels,
                heads=1,
                dim_head=channels,
                bias=True,
                norm_num_groups=norm_num_groups,
                residual_connection=True,
                eps=1e-6,
            )
        self.resnet_out = ResBlock(channels, channels, norm_num_groups, act_fn)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnet_in(hidden_states)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states)
        return self.resnet_out(hidden_states)


class MotionEncoder(nn.Module):
    """Frame → latents and a feature pyramid; one map per scale, at strides `stem_stride`, …, `f`."""

    _gradient_checkpointing_func: Callable[..., Any]  # set with `gradient_checkpointing`

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int | None,
        act_fn: str,
        stem_stride: int,
        add_attention: bool,
    ):
        super().__init__()
        channels = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, stride=stem_stride, padding=1)
        self.levels = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        for i, out_channels in enumerate(block_out_channels):
            widths = [channels] + [out_channels] * layers_per_block
            self.levels.append(
                nn.Sequential(*(ResBlock(a, b, norm_num_groups, act_fn) for a, b in zip(widths[:-1], widths[1:])))
            )
            channels = block_out_channels[min(i + 1, len(block_out_channels) - 1)]
            self.downsamplers.append(nn.Conv2d(out_channels, channels, 3, stride=2, padding=1))
        self.mid_block = MidBlock(channels, norm_num_groups, act_fn, add_attention)
        self.conv_norm_out = _norm(norm_num_groups, channels)
        self.act_out = _activation(act_fn)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, frame: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        features = []
        hidden_states = self.conv_in(frame)  # [B,C0,H/s,W/s]
        for level, downsample in zip(self.levels, self.downsamplers):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(level, hidden_states)
            else:
                hidden_states = level(hidden_states)
            features.append(hidden_states)
            hidden_states = downsample(hidden_states)
        hidden_states = self.mid_block(hidden_states)  # [B,CL,H/f,W/f]
        features.append(hidden_states)
        latents = self.conv_out(self.act_out(self.conv_norm_out(hidden_states)))  # [B,latent_channels,H/f,W/f]
        return latents, tuple(features)


class MAWarpBlock(nn.Module):
    r"""
    Motion-aware warp of the neighbours' features into the decoder (MA-WARP).

        Ω_prev = f_Ω(h, m_prev, φ_prev)        Ω_next = f_Ω(h, m_next, φ_next)        one f_Ω for both
        w_prev = warp(φ_prev, Ω_prev)          w_next = warp(φ_next, Ω_next)
        g = σ(f_g(w_prev, w_next))             h̃ = g·w_prev + (1 − g)·w_next + f_δ(h)

    With `coarse_to_fine`, `f_Ω` estimates a correction to offsets carried from the coarser scale (and to the hints' own
    offsets, where they have them), and looks at features already warped along them. With
    `match_neighbours` it sees the other neighbour's features beside its own, so that it can compare the two.
    """

    def __init__(
        self,
        channels: int,
        layout: HintLayout,
        act_fn: str,
        coarse_to_fine: bool,
        match_neighbours: bool,
    ):
        super().__init__()
        self.layout, self.coarse_to_fine = layout, coarse_to_fine
        self.offset_net = nn.Sequential(
            ComparingConv2d(channels, layout.channels, match_neighbours, 2 if coarse_to_fine else 0),
            _activation(act_fn),
            nn.Conv2d(channels, channels, 3, padding=1),
            _activation(act_fn),
            # Zero at the start: the first offsets are those of the hints, or none.
            _zero_init(nn.Conv2d(channels, 2, 3, padding=1)),
        )
        self.gate_net = nn.Sequential(
            PartsConv2d(2 * channels, channels, 1),
            _activation(act_fn),
            nn.Conv2d(channels, 1, 3, padding=1),
        )
        self.residual_net = nn.Sequential(_activation(act_fn), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        features: torch.Tensor,
        hints: torch.Tensor,
        corrections: torch.Tensor | None,
        log_odds: torch.Tensor | None = None,
        origin: Origin = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Both directions run in one batch: the first half of each `2B` tensor is for the previous frame.

        Args:
            hidden_states (`(B, C, U, V)`): decoder features h.
            features (`(2B, C, U, V)`): φ_prev and φ_next at this scale.
            hints (`(2B, K, U, V)`): m_prev and m_next at this scale, in float32 whatever the dtype of the rest.
            corrections (`(2B, 2, U, V)`, *optional*): what coarser scales added to the hints' own offsets.
            log_odds (`(B, 1, 1, 1)`, *optional*): of the previous frame, from which the gate starts; 0 if not given.
            origin: where in `features`, which may be larger then, everything else begins.

        Returns:
            `(h̃, corrections, offsets, gate, warped)`, of shapes `(B, C, U, V)`, `(2B, 2, U, V)` twice, `(B, 1, U, V)` and
            `(2B, C, U, V)`.
        """
        # 1. where the search starts  # [2B,2,U,V]
        if self.layout.has_offsets:
            start = self.layout.offsets(hints).float()
        else:
            start = torch.zeros_like(hints[:, :2], dtype=torch.float32)
        if corrections is None:
            corrections = torch.zeros_like(start)
        start = start + corrections

        # 2. offsets, for both neighbours in one batch
        if self.coarse_to_fine:
            looked_at = warp(features, start, origin)
        else:
            looked_at = part_of(features, start.shape[-2:], origin)
        dtype = hidden_states.dtype
        compare, *layers = self.offset_net
        motion = torch.cat([hints.to(dtype), start.to(dtype)], dim=1) if self.coarse_to_fine else hints.to(dtype)
        estimate = compare(hidden_states, looked_at, motion)
        for layer in layers:
            estimate = layer(estimate)
        estimate = estimate.float()
        offsets = start + estimate

        # 3. warp, blend, add
        warped = warp(features, offsets, origin)
        warped_prev, warped_next = halves(warped)  # [B,C,U,V]
        first, *layers = self.gate_net
        logits = first(warped_prev, warped_next)
        for layer in layers:
            logits = layer(logits)
        gate = torch.sigmoid(logits if log_odds is None else logits + log_odds)  # [B,1,U,V]
        blended = gate * warped_prev + (1 - gate) * warped_next + self.residual_net(hidden_states)
        return blended, corrections + estimate, offsets, gate, warped


class HintEncoder(nn.Module):
    """Features of the hints towards one neighbour for each scale, found by convolutions at the frames' own size. Of hints that are zeros they are
    zeros: no layer has a bias."""

    def __init__(self, in_channels: int, channels: int, scales: int, stem_stride: int, act_fn: str):
        super().__init__()
        strides = [stem_stride] + [2] * (scales - 1)
        widths = [in_channels] + [channels] * (scales - 1)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 3, stride, padding=1, bias=False),
                _activation(act_fn),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                _activation(act_fn),
            )
            for width, stride in zip(widths, strides)
        )

    def forward(self, hints: torch.Tensor) -> list[torch.Tensor]:
        """From hints `(B, K, H, W)` one `(B, channels, H / s, W / s)` for each stride s, finest first."""
        found = []
        for level in self.levels:
            hints = level(hints)
            found.append(hints)
        return found


class PaintHead(nn.Module):
    """From the decoder's finest features to the image, painted from them alone, as in the paper."""

    def __init__(self, channels: int, out_channels: int, stride: int, norm_num_groups: int | None, act_fn: str):
        super().__init__()
        self.stride = stride
        self.conv_norm = _norm(norm_num_groups, channels)
        self.act = _activation(act_fn)
        self.conv_out = nn.Conv2d(channels, out_channels * stride**2, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        return self.conv_out.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` from the decoder's finest features `(B, C, H / stride, W / stride)`."""
        return F.pixel_shuffle(self.conv_out(self.act(self.conv_norm(hidden_states))), self.stride)


class WarpHead(nn.Module):
    r"""
    From the decoder's finest features to the image, by a last MA-WARP of the frames themselves at image resolution, so that texture is
    copied and not repainted.

    Offsets, gate and residual are predicted at the decoder's finest stride and unfolded to pixels, and
    `refine_channels` (0: none) sets the width of a small network that touches up the blend at full resolution. With
    `compare_warps` the offsets, gate and residual are predicted from both neighbours' warped features too: the blend of
    these, which the decoder's features are, does not tell where they disagree, as they do where one side is hidden. Where
    the frames differ by less than `still_threshold`, in the mean around a pixel, their own mean takes the place of what was
    predicted: by as much as they differ less, and wholly where they are equal. With `cubic` the frames are sampled so (see `warp`).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        stride: int,
        norm_num_groups: int | None,
        act_fn: str,
        refine_channels: int,
        compare_warps: bool,
        still_threshold: float,
        cubic: bool,
    ):
        super().__init__()
        self.stride, self.compare_warps, self.still_threshold = stride, compare_warps, still_threshold
        self.cubic = cubic
        self.conv_norm = _norm(norm_num_groups, channels)
        self.act = _activation(act_fn)
        in_channels = 3 * channels if compare_warps else channels
        # A pixel's outputs: 2 + 2 offsets, the gate's logit, and the residual.
        self.conv_out = _zero_init(nn.Conv2d(in_channels, (out_channels + 5) * stride**2, 3, padding=1))
        self.refine = None
        if refine_channels:
            self.refine = nn.Sequential(
                nn.Conv2d(3 * out_channels + 1, refine_channels, 3, padding=1),
                _activation(act_fn, in_place=True),
                nn.Conv2d(refine_channels, refine_channels, 3, padding=1),
                _activation(act_fn, in_place=True),
                _zero_init(nn.Conv2d(refine_channels, out_channels, 3, padding=1)),
            )

    @property
    def last_layer(self) -> torch.Tensor:
        layer = self.conv_out if self.refine is None else self.refine[-1]
        return next(layer.parameters())

    def forward(
        self,
        hidden_states: torch.Tensor,
        frames: torch.Tensor,
        start: torch.Tensor,
        warped: torch.Tensor | None = None,
        log_odds: torch.Tensor | None = None,
        share: torch.Tensor | None = None,
        origin: Origin = None,
        beyond: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`(B, C, H / stride, W / stride)`): the decoder's finest features.
            frames (`(2B, 3, H, W)`): the previous and the next frames.
            start (`(2B, 2, H, W)`): offsets to start from, in pixels.
            warped (`(2B, C, H / stride, W / stride)`): the neighbours' finest features as the last warp left them.
            log_odds (`(B, 1, 1, 1)` or `(B, 1, H, W)`, *optional*): see `MAWarpBlock`.
            share (`(B, 1, 1, 1)`, *optional*): of the previous frame where nothing moves; half if not given.
            origin: where in `frames`, which may be larger then, everything else begins.
            beyond (`(B, 1, 1, 1)`, *optional*): what is added to `log_odds` for the gate alone.

        Returns:
            `(image, offsets, gate)`.
        """
        hidden_states = self.act(self.conv_norm(hidden_states))
        if self.compare_warps:
            assert warped is not None, "what is compared"
            hidden_states = torch.cat([hidden_states, *halves(warped)], dim=1)
        pixels = F.pixel_shuffle(self.conv_out(hidden_states), self.stride).to(frames.dtype)
        log_odds = None if log_odds is None else log_odds.to(frames.dtype)
        if log_odds is not None and beyond is not None:
            log_odds = log_odds + beyond.to(frames.dtype)
        dtype, height = hidden_states.dtype, start.shape[-2]
        if not in_strips(frames):
            return self._image(pixels, start, log_odds, frames, share, origin, dtype)
        top, left = (0, 0) if origin is None else origin
        rows, margin = max(STRIP_PIXELS // start.shape[-1], 1), 2 if self.refine is None else 3
        strips = []
        for first in range(0, height, rows):
            last = min(first + rows, height)
            begin, end = max(first - margin, 0), min(last + margin, height)
            odds = log_odds if log_odds is None or log_odds.shape[-2] == 1 else log_odds[..., begin:end, :]
            seen = (pixels[..., begin:end, :], start[..., begin:end, :], odds)
            found = self._image(*seen, frames, share, (top + begin, left), dtype)
            strips.append([each[..., first - begin : last - begin, :] for each in found])
        image, offsets, gate = (torch.cat(each, dim=-2) for each in zip(*strips))
        return image, offsets, gate

    def _image(
        self,
        pixels: torch.Tensor,
        start: torch.Tensor,
        log_odds: torch.Tensor | None,
        frames: torch.Tensor,
        share: torch.Tensor | None,
        origin: Origin,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `forward` returns, from what was predicted for pixels, `(B, 8, H, W)`; refined in `dtype`."""
        offsets = start + torch.cat([pixels[:, 0:2], pixels[:, 2:4]]).float()  # [2B,2,H,W]
        logits = pixels[:, 4:5]
        gate = torch.sigmoid(logits if log_odds is None else logits + log_odds)
        warped_prev, warped_next = halves(warp(frames, offsets, origin, self.cubic))  # [B,3,H,W]
        image = torch.lerp(warped_next, warped_prev, gate) + pixels[:, 5:]
        if self.refine is not None:
            seen = torch.cat([warped_prev, warped_next, image, gate], dim=1).to(dtype)
            image = image + self.refine(seen).to(frames.dtype)
        if self.still_threshold > 0:
            prev, next_ = halves(part_of(frames, offsets.shape[-2:], origin))
            difference = window_mean((prev - next_).abs().amax(dim=1, keepdim=True), 2)  # [B,1,H,W]
            moving = (difference / self.still_threshold).clamp(max=1)
            image = torch.lerp(torch.lerp(next_, prev, 0.5 if share is None else share), image, moving)
        return image, offsets, gate


class MotionDecoder(nn.Module):
    """Latents, feature pyramids and hints → the middle frame, with an MA-WARP block after every scale."""

    _gradient_checkpointing_func: Callable[..., Any]  # set with `gradient_checkpointing`

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int | None,
        act_fn: str,
        stem_stride: int,
        add_attention: bool,
        layout: HintLayout,
        coarse_to_fine: bool,
        match_neighbours: bool,
        warp_frames: bool,
        refine_channels: int,
        compare_warps: bool,
        still_threshold: float,
        cubic: bool,
    ):
        super().__init__()
        self.coarse_to_fine, self.stem_stride = coarse_to_fine, stem_stride
        widths = [*reversed(block_out_channels)]

        def warp_block(channels: int) -> MAWarpBlock:
            return MAWarpBlock(channels, layout, act_fn, coarse_to_fine, match_neighbours)

        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], norm_num_groups, act_fn, add_attention)
        self.mid_warp = warp_block(widths[0])
        self.levels, self.warps = nn.ModuleList(), nn.ModuleList()
        channels = widths[0]
        for out_channels_level in widths:
            blocks = [channels] + [out_channels_level] * layers_per_block
            self.levels.append(
                nn.Sequential(*(ResBlock(a, b, norm_num_groups, act_fn) for a, b in zip(blocks[:-1], blocks[1:])))
            )
            self.warps.append(warp_block(out_channels_level))
            channels = out_channels_level
        shared = (channels, out_channels, stem_stride, norm_num_groups, act_fn)
        self.head: PaintHead | WarpHead = (
            WarpHead(*shared, refine_channels, compare_warps, still_threshold, cubic)
            if warp_frames
            else PaintHead(*shared)
        )
        self.gradient_checkpointing = False

    def forward(
        self,
        latents: torch.Tensor,
        frames: torch.Tensor,
        features: Sequence[torch.Tensor],
        hints: Sequence[torch.Tensor],
        frame_offsets: torch.Tensor | None = None,
        log_odds: torch.Tensor | None = None,
        origin: Origin = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Args:
            latents (`(B, C, H / f, W / f)`): quantized latents.
            frames (`(2B, 3, H, W)`): the previous and the next frames.
            features: φ_prev and φ_next in one batch, finest first.
            hints: m_prev and m_next in one batch of `2B`, one tensor per feature map, in their order.
            frame_offsets (`(2B, 2, H, W)`, *optional*): offsets that the hints tell of the frames themselves.
            log_odds (`(B, 1, 1, 1)`, *optional*): see `MAWarpBlock`.
            origin: where in `frames` and `features`, which may be larger then, everything else begins; in pixels of the frames.

        Returns:
            `(image, offsets, gates)`, see [`VQMAGANDecoderOutput`].
        """
        run = self._gradient_checkpointing_func if torch.is_grad_enabled() and self.gradient_checkpointing else None
        all_offsets, all_gates = [], []

        # 1. the coarsest scale
        hidden_states = self.mid_block(self.conv_in(latents))  # [B,C,H/f,W/f]
        blocks = [self.mid_warp, *self.warps]
        carried = None

        # 2. up the scales, a warp after each
        for i, (warp_block, feature, hint) in enumerate(zip(blocks, features[::-1], hints[::-1])):
            if i > 0:
                hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
                level = self.levels[i - 1]
                hidden_states = level(hidden_states) if run is None else run(level, hidden_states)
            stride = self.stem_stride * 2 ** (len(self.levels) - i)
            arguments = (hidden_states, feature, hint, carried, log_odds, _at_stride(origin, stride))
            hidden_states, corrections, offsets, gate, warped = (
                warp_block(*arguments) if run is None else run(warp_block, *arguments)
            )
            if self.coarse_to_fine and i < len(self.levels):
                carried = _upsample_offsets(corrections)
            all_offsets.append(torch.cat(halves(offsets), dim=1))
            all_gates.append(gate)

        # 3. the image, or the frames themselves; what the last warp found is where they start
        if isinstance(self.head, PaintHead):
            return self.head(hidden_states).to(frames.dtype), tuple(all_offsets), tuple(all_gates)
        # Only the corrections are resized: the hints' own offsets are known at full resolution.
        start = _upsample_offsets(corrections, self.stem_stride) if self.stem_stride > 1 else corrections
        if frame_offsets is not None:
            start = start + frame_offsets
        share = None if log_odds is None else torch.sigmoid(log_odds.to(frames.dtype))
        image, offsets, gate = self.head(hidden_states, frames, start, warped, log_odds, share, origin)
        return image, (*all_offsets, torch.cat(halves(offsets), dim=1)), (*all_gates, gate)


class PyramidEncoder(nn.Module):
    """Frame → feature pyramid alone: at each scale a convolution that halves the size, and another."""

    _gradient_checkpointing_func: Callable[..., Any]  # set with `gradient_checkpointing`

    def __init__(self, in_channels: int, block_out_channels: Sequence[int], act_fn: str):
        super().__init__()
        self.levels = nn.ModuleList()
        for before, width in zip((in_channels, *block_out_channels[:-1]), block_out_channels):
            first, second = nn.Conv2d(before, width, 3, stride=2, padding=1), nn.Conv2d(width, width, 3, padding=1)
            acts = [_activation(act_fn, in_place=True) for _ in range(2)]
            self.levels.append(nn.Sequential(first, acts[0], second, acts[1]))
        self.gradient_checkpointing = False

    def forward(self, frame: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, hidden_states = [], frame
        for level in self.levels:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(level, hidden_states)
            else:
                hidden_states = level(hidden_states)
            features.append(hidden_states)
        return tuple(features)


class JointWarpBlock(nn.Module):
    r"""
    MA-WARP with one look at both neighbours.

        h ← f_δ(h, w⁰_prev, w⁰_next, Ω⁰)       w⁰ = warp(φ, Ω⁰), along the offsets so far
        Ω_prev, Ω_next, g = Ω⁰ + f_Ω(h), σ(f_g(h))
        h̃ = g·warp(φ_prev, Ω_prev) + (1 − g)·warp(φ_next, Ω_next) + h

    It is cheaper than [`MAWarpBlock`], which estimates the offsets to each neighbour on their own.
    """

    def __init__(self, in_channels: int, channels: int, act_fn: str):
        super().__init__()
        self.conv_hidden = nn.Conv2d(in_channels, channels, 1)
        self.conv_in = PartsConv2d(3 * channels + 5, channels, 3, padding=1)
        self.residual = ResBlock(channels, channels, None, act_fn)
        self.act_in, self.act_out = _activation(act_fn, in_place=True), _activation(act_fn)
        self.conv_out = _zero_init(nn.Conv2d(channels, 5, 3, padding=1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        features: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        origin: Origin = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`(B, C', U, V)` or half as large): of the scale before.
            features (`(2B, C, U, V)`): φ_prev and φ_next.
            offsets (`(B, 4, U, V)`): Ω⁰, float32, in pixels of this scale.
            logits (`(B, 1, U, V)`): of the gate so far, float32.
            origin: where in `features`, which may be larger then, everything else begins.

        Returns:
            `(h̃, offsets, logits)`.
        """
        hidden_states, offsets, logits = self.look(hidden_states, features, offsets, logits, origin)
        warped_prev, warped_next = halves(warp(features, torch.cat([offsets[:, :2], offsets[:, 2:]]), origin))
        gate = torch.sigmoid(logits).to(hidden_states.dtype)
        return torch.lerp(warped_next, warped_prev, gate) + hidden_states, offsets, logits

    def look(
        self,
        hidden_states: torch.Tensor,
        features: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        origin: Origin = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same arguments, and `(h, offsets, logits)` as the look at both neighbours left them, nothing warped along them."""
        dtype = hidden_states.dtype
        hidden_states = self.conv_hidden(hidden_states)
        if hidden_states.shape[-1] != offsets.shape[-1]:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        both = torch.cat([offsets[:, :2], offsets[:, 2:]])
        warped_prev, warped_next = halves(warp(features, both, origin))
        motion = torch.cat([0.25 * offsets, logits], dim=1).to(dtype)
        hidden_states = self.act_in(self.conv_in(hidden_states, warped_prev, warped_next, motion))
        hidden_states = self.residual(hidden_states)
        change = self.conv_out(self.act_out(hidden_states)).float().contiguous()
        return hidden_states, offsets + change[:, :4], logits + change[:, 4:]


def _warps_difference(frames: torch.Tensor, offsets: torch.Tensor, stride: int, origin: Origin) -> torch.Tensor:
    """Mean difference of both neighbours, `(2B, C, H, W)`, warped to every `stride`-th pixel along offsets `(B, 4, U, V)` in these
    steps, around each pixel of half that size, `(B, 1, U / 2, V / 2)`."""
    # A step of `warp` is a pixel, so what the longer steps are more is added to the offsets; a cell is sampled in its middle.
    places = [(stride - 1) * (torch.arange(side, device=frames.device) + 0.5) for side in offsets.shape[:-3:-1]]
    x, y = (stride * offsets[:, axis::2] for axis in (0, 1))
    x, y = x + places[0], y + places[1][:, None]
    both = torch.cat([torch.stack([x[:, side], y[:, side]], dim=1) for side in (0, 1)])
    warped_prev, warped_next = halves(warp(frames, both, origin))
    difference = F.avg_pool2d((warped_prev - warped_next).abs().mean(dim=1, keepdim=True), 2)
    return F.avg_pool2d(F.pad(difference, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


class NewsEncoder(nn.Module):
    """A frame, both neighbours warped to its instant, and the hints that they were warped along → latents of one scale."""

    def __init__(self, in_channels: int, latent_channels: int, block_out_channels: Sequence[int], act_fn: str):
        super().__init__()
        self.features = PyramidEncoder(3 * in_channels + 4, block_out_channels, act_fn)
        self.conv_out = nn.Conv2d(block_out_channels[-1], latent_channels, 3, padding=1)

    def forward(self, frame: torch.Tensor, warped: Sequence[torch.Tensor], hints: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.features(torch.cat([frame, *warped, hints], dim=1))[-1])


class NewsDecoder(nn.Module):
    """Latents of motion news, feature pyramids and offsets → the middle frame: the latents move the first offsets and the gate
    directly, then a [`JointWarpBlock`] a scale, and a last warp of the frames themselves. What is carried from scale to scale is
    what was added to the hints' offsets, which are known at each. Its layers, which see the gate's logits, are told of an instant near 0
    or 1 as of 0.1 or 0.9; the last gate has the instant itself."""

    _gradient_checkpointing_func: Callable[..., Any]  # set with `gradient_checkpointing`

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        act_fn: str,
        refine_channels: int,
        still_threshold: float,
        cubic: bool,
    ):
        super().__init__()
        widths = [*reversed(block_out_channels)]
        # A unit of the latents is half a pixel of their scale to begin with, 4 of the frame at f = 8.
        self.to_offsets = nn.Conv2d(latent_channels, 4, 1, bias=False)
        nn.init.zeros_(self.to_offsets.weight)
        with torch.no_grad():
            for number in range(min(4, latent_channels)):
                self.to_offsets.weight[number, number] = 0.5
        self.to_gate = _zero_init(nn.Conv2d(latent_channels, 1, 1))
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.warps = nn.ModuleList(
            JointWarpBlock(before, width, act_fn) for before, width in zip((widths[0], *widths[:-1]), widths)
        )
        self.head = WarpHead(widths[-1], out_channels, 2, None, act_fn, refine_channels, False, still_threshold, cubic)
        self.gradient_checkpointing = False

    def forward(
        self,
        latents: torch.Tensor,
        frames: torch.Tensor,
        features: Sequence[torch.Tensor],
        hints: Sequence[torch.Tensor],
        log_odds: torch.Tensor,
        origin: Origin = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Args:
            latents (`(B, C, H / f, W / f)`): quantized latents.
            frames (`(2B, 3, H, W)`): the previous and the next frames.
            features: φ_prev and φ_next in one batch, finest first.
            hints: offsets that the hints tell, `(B, 4, U, V)` float32 of the frames and then of each feature map, in pixels of that scale.
            log_odds (`(B, 1, 1, 1)`): of the previous frame, from which the gate starts.
            origin: see `MotionDecoder`.

        Returns:
            `(image, offsets, gates)`, see [`VQMAGANDecoderOutput`]; before the blocks' offsets come those that the latents made of the hints.
        """
        told = log_odds.clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS)
        hidden_states, corrections, logits, all_offsets, all_gates = self._through(
            len(self.warps), latents, features, hints, told, origin
        )
        start = hints[0] + _upsample_offsets(corrections)
        start = torch.cat([start[:, :2], start[:, 2:]])
        logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        share = torch.sigmoid(log_odds.to(frames.dtype))
        image, offsets, gate = self.head(hidden_states, frames, start, None, logits, share, origin, log_odds - told)
        return image, (*all_offsets, torch.cat(halves(offsets), dim=1)), (*all_gates, gate)

    def motion(
        self,
        count: int,
        latents: torch.Tensor,
        features: Sequence[torch.Tensor],
        hints: Sequence[torch.Tensor],
        log_odds: torch.Tensor,
    ) -> torch.Tensor:
        """Offsets `(B, 4, U, V)` of the `count`-th scale, the coarsest first, as in `forward`; of features and hints that are finer nothing is
        read."""
        told = log_odds.clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS)
        return self._through(count, latents, features, hints, told, None, warps_last=False)[3][-1]

    def _through(
        self,
        count: int,
        latents: torch.Tensor,
        features: Sequence[torch.Tensor],
        hints: Sequence[torch.Tensor],
        log_odds: torch.Tensor,
        origin: Origin,
        warps_last: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """What so many of the coarsest scales make of latents: hidden states, corrections of the hints and logits of the gate at the last
        of them, and the offsets and gates of all. Nothing need be warped along the last offsets where nobody reads the hidden states."""
        run = self._gradient_checkpointing_func if torch.is_grad_enabled() and self.gradient_checkpointing else None
        # Planes of offsets, as hints are: four channels side by side are enlarged at a third of the speed.
        corrections = self.to_offsets(latents).float().contiguous()
        offsets = hints[-1] + corrections
        logits = log_odds.float() + self.to_gate(latents).float()
        all_offsets, all_gates = [offsets], [torch.sigmoid(logits)]
        hidden_states = self.conv_in(latents)
        for number, block in enumerate(self.warps[:count]):
            if number:
                corrections = _upsample_offsets(corrections)
                offsets = hints[-1 - number] + corrections
                logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
            stride = 2 ** (len(self.warps) - number)
            arguments = (hidden_states, features[-1 - number], offsets, logits, _at_stride(origin, stride))
            before = offsets
            assert isinstance(block, JointWarpBlock)
            call = block if warps_last or number < count - 1 else block.look
            hidden_states, offsets, logits = call(*arguments) if run is None else run(call, *arguments)
            corrections = corrections + (offsets - before)
            all_offsets.append(offsets)
            all_gates.append(torch.sigmoid(logits))
        return hidden_states, corrections, logits, all_offsets, all_gates


class VQMAGANModel(CheckpointComponent, VQModel):
    r"""
    Motion-aware autoencoder of MADiff (VQ-MAGAN): a [`~diffusers.VQModel`] whose decoder sees the two neighbouring
    frames and motion hints.

    The downsampling factor is `f = stem_stride * 2 ** len(block_out_channels)`, or `2 ** len(block_out_channels)` with
    `news_latents`; frame sizes must be multiples of it.
    The defaults are the paper's behaviour; the flags below it are this implementation's options.

    Args:
        in_channels, out_channels (`int`, defaults to 3): channels of a frame.
        block_out_channels (`tuple` of `int`): widths from the finest scale to the coarsest; the bottleneck has the last.
        layers_per_block (`int`): residual blocks per scale.
        latent_channels (`int`): channels of the latents.
        num_vq_embeddings (`int`): codes in the codebook.
        vq_embed_dim (`int`, *optional*): dimensions of a code; `latent_channels` if not given.
        norm_num_groups (`int`, *optional*): groups of the GroupNorms; None builds the network without norms.
        act_fn (`str`): `"silu"` or `"leaky_relu"`.
        mid_block_add_attention (`bool`): self-attention in the two bottlenecks.
        scaling_factor (`float`): the latents' standard deviation times this is 1; see [`~diffusers.AutoencoderKL`].
        hint_channels (`int`): channels of the hints towards one neighbour.
        stem_stride (`int`, 1 or 2): stride of the first convolution. 2 leaves full resolution to the last warp.
        coarse_to_fine (`bool`): carry offsets from scale to scale, instead of estimating each from nothing.
        offset_hints (`bool`): whether the last two channels of the hints are offsets in pixels (optical flow), to which
            estimates are added. Needs `coarse_to_fine`.
        match_neighbours (`bool`): let the offset network see both neighbours' features.
        hint_encoder_channels (`int`): width of a network that finds features of the hints at the frames' own size, which each scale then
            sees, at least 2; 0: each sees the hints' mean over its cells, in which edges that go by cancel.
        warp_frames (`bool`): a last warp of the frames themselves at image resolution.
        refine_channels (`int`): width of the full-resolution refinement after the last warp; 0 for none.
        compare_warps (`bool`): let the last warp see both neighbours' warped features beside their blend. Needs
            `warp_frames`.
        still_threshold (`float`): difference of the two frames, of values in `[-1, 1]`, below which their mean takes the
            place of what was predicted, since a network never gives back quite what it was given; 0 for never. Needs
            `warp_frames`.
        time_conditioned (`bool`): let the gates start from the instant of the middle frame: the nearer a neighbour in time, the
            larger its share. Without it, as in the paper, they know the frame half-way alone.
        news_latents (`bool`): let the latents tell what the middle frame adds to its neighbours warped along the hints
            (`encode_news`), instead of the frame as a whole; the decoder's offsets and gates then start from the hints and the
            latents. Needs `offset_hints`, `warp_frames`, `time_conditioned`, `stem_stride=2` and `vq_embed_dim` equal to
            `latent_channels`; `f = 2 ** len(block_out_channels)`, and neither norms nor attention are built.
        news_block_out_channels (`tuple` of `int`): widths of the encoder of news, from stride 2 to stride f.
        evidence_channels (`int`): channels that each neighbour's features are reduced to for the denoiser (`condition`).
        evidence_reach (`int`): half-width of the window in which these are correlated, in latents.
        news_threshold (`float`): mean difference of both warped neighbours, of values in `[-1, 1]`, at which half of the news is told; of
            less difference less, and where they agree, none: the hints were right there. 0 tells all of it everywhere.
        frame_sampling (`str`): `"bilinear"`, or `"bicubic"`, which takes more time and blurs less, for the last warp of the frames. Needs
            `warp_frames`.
    """

    encoder: MotionEncoder | PyramidEncoder
    decoder: MotionDecoder | NewsDecoder

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 128, 128, 256),
        layers_per_block: int = 1,
        latent_channels: int = 3,
        num_vq_embeddings: int = 8192,
        vq_embed_dim: int | None = None,
        norm_num_groups: int | None = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        scaling_factor: float = 1.0,
        hint_channels: int = 18,
        stem_stride: int = 1,
        coarse_to_fine: bool = False,
        offset_hints: bool = False,
        match_neighbours: bool = False,
        hint_encoder_channels: int = 0,
        warp_frames: bool = False,
        refine_channels: int = 0,
        compare_warps: bool = False,
        still_threshold: float = 0.0,
        time_conditioned: bool = False,
        news_latents: bool = False,
        news_block_out_channels: tuple[int, ...] = (32, 64, 96),
        evidence_channels: int = 24,
        evidence_reach: int = 2,
        news_threshold: float = 0.0,
        frame_sampling: str = "bilinear",
    ):
        # VQModel's own constructor would build an encoder and a decoder that know nothing of neighbours.
        ModelMixin.__init__(self)
        if stem_stride not in (1, 2):
            raise ValueError(f"`stem_stride` must be 1 or 2, but is {stem_stride}.")
        if offset_hints and not coarse_to_fine:
            raise ValueError("`offset_hints=True` needs `coarse_to_fine=True`: estimates are added to the hints.")
        if (compare_warps or still_threshold > 0) and not warp_frames:
            raise ValueError(
                "`compare_warps` and `still_threshold` need `warp_frames=True`: they are for the last warp."
            )
        if frame_sampling not in ("bilinear", "bicubic") or frame_sampling == "bicubic" and not warp_frames:
            raise ValueError(
                "`frame_sampling` must be 'bilinear', or 'bicubic' with `warp_frames=True`, whose last warp it is for, but is "
                f"{frame_sampling!r}."
            )
        cubic = frame_sampling == "bicubic"
        if still_threshold < 0:
            raise ValueError(f"`still_threshold` must be at least 0, but is {still_threshold}.")
        if news_threshold < 0 or news_threshold > 0 and not news_latents:
            raise ValueError(
                f"`news_threshold` must be at least 0, and 0 without `news_latents`, but is {news_threshold}."
            )
        vq_embed_dim = vq_embed_dim if vq_embed_dim is not None else latent_channels
        if hint_encoder_channels and (hint_encoder_channels < 2 or news_latents):
            raise ValueError(
                "`hint_encoder_channels` must be 0 or at least 2, and 0 with `news_latents`, whose decoder reads offsets alone, but is "
                f"{hint_encoder_channels}."
            )
        if news_latents:
            if (
                not (offset_hints and warp_frames and time_conditioned)
                or vq_embed_dim != latent_channels
                or stem_stride != 2
            ):
                raise ValueError(
                    "`news_latents=True` needs `offset_hints=True`, `warp_frames=True`, `time_conditioned=True`, `stem_stride=2` and "
                    "`vq_embed_dim` equal to `latent_channels`."
                )
            if len(news_block_out_channels) != len(block_out_channels):
                raise ValueError(
                    "`news_block_out_channels` must be as many as `block_out_channels`, but are "
                    f"{len(news_block_out_channels)} and {len(block_out_channels)}."
                )
            self.encoder = PyramidEncoder(in_channels, block_out_channels, act_fn)
            self.news_encoder = NewsEncoder(in_channels, latent_channels, news_block_out_channels, act_fn)
            self.register_buffer("news_rms", torch.ones(latent_channels))
            self.evidence_conv = nn.Conv2d(block_out_channels[-1], evidence_channels, 1)
            self.quantize = VectorQuantizer(num_vq_embeddings, vq_embed_dim, beta=0.25, legacy=False)
            self.decoder = NewsDecoder(
                latent_channels, out_channels, block_out_channels, act_fn, refine_channels, still_threshold, cubic
            )
            return
        shared = (block_out_channels, layers_per_block, norm_num_groups, act_fn, stem_stride, mid_block_add_attention)
        self.encoder = MotionEncoder(in_channels, latent_channels, *shared)
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        # legacy=False: beta weighs the commitment, not the codebook.
        self.quantize = VectorQuantizer(num_vq_embeddings, vq_embed_dim, beta=0.25, legacy=False)
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        layout = self.hint_layout
        self.hint_encoder = None
        if hint_encoder_channels:
            scales = len(block_out_channels) + 1
            self.hint_encoder = HintEncoder(hint_channels, hint_encoder_channels, scales, stem_stride, act_fn)
            layout = HintLayout(hint_encoder_channels + 2 * offset_hints, offset_hints)
        self.decoder = MotionDecoder(
            latent_channels,
            out_channels,
            *shared,
            layout=layout,
            coarse_to_fine=coarse_to_fine,
            match_neighbours=match_neighbours,
            warp_frames=warp_frames,
            refine_channels=refine_channels,
            compare_warps=compare_warps,
            still_threshold=still_threshold,
            cubic=cubic,
        )

    @property
    def hint_layout(self) -> HintLayout:
        """What the channels of the hints towards one neighbour are."""
        return HintLayout(self.config.hint_channels, self.config.offset_hints)

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along each side."""
        if self.config.news_latents:
            return 2 ** len(self.config.block_out_channels)
        return self.config.stem_stride * 2 ** len(self.config.block_out_channels)

    @property
    def motion_scales(self) -> int:
        """How many of the decoder's scales `guess_motion` goes through, the coarsest first: all but the two finest, which take most of the
        time, and one at least. 0 without `news_latents` or with a single scale: there is no such guess."""
        levels = len(self.config.block_out_channels)
        return max(1, levels - 2) if self.config.news_latents and levels > 1 else 0

    @property
    def motion_stride(self) -> int:
        """Pixels of a frame to one of the motion that `guess_motion` finds, along each side.

        Raises:
            ValueError: without `news_latents`, or with a single scale.
        """
        if not self.motion_scales:
            raise ValueError(
                "`guess_motion` needs `news_latents=True` and two `block_out_channels` at least, but they are "
                f"{self.config.news_latents} and {tuple(self.config.block_out_channels)}."
            )
        return 2 ** (len(self.config.block_out_channels) - self.motion_scales + 1)

    @property
    def condition_channels(self) -> int:
        """Channels that a denoiser sees beside the noisy latents, see `condition`."""
        if self.config.news_latents:
            side = 2 * self.config.evidence_reach + 1
            return 3 * self.config.evidence_channels + side**2 + 2 * self.config.hint_channels
        return 2 * (self.config.vq_embed_dim or self.config.latent_channels) + 2 * self.config.hint_channels

    @property
    def last_layer(self) -> torch.Tensor:
        """Weight of the last layer, at which the adversarial loss is balanced (Esser et al., 2021, eq. 7)."""
        return self.decoder.head.last_layer

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> VQMAGANEncoderOutput | tuple[torch.Tensor | None, FrameFeatures]:
        """
        Args:
            x (`torch.Tensor` of shape `(B, 3, H, W)`): frames in `[-1, 1]`; H and W multiples of `downsample_factor`. Give them
                in float32 in half precision too: the last warp blends the frames themselves, in their own dtype.

        Returns:
            [`VQMAGANEncoderOutput`]: latents before quantization, and the frames' features.
        """
        if any(side % self.downsample_factor for side in x.shape[-2:]):
            raise ValueError(
                f"`x` must have a height and width that are multiples of {self.downsample_factor}, "
                f"but is {x.shape[-2]}x{x.shape[-1]}."
            )
        if self.config.news_latents:
            latents, pyramid = None, self.encoder(x.to(self.dtype))
        else:
            latents, pyramid = self.encoder(x.to(self.dtype))
            latents = self.quant_conv(latents)
        features = FrameFeatures(x, pyramid)
        if not return_dict:
            return latents, features
        return VQMAGANEncoderOutput(latents=latents, features=features)

    @apply_forward_hook
    def encode_news(
        self,
        frame_mid: torch.Tensor,
        features_prev: FrameFeatures,
        features_next: FrameFeatures,
        hints_prev: torch.Tensor,
        hints_next: torch.Tensor,
        time: float | torch.Tensor = 0.5,
    ) -> torch.Tensor:
        """
        What a middle frame tells beside its neighbours, warped along the hints: `E(frame | warps) - E(mean of the warps | warps)`, of
        variance 1 in each channel over the frames of training. 0 means that the hints were right. In training mode, where
        the encoder of news is trained, the variance is that of the batch, and a running mean of it is kept for later.

        Args:
            frame_mid (`torch.Tensor` of shape `(B, 3, H, W)`): the middle frame, in [-1, 1].
            features_prev, features_next, hints_prev, hints_next, time: as for `decode`.

        Returns:
            Latents `(B, latent_channels, H / f, W / f)`, before quantization.
        """
        size = frame_mid.shape[-2:]
        hints = [self.resize_hints(self.hint_layout.offsets(each), size).float() for each in (hints_prev, hints_next)]
        warped = [warp(features.frame, hint) for features, hint in zip((features_prev, features_next), hints)]
        share = torch.as_tensor(time, dtype=torch.float32, device=frame_mid.device).view(-1, 1, 1, 1)
        mean = (1 - share) * warped[0] + share * warped[1]
        motion = torch.cat(hints, dim=1) / 16
        seen = [torch.cat([each, each]).to(self.dtype) for each in (*warped, motion)]
        latents, expected = halves(
            self.news_encoder(torch.cat([frame_mid, mean]).to(self.dtype), seen[:2], seen[2]).float()
        )
        news = latents - expected
        rms = self.news_rms
        if self.training and self.news_encoder.conv_out.weight.requires_grad:
            rms = news.square().mean(dim=(0, 2, 3)).sqrt().clamp(min=1e-6)
            with torch.no_grad():
                self.news_rms.lerp_(rms.detach().to(self.news_rms.dtype), 0.01)
        return news / rms.float().view(1, -1, 1, 1)

    @apply_forward_hook
    def condition(
        self,
        coarsest_prev: torch.Tensor,
        coarsest_next: torch.Tensor,
        hints_prev: torch.Tensor,
        hints_next: torch.Tensor,
    ) -> torch.Tensor:
        """
        What a denoiser of news sees beside the noisy latents: both neighbours' features, warped along the hints, their difference
        and local correlation, and the hints.

        Args:
            coarsest_prev, coarsest_next (`torch.Tensor` of shape `(B, C, H / f, W / f)`): the neighbours' last feature maps,
                `encode(frame).features.pyramid[-1]`.
            hints_prev, hints_next: as for `decode`.

        Returns:
            `(B, condition_channels, H / f, W / f)`.
        """
        features = torch.cat([coarsest_prev, coarsest_next])
        hints = self.resize_hints(torch.cat([hints_prev, hints_next]), features.shape[-2:])
        warped_prev, warped_next = halves(warp(self.evidence_conv(features), self.hint_layout.offsets(hints)))
        correlation = correlate(warped_prev, warped_next, self.config.evidence_reach)
        seen = [warped_prev, warped_next, warped_prev - warped_next, correlation]
        return torch.cat([*seen, *halves((0.25 * hints).to(warped_prev.dtype))], dim=1)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        features_prev: FrameFeatures,
        features_next: FrameFeatures,
        hints_prev: torch.Tensor,
        hints_next: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        time: float | torch.Tensor = 0.5,
        origin: Origin = None,
    ) -> VQMAGANDecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            h (`torch.Tensor` of shape `(B, vq_embed_dim, H / f, W / f)`): latents of the middle frame, unscaled.
            features_prev, features_next: `encode(frame).features` of the two neighbours.
            hints_prev, hints_next (`torch.Tensor` of shape `(B, hint_channels, H, W)`): motion between the middle frame
                and each neighbour; resized here to every scale. Give them in float32 in half precision too: offsets of
                many pixels need it.
            force_not_quantize (`bool`): decode the latents as they are.
            time (`float` or `torch.Tensor` of shape `(B,)`): instant of the middle frame, in (0, 1); read where the model is
                `time_conditioned`.
            origin (`tuple` of `int`, *optional*): decode a part of the frame, of which `h` and the hints are, that begins at this row
                and column, multiples of `downsample_factor`; features are of a larger part, into which the warps reach.

        Returns:
            [`VQMAGANDecoderOutput`], or `(sample, commit_loss)`.
        """
        factor = self.downsample_factor
        height, width = features_prev.frame.shape[-2:] if origin is None else [side * factor for side in h.shape[-2:]]
        if origin is not None:
            whole = features_prev.frame.shape[-2:]
            if any(
                first % factor or first < 0 or first + part > all_
                for first, part, all_ in zip(origin, (height, width), whole)
            ):
                raise ValueError(
                    f"`origin` must be multiples of {factor} at which {height}x{width} pixels begin that lie within the features' "
                    f"{whole[0]}x{whole[1]}, but is {tuple(origin)}."
                )
        for name, hints in (("hints_prev", hints_prev), ("hints_next", hints_next)):
            ratio = height // hints.shape[-2]
            if hints.shape[1] != self.config.hint_channels or (hints.shape[-2] * ratio, hints.shape[-1] * ratio) != (
                height,
                width,
            ):
                raise ValueError(
                    f"`{name}` must have {self.config.hint_channels} channels at the frames' size {(height, width)}, or one that "
                    f"this is a multiple of, but has shape {tuple(hints.shape)}."
                )
        quantized, commit_loss, code_indices = self._quantized(h, force_not_quantize)
        layout, frames = self.hint_layout, joined(features_prev.frame, features_next.frame)
        features = [joined(*pair) for pair in zip(features_prev.pyramid, features_next.pyramid)]
        if self.config.news_latents:
            at_scales = self._offsets_at_scales(hints_prev, hints_next, (height, width), range(len(features) + 1))
            told = self._told(quantized, frames, at_scales, origin)
            sample, offsets, gates = self.decoder(told, frames, features, at_scales, _log_odds(time, h), origin)
        else:
            pyramid = self._hint_pyramid(hints_prev, hints_next, features, (height, width))
            start = None
            if layout.has_offsets and self.config.warp_frames:  # all that the frames' own warp reads of the hints
                both = torch.cat([layout.offsets(hints_prev), layout.offsets(hints_next)])
                start = self.resize_hints(both, (height, width)).float()
            log_odds = _log_odds(time, h).to(h.dtype) if self.config.time_conditioned else None
            sample, offsets, gates = self.decoder(
                self.post_quant_conv(quantized), frames, features, pyramid, start, log_odds, origin
            )
        if not return_dict:
            return sample, commit_loss
        return VQMAGANDecoderOutput(
            sample=sample, commit_loss=commit_loss, offsets=offsets, gates=gates, code_indices=code_indices
        )

    @apply_forward_hook
    def guess_motion(
        self,
        features_prev: FrameFeatures,
        features_next: FrameFeatures,
        hints_prev: torch.Tensor,
        hints_next: torch.Tensor,
        h: torch.Tensor | None = None,
        force_not_quantize: bool = False,
        time: float | torch.Tensor = 0.5,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The motion that the decoder makes of latents and hints: a guess that is not decoded to a frame, but goes through its coarser scales
        alone.

        Args:
            features_prev, features_next, force_not_quantize, time: as for `decode`.
            h (`torch.Tensor` of shape `(B, vq_embed_dim, H / f, W / f)`, *optional*): latents, as for `decode`; zeros if not given, which
                is all that is known of the middle frame at first.
            hints_prev, hints_next (`torch.Tensor` of shape `(B, hint_channels, H / s, W / s)`): as for `decode`, where s is `motion_stride`; in pixels of
                their own size.

        Returns:
            Offsets to the previous frame and to the next, of the hints' size and in its pixels, float32.

        Raises:
            ValueError: without `news_latents`, or with a single scale.
        """
        stride = self.motion_stride
        log_odds = _log_odds(time, hints_prev)
        height, width = (stride * side for side in hints_prev.shape[-2:])
        levels, finest = len(self.config.block_out_channels), stride.bit_length() - 1
        scales = range(min(finest, levels - 1), levels + 1)  # news are told by hints of half the latents' stride
        at_scales = self._offsets_at_scales(hints_prev, hints_next, (height, width), scales)
        pyramids = (each.pyramid[finest - 1 :] for each in (features_prev, features_next))
        features = [joined(*pair) for pair in zip(*pyramids)]
        if h is None:
            size = at_scales[-1].shape[-2:]
            shape = (hints_prev.shape[0], self.config.latent_channels, *size)
            told = torch.zeros(shape, dtype=self.dtype, device=hints_prev.device)
        else:
            frames = joined(features_prev.frame, features_next.frame)
            told = self._told(self._quantized(h, force_not_quantize)[0], frames, at_scales)
        assert isinstance(self.decoder, NewsDecoder)
        arguments = (told, features, at_scales, log_odds)
        offsets_prev, offsets_next = self.decoder.motion(self.motion_scales, *arguments).chunk(2, dim=1)
        return offsets_prev, offsets_next

    def _quantized(
        self, latents: torch.Tensor, force_not_quantize: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Latents moved to their nearest codes, or as they are; the loss of each and the codes."""
        if force_not_quantize:
            return latents, latents.new_zeros(latents.shape[0]), None
        # Codes lie closer together than half precision can tell.
        codebook = {"embedding.weight": self.quantize.embedding.weight.float()}
        quantized, loss, (_, _, codes) = functional_call(self.quantize, codebook, (latents.float(),))
        return quantized.to(latents.dtype), loss.repeat(latents.shape[0]), codes

    def _told(
        self, news: torch.Tensor, frames: torch.Tensor, at_scales: Sequence[torch.Tensor], origin: Origin = None
    ) -> torch.Tensor:
        """News as the decoder is told them: less where both warped neighbours agree, see `news_threshold`."""
        if self.config.news_threshold:
            difference = _warps_difference(frames, at_scales[-2], self.downsample_factor // 2, origin)
            news = news * (difference / (difference + self.config.news_threshold))
        return news.to(self.dtype)

    def _offsets_at_scales(
        self, hints_prev: torch.Tensor, hints_next: torch.Tensor, size: tuple[int, int], scales: Sequence[int]
    ) -> list[torch.Tensor]:
        """Offsets of hints to both neighbours, `(B, 4, U, V)` float32, at so many halvings of a frame's `size`, in pixels there."""
        told = torch.cat([self.hint_layout.offsets(each) for each in (hints_prev, hints_next)]).float()
        found = []
        for scale in scales:
            resized = self.resize_hints(told, (size[0] // 2**scale, size[1] // 2**scale))
            if resized.shape[-1] < told.shape[-1]:  # a mean of means of equal cells is their mean
                told = resized
            found.append(torch.cat(halves(resized), dim=1))
        return found

    def _hint_pyramid(
        self,
        hints_prev: torch.Tensor,
        hints_next: torch.Tensor,
        features: Sequence[torch.Tensor],
        size: tuple[int, int],
    ) -> list[torch.Tensor]:
        """What each scale of the decoder sees of the hints, `(2B, K, U, V)` in the layout of its features; `size` is that of the frame that is
        decoded, of which the features may be of a larger part."""
        strides = [self.config.stem_stride * 2**i for i in range(len(features))]
        sizes = [(size[0] // stride, size[1] // stride) for stride in strides]
        # Each side is averaged before both are put together and into the features' layout: hints of full size are the largest tensors here.
        pooled = [hints_prev, hints_next]
        if self.hint_encoder is None:
            pyramid = []
            for feature, scale in zip(features, sizes):
                if scale[-1] <= pooled[0].shape[-1]:  # a mean of means of equal cells is their mean
                    resized = pooled = [self.resize_hints(each, scale) for each in pooled]
                else:
                    resized = [self.resize_hints(each, scale) for each in (hints_prev, hints_next)]
                pyramid.append(laid_out_as(feature, torch.cat(resized)))
            return pyramid
        whole = torch.cat([self.resize_hints(each, size) for each in pooled])
        pyramid = self.hint_encoder(laid_out_as(features[0], whole.to(self.dtype)))
        if not self.config.offset_hints:
            return pyramid
        offsets = [self.resize_hints(self.hint_layout.offsets(whole), scale) for scale in sizes]
        return [torch.cat([found.float(), each], dim=1) for found, each in zip(pyramid, offsets)]

    def resize_hints(self, hints: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Hints `(B, K, H, W)`, or their offsets alone, averaged to a smaller `size` or interpolated to a larger one; offsets are in
        pixels of that size then."""
        if hints.shape[-1] > size[1]:
            ratio = (hints.shape[-2] // size[0], hints.shape[-1] // size[1])
            # What is half-way between two pixels and two rows is their mean, found three times as fast.
            if tuple(hints.shape[-2:]) == (2 * size[0], 2 * size[1]):
                resized = F.interpolate(hints, size=tuple(size), mode="bilinear", align_corners=False)
            else:
                resized = F.avg_pool2d(hints, ratio)
            scales = (1 / ratio[1], 1 / ratio[0])
        elif hints.shape[-1] < size[1]:
            resized = F.interpolate(hints, size=tuple(size), mode="bilinear", align_corners=False)
            scales = (size[1] / hints.shape[-1], size[0] / hints.shape[-2])
        else:
            return hints
        return self.hint_layout.with_scaled_offsets(resized, scales)

    def forward(
        self,
        sample: torch.Tensor,
        frame_prev: torch.Tensor,
        frame_next: torch.Tensor,
        hints_prev: torch.Tensor,
        hints_next: torch.Tensor,
        latent_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        time: float | torch.Tensor = 0.5,
    ) -> VQMAGANDecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Encode the middle frame and decode it again beside its neighbours.

        Args:
            sample, frame_prev, frame_next (`torch.Tensor` of shape `(B, 3, H, W)`): frames in `[-1, 1]`.
            hints_prev, hints_next (`torch.Tensor` of shape `(B, hint_channels, H, W)`): motion hints.
            latent_noise (`torch.Tensor`, *optional*): added to the latents in units of their standard deviation over
                the batch, before they are quantized.
            time (`float` or `torch.Tensor` of shape `(B,)`): see `decode`.
        """
        batch = sample.shape[0]
        if self.config.news_latents:
            features = self.encode(torch.cat([frame_prev, frame_next])).features
            features_prev, features_next = (features.map(lambda each: halves(each)[side]) for side in (0, 1))
            latents = self.encode_news(sample, features_prev, features_next, hints_prev, hints_next, time)
            deviation: float | torch.Tensor = 1.0
        else:
            encoded = self.encode(torch.cat([sample, frame_prev, frame_next]))
            latents = encoded.latents[:batch]
            features_prev = encoded.features.map(lambda each: each[batch : 2 * batch])
            features_next = encoded.features.map(lambda each: each[2 * batch :])
            deviation = latents.detach().std()
        noisy = latents if latent_noise is None else latents + latent_noise * deviation
        decoded = self.decode(noisy, features_prev, features_next, hints_prev, hints_next, time=time)
        if not return_dict:
            return decoded.sample, decoded.commit_loss
        decoded["latents"] = latents
        return decoded
