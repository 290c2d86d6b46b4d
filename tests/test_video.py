"""Videos in and out: times, sound, colours and all that a file has besides pictures."""

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from madiff_diffusers import interpolate_frames, interpolate_video
from madiff_diffusers.commands.madiff_cli import build_parser
from madiff_diffusers.scene_cuts import LEAST_CHANGE, change, thumbnail
from madiff_diffusers.video.analysis import analyse
from madiff_diffusers.video.colour import ColourPath, ColourTags, _samples, planar_format
from madiff_diffusers.video.decoding import IMAGE_RATE, Source
from madiff_diffusers.video.destinations import check_output
from madiff_diffusers.video.encoding import analogous_format
from madiff_diffusers.video.errors import VideoError
from madiff_diffusers.video.ffmpeg import open_file
from madiff_diffusers.video.formats import CODECS, CONTAINERS
from madiff_diffusers.video.jobs import VideoJob
from madiff_diffusers.video.memory import USUAL_MEMORY
from madiff_diffusers.video.options import VideoOptions
from madiff_diffusers.video.parts import png_bytes
from tests.conftest import moving_picture
from tests.video_files import decode, drifting, film_clip, phone_clip, read, read_audio, write_video


LOSSLESS = {"codec": "ffv1"}


def run(pipeline, source, output, steps: int | None = 1, **options):
    """With one step of sampling, unless the pictures themselves are looked at."""
    return interpolate_video(pipeline, source, output, steps=steps, progress=False, **options)


def test_what_a_phone_records(pipeline, tmp_path):
    source, out = phone_clip(tmp_path / "phone.mp4"), tmp_path / "out.mp4"
    result = run(pipeline, source, out)
    before, after = read(source), read(out)
    assert result == (out, 28, 13, []) and not (tmp_path / "out.mp4.parts").exists()
    assert after.times[::2] == before.times and after.duration == before.duration
    assert all(b - a == c - b for a, b, c in zip(after.times[::2], after.times[1::2], after.times[2::2]))
    assert after.audio == before.audio and after.audio["codec"] == "aac" and after.audio["language"] == "fra"
    assert after.rotation == before.rotation == 90 and after.size == before.size
    assert after.chapters == before.chapters and len(after.chapters) == 2
    assert {name: after.metadata[name] for name in ("title", "comment")} == {
        "title": "Holiday",
        "comment": "by the sea",
    }
    assert after.colours == before.colours == (1, 1, 1, 1) and after.pixel_format == "yuv420p"
    whole = out.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat"), "it can be shown while it is loaded"


def test_what_a_phone_says_of_itself_is_kept(pipeline, tmp_path):
    said = {"com.apple.quicktime.model": "phone 5"}
    with av.open(str(tmp_path / "in.mov"), "w", container_options={"movflags": "use_metadata_tags"}) as file:
        video = file.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        file.metadata.update(said)
        for frame in drifting(2):
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode(None))
    for name in ("out.mov", "out.mp4"):
        run(pipeline, tmp_path / "in.mov", tmp_path / name)
        assert said.items() <= read(tmp_path / name).metadata.items()


@pytest.mark.parametrize("suffix", ("mp4", "mkv"))
def test_tags_that_are_not_utf8_keep_their_bytes(pipeline, tmp_path, suffix):
    source, out = film_clip(tmp_path / f"in.{suffix}", 2, metadata={"title": "F-te"}), tmp_path / f"out.{suffix}"
    source.write_bytes(source.read_bytes().replace(b"F-te", "Fête".encode("latin-1")))
    run(pipeline, source, out)
    assert "Fête".encode("latin-1") in out.read_bytes()


def test_attachments_whose_names_are_not_utf8_are_kept(pipeline, tmp_path):
    source, film, out = tmp_path / "in.mkv", film_clip(tmp_path / "film.mkv", 2), tmp_path / "out.mkv"
    with av.open(str(film)) as container, av.open(str(source), "w") as file:
        stream = file.add_stream_from_template(container.streams.video[0])
        for name in ("F-te.ttf", "other.ttf"):
            file.add_attachment(name, "font/ttf", 10 * name.encode())
        for packet in container.demux(video=0):
            packet.stream = stream
            file.mux([packet] if packet.size else [])
    name = "Fête.ttf".encode("latin-1")
    source.write_bytes(source.read_bytes().replace(b"F-te.ttf", name))
    assert run(pipeline, source, out).notes == []
    with open_file(out) as container:
        attached = {stream.metadata["filename"]: stream.data for stream in container.streams.attachments}
    assert attached == {name.decode(errors="surrogateescape"): 10 * name, "other.ttf": 10 * b"other.ttf"}


def test_steps_are_as_many_as_are_asked_for(pipeline, tmp_path):
    source, calls = film_clip(tmp_path / "film.mkv", 2), []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    for steps, expected in ((3, 3), (None, pipeline.config.default_num_inference_steps)):
        calls.clear()
        run(pipeline, source, tmp_path / f"{steps}.mkv", steps=steps)
        assert len(calls) == expected != 0


@pytest.mark.parametrize("fps, frames", [("60000/1001", 30), ("25", 13), ("8", 4)])
def test_film_at_other_rates(pipeline, tmp_path, fps, frames):
    source = film_clip(tmp_path / "film.mp4", 12, sound=0.5)
    result = run(pipeline, source, tmp_path / "out.mp4", fps=Fraction(fps))
    after = read(tmp_path / "out.mp4")
    assert len(after.times) == frames == result.frames and after.rate == Fraction(fps)
    assert after.times == [number / Fraction(fps) for number in range(frames)]
    assert abs(after.duration - read(source).duration) <= 1 / Fraction(fps) and after.audio == read(source).audio


def test_a_clock_of_milliseconds_is_taken_for_the_rate_that_it_rounds(pipeline, tmp_path):
    source = film_clip(tmp_path / "film.mkv", 24)
    analysis = analyse(Source(source))
    assert analysis.regular and analysis.unit == Fraction(1001, 24000) and list(analysis.starts) == list(range(24))
    run(pipeline, source, tmp_path / "out.mov", factor=2)
    assert read(tmp_path / "out.mov").times == [number * Fraction(1001, 48000) for number in range(48)]


def test_ten_bits_and_their_colours(pipeline, tmp_path):
    hdr = (1, 9, 9, 16)  # limited range, BT.2020, PQ
    source = film_clip(tmp_path / "hdr.mkv", 6, codec="libx265", pixel_format="yuv420p10le", colours=hdr)
    for name, codec in (
        ("out.mkv", "hevc"),
        ("hevc.mp4", "hevc"),
        ("out.mp4", None),
        ("out.webm", None),
        ("out.mov", "prores"),
    ):
        run(pipeline, source, tmp_path / name, codec=codec)
        after = read(tmp_path / name)
        assert "10" in after.pixel_format and after.colours == hdr and len(after.times) == 12, name
    with av.open(str(tmp_path / "hevc.mp4")) as file:
        assert file.streams.video[0].codec_context.codec_tag == "hvc1", "which Apple's players know"


