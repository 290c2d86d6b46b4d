"""The processes that `accelerate launch` started together."""

from datetime import timedelta

import torch
from accelerate import PartialState


def this_process(device: torch.device) -> PartialState:
    """This process among those that were launched with it (alone, if none were). Waiting for another may take as long as its share."""
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))


def own_device(state: PartialState, device: torch.device) -> torch.device:
    """One device for each process; of a single process, the one that it was told."""
    return state.device if device.type == "cuda" and state.num_processes > 1 else device
