"""How far a run has come: counted by its trainer, saved with its checkpoints, written in its log."""

from typing import Any

import torch
from accelerate import Accelerator


class Progress:
    """How far a run has come; saved with every checkpoint."""

    def __init__(self):
        self.step, self.samples = 0, 0
        self.seconds = 0.0  # of training, where a run is limited by them
        self.best: dict[str, float] = {}  # step and value of the best validation
        self.unreadable_before = 0  # draws of all processes that met a file which cannot be read, until the last start
        self.unreadable = 0  # and of this process since then

    def total_unreadable(self, accelerator: Accelerator) -> int:
        count = torch.tensor(self.unreadable, device=accelerator.device)
        return self.unreadable_before + int(accelerator.reduce(count, "sum"))


class SavedProgress:
    """A run's progress as it is saved: one file for all processes, each of which calls this."""

    def __init__(self, progress: Progress, accelerator: Accelerator):
        self.progress, self.accelerator = progress, accelerator

    def state_dict(self) -> dict[str, Any]:
        unreadable = self.progress.total_unreadable(self.accelerator)
        return {**self.progress.__dict__, "unreadable_before": unreadable, "unreadable": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress.__dict__.update(state)