def test_a_gif(pipeline, tmp_path):
    frames = [Image.fromarray(frame) for frame in drifting(6, 51, 75)]
    frames[0].save(
        tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=[100, 100, 300, 100, 100, 200], loop=0
    )
    result = run(pipeline, tmp_path / "in.gif", tmp_path / "out.mp4")
    after = read(tmp_path / "out.mp4")
    assert after.size == (52, 76) and "no odd sizes" in result.notes[-1] and after.pixel_format == "yuv420p"
    assert after.times[::2] == [Fraction(time, 10) for time in (0, 1, 2, 5, 6, 7)] and after.duration == Fraction(
        9, 10
    )
    assert after.colours == (1, 1, 1, 1)
    source, shown = decode(tmp_path / "in.gif"), decode(tmp_path / "out.mp4")
    assert np.abs(source[3].astype(int) - shown[6][:51, :75]).mean() < 6

    run(pipeline, tmp_path / "in.gif", tmp_path / "out.gif", fps=Fraction(20))
    after = read(tmp_path / "out.gif")
    assert len(after.times) == 18 and after.size == (51, 75) and after.times[1] == Fraction(1, 20)
    assert Image.open(tmp_path / "out.gif").info["loop"] == 0
    again = decode(tmp_path / "out.gif")
    assert np.abs(source[0].astype(int) - again[0]).mean() < 6


def test_nothing_is_made_across_a_cut(pipeline, tmp_path):
    frames = drifting(4) + [255 - frame for frame in drifting(4, start=4)]
    source = write_video(
        tmp_path / "cut.mkv",
        frames,
        range(8),
        Fraction(1, 25),
        codec="ffv1",
        pixel_format="bgr0",
        colours=(2, 0, 1, 1),
    )
    result = run(pipeline, source, tmp_path / "out.mkv", factor=3, **LOSSLESS)
    shown = decode(tmp_path / "out.mkv")
    assert result.frames == len(shown) == 24 and result.made == 6 * 2
    for number in range(9, 12):
        assert np.array_equal(shown[number], frames[3]), number
    assert np.array_equal(shown[12], frames[4]) and not np.array_equal(shown[8], frames[3])
    assert run(pipeline, source, tmp_path / "all.mkv", factor=2, cut_threshold=2.0, **LOSSLESS).made == 7


