"""The `madiff` command as a user runs it: real processes, real files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from madiff_diffusers import EventGANModel
from madiff_diffusers.cli import main
from madiff_diffusers.image_io import read_image, write_image
from tests.conftest import moving_picture
from tests.test_eventgan import original_state


def madiff(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "madiff_diffusers", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def frames(tmp_path) -> tuple:
    paths = tmp_path / "prev.png", tmp_path / "next.jpg"
    for path, time in zip(paths, (-1, 1)):
        Image.fromarray(moving_picture(time, 50, 70)).save(path)
    return paths


def test_interpolate_writes_what_the_pipeline_makes(pipeline, checkpoint, frames, tmp_path):
    out = tmp_path / "mid.png"
    done = madiff("interpolate", *frames, "-o", out, "--checkpoint", checkpoint, "--seed", 3, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
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
        ((prev, next_, "-o", out, "--checkpoint", tmp_path), "--checkpoint must be a folder with"),
        ((prev, next_, "-o", out, "--checkpoint", "madiff-giant"), "but is 'madiff-giant'"),
        ((prev, next_, "-o", tmp_path / "no" / "out.png", *known), "no such folder"),
        ((prev, next_, "-o", tmp_path, *known), "image format"),
        ((prev, next_, "-o", tmp_path / "out.xyz", *known), "out.xyz"),
        ((prev, next_, "-o", out, *known, "--num-frames", 0), "`num_frames` must be a positive integer"),
        ((prev, next_, "-o", out, *known, "--times", "1/4", 1), "`times` must be a list of numbers between 0 and 1"),
        ((prev, next_, "-o", out, *known, "--steps", 0), "`num_inference_steps`"),
        ((prev, next_, "-o", out, *known, "--device", "warp9"), "--device 'warp9'"),
        ((prev, next_, "-o", out, *known, "--device", "hpu"), "--device 'hpu'"),  # known to torch, but not in its build
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


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["interpolate", "--help"])
    printed = capsys.readouterr().out
    for option in ("PREV", "NEXT", "--output", "--num-frames", "--times", "--steps", "--seed", "--checkpoint", "--device", "--dtype"):
        assert option in printed


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
    assert main(list(map(str, ["interpolate", *paths, "-o", out, "--checkpoint", checkpoint]))) == 0
    expected = pipeline(*map(Image.open, paths), generator=torch.Generator().manual_seed(0)).frames[0][0]
    assert np.array_equal(np.array(Image.open(out)), np.array(expected))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.jpg"
    path.write_bytes(b"precious")
    with pytest.raises(OSError):
        write_image(Image.new("RGBA", (4, 4)), path)  # JPEG has no transparency
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


def test_importing_the_package_is_quick():
    code = (
        "import time, diffusers; start = time.perf_counter(); import madiff_diffusers; "
        "print(time.perf_counter() - start, 'cv2' in __import__('sys').modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds, opencv = done.stdout.split()
    assert float(seconds) < 1 and opencv == "False", "heavy modules are imported on first use"
