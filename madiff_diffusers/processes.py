"""The processes that `accelerate launch` started together."""

from datetime import timedelta

import torch
from accelerate import PartialState


def this_process(device: torch.device) -> PartialState:
    """This process among those that were launched with it, or alone. It waits for others for up to 7 days, as long as their share may take."""
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))


def own_device(state: PartialState, device: torch.device) -> torch.device:
    """A device of its own for each process; `device` for a single one."""
    return state.device if device.type == "cuda" and state.num_processes > 1 else device