def test_repeated_frames(pipeline, tmp_path):
    moving = drifting(12)
    frames = [moving[number // 2 * 2] for number in range(12)] + [moving[-1]] * 8 + drifting(4, start=14)
    source = write_video(
        tmp_path / "twos.mkv",
        frames,
        range(24),
        Fraction(1, 24),
        codec="ffv1",
        pixel_format="bgr0",
        colours=(2, 0, 1, 1),
    )
    plain = run(pipeline, source, tmp_path / "plain.mkv", cut_threshold=2.0, **LOSSLESS)
    smooth = run(pipeline, source, tmp_path / "smooth.mkv", cut_threshold=2.0, dedup=True, **LOSSLESS)
    shown = decode(tmp_path / "smooth.mkv")
    assert (
        plain.made == 23
        and plain.frames == smooth.frames == len(shown) == 48
        and read(tmp_path / "smooth.mkv").times == read(tmp_path / "plain.mkv").times
    )
    for number in range(1, 20):
        assert not np.array_equal(shown[number], shown[number - 1]), number
    still = [number for number in range(1, 48) if np.array_equal(shown[number], shown[number - 1])]
    assert set(range(25, 38)) <= set(still), "a picture that stands still is not moved"
    assert smooth.made == 6 * 3 + 1 + 3


@pytest.mark.parametrize("each", [2, 3, 4])
def test_motion_goes_on_across_drawings_that_are_shown_several_times(pipeline, tmp_path, each):
    """Fast motion, whose every drawing changes as much as a cut may: no cut is asked to be found, and none is."""
    drawings = [moving_picture(8 * number, 96, 128) for number in range(6)]
    frames = [drawing for drawing in drawings for _ in range(each)]
    source = write_video(
        tmp_path / "drawn.mkv", frames, range(len(frames)), Fraction(1, 24), codec="ffv1", pixel_format="bgr0"
    )
    assert min(change(thumbnail(a), thumbnail(b)) for a, b in zip(drawings, drawings[1:])) > LEAST_CHANGE
    plain = run(pipeline, source, tmp_path / "plain.mkv", **LOSSLESS)
    smooth = run(pipeline, source, tmp_path / "smooth.mkv", dedup=True, **LOSSLESS)
    assert plain.made == 6 * each - 1 and smooth.made == 5 * (2 * each - 1)


@pytest.mark.parametrize("matrix", [1, 6, 9, 2, 8])
@pytest.mark.parametrize("colour_range", [1, 2])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p10le", "yuv444p", "yuv411p", "yuv420p12le", "gray"])
@pytest.mark.parametrize("size", [(48, 64), (51, 75)])
def test_the_way_to_rgb_and_back_loses_nothing(matrix, colour_range, pixel_format, size):
    tags = ColourTags(colour_range, matrix, 1, 1)
    path = ColourPath(tags, 480)
    rgb = moving_picture(0, *size).astype(np.float32) / 255
    picture = path.from_rgb(rgb, pixel_format)
    back = path.from_rgb(path.to_rgb(picture), pixel_format)
    assert ColourTags.of(back) == tags
    bits = picture.format.components[0].bits
    for mine, theirs in zip(picture.planes, back.planes):
        assert np.array_equal(*(np.frombuffer(plane, np.uint16 if bits > 8 else np.uint8) for plane in (mine, theirs)))
    luma = np.frombuffer(picture.planes[0], np.uint16 if bits > 8 else np.uint8).reshape(size[0], -1)[
        :, : size[1]
    ] / 2 ** (bits - 8)
    assert (luma.min() >= 16 and luma.max() <= 235) == (colour_range == 1)
    # FFmpeg's own conversion, which rounds, tells whether matrix and range are the right ones; it knows no YCgCo.
    if pixel_format == "yuv444p" and matrix != 8:
        theirs = picture.to_ndarray(
            format="rgb24",
            src_colorspace={1: 1, 6: 5, 9: 9}.get(matrix, 5),
            src_color_range=colour_range,
            dst_color_range=2,
        )
        assert np.abs(theirs / 255 - rgb).max() < 0.02


@pytest.mark.parametrize("colour_range, expected", [(1, (59, 85, 214)), (2, (50, 78, 228))])
def test_ycgco_is_that_of_the_standard(colour_range, expected):
    """ITU-T H.273, equations 49 to 51, of red 200."""
    path = ColourPath(ColourTags(colour_range, 8, 1, 1), 480)
    red = path.from_rgb(np.full((16, 16, 3), [200 / 255, 0, 0], np.float32), "yuv444p")
    assert tuple(np.frombuffer(plane, np.uint8)[0] for plane in red.planes) == expected


@pytest.mark.parametrize(
    "matrix, height, red, blue",
    [
        (1, 480, 0.2126, 0.0722),
        (4, 480, 0.30, 0.11),
        (5, 720, 0.299, 0.114),
        (6, 720, 0.299, 0.114),
        (7, 480, 0.212, 0.087),
        (9, 480, 0.2627, 0.0593),
        (10, 480, 0.2627, 0.0593),
        (2, 719, 0.299, 0.114),
        (2, 720, 0.2126, 0.0722),
        (14, 719, 0.299, 0.114),
        (14, 720, 0.2126, 0.0722),
    ],
)
def test_matrices_are_those_of_the_standard(matrix, height, red, blue):
    """ITU-T H.273, table 4: what red and blue are in luma; where no known one is told, by the height."""
    path = ColourPath(ColourTags(1, matrix, 2, 2), height)
    for colour, share in (([1, 0, 0], red), ([0, 0, 1], blue)):
        picture = path.from_rgb(np.full((16, 16, 3), colour, np.float32), "yuv444p16le")
        luma = np.frombuffer(picture.planes[0], np.uint16)[0] / 256
        assert luma == pytest.approx(16 + 219 * share, abs=0.01)


def test_rgb_of_a_wider_gamut_stays_of_that_gamut(pipeline, tmp_path):
    wide = {"codec": "ffv1", "pixel_format": "gbrp10le", "colours": (2, 0, 9, 16)}
    run(pipeline, film_clip(tmp_path / "in.mkv", 2, **wide), tmp_path / "out.mp4")
    assert read(tmp_path / "out.mp4").colours == (1, 1, 9, 16)


@pytest.mark.parametrize("matrix, known", [(8, True), (14, False)])
def test_colours_of_an_unknown_matrix_are_told(pipeline, tmp_path, matrix, known):
    source = film_clip(tmp_path / "in.mkv", 3, colours=(1, matrix, 1, 1), pixel_format="yuv444p", codec="ffv1")
    result = run(pipeline, source, tmp_path / "out.mkv", **LOSSLESS)
    assert any(f"number {matrix} of ITU-T H.273" in note for note in result.notes) != known
    assert read(tmp_path / "out.mkv").colours == (1, matrix, 1, 1)


def planes(path: Path) -> list:
    """All samples of each frame as they are decoded."""
    with av.open(str(path)) as file:
        return [
            np.concatenate(
                [
                    np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width].ravel()
                    for plane in frame.planes
                ]
            )
            for frame in file.decode(video=0)
        ]


@pytest.mark.parametrize("colours", [(1, 6, 6, 6), (1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2)])
def test_originals_in_a_lossless_file_are_what_they_were(pipeline, tmp_path, colours):
    source = film_clip(tmp_path / "in.mkv", 3, colours=colours)
    run(pipeline, source, tmp_path / "out.mkv", **LOSSLESS)
    assert read(tmp_path / "out.mkv").colours == colours
    for frame, shown in zip(planes(source), planes(tmp_path / "out.mkv")[::2]):
        assert np.array_equal(frame, shown)


def test_made_frames_have_the_colours_of_their_neighbours(pipeline, tmp_path):
    """A still picture: what flickers between frames that are made and those that are not is two ways for colours."""
    source = write_video(tmp_path / "still.mkv", drifting(1) * 5, range(5), Fraction(1, 25), colours=(1, 6, 6, 6))
    pipeline.vqvae.decoder.register_forward_hook(
        lambda module, inputs, output: (torch.full_like(output[0], 0.2), *output[1:])
    )
    grey = write_video(
        tmp_path / "grey.mkv",
        [np.full((64, 96, 3), 153, np.uint8)] * 5,
        range(5),
        Fraction(1, 25),
        colours=(1, 6, 6, 6),
    )
    for path in (source, grey):
        run(pipeline, path, tmp_path / "out.mkv", overwrite=True, **LOSSLESS)
        made = decode(tmp_path / "out.mkv")[1::2][:4]
        assert all(np.abs(frame.astype(int) - 153).max() <= 1 for frame in made)
    originals = decode(tmp_path / "out.mkv")[::2]
    assert all(np.abs(frame.astype(int) - 153).max() <= 1 for frame in originals)


@pytest.mark.parametrize(
    "suffix, codec",
    [
        pytest.param(
            suffix,
            codec,
            marks=[]
            if codec == container.codecs[0] or (suffix, codec) in ((".mov", "prores"), (".mkv", "ffv1"))
            else pytest.mark.slow,
        )
        for suffix, container in CONTAINERS.items()
        for codec in container.codecs
    ],
)
def test_every_kind_of_file(pipeline, tmp_path, suffix, codec):
    source, out = phone_clip(tmp_path / "in.mp4", 4), tmp_path / f"out{suffix}"
    # Players keep at most 50 frames a second of a GIF.
    slower = {"slow_motion": Fraction(2), "audio": "drop"} if codec == "gif" else {}
    result = run(pipeline, source, out, **({} if codec in ("gif", "raw") else {"codec": codec}), **slower)
    before, after = read(source), read(out)
    # Where there is but one rate, it is that of the quick frames, 30, and not the mean.
    expected = round(13490 / 90000 * 60) if CONTAINERS[suffix].steady else 8
    assert len(after.times) == expected == result.frames and after.codec == {"raw": "rawvideo"}.get(codec, codec)
    turned = not CONTAINERS[suffix].turns
    assert after.size == ((96, 64) if turned else (64, 96)) and after.rotation == (0 if turned else 90)
    shown, frames = decode(out), decode(source)
    first = np.rot90(frames[0]) if turned else frames[0]
    assert np.abs(first.astype(int) - shown[0]).mean() < (12 if codec == "gif" else 6)
    # AVI and Y4M have one rate, GIF hundredths of a second, Matroska milliseconds and no times below 0.
    offset = after.times[0]
    rounding = {".gif": Fraction(1, 100), ".mkv": Fraction(1, 1000), ".webm": Fraction(1, 1000)}.get(suffix, 0)
    if not CONTAINERS[suffix].steady:
        assert all(
            abs(a - offset - b * slower.get("slow_motion", 1)) <= rounding
            for a, b in zip(after.times[::2], before.times)
        )
    if suffix in (".mp4", ".m4v", ".mov", ".mkv", ".avi"):
        assert after.audio["hash"] == before.audio["hash"]
        assert abs(
            (after.audio["times"][-1] - after.times[0]) - (before.audio["times"][-1] - before.times[0])
        ) < Fraction(3, 100)
    elif suffix == ".webm":
        assert after.audio["codec"] == "opus" and "encoded anew" in result.notes[-1]


def test_images(pipeline, tmp_path):
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(drifting(11)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"shot{number}.png")
    result = run(pipeline, tmp_path / "frames", tmp_path / "out.mkv", image_fps=Fraction(30), **LOSSLESS)
    shown = decode(tmp_path / "out.mkv")
    assert result.frames == 22 and read(tmp_path / "out.mkv").rate == 60
    assert np.array_equal(shown[2 * 10], drifting(11)[10]), "shot10 comes behind shot9, and RGB is kept as it is"
    assert run(pipeline, tmp_path / "frames" / "shot%d.png", tmp_path / "two.mp4", image_fps=Fraction(30)).frames == 22
    assert run(pipeline, tmp_path / "frames" / "shot%01d.png", tmp_path / "ten.mp4").frames == 22, "shot10, too"
    assert run(pipeline, tmp_path / "frames" / "shot1*.png", tmp_path / "three.mp4").frames == 4
    assert read(tmp_path / "three.mp4").rate == 48

    result = run(pipeline, tmp_path / "two.mp4", tmp_path / "made")
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert len(names) == 44 == result.frames and names[0] == "00000000.png" and names[-1] == "00000043.png"
    with pytest.raises(VideoError, match="is there already"):
        run(pipeline, tmp_path / "two.mp4", tmp_path / "made")
    assert run(pipeline, tmp_path / "three.mp4", tmp_path / "made", overwrite=True).frames == 8
    assert len(list((tmp_path / "made").iterdir())) == 8
    (tmp_path / "made" / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(VideoError, match="holds other files"):
        run(pipeline, tmp_path / "three.mp4", tmp_path / "made", overwrite=True)
    assert (tmp_path / "made" / "holiday.jpg").exists()


def test_sixteen_bits_of_images_are_ten_of_video(pipeline, tmp_path):
    (tmp_path / "frames").mkdir()
    ramp = np.tile(np.linspace(0, 65535, 96).astype(np.uint16), (64, 1))
    for number in range(3):
        frame = av.VideoFrame.from_ndarray(np.stack([ramp] * 3, -1), format="rgb48le").reformat(format="rgb48be")
        (tmp_path / "frames" / f"{number}.png").write_bytes(png_bytes(frame))
    run(pipeline, tmp_path / "frames", tmp_path / "out.mp4", image_fps=Fraction(25))
    assert read(tmp_path / "out.mp4").pixel_format == "yuv420p10le"
    run(pipeline, tmp_path / "frames", tmp_path / "made", image_fps=Fraction(25))
    assert av.open(str(tmp_path / "made" / "00000000.png")).streams.video[0].pix_fmt == "rgb48be"


def noise(pixel_format: str, seed: int = 0, size: tuple = (48, 70)) -> av.VideoFrame:
    """A frame of which every sample is any number that its format has."""
    planar = av.VideoFrame(size[1], size[0], planar_format(av.VideoFormat(pixel_format)))
    bits, dice = planar.format.components[0].bits, np.random.default_rng(seed)
    for plane in planar.planes:
        width = plane.line_size // (2 if bits > 8 else 1)
        plane.update(dice.integers(0, 2**bits, (plane.height, width)).astype(np.uint16 if bits > 8 else np.uint8))
    return (
        planar
        if planar.format.name == pixel_format
        else planar.reformat(format=pixel_format, src_color_range=2, dst_color_range=2)
    )


def samples(frame: av.VideoFrame) -> list:
    return [_samples(plane, frame.format).tolist() for plane in frame.planes]


# All that some codec is given, and what decoders give that it is made of.
SOURCES = sorted(
    name
    for name in av.video.format.names
    if not re.search(
        "f16|f32|32[bl]e|96|128|bayer|msb|xyz|^(amf|cuda|d3d11|d3d12|drm_prime|mediacodec|mmal|ohcodec|opencl|qsv|vaapi|vdpau|vulkan)$|^mono|^pal|[1-6]{3}[bl]e$|_byte$|^bgr8|^rgb8|^rgb4|^bgr4|vld|be$",
        name,
    )
)
BUILT = [name for name, kind in CODECS.items() if kind.encoder in av.codecs_available]
ENCODED = sorted({analogous_format(av.VideoFormat(name), codec) for name in SOURCES for codec in BUILT})


@pytest.mark.parametrize("colour_range", [1, 2])
@pytest.mark.parametrize("pixel_format", ENCODED)
def test_every_format_that_is_written_keeps_every_value(pixel_format, colour_range):
    path, frame = ColourPath(ColourTags(colour_range, 6, 1, 1), 480), noise(pixel_format)
    assert samples(path.from_rgb(path.to_rgb(frame), pixel_format)) == samples(frame)


@pytest.mark.parametrize(
    "pixel_format",
    [
        "rgb48be",
        "rgb24",
        "gbrp10le",
        "yuv420p16le",
        "yuv444p12le",
        "yuv422p9le",
        "yuv440p10le",
        "gray16le",
        "gray12le",
        "yuv410p",
    ],
)
def test_originals_reach_lossless_files_bit_for_bit(pipeline, tmp_path, pixel_format):
    frames = [noise(pixel_format, number) for number in range(3)]
    if "rgb" in pixel_format:
        (tmp_path / "in").mkdir()
        for number, frame in enumerate(frames):
            (tmp_path / "in" / f"{number}.png").write_bytes(png_bytes(frame))
        run(pipeline, tmp_path / "in", tmp_path / "made", factor=1)
        for number, frame in enumerate(frames):
            with av.open(str(tmp_path / "made" / f"{number:08d}.png")) as image:
                assert samples(next(image.decode(video=0))) == samples(frame)
    else:
        with av.open(str(tmp_path / "in.mkv"), "w") as file:
            video = file.add_stream("ffv1", rate=25, options={"level": "3", "strict": "-2"})
            video.height, video.width, video.pix_fmt = 48, 70, pixel_format
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = number, Fraction(1, 25)
                file.mux(video.encode(frame))
            file.mux(video.encode(None))
        with av.open(str(tmp_path / "in.mkv")) as file:
            frames = list(file.decode(video=0))
    run(pipeline, tmp_path / ("in" if "rgb" in pixel_format else "in.mkv"), tmp_path / "out.mkv", factor=1, **LOSSLESS)
    with av.open(str(tmp_path / "out.mkv")) as file:
        for shown, frame in zip(file.decode(video=0), frames):
            planar = planar_format(frame.format)
            assert samples(shown if shown.format.name == planar else shown.reformat(format=planar)) == samples(
                frame if "rgb" not in pixel_format else frame.reformat(format=planar)
            )


def test_slow_motion(pipeline, tmp_path):
    source = phone_clip(tmp_path / "in.mp4", 14)
    before = read(source)
    result = run(pipeline, source, tmp_path / "slow.mp4", slow_motion=Fraction(3), audio="stretch")
    after = read(tmp_path / "slow.mp4")
    assert (
        result.frames == 42
        and abs(after.duration - 3 * before.duration) <= Fraction(1, 1000)
        and after.times[::3] == [3 * time for time in before.times]
    )
    assert (
        abs(after.audio["times"][-1] - 3 * before.audio["times"][-1]) < 0.1
        and after.audio["hash"] != before.audio["hash"]
    )
    assert [chapter[1] for chapter in after.chapters] == [3 * chapter[1] for chapter in before.chapters]
    with av.open(str(tmp_path / "slow.mp4")) as file:  # the pitch of a sine stays
        sound = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])[4096:][:32768]
    peak = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))).argmax() * 48000 / len(sound)
    assert abs(peak - 0.05 * 48000 / (2 * np.pi)) < 10
    result = run(pipeline, source, tmp_path / "dropped.mp4", slow_motion=Fraction(3), audio="drop")
    assert read(tmp_path / "dropped.mp4").audio == {} and "left out, as asked" in result.notes[0]


