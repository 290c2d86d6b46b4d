"""Options of a training run: the defaults of a dataclass, then a section of a YAML file, then flags."""

import argparse
import contextlib
import dataclasses
import inspect
import sys
import traceback
import typing
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import diffusers
import yaml
from diffusers import UNet2DModel

import madiff_diffusers
from madiff_diffusers.eventgan import EventGANModel
from madiff_diffusers.motion_hints import HINT_SOURCES
from madiff_diffusers.pipeline_madiff import MADiffPipeline
from madiff_diffusers.vq_magan import VQMAGANModel

CONFIG_FOLDER = Path(__file__).parent / "configs"

# Sections of a configuration that hold the arguments of a class; "scheduler" names its own.
MODEL_SECTIONS = {"i2e": EventGANModel, "vqvae": VQMAGANModel, "unet": UNet2DModel, "pipeline": MADiffPipeline}
STAGES = ("train_i2e", "train_vq_magan", "train_denoiser")


def option(default: Any, help: str) -> Any:
    """A field of an options class, with the text that `--help` shows."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class RunOptions:
    """Options that every stage has; each stage adds its own."""

    data: str = option("", "training data: FORMAT:PATH[@WEIGHT], several joined by commas; see training/README.md")
    output: str = option("", "folder of the run")
    # data
    crop: int = option(128, "side of the training crops, pixels")
    gaps: Tuple[float, ...] = option((0.5, 0.3, 0.2), "chances of 1, 2, 3 … source frames between two frames of a sample")
    candidates: int = option(2, "crops drawn per sample, of which the one that changes most is kept")
    colour_jitter: float = option(0.0, "largest relative change of brightness, contrast and saturation, one for a sample")
    random_motion_share: float = option(0.0, "share of samples composed of frames of the data in random, known motion")
    decoder: str = option("av", "what decodes video files: av (PyAV) or opencv")
    cache_gib: float = option(8.0, "decoded clips that a process keeps in memory, GiB for each folder of videos; others are decoded when drawn")
    columns: str = option("prev,mid,next", "image columns of Hugging Face datasets")
    on_unreadable: str = option("error", "a file that cannot be read stops the run (error) or is reported and left out (skip)")
    workers: int = option(1, "loader processes per training process")
    # optimisation
    seed: int = option(0, "of everything that is drawn")
    steps: int = option(1000, "optimiser steps")
    stop_step: int = option(0, "end at this step, with a checkpoint; the same command with another value goes on. 0: at the last")
    batch_size: int = option(16, "samples per process and forward pass")
    accumulation: int = option(1, "forward passes per optimiser step")
    learning_rate: float = option(1e-4, "highest learning rate")
    warmup_steps: int = option(200, "steps in which the learning rate rises")
    lr_schedule: str = option("cosine", "a name of diffusers.optimization.get_scheduler")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    ema_decay: float = option(0.0, "decay of the moving average of the weights, which is what is exported; 0: none")
    # speed and memory
    mixed_precision: str = option("", "no, bf16 or fp16; empty: what the launch says")
    channels_last: bool = option(True, "weights in channels-last layout")
    compile: bool = option(False, "torch.compile the network")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    # what a run leaves
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(1, "checkpoints kept, newest first; the best is kept beside them")
    log_every: int = option(50, "steps between rows of summary.csv")
    tracker: str = option("tensorboard", "tensorboard, wandb or none")
    validation: str = option("", "data of the validation, as in --data; empty: none")
    validation_samples: int = option(64, "samples of a validation")
    validation_crop: int = option(256, "side of its centre crops, pixels")
    validate_every: int = option(1000, "steps between validations")
    panels: int = option(4, "validation samples shown as pictures")
    lpips_net: str = option("vgg", "features of LPIPS: alex, vgg, or none for no LPIPS, neither as a loss nor as a score")
    lpips_backbone: str = option("", "safetensors file with their weights; downloaded by torchvision if empty")
    push_to_hub: str = option("", "repository (user/name) that the result is uploaded to")
    hub_private: bool = option(False, "make that repository private, if it is new")
    hub_revision: str = option("", "branch of it to commit to, made if there is none; empty: the main one")
    hub_message: str = option("", "message of the commit; empty: a general one")


def parse_options(options_class: type, stage: str, argv: Optional[List[str]], description: str) -> Tuple[Any, Dict]:
    """Options of a stage, and the whole configuration.

    Raises:
        SystemExit: on an unknown flag, an unknown section, an unknown key in this stage's or a network's section, a value
            of the wrong type, or a missing `--data` or `--output`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="paper, compact, tiny, or the path of a YAML file")
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    types = typing.get_type_hints(options_class)
    for name, field in fields.items():
        # A switch may stand alone: `--compile` is `--compile true`.
        extra = {"nargs": "?", "const": "true"} if types[name] is bool else {}
        text = field.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{name}", help=f"{text} (default: {_shown(field.default)})", **extra)
    flags = vars(parser.parse_args(argv))
    path = CONFIG_FOLDER / f"{flags['config']}.yaml"
    path = path if path.is_file() else Path(flags["config"])
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        parser.error(f"--config must be one of {known}, or a YAML file, but is {flags['config']!r}")
    try:
        config = yaml.safe_load(path.read_text())
        check_config(config)
    except (yaml.YAMLError, ValueError) as error:
        parser.error(f"{path.name}: {error}")
    section = dict(config.get(stage) or {})
    _check_keys(section, fields, f"section {stage}", parser, path)
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
            parser.error(f"--{name} must be of type {wanted}, such as {_shown(fields[name].default)}, but is {value!r}")
    for name in ("data", "output"):
        if not section.get(name):
            parser.error(f"--{name} is required")
    options = options_class(**section)
    try:
        _check_values(options)
    except ValueError as error:
        parser.error(str(error))
    return options, config


