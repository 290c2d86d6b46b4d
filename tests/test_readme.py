"""What the README prints is what happens."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image

from tests.conftest import REPOSITORY

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
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_command():
    lines = [line for line in README.splitlines() if "-m pytest" in line]
    assert len(lines) == 1 and "grep -m 1 -- '-m pytest' README.md" in (REPOSITORY / ".ci" / "run").read_text()
