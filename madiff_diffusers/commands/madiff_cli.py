"""The `madiff` command."""

import argparse
import codecs
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .. import __version__
from .ablate import AblateCommand
from .common import CommandError, in_flags
from .convert import ConvertEventGANCommand, ConvertRIFECommand
from .demo import DemoCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .interpolate import InterpolateCommand
from .push import PushCommand
from .video import VideoCommand


# What the pipeline's arguments are called on the command line, where that is not the same name.
_OTHER_NAMES = {"num_inference_steps": "steps", "image_prev": "prev", "image_next": "next"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="madiff", description="Video frame interpolation by motion-aware latent diffusion (MADiff)."
    )
    parser.add_argument("--version", action="version", version=f"madiff {__version__}")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show the whole error where a command fails, as MADIFF_DEBUG=1 in the environment does",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", help="what to do; madiff COMMAND --help tells how"
    )
    InterpolateCommand.register_subcommand(commands)
    VideoCommand.register_subcommand(commands)
    EvaluateCommand.register_subcommand(commands)
    AblateCommand.register_subcommand(commands)
    ExportCommand.register_subcommand(commands)
    PushCommand.register_subcommand(commands)
    DemoCommand.register_subcommand(commands)
    ConvertEventGANCommand.register_subcommand(commands)
    ConvertRIFECommand.register_subcommand(commands)
    for command in commands.choices.values():
        # The option may stand after the command's name, too; without a default, it leaves what stands before that name.
        command.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="show the whole error if it fails"
        )
        flags = {
            action.dest: action.option_strings[-1] if action.option_strings else action.metavar
            for action in command._actions
        }
        command.set_defaults(
            flags=flags | {name: flags[other] for name, other in _OTHER_NAMES.items() if other in flags}
        )
    return parser


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, by which services, containers and queues stop a command, and SIGHUP, which a closed terminal sends, end it as Ctrl-C does:
    what it must tidy up, it does. Where nobody hears the latter, as under nohup, it stays so."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut that short
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None for one that was not set by Python


def _as_it_can(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of file names as they are, and what an encoding has not as numbers."""
    for name in ("surrogateescape", "backslashreplace"):
        with suppress(UnicodeError):
            return codecs.lookup_error(name)(error)
    raise error


def _print_no_more() -> None:
    """Throw away what waits to be printed, which Python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_printed() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _print_no_more()
        raise CommandError(f"all is done, but what it prints cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    # Read when torch is loaded: how many turns of a loop its threads wait for each other. With the tenfold number, which is usual, a frame takes
    # twice as long where other programs need the cores, too; with none, half as long again where they do not.
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "30000"
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("madiff", _as_it_can)
        sys.stdout.reconfigure(errors="madiff")
    try:
        with _terminable():
            args.command_class(args).run()
            if sys.stdout is not None:
                _flush_printed()
    except BrokenPipeError:  # whoever reads what is printed has gone
        _print_no_more()
        return 128 + 13  # of SIGPIPE
    except CommandError as error:
        if args.traceback or os.environ.get("MADIFF_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        message = " ".join(in_flags(str(error), args.flags).split())
        print(f"madiff: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("madiff: interrupted", file=sys.stderr)
        return 130
    return 0
