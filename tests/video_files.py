"""Video files as phones, cameras and editors make them, and what can be read of a file."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from tests.conftest import moving_picture


class Reading(NamedTuple):
    """What a player finds in a file; times in seconds."""

    times: list[Fraction]
    duration: Fraction | None
    codec: str
    pixel_format: str
    size: tuple
    rate: Fraction
    colours: tuple
    rotation: int
    pixel_aspect: Fraction | None
    metadata: dict[str, str]
    chapters: list
    audio: dict[str, Any]
    subtitles: list[tuple]


def read(path: Path) -> Reading:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        first = frames[0]
        return Reading(
            times=[frame.pts * frame.time_base for frame in frames],
            duration=stream.duration and stream.duration * stream.time_base,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=first.format.name,
            size=(first.height, first.width),
            rate=stream.average_rate,
            colours=tuple(map(int, (first.color_range, first.colorspace, first.color_primaries, first.color_trc))),
            rotation=int(first.rotation) % 360,
            pixel_aspect=stream.sample_aspect_ratio,
            metadata=dict(container.metadata),
            chapters=[
                (
                    chapter["start"] * chapter["time_base"],
                    chapter["end"] * chapter["time_base"],
                    chapter["metadata"].get("title"),
                )
                for chapter in container.chapters()
            ],
            audio=read_audio(path),
            subtitles=read_subtitles(path),
        )


def read_audio(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return {}
        stream, digest, times = container.streams.audio[0], hashlib.sha256(), []
        for packet in container.demux(stream):
            digest.update(bytes(packet))
            times += [packet.pts * packet.time_base] if packet.size else []
        return {
            "codec": stream.codec_context.codec.canonical_name,
            "hash": digest.hexdigest(),
            "times": times,
            "language": stream.metadata.get("language"),
        }


def read_subtitles(path: Path) -> list[tuple]:
    with av.open(str(path)) as container:
        if not container.streams.subtitles:
            return []
        return [
            (packet.pts * packet.time_base, bytes(packet))
            for packet in container.demux(container.streams.subtitles[0])
            if packet.size
        ]


def decode(path: Path) -> list[np.ndarray]:
    """Frames as `(H, W, 3)` uint8."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[int],
    time_base: Fraction,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    colours: tuple = (1, 1, 1, 1),
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    last: int | None = None,
    options: dict[str, str] | None = None,
    sound: float | None = None,
    metadata: dict[str, str] | None = None,
    chapters: Sequence[dict] = (),
    subtitle: bytes | None = None,
) -> Path:
    """Frames `(H, W, 3)` RGB uint8 at their times; with seconds of `sound`, and a subtitle from 0.2 to 0.5 s."""
    if codec == "libx265":
        # A clip shorter than the delay of B-frames leaves x265 without times of decoding: what it tells then is uninitialised memory.
        options = {
            "x265-params": ":".join(["bframes=0", "log-level=none", (options or {}).get("x265-params", "")]).rstrip(
                ":"
            )
        }
    with av.open(str(path), "w") as file:
        rate = Fraction(len(times)) / ((times[-1] + (last or times[-1] - times[-2])) * time_base)
        video = file.add_stream(codec, rate=rate.limit_denominator(10000), options=options or {})
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pixel_format
        video.codec_context.time_base = video.time_base = time_base
        context = video.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = colours
        if pixel_aspect:
            context.sample_aspect_ratio = pixel_aspect
        if rotation:
            video.set_display_rotation(rotation)
        streams = {}
        if sound:
            streams["sound"] = file.add_stream("aac", rate=48000)
            streams["sound"].layout = "stereo"
            streams["sound"].metadata["language"] = "fra"
        if subtitle:
            streams["subtitle"] = file.add_mux_stream("subrip")
            streams["subtitle"].time_base = Fraction(1, 1000)
        file.metadata.update(metadata or {})
        file.set_chapters(list(chapters))
        for frame, time in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
                format=pixel_format, dst_colorspace={1: 1, 6: 5, 9: 9}.get(colours[1]), dst_color_range=colours[0] or 1
            )
            picture.pts, picture.time_base = time, time_base
            file.mux(video.encode(picture))
        for packet in video.encode(None):
            file.mux(packet)
        for number in range(int((sound or 0) * 48000) // 1024):
            wave = (np.sin((np.arange(1024) + 1024 * number) * 0.05) * 8000).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
            samples.sample_rate, samples.pts, samples.time_base = 48000, 1024 * number, Fraction(1, 48000)
            file.mux(streams["sound"].encode(samples))
        if sound:
            file.mux(streams["sound"].encode(None))
        if subtitle:
            packet = av.Packet(subtitle)
            packet.pts = packet.dts = 200
            packet.duration, packet.time_base, packet.stream = 300, Fraction(1, 1000), streams["subtitle"]
            file.mux(packet)
    return path


def drifting(count: int, height: int = 64, width: int = 96, start: int = 0) -> list[np.ndarray]:
    return [moving_picture(start + number, height, width) for number in range(count)]


def phone_clip(path: Path, count: int = 14) -> Path:
    """Portrait, of a variable frame rate, with sound, chapters and metadata."""
    steps = [2990, 3010, 6000, 3000, 3001]
    times = [sum(steps[i % 5] for i in range(number)) for number in range(count)]
    return write_video(
        path,
        drifting(count),
        times,
        Fraction(1, 90000),
        rotation=90,
        sound=times[-1] / 90000,
        metadata={"title": "Holiday", "comment": "by the sea"},
        chapters=[
            {
                "id": number,
                "start": 200 * number,
                "end": 200 * number + 200,
                "time_base": Fraction(1, 1000),
                "metadata": {"title": f"part {number}"},
            }
            for number in range(2)
        ],
    )


def film_clip(path: Path, count: int = 24, **settings) -> Path:
    """24000/1001 frames a second."""
    return write_video(
        path, drifting(count), [1001 * number for number in range(count)], Fraction(1, 24000), **settings
    )
