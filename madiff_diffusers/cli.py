"""The `madiff` command."""

import argparse
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from . import __version__


DTYPES = ("auto", "float32", "float16", "bfloat16")

# Names that the command takes beside torch's.
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# What the pipeline's arguments are called on the command line, where that is not the same name.
_OTHER_NAMES = {"num_inference_steps": "steps", "image_prev": "prev", "image_next": "next"}

VARIANTS = {"fp16": "float16", "bf16": "bfloat16"}

BENCHMARK_NAMES = (
    "middlebury",
    "ucf101",
    "davis",
    "snu-film-easy",
    "snu-film-medium",
    "snu-film-hard",
    "snu-film-extreme",
    "vimeo-triplet",
    "vimeo-septuplet",
    "xiph-2k",
    "xiph-4k",
    "vfitex",
    "triplets",
    "frames",
)


class CommandError(Exception):
    """Bad input; shown in one line, exit code 2."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="madiff", description="Video frame interpolation by motion-aware latent diffusion (MADiff)."
    )
    parser.add_argument("--version", action="version", version=f"madiff {__version__}")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="where a command fails, show the whole error; as MADIFF_DEBUG=1 in the environment does",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    interpolate = commands.add_parser(
        "interpolate",
        help="make the frames between two frames",
        description="Make the frame in the middle between two image files of the same size, or several frames at any instants.",
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
    instants = interpolate.add_mutually_exclusive_group()
    instants.add_argument(
        "--num-frames", type=int, default=1, metavar="N", help="frames to make, evenly spaced in time (default: 1)"
    )
    instants.add_argument(
        "--times",
        type=parse_instant,
        nargs="+",
        metavar="T",
        help="instants of the frames to make instead, between 0 (PREV) and 1 (NEXT): 0.25, 1/3, …",
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
        metavar="C",
        help="a saved pipeline's folder, a repository of the Hub (USER/NAME), or what comes with the package (default: madiff-compact)",
    )
    add_device_options(interpolate)
    interpolate.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is there; PREV and NEXT never are"
    )
    interpolate.set_defaults(run=run_interpolate)

    video = commands.add_parser(
        "video",
        help="make a video smoother, or slower",
        description="Interpolate a video file, a folder of images (or a pattern such as 'f/%05d.png'), or each video file of a folder. Sound, "
        "subtitles, chapters, metadata, rotation and colours are kept. Finished parts lie in OUTPUT.parts until OUTPUT is complete. "
        "Several processes share the work: accelerate launch --num_processes N -m madiff_diffusers video …",
    )
    video.add_argument(
        "input", metavar="INPUT", help="video file, folder or pattern of images, or folder of video files"
    )
    video.add_argument(
        "output",
        metavar="OUTPUT",
        help=".mp4, .m4v, .mov, .mkv, .webm, .avi, .gif or .y4m file; a folder for PNG files, or for the videos of a folder",
    )
    timing = video.add_mutually_exclusive_group()
    timing.add_argument(
        "--factor",
        type=int,
        metavar="N",
        help="frames in the place of each one (default: 2, or what --slow-motion asks for)",
    )
    timing.add_argument("--fps", metavar="R", help="frames a second instead: 60, 23.976, 30000/1001, …")
    video.add_argument("--slow-motion", metavar="N", help="times that the result lasts longer (default: 1)")
    video.add_argument(
        "--audio",
        choices=("keep", "stretch", "drop"),
        metavar="A",
        help="in slow motion, stretch (default; at the same pitch) or drop; else keep (default) or drop",
    )
    video.add_argument(
        "--codec",
        metavar="C",
        help="h264, hevc, vp9, av1, prores or ffv1; of a chip that this machine has, h264_nvenc, hevc_qsv, … (default: what suits OUTPUT)",
    )
    video.add_argument(
        "--crf",
        type=int,
        metavar="Q",
        help="quality; less is better and larger (default: 18 for h264, 20 for hevc, 24 for vp9, av1)",
    )
    video.add_argument("--preset", metavar="P", help="the encoder's: fast, slow, …; numbers for vp9 and av1")
    video.add_argument(
        "--cut-threshold",
        metavar="X",
        help="least change of thumbnails, of 1, that may be a scene cut; 2: none is (default: 0.08)",
    )
    video.add_argument(
        "--cut-ratio", metavar="X", help="times that a cut changes more than frames around it (default: 3)"
    )
    video.add_argument("--max-gap", metavar="S", help="seconds between frames above which none are made (default: 1)")
    video.add_argument(
        "--dedup",
        action="store_true",
        help="leave out frames that only repeat the one before, and make motion go on across them",
    )
    video.add_argument(
        "--dedup-threshold",
        metavar="X",
        help="change, of 255, of the 8x8 pixels that change most, up to which a frame is a repetition (default: 2)",
    )
    video.add_argument(
        "--dedup-run",
        type=int,
        metavar="N",
        help="repetitions in a row above which the picture stands still (default: 3)",
    )
    video.add_argument("--input-fps", dest="image_fps", metavar="R", help="frames a second of images (default: 24)")
    video.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps per frame (default: the checkpoint's own)"
    )
    video.add_argument(
        "--seed", type=int, metavar="S", help="seed of the noise, the same for every frame (default: 0)"
    )
    video.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="that the process may take; larger frames are made by tiles (default: 8GiB)",
    )
    video.add_argument(
        "--preview",
        metavar="FILE",
        help="image file for the latest frames side by side, written every two seconds of the result",
    )
    video.add_argument("--resume", action="store_true", help="go on with what a stopped command left in OUTPUT.parts")
    video.add_argument("--overwrite", action="store_true", help="replace OUTPUT, and OUTPUT.parts, if they are there")
    video.add_argument(
        "--keep-partial",
        action="store_true",
        help="when stopped, or when something fails or is damaged, write what is good as NAME.partial.ENDING",
    )
    video.add_argument("--skip-damage", action="store_true", help="go on behind damaged places of INPUT")
    video.add_argument("--checkpoint", default="madiff-compact", metavar="C", help="as for interpolate")
    add_device_options(video)
    video.set_defaults(run=run_video)

    evaluate = commands.add_parser(
        "evaluate",
        help="run methods on a benchmark: frames, scores, tables, pages",
        description="Make the middle frames of a benchmark (or those at several instants), score the files, and write frames, tables (results.md, .csv, .json), a "
        "chart and pages (index.html) into a folder. The folder may hold other benchmarks and methods already; its tables then "
        "hold all of them. The same command takes up what was stopped.",
    )
    evaluate.add_argument(
        "--method",
        nargs="+",
        default=["madiff"],
        metavar="M",
        help="madiff (a checkpoint), average, flow (OpenCV's DIS), or MODULE:FUNCTION that takes two (H, W, 3) uint8 arrays and "
        "gives the one between; for other instants than the middle, it is given these, from 0 to 1, besides (default: madiff)",
    )
    evaluate.add_argument(
        "--label", metavar="TEXT", help="row in the tables, for a single method (default: what it is)"
    )
    evaluate.set_defaults(run=run_evaluate)

    ablate = commands.add_parser(
        "ablate",
        help="what a checkpoint's parts are worth, on a benchmark",
        description="Compare settings of a checkpoint on a benchmark, all else being equal, and print a table; writes what "
        "evaluate writes.",
    )
    ablate.add_argument(
        "question",
        metavar="QUESTION",
        choices=("hints", "source", "interval", "steps", "scheduler", "quantized", "latents"),
        help="hints: where motion hints come from (none, neighbours, start, sampling, damped); source: events, flow or both; interval: steps "
        "between re-extractions (8 steps unless told); steps: sampling steps; scheduler: which; quantized: latents moved to "
        "their nearest codes or not; latents: what is decoded (denoised, zero, noise, mirrored: denoised of the pair mirrored, true: of the true frame)",
    )
    ablate.add_argument(
        "--values",
        nargs="+",
        metavar="V",
        help="what to compare, instead of: all hints; all sources; intervals 1 2 4 8; steps "
        "1 2 5 10 25 50; six schedulers; quantized yes no; all latents",
    )
    ablate.set_defaults(run=run_ablate)
    for command in (evaluate, ablate):
        add_evaluation_options(command, gallery=20 if command is evaluate else 0)

    export = commands.add_parser(
        "export",
        help="save a checkpoint as a repository of the Hub",
        description="Save a checkpoint as a folder that is a whole repository of the Hub: float32 weights, other precisions beside them, "
        "the code that DiffusionPipeline.from_pretrained needs where this package is not installed, licence and model card. "
        "Push it with madiff push.",
    )
    export.add_argument(
        "output", metavar="DIR", nargs="?", help="folder to write; must not exist; may be left out with --onnx"
    )
    export.add_argument(
        "--onnx",
        metavar="DIR",
        help="folder to write, with the networks as ONNX graphs for other runtimes; must not exist; takes some minutes",
    )
    export.add_argument("--checkpoint", default="madiff-compact", metavar="C", help="as for interpolate")
    export.add_argument(
        "--variant",
        nargs="+",
        default=[],
        choices=tuple(VARIANTS),
        metavar="V",
        help="weights in half precision beside them: fp16, bf16",
    )
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="size of a weight file above which it becomes several, such as 5GB"
    )
    export.add_argument(
        "--results",
        metavar="FILE",
        help="results.json of madiff evaluate, whose scores of this checkpoint go into the card's header",
    )
    export.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights for the card's header, as the Hub names it: apache-2.0, …",
    )
    export.add_argument(
        "--space",
        action="store_true",
        help="write a Space instead, which shows madiff demo with this checkpoint: app.py, requirements.txt, README.md",
    )
    export.set_defaults(run=run_export)

    push = commands.add_parser(
        "push",
        help="upload a saved pipeline or component to the Hub",
        description="Upload what madiff export or a training script saved to the Hugging Face Hub, in one commit; hf auth login first.",
    )
    push.add_argument("folder", metavar="DIR", help="folder of a saved pipeline or component")
    push.add_argument("repository", metavar="USER/NAME", help="repository; made if there is none")
    push.add_argument(
        "--private", action="store_true", help="make a new repository private (default: as the account has it)"
    )
    push.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to; made if there is none (default: the main one)"
    )
    push.add_argument("--message", metavar="TEXT", help="commit message")
    push.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of committing to the branch"
    )
    push.set_defaults(run=run_push)

    demo = commands.add_parser(
        "demo",
        help="try it in a browser",
        description="Show a page, in a browser of this machine, that makes frames between two pictures, and videos smoother or slower. Needs pip install "
        "'madiff_diffusers[demo]'. What is uploaded is deleted after an hour, and when the page is stopped (Ctrl-C).",
    )
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen at; 0.0.0.0 shows the page to other machines (default: 127.0.0.1)",
    )
    demo.add_argument(
        "--port", type=int, metavar="P", help="port to listen at (default: the first free one from 7860 on)"
    )
    demo.add_argument(
        "--max-pixels",
        type=int,
        default=1920 * 1088,
        metavar="N",
        help="of a frame (default: 2088960, which is 1920x1088)",
    )
    demo.add_argument(
        "--max-seconds", type=float, default=20.0, metavar="S", help="that an uploaded video may last (default: 20)"
    )
    demo.add_argument(
        "--max-frames", type=int, default=2000, metavar="N", help="that one request may ask for (default: 2000)"
    )
    demo.add_argument(
        "--max-upload", default="200mb", metavar="SIZE", help="of a file: 500kb, 200mb, 1gb, … (default: 200mb)"
    )
    demo.add_argument(
        "--max-waiting",
        type=int,
        default=20,
        metavar="N",
        help="requests in the queue; one is worked on at a time (default: 20)",
    )
    demo.add_argument("--checkpoint", default="madiff-compact", metavar="C", help="as for interpolate")
    add_device_options(demo)
    demo.set_defaults(run=run_demo)

    convert = commands.add_parser(
        "convert-eventgan",
        help="convert a checkpoint of the original EventGAN",
        description="Convert a checkpoint of the original EventGAN to an EventGANModel folder.",
    )
    convert.add_argument("source", metavar="CHECKPOINT", help="the original's .pt or .pth file")
    convert.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; must not exist")
    convert.set_defaults(run=run_convert)

    rife = commands.add_parser(
        "convert-rife",
        help="convert the flow network of a RIFE 4.0 checkpoint",
        description="Convert the flow network of a RIFE 4.0 checkpoint to a RIFEFlowModel folder, which can be a pipeline's hint_model.",
    )
    rife.add_argument("source", metavar="CHECKPOINT", help="RIFE's flownet.pkl")
    rife.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; must not exist")
    rife.set_defaults(run=run_convert_rife)
    for command in (interpolate, video, evaluate, ablate, export, demo):
        command.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run code of the checkpoint that is not this package's: its own source of motion hints",
        )
    for command in set(commands.choices.values()):
        # Behind the command's name, too; what stands before it is not put back by a default.
        command.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="where it fails, show the whole error"
        )
        flags = {
            action.dest: action.option_strings[-1] if action.option_strings else action.metavar
            for action in command._actions
        }
        command.set_defaults(
            flags=flags | {name: flags[other] for name, other in _OTHER_NAMES.items() if other in flags}
        )
    return parser


def add_device_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="cpu, cuda, cuda:1, mps, xpu, …; auto: a GPU if there is one; cuda is each process's own (default: auto)",
    )
    command.add_argument(
        "--dtype",
        default="float32",
        type=parse_dtype,
        metavar="T",
        help="fp32, fp16 or bf16 (or float32, float16, bfloat16), or auto: the fastest that the device computes in by itself (default: fp32)",
    )


def parse_dtype(text: str) -> str:
    name = SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"must be one of auto, {', '.join(SHORT_DTYPES)} or {', '.join(SHORT_DTYPES.values())}, but is {text!r}"
        )
    return name


def parse_instant(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number or a fraction, but is {text!r}") from None


def run_interpolate(args: argparse.Namespace) -> None:
    from .image_io import image_format, open_image, write_image
    from .image_processor import rgb_of_image
    from .outputs import check_outputs
    from .properties import lost

    # What can be wrong with the files is found before a model is loaded.
    output = Path(args.output)
    try:
        prev, next_ = open_image(args.prev), open_image(args.next)
        frame_prev, frame_next = rgb_of_image(prev.image, args.prev), rgb_of_image(next_.image, args.next)
        notes = lost(prev.found | next_.found, "image", image_format(output))
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    if not output.parent.is_dir():
        raise CommandError(f"--output: no such folder: {output.parent}")
    if output.is_dir():
        raise CommandError(f"--output must name an image file, but {output} is a folder")
    if not 0 <= args.seed < 2**63:
        raise CommandError(f"--seed must be in [0, 2^63), but is {args.seed}")
    if frame_prev.shape != frame_next.shape:
        sizes = [f"{frame.shape[1]}x{frame.shape[0]}" for frame in (frame_prev, frame_next)]
        raise CommandError(f"PREV and NEXT must have the same size, but are {sizes[0]} and {sizes[1]}")

    paths, count = [output], args.num_frames if args.times is None else len(args.times)
    if count > 1:
        paths = [output.with_name(f"{output.stem}_{i}{output.suffix}") for i in range(1, count + 1)]
    try:
        check_outputs([(path, args.overwrite) for path in paths], [args.prev, args.next], "; --overwrite replaces it")
    except (OSError, ValueError) as error:
        raise CommandError(error) from error

    import torch

    from .terminal import bar_size

    device, dtype = usable_device(args.device), chosen_dtype(args)
    say_where(device, dtype)
    pipeline = load_pipeline(
        checkpoint_folder(args.checkpoint, args.trust_remote_code), str(device), dtype, args.trust_remote_code
    )
    pipeline.set_progress_bar_config(disable=None, **bar_size())  # but on a terminal
    try:
        frames = pipeline(
            frame_prev,
            frame_next,
            num_inference_steps=args.steps,
            num_frames=args.num_frames,
            times=args.times,
            generator=torch.Generator().manual_seed(args.seed),
        ).frames[0]
    except (ValueError, torch.OutOfMemoryError) as error:
        raise CommandError(error) from error
    try:
        for path, frame in zip(paths, frames):
            write_image(frame, path, prev.profile, prev.resolution)
    except OSError as error:
        raise CommandError(error) from error
    if prev.profile != next_.profile:
        notes.append("PREV and NEXT have different colour profiles; the result has that of PREV, or none")
    for note in notes:
        print(f"madiff: note: {note}", file=sys.stderr)
    print("\n".join(str(path) for path in paths))


def run_video(args: argparse.Namespace) -> None:
    import torch

    from .outputs import check_outputs
    from .processes import own_device, this_process
    from .video.batches import video_batch
    from .video.jobs import check_output, check_places, interpolate_video, make_video, outputs_of
    from .video.options import VideoOptions

    # What is not given has its default there.
    options = {
        name: value
        for name, value in vars(args).items()
        if name in VideoOptions.__dataclass_fields__ and value is not None
    }
    state = this_process(usable_device(args.device))
    try:
        checked = VideoOptions(**options).checked()
        batch, is_folder, left_out = video_batch(Path(args.input), Path(args.output))
        if is_folder:
            # With --resume, those that are there are done.
            written = [
                each
                for _, output in batch
                for each in outputs_of(output, args.resume, args.overwrite or args.resume, args.keep_partial)
            ]
            written += [] if args.preview is None else [(Path(args.preview), args.overwrite or args.resume)]
            check_outputs(
                written,
                [path for path in Path(args.input).iterdir() if path.is_file()],
                "; --overwrite replaces it, --resume leaves it",
            )
            state.wait_for_everyone()  # one that looks later would find what others have made
            Path(args.output).mkdir(parents=True, exist_ok=True)
            for _, output in batch:
                check_output(output, checked)
        else:
            preview = None if args.preview is None else Path(args.preview)
            check_places(
                args.input, Path(args.output), checked, args.resume, args.overwrite, args.keep_partial, preview
            )
        device, dtype = own_device(state, usable_device(args.device)), chosen_dtype(args)
        if state.is_main_process:
            say_where(device, dtype)
        pipeline = load_pipeline(
            checkpoint_folder(args.checkpoint, args.trust_remote_code), str(device), dtype, args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    pipeline.set_progress_bar_config(disable=True)
    if left_out and state.is_main_process:
        print(
            f"madiff: note: left out, for there is no video in them: {', '.join(path.name for path in left_out)}",
            file=sys.stderr,
        )
    failed = 0
    # Of a single video, each process makes some parts; of several, each makes some of the videos.
    for source, output in batch[state.process_index :: state.num_processes] if len(batch) > 1 else batch:
        if is_folder and args.resume and output.exists() and not args.overwrite:
            continue
        try:
            result = (make_video if is_folder else interpolate_video)(
                pipeline,
                source,
                output,
                resume=args.resume,
                overwrite=args.overwrite,
                keep_partial=args.keep_partial,
                preview=None if args.preview is None else Path(args.preview),
                processes=state if len(batch) == 1 else None,
                **options,
            )
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            message = str(error) + what_is_kept(output)
            if len(batch) == 1:
                raise CommandError(message) from error
            print(f"madiff: {in_flags(message, args.flags)}", file=sys.stderr)
            failed += 1
            continue
        except KeyboardInterrupt:
            if state.is_main_process:
                print(f"madiff: {output} is not complete{what_is_kept(output)}", file=sys.stderr)
            raise
        if len(batch) > 1 or state.is_main_process:
            for note in result.notes:
                print(f"madiff: note: {in_flags(note, args.flags)}", file=sys.stderr)
            print(output)
    if len(batch) > 1:
        state.wait_for_everyone()  # one that fails would end the others' work
    if failed:
        raise CommandError(f"{failed} of {len(batch)} videos could not be made")


def what_is_kept(output: Path) -> str:
    """Of a video that could not be finished, for the end of a message."""
    from .video.jobs import partial_path, parts_folder

    folder, partial = parts_folder(output), partial_path(output)
    kept = f"; what is done is in {folder}, and --resume goes on with it" if folder.exists() else ""
    return f"{kept}; it can be watched in {partial}" if kept and partial.exists() else kept


def add_evaluation_options(command: argparse.ArgumentParser, gallery: int) -> None:
    command.add_argument("--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(BENCHMARK_NAMES)}")
    command.add_argument(
        "--root", required=True, metavar="DIR", help="folder of the benchmark; a wrong one is told the layout"
    )
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write into, or to go on in")
    command.add_argument("--checkpoint", default="madiff-compact", metavar="C", help="as for interpolate")
    command.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the checkpoint's own)")
    command.add_argument(
        "--hint-policy",
        metavar="P",
        help="sampling, damped, start, neighbours or none (default: the checkpoint's own)",
    )
    command.add_argument(
        "--hint-interval", type=int, metavar="N", help="steps between re-extractions (default: the checkpoint's)"
    )
    command.add_argument(
        "--hint-source",
        metavar="S",
        help="use only this part of the checkpoint's hints: events, flow, fine_flow or one of its own",
    )
    command.add_argument(
        "--scheduler", metavar="CLASS", help="a scheduler class of Diffusers (default: the checkpoint's own)"
    )
    command.add_argument(
        "--no-quantize", action="store_true", help="decode latents as they are, not as their nearest codes"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the noise, the same for every item (default: 0)"
    )
    add_device_options(command)
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    command.add_argument(
        "--skip",
        type=int,
        metavar="N",
        help="of frames and vimeo-septuplet, leave N frames out between two neighbours and make them (default: 1)",
    )
    command.add_argument(
        "--metrics",
        nargs="+",
        default=["psnr", "ssim", "lpips"],
        metavar="M",
        help="psnr, ssim, lpips, lpips_vgg, flolpips (flow by RAFT), fid, step_ratio (largest over smallest step of a pan that the command "
        "makes) (default: psnr ssim lpips); what cannot be had is left out by name",
    )
    for option, network in (
        ("--lpips-backbone", "AlexNet's feature layers (.safetensors), for lpips and flolpips"),
        ("--lpips-vgg-backbone", "VGG-16's feature layers (.safetensors), for lpips_vgg"),
        ("--raft-weights", "torchvision's raft_large (.pth or .safetensors), for flolpips"),
        ("--inception-weights", "torch-fidelity's Inception network (.pth), for fid"),
    ):
        command.add_argument(option, metavar="FILE", help=f"file of {network}; downloaded if not given")
    command.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="items of one size made and scored at once (default: 1)"
    )
    command.add_argument(
        "--gallery",
        type=int,
        default=gallery,
        metavar="N",
        help=f"items on a run's page, worst first; 0: none (default: {gallery})",
    )


class EvaluationCommand:
    """What `evaluate` and `ablate` share: loads what the options name, runs methods, prints the table."""

    def __init__(self, args: argparse.Namespace):

        from .evaluation.methods import Settings
        from .evaluation.metrics import Scorer
        from .processes import own_device, this_process

        if not 0 <= args.seed < 2**63:
            raise CommandError(f"--seed must be in [0, 2^63), but is {args.seed}")
        self.args, self._pipeline = args, None
        device = usable_device(args.device)
        self.state = this_process(device)
        self.device = own_device(self.state, device)
        self.dtype = chosen_dtype(args)
        if self.state.is_main_process:
            say_where(self.device, self.dtype)
        quantized = False if args.no_quantize else None
        self.settings = Settings(
            args.steps, args.hint_policy, args.hint_interval, args.hint_source, args.scheduler, quantized
        )
        self.scorer = Scorer(
            args.metrics,
            self.device,
            args.lpips_backbone,
            args.lpips_vgg_backbone,
            args.raft_weights,
            args.inception_weights,
        )
        for name, reason in self.scorer.left_out.items():
            print(f"madiff: {name} is left out: {reason}", file=sys.stderr)
        if not self.scorer.names:
            raise CommandError("--metrics: none of them can be had")

    @cached_property
    def folder(self) -> Path:
        return checkpoint_folder(self.args.checkpoint, self.args.trust_remote_code)

    @property
    def pipeline(self) -> "MADiffPipeline":  # noqa: F821
        if self._pipeline is None:
            self._pipeline = load_pipeline(self.folder, str(self.device), self.dtype, self.args.trust_remote_code)
            self._pipeline.set_progress_bar_config(disable=True)
        return self._pipeline

    def method(self, name: str) -> "Method":  # noqa: F821
        from .evaluation.methods import BASELINES, Baseline, FunctionMethod

        if name == "madiff":
            return self.checkpoint(self.settings)
        if name in BASELINES:
            return Baseline(name)
        if ":" in name:
            return FunctionMethod(name)
        raise CommandError(f"--method must be madiff, {', '.join(BASELINES)} or MODULE:FUNCTION, but is {name!r}")

    def checkpoint(self, settings: "Settings") -> "MADiffMethod":  # noqa: F821
        from .evaluation.methods import MADiffMethod, checkpoint_digest

        name = (
            Path(self.args.checkpoint).resolve().name if Path(self.args.checkpoint).exists() else self.args.checkpoint
        )
        return MADiffMethod(self.pipeline, name, checkpoint_digest(self.folder), settings, self.args.seed)

    def run(self, methods: "Sequence[Method]", label: str | None = None, compare: bool = False) -> None:  # noqa: F821
        """Run methods and print the table; with `compare` also how far each is from the checkpoint's own settings, or from the first."""
        from .evaluation.evaluate import evaluate
        from .evaluation.report import differences, markdown

        args, output = self.args, Path(self.args.output)
        summaries = evaluate(
            args.benchmark,
            args.root,
            output,
            methods,
            self.scorer,
            label=label,
            limit=args.limit,
            skip=args.skip,
            batch_size=args.batch_size,
            gallery=args.gallery,
            state=self.state,
        )
        if self.state.is_main_process:
            print(markdown(summaries), end="")
            if compare:
                own = self.checkpoint(self.settings).identity
                labels = [method.label for method in methods if method.identity == own] or [methods[0].label]
                ran = {method.label for method in methods}
                table = differences([summary for summary in summaries if summary["label"] in ran], labels[0])
                print(f"\n{table}" if table else "", end="")
            print(f"madiff: {output / 'index.html'}", file=sys.stderr)


