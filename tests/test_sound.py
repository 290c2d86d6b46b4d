"""Sound of kinds that files take, refuse, or refuse only at their end."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from madiff_diffusers import interpolate_video
from tests.video_files import drifting


CHANNELS = {"mono": 1, "stereo": 2, "5.1": 6, "7.1": 8}


def with_sound(
    path: Path, codec: str, layout: str, pictures: str = "libx264", begins: int = 0, format_name: str | None = None
) -> Path:
    """A second of pictures and a tone, from second `begins` on."""
    with av.open(str(path), "w", format=format_name) as file:
        video, sound = file.add_stream(pictures, rate=25), file.add_stream(codec, rate=48000)
        video.width, video.height, video.pix_fmt, sound.layout = 96, 64, "yuv420p", layout
        video.codec_context.max_b_frames = 0
        for number, picture in enumerate(drifting(25)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number + 25 * begins, Fraction(1, 25)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        samples = sound.codec_context.frame_size or 960
        for number in range(48000 // samples):
            wave = (8000 * np.sin(0.05 * (samples * number + np.arange(samples)))).astype(np.int16)
            array = np.repeat(wave, CHANNELS[layout])[None]
            frame = av.AudioFrame.from_ndarray(array, format="s16", layout=layout)
            frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
            frame.pts = samples * number + 48000 * begins
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    return path


def sound_of(path: Path) -> tuple[str, float, float, int]:
    """Codec, seconds, loudness (root mean square of samples in [-1, 1]) and channels."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler("fltp", "mono", 48000)
        pieces = [piece for frame in container.decode(stream) for piece in resampler.resample(frame)]
        samples = np.concatenate([piece.to_ndarray()[0] for piece in pieces])
        return (
            stream.codec_context.name,
            len(samples) / 48000,
            float(np.sqrt((samples**2).mean())),
            stream.codec_context.layout.nb_channels,
        )


@pytest.mark.parametrize("codec, layout", [("pcm_s16le", "stereo"), ("pcm_s16le", "mono"), ("pcm_s24le", "stereo")])
def test_uncompressed_sound_of_an_avi_reaches_an_mp4(pipeline, tmp_path, codec, layout):
    """MP4 refuses a layout that AVI does not tell, and only when the file ends."""
    source = with_sound(tmp_path / "in.avi", codec, layout, pictures="mpeg4")
    result = interpolate_video(pipeline, source, tmp_path / "out.mp4", factor=1, progress=False)
    _, seconds, loudness, channels = sound_of(tmp_path / "out.mp4")
    assert seconds == pytest.approx(1, abs=0.05) and channels == CHANNELS[layout]
    assert loudness == pytest.approx(sound_of(source)[2], rel=0.1)
    assert all("cannot be kept" not in note for note in result.notes)


def test_sound_that_mov_refuses_is_encoded_anew(pipeline, tmp_path):
    source = with_sound(tmp_path / "in.mkv", "libopus", "stereo")
    result = interpolate_video(pipeline, source, tmp_path / "out.mov", factor=1, progress=False)
    name, seconds, _, _ = sound_of(tmp_path / "out.mov")
    assert name == "aac" and seconds == pytest.approx(1, abs=0.05)
    assert any("is encoded anew as aac" in note for note in result.notes)


@pytest.mark.parametrize("options, length", [({"factor": 1}, 2), ({"slow_motion": 2, "factor": 1}, 4)])
def test_sound_that_changes_its_layout_is_encoded_as_it_began(pipeline, tmp_path, options, length):
    pieces = [
        with_sound(tmp_path / f"{layout}.ts", "ac3", layout, "mpeg2video", begins, "mpegts")
        for begins, layout in ((1, "stereo"), (2, "5.1"))
    ]
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(path.read_bytes() for path in pieces))
    interpolate_video(pipeline, source, tmp_path / "out.webm", progress=False, **options)
    _, seconds, loudness, channels = sound_of(tmp_path / "out.webm")
    assert seconds == pytest.approx(length, abs=0.15) and channels == 2 and loudness > 0.05


