"""Videos as long work: stopped, killed, resumed, shared among processes, damaged. Real processes, real files."""

import copy
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from av.video.codeccontext import VideoCodecContext
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from madiff_diffusers import MADiffPipeline, interpolate_video
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.hub_repository import CHECKPOINT_FOLDER
from madiff_diffusers.motion_hints import EventHints, FlowHints, NullHints, StackedHints
from madiff_diffusers.video.destinations import check_folder, partial_path
from madiff_diffusers.video.errors import VideoError
from madiff_diffusers.video.jobs import VideoJob
from madiff_diffusers.video.memory import lacks_memory
from madiff_diffusers.video.options import VideoOptions
from madiff_diffusers.video.parts import PartWriter, index_path
from madiff_diffusers.video.planning import pipeline_digest
from madiff_diffusers.video.queues import prefetch_queue
from tests.conftest import moving_picture, two_processes
from tests.processes import run_python, start_python
from tests.video_files import decode, drifting, film_clip, phone_clip, read, write_video


@pytest.fixture
def film(tmp_path) -> Path:
    """Six seconds in three parts, of few frames."""
    return write_video(tmp_path / "film.mp4", drifting(24), range(24), Fraction(1, 4), sound=5.5)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(source: Path, output: Path, checkpoint: Path, *options) -> list:
    return [
        sys.executable,
        "-m",
        "madiff_diffusers",
        "video",
        *map(str, (source, output, "--checkpoint", checkpoint, *options)),
    ]


def wait_for(condition, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.01)


def test_the_command(checkpoint, tmp_path):
    source, out = phone_clip(tmp_path / "in.mp4", 6), tmp_path / "out.mp4"
    done = run_python(command(source, out, checkpoint, "--fps", "59.94", "--preview", tmp_path / "strip.png"))
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    assert read(out).rate == Fraction(60000, 1001) and "frame/s" in done.stderr
    assert Image.open(tmp_path / "strip.png").size == (8 * 120, 194), "eight portraits of 180 rows, and captions"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "in.mp4", "out.mp4", "strip.png"]


def test_what_is_wrong_is_said_in_one_line(checkpoint, tmp_path, capsys):
    source = phone_clip(tmp_path / "in.mp4", 4)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.mp4").write_bytes(source.read_bytes())
    Image.fromarray(moving_picture(0)).save(tmp_path / "mixed" / "a.png")
    cases = [
        ((tmp_path / "none.mp4", tmp_path / "out.mp4"), "there is no file"),
        ((source, tmp_path / "out.mp4", "--crf", 99), "--crf for h264 must be from 0 (best) to 51, but is 99"),
        ((source, tmp_path / "out.mp4", "--audio", "stretch"), "--audio must be keep or drop"),
        ((source, tmp_path / "out.mp4", "--max-memory", "1KB"), "--max-memory must be at least 1 GiB"),
        ((source, tmp_path / "out.mp4", "--fps", "fast"), "--fps must be a number or a fraction, but is 'fast'"),
        ((source, tmp_path / "out.mp4", "--max-memory", "big"), "--max-memory must be a size such as 8GiB"),
        ((tmp_path / "mixed", tmp_path / "out"), "must hold images or videos, but holds 1 and 1"),
    ]
    for arguments, message in cases:
        assert main(["video", *map(str, arguments), "--checkpoint", str(checkpoint)]) == 2
        printed = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(printed) == 1 and message in printed[0] and printed[0].startswith("madiff: error: ")
        assert not (tmp_path / "out.mp4").exists() and not (tmp_path / "out.mp4.parts").exists()


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_a_video_that_is_being_made_is_left_alone(film, checkpoint, tmp_path, capsys, flags):
    out, lock = tmp_path / "out.mkv", tmp_path / ".out.mkv.parts.lock"
    first = start_python(command(film, out, checkpoint), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "out.mkv.parts" / "job.json").is_file() or first.poll() is not None)
    first.send_signal(signal.SIGSTOP)
    try:
        assert lock.exists() and main(list(map(str, command(film, out, checkpoint, *flags)[3:]))) == 2
    finally:
        first.send_signal(signal.SIGCONT)
    assert (
        f"{out} is being made by another process; let it end, or stop it, and then --resume" in capsys.readouterr().err
    )
    assert first.wait() == 0 and len(decode(out)) == 48
    assert not lock.exists() and not (tmp_path / "out.mkv.parts").exists()


def test_what_is_done_is_not_made_again(pipeline, film, tmp_path):
    whole = interpolate_video(pipeline, film, tmp_path / "whole.mkv", steps=1, progress=False)
    job = VideoJob(pipeline, film, tmp_path / "out.mkv", VideoOptions(steps=1))
    job.prepare(False, False)
    made = job.make_parts(job.parts[:1])
    rest = interpolate_video(pipeline, film, tmp_path / "out.mkv", steps=1, resume=True, progress=False)
    assert 0 < made and made + rest.made == whole.made and rest.frames == whole.frames


