"""What the three training scripts share: processes, checkpoints, resuming, the log, validation, the end of a run.

A run lives in one folder, on storage that all of its processes see:

    args.yaml           the options of its last start
    environment.yaml    versions, git revision, hardware and command of its last start
    summary.csv         a row per logged step
    validation.csv      a row per validation
    panels/             pictures of the validation samples
    checkpoints/step_N  everything needed to go on, and in its subfolder the part trained, loadable by itself
    checkpoints/best.yaml   which of them had the best validation

A checkpoint is written under a temporary name, flushed and renamed, so that a folder with its final name is whole.
Running the same command again resumes from the newest one.
"""

import contextlib
import csv
import ctypes
import dataclasses
import importlib.metadata
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from training.data import Unreadable
from training.hub import push, write_card
from training.options import RunOptions


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LAUNCHERS = (b"accelerate", b"accelerate-launch", b"accelerate.commands.launch")
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

# Scores a validation sample by its number, and shows it as a picture `(H, W, 3)` uint8 if asked to.
Validation = Callable[[int, bool], tuple[dict[str, float], np.ndarray | None]]


class Progress:
    """How far a run has come; saved with every checkpoint."""

    def __init__(self):
        self.step, self.samples = 0, 0
        self.seconds = 0.0  # of training, where a run is limited by them
        self.best: dict[str, float] = {}  # step and value of the best validation
        self.unreadable_before = (
            0  # draws that met a file which cannot be read, of all processes, until the last start
        )
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


