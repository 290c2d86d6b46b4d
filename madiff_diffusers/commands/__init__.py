"""The commands of `madiff`, one module each; `madiff_cli.py` puts them together."""

import argparse
from abc import ABC, abstractmethod


class BaseCommand(ABC):
    """
    A command of `madiff`. Modules of commands import what is heavy inside functions, so that `--help` is quick.

    Args:
        args: what its parser made of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args

    # argparse has no public name for what `add_subparsers` returns.
    @staticmethod
    @abstractmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Add the command's parser, whose default `command_class` is the command's class."""

    @abstractmethod
    def run(self) -> None:
        """
        Raises:
            CommandError: for bad input.
        """