def kills(count: int, film: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.mkv", tmp_path / "out.mkv"
    assert main(list(map(str, command(film, whole, checkpoint)[3:]))) == 0
    dice, killed = random.Random(0), 0
    for number in range(count):
        before = len(list((tmp_path / "out.mkv.parts").glob("*.json"))) if number else 0
        process = start_python(
            command(film, out, checkpoint, "--resume"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        wait_for(lambda: (tmp_path / "out.mkv.parts" / "job.json").is_file() or process.poll() is not None)
        time.sleep(dice.random())
        process.kill()
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        if out.exists():  # killed when all was done
            break
        assert len(list((tmp_path / "out.mkv.parts").glob("*.json"))) >= before, "what is done stays"
    assert killed == count
    done = run_python(command(film, out, checkpoint, "--resume"))
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(whole) and not (tmp_path / "out.mkv.parts").exists()


def test_killed_work_goes_on_and_gives_the_same_file(film, checkpoint, tmp_path):
    kills(1, film, checkpoint, tmp_path)


@pytest.mark.slow
def test_killed_ten_times(checkpoint, tmp_path):
    kills(
        10,
        write_video(tmp_path / "film.mp4", drifting(120), range(120), Fraction(1, 4), sound=29.0),
        checkpoint,
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep, number", [(True, signal.SIGINT), (False, signal.SIGINT), (True, signal.SIGTERM), (True, signal.SIGHUP)]
)
def test_interrupted_work_leaves_a_playable_file_or_none(film, checkpoint, tmp_path, keep, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the signal is not heard here, as under nohup")
    out, parts = tmp_path / "out.mp4", tmp_path / "out.mp4.parts"
    process = subprocess.Popen(
        command(film, out, checkpoint, *(["--keep-partial"] if keep else [])),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list(parts.glob("*.json"))) >= 2)  # the plan and a part
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in printed and "--resume goes on with it" in printed
    assert not out.exists() and not list(parts.glob("*.tmp")) and not list(tmp_path.glob(".*.lock"))
    partial = tmp_path / "out.partial.mp4"
    assert partial.exists() == keep
    if keep:
        frames = read(partial).times
        assert f"it can be watched in {partial}" in printed and read(partial).audio["times"][-1] < frames[
            -1
        ] + Fraction(1, 4)
        assert (
            len(frames) >= 8
            and frames == [number * Fraction(1, 8) for number in range(len(frames))]
            and len(decode(partial)) == len(frames)
        )
    assert main(list(map(str, command(film, out, checkpoint)[3:]))) == 2, "what is done is not thrown away unasked"
    assert main(list(map(str, command(film, out, checkpoint, "--resume", "--crf", 30)[3:]))) == 2, (
        "nor mixed with other work"
    )
    assert (
        main(list(map(str, command(film, out, checkpoint, "--resume")[3:]))) == 0
        and len(read(out).times) == 48
        and not parts.exists()
    )


@pytest.mark.slow
def test_interrupted_before_a_part_is_done(film, checkpoint, tmp_path):
    process = subprocess.Popen(
        command(film, tmp_path / "out.mp4", checkpoint), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((tmp_path / "out.mp4.parts" / "job.json").is_file)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    if not list(tmp_path.glob("out.mp4.parts/*[0-9].json")):
        assert not (tmp_path / "out.mp4.parts").exists() and not (tmp_path / "out.mp4").exists()


@pytest.mark.slow
def test_two_processes_make_the_same_file(film, checkpoint, tmp_path):
    # Each with one thread: two on as many cores are slower, and sums of another number of threads are rounded otherwise.
    alone, shared, environment = (
        tmp_path / "alone.mp4",
        tmp_path / "shared.mp4",
        {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    subprocess.run(command(film, alone, checkpoint), check=True, capture_output=True, env=environment)
    launch = two_processes(["madiff_diffusers", *command(film, shared, checkpoint)[3:]])
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(shared)
    assert digest(alone) == digest(shared) and read(alone).audio == read(film).audio and len(read(alone).times) == 48


def test_a_folder_of_videos(checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.mkv"):
        film_clip(tmp_path / "in" / name, 4)
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "in" / "notes.txt").write_text("not a video")
    arguments = ["video", str(tmp_path / "in"), str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    film_clip(tmp_path / "in" / "c.ts", 4)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "1 of 4 videos could not be made" in printed.err and "cannot read" in printed.err
    assert (
        sorted(path.name for path in (tmp_path / "out").iterdir())
        == ["a.mp4", "b.mkv", "c.mp4"]
        == [Path(line).name for line in printed.out.split()]
    )
    assert len(read(tmp_path / "out" / "b.mkv").times) == 8
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "in" / "broken.mp4").unlink()
    assert main([*arguments, "--resume", "--factor", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "a.mp4 is there already, and stays" in printed.err, "what is made is not made again"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == made


@pytest.mark.slow
def test_a_folder_of_videos_among_processes(checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.mkv"):
        film_clip(tmp_path / "in" / name, 4)
    launch = two_processes(
        ["madiff_diffusers", *command(tmp_path / "in", tmp_path / "out", checkpoint, "--factor", 3)[3:]]
    )
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert (
        done.returncode == 0
        and len(read(tmp_path / "out" / "a.mp4").times) == len(read(tmp_path / "out" / "b.mkv").times) == 12
    ), done.stderr


def damaged(data: bytes, dice: random.Random, kind: int) -> bytes:
    """A file's bytes: cut off, with flipped bits, with another header, of another kind, or none."""
    if kind == 0:
        return data[: dice.randrange(1, len(data))]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(dice.choice([1, 20, 400])):
            flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        return bytes(flipped)
    if kind == 2:
        head = dice.randrange(8, 400)
        return bytes(dice.randrange(256) for _ in range(head)) + data[head:]
    if kind == 3:
        start = dice.randrange(len(data) // 2)
        return data[:start] + b"\xff" * dice.randrange(4, 64) + data[start + 64 :]
    return b"" if dice.random() < 0.3 else dice.randbytes(dice.randrange(1, 4000))


def try_damaged(pipeline, tmp_path, count: int, capfd) -> dict:
    dice, outcomes = random.Random(1), {"error": 0, "file": 0}
    sources = [
        phone_clip(tmp_path / "phone.mp4", 8).read_bytes(),
        film_clip(tmp_path / "film.mkv", 8, sound=0.3).read_bytes(),
        film_clip(tmp_path / "film.avi", 8, codec="ffv1", pixel_format="yuv420p").read_bytes(),
        film_clip(tmp_path / "film.mov", 8, codec="prores_ks", pixel_format="yuv422p10le").read_bytes(),
    ]
    for number in range(count):
        suffix = dice.choice([".mp4", ".mkv", ".avi", ".mov", ".gif", ".y4m", ".webm"])
        path, folder = tmp_path / f"damaged{suffix}", tmp_path / "out"
        folder.mkdir(exist_ok=True)
        path.write_bytes(damaged(dice.choice(sources), dice, number % 5))
        out = folder / f"out{dice.choice(['.mp4', '.mkv'])}"
        started = time.monotonic()
        try:
            result = interpolate_video(
                pipeline,
                path,
                out,
                progress=False,
                skip_damage=number % 3 == 0,
                keep_partial=number % 7 == 0,
                fps=Fraction(50) if number % 2 else None,
            )
        except (VideoError, OSError) as error:
            outcomes["error"] += 1
            assert str(error) and "\n" not in str(error)
            assert not [left for left in folder.iterdir() if left.name != f"out.partial{out.suffix}"], (
                number,
                str(error),
            )
        else:
            outcomes["file"] += 1
            assert [left for left in folder.iterdir() if "partial" not in left.name] == [out] and len(
                decode(out)
            ) == result.frames, number
        assert time.monotonic() - started < 60, number
        for left in folder.iterdir():
            left.unlink()
        path.unlink()
    assert "Traceback" not in capfd.readouterr().err
    return outcomes


def test_damaged_files(pipeline, tmp_path, capfd):
    outcomes = try_damaged(pipeline, tmp_path, 25, capfd)
    assert min(outcomes.values()) >= 3, outcomes


@pytest.mark.slow
def test_two_hundred_damaged_files(pipeline, tmp_path, capfd):
    outcomes = try_damaged(pipeline, tmp_path, 200, capfd)
    assert min(outcomes.values()) >= 20, outcomes


def test_damage_in_the_middle(pipeline, tmp_path):
    """One unreadable image among others."""
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(drifting(8)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "frames" / "5.png").write_bytes(b"no image")
    source, out = tmp_path / "frames", tmp_path / "out.mkv"
    settings = {"image_fps": Fraction(25), "codec": "ffv1", "progress": False}
    with pytest.raises(VideoError, match="5.png as an image"):
        interpolate_video(pipeline, source, out, **settings)
    assert sorted(tmp_path.iterdir()) == [source]
    with pytest.raises(VideoError, match="5.png as an image.*what is good is in .*out.partial.mkv"):
        interpolate_video(pipeline, source, out, keep_partial=True, **settings)
    assert len(decode(tmp_path / "out.partial.mkv")) == 10 and not out.exists() and not list(tmp_path.glob("*.parts"))
    result = interpolate_video(pipeline, source, out, skip_damage=True, **settings)
    assert result.frames == 14 and "5.png" in result.notes[0]
    place = read(out).times.index(Fraction(6, 25))
    assert np.array_equal(decode(out)[place], drifting(8)[6]), "what comes behind keeps its time"


@pytest.mark.parametrize("codec, suffix", [("libx264", ".mkv"), ("mpeg4", ".avi")])
def test_damage_that_the_decoder_conceals(pipeline, tmp_path, codec, suffix):
    """Frames that it fills in from others are none of the source's."""
    source = write_video(
        tmp_path / f"in{suffix}", drifting(12), range(12), Fraction(1, 25), codec=codec, options={"bf": "0", "g": "4"}
    )
    good, sizes = source.read_bytes(), [packet.size for packet in packets_of(source)]
    place = good.find(bytes(packets_of(source)[4])) + sizes[4] // 2
    source.write_bytes(good[:place] + b"\xaa" * 60 + good[place + 60 :])
    with av.open(str(source)) as file:
        assert [frame.is_corrupt for frame in file.decode(video=0)] == [number == 4 for number in range(12)], (
            "the decoder goes on"
        )
    options = {"factor": 1, "codec": "ffv1", "progress": False}
    with pytest.raises(VideoError, match=f"in{suffix} is damaged: its frame at 0.16 s"):
        interpolate_video(pipeline, source, tmp_path / "out.mkv", **options)
    result = interpolate_video(pipeline, source, tmp_path / "out.mkv", skip_damage=True, **options)
    assert result.frames == len(decode(tmp_path / "out.mkv")) == 11 and "at 0.16 s" in result.notes[0]
    with pytest.raises(VideoError, match="what is good is in .*partial"):
        interpolate_video(pipeline, source, tmp_path / "cut.mkv", keep_partial=True, **options)
    assert len(decode(tmp_path / "cut.partial.mkv")) == 4


def packets_of(path: Path) -> list:
    with av.open(str(path)) as file:
        return [packet for packet in file.demux(video=0) if packet.size]


def limited_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


@pytest.mark.slow
def test_a_full_disk(checkpoint, tmp_path):
    """A limit on files' sizes, which fails as a full disk does."""
    source = write_video(
        tmp_path / "in.mkv",
        [np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8) for number in range(6)],
        range(6),
        Fraction(1, 25),
    )
    done = subprocess.run(
        command(source, tmp_path / "out.mkv", checkpoint, "--codec", "ffv1"),
        capture_output=True,
        text=True,
        preexec_fn=limited_file_size,
    )
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and "File too large" in errors[0], done.stderr
    assert not (tmp_path / "out.mkv").exists() and not (tmp_path / "out.mkv.parts").exists()


def test_a_network_that_is_offloaded_layer_by_layer_makes_videos(pipeline, film, tmp_path):
    digest_before = pipeline_digest(pipeline)
    cpu_offload(pipeline.unet, execution_device="cpu")
    assert pipeline_digest(pipeline) == digest_before
    fast = MADiffPipeline.from_pretrained("madiff-fast")  # with a buffer of the whole network
    digest_before = pipeline_digest(fast)
    cpu_offload(fast.vqvae, execution_device="cpu")
    assert pipeline_digest(fast) == digest_before
    fast.vqvae.news_rms.mul_(3)
    assert pipeline_digest(fast) != digest_before
    assert interpolate_video(pipeline, film, tmp_path / "out.mkv", steps=1, progress=False).frames == 48


def test_a_checkpoint_is_known_again_in_another_process_and_place(tmp_path):
    """`madiff-compact` lacks settings that came later: Diffusers tells those in another order from process to process."""
    (tmp_path / "elsewhere").symlink_to(CHECKPOINT_FOLDER / "madiff-compact")
    code = (
        "import sys; from madiff_diffusers import MADiffPipeline; from madiff_diffusers.video.planning import pipeline_digest;"
        "print(pipeline_digest(MADiffPipeline.from_pretrained(sys.argv[1])))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(checkpoint)],
            stdout=subprocess.PIPE,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed, checkpoint in ((1, "madiff-compact"), (2, "madiff-compact"), (1, tmp_path / "elsewhere"))
    }
    assert len(digests) == 1


def test_work_that_was_done_is_not_mixed_with_other_weights(pipeline, film, tmp_path):
    job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions())
    job.prepare(resume=False, overwrite=False)
    job.make_parts(job.parts[:1])
    half = copy.deepcopy(pipeline).to(torch.bfloat16)
    with pytest.raises(VideoError, match=r"another job \(dtype, checkpoint differ"):
        VideoJob(half, film, tmp_path / "out.mp4", VideoOptions()).prepare(resume=True, overwrite=False)
    with torch.no_grad():
        next(pipeline.vqvae.parameters()).add_(1)
    with pytest.raises(VideoError, match=r"another job \(checkpoint differ"):
        interpolate_video(pipeline, film, tmp_path / "out.mp4", resume=True, progress=False)
    assert interpolate_video(pipeline, film, tmp_path / "out.mp4", overwrite=True, progress=False).made == 23


def test_work_that_was_done_is_not_mixed_with_other_options(pipeline, film, tmp_path):
    job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions())
    job.prepare(resume=False, overwrite=False)
    job.make_parts(job.parts[:1])
    for name, value in (
        ("seed", 1),
        ("steps", 3),
        ("cut_threshold", 0.5),
        ("max_gap", 2),
        ("crf", 30),
        ("dedup", True),
    ):
        job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions(**{name: value}))
        with pytest.raises(VideoError, match=rf"another job \(.*\b{name}\b.* differ\)"):
            job.prepare(resume=True, overwrite=False)


@pytest.mark.parametrize("output", ["out.mkv", "out.gif"])
def test_parts_that_a_power_failure_cut_off_are_made_again(pipeline, film, tmp_path, output):
    job = VideoJob(pipeline, film, tmp_path / output, VideoOptions(steps=1))
    job.prepare(resume=False, overwrite=False)
    job.make_parts(job.parts)
    parts = [job.path(part) for part in job.parts]
    os.truncate(parts[0], parts[0].stat().st_size // 2)
    os.truncate(parts[1], 0)
    os.truncate(index_path(parts[2]), 0)
    assert job.done() == []
    interpolate_video(pipeline, film, tmp_path / output, steps=1, resume=True, progress=False)
    assert len(decode(tmp_path / output)) == 48


def test_a_part_that_lacks_a_picture_is_made_again(pipeline, film, tmp_path):
    job = VideoJob(pipeline, film, tmp_path / "out", VideoOptions(steps=1))
    job.prepare(resume=False, overwrite=False)
    job.make_parts(job.parts)
    folders = [job.path(part) for part in job.parts]
    next(folders[0].iterdir()).unlink()
    os.truncate(next(folders[1].iterdir()), 0)
    assert job.done() == job.parts[2:]
    for folder in folders[2:]:
        index_path(folder).unlink()  # as former versions left them
    with pytest.raises(VideoError, match="another job"):
        VideoJob(pipeline, film, tmp_path / "out", VideoOptions(steps=2)).prepare(resume=True, overwrite=False)
    assert all(folder.is_dir() for folder in folders), "work of another job stays, whole or not"
    interpolate_video(pipeline, film, tmp_path / "out", steps=1, resume=True, progress=False)
    assert len(list((tmp_path / "out").glob("*.png"))) == 48


def test_a_plan_that_is_cut_off_is_told(pipeline, film, tmp_path):
    job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions())
    job.prepare(resume=False, overwrite=False)
    os.truncate(job.folder / "job.json", 0)
    for options in ({}, {"resume": True}, {"resume": True, "preview": tmp_path / "strip.png"}):
        with pytest.raises(VideoError, match=r"job.json does not tell whose parts these are; `overwrite` or delete"):
            interpolate_video(pipeline, film, tmp_path / "out.mp4", progress=False, **options)
    options = {"resume": True, "overwrite": True, "preview": tmp_path / "strip.png"}
    assert interpolate_video(pipeline, film, tmp_path / "out.mp4", steps=1, progress=False, **options).made == 23


def test_what_is_done_is_passed_over_no_longer_than_somebody_waits(pipeline, tmp_path):
    """Decoding up to the first part that is not there yet may take minutes, in one step."""
    source = write_video(tmp_path / "in.mkv", drifting(60), range(60), Fraction(1, 4))
    job = VideoJob(pipeline, source, tmp_path / "out.mkv", VideoOptions(steps=1, factor=1))
    job.prepare(resume=False, overwrite=False)
    job.make_parts(job.parts[:-1])
    stop = threading.Event()
    frames = job._decoded(job.parts[-1:], stop)
    stop.set()
    assert list(frames) == []
    stop.clear()
    assert next(job._decoded(job.parts[-1:], stop))[0] > 30
    with prefetch_queue(iter(range(3)), 2, stop) as items:
        assert next(items) == 0 and not stop.is_set()
    assert stop.is_set()


def test_commands_work_where_there_is_no_stderr(pipeline, film, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as in programs without a console
    assert interpolate_video(pipeline, film, tmp_path / "out.mp4", steps=1).frames == 48


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.register_to_config(default_num_inference_steps=3),
        lambda pipe: pipe.register_to_config(guess_scale=2),
        lambda pipe: pipe.register_to_config(default_hint_policy="start"),
        lambda pipe: setattr(pipe, "hints", StackedHints([EventHints(pipe.i2e), FlowHints(fine=True)])),
        lambda pipe: setattr(pipe, "hints", NullHints(pipe.hints.hint_channels)),
        lambda pipe: setattr(pipe, "scheduler", DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)),
    ],
)
def test_what_decides_the_frames_is_told_apart(pipeline, change):
    pipeline.hints = StackedHints([EventHints(pipeline.i2e), FlowHints()])
    before = pipeline_digest(pipeline)
    assert pipeline_digest(pipeline) == before
    change(pipeline)
    assert pipeline_digest(pipeline) != before


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_file_whose_end_is_missing_is_told(pipeline, tmp_path, suffix):
    """Of an unfinished download, whose header tells how long it was to be."""
    made = write_video(tmp_path / "in.mkv", drifting(100), range(100), Fraction(1, 25))
    whole = tmp_path / f"whole.{suffix}"
    interpolate_video(pipeline, made, whole, factor=1, progress=False)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    notes = [
        interpolate_video(pipeline, source, tmp_path / f"{source.stem}_out.mp4", factor=1, progress=False).notes
        for source in (whole, cut)
    ]
    assert not notes[0] and len(notes[1]) == 1
    assert re.search(r"cut\.\w+ end at [12]\.\d\d s, though it tells that they last until 4\.\d\d s", notes[1][0])


def test_uneven_times_become_even_in_a_folder_of_images(pipeline, tmp_path):
    """Which has no times."""
    source = phone_clip(tmp_path / "phone.mp4")
    folder = interpolate_video(pipeline, source, tmp_path / "out", factor=1, progress=False)
    steady = interpolate_video(pipeline, source, tmp_path / "out.avi", factor=1, progress=False)
    assert (folder.frames, folder.made) == (steady.frames, steady.made) and folder.made > 0


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_what_is_kept_of_a_stopped_video_grows_as_it_goes_on(pipeline, film, tmp_path, name):
    output, partial = tmp_path / name, partial_path(tmp_path / name)

    class Enough(Exception):
        pass

    counts = []
    for parts in (1, 2):  # of the film's six or so

        def progress(text: str, done: int, total: int | None) -> None:
            if text == name and done >= 20 * parts:
                raise Enough

        with pytest.raises(Enough):
            interpolate_video(pipeline, film, output, steps=1, keep_partial=True, resume=parts > 1, progress=progress)
        counts.append(len(list(partial.iterdir())) if name == "out" else len(decode(partial)))
    assert 0 < counts[0] < counts[1], counts


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_what_comes_to_the_outputs_place_during_the_work_stays(pipeline, film, tmp_path, name):
    output = tmp_path / name
    precious = output / "thesis.tex" if name == "out" else output
    if name == "out":
        output.mkdir()  # an empty folder may be replaced

    def appear(text: str, done: int, total: int | None) -> None:
        if text == name and not precious.exists():
            precious.write_text("years of work")

    with pytest.raises(VideoError, match="holds other files" if name == "out" else "came to be during the work"):
        interpolate_video(pipeline, film, output, steps=1, factor=1, progress=appear)
    assert precious.read_text() == "years of work"
    precious.rename(tmp_path / "elsewhere")
    assert interpolate_video(pipeline, film, output, steps=1, factor=1, resume=True, progress=False).frames == 24
    assert not list(tmp_path.glob("*.parts"))


def test_notes_that_are_known_before_the_work_are_told_then(pipeline, tmp_path):
    source, events = film_clip(tmp_path / "in.mkv", 4, codec="libx265", pixel_format="yuv420p10le"), []

    def progress(text: str, done: int, total: int | None) -> None:
        events.append("frame" if text == "out.gif" and done else "")

    result = interpolate_video(pipeline, source, tmp_path / "out.gif", steps=1, progress=progress, tell=events.append)
    told = [each for each in events if each not in ("frame", "")]
    assert told == result.notes and any("of the source's 10" in note for note in told)
    assert events.index(told[0]) < events.index("frame")


def test_folders_that_are_not_ours_stay(pipeline, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, picture in enumerate(drifting(3)):
        Image.fromarray(picture).save(frames / f"{number}.png")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(VideoError, match="out.partial holds other files than frames"):
        interpolate_video(pipeline, frames, tmp_path / "out", overwrite=True, keep_partial=True, progress=False)
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


def test_a_preview_replaces_only_its_own_when_work_goes_on(pipeline, film, tmp_path):
    picture, own = tmp_path / "photo.png", tmp_path / "preview.png"
    Image.fromarray(drifting(1)[0]).save(picture)
    before = picture.read_bytes()
    job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions())
    job.prepare(resume=False, overwrite=False, preview=own)
    job.make_parts(job.parts[:1], own)
    with pytest.raises(VideoError, match="photo.png is there already"):
        interpolate_video(pipeline, film, tmp_path / "out.mp4", resume=True, preview=picture, progress=False)
    assert picture.read_bytes() == before
    shown = own.read_bytes()
    job.prepare(resume=True, overwrite=False)  # without one, it stays the job's own
    interpolate_video(pipeline, film, tmp_path / "out.mp4", resume=True, preview=own, progress=False)
    assert own.read_bytes() != shown


@pytest.mark.parametrize("preview", ["strip.xyz", "nowhere/strip.png", "videos/strip.png"])
def test_a_preview_of_several_videos_is_checked_first(checkpoint, film, tmp_path, capsys, preview):
    (tmp_path / "videos").mkdir()
    shutil.copy(film, tmp_path / "videos" / "a.mp4")
    arguments = [str(tmp_path / "videos"), str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    assert main(["video", *arguments, "--preview", str(tmp_path / preview)]) == 2
    assert "strip" in capsys.readouterr().err.replace("nowhere", "strip") and not (tmp_path / "out").exists()


def test_results_beside_images_are_not_taken_for_sources(checkpoint, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, picture in enumerate(drifting(3)):
        Image.fromarray(picture).save(frames / f"{number}.png")
    arguments = ["video", str(frames), str(frames / "out.mp4"), "--checkpoint", str(checkpoint)]
    assert main(arguments) == 0
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("output", [".", "/", ""])
def test_an_output_without_a_name_is_refused(checkpoint, film, capsys, output):
    assert main(["video", str(film), output, "--checkpoint", str(checkpoint)]) == 2
    assert "the output must be the name of a file or folder" in capsys.readouterr().err


def test_parts_are_in_a_folder_of_their_own(pipeline, film, tmp_path):
    (tmp_path / "other.mp4.parts").mkdir()
    (tmp_path / "other.mp4.parts" / "precious.txt").write_text("not ours")
    with pytest.raises(VideoError, match="is needed for parts, but holds something else"):
        interpolate_video(pipeline, film, tmp_path / "other.mp4", overwrite=True, progress=False)
    assert (tmp_path / "other.mp4.parts" / "precious.txt").exists()


def test_large_frames_are_made_by_tiles(pipeline, tmp_path):
    """Where memory is short, and for as long as the video takes."""
    frames = drifting(2, 320, 320)
    source = write_video(
        tmp_path / "in.mkv", frames, range(2), Fraction(1, 25), codec="ffv1", pixel_format="bgr0", colours=(2, 0, 1, 1)
    )
    sizes = set()
    pipeline.vqvae.decoder.register_forward_hook(lambda module, inputs, output: sizes.add(tuple(output[0].shape[-2:])))
    interpolate_video(pipeline, source, tmp_path / "whole.mkv", codec="ffv1", progress=False)
    assert max(sizes) == (320, 320)
    sizes.clear()
    pipeline.enable_tiling(10**6)
    own = pipeline.tiling
    interpolate_video(pipeline, source, tmp_path / "tiled.mkv", codec="ffv1", max_memory=2**30, progress=False)
    assert max(sizes) == (256, 256) and pipeline.tiling is own


@pytest.mark.parametrize("rate", [{"factor": 2}, {"fps": 10}])
def test_several_frames_at_once_are_the_same_frames(pipeline, film, tmp_path, rate):
    batches = []
    pipeline.vqvae.decoder.register_forward_hook(lambda module, inputs, output: batches.append(len(output[0])))

    def frames(batch: int) -> np.ndarray:
        batches.clear()
        output = tmp_path / f"out{batch}"
        interpolate_video(pipeline, film, output, **rate, batch=batch, progress=False)
        return np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in sorted(output.iterdir())])

    alone = frames(1)
    assert set(batches) == {1}
    together = frames(3)
    # Parts of eight pairs have groups of three and rests of two, the last one of one; at ten frames a second, from four, gaps that are next
    # to each other have other instants, two each, which are made at once.
    assert set(batches) == ({1, 2, 3} if "factor" in rate else {2}), batches
    # Rounding may give a latent that lies between two codes the other one, in a network that learned nothing.
    assert (np.abs(together - alone) > 1).mean() <= 1e-3


def test_work_goes_on_with_fewer_pairs_at_once(pipeline, film, tmp_path):
    """As after memory was too short."""
    job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions(batch=4))
    job.prepare(resume=False, overwrite=False)
    job.make_parts(job.parts[:1])
    batches = set()
    pipeline.vqvae.decoder.register_forward_hook(lambda module, inputs, output: batches.add(len(output[0])))
    result = interpolate_video(pipeline, film, tmp_path / "out.mp4", batch=1, resume=True, progress=False)
    assert batches == {1} and result.frames == 48


def test_work_goes_on_within_the_memory_that_is_asked_for(pipeline, tmp_path):
    """A limit that is given when work goes on is kept; without one, that of before."""
    source = write_video(tmp_path / "in.mkv", drifting(2, 320, 320), range(2), Fraction(1, 25), codec="ffv1")
    output = tmp_path / "out.mkv"
    sizes = []
    for options in ({}, {"max_memory": 2**30}, {}, {"batch": 3}, {}):
        job = VideoJob(pipeline, source, output, VideoOptions(**options))
        job.prepare(resume=True, overwrite=False)
        plan = json.loads((job.folder / "job.json").read_text())
        sizes.append((plan["tile_pixels"] is not None, plan["at_once"]))
    assert sizes == [(False, 1), (True, 1), (True, 1), (True, 3), (True, 3)]


@pytest.mark.slow
def test_memory_does_not_grow_with_length(checkpoint, tmp_path):
    script = (
        "import sys, resource; from madiff_diffusers import MADiffPipeline, interpolate_video; pipe = MADiffPipeline.from_pretrained(sys.argv[1]);"
        "pipe.set_progress_bar_config(disable=True); interpolate_video(pipe, sys.argv[2], sys.argv[3], progress=False);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for count in (100, 1000):
        source = write_video(
            tmp_path / f"{count}.mp4", drifting(50) * (count // 50), range(count), Fraction(1, 25), sound=count / 25
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(checkpoint), str(source), str(tmp_path / f"out{count}.mp4")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(read(tmp_path / f"out{count}.mp4").times) == 2 * count
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 8 * 1024, "less than 9 KiB for each further frame, of which a decoded one has 18"


@pytest.mark.slow
def test_real_clips(shared_data, tmp_path):
    pipeline = MADiffPipeline.from_pretrained("madiff-compact")
    pipeline.set_progress_bar_config(disable=True)
    for source in sorted((shared_data / "train" / "open").glob("*.mp4"))[::12]:
        out = tmp_path / source.name
        result = interpolate_video(pipeline, source, out, factor=2, steps=1, progress=False)
        before, after = read(source), read(out)
        assert after.times[::2] == before.times and abs(after.duration - before.duration) <= 1 / before.rate, source
        assert (after.rotation, after.size) == (before.rotation, before.size) and result.frames == 2 * len(
            before.times
        )
        # x264 does not write that a range is limited where it writes nothing else of colours: it is what players take for granted.
        assert (after.colours[0] or 1, *after.colours[1:]) == before.colours


def test_parts_that_another_job_has_and_this_one_has_not_are_kept(pipeline, film, tmp_path):
    """As where one of several processes had not finished its own."""
    job = VideoJob(pipeline, film, tmp_path / "out.mp4", VideoOptions(factor=1, steps=1))
    job.prepare(False, False)
    job.make_parts(job.parts[1:2])
    kept = sorted(path.name for path in job.folder.iterdir())
    for resume in (False, True):
        with pytest.raises(VideoError, match="holds unfinished work of another job"):
            interpolate_video(pipeline, film, tmp_path / "out.mp4", factor=3, steps=1, resume=resume, progress=False)
    assert sorted(path.name for path in job.folder.iterdir()) == kept


def test_file_names_of_any_bytes(pipeline, checkpoint, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        path = os.path.join(os.fsencode(images), b"\xe9%d.png" % number)
        Image.fromarray(moving_picture(number)).save(tmp_path / "image.png")
        os.rename(tmp_path / "image.png", path)
    output = os.path.join(os.fsencode(tmp_path), b"o\xe9.mp4")
    done = subprocess.run(
        [*command(images, Path(os.fsdecode(output)), checkpoint, "--device", "cpu")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output and os.path.isfile(output)


def test_a_source_that_changed_in_its_middle_is_not_gone_on_with(pipeline, tmp_path):
    frames = [np.full((240, 320, 3), 90, np.uint8) for _ in range(64)]
    source = write_video(
        tmp_path / "in.y4m", frames, range(64), Fraction(1, 8), codec="wrapped_avframe", pixel_format="yuv420p"
    )

    def stop(name: str, done: int, total: int | None) -> None:
        if name != "reading" and done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interpolate_video(pipeline, source, tmp_path / "out.mp4", factor=1, progress=stop)
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 255
    source.write_bytes(data)
    with pytest.raises(VideoError, match=r"unfinished work of another job \(source differ\)"):
        interpolate_video(pipeline, source, tmp_path / "out.mp4", factor=1, resume=True, progress=False)


def test_a_folder_that_is_resumed_leaves_what_has_the_name_of_a_partial_video(checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a.mp4", "b.mp4"):
        film_clip(tmp_path / "in" / name, 4)
    mine = tmp_path / "out" / "a.partial.mp4"
    mine.write_bytes(b"mine")
    arguments = ["video", str(tmp_path / "in"), str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    assert main([*arguments, "--keep-partial"]) == 2
    assert (
        "--resume leaves it and what it is of" in capsys.readouterr().err and not (tmp_path / "out" / "b.mp4").exists()
    )
    assert main([*arguments, "--keep-partial", "--resume"]) == 0
    assert "a.partial.mp4 is there already, and stays" in capsys.readouterr().err and mine.read_bytes() == b"mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.partial.mp4", "b.mp4"]


def test_a_partial_video_has_the_chapters_that_it_reaches(pipeline, tmp_path):
    chapters = [
        {
            "id": number,
            "start": 2000 * number,
            "end": 2000 * number + 2000,
            "time_base": Fraction(1, 1000),
            "metadata": {"title": f"part {number}"},
        }
        for number in range(4)
    ]
    source = write_video(tmp_path / "in.mp4", drifting(32), range(32), Fraction(1, 4), chapters=chapters)

    def stop(name: str, done: int, total: int | None) -> None:
        if name != "reading" and done > 20:
            raise KeyboardInterrupt

    for suffix in (".mp4", ".mkv"):
        output = tmp_path / f"out{suffix}"
        with pytest.raises(KeyboardInterrupt):
            interpolate_video(pipeline, source, output, factor=1, keep_partial=True, progress=stop)
        made = read(partial_path(output))
        end = len(made.times) / 4
        assert end < 8 and [begin for begin, _, _ in made.chapters] == [0, 2, 4, 6][: -(-int(end) // 2)]
        assert made.chapters[-1][1] == pytest.approx(end, abs=0.3)
        with av.open(str(partial_path(output))) as file:
            assert file.duration / 1e6 == pytest.approx(end, abs=0.3)


def test_a_stop_while_finished_parts_are_removed_leaves_a_whole_video(pipeline, film, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def stopped(path, **options):
        if Path(path).name == ".out.mp4.parts.tmp" and Path(path).exists():
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr("madiff_diffusers.video.jobs.shutil.rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        interpolate_video(pipeline, film, tmp_path / "out.mp4", factor=1, keep_partial=True, progress=False)
    monkeypatch.undo()
    assert len(read(tmp_path / "out.mp4").times) == 24 and not (tmp_path / "out.mp4.parts").exists()
    assert not partial_path(tmp_path / "out.mp4").exists()
    interpolate_video(pipeline, film, tmp_path / "out.mp4", factor=1, overwrite=True, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"film.mp4", "out.mp4"}


def test_a_finished_part_keeps_no_encoder(pipeline, tmp_path):
    """Encoders take threads and, of 1920x1080, some 350 MB each: they must not wait for a full collection of garbage, which hardly ever comes."""
    clip = write_video(tmp_path / "in.mp4", drifting(3), range(3), Fraction(1, 25))
    job = VideoJob(pipeline, clip, tmp_path / "out.mp4", VideoOptions())
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, VideoCodecContext) for each in gc.get_objects())
        for number in range(3):
            writer = PartWriter(tmp_path / f"part-{number}", job.encoding, job.written_colour, 0)
            writer.write(np.zeros((*job.analysis.size, 3), np.float32), 0)
            writer.close() if number else writer.abandon()
            del writer
        assert sum(isinstance(each, VideoCodecContext) for each in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 68.91 GiB)"),
    ],
)
def test_windows_and_apple_tell_of_too_little_memory_in_other_words(error):
    assert lacks_memory(error)


def test_what_desktops_leave_in_folders_is_nobodys(tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".DS_Store", "._00000001.png", "Thumbs.db", "00000001.png"):
        (tmp_path / "out" / name).write_bytes(b"")
    check_folder(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_bytes(b"")
    with pytest.raises(VideoError):
        check_folder(tmp_path / "out")
