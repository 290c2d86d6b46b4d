"""Methods on a benchmark, from files to tables and pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..files import check_outputs
from ..hint_registry import hint_parts
from ..processes import this_process
from .benchmarks import benchmark_title, find_triplets
from .methods import LATENTS, MIDDLE, Method, Settings
from .metrics import METRICS, Scorer
from .report import REPORT, write_gallery, write_report
from .runs import BenchmarkRun


# The questions of ablations, each with the setting that it varies and the values that are compared unless others are given.
QUESTIONS: dict[str, Any] = {
    "hints": ("hint_policy", ("none", "neighbours", "start", "sampling", "damped", "true")),
    "source": ("hint_source", None),  # all that the checkpoint has, and each part of it
    "interval": ("hint_interval", (1, 2, 4, 8)),
    "steps": ("steps", (1, 2, 5, 10, 25, 50)),
    "scheduler": (
        "scheduler",
        (
            "DDIMScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerDiscreteScheduler",
            "LCMScheduler",
            "UniPCMultistepScheduler",
        ),
    ),
    "quantized": ("quantized", (True, False)),
    "latents": ("latents", LATENTS),
    "parts": (None, None),  # what each part is worth: latents, steps and hints, in one table
}

# What the question `parts` compares.
PARTS: tuple[dict[str, Any], ...] = (
    *({"latents": each} for each in LATENTS),
    *({"steps": each} for each in (1, 2, 4)),
    *({"hint_policy": each} for each in ("none", "neighbours", "start", "true")),
)


def ablation(question: str, base: Settings, hint_source: str, values: Sequence | None = None) -> list[Settings]:
    """The settings that a question compares.

    Args:
        question: a name in `QUESTIONS`.
        base: the other settings.
        hint_source: the checkpoint's own hint source.
        values: values to compare; those of `QUESTIONS` if not given.

    Raises:
        ValueError: if there is nothing to compare.
    """
    name, defaults = QUESTIONS[question]
    if question == "parts":
        if values is not None:
            raise ValueError(
                f"`values` must not be given for `question` parts, but are {', '.join(map(str, values))}."
            )
        varied = {name for part in PARTS for name in part}
        taken = [name for name in sorted(varied) if getattr(base, name) is not None]
        if taken:
            raise ValueError(f"`question` parts varies {', '.join(taken)}, which must not be set besides.")
        return [base._replace(**part) for part in PARTS]
    if values is None and name == "hint_source":
        parts = hint_parts(hint_source)
        defaults = (hint_source, *parts)
        if len(parts) == 1:
            raise ValueError(
                f"`question` source needs a checkpoint of several hint sources, but this one's is {hint_source}."
            )
    if getattr(base, name) is not None:
        raise ValueError(
            f"`question` {question} varies `{name}`, which must not be set besides; it is {getattr(base, name)!r}."
        )
    return [base._replace(**{name: value}) for value in (defaults if values is None else values)]


def evaluate(
    benchmark: str,
    root: str,
    output: Path,
    methods: Sequence[Method],
    scorer: Scorer,
    *,
    label: str | None = None,
    limit: int | None = None,
    skip: int | None = None,
    batch_size: int = 1,
    gallery: int = 20,
    state: PartialState | None = None,
) -> list[dict[str, Any]]:
    """Run methods on a benchmark and write frames, scores, tables, chart and pages into a folder.

    A folder can take several benchmarks and methods, one call after another; its tables hold all that are finished. The same call
    goes on with what was stopped. Every process of a launch calls this; the first one writes the report.

    Args:
        benchmark, root, limit, skip: see `find_triplets`.
        output: the folder; made if it is not there.
        methods: methods that make the frames.
        scorer: scorer of the frames.
        label: label of the one method, instead of its own.
        batch_size: number of items of one size that are made and scored at once.
        gallery: number of items on a run's page, worst first; 0 for no page.
        state: see `this_process`.

    Returns:
        The summaries of all finished runs of `benchmark` in the folder; only in the first process, empty in others.

    Raises:
        ValueError: for an argument out of its range, for unfit data, for data that would be written over, or for a folder that holds
            files of the names that are written, but no evaluation.
        OSError: if a file cannot be read or written.
    """
    if batch_size < 1 or gallery < 0:
        raise ValueError(
            f"`batch_size` must be at least 1 and `gallery` at least 0, but are {batch_size} and {gallery}."
        )
    labels = [label or method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise ValueError(f"`methods` must have different labels, but are {', '.join(labels)}.")
    state = state or this_process(torch.device("cpu"))
    triplets = find_triplets(benchmark, root, limit, skip)
    # Not by the folder `runs` alone: TensorBoard, too, writes one of that name.
    is_ours = any(
        each.name == "protocol.json" or each.name.startswith("progress-") for each in output.glob("runs/*/*/*")
    )
    check_outputs(
        [(output / name, is_ours) for name in ("runs", "frames", "gallery", *REPORT)],
        [path for triplet in triplets for path in triplet.files],
        ", but from no evaluation: give another `output`",
    )
    of_truth = [name for method, name in zip(methods, labels) if getattr(method, "needs_truth", False)]
    if scorer.names == ["step_ratio"] and of_truth:
        raise ValueError(
            f"`metrics` must not be step_ratio alone for {', '.join(of_truth)}, which needs the true frame: of the pan that it is measured on there is none."
        )
    if not scorer.names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in scorer.left_out.items())
        raise ValueError(f"`metrics` has none that can be computed here: {reasons}.")
    if "fid" in scorer.names and len(triplets) < 2:
        raise ValueError(f"`metrics`: fid needs at least 2 triplets, but there is {len(triplets)}.")
    for metric in scorer.names:
        least = METRICS[metric].least_side
        small = next((triplet for triplet in triplets if least > 1 and triplet.least_side < least), None)
        if small is not None:
            raise ValueError(
                f"`metrics`: {metric} needs frames of {least} pixels a side at least, but those of {small.name} have {small.least_side}."
            )
    if "step_ratio" in scorer.names or any(triplet.time != MIDDLE for triplet in triplets):
        for method, name in zip(methods, labels):
            if not method.any_time:
                raise ValueError(
                    f"`method` {name!r} must take (prev, next, time) for other instants than the middle, but takes (prev, next) alone."
                )
    title = benchmark_title(benchmark, skip)
    for method, name in zip(methods, labels):
        run = BenchmarkRun(output, title, triplets, method, name, state)
        run.predict(batch_size)
        run.score(scorer, batch_size)
        if state.is_main_process:
            summary = run.summarise(scorer)
            if gallery:
                write_gallery(run, method, summary, output, gallery)
            summaries = write_report(output)
        state.wait_for_everyone()
    return [summary for summary in summaries if summary["benchmark"] == title] if state.is_main_process else []
