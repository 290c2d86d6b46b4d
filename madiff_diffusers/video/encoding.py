"""Encoding of the frames of a video, chosen so that the result has the pixels, colours and shape of the source."""

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av

from .analysis import Analysis
from .colour import PLANAR, ColourTags, chroma_of, is_rgb, planar_format
from .errors import VideoError
from .formats import CODECS, Container, container_of, refusal_of
from .options import CheckedOptions


# Formats that hold the samples of a planar format in fewer planes. Some chips take no others.
_INTERLEAVED = {"yuv420p": "nv12", "yuv420p10le": "p010le"}


class Display(NamedTuple):
    """
    The display that a video was mastered on.

    Args:
        colours: CIE x and y of red, green, blue and white.
        darkest, brightest: its least and greatest light, in candela per square metre.
    """

    colours: tuple[Fraction, ...]
    darkest: Fraction
    brightest: Fraction


class Hdr10(NamedTuple):
    """
    Metadata of HDR10.

    Args:
        display: the display that the video was mastered on; None where it is not told.
        most, most_mean: the light of the brightest pixel, and the mean light of the brightest frame; 0 where it is not told.
    """

    display: Display | None
    most: int
    most_mean: int

    def options(self, codec: str) -> str:
        """The metadata as an option of the encoder of "hevc" or "av1"."""

        def written(first: Fraction, second: Fraction, unit: int) -> str:
            return ",".join(
                str(round(each * unit)) if codec == "hevc" else f"{float(each):.5f}" for each in (first, second)
            )

        named = ("master-display", "max-cll") if codec == "hevc" else ("mastering-display", "content-light")
        told = []
        if self.display is not None:
            # HEVC counts colours in parts of 50000, and light in parts of 10000.
            colours, darkest, brightest = self.display
            red, green, blue, white = (written(colours[i], colours[i + 1], 50000) for i in range(0, 8, 2))
            told.append(f"{named[0]}=G({green})B({blue})R({red})WP({white})L({written(brightest, darkest, 10000)})")
        if self.most or self.most_mean:
            told.append(f"{named[1]}={self.most},{self.most_mean}")
        return ":".join(told)


# The encoders that take the metadata, and the names of their options.
_HDR10_OPTIONS = {"hevc": "x265-params", "av1": "svtav1-params"}


class Encoding(NamedTuple):
    """
    The way in which a video is written.

    Args:
        container: the kind of file.
        codec: a name in `CODECS`.
        options: options of the encoder.
        pixel_format: FFmpeg's name of the format of pixels.
        size: height and width as coded.
        tags: the tags of colours.
        time_base: the unit of times, in seconds.
        rate: frames a second, on average.
        pixel_aspect, matrix: see [`Analysis`].
        mirrored, turned: the turn of frames before they are encoded: whether left and right change places first, and then degrees
            against the clock.
    """

    container: Container
    codec: str
    options: dict[str, str]
    pixel_format: str
    size: tuple[int, int]
    tags: ColourTags
    time_base: Fraction
    rate: Fraction
    pixel_aspect: Fraction | None
    matrix: list[int] | None
    mirrored: bool
    turned: int

    @property
    def standard(self) -> str:
        """The name in `CODECS` of the same kind of pictures encoded by the processor."""
        return CODECS[self.codec].standard or self.codec

    def add_stream(self, output: av.container.OutputContainer) -> av.video.stream.VideoStream:
        """Add a stream that encodes in this way, and whose header tells so."""
        os.environ.setdefault("SVT_LOG", "1")  # Otherwise the AV1 encoder prints its settings.
        encoder = CODECS[self.codec].encoder
        stream = cast(
            av.video.stream.VideoStream, output.add_stream(encoder, rate=self.rate, options=dict(self.options))
        )
        context = stream.codec_context
        context.height, context.width = self.size
        context.pix_fmt = self.pixel_format
        context.time_base = stream.time_base = self.time_base
        context.color_range, context.colorspace = self.tags.range, self.tags.matrix
        context.color_primaries, context.color_trc = self.tags.primaries, self.tags.transfer
        if self.pixel_aspect is not None:
            context.sample_aspect_ratio = self.pixel_aspect
        if self.matrix is not None:
            stream.set_display_matrix(self.matrix)
        if self.standard == "hevc" and self.container.format in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # The tag that Apple's players know.
        return stream

    def unwritten_stream(self) -> tuple[av.container.OutputContainer, av.video.stream.VideoStream]:
        """A file that is never written to, and its stream, whose encoder is set up as in the real file."""
        output = av.open(io.BytesIO(), "w", format="matroska" if self.codec == "gif" else self.container.format)
        return output, self.add_stream(output)


def told_tags(tags: ColourTags, pixel_format: str) -> ColourTags:
    """Tags with the range that a format implies: grey, and formats with a J in their names, have the full range."""
    is_full = pixel_format.startswith("yuvj") or (tags.range == 0 and pixel_format.startswith(("gray", "ya", "mono")))
    return tags._replace(range=2) if is_full else tags


def _usual_codec(container: Container, source: av.VideoFormat, has_hdr10: bool) -> str:
    """The first codec of a kind of file that keeps ten bits, if the source has as many, and the metadata of HDR10, if the source has such."""
    able = [
        each
        for each in container.codecs
        if _bits(av.VideoFormat(analogous_format(source, each))) >= min(10, _bits(source))
    ]
    able = [each for each in able if has_hdr10 and each in _HDR10_OPTIONS] or able
    return (able or container.codecs)[0]


