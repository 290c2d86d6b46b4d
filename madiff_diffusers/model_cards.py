# SPDX-License-Identifier: Apache-2.0
"""Model cards of pipelines and components, and scores in their headers."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData


# The name of the repository in a card that is not written for a particular one.
PLACEHOLDER = "REPOSITORY"

_REQUIREMENTS = "pip install torch diffusers accelerate safetensors einops opencv-python-headless"

_USE_PIPELINE = """\
from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained({arguments}, trust_remote_code=True)
mid = pipe(Image.open("prev.png"), Image.open("next.png")).frames[0][0]"""

_USE_COMPONENT = """\
from diffusers import AutoModel

model = AutoModel.from_pretrained({arguments}, trust_remote_code=True)"""

_CITATION = """\
@article{huang2024madiff,
  title   = {Motion-aware Latent Diffusion Models for Video Frame Interpolation},
  author  = {Huang, Zhilin and Yu, Yijie and Yang, Ling and Qin, Chujun and Zheng, Bing and Zheng, Xiawu and Zhou, Zikun and Wang, Yaowei and Yang, Wenming},
  journal = {arXiv preprint arXiv:2404.13534},
  year    = {2024}
}"""


def model_card(
    model: DiffusionPipeline | ModelMixin, sections: Sequence[str] = (), variant: str | None = None, **metadata
) -> ModelCard:
    """
    Make a model card that claims no more than the weights themselves tell.

    Args:
        model: a pipeline or one of its components.
        sections: Markdown to put between its parts and its limits: training, scores.
        variant: the variant of the weights, if there are no others.
        metadata: more fields for the card's header, as [`~huggingface_hub.ModelCardData`] has them.
    """
    is_pipeline = isinstance(model, DiffusionPipeline)
    parts = (
        {name: part for name, part in model.components.items() if isinstance(part, torch.nn.Module)}
        if is_pipeline
        else {"": model}
    )
    rows = [f"| `{name}` | `{type(part).__name__}` | {_count(part)} |" for name, part in parts.items()]
    arguments = f'"{PLACEHOLDER}"' + (f', variant="{variant}"' if variant else "")
    what = "Whole pipeline" if is_pipeline else f"`{type(model).__name__}`: one part"
    blocks = [
        f"# MADiff: {type(model).__name__}",
        f"{what} of [MADiff](https://arxiv.org/abs/2404.13534), motion-aware latent diffusion for video frame interpolation: it makes "
        "the frame between two video frames.",
        f"```bash\n{_REQUIREMENTS}\n```",
        f"```python\n{(_USE_PIPELINE if is_pipeline else _USE_COMPONENT).format(arguments=arguments)}\n```",
        "`trust_remote_code=True` runs the Python files that stand here beside the weights. Where the package `madiff_diffusers` is "
        f"installed, `{type(model).__name__}.from_pretrained` loads the same weights and runs none of them.",
        "\n".join(["| part | class | parameters |", "|---|---|---|", *rows]),
    ]
    if is_pipeline:
        config = model.config
        blocks.append(
            f"Motion hints come from {model._describe_hints()[0]}. Unless told otherwise: {type(model.scheduler).__name__}, `num_inference_steps` "
            f"{config.default_num_inference_steps}, `hint_interval` {config.default_hint_interval}, `hint_policy` {config.default_hint_policy}."
        )
    blocks += sections
    blocks += [
        "## Limits and licence",
        "A made frame is a guess: what neither neighbour shows is invented. Frames far apart, or across a cut, give a wrong picture, "
        "not an error. The code is Apache-2.0; the licence of the weights, where their maker states one, is in this card's header.",
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    header = {"library_name": "diffusers", "tags": ["madiff", "video-frame-interpolation"], **metadata}
    if is_pipeline:
        header.setdefault("pipeline_tag", "video-to-video")
    return ModelCard(f"---\n{ModelCardData(**header).to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n")


def _count(part: torch.nn.Module) -> str:
    count = sum(parameter.numel() for parameter in part.parameters())
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def component_card(folder: Path) -> ModelCard | None:
    """Make a model card for a component, which is saved without one; None for a pipeline, which is not.

    Raises:
        ValueError: if its configuration is damaged.
    """
    if not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = getattr(importlib.import_module("madiff_diffusers"), config["_class_name"])
        return model_card(kind.from_config(config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is no component's of this package: {type(error).__name__}: {error}"
        ) from error


def results_metadata(
    summaries: Sequence[dict[str, Any]], identity: dict[str, Any], metrics: Mapping[str, tuple[str, int]]
) -> dict[str, Any]:
    """
    Fields with a checkpoint's scores for a model card's header.

    Args:
        summaries: summaries of any runs.
        identity: the identity of the checkpoint's [`MADiffMethod`]. Only runs of these weights, at these settings and precision, count.
        metrics: title of each metric and number of digits of its scores, by name, in order.

    Raises:
        ValueError: if no run is of this checkpoint, or several of one benchmark are.
    """
    needed = {key: value for key, value in identity.items() if key not in ("checkpoint", "seed", "device")}
    # What replaces the latents is in a run's identity only where something does.
    chosen = [
        summary
        for summary in summaries
        if needed.items() <= summary["protocol"].items()
        and summary["protocol"].get("latents") == needed.get("latents")
    ]
    if not chosen:
        raise ValueError(f"no run is of these weights at their default settings: {needed}")
    if len({summary["benchmark"] for summary in chosen}) < len(chosen):
        raise ValueError(
            f"several runs of one benchmark are of these weights: {', '.join(summary['label'] for summary in chosen)}"
        )
    results = [
        EvalResult(
            task_type="video-to-video",
            task_name="Video frame interpolation",
            dataset_type=summary["benchmark"],
            dataset_name=f"{summary['benchmark']} ({summary['protocol']['triplets']} triplets)",
            metric_type=name,
            metric_name=metrics[name][0],
            metric_value=round(summary["scores"][name]["mean"], metrics[name][1]),
        )
        for summary in chosen
        for name in metrics
        if name in summary["scores"]
    ]
    scored = [name for name in metrics if any(name in summary["scores"] for summary in chosen)]
    return {"metrics": scored, "model_name": chosen[0]["protocol"]["checkpoint"], "eval_results": results}


def add_to_card(path: Path, metadata: dict[str, Any]) -> None:
    """Put fields into the header of a model card.

    Raises:
        ValueError: if the header cannot be read.
    """
    try:
        card = ModelCard.load(path, ignore_metadata_errors=False)
    except Exception as error:  # YAML's, for what is no YAML; the Hub client's, for what is no header
        raise ValueError(f"the checkpoint's README.md has a header that cannot be read: {error}") from error
    for name, value in metadata.items():
        setattr(card.data, name, value)
    card.save(path)
