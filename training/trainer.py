"""What the training scripts share: processes, optimiser steps, validation, and the start and end of a run.

A run lives in one folder, on storage that all of its processes see:

    args.yaml           the options of its last start
    environment.yaml    versions, git revision, hardware and command of its last start
    summary.csv         a row per logged step
    validation.csv      a row per validation
    panels/             pictures of the validation samples
    checkpoints/step_N  everything needed to go on, and in its subfolder the part trained, loadable by itself
    checkpoints/best.yaml   which of them had the best validation

Running the same command again resumes from the newest checkpoint.
"""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    broadcast,
    gather_object,
    is_torch_xla_available,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from madiff_diffusers.precision import is_emulated
from training.checkpoints import Checkpoints, lock_folder
from training.data.loading import load_batches
from training.hub import push, write_card
from training.options import RunOptions
from training.progress import Progress, SavedProgress
from training.run_log import RunLog
from training.signals import StopSignals, follow_the_launcher


# Scores a validation sample by its number, and shows it as a picture `(H, W, 3)` uint8 if asked to.
Validation = Callable[[int, bool], tuple[dict[str, float], np.ndarray | None]]


class Trainer:
    """A training run: its Accelerator, its folder, its checkpoints and its log.

    A script builds its models, hands them to `prepare`, says with `set_export` and `set_validation` how they are written and
    scored, calls `resume`, and loops:

        for batch in trainer.batches(data):
            with trainer.accumulate(model):
                ...
                trainer.backward(loss)
                trainer.optimizer_step(model, optimizer)
            trainer.finish_micro_batch({"loss": loss})
        trainer.finish()

    Args:
        options: of the stage.
        part: name of what the stage trains: `i2e`, `vqvae`, `unet` or, all parts of it together, `pipeline`.

    Raises:
        ValueError: if the options ask for what this kind of launch does not do.
    """

    def __init__(self, options: RunOptions, part: str):
        self.options, self.part = options, part
        self.folder = Path(options.output_dir)
        init = getattr(options, "init", "")
        if init and not Path(init).is_dir():
            raise ValueError(f"`init` must be a folder that is there, but is {init!r}.")
        follow_the_launcher()
        # The launch's own would go before what is asked for here, and steps would be counted wrongly.
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(options.gradient_accumulation_steps)
        os.environ["ACCELERATE_GRADIENT_CLIPPING"] = str(options.max_grad_norm)
        self.accelerator = Accelerator(
            # Without it, processes that torchrun starts on CPUs would know nothing of each other.
            cpu=not (torch.accelerator.is_available() or is_torch_xla_available()),
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            mixed_precision=options.mixed_precision or None,
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder / "log")),
        )
        self.distribution = self.accelerator.distributed_type
        self.fp16 = self.accelerator.mixed_precision == "fp16"
        if self.fp16 and options.gradient_accumulation_steps > 1:
            raise ValueError(
                "`mixed_precision` fp16 with `gradient_accumulation_steps` > 1 is not supported: the loss scale of one optimiser would be "
                "applied to the gradients of another. Use bf16."
            )
        if self.accelerator.mixed_precision == "bf16" and is_emulated(self.accelerator.device, torch.bfloat16):
            self.accelerator.print(
                "warning: this CPU does not compute in bfloat16 by itself, and trains several times slower in it: `--mixed_precision no` is for it",
                file=sys.stderr,
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
            settings["train_micro_batch_size_per_gpu"] = options.train_batch_size
        set_seed(options.seed)
        self.progress = Progress()
        self.checkpoints = Checkpoints(self.folder, self.accelerator, self.progress, options.checkpoints_total_limit)
        self.log = RunLog(self.folder, options, self.accelerator, self.progress)
        self.accelerator.register_for_checkpointing(SavedProgress(self.progress, self.accelerator))
        self.ema: EMAModel | None = None
        self._schedules: list[tuple[Any, torch.optim.Optimizer, list[dict[str, Any]]]] = []
        self.micro_batches: list[dict[str, torch.Tensor]] = []  # the current step's batches so far
        self._sums: dict[str, torch.Tensor] = {}  # of the values that they gave
        self._export: Callable[[Path], None] | None = None
        self._validation: tuple[Validation, int, str] | None = None
        self._norm: torch.Tensor | None = None  # of the latest gradients, where nobody looked at it yet
        if self.accelerator.is_main_process:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
        if options.report_to != "none" and not self.accelerator.log_with:
            raise ValueError(
                f"`report_to` {options.report_to!r} needs its package; install it, or use `report_to` none."
            )
        self._signals = StopSignals()
        self.accelerator.wait_for_everyone()

    # ---- what is trained ----

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, compiles: bool = True
    ) -> tuple[torch.nn.Module, Any]:
        """The network and its optimiser for this launch, with a schedule, and a moving average if the options want one.

        Pipelines of the network are built before, for they change the layout of its weights, and sharded ones' cannot be changed.

        Args:
            model, optimizer: what is trained, and by what.
            compiles: whether the network is compiled as a whole if the options want that.
        """
        if self.options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        # FSDP wants contiguous weights.
        is_last = self.options.channels_last and self.distribution != DistributedType.FSDP
        model = model.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        if self.options.compile and compiles:
            model.compile()  # in place: parameters keep their names
        self._schedule = self.schedule(optimizer)
        self._model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.options.ema_decay:
            self.ema = EMAModel(
                self._model.parameters(), decay=self.options.ema_decay, use_ema_warmup=True, power=0.75
            )
            self.register(self.ema)
        return self._model, optimizer

    def schedule(self, optimizer: torch.optim.Optimizer, first_step: int = 0) -> Any:
        """The learning-rate schedule of an optimiser that begins at a step of the run and ends with it, saved with every checkpoint."""
        schedule = get_scheduler(
            self.options.lr_scheduler,
            optimizer,
            num_warmup_steps=self.options.lr_warmup_steps,
            num_training_steps=max(1, self.options.max_train_steps - first_step),
        )
        self.register(schedule)
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._schedules.append((schedule, optimizer, asked))
        return schedule

    def _take_options_again(self) -> None:
        """Optimisers, schedules and the moving average are as the options of this start say, not as a checkpoint had them."""
        for schedule, optimizer, asked in self._schedules:
            schedule.base_lrs = [group["initial_lr"] for group in asked]
            for group, own, share in zip(optimizer.param_groups, asked, schedule.lr_lambdas):
                group.update({**own, "lr": own["initial_lr"] * share(schedule.last_epoch)})
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
        if self.ema is not None:
            self.ema.decay = self.options.ema_decay

    def register(self, state: Any) -> None:
        """Save an object that has `state_dict` and `load_state_dict` in every checkpoint."""
        self.accelerator.register_for_checkpointing(state)

    def reset_average(self, parameter: torch.nn.Parameter, rows: torch.Tensor) -> None:
        """Start the moving average of rows of a parameter anew, from their present values."""
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

    def set_export(self, export: Callable[[Path], None]) -> None:
        """Set how the part is written: `export` is called on every process with the folder to write to."""
        self._export = export

    def set_validation(self, score: Validation, count: int, metric: str) -> None:
        """Set how validation samples 0 … count - 1 are scored; the checkpoint with the least `metric` is the best."""
        self._validation = (score, count, metric)

    # ---- the loop ----

    @property
    def samples_per_step(self) -> int:
        return (
            self.options.train_batch_size * self.options.gradient_accumulation_steps * self.accelerator.num_processes
        )

    def batches(self, dataset: Dataset) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from where this run has come to until its last step, each sample on one process.

        Raises:
            SystemExit: with 0, if the run stands at `stop_step` already.
        """
        if self.progress.step >= self.options.max_train_steps:
            return
        if 0 < self.options.stop_step <= self.progress.step:
            self._stop_early()
        self._begin()
        for batch in load_batches(dataset, self.options, self.accelerator, self.progress):
            self.progress.unreadable += int(batch.pop("unreadable").sum())
            self.micro_batches.append(batch)
            yield batch
            if self.progress.step >= self.options.max_train_steps:
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
        if self.options.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be 1 in this stage, but is {self.options.gradient_accumulation_steps}."
            )
        if 0 < self.options.stop_step <= self.progress.step < self.options.max_train_steps:
            self._stop_early()
        limit, total, before, is_first = 60 * time_limit, self.options.max_train_steps, None, True
        if self.progress.step >= total or (limit and self.progress.seconds >= limit):  # it came to its end before
            return
        self._begin()
        while self.progress.step < self.options.max_train_steps:
            if before is not None:
                self.progress.seconds += time.perf_counter() - before
                if limit and self.accelerator.num_processes > 1:  # one clock for all
                    clock = torch.tensor(self.progress.seconds, dtype=torch.float32, device=self.accelerator.device)
                    self.progress.seconds = broadcast(clock).item()
            before = None if is_first else time.perf_counter()  # the first step may compile
            is_first = False
            spent = self.progress.seconds / limit if limit else 0.0
            if spent >= 1:  # this step is the last
                self.options.max_train_steps = self.progress.step + 1
            passed = min(max(self.progress.step / total, spent), 1.0)
            if self.progress.step > self.options.lr_warmup_steps:
                self._schedule.last_epoch = min(max(self.progress.step, int(passed * total)), total - 1)
            self.micro_batches.append({})
            yield passed

    def _begin(self) -> None:
        """Put on record what trains from here on, and start the log. A start that only sends the result leaves what trained it on record."""
        if self.accelerator.is_main_process:
            self.log.record_start(goes_on=bool(self.checkpoints.saved()))
        self.log.start()

    def _stop_early(self) -> None:
        self.accelerator.print(
            f"stopped at step {self.progress.step} of {self.options.max_train_steps}, which is saved"
        )
        self.accelerator.end_training()
        raise SystemExit(0)

    def generator(self) -> torch.Generator:
        """Randomness of the current forward pass: the same whether or not the run was interrupted before, and whether
        the passes of a step are done one after the other (accumulation) or by several processes."""
        place = (len(self.micro_batches) - 1) * self.accelerator.num_processes + self.accelerator.process_index
        seed = np.random.SeedSequence((self.options.seed, self.progress.step, place)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))

    def accumulate(self, *models: torch.nn.Module) -> contextlib.AbstractContextManager:
        return self.accelerator.accumulate(*models)

    @property
    def sync_gradients(self) -> bool:
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

    def optimizer_step(self, model: torch.nn.Module, optimizer: Any) -> None:
        """At the end of a step: clip the gradients and step the optimiser.

        Raises:
            FloatingPointError: if the gradients are not finite, at once on a CPU, elsewhere where a step is logged or saved. The batches
                of that step are saved; the last checkpoint is from before.
        """
        if self.sync_gradients:
            if self.fp16:  # this optimiser's gradients alone: others share the scaler
                self.accelerator.unscale_gradients(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.options.max_grad_norm)
            else:
                norm = self.accelerator.clip_grad_norm_(model.parameters(), self.options.max_grad_norm)
                if norm is not None:  # DeepSpeed clips by itself, and gives a number or None
                    norm = torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)
                    self._norm = norm if self._norm is None else torch.maximum(self._norm, norm)  # which keeps NaN
                if self.accelerator.device.type == "cpu":
                    self._check_norm()
        optimizer.step()
        optimizer.zero_grad()

    def _check_norm(self) -> None:
        """On an accelerator, looking at a number waits for everything before it: that is done where a step is logged or saved."""
        norm, self._norm = self._norm, None
        if norm is not None and not math.isfinite(float(norm)):
            since = "" if self.accelerator.device.type == "cpu" else f", in one of {self.options.log_steps} steps,"
            self._fail(f"The gradient's norm is {float(norm)}{since}")

    def _fail(self, reason: str) -> None:
        folder = self.folder / f"failure_step_{self.progress.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self.accelerator.process_index}.safetensors"
        tensors = {
            f"pass_{i}.{name}": value.detach().cpu().contiguous()
            for i, batch in enumerate(self.micro_batches)
            for name, value in batch.items()
        }
        save_file(tensors, path)
        # Elsewhere the norm is looked at later than the step whose batches these are.
        whose = "that caused it" if self.fp16 or self.accelerator.device.type == "cpu" else "of this step"
        raise FloatingPointError(f"{reason} at step {self.progress.step}; the batches {whose} are in {path}.")

    def finish_micro_batch(self, values: dict[str, torch.Tensor]) -> None:
        """Note the `values` of a forward pass; after the last of a step, count it and do what is due: log the means,
        validate, save, stop.

        Raises:
            SystemExit: after saving, with 128 + the signal's number, if the process was told to end by SIGTERM or SIGINT; with 0
                at `stop_step`.
        """
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach()
            self._sums[name] = self._sums.get(name, 0) + value
        if not self.sync_gradients:
            return
        self._schedule.step()
        if self.ema is not None:
            self.ema.step(self._model.parameters())
        following = self.progress.step + 1
        if following % self.options.log_steps == 0 or following % self.options.checkpointing_steps == 0:
            self._check_norm()  # while the step's batches are at hand
        self.progress.step += 1
        self.progress.samples += self.samples_per_step
        last = self.progress.step >= self.options.max_train_steps
        if last or self.progress.step % self.options.log_steps == 0:
            self._check_norm()
            means = {name: value / len(self.micro_batches) for name, value in self._sums.items()}
            self.log.write_step(means, self._schedule.get_last_lr()[0])
        self.micro_batches, self._sums = [], {}
        best = False
        if self._validation is not None and (last or self.progress.step % self.options.validation_steps == 0):
            best = self._validate(*self._validation)
        told = self._signals.received(self.accelerator)
        stop = self.progress.step == self.options.stop_step and not last
        if last or best or told or stop or self.progress.step % self.options.checkpointing_steps == 0:
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
            ValueError: if the last checkpoint was cut off, or OUTPUT cannot be written.
            SystemExit: with a message that says how to go on, if the upload fails.
        """
        if self.accelerator.is_main_process:
            temporary = self.folder / f"writing_{self.part}"
            final = self.folder / self.part
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.checkpoints.saved()[-1]
            try:
                shutil.copytree(last / self.part, temporary)
                for weights in temporary.rglob("*.safetensors"):
                    _check_weights(weights, last)  # before those of an earlier run go
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
                if complete is not None:
                    complete(self.folder)
                write_card(self.folder, self.part, self.options)
            except (OSError, SafetensorError) as error:  # as of a full disk
                shutil.rmtree(temporary, ignore_errors=True)
                reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # one of its many
                raise ValueError(
                    f"`output_dir`: the result cannot be written in {self.folder}: {reason}. It is in {last}; the same command writes it "
                    "once that is mended, and trains nothing a second time."
                ) from error
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self._signals.restore()
        if self.accelerator.is_main_process and self.options.push_to_hub:
            push(self.folder, self.part, self.options)

    # ---- checkpoints and validation ----

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one. Call after everything is prepared and registered.

        Raises:
            ValueError: if it cannot be read.
        """
        if self.checkpoints.load():
            self._take_options_again()
        if self.accelerator.is_main_process:
            self.log.take_back()
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # checkpoints are loaded to the CPU

    def save(self) -> None:
        """Write a checkpoint of the current step, unless there is one."""
        if not self.checkpoints.current.exists():
            self._check_norm()
            self.checkpoints.save(self.part, self._export)

    @torch.no_grad()
    def _validate(self, score: Validation, count: int, metric: str) -> bool:
        """Score every validation sample once, on one of the processes; whether the result is the best so far."""
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
        self.log.write_validation(means, count, [picture for _, picture in pictures])
        if not math.isfinite(means[metric]) or self.progress.best.get(metric, math.inf) <= means[metric]:
            return False
        self.progress.best = {"step": self.progress.step, metric: means[metric]}
        return True


def _check_weights(path: Path, checkpoint: Path) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"`output_dir`: {path.name} in {checkpoint} is damaged ({error}). Once that checkpoint is moved away, the same command goes on from "
            "the one before."
        ) from error
