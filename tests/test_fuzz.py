"""Random images and containers, odd and damaged, through the command: it writes what was asked or says in a line what is wrong, and
whatever it reads stays as it is."""

import io
import random
import shutil
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some
from PIL import Image, ImageCms, PngImagePlugin

from madiff_diffusers.commands.madiff_cli import main
from tests.conftest import moving_picture
from tests.video_files import write_video


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B", "I", "F")
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".tif": "TIFF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".tga": "TGA",
    ".jp2": "JPEG2000",
    ".ico": "ICO",
}
VIDEOS = {
    ".mp4": [("libx264", "yuv420p"), ("libx264", "yuv444p10le"), ("mpeg4", "yuv420p")],
    ".mov": [("prores_ks", "yuva444p10le"), ("png", "rgba"), ("qtrle", "argb")],
    ".mkv": [
        ("ffv1", "gray16le"),
        ("ffv1", "gbrp12le"),
        ("ffv1", "yuva420p"),
        ("mjpeg", "yuvj422p"),
        ("rawvideo", "bgr24"),
    ],
    ".avi": [("mpeg4", "yuv420p"), ("ffv1", "bgr0")],
    ".webm": [("libvpx-vp9", "yuva420p")],
    ".gif": [("gif", "rgb8")],
    ".ts": [("mpeg2video", "yuv422p")],
    ".y4m": [("rawvideo", "yuv411p")],
    ".flv": [("flv1", "yuv420p")],
}
OUTPUTS = {
    "interpolate": (".png", ".jpg", ".tif", ".webp", ".bmp", ".ppm", ".xyz"),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".y4m", "", ".png"),
}
WORDS = ("plain", "mit Ümläut", "a:b", "50%d", "-dash", "white  space", "new\nline", "quo'te\"")


def image_bytes(dice: random.Random, suffix: str, size: tuple) -> bytes:
    """An image file, of any mode and with any metadata, as far as Pillow writes such."""
    picture, mode = Image.fromarray(moving_picture(dice.randrange(9), *size[::-1])), dice.choice(MODES)
    if mode.startswith("I") or mode == "F":
        values = np.array(picture.convert("L")).astype(np.float64) * dice.choice([1 / 255, 1, 257, 70000, -1])
        picture = (
            Image.fromarray(values.clip(0, 65535).astype(np.uint16))
            if ";" in mode
            else Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
        )
    elif mode == "LAB":
        picture = Image.merge("LAB", picture.split())
    else:
        picture = picture.convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    exif = Image.Exif()
    for tag in dice.sample([0x10F, 0x112, 0x132, 0x8769, 0x011A, 0x9286, 0x927C], dice.randrange(4)):
        exif[tag] = dice.choice([dice.randrange(12), "text", b"\x00\xff", 3.5])
    text = PngImagePlugin.PngInfo()
    text.add_text(dice.choice(WORDS).strip("-") or "x", dice.choice(WORDS))
    extras = {
        "icc_profile": dice.choice([PROFILE, dice.randbytes(40), b""]),
        "exif": dice.choice([dice.randbytes(30), b"Exif\x00\x00MM\x00*", b"", None]) or exif,
        "pnginfo": text,
        "dpi": dice.choice([(72, 72), (300, 150), (0, 0), (1, 9999)]),
        "transparency": dice.choice([0, 255, (1, 2, 3)]),
        "comment": dice.choice(WORDS),
        "save_all": True,
        "append_images": [picture],
        "lossless": True,
        "quality": 40,
        "progressive": True,
        "compression": dice.choice([None, "tiff_lzw", "jpeg"]),
    }
    file = io.BytesIO()
    chosen = dict(dice.sample(sorted(extras.items(), key=lambda item: item[0]), dice.randrange(5)))
    for attempt, extra in ((picture, chosen), (picture, {}), (picture.convert("RGB"), {})):
        file.seek(0)
        file.truncate()
        try:
            attempt.save(file, FORMATS[suffix], **extra)
            break
        except Exception:  # Pillow does not write everything; what is read is under test
            continue
    return file.getvalue()


def video_bytes(dice: random.Random, folder: Path, suffix: str, size: tuple) -> bytes:
    """A video file, of any pixels and with any times and tags, as far as FFmpeg writes such."""
    codec, pixel_format = dice.choice(VIDEOS[suffix])
    frames = [
        moving_picture(number, *(max(16, each) + each % 2 for each in size)) for number in range(dice.randrange(1, 5))
    ]
    steps = [dice.choice([1, 1, 1, 2, 40]) for _ in frames]
    settings = {
        "colours": tuple(dice.choice([0, 1, 2, 4, 5, 6, 9, 16, 18]) for _ in range(4)),
        "rotation": dice.choice([0, 90, 180, 45]),
        "metadata": {dice.choice(WORDS): dice.choice(WORDS)},
        "pixel_aspect": dice.choice([Fraction(16, 11), Fraction(1, 100)]),
        "sound": 0.2,
        "subtitle": b"hello",
        "options": {"g": "2"},
        "chapters": [
            {"id": 1, "start": 0, "end": 50, "time_base": Fraction(1, 1000), "metadata": {"title": dice.choice(WORDS)}}
        ],
    }
    chosen = dict(dice.sample(sorted(settings.items(), key=lambda item: item[0]), dice.randrange(4)))
    chosen["colours"] = (
        *(min(2, each) for each in chosen.get("colours", (1,))[:1]),
        *chosen.get("colours", (1, 1, 1, 1))[1:],
    )
    for settings in (chosen, {}):
        path = folder / f"written{suffix}"
        try:
            write_video(
                path,
                frames,
                [sum(steps[:number]) for number in range(len(frames))],
                Fraction(1, 25),
                codec=codec,
                pixel_format=pixel_format,
                last=1,
                **settings,
            )
            return path.read_bytes()
        except Exception:  # FFmpeg does not write everything; what is read is under test
            continue
        finally:
            path.unlink(missing_ok=True)
    return b""


