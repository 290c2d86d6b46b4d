"""Notes on what of a source its result does not have, in words."""

from collections.abc import Collection

import av

from ..properties import lost
from .analysis import Analysis
from .colour import KNOWN_MATRICES, chroma_of, is_rgb
from .decoding import Source
from .encoding import Encoding
from .frame_times import LONGEST_TICK, Timeline
from .options import CheckedOptions


MOST_NOTES = 5  # Damaged places that have a note each; of more, only the number is told.


def notes_on_source(source: Source, analysis: Analysis) -> list[str]:
    """Notes on what was left out while a source was read."""
    damage = analysis.damage
    more = [f"{len(damage) - MOST_NOTES} more places are damaged"] if len(damage) > MOST_NOTES else []
    names = ", ".join(path.name for path in source.left_out)
    more += [f"left out, for they are no images: {names}"] if names else []
    return [*damage[:MOST_NOTES], *more, *analysis.notes]


def notes_on_pictures(
    source: Source,
    analysis: Analysis,
    found: Collection[str],
    encoding: Encoding,
    options: CheckedOptions,
    timeline: Timeline,
) -> list[str]:
    """
    Notes on what the pictures of a result do not have.

    Args:
        source, analysis: the source.
        found: keys of `properties.PROPERTIES` that the source has.
        encoding, options, timeline: how the result is made.
    """
    notes = []
    coded, own = av.VideoFormat(encoding.pixel_format), av.VideoFormat(analysis.pixel_format)
    if analysis.interlaced:
        notes.append(f"{source.path} is interlaced: frames are made of both fields at once; deinterlace it first")
    if not is_rgb(own) and len(own.components) >= 3 and analysis.tags.matrix not in KNOWN_MATRICES:
        notes.append(
            f"{source.path} has colours of a matrix that is not known here (number {analysis.tags.matrix} of ITU-T H.273): frames are made as if of "
            f"BT.{709 if analysis.size[0] >= 720 else 601}'s"
        )
    if max(part.bits for part in own.components) > max(part.bits for part in coded.components):
        notes.append(
            f"{encoding.codec} keeps {coded.components[0].bits} bits of the source's {own.components[0].bits} ({coded.name})"
        )
    (across, down), (own_across, own_down) = chroma_of(coded), chroma_of(own)
    if across * down > own_across * own_down and (len(own.components) >= 3 or is_rgb(own)):
        notes.append(f"{encoding.codec} keeps one colour for {across}x{down} pixels ({coded.name})")
    notes += lost(found, encoding.container.format or "folder", encoding.codec)
    upright = analysis.size[::-1] if encoding.turned in (90, 270) else analysis.size
    if encoding.size != tuple(upright):
        notes.append(
            f"{encoding.codec} has no odd sizes: {upright[1]}x{upright[0]} is {encoding.size[1]}x{encoding.size[0]}, the edge repeated"
        )
    longest = options.longest_gap(source.images is not None)
    gap = min((b - a for a, b in zip(analysis.starts, analysis.starts[1:])), default=0) * analysis.unit
    if gap > longest:
        notes.append(
            f"nothing is made: all frames of {source.path} are more than {float(longest):g} s apart; `max_gap` sets how far they may be"
        )
    if (
        timeline.rate is None
        and encoding.container.format in ("matroska", "webm")
        and 0 < gap * options.slow_motion / (options.factor or 1) < LONGEST_TICK
    ):
        notes.append(
            f"some frames are less than a millisecond apart, which {encoding.container.format} cannot tell: those may be lost; `fps` or .mp4 keeps them"
        )
    if timeline.rate is not None and options.fps is None:
        shown, usual = float(timeline.rate), float(options.rate_of(analysis.showing_rate))
        if encoding.codec == "gif":
            wanted = f"{usual:.2f}" if analysis.regular else "what varies"
            notes.append(
                f"GIF players keep delays of 2/100 s and more: {shown:.2f} frames a second are shown in the place of {wanted}"
            )
        elif not analysis.regular:
            notes.append(
                f"{source.path} has no steady rate, and what is written has one: {shown:.2f} frames a second are shown; `fps` chooses another"
            )
    return notes
