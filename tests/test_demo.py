"""`madiff demo` as people meet it: in a real browser; and the Space that runs it."""

import ast
import base64
import importlib.util
import io
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.image_io import read_image
from madiff_diffusers.space import GRADIO, REQUIREMENTS, write_space
from tests.conftest import REPOSITORY, moving_picture
from tests.processes import free_port
from tests.video_files import drifting, read, write_video


needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs the extra `demo`")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None, reason="needs Chromium and playwright"
)


def test_options_are_checked_before_a_model_is_loaded(capsys):
    for options, message in (
        (("--max-pixels", 0), "--max-pixels must be more than 0, but is 0"),
        (("--max-seconds", "nan"), "--max-seconds must be more than 0"),
        (("--max-frames", -1), "--max-frames must be more than 0, but is -1"),
        (("--max-waiting", 0), "--max-waiting must be more than 0"),
        (("--port", 70000), "--port must be from 1 to 65535, but is 70000"),
        (("--max-upload", "much"), "--max-upload must be a size such as 500kb, 200mb or 1gb, but is 'much'"),
    ):
        assert main(["demo", "--checkpoint", "no checkpoint", *map(str, options)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"madiff: error: {message}")


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="Gradio is there")
def test_without_gradio_the_extra_is_named(capsys):
    assert (
        main(["demo"]) == 2
        and capsys.readouterr().err == "madiff: error: gradio is missing; pip install 'madiff_diffusers[demo]'\n"
    )


def test_a_space_holds_all_that_it_needs(checkpoint, pipeline, tmp_path, capsys):
    space = tmp_path / "space"
    assert main(["export", "--space", str(space), "--checkpoint", str(checkpoint), "--license", "mit"]) == 0
    assert capsys.readouterr().out.strip() == str(space)
    names = {path.name for path in space.iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md", "LICENSE", "checkpoint", "madiff_diffusers"}
    header = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (
        header["sdk"] == "gradio"
        and header["sdk_version"] == GRADIO
        and f'python_requires=">={header["python_version"]}"' in (REPOSITORY / "setup.py").read_text()
        and header["app_file"] == "app.py"
        and header["license"] == "mit"
    )
    assert len(header["short_description"]) <= 60, "the Hub takes no more"
    app = (space / "app.py").read_text()
    assert ast.parse(app) and "trust_remote_code" not in app
    write_space(tmp_path / "trusted", pipeline, "own", trust_remote_code=True)
    assert '"checkpoint", trust_remote_code=True)' in (tmp_path / "trusted" / "app.py").read_text()
    assert not (space / "madiff_diffusers" / "checkpoints").exists() and not list(space.rglob("__pycache__"))
    frames = [moving_picture(time) for time in (0, 4)]
    loaded = MADiffPipeline.from_pretrained(space / "checkpoint")
    assert np.array_equal(loaded(*frames, num_inference_steps=1, output_type="np").frames.shape, (1, 1, 64, 96, 3))
    assert main(["export", "--space", str(space)]) == 2 and "must not exist yet" in capsys.readouterr().err
    assert (
        main(["export", "--space", str(tmp_path / "new"), "--variant", "fp16"]) == 2
        and "--space takes" in capsys.readouterr().err
    )


def test_a_spaces_requirements_are_the_packages():
    setup = (REPOSITORY / "setup.py").read_text()
    (listed,) = [
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(setup))
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    ]
    assert tuple(listed) == REQUIREMENTS


def serving(command: list, port: int, **settings) -> subprocess.Popen:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    until = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as answer:
                answer.read()
            return process
        except OSError:
            assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
            time.sleep(0.5)


