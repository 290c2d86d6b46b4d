# SPDX-License-Identifier: Apache-2.0
"""Frames in and out: frames are checked, converted and padded for the pipeline; results are cropped and converted."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from einops import rearrange


FrameInput = (
    PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
)
OUTPUT_TYPES = ("pil", "np", "pt")


class FrameProcessor:
    """Converts between what users hold and the pipeline's tensors.

    Args:
        multiple (`int`): heights and widths are padded to multiples of this.
    """

    def __init__(self, multiple: int):
        self.multiple = multiple

    def to_tensor(self, frames: FrameInput, name: str) -> torch.Tensor:
        """Frames as one `(B, 3, H, W)` float32 tensor in [-1, 1].

        Args:
            frames: a PIL image that `rgb_of_image` takes; a numpy array `(H, W, 3)` or `(B, H, W, 3)`, uint8, or float in [0, 1]; a tensor
                `(3, H, W)` or `(B, 3, H, W)`, uint8, or float in [0, 1]; or a list of any one of these.
            name: what the errors call it.

        Raises:
            TypeError: for any other type.
            ValueError: for any other shape or range, frames of different sizes, or an empty list.
        """
        items: list[PIL.Image.Image | np.ndarray | torch.Tensor] = (
            [*frames] if isinstance(frames, (list, tuple)) else [frames]
        )
        if not items:
            raise ValueError(f"`{name}` must hold at least one frame, but is an empty list.")
        tensors = [self._one_to_tensor(item, name) for item in items]
        sizes = {tuple(tensor.shape[-2:]) for tensor in tensors}
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise ValueError(f"`{name}` must hold frames of one size, but holds {listed} (width x height).")
        # One layout, whatever came in: convolutions round differently in each.
        together = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return together.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _one_to_tensor(frame: PIL.Image.Image | np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
        if isinstance(frame, PIL.Image.Image):
            frame = rgb_of_image(frame, f"`{name}`")
        if isinstance(frame, np.ndarray):
            if frame.ndim not in (3, 4) or frame.shape[-1] != 3:
                raise ValueError(
                    f"`{name}` as a numpy array must have shape (H, W, 3) or (B, H, W, 3), but has {frame.shape}."
                )
            if frame.dtype != np.uint8 and not np.issubdtype(frame.dtype, np.floating):
                raise ValueError(f"`{name}` must be uint8 or floating point, but is {frame.dtype}.")
            # Torch knows neither numbers of the other byte order nor long ones.
            known = frame if frame.dtype == np.uint8 else frame.astype(np.float32, copy=False)
            tensor = rearrange(torch.from_numpy(np.require(known, requirements=["C", "W"])), "... h w c -> ... c h w")
        elif isinstance(frame, torch.Tensor):
            if frame.ndim not in (3, 4) or frame.shape[-3] != 3:
                raise ValueError(
                    f"`{name}` as a tensor must have shape (3, H, W) or (B, 3, H, W), but has {tuple(frame.shape)}."
                )
            tensor = frame
        else:
            raise TypeError(
                f"`{name}` must be a PIL image, a numpy array, a tensor, or a list of these, but holds a "
                f"{type(frame).__name__}."
            )
        tensor = tensor if tensor.ndim == 4 else tensor[None]
        if 0 in tensor.shape:
            raise ValueError(f"`{name}` must not be empty, but has shape {tuple(tensor.shape)}.")
        if tensor.dtype == torch.uint8:
            return tensor.float().div_(127.5).sub_(1)
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be uint8 or floating point, but is {tensor.dtype}.")
        tensor = tensor.float()
        low, high = tensor.min().item(), tensor.max().item()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"`{name}` as floating point must lie in [0, 1], but lies in [{low:.9g}, {high:.9g}].")
        return tensor * 2 - 1

    def pad(self, frames: torch.Tensor) -> torch.Tensor:
        """Repeat the last row and column until height and width are multiples of `multiple`."""
        height, width = frames.shape[-2:]
        added = (0, -width % self.multiple, 0, -height % self.multiple)
        return F.pad(frames, added, mode="replicate") if any(added) else frames

    def crop(self, frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Undo `pad`: the upper left `(height, width)`."""
        return frames[..., : size[0], : size[1]]

    def postprocess(
        self, frames: torch.Tensor, output_type: str
    ) -> torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]:
        """Frames `(B, F, 3, H, W)` in [-1, 1] as `"pt"` `(B, F, 3, H, W)` or `"np"` `(B, F, H, W, 3)`, both float32 in
        [0, 1], or as `"pil"`, a list of F images for each of B."""
        frames = (frames.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return frames
        array = rearrange(frames, "b f c h w -> b f h w c").cpu().numpy()
        if output_type == "np":
            return array
        return [[PIL.Image.fromarray(to_uint8(frame)) for frame in pair] for pair in array]


def to_uint8(image: np.ndarray) -> np.ndarray:
    """An image of uint8, or of floating point in [0, 1], as uint8; values are rounded to the nearest, halves to even."""
    return image if image.dtype == np.uint8 else np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def rgb_of_image(image: PIL.Image.Image, name: str = "an image") -> np.ndarray:
    """A PIL image of any mode as RGB `(H, W, 3)`: uint8, or float32 in [0, 1] where it has more than 8 bits of grey.

    Modes with more bits are I;16 and I, whose values are 16 bits, in [0, 65535], as files have them, and F, with values in [0, 1].
    Transparent pixels are shown on black, since the colours under them were never meant to be seen.

    Args:
        name: what the errors call it.

    Raises:
        ValueError: for values out of a mode's range.
    """
    if image.mode[0] not in "IF":
        transparent = rgba_of_transparent(image)
        if transparent is not None:
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "black"), transparent)
        return np.array(image.convert("RGB"))
    grey, most = np.array(image), 1 if image.mode == "F" else 65535
    low, high = (grey.min(), grey.max()) if grey.size else (0, 0)
    if not (low >= 0 and high <= most):  # also catches NaN
        raise ValueError(
            f"{name} as a PIL image of mode {image.mode} must lie in [0, {most}], but lies in [{low:.6g}, {high:.6g}]."
        )
    return np.repeat((grey / np.float32(most)).astype(np.float32)[..., None], 3, axis=-1)


def rgba_of_transparent(image: PIL.Image.Image) -> PIL.Image.Image | None:
    """A PIL image as RGBA, if something in it is not opaque; else None."""
    if not image.has_transparency_data or image.mode[0] in "IF":
        return None
    image = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
    return image if np.asarray(image.getchannel("A")).min() < 255 else None


def check_same_size(prev: Sequence[int], next_: Sequence[int], names: Sequence[str]) -> None:
    """
    Args:
        prev, next_: number, height and width `(B, H, W)` of two batches of frames.
        names: what the errors call them.

    Raises:
        ValueError: if the batches hold different numbers of frames, or frames of different sizes.
    """
    if prev[0] != next_[0]:
        raise ValueError(f"`{names[0]}` and `{names[1]}` must hold as many frames, but hold {prev[0]} and {next_[0]}.")
    if tuple(prev[1:]) != tuple(next_[1:]):
        sizes = [f"{width}x{height}" for _, height, width in (prev, next_)]
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have the same size, but are {sizes[0]} and {sizes[1]} (width x height)."
        )
