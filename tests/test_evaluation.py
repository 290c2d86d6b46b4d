"""From a benchmark's files to tables and pages: real processes, real files, a real browser."""

import csv
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps

from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.evaluation.benchmarks import find_triplets
from madiff_diffusers.evaluation.evaluate import QUESTIONS, ablation, evaluate
from madiff_diffusers.evaluation.methods import (
    LATENTS,
    MIDDLE,
    Baseline,
    FunctionMethod,
    MADiffMethod,
    Settings,
    checkpoint_digest,
)
from madiff_diffusers.evaluation.metrics import Scorer, psnr
from madiff_diffusers.evaluation.report import differences, markdown
from madiff_diffusers.evaluation.runs import mean_and_interval
from madiff_diffusers.evaluation.smoothness import pan, step_ratio, steps
from madiff_diffusers.evaluation.visualization import offsets_image
from madiff_diffusers.image_io import read_image
from tests.conftest import build_pipeline, load_config, moving_picture, two_processes
from tests.processes import run_python, start_python
from tests.test_metrics import load_scorer, random_backbone_file


NAMES = ["2", "3", "11", "12"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def root(tmp_path) -> Path:
    """Four triplets of two sizes in the layout of UCF101."""
    for number, name in enumerate(NAMES):
        for frame, time_ in (("frame_00", -1), ("frame_01_gt", 0), ("frame_02", 1)):
            path = tmp_path / "ucf101" / name / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(moving_picture(time_ + 5 * number, 40, 48 + 16 * (number % 2))).save(path)
    return tmp_path / "ucf101"


@pytest.fixture
def peer(tmp_path) -> Path:
    """A working directory with a module of functions to evaluate; each call is a line of `calls`."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "peers.py").write_text(
        "import time\n"
        "import numpy as np\n"
        "def slow(prev, next):\n"
        "    open('calls', 'a').write('call\\n')\n"
        "    time.sleep(0.3)\n"
        "    return next\n"
        "def blend(prev, next):\n"
        "    prev *= 0  # nobody else's frame\n"
        "    return next / 255\n"
        "def at(prev, next, time=0.5):\n"
        "    if time != 0.5:\n"
        "        open('times', 'a').write(f'{time}\\n')\n"
        "    return prev\n"
        "def told(prev, next, time):\n"
        "    return at(prev, next, time)\n"
        "def truth(prev, next, time=0.5):\n"
        "    from madiff_diffusers.evaluation.smoothness import pan\n"
        "    open('pans', 'a').write('call\\n')\n"
        "    place = next_place(prev)\n"
        "    return prev if place is None else pan(place + time)\n"
        "def next_place(prev):\n"
        "    from madiff_diffusers.evaluation.smoothness import pan\n"
        "    return [None, *(place for place in range(2) if np.array_equal(pan(place), prev))][-1]\n"
        "def nearest(prev, next, time=0.5):\n"
        "    return prev if time < 0.5 else next\n"
        "def broken(prev, next):\n"
        "    raise RuntimeError('out of ideas')\n"
        "def small(prev, next):\n"
        "    return next[:-1]\n"
        "def bright(prev, next):\n"
        "    return next.astype(np.float32)\n"
        "def nothing(prev, next):\n"
        "    return None\n"
        "memory = np.zeros((8, 8, 3), np.uint8)\n"
        "def buffered(prev, next):\n"
        "    memory[...] = next\n"
        "    return memory\n"
        "number = 3\n"
    )
    return folder


def madiff(*arguments, cwd=None, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "madiff_diffusers", *arguments]
    return run_python(command, cwd=cwd, env={**ENVIRONMENT, **environment})


def scorer() -> Scorer:
    return Scorer(["psnr", "ssim"])


def results(output: Path) -> list:
    return json.loads((output / "results.json").read_text())["runs"]


# ---- what is made and scored ----


def test_frames_scores_and_tables(pipeline, root, tmp_path):
    output = tmp_path / "out"
    methods = [MADiffMethod(pipeline, "tiny", "0123"), Baseline("average"), Baseline("flow")]
    summaries = evaluate("ucf101", str(root), output, methods, scorer(), gallery=2)
    assert [summary["label"] for summary in summaries] == ["tiny", "flow", "average"]
    assert results(output) == summaries
    for summary in summaries:
        triplets = find_triplets("ucf101", str(root))
        written = [
            np.array(read_image(output / "frames" / summary["label"] / "ucf101" / f"{name}.png")) for name in NAMES
        ]
        scores = [psnr(image, triplet.read()[1]) for image, triplet in zip(written, triplets)]
        assert [item["psnr"] for item in summary["items"]] == scores
        assert summary["scores"]["psnr"]["mean"] == pytest.approx(np.mean(scores))
        assert summary["scores"]["psnr"]["low"] <= np.mean(scores) <= summary["scores"]["psnr"]["high"]
        assert summary["seconds_per_frame"]["median"] > 0
    # The pipeline's own result with the same seed is what was written, and seeds do not depend on the order.
    triplet = find_triplets("ucf101", str(root))[3]
    expected = pipeline(
        *map(read_image, (triplet.prev, triplet.next)), generator=torch.Generator().manual_seed(0)
    ).frames[0][0]
    assert np.array_equal(np.array(expected), np.array(read_image(output / "frames" / "tiny" / "ucf101" / "12.png")))
    protocol = summaries[0]["protocol"]
    assert protocol["checkpoint_sha256"] == "0123" and protocol["steps"] == pipeline.config.default_num_inference_steps
    libraries = summaries[0]["environments"][0]["libraries"]
    assert libraries["torch"] == torch.__version__.split("+")[0] and {"diffusers", "scikit-image"} <= set(libraries)
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert len(rows) == 3 * 4 and {row["name"] for row in rows} == set(NAMES)
    table = (output / "results.md").read_text()
    assert "### ucf101 (4 triplets)" in table and "| method | PSNR ↑ | SSIM ↑ | s/frame |" in table
    assert re.search(r"\| flow \| \d\d\.\d\d \[\d\d\.\d\d, \d\d\.\d\d\] \| 0\.\d{4} ", table)
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_baselines():
    prev, truth, next_ = (moving_picture(time_, 96, 128) for time_ in (-1, 0, 1))
    (average,) = Baseline("average")([(prev, next_)])
    assert np.abs(average.astype(float) - (prev.astype(float) + next_) / 2).max() <= 0.5
    (flow,) = Baseline("flow")([(prev, next_)])
    assert psnr(flow, truth) > psnr(average, truth) + 3
    (still,) = Baseline("flow")([(prev, prev)])
    assert np.array_equal(still, prev)


def test_baselines_at_other_instants():
    prev, next_ = moving_picture(0, 96, 128), moving_picture(4, 96, 128)
    (average,) = Baseline("average")([(prev, next_)], Fraction(1, 4))
    assert np.abs(average - (0.75 * prev + 0.25 * next_)).max() <= 0.5
    for time_ in (1, 3):
        (flow,) = Baseline("flow")([(prev, next_)], Fraction(time_, 4))
        truths = [psnr(flow, moving_picture(other, 96, 128)) for other in (1, 2, 3)]
        assert np.argmax(truths) == time_ - 1 and truths[time_ - 1] > 30, "nearest to its own instant"


@pytest.fixture
def septuplets(tmp_path) -> Path:
    for i in range(7):
        path = tmp_path / "vimeo" / "sequences" / "00001" / "0001" / f"im{i + 1}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(moving_picture(i, 48, 64)).save(path)
    (tmp_path / "vimeo" / "sep_testlist.txt").write_text("00001/0001\n")
    return tmp_path / "vimeo"


def test_several_instants(septuplets, peer, monkeypatch, capsys):
    """Scores of each instant, a chart of them, and the middle's the same as ever."""
    monkeypatch.chdir(peer)
    options = [
        "evaluate",
        "--benchmark",
        "vimeo-septuplet",
        "--root",
        str(septuplets),
        "--metrics",
        "psnr",
        "-o",
        "out",
    ]
    assert main([*options, "--skip", "5", "--method", "flow", "peers:at", "peers:told", "--batch-size", "3"]) == 0
    printed = capsys.readouterr().out
    runs = {run["label"]: run for run in results(peer / "out")}
    assert {run["benchmark"] for run in runs.values()} == {"vimeo-septuplet-skip-5"}
    instants = ["1/6", "1/3", "1/2", "2/3", "5/6"]
    for label, run in runs.items():
        assert [item["time"] for item in run["items"]] == instants == list(run["instants"])
        assert [scores["psnr"]["mean"] for scores in run["instants"].values()] == [
            item["psnr"] for item in run["items"]
        ]
        assert len(re.findall(rf"\| {label} \| \d/\d \| \d+\.\d\d \|", printed)) == 5
    assert set((peer / "times").read_text().split()) == {str(time_) for time_ in (1 / 6, 1 / 3, 2 / 3, 5 / 6)}
    chart = (peer / "out" / "chart-vimeo-septuplet-skip-5.svg").read_text()
    assert chart.count("<!-- instant -->") == 1 and "psnr" not in chart
    rows = list(csv.DictReader((peer / "out" / "results.csv").open()))
    assert [row["time"] for row in rows if row["label"] == "flow"] == instants
    assert "5/6" in (peer / "out" / "index.html").read_text()
    # Without --skip, as before: one instant, which is not named.
    assert main([*options, "--method", "flow"]) == 0
    printed = capsys.readouterr().out
    assert "### vimeo-septuplet (1 triplets)" in printed and "instant" not in printed
    assert main([*options, "--skip", "5", "--method", "peers:blend"]) == 2
    assert (
        "--method 'peers:blend' must take (prev, next, time) for other instants than the middle"
        in capsys.readouterr().err
    )


def test_motion_in_steps_of_one_length(pipeline, root, peer, monkeypatch, capsys):
    assert steps([pan(time_) for time_ in (0, 1 / 3, 1)]) == pytest.approx([4, 8], rel=0.02)
    assert step_ratio(Baseline("flow")) < 1.02
    monkeypatch.chdir(peer)
    for name, ratio in (
        ("peers:truth", 1.0),
        ("peers:nearest", 1200.0),
    ):  # the latter stands still, then jumps by a whole step
        assert step_ratio(FunctionMethod(name)) == pytest.approx(ratio, rel=0.02)
    options = [
        "evaluate",
        "--benchmark",
        "ucf101",
        "--root",
        str(root),
        "-o",
        "out",
        "--gallery",
        "0",
        "--metrics",
        "psnr",
    ]
    assert main([*options, "step_ratio", "--method", "peers:truth", "peers:nearest"]) == 0
    printed = capsys.readouterr().out
    assert "| step ratio ↓ |" in printed and "pan of 12 pixels a frame" in printed
    assert re.search(r"\| peers:truth \| [^|]+ \| 1\.0\d \|", printed)
    calls = (peer / "pans").read_text()
    assert main([*options, "--method", "peers:truth"]) == 0
    assert "| step ratio ↓ |" in capsys.readouterr().out and (peer / "pans").read_text() == calls, (
        "known, and not measured again"
    )
    assert main([*options, "step_ratio", "--method", "peers:blend"]) == 2
    assert "must take (prev, next, time)" in capsys.readouterr().err


# Published beside the sets; measured by a program that knows nothing of this one.
REFERENCES = {
    "middlebury": {"average": (28.00, 0.799, 0.0909), "flow": (34.16, 0.947, 0.0397)},
    "davis": {"average": (22.13, 0.632, 0.1841), "flow": (26.09, 0.822, 0.1115)},
    "ucf101": {"average": (33.05, 0.920, 0.0480), "flow": (34.14, 0.940, 0.0351)},
}


def compare_with_independent_scorer(benchmark: str, shared_data: Path, output: Path, limit=None) -> dict:
    """Scores of both baselines, equal to what a program that shares no code says of the files that were written."""
    score = load_scorer(shared_data)
    root = shared_data / "bench" / {"middlebury": "middlebury_others"}.get(benchmark, benchmark)
    metrics = Scorer(lpips_backbone=str(shared_data / "weights" / "lpips_alexnet_features.safetensors"))
    summaries = evaluate(
        benchmark, str(root), output, [Baseline("average"), Baseline("flow")], metrics, limit=limit, gallery=0
    )
    independent, scores = score.LPIPS(str(shared_data / "weights")), {}
    for summary in summaries:
        means = scores[summary["label"]] = {name: value["mean"] for name, value in summary["scores"].items()}
        rows = []
        for name, _, _, truth in list(score.triplets(str(shared_data / "bench"), benchmark))[:limit]:
            pair = score.load(output / "frames" / summary["label"] / benchmark / f"{name}.png"), score.load(truth)
            rows.append((score.psnr(*pair), score.ssim(*pair), independent(*pair)))
        psnr_, ssim_, lpips_ = np.mean(rows, axis=0)
        assert means["psnr"] == pytest.approx(psnr_, abs=1e-3)
        assert means["ssim"] == pytest.approx(ssim_, abs=1e-4) and means["lpips"] == pytest.approx(lpips_, abs=1e-4)
    return scores


def test_an_independent_scorer_agrees(shared_data, tmp_path):
    compare_with_independent_scorer("middlebury", shared_data, tmp_path, limit=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_reference_values_come_out(name, shared_data, tmp_path):
    scores = compare_with_independent_scorer(name, shared_data, tmp_path)
    for label, expected in REFERENCES[name].items():
        # Half of the last digit given, and what two programs may differ by.
        for metric, value, tolerance in zip(
            ("psnr", "ssim", "lpips"), expected, (0.005 + 1e-3, 0.0005 + 1e-4, 0.00005 + 1e-4)
        ):
            assert scores[label][metric] == pytest.approx(value, abs=tolerance), (label, metric)


def test_intervals():
    values = np.random.default_rng(1).normal(10, 2, 200)
    result = mean_and_interval(values, [str(i) for i in range(200)])
    assert result["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(200)
    assert result["low"] == pytest.approx(values.mean() - half, abs=half / 5)
    assert result["high"] == pytest.approx(values.mean() + half, abs=half / 5)
    # Clips count alike, however many frames they have, and are what is drawn again.
    clips = mean_and_interval([1, 1, 1, 4], ["a", "a", "a", "b"])
    assert clips == {"mean": 2.5, "low": 1.0, "high": 4.0}
    assert mean_and_interval([3.0], ["a"]) == {"mean": 3.0}


def test_batches_give_the_same_table(pipeline, root, tmp_path):
    tables = []
    for size in (1, 4):
        (summary,) = evaluate(
            "ucf101",
            str(root),
            tmp_path / str(size),
            [MADiffMethod(pipeline, "tiny", "0")],
            scorer(),
            batch_size=size,
            gallery=0,
        )
        tables.append([(item["name"], round(item["psnr"], 1)) for item in summary["items"]])
        told = re.findall(r"made at once.*: (.+)\.", markdown([summary]))
        assert told == ([] if size == 1 else [f"{summary['label']} {' or '.join(map(str, summary['batches']))}"])
        assert summary["batches"] == ([1] if size == 1 else [2]), "two of each size"
    assert tables[0] == tables[1]


def test_the_time_of_a_batch_is_shared_among_its_frames(peer, root, tmp_path, monkeypatch):
    monkeypatch.chdir(peer)
    (summary,) = evaluate(
        "ucf101", str(root), tmp_path / "out", [FunctionMethod("peers:slow")], scorer(), batch_size=4, gallery=0
    )
    assert summary["batches"] == [2] and all(0.3 <= item["seconds"] < 0.5 for item in summary["items"])


def test_scores_are_those_of_the_files_that_are_there(root, tmp_path):
    """Frames that were deleted are made again; another metric is added to what is known."""
    first = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], Scorer(["psnr"]), gallery=0)[0]
    frames = tmp_path / "out" / "frames" / "average" / "ucf101"
    kept = (frames / "2.png").stat().st_mtime_ns
    (frames / "3.png").unlink()
    second = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], Scorer(["ssim"]), gallery=0)[0]
    assert set(second["scores"]) == {"psnr", "ssim"} and second["scores"]["psnr"] == first["scores"]["psnr"]
    assert (frames / "2.png").stat().st_mtime_ns == kept and (frames / "3.png").is_file()
    Image.fromarray(moving_picture(0, 12, 12)).save(frames / "3.png")  # not what the method made
    third = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], scorer(), gallery=0)[0]
    assert third["items"] == [
        {**item, "seconds": new["seconds"]} for item, new in zip(second["items"], third["items"])
    ]
    assert read_image(frames / "3.png").size == (64, 40)


