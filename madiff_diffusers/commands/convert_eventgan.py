"""`madiff convert-eventgan`: a checkpoint of the original EventGAN as a model of this package."""

import argparse
from typing import TYPE_CHECKING

from . import BaseCommand
from .common import new_folder


if TYPE_CHECKING:
    from argparse import _SubParsersAction


class ConvertEventGANCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "convert-eventgan",
            help="convert a checkpoint of the original EventGAN",
            description="Convert a checkpoint of the original EventGAN to an EventGANModel folder.",
        )
        command.add_argument("source", metavar="CHECKPOINT", help="the original's .pt or .pth file")
        command.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; must not exist")
        command.set_defaults(command_class=ConvertEventGANCommand)

    def run(self) -> None:
        from ..convert_eventgan import convert_eventgan_checkpoint

        with new_folder(self.args.output, "--output") as folder:
            convert_eventgan_checkpoint(self.args.source).save_pretrained(folder)
        print(self.args.output)
