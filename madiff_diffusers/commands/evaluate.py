"""`madiff evaluate`: methods on a benchmark."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import BaseCommand
from .common import (
    CommandError,
    add_checkpoint_option,
    add_device_options,
    add_steps_option,
    add_trust_option,
    checkpoint_folder,
    chosen_dtype,
    load_pipeline,
    say_where,
    usable_device,
)


if TYPE_CHECKING:
    from ..evaluation.methods import MADiffMethod, Method, Settings
    from ..pipeline_madiff import MADiffPipeline


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


class EvaluateCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "evaluate",
            help="run methods on a benchmark: frames, scores, tables, pages",
            description="Make the middle frames of a benchmark (or those at several instants), score the files, and write frames, tables (results.md, .csv, .json), a "
            "chart and pages (index.html) into a folder. The folder may hold other benchmarks and methods already; its tables then "
            "hold all of them. The same command takes up what was stopped.",
        )
        command.add_argument(
            "--method",
            nargs="+",
            default=["madiff"],
            metavar="M",
            help="madiff (a checkpoint), average, flow (OpenCV's DIS), or MODULE:FUNCTION that takes two (H, W, 3) uint8 arrays and "
            "gives the one between; for instants other than the middle, it takes the instant, from 0 to 1, as a third argument (default: madiff)",
        )
        command.add_argument(
            "--label",
            metavar="TEXT",
            help="name of a single method in the tables (default: the method and its settings)",
        )
        add_evaluation_options(command, gallery=20)
        add_trust_option(command)
        command.set_defaults(command_class=EvaluateCommand)

    def run(self) -> None:
        args = self.args
        if args.label is not None and len(args.method) > 1:
            raise CommandError(f"--label is for one method, but --method names {len(args.method)}")
        with evaluation_errors():
            evaluation = Evaluation(args)
            evaluation.run([evaluation.method(name) for name in args.method], args.label)


def add_evaluation_options(command: argparse.ArgumentParser, gallery: int) -> None:
    command.add_argument(
        "--benchmark", required=True, metavar="NAME", help=f"benchmark to run: one of {', '.join(BENCHMARK_NAMES)}"
    )
    command.add_argument(
        "--root",
        required=True,
        metavar="DIR",
        help="folder of the benchmark; if it holds something else, the error tells the layout",
    )
    command.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="folder to write into, or to go on in where a command was stopped",
    )
    add_checkpoint_option(command)
    add_steps_option(command)
    command.add_argument(
        "--hint-policy",
        metavar="P",
        help="hint policy: sampling, damped, start, neighbours, none, or true: the true frame's (default: the checkpoint's own)",
    )
    command.add_argument(
        "--hint-interval",
        type=int,
        metavar="N",
        help="sampling steps from one extraction of hints to the next (default: the checkpoint's own)",
    )
    command.add_argument(
        "--hint-source",
        metavar="S",
        help="use only this part of the checkpoint's hints: search, flow, fine_flow, events, model or one of its own",
    )
    command.add_argument(
        "--scheduler", metavar="CLASS", help="scheduler class of Diffusers (default: the checkpoint's own)"
    )
    command.add_argument(
        "--no-quantize", action="store_true", help="decode latents as they are, not as their nearest codes"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the noise, the same for every item (default: 0)"
    )
    add_device_options(command, dtype="float32")  # figures are the same on every machine
    command.add_argument("--limit", type=int, metavar="N", help="run only the first N items of the benchmark")
    command.add_argument(
        "--skip",
        type=int,
        metavar="N",
        help="in frames and vimeo-septuplet, leave N frames out between two neighbours and make them (default: 1)",
    )
    command.add_argument(
        "--metrics",
        nargs="+",
        default=["psnr", "ssim", "lpips"],
        metavar="M",
        help="psnr, ssim, lpips, lpips_vgg, flolpips (flow by RAFT), fid, step_ratio (largest over smallest step of a pan that the command "
        "makes); a metric that cannot be had is left out, and named (default: psnr ssim lpips)",
    )
    for option, network in (
        ("--lpips-backbone", "AlexNet's feature layers (.safetensors), for lpips and flolpips"),
        ("--lpips-vgg-backbone", "VGG-16's feature layers (.safetensors), for lpips_vgg"),
        ("--raft-weights", "torchvision's raft_large (.pth or .safetensors), for flolpips"),
        ("--inception-weights", "torch-fidelity's Inception network (.pth), for fid"),
    ):
        command.add_argument(option, metavar="FILE", help=f"file of {network}; downloaded if not given")
    command.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="number of items of one size that are made and scored at once (default: 1)",
    )
    command.add_argument(
        "--gallery",
        type=int,
        default=gallery,
        metavar="N",
        help=f"number of items on a run's page, worst first; 0: no page (default: {gallery})",
    )


class Evaluation:
    """What `evaluate` and `ablate` do alike: load what the options name, run methods, print the table."""

    def __init__(self, args: argparse.Namespace):
        from ..evaluation.methods import Settings
        from ..evaluation.metrics import Scorer
        from ..processes import own_device, this_process

        if not 0 <= args.seed < 2**63:
            raise CommandError(f"--seed must be in [0, 2^63), but is {args.seed}")
        self.args = args
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

    @cached_property
    def pipeline(self) -> "MADiffPipeline":
        pipeline = load_pipeline(self.folder, str(self.device), self.dtype, self.args.trust_remote_code)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def method(self, name: str) -> "Method":
        from ..evaluation.methods import BASELINES, Baseline, FunctionMethod

        if name == "madiff":
            return self.checkpoint(self.settings)
        if name in BASELINES:
            return Baseline(name)
        if ":" in name:
            return FunctionMethod(name)
        raise CommandError(f"--method must be madiff, {', '.join(BASELINES)} or MODULE:FUNCTION, but is {name!r}")

    def checkpoint(self, settings: "Settings") -> "MADiffMethod":
        from ..evaluation.methods import MADiffMethod, checkpoint_digest

        name = (
            Path(self.args.checkpoint).resolve().name if Path(self.args.checkpoint).exists() else self.args.checkpoint
        )
        return MADiffMethod(self.pipeline, name, checkpoint_digest(self.folder), settings, self.args.seed)

    def run(self, methods: Sequence["Method"], label: str | None = None, compare: bool = False) -> None:
        """Run methods and print the table; with `compare` also how far each is from the checkpoint's own settings, or from the first."""
        from ..evaluation.evaluate import evaluate
        from ..evaluation.report import differences, markdown

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
    from ..video.memory import memory_errors

    try:
        with memory_errors():
            yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[eval]'") from error
    except BrokenPipeError:
        raise
    except (OSError, ValueError, MemoryError) as error:
        raise CommandError(error) from error
