"""The `madiff` command."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import List, Optional


class CommandError(Exception):
    """Bad input; shown in one line, exit code 2."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="madiff", description="Video frame interpolation by motion-aware latent diffusion (MADiff)."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    interpolate = commands.add_parser(
        "interpolate",
        help="make the frames between two frames",
        description="Make the frame (or frames) in the middle between two image files of the same size.",
    )
    interpolate.add_argument("prev", metavar="PREV", help="image file of the first frame")
    interpolate.add_argument("next", metavar="NEXT", help="image file of the second frame")
    interpolate.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="image file to write; with more than one frame, OUT.png stands for OUT_1.png, OUT_2.png, …",
    )
    interpolate.add_argument(
        "--num-frames", type=int, default=1, metavar="N", help="frames to make: 1, 3, 7, 15, … (default: 1)"
    )
    interpolate.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps per frame (default: the checkpoint's own)"
    )
    interpolate.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the noise; same seed, same picture (default: 0)"
    )
    interpolate.add_argument(
        "--checkpoint",
        default="madiff-compact",
        metavar="DIR",
        help="folder of a saved pipeline, or the name of one that comes with the package (default: madiff-compact)",
    )
    interpolate.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, mps, … (default: cpu)")
    interpolate.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        metavar="T",
        help="float32, float16 or bfloat16 (default: float32)",
    )
    interpolate.set_defaults(run=run_interpolate)

    for name, run, text in (
        ("evaluate", run_evaluate, "Interpolate the triplets of a benchmark folder and print the mean scores."),
        ("ablate", run_ablate, "Print a table of scores: where motion hints come from, by the number of sampling steps."),
    ):
        command = commands.add_parser(name, help=text[0].lower() + text[1:-1], description=text)
        command.add_argument(
            "--root",
            required=True,
            metavar="DIR",
            help="input/NAME/frame10.png, frame11.png with gt/NAME/frame10i11.png, "
            "or NAME/frame_00.png, frame_02.png, frame_01_gt.png",
        )
        command.add_argument("--checkpoint", default="madiff-compact", metavar="DIR", help="as for interpolate")
        command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the noise (default: 0)")
        command.add_argument("--device", default="cpu", metavar="D", help="as for interpolate")
        command.add_argument(
            "--lpips-backbone",
            metavar="FILE",
            help="safetensors file of AlexNet's feature layers; downloaded by torchvision if not given",
        )
        if name == "evaluate":
            command.add_argument("-o", "--output", metavar="DIR", help="folder to write the frames to, as NAME.png")
            command.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the checkpoint's own)")
        else:
            command.add_argument(
                "--steps", type=int, nargs="+", default=[1, 2, 5, 10, 25, 50], metavar="N", help="default: 1 2 5 10 25 50"
            )
            command.add_argument(
                "--policies",
                nargs="+",
                default=["none", "neighbours", "sampling"],
                metavar="P",
                help="none, start, neighbours or sampling (default: none neighbours sampling)",
            )
        command.set_defaults(run=run)

    convert = commands.add_parser(
        "convert-eventgan",
        help="convert a checkpoint of the original EventGAN",
        description="Convert a checkpoint of the original EventGAN to an EventGANModel folder.",
    )
    convert.add_argument("source", metavar="CHECKPOINT", help="the original's .pt or .pth file")
    convert.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; must not exist")
    convert.set_defaults(run=run_convert)
    return parser


def run_interpolate(args: argparse.Namespace) -> None:
    from .image_io import image_format, read_image, write_image

    # What can be wrong with the files is found before a model is loaded.
    output = Path(args.output)
    try:
        frame_prev, frame_next = read_image(args.prev), read_image(args.next)
        image_format(output)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    if not output.parent.is_dir():
        raise CommandError(f"--output: no such folder: {output.parent}")
    if output.is_dir():
        raise CommandError(f"--output must name an image file, but {output} is a folder")
    if not 0 <= args.seed < 2**63:
        raise CommandError(f"--seed must be in [0, 2^63), but is {args.seed}")
    if frame_prev.size != frame_next.size:
        sizes = [f"{image.size[0]}x{image.size[1]}" for image in (frame_prev, frame_next)]
        raise CommandError(f"PREV and NEXT must have the same size, but are {sizes[0]} and {sizes[1]}")

    import torch

    pipeline = load_pipeline(args.checkpoint, args.device, getattr(torch, args.dtype))
    try:
        frames = pipeline(
            frame_prev,
            frame_next,
            num_inference_steps=args.steps,
            num_frames=args.num_frames,
            generator=torch.Generator().manual_seed(args.seed),
        ).frames[0]
    except (ValueError, torch.OutOfMemoryError) as error:
        raise CommandError(error) from error
    if len(frames) == 1:
        paths = [output]
    else:
        paths = [output.with_name(f"{output.stem}_{i}{output.suffix}") for i in range(1, len(frames) + 1)]
    try:
        for path, frame in zip(paths, frames):
            write_image(frame, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
    print("\n".join(str(path) for path in paths))


def build_evaluator(args: argparse.Namespace) -> "Evaluator":  # noqa: F821
    import torch

    try:
        from .evaluation import Evaluator, find_triplets

        triplets = find_triplets(args.root)
        pipeline = load_pipeline(args.checkpoint, args.device, torch.float32)
        return Evaluator(pipeline, triplets, args.lpips_backbone, args.seed)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[eval]'") from error
    except (OSError, ValueError) as error:
        raise CommandError(error) from error


def run_evaluate(args: argparse.Namespace) -> None:
    from .evaluation import summary

    evaluator = build_evaluator(args)
    output = None if args.output is None else Path(args.output)
    try:
        means = evaluator.score(output, num_inference_steps=args.steps)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    print(summary(Path(args.root).name, len(evaluator.triplets), means))


def run_ablate(args: argparse.Namespace) -> None:
    try:
        for row in build_evaluator(args).ablate(args.policies, args.steps):
            print(row, flush=True)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error


def load_pipeline(checkpoint: str, device: str, dtype: "torch.dtype") -> "MADiffPipeline":  # noqa: F821
    """A pipeline on a device.

    Raises:
        CommandError: if there is no such checkpoint or device.
    """
    import torch

    from .pipeline_madiff import CHECKPOINT_FOLDER, MADiffPipeline

    bundled = sorted(path.name for path in CHECKPOINT_FOLDER.glob("*") if path.is_dir())
    if checkpoint not in bundled and not (Path(checkpoint) / "model_index.json").is_file():
        raise CommandError(
            f"--checkpoint must be a folder with a model_index.json or one of {', '.join(bundled)}, "
            f"but is {checkpoint!r}"
        )
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for devices it cannot use
        raise CommandError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    try:
        return MADiffPipeline.from_pretrained(checkpoint, dtype=dtype).to(place)
    except (OSError, ValueError) as error:
        raise CommandError(f"--checkpoint {checkpoint!r} cannot be loaded: {error}") from error


def run_convert(args: argparse.Namespace) -> None:
    from .convert_eventgan import convert_eventgan_checkpoint

    output = Path(args.output)
    if output.exists():
        raise CommandError(f"--output must not exist yet, but {output} does")
    try:
        model = convert_eventgan_checkpoint(args.source)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            model.save_pretrained(Path(folder) / "model")
            os.replace(Path(folder) / "model", output)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    print(output)


def main(argv: Optional[List[str]] = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
        message = " ".join(str(error).split())
        print(f"madiff: error: {message}", file=sys.stderr)
        return 2
    return 0
