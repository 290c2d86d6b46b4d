"""Options of a training run: the defaults of a dataclass, then a section of a YAML file, then flags."""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import math
import sys
import traceback
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import yaml
from diffusers import ModelMixin, SchedulerMixin, UNet2DModel

import madiff_diffusers
from madiff_diffusers.eventgan import EventGANModel
from madiff_diffusers.hint_registry import hint_parts
from madiff_diffusers.motion_flow import MotionHintModel
from madiff_diffusers.pipeline_madiff import MADiffPipeline
from madiff_diffusers.vq_magan import VQMAGANModel


ModelT = TypeVar("ModelT", bound=ModelMixin)

CONFIG_FOLDER = Path(__file__).parent / "configs"

# Sections of a configuration that hold the arguments of a class; "scheduler" names its own.
MODEL_SECTIONS = {
    "i2e": EventGANModel,
    "hint_model": MotionHintModel,
    "vqvae": VQMAGANModel,
    "unet": UNet2DModel,
    "pipeline": MADiffPipeline,
}
STAGES = ("train_i2e", "train_vq_magan", "train_denoiser", "train_sampler")

# Of diffusers.optimization, those that need no arguments of their own.
LR_SCHEDULES = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")


def option(
    default: Any,
    help: str,
    least: float | None = None,
    most: float | None = None,
    more_than: float | None = None,
    less_than: float | None = None,
    choices: Sequence[str] = (),
    count: int = 0,
) -> Any:
    """A field of an options class: its default, the text that `--help` shows, and what values it takes.

    Args:
        least, most, more_than, less_than: range of a number, or of each of several.
        choices: the texts that there are.
        count: how many numbers there must be; 0: one or more.
    """
    allowed = Allowed(least, most, more_than, less_than, tuple(choices), count)
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What values an option takes; see `option`."""

    least: float | None
    most: float | None
    more_than: float | None
    less_than: float | None
    choices: tuple[str, ...]
    count: int

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(choice or '(empty)' for choice in self.choices)}"
        limits = {
            "at least": self.least,
            "more than": self.more_than,
            "at most": self.most,
            "less than": self.less_than,
        }
        text = " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
        return f"{self.count} numbers, each {text}" if self.count else text

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        numbers = value if isinstance(value, tuple) else (value,)
        if len(numbers) != (self.count or len(numbers)) or not numbers:
            return False
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            return False
        return (
            (self.least is None or min(numbers) >= self.least)
            and (self.more_than is None or min(numbers) > self.more_than)
            and (self.most is None or max(numbers) <= self.most)
            and (self.less_than is None or max(numbers) < self.less_than)
        )


@dataclasses.dataclass
class RunOptions:
    """Options that every stage has; each stage adds its own."""

    data: str = option("", "training data: FORMAT:PATH[@WEIGHT], several joined by commas; see training/README.md")
    output_dir: str = option("", "folder of the run")
    # data
    resolution: int = option(128, "side of the training crops, pixels", least=1)
    gaps: tuple[float, ...] = option(
        (0.5, 0.3, 0.2), "chances of 1, 2, 3 … source frames between two frames of a sample", least=0
    )
    any_time: float = option(
        0.0,
        "share of samples whose middle frame is at any instant between the others; that of the rest is half-way",
        least=0,
        most=1,
    )
    window: int = option(
        3, "frames of clips that a sample spans, an odd number; more give more instants, and wider motion", least=3
    )
    candidates: int = option(2, "crops drawn per sample; the one that changes most is kept", least=1)
    colour_jitter: float = option(
        0.0, "largest relative change of brightness, contrast and saturation, drawn once per sample", least=0, most=1
    )
    random_motion_share: float = option(
        0.0, "share of samples composed of frames of the data in random, known motion", least=0, most=1
    )
    cache_gib: float = option(
        8.0,
        "decoded clips that a process keeps in memory, GiB for each folder of videos; others are decoded when drawn",
        least=0,
    )
    columns: str = option("prev,mid,next", "image columns of Hugging Face datasets")
    on_unreadable: str = option(
        "error",
        "a file that cannot be read stops the run (error) or is reported and left out (skip)",
        choices=("error", "skip"),
    )
    dataloader_num_workers: int = option(1, "loader processes per training process", least=0)
    # optimisation
    seed: int = option(0, "seed of everything that is drawn", least=0, less_than=2**32)
    max_train_steps: int = option(1000, "optimiser steps", least=1)
    stop_step: int = option(
        0, "end at this step, with a checkpoint; the same command with another value goes on. 0: at the last", least=0
    )
    train_batch_size: int = option(16, "samples per process and forward pass", least=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step", least=1)
    learning_rate: float = option(1e-4, "highest learning rate", more_than=0)
    lr_warmup_steps: int = option(200, "steps in which the learning rate rises", least=0)
    lr_scheduler: str = option(
        "cosine", "learning-rate schedule, by its name in diffusers.optimization.get_scheduler", choices=LR_SCHEDULES
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", more_than=0)
    ema_decay: float = option(
        0.0, "decay of the moving average of the weights, which is exported; 0: no average", least=0, less_than=1
    )
    # speed and memory
    mixed_precision: str = option(
        "", "precision of the networks; empty: that of the launch", choices=("", "no", "bf16", "fp16")
    )
    channels_last: bool = option(True, "weights in channels-last layout")
    compile: bool = option(False, "torch.compile the network")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    # what a run leaves
    checkpointing_steps: int = option(500, "steps between checkpoints", least=1)
    checkpoints_total_limit: int = option(
        2,
        "number of newest checkpoints that are kept, beside the best; with 1, nothing is left if a disk damages it",
        least=1,
    )
    log_steps: int = option(50, "steps between rows of summary.csv", least=1)
    report_to: str = option("tensorboard", "tracker that the log is sent to", choices=("tensorboard", "wandb", "none"))
    validation: str = option("", "data of the validation, as in --data; empty: none")
    validation_samples: int = option(64, "samples of a validation", least=1)
    validation_crop: int = option(256, "side of its centre crops, pixels", least=1)
    validation_steps: int = option(1000, "steps between validations", least=1)
    panels: int = option(4, "validation samples shown as pictures", least=0)
    lpips_net: str = option(
        "vgg", "features of LPIPS; none: no LPIPS, neither as a loss nor as a score", choices=("alex", "vgg", "none")
    )
    lpips_backbone: str = option("", "safetensors file with their weights; downloaded by torchvision if empty")
    push_to_hub: str = option("", "repository (user/name) that the result is uploaded to")
    hub_private_repo: bool = option(False, "make that repository private, if it is new")
    hub_revision: str = option("", "branch of it to commit to, made if there is none; empty: the main one")
    hub_message: str = option("", "message of the commit; empty: a general one")


def parse_options(options_class: type, stage: str, argv: list[str] | None, description: str) -> tuple[Any, dict]:
    """Options of a stage, and the whole configuration, in which empty sections are empty mappings.

    Raises:
        SystemExit: on an unknown flag or section, an unknown key in this stage's section or a network's, a value of the wrong type or out of its
            range, or a missing `--data` or `--output_dir`.
    """
    # 1. the configuration, whose values are the defaults that `--help` shows
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config")
    name = named.parse_known_args(argv)[0].config
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    config, section = ({}, {}) if name is None else _read_config(name, stage, fields, named)

    # 2. flags
    about = (
        f"Defaults below are those of --config {name}."
        if name
        else "Defaults below give way to those of --config, which --config NAME --help shows."
    )
    parser = argparse.ArgumentParser(
        description=description, epilog=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="paper, compact, tiny, motion, or the path of a YAML file")
    types = typing.get_type_hints(options_class)
    for name, field in fields.items():
        text = "; ".join(filter(None, (field.metadata["help"], str(field.metadata["allowed"]))))
        text = f"{text} (default: {_shown(section.get(name, field.default))})"
        argument = parser.add_argument(f"--{name}", help=text.replace("%", "%%"))
        if types[name] is bool:  # a switch may stand alone: `--compile` is `--compile true`
            argument.nargs, argument.const = "?", "true"
    flags = vars(parser.parse_args(argv))

    # 3. what they say together
    for name in fields:
        if flags[name] is not None:
            try:
                section[name] = flags[name] if types[name] is str else yaml.safe_load(flags[name])
            except yaml.YAMLError:
                section[name] = flags[name]  # which is of the wrong type, as is said below
    for name, value in section.items():
        try:
            section[name] = _as_type(value, types[name])
        except (TypeError, ValueError):
            wanted = getattr(types[name], "__name__", types[name])
            parser.error(
                f"--{name} must be of type {wanted}, such as {_shown(fields[name].default)}, but is {value!r}"
            )
    for name in ("data", "output_dir"):
        if not section.get(name):
            parser.error(f"--{name} is required")
    options = options_class(**section)
    try:
        if getattr(options, "hint_source", ""):
            hint_parts(options.hint_source)
            config["hint_source"] = options.hint_source
        _check_values(options)
    except ValueError as error:
        parser.error(str(error))
    return options, config


def _read_config(name: str, stage: str, fields: dict, parser: argparse.ArgumentParser) -> tuple[dict, dict]:
    """A configuration by its name or path, and a copy of the stage's section of it."""
    path = CONFIG_FOLDER / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        parser.error(f"--config must be one of {known}, or a YAML file, but is {name!r}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            config = {key: {} if value is None else value for key, value in config.items()}
        check_config(config)
    except (yaml.YAMLError, ValueError) as error:
        parser.error(f"{path.name}: {error}")
    section = dict(config.get(stage, {}))
    unknown = sorted(set(section) - set(fields))
    if unknown:
        parser.error(f"{path.name}, section {stage}: unknown key(s) {', '.join(unknown)}; known: {', '.join(fields)}")
    return config, section


def check_config(config: Any) -> None:
    """Refuse a configuration with a section or a network's key that nothing reads.

    Raises:
        ValueError: naming the key, and what is known.
    """
    if not isinstance(config, dict):
        raise ValueError("a configuration is a mapping of sections")
    known = {*MODEL_SECTIONS, *STAGES, "hint_source", "scheduler"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"unknown section(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    missing = sorted({*MODEL_SECTIONS, "hint_source", "scheduler"} - set(config) - {"hint_model"})
    if missing:
        raise ValueError(f"missing section(s) {', '.join(missing)}")
    for section in {*MODEL_SECTIONS, *STAGES, "scheduler"} & set(config):
        if not isinstance(config[section], dict):
            raise ValueError(f"section {section} must be a mapping of keys to values, but is {config[section]!r}")
    hint_parts(config["hint_source"])
    classes = dict(MODEL_SECTIONS)
    name = config["scheduler"].get("class")
    classes["scheduler"] = getattr(diffusers, str(name), None)
    if not (isinstance(classes["scheduler"], type) and issubclass(classes["scheduler"], SchedulerMixin)):
        raise ValueError(f"section scheduler: class must be a scheduler of diffusers, but is {name!r}")
    for section, owner in classes.items():
        if section not in config:
            continue
        arguments = {*inspect.signature(owner.__init__).parameters} - {"self"}
        if section == "scheduler":
            arguments.add("class")
        unknown = sorted(set(config[section]) - arguments)
        if unknown:
            raise ValueError(
                f"section {section}: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(arguments))}"
            )


def refuse_news(config: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if a configuration is of latents of news, which another stage trains.
    """
    if config["vqvae"].get("news_latents"):
        raise ValueError(
            "`config` must be one without `news_latents`, which training.train_sampler trains as a whole."
        )


def check_resolution(options: RunOptions, multiple: int) -> None:
    """
    Raises:
        ValueError: if crops are of another size than the networks take.
    """
    if options.resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple}, but is {options.resolution}.")


def check_unused(options: RunOptions, names: Iterable[str], where: str, config: dict[str, Any] | None = None) -> None:
    """
    Args:
        names: options that nothing reads.
        where: nothing reads them, for the message.
        config: what a configuration says of them, which may be for runs that do; their defaults if it says nothing.

    Raises:
        ValueError: if one of them has another value.
    """
    usual = {field.name: field.default for field in dataclasses.fields(options)} | (config or {})
    for name in names:
        value = usual[name]
        value = tuple(value) if isinstance(value, list) else value
        if getattr(options, name) != value:
            raise ValueError(f"`{name}` is not used {where} and must be {value!r}, but is {getattr(options, name)!r}.")


def as_configured(trained: ModelT, configured: ModelT, name: str = "") -> ModelT:
    """A network of `init`, which may be its part `name`.

    Raises:
        ValueError: if its configuration is not that of the one that is `configured`.
    """
    for key, value in configured.config.items():
        found = trained.config.get(key)
        # The size of samples is what a network was meant for, and nothing that it has.
        if (
            not key.startswith("_")
            and key != "sample_size"
            and (list(found) if isinstance(found, tuple) else found)
            != (list(value) if isinstance(value, tuple) else value)
        ):
            of = f" of {name}" if name else ""
            raise ValueError(f"`init`: `{key}`{of} must be {value!r}, as configured, but is {found!r}.")
    return trained


def training_scheduler(config: dict[str, Any]) -> SchedulerMixin:
    """
    The scheduler of a configuration, by which latents are made noisy.

    Raises:
        ValueError: if it makes them noisy in another way than a network can be trained on: those that sample by several steps do so
            from the last time that they sampled, and Euler's by a scale that sampling undoes.
    """
    settings = dict(config["scheduler"])
    name = settings.pop("class")
    scheduler = getattr(diffusers, name)(**settings)
    times = torch.tensor([0, scheduler.config.num_train_timesteps // 2, scheduler.config.num_train_timesteps - 1])
    sample, noise = torch.ones(3, 1, 1, 1), torch.full((3, 1, 1, 1), 2.0)
    try:
        signal = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        is_right = torch.allclose(
            scheduler.add_noise(sample, noise, times), signal.sqrt() * sample + (1 - signal).sqrt() * noise, atol=1e-4
        )
    except (AttributeError, IndexError, RuntimeError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"section scheduler: class must be one for training, such as DDPMScheduler or DDIMScheduler, but is {name}; sampling can "
            "take another (`pipe.scheduler = ….from_config(pipe.scheduler.config)`)."
        )
    return scheduler


def _check_values(options: RunOptions) -> None:
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), field.metadata["allowed"]
        if str(allowed) and value not in allowed:
            raise ValueError(f"--{field.name} must be {allowed}, but is {_shown(value)}")
    if options.window % 2 == 0:
        raise ValueError(f"--window must be an odd number, so that a frame is half-way, but is {options.window}")
    if sum(options.gaps) == 0:
        raise ValueError(f"--gaps must be chances, not all of them zero, but is {_shown(options.gaps)}")
    for name in ("lpips_weight", "gram_weight"):  # which not every stage has
        weight = getattr(options, name, 0)
        if options.lpips_net == "none" and weight > 0:
            raise ValueError(f"--{name} must be 0 with --lpips_net none, but is {weight}")


def _as_type(value: Any, wanted: Any) -> Any:
    """What YAML read, as the type of an option."""
    if typing.get_origin(wanted) is tuple:
        return tuple(_as_type(item, float) for item in value)
    if wanted is float and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-4 as a string
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError
    return value


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Report bad input, and training that went wrong, in one message without a traceback; exit status 2 or 1."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        calls = traceback.extract_tb(error.__traceback__)
        folders = {Path(__file__).parent, Path(madiff_diffusers.__file__).parent}
        ours = not folders.isdisjoint(Path(calls[-1].filename).parents)
        training = any(call.name in ("batches", "finish_micro_batch", "finish") for call in calls)
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not ours and not is_full and (training or not isinstance(error, OSError)):
            raise  # no bad input: where it happened is worth knowing
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