def test_channels_that_are_lost_are_told(pipeline, tmp_path):
    source = with_sound(tmp_path / "in.mkv", "flac", "7.1")
    result = interpolate_video(pipeline, source, tmp_path / "out.mp4", slow_motion=2, factor=1, progress=False)
    assert any("has 8 channels, of which 2 are made" in note for note in result.notes)


@pytest.mark.parametrize("hole", [500, 700])
@pytest.mark.parametrize("name, slow_motion", [("out.webm", 1), ("out.mkv", 2)])
def test_sound_behind_a_long_silence_stays_in_its_place(pipeline, tmp_path, hole, name, slow_motion):
    with av.open(str(tmp_path / "in.mkv"), "w") as file:
        video, sound = file.add_stream("mpeg4", rate=1), file.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt, sound.layout = 32, 32, "yuv420p", "mono"
        for second in range(0, 801, 100):
            frame = av.VideoFrame.from_ndarray(drifting(1, 32, 32)[0], format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = second, Fraction(1)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for begin in (0, hole):
            for number in range(8):
                wave = (8000 * np.sin(0.5 * np.arange(1024))).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 8000, 8000 * begin + 1024 * number, Fraction(1, 8000)
                file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    interpolate_video(
        pipeline, tmp_path / "in.mkv", tmp_path / name, factor=1, slow_motion=slow_motion, progress=False
    )
    with av.open(str(tmp_path / name)) as file:
        heard = [
            float(frame.pts * frame.time_base)
            for frame in file.decode(audio=0)
            if np.abs(frame.to_ndarray()).max() > 0.05
        ]
    begins = [time for before, time in zip([-10, *heard], heard) if time - before > 5]
    assert begins == pytest.approx([0, slow_motion * hole], abs=0.3)


@pytest.mark.parametrize("codec, slow_motion", [("ac3", 2), ("libopus", 1)])
def test_six_channels_become_two_where_the_encoder_has_no_six(pipeline, tmp_path, codec, slow_motion):
    source = with_sound(tmp_path / "in.mkv", codec, "5.1")
    result = interpolate_video(
        pipeline, source, tmp_path / "out.avi", factor=1, slow_motion=slow_motion, progress=False
    )
    assert any("has 6 channels, of which 2 are made" in note for note in result.notes)
    _, seconds, loudness, channels = sound_of(tmp_path / "out.avi")
    assert channels == 2 and seconds == pytest.approx(slow_motion, abs=0.15) and loudness > 0.01


def test_sound_that_an_edit_list_cuts_off_does_not_move_the_rest(pipeline, tmp_path):
    """Decoders need some of it to begin with, which files without times would begin with."""
    with av.open(str(tmp_path / "in.mp4"), "w") as file:
        video, sound = file.add_stream("libx264", rate=25), file.add_stream("aac", rate=48000)
        video.width, video.height, video.pix_fmt, sound.layout = 96, 64, "yuv420p", "mono"
        for number, picture in enumerate(drifting(40)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number - 10, Fraction(1, 25)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for number in range(75):
            wave = np.full((1, 1024), 16000 if number % 10 == 0 else 0, np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 1024 * number - 19200, Fraction(1, 48000)
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))

    def heard(path: Path) -> float:
        with av.open(str(path)) as file:
            begins = float(Fraction(file.streams.video[0].start_time or 0) * file.streams.video[0].time_base)
            for frame in file.decode(audio=0):
                loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2)
                if len(loud):
                    return float(frame.pts * frame.time_base) + loud[0] / 48000 - begins
        raise AssertionError("nothing is heard")

    for name in ("out.avi", "out.mkv", "out.mp4"):
        interpolate_video(pipeline, tmp_path / "in.mp4", tmp_path / name, factor=1, progress=False)
        assert heard(tmp_path / name) == pytest.approx(heard(tmp_path / "in.mp4"), abs=0.05), name
