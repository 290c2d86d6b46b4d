"""What the three training scripts share: options from YAML and flags, checkpoints, resuming, the log.

A run lives in one folder: `args.yaml` (the options of its last start), `summary.csv` (one row per logged step) and
`checkpoints/step_N` (everything needed to go on). A checkpoint is written under a temporary name and then renamed, so
that a folder with its final name is whole; running the same command again resumes from the newest one.
"""

import argparse
import csv
import dataclasses
import os
import shutil
import typing
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset, Subset

CONFIG_FOLDER = Path(__file__).parent / "configs"


@dataclasses.dataclass
class RunOptions:
    """Options that every stage has; each stage adds its own."""

    data: str = ""  # folder of video clips
    output: str = ""  # folder of the run
    seed: int = 0
    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # samples per process and forward pass
    accumulation: int = 1  # forward passes per optimiser step
    crop: int = 128  # side of the training crops, pixels
    gaps: Tuple[float, ...] = (0.5, 0.3, 0.2)  # chances of 1, 2, 3 … source frames between two frames of a sample
    candidates: int = 2  # crops drawn per sample, of which the one that changes most is kept
    learning_rate: float = 1e-4
    warmup_steps: int = 200
    lr_schedule: str = "cosine"  # a name of diffusers.optimization.get_scheduler
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    workers: int = 1  # loader processes
    save_every: int = 500  # steps between checkpoints
    log_every: int = 50  # steps between rows of summary.csv


def parse_options(options_class: type, stage: str, argv: Optional[List[str]], description: str) -> Tuple[Any, Dict]:
    """Options of a stage and the whole configuration: the dataclass's defaults, then the YAML's section, then flags.

    Raises:
        SystemExit: on an unknown flag, an unknown key in the stage's section, or a missing `--data` or `--output`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="paper, compact, tiny, or the path of a YAML file")
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    hints = typing.get_type_hints(options_class)
    for name, field in fields.items():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        parser.add_argument(f"--{name}", help=f"default {default!r}")
    flags = vars(parser.parse_args(argv))
    path = CONFIG_FOLDER / f"{flags['config']}.yaml"
    path = path if path.is_file() else Path(flags["config"])
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        parser.error(f"--config must be one of {known}, or a YAML file, but is {flags['config']!r}")
    config = yaml.safe_load(path.read_text())
    section = dict(config.get(stage, {}))
    unknown = sorted(set(section) - set(fields))
    if unknown:
        parser.error(f"{path.name}, section {stage}: unknown key(s) {', '.join(unknown)}; known: {', '.join(fields)}")
    for name in fields:
        if flags[name] is not None:
            section[name] = yaml.safe_load(flags[name]) if hints[name] is not str else flags[name]
    for name, value in section.items():
        try:
            section[name] = _as_type(value, hints[name])
        except (TypeError, ValueError):
            parser.error(f"--{name} must be of type {getattr(hints[name], '__name__', hints[name])}, such as {fields[name].default!r}, but is {value!r}")
    for name in ("data", "output"):
        if not section.get(name):
            parser.error(f"--{name} is required")
    return options_class(**section), config


def _as_type(value: Any, hint: Any) -> Any:
    """What YAML read, as the type of an option."""
    if typing.get_origin(hint) is tuple:
        return tuple(float(item) for item in value)
    if hint is float:
        return float(value)  # YAML reads 1e-4 as a string
    if not isinstance(value, hint):
        raise TypeError
    return value


class Progress:
    """The step that a run has reached; registered with Accelerate, so that it is saved with every checkpoint."""

    def __init__(self):
        self.step = 0

    def state_dict(self) -> Dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Dict[str, int]) -> None:
        self.step = state["step"]


class Run:
    """A training run: its Accelerator, its folder, its checkpoints and its log."""

    def __init__(self, options: RunOptions):
        if options.mixed_precision == "fp16" and options.accumulation > 1:
            raise ValueError(
                "`mixed_precision` fp16 with `accumulation` > 1 is not supported: the loss scale of one optimiser would be "
                "applied to the gradients of another. Use bf16."
            )
        self.options = options
        self.folder = Path(options.output)
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = Accelerator(
            gradient_accumulation_steps=options.accumulation,
            mixed_precision=options.mixed_precision,
            project_config=ProjectConfiguration(project_dir=str(self.folder)),
        )
        set_seed(options.seed)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        if self.accelerator.is_main_process:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.yaml").write_text(yaml.safe_dump(dataclasses.asdict(options)))
        self.accelerator.wait_for_everyone()

    @property
    def samples_per_step(self) -> int:
        return self.options.batch_size * self.options.accumulation * self.accelerator.num_processes

    def loader(self, dataset: Dataset) -> Iterable[Dict[str, torch.Tensor]]:
        """Batches of a dataset in its own order, from the sample that this run has come to."""
        start = self.progress.step * self.samples_per_step
        if start >= len(dataset):  # a finished run; older versions of Accelerate yield None from an empty loader
            return []
        loader = DataLoader(
            Subset(dataset, range(start, len(dataset))),
            batch_size=self.options.batch_size,
            num_workers=self.options.workers,
            drop_last=True,
        )
        return self.accelerator.prepare_data_loader(loader)

    def generator(self) -> torch.Generator:
        """Randomness of the current forward pass on this process: the same whether or not the run was interrupted before."""
        # The Accelerator counts forward passes, of which a step may have several.
        passes, rank = self.accelerator.step, self.accelerator.process_index
        seed = np.random.SeedSequence((self.options.seed, self.progress.step, passes, rank)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one. Call after everything is prepared and registered."""
        found = self._saved()
        if found:
            self.accelerator.load_state(str(found[-1]))
            self.accelerator.print(f"resumed at step {self.progress.step} from {found[-1]}")

    def save(self) -> None:
        """Write a checkpoint of the current step and remove those before it."""
        final = self.checkpoints / f"step_{self.progress.step:08d}"
        if final.exists():
            return
        temporary = self.checkpoints / f"writing_{self.progress.step:08d}"
        if self.accelerator.is_main_process and temporary.exists():
            shutil.rmtree(temporary)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(temporary, final)
            for old in self._saved()[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _saved(self) -> List[Path]:
        return sorted(self.checkpoints.glob("step_*"))

    def clip_gradients(self, model: torch.nn.Module) -> None:
        """Clip the gradients of a whole step to `max_grad_norm`.

        Raises:
            FloatingPointError: if they are not finite; the last checkpoint is from before.
        """
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.options.max_grad_norm)
        # In fp16 the loss scaler expects infinities now and then, and skips their steps.
        if self.options.mixed_precision != "fp16" and not torch.isfinite(norm):
            raise FloatingPointError(f"The gradient's norm is {norm.item()} at step {self.progress.step}.")

    def log(self, values: Dict[str, torch.Tensor]) -> None:
        """Append a row to `summary.csv`, where this step is one to log. Values are averaged over the processes."""
        if self.progress.step % self.options.log_every and self.progress.step != self.options.steps:
            return
        row: Dict[str, Any] = {"step": self.progress.step, "samples": self.progress.step * self.samples_per_step}
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach()
            row[name] = f"{self.accelerator.reduce(value, 'mean').item():.6g}"
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "summary.csv"
        # Steps that a killed run logged after its last checkpoint are run, and logged, again.
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows([*rows, row])
        os.replace(temporary, path)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
