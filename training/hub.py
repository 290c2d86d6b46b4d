"""Sending a trained part to the Hugging Face Hub, with a model card that says how it came about."""

import csv
from pathlib import Path
from typing import List

import yaml
from huggingface_hub import HfApi

from training.options import RunOptions

WHAT = {
    "i2e": ("an image-to-event generator", "EventGANModel", "from madiff_diffusers import EventGANModel"),
    "vqvae": ("a motion-aware autoencoder (VQ-MAGAN)", "VQMAGANModel", "from madiff_diffusers import VQMAGANModel"),
    "unet": ("a whole MADiff pipeline", "MADiffPipeline", "from madiff_diffusers import MADiffPipeline"),
}


def model_card(run_folder: Path, part: str, repository: str) -> str:
    """A model card from what a run left in its folder: options, environment, the last losses and validations."""
    what, name, statement = WHAT[part]
    args = yaml.safe_load((run_folder / "args.yaml").read_text())
    environment = yaml.safe_load((run_folder / "environment.yaml").read_text())
    header = {"library_name": "diffusers", "tags": ["madiff", "video-frame-interpolation"]}
    lines = ["---", yaml.safe_dump(header).strip(), "---", "", f"# {repository.split('/')[-1]}", ""]
    lines += [
        f"This is {what} of [MADiff](https://arxiv.org/abs/2404.13534), motion-aware latent diffusion for video frame "
        "interpolation, trained with `madiff_diffusers`.",
        "",
        "```python",
        statement,
        "",
        f'model = {name}.from_pretrained("{repository}")',
        "```",
        "",
    ]
    lines += _table("Validation", run_folder / "validation.csv")
    lines += _table("Training loss", run_folder / "summary.csv")
    chosen = {key: value for key, value in args.items() if key not in ("output", "push_to_hub", "hub_private")}
    lines += ["## Options", "", "```yaml", yaml.safe_dump(chosen).strip(), "```", ""]
    chosen = {key: value for key, value in environment.items() if key != "command"}
    lines += ["## Environment", "", "```yaml", yaml.safe_dump(chosen, sort_keys=False).strip(), "```", ""]
    return "\n".join(lines)


def _table(title: str, path: Path, rows: int = 5) -> List[str]:
    """The last rows of a CSV file as a Markdown section; nothing if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        header, *body = csv.reader(file)
    shown = [header, ["---"] * len(header), *body[-rows:]]
    return [f"## {title}", "", *("| " + " | ".join(row) + " |" for row in shown), ""]


def push(run_folder: Path, part: str, options: RunOptions) -> None:
    """Upload a finished run's result to `options.push_to_hub`: the pipeline of the last stage, the model of the others.

    Raises:
        SystemExit: if the Hub cannot be reached or refuses, saying where the result is and how to try again.
    """
    folder = run_folder / ("pipeline" if part == "unet" else part)
    repository = options.push_to_hub
    (folder / "README.md").write_text(model_card(run_folder, part, repository))
    try:
        api = HfApi()
        api.create_repo(repository, private=options.hub_private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {part} trained by madiff_diffusers")
    except Exception as error:  # whatever goes wrong on the way: the result is there, and the user must know how to go on
        raise SystemExit(
            f"The upload to {repository} failed: {error}\nNothing is lost: the result is in {folder}. Run the same command "
            "again to upload it; nothing is trained a second time."
        ) from error
    print(f"uploaded {folder} to {repository}", flush=True)
