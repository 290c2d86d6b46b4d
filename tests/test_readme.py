"""What README.md and docs/ print is what happens."""

import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from madiff_diffusers.commands.madiff_cli import build_parser, main
from madiff_diffusers.evaluation.benchmarks import BENCHMARKS
from madiff_diffusers.evaluation.evaluate import QUESTIONS
from madiff_diffusers.evaluation.metrics import METRICS
from tests.conftest import REPOSITORY
from tests.processes import run_python
from tests.video_files import phone_clip, read
from training.data.sources import LAYOUTS
from training.options import RunOptions


README = (REPOSITORY / "README.md").read_text()
DOCS = {f"docs/{path.name}": path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md"))}
PAGES = {"README.md": README, **DOCS, "comfyui/README.md": (REPOSITORY / "comfyui" / "README.md").read_text()}
EVALUATION = DOCS["docs/evaluation.md"]

# Whose tests are elsewhere: `test_hint_sources.py` runs what the first prints, with weights of RAFT's shape, and `test_onnx_export.py` what the second
# does, with small networks.
ELSEWHERE = ("docs/hint-sources.md", "docs/onnx.md")


def blocks(language: str, page: str = "README.md") -> list:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands(page: str, start: str) -> list:
    lines = [line for block in blocks("bash", page) for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def test_the_first_command_makes_the_picture_that_is_shown(tmp_path):
    command, printed = blocks("bash")[0].strip().splitlines()
    *installing, interpolating = command.split(" && ")
    assert "-m venv .venv" in installing[0] and "pip install ." in installing[1]
    arguments = shlex.split(interpolating)
    assert arguments[0] == ".venv/bin/madiff"
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    done = run_python([sys.executable, "-m", "madiff_diffusers", *arguments[1:]], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed.removeprefix("# ")
    made, shown = (
        np.array(Image.open(path)).astype(float)
        for path in (tmp_path / "mid.png", REPOSITORY / "examples" / "mid.png")
    )
    assert np.abs(made - shown).mean() < 0.5


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and blocks("python", page)])
def test_python_snippets_run(page, tmp_path):
    """One page's after another, as it is read; with a CPU in the place of a GPU that is not there, and measurements on small frames."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    phone_clip(tmp_path / "in.mp4", 3)
    for command in commands(page, "madiff export"):
        assert (
            main(
                [*command[1:-1], str(tmp_path / command[-1])]
                if command[2].startswith("--")
                else [command[1], str(tmp_path / command[2]), *command[3:]]
            )
            == 0
        )
    code = "\n".join(blocks("python", page)).replace(".resize((640, 480))", ".resize((96, 64))")
    if not torch.cuda.is_available():
        code = code.replace('.to("cuda")', '.to("cpu")')
    done = run_python([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_options_that_exist(page, capsys):
    """All of `madiff`, those that are typed behind `accelerate launch` too."""
    printed = commands(page, "madiff ") + [
        command[command.index("madiff_diffusers") :]
        for command in commands(page, "accelerate launch")
        if "madiff_diffusers" in command
    ]
    assert printed or page in ("docs/properties.md", "docs/hint-sources.md", "comfyui/README.md")
    for _, *arguments in printed:
        build_parser().parse_args(arguments)


def test_interpolating_commands_run(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for command in commands(page, "madiff interpolate"):
            assert main(command[1:]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/video.md"])
def test_video_commands_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = commands(page, "madiff video")
    assert len(printed) >= 3
    for command in printed:
        phone_clip(tmp_path / command[2], 3)
        assert main([*command[1:], "--overwrite"]) == 0
        assert read(tmp_path / command[3]).audio


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = target.partition("#")
            if "://" in target:
                continue
            found = (REPOSITORY / page).parent / path if path else REPOSITORY / page
            assert found.exists(), f"{page}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], (
                    f"{page}: {target}"
                )


def test_the_readme_is_short_and_its_moving_picture_small():
    lines = README.splitlines()
    assert len(lines) <= 135
    assert all(len(line) <= 200 for line in lines if line.startswith("|")), "no table is wider than a page"
    assert (REPOSITORY / "examples" / "motion.gif").stat().st_size < 3_000_000
    with Image.open(REPOSITORY / "examples" / "motion.gif") as picture:
        assert picture.n_frames >= 24 and picture.info["loop"] == 0 and picture.info["duration"] >= 20


def test_ci_runs_the_test_command():
    lines = [line for line in README.splitlines() if "-m pytest" in line]
    assert len(lines) == 1 and "grep -m 1 -- '-m pytest' README.md" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["README.md", "training/README.md"])
def test_training_commands_have_options_that_exist(name):
    printed = re.findall(
        r"accelerate launch ([^\n]*?)-m training\.(\w+)([^#\n]*)", (REPOSITORY / name).read_text().replace("\\\n", "")
    )
    assert len(printed) >= 3
    for launcher, module, flags in printed:
        options = importlib.import_module(f"training.{module}")
        owner = next(
            each
            for each in vars(options).values()
            if isinstance(each, type) and each.__name__.endswith("Options") and each is not RunOptions
        )
        known = {field.name for field in dataclasses.fields(owner)} | {"config"}
        assert set(re.findall(r"--(\w+)", flags)) <= known
        for path in re.findall(r"--config_file (\S+)", launcher):
            assert (REPOSITORY / path).is_file()


def test_parameters_are_what_the_command_prints():
    text = (REPOSITORY / "training" / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "numel" in block)
    done = run_python([sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    printed = {tuple(line.split()[:2]): line.split(maxsplit=2)[2] for line in done.stdout.splitlines()}
    shown = {}
    for name, *cells in (
        re.findall(r"[^|]+", line)
        for line in text.splitlines()
        if re.match(r"\| `(tiny|compact|motion|paper)` \| [\d–]", line)
    ):
        shown.update(
            {
                (name.strip(" `"), part): cell.strip()
                for part, cell in zip(("i2e", "hint_model", "vqvae", "unet"), cells)
                if cell.strip() != "–"
            }
        )
    assert shown == printed


def test_every_data_format_is_described():
    described = (REPOSITORY / "training" / "README.md").read_text()
    assert all(
        f"| `{name}`" in described or f"`{name}` |" in described or f"`{name}`," in described for name in LAYOUTS
    )


def test_every_benchmark_metric_and_question_is_described():
    described = re.sub(r"`(-\w+)`", lambda match: f"`snu-film{match.group(1)}`", EVALUATION)
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
    backbone, vgg = (
        str(shared_data / "weights" / f"lpips_{net}_features.safetensors") for net in ("alexnet", "vgg16")
    )
    printed = re.findall(r"^madiff (evaluate --benchmark .*)$", EVALUATION, flags=re.MULTILINE)
    assert len(printed) == 3
    for command in printed:
        arguments = shlex.split(command)
        benchmark = arguments[arguments.index("--benchmark") + 1]
        root = shared_data / "bench" / {"middlebury": "middlebury_others"}.get(benchmark, benchmark)
        values = {
            "DIR": str(root),
            "alexnet_features.safetensors": backbone,
            "vgg16_features.safetensors": vgg,
            "results": str(tmp_path / "results"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "madiff_diffusers", *(values.get(each, each) for each in arguments)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert table_rows((tmp_path / "results" / "results.md").read_text()) == table_rows(EVALUATION) != {}
