"""What a run writes down: its options and environment, a row per logged step and per validation, pictures, a tracker's log."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from madiff_diffusers.files import replacing, write_text
from training.options import RunOptions
from training.progress import Progress


PACKAGES = (
    "madiff_diffusers",
    "torch",
    "diffusers",
    "accelerate",
    "transformers",
    "datasets",
    "lpips",
    "numpy",
    "opencv-python-headless",
)


class RunLog:
    """What a run writes into its folder.

    Args:
        folder: of the run.
        options: of the stage.
        accelerator, progress: of the run.
    """

    def __init__(self, folder: Path, options: RunOptions, accelerator: Accelerator, progress: Progress):
        self.folder, self.options, self.accelerator, self.progress = folder, options, accelerator, progress
        self._clock: tuple[float, int] = (0.0, 0)  # time and samples when speed was last measured

    # ---- the start of a run ----

    def record_start(self, goes_on: bool) -> None:
        """Write `args.yaml` and `environment.yaml`, and say what changed where a run `goes_on`: it is no longer what its first
        options say, which nobody should overlook."""
        path = self.folder / "args.yaml"
        before: Any = {}
        if goes_on and path.exists():
            with contextlib.suppress(yaml.YAMLError, UnicodeError):  # of what a power failure left
                before = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                before = {}
            if not before:
                print(f"{path} cannot be read: what has changed since the last start is not told", file=sys.stderr)
        for name, value in yaml.safe_load(yaml.safe_dump(dataclasses.asdict(self.options))).items():
            if name in before and before[name] != value:
                print(f"changed since the last start: {name} was {before[name]!r}, is {value!r}", file=sys.stderr)
        write_text(path, yaml.safe_dump(dataclasses.asdict(self.options)))
        write_text(self.folder / "environment.yaml", yaml.safe_dump(self._environment(), sort_keys=False))

    def _environment(self) -> dict[str, Any]:
        versions = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)

        def git(*arguments: str) -> str:
            try:
                done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
            except OSError:  # git is not installed
                return ""
            return done.stdout.strip() if done.returncode == 0 else ""

        device = self.accelerator.device
        return {
            "command": " ".join(sys.argv),
            "git_revision": git("rev-parse", "HEAD") or "unknown",
            "git_changes": bool(git("status", "--porcelain")),
            "python": platform.python_version(),
            "versions": versions,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "distribution": str(self.accelerator.distributed_type.value),
            "processes": self.accelerator.num_processes,
        }

    def take_back(self) -> None:
        """Remove what was logged after the checkpoint that the run goes on from."""
        for name in ("summary.csv", "validation.csv"):
            take_back_rows(self.folder / name, self.progress.step)

    def start(self) -> None:
        """Start the tracker and the clock, on all processes, and only once there is something to log: TensorBoard writes a file
        at its start."""
        if self.options.report_to != "none":
            self._start_tracker()
        self._clock = (time.perf_counter(), self.progress.samples)

    def _start_tracker(self) -> None:
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        # TensorBoard's place is the Accelerator's; it would make a folder of its own for a configuration, at every start.
        settings = {
            name: value if isinstance(value, (int, float, str)) else str(value)
            for name, value in dataclasses.asdict(self.options).items()
        }
        config = settings if self.options.report_to == "wandb" else None
        self.accelerator.init_trackers(
            "madiff", config=config, init_kwargs={"wandb": {"dir": str(self.folder / "log")}}
        )

    # ---- while it lasts ----

    def write_step(self, values: dict[str, torch.Tensor], learning_rate: float) -> None:
        """Append a row to `summary.csv`. Values are averaged over the processes, all of which call this."""
        numbers: dict[str, float] = {}
        for name, value in values.items():
            numbers[name] = self.accelerator.reduce(value, "mean").item()
        if self.options.on_unreadable == "skip":
            numbers["unreadable"] = self.progress.total_unreadable(self.accelerator)
        numbers["learning_rate"] = learning_rate
        self.accelerator.log(numbers, step=self.progress.step)
        before, samples = self._clock
        self._clock = (time.perf_counter(), self.progress.samples)
        speed = (self.progress.samples - samples) / (self._clock[0] - before)
        if self.accelerator.is_main_process:
            row: dict[str, Any] = {"step": self.progress.step, "samples": self.progress.samples}
            row.update((name, f"{value:.6g}") for name, value in numbers.items())
            append_row(self.folder / "summary.csv", row)
            print(" ".join(f"{name}={value}" for name, value in row.items()), f"({speed:.1f} samples/s)", flush=True)

    def write_validation(self, means: dict[str, float], count: int, pictures: Sequence[np.ndarray]) -> None:
        """Append a row to `validation.csv`, and write the `pictures` `(H, W, 3)` one below the other into `panels`. All processes
        call this; the pictures of the main one count."""
        self.accelerator.log({f"validation/{name}": value for name, value in means.items()}, step=self.progress.step)
        if not self.accelerator.is_main_process:
            return
        row: dict[str, Any] = {"step": self.progress.step, "samples": self.progress.samples, "count": count}
        row.update((name, f"{value:.6g}") for name, value in means.items())
        append_row(self.folder / "validation.csv", row)
        print("validation", " ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        if not pictures:
            return
        width = max(picture.shape[1] for picture in pictures)
        padding = [np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0))) for picture in pictures]
        sheet = np.concatenate(padding)
        folder = self.folder / "panels"
        folder.mkdir(exist_ok=True)
        Image.fromarray(sheet).save(folder / f"step_{self.progress.step:08d}.png")
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"panels": sheet[None]}, step=self.progress.step, **layout)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, which gets the columns that it lacks: a resumed run may log others."""
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
    missing = [name for name in row if name not in columns]
    if missing:
        columns += missing
        _rewrite(path, columns, read_rows(path))
    with path.open("a", newline="") as file:
        csv.DictWriter(file, fieldnames=columns, restval="").writerow(row)


def take_back_rows(path: Path, step: int) -> None:
    """Remove the rows after a step from a CSV file: a run that was killed wrote them after its last checkpoint."""
    rows = read_rows(path)
    kept = [row for row in rows if int(row["step"]) <= step]
    if kept:
        _rewrite(path, list(rows[0]), kept)
    else:
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file, if there is one; a kill may have left a part of a last one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))


def _rewrite(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
