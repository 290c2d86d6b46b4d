"""Forked commands end, print and find modules as those do that begin from nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import Forked, run_python, run_two_ranks, start_python


@pytest.mark.parametrize(
    "code, returncode, said",
    [
        ("print('out'); raise SystemExit(3)", 3, ""),
        ("raise SystemExit('one line')", 1, "one line\n"),
        ("import nothing", 1, "No module named 'nothing'"),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV, ""),
    ],
)
def test_ends_are_told(code, returncode, said):
    done = run_python([sys.executable, "-c", code])
    assert done.returncode == returncode and said in done.stderr
    assert done.stdout == ("out\n" if "out" in code else "")


def test_a_command_can_be_signalled():
    code = "import time; print('here', flush=True); time.sleep(60)"
    process = start_python([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert isinstance(process, Forked) and process.stdout.readline() == "here\n" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == process.poll() == -signal.SIGTERM
    process.stdout.close()


def test_modules_are_found_by_the_command_s_own_paths(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("")
    command = [sys.executable, "-c", "import only_here"]
    monkeypatch.syspath_prepend(tmp_path)
    assert run_python(command).returncode == 1, "what a test adds to its own paths is not there"
    for given in ({"cwd": tmp_path}, {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}}):
        assert run_python(command, **given).returncode == 0


def test_what_libraries_read_at_import_begins_from_nothing():
    code = "import sys; print('torch' in sys.modules)"
    for changed, forked in (({}, True), ({"HF_HUB_OFFLINE": "1"}, False)):
        done = run_python([sys.executable, "-c", code], env={**os.environ, **changed})
        assert done.stdout == f"{forked}\n"


def test_a_rank_that_fails_ends_the_other(tmp_path):
    code = "import os, sys, time; sys.exit('lost') if os.environ['RANK'] == '1' else time.sleep(60)"
    started = time.monotonic()
    done = run_two_ranks([sys.executable, "-c", code], tmp_path, os.environ)
    assert done.returncode == 1 and "lost" in done.stderr and time.monotonic() - started < 50