def test_subtitles(pipeline, tmp_path):
    source = film_clip(tmp_path / "in.mkv", 6, subtitle=b"Bonjour", sound=0.9)
    run(pipeline, source, tmp_path / "out.mkv")
    before, after = read(source), read(tmp_path / "out.mkv")
    assert after.subtitles == before.subtitles and after.subtitles[0][1] == b"Bonjour"
    run(pipeline, source, tmp_path / "slow.mkv", slow_motion=Fraction(2), audio="drop")
    assert read(tmp_path / "slow.mkv").subtitles == [(Fraction(2, 5), b"Bonjour")]
    assert "subtitle" in run(pipeline, source, tmp_path / "out.avi").notes[0]


def test_pixels_that_are_not_square(pipeline, tmp_path):
    source = film_clip(tmp_path / "in.mp4", 4, pixel_aspect=Fraction(16, 11))
    for name in ("out.mp4", "out.mkv"):
        run(pipeline, source, tmp_path / name)
        assert read(tmp_path / name).pixel_aspect == Fraction(16, 11)


def test_sound_that_begins_earlier_stays_in_step(pipeline, tmp_path):
    times = [45000 + 3000 * number for number in range(8)]
    source = write_video(tmp_path / "in.mp4", drifting(8), times, Fraction(1, 90000), sound=1.0)
    run(pipeline, source, tmp_path / "out.mp4", fps=Fraction(60000, 1001))
    after = read(tmp_path / "out.mp4")
    assert after.times[0] == Fraction(1, 2) and after.audio == read(source).audio


