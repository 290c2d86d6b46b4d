"""`madiff export`: a checkpoint as a repository of the Hub, a Space, or ONNX graphs."""

import argparse
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BaseCommand
from .common import (
    CommandError,
    add_checkpoint_option,
    add_trust_option,
    checkpoint_folder,
    load_pipeline,
    new_folder,
)


if TYPE_CHECKING:
    from ..pipeline_madiff import MADiffPipeline


VARIANTS = {"fp16": "float16", "bf16": "bfloat16"}


class ExportCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "export",
            help="save a checkpoint as a repository of the Hub",
            description="Save a checkpoint as a folder that is a whole repository of the Hub: float32 weights, other precisions beside them, "
            "the code that DiffusionPipeline.from_pretrained needs where this package is not installed, licence and model card. "
            "Push it with madiff push.",
        )
        command.add_argument(
            "output", metavar="DIR", nargs="?", help="folder to write; must not exist; may be left out with --onnx"
        )
        command.add_argument(
            "--onnx",
            metavar="DIR",
            help="folder to write the networks to, as ONNX graphs for other runtimes; must not exist; takes some minutes",
        )
        add_checkpoint_option(command)
        command.add_argument(
            "--variant",
            nargs="+",
            default=[],
            choices=tuple(VARIANTS),
            metavar="V",
            help="further weights in half precision: fp16, bf16",
        )
        command.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            help="largest size of a file of weights, such as 5GB; larger ones become several files",
        )
        command.add_argument(
            "--results",
            metavar="FILE",
            help="results.json of madiff evaluate; its scores of this checkpoint go into the card's header",
        )
        command.add_argument(
            "--license",
            metavar="ID",
            help="licence of the weights for the card's header, as the Hub names it: apache-2.0, …",
        )
        command.add_argument(
            "--space",
            action="store_true",
            help="write a Space that shows madiff demo with this checkpoint instead: app.py, requirements.txt, README.md",
        )
        add_trust_option(command)
        command.set_defaults(command_class=ExportCommand)

    def run(self) -> None:
        import torch

        from ..files import check_outputs
        from ..hub_repository import local_checkpoint
        from ..model_cards import add_to_card
        from ..space import write_space

        args = self.args
        size = args.max_shard_size
        if size is not None and not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", size):
            raise CommandError(
                f"--max-shard-size must be a number with KB, MB, GB or TB, such as 5GB, but is {size!r}"
            )
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
        if args.output is not None and args.onnx is not None:
            try:
                check_outputs([(args.output, False), (args.onnx, False)], [])
            except (OSError, ValueError) as error:
                raise CommandError(f"DIR and --onnx: {error}") from error
        with ExitStack() as folders:
            # Both are made sure of before the work.
            graphs = folders.enter_context(new_folder(args.onnx, "--onnx")) if args.onnx is not None else None
            folder = folders.enter_context(new_folder(args.output, "DIR")) if args.output is not None else None
            source = checkpoint_folder(args.checkpoint, args.trust_remote_code)
            pipeline = load_pipeline(source, "cpu", torch.float32, args.trust_remote_code)
            if local_checkpoint(args.checkpoint) is None:
                pipeline._source = source, args.checkpoint  # whose card is told apart by its name
            metadata = {"license": args.license} if args.license else {}
            if args.results is not None:
                metadata.update(checkpoint_results(args.results, source, pipeline))
            if graphs is not None:
                export_graphs(graphs, pipeline)
            if folder is not None and args.space:
                name = Path(args.checkpoint).resolve().name if Path(args.checkpoint).is_dir() else args.checkpoint
                write_space(folder, pipeline, name, args.license, args.trust_remote_code)
            elif folder is not None:
                pipeline.save_pretrained(folder, max_shard_size=size)
                for variant in args.variant:
                    half = load_pipeline(source, "cpu", torch.float32, args.trust_remote_code)
                    half._source = pipeline._source
                    for part in half.components.values():
                        if isinstance(part, torch.nn.Module):
                            # Not by the pipeline's or the model's own method, which warn of running in half precision.
                            torch.nn.Module.to(part, getattr(torch, VARIANTS[variant]))
                    half.save_pretrained(folder, variant=variant, max_shard_size=size)
                if metadata:
                    add_to_card(folder / "README.md", metadata)
        for written in filter(None, (args.output, args.onnx)):
            print(written)


def export_graphs(folder: Path, pipeline: "MADiffPipeline") -> None:
    """
    Raises:
        CommandError: if packages are missing, or a part cannot become a graph.
    """
    from ..onnx_export import export_onnx

    try:
        export_onnx(folder, pipeline.vqvae, pipeline.unet, pipeline.scheduler, getattr(pipeline, "hint_model", None))
    except (ImportError, ValueError) as error:
        raise CommandError(error) from error


def checkpoint_results(path: str, folder: Path, pipeline: "MADiffPipeline") -> dict[str, Any]:
    """What a file of results says of a checkpoint, for its model card.

    Raises:
        CommandError: if it is no such file, or says nothing of this checkpoint.
    """
    try:
        from ..evaluation.methods import MADiffMethod, checkpoint_digest
        from ..evaluation.metrics import METRICS
        from ..evaluation.report import read_results
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing; pip install 'madiff_diffusers[eval]'") from error
    from ..model_cards import results_metadata

    method = MADiffMethod(pipeline, folder.name, checkpoint_digest(folder))
    metrics = {name: (metric.title, metric.digits) for name, metric in METRICS.items()}
    try:
        return results_metadata(read_results(path), method.identity, metrics)
    except (OSError, ValueError) as error:
        raise CommandError(f"--results {path!r}: {error}") from error
