"""`madiff video`: smoother or slower videos."""

import argparse
import sys
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
    in_flags,
    say_where,
    usable_device,
)


class VideoCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "video",
            help="make a video smoother, or slower",
            description="Interpolate a video file, a folder of images (or a pattern such as 'f/%05d.png'), or each video file of a folder. Sound, "
            "subtitles, chapters, metadata, rotation and colours are kept. Finished parts lie in OUTPUT.parts until OUTPUT is complete. "
            "Several processes share the work: accelerate launch --num_processes N -m madiff_diffusers video …",
        )
        command.add_argument(
            "input", metavar="INPUT", help="video file, folder or pattern of images, or folder of video files"
        )
        command.add_argument(
            "output",
            metavar="OUTPUT",
            help=".mp4, .m4v, .mov, .mkv, .webm, .avi, .gif or .y4m file; a folder for PNG files, or for the videos of a folder",
        )
        timing = command.add_mutually_exclusive_group()
        timing.add_argument(
            "--factor",
            type=int,
            metavar="N",
            help="how many times as many frames: 2 doubles them (default: 2, or what --slow-motion asks for)",
        )
        timing.add_argument(
            "--fps", metavar="R", help="frames per second of OUTPUT instead: 60, 23.976, 30000/1001, …"
        )
        command.add_argument(
            "--slow-motion", metavar="N", help="number of times that OUTPUT lasts longer than INPUT (default: 1)"
        )
        command.add_argument(
            "--audio",
            choices=("keep", "stretch", "drop"),
            metavar="A",
            help="what becomes of sound: in slow motion, stretch (default; at the same pitch) or drop; else keep (default) or drop",
        )
        command.add_argument(
            "--codec",
            metavar="C",
            help="codec of OUTPUT: h264, hevc, vp9, av1, prores or ffv1; on a chip of this machine, h264_nvenc, hevc_qsv, … (default: what suits OUTPUT)",
        )
        command.add_argument(
            "--crf",
            type=int,
            metavar="Q",
            help="quality of the encoder; lower numbers give better pictures and larger files (default: 18 for h264, 20 for hevc, 24 for vp9, av1)",
        )
        command.add_argument(
            "--preset", metavar="P", help="preset of the encoder: fast, slow, …; numbers for vp9 and av1"
        )
        command.add_argument(
            "--cut-threshold",
            metavar="X",
            help="smallest difference between thumbnails, from 0 to 1, that may be a scene cut; 2: nothing is a cut (default: 0.08)",
        )
        command.add_argument(
            "--cut-ratio",
            metavar="X",
            help="number of times that the picture changes more at a cut than in the frames around it (default: 3)",
        )
        command.add_argument(
            "--max-gap",
            metavar="S",
            help="longest gap in seconds between two frames that is filled (default: 1; between images, any)",
        )
        command.add_argument(
            "--dedup",
            action="store_true",
            help="leave out frames that only repeat the one before, and let motion go on across them",
        )
        command.add_argument(
            "--dedup-threshold",
            metavar="X",
            help="largest change of a repeated frame, in grey levels of 255, in the 8x8 pixels that change most (default: 2)",
        )
        command.add_argument(
            "--dedup-run",
            type=int,
            metavar="N",
            help="largest number of repeated frames in a row that are left out; where there are more, the picture stands still (default: 3)",
        )
        command.add_argument(
            "--input-fps",
            dest="image_fps",
            metavar="R",
            help="frames per second of INPUT that is images (default: 24)",
        )
        add_steps_option(command)
        command.add_argument(
            "--seed", type=int, metavar="S", help="seed of the noise, the same for every frame (default: 0)"
        )
        command.add_argument(
            "--batch",
            type=int,
            metavar="N",
            help="pairs of frames that are made at once (default: 1; on an NVIDIA GPU as many as fit, 8 at most)",
        )
        add_memory_option(command)
        command.add_argument(
            "--preview",
            metavar="FILE",
            help="image file that shows the latest frames side by side, written after every two seconds of OUTPUT",
        )
        command.add_argument(
            "--resume", action="store_true", help="go on with what a stopped command left in OUTPUT.parts"
        )
        command.add_argument(
            "--overwrite", action="store_true", help="replace OUTPUT, and OUTPUT.parts, if they are there"
        )
        command.add_argument(
            "--keep-partial",
            action="store_true",
            help="when stopped, or when something fails or is damaged, write what is good as NAME.partial.ENDING",
        )
        command.add_argument("--skip-damage", action="store_true", help="go on after damaged places of INPUT")
        add_checkpoint_option(command)
        add_device_options(command)
        add_trust_option(command)
        command.set_defaults(command_class=VideoCommand)

    def run(self) -> None:
        from ..files import check_outputs
        from ..processes import own_device, this_process
        from ..video.batches import video_batch
        from ..video.destinations import (
            check_output,
            check_places,
            check_preview,
            outputs_of,
            parts_folder,
            what_stays,
        )
        from ..video.errors import VideoError
        from ..video.jobs import interpolate_video, make_video
        from ..video.memory import memory_errors
        from ..video.options import VideoOptions

        args = self.args
        # What is not given has its default there.
        options = {
            name: value
            for name, value in vars(args).items()
            if name in VideoOptions.__dataclass_fields__ and value is not None
        }
        state = this_process(usable_device(args.device))
        try:
            checked = VideoOptions(**options).checked()
            preview = None if args.preview is None else Path(args.preview)
            batch, is_folder, left_out = video_batch(Path(args.input), Path(args.output))
            if is_folder:
                if args.resume and not args.overwrite:
                    there = {output: what_stays(output, args.keep_partial) for _, output in batch}
                    for path in filter(None, there.values()) if state.is_main_process else ():
                        print(f"madiff: note: {path} is there already, and stays, whatever made it", file=sys.stderr)
                    batch = [(source, output) for source, output in batch if there[output] is None]
                written = [
                    each
                    for _, output in batch
                    for each in outputs_of(output, args.resume, args.overwrite, args.keep_partial)
                ]
                if preview is not None:
                    check_preview(preview)
                    # Of any of the videos, since each replaces that of the one before.
                    own = any(
                        outputs_of(output, args.resume, args.overwrite, False, preview)[-1][1] for _, output in batch
                    )
                    written.append((preview, own))
                    if preview.absolute().parent.resolve() == Path(args.input).resolve():
                        raise VideoError(f"`preview` {preview} would lie among the videos of {args.input}")
                check_outputs(
                    written,
                    [path for path in Path(args.input).iterdir() if path.is_file()],
                    "; --overwrite replaces it, --resume leaves it and what it is of",
                )
                state.wait_for_everyone()  # one that looks later would find what others have made
                Path(args.output).mkdir(parents=True, exist_ok=True)
                for _, output in batch:
                    check_output(output, checked, args.keep_partial)
            else:
                check_places(
                    args.input, Path(args.output), checked, args.resume, args.overwrite, args.keep_partial, preview
                )
            device, dtype = own_device(state, usable_device(args.device)), chosen_dtype(args)
            if state.is_main_process:
                say_where(device, dtype)
            pipeline = chosen_pipeline(args, device, dtype)
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
            try:
                with memory_errors():
                    (make_video if is_folder else interpolate_video)(
                        pipeline,
                        source,
                        output,
                        resume=args.resume,
                        overwrite=args.overwrite,
                        keep_partial=args.keep_partial,
                        preview=preview,
                        processes=state if len(batch) == 1 else None,
                        tell=lambda note: print(f"madiff: note: {in_flags(note, args.flags)}", file=sys.stderr),
                        **options,
                    )
            except (OSError, ValueError, MemoryError) as error:
                message = str(error)
                if isinstance(error, MemoryError):
                    message += "; a smaller --max-memory makes smaller tiles"
                if str(parts_folder(output)) not in message:  # else it says what is there
                    message += what_is_kept(output)
                if len(batch) == 1:
                    raise CommandError(message) from error
                print(f"madiff: {in_flags(message, args.flags)}", file=sys.stderr)
                failed += 1
                continue
            except (KeyboardInterrupt, SystemExit):
                kept = what_is_kept(output)
                if state.is_main_process and (kept or not output.exists()):  # else it was just done
                    print(f"madiff: {output} is not complete{kept}", file=sys.stderr)
                raise
            if len(batch) > 1 or state.is_main_process:
                print(output)
        if len(batch) > 1:
            state.wait_for_everyone()  # one that fails would end the others' work
        if failed:
            raise CommandError(f"{failed} of {len(batch)} videos could not be made")


def what_is_kept(output: Path) -> str:
    """The end of a message: what is left of a video that could not be finished."""
    from ..video.destinations import partial_path, parts_folder

    folder, partial = parts_folder(output), partial_path(output)
    kept = f"; what is done is in {folder}, and --resume goes on with it" if folder.exists() else ""
    return f"{kept}; it can be watched in {partial}" if kept and partial.exists() else kept
