"""`madiff convert-rife`: the flow network of a RIFE 4.0 checkpoint as a model of this package."""

import argparse
from typing import TYPE_CHECKING

from . import BaseCommand
from .common import new_folder


if TYPE_CHECKING:
    from argparse import _SubParsersAction


class ConvertRIFECommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "convert-rife",
            help="convert the flow network of a RIFE 4.0 checkpoint",
            description="Convert the flow network of a RIFE 4.0 checkpoint to a RIFEFlowModel folder, which can be a pipeline's hint_model.",
        )
        command.add_argument("source", metavar="CHECKPOINT", help="RIFE's flownet.pkl")
        command.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; must not exist")
        command.set_defaults(command_class=ConvertRIFECommand)

    def run(self) -> None:
        from ..convert_rife import convert_rife_checkpoint

        with new_folder(self.args.output, "--output") as folder:
            convert_rife_checkpoint(self.args.source).save_pretrained(folder)
        print(self.args.output)
