"""What commands write never takes the place of what they read, nor of what was there before."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from madiff_diffusers import interpolate_video
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.evaluation.benchmarks import find_triplets
from madiff_diffusers.evaluation.evaluate import evaluate
from madiff_diffusers.evaluation.methods import Baseline
from madiff_diffusers.evaluation.metrics import Scorer
from madiff_diffusers.files import UnwritableError, check_outputs, filled_folder, natural_order, replacing, write_text
from madiff_diffusers.image_io import write_image
from madiff_diffusers.video.errors import VideoError
from tests.conftest import moving_picture
from tests.video_files import decode, drifting, film_clip, write_video


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def image(path: Path, time: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(moving_picture(time)).save(path)
    return path


def run(pipeline, source, output, **options):
    return interpolate_video(pipeline, source, output, progress=False, **{"factor": 1, **options})


def test_what_a_format_cannot_hold_is_one_error(tmp_path):
    with pytest.raises(UnwritableError, match="cannot write .*wide.webp"):
        write_image(Image.new("RGB", (16384, 1)), tmp_path / "wide.webp")
    assert not [*tmp_path.iterdir()]


def test_numbers_in_names_count():
    """Decimal numbers alone: a superscript is a digit to Python, but no number."""
    names = [
        "9.png",
        "10.png",
        "frame2.png",
        "frame10.png",
        "frame10b.png",
        "frame²3.png",
        "frame³.png",
        "²3.png",
        "٣.png",
    ]
    assert sorted(set(names), key=natural_order) == ["٣.png", *names[:-1]]


def test_a_benchmark_of_any_names(tmp_path):
    for number, name in enumerate(("9", "10", "²3")):
        image(tmp_path / f"{name}.png", number)
    (triplet,) = find_triplets("frames", str(tmp_path))
    assert [path.stem for path in triplet.files] == ["9", "10", "²3"]


def test_a_folder_of_frames_of_any_names(pipeline, tmp_path):
    for number, name in enumerate(("9", "10", "²3")):
        image(tmp_path / "frames" / f"{name}.png", number)
    assert run(pipeline, tmp_path / "frames", tmp_path / "out.mkv").frames == 3


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
        1 / 0
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    write_text(path, "third")
    assert path.read_text() == "third" and list(path.parent.iterdir()) == [path]


def test_the_longest_names(tmp_path):
    path = tmp_path / f"{'é' * 125}a.png"  # 255 bytes, of which a temporary name would take more
    check_outputs([(path, False)], [])
    write_image(Image.fromarray(moving_picture(0)), path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnwritableError, match="too long"):
        check_outputs([(path.with_name("a" + path.name), True)], [])


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), filled_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("some")
        1 / 0
    assert not list(tmp_path.iterdir())
    with filled_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("all")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "all" and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_same_file_by_other_names(tmp_path):
    source = image(tmp_path / "a.png")
    os.link(source, tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path)
    for output in ("a.png", "hard.png", "soft.png", "folder/a.png", "../" + tmp_path.name + "/a.png"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="must not take the place of its source"):
                check_outputs([(tmp_path / output, overwrite)], [source])
    with pytest.raises(ValueError, match="must not take the place of its source"):
        check_outputs([(tmp_path, True)], [source])
    other = image(tmp_path / "other.png")
    check_outputs([(other, True), (tmp_path / "new" / "b.png", False)], [source])
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="other.png is there already$"):
        check_outputs([(other, False)], [source])
    with pytest.raises(ValueError, match="written twice"):
        check_outputs([(tmp_path / "b.png", False), (tmp_path / "folder" / "b.png", False)], [source])
    with pytest.raises(ValueError, match="c.png would be written into .*folder, which is written as a whole"):
        check_outputs([(tmp_path / "folder", True), (tmp_path / "folder" / "c.png", False)], [])
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is there already"):
        check_outputs([(tmp_path / "dangling.png", False)], [])


def test_names_that_differ_in_case(tmp_path):
    source = image(tmp_path / "a.png")
    if (tmp_path / "A.PNG").exists():
        with pytest.raises(ValueError, match="must not take the place of its source"):
            check_outputs([(tmp_path / "A.PNG", True)], [source])
        with pytest.raises(ValueError, match="written twice"):
            check_outputs([(tmp_path / "b.png", False), (tmp_path / "B.png", False)], [source])
    else:
        check_outputs([(tmp_path / "A.PNG", True), (tmp_path / "b.png", False), (tmp_path / "B.png", False)], [source])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where not even root can write")
def test_a_place_that_cannot_be_written_is_named_before_the_work(pipeline, tmp_path):
    with pytest.raises(OSError, match="cannot write /proc/self: "):
        check_outputs([("/proc/self/out.png", False)], [])
    source = film_clip(tmp_path / "in.mkv", 3)
    with pytest.raises(OSError, match="cannot write /proc/self: "):
        run(pipeline, source, Path("/proc/self/out.mkv"))


def test_interpolate_writes_over_nothing(checkpoint, tmp_path, capsys):
    sources = [image(tmp_path / "in" / f"a_{number}.png", number) for number in (1, 2)]
    image(tmp_path / "in" / "there.png")
    before = contents(tmp_path / "in")
    for output, options, message in (
        ("a_1.png", [], "must not take the place of its source"),
        ("a.png", ["--num-frames", "3"], "must not take the place of its source"),
        ("a.png", ["--times", "0.25", "0.5"], "must not take the place of its source"),
        ("a_2.png", ["--overwrite"], "must not take the place of its source"),
        ("there.png", [], "there.png is there already; --overwrite replaces it"),
    ):
        assert (
            main(
                [
                    "interpolate",
                    *map(str, sources),
                    "-o",
                    str(tmp_path / "in" / output),
                    "--checkpoint",
                    "none",
                    *options,
                ]
            )
            == 2
        )
        assert message in capsys.readouterr().err and contents(tmp_path / "in") == before
    output = tmp_path / "in" / "there.png"
    assert (
        main(["interpolate", *map(str, sources), "-o", str(output), "--checkpoint", str(checkpoint), "--overwrite"])
        == 0
    )
    after = contents(tmp_path / "in")
    assert after.pop(output) != before.pop(output) and after == before


def test_video_writes_over_nothing(pipeline, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = film_clip(folder / "clip.partial.mkv", 3)
    os.link(source, folder / "linked.mkv")
    (folder / "there.partial.mkv").write_bytes(b"precious")
    (folder / "file.mkv.parts").write_bytes(b"precious")
    for number in range(3):
        image(folder / "frames" / f"{number}.png", number)
    image(folder / "strip.png")
    before = contents(folder)
    for name, output, options, message in (
        (
            "clip.partial.mkv",
            "clip.mkv",
            {"keep_partial": True, "overwrite": True},
            "clip.partial.mkv must not take the place of its source",
        ),
        ("clip.partial.mkv", "linked.mkv", {"overwrite": True}, "linked.mkv must not take the place of its source"),
        ("clip.partial.mkv", "there.mkv", {"keep_partial": True}, "there.partial.mkv is there already"),
        (
            "clip.partial.mkv",
            "there.mkv",
            {"keep_partial": True, "resume": True},
            "there.partial.mkv is there already",
        ),
        ("clip.partial.mkv", "file.mkv", {}, "file.mkv.parts is needed for parts"),
        ("clip.partial.mkv", "new.mkv", {"preview": folder / "strip.png"}, "strip.png is there already"),
        (
            "frames",
            "new.mkv",
            {"preview": folder / "frames" / "1.png", "overwrite": True},
            "1.png must not take the place of its source",
        ),
        ("frames", "new.mkv", {"preview": folder / "frames" / "3.png"}, "3.png would become one of the images"),
        ("frames/?.png", "new.mkv", {"preview": folder / "frames" / "3.png"}, "3.png would become one of the images"),
        ("frames/%d.png", "frames", {"overwrite": True}, "frames must not take the place of its source"),
    ):
        with pytest.raises(VideoError, match=message):
            run(pipeline, folder / name, folder / output, **options)
        assert contents(folder) == before, (name, output, options)


def test_a_link_to_a_folder_is_not_replaced(pipeline, tmp_path):
    source = film_clip(tmp_path / "in.mkv", 3)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(VideoError, match="link is a link or a mounted disk"):
        run(pipeline, source, tmp_path / "link")


def test_a_folder_of_videos_is_looked_at_before_work_begins(checkpoint, tmp_path, capsys):
    sources, made = tmp_path / "in", tmp_path / "out"
    sources.mkdir()
    made.mkdir()
    for name in ("a.mkv", "b.mkv"):
        film_clip(sources / name, 3)
    os.link(sources / "b.mkv", made / "b.mkv")
    before = contents(tmp_path)
    command = ["video", str(sources), str(made), "--factor", "1", "--checkpoint", str(checkpoint)]
    assert (
        main([*command, "--overwrite"]) == 2
        and "b.mkv must not take the place of its source" in capsys.readouterr().err
    )
    (made / "b.mkv").unlink()
    (made / "b.mkv").write_bytes(b"precious")
    assert main(command) == 2 and "b.mkv is there already; --overwrite replaces it" in capsys.readouterr().err
    assert not (made / "a.mkv").exists() and (made / "b.mkv").read_bytes() == b"precious"
    assert all(path.read_bytes() == data for path, data in before.items() if path.parent == sources)
    assert (
        main([*command, "--overwrite", "--preview", str(tmp_path / "strip.png")]) == 0
        and (tmp_path / "strip.png").exists()
    )
    assert len(decode(made / "b.mkv")) == 3


def test_evaluate_writes_over_nothing(tmp_path):
    root = tmp_path / "frames"
    for number in range(2):
        for view in range(3):
            image(root / str(number) / f"{view}.png", view)
    for output, message in (
        (tmp_path, "must not take the place of its source|is there already, but from no evaluation"),
    ):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            evaluate("triplets", str(root), output, [Baseline("average")], Scorer(["psnr"]))
        assert contents(tmp_path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("precious")
    with pytest.raises(ValueError, match="index.html is there already, but from no evaluation"):
        evaluate("triplets", str(root), tmp_path / "other", [Baseline("average")], Scorer(["psnr"]))
    assert contents(tmp_path / "other") == {tmp_path / "other" / "index.html": b"precious"}
    log = tmp_path / "other" / "runs" / "first" / "events.out.tfevents.1"  # TensorBoard's
    log.parent.mkdir(parents=True)
    log.write_text("log")
    with pytest.raises(ValueError, match="runs is there already, but from no evaluation"):
        evaluate("triplets", str(root), tmp_path / "other", [Baseline("average")], Scorer(["psnr"]))
    assert contents(tmp_path / "other") == {tmp_path / "other" / "index.html": b"precious", log: b"log"}
    for _ in range(2):
        evaluate("triplets", str(root), tmp_path / "results", [Baseline("average")], Scorer(["psnr"]), gallery=0)


def test_names_are_names(pipeline, tmp_path, monkeypatch):
    """A colon would mean a protocol, and a sign of per cent a number."""
    source = film_clip(tmp_path / "in.mkv", 3)
    monkeypatch.chdir(tmp_path)
    for output in ("12:31:10.mp4", "http:a.mkv", "pipe:1.gif", "50%d.avi", "#1?.y4m"):
        assert run(pipeline, source, Path(output)).path.exists() and len(decode(Path("file:" + output))) == 3
    assert not list(tmp_path.glob("*.parts"))


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can be larger, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_of_the_file(pipeline, tmp_path):
    source = write_video(
        tmp_path / "in.mkv", drifting(24), range(24), Fraction(1, 25), codec="ffv1", pixel_format="bgr0"
    )
    for options in ({"codec": "ffv1"}, {"codec": "ffv1", "keep_partial": True}):
        with disk_of(60_000), pytest.raises(OSError, match=r"^cannot write .*/out.mkv: File too large") as caught:
            run(pipeline, source, tmp_path / "out.mkv", **options)
        assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == [source]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    with disk_of(60_000), pytest.raises(OSError, match=r"^cannot write .*/out.png: File too large"):
        write_image(noise, tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".tif", ".ppm", ".png", ".webp"])
def test_a_disk_that_takes_all_but_the_last_bytes_leaves_the_old_image(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    path = tmp_path / f"out{suffix}"
    write_image(noise, path)
    size = path.stat().st_size
    path.write_bytes(b"precious")
    with disk_of(size - 100), pytest.raises(OSError, match=rf"^cannot write .*/out{suffix}: File too large"):
        write_image(noise, path)
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


def test_what_an_encoder_refuses_is_found_before_the_work(pipeline, tmp_path):
    source = write_video(tmp_path / "in.mkv", drifting(3, 8, 8), range(3), Fraction(1, 25), codec="ffv1")
    made = []
    pipeline.unet.register_forward_hook(lambda *arguments: made.append(arguments))
    with pytest.raises(OSError, match=r"cannot write .*out.mkv: [A-Z]") as caught:
        run(pipeline, source, tmp_path / "out.mkv", codec="hevc", factor=2)
    assert "Errno" not in str(caught.value) and not made and list(tmp_path.iterdir()) == [source]
