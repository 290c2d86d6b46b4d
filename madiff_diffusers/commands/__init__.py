"""The commands of `madiff`, one module each; `madiff_cli.py` puts them together."""

import argparse
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # argparse has no public name for what `add_subparsers` returns.
    from argparse import _SubParsersAction


class BaseCommand(ABC):
    """
    A command of `madiff`. Modules of commands import what is heavy inside functions, so that `--help` is quick.

    Args:
        args: what its parser made of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args

    @staticmethod
    @abstractmethod
    def register_subcommand(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
        """Add the command's parser, whose default `command_class` is the command's class."""

    @abstractmethod
    def run(self) -> None:
        """
        Raises:
            CommandError: for bad input.
        """
