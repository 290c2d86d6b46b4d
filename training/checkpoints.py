"""Checkpoints of a run: each written whole or not at all, the newest and the best kept, and the newest loaded again.

A checkpoint is written under a temporary name, flushed and renamed, so that a folder with its final name is whole.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError

from madiff_diffusers.files import write_text
from training.progress import Progress


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: of the run; they lie in its subfolder `checkpoints`.
        accelerator: of the run, with which everything that they hold is registered.
        progress: of the run.
        limit: how many of the newest are kept, beside the best.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, progress: Progress, limit: int):
        self.folder = folder / "checkpoints"
        self.accelerator, self.progress, self.limit = accelerator, progress, limit

    def saved(self) -> list[Path]:
        """The checkpoints that there are, the newest last; folders of other names, such as copies, are their owner's."""
        return sorted(path for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))

    @property
    def current(self) -> Path:
        """Where the checkpoint of the current step lies, once it is saved."""
        return self.folder / f"step_{self.progress.step:08d}"

    def load(self) -> bool:
        """Load the newest checkpoint; False if there is none. Call after everything is prepared and registered.

        Raises:
            ValueError: if it cannot be read.
        """
        if self.accelerator.is_main_process:
            for unfinished in self.folder.glob("writing_*"):
                shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        found = self.saved()
        if not found:
            return False
        try:
            self.accelerator.load_state(str(found[-1]))
        except Exception as error:  # a damaged file shows in errors of every kind
            older = f"; once it is moved away, the run goes on from {found[-2].name}" if found[1:] else ""
            raise ValueError(
                f"`output_dir`: the newest checkpoint, {found[-1]}, cannot be loaded{older}. {type(error).__name__}: {error}"
            ) from error
        # Checkpoints lie between steps: passes of the next are counted anew, of however many it consists now.
        self.accelerator.step = 0
        self.accelerator.print(f"resumed at step {self.progress.step} from {found[-1]}")
        if self.accelerator.is_main_process:
            self._rotate()  # in case the last start was killed before it did
        return True

    def save(self, part: str, export: Callable[[Path], None] | None) -> None:
        """Write a checkpoint of the current step, and remove those that are neither among the newest nor the best.

        Args:
            part: its subfolder for the part that is trained.
            export: writes the part, given that folder, on every process.

        Raises:
            ValueError: if it cannot be written.
        """
        temporary = self.folder / f"writing_{self.progress.step:08d}"
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary))
            if export is not None:
                # Random states were just saved; what building a network for export draws must not show in those to come.
                with torch.random.fork_rng(devices=[]):
                    export(temporary / part)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # as of a full disk, in the words of each of those that write
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise ValueError(
                f"`output_dir`: the checkpoint of step {self.progress.step} cannot be written in {self.folder}: {error}"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in temporary.rglob("*"):  # a rename may reach the disk before the files that it names
                if path.is_file():
                    with path.open("r+b") as file:  # Windows flushes only what is open for writing
                        os.fsync(file.fileno())
            os.replace(temporary, self.current)
            self._rotate()
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        best = self.folder / f"step_{self.progress.best.get('step', -1):08d}"
        if self.progress.best:
            write_text(self.folder / "best.yaml", yaml.safe_dump(self.progress.best))
        for old in self.saved()[: -self.limit]:
            if old != best:
                # No folder with a checkpoint's name is ever incomplete, not even while it is being removed.
                removed = old.with_name(f"writing_removed_{old.name}")
                os.replace(old, removed)
                shutil.rmtree(removed)


def lock_folder(folder: Path) -> TextIO | None:
    """Keep other runs out of a folder for as long as the file that is returned stays open; None where there are no locks.

    Raises:
        ValueError: if one is in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"`output_dir` {str(folder)!r} is being written by another run that has not ended yet."
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    return file
