"""Converter for checkpoints of the original EventGAN (https://github.com/alexzzhu/EventGAN)."""

import os
import re
from pathlib import Path
from typing import Union

import torch

from .eventgan import EventGANModel


# (pattern of the original's parameter names, name here). The original's decoders and residual blocks may be wrapped in
# spectral norm, whose weight is stored as `module.weight_bar` beside its power iteration's vectors.
_RENAMES = (
    (r"^head\.conv2d\.", "conv_in.conv."),
    (r"^pred\.conv2d\.", "conv_out."),
    (r"^encoders\.(\d+)\.conv2d\.", r"down_blocks.\1.conv."),
    (r"^encoders\.(\d+)\.norm_layer\.", r"down_blocks.\1.norm."),
    (r"^decoders\.(\d+)\.conv2d\.", r"up_blocks.\1.conv."),
    (r"^decoders\.(\d+)\.norm_layer\.", r"up_blocks.\1.norm."),
    (r"^resblocks\.(\d+)\.conv(\d)\.", r"mid_blocks.\1.conv\2."),
    (r"^resblocks\.(\d+)\.bn(\d)\.", r"mid_blocks.\1.norm\2."),
)


def convert_eventgan_checkpoint(path: Union[str, "os.PathLike[str]"]) -> EventGANModel:
    """Load a checkpoint of the original EventGAN as an [`EventGANModel`], its widths read off the weights.

    Spectral norm is folded into the weights: weight = weight_bar / σ, with σ after one power iteration from the stored
    vectors, as the original computes it in every forward pass.

    Args:
        path: the original's `.pt` or `.pth` file: a dictionary with the generator's state under `"gen"`, or that state.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but tensors and plain values, or is no EventGAN generator.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such checkpoint: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader of pickles makes of a file that is none
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors alone: {error}") from error
    state = checkpoint.get("gen", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or "head.conv2d.weight" not in state:
        raise ValueError(
            f"{path} is no EventGAN generator: it has no `head.conv2d.weight`, at the root or under `gen`."
        )

    try:
        return _convert(state)
    except (KeyError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the EventGAN generator: {error}") from error


def _convert(state: dict[str, torch.Tensor]) -> EventGANModel:
    converted = {}
    for name, value in _fold_spectral_norm(state).items():
        for pattern, replacement in _RENAMES:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                converted[renamed] = value
                break
        else:
            raise ValueError(f"unknown parameter `{name}`")

    def blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in converted if name.startswith(f"{kind}.")})

    model = EventGANModel(
        num_bins=converted["conv_out.weight"].shape[0] // 2,
        base_channels=converted["conv_in.conv.weight"].shape[0],
        num_encoders=blocks("down_blocks"),
        num_residual_blocks=blocks("mid_blocks"),
    )
    model.load_state_dict(converted, strict=True)
    return model.eval()


def _fold_spectral_norm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    folded = {}
    for name, value in state.items():
        if name.endswith((".module.weight_u", ".module.weight_v")):
            continue
        if not name.endswith(".module.weight_bar"):
            folded[name.replace(".module.", ".")] = value
            continue
        prefix = name[: -len("weight_bar")]
        matrix = value.flatten(1)
        v = torch.nn.functional.normalize(matrix.T @ state[prefix + "weight_u"], dim=0)
        u = torch.nn.functional.normalize(matrix @ v, dim=0)
        folded[prefix.replace(".module.", ".") + "weight"] = value / (u @ matrix @ v)
    return folded