@needs_gradio
def test_uploads_beyond_the_limits_are_refused_before_they_cost_anything(pipeline, tmp_path):
    from madiff_diffusers.demo import Demo, Limits

    demo = Demo(pipeline, Limits(pixels=10_000, seconds=4, frames=100), "tiny")
    video = write_video(tmp_path / "in.mp4", drifting(4), range(4), Fraction(1, 4))
    demo._check_video(video, None, Fraction(1))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="is a list of other files"):
        demo._check_video(playlist, None, Fraction(1))
    still = write_video(tmp_path / "still.mkv", drifting(3), [0, 1, 2], Fraction(1, 25), last=590)
    with pytest.raises(ValueError, match="Videos may last at most 4 seconds here"):
        demo._check_video(still, Fraction(120), Fraction(8))
    # A gigabyte once it is decoded, which a small limit of memory would not allow.
    for name in ("a.png", "b.png"):
        Image.new("L", (9000, 9000)).save(tmp_path / name)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, hard))
    try:
        *_, said = demo._make_pair(str(tmp_path / "a.png"), str(tmp_path / "b.png"), 1, None)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert "Frames may have at most 10000 pixels here, but have 9000x9000" in said[1]
    # So large by its header that Pillow does not open it.
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    *_, said = demo._make_pair(str(tmp_path / "a.png"), str(tmp_path / "a.png"), 1, None)
    assert "Cannot read a.png as an image: Image size (400000000 pixels) exceeds limit" in said[1]


