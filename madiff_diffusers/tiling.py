# SPDX-License-Identifier: Apache-2.0
"""Networks on overlapping tiles of a frame, blended: less memory for large frames."""

import math
from collections.abc import Callable, Sequence

import torch


Span = tuple[int, int]


class Tiling:
    """
    Calls functions of images tile by tile.

    Args:
        pixels (`int`): most pixels of a tile; no tile is smaller than four times `multiple` in either direction, however few they are.
        multiple (`int`): tile origins and sizes are multiples of this many pixels, and frames are padded to such sizes.
    """

    def __init__(self, pixels: int, multiple: int):
        self.pixels, self.multiple = pixels, multiple

    def tiles(self, height: int, width: int, margin: int = 0) -> tuple[list[Span], list[Span]]:
        """First and last rows and columns of tiles. Tiles overlap by an eighth of their side, and with a margin all around they have as
        many pixels as they may."""
        side = self._side(int(self.pixels**0.5) - 2 * margin)
        rows = self._spans(height, side)
        # What the height leaves over goes to the width.
        tallest = min(height, max(end - start for start, end in rows) + 2 * margin)
        return rows, self._spans(width, self._side(self.pixels // tallest - 2 * margin))

    def _side(self, pixels: int) -> int:
        return max(4 * self.multiple, pixels // self.multiple * self.multiple)

    def _spans(self, length: int, side: int) -> list[Span]:
        """The fewest spans of at most `side` that cover a length, as short as they can be."""
        if length <= side:
            return [(0, length)]
        overlap = max(1, side // 8 // self.multiple) * self.multiple
        count = -(-(length - overlap) // (side - overlap))
        side = -(-(length + (count - 1) * overlap) // (count * self.multiple)) * self.multiple
        starts = [number * (length - side) // (count - 1) // self.multiple * self.multiple for number in range(count)]
        return [*((start, start + side) for start in starts[:-1]), (starts[-1], length)]

    def __call__(
        self,
        function: Callable[..., Sequence[torch.Tensor]],
        images: Sequence[torch.Tensor],
        height: int,
        width: int,
        reach: float = 0.0,
    ) -> list[torch.Tensor]:
        """
        What a function makes of images, tile by tile.

        Args:
            function: takes as many `(B, C, h, w)` as there are `images`, and returns tensors of this kind, each of the frame's size
                divided by a whole number, at most `multiple`.
            images: tensors of the whole frame.
            height, width: size of the frame, multiples of `multiple`.
            reach: distance in pixels that a tile's result depends on; the function is given that much more all around.
        """
        margin = 0
        if height * width > self.pixels:
            # Not so much that the least tiles would have more pixels than they may.
            most = max(2 * self.multiple, (int(self.pixels**0.5) // self.multiple - 4) // 2 * self.multiple)
            margin = min(math.ceil(reach / self.multiple) * self.multiple, most)
        rows, columns = self.tiles(height, width, margin)
        if len(rows) == len(columns) == 1:
            return list(function(*images))
        row_weights, column_weights = _weights(height, rows), _weights(width, columns)
        whole: list[torch.Tensor] = []
        for (top, bottom), row_weight in zip(rows, row_weights):
            for (left, right), column_weight in zip(columns, column_weights):
                upper, lower = max(0, top - margin), min(height, bottom + margin)
                first, last = max(0, left - margin), min(width, right + margin)
                made = function(*(self._crop(image, height, upper, lower, first, last) for image in images))
                for number, part in enumerate(made):
                    scale = (lower - upper) // part.shape[-2]
                    rows_of_tile = slice((top - upper) // scale, (bottom - upper) // scale)
                    part = part[..., rows_of_tile, (left - first) // scale : (right - first) // scale]
                    if number == len(whole):
                        whole.append(part.new_zeros((*part.shape[:-2], height // scale, width // scale)))
                    weight = torch.outer(_reduced(row_weight, scale), _reduced(column_weight, scale)).to(part)
                    whole[number][..., top // scale : bottom // scale, left // scale : right // scale] += part * weight
        return whole

    @staticmethod
    def _crop(image: torch.Tensor, height: int, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        scale = height // image.shape[-2]
        part = image[..., top // scale : bottom // scale, left // scale : right // scale]
        return part.contiguous(memory_format=torch.channels_last) if part.shape[1] > 1 else part.contiguous()


def _weights(length: int, spans: Sequence[Span]) -> list[torch.Tensor]:
    """Weights of each span's pixels: 1, and down to 0 across what it shares with a neighbour. They add up to 1 everywhere."""
    weights = []
    for number, (start, end) in enumerate(spans):
        weight = torch.ones(end - start)
        if number > 0:
            shared = spans[number - 1][1] - start
            weight[:shared] *= (torch.arange(shared) + 0.5) / shared
        if number + 1 < len(spans):
            shared = end - spans[number + 1][0]
            weight[-shared:] *= 1 - (torch.arange(shared) + 0.5) / shared
        weights.append(weight)
    total = torch.zeros(length)
    for (start, end), weight in zip(spans, weights):
        total[start:end] += weight
    return [weight / total[start:end] for (start, end), weight in zip(spans, weights)]


def _reduced(weight: torch.Tensor, scale: int) -> torch.Tensor:
    return weight.view(-1, scale).mean(dim=1)
