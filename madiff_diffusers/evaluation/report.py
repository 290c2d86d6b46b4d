"""Reports of runs: tables, files of numbers, a chart, and pages to look at."""

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..files import write_text
from ..image_io import write_image
from .methods import Method
from .metrics import METRICS
from .runs import BenchmarkRun, folder_name, mean_and_interval
from .smoothness import PAN_STEP
from .visualization import ERROR_SCALE, error_image


REPORT = ("results.json", "results.csv", "results.md", "index.html")  # and a chart for each benchmark

_pages = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def load_summaries(output: Path) -> list[dict[str, Any]]:
    """The summaries of all finished runs of a folder, in the order of the tables: benchmarks by name, and of each the
    checkpoints (settings in order, numbers as numbers), functions, and baselines."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("runs/*/*/summary.json")]

    def order(summary: dict[str, Any]) -> tuple:
        protocol = summary["protocol"]
        kind = {"madiff": 0, "flow": 2, "average": 3}.get(protocol["method"], 1)
        texts = [
            str(protocol.get(name)) for name in ("checkpoint", "hint_policy", "hint_source", "scheduler", "quantized")
        ]
        numbers = [protocol.get(name, 0) for name in ("hint_interval", "steps")]
        return summary["benchmark"], kind, *texts, *numbers, summary["label"]

    return sorted(summaries, key=order)


def read_results(path: str) -> list[dict[str, Any]]:
    """The summaries in a `results.json`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is something else.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if results["format"] != 1:
            raise ValueError(f"it has format {results['format']!r}")
        for run in results["runs"]:
            if run["protocol"]["method"] == "madiff" and not run["protocol"].keys() >= {"checkpoint", "triplets"}:
                raise ValueError("a run's protocol is not whole")
            for name, score in run["scores"].items():
                if not (name in METRICS and math.isfinite(score["mean"]) and isinstance(run["benchmark"], str)):
                    raise ValueError(f"a run's {name} is no score")
        return results["runs"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no results.json that this version wrote: {type(error).__name__}: {error}") from error


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """A table for each benchmark, with 95 % intervals, and below them what is needed to read them."""
    parts, notes = [], []
    for benchmark in dict.fromkeys(summary["benchmark"] for summary in summaries):
        rows = [summary for summary in summaries if summary["benchmark"] == benchmark]
        names = _metrics_of(rows)
        counts = sorted({row["protocol"]["triplets"] for row in rows})
        lines = [f"### {benchmark} ({' or '.join(map(str, counts))} triplets)", ""]
        lines.append(" | ".join(["| method", *(_heading(name) for name in names), "s/frame |"]))
        lines.append("|---" * (len(names) + 2) + "|")
        for row in rows:
            cells = [_cell(row, name) for name in names]
            lines.append(" | ".join(["| " + row["label"].replace("|", "\\|"), *cells, f"{_seconds(row)} |"]))
        parts.append("\n".join(lines))
        headings, instants = _instants(rows)
        if instants:
            lines = [" | ".join(["| method | instant", *headings]) + " |", "|---" * (len(headings) + 2) + "|"]
            lines += [
                " | ".join(["| " + label.replace("|", "\\|"), instant, *cells]) + " |"
                for label, instant, *cells in instants
            ]
            parts.append("\n".join(lines))
        notes += _notes(rows)
    return "\n\n".join([*parts, *dict.fromkeys(notes)]) + "\n"


def differences(summaries: Sequence[dict[str, Any]], reference: str) -> str:
    """A table of how far each run's scores are from those of the run with the label `reference`, item by item, with 95 % bootstrap intervals
    of the mean difference; empty where there is nothing to compare."""
    chosen = [summary for summary in summaries if summary["label"] == reference]
    others = [summary for summary in summaries if summary["label"] != reference]
    if not chosen or not others:
        return ""
    names = [name for name in _metrics_of(summaries) if METRICS[name].of_items]
    base = {item["name"]: item for item in chosen[0]["items"]}
    less = "| less " + reference.replace("|", "\\|")
    lines = [
        " | ".join([less, *(METRICS[name].title for name in names)]) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for summary in others:
        cells = []
        for name in names:
            pairs = [
                (item, base[item["name"]])
                for item in summary["items"]
                if name in item and name in base.get(item["name"], {})
            ]
            if not pairs:
                cells.append("–")
                continue
            changes = [item[name] - other[name] for item, other in pairs]
            score = mean_and_interval(changes, [item["sequence"] or item["name"] for item, _ in pairs])
            digits = METRICS[name].digits
            text = f"{score['mean']:+.{digits}f}"
            cells.append(
                f"{text} [{score['low']:+.{digits}f}, {score['high']:+.{digits}f}]" if "low" in score else text
            )
        lines.append(" | ".join(["| " + summary["label"].replace("|", "\\|"), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _metrics_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in METRICS if any(name in row["scores"] for row in rows)]


def _instants(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings of metrics, and rows of method, instant and scores; no rows where there is but one instant."""
    names = [name for name in _metrics_of(rows) if METRICS[name].of_items]
    table = []
    for row in rows:
        for instant, scores in row.get("instants", {}).items():
            table.append([row["label"], instant, *(_cell({"scores": scores}, name) for name in names)])
    return [_heading(name) for name in names], table


def _heading(name: str) -> str:
    return f"{METRICS[name].title} {'↑' if METRICS[name].higher_is_better else '↓'}"


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["scores"]:
        return "–"
    score, digits = row["scores"][name], METRICS[name].digits
    text = f"{score['mean']:.{digits}f}"
    return f"{text} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]" if "low" in score else text


def _seconds(row: dict[str, Any]) -> str:
    seconds = row["seconds_per_frame"]["median"]
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3f}"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    unit = "clips" if any(row["sequences"] for row in rows) else "triplets"
    machines = {_machine(row, environment["hardware"]) for row in rows for environment in row["environments"]}
    lines = [
        f"Means of 8-bit frames with 95 % bootstrap intervals over {unit}; s/frame is the median, without the first call of each "
        f"size, on {' and '.join(sorted(machines))}."
    ]
    at_once = [
        f"{row['label']} {' or '.join(map(str, sizes))}"
        for row in rows
        if max(sizes := row.get("batches", []), default=1) > 1
    ]
    if at_once:
        lines.append(
            f"Several frames were made at once, whose time is shared evenly among them: {', '.join(at_once)}."
        )
    if any("step_ratio" in row["scores"] for row in rows):
        lines.append(
            f"Step ratio: the largest over the smallest displacement between consecutive frames of a pan of {PAN_STEP} pixels a frame, with "
            f"frames made at thirds and at fifths; 1 is even motion."
        )
    if len({row["protocol"].get("triplets_sha256") for row in rows}) > 1:
        told = [f"{row['label']} {row['protocol']['triplets']}" for row in rows]
        lines.append(f"Not all rows are of the same triplets, and such cannot be compared: {', '.join(told)}.")
    for name in _metrics_of(rows):
        scored = [row for row in rows if name in row["scores"]]
        if len({row.get("networks", {}).get(name) for row in scored}) > 1:
            told = [
                f"{row['label']} {str(row.get('networks', {}).get(name)).rpartition(':')[2][:8]}" for row in scored
            ]
            lines.append(f"{METRICS[name].title} is of different networks, and cannot be compared: {', '.join(told)}.")
    reasons = {(METRICS[name].title, reason) for row in rows for name, reason in row["left_out"].items()}
    lines += [f"{title} is left out: {reason}." for title, reason in sorted(reasons)]
    return lines


def _machine(row: dict[str, Any], hardware: dict[str, Any]) -> str:
    if row["protocol"].get("device") == "cuda":
        return hardware.get("gpu", "a GPU")
    processes = f", {hardware['processes']} processes" if hardware["processes"] > 1 else ""
    return f"{hardware['cores']} cores of {hardware['cpu']}{processes}"


def table_of_items(summaries: Sequence[dict[str, Any]]) -> str:
    """CSV with a line for each item of each run."""
    text = io.StringIO()
    metrics = [name for name in METRICS if METRICS[name].of_items]
    writer = csv.DictWriter(
        text, ["benchmark", "label", "name", "sequence", "time", *metrics, "seconds"], lineterminator="\n"
    )
    writer.writeheader()
    for summary in summaries:
        for item in summary["items"]:
            writer.writerow({"benchmark": summary["benchmark"], "label": summary["label"], **item})
    return text.getvalue()


def chart(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality of one benchmark's runs against steps, against seconds and, where there are several, against instants, as an SVG file.
    Runs that differ in steps alone are one line, but for the last."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = [name for name in ("psnr", "lpips") if any(name in summary["scores"] for summary in summaries)]
    names = names or _metrics_of(summaries)[:1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        protocol = summary["protocol"]
        title = " ".join(part for part in summary["label"].split(" ") if not part.startswith("steps="))
        key = json.dumps([title, {name: value for name, value in protocol.items() if name not in ("label", "steps")}])
        lines.setdefault(key, []).append(summary)
    columns = 3 if any(summary.get("instants") for summary in summaries) else 2
    figure = Figure(figsize=(1 + 5 * columns, 3.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), columns, squeeze=False)
    for row, name in zip(axes, names):
        for number, (key, runs) in enumerate(lines.items()):
            runs = sorted(
                (run for run in runs if name in run["scores"]), key=lambda run: run["protocol"].get("steps", 0)
            )
            if not runs:
                continue
            values = [run["scores"][name]["mean"] for run in runs]
            colour = f"C{number % 10}"
            if "steps" in runs[0]["protocol"]:
                row[0].plot([run["protocol"]["steps"] for run in runs], values, marker="o", color=colour)
            else:
                row[0].axhline(values[0], linestyle="--", color=colour)
            seconds = [run["seconds_per_frame"]["median"] for run in runs]
            row[1].plot(seconds, values, marker="o", color=colour, label=_in_legend(json.loads(key)[0]))
        for axis, title in zip(row, ("sampling steps", "seconds per frame")):
            axis.set(xscale="log", xlabel=title, ylabel=_heading(name))
            axis.grid(alpha=0.3)
        row[0].set_xticks([1, 2, 5, 10, 20, 50])
        low, high = row[1].get_xlim()
        row[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        for axis in row[:2]:
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        if columns == 3:
            for number, summary in enumerate(summaries):
                instants = [
                    (float(Fraction(text)), scores[name]["mean"])
                    for text, scores in summary.get("instants", {}).items()
                    if name in scores
                ]
                if instants:
                    row[2].plot(
                        *zip(*instants), marker="o", color=f"C{number % 10}", label=_in_legend(summary["label"])
                    )
            row[2].set(xlim=(0, 1), xlabel="instant", ylabel=_heading(name))
            row[2].grid(alpha=0.3)
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    write_text(path, text.getvalue())


def _in_legend(label: str) -> str:
    """A label as matplotlib shows it as it is: dollars begin formulas, and what begins with an underscore is left out."""
    escaped = label.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{escaped}" if escaped.startswith("_") else escaped


def write_gallery(run: BenchmarkRun, method: Method, summary: dict[str, Any], output: Path, count: int) -> None:
    """A page of the `count` worst items of a run, by LPIPS, or by the first metric that there is of single items."""
    items = {item["name"]: item for item in summary["items"]}
    # A run that was stopped while it was scored has metrics of some items alone.
    order = next((name for name in ("lpips", *METRICS) if all(name in item for item in summary["items"])), None)
    worst = run.triplets
    if order is not None:
        sign = -1 if METRICS[order].higher_is_better else 1
        worst = sorted(worst, key=lambda triplet: sign * items[triplet.name][order], reverse=True)
    worst = worst[:count]
    target = output / "gallery" / folder_name(run.label) / run.benchmark
    key = hashlib.sha256(json.dumps([order, [run.records[triplet.name] for triplet in worst]]).encode()).hexdigest()
    page = target / "index.html"
    if page.is_file() and key in page.read_text(encoding="utf-8"):
        return  # of these very frames and scores
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for abandoned in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(abandoned)
    building.mkdir(parents=True)
    try:
        rows = []
        for number, triplet in enumerate(worst, 1):
            prev, truth, next_ = triplet.read()
            result = run.read_result(triplet)
            pictures = [
                ("previous", prev),
                ("next", next_),
                ("truth", truth),
                ("result", result),
                ("error", error_image(result, truth)),
            ]
            if hasattr(method, "explain"):
                pictures += method.explain((prev, next_), triplet.time, truth)
            shown = []
            for title, image in pictures:
                name = f"{number:03d}-{title.replace(' ', '-')}.jpg"
                write_image(Image.fromarray(image), building / name)
                shown.append({"title": title, "file": name, "width": image.shape[1], "height": image.shape[0]})
            item = items[triplet.name]
            scores = [
                f"{METRICS[name].title} {item[name]:.{METRICS[name].digits}f}" for name in METRICS if name in item
            ]
            rows.append({"name": triplet.name, "scores": ", ".join(scores), "pictures": shown})
        text = _pages.get_template("gallery.html").render(
            label=run.label,
            benchmark=run.benchmark,
            order=order and METRICS[order].title,
            rows=rows,
            total=len(run.triplets),
            error_scale=ERROR_SCALE,
            key=key,
        )
        write_text(building / "index.html", text)
        if target.exists():
            shutil.rmtree(target)
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_report(output: Path) -> list[dict[str, Any]]:
    """Write the report of all finished runs of a folder: `results.json`, `results.csv`, `results.md`, `chart-BENCHMARK.svg` and
    `index.html`. Returns their summaries."""
    summaries = load_summaries(output)
    write_text(output / "results.json", json.dumps({"format": 1, "runs": summaries}, indent=1))
    write_text(output / "results.csv", table_of_items(summaries))
    write_text(output / "results.md", markdown(summaries))
    benchmarks = []
    for benchmark in dict.fromkeys(summary["benchmark"] for summary in summaries):
        rows = [summary for summary in summaries if summary["benchmark"] == benchmark]
        chart(rows, output / f"chart-{benchmark}.svg")
        names = _metrics_of(rows)
        table = []
        for row in rows:
            page = Path("gallery") / folder_name(row["label"]) / benchmark / "index.html"
            page = page.as_posix() if (output / page).is_file() else None
            table.append(
                {
                    "label": row["label"],
                    "page": page,
                    "cells": [_cell(row, name) for name in names],
                    "seconds": _seconds(row),
                }
            )
        headings = [_heading(name) for name in names]
        benchmarks.append(
            {
                "name": benchmark,
                "headings": headings,
                "rows": table,
                "instants": _instants(rows),
                "notes": _notes(rows),
                "chart": f"chart-{benchmark}.svg",
            }
        )
    write_text(output / "index.html", _pages.get_template("index.html").render(benchmarks=benchmarks))
    return summaries