@needs_gradio
@pytest.mark.slow
def test_the_space_serves_its_page_from_its_own_folder(checkpoint, tmp_path):
    assert main(["export", "--space", str(tmp_path / "space"), "--checkpoint", str(checkpoint)]) == 0
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = serving(
        [sys.executable, "app.py"],
        port,
        cwd=tmp_path / "space",
        env={**environment, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"},
    )
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(checkpoint, tmp_path):
    """The demo of the tiny checkpoint in a browser; afterwards the server is stopped, and leaves no files."""
    from playwright.sync_api import sync_playwright

    files, port = tmp_path / "tmp", free_port()
    files.mkdir()
    command = [
        sys.executable,
        "-m",
        "madiff_diffusers",
        "demo",
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--port",
        str(port),
        "--max-seconds",
        "4",
        "--max-pixels",
        "300000",
        "--max-waiting",
        "1",
    ]
    process = serving(command, port, env={**os.environ, "TMPDIR": str(files), "GRADIO_ANALYTICS_ENABLED": "False"})
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        opened = browser.new_page(viewport={"width": 1100, "height": 1000})
        opened.files = files
        opened.goto(f"http://127.0.0.1:{port}")
        opened.wait_for_selector("#prev input[type=file]", state="attached", timeout=60000)
        yield opened
        browser.close()
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert "Traceback" not in printed, printed
    assert not list(files.glob("madiff-demo*")), "no upload and no result stays"


def says(page, status: str, text: str, seconds: float = 120) -> None:
    page.wait_for_function(
        "([id, text]) => document.querySelector(id).innerText.includes(text)",
        arg=[status, text],
        timeout=1000 * seconds,
    )


def clearing(page, place: str):
    """The button that takes an upload away, which is there once it has arrived."""
    return page.locator(f"{place} button[aria-label=Clear], {place} button[aria-label='Remove Image']").first


def upload(page, place: str, path: Path) -> None:
    page.locator(f"{place} input[type=file]").set_input_files(str(path))
    clearing(page, place).wait_for(timeout=30000)


def shown_picture(page) -> np.ndarray:
    data = page.locator("#shown img").get_attribute("src").split(",")[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@needs_gradio
@needs_browser
@pytest.mark.slow
def test_a_pair_in_the_browser(page, checkpoint, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, moment in zip(paths, (0, 6)):
        Image.fromarray(moving_picture(moment)).save(path)
    page.click("#make-pair")
    says(page, "#pair-status", "Both frames are needed")
    for place, path in zip(("#prev", "#next"), paths):
        upload(page, place, path)
    page.click("#make-pair")
    says(page, "#pair-status", "3 made.")
    page.wait_for_selector("#compare img")
    page.wait_for_selector("#instant input[type=range]")
    pipe = MADiffPipeline.from_pretrained(checkpoint)
    expected = pipe(*map(read_image, paths), num_frames=3, generator=torch.Generator().manual_seed(0)).frames[0]
    assert np.array_equal(shown_picture(page), np.array(expected[1])) and "made, at 0.50" in page.inner_text("#shown")
    for instant, label, frame in (("0.25", "made, at 0.25", expected[0]), ("1", "next frame", read_image(paths[1]))):
        page.locator("#instant input[type=range]").fill(instant)
        says(page, "#shown", label, 20)
        assert np.array_equal(shown_picture(page), np.array(frame))

    # What cannot be: told in the page, in one line, without the server's folders.
    broken, large = tmp_path / "broken.png", tmp_path / "large.png"
    broken.write_bytes(paths[0].read_bytes()[:500])
    Image.new("RGB", (700, 500)).save(large)
    for path, message in (
        (broken, "Cannot read broken.png as an image"),
        (large, "at most 300000 pixels here, but have 700x500"),
    ):
        clearing(page, "#next").click()
        upload(page, "#next", path)
        page.click("#make-pair")
        says(page, "#pair-status", message)
        assert "\n" not in page.inner_text("#pair-status").strip() and "/" not in page.inner_text("#pair-status")


@needs_gradio
@needs_browser
@pytest.mark.slow
def test_a_video_in_the_browser(page, tmp_path):
    source = write_video(tmp_path / "clip.mp4", drifting(10), range(10), Fraction(1, 10), sound=1.0)
    page.get_by_role("tab", name="Video").click()
    page.wait_for_selector("#video-in input[type=file]", state="attached")
    page.click("#make-video")
    says(page, "#video-status", "A video is needed")
    upload(page, "#video-in", source)
    page.locator("#fps input[type=number]").fill("30")
    page.click("#make-video")
    says(page, "#video-status", "30 frames, 18 of them made.")
    # It plays, to its end, and has sound.
    page.wait_for_selector("#video-out video", state="attached")
    page.wait_for_function("document.querySelector('#video-out video').readyState >= 2", timeout=30000)
    played = page.evaluate(
        """async () => { const video = document.querySelector('#video-out video'); video.muted = true; await video.play();
        await new Promise(done => { video.onended = done; setTimeout(done, 8000); });
        return [video.ended, video.duration, video.webkitAudioDecodedByteCount > 0, video.getVideoPlaybackQuality().totalVideoFrames]; }"""
    )
    assert played[0] and abs(played[1] - 1) < 0.1 and played[2] and played[3] > 15, played
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "got.mp4")
    made = read(tmp_path / "got.mp4")
    assert len(made.times) == 30 and made.rate == 30 and made.audio["hash"] == read(source).audio["hash"]
    assert not list(page.files.glob("madiff-demo-??????*/*-smooth*")), "the page has its own copy"

    def again(path: Path) -> None:
        clearing(page, "#video-in").click()
        upload(page, "#video-in", path)
        page.click("#make-video")

    (tmp_path / "broken.mp4").write_bytes(source.read_bytes()[:3000])
    again(tmp_path / "broken.mp4")
    says(page, "#video-status", "broken.mp4 as a video")
    assert "\n" not in page.inner_text("#video-status").strip() and str(page.files) not in page.inner_text(
        "#video-status"
    )
    again(write_video(tmp_path / "long.mp4", drifting(60), range(60), Fraction(1, 10)))
    says(page, "#video-status", "at most 4 seconds here")

    # Cancel: the work ends, says so, and leaves nothing; the page goes on to work.
    again(write_video(tmp_path / "slow.mp4", drifting(60, 240, 320), range(60), Fraction(1, 20)))
    says(page, "#video-status", "frames")
    page.click("#cancel-video")
    says(page, "#video-status", "Stopped.")
    until = time.monotonic() + 30
    while list(page.files.glob("madiff-demo-??????*/*-smooth*")):
        assert time.monotonic() < until, "the work ends, and leaves nothing"
        time.sleep(0.2)

    # What waits for another page's work, too; that goes on, also where the other tab's work is cancelled, of which there is none.
    again(tmp_path / "slow.mp4")
    says(page, "#video-status", "frames")
    other = page.context.browser.new_context().new_page()
    other.goto(page.url)
    other.get_by_role("tab", name="Video").click()
    other.wait_for_selector("#video-in input[type=file]", state="attached")
    upload(other, "#video-in", source)
    other.click("#make-video")
    says(other, "#video-status", "Waiting")
    third = other.context.new_page()
    third.goto(page.url)
    third.wait_for_selector("#prev input[type=file]", state="attached")
    third.click("#make-pair")
    says(third, "#pair-status", "Not taken: too many wait already.")
    other.click("#cancel-video")
    says(other, "#video-status", "Stopped.")
    page.get_by_role("tab", name="Two frames").click()
    page.click("#cancel-pair")
    page.get_by_role("tab", name="Video").click()
    says(page, "#video-status", "of them made.")
    again(source)
    says(page, "#video-status", "30 frames, 18 of them made.")
    assert "Stopped." in other.inner_text("#video-status")
