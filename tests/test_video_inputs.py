"""What cameras, editors and careless people hand in: every kind of image, and sources that change on the way."""

import re
import shutil
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from madiff_diffusers import interpolate_video
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.video.analysis import analyse
from madiff_diffusers.video.batches import video_batch
from madiff_diffusers.video.colour import opacity
from madiff_diffusers.video.decoding import Source
from madiff_diffusers.video.errors import VideoError
from madiff_diffusers.video.images import image_frame
from madiff_diffusers.video.jobs import VideoJob
from madiff_diffusers.video.notes import notes_on_pictures
from madiff_diffusers.video.options import VideoOptions
from tests.conftest import moving_picture
from tests.processes import run_python
from tests.video_files import decode, drifting, write_video


ORIENTATION = 0x0112
LOSSLESS = {"codec": "ffv1", "image_fps": Fraction(25), "factor": 1, "progress": False}


def folder_of(path: Path, images: list, suffix: str = ".png", **settings) -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        image.save(path / f"{number}{suffix}", **settings)
    return path


def pictures(count: int = 3) -> list:
    return [Image.fromarray(frame) for frame in drifting(count)]


def test_colour_profiles_are_no_obstacle(checkpoint, tmp_path):
    """In a process of its own: what is read wrongly here ends the process."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    folder_of(tmp_path / "icc", pictures(), icc_profile=profile)
    options = ["--factor", "1", "--codec", "ffv1", "--checkpoint", checkpoint]
    command = [sys.executable, "-m", "madiff_diffusers", "video", tmp_path / "icc", tmp_path / "out.mkv", *options]
    done = run_python(command)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert all(map(np.array_equal, decode(tmp_path / "out.mkv"), drifting(3)))


def test_a_motion_jpeg_with_a_profile_and_exif(tmp_path):
    """Frames of a video file carry the same."""
    profile, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.Exif()
    exif[0x010F] = "camera"
    folder_of(tmp_path / "frames", pictures(), ".jpg", icc_profile=profile, exif=exif)
    (tmp_path / "film.mjpeg").write_bytes(
        b"".join((tmp_path / "frames" / f"{number}.jpg").read_bytes() for number in range(3))
    )
    code = "import sys; from madiff_diffusers.video.analysis import analyse; from madiff_diffusers.video.decoding import Source; print(len(analyse(Source(sys.argv[1])).starts))"
    done = run_python([sys.executable, "-c", code, str(tmp_path / "film.mjpeg")])
    assert done.returncode == 0 and done.stdout == "3\n", (done.returncode, done.stderr)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_images_are_upright_whichever_way_the_camera_was_held(tmp_path, suffix):
    (tmp_path / "stills").mkdir()
    upright = []
    for orientation in range(1, 9):
        # What a camera writes: the picture in the way that the orientation undoes, one after the other in one folder.
        exif = Image.Exif()
        exif[ORIENTATION], exif[0x010F] = orientation, "camera"
        image = Image.fromarray(moving_picture(orientation))
        image = image.transpose(Image.Transpose.ROTATE_90) if orientation >= 5 else image
        path = tmp_path / "stills" / f"{orientation}{suffix}"
        image.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
        upright.append(np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB")))
    source = Source(tmp_path / "stills")
    shown = [frame.to_ndarray(format="rgb24") for _, frame in source.frames()]
    assert len(shown) == 8 and all(map(np.array_equal, shown, upright))
    assert analyse(source).matrix is None, "what is upright is not turned again"


def test_sixteen_bits_are_read_as_such(tmp_path):
    deep = moving_picture(0).astype(np.uint16) * 256
    (tmp_path / "deep").mkdir()
    for name in ("0.png", "1.tif", "2.ppm"):
        cv2.imwrite(str(tmp_path / "deep" / name), deep + 77)
    cv2.imwrite(str(tmp_path / "eight.ppm"), moving_picture(0))
    assert image_frame(tmp_path / "eight.ppm").format.name == "rgb24"
    for _, frame in Source(tmp_path / "deep").frames():
        assert np.array_equal(frame.to_ndarray(format="rgb48le"), deep[..., ::-1] + 77)
    grey = np.linspace(0, 65535, 64 * 96).astype(np.uint16).reshape(64, 96)
    (tmp_path / "grey").mkdir()
    for name in ("0.png", "1.tif", "2.pgm"):
        cv2.imwrite(str(tmp_path / "grey" / name), grey)
    for _, frame in Source(tmp_path / "grey").frames():
        assert all(np.array_equal(channel, grey) for channel in frame.to_ndarray(format="rgb48le").transpose(2, 0, 1))


def test_every_kind_of_pixels(pipeline, tmp_path):
    """In one folder: black and white, grey (first), palettes, CMYK, transparency. None decides on the others."""
    (tmp_path / "mixed").mkdir()
    image = Image.fromarray(moving_picture(0))
    half = image.copy()
    half.putalpha(128)
    kinds = [
        image.convert("L"),
        image.convert("1"),
        image.convert("P"),
        image,
        image.convert("RGBA"),
        half,
        image.convert("L").convert("LA"),
    ]
    for number, kind in enumerate(kinds):
        kind.save(tmp_path / "mixed" / f"{number}.png")
    image.convert("CMYK").save(tmp_path / "mixed" / "7.tif")
    interpolate_video(pipeline, tmp_path / "mixed", tmp_path / "out.mkv", **LOSSLESS)
    shown = decode(tmp_path / "out.mkv")
    expected = [np.array(kind.convert("RGB")) for kind in [*kinds, image]]
    expected[5] = (expected[5] * (128 / 255)).round().astype(np.uint8)  # half transparent, on black
    assert all(map(np.array_equal, shown, expected))


def test_grey_before_colours_in_a_video(pipeline, tmp_path):
    frames = drifting(4)
    # JPEG tells its pixels in each frame.
    data = b""
    for number, array in enumerate(frames):
        image = Image.fromarray(array).convert("L" if number < 2 else "RGB")
        image.save(tmp_path / "one.jpg", quality=100, subsampling=0)
        data += (tmp_path / "one.jpg").read_bytes()
    (tmp_path / "film.mjpeg").write_bytes(data)
    interpolate_video(pipeline, tmp_path / "film.mjpeg", tmp_path / "out.mkv", factor=1, codec="ffv1", progress=False)
    shown = decode(tmp_path / "out.mkv")
    assert np.abs(shown[3].astype(int) - frames[3]).mean() < 3, "colours"
    assert np.abs(shown[0].astype(int) - np.array(Image.fromarray(frames[0]).convert("L"))[..., None]).mean() < 3, (
        "grey"
    )


def test_a_size_that_changes_among_images(pipeline, tmp_path):
    folder = folder_of(tmp_path / "sizes", pictures(4))
    Image.fromarray(moving_picture(2, 96, 64)).save(folder / "2.png")
    with pytest.raises(VideoError, match=r"2.png has frames of 64x96, but of 96x64 before"):
        interpolate_video(pipeline, folder, tmp_path / "out.mkv", **LOSSLESS)
    assert list(tmp_path.iterdir()) == [folder]
    result = interpolate_video(pipeline, folder, tmp_path / "out.mkv", skip_damage=True, **LOSSLESS)
    assert "2.png has frames of 64x96" in result.notes[0]
    assert all(map(np.array_equal, decode(tmp_path / "out.mkv"), [drifting(4)[number] for number in (0, 1, 3)]))


def test_a_size_that_changes_inside_a_video(tmp_path):
    parts = [
        write_video(tmp_path / f"{number}.ts", drifting(4, *size), range(4), Fraction(1, 25), options={"bf": "0"})
        for number, size in enumerate([(64, 96), (96, 64)])
    ]
    (tmp_path / "glued.ts").write_bytes(b"".join(path.read_bytes() for path in parts))
    with pytest.raises(VideoError, match=r"glued.ts behind \d.\d\d s has frames of 64x96, but of 96x64 before"):
        analyse(Source(tmp_path / "glued.ts"))
    analysis = analyse(Source(tmp_path / "glued.ts"), skip_damage=True)
    assert len(analysis.starts) == 4 and len(analysis.damage) == 1


def test_too_many_pixels_are_refused_before_they_are_read(tmp_path):
    (tmp_path / "large").mkdir()
    Image.new("1", (8193, 8192)).save(tmp_path / "large" / "0.png")
    with pytest.raises(VideoError, match="0.png must have at most 8192x8192 pixels, but has 8193x8192"):
        analyse(Source(tmp_path / "large"))


def gif_times(path: Path) -> tuple:
    """How long each frame of a GIF is shown, in milliseconds, and how often it is shown again; 0 for ever, None never."""
    with Image.open(path) as image:
        loop, durations = image.info.get("loop"), []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
        return durations, loop


@pytest.mark.parametrize("loop", [3, 0, None])
def test_a_gif_keeps_its_whole_time_and_its_loops(pipeline, tmp_path, loop):
    first, *others = pictures()
    settings = {} if loop is None else {"loop": loop}
    first.save(tmp_path / "in.gif", save_all=True, append_images=others, duration=[100, 100, 2000], **settings)
    interpolate_video(pipeline, tmp_path / "in.gif", tmp_path / "out.gif", progress=False)
    assert gif_times(tmp_path / "out.gif") == ([50, 50, 50, 50, 1000, 1000], loop)


def test_hundredths_of_a_gif_do_not_add_up_to_less(pipeline, tmp_path):
    source = write_video(tmp_path / "in.mkv", drifting(7), range(7), Fraction(1, 15))
    for factor in (1, 2, 3):
        interpolate_video(
            pipeline, source, tmp_path / "out.gif", steps=1, factor=factor, overwrite=True, progress=False
        )
        durations, loop = gif_times(tmp_path / "out.gif")
        ends = np.cumsum(durations)
        assert np.abs(ends - np.arange(1, len(ends) + 1) * 1000 / 15 / factor).max() <= 5 and loop == 0


def test_sixteen_bits_that_are_turned_stay_transparent(tmp_path):
    deep = np.dstack([moving_picture(0).astype(np.uint16) * 256, np.full((64, 96), 32768, np.uint16)])
    cv2.imwrite(str(tmp_path / "plain.png"), deep)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    tags = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = len(tags).to_bytes(4, "big") + b"eXIf" + tags + zlib.crc32(b"eXIf" + tags).to_bytes(4, "big")
    png = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "turned.png").write_bytes(png[:33] + chunk + png[33:])  # behind its header
    plain, turned = (image_frame(tmp_path / f"{name}.png") for name in ("plain", "turned"))
    assert turned.format.name == "rgba64le" and np.allclose(opacity(turned), 0.5, atol=1e-4)
    upright = np.rot90(plain.to_ndarray(format="rgba64le"), -1)
    assert np.array_equal(turned.to_ndarray(format="rgba64le"), upright)


def test_a_number_has_at_least_as_many_digits_as_its_pattern(tmp_path):
    names = [f"f{number:03d}.png" for number in (7, 97, 998, 999, 1000, 1001, 12000)]
    for name in (*names, "f07.png", "f0998.png", "f.png"):
        pictures(1)[0].save(tmp_path / name)
    assert [path.name for path in Source(tmp_path / "f%03d.png").images] == names


def test_images_are_as_far_apart_as_they_are_said_to_be(pipeline, tmp_path):
    """No pause of a video, across which nothing is made."""
    folder_of(tmp_path / "frames", pictures(3))
    slow = {"image_fps": Fraction(1, 2), "fps": 4, "steps": 1, "codec": "ffv1", "progress": False}
    made = interpolate_video(pipeline, tmp_path / "frames", tmp_path / "out.mkv", **slow)
    assert (made.frames, made.made, made.notes) == (24, 14, [])
    held = interpolate_video(pipeline, tmp_path / "frames", tmp_path / "held.mkv", max_gap=1, **slow)
    told = "nothing is made: all frames of .* are more than 1 s apart; `max_gap` sets"
    assert held.made == 0 and len(held.notes) == 1 and re.match(told, held.notes[0])


def recorded(path: Path) -> Path:
    """A screen, recorded as it changes: 40 frames some 20 ms apart, then five that last for most of a second."""
    lengths = [*[15, 18, 20, 23] * 10, *[700] * 5]
    times = [sum(lengths[:number]) for number in range(len(lengths))]
    return write_video(path, drifting(len(lengths)), times, Fraction(1, 1000), last=lengths[-1])


@pytest.mark.parametrize("name", ["out.avi", "out.y4m", "out", "out.gif"])
def test_quick_frames_of_no_steady_rate_are_shown_where_there_is_but_one(pipeline, tmp_path, name):
    """Not the mean rate, which pauses make low. GIF shows 50 frames a second at the most."""
    job = VideoJob(pipeline, recorded(tmp_path / "screen.mkv"), tmp_path / name, VideoOptions(factor=2))
    shown = [len(each) for each in job.timeline.shown()]
    assert sum(count > 0 for count in shown) >= (43 if job.timeline.rate > 50 else 35)
    assert job.timeline.rate == 50 if name == "out.gif" else 100 <= job.timeline.rate <= 120
    notes = notes_on_pictures(job.source, job.analysis, set(), job.encoding, job.options, job.timeline)
    told = f"{float(job.timeline.rate):.2f} frames a second are shown"
    assert len([note for note in notes if told in note]) == 1


@pytest.mark.parametrize("factor", [2, 3])
def test_a_gif_whose_last_frame_is_short(pipeline, tmp_path, factor):
    first, *others = pictures(4)
    first.save(tmp_path / "in.gif", save_all=True, append_images=others, duration=[100, 70, 130, 20], loop=0)
    interpolate_video(pipeline, tmp_path / "in.gif", tmp_path / "out.gif", steps=1, factor=factor, progress=False)
    durations, _ = gif_times(tmp_path / "out.gif")
    assert min(durations) >= 20 and abs(sum(durations) - 300 - 20 * factor) <= 10, "room for each of its copies"


@pytest.mark.parametrize("rate, factor, shown", [(30, 2, 50), (60, 1, 50), (25, 2, 50), (10, 8, 50), (16, 2, None)])
def test_players_keep_the_delays_of_a_gif(pipeline, tmp_path, rate, factor, shown):
    """Whole hundredths of a second, two and more; what is less, players show as ten."""
    source = write_video(tmp_path / "in.mkv", drifting(rate // 2), range(rate // 2), Fraction(1, rate))
    result = interpolate_video(pipeline, source, tmp_path / "out.gif", steps=1, factor=factor, progress=False)
    durations, _ = gif_times(tmp_path / "out.gif")
    assert (
        min(durations) >= 20
        and all(each % 10 == 0 for each in durations)
        and sum(durations) == 1000 * (rate // 2) // rate
    )
    assert set(durations) == ({1000 // shown} if shown else {30, 40}) and len(durations) == result.frames
    told = [note for note in result.notes if "GIF players" in note]
    assert told == (
        [
            f"GIF players keep delays of 2/100 s and more: {shown}.00 frames a second are shown in the place of {rate * factor}.00"
        ]
        if shown and rate * factor != shown
        else []
    )


def test_a_folder_of_videos_by_any_name(checkpoint, tmp_path, capsys):
    """Whatever FFmpeg opens is made, and what is left out is named."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, codec in (
        ("a.mp4", "libx264"),
        ("b.flv", "flv1"),
        ("c.3gp", "libx264"),
        ("B.asf", "wmv2"),
        ("d.mkv", "libx264"),
    ):
        write_video(folder / name, drifting(2), range(2), Fraction(1, 25), codec=codec)
    (folder / "d.mkv").rename(folder / "nameless")
    (folder / "notes.txt").write_text("\033[1mno video\033[0m\n" * 50)
    (folder / "song.bin").write_bytes(b"no video")
    Image.fromarray(moving_picture(0)).save(folder / "cover.jp2")
    assert main(["video", str(folder), str(tmp_path / "out"), "--factor", "1", "--checkpoint", str(checkpoint)]) == 0
    printed = capsys.readouterr()
    assert "note: left out, for there is no video in them: cover.jp2, notes.txt, song.bin" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["a.mp4", "b.flv.mp4", "B.asf.mp4", "c.mp4", "nameless.mp4"]
    )


