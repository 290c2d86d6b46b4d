"""Signals that end a run: noted until the step is saved, and followed where a launcher does not pass them on."""

import atexit
import contextlib
import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator


LAUNCHERS = (b"accelerate", b"accelerate-launch", b"accelerate.commands.launch")


class StopSignals:
    """SIGTERM and SIGINT to this process, from now on until `restore`."""

    def __init__(self):
        self._number = 0
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        # Launchers repeat a SIGTERM that the whole group got already; a second Ctrl-C is meant to end the process at once.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else self._handlers[number])

    def received(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, 0 if none; the same on all processes."""
        if accelerator.num_processes == 1:
            return self._number
        told = torch.tensor([self._number], device=accelerator.device)
        return int(accelerator.gather(told).max())

    def restore(self) -> None:
        """Give both signals back to who had them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def follow_the_launcher() -> None:
    """`accelerate launch` with one process does not pass signals on, and would leave it behind when it is ended."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        if any(os.path.basename(each) in LAUNCHERS for each in arguments):
            end_with_parent = 1  # PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(end_with_parent, signal.SIGTERM)


def end_loaders_at_exit() -> None:
    """Let loader processes end with this one, whatever ends it: `multiprocessing`, whose own way is a SIGTERM, would wait for ever for such as
    ignore it."""

    def end() -> None:
        if hasattr(signal, "SIGCHLD"):  # by which torch would report, in a traceback, that they were killed
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():
            process.kill()

    # `multiprocessing` was imported, and its handler registered, before; so this one runs first.
    atexit.register(end)


def leave_signals_to_the_parent(worker: int) -> None:
    """A terminal or a scheduler signals a whole group of processes; loaders must live until the step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
