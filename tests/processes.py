"""`python -m MODULE …` and `python -c CODE …` in processes of their own that need not import torch and Diffusers once more: they are forked from one
that has."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO


# Imported once; none of them is ever run as a command.
PRELOADED = [
    "madiff_diffusers.pipeline_madiff",
    "madiff_diffusers.evaluation.runs",
    "madiff_diffusers.video.jobs",
    "training.trainer",
    "torch.utils.tensorboard",
    "datasets",
    "lpips",
]

# What libraries read when they are imported: a command that sets one of these begins from nothing.
READ_AT_IMPORT = ("HF_", "OMP_", "PYTHON", "TORCH", "HOME", "XDG_", "PATH", "LD_")


def _named_paths(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


# Where modules are found before any test adds to it.
PATHS = [path for path in sys.path if path not in ("", *_named_paths(os.environ))]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def _run(
    command: Sequence[str],
    cwd: str | None,
    environment: dict[str, str],
    paths: Sequence[str],
    printed: Sequence[Connection],
) -> None:
    """What Python does with the arguments `command`, in a process that has imported much already."""
    for number, end in zip((1, 2), printed):
        os.dup2(end.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.path[:] = [os.getcwd(), *_named_paths(environment), *paths]
    # Loaders of data start as they do anywhere, not as this process was started.
    multiprocessing.set_start_method(None, force=True)
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Forked:
    """A command that runs, with those attributes of `subprocess.Popen` that tests use."""

    def __init__(self, command: Sequence[str], cwd: str | None, environment: dict[str, str], stdout, stderr):
        self.stdout: IO[str] | None = None
        with self._end(stdout) as out, self._end(out if stderr == subprocess.STDOUT else stderr) as err:
            self._process = _server.Process(target=_run, args=(command, cwd, environment, PATHS, (out, err)))
            self._process.start()
        self.pid = self._process.pid

    def _end(self, stream) -> Connection:
        """Where the command prints: of all that has a descriptor, only this can be handed to the server."""
        if stream == subprocess.PIPE:
            reader, writer = os.pipe()
            self.stdout = os.fdopen(reader)
        elif stream == subprocess.DEVNULL:
            writer = os.open(os.devnull, os.O_WRONLY)
        else:
            writer = os.dup(stream if isinstance(stream, int) else stream.fileno())
        return Connection(writer, readable=False)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def start_python(
    command: Sequence[str], cwd: str | Path | None = None, env: Mapping[str, str] | None = None, stdout=1, stderr=2
) -> subprocess.Popen | Forked:
    """`subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, text=True)`, or what does the same."""
    python, *arguments = map(str, command)
    environment = dict(os.environ if env is None else env)
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    anew = any(name.startswith(READ_AT_IMPORT) for name in changed - {"PYTHONPATH"})
    if python != sys.executable or arguments[0] not in ("-m", "-c") or anew:
        return subprocess.Popen(
            [python, *arguments], cwd=cwd, env=environment, stdout=stdout, stderr=stderr, text=True
        )
    return Forked(arguments, cwd and str(cwd), environment, stdout, stderr)


def run_python(
    command: Sequence[str], cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """What `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` returns."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start_python(command, cwd, env, out, err)
        process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two_ranks(command: Sequence[str], cwd: str | Path, env: Mapping[str, str]) -> subprocess.CompletedProcess:
    """Two processes with those variables that `accelerate launch` would set; they print all into `stderr`."""
    shared = {**env, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile("w+") as printed:
        environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        processes = [start_python(command, cwd, each, printed, printed) for each in environments]
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.02)
        for process in processes:  # what is left waits in vain for the one that failed
            process.kill()
            process.wait()
        printed.seek(0)
        return subprocess.CompletedProcess(command, max(code or 0 for code in codes), "", printed.read())


def layout_script(stage: str) -> str:
    """Code that runs a stage of the training and prints how its weights are laid out at each step, "last" or "contiguous"."""
    return (
        "import sys\n"
        f"from training import {stage}, trainer\n"
        "step = trainer.Trainer.optimizer_step\n"
        "def told(self, model, optimizer):\n"
        "    weight = next(each for each in model.parameters() if each.ndim == 4 and min(each.shape) > 1)\n"
        "    print('last' if weight.stride(1) == 1 else 'contiguous')\n"
        "    step(self, model, optimizer)\n"
        "trainer.Trainer.optimizer_step = told\n"
        f"{stage}.main(sys.argv[1:])\n"
    )
