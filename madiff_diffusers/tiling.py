# SPDX-License-Identifier: Apache-2.0
"""Networks on overlapping tiles of a frame, blended: less memory for large frames."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


Span = tuple[int, int]

# Of a tile of so many pixels, all tensors of the networks that ship are smaller than 32 MiB, float32: what the C library keeps of
# freed memory. Larger tiles take longer.
TILE_PIXELS = 480_000

LEAST_OVERLAP = 64  # Pixels, or half of a tile: what a decoder sees around a place.


class Tile(NamedTuple):
    """Rows and columns of a part of a frame, in pixels: from the first to the one after the last."""

    top: int
    bottom: int
    left: int
    right: int

    def cut_out(self, image: torch.Tensor, height: int) -> torch.Tensor:
        """This part of an image of a frame so high, which may be a whole number of times smaller than the frame; a view."""
        scale = height // image.shape[-2]
        return image[..., self.top // scale : self.bottom // scale, self.left // scale : self.right // scale]

    def widened(self, reach: float, multiple: int, height: int, width: int) -> "Tile":
        """This part and what lies around it as far as `reach` pixels, up to multiples and the borders of the frame; but no farther than the part
        is long, since a single wrong pixel of flow may reach anywhere."""
        reach = min(reach, max(self.bottom - self.top, self.right - self.left))
        margin = math.ceil(reach / multiple) * multiple
        return Tile(
            max(0, self.top - margin),
            min(height, self.bottom + margin),
            max(0, self.left - margin),
            min(width, self.right + margin),
        )


class Tiling:
    """
    Calls functions of images tile by tile.

    Args:
        pixels (`int`): most pixels of a tile; no tile is smaller than four times `multiple` in either direction, however few they are.
        multiple (`int`): tile origins and sizes are multiples of this many pixels, and frames are padded to such sizes.
    """

    def __init__(self, pixels: int, multiple: int):
        self.pixels, self.multiple = pixels, multiple

    def tiles(self, height: int, width: int) -> tuple[list[Span], list[Span]]:
        """First and last rows and columns of tiles, which overlap by an eighth of their side, 64 pixels at least: of all such ways to cut a frame, the one
        whose tiles have the fewest pixels together, and of those the one with the fewest tiles."""
        if height * width <= self.pixels:
            return [(0, height)], [(0, width)]
        ways: list[tuple[int, int, list[Span], list[Span]]] = []
        for side in range(4 * self.multiple, max(height, 4 * self.multiple) + self.multiple, self.multiple):
            rows = self._spans(height, side)
            tallest = _longest(rows)
            columns = self._spans(width, self._side(self.pixels // tallest))
            covered, count = tallest * _longest(columns), len(rows) * len(columns)
            if covered <= self.pixels or not ways:  # the least tiles, at any rate
                ways.append((covered * count, count, rows, columns))
        return min(ways)[2:]

    def _side(self, pixels: int) -> int:
        return max(4 * self.multiple, pixels // self.multiple * self.multiple)

    def _spans(self, length: int, side: int) -> list[Span]:
        """The fewest spans of at most `side` that cover a length, as short as they can be."""
        if length <= side:
            return [(0, length)]
        overlap = max(1, side // 8 // self.multiple, min(LEAST_OVERLAP, side // 2) // self.multiple) * self.multiple
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
    ) -> list[torch.Tensor]:
        """
        What a function makes of images, tile by tile.

        Args:
            function: takes the [`Tile`] and as many `(B, C, h, w)`, which are cut out of `images`, and returns tensors of this kind,
                each of the tile's size divided by a whole number, at most `multiple`.
            images: tensors of the whole frame.
            height, width: size of the frame, multiples of `multiple`.
        """
        rows, columns = self.tiles(height, width)
        if len(rows) == len(columns) == 1:
            return list(function(Tile(0, height, 0, width), *images))
        row_weights, column_weights = _weights(height, rows), _weights(width, columns)
        whole: list[torch.Tensor] = []
        for (top, bottom), row_weight in zip(rows, row_weights):
            for (left, right), column_weight in zip(columns, column_weights):
                tile = Tile(top, bottom, left, right)
                made = function(tile, *(tile.cut_out(image, height) for image in images))
                for number, part in enumerate(made):
                    scale = (bottom - top) // part.shape[-2]
                    if number == len(whole):
                        empty = part.new_zeros((*part.shape[:-2], height // scale, width // scale))
                        last = part.shape[1] > 1 and part.is_contiguous(memory_format=torch.channels_last)
                        whole.append(empty.to(memory_format=torch.channels_last) if last else empty)
                    weight = torch.outer(_reduced(row_weight, scale), _reduced(column_weight, scale)).to(part)
                    whole[number][..., top // scale : bottom // scale, left // scale : right // scale] += part * weight
        return whole


def _longest(spans: Sequence[Span]) -> int:
    return max(end - start for start, end in spans)


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