def test_a_page_is_of_the_latest_scores(root, tmp_path):
    def page(*metrics: str) -> Path:
        method, scores = Baseline("average"), Scorer(metrics)
        (summary,) = evaluate("ucf101", str(root), tmp_path / "out", [method], scores, gallery=1)
        worst = min(summary["items"], key=lambda item: item["psnr"])
        (found,) = (tmp_path / "out" / "gallery").rglob("index.html")
        assert f"PSNR {worst['psnr']:.2f}" in found.read_text()
        return found

    first = page("psnr")
    abandoned = first.parent.with_name(f".{first.parent.name}.1.tmp")
    abandoned.mkdir()
    assert "SSIM" not in first.read_text() and "SSIM" in page("psnr", "ssim").read_text() and not abandoned.exists()
    written = first.stat().st_mtime_ns
    assert page("ssim").stat().st_mtime_ns == written, "nothing new, nothing written"


def test_scores_of_another_network_are_not_kept(root, tmp_path):
    means = []
    for seed in (1, 2, 2):
        metrics = Scorer(["lpips"], lpips_backbone=random_backbone_file(tmp_path / f"{seed}.safetensors", seed))
        (summary,) = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], metrics, gallery=0)
        assert summary["networks"] == metrics.networks
        means.append(summary["scores"]["lpips"]["mean"])
    assert means[0] != means[1] == means[2]