@contextmanager
def evaluation_errors() -> Iterator[None]:
    import torch

    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[eval]'") from error
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        raise CommandError(error) from error


def run_evaluate(args: argparse.Namespace) -> None:
    if args.label is not None and len(args.method) > 1:
        raise CommandError(f"--label is for one method, but --method names {len(args.method)}")
    with evaluation_errors():
        command = EvaluationCommand(args)
        command.run([command.method(name) for name in args.method], args.label)


def run_ablate(args: argparse.Namespace) -> None:
    with evaluation_errors():
        from .evaluation.evaluate import QUESTIONS, ablation

        setting, _ = QUESTIONS[args.question]
        values = None if args.values is None else [parse_setting(setting, value) for value in args.values]
        if args.question == "interval" and args.steps is None:
            args.steps = 8  # at a small checkpoint's one or two steps, there is nothing to space out
        command = EvaluationCommand(args)
        variants = ablation(args.question, command.settings, command.pipeline.config.hint_source, values)
        command.run([command.checkpoint(settings) for settings in variants], compare=True)


def parse_setting(name: str, text: str) -> "Union[int, bool, str]":  # noqa: F821
    try:
        if name in ("steps", "hint_interval"):
            return int(text)
        return {"yes": True, "no": False}[text] if name == "quantized" else text
    except (KeyError, ValueError) as error:
        kind = "yes or no" if name == "quantized" else "integers"
        raise CommandError(f"--values must be {kind}, but has {text!r}") from error