def check_config(config: Any) -> None:
    """Refuse a configuration with a section or a key that nothing reads.

    Raises:
        ValueError: naming the key and what is known.
    """
    if not isinstance(config, dict):
        raise ValueError("a configuration is a mapping of sections")
    known = {*MODEL_SECTIONS, *STAGES, "hint_source", "scheduler"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"unknown section(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    missing = sorted({*MODEL_SECTIONS, "hint_source", "scheduler"} - set(config))
    if missing:
        raise ValueError(f"missing section(s) {', '.join(missing)}")
    if config["hint_source"] not in HINT_SOURCES:
        raise ValueError(f"hint_source must be one of {', '.join(HINT_SOURCES)}, but is {config['hint_source']!r}")
    classes = dict(MODEL_SECTIONS)
    name = (config["scheduler"] or {}).get("class")
    classes["scheduler"] = getattr(diffusers, str(name), None)
    if classes["scheduler"] is None:
        raise ValueError(f"section scheduler: class must be a scheduler of diffusers, but is {name!r}")
    for section, owner in classes.items():
        arguments = {*inspect.signature(owner.__init__).parameters} - {"self"}
        if section == "scheduler":
            arguments.add("class")
        unknown = sorted(set(config[section] or {}) - arguments)
        if unknown:
            raise ValueError(f"section {section}: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(arguments))}")


def _check_keys(section: Dict, fields: Dict, where: str, parser: argparse.ArgumentParser, path: Path) -> None:
    unknown = sorted(set(section) - set(fields))
    if unknown:
        parser.error(f"{path.name}, {where}: unknown key(s) {', '.join(unknown)}; known: {', '.join(fields)}")


def _check_values(options: RunOptions) -> None:
    choices = {
        "mixed_precision": ("", "no", "bf16", "fp16"),
        "tracker": ("tensorboard", "wandb", "none"),
        "decoder": ("av", "opencv"),
        "on_unreadable": ("error", "skip"),
        "lpips_net": ("alex", "vgg", "none"),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, but is {getattr(options, name)!r}")
    least = dict.fromkeys(("crop", "candidates", "steps", "batch_size", "accumulation", "save_every", "keep", "log_every"), 1)
    least.update(validate_every=1, validation_samples=1, validation_crop=1, guess_rounds=1, frames=2, workers=0, cache_gib=0)
    for name, number in least.items():
        if getattr(options, name, number) < number:
            raise ValueError(f"--{name} must be at least {number}, but is {getattr(options, name)}")
    if getattr(options, "squared_until", 1.0) <= 0:
        raise ValueError(f"--squared_until must be more than 0, but is {options.squared_until}")
    if options.lpips_net == "none" and getattr(options, "lpips_weight", 0) > 0:
        raise ValueError(f"--lpips_weight must be 0 with --lpips_net none, but is {options.lpips_weight}")
    if min(options.gaps) < 0 or sum(options.gaps) <= 0:
        raise ValueError(f"--gaps must be chances, not all of them zero, but is {_shown(options.gaps)}")


def _as_type(value: Any, wanted: Any) -> Any:
    """What YAML read, as the type of an option."""
    if typing.get_origin(wanted) is tuple:
        return tuple(float(item) for item in value)
    if wanted is float:
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
        ours = Path(calls[-1].filename).parent in (Path(__file__).parent, Path(madiff_diffusers.__file__).parent)
        training = any(call.name in ("batches", "finish_pass", "finish") for call in calls)
        if not ours and (training or not isinstance(error, OSError)):
            raise  # no bad input: where it happened is worth knowing
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
