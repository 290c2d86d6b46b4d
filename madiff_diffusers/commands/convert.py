"""`madiff convert-eventgan` and `madiff convert-rife`: published checkpoints of others as models of this package."""

import argparse
from abc import abstractmethod
from typing import TYPE_CHECKING

from . import BaseCommand
from .common import new_folder


if TYPE_CHECKING:
    from ..components import CheckpointComponent


class ConvertCommand(BaseCommand):
    """A file of weights becomes a folder of a model."""

    @staticmethod
    def add_arguments(command: argparse.ArgumentParser, checkpoint: str) -> None:
        command.add_argument("source", metavar="CHECKPOINT", help=checkpoint)
        command.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; must not exist")

    @abstractmethod
    def convert(self, path: str) -> "CheckpointComponent":
        """The model with the weights of a file."""

    def run(self) -> None:
        with new_folder(self.args.output, "--output") as folder:
            self.convert(self.args.source).save_pretrained(folder)
        print(self.args.output)


class ConvertEventGANCommand(ConvertCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "convert-eventgan",
            help="convert a checkpoint of the original EventGAN",
            description="Convert a checkpoint of the original EventGAN to an EventGANModel folder.",
        )
        ConvertCommand.add_arguments(command, "the original's .pt or .pth file")
        command.set_defaults(command_class=ConvertEventGANCommand)

    def convert(self, path: str) -> "CheckpointComponent":
        from ..convert_eventgan import convert_eventgan_checkpoint

        return convert_eventgan_checkpoint(path)


class ConvertRIFECommand(ConvertCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "convert-rife",
            help="convert the flow network of a RIFE 4.0 checkpoint",
            description="Convert the flow network of a RIFE 4.0 checkpoint to a RIFEFlowModel folder, which can be a pipeline's hint_model.",
        )
        ConvertCommand.add_arguments(command, "RIFE's flownet.pkl")
        command.set_defaults(command_class=ConvertRIFECommand)

    def convert(self, path: str) -> "CheckpointComponent":
        from ..convert_rife import convert_rife_checkpoint

        return convert_rife_checkpoint(path)