def test_a_pause_is_shown_and_not_filled(pipeline, tmp_path):
    source = write_video(
        tmp_path / "in.mkv", drifting(4), [0, 40, 1140, 1180], Fraction(1, 1000), codec="ffv1", pixel_format="bgr0"
    )
    assert run(pipeline, source, tmp_path / "out.mkv", fps=Fraction(50)).made == 2
    assert run(pipeline, source, tmp_path / "all.mkv", fps=Fraction(10), max_gap=Fraction(3)).made >= 8


def test_bad_input_says_what_is_allowed(pipeline, tmp_path):
    source = phone_clip(tmp_path / "in.mp4", 4)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="stereo")
        samples.sample_rate = 48000
        file.mux(sound.encode(samples))
        file.mux(sound.encode(None))
    before = sorted(tmp_path.rglob("*"))
    cases = [
        ({"source": "none.mp4"}, "there is no file"),
        ({"source": "text.mp4"}, "cannot read .*text.mp4 as a video"),
        ({"source": "empty.mp4"}, "is empty"),
        ({"source": "sound.mp4"}, "has no video"),
        ({"output": "out.xyz"}, "must end in .mp4"),
        ({"output": "no/out.mp4"}, "there is no folder"),
        ({"output": "in.mp4"}, "must not take the place"),
        ({"output": "text.mp4"}, "is there already"),
        ({"factor": 0}, "`factor` must be an integer from 1 to 64, but is 0"),
        ({"factor": 2, "fps": Fraction(50)}, "either `factor` or `fps`"),
        ({"fps": Fraction(5000)}, "`fps` must be"),
        ({"codec": "prores"}, "`codec` for .mp4 must be one of h264"),
        ({"crf": 70}, "`crf` for h264 must be from 0"),
        ({"preset": "quick"}, "`preset` for h264 must be one of ultrafast"),
        ({"slow_motion": Fraction(1, 2)}, "`slow_motion` must be"),
        ({"slow_motion": 1.0001}, "`slow_motion` must be 1, or from 1001/1000 to 64, but is 1.0001"),
        ({"slow_motion": Fraction(2), "audio": "keep"}, "`audio` must be stretch or drop in slow motion, but is keep"),
        ({"audio": "stretch"}, "`audio` must be keep or drop, but is stretch"),
        ({"image_fps": Fraction(25)}, "which has a rate of its own"),
        ({"source": "*.png"}, "there are no images"),
        ({"seed": -1}, "`seed`"),
        ({"max_memory": 5}, "`max_memory`"),
        ({"output": "out.mkv", "codec": "ffv1", "crf": 3}, "`crf` cannot be set for ffv1"),
    ]
    for changed, message in cases:
        options = {"source": source.name, "output": "out.mp4", **changed}
        with pytest.raises(VideoError, match=message):
            run(pipeline, tmp_path / options.pop("source"), tmp_path / options.pop("output"), **options)
        assert sorted(tmp_path.rglob("*")) == before, changed


def test_options_have_their_defaults_filled_in():
    assert VideoOptions().checked().factor == 2 and VideoOptions(fps=Fraction(60)).checked().factor is None
    assert VideoOptions(slow_motion=Fraction(5, 2), audio="drop").checked().factor == 3
    assert VideoOptions(slow_motion=4).checked().audio == "stretch" and VideoOptions().checked().audio == "keep"


@pytest.mark.parametrize(
    "option, value, text, expected",
    [
        ("fps", 59.94, "59.94", Fraction(60000, 1001)),
        ("fps", np.float32(23.976), "23.976", Fraction(24000, 1001)),
        ("fps", Fraction(2997, 50), "2997/50", Fraction(2997, 50)),
        ("fps", 29.5, "29.5", Fraction(59, 2)),
        ("fps", np.int64(60), "60", Fraction(60)),
        ("image_fps", 29.97, "29.97", Fraction(30000, 1001)),
        ("slow_motion", 2.2, "2.2", Fraction(11, 5)),
        ("slow_motion", Fraction(1001, 1000), "1001/1000", Fraction(1001, 1000)),
        ("slow_motion", Fraction(1001, 960), "1001/960", Fraction(1001, 960)),
        ("max_gap", 0.3, "0.3", Fraction(3, 10)),
        ("max_memory", 2**31, "2GiB", 2**31),
        ("factor", np.int64(3), "3", 3),
        ("preset", 2, "2", "2"),
        ("cut_ratio", 4, "4", 4.0),
        ("seed", 7, "7", 7),
    ],
)
def test_python_and_the_command_line_agree(option, value, text, expected):
    flag = f"--{'input-fps' if option == 'image_fps' else option.replace('_', '-')}"
    parsed = vars(build_parser().parse_args(["video", "in.mp4", "out.mp4", flag, text]))
    for given in (value, parsed[option]):
        assert getattr(VideoOptions(**{option: given}).checked(), option) == expected


def test_the_command_line_has_no_defaults_of_its_own(capsys):
    parsed = vars(build_parser().parse_args(["video", "in.mp4", "out.mp4"]))
    assert {name for name in VideoOptions.__dataclass_fields__ if parsed[name] is not None} == {"dedup", "skip_damage"}
    with pytest.raises(SystemExit):
        build_parser().parse_args(["video", "--help"])
    printed = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for name in ("slow_motion", "cut_threshold", "cut_ratio", "dedup_threshold", "dedup_run", "seed"):
        assert (
            re.search(rf"--{name.replace('_', '-')} .*?\(default: ([\d.]+)\)", printed)[1]
            == f"{float(getattr(VideoOptions, name)):g}"
        ), name
    assert f"(default: {VideoOptions().checked().longest_gap(False)}; between images, any)" in printed
    assert f"(default: {USUAL_MEMORY // 2**30}GiB; on" in printed and f"images (default: {IMAGE_RATE})" in printed


def test_options_are_found_wrong_before_anything_is_read(pipeline, tmp_path):
    source = phone_clip(tmp_path / "in.mp4", 4)
    read_frames = []
    for options, message in (
        ({"factor": 2.5}, "`factor` must be an integer, but is 2.5"),
        ({"factor": True}, "`factor`"),
        ({"steps": 1.5}, "`steps`"),
        ({"dedup_run": "3"}, "`dedup_run`"),
        ({"fps": "fast"}, "`fps`"),
        ({"slow_motion": float("nan")}, "`slow_motion`"),
        ({"max_gap": 0}, "`max_gap`"),
        ({"image_fps": 0.001}, "`image_fps` must be from 1/600 to 1000, but is 0.001"),
        ({"max_memory": "big"}, "`max_memory` must be a size such as 8GiB"),
        ({"fps": "1/0"}, "a fraction"),
        ({"cut_ratio": "x"}, "`cut_ratio`"),
        ({"cut_threshold": float("nan")}, "`cut_threshold`"),
        ({"cut_ratio": "1e999"}, "`cut_ratio` must be a number that floating point can hold"),
        ({"image_fps": float("inf")}, "`image_fps`"),
        ({"slow_motion": 2, "audio": "keep"}, "`audio`"),
    ):
        with pytest.raises(VideoError, match=message):
            VideoJob(
                pipeline, source, tmp_path / "out.mp4", VideoOptions(**options), progress=lambda: read_frames.append(1)
            )
    assert not read_frames