def mutated(dice: random.Random, data: bytes) -> bytes:
    kind, data = dice.randrange(6), bytearray(data)
    if not data or kind == 0:
        return bytes(data)
    place = dice.randrange(len(data))
    if kind == 1:
        return bytes(data[:place])
    if kind == 2:
        for _ in range(dice.choice([1, 5, 50])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == 3:
        data[place : place + dice.choice([4, 40])] = dice.randbytes(dice.choice([0, 4, 60]))
    elif kind == 4:
        head = dice.randrange(min(60, len(data)))
        data[head : head + 4] = dice.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
    else:
        data += data[place:]
    return bytes(data)


def sources(dice: random.Random, folder: Path, command: str) -> list:
    """Arguments that name what is read."""
    size = (dice.randrange(1, 40), dice.randrange(1, 40))
    is_images = command == "interpolate" or dice.random() < 0.4
    word = dice.choice(WORDS)
    if not is_images:
        suffix = dice.choice(list(VIDEOS))
        path = folder / f"{word}{dice.choice([suffix, suffix, '.mp4', ''])}"
        path.write_bytes(mutated(dice, video_bytes(dice, folder, suffix, size)))
        return [path]
    inside = folder if command == "interpolate" else folder / "in"
    inside.mkdir(exist_ok=True)
    paths = []
    for number in range(2 if command == "interpolate" else dice.randrange(1, 5)):
        suffix = dice.choice(list(FORMATS))
        path = inside / f"{word}{number}{dice.choice([suffix, suffix, suffix, '.png'])}"
        data = image_bytes(dice, suffix, size if dice.random() < 0.9 else (size[0] + 1, size[1]))
        path.write_bytes(mutated(dice, data) if dice.random() < 0.3 else data)
        paths.append(path)
    return paths if command == "interpolate" else [inside]


def target(dice: random.Random, folder: Path, command: str, read: list) -> Path:
    """What is asked to be written: something new, mostly; or what is read, or a link to it."""
    kind = dice.randrange(12)
    if kind == 0:
        return read[-1]
    if kind == 1:
        (folder / "link.png").symlink_to(read[0])
        return folder / "link.png"
    return folder / f"{dice.choice(['out', *WORDS])}{dice.choice(OUTPUTS[command])}"


def extra_options(dice: random.Random, command: str, folder: Path, read: list) -> list:
    if command == "interpolate":
        return ["--num-frames", dice.choice([1, 1, 2, 3])]
    options = [
        ["--factor", 1],
        ["--factor", 2],
        ["--fps", "12"],
        ["--slow-motion", "2.5"],
        ["--dedup"],
        ["--skip-damage"],
        ["--keep-partial"],
        ["--overwrite"],
        ["--resume"],
    ]
    options += [
        ["--codec", dice.choice(["h264", "hevc", "vp9", "prores", "ffv1"])],
        ["--preview", dice.choice([folder / "strip.png", *(sorted(read[0].glob("*")) if read[0].is_dir() else read)])],
        ["--input-fps", "29.97"],
        ["--max-gap", "0.1"],
    ]
    return [part for option in dice.sample(options, dice.randrange(4)) for part in option]


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def try_one(seed: int, folder: Path, checkpoint: Path, capfd) -> int:
    """The exit status of one command, all of which a seed decides on."""
    dice = random.Random(seed)
    folder.mkdir()
    try:
        command = dice.choice(["interpolate", "video"])
        read = sources(dice, folder, command)
        out = target(dice, folder, command, read)
        options = extra_options(dice, command, folder, read)
        before = contents(folder)
        places = ["-o", out, "--steps", 1, "--", *read] if command == "interpolate" else ["--", *read, out]
        arguments = [*options, "--checkpoint", checkpoint, *places]
        started = time.monotonic()
        try:
            status = main([command, *map(str, arguments)])
        except SystemExit as exit_:  # of argparse
            status = exit_.code
        printed = capfd.readouterr()
        assert status in (0, 2), (seed, status, printed.err)
        assert "Traceback" not in printed.err, (seed, printed.err)
        assert status == 0 or [line for line in printed.err.splitlines() if "error: " in line], (seed, printed.err)
        after = contents(folder)
        assert {path: after.get(path) for path in before} == before, (seed, "an input is not what it was")
        assert time.monotonic() - started < 60, seed
        return status
    finally:
        shutil.rmtree(folder)


def fuzz(count: int, checkpoint: Path, tmp_path: Path, capfd) -> None:
    outcomes = []

    # A seed says all, and smaller ones are no simpler.
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(some.integers(0, 2**32))
    def one(seed: int) -> None:
        outcomes.append(try_one(seed, tmp_path / "here", checkpoint, capfd))

    one()
    assert min(outcomes.count(0), outcomes.count(2)) >= count // 10, (outcomes.count(0), outcomes.count(2))


def test_sixty_odd_inputs(checkpoint, tmp_path, capfd):
    fuzz(60, checkpoint, tmp_path, capfd)


@pytest.mark.slow
def test_a_thousand_odd_inputs(checkpoint, tmp_path, capfd):
    fuzz(1000, checkpoint, tmp_path, capfd)