def test_of_scores_by_other_processes_the_latest_count(root, tmp_path):
    """Two processes scored with a network, and one does so with another."""
    first = Scorer(["lpips"], lpips_backbone=random_backbone_file(tmp_path / "1.safetensors", 1))
    second = Scorer(["lpips"], lpips_backbone=random_backbone_file(tmp_path / "2.safetensors", 2))
    expected = evaluate("ucf101", str(root), tmp_path / "second", [Baseline("average")], second, gallery=0)[0]
    evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], first, gallery=0)
    folder = tmp_path / "out" / "runs" / "average" / "ucf101"
    lines = (folder / "progress-0.jsonl").read_text().splitlines(keepends=True)
    made, scored = ([line for line in lines if ("seconds" in line) == is_made] for is_made in (True, False))
    (folder / "progress-0.jsonl").write_text("".join(made + scored[::2]))
    (folder / "progress-1.jsonl").write_text("".join(scored[1::2]))
    (summary,) = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], second, gallery=0)
    assert summary["scores"]["lpips"] == expected["scores"]["lpips"] and summary["networks"] == second.networks


def test_a_run_that_was_stopped_while_it_was_scored_ends_with_fewer_metrics(root, tmp_path):
    lpips = Scorer(["psnr", "lpips"], lpips_backbone=random_backbone_file(tmp_path / "1.safetensors", 1))
    evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], lpips, gallery=0)
    (progress,) = (tmp_path / "out").rglob("progress-0.jsonl")
    lines = progress.read_text().splitlines(keepends=True)
    progress.write_text(
        "".join([line for line in lines if "seconds" in line] + [line for line in lines if "lpips" in line][:1])
    )
    (summary,) = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], scorer(), gallery=2)
    assert set(summary["scores"]) == {"psnr", "ssim"} and list((tmp_path / "out" / "gallery").rglob("index.html"))
    # Half of it by another network: neither's is the mean of both.
    scored = [json.loads(line) for line in lines if "lpips" in line]
    for entry in scored[:2]:
        entry.update(networks={"lpips": "another"})
        entry["pass"] += 1
    progress.write_text("".join(lines) + "".join(f"{json.dumps(entry)}\n" for entry in scored[:2]))
    (summary,) = evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], scorer(), gallery=0)
    assert set(summary["scores"]) == set(summary["networks"]) | {"psnr", "ssim"} == {"psnr", "ssim"}