def test_formats_of_pixels():
    for source, codec, expected in (
        ("yuvj420p", "h264", "yuv420p"),
        ("nv12", "hevc", "yuv420p"),
        ("p010le", "hevc", "yuv420p10le"),
        ("bgra", "h264", "yuv420p"),
        ("yuv444p", "av1", "yuv420p"),
        ("yuv420p", "prores", "yuv422p10le"),
        ("yuv444p12le", "prores", "yuv444p10le"),
        ("gray", "h264", "yuv420p"),
        ("gray", "ffv1", "gray"),
        ("pal8", "ffv1", "bgr0"),
        ("gbrp10le", "ffv1", "gbrp10le"),
        ("yuv420p14le", "ffv1", "yuv420p14le"),
        ("rgb48be", "ffv1", "gbrp16le"),
        ("yuva422p10le", "ffv1", "yuv422p10le"),
        ("gbrpf32le", "ffv1", "gbrp16le"),
    ):
        assert analogous_format(av.VideoFormat(source), codec) == expected


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_generator_over_frames(pipeline, output_type):
    frames = drifting(4) + [255 - frame for frame in drifting(4, start=4)]
    encoded = []
    pipeline.vqvae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    taken = []
    stream = interpolate_frames(
        pipeline, (taken.append(number) or frame for number, frame in enumerate(frames)), output_type=output_type
    )
    first = next(stream)
    assert len(taken) <= 5, "frames are taken as they are needed"
    shown = [first, *stream]
    assert len(shown) == 16 and sum(encoded) == 8, "each frame is encoded once"
    as_arrays = {
        "pil": np.array,
        "np": lambda frame: (frame * 255).round(),
        "pt": lambda frame: (frame.permute(1, 2, 0) * 255).round().numpy(),
    }[output_type]
    shown = [as_arrays(frame).astype(np.uint8) for frame in shown]
    assert all(np.array_equal(a, b) for a, b in zip(shown[::2], frames))
    assert (
        np.array_equal(shown[7], frames[3])
        and np.array_equal(shown[15], frames[7])
        and not np.array_equal(shown[5], frames[2])
    )
    expected = pipeline(frames[0], frames[1], generator=torch.Generator().manual_seed(0)).frames[0][0]
    assert np.abs(np.array(expected).astype(int) - shown[1]).max() <= 1
    with pytest.raises(ValueError, match="`factor`"):
        next(interpolate_frames(pipeline, frames, 0))
    with pytest.raises(ValueError, match="single frames of one size"):
        list(interpolate_frames(pipeline, [frames[0], frames[1][:-1]]))


def test_each_frame_is_encoded_once(pipeline, tmp_path):
    encoded = []
    pipeline.vqvae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    run(pipeline, phone_clip(tmp_path / "in.mp4", 9), tmp_path / "out.mp4")
    assert sum(encoded) == 9


def remuxed(
    source: Path,
    target: Path,
    kinds=("video", "audio"),
    shift: Fraction = Fraction(0),
    hole: tuple = (10**6, 10**6),
    cover: bool = False,
) -> Path:
    """A file's packets in another file, later by some seconds and without those of its sound in a hole."""
    with av.open(str(source)) as file, av.open(str(target), "w") as out:
        streams = {
            stream.index: out.add_stream_from_template(stream, opaque=True)
            for stream in file.streams
            if stream.type in kinds
        }
        if cover:
            picture = out.add_mux_stream("png", width=8, height=8)
            picture.time_base, picture.disposition = Fraction(1, 1000), av.stream.Disposition.attached_pic
        for packet in file.demux([file.streams[index] for index in streams]):
            time = packet.dts is not None and packet.dts * packet.time_base
            if packet.dts is None or (packet.stream.type == "audio" and hole[0] <= time < hole[1]):
                continue
            packet.pts, packet.dts = (
                packet.pts + int(shift / packet.time_base),
                packet.dts + int(shift / packet.time_base),
            )
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
        if cover:
            packet = av.Packet(png_bytes(av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), format="rgb24")))
            packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = (
                picture,
                0,
                0,
                Fraction(1, 1000),
                True,
            )
            out.mux(packet)
    return target


def order_of_packets(path: Path) -> list:
    with av.open(str(path)) as file:
        return [float(packet.dts * packet.time_base) for packet in file.demux() if packet.dts is not None]


def test_a_recording_that_begins_at_an_hour(pipeline, tmp_path):
    source = remuxed(phone_clip(tmp_path / "phone.mp4"), tmp_path / "in.ts", shift=Fraction(3600))
    run(pipeline, source, tmp_path / "out.mkv")
    after = read(tmp_path / "out.mkv")
    assert after.times[0] < 1 and len(after.times) == 28
    assert abs(
        (after.audio["times"][0] - after.times[0]) - (read(source).audio["times"][0] - read(source).times[0])
    ) < Fraction(1, 100)
    run(pipeline, source, tmp_path / "slow.mkv", slow_motion=Fraction(2), audio="stretch")
    for path in (tmp_path / "out.mkv", tmp_path / "slow.mkv"):
        order = order_of_packets(path)
        assert max(before - after for before, after in zip(order, order[1:])) < 0.2, "sound lies beside its pictures"


def test_a_hole_in_sound_that_is_encoded_anew(pipeline, tmp_path):
    source = remuxed(film_clip(tmp_path / "film.mp4", 24, sound=1.0), tmp_path / "in.mp4", hole=(0.3, 0.6))
    for name, options, length in (
        ("out.webm", {}, 1),
        ("slow.mp4", {"slow_motion": Fraction(2), "audio": "stretch"}, 2),
    ):
        run(pipeline, source, tmp_path / name, **options)
        assert abs(float(read(tmp_path / name).audio["times"][-1]) - length) < 0.1


