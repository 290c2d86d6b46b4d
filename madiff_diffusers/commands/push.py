"""`madiff push`: upload to the Hub."""

import argparse
from pathlib import Path

from . import BaseCommand
from .common import CommandError


class PushCommand(BaseCommand):
    @staticmethod
    def register_subcommand(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        command = commands.add_parser(
            "push",
            help="upload a saved pipeline or component to the Hub",
            description="Upload what madiff export or a training script saved to the Hugging Face Hub, in one commit; hf auth login first.",
        )
        command.add_argument("folder", metavar="DIR", help="folder of a saved pipeline or component")
        command.add_argument("repository", metavar="USER/NAME", help="repository to upload to; made if there is none")
        command.add_argument(
            "--private", action="store_true", help="make a new repository private (default: as the account has it)"
        )
        command.add_argument(
            "--revision", metavar="BRANCH", help="branch to commit to; made if there is none (default: the main one)"
        )
        command.add_argument("--message", metavar="TEXT", help="message of the commit (default: a general one)")
        command.add_argument(
            "--create-pr", action="store_true", help="open a pull request instead of committing to the branch"
        )
        command.set_defaults(command_class=PushCommand)

    def run(self) -> None:
        from ..hub_repository import upload_repository
        from ..model_cards import component_card

        args = self.args
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
