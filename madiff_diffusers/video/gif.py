"""GIF files: a palette for every frame, and times of whole hundredths of a second."""

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from .decoding import Source
from .encoding import Encoding
from .ffmpeg import file_url
from .parts import joined_packets, read_index


LEAST_DELAY = 2  # Hundredths of a second that a frame must last; players show what lasts less for ten.

# FFmpeg's numbers of times that a GIF is shown again.
FOR_EVER, NEVER = 0, -1


def loops_of(source: Source) -> int:
    """How often a source is shown again, if it is a GIF; for ever, if it is not."""
    if source.images is None:
        with suppress(OSError, SyntaxError), Image.open(source.path) as image:
            if image.format == "GIF":
                return image.info.get("loop", NEVER)
    return FOR_EVER


def assemble_gif(output: Path, encoding: Encoding, parts: Sequence[Path], end: int, loops: int) -> None:
    """
    Write a GIF, each of whose frames has a palette of its own.

    Args:
        output: the file.
        encoding, parts, end: see `muxing.assemble`.
        loops: how often the GIF is shown again.
    """
    height, width = encoding.size
    unwritten, stream = encoding.unwritten_stream()
    stream.codec_context.open()
    decoder = av.CodecContext.create("ffv1", "r")
    decoder.extradata, decoder.width, decoder.height = stream.codec_context.extradata, width, height
    unwritten.close()
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat(encoding.pixel_format), time_base=Fraction(1, 100)
    )
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1:dither=bayer"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    last_time = max(time for time, _, _ in read_index(parts[-1]))
    # Other frames last until the next one begins. Times are rounded one by one, so that errors do not add up.
    last_delay = max(LEAST_DELAY, _hundredths(end, encoding) - _hundredths(last_time, encoding))
    options = {"loop": str(loops), "final_delay": str(last_delay)}
    with av.open(file_url(output), "w", format="gif", container_options=options) as file:
        video = file.add_stream("gif", rate=encoding.rate)
        video.height, video.width, video.pix_fmt = height, width, "pal8"
        video.codec_context.time_base = video.time_base = Fraction(1, 100)
        if encoding.pixel_aspect is not None:
            video.codec_context.sample_aspect_ratio = encoding.pixel_aspect

        def drain() -> None:
            while True:
                try:
                    frame = graph.vpull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    return
                file.mux(video.encode(frame))

        for packet, time in joined_packets(parts, end):
            for frame in decoder.decode(packet):
                frame.pts, frame.time_base = _hundredths(time.shown, encoding), Fraction(1, 100)
                graph.push(frame)
                drain()
        graph.push(None)
        drain()
        file.mux(video.encode(None))


def _hundredths(time: int, encoding: Encoding) -> int:
    return round(time * encoding.time_base * 100)