def with_sounds(source: Path, path: Path, sounds: list[tuple[str, int]]) -> Path:
    """The pictures of a file, and half a second of each sound, of a codec and rate."""
    with av.open(str(source)) as before, av.open(str(path), "w") as file:
        pictures = file.add_stream_from_template(before.streams.video[0])
        streams = [file.add_stream(codec, rate=rate, layout="mono") for codec, rate in sounds]
        for packet in before.demux(before.streams.video[0]):
            if packet.size:
                packet.stream = pictures
                file.mux(packet)
        for stream, (_, rate) in zip(streams, sounds):
            resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, stream.codec_context.frame_size)
            samples = av.AudioFrame.from_ndarray(
                (np.sin(np.arange(rate // 2) * 0.2) * 8000).astype(np.int16)[None], format="s16", layout="mono"
            )
            samples.sample_rate, samples.pts, samples.time_base = rate, 0, Fraction(1, rate)
            for piece in (*resampler.resample(samples), *resampler.resample(None)):
                file.mux(stream.encode(piece))
            file.mux(stream.encode(None))
    return path


def test_only_the_sound_that_a_file_refuses_is_encoded_anew(pipeline, tmp_path):
    source = with_sounds(
        film_clip(tmp_path / "film.mp4", 12), tmp_path / "in.mkv", [("aac", 48000), ("libmp3lame", 8000)]
    )
    result = run(pipeline, source, tmp_path / "out.mp4")
    assert len(result.notes) == 1 and "stream 2 (audio, mp3float) is encoded anew as aac" in result.notes[0]
    assert read_audio(tmp_path / "out.mp4")["hash"] == read_audio(source)["hash"], "of the first, which is kept"


def sound_of_packets(source: Path, path: Path, samples: int, apart: Fraction, count: int) -> Path:
    """The pictures of a file, and uncompressed sound of 48 kHz in packets of so many samples, so many seconds apart."""
    with av.open(str(source)) as before, av.open(str(path), "w") as file:
        pictures = file.add_stream_from_template(before.streams.video[0])
        sound = file.add_stream("pcm_s16le", rate=48000, layout="mono")
        for packet in before.demux(before.streams.video[0]):
            if packet.size:
                packet.stream = pictures
                file.mux(packet)
        for number in range(count):
            packet = av.Packet(np.full(samples, number, np.int16).tobytes())
            packet.pts = packet.dts = round(1000 * apart * number)
            packet.duration, packet.time_base, packet.stream = (
                max(1, 1000 * samples // 48000),
                Fraction(1, 1000),
                sound,
            )
            file.mux(packet)
    return path


@pytest.mark.parametrize("samples", [40, 12])
@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_packets_shorter_than_a_tick_of_the_clock_are_all_kept(pipeline, tmp_path, suffix, samples):
    film = film_clip(tmp_path / "film.mp4", 12)
    source = sound_of_packets(film, tmp_path / "in.mkv", samples, Fraction(samples, 48000), 24000 // samples)
    run(pipeline, source, tmp_path / f"out{suffix}")
    assert read_audio(tmp_path / f"out{suffix}")["hash"] == read_audio(source)["hash"]


def test_sound_that_is_encoded_anew_stays_in_step(pipeline, tmp_path):
    # Told to be a twentieth shorter than it is.
    film = write_video(tmp_path / "film.mp4", drifting(4), range(4), Fraction(1))
    source = sound_of_packets(film, tmp_path / "in.mkv", 1024, Fraction(95, 100) * Fraction(1024, 48000), 180)
    run(pipeline, source, tmp_path / "out.webm", factor=1)
    end = float(read_audio(source)["times"][-1])
    assert float(read_audio(tmp_path / "out.webm")["times"][-1]) == pytest.approx(end, abs=0.1)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4"])
def test_chapters_of_a_file_that_begins_after_them(pipeline, tmp_path, suffix):
    chapters = [
        {"id": number, "start": begin, "end": end, "time_base": Fraction(1, 1000), "metadata": {"title": name}}
        for number, (begin, end, name) in enumerate([(0, 50, "none"), (50, 400, "one"), (400, 800, "two")])
    ]
    source = write_video(
        tmp_path / "in.mkv", drifting(20), [2 + i for i in range(20)], Fraction(1, 25), chapters=chapters
    )
    run(pipeline, source, tmp_path / f"out{suffix}")
    found = read(tmp_path / f"out{suffix}").chapters
    assert [name for *_, name in found] == ["one", "two"]
    assert found[0][0] == 0 and abs(found[1][0] - Fraction(32, 100)) < Fraction(1, 100)


def test_a_stereo_mode_that_webm_does_not_have(pipeline, tmp_path):
    with av.open(str(tmp_path / "in.mkv"), "w") as file:
        video = file.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        video.metadata["stereo_mode"] = "block_lr"
        for frame in drifting(3):
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode(None))
    assert (
        "stereo mode block_lr cannot be kept in webm"
        in run(pipeline, tmp_path / "in.mkv", tmp_path / "out.webm").notes
    )
    assert run(pipeline, tmp_path / "in.mkv", tmp_path / "out.mkv").notes == []


def test_a_cover_picture(pipeline, tmp_path):
    source = remuxed(phone_clip(tmp_path / "phone.mp4", 4), tmp_path / "in.mp4", cover=True)
    assert run(pipeline, source, tmp_path / "out.mp4").notes == []
    with av.open(str(tmp_path / "out.mp4")) as file:
        covers = [stream for stream in file.streams.video if stream.disposition & av.stream.Disposition.attached_pic]
        assert len(covers) == 1 and [packet.size for packet in file.demux(covers[0]) if packet.size]
    assert "cannot be kept in matroska" in run(pipeline, source, tmp_path / "out.mkv").notes[0]


def test_two_recordings_glued_together(pipeline, tmp_path):
    part = remuxed(phone_clip(tmp_path / "phone.mp4", 40), tmp_path / "part.ts", shift=Fraction(2))
    source = tmp_path / "in.ts"
    source.write_bytes(part.read_bytes() * 2)
    with pytest.raises(VideoError, match="jump back by"):
        run(pipeline, source, tmp_path / "out.mp4")
    result = run(
        pipeline, source, tmp_path / "out.mp4", skip_damage=True, cut_threshold=0.0, max_gap=Fraction(1, 1000)
    )
    assert (
        result.made == 0
        and ["jump back" in note for note in result.notes] == [True, False, False]
        and "nothing is made" in result.notes[-1]
        and len(read(tmp_path / "out.mp4").times) == 80
    )


@pytest.mark.parametrize(
    "turns, expected",
    [
        ((0, True, False), lambda a: a[:, ::-1]),
        ((0, False, True), lambda a: a[::-1]),
        ((90, True, False), None),
        ((180, False, False), lambda a: a[::-1, ::-1]),
    ],
)
def test_mirrored_pictures(pipeline, tmp_path, turns, expected):
    frames = drifting(2)
    with av.open(str(tmp_path / "in.mov"), "w") as file:
        video = file.add_stream("libx264", rate=25, options={"crf": "4"})
        video.height, video.width, video.pix_fmt = 64, 96, "yuv444p"
        video.set_display_rotation(turns[0], hflip=turns[1], vflip=turns[2])
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode(None))
    run(pipeline, tmp_path / "in.mov", tmp_path / "made")
    upright = np.array(Image.open(tmp_path / "made" / "00000000.png")).astype(int)
    if expected is not None:
        assert np.abs(upright - expected(frames[0])).mean() < 3
    else:
        assert (
            upright.shape == (96, 64, 3)
            and min(
                np.abs(upright - turned).mean()
                for turned in (frames[0].transpose(1, 0, 2), frames[0].transpose(1, 0, 2)[::-1, ::-1])
            )
            < 3
        )
    run(pipeline, tmp_path / "in.mov", tmp_path / "out.mov")
    with av.open(str(tmp_path / "in.mov")) as before, av.open(str(tmp_path / "out.mov")) as after:
        matrices = [
            bytes(next(file.decode(video=0)).side_data.get("DISPLAYMATRIX") or b"") for file in (before, after)
        ]
    assert matrices[0] == matrices[1]


def test_what_files_cannot_hold_is_found_at_once(pipeline, tmp_path):
    source = film_clip(tmp_path / "in.mkv", 4, codec="libx265", pixel_format="yuv420p10le")
    assert (
        run(pipeline, source, tmp_path / "out.y4m").frames == 8
        and read(tmp_path / "out.y4m").pixel_format == "yuv420p10le"
    )
    for wrong, message in ({"crf": 60}, "`crf` for h264"), ({"preset": "6"}, "`preset` for h264"):
        with pytest.raises(VideoError, match=message):
            check_output(tmp_path / "out.mkv", VideoOptions(**wrong).checked())
    check_output(tmp_path / "out.webm", VideoOptions(crf=60, preset="6").checked())
    with pytest.raises(VideoError, match="`fps` for .gif must be at most 50"):
        run(pipeline, source, tmp_path / "out.gif", fps=Fraction(120))
    with pytest.raises(ValueError, match="must end in an image format"):
        run(pipeline, source, tmp_path / "out.mp4", preview=tmp_path / "strip.xyz")
    with pytest.raises(VideoError, match="must not take the place of its source"):
        run(pipeline, source, tmp_path, overwrite=True)
    assert source.exists() and not list(tmp_path.glob("*.parts"))


def test_odd_names_and_plain_numbers(pipeline, tmp_path):
    source = film_clip(tmp_path / "12_30.mkv", 4).rename(tmp_path / "12:30 at 50%d.mkv")
    result = run(pipeline, source, tmp_path / "out: a.mp4", fps=59.94, max_gap="1/2")
    assert result.path.exists() and read(result.path).rate == Fraction(60000, 1001)


def test_pictures_of_b_frames_in_avi(pipeline, tmp_path):
    with av.open(str(tmp_path / "in.avi"), "w") as file:
        video = file.add_stream("libx264", rate=25, options={"bf": "2"})
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for frame in drifting(12):
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode(None))
    result = run(pipeline, tmp_path / "in.avi", tmp_path / "out.mp4")
    assert result.frames == 24 and read(tmp_path / "out.mp4").rate == 50 and result.notes == []


def test_grey_that_does_not_tell_its_range_is_full(pipeline, tmp_path):
    ramp = np.repeat(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))[..., None], 3, 2)
    source = write_video(
        tmp_path / "in.mkv",
        [ramp] * 2,
        range(2),
        Fraction(1, 25),
        codec="ffv1",
        pixel_format="gray",
        colours=(0, 2, 2, 2),
    )
    run(pipeline, source, tmp_path / "made")
    shown = np.array(Image.open(tmp_path / "made" / "00000000.png")).astype(int)
    assert abs(int(shown.min()) - int(decode(source)[0].min())) <= 1 and np.abs(shown - decode(source)[0]).max() <= 2


