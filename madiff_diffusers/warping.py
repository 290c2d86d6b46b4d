# SPDX-License-Identifier: Apache-2.0
"""Features and frames moved along offsets, compared with each other pixel by pixel, and averaged around each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


Origin = (
    tuple[int, int] | None
)  # row and column of a part's first pixel in what it is a part of; None: it is all of it

LEAST_ROW = 16  # channels, from which `warp` reads rows of them


def part_of(image: torch.Tensor, size: Sequence[int], origin: Origin) -> torch.Tensor:
    """The part of an image `(B, C, H, W)` that begins at `origin` and has a height and width of `size`."""
    if origin is None:
        return image
    return image[..., origin[0] : origin[0] + size[0], origin[1] : origin[1] + size[1]]


def warp(image: torch.Tensor, offsets: torch.Tensor, origin: Origin = None, cubic: bool = False) -> torch.Tensor:
    """Backward warp: `out(p) = image(origin + p + offsets(p))`.

    Convention: `image` is `(B, C, H, W)`; `offsets` is `(B, 2, H, W)`, (x, y) in pixels, x to the right and y down; or with an
    `origin`, of a part of the image. Bilinear, or `cubic` (sixteen pixels in the place of four, which blur less: Keys, "Cubic convolution
    interpolation", 1981, with a slope of -0.75), border padding, pixel centres at half-integers (`align_corners=False`). Coordinates are
    computed in float32 whatever the dtype of `image`, since half precision cannot address pixels of a large frame.
    """
    height, width = image.shape[-2:]
    top, left = (0, 0) if origin is None else origin
    if not cubic and _gathers_rows(image):
        return _warp_by_rows(image, offsets, top, left)
    x = torch.arange(offsets.shape[-1], device=image.device, dtype=torch.float32) + (left + 0.5)
    y = torch.arange(offsets.shape[-2], device=image.device, dtype=torch.float32) + (top + 0.5)
    offsets = offsets.float()
    # Clamped to the outermost pixel centres, which is border padding on every device (MPS lacks the mode).
    at_x, at_y = (x + offsets[:, 0]).clamp_(0.5, width - 0.5), (y[:, None] + offsets[:, 1]).clamp_(0.5, height - 0.5)
    if cubic and image.device.type == "mps":
        return laid_out_as(image, _cubic_by_pixels(image.float(), at_x - 0.5, at_y - 0.5).to(image.dtype))
    # Planes of x and y are read faster than pairs of them.
    grid = torch.stack([at_x.mul_(2 / width).sub_(1), at_y.mul_(2 / height).sub_(1)], dim=1).permute(0, 2, 3, 1)
    # Of sixteen pixels, some lie outside where the place itself does not.
    mode, padding = ("bicubic", "border") if cubic else ("bilinear", "zeros")
    warped = F.grid_sample(image.float(), grid, mode=mode, padding_mode=padding, align_corners=False)
    return laid_out_as(image, warped.to(image.dtype))


def _cubic_by_pixels(image: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cubic samples of an image at places `(B, h, w)`, in pixels from the first one's centre, pixel by pixel of the sixteen: for devices
    whose `grid_sample` may have no such mode (MPS)."""
    height, width = image.shape[-2:]
    pixels, sampled = image.flatten(2), image.new_zeros(image.shape[0], image.shape[1], *x.shape[-2:])
    for row in range(-1, 3):
        at_y = y.floor() + row
        for column in range(-1, 3):
            at_x = x.floor() + column
            number = at_y.clamp(0, height - 1).long() * width + at_x.clamp(0, width - 1).long()
            found = pixels.gather(2, number.flatten(1)[:, None].expand(-1, image.shape[1], -1)).view_as(sampled)
            sampled = sampled + (_cubic_weight(y - at_y) * _cubic_weight(x - at_x))[:, None] * found
    return sampled


def _cubic_weight(distance: torch.Tensor, slope: float = -0.75) -> torch.Tensor:
    """Share of a pixel that is so far away, up to 2 pixels, in a cubic sample."""
    away = distance.abs()
    near = ((slope + 2) * away - (slope + 3)) * away**2 + 1
    far = ((away - 5) * away + 8) * (slope * away) - 4 * slope
    return torch.where(away <= 1, near, far)


def _gathers_rows(image: torch.Tensor) -> bool:
    """Whether `_warp_by_rows` is the faster one: for many channels that lie side by side, on a CPU, where no gradient is wanted."""
    return (
        image.device.type == "cpu"
        and image.dtype in (torch.float32, torch.bfloat16)
        and image.shape[1] >= LEAST_ROW
        and min(image.shape[-2:]) > 1
        and image.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _warp_by_rows(image: torch.Tensor, offsets: torch.Tensor, top: int, left: int) -> torch.Tensor:
    """`warp` of a channels-last image as weighted sums of its pixels' rows of channels, which `embedding_bag` reads many times as fast as
    `grid_sample` does each channel on its own, and leaves in the same layout."""
    batch, channels, height, width = image.shape
    offsets = offsets.float()
    x = (torch.arange(offsets.shape[-1], dtype=torch.float32) + left + offsets[:, 0]).clamp_(0, width - 1)
    y = (torch.arange(offsets.shape[-2], dtype=torch.float32)[:, None] + top + offsets[:, 1]).clamp_(0, height - 1)
    # An offset that is no number reads some row, with shares that are none: so is what comes out, as in `grid_sample`.
    column, row = (each.floor().clamp_(max=most - 2).nan_to_num_() for each, most in ((x, width), (y, height)))
    right, below = x.sub_(column), y.sub_(row)
    # 32 bits number the pixels of all that memory holds, and are read in half of the time of 64.
    begins = height * width * torch.arange(batch, dtype=torch.int32).view(-1, 1, 1)
    first = row.int().mul_(width).add_(column.int()).add_(begins)
    corners = torch.stack([first, first + 1, first + width, first + width + 1], dim=-1)
    of_both = right * below
    of_right, of_below = right - of_both, below - of_both
    shares = torch.stack([1 - right - of_below, of_right, of_below, of_both], dim=-1)
    rows = image.permute(0, 2, 3, 1).reshape(-1, channels)
    warped = F.embedding_bag(
        corners.view(-1, 4), rows, per_sample_weights=shares.view(-1, 4).to(image.dtype), mode="sum"
    )
    return warped.view(batch, *offsets.shape[-2:], channels).permute(0, 3, 1, 2)


def correlate(first: torch.Tensor, second: torch.Tensor, reach: int) -> torch.Tensor:
    """Local correlation: the mean product of features `(B, C, U, V)` at each pixel of `first` and at every pixel of `second` within
    `reach` of it, row by row, `(B, (2 * reach + 1)², U, V)`; zeros lie outside."""
    batch, channels, height, width = first.shape
    side = 2 * reach + 1
    padded = F.pad(second, (reach, reach, reach, reach))
    if torch.is_grad_enabled() and second.requires_grad:
        # Rows times rows, of which a band is kept: more products than are needed, but four times as fast with its gradient.
        rows, others = first.permute(0, 2, 3, 1), padded.permute(0, 2, 1, 3)
        bands = []
        for y in range(side):
            products = (rows @ others[:, y : y + height]).flatten(2)  # [B,U,V*(V+2*reach)]
            # In rows that are one longer, the band's diagonals are columns.
            bands.append(F.pad(products, (0, width)).view(batch, height, width, -1)[..., :side])
        return torch.cat(bands, dim=-1).permute(0, 3, 1, 2) / channels
    shifted = [padded[:, :, y : y + height, x : x + width] for y in range(side) for x in range(side)]
    return torch.cat([(first * each).mean(dim=1, keepdim=True) for each in shifted], dim=1)


def window_mean(images: torch.Tensor, radius: int) -> torch.Tensor:
    """Means of windows of `2 * radius + 1` pixels a side; borders are continued. By sums of sums, several times as fast as pooling."""
    side = 2 * radius + 1
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    return _sums(_sums(padded, side, -2), side, -1) / side**2


def _sums(images: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Sums of so many neighbours along a dimension."""
    length = images.shape[dim] - count + 1
    total, at = None, 0
    power, summed = 1, images  # sums of so many
    while True:
        if count & power:
            part = summed.narrow(dim, at, length)
            total, at = part if total is None else total + part, at + power
        if 2 * power > count:
            assert total is not None
            return total
        kept = summed.shape[dim] - power
        summed = summed.narrow(dim, 0, kept) + summed.narrow(dim, power, kept)
        power *= 2


def halves(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of a batch `(2B, …)`, as views. Unlike `chunk`, it does not tie a compiled or exported network to one batch size."""
    half = tensor.shape[0] // 2
    return tensor[:half], tensor[half:]


def joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two tensors `(B, …)` in one batch `(2B, …)`. What lies one behind the other, as `halves` do, is not copied on a CPU where no gradient is
    wanted; so nothing may be written into what this gives."""
    if (
        first.device.type == "cpu"
        and (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and second.storage_offset() - first.storage_offset() == first.shape[0] * first.stride(0)
        and second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    ):
        return first.as_strided((2 * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat([first, second])


def laid_out_as(other: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in another's memory layout: convolutions are up to twice as fast in channels-last, and slow where layouts meet."""
    is_last = other.stride(1) == 1 and other.shape[1] > 1
    return tensor.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
