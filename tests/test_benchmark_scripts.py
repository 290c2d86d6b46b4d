"""The benchmarks' scripts run as they are called by hand, and count and divide right."""

import json
import os
import sys

import pytest

from benchmarks.pipeline import CALLS, STAGES, main
from tests.conftest import REPOSITORY, build_pipeline
from tests.processes import run_python


@pytest.mark.parametrize("factor", [None, 4])
def test_pipeline(factor, checkpoint, tmp_path, capsys):
    """The tiny checkpoint makes two steps, with hints from a guess after each."""
    flags = ["--size", "64x48", "--checkpoint", str(checkpoint), "--rounds", "1", "--json", str(tmp_path / "out.json")]
    if factor is None:  # in this process, which has imported all that the script does
        main(flags)
        printed = capsys.readouterr().out
    else:
        (tmp_path / "a_peer.py").write_text("def previous(prev, next):\n    return prev\n")
        command = [
            sys.executable,
            "-m",
            "benchmarks.pipeline",
            *flags,
            "--factor",
            str(factor),
            "--peer",
            "a_peer:previous",
            "--threads",
            "1",
        ]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = run_python(command, cwd=REPOSITORY, env=environment)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    result = json.loads((tmp_path / "out.json").read_text())

    stages = result["stages"]
    assert tuple(stages) == STAGES and all(f"| {name} |" in printed for name in STAGES)
    assert [stages[name]["calls"] for name in STAGES] == [1, 1, 0, 0, 2, 2, 2, 1, 0]
    unused = ("motion guess", "hints finish")
    assert all((each["seconds"] > 0) == (name not in unused) for name, each in stages.items())
    assert sum(each["share"] for each in stages.values()) == pytest.approx(1)
    assert sum(each["seconds"] for each in stages.values()) == pytest.approx(result["seconds"])
    # The guesses are as large as the result here, and start hints are OpenCV's flow alone.
    assert stages["decode guess"]["gflop"] == pytest.approx(2 * stages["decode last"]["gflop"])
    assert all((stages[name]["gflop"] > 0) == (name not in ("hints start", "rest", *unused)) for name in STAGES)
    assert 0.1 < result["peak_gib"]["process"] < 10
    assert (result["size"], result["dtype"]) == ("64x48", "float32")
    assert "torch" in result["environment"]["libraries"] and result["environment"]["hardware"]["threads"] >= 1

    assert ("peer" in result, "factor" in result) == (factor is not None, factor is not None)
    if factor is None:
        return
    peer = result["peer"]
    assert peer["ratio"] == pytest.approx(peer["own_seconds"] / peer["seconds"]) == pytest.approx(peer["ratios"][0])
    assert f"ratio {peer['ratio']:.3f}" in printed
    # Three frames; the one half-way is a neighbour of both others in the recursion, and must be encoded for them.
    for way, encodes in (("straight", 1), ("recursive", 2), ("separate pairs", 3)):
        assert result["factor"][way]["calls"] == dict(zip(CALLS, [encodes, 6, 9, 3, 6])), way
        assert result["factor"][way]["seconds"] > 0
        assert f"| {way} | {encodes} | 6 | 9 | 3 | 6 |" in printed


def test_pipeline_that_guesses_motion(tiny_news, tmp_path):
    """Hints are finished before the first step and before the second; the first guess is of motion alone."""
    config = {**tiny_news, "hint_source": "search"}
    config.pop("hint_model")
    config["pipeline"] = {**config["pipeline"], "guess_motion": True, "default_num_inference_steps": 2}
    build_pipeline(config).save_pretrained(tmp_path / "checkpoint")
    flags = ["--size", "64x48", "--checkpoint", str(tmp_path / "checkpoint"), "--rounds", "1"]
    main([*flags, "--json", str(tmp_path / "out.json")])
    stages = json.loads((tmp_path / "out.json").read_text())["stages"]
    calls = {"encode": 1, "hints start": 1, "motion guess": 2, "hints finish": 2, "denoise": 2, "decode last": 1}
    assert {name: each["calls"] for name, each in stages.items() if each["calls"]} == calls
    assert 0 < stages["motion guess"]["gflop"] < stages["decode last"]["gflop"]


def test_pipeline_by_tiles(checkpoint, tmp_path):
    """What is decoded for the frame itself is told apart from its guesses, however many tiles there are."""
    flags = [
        "--size",
        "576x64",
        "--checkpoint",
        str(checkpoint),
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "out.json"),
    ]
    main([*flags, "--tile-pixels", "1", "--keep-memory"])
    result = json.loads((tmp_path / "out.json").read_text())
    calls = {name: stage["calls"] for name, stage in result["stages"].items()}
    assert calls["decode last"] == calls["encode"] > 1 and calls["decode guess"] == 2 * calls["encode"]
    assert (result["tile_pixels"], result["memory_kept"]) == (1, True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "640"], "--size: must be WIDTHxHEIGHT in pixels, such as 640x480, but is '640'"),
        (["--size", "0x48"], "--size: must be WIDTHxHEIGHT"),
        (["--rounds", "0"], "--rounds: must be a positive integer, but is '0'"),
        (
            ["--json", "nowhere/out.json"],
            "--json: must be a file in a folder that is there, but is 'nowhere/out.json'",
        ),
        (["--checkpoint", "nowhere"], "--checkpoint must be"),
    ],
)
def test_bad_input_is_told_before_anything_runs(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert message in capsys.readouterr().err
