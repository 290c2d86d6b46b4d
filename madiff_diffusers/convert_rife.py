"""Converter for the flow networks in checkpoints of RIFE 4.0 (https://github.com/hzwer/Practical-RIFE)."""

import os
from pathlib import Path
from typing import Union

import torch

from .motion_flow import RIFEFlowModel


def convert_rife_checkpoint(path: Union[str, "os.PathLike[str]"]) -> RIFEFlowModel:
    """Load the flow network of a RIFE 4.0 checkpoint.

    Args:
        path: `flownet.pkl`, a dictionary of tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but tensors, or no flow network of RIFE 4.0.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such checkpoint: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader of pickles makes of a file that is none
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors alone: {error}") from error
    blocks = ("block0.", "block1.", "block2.", "block3.")
    names = {name: str(name).removeprefix("module.") for name in state} if isinstance(state, dict) else {}
    converted = {short: state[name] for name, short in names.items() if short.startswith(blocks)}
    model = RIFEFlowModel()
    try:
        model.load_state_dict(converted, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no flow network of RIFE 4.0: {error}") from error
    return model.eval()
