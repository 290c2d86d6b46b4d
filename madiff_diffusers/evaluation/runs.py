"""One method on one benchmark: frames are made and written item by item, the files are scored, the scores summed up.

A run's folder is OUTPUT/runs/LABEL/BENCHMARK: `protocol.json` tells what is run, `progress-RANK.jsonl` what each process has done,
a line for each frame and for its scores, and `summary.json` the outcome. Frames are OUTPUT/frames/LABEL/BENCHMARK/NAME.png. The
same command goes on where it was stopped, on as many processes as it is given.
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ..files import write_text
from ..image_io import read_image, write_image
from ..terminal import bar_settings
from .benchmarks import Triplet
from .methods import MIDDLE, Method
from .metrics import METRICS, Scorer
from .smoothness import step_ratio


_LIBRARIES = (
    "madiff_diffusers",
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "numpy",
    "opencv-python-headless",
    "scikit-image",
    "lpips",
    "torch-fidelity",
)

BOOTSTRAP_SAMPLES = 10_000


class ItemRecord(NamedTuple):
    """The state of one item.

    Args:
        frame: SHA-256 of its file.
        seconds: time that it took.
        batch: how many were made at once; 0 where a former version did not say.
        scores: scores of this file, by metric.
        networks: networks that gave scores, by metric.
    """

    frame: str
    seconds: float
    batch: int
    scores: dict[str, float]
    networks: dict[str, str]


class BenchmarkRun:
    """
    Args:
        output: folder of this and other runs.
        benchmark: name of the benchmark.
        triplets: items of the benchmark.
        method: method that makes the frames.
        label: row in the tables and name of the folders.
        state: this process among others.

    Raises:
        ValueError: if the folder holds a run with the same label and another protocol.
    """

    def __init__(
        self,
        output: Path,
        benchmark: str,
        triplets: Sequence[Triplet],
        method: Method,
        label: str,
        state: PartialState,
    ):
        self.benchmark, self.triplets, self.method = benchmark, list(triplets), method
        self.label, self.state = label, state
        self._needs_truth = getattr(method, "needs_truth", False)
        self.folder = output / "runs" / folder_name(self.label) / benchmark
        self.frames = output / "frames" / folder_name(self.label) / benchmark
        identity = {
            "benchmark": benchmark,
            "label": self.label,
            "triplets": len(self.triplets),
            "triplets_sha256": _triplets_digest(self.triplets),
            **method.identity,
        }
        self.protocol: dict[str, Any] = {"identity": identity, "environments": []}
        if (self.folder / "protocol.json").is_file():
            self.protocol = json.loads((self.folder / "protocol.json").read_text(encoding="utf-8"))
            before = self.protocol["identity"]
            for key in sorted({*before, *identity}):
                if before.get(key) != identity.get(key):
                    raise ValueError(
                        f"`output` {str(output)!r} holds {self.label!r} on {benchmark} with {key} {before.get(key)!r}, but it is "
                        f"{identity.get(key)!r} now: give another `output` or `label`."
                    )
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}
        self.records = self._read_records()
        self.was_complete = len(self.records) == len(self.triplets)
        environment = describe_environment(self.state.num_processes)
        # Of what the frames that are there were made by, as far as it is known.
        codes = {each["code_sha256"] for each in self.protocol["environments"] if "code_sha256" in each}
        if self.records and codes - {environment["code_sha256"]} and self.state.is_main_process:
            print(
                f"note: frames of {self.label!r} on {benchmark} that {output} holds were made by other code of this package, and are kept: "
                "another `output` has them made anew",
                file=sys.stderr,
            )
        if not self.was_complete and environment not in self.protocol["environments"]:
            self.protocol["environments"].append(environment)
        if self.state.is_main_process:
            for abandoned in self.frames.rglob(".*.tmp"):
                abandoned.unlink()
        # Every process has read the same before one of them writes.
        self.state.wait_for_everyone()

    def result_path(self, triplet: Triplet) -> Path:
        return self.frames / f"{triplet.name}.png"

    def read_result(self, triplet: Triplet) -> np.ndarray:
        return np.asarray(read_image(self.result_path(triplet)))

    def predict(self, batch_size: int = 1) -> None:
        """Make this process's share of the frames that are not there yet, and wait for the other processes.

        Each frame is timed; a first call for every new size is not.

        Raises:
            OSError, ValueError: if a file cannot be read or written, or the method fails; frames made until then stay.
        """
        warm: set = set()
        with self._progress_file() as progress:
            for batch in self._share(batch_size, lambda triplet: triplet.name not in self.records, "frames"):
                for group in _by_size_and_time([(triplet, *triplet.read()) for triplet in batch]):
                    pairs = [(prev, next_) for _, prev, _, next_ in group]
                    truths = {"truths": [truth for _, _, truth, _ in group]} if self._needs_truth else {}
                    shape, instant = (len(pairs), *pairs[0][0].shape), group[0][0].time
                    try:
                        if shape not in warm:
                            self.method(pairs, instant, **truths)
                            warm.add(shape)
                        _synchronise()
                        start = time.perf_counter()
                        results = self.method(pairs, instant, **truths)
                    except ValueError as error:
                        names = ", ".join(triplet.name for triplet, *_ in group)
                        raise ValueError(f"{self.benchmark}, {names}: {error}") from error
                    seconds = (time.perf_counter() - start) / len(pairs)
                    self._write_protocol()
                    for (triplet, *_), result in zip(group, results):
                        path = self.result_path(triplet)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_image(Image.fromarray(result), path)
                        made = {"item": triplet.name, "frame": self._digest(path)}
                        progress.write({**made, "seconds": seconds, "batch": len(pairs)})
        self.state.wait_for_everyone()
        self.records = self._read_records()
        self.state.wait_for_everyone()

    def score(self, scorer: Scorer, batch_size: int = 1) -> None:
        """Score this process's share of the files that these metrics have not scored yet, and wait for the other processes.

        Raises:
            OSError, ValueError: if a file cannot be read.
        """
        names = [name for name in scorer.names if METRICS[name].of_items]
        networks = {name: scorer.networks[name] for name in names if name in scorer.networks}

        def lacks(triplet: Triplet) -> bool:
            record = self.records[triplet.name]
            return any(name not in record.scores or record.networks.get(name) != networks.get(name) for name in names)

        with self._progress_file() as progress:
            for batch in self._share(batch_size, lacks, "scores"):
                rows = []
                for triplet in batch:
                    prev, truth, next_ = triplet.read()
                    rows.append((triplet, prev, truth, next_, self.read_result(triplet)))
                for group in _by_size_and_time(rows):
                    for (triplet, *_), scores in zip(group, scorer.score([row[1:] for row in group])):
                        frame = self.records[triplet.name].frame
                        entry = {"item": triplet.name, "frame": frame, "scores": scores, "networks": networks}
                        progress.write({**entry, "pass": self._passes + 1})
        self.state.wait_for_everyone()
        self.records = self._read_records()

    def summarise(self, scorer: Scorer) -> dict[str, Any]:
        """Write `summary.json`: means, their bootstrap intervals, the time per frame, and where there are several instants, the means
        of each. Returns what it holds."""
        records = [self.records[triplet.name] for triplet in self.triplets]
        sequences = [triplet.sequence or triplet.name for triplet in self.triplets]
        scores, networks = {}, {}
        for name in METRICS:
            used = {record.networks.get(name) for record in records}
            if all(name in record.scores for record in records) and len(used) == 1:
                scores[name] = mean_and_interval([record.scores[name] for record in records], sequences)
                networks[name] = used.pop()
        instants = sorted({triplet.time for triplet in self.triplets})
        by_instant = {
            str(instant): self._scores_at(instant, list(scores)) for instant in instants if len(instants) > 1
        }
        previous, left_out = _read_json(self.folder / "summary.json"), dict(scorer.left_out)
        if "fid" in scorer.names:
            value = scorer.fid(map(self.read_result, self.triplets), (triplet.read()[1] for triplet in self.triplets))
            scores["fid"], networks["fid"] = {"mean": value}, scorer.networks["fid"]
        elif self.was_complete and "fid" in previous.get("scores", {}):
            scores["fid"], networks["fid"] = previous["scores"]["fid"], previous["networks"]["fid"]
        if "step_ratio" in previous.get("scores", {}):
            scores["step_ratio"] = previous["scores"]["step_ratio"]
        elif "step_ratio" in scorer.names and self._needs_truth:
            left_out["step_ratio"] = "of the pan that it is measured on there is no true frame"
        elif "step_ratio" in scorer.names:
            scores["step_ratio"] = {"mean": step_ratio(self.method)}
        seconds = [record.seconds for record in records]
        summary = {
            "benchmark": self.benchmark,
            "label": self.label,
            "protocol": self.protocol["identity"],
            "sequences": len(set(sequences)) if any(triplet.sequence for triplet in self.triplets) else None,
            "scores": scores,
            "instants": by_instant,
            "networks": {name: network for name, network in networks.items() if network},
            "left_out": {name: reason for name, reason in left_out.items() if name not in scores},
            "seconds_per_frame": {"median": float(np.median(seconds)), "mean": float(np.mean(seconds))},
            "batches": sorted({record.batch for record in records if record.batch}),
            "environments": self.protocol["environments"],
            "items": [
                {
                    "name": triplet.name,
                    "sequence": triplet.sequence,
                    "time": str(triplet.time),
                    "seconds": record.seconds,
                    **record.scores,
                }
                for triplet, record in zip(self.triplets, records)
            ],
        }
        self._write_protocol()
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary

    def _scores_at(self, time: Fraction, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Each metric's mean and interval over the items of one instant."""
        chosen = [triplet for triplet in self.triplets if triplet.time == time]
        sequences = [triplet.sequence or triplet.name for triplet in chosen]
        return {
            name: mean_and_interval([self.records[triplet.name].scores[name] for triplet in chosen], sequences)
            for name in names
        }

    def _share(self, batch_size: int, wanted, what: str) -> Iterable[list[Triplet]]:
        """This process's batches of those with a wanted item. Batches are cut from the whole list, so that what is computed
        together depends neither on the number of processes nor on where a run was stopped."""
        batches = [self.triplets[i : i + batch_size] for i in range(0, len(self.triplets), batch_size)]
        batches = [batch for batch in batches if any(map(wanted, batch))]
        mine = batches[self.state.process_index :: self.state.num_processes]
        title = f"{self.label} on {self.benchmark}: {what}"
        return tqdm(
            mine, title, leave=False, disable=not self.state.is_main_process, **bar_settings("batch", "batches")
        )

    def _progress_file(self) -> "_ProgressFile":
        return _ProgressFile(self.folder / f"progress-{self.state.process_index}.jsonl")

    def _write_protocol(self) -> None:
        path = self.folder / "protocol.json"
        text = json.dumps(self.protocol, indent=1)
        if self.state.is_main_process and not (path.is_file() and path.read_text(encoding="utf-8") == text):
            write_text(path, text)

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file, read again only if it changed."""
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)
        if self._digests.get(path, (None, ""))[0] != version:
            self._digests[path] = version, hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path][1]

    def _read_records(self) -> dict[str, ItemRecord]:
        """The records of all processes for frames that are still as they were written."""
        frames: dict[tuple[str, str], tuple[float, int]] = {}
        scored: dict[tuple[str, str], list[dict]] = {}
        for path in sorted(self.folder.glob("progress-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut off when its process was killed
                key = entry["item"], entry["frame"]
                if "seconds" in entry:
                    frames[key] = entry["seconds"], entry.get("batch", 0)
                else:
                    scored.setdefault(key, []).append(entry)
        entries = itertools.chain.from_iterable(scored.values())
        self._passes = max((entry.get("pass", 0) for entry in entries), default=0)  # of scoring, by now
        records = {}
        for triplet in self.triplets:
            path = self.result_path(triplet)
            key = triplet.name, self._digest(path) if path.is_file() else ""
            if key in frames:
                record = records[triplet.name] = ItemRecord(key[1], *frames[key], {}, {})
                # The latest last, whichever process's.
                for entry in sorted(scored.get(key, []), key=lambda entry: entry.get("pass", 0)):
                    record.scores.update(entry["scores"])
                    record.networks.update(entry["networks"])
        return records


class _ProgressFile:
    """A file of lines, each handed to the system before the next is made; it exists from the first line on."""

    def __init__(self, path: Path):
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> "_ProgressFile":
        return self

    def write(self, entry: dict) -> None:
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A line that was cut off when its process was killed must not swallow the next.
            cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            self.file = self.path.open("a", encoding="utf-8")
            if cut:
                self.file.write("\n")
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def __exit__(self, *error) -> None:
        if self.file is not None:
            self.file.close()


def mean_and_interval(values: Sequence[float], sequences: Sequence[str]) -> dict[str, float]:
    """`mean` over the sequences of the mean in each, and with two sequences or more `low` and `high` of the 95 % interval of
    a bootstrap over them (percentiles of 10,000 resampled means, the same draws every time)."""
    grouped: dict[str, list[float]] = {}
    for sequence, value in zip(sequences, values):
        grouped.setdefault(sequence, []).append(value)
    means = np.array([np.mean(group) for group in grouped.values()])
    result = {"mean": float(means.mean())}
    if len(means) > 1:
        generator = np.random.default_rng(0)
        draws = [means[generator.integers(0, len(means), len(means))].mean() for _ in range(BOOTSTRAP_SAMPLES)]
        result["low"], result["high"] = map(float, np.percentile(draws, [2.5, 97.5]))
    return result


def describe_environment(processes: int) -> dict[str, Any]:
    """Versions of the libraries, this package's code, and the machine's hardware."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "processes": processes}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        "libraries": versions,
        "code_sha256": code.hexdigest(),
        "hardware": hardware,
    }


def folder_name(label: str) -> str:
    """A label as a folder's name: each run of characters other than letters, digits and `_.=,+-` becomes `_`."""
    return re.sub(r"[^\w.=,+-]+", "_", label).strip(".") or "_"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _by_size_and_time(rows: Sequence[tuple]) -> list[list[tuple]]:
    """Rows `(triplet, image, …)` in groups of one size and one instant."""
    groups: dict[tuple, list[tuple]] = {}
    for row in rows:
        groups.setdefault((row[1].shape, row[0].time), []).append(row)
    return list(groups.values())


def _triplets_digest(triplets: Sequence[Triplet]) -> str:
    """SHA-256 of the items' names, views, instants (other than the middle) and files' contents, but not of places of files."""
    lines = [
        json.dumps(
            [
                each.name,
                each.view,
                *([] if each.time == MIDDLE else [str(each.time)]),
                *(_content_digest(path, path.stat().st_mtime_ns) for path in each.files),
            ]
        )
        for each in triplets
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=None)
def _content_digest(path: Path, changed: int) -> str:
    """SHA-256 of a file that was `changed` at that time last."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