@pytest.mark.parametrize("options", [{"slow_motion": "1001/1000", "factor": 3}, {"slow_motion": 3.01, "factor": 8}])
def test_times_of_a_clock_that_is_too_fine_are_rounded(pipeline, tmp_path, options):
    ticks = [0, 400001, 900007, 1200003, 1700009]  # of 100 nanoseconds
    source = write_video(tmp_path / "fine.mp4", drifting(5), ticks, Fraction(1, 10**7))
    for suffix in (".mp4", ".mkv"):
        result = run(pipeline, source, tmp_path / f"out{suffix}", **options)
        shown = read(tmp_path / f"out{suffix}").times
        assert result.frames == len(shown) == 5 * options["factor"]
        for tick, time in zip(ticks, shown[:: options["factor"]]):
            expected = float(Fraction(options["slow_motion"])) * tick / 10**7
            assert float(time) == pytest.approx(expected, abs=4e-5 if suffix == ".mp4" else 6e-4)


@pytest.mark.parametrize("name, codec", [("out.mov", "prores"), ("out.mkv", "prores"), ("out.mkv", "libx264")])
def test_colours_of_full_range_stay_in_codecs_that_have_limited_range(pipeline, tmp_path, name, codec):
    grey = [np.full((64, 96, 3), value, np.uint8) for value in (10, 10, 240, 240)]
    source = write_video(
        tmp_path / "full.mkv",
        grey,
        range(4),
        Fraction(1, 25),
        codec="ffv1",
        pixel_format="yuv422p",
        colours=(2, 1, 1, 1),
    )
    run(pipeline, source, tmp_path / name, codec=codec.replace("libx264", "h264"), factor=1)
    for before, after in zip(decode(source), decode(tmp_path / name)):
        assert abs(float(before.mean()) - float(after.mean())) < 3


@pytest.mark.parametrize("name", ["out.y4m", "out.mp4", "out.mkv", "out.avi"])
def test_colours_of_images_are_what_readers_of_the_video_see(pipeline, tmp_path, name):
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.fromarray(np.full((64, 96, 3), (220, 30, 40), np.uint8)).save(tmp_path / "images" / f"{number}.png")
    run(pipeline, tmp_path / "images", tmp_path / name, factor=1)
    run(pipeline, tmp_path / name, tmp_path / "back", factor=1)
    back = np.array(Image.open(tmp_path / "back" / "00000000.png"))
    assert np.abs(back[30, 40] - np.array([220, 30, 40])).max() < 4


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_images_of_openexr_with_opacity(pipeline, tmp_path, alpha):
    """Their pixels are multiplied by it already."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        encoder = av.CodecContext.create("exr", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 96, 64, "gbrapf32le", Fraction(1)
        frame = av.VideoFrame(96, 64, "gbrapf32le")
        for plane, value in zip(frame.planes, (0.2, 0.4, 0.6, alpha)):  # green, blue, red
            plane.update(np.full((64, plane.line_size // 4), value, np.float32).tobytes())
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        (tmp_path / "images" / f"{number}.exr").write_bytes(b"".join(map(bytes, packets)))
    run(pipeline, tmp_path / "images", tmp_path / "out", factor=1)
    made = np.array(Image.open(tmp_path / "out" / "00000000.png").convert("RGB"))[30, 40]
    seen = np.array([0.6, 0.2, 0.4]) * (255 if made.max() < 256 else 65535)
    assert np.abs(made - seen).max() < 2


def test_more_frames_than_a_file_can_count_are_refused_or_told(pipeline, tmp_path):
    fast = write_video(tmp_path / "fast.mp4", drifting(6), range(6), Fraction(1, 480))
    for name in ("out.mkv", "out.webm"):
        with pytest.raises(VideoError, match="`factor` 4 makes frames of 1920 a second"):
            run(pipeline, fast, tmp_path / name, factor=4)
    result = run(pipeline, fast, tmp_path / "out.mp4", factor=4)
    assert len(set(read(tmp_path / "out.mp4").times)) == result.frames == 24 and not result.notes
    uneven = write_video(tmp_path / "uneven.mp4", drifting(5), [0, 40, 41, 80, 120], Fraction(1, 1000))
    (note,) = run(pipeline, uneven, tmp_path / "uneven.mkv", factor=2).notes
    assert "less than a millisecond apart, which matroska cannot tell" in note


@pytest.mark.parametrize("suffix", [".mov", ".mp4", ".mkv"])
def test_a_start_timecode_is_not_kept_and_told(pipeline, tmp_path, suffix):
    """Its last number counts frames of the source's rate."""
    source = write_video(
        tmp_path / "in.mov", drifting(4), range(4), Fraction(1, 24), metadata={"timecode": "01:00:00:12"}
    )
    result = run(pipeline, source, tmp_path / f"out{suffix}", factor=2)
    assert "not kept: timecodes of frames" in result.notes
    with av.open(str(tmp_path / f"out{suffix}")) as file:
        assert not any("timecode" in each for tags in (file, *file.streams) for each in tags.metadata)
        assert [stream.type for stream in file.streams] == ["video"]


def test_vp9_takes_times_of_any_clock(pipeline, tmp_path):
    ticks = [0, 400001, 900007, 1200003]
    source = write_video(tmp_path / "in.mp4", drifting(4), ticks, Fraction(1, 10**7))
    assert run(pipeline, source, tmp_path / "out.webm", slow_motion="33.333").frames == 4 * 34