def test_what_a_whole_run_cannot_have_is_refused_or_left_out_before(pipeline, root, tmp_path):
    metrics = scorer()
    for names, left_out, message in (
        (["fid"], {}, "fid needs at least 2 triplets, but there is 1"),
        ([], {"fid": "its network is not there"}, "none that can be computed here: fid: its network is not there"),
    ):
        metrics.names, metrics.left_out = names, left_out
        with pytest.raises(ValueError, match=message):
            evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], metrics, limit=1)
    assert not (tmp_path / "out").exists()
    method = MADiffMethod(pipeline, "tiny", "0123", Settings(hint_policy="true", steps=1))
    (summary,) = evaluate("ucf101", str(root), tmp_path / "out", [method], Scorer(["psnr", "step_ratio"]), gallery=0)
    assert set(summary["scores"]) == {"psnr"} and "step_ratio" in summary["left_out"]
    with pytest.raises(ValueError, match="must not be step_ratio alone for tiny"):
        evaluate("ucf101", str(root), tmp_path / "new", [method], Scorer(["step_ratio"]), gallery=0)


def test_hidden_files_and_folders_are_no_part_of_a_benchmark(root, tmp_path):
    before = [triplet.name for triplet in find_triplets("ucf101", str(root))]
    (root / ".ipynb_checkpoints").mkdir()
    (next(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".") / "._0.png").write_bytes(b"mac")
    assert [triplet.name for triplet in find_triplets("ucf101", str(root))] == before


