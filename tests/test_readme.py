"""What the README prints is what happens."""

import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from madiff_diffusers.cli import main
from madiff_diffusers.evaluation.benchmarks import BENCHMARKS
from madiff_diffusers.evaluation.evaluate import QUESTIONS
from madiff_diffusers.evaluation.metrics import METRICS
from tests.conftest import REPOSITORY
from tests.video_files import phone_clip, read
from training.data import LAYOUTS
from training.options import RunOptions

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_command_makes_the_picture_that_is_shown(tmp_path):
    command, printed = blocks("bash")[0].strip().splitlines()
    *installing, interpolating = command.split(" && ")
    assert "-m venv .venv" in installing[0] and "pip install ." in installing[1]
    arguments = shlex.split(interpolating)
    assert arguments[0] == ".venv/bin/madiff"
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    done = subprocess.run(
        [sys.executable, "-m", "madiff_diffusers", *arguments[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed.removeprefix("# ")
    made, shown = (np.array(Image.open(path)).astype(float) for path in (tmp_path / "mid.png", REPOSITORY / "examples" / "mid.png"))
    assert np.abs(made - shown).mean() < 0.5


def test_python_snippets_run(tmp_path):
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    phone_clip(tmp_path / "in.mp4", 3)
    exporting = next(line for block in blocks("bash") for line in block.splitlines() if line.startswith("madiff export"))
    subprocess.run([sys.executable, "-m", "madiff_diffusers", *shlex.split(exporting)[1:]], cwd=tmp_path, check=True)
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_video_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines() if line.startswith("madiff video")]
    assert len(commands) == 3
    for command in commands:
        phone_clip(tmp_path / command[2], 3)
        assert main([*command[1:], "--overwrite"]) == 0
        assert read(tmp_path / command[3]).audio


def test_ci_runs_the_test_command():
    lines = [line for line in README.splitlines() if "-m pytest" in line]
    assert len(lines) == 1 and "grep -m 1 -- '-m pytest' README.md" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["README.md", "training/README.md"])
def test_training_commands_have_options_that_exist(name):
    commands = re.findall(r"accelerate launch ([^\n]*?)-m training\.(\w+)([^#\n]*)", (REPOSITORY / name).read_text().replace("\\\n", ""))
    assert len(commands) >= 3
    for launcher, module, flags in commands:
        options = importlib.import_module(f"training.{module}")
        owner = next(each for each in vars(options).values() if isinstance(each, type) and each.__name__.endswith("Options") and each is not RunOptions)
        known = {field.name for field in dataclasses.fields(owner)} | {"config"}
        assert set(re.findall(r"--(\w+)", flags)) <= known
        for path in re.findall(r"--config_file (\S+)", launcher):
            assert (REPOSITORY / path).is_file()


def test_every_data_format_is_described():
    described = (REPOSITORY / "training" / "README.md").read_text()
    assert all(f"| `{name}`" in described or f"`{name}` |" in described or f"`{name}`," in described for name in LAYOUTS)


def test_every_benchmark_metric_and_question_is_described():
    described = re.sub(r"`(-\w+)`", lambda match: f"`snu-film{match.group(1)}`", README)
    for name in (*BENCHMARKS, *METRICS, *QUESTIONS):
        assert f"`{name}`" in described, name


def table_rows(text: str) -> dict:
    """`{benchmark: {method: cells}}` of the tables that `madiff evaluate` prints, but for their last column, the seconds."""
    tables = {}
    for title, body in re.findall(r"### ([\w-]+ \(\d+ triplets\))\n\n\| method .*\n\|[-|]+\n((?:\|.*\n)+)", text):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
        tables[title] = {row[0]: row[1:-1] for row in rows}
    return tables


@pytest.mark.slow
def test_the_results_are_what_the_commands_print(shared_data, tmp_path):
    backbone, vgg = (str(shared_data / "weights" / f"lpips_{net}_features.safetensors") for net in ("alexnet", "vgg16"))
    commands = re.findall(r"^madiff (evaluate --benchmark .*)$", README, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        arguments = shlex.split(command)
        benchmark = arguments[arguments.index("--benchmark") + 1]
        root = shared_data / "bench" / {"middlebury": "middlebury_others"}.get(benchmark, benchmark)
        values = {"DIR": str(root), "alexnet_features.safetensors": backbone, "vgg16_features.safetensors": vgg, "results": str(tmp_path / "results")}
        done = subprocess.run(
            [sys.executable, "-m", "madiff_diffusers", *(values.get(each, each) for each in arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert table_rows((tmp_path / "results" / "results.md").read_text()) == table_rows(README) != {}