def checkpoint_folder(checkpoint: str, with_code: bool = False) -> Path:
    """Where a checkpoint lies on this machine, after it was fetched from the Hub if that is where it is from.

    Raises:
        CommandError: if there is none.
    """
    from .hub_repository import download_repository
    from .pipeline_files import CHECKPOINT_FOLDER, bundled_checkpoints

    if (Path(checkpoint) / "model_index.json").is_file():
        return Path(checkpoint)
    if checkpoint in bundled_checkpoints() and not Path(checkpoint).exists():
        return CHECKPOINT_FOLDER / checkpoint
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


def chosen_dtype(args: argparse.Namespace) -> "torch.dtype":  # noqa: F821
    import torch

    from .precision import fastest_dtype

    return fastest_dtype(usable_device(args.device)) if args.dtype == "auto" else getattr(torch, args.dtype)


def say_where(device: "torch.device", dtype: "torch.dtype") -> None:  # noqa: F821
    """A command's first line."""
    import torch

    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"madiff: on {device}{name}, in {str(dtype).removeprefix('torch.')}", file=sys.stderr)


def load_pipeline(
    folder: Path,
    device: str,
    dtype: "torch.dtype",  # noqa: F821
    trust_remote_code: bool = False,
) -> "MADiffPipeline":  # noqa: F821
    """A pipeline on a device.

    Raises:
        CommandError: if the folder's pipeline cannot be loaded, or there is no such device.
    """
    from diffusers.utils import logging

    from .pipeline_madiff import MADiffPipeline

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


