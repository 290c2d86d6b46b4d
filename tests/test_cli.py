"""The `madiff` command as a user runs it: real processes, real files."""

import argparse
import os
import platform
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from madiff_diffusers import EventGANModel, MADiffPipeline, __version__
from madiff_diffusers.commands.madiff_cli import build_parser, main
from madiff_diffusers.image_io import read_image, write_image
from madiff_diffusers.precision import best_device, fastest_dtype, is_emulated
from madiff_diffusers.video.formats import CODECS
from tests.conftest import moving_picture
from tests.processes import run_python, start_python
from tests.test_eventgan import original_state
from tests.video_files import drifting, write_video


def madiff(*arguments) -> subprocess.CompletedProcess:
    return run_python([sys.executable, "-m", "madiff_diffusers", *arguments])


@pytest.fixture
def frames(tmp_path) -> tuple:
    paths = tmp_path / "prev.png", tmp_path / "next.jpg"
    for path, time in zip(paths, (-1, 1)):
        Image.fromarray(moving_picture(time, 50, 70)).save(path)
    return paths


def test_interpolate_writes_what_the_pipeline_makes(checkpoint, frames, tmp_path):
    out = tmp_path / "mid.png"
    done = madiff("interpolate", *frames, "-o", out, "--checkpoint", checkpoint, "--seed", 3, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    pipeline = MADiffPipeline.from_pretrained(checkpoint, dtype="auto").to(best_device())
    expected = pipeline(
        *map(read_image, frames), num_inference_steps=2, generator=torch.Generator().manual_seed(3)
    ).frames[0][0]
    assert np.array_equal(np.array(Image.open(out)), np.array(expected))
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_more_frames_are_numbered(checkpoint, frames, tmp_path, capsys):
    options = ["-o", tmp_path / "mid.png", "--checkpoint", checkpoint, "--num-frames", 3]
    assert main(list(map(str, ["interpolate", *frames, *options]))) == 0
    names = ["mid_1.png", "mid_2.png", "mid_3.png"]
    assert sorted(path.name for path in tmp_path.glob("mid*")) == names
    assert [Path(line).name for line in capsys.readouterr().out.split()] == names


def test_frames_that_are_too_large_for_a_memory_are_made_in_tiles(checkpoint, tmp_path):
    paths = [tmp_path / "prev.png", tmp_path / "next.png"]
    for path, time in zip(paths, (-1, 1)):
        Image.fromarray(moving_picture(time, 300, 420)).save(path)

    def made(name: str, *flags: str) -> np.ndarray:
        out = str(tmp_path / name)
        options = ["-o", out, "--checkpoint", checkpoint, "--dtype", "fp32", *flags]
        assert main(list(map(str, ["interpolate", *paths, *options]))) == 0
        return np.array(Image.open(out))

    whole, tiles = made("whole.png"), made("tiles.png", "--max-memory", "1GiB")
    pipeline = MADiffPipeline.from_pretrained(checkpoint)
    pipeline.enable_tiling(1)
    expected = pipeline(*map(read_image, paths), generator=torch.Generator().manual_seed(0)).frames[0][0]
    assert np.array_equal(tiles, np.array(expected)) and not np.array_equal(tiles, whole)


def test_what_is_printed_suits_where_it_goes(checkpoint, frames, tmp_path):
    """Arrows in tables are numbers where an encoding has none, bytes of names are as they are, and a pipe that nobody reads ends the command."""
    for number, path in enumerate(frames):
        (tmp_path / "set" / "é").mkdir(parents=True, exist_ok=True)
        Image.open(path).save(tmp_path / "set" / "é" / f"{2 * number}.png")
    Image.open(frames[0]).save(tmp_path / "set" / "é" / "1.png")
    evaluate = [sys.executable, "-m", "madiff_diffusers", "evaluate", "--benchmark", "triplets", "--root"]
    evaluate += [tmp_path / "set", "--method", "average", "--metrics", "psnr", "-o", tmp_path / "results"]
    out = tmp_path / os.fsdecode(b"\xff\xe9.png")
    interpolate = ["interpolate", *frames, "-o", out, "--checkpoint", checkpoint, "--steps", 1]
    for command, text in (
        (evaluate, b"PSNR \\u2191"),
        ([sys.executable, "-m", "madiff_diffusers", *interpolate], os.fsencode(out)),
    ):
        command = list(map(os.fspath, map(str, command)))
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and text in done.stdout, done.stderr.decode()
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            list(map(str, evaluate)), stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
        )
        os.close(writer)
        assert done.returncode == 141 and "Traceback" not in done.stderr and "Broken pipe" not in done.stderr
    if (full := Path("/dev/full")).exists():
        with full.open("w") as printed:
            command = list(map(str, [sys.executable, "-m", "madiff_diffusers", *interpolate, "--overwrite"]))
            environment = {**os.environ, "PYTHONUNBUFFERED": ""}
            done = subprocess.run(command, stdout=printed, stderr=subprocess.PIPE, text=True, env=environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
        assert done.stderr.endswith(
            "madiff: error: all is done, but what it prints cannot be written: No space left on device\n"
        )


def test_half_precision(checkpoint, frames, tmp_path):
    out = tmp_path / "mid.png"
    options = ["-o", out, "--checkpoint", checkpoint, "--dtype", "bfloat16"]
    assert main(list(map(str, ["interpolate", *frames, *options]))) == 0 and read_image(out).size == (70, 50)


def test_bad_input_is_one_line_and_exit_code_2(checkpoint, frames, tmp_path, capsys):
    prev, next_ = frames
    text = tmp_path / "text.png"
    text.write_text("no image")
    small = tmp_path / "small.png"
    Image.fromarray(moving_picture(0, 40, 70)).save(small)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(prev.read_bytes()[:500])
    out, known = tmp_path / "out.png", ("--checkpoint", checkpoint)
    cases = [
        ((tmp_path / "missing.png", next_, "-o", out, *known), "No such image file"),
        ((text, next_, "-o", out, *known), "text.png as an image"),
        ((truncated, next_, "-o", out, *known), "truncated.png as an image"),
        ((prev, small, "-o", out, *known), "same size, but are 70x50 and 70x40"),
        ((prev, next_, "-o", out, *known, "--max-memory", "1MB"), "--max-memory must be at least 1 GiB, but is 1MB"),
        ((prev, next_, "-o", out, "--checkpoint", tmp_path), "--checkpoint must be a folder with"),
        ((prev, next_, "-o", out, "--checkpoint", "madiff-giant"), "but is 'madiff-giant'"),
        ((prev, next_, "-o", tmp_path / "no" / "out.png", *known), "no such folder"),
        ((prev, next_, "-o", tmp_path, *known), "image format"),
        ((prev, next_, "-o", tmp_path / "out.xyz", *known), "out.xyz"),
        ((prev, next_, "-o", out, *known, "--num-frames", 0), "--num-frames must be a positive integer, but is 0"),
        ((prev, next_, "-o", out, *known, "--times", "1/4", 1), "--times must be a list of numbers between 0 and 1"),
        ((prev, next_, "-o", out, *known, "--steps", 0), "--steps must be a positive integer, but is 0"),
        # Before the checkpoint is looked for.
        (
            (prev, next_, "-o", out, "--checkpoint", "madiff-giant", "--num-frames", -2),
            "--num-frames must be a positive",
        ),
        ((prev, next_, "-o", out, "--checkpoint", "madiff-giant", "--times", 0), "--times must be a list of numbers"),
        ((prev, next_, "-o", out, "--checkpoint", "madiff-giant", "--steps", 0), "--steps must be a positive integer"),
        ((prev, next_, "-o", out, *known, "--device", "warp9"), "--device 'warp9'"),
        ((prev, next_, "-o", out, *known, "--device", "meta"), "--device 'meta' cannot be used"),
        (
            (prev, next_, "-o", out, *known, "--device", "hpu"),
            "--device 'hpu'",
        ),  # known to torch, but not in its build
        ((prev, next_, "-o", out, *known, "--seed", -1), "--seed must be in [0, 2^63), but is -1"),
        ((prev, next_, "-o", tmp_path / "out.ico", *known), "must end in an image format"),
    ]
    for arguments, message in cases:
        assert main(["interpolate", *map(str, arguments)]) == 2, arguments
        printed = capsys.readouterr().err
        lines = [line for line in printed.splitlines() if "error" in line]
        assert len(lines) == 1 and lines[0].startswith("madiff: error: ") and message in lines[0], printed
        assert not out.exists()
    done = madiff("interpolate", *cases[0][0])
    assert done.returncode == 2 and "Traceback" not in done.stderr


COMMANDS = next(
    action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
)  # argparse tells of them nowhere else


def squeezed(text: str) -> str:
    """A text without spaces and line ends, which `--help` puts anywhere."""
    return "".join(text.split())


def test_help_tells_what_every_command_does(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = squeezed(capsys.readouterr().out)
    told = {action.dest: action.help for action in COMMANDS._choices_actions}
    assert told.keys() == COMMANDS.choices.keys()
    for name, text in told.items():
        assert text and squeezed(name + text) in printed, name
    assert len(set(told.values())) == len(told)


@pytest.mark.parametrize("name", COMMANDS.choices)
def test_help_tells_what_every_option_does(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = squeezed(capsys.readouterr().out)
    command = COMMANDS.choices[name]
    assert command.description and squeezed(command.description) in printed
    for action in command._actions:
        assert action.help and len(action.help.split()) >= 2, action.dest
        assert squeezed(action.help) in printed, action.dest
        names = [each for each in action.option_strings if each.startswith("--")] or [action.metavar]
        assert all(each in printed for each in names), action.dest
    told = [action.help for action in command._actions]
    assert len(set(told)) == len(told), "each says what it alone does"


def test_convert_eventgan(tmp_path, capsys):
    torch.save({"gen": original_state()}, tmp_path / "original.pt")
    command = ["convert-eventgan", str(tmp_path / "original.pt"), "-o", str(tmp_path / "i2e")]
    assert main(command) == 0
    assert EventGANModel.from_pretrained(tmp_path / "i2e").config.base_channels == 4
    assert main(command) == 2 and "must not exist" in capsys.readouterr().err
    (tmp_path / "original.pt").write_bytes(b"\x80")
    assert main([*command[:-1], str(tmp_path / "other")]) == 2 and not (tmp_path / "other").exists()


def test_images_are_read_upright(tmp_path):
    image = Image.fromarray(moving_picture(0, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (40, 60)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    assert np.array_equal(np.array(read_image(tmp_path / "grey16.png"))[..., 0], (ramp / 257).round())


def test_the_command_line_converts_as_the_pipeline_does(pipeline, checkpoint, tmp_path):
    ramps = [np.tile(np.linspace(0, high, 64).astype(np.uint16), (48, 1)) for high in (65535, 60000)]
    paths, out = [tmp_path / "prev.png", tmp_path / "next.tif"], tmp_path / "mid.png"
    for path, ramp in zip(paths, ramps):
        Image.fromarray(ramp).save(path)
    options = ["-o", out, "--checkpoint", checkpoint, "--device", "cpu", "--dtype", "fp32"]
    assert main(list(map(str, ["interpolate", *paths, *options]))) == 0
    expected = pipeline(*map(Image.open, paths), generator=torch.Generator().manual_seed(0)).frames[0][0]
    assert np.array_equal(np.array(Image.open(out)), np.array(expected))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.jpg"
    path.write_bytes(b"precious")
    with pytest.raises(OSError):
        write_image(Image.new("RGBA", (4, 4)), path)  # JPEG has no transparency
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments", [None, (), ("--help",), *((name, "--help") for name in COMMANDS.choices)], ids=str
)
def test_heavy_modules_are_imported_on_first_use(arguments):
    code = "import atexit, sys, madiff_diffusers; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    if arguments is not None:
        code += f"; from madiff_diffusers.commands.madiff_cli import main; main({list(arguments)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert "madiff_diffusers" in imported
    heavy = {"torch", "diffusers", "cv2", "av", "numpy", "PIL", "accelerate", "huggingface_hub", "gradio"}
    assert not heavy & imported


def test_the_command_alone_prints_its_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: madiff") and all(
        name in printed for name in ("interpolate", "video", "evaluate", "--version", "--traceback")
    )


def test_version():
    done = madiff("--version")
    assert (done.returncode, done.stdout) == (0, f"madiff {__version__}\n")


def test_the_first_line_says_where_it_computes(checkpoint, frames, tmp_path, capsys):
    known = ("-o", tmp_path / "out.png", "--checkpoint", checkpoint, "--overwrite")
    for options, device, dtype in (
        ((), best_device(), fastest_dtype(best_device())),
        (("--device", "cpu", "--dtype", "bf16"), "cpu", torch.bfloat16),
        (("--device", "cpu", "--dtype", "fp32"), "cpu", torch.float32),
    ):
        assert main(["interpolate", *map(str, (*frames, *known, *options))]) == 0
        first = capsys.readouterr().err.splitlines()[0]
        slow = ", which this CPU does not compute in by itself: slower than fp32" if is_emulated(device, dtype) else ""
        assert first.startswith(f"madiff: on {device}")
        assert first.endswith(f", in {str(dtype).removeprefix('torch.')}{slow}")


def test_bfloat16_is_emulated_on_cpus_that_have_it_in_no_form(monkeypatch):
    x86 = platform.machine() in ("x86_64", "AMD64")
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx: value)
        assert is_emulated("cpu", torch.bfloat16) == (x86 and not (amx or avx))
        assert not is_emulated("cpu", torch.float32) and not is_emulated("mps", torch.bfloat16)


@pytest.mark.parametrize(
    "there, chosen",
    [
        ((True, True, True), "cuda"),
        ((False, True, True), "mps"),
        ((False, False, True), "xpu"),
        ((False, False, False), "cpu"),
    ],
)
def test_auto_takes_the_first_accelerator_that_is_there(monkeypatch, there, chosen):
    for name, value in zip((torch.cuda, torch.backends.mps, torch.xpu), there):
        monkeypatch.setattr(name, "is_available", lambda value=value: value)
    assert best_device() == torch.device(chosen)


@pytest.mark.parametrize(
    "command, dtype",
    [
        (("interpolate", "prev.png", "next.png", "-o", "mid.png"), "auto"),
        (("video", "in.mp4", "out.mp4"), "auto"),
        (("demo",), "auto"),
        (("evaluate", "--benchmark", "davis", "--root", "davis", "-o", "out"), "float32"),
        (("ablate", "parts", "--benchmark", "davis", "--root", "davis", "-o", "out"), "float32"),
    ],
)
def test_frames_are_made_in_the_fastest_dtype_and_figures_in_one_that_every_machine_has(command, dtype):
    assert build_parser().parse_args(command).dtype == dtype


def test_an_unknown_dtype_is_told_what_there_is(frames, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["interpolate", *map(str, frames), "-o", str(tmp_path / "out.png"), "--dtype", "fp8"])
    assert (
        "--dtype: must be one of auto, fp32, fp16, bf16 or float32, float16, bfloat16, but is 'fp8'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "before, behind, environment",
    [
        ((), (), {}),
        (("--traceback",), (), {}),
        ((), ("--traceback",), {}),
        ((), (), {"MADIFF_DEBUG": "1"}),
        ((), (), {"MADIFF_DEBUG": "0"}),
    ],
)
def test_the_whole_error_where_it_is_asked_for(frames, tmp_path, monkeypatch, capsys, before, behind, environment):
    monkeypatch.delenv("MADIFF_DEBUG", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (
        main(
            [
                *before,
                "interpolate",
                str(tmp_path / "no.png"),
                str(frames[1]),
                "-o",
                str(tmp_path / "out.png"),
                *behind,
            ]
        )
        == 2
    )
    *whole, last = capsys.readouterr().err.splitlines()
    assert last == f"madiff: error: No such image file: {tmp_path / 'no.png'}"
    assert any("FileNotFoundError" in line for line in whole) == bool(
        before or behind or environment.get("MADIFF_DEBUG") == "1"
    )


def test_video_errors_show_whole_too(checkpoint, tmp_path, capsys):
    (tmp_path / "in.mp4").write_bytes(b"no video")
    assert (
        main(
            [
                "video",
                str(tmp_path / "in.mp4"),
                str(tmp_path / "out.mp4"),
                "--checkpoint",
                str(checkpoint),
                "--traceback",
            ]
        )
        == 2
    )
    printed = capsys.readouterr().err
    assert (
        "VideoError" in printed
        and "Traceback" in printed
        and printed.splitlines()[-1].startswith("madiff: error: cannot read")
    )


def test_what_cannot_be_written_is_found_before_a_model_or_a_frame_is_read(tmp_path, capsys):
    source = tmp_path / "in.mp4"
    source.write_bytes(b"no video, which nobody notices")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    refused = [
        name
        for name, kind in CODECS.items()
        if kind.standard and kind.encoder not in av.codecs_available and "webm" not in name
    ]
    cases = [
        (("out.mp4", "--codec", "prores"), "--codec for .mp4 must be one of h264, hevc"),
        (("out.webm", "--codec", "h264_nvenc"), "--codec for .webm must be one of vp9, av1"),
        (("out.mp4", "--crf", 99), "--crf for h264 must be from 0 (best) to 51, but is 99"),
        (("out.webm", "--preset", "slow"), "--preset for vp9 must be one of 8, 7"),
        (("out.mov", "--codec", "prores", "--crf", 9), "--crf cannot be set for prores"),
        (
            ("out.gif", "--fps", 60),
            "--fps for .gif must be at most 50, as players show shorter frames slower, but is 60",
        ),
        (("out.xyz",), "a video's name must end in .mp4"),
        (("no/out.mp4",), "there is no folder"),
        (("mine",), "holds other files than frames"),
        (("mine.mp4", "--input-fps", 5), "--input-fps is for images"),
        (("out.mp4", "--preview", "strip.xyz"), "must end in an image format"),
        *[(("out.mkv", "--codec", name), f"--codec {name} cannot be used: this build of PyAV") for name in refused],
    ]
    for (name, *options), message in cases:
        assert (
            main(
                [
                    "video",
                    str(source),
                    str(tmp_path / name),
                    *map(str, options),
                    "--checkpoint",
                    "no checkpoint either",
                ]
            )
            == 2
        )
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 1 and message in printed[0], printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "mine"]


@pytest.mark.parametrize(
    "codec", [name for name, kind in CODECS.items() if kind.standard and kind.encoder in av.codecs_available]
)
def test_encoders_of_chips_encode_or_are_refused_clearly(checkpoint, tmp_path, capsys, codec):
    source = write_video(tmp_path / "in.mp4", drifting(4, 256, 320), range(4), Fraction(1, 25))
    status = main(["video", str(source), str(tmp_path / "out.mkv"), "--codec", codec, "--checkpoint", str(checkpoint)])
    if status == 0:
        with av.open(str(tmp_path / "out.mkv")) as file:
            assert (
                file.streams.video[0].codec_context.codec.canonical_name == CODECS[codec].standard
                and len(list(file.decode(video=0))) == 8
            )
        return
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith(
        f"madiff: error: --codec {codec} cannot be used: this machine has no such chip, or no driver for it"
    )
    assert line.endswith(f"{CODECS[codec].standard} encodes on the processor") and not list(tmp_path.glob("out*"))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
@pytest.mark.parametrize("size", [(0, 0), (24, 60)])
def test_the_bar_shows_on_any_terminal(checkpoint, tmp_path, size):
    """Also on one that does not tell its size, as in a container without -t's window."""
    import fcntl
    import pty
    import struct
    import termios

    source = write_video(tmp_path / "in.mp4", drifting(3), range(3), Fraction(1, 25))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    command = [
        sys.executable,
        "-m",
        "madiff_diffusers",
        "video",
        str(source),
        str(tmp_path / "out.mp4"),
        "--checkpoint",
        str(checkpoint),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = start_python(command, env=environment, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    printed = b""
    try:
        while piece := os.read(leader, 4096):
            printed += piece
    except OSError:  # Linux tells the end in this way
        pass
    os.close(leader)
    assert process.wait() == 0
    bars = [line for line in printed.decode().split("\r") if "out.mp4" in line and "%" in line]
    assert bars and "6/6" in bars[-1] and max(map(len, bars)) <= (size[1] or 80) + 1


def test_a_log_gets_few_whole_lines(checkpoint, tmp_path):
    source = write_video(tmp_path / "in.mp4", drifting(3), range(3), Fraction(1, 25))
    done = madiff("video", source, tmp_path / "out.mp4", "--checkpoint", checkpoint)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and lines[0].startswith("madiff: on ") and len(lines) <= 5
    assert any(line.startswith("out.mp4: 6 of 6 frames") for line in lines)


def test_threads_do_not_wait_for_each_other_on_cores_that_others_need(checkpoint, frames, tmp_path):
    """What the command sets is for what it loads afterwards, and leaves what a user has set."""
    code = (
        "import os, sys; from madiff_diffusers.commands.madiff_cli import main\n"
        "assert 'torch' not in sys.modules; main(['interpolate', *sys.argv[1:]])\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    for own, expected in (({}, "30000 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")):
        options = ["-o", tmp_path / f"{len(own)}.png", "--checkpoint", tmp_path / "none"]
        command = [sys.executable, "-c", code, *map(str, [*frames, *options])]
        done = subprocess.run(command, capture_output=True, text=True, env={**environment, **own})
        assert done.stdout.splitlines()[-1] == expected, done.stderr
