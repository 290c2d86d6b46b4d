"""`python -m MODULE …` in processes of their own that need not import torch and Diffusers once more: they are forked from one that has."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


# Imported once; none of them is ever run as a command.
PRELOADED = [
    "madiff_diffusers.pipeline_madiff",
    "madiff_diffusers.evaluation.runs",
    "training.trainer",
    "torch.utils.tensorboard",
    "datasets",
    "lpips",
]

# What libraries read when they are imported: a command that sets one of these begins from nothing.
READ_AT_IMPORT = ("HF_", "OMP_", "PYTHON", "TORCH", "HOME", "XDG_", "PATH", "LD_")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def _run(command: Sequence[str], cwd: str | None, environment: dict[str, str], printed: Sequence[str]) -> None:
    for number, path in zip((1, 2), printed):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    # As `python -m` has it: the folder where it was started comes first.
    sys.path[0:0] = [os.getcwd()]
    sys.argv = ["-m", *command[1:]]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def run_module(
    command: Sequence[str], cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """What `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` returns."""
    command = [str(part) for part in command]
    environment = dict(os.environ if env is None else env)
    names = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    if command[:2] != [sys.executable, "-m"] or any(name.startswith(READ_AT_IMPORT) for name in names):
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        printed = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = _server.Process(target=_run, args=(command[2:], cwd and str(cwd), environment, printed))
        process.start()
        process.join()
        texts = [Path(path).read_text() if Path(path).exists() else "" for path in printed]
    return subprocess.CompletedProcess(command, process.exitcode, *texts)
