"""`madiff demo`: a page to try it on."""

import argparse
import importlib
import re

from . import BaseCommand
from .common import (
    CommandError,
    add_checkpoint_option,
    add_device_options,
    add_trust_option,
    chosen_dtype,
    chosen_pipeline,
    say_where,
    usable_device,
)


class DemoCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "demo",
            help="try it in a browser",
            description="Show a page, in a browser of this machine, that makes frames between two pictures, and videos smoother or slower. Needs pip install "
            "'madiff_diffusers[demo]'. What is uploaded is deleted after an hour, and when the page is stopped (Ctrl-C).",
        )
        command.add_argument(
            "--host",
            default="127.0.0.1",
            metavar="H",
            help="address to listen at; 0.0.0.0 shows the page to other machines (default: 127.0.0.1)",
        )
        command.add_argument(
            "--port", type=int, metavar="P", help="port to listen at (default: the first free one from 7860 on)"
        )
        command.add_argument(
            "--max-pixels",
            type=int,
            default=1920 * 1088,
            metavar="N",
            help="largest number of pixels of a frame (default: 2088960, which is 1920x1088)",
        )
        command.add_argument(
            "--max-seconds",
            type=float,
            default=20.0,
            metavar="S",
            help="longest video in seconds that may be uploaded (default: 20)",
        )
        command.add_argument(
            "--max-frames",
            type=int,
            default=2000,
            metavar="N",
            help="largest number of frames that one request may ask for (default: 2000)",
        )
        command.add_argument(
            "--max-upload",
            default="200mb",
            metavar="SIZE",
            help="largest size of an uploaded file: 500kb, 200mb, 1gb, … (default: 200mb)",
        )
        command.add_argument(
            "--max-waiting",
            type=int,
            default=20,
            metavar="N",
            help="largest number of requests that wait; one is worked on at a time (default: 20)",
        )
        add_checkpoint_option(command)
        add_device_options(command)
        add_trust_option(command)
        command.set_defaults(command_class=DemoCommand)

    def run(self) -> None:
        args = self.args
        for name in ("max_pixels", "max_seconds", "max_frames", "max_waiting"):
            if not getattr(args, name) > 0:
                raise CommandError(f"`{name}` must be more than 0, but is {getattr(args, name)}")
        if args.port is not None and not 0 < args.port < 65536:
            raise CommandError(f"`port` must be from 1 to 65535, but is {args.port}")
        if not re.fullmatch(r"\d+ *[kmg]b", args.max_upload, flags=re.IGNORECASE):
            raise CommandError(f"`max_upload` must be a size such as 500kb, 200mb or 1gb, but is {args.max_upload!r}")
        try:
            importlib.import_module("gradio")  # before a model is loaded
        except ModuleNotFoundError as error:
            raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[demo]'") from error
        from ..demo import Demo, Limits, serve

        device, dtype = usable_device(args.device), chosen_dtype(args)
        say_where(device, dtype)
        pipeline = chosen_pipeline(args, device, dtype)
        limits = Limits(args.max_pixels, args.max_seconds, args.max_frames, args.max_upload, args.max_waiting)
        try:
            serve(Demo(pipeline, limits, args.checkpoint), args.host, args.port)
        except OSError as error:
            raise CommandError(error) from error
