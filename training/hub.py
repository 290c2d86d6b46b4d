"""Sending a trained part to the Hugging Face Hub, with a model card that says how it came about."""

import csv
from pathlib import Path

import yaml

from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel
from madiff_diffusers.hub_repository import upload_repository
from madiff_diffusers.model_cards import model_card
from training.data.sources import parse_sources
from training.options import RunOptions


CLASSES = {"i2e": EventGANModel, "vqvae": VQMAGANModel, "unet": MADiffPipeline, "pipeline": MADiffPipeline}

# Options that say where things are on this machine or on the Hub, not how the result came about.
_PLACES = ("output_dir", "push_to_hub", "hub_private_repo", "hub_revision", "hub_message")


def run_sections(run_folder: Path) -> list[str]:
    """What a run left in its folder, as Markdown for a model card: the last validations and losses, options, environment."""
    args = yaml.safe_load((run_folder / "args.yaml").read_text())
    environment = yaml.safe_load((run_folder / "environment.yaml").read_text())
    options = yaml.safe_dump({key: value for key, value in args.items() if key not in _PLACES})
    machine = yaml.safe_dump({key: value for key, value in environment.items() if key != "command"}, sort_keys=False)
    return [
        *_table("Validation", run_folder / "validation.csv"),
        *_table("Training loss", run_folder / "summary.csv"),
        f"## Options\n\n```yaml\n{options.strip()}\n```",
        f"## Environment\n\n```yaml\n{machine.strip()}\n```",
    ]


def _table(title: str, path: Path, rows: int = 5) -> list[str]:
    """The last rows of a CSV file as a Markdown section; nothing if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        header, *body = csv.reader(file)
    shown = [header, ["---"] * len(header), *body[-rows:]]
    return [f"## {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in shown)]


def result_folder(run_folder: Path, part: str) -> Path:
    """Where a finished run's result is: the pipeline of the last stage, the model of the others."""
    return run_folder / ("pipeline" if part == "unet" else part)


def write_card(run_folder: Path, part: str, options: RunOptions) -> None:
    """Put a model card beside a finished run's result."""
    folder = result_folder(run_folder, part)
    model = CLASSES[part].from_pretrained(folder)
    sources = parse_sources(options.data)
    datasets = [
        path for name, path, _ in sources if name in ("datasets", "datasets-stream") and not Path(path).exists()
    ]
    model_card(model, run_sections(run_folder), datasets=datasets or None).save(folder / "README.md")


def push(run_folder: Path, part: str, options: RunOptions) -> None:
    """Upload a finished run's result to `options.push_to_hub`.

    Raises:
        SystemExit: if the Hub cannot be reached or refuses, saying where the result is and how to try again.
    """
    folder = result_folder(run_folder, part)
    try:
        address = upload_repository(
            folder,
            options.push_to_hub,
            private=options.hub_private_repo or None,
            revision=options.hub_revision or None,
            commit_message=options.hub_message or None,
        )
    except OSError as error:
        raise SystemExit(
            f"{error}\nNothing is lost: the result is in {folder}. Run the same command again to upload it; nothing is trained a "
            "second time."
        ) from error
    print(f"uploaded {folder} to {address}", flush=True)
