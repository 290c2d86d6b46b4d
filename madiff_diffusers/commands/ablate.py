"""`madiff ablate`: what a checkpoint's parts are worth."""

import argparse

from . import BaseCommand
from .common import CommandError, add_trust_option
from .evaluate import Evaluation, add_evaluation_options, evaluation_errors


class AblateCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "ablate",
            help="compare settings of a checkpoint on a benchmark",
            description="Compare settings of a checkpoint on a benchmark, all else being equal, and print a table; writes what "
            "evaluate writes.",
        )
        command.add_argument(
            "question",
            metavar="QUESTION",
            choices=("hints", "source", "interval", "steps", "scheduler", "quantized", "latents", "parts"),
            help="setting to compare: hints (where motion hints come from: none, neighbours, start, sampling, damped, true), source (events, flow or "
            "both), interval (sampling steps from one extraction of hints to the next, of 8 steps unless --steps is given), steps (sampling steps), "
            "scheduler, quantized (latents moved to their nearest codes, or not), latents (what is decoded: denoised, zero, noise, mirrored, "
            "which is what is denoised of the mirrored pair, or true, which is the true frame's), parts (all of these latents, 1, 2 and 4 steps, "
            "and hints none, neighbours, start and true, which are those of the true frame: one table)",
        )
        command.add_argument(
            "--values",
            nargs="+",
            metavar="V",
            help="values to compare (default: all hints; all sources; intervals 1 2 4 8; steps "
            "1 2 5 10 25 50; six schedulers; quantized yes no; all latents)",
        )
        add_evaluation_options(command, gallery=0)
        add_trust_option(command)
        command.set_defaults(command_class=AblateCommand)

    def run(self) -> None:
        args = self.args
        with evaluation_errors():
            from ..evaluation.evaluate import QUESTIONS, ablation

            setting, _ = QUESTIONS[args.question]
            values = None if args.values is None else [parse_setting(setting, value) for value in args.values]
            if args.question == "interval" and args.steps is None:
                args.steps = 8  # at a small checkpoint's one or two steps, there is nothing to space out
            evaluation = Evaluation(args)
            variants = ablation(args.question, evaluation.settings, evaluation.pipeline.config.hint_source, values)
            evaluation.run([evaluation.checkpoint(settings) for settings in variants], compare=True)


def parse_setting(name: str, text: str) -> int | bool | str:
    try:
        if name in ("steps", "hint_interval"):
            return int(text)
        return {"yes": True, "no": False}[text] if name == "quantized" else text
    except (KeyError, ValueError) as error:
        kind = "yes or no" if name == "quantized" else "integers"
        raise CommandError(f"--values must be {kind}, but has {text!r}") from error
