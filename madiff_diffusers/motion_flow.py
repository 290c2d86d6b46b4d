# SPDX-License-Identifier: Apache-2.0
"""Networks that find motion: a small one that is trained with the rest of a checkpoint, and RIFE's, as an example of another.

Both answer the same two questions, so that either can be a pipeline's `hint_model`: `forward`, how pixels of an instant between two
frames move to both of them, and `refine`, the same once there is a guess of the frame of that instant.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from .components import CheckpointComponent
from .warping import correlate, halves, warp


FlowPair = tuple[torch.Tensor, torch.Tensor]


def _resize_flow(flow: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Flow `(B, 2n, h, w)` at another size, in pixels of that size."""
    if tuple(flow.shape[-2:]) == tuple(size):
        return flow
    resized = F.interpolate(flow, size=tuple(size), mode="bilinear", align_corners=False).unflatten(1, (-1, 2))
    # By numbers, since a tensor of them would have to be copied to a GPU.
    x, y = resized[:, :, 0] * (size[1] / flow.shape[-1]), resized[:, :, 1] * (size[0] / flow.shape[-2])
    return torch.stack([x, y], dim=2).flatten(1, 2)


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.LeakyReLU(0.1))


class FlowLevel(nn.Module):
    """Correction of a flow at one scale, from features warped along it and their local correlation.

    Args:
        in_channels: of everything that it sees together.
        channels: of its layers.
        flow_channels: of the flow, 2 for each neighbour.
    """

    def __init__(self, in_channels: int, channels: int, flow_channels: int):
        super().__init__()
        self.conv_in = _conv(in_channels, channels)
        self.layers = nn.Sequential(_conv(channels, channels), _conv(channels, channels), _conv(channels, channels))
        self.conv_out = nn.Conv2d(channels, flow_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, *seen: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(torch.cat(seen, dim=1))
        return self.conv_out(hidden_states + self.layers(hidden_states)).float()


class MotionHintModel(CheckpointComponent, ModelMixin, ConfigMixin):
    r"""
    Learned motion hints: backward flow from an instant to both neighbours, coarse to fine.

    Every frame becomes a pyramid of features at strides 2, 4, 8, …. From the coarsest stride to stride 4, the neighbours' features
    are warped along the flow so far, compared (features, and their correlation in a window), and the flow is corrected. What
    it says of a guess starts from flow that is known already and compares the guess's features with each neighbour's.

    Args:
        channels (`tuple` of `int`): of the features at strides 2, 4, 8, …, two strides at the least.
        start_channels, refine_channels (`tuple` of `int`): of the layers that correct flow, at strides 4, 8, …. Strides of equal
            widths throughout share theirs.
        match_channels (`int`): of the features that are correlated.
        reach (`tuple` of `int`): half-widths of the correlation's window at strides 4, 8, …, in pixels of that scale.
        start_scale (`int`): how many times smaller the frames are seen first; what is found there is where the flow between the frames
            themselves starts, so that motion is found that is as many times larger. 1: they are seen once.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64, 96, 96),
        start_channels: tuple[int, ...] = (32, 64, 96, 96),
        refine_channels: tuple[int, ...] = (24, 40, 64, 64),
        match_channels: int = 24,
        reach: tuple[int, ...] = (2, 3, 4, 4),
        start_scale: int = 1,
    ):
        super().__init__()
        if start_scale < 1:
            raise ValueError(f"`start_scale` must be 1 or more, but is {start_scale}.")
        count = len(channels) - 1
        if count < 1 or not len(start_channels) == len(refine_channels) == len(reach) == count:
            raise ValueError(
                f"`start_channels`, `refine_channels` and `reach` must have one value less than `channels`, {count}, "
                f"but have {len(start_channels)}, {len(refine_channels)} and {len(reach)}."
            )
        self.pyramid = nn.ModuleList()
        for number, (before, width) in enumerate(zip((3, *channels[:-1]), channels)):
            block = [_conv(before, width, stride=2)] + ([_conv(width, width)] if number >= 2 else [])
            self.pyramid.append(nn.Sequential(*block))
        self.match = nn.ModuleList(nn.Conv2d(width, match_channels, 1) for width in channels[1:])
        self.start_levels, self.refine_levels = nn.ModuleList(), nn.ModuleList()
        self.level_of_scale = []
        for number, width in enumerate(channels[1:]):
            window = (2 * reach[number] + 1) ** 2
            same = number > 0 and all(
                each[number] == each[number - 1] for each in (channels[1:], start_channels, refine_channels, reach)
            )
            self.level_of_scale.append(len(self.start_levels) - same)
            if same:
                continue
            # Both neighbours' features, their correlation, flow, instant; and a guess's, one neighbour's, theirs, flow.
            self.start_levels.append(FlowLevel(2 * width + window + 5, start_channels[number], 4))
            self.refine_levels.append(FlowLevel(2 * width + window + 2, refine_channels[number], 2))

    @property
    def multiple(self) -> int:
        """Frames whose sizes are multiples of this are not padded at any scale."""
        return self._coarsest_stride * self.config.start_scale

    @property
    def _coarsest_stride(self) -> int:
        return 2 ** len(self.config.channels)

    def features(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features of frames `(B, 3, H, W)` in [-1, 1], at strides 4, 8, …; sizes are padded to multiples of the coarsest."""
        multiple = self._coarsest_stride
        padding = (0, -frames.shape[-1] % multiple, 0, -frames.shape[-2] % multiple)
        hidden_states = frames.to(self.dtype)
        if any(padding):
            hidden_states = F.pad(hidden_states, padding, mode="replicate")
        pyramid = []
        for block in self.pyramid:
            hidden_states = block(hidden_states)
            pyramid.append(hidden_states)
        return tuple(pyramid[1:])

    def forward(
        self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float | torch.Tensor = 0.5
    ) -> FlowPair:
        """
        Args:
            frame_prev, frame_next (`torch.Tensor` of shape `(B, 3, H, W)`): neighbours, in [-1, 1].
            time (`float` or `torch.Tensor` of shape `(B,)`): the instant, in (0, 1).

        Returns:
            Flow from the instant to the previous frame and to the next, each `(B, 2, H, W)` float32, (x, y) in pixels.
        """
        return self.starts(frame_prev, frame_next, time)[-1]

    def starts(
        self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float | torch.Tensor
    ) -> tuple[FlowPair, ...]:
        """`estimates` of the frames at `start_scale`, where that is another, and then of the frames themselves; arguments as for `forward`."""
        found: tuple[FlowPair, ...] = ()
        flow = None
        for scale in sorted({1, self.config.start_scale}, reverse=True):
            seen = torch.cat([frame_prev, frame_next])
            height, width = seen.shape[-2:]
            if scale > 1:
                seen = F.pad(seen, (0, -width % scale, 0, -height % scale), mode="replicate")
                seen = F.avg_pool2d(seen, scale)
            features = [halves(each) for each in self.features(seen)]
            prev, next_ = zip(*features)
            found += self.estimates(prev, next_, seen.shape[-2:], time, flow)
            size = [scale * side for side in seen.shape[-2:]]  # of the frames, continued to multiples of the scale
            flow = _resize_flow(torch.cat(found[-1], dim=1), size)[..., :height, :width]
        return found

    def estimates(
        self,
        prev: Sequence[torch.Tensor],
        next_: Sequence[torch.Tensor],
        size: Sequence[int],
        time: float | torch.Tensor,
        flow: torch.Tensor | None = None,
    ) -> tuple[FlowPair, ...]:
        """Flow of every scale from the coarsest, in its pixels, and last at a size in pixels; from both neighbours' features. `flow` to
        start from is `(B, 4, H, W)`."""
        batch = prev[0].shape[0]
        time = torch.as_tensor(time, dtype=torch.float32, device=prev[0].device).expand(batch).view(-1, 1, 1, 1)
        flow, found = self._at_coarsest(flow, prev, 4), []
        for number in reversed(range(len(prev))):
            height, width = prev[number].shape[-2:]
            flow = _resize_flow(flow, (height, width))
            warped_prev, warped_next = warp(prev[number], flow[:, :2]), warp(next_[number], flow[:, 2:])
            match = self.match[number]
            correlation = correlate(match(warped_prev), match(warped_next), self.config.reach[number])
            instant = (time - 0.5).expand(batch, 1, height, width)
            motion = torch.cat([0.25 * flow, instant], dim=1).to(warped_prev.dtype)
            flow = flow + self.start_levels[self.level_of_scale[number]](warped_prev, warped_next, correlation, motion)
            found.append((flow[:, :2], flow[:, 2:]))
        return (*found, self._at_size(flow, size))

    def refine(
        self,
        frame_prev: torch.Tensor,
        frame_mid: torch.Tensor,
        frame_next: torch.Tensor,
        hints: FlowPair | None = None,
    ) -> FlowPair:
        """
        Args:
            frame_prev, frame_mid, frame_next (`torch.Tensor` of shape `(B, 3, H, W)`): neighbours and a guess of the frame between.
            hints (pair of `torch.Tensor` of shape `(B, 2, H, W)`, *optional*): flow to start from.

        Returns:
            As `forward`.
        """
        flow = None if hints is None else torch.cat(hints)
        neighbours = self.features(torch.cat([frame_prev, frame_next]))
        return self.refined(neighbours, self.features(frame_mid), frame_mid.shape[-2:], flow)[-1]

    def refined(
        self,
        neighbours: Sequence[torch.Tensor],
        mid: Sequence[torch.Tensor],
        size: Sequence[int],
        flow: torch.Tensor | None = None,
    ) -> tuple[FlowPair, ...]:
        """As `estimates`, from the features of both neighbours in one batch, previous first, and of a guess. `flow` to start from
        is `(2B, 2, H, W)`."""
        flow = self._at_coarsest(flow, neighbours, 2)
        found = []
        for number in reversed(range(len(mid))):
            flow = _resize_flow(flow, mid[number].shape[-2:])
            warped, match = warp(neighbours[number], flow), self.match[number]
            guess = torch.cat([mid[number], mid[number]])
            correlation = correlate(match(guess), match(warped), self.config.reach[number])
            flow = flow + self.refine_levels[self.level_of_scale[number]](
                guess, warped, correlation, (0.25 * flow).to(warped.dtype)
            )
            found.append(halves(flow))
        return (*found, self._at_size(torch.cat(halves(flow), dim=1), size))

    @staticmethod
    def _at_coarsest(flow: torch.Tensor | None, features: Sequence[torch.Tensor], channels: int) -> torch.Tensor:
        """Flow of frames as flow at the coarsest scale of their features; zeros where there is none."""
        if flow is None:
            batch, _, height, width = features[-1].shape
            return features[-1].new_zeros(batch, channels, height, width, dtype=torch.float32)
        height, width = (side * 4 for side in features[0].shape[-2:])
        flow = F.pad(flow, (0, width - flow.shape[-1], 0, height - flow.shape[-2]), mode="replicate")
        stride = 2 ** (len(features) + 1)
        return F.avg_pool2d(flow, stride) / stride

    @staticmethod
    def _at_size(flow: torch.Tensor, size: Sequence[int]) -> FlowPair:
        """Flow at stride 4 of padded frames as flow of the frames."""
        flow = 4 * F.interpolate(flow, scale_factor=4.0, mode="bilinear", align_corners=False)
        flow = flow[..., : size[0], : size[1]]
        return flow[:, :2], flow[:, 2:]


class RIFEBlock(nn.Module):
    """Block of RIFE's flow network (IFBlock): flow and mask at stride 4 of what is given, a `scale` times smaller."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()

        def conv(before: int, width: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, width, 3, stride, padding=1), nn.PReLU(width))

        self.conv0 = nn.Sequential(conv(in_channels, channels // 2, 2), conv(channels // 2, channels, 2))
        self.convblock = nn.Sequential(*(conv(channels, channels) for _ in range(8)))
        self.lastconv = nn.ConvTranspose2d(channels, 5, 4, 2, 1)

    def forward(
        self, seen: torch.Tensor, flow: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = seen.shape[-2:]
        small = [max(round(side / scale), 1) for side in size]
        seen = F.interpolate(seen, size=small, mode="bilinear", align_corners=False)
        if flow is not None:
            flow = F.interpolate(flow, size=small, mode="bilinear", align_corners=False) / scale
            seen = torch.cat([seen, flow.to(seen.dtype)], dim=1)
        features = self.conv0(seen)
        output = self.lastconv(self.convblock(features) + features).float()
        output = F.interpolate(output, size=size, mode="bilinear", align_corners=False)
        return output[:, :4] * scale * 2, output[:, 4:]


class RIFEFlowModel(CheckpointComponent, ModelMixin, ConfigMixin):
    r"""
    The flow network of RIFE 4.0 (Huang et al., "Real-Time Intermediate Flow Estimation for Video Frame Interpolation", 2022), as
    a motion model for MADiff. Weights come from `madiff convert-rife`; they are MIT-licensed and not part of this package.

    Args:
        channels (`tuple` of `int`): of the four blocks.
        scales (`tuple` of `float`): how many times smaller each block sees the frames.
        adaptive (`bool`): see the frames twice as small where the first flow is of more than 32 pixels in each direction.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (192, 128, 96, 64),
        scales: tuple[float, ...] = (8, 4, 2, 1),
        adaptive: bool = True,
    ):
        super().__init__()
        for number, width in enumerate(channels):
            setattr(self, f"block{number}", RIFEBlock(7 if number == 0 else 12, width))

    def forward(
        self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float | torch.Tensor = 0.5
    ) -> FlowPair:
        """See [`MotionHintModel`]."""
        flow, _ = self.flow_and_mask(frame_prev, frame_next, time)
        return flow[:, :2], flow[:, 2:]

    def flow_and_mask(
        self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float | torch.Tensor = 0.5
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow to both neighbours, `(B, 4, H, W)` in pixels, and the logit of the previous frame's share, `(B, 1, H, W)`."""
        batch, _, height, width = frame_prev.shape
        multiple = 64 if self.config.adaptive else 32
        padding = (0, -width % multiple, 0, -height % multiple)
        prev, next_ = (F.pad((each.to(self.dtype) + 1) / 2, padding) for each in (frame_prev, frame_next))
        instant = (
            torch.as_tensor(time, dtype=self.dtype, device=prev.device)
            .expand(batch)
            .view(-1, 1, 1, 1)
            .expand_as(prev[:, :1])
        )
        scales = list(self.config.scales)
        flow, mask = self.block0(torch.cat([prev, next_, instant], dim=1), None, scales[0])
        for number in range(1, len(scales)):
            seen = torch.cat([warp(prev, flow[:, :2]), warp(next_, flow[:, 2:]), instant, mask.to(self.dtype)], dim=1)
            change, mask_change = getattr(self, f"block{number}")(seen, flow, scales[number])
            if number == 1 and self.config.adaptive:
                most = change.abs().unflatten(1, (2, 2)).amax(dim=(2, 3, 4))  # [B,2]
                wide = (most.amin(dim=1) > 32).cpu()
                if wide.any() and not wide.all():  # apart, so that a pair's flow is what it is without the others
                    order = torch.cat([wide.nonzero(), (~wide).nonzero()])[:, 0]
                    groups = [
                        self.flow_and_mask(frame_prev[rows], frame_next[rows], instant[rows, 0, 0, 0])
                        for rows in order.split([int(wide.sum()), int((~wide).sum())])
                    ]
                    flow, mask = (torch.cat(each)[order.argsort()] for each in zip(*groups))
                    return flow, mask
                if wide.all():
                    scales = [2 * scale for scale in scales]
                    flow, mask = self.block0(torch.cat([prev, next_, instant], dim=1), None, scales[0])
                    seen = torch.cat(
                        [warp(prev, flow[:, :2]), warp(next_, flow[:, 2:]), instant, mask.to(self.dtype)], dim=1
                    )
                    change, mask_change = self.block1(seen, flow, scales[1])
            flow, mask = flow + change, mask + mask_change
        return flow[..., :height, :width], mask[..., :height, :width]

    def refine(
        self,
        frame_prev: torch.Tensor,
        frame_mid: torch.Tensor,
        frame_next: torch.Tensor,
        hints: FlowPair | None = None,
    ) -> FlowPair:
        """See [`MotionHintModel`]."""
        return halves(self.flow_to(torch.cat([frame_mid, frame_mid]), torch.cat([frame_prev, frame_next])))

    def flow_to(self, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Flow `(B, 2, H, W)` from `frames` to `others`, in pixels.

        The network is asked half-way between them, where it is exact (an instant after `frames`, its flow is a fifth to a half too
        short). Twice that flow is the whole of what passes there, and is carried back to the pixels from which it set out.
        """
        passing = 2 * self(frames, others, 0.5)[1]
        flow = passing
        for _ in range(4):  # fixed-point iteration
            flow = warp(passing, flow / 2)
        return flow
