# SPDX-License-Identifier: Apache-2.0
"""What VQ-MAGAN's decoder is given beside the latents: the neighbours' features, and motion hints of a known layout."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class FrameFeatures(NamedTuple):
    """
    What the encoder makes of a frame alone: computed once, it serves every decoding beside that frame.

    Args:
        frame (`(B, 3, H, W)`): the frame itself, in the dtype in which it was given.
        pyramid: one feature map per scale from the finest (stride `stem_stride`) to the coarsest (stride `f`).
    """

    frame: torch.Tensor
    pyramid: tuple[torch.Tensor, ...]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FrameFeatures":
        """What a function makes of the frame and of each feature map."""
        return FrameFeatures(function(self.frame), tuple(function(each) for each in self.pyramid))


class HintLayout(NamedTuple):
    """
    The channels of hints `(B, C, H, W)` towards one neighbour. With `has_offsets`, the last two are the offsets (x, y) from the middle
    frame to the neighbour, in pixels of the hints' own size: flow, which stands last in a stack of sources. All others are features of
    any kind, such as counts of events.

    Args:
        channels: C, of all parts together.
        has_offsets: whether the last two channels are offsets.
    """

    channels: int
    has_offsets: bool

    def offsets(self, hints: torch.Tensor) -> torch.Tensor:
        """`(B, 2, H, W)`: the offsets among the hints."""
        return hints[:, -2:]

    def with_scaled_offsets(self, hints: torch.Tensor, scales: tuple[float, float]) -> torch.Tensor:
        """Hints whose offsets, where they have them, are (x, y) times as long."""
        if not self.has_offsets:
            return hints
        # By numbers, since a tensor of them would have to be copied to a GPU.
        return torch.cat([hints[:, :-2], hints[:, -2:-1] * scales[0], hints[:, -1:] * scales[1]], dim=1)