def test_rows_that_cannot_be_compared_are_told(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    changed = next((tmp_path / "other").rglob("*.png"))
    ImageOps.invert(read_image(changed)).save(changed)
    for number, (place, method) in enumerate(((root, "average"), (tmp_path / "other", "flow"))):
        metrics = Scorer(["lpips"], lpips_backbone=random_backbone_file(tmp_path / f"{number}.safetensors", number))
        evaluate("ucf101", str(place), tmp_path / "out", [Baseline(method)], metrics, gallery=0)
    table = (tmp_path / "out" / "results.md").read_text()
    assert "Not all rows are of the same triplets, and such cannot be compared: flow 4, average 4." in table
    assert re.search(
        "LPIPS is of different networks, and cannot be compared: flow [0-9a-f]{8}, average [0-9a-f]{8}", table
    )


def test_other_code_is_told_or_begins_anew(root, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    code = "import torch\nclass Still:\n    hint_channels = 2\n    def start(self, prev, next_, time=0.5):\n        return (torch.full_like(prev[:, :2], {0}),) * 2\n    def from_guess(self, prev, mid, next_):\n        return self.start(prev, next_)\n"
    (tmp_path / "still_hints.py").write_text(code.format(0.0))
    config = load_config("tiny")
    config.update(hint_source="still_hints:Still")
    config["vqvae"]["hint_channels"], config["unet"]["in_channels"] = 2, 13
    pipeline = build_pipeline(config)

    def run() -> None:
        evaluate("ucf101", str(root), tmp_path / "out", [MADiffMethod(pipeline, "tiny", "0123")], scorer(), gallery=0)

    run()
    (tmp_path / "still_hints.py").write_text(code.format(8.0))
    with pytest.raises(ValueError, match="holds 'tiny' on ucf101 with hint_code_sha256"):
        run()
    (tmp_path / "still_hints.py").write_text(code.format(0.0))
    assert "other code" not in capsys.readouterr().err
    (protocol,) = (tmp_path / "out").rglob("protocol.json")
    protocol.write_text(re.sub('"code_sha256": "[0-9a-f]*"', '"code_sha256": "0"', protocol.read_text()))
    run()
    assert "were made by other code of this package, and are kept" in capsys.readouterr().err


# ---- methods ----


def test_functions(peer, root, tmp_path, monkeypatch):
    monkeypatch.chdir(peer)
    prev, next_ = moving_picture(0), moving_picture(3)
    before = prev.copy()
    (result,) = FunctionMethod("peers:blend")([(prev, next_)])
    assert np.array_equal(result, next_) and np.array_equal(prev, before)
    for name, message in (
        ("peers:broken", "failed: RuntimeError: out of ideas .*peers.py, line 27"),
        ("peers:small", r"must give an array \(64, 96, 3\), but gave an array \(63, 96, 3\)"),
        ("peers:bright", r"must give uint8, or floating point in \[0, 1\], but gave float32"),
        ("peers:nothing", "but gave a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            FunctionMethod(name)([(prev, next_)])
    with pytest.raises(ValueError, match="ucf101, 2: `method` 'peers:broken' failed"):
        evaluate("ucf101", str(root), tmp_path / "out", [FunctionMethod("peers:broken")], scorer())
    black, white = (np.full((8, 8, 3), value, np.uint8) for value in (0, 255))
    results = FunctionMethod("peers:buffered")([(white, black), (white, white)])
    assert np.array_equal(results, [black, white])
    (peer / "no_end.py").write_text("import sys\nf = print\nsys.exit(0)")
    (peer / "no_python.py").write_text("def f(:")
    (peer / "no_weights.py").write_text("raise RuntimeError('no weights here')")
    for name in ("peers:none", "nowhere:f", "peers:number", "peers:", "no_python:f", "no_weights:f", "no_end:f"):
        with pytest.raises(ValueError, match=f"`method` '{name}'"):
            FunctionMethod(name)


def test_settings_change_what_they_name_and_nothing_else(pipeline, root):
    prev, _, next_ = find_triplets("ucf101", str(root))[0].read()
    source = pipeline.config.hint_source
    assert source == "events+flow"

    def result(**settings) -> np.ndarray:
        return MADiffMethod(pipeline, "tiny", "0", Settings(**settings))([(prev, next_)])[0]

    own = result()
    scheduler = pipeline.scheduler
    for settings in (
        {"steps": 3},
        {"hint_policy": "none"},
        {"steps": 3, "hint_interval": 2},
        {"hint_source": "events"},
        {"hint_source": "flow"},
        {"scheduler": "LCMScheduler", "steps": 3},
        {"quantized": False},
    ):
        assert not np.array_equal(result(**settings), own), settings
        assert pipeline.scheduler is scheduler and np.array_equal(result(), own), f"{settings} are gone afterwards"
    assert np.array_equal(result(hint_source=source, quantized=True, hint_policy="sampling"), own)
    for settings, message in (
        ({"steps": 0}, "`steps` must be a positive integer"),
        ({"hint_interval": -1}, "`hint_interval`"),
        ({"hint_policy": "guess"}, "`hint_policy` must be one of"),
        ({"hint_source": "depth"}, "`hint_source` must be of the checkpoint's events\\+flow"),
        ({"scheduler": "UNet2DModel"}, "`scheduler` must be the name of a scheduler"),
    ):
        with pytest.raises(ValueError, match=message):
            result(**settings)


def test_hints_to_compare_with_are_nothing_and_what_the_neighbours_tell(pipeline):
    """Both stay what they were at the first step."""
    pair = (moving_picture(-1, 64, 64), moving_picture(1, 64, 64))
    prev, next_ = (torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in pair)
    events, flow = pipeline.hints.sources
    with torch.no_grad():
        told = zip(events.events((prev, prev), (next_, next_)), flow.start(prev, next_))
    expected = {"neighbours": [torch.cat(side, dim=1) for side in told]}
    expected["none"] = [torch.zeros_like(side) for side in expected["neighbours"]]
    frames = []
    for policy in ("sampling", "damped", "start", "neighbours", "none"):
        seen = []
        hook = pipeline.unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][:, 9:]))
        frames.append(MADiffMethod(pipeline, "tiny", "0", Settings(steps=3, hint_policy=policy))([pair])[0])
        hook.remove()
        if policy in expected:
            small = [pipeline.vqvae.resize_hints(side, seen[0].shape[-2:]) for side in expected[policy]]
            assert all(torch.allclose(each, torch.cat(small, dim=1), atol=1e-4) for each in seen)
    assert len({frame.tobytes() for frame in frames}) == 5, "no two policies make the same frame"


@pytest.mark.parametrize(
    "name, own, error",  # that Diffusers raises: in the constructor of the first two, in the others' first step
    [
        ("EulerDiscreteScheduler", {"beta_schedule": "sigmoid"}, "NotImplementedError"),
        ("VQDiffusionScheduler", {}, "TypeError"),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "NotImplementedError"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, "ValueError"),
        ("FlowMatchEulerDiscreteScheduler", {}, "ValueError"),
        ("CogVideoXDPMScheduler", {}, "TypeError"),
    ],
)
def test_a_scheduler_that_cannot_sample_is_refused_before_anything_runs(pipeline, name, own, error):
    pipeline.scheduler = scheduler = DDPMScheduler.from_config({**pipeline.scheduler.config, **own})
    with pytest.raises(ValueError, match=f"`scheduler` {name} does not take this checkpoint: {error}: "):
        MADiffMethod(pipeline, "tiny", "0", Settings(scheduler=name))
    assert pipeline.scheduler is scheduler


def test_questions():
    own = Settings()
    for question, (name, defaults) in QUESTIONS.items():
        if question == "parts":
            continue
        variants = ablation(question, own, "events+flow")
        assert (
            len({getattr(each, name) for each in variants})
            == len(variants)
            == len(defaults or ("events+flow", "events", "flow"))
        )
        assert all(each._replace(**{name: None}) == own for each in variants)
    assert [each.steps for each in ablation("steps", own, "flow", [7, 8])] == [7, 8]
    with pytest.raises(ValueError, match="`question` source needs a checkpoint of several hint sources"):
        ablation("source", own, "flow")
    with pytest.raises(ValueError, match="`question` steps varies `steps`"):
        ablation("steps", Settings(steps=3), "flow")
    parts = ablation("parts", Settings(quantized=False), "flow")
    assert all(each.quantized is False for each in parts) and len({*parts}) == len(parts) == 12
    assert all(sum(value is not None for value in each) == 2 for each in parts)
    with pytest.raises(ValueError, match="`question` parts varies steps, which must not be set"):
        ablation("parts", Settings(steps=3), "flow")
    with pytest.raises(ValueError, match="`values` must not be given for `question` parts, but are 1"):
        ablation("parts", own, "flow", [1])


