"""`madiff interpolate`: frames between two image files."""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from . import BaseCommand
from .common import (
    CommandError,
    add_checkpoint_option,
    add_device_options,
    add_memory_option,
    add_steps_option,
    add_trust_option,
    chosen_dtype,
    chosen_pipeline,
    say_where,
    usable_device,
)


class InterpolateCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "interpolate",
            help="make the frames between two frames",
            description="Make the frame in the middle between two image files of the same size, or several frames at any instants.",
        )
        command.add_argument("prev", metavar="PREV", help="image file of the first frame")
        command.add_argument("next", metavar="NEXT", help="image file of the second frame")
        command.add_argument(
            "-o",
            "--output",
            metavar="OUT",
            required=True,
            help="image file to write; with more than one frame, OUT.png stands for OUT_1.png, OUT_2.png, …",
        )
        instants = command.add_mutually_exclusive_group()
        instants.add_argument(
            "--num-frames",
            type=int,
            default=1,
            metavar="N",
            help="number of frames to make, evenly spaced in time (default: 1)",
        )
        instants.add_argument(
            "--times",
            type=parse_instant,
            nargs="+",
            metavar="T",
            help="instants of the frames to make instead, between 0 (PREV) and 1 (NEXT): 0.25, 1/3, …",
        )
        add_steps_option(command)
        command.add_argument(
            "--seed", type=int, default=0, metavar="S", help="seed of the noise; same seed, same picture (default: 0)"
        )
        add_memory_option(command)
        add_checkpoint_option(command)
        add_device_options(command)
        command.add_argument(
            "--overwrite", action="store_true", help="replace OUT if it is there; PREV and NEXT never are"
        )
        add_trust_option(command)
        command.set_defaults(command_class=InterpolateCommand)

    def run(self) -> None:
        import torch

        from ..files import check_outputs
        from ..image_io import MOST_RESOLUTION, image_format, open_image, write_image
        from ..image_processor import rgb_of_image
        from ..pipeline_inputs import check_count, check_instants
        from ..properties import lost
        from ..terminal import bar_size
        from ..video.memory import USUAL_MEMORY, USUAL_PIXELS, memory_errors, tile_pixels_for, tiled
        from ..video.options import VideoOptions

        args = self.args

        # What can be wrong with files and numbers is found before a model is loaded.
        output = Path(args.output)
        try:
            prev, next_ = open_image(args.prev), open_image(args.next)
            frame_prev, frame_next = rgb_of_image(prev.image, args.prev), rgb_of_image(next_.image, args.next)
            format_name = image_format(output)
            notes = lost(prev.found | next_.found, "image", format_name)
        except (OSError, ValueError) as error:
            raise CommandError(error) from error
        if not output.parent.is_dir():
            raise CommandError(f"--output: no such folder: {output.parent}")
        if output.is_dir():
            raise CommandError(f"--output must name an image file, but {output} is a folder")
        if not 0 <= args.seed < 2**63:
            raise CommandError(f"--seed must be in [0, 2^63), but is {args.seed}")
        try:
            check_instants(args.num_frames, args.times)
            if args.steps is not None:
                check_count(args.steps, "num_inference_steps")
            max_memory = VideoOptions(max_memory=args.max_memory).checked().max_memory or USUAL_MEMORY
        except ValueError as error:
            raise CommandError(error) from error
        if frame_prev.shape != frame_next.shape:
            sizes = [f"{frame.shape[1]}x{frame.shape[0]}" for frame in (frame_prev, frame_next)]
            raise CommandError(f"PREV and NEXT must have the same size, but are {sizes[0]} and {sizes[1]}")

        paths, count = [output], args.num_frames if args.times is None else len(args.times)
        if count > 1:
            paths = [output.with_name(f"{output.stem}_{i}{output.suffix}") for i in range(1, count + 1)]
        try:
            check_outputs(
                [(path, args.overwrite) for path in paths], [args.prev, args.next], "; --overwrite replaces it"
            )
        except (OSError, ValueError) as error:
            raise CommandError(error) from error

        device, dtype = usable_device(args.device), chosen_dtype(args)
        say_where(device, dtype)
        pipeline = chosen_pipeline(args, device, dtype)
        pipeline.set_progress_bar_config(disable=None, **bar_size())  # but on a terminal
        pixels = frame_prev.shape[0] * frame_prev.shape[1]
        try:
            with memory_errors():
                # What the networks need is measured, which takes as long as a small frame: where it can matter.
                matters = args.max_memory is not None or pixels > USUAL_PIXELS
                tile_pixels = tile_pixels_for(pipeline, pixels, max_memory, args.steps) if matters else None
            with memory_errors(), tiled(pipeline, tile_pixels):
                frames = pipeline(
                    frame_prev,
                    frame_next,
                    num_inference_steps=args.steps,
                    num_frames=args.num_frames,
                    times=args.times,
                    generator=torch.Generator().manual_seed(args.seed),
                ).frames[0]
        except MemoryError as error:
            raise CommandError(f"{error}; a smaller --max-memory makes smaller tiles") from error
        except ValueError as error:
            raise CommandError(error) from error
        try:
            for path, frame in zip(paths, frames):
                write_image(frame, path, prev.profile, prev.resolution)
        except OSError as error:
            raise CommandError(error) from error
        most = MOST_RESOLUTION.get(format_name)
        if prev.resolution is not None and most is not None and max(prev.resolution) > most:
            notes.append(
                f"not kept: resolution of {max(prev.resolution):g} pixels per inch; {format_name} has room for {most:g}"
            )
        if prev.profile != next_.profile:
            notes.append("PREV and NEXT have different colour profiles; the result has that of PREV, or none")
        for note in notes:
            print(f"madiff: note: {note}", file=sys.stderr)
        print("\n".join(str(path) for path in paths))


def parse_instant(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number or a fraction, but is {text!r}") from None
