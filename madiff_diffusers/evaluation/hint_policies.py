"""Hints that no checkpoint uses, to compare with: none at all, what the two neighbours tell without an instant or a guess, and what the
true frame tells."""

import torch

from ..motion_hints import EventHints, HintPair, HintSource, StackedHints, goes_on


# `neighbours`: what the two neighbours tell, all along; `none`: zeros; `true`: what the true frame tells in the place of a guess.
ABLATION_POLICIES = ("neighbours", "none", "true")


class NeighbourHints:
    """A source whose every answer is what another one makes of the two neighbours alone: events from the previous frame to the next,
    flow half-way.

    Args:
        source: the other one.
    """

    def __init__(self, source: HintSource):
        self.source, self.hint_channels = source, source.hint_channels

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        return from_neighbours(self.source, frame_prev, frame_next)

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return from_neighbours(self.source, frame_prev, frame_next)


class TrueHints:
    """A source whose answer is what another one makes of the true frame.

    Args:
        source: the other one.
        frame_mid: the true frame, `(B, 3, H, W)` in [-1, 1].
    """

    def __init__(self, source: HintSource, frame_mid: torch.Tensor):
        self.source, self.frame_mid, self.hint_channels = source, frame_mid, source.hint_channels

    def start(self, frame_prev: torch.Tensor, frame_next: torch.Tensor, time: float = 0.5) -> HintPair:
        known = (self.source.start(frame_prev, frame_next, time),) if goes_on(self.source) else ()
        return self.source.from_guess(frame_prev, self.frame_mid, frame_next, *known)

    def from_guess(self, frame_prev: torch.Tensor, frame_mid: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
        return self.start(frame_prev, frame_next)


def from_neighbours(source: HintSource, frame_prev: torch.Tensor, frame_next: torch.Tensor) -> HintPair:
    """What a hint source makes of two neighbours `(B, 3, H, W)` in [-1, 1], without a guess of a frame between them."""
    if isinstance(source, StackedHints):
        sides = zip(*(from_neighbours(part, frame_prev, frame_next) for part in source.sources))
        hints_prev, hints_next = (torch.cat(side, dim=1) for side in sides)
        return hints_prev, hints_next
    if isinstance(source, EventHints):
        return source.events((frame_prev, frame_prev), (frame_next, frame_next))
    return source.start(frame_prev, frame_next)