class Run:
    """A training run: its Accelerator, its folder, its checkpoints and its log.

    A script builds its models, hands them to `prepare`, says with `exports` and `validates` how they are written and
    scored, calls `resume`, and loops:

        for batch in run.batches(data):
            with run.accumulate(model):
                ...
                run.backward(loss)
                run.update(model, optimizer)
            run.finish_pass({"loss": loss})
        run.finish()

    Args:
        options: of the stage.
        part: name of what the stage trains: `i2e`, `vqvae`, `unet` or, all parts of it together, `pipeline`.

    Raises:
        ValueError: if the options ask for what this kind of launch does not do.
    """

    def __init__(self, options: RunOptions, part: str):
        self.options, self.part = options, part
        self.folder = Path(options.output)
        self.checkpoints = self.folder / "checkpoints"
        self._follow_the_launcher()
        # The launch's own would go before what is asked for here, and steps would be counted wrongly.
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(options.accumulation)
        os.environ["ACCELERATE_GRADIENT_CLIPPING"] = str(options.max_grad_norm)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=options.accumulation,
            mixed_precision=options.mixed_precision or None,
            log_with=None if options.tracker == "none" else options.tracker,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder / "log")),
        )
        self.distribution = self.accelerator.distributed_type
        self.fp16 = self.accelerator.mixed_precision == "fp16"
        if self.fp16 and options.accumulation > 1:
            raise ValueError(
                "`mixed_precision` fp16 with `accumulation` > 1 is not supported: the loss scale of one optimiser would be "
                "applied to the gradients of another. Use bf16."
            )
        if self.accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
            # What `accelerate launch --cpu --num_processes N` does where it has no MPI to start the others with.
            print(
                "warning: this is the only process of the launch; training/README.md says how to start several on CPUs",
                file=sys.stderr,
            )
        if self.distribution in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            kind = self.distribution.value
            if part != "unet":
                raise ValueError(
                    f"{kind} is for train_denoiser; the other stages' networks are small: use data parallelism."
                )
            if options.ema_decay:
                raise ValueError(
                    f"`ema_decay` must be 0 under {kind}, which keeps the weights its own way, but is {options.ema_decay}."
                )
        if self.distribution == DistributedType.DEEPSPEED:
            # Loaders are not prepared by DeepSpeed, which therefore cannot tell the batch size by itself.
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = options.batch_size
        set_seed(options.seed)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(SavedProgress(self.progress, self.accelerator))
        self.ema: EMAModel | None = None
        self.passes: list[dict[str, torch.Tensor]] = []  # the current step's batches so far
        self._sums: dict[str, torch.Tensor] = {}  # of the values that they gave
        self._export: Callable[[Path], None] | None = None
        self._validation: tuple[Validation, int, str] | None = None
        self._signal = 0
        self._norm: torch.Tensor | None = None  # of the latest gradients, where nobody looked at it yet
        self._clock: tuple[float, int] = (0.0, 0)  # time and samples when speed was last measured
        if self.accelerator.is_main_process:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            finished = self._saved() and int(self._saved()[-1].name[len("step_") :]) >= options.steps
            if not finished:  # what is on record is what trained, not what sends the result
                self._say_what_changed()
                _write(self.folder / "args.yaml", yaml.safe_dump(dataclasses.asdict(options)))
                _write(self.folder / "environment.yaml", yaml.safe_dump(self._environment(), sort_keys=False))
        if options.tracker != "none" and not self.accelerator.log_with:
            raise ValueError(f"`tracker` {options.tracker!r} needs its package; install it, or use `tracker` none.")
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.accelerator.wait_for_everyone()

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
            "distribution": str(self.distribution.value),
            "processes": self.accelerator.num_processes,
        }

    def _say_what_changed(self) -> None:
        """A run that goes on with other options is no longer what its first options say; nobody should overlook that."""
        path = self.folder / "args.yaml"
        before = yaml.safe_load(path.read_text()) if path.exists() and self._saved() else {}
        for name, value in yaml.safe_load(yaml.safe_dump(dataclasses.asdict(self.options))).items():
            if name in before and before[name] != value:
                print(f"changed since the last start: {name} was {before[name]!r}, is {value!r}", file=sys.stderr)

    @staticmethod
    def _follow_the_launcher() -> None:
        """`accelerate launch` with one process does not pass signals on, and would leave it behind when it is ended."""
        if not sys.platform.startswith("linux"):
            return
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
            if any(os.path.basename(each) in LAUNCHERS for each in arguments):
                end_with_parent = 1  # PR_SET_PDEATHSIG
                ctypes.CDLL(None).prctl(end_with_parent, signal.SIGTERM)

    # ---- what is trained ----

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[torch.nn.Module, Any]:
        """The network and its optimiser for this launch, with a schedule, and a moving average if the options want one."""
        if self.options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if self.options.channels_last and self.distribution != DistributedType.FSDP:  # which wants contiguous weights
            model = model.to(memory_format=torch.channels_last)
        if self.options.compile:
            model.compile()  # in place: parameters keep their names
        self._schedule = self.schedule(optimizer)
        self._model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.options.ema_decay:
            self.ema = EMAModel(
                self._model.parameters(), decay=self.options.ema_decay, use_ema_warmup=True, power=0.75
            )
            self.register(self.ema)
        return self._model, optimizer

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """The learning-rate schedule of an optimiser, saved with every checkpoint."""
        schedule = get_scheduler(
            self.options.lr_schedule,
            optimizer,
            num_warmup_steps=self.options.warmup_steps,
            num_training_steps=self.options.steps,
        )
        self.register(schedule)
        return schedule

    def register(self, state: Any) -> None:
        """Save an object that has `state_dict` and `load_state_dict` in every checkpoint."""
        self.accelerator.register_for_checkpointing(state)

    def jumped(self, parameter: torch.nn.Parameter, rows: torch.Tensor) -> None:
        """Tell that rows of a parameter were set anew: their average starts there."""
        if self.ema is not None:
            number = next(i for i, each in enumerate(self._model.parameters()) if each is parameter)
            self.ema.shadow_params[number][rows] = parameter.detach()[rows]

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """In this context the network has the moving average of its weights, where there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._model.parameters())
        self.ema.copy_to(self._model.parameters())
        try:
            yield
        finally:
            self.ema.restore(self._model.parameters())

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are exported, whole, on the main process. All processes must call this."""
        with self.averaged_weights():
            state = self.accelerator.get_state_dict(self._model)
            return {name: value.detach().cpu().clone() for name, value in (state or {}).items()}

    def exports(self, export: Callable[[Path], None]) -> None:
        """How the part is written, called on every process with the folder to write to."""
        self._export = export

    def validates(self, score: Validation, count: int, metric: str) -> None:
        """How validation samples 0 … count - 1 are scored; the least `metric` marks the best checkpoint."""
        self._validation = (score, count, metric)

    # ---- the loop ----

    @property
    def samples_per_step(self) -> int:
        return self.options.batch_size * self.options.accumulation * self.accelerator.num_processes

    def batches(self, dataset: Dataset) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from where this run has come to until its last step, each sample on one process.

        Raises:
            SystemExit: with 0, if the run stands at `stop_step` already.
        """
        if self.progress.step >= self.options.steps:
            return
        if 0 < self.options.stop_step <= self.progress.step:
            self._stop_early()
        self._start_tracker()
        self._clock = (time.perf_counter(), self.progress.samples)
        for batch in self._readable(self._loader(dataset)):
            self.progress.unreadable += int(batch.pop("unreadable").sum())
            self.passes.append(batch)
            yield batch
            if self.progress.step >= self.options.steps:
                return

    def steps(self, time_limit: float = 0.0) -> Iterator[float]:
        """For scripts that make their batches themselves: the share of the training that is done, in [0, 1], before each step. The
        learning rate follows it, once it has risen.

        Args:
            time_limit: minutes of training, those of earlier starts and without the first step of each, after which the run ends if
                it has not come to its last step; 0: none.

        Raises:
            ValueError: if several passes make a step.
            SystemExit: as `batches`.
        """
        if self.options.accumulation != 1:
            raise ValueError(f"`accumulation` must be 1 in this stage, but is {self.options.accumulation}.")
        if 0 < self.options.stop_step <= self.progress.step < self.options.steps:
            self._stop_early()
        self._start_tracker()
        self._clock = (time.perf_counter(), self.progress.samples)
        limit, total, before = 60 * time_limit, self.options.steps, None
        while self.progress.step < self.options.steps:
            if before is not None:
                self.progress.seconds += time.perf_counter() - before
            before = None if self.progress.step == 0 and before is None and not self.passes else time.perf_counter()
            spent = self.progress.seconds / limit if limit else 0.0
            if spent >= 1:  # this step is the last
                self.options.steps = self.progress.step + 1
            passed = min(max(self.progress.step / total, spent), 1.0)
            if self.progress.step > self.options.warmup_steps:
                self._schedule.last_epoch = min(max(self.progress.step, int(passed * total)), total - 1)
            self.passes.append({})
            yield passed

    def _start_tracker(self) -> None:
        """Only once there is something to log: TensorBoard writes a file at its start."""
        if self.options.tracker == "none":
            return
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        # TensorBoard's place is the Accelerator's; it would make a folder of its own for a configuration, at every start.
        settings = {
            name: value if isinstance(value, (int, float, str)) else str(value)
            for name, value in dataclasses.asdict(self.options).items()
        }
        config = settings if self.options.tracker == "wandb" else None
        self.accelerator.init_trackers(
            "madiff", config=config, init_kwargs={"wandb": {"dir": str(self.folder / "log")}}
        )

    def _stop_early(self) -> None:
        self.accelerator.print(f"stopped at step {self.progress.step} of {self.options.steps}, which is saved")
        self.accelerator.end_training()
        raise SystemExit(0)

    @staticmethod
    def _readable(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """The batches; a loader process's error about a file without that process's traceback around it."""
        try:
            yield from batches
        except Unreadable as error:
            raise Unreadable(str(error).strip().splitlines()[-1].removeprefix("training.data.Unreadable: ")) from None

    def _loader(self, dataset: Dataset) -> Iterable[dict[str, torch.Tensor]]:
        settings = {
            "batch_size": self.options.batch_size,
            "num_workers": self.options.workers,
            "drop_last": True,
            "worker_init_fn": _leave_signals_to_the_parent,
            # Otherwise a seed is drawn from torch's own state, which would differ after a resumption.
            "generator": torch.Generator().manual_seed(self.options.seed),
        }
        if isinstance(dataset, IterableDataset):  # a stream shares itself among processes and finds its own place
            world = self.accelerator.num_processes
            place = self.progress.samples // (self.options.batch_size * world)
            dataset.start(self.accelerator.process_index, world, self.options.batch_size, place)
            for batch in DataLoader(dataset, **settings):
                yield send_to_device(batch, self.accelerator.device)
            return
        first = self.progress.samples
        last = first + (self.options.steps - self.progress.step) * self.samples_per_step
        yield from self.accelerator.prepare_data_loader(DataLoader(Subset(dataset, range(first, last)), **settings))

    def generator(self) -> torch.Generator:
        """Randomness of the current forward pass: the same whether or not the run was interrupted before, and whether
        the passes of a step are done one after the other (accumulation) or by several processes."""
        place = (len(self.passes) - 1) * self.accelerator.num_processes + self.accelerator.process_index
        seed = np.random.SeedSequence((self.options.seed, self.progress.step, place)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))

    def accumulate(self, *models: torch.nn.Module) -> contextlib.AbstractContextManager:
        return self.accelerator.accumulate(*models)

    @property
    def ends_step(self) -> bool:
        """Whether the current forward pass is the last of its step."""
        return self.accelerator.sync_gradients

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass.

        Raises:
            FloatingPointError: in fp16, if the loss is not finite. Its gradients may be: the scaler skips such steps.
        """
        if self.fp16 and not torch.isfinite(loss):
            self._fail(f"The loss is {loss.item()}")
        self.accelerator.backward(loss)

    def update(self, model: torch.nn.Module, optimizer: Any) -> None:
        """At the end of a step: clip the gradients and step the optimiser.

        Raises:
            FloatingPointError: if the gradients are not finite. The batches of this step are saved; the last checkpoint
                is from before.
        """
        if self.ends_step:
            if self.fp16:  # this optimiser's gradients alone: others share the scaler
                self.accelerator.unscale_gradients(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.options.max_grad_norm)
            else:
                norm = self.accelerator.clip_grad_norm_(model.parameters(), self.options.max_grad_norm)
                self._norm = norm
                if self.accelerator.device.type == "cpu":
                    self._check_norm()
        optimizer.step()
        optimizer.zero_grad()

    def _check_norm(self) -> None:
        """On an accelerator, looking at a number waits for everything before it: that is done where a step is logged or saved."""
        norm, self._norm = self._norm, None
        if norm is not None and not math.isfinite(float(norm)):  # DeepSpeed clips by itself, and may give None
            self._fail(f"The gradient's norm is {float(norm)}")

    def _fail(self, reason: str) -> None:
        folder = self.folder / f"failure_step_{self.progress.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self.accelerator.process_index}.safetensors"
        tensors = {
            f"pass_{i}.{name}": value.detach().cpu().contiguous()
            for i, batch in enumerate(self.passes)
            for name, value in batch.items()
        }
        save_file(tensors, path)
        raise FloatingPointError(f"{reason} at step {self.progress.step}; the batches that caused it are in {path}.")

    def finish_pass(self, values: dict[str, torch.Tensor]) -> None:
        """Note the `values` of a forward pass; after the last of a step, count it and do what is due: log the means,
        validate, save, stop.

        Raises:
            SystemExit: after saving, with 128 + the signal's number, if the process was told to end by SIGTERM or SIGINT; with 0
                at `stop_step`.
        """
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach()
            self._sums[name] = self._sums.get(name, 0) + value
        if not self.ends_step:
            return
        self._schedule.step()
        if self.ema is not None:
            self.ema.step(self._model.parameters())
        self.progress.step += 1
        self.progress.samples += self.samples_per_step
        self._log({name: value / len(self.passes) for name, value in self._sums.items()})
        self.passes, self._sums = [], {}
        last = self.progress.step >= self.options.steps
        best = False
        if self._validation is not None and (last or self.progress.step % self.options.validate_every == 0):
            best = self._validate()
        told = self._told_to_stop()
        stop = self.progress.step == self.options.stop_step and not last
        if last or best or told or stop or self.progress.step % self.options.save_every == 0:
            self.save()
        if stop:
            self._stop_early()
        if told and not last:
            self.accelerator.print(
                f"stopped by {signal.Signals(told).name} at step {self.progress.step}, which is saved"
            )
            self.accelerator.end_training()
            raise SystemExit(128 + told)

    def finish(self, complete: Callable[[Path], None] | None = None) -> None:
        """Copy the part of the last checkpoint to OUTPUT, send it to the Hub if the options ask for it, end the run.

        Args:
            complete: what else the main process writes, given OUTPUT, where the part lies by then.

        Raises:
            SystemExit: with a message that says how to go on, if the upload fails.
        """
        if self.accelerator.is_main_process:
            temporary = self.folder / f"writing_{self.part}"
            final = self.folder / self.part
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(self._saved()[-1] / self.part, temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            if complete is not None:
                complete(self.folder)
            write_card(self.folder, self.part, self.options)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.accelerator.is_main_process and self.options.push_to_hub:
            push(self.folder, self.part, self.options)

    # ---- checkpoints ----

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one. Call after everything is prepared and registered.

        Raises:
            ValueError: if it cannot be read.
        """
        if self.accelerator.is_main_process:
            for unfinished in self.checkpoints.glob("writing_*"):
                shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        found = self._saved()
        if found:
            try:
                self.accelerator.load_state(str(found[-1]))
            except Exception as error:  # a damaged file shows in errors of every kind
                older = f"; once it is moved away, the run goes on from {found[-2].name}" if found[1:] else ""
                raise ValueError(
                    f"`output`: the newest checkpoint, {found[-1]}, cannot be loaded{older}. {type(error).__name__}: {error}"
                ) from error
            self.accelerator.print(f"resumed at step {self.progress.step} from {found[-1]}")
            if self.accelerator.is_main_process:
                self._rotate()  # in case the last start was killed before it did
        if self.accelerator.is_main_process:
            for name in ("summary.csv", "validation.csv"):
                _take_back(self.folder / name, self.progress.step)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # checkpoints are loaded to the CPU

    def save(self) -> None:
        """Write a checkpoint of the current step, and remove those that are neither among the newest nor the best."""
        final = self.checkpoints / f"step_{self.progress.step:08d}"
        temporary = self.checkpoints / f"writing_{self.progress.step:08d}"
        if final.exists():
            return
        self._check_norm()
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        if self._export is not None:
            # Random states were just saved; what building a network for export draws must not show in those to come.
            with torch.random.fork_rng(devices=[]):
                self._export(temporary / self.part)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in temporary.rglob("*"):  # a rename may reach the disk before the files that it names
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            os.replace(temporary, final)
            self._rotate()
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        best = self.checkpoints / f"step_{self.progress.best.get('step', -1):08d}"
        if self.progress.best:
            _write(self.checkpoints / "best.yaml", yaml.safe_dump(self.progress.best))
        for old in self._saved()[: -self.options.keep]:
            if old != best:
                # No folder with a checkpoint's name is ever incomplete, not even while it is being removed.
                removed = old.with_name(f"writing_removed_{old.name}")
                os.replace(old, removed)
                shutil.rmtree(removed)

    def _saved(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step_*"))

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        # Launchers repeat a SIGTERM that the whole group got already; a second Ctrl-C is meant to end the process at once.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else self._handlers[number])

    def _told_to_stop(self) -> int:
        """The signal that any process has received, 0 if none; the same on all processes."""
        if self.accelerator.num_processes == 1:
            return self._signal
        told = torch.tensor([self._signal], device=self.accelerator.device)
        return int(self.accelerator.gather(told).max())

    # ---- what is written ----

    def _log(self, values: dict[str, torch.Tensor]) -> None:
        """Append a row to `summary.csv`, where this step is one to log. Values are averaged over the processes."""
        if self.progress.step % self.options.log_every and self.progress.step != self.options.steps:
            return
        self._check_norm()
        numbers: dict[str, float] = {}
        for name, value in values.items():
            numbers[name] = self.accelerator.reduce(value, "mean").item()
        if self.options.on_unreadable == "skip":
            numbers["unreadable"] = self.progress.total_unreadable(self.accelerator)
        numbers["learning_rate"] = self._schedule.get_last_lr()[0]
        self.accelerator.log(numbers, step=self.progress.step)
        before, samples = self._clock
        self._clock = (time.perf_counter(), self.progress.samples)
        speed = (self.progress.samples - samples) / (self._clock[0] - before)
        if self.accelerator.is_main_process:
            row = {"step": self.progress.step, "samples": self.progress.samples}
            row.update((name, f"{value:.6g}") for name, value in numbers.items())
            _append(self.folder / "summary.csv", row)
            print(" ".join(f"{name}={value}" for name, value in row.items()), f"({speed:.1f} samples/s)", flush=True)

    @torch.no_grad()
    def _validate(self) -> bool:
        """Score every validation sample once, on one of the processes; whether the result is the best so far."""
        score, count, metric = self._validation
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        results, pictures = [], []
        with self.averaged_weights():
            # Every process makes the same number of forward passes, as sharded weights need; a surplus is not counted.
            for turn in range(math.ceil(count / world)):
                index = turn * world + rank
                scores, picture = score(min(index, count - 1), index < self.options.panels)
                if index < count:
                    results.append((index, scores))
                    if picture is not None:
                        pictures.append((index, picture))
        results, pictures = (sorted(gather_object(each), key=lambda pair: pair[0]) for each in (results, pictures))
        if [index for index, _ in results] != list(range(count)):
            raise RuntimeError(f"{len(results)} validation results were gathered for {count} samples.")
        means = {name: float(np.mean([scores[name] for _, scores in results])) for name in results[0][1]}
        self.accelerator.log({f"validation/{name}": value for name, value in means.items()}, step=self.progress.step)
        if self.accelerator.is_main_process:
            row = {"step": self.progress.step, "samples": self.progress.samples, "count": count}
            row.update((name, f"{value:.6g}") for name, value in means.items())
            _append(self.folder / "validation.csv", row)
            print("validation", " ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            if pictures:
                width = max(picture.shape[1] for _, picture in pictures)
                padding = [np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0))) for _, picture in pictures]
                sheet = np.concatenate(padding)
                folder = self.folder / "panels"
                folder.mkdir(exist_ok=True)
                Image.fromarray(sheet).save(folder / f"step_{self.progress.step:08d}.png")
                for tracker in self.accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"panels": sheet[None]}, step=self.progress.step, **layout)
        if not math.isfinite(means[metric]) or self.progress.best.get(metric, math.inf) <= means[metric]:
            return False
        self.progress.best = {"step": self.progress.step, metric: means[metric]}
        return True


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, which gets the columns that it lacks: a resumed run may log others."""
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
    missing = [name for name in row if name not in columns]
    if missing:
        columns += missing
        _rewrite(path, columns, _rows(path))
    with path.open("a", newline="") as file:
        csv.DictWriter(file, fieldnames=columns, restval="").writerow(row)


def _take_back(path: Path, step: int) -> None:
    """Remove the rows after a step from a CSV file: a run that was killed wrote them after its last checkpoint."""
    rows = _rows(path)
    kept = [row for row in rows if int(row["step"]) <= step]
    if kept:
        _rewrite(path, list(rows[0]), kept)
    else:
        path.unlink(missing_ok=True)


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file, if there is one; a kill may have left a part of a last one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))


def _rewrite(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _lock(folder: Path) -> Any:
    """Keep other runs out of a folder for as long as this process lives.

    Raises:
        ValueError: if one is in it.
    """
    if fcntl is None:
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"`output` {str(folder)!r} is being written by another run that has not ended yet."
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


def _leave_signals_to_the_parent(worker: int) -> None:
    """A terminal or a scheduler signals a whole group of processes; loaders must live until the step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
