"""What files have besides plain pixels: kept, converted, or said to be lost; one table, and what it says done."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from madiff_diffusers import interpolate_video
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.files import WRITABLE_FORMATS
from madiff_diffusers.image_io import open_image
from madiff_diffusers.properties import (
    IRRELEVANT_INFO,
    IRRELEVANT_SIDE_DATA,
    OUTPUTS,
    PROPERTIES,
    found_in_image,
    lost,
)
from madiff_diffusers.video.decoding import Source
from madiff_diffusers.video.encoding import Display, Hdr10
from madiff_diffusers.video.formats import CODECS, CONTAINERS
from madiff_diffusers.video.source_properties import hdr10_of
from tests.conftest import REPOSITORY, moving_picture
from tests.video_files import decode, drifting, film_clip, phone_clip, read


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NAMES = {
    "mp4": ".mp4",
    "mov": ".mov",
    "matroska": ".mkv",
    "webm": ".webm",
    "avi": ".avi",
    "gif": ".gif",
    "yuv4mpegpipe": ".y4m",
    "folder": "PNG folder",
    "image": "`interpolate`",
}


def notes(pipeline, source: Path, output: Path, **options) -> list:
    return interpolate_video(pipeline, source, output, progress=False, overwrite=True, factor=1, **options).notes


def test_all_that_ffmpeg_knows_is_in_the_table():
    rows = [kind for each in PROPERTIES.values() for kind in each.side_data] + list(IRRELEVANT_SIDE_DATA)
    assert sorted(rows) == list(range(32)), "each kind once"
    assert {kind.value for kind in Type} <= set(rows)
    assert set(OUTPUTS) == {container.format for container in CONTAINERS.values()} | {"folder", "image"}
    known = {*OUTPUTS, *CODECS, *WRITABLE_FORMATS.values()}
    assert all(
        known.issuperset((*each.kept, *each.converted, *each.meaningless, *each.told)) for each in PROPERTIES.values()
    )


def picture(mode: str) -> Image.Image:
    image = Image.fromarray(moving_picture(0, 32, 48))
    if mode == "I;16":
        return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    return (
        image.convert("L").convert(mode)
        if mode in "LAIF1"
        else image.convert("RGBA").convert(mode)
        if mode == "PA"
        else image.convert(mode)
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp", ".gif", ".ppm"])
def test_all_that_pillow_knows_is_in_the_table(suffix):
    """Of plain images, nothing is said; of others, what they have."""
    format_name, modes = {**WRITABLE_FORMATS, ".gif": "GIF"}[suffix], ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16")
    plain = 0
    for mode in modes:
        file = io.BytesIO()
        try:
            picture(mode).save(file, format_name)
        except (OSError, KeyError, ValueError):
            continue  # the format has no such mode
        opened, plain = Image.open(file), plain + 1
        assert found_in_image(opened) - {"resolution"} == ({"bits"} if opened.mode.startswith("I") else set()), (
            mode
        )  # BMP always has a resolution
    assert plain >= 2
    known = {*IRRELEVANT_INFO, *(name for each in PROPERTIES.values() for name in each.info)}
    exif = Image.Exif()
    exif[0x10F], exif[0x112] = "camera", 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "me")
    rich = io.BytesIO()
    picture("RGB").save(
        rich,
        format_name,
        icc_profile=PROFILE,
        exif=exif.tobytes(),
        dpi=(300, 150),
        comment="hello",
        pnginfo=text,
        **({"tiffinfo": {270: "hello"}} if suffix == ".tif" else {}),
    )
    image = Image.open(rich)
    assert set(image.info) - known <= {"Author"}
    expected = {
        ".png": {"profile", "EXIF", "resolution", "pixel aspect", "comments", "orientation"},
        ".jpg": {"profile", "EXIF", "resolution", "pixel aspect", "comments", "orientation"},
        ".tif": {"profile", "EXIF", "resolution", "pixel aspect"},
        ".webp": {"profile", "EXIF", "orientation"},
        ".bmp": {"resolution", "pixel aspect"},
        ".gif": {"comments"},
        ".ppm": set(),
    }
    assert found_in_image(image) == expected[suffix]


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_row_of_the_table_is_noted_where_it_is_lost(output):
    codecs = next(
        (container.codecs for container in CONTAINERS.values() if container.format == output), ("PNG", "PPM")
    )
    for key, row in PROPERTIES.items():
        for codec in codecs:
            said = lost({key}, output, codec)
            assert said == (
                [f"not kept: {row.name}"] if row.fate(output, codec) == "noted" and output not in row.told else []
            ), key
    everything = lost(PROPERTIES, output, codecs[0])
    assert len(everything) == len(set(everything)) and lost((), output, codecs[0]) == []


def cell(row, output: str) -> str:
    codecs = next(
        (container.codecs for container in CONTAINERS.values() if container.format == output),
        WRITABLE_FORMATS.values() if output == "image" else (),
    )
    fates = {codec: row.fate(output, codec) for codec in dict.fromkeys(codecs) or (None,)}
    if len(set(fates.values())) == 1:
        return next(iter(fates.values())) or "–"
    return f"kept ({', '.join(codec for codec, fate in fates.items() if fate == 'kept')})"


def test_the_table_in_the_docs_is_that_of_the_code():
    lines = [f"| | {' | '.join(NAMES[output] for output in OUTPUTS)} |", "|---" * (len(OUTPUTS) + 1) + "|"]
    lines += [f"| {row.name} | {' | '.join(cell(row, output) for output in OUTPUTS)} |" for row in PROPERTIES.values()]
    table = (REPOSITORY / "docs" / "properties.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in table, "\n".join(lines)


def interpolated(checkpoint, capsys, prev: Path, next_: Path, out: Path) -> list:
    """Notes of the command."""
    assert (
        main(
            [
                "interpolate",
                *map(str, (prev, next_, "-o", out, "--checkpoint", checkpoint, "--steps", 1, "--overwrite")),
            ]
        )
        == 0
    )
    return [
        line.removeprefix("madiff: note: ")
        for line in capsys.readouterr().err.splitlines()
        if "madiff: note: " in line
    ]


def saved(path: Path, image: Image.Image, **settings) -> Path:
    image.save(path, **settings)
    return path


def names(*keys: str) -> list:
    return [f"not kept: {PROPERTIES[key].name}" for key in keys]


def test_a_resolution_that_a_format_cannot_hold(checkpoint, tmp_path, capsys):
    """Of microscopes, say, or faulty: the work is not lost by it, and no other number takes its place."""
    sources = {}
    for name, across, down in (
        ("fine", (70000, 1), (70000, 1)),
        ("mad", (4 * 10**9, 1), (4 * 10**9, 1)),
        ("none", (72, 1), (0, 0)),
    ):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[282], tags[283], tags[296] = TiffImagePlugin.IFDRational(*across), TiffImagePlugin.IFDRational(*down), 2
        sources[name] = saved(tmp_path / f"{name}.tif", Image.fromarray(moving_picture(0, 48, 64)), tiffinfo=tags)
    for name, suffix, kept, said in (
        ("fine", "jpg", None, ["not kept: resolution of 70000 pixels per inch; JPEG has room for 65535"]),
        ("fine", "png", 70000, []),
        ("mad", "png", None, ["not kept: resolution of 4e+09 pixels per inch; PNG has room for 5e+07"]),
        ("none", "png", None, []),
    ):
        output = tmp_path / f"{name}-out.{suffix}"
        assert interpolated(checkpoint, capsys, sources[name], sources[name], output) == said
        dpi = Image.open(output).info.get("dpi")
        assert dpi is None if kept is None else np.allclose(dpi, kept)


def test_an_image_keeps_its_profile_and_resolution(checkpoint, tmp_path, capsys):
    sources = [
        saved(
            tmp_path / f"{number}.png",
            Image.fromarray(moving_picture(number, 48, 64)),
            icc_profile=PROFILE,
            dpi=(300, 300),
        )
        for number in range(2)
    ]
    for name in ("out.png", "out.jpg", "out.tif"):
        assert interpolated(checkpoint, capsys, *sources, tmp_path / name) == []
        info = Image.open(tmp_path / name).info
        assert info["icc_profile"] == PROFILE and np.allclose(info["dpi"], 300, atol=0.1)
    assert interpolated(checkpoint, capsys, *sources, tmp_path / "out.webp") == names("resolution")
    assert Image.open(tmp_path / "out.webp").info["icc_profile"] == PROFILE
    assert interpolated(checkpoint, capsys, *sources, tmp_path / "out.ppm") == names("resolution", "profile")
    made = {
        name: np.array(Image.open(tmp_path / name).convert("RGB")).astype(int)
        for name in ("out.png", "out.webp", "out.jpg")
    }
    assert np.array_equal(made["out.png"], made["out.webp"]), "WebP without loss"
    assert np.abs(made["out.png"] - made["out.jpg"]).mean() < 3
    with Image.open(tmp_path / "out.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3, "colours as fine as the picture"
    plain = saved(tmp_path / "plain.png", Image.fromarray(moving_picture(1, 48, 64)), dpi=(300, 300))
    assert interpolated(checkpoint, capsys, sources[0], plain, tmp_path / "mixed.png") == [
        "PREV and NEXT have different colour profiles; the result has that of PREV, or none"
    ]


def test_what_an_image_loses_is_said(checkpoint, tmp_path, capsys):
    image, exif, text = Image.fromarray(moving_picture(0, 48, 64)), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x10F] = "camera"
    text.add_text("Author", "me")
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    grey16 = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    opaque = image.convert("RGBA")
    grey_profile = bytearray(PROFILE)
    grey_profile[16:20] = b"GRAY"
    cases = [
        ("exif.jpg", image, {"exif": exif}, ["EXIF"]),
        ("text.png", image, {"pnginfo": text}, ["comments"]),
        ("clear.png", clear, {}, ["transparency"]),
        ("grey16.png", grey16, {}, ["bits"]),
        ("pages.tif", image, {"save_all": True, "append_images": [image]}, ["pages"]),
        ("opaque.png", opaque, {}, []),
        ("cmyk.jpg", image.convert("CMYK"), {}, []),
        ("opaque.gif", image, {}, []),
        ("plain.jpg", image, {}, []),
        ("grey.png", image.convert("L"), {"icc_profile": bytes(grey_profile)}, ["other profile"]),
    ]
    for name, source, settings, keys in cases:
        path = saved(tmp_path / name, source, **settings)
        assert interpolated(checkpoint, capsys, path, path, tmp_path / "out.png") == names(*keys), name


def test_a_plain_video_loses_nothing_but_what_is_said(pipeline, tmp_path):
    plain = film_clip(tmp_path / "plain.mp4", 2)
    assert all(notes(pipeline, plain, tmp_path / f"out{suffix}") == [] for suffix in (".mp4", ".mkv", ".mov", ".webm"))
    phone = phone_clip(tmp_path / "phone.mp4", 4)
    lost = names("sound", "chapters", "metadata")
    *before, steady = notes(pipeline, phone, tmp_path / "out")
    assert notes(pipeline, phone, tmp_path / "out.gif") == lost == before and "has no steady rate" in steady
    assert names("chapters")[0] in notes(pipeline, phone, tmp_path / "out.avi")
    fine = film_clip(tmp_path / "fine.mkv", 2, pixel_format="yuv444p")
    assert notes(pipeline, fine, tmp_path / "out.webm", codec="av1") == [
        "av1 keeps one colour for 2x2 pixels (yuv420p)"
    ]
    deep = film_clip(tmp_path / "deep.mkv", 2, codec="ffv1", pixel_format="yuv420p12le")
    assert notes(pipeline, deep, tmp_path / "out.mp4") == ["h264 keeps 10 bits of the source's 12 (yuv420p10le)"]


def test_what_frames_carry(pipeline, tmp_path):
    hdr = (
        "hdr10=1:master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1):max-cll=1000,400"
    )
    source = film_clip(
        tmp_path / "hdr.mkv",
        2,
        codec="libx265",
        pixel_format="yuv420p10le",
        colours=(1, 9, 9, 16),
        options={"x265-params": hdr},
    )
    assert (
        notes(pipeline, source, tmp_path / "out.mp4", codec="h264")
        == names("HDR10")
        == notes(pipeline, source, tmp_path / "out.mkv", codec="ffv1")
    )
    display = Display(
        tuple(map(Fraction, "0.68 0.32 0.265 0.69 0.15 0.06 0.3127 0.329".split())),
        Fraction(1, 10000),
        Fraction(1000),
    )
    told = Hdr10(display, 1000, 400)
    assert hdr10_of(Source(source)) == told
    for name in ("out.mp4", "out.mkv", "out.mov", "out.webm"):
        assert notes(pipeline, source, tmp_path / name) == [], name
        kept, *light = hdr10_of(Source(tmp_path / name))
        assert (
            light == [1000, 400]
            and all(
                abs(a - b) < 1e-4
                for a, b in zip((*kept.colours, kept.darkest), (*display.colours, display.darkest), strict=True)
            )
            and abs(kept.brightest - 1000) < 0.01
        )
    light_alone = film_clip(
        tmp_path / "light.mkv",
        2,
        codec="libx265",
        pixel_format="yuv420p10le",
        colours=(1, 9, 9, 16),
        options={"x265-params": "hdr10=1:max-cll=900,300"},
    )
    assert hdr10_of(Source(light_alone)) == Hdr10(None, 900, 300)
    for name in ("light.mp4", "light.webm"):
        assert notes(pipeline, light_alone, tmp_path / name) == [], name
        assert hdr10_of(Source(tmp_path / name)) == Hdr10(None, 900, 300), name
    assert notes(pipeline, source, tmp_path / "out.y4m") == names("matrix", "primaries", "HDR10")
    stereo = film_clip(tmp_path / "stereo.mkv", 2, options={"x264-params": "frame-packing=3"})
    assert notes(pipeline, stereo, tmp_path / "out.mp4") == names("stereo")
    with av.open(str(stereo)) as file, av.open(str(tmp_path / "tagged.mkv"), "w") as tagged:
        stream = tagged.add_stream_from_template(file.streams.video[0], opaque=True)
        stream.metadata["stereo_mode"] = "left_right"
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                tagged.mux(packet)
    assert notes(pipeline, tmp_path / "tagged.mkv", tmp_path / "out.mkv") == [] and notes(
        pipeline, tmp_path / "tagged.mkv", tmp_path / "out.mp4"
    ) == names("stereo tag")
    with av.open(str(tmp_path / "out.mkv")) as file:
        assert file.streams.video[0].metadata["stereo_mode"] == "left_right"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".y4m", ".avi", ""])
def test_pixels_that_are_not_square_are_kept_or_noted(pipeline, tmp_path, suffix):
    source, out = film_clip(tmp_path / "in.mkv", 2, pixel_aspect=Fraction(16, 11)), tmp_path / f"out{suffix}"
    said = notes(pipeline, source, out)
    if suffix in (".webm", ".y4m"):
        assert said == names("pixel aspect", *(["matrix"] if suffix == ".y4m" else []))
    elif suffix:
        assert said == [] and abs(read(out).pixel_aspect - Fraction(16, 11)) < (
            0.01 if suffix == ".gif" else 1e-9
        )  # GIF has 1/64
    else:
        assert said == [] and Image.open(out / "00000000.png").info["aspect"] == (11, 16), "PNG has pixels to the unit"


def test_wide_pixels_are_tall_in_a_picture_that_was_turned(pipeline, tmp_path):
    source = film_clip(tmp_path / "in.mp4", 2, pixel_aspect=Fraction(16, 11), rotation=90)
    notes(pipeline, source, tmp_path / "out.avi")
    before, after = read(source), read(tmp_path / "out.avi")
    assert after.size == before.size[::-1] and (before.rotation, after.rotation) == (90, 0)
    assert (before.pixel_aspect, after.pixel_aspect) == (Fraction(16, 11), Fraction(11, 16))


def test_images_with_pixels_that_are_not_square(pipeline, checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(2):
        Image.fromarray(moving_picture(number)).save(tmp_path / "in" / f"{number}.png", dpi=(110, 160))
    assert notes(pipeline, tmp_path / "in", tmp_path / "out.mp4") == ["h264 keeps one colour for 2x2 pixels (yuv420p)"]
    assert abs(read(tmp_path / "out.mp4").pixel_aspect - Fraction(16, 11)) < 0.01
    assert notes(pipeline, tmp_path / "in", tmp_path / "made") == []
    across, down = Image.open(tmp_path / "made" / "00000000.png").info["aspect"]
    assert abs(down / across - 16 / 11) < 0.01
    assert (
        interpolated(
            checkpoint, capsys, tmp_path / "in" / "0.png", tmp_path / "made" / "00000001.png", tmp_path / "mid.png"
        )
        == []
    )
    assert np.allclose(Image.open(tmp_path / "mid.png").info["dpi"], (110, 160), atol=0.1)


def transparent_gif(path: Path) -> Path:
    frames = []
    for number in range(3):
        frame = Image.new("P", (64, 48), 0)
        frame.putpalette([0, 0, 0, 250, 250, 250, 0, 200, 0])
        frame.paste(1, (0, 0, 64, 24))
        frame.paste(2, (8 + 4 * number, 30, 20 + 4 * number, 42))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, transparency=1, disposal=2)
    return path


def test_transparency_is_shown_on_black_and_noted(pipeline, tmp_path):
    source = transparent_gif(tmp_path / "clear.gif")
    for name in ("out.mkv", "out.gif"):
        options = {"codec": "ffv1"} if name == "out.mkv" else {}
        assert notes(pipeline, source, tmp_path / name, **options) == names("transparency")
        shown = decode(tmp_path / name)[0]
        assert shown[2:20].max() < 4 and shown[32:40, 10:18, 1].min() > 150
    frames = [Image.fromarray(frame).quantize(64) for frame in drifting(2, 48, 64)]
    frames[0].save(tmp_path / "opaque.gif", save_all=True, append_images=frames[1:], duration=100)
    assert notes(pipeline, tmp_path / "opaque.gif", tmp_path / "out.mkv", codec="ffv1") == []
    opaque = film_clip(tmp_path / "opaque.mkv", 2, codec="ffv1", pixel_format="yuva420p")
    assert notes(pipeline, opaque, tmp_path / "out.mp4") == [], "an alpha channel that lets nothing through"


def test_transparency_that_the_decoder_leaves_out(pipeline, tmp_path):
    with av.open(str(tmp_path / "alpha.webm"), "w") as file:
        video = file.add_stream("libvpx-vp9", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuva420p"
        video.metadata["alpha_mode"] = "1"
        for number, frame in enumerate(drifting(2)):
            picture = av.VideoFrame.from_ndarray(
                np.dstack([frame, np.full(frame.shape[:2], 100, np.uint8)]), format="rgba"
            )
            picture.pts, picture.time_base = number, Fraction(1, 25)
            file.mux(video.encode(picture.reformat(format="yuva420p")))
        file.mux(video.encode(None))
    assert notes(pipeline, tmp_path / "alpha.webm", tmp_path / "out.webm") == names("alpha stream")
    with av.open(str(tmp_path / "out.webm")) as file:
        assert not [key for key in file.streams.video[0].metadata if key.lower() == "alpha_mode"]


def test_a_folder_of_images_of_which_some_have_more(pipeline, tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x10F] = "camera"
    for number, settings in enumerate([{}, {"icc_profile": PROFILE}, {"exif": exif}]):
        Image.fromarray(moving_picture(number)).save(tmp_path / "in" / f"{number}.webp", lossless=True, **settings)
    assert notes(pipeline, tmp_path / "in", tmp_path / "made") == names("profile", "EXIF")
    for number in range(2):
        Image.fromarray(moving_picture(number)).convert("CMYK").save(tmp_path / "in" / f"{number}.jpg")
    assert notes(pipeline, tmp_path / "in" / "*.jpg", tmp_path / "made") == []


def test_opening_an_image_tells_what_it_has(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    opened = open_image(
        saved(
            tmp_path / "turned.jpg",
            Image.fromarray(moving_picture(0, 32, 48)),
            exif=exif,
            dpi=(300, 150),
            icc_profile=PROFILE,
        )
    )
    assert opened.image.size == (32, 48) and opened.resolution == (150, 300) and opened.profile == PROFILE
    assert opened.found == {"orientation", "profile", "resolution", "pixel aspect"}
