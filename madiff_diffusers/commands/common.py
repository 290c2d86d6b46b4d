"""What commands share: options, the device, the checkpoint, and errors that are one line."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

    from ..pipeline_madiff import MADiffPipeline


# Of those that come with the package.
DEFAULT_CHECKPOINT = "madiff-fast"

DTYPES = ("auto", "float32", "float16", "bfloat16")

# Names that the command line takes beside torch's.
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class CommandError(Exception):
    """Bad input; shown in one line, exit code 2."""


def add_checkpoint_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="C",
        help="a saved pipeline's folder, a repository of the Hub (USER/NAME), or what comes with the package: madiff-fast, or "
        f"madiff-compact, which is slower and has more PSNR on Middlebury and DAVIS (default: {DEFAULT_CHECKPOINT})",
    )


def add_steps_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps per frame (default: the checkpoint's own)"
    )


def add_device_options(command: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Adds `--device`, and `--dtype` with this default."""
    command.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="cpu, cuda, cuda:1, mps, xpu, …; auto: a GPU if there is one; cuda is each process's own (default: auto)",
    )
    command.add_argument(
        "--dtype",
        default=dtype,
        type=parse_dtype,
        metavar="T",
        help="fp32, fp16 or bf16 (or float32, float16, bfloat16), or auto: the fastest that the device computes in by itself; frames, offsets and "
        f"hints stay in fp32 (default: {dtype})",
    )


def add_memory_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory that the process may take; frames too large for it are made in tiles (default: 8GiB; on an NVIDIA GPU its free memory)",
    )


def add_trust_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code of the checkpoint that is not this package's: its own source of motion hints",
    )


def parse_dtype(text: str) -> str:
    name = SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"must be one of auto, {', '.join(SHORT_DTYPES)} or {', '.join(SHORT_DTYPES.values())}, but is {text!r}"
        )
    return name


def in_flags(message: str, flags: dict[str, str]) -> str:
    """A message of Python's, with its arguments as the command line has them: `` `max_memory` `` is `--max-memory`, `` `resume=True` `` is `--resume`."""
    return re.sub(r"`(\w+)(?:=True)?`", lambda found: flags.get(found[1], found[0]), message)


def usable_device(name: str) -> "torch.device":
    """
    Args:
        name: torch's, or "auto".

    Raises:
        CommandError: if torch cannot use it.
    """
    import torch

    from ..precision import best_device

    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # torch's meta device has no values to be fetched
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for devices it cannot use
        raise CommandError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def chosen_dtype(args: argparse.Namespace) -> "torch.dtype":
    import torch

    from ..precision import fastest_dtype

    return fastest_dtype(usable_device(args.device)) if args.dtype == "auto" else getattr(torch, args.dtype)


def say_where(device: "torch.device", dtype: "torch.dtype") -> None:
    """A command's first line."""
    import torch

    from ..precision import is_emulated

    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    slow = ", which this CPU does not compute in by itself: slower than fp32" if is_emulated(device, dtype) else ""
    print(f"madiff: on {device}{name}, in {str(dtype).removeprefix('torch.')}{slow}", file=sys.stderr)


def checkpoint_folder(checkpoint: str, with_code: bool = False) -> Path:
    """The folder of a checkpoint on this machine; a repository of the Hub is fetched first.

    Raises:
        CommandError: if there is none.
    """
    from ..hub_repository import bundled_checkpoints, download_repository, local_checkpoint

    folder = local_checkpoint(checkpoint)
    if folder is not None and (folder / "model_index.json").is_file():
        return folder
    if Path(checkpoint).exists() or checkpoint.count("/") != 1:
        raise CommandError(
            f"--checkpoint must be a folder with a model_index.json, a repository of the Hub (USER/NAME) or one of "
            f"{', '.join(bundled_checkpoints())}, but is {checkpoint!r}"
        )
    try:
        return Path(download_repository(checkpoint, code=["*.py"] if with_code else []))
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--checkpoint {checkpoint!r} is no folder, and no repository of the Hub that can be had: {error}"
        ) from error


def load_pipeline(
    folder: Path, device: str, dtype: "torch.dtype", trust_remote_code: bool = False
) -> "MADiffPipeline":
    """A pipeline on a device.

    Raises:
        CommandError: if the folder's pipeline cannot be loaded, or there is no such device.
    """
    from diffusers.utils import logging

    from ..pipeline_madiff import MADiffPipeline

    place = usable_device(device)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what Diffusers logs on the way is in the error
    try:
        pipeline = MADiffPipeline.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged checkpoint shows in errors of every kind
        raise CommandError(
            f"--checkpoint {str(folder)!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return pipeline.to(place)


def chosen_pipeline(args: argparse.Namespace, device: "torch.device", dtype: "torch.dtype") -> "MADiffPipeline":
    """What `--checkpoint` names, on a device.

    Raises:
        CommandError: see `checkpoint_folder` and `load_pipeline`.
    """
    folder = checkpoint_folder(args.checkpoint, args.trust_remote_code)
    return load_pipeline(folder, str(device), dtype, args.trust_remote_code)


@contextmanager
def new_folder(output: str, argument: str) -> Iterator[Path]:
    """A folder to fill, which becomes the output once it is complete.

    Raises:
        CommandError: if the output exists already, or cannot be made.
    """
    from safetensors import SafetensorError

    from ..files import filled_folder

    path = Path(output)
    try:
        if path.exists() or path.is_symlink():
            raise CommandError(f"{argument} must not exist yet, but {path} does")
        if not path.absolute().parent.is_dir():
            raise CommandError(f"{argument}: no such folder: {path.parent}")
        with filled_folder(path) as folder:
            yield folder
    except (OSError, ValueError, SafetensorError) as error:
        raise CommandError(error) from error
