"""Decisions before any frame is made: the frames that are shown, the parts they are made in, and the identity of the work."""

import hashlib
import json
import os
from array import array
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil
from statistics import median_low
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import ModelMixin

from .. import __version__
from ..motion_hints import HintSource
from ..pipeline_madiff import MADiffPipeline
from ..scene_cuts import cuts_of_changes
from .analysis import Analysis
from .decoding import Source
from .encoding import Encoding
from .errors import VideoError
from .formats import MOST_GIF_RATE, Container
from .frame_times import LONGEST_TICK, Timeline
from .options import CheckedOptions


# A part holds about this many seconds of the result. This is what is lost when the work is killed, and the distance of key frames.
PART_SECONDS = 2

# Ticks of a second that files and encoders (VP9's the least) can count at most. Times of a finer clock are rounded, to 64 microseconds or finer.
FINEST_CLOCK = 10**9


@dataclass(frozen=True)
class Part:
    """
    A stretch of the result that is made and kept by itself.

    Args:
        first, last: kept source frames, by their places in `Timeline.kept`, whose time the part fills; `last` is not among them.
        number: number of the part's first frame in the result.
        count: number of its frames.
    """

    first: int
    last: int
    number: int
    count: int


def plan_timeline(options: CheckedOptions, source: Source, analysis: Analysis, container: Container) -> Timeline:
    """
    Decide which frames are shown, and when.

    Args:
        options: the options.
        source: what is interpolated.
        analysis: the source's.
        container: the kind of file that is written.
    """
    dropped, still = analysis.duplicates(options.dedup_threshold, options.dedup_run) if options.dedup else ([], [])
    gone = set(dropped)
    kept = [index for index in range(len(analysis.starts)) if index not in gone]
    # A cut that falls on a frame which is left out is one before the next that is kept.
    cuts = set(cuts_of_changes(analysis.changes[1:], options.cut_threshold, options.cut_ratio))
    held = {a for a, b in zip(kept, kept[1:]) if not cuts.isdisjoint(range(a + 1, b + 1))}
    longest = options.longest_gap(source.images is not None) / analysis.unit
    held |= {a for a, b in zip(kept, kept[1:]) if analysis.starts[b] - analysis.starts[a] > longest}
    rate = options.fps
    if rate is None and container.steady:  # a file that has but one rate
        rate = options.rate_of(analysis.showing_rate)
    end = analysis.end
    if rate is None and container.format == "gif":
        times = analysis.starts
        shortest = min((later - time for time, later in zip(times, times[1:])), default=end) * analysis.unit
        # All frames get one length, of whole hundredths of a second, as near as players keep.
        if options.rate_of(1 / shortest) > MOST_GIF_RATE:
            rate = Fraction(100, max(100 // MOST_GIF_RATE, ceil(100 / options.rate_of(analysis.showing_rate))))
        else:  # The last frame's length, of which files are often wrong, makes room for its copies.
            needed = Fraction(options.factor or 1, MOST_GIF_RATE) / (analysis.unit * options.slow_motion)
            end = max(end, times[-1] + ceil(needed))
    if rate is None and container.format in ("matroska", "webm") and len(kept) > 1:
        usual = median_low(b - a for a, b in zip(analysis.starts, analysis.starts[1:])) * analysis.unit
        made_each = usual * options.slow_motion / (options.factor or 1)
        if made_each < LONGEST_TICK:
            raise VideoError(
                f"`factor` {options.factor or 1} makes frames of {float(1 / made_each):.0f} a second, but .mkv and .webm count milliseconds: choose "
                "`fps` 1000 or less, a smaller `factor`, or .mp4"
            )
    starts, unit = analysis.starts, analysis.unit
    factor = None if rate is not None else options.factor or 1
    if factor is not None and (unit * options.slow_motion / factor).denominator > FINEST_CLOCK:
        ticks = FINEST_CLOCK // (options.slow_motion.denominator * factor)
        rounded = (round(start * unit * ticks) for start in (*starts, end))
        starts = array("q", accumulate(rounded, lambda before, own: max(before + 1, own)))
        starts, end, unit = starts[:-1], starts[-1], Fraction(1, ticks)
    return Timeline(
        starts,
        end,
        unit,
        factor=factor,
        rate=rate,
        slow_motion=options.slow_motion,
        dropped=dropped,
        held=held | set(still),
    )


def plan_parts(timeline: Timeline) -> list[Part]:
    """Divide the frames into parts of about `PART_SECONDS`; they are the same for every process, and every time."""
    kept = len(timeline.kept)
    seconds = float(timeline.duration * timeline.time_base)
    each = max(1, round(kept * PART_SECONDS / seconds))
    parts, number = [], 0
    for first in range(0, kept, each):
        last = min(first + each, kept)
        count = timeline.count(first, last)
        if count:
            parts.append(Part(first, last, number, count))
        number += count
    return parts


def work_identity(
    options: CheckedOptions, source: Source, pipeline: MADiffPipeline, encoding: Encoding
) -> dict[str, str]:
    """What two works must have in common, so that one can go on with the parts of the other."""
    named = {name: str(value) for name, value in asdict(options).items() if name not in ("max_memory", "batch")}
    return {
        "version": __version__,
        "source": source_digest(source),
        "dtype": str(pipeline.vqvae.dtype),  # the digest below differs with it, but does not say so
        "checkpoint": pipeline_digest(pipeline),
        "encoding": str(encoding),
        **named,
    }


def source_digest(source: Source) -> str:
    """Digest of a source's files, whole, which takes little beside decoding them, and of their names where they are images."""
    digest = hashlib.sha256()
    for path in source.images or [source.path]:
        with open(path, "rb") as file:
            digest.update(os.fsencode(f"{path.name if source.images else ''} "))  # of names of any bytes
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def pipeline_digest(pipeline: MADiffPipeline) -> str:
    """Digest of everything that decides what frames a pipeline makes."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        """Take in a network, with its weights, or settings."""
        if isinstance(value, ModelMixin):
            add(f"{name} {type(value).__qualname__}", value.config)
            weights = value.state_dict()
            if any(tensor.is_meta for tensor in weights.values()):  # offloaded one by one: they lie beside the network
                weights |= get_state_dict_offloaded_model(value)  # which leaves out those of the network as a whole
            for key, tensor in sorted(weights.items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            # Of what Diffusers notes beside them, the place on this machine and the order of default values change from start to start.
            settings = {key: each for key, each in value.items() if not key.startswith("_")}
            digest.update(f"{name} {json.dumps(settings, sort_keys=True, default=str)}".encode())

    def add_hints(source: HintSource) -> None:
        add(f"{type(source).__module__}.{type(source).__qualname__}", getattr(source, "config", None) or {})
        for name, value in sorted(vars(source).items()):
            if isinstance(value, ModelMixin):
                add(name, value)
        for each in getattr(source, "sources", []):
            add_hints(each)

    add("pipeline", pipeline.config)
    add(f"scheduler {type(pipeline.scheduler).__qualname__}", pipeline.scheduler.config)
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, ModelMixin):
            add(name, component)
    add_hints(pipeline.hints)
    return digest.hexdigest()