def test_still_pictures_that_ffmpeg_takes_for_videos(checkpoint, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(moving_picture(number)).save(folder / f"{number}.avif")
    assert main(["video", str(folder), str(tmp_path / "out.mp4"), "--checkpoint", str(checkpoint)]) == 2
    assert "there are no images" in capsys.readouterr().err and not (tmp_path / "out.mp4").exists()
    write_video(folder / "film.mp4", drifting(2), range(2), Fraction(1, 10))
    assert [path.name for path in video_batch(folder, tmp_path / "out").left_out] == ["0.avif", "1.avif"]


def test_a_clock_that_frames_do_not_follow_is_no_rate(tmp_path):
    # Twelve frames of three to thirteen hundredths of a second, and a clock of hundredths.
    with Image.new("RGB", (32, 32)) as first:
        rest = [Image.new("RGB", (32, 32), (20 * number,) * 3) for number in range(1, 12)]
        first.save(tmp_path / "in.gif", save_all=True, append_images=rest, duration=[30, 70, 110, 130] * 3)
    analysis = analyse(Source(tmp_path / "in.gif"))
    assert not analysis.regular and analysis.showing_rate < 50
    # A rate that is the clock's, with a frame left out here and there, is one.
    times = [number for number in range(30) if number % 7]
    assert analyse(Source(write_video(tmp_path / "in.mp4", drifting(len(times)), times, Fraction(1, 25)))).regular


def test_what_is_no_image_is_named(pipeline, tmp_path):
    folder = folder_of(tmp_path / "frames", pictures())
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").touch()
    result = interpolate_video(pipeline, folder, tmp_path / "out.mkv", **LOSSLESS)
    assert result.frames == 3 and result.notes == ["left out, for they are no images: notes.txt"]


def test_an_image_that_is_not_there(tmp_path):
    """A link to nothing is missed, not passed over."""
    folder = folder_of(tmp_path / "frames", pictures())
    (folder / "3.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(VideoError, match="cannot read .*3.png as an image: No such file"):
        analyse(Source(folder))


def test_progress_in_a_log_is_lines(pipeline, tmp_path, capfd):
    folder = folder_of(tmp_path / "frames", pictures())
    interpolate_video(pipeline, folder, tmp_path / "out.mkv", **{**LOSSLESS, "progress": True})
    printed = capfd.readouterr().err
    assert "\r" not in printed and len(printed.splitlines()) <= 6
    assert "out.mkv: 3 of 3 frames" in printed.splitlines()[-1]


def test_videos_of_a_folder_that_would_have_one_name_are_refused(checkpoint, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "a.mp4", drifting(2), range(2), Fraction(1, 25))
    shutil.copyfile(folder / "a.mp4", folder / "a.m2ts.mp4")
    write_video(folder / "a.ts", drifting(2), range(2), Fraction(1, 25))
    (folder / "a.ts").rename(folder / "a.m2ts")
    assert main(["video", str(folder), str(tmp_path / "out"), "--checkpoint", str(checkpoint)]) == 2
    assert "a.m2ts.mp4 would both become" in capsys.readouterr().err and not (tmp_path / "out").exists()