def usual_codecs(container: Container) -> list[str]:
    """The codecs of a kind of file that are chosen for one source or another where none is asked for."""
    sources = [av.VideoFormat(name) for name in ("yuv420p", "yuv420p10le", "gray16le", "rgb48le")]
    chosen = {_usual_codec(container, source, has_hdr10) for source in sources for has_hdr10 in (False, True)}
    return [name for name in container.codecs if name in chosen]


def choose_encoding(
    output: Path,
    analysis: Analysis,
    time_base: Fraction,
    rate: Fraction,
    video_options: CheckedOptions,
    hdr10: Hdr10 | None,
) -> Encoding:
    """
    Choose how to write a video so that it has the pixels, colours and shape of the source.

    Args:
        output: the file or folder.
        analysis: the source's.
        time_base, rate: those of the frames that will be shown.
        video_options: their `codec`, `crf` and `preset` are used, the usual ones where they are None.
        hdr10: the source's metadata of HDR10, if it has any.

    Raises:
        VideoError: if the codec cannot have the settings, or no pixels like the source's.
    """
    container = container_of(output)
    source = av.VideoFormat(analysis.pixel_format)
    crf, preset = video_options.crf, video_options.preset
    name = video_options.codec or _usual_codec(container, source, hdr10 is not None)
    kind = CODECS[name]
    options = dict(kind.options)
    refusal = refusal_of(name, crf, preset)
    if refusal is not None:
        raise VideoError(refusal)
    if kind.crf is not None:
        options[kind.quality] = str(kind.crf if crf is None else crf)
    if kind.preset is not None:
        options[kind.pace] = preset or kind.preset
    if hdr10 is not None and name in _HDR10_OPTIONS:
        place = _HDR10_OPTIONS[name]
        options[place] = ":".join(filter(None, (options.get(place), hdr10.options(name))))
    pixel_format = analogous_format(source, name)
    if name == "prores":
        options["profile"] = "4" if "444" in pixel_format else "3"
    if container.format == "avi" and (kind.standard or name) == "h264":
        options["bf"] = "0"  # AVI has no way to show frames in another order than they are decoded in.
    rotation = 0 if container.turns else analysis.rotation
    height, width = analysis.size[::-1] if rotation in (90, 270) else analysis.size
    tags = told_tags(analysis.tags, analysis.pixel_format)
    if is_rgb(source) and not is_rgb(av.VideoFormat(pixel_format)):
        # Players take limited range and BT.709 for granted; what Y4M cannot tell is taken by the height. Primaries and transfer are the
        # source's, if it tells them.
        primaries, transfer = (1 if told == 2 else told for told in (tags.primaries, tags.transfer))
        told = 1 if container.format != "yuv4mpegpipe" or analysis.size[0] >= 720 else 6
        tags = ColourTags(1, told, primaries, transfer)
    elif is_rgb(av.VideoFormat(pixel_format)):
        tags = tags._replace(range=2, matrix=0)
    elif name == "prores":  # which has limited range alone, whatever is told of it
        tags = tags._replace(range=1)
    if (kind.standard or name) in ("h264", "hevc"):  # Their 4:2:0 and 4:2:2 have no odd sizes.
        across, down = chroma_of(av.VideoFormat(pixel_format))
        width, height = width + -width % across, height + -height % down
    aspect = analysis.pixel_aspect
    return Encoding(
        container=container,
        codec=name,
        options=options,
        pixel_format=pixel_format,
        size=(height, width),
        tags=tags,
        time_base=time_base,
        rate=rate,
        pixel_aspect=1 / aspect if aspect and rotation in (90, 270) else aspect,
        matrix=analysis.matrix if container.turns else None,
        mirrored=analysis.mirrored and not container.turns,
        turned=rotation,
    )


def _bits(pixel_format: av.VideoFormat) -> int:
    return max(component.bits for component in pixel_format.components)


def analogous_format(source: av.VideoFormat, codec: str) -> str:
    """The format that a codec encodes and that is nearest to a source's in fineness of colours and number of bits, rather more than less."""
    bits = _bits(source)
    if codec == "png":
        return "rgb48be" if bits > 8 else "rgb24"
    if codec == "gif":
        return "bgr0"
    encodable = {each.name for each in av.Codec(CODECS[codec].encoder, "w").video_formats or []}
    if codec == "ffv1" and planar_format(source) in encodable - {"gbrpf32le"}:
        return planar_format(source)
    if codec == "ffv1" and is_rgb(source):
        return "bgr0" if bits <= 8 else "gbrp16le"
    if codec == "raw":  # The header of a .y4m file can name these alone.
        encodable = {f"yuv{chroma}p{depth}" for chroma in ("420", "422", "444") for depth in ("", "10le", "12le")}
        encodable |= {"gray", "gray10le"}
    if len(source.components) < 3 and not is_rgb(source):  # Grey, which few players show.
        families = ["gray", "yuv420p", "yuv422p"] if codec in ("ffv1", "raw") else ["yuv420p", "yuv422p"]
    else:
        own = "yuv420p" if is_rgb(source) else PLANAR.get(chroma_of(source), "yuv444p")
        families = [own, "yuv422p", "yuv444p", "yuv420p"]
    depths = {8: "", 10: "10le", 12: "12le", 16: "16le"}
    wanted = 8 if bits <= 8 else 10 if bits <= 10 or is_rgb(source) else 12 if bits <= 12 else 16
    for depth in sorted(depths, key=lambda depth: abs(depth - wanted) if depth >= wanted else 100 - depth):
        for family in families:
            for pixel_format in (family + depths[depth], _INTERLEAVED.get(family + depths[depth])):
                if pixel_format in encodable:
                    return pixel_format
    raise VideoError(f"{codec} has nothing like the pixels of the source ({source.name})")