def usable_device(name: str) -> "torch.device":  # noqa: F821
    """
    Args:
        name: torch's, or "auto".

    Raises:
        CommandError: if torch cannot use it.
    """
    import torch

    from .precision import best_device

    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for devices it cannot use
        raise CommandError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def run_export(args: argparse.Namespace) -> None:
    import torch

    from .space import write_space

    size = args.max_shard_size
    if size is not None and not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", size):
        raise CommandError(f"--max-shard-size must be a number with KB, MB, GB or TB, such as 5GB, but is {size!r}")
    if args.output is None and args.onnx is None:
        raise CommandError("DIR or --onnx must be given")
    if args.space and (
        args.output is None or args.onnx or args.variant or size is not None or args.results is not None
    ):
        raise CommandError(
            "--space takes DIR, --checkpoint and --license alone: a Space's weights are its own, in float32"
        )
    for name in ("variant", "max_shard_size", "results", "license"):
        if args.output is None and getattr(args, name):
            raise CommandError(f"--{name.replace('_', '-')} is for DIR, which is not given")
    with ExitStack() as folders:
        # Both are made sure of before the work.
        graphs = folders.enter_context(new_folder(args.onnx, "--onnx")) if args.onnx is not None else None
        folder = folders.enter_context(new_folder(args.output, "DIR")) if args.output is not None else None
        source = checkpoint_folder(args.checkpoint, args.trust_remote_code)
        pipeline = load_pipeline(source, "cpu", torch.float32, args.trust_remote_code)
        if graphs is not None:
            export_graphs(graphs, pipeline)
        if args.space:
            write_space(folder, pipeline, source.name, args.license)
        elif folder is not None:
            metadata = {"license": args.license} if args.license else {}
            if args.results is not None:
                metadata.update(results_metadata(args.results, source, pipeline))
            pipeline.save_pretrained(folder, max_shard_size=size)
            for variant in args.variant:
                half = load_pipeline(source, "cpu", torch.float32, args.trust_remote_code)
                for part in half.components.values():
                    if isinstance(part, torch.nn.Module):
                        # Not by the pipeline's or the model's own method, which warn of running in half precision.
                        torch.nn.Module.to(part, getattr(torch, VARIANTS[variant]))
                half.save_pretrained(folder, variant=variant, max_shard_size=size)
            if metadata:
                add_to_card(folder / "README.md", metadata)
    for written in filter(None, (args.output, args.onnx)):
        print(written)