def test_a_checkpoint_s_digest_is_of_weights_and_configurations(checkpoint, tmp_path):
    digest = checkpoint_digest(checkpoint)
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    (copied / "README.md").write_text("other words")
    assert checkpoint_digest(copied) == digest
    # Results that lie in the folder, or a state of training, would else make the same checkpoint another one.
    for name in ("results.json", "eval/runs/own/ucf101/protocol.json", "vqvae/old/config.json"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("{}")
    assert checkpoint_digest(copied) == digest
    for name in ("vqvae/config.json", "unet/diffusion_pytorch_model.safetensors"):
        changed = shutil.copytree(checkpoint, tmp_path / name.partition("/")[0])
        (changed / name).write_bytes((changed / name).read_bytes() + b" ")
        assert checkpoint_digest(changed) != digest
    (copied / "model_index.json").write_text((copied / "model_index.json").read_text() + " ")
    assert checkpoint_digest(copied) != digest


# ---- stopped and taken up ----


def test_killed_half_way_the_same_command_makes_only_what_is_left(root, peer, monkeypatch, capsys):
    arguments = [
        "evaluate",
        "--benchmark",
        "ucf101",
        "--root",
        root,
        "-o",
        "out",
        "--method",
        "peers:slow",
        "--metrics",
        "psnr",
        "--gallery",
        "0",
    ]
    calls, frames = peer / "calls", peer / "out" / "frames" / "peers_slow" / "ucf101"
    process = start_python([sys.executable, "-m", "madiff_diffusers", *arguments], cwd=peer, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(list(frames.glob("*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    progress = peer / "out" / "runs" / "peers_slow" / "ucf101" / "progress-0.jsonl"
    progress.write_text(progress.read_text() + '{"item": "12", "seco')  # as a line looks that was being written
    (frames / ".12.png.1.tmp").write_bytes(b"half a frame")
    made = {path.name: path.stat().st_mtime_ns for path in frames.glob("[!.]*.png")}
    recorded = len([line for line in progress.read_text().splitlines() if line.endswith("}")])
    assert 2 <= len(made) < 4 and not (peer / "out" / "results.json").exists()
    before = len(calls.read_text().splitlines())
    done = madiff(*arguments, cwd=peer)
    assert done.returncode == 0, done.stderr
    sizes = 2 if recorded < 3 else 1  # the first frame of each size is made twice, to warm up
    assert len(calls.read_text().splitlines()) - before == 4 - recorded + sizes
    again = {path.name: path.stat().st_mtime_ns for path in frames.iterdir()}
    assert len(again) == 4 and sum(again[name] == made[name] for name in made) >= recorded
    assert results(peer / "out")[0]["scores"]["psnr"]["mean"] > 10
    before = calls.read_text()
    monkeypatch.chdir(peer)
    assert main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out == done.stdout and calls.read_text() == before, "nothing is left to do"


def test_two_processes_give_the_table_of_one(root, checkpoint, tmp_path):
    options = [
        "evaluate",
        "--benchmark",
        "ucf101",
        "--root",
        root,
        "--checkpoint",
        checkpoint,
        "--method",
        "madiff",
        "flow",
    ]
    options += ["--metrics", "psnr", "ssim", "--gallery", "1"]
    assert main([*map(str, options), "-o", str(tmp_path / "one")]) == 0
    command = two_processes(["madiff_diffusers", *map(str, options), "-o", str(tmp_path / "two")])
    done = run_python(command, env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("### ucf101") == 1
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    for run, other in zip(one, two):
        assert other["environments"][0]["hardware"]["processes"] == 2
        made = [
            len((tmp_path / "two" / "runs" / run["label"] / "ucf101" / f"progress-{i}.jsonl").read_text().splitlines())
            for i in (0, 1)
        ]
        assert made == [4, 4], "two frames, two scores each"
        assert other["scores"] == run["scores"] and other["protocol"] == run["protocol"]
        assert [{**item, "seconds": 0} for item in other["items"]] == [{**item, "seconds": 0} for item in run["items"]]
    assert len(two) == 2


def test_another_protocol_is_not_mixed_in(pipeline, root, tmp_path):
    def run(seed=0, **arguments):
        return evaluate(
            "ucf101",
            str(root),
            tmp_path / "out",
            [MADiffMethod(pipeline, "tiny", "0", seed=seed)],
            scorer(),
            gallery=0,
            **arguments,
        )

    run()
    with pytest.raises(
        ValueError, match="holds 'tiny' on ucf101 with seed 0, but it is 1 now: give another `output` or `label`"
    ):
        run(seed=1)
    with pytest.raises(ValueError, match="with triplets 4, but it is 2 now"):
        run(limit=2)
    truth, before = root / "2" / "frame_01_gt.png", (root / "2" / "frame_01_gt.png").read_bytes()
    truth.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # another file of the same size
    with pytest.raises(ValueError, match="with triplets_sha256 '.*', but it is '.*' now"):
        run()
    truth.write_bytes(before)
    assert len(run(seed=1, label="tiny | second seed")) == 2
    table = (tmp_path / "out" / "results.md").read_text()
    assert r"| tiny \| second seed | " in table


# ---- errors ----


def test_bad_input_is_one_line_and_leaves_nothing(root, checkpoint, tmp_path, capsys):
    truth = root / "12" / "frame_01_gt.png"
    good = truth.read_bytes()
    output = tmp_path / "out"

    def fails(message: str, *options) -> None:
        arguments = ["evaluate", "--benchmark", "ucf101", "--root", root, "-o", output, "--metrics", "psnr", *options]
        assert main(list(map(str, arguments))) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("madiff: error: ")]
        assert re.search(message, line), line
        assert not output.exists()

    truth.unlink()
    fails("No such image file: .*12/frame_01_gt.png", "--method", "average")
    truth.write_bytes(good[:200])
    fails("Cannot read .*12/frame_01_gt.png as an image", "--method", "average")
    Image.fromarray(moving_picture(0, 40, 40)).save(truth)
    fails("12/frame_01_gt.png is 40x40, but .*12/frame_00.png is 64x40", "--method", "average")
    truth.write_bytes(good)
    fails("--root must hold ucf101", "--root", tmp_path / "nowhere", "--method", "average")
    fails("--benchmark must be one of", "--benchmark", "kodak", "--method", "average")
    fails("--method must be madiff, average, flow or MODULE:FUNCTION, but is 'rife'", "--method", "rife")
    fails("--method 'nowhere:f' cannot be loaded", "--method", "nowhere:f")
    fails("--checkpoint must be a folder", "--checkpoint", tmp_path)
    fails("--steps must be a positive integer", "--checkpoint", checkpoint, "--steps", "0")
    fails("--scheduler must be the name of a scheduler", "--checkpoint", checkpoint, "--scheduler", "Nothing")
    fails(
        "--scheduler PNDMScheduler does not take this checkpoint",
        "--checkpoint",
        checkpoint,
        "--scheduler",
        "PNDMScheduler",
    )
    fails("--metrics must be among", "--metrics", "vmaf")
    fails("--label is for one method", "--method", "average", "flow", "--label", "both")
    fails("different labels", "--method", "average", "average")
    fails("--batch-size must be at least 1", "--method", "average", "--batch-size", "0")
    fails("--device 'warp9'", "--device", "warp9")
    fails("--seed must be in", "--seed", "-1")


def test_ablate_prints_a_table(root, checkpoint, tmp_path, capsys):
    options = [
        "--benchmark",
        "ucf101",
        "--root",
        root,
        "--checkpoint",
        checkpoint,
        "--metrics",
        "psnr",
        "--limit",
        "2",
        "-o",
        tmp_path / "out",
    ]
    for question, values, labels in (
        (
            "hints",
            [],
            [f"hint_policy={policy}" for policy in ("damped", "neighbours", "none", "sampling", "start", "true")],
        ),
        ("source", [], ["hint_source=events", "hint_source=events+flow", "hint_source=flow"]),
        ("interval", ["1", "2"], ["steps=8 hint_interval=1", "steps=8 hint_interval=2"]),
        ("steps", ["1", "3", "12"], ["steps=1", "steps=3", "steps=12"]),
        ("scheduler", ["DDIMScheduler", "LCMScheduler"], ["scheduler=DDIMScheduler", "scheduler=LCMScheduler"]),
        ("quantized", [], ["quantized=no", "quantized=yes"]),
        ("latents", [], [f"latents={kind}" for kind in ("denoised", "mirrored", "noise", "true", "zero")]),
    ):
        options[-1] = tmp_path / question
        values = ["--values", *values] if values else []
        assert main(["ablate", question, *map(str, options), *values]) == 0
        printed = re.findall(r"^\| checkpoint (\S.*?) \|", capsys.readouterr().out, flags=re.MULTILINE)
        assert printed[: len(labels)] == labels
        compared = printed[len(labels) :]  # with the checkpoint's own settings, or the first
        assert len(compared) == len(labels) - 1 and set(compared) < set(labels)
        assert (tmp_path / question / "chart-ucf101.svg").read_text().count("<svg") == 1
    assert main(["ablate", "steps", *map(str, options), "--values", "some"]) == 2
    assert "--values must be integers, but has 'some'" in capsys.readouterr().err
    assert main(["ablate", "parts", *map(str, options), "--values", "1"]) == 2
    assert "--values must not be given for QUESTION parts, but are 1" in capsys.readouterr().err
    assert main(["ablate", "quantized", *map(str, options), "--values", "perhaps"]) == 2
    assert "--values must be yes or no" in capsys.readouterr().err


def test_true_hints_are_what_the_true_frame_tells(pipeline):
    prev, next_ = (moving_picture(time, 64, 96) for time in (-2, 2))
    early, late = (moving_picture(time, 64, 96) for time in (-1, 1))
    method = MADiffMethod(pipeline, "tiny", "0", Settings(hint_policy="true"))
    with pytest.raises(ValueError, match="`truths` must be given for `latents` or `hint_policy` true"):
        method([(prev, next_)])
    seen = []
    for truth in (early, late):
        pictures = dict(method.explain((prev, next_), MIDDLE, truth))
        flow = pipeline.hints.sources[-1].from_guess(
            *(torch.from_numpy(each).permute(2, 0, 1)[None] / 127.5 - 1 for each in (prev, truth, next_))
        )
        assert np.array_equal(pictures["flow to previous"], offsets_image(flow[0][0]))
        seen.append(method([(prev, next_)], MIDDLE, [truth])[0])
    assert not np.array_equal(*seen) and pipeline._hints is None


def test_latents_take_the_place_of_what_was_denoised(pipeline):
    """Of zeros, noise, another pair's latents and the true frame's, only the last depend on the true frame."""
    pair = (moving_picture(-1, 64, 64), moving_picture(1, 64, 64))
    truths = [moving_picture(0, 64, 64)], [np.zeros((64, 64, 3), np.uint8)]
    pipeline.vqvae.requires_grad_(False)

    def frame(kind: str, truth: list) -> np.ndarray:
        method = MADiffMethod(pipeline, "tiny", "0", Settings(latents=kind, quantized=False))
        return method([pair], truths=truth)[0].astype(int)

    frames = {kind: [frame(kind, truth) for truth in truths] for kind in LATENTS}
    assert all((first == second).all() == (kind != "true") for kind, (first, second) in frames.items())
    assert all((frames[kind][0] != frames["denoised"][0]).any() for kind in LATENTS[1:])
    with pytest.raises(ValueError, match="truths"):
        frame("true", None)
    with pytest.raises(ValueError, match="`latents` must be one of denoised"):
        MADiffMethod(pipeline, "tiny", "0", Settings(latents="some"))


def test_differences_are_paired():
    def run(label: str, scores: list) -> dict:
        items = [{"name": str(i), "sequence": None, "psnr": score} for i, score in enumerate(scores)]
        return {"label": label, "scores": {"psnr": {}}, "items": items}

    table = differences([run("own", [10.0, 20.0, 30.0]), run("other", [10.5, 20.5, 30.5])], "own")
    assert "| other | +0.50 [+0.50, +0.50] |" in table and "own |" not in table.replace("| less own |", "")
    assert differences([run("own", [1.0])], "own") == ""
    assert r"| less a\|b | PSNR" in differences([run("a|b", [1.0]), run("c|d", [2.0])], "a|b"), "no column more"
    # Frames of one clip go together: half of its difference is that of three frames, half that of one.
    runs = [run("own", [10.0] * 4), run("other", [11.0, 11.0, 11.0, 14.0])]
    for each in runs:
        for item, clip in zip(each["items"], "aaab"):
            item["sequence"] = clip
    assert "| other | +2.50 [+1.00, +4.00] |" in differences(runs, "own")


# ---- pages ----


def test_pages_open_in_a_browser_with_every_picture(pipeline, root, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    output = tmp_path / "out"
    methods = [MADiffMethod(pipeline, 'tiny & "co" <b>', "0"), Baseline("flow")]
    summaries = evaluate("ucf101", str(root), output, methods, scorer(), gallery=3)
    worst = sorted(summaries[1]["items"], key=lambda item: item["psnr"])
    page = output / "gallery" / "flow" / "ucf101" / "index.html"
    names = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert names == [item["name"] for item in worst][:3], "the worst first; by PSNR, since LPIPS was not asked for"
    count = """<script>addEventListener("load", () => {
        const pictures = [...document.images], bad = pictures.filter(each => !each.naturalWidth).length;
        const links = [...document.links].map(each => each.getAttribute("href"));
        document.body.innerHTML = `pictures ${pictures.length} missing ${bad} links ${links.join(" ")} end`;
    })</script></body>"""
    pages = sorted(output.rglob("*.html"))
    assert len(pages) == 3
    shown = {}
    for path in pages:
        counted = path.with_name("counted.html")
        counted.write_text(path.read_text().replace("</body>", count))
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            counted.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        pictures, missing, links = re.search(r"pictures (\d+) missing (\d+) links (.*) end", done.stdout).groups()
        assert missing == "0", path
        for link in links.split():
            assert (path.parent / unquote(link)).exists(), link
        shown[path.parent.parent.name] = int(pictures)
    # Three items: prev, next, truth, result, error; of a checkpoint also events and flow to both sides, and the gate.
    assert sorted(shown.values()) == [1, 3 * 5, 3 * 10]


@pytest.mark.parametrize("label", ["a$b^$", "_hidden", "<b>|&"])
def test_labels_of_any_characters_are_shown(root, tmp_path, label):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate("ucf101", str(root), tmp_path / "out", [Baseline("average")], Scorer(["psnr"]), label=label)
    assert html.escape(label) in (tmp_path / "out" / "index.html").read_text().replace("&#34;", '"')
    assert results(tmp_path / "out")[0]["label"] == label


def test_clips_of_any_names(tmp_path):
    """Of bytes that are no characters, and behind symbolic links."""
    for number, folder in enumerate((b"caf\xe9", b"store/a/frames", b"store/b/frames")):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), folder)))
        path.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(moving_picture(i + number, 40, 48)).save(path / f"{i}.png")
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a").symlink_to(tmp_path / "store" / "a" / "frames")
    (clips / "b").symlink_to(tmp_path / "store" / "b" / "frames")
    assert {triplet.sequence for triplet in find_triplets("frames", str(clips))} == {"a", "b"}
    os.rename(os.path.join(os.fsencode(tmp_path), b"caf\xe9"), os.path.join(os.fsencode(clips), b"caf\xe9"))
    evaluate("frames", str(clips), tmp_path / "out", [Baseline("average")], Scorer(["psnr"]), gallery=2)
    assert "caf" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "index.html").is_file()


def test_clips_by_the_way_up(tmp_path, monkeypatch):
    """Of a folder that is named `..`, the frames that are made lie where those of other folders do."""
    (tmp_path / "clip" / "below").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(moving_picture(i, 40, 48)).save(tmp_path / "clip" / f"{i}.png")
    monkeypatch.chdir(tmp_path / "clip" / "below")
    assert find_triplets("frames", "..")[0].name == "clip/1"
    evaluate("frames", "..", tmp_path / "out", [Baseline("average")], Scorer(["psnr"]), gallery=0)
    made = [path for path in (tmp_path / "out" / "frames").rglob("*") if path.is_file()]
    assert made == [tmp_path / "out" / "frames" / "average" / "frames" / "clip" / "1.png"]


@pytest.mark.parametrize("metric, least", [("ssim", 11), ("lpips", 31)])
def test_frames_too_small_for_a_metric_are_told_before_the_work(tmp_path, metric, least):
    own = Scorer(
        [metric],
        lpips_backbone=random_backbone_file(tmp_path / "alexnet.safetensors", 0) if metric == "lpips" else None,
    )
    for side in (least, least - 1):
        folder = tmp_path / str(side) / "clip"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(moving_picture(i, 40, side)).save(folder / f"{i}.png")
    arguments = (tmp_path / "out", [Baseline("average")], own)
    evaluate("frames", str(tmp_path / str(least)), *arguments, gallery=0)
    with pytest.raises(ValueError, match=f"`metrics`: {metric} needs frames of {least} pixels .* have {least - 1}"):
        evaluate("frames", str(tmp_path / str(least - 1)), tmp_path / "other", *arguments[1:], gallery=0)
    assert not (tmp_path / "other").exists()


def test_what_takes_no_two_frames_is_refused_before_the_work(root, peer, monkeypatch, capsys):
    monkeypatch.chdir(peer)
    (peer / "others.py").write_text("def one(prev):\n    return prev\n")
    options = ["evaluate", "--benchmark", "ucf101", "--root", str(root), "--metrics", "psnr", "-o", "out"]
    assert main([*options, "--method", "average", "others:one"]) == 2
    assert "--method 'others:one' must take (prev, next), or (prev, next, time)" in capsys.readouterr().err
    assert not (peer / "out").exists()