def export_graphs(folder: Path, pipeline: "MADiffPipeline") -> None:  # noqa: F821
    """
    Raises:
        CommandError: if packages are missing, or a part cannot become a graph.
    """
    from .onnx_export import export_onnx

    try:
        export_onnx(folder, pipeline.vqvae, pipeline.unet, pipeline.scheduler, getattr(pipeline, "hint_model", None))
    except (ImportError, ValueError) as error:
        raise CommandError(error) from error


def results_metadata(results: str, folder: Path, pipeline: "MADiffPipeline") -> "dict[str, Any]":  # noqa: F821
    """What a file of results says of a checkpoint, for its model card.

    Raises:
        CommandError: if it is no such file, or says nothing of this checkpoint.
    """
    try:
        from .evaluation.methods import MADiffMethod, checkpoint_digest
        from .evaluation.report import card_metadata, read_results
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[eval]'") from error
    method = MADiffMethod(pipeline, folder.name, checkpoint_digest(folder))
    try:
        return card_metadata(read_results(results), method.identity)
    except (OSError, ValueError) as error:
        raise CommandError(f"--results {results!r}: {error}") from error


def add_to_card(path: Path, metadata: "dict[str, Any]") -> None:  # noqa: F821
    """
    Raises:
        CommandError: if the card's header cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(path, ignore_metadata_errors=False)
    except Exception as error:  # YAML's, for what is no YAML; the Hub client's, for what is no header
        raise CommandError(f"the checkpoint's README.md has a header that cannot be read: {error}") from error
    for name, value in metadata.items():
        setattr(card.data, name, value)
    card.save(path)


def run_demo(args: argparse.Namespace) -> None:
    for name in ("max_pixels", "max_seconds", "max_frames", "max_waiting"):
        if not getattr(args, name) > 0:
            raise CommandError(f"`{name}` must be more than 0, but is {getattr(args, name)}")
    if args.port is not None and not 0 < args.port < 65536:
        raise CommandError(f"`port` must be from 1 to 65535, but is {args.port}")
    if not re.fullmatch(r"\d+ *[kmg]b", args.max_upload, flags=re.IGNORECASE):
        raise CommandError(f"`max_upload` must be a size such as 500kb, 200mb or 1gb, but is {args.max_upload!r}")
    try:
        import gradio  # noqa: F401, before a model is loaded
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[demo]'") from error
    from .demo import Demo, Limits, serve

    device, dtype = usable_device(args.device), chosen_dtype(args)
    say_where(device, dtype)
    pipeline = load_pipeline(
        checkpoint_folder(args.checkpoint, args.trust_remote_code), str(device), dtype, args.trust_remote_code
    )
    limits = Limits(args.max_pixels, args.max_seconds, args.max_frames, args.max_upload, args.max_waiting)
    try:
        serve(Demo(pipeline, limits, args.checkpoint), args.host, args.port)
    except OSError as error:
        raise CommandError(error) from error


def run_push(args: argparse.Namespace) -> None:
    from .hub_repository import upload_repository

    try:
        spare_card = component_card(Path(args.folder))
        print(
            upload_repository(
                args.folder,
                args.repository,
                private=args.private or None,
                revision=args.revision,
                commit_message=args.message,
                create_pr=args.create_pr,
                spare_card=spare_card,
            )
        )
    except ValueError as error:
        raise CommandError(error) from error
    except OSError as error:
        raise CommandError(
            f"{error}. Nothing is lost: {args.folder} is as it was, and the same command tries again."
        ) from error


def component_card(folder: Path) -> "ModelCard | None":  # noqa: F821
    """A model card for a component that was saved without one; None for a pipeline, which is not.

    Raises:
        ValueError: if its configuration is damaged.
    """
    import madiff_diffusers

    from .hub_repository import model_card

    if not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return model_card(getattr(madiff_diffusers, config["_class_name"]).from_config(config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is no component's of this package: {type(error).__name__}: {error}"
        ) from error


def run_convert(args: argparse.Namespace) -> None:
    from .convert_eventgan import convert_eventgan_checkpoint

    with new_folder(args.output, "--output") as folder:
        convert_eventgan_checkpoint(args.source).save_pretrained(folder)
    print(args.output)


def run_convert_rife(args: argparse.Namespace) -> None:
    from .convert_rife import convert_rife_checkpoint

    with new_folder(args.output, "--output") as folder:
        convert_rife_checkpoint(args.source).save_pretrained(folder)
    print(args.output)


@contextmanager
def new_folder(output: str, argument: str) -> Iterator[Path]:
    """A folder to fill, which becomes the output once it is complete.

    Raises:
        CommandError: if the output exists already, or cannot be made.
    """
    from safetensors import SafetensorError

    path = Path(output)
    try:
        if path.exists() or path.is_symlink():
            raise CommandError(f"{argument} must not exist yet, but {path} does")
        if not path.absolute().parent.is_dir():
            raise CommandError(f"{argument}: no such folder: {path.parent}")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}.") as folder:
            filled = Path(folder) / "filled"
            filled.mkdir()
            yield filled
            os.replace(filled, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CommandError(error) from error


def in_flags(message: str, flags: dict[str, str]) -> str:
    """A message of Python's, with its arguments as the command line has them: `` `max_memory` `` is `--max-memory`, `` `resume=True` `` is `--resume`."""
    return re.sub(r"`(\w+)(?:=True)?`", lambda found: flags.get(found[1], found[0]), message)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.run(args)
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
