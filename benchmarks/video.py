"""How much longer a video takes than the pipeline's own work for its frames: python -m benchmarks.video CLIP [--frames N] [--rounds N]

Both in one process, turn by turn after a warm-up: the frames between neighbours that lie decoded in memory, each encoded by the network once;
and the whole of `interpolate_video`, from looking through the file to the finished one. Prints seconds per made frame, medians and their ratio.
"""

import argparse
import statistics
import tempfile
import time
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import torch

from madiff_diffusers import MADiffPipeline, interpolate_video
from madiff_diffusers.commands.common import DEFAULT_CHECKPOINT
from madiff_diffusers.video.colour import ColourPath, ColourTags
from madiff_diffusers.video.interpolation import FrameInterpolator, Pair, SourceFrame


def cut(clip: Path, frames: int, out: Path) -> list:
    """The first frames of a clip as a file of their own, and as arrays."""
    with av.open(str(clip)) as source, av.open(str(out), "w") as file:
        stream = source.streams.video[0]
        copy = file.add_stream("libx264", rate=stream.average_rate)
        copy.width, copy.height, copy.pix_fmt = stream.width, stream.height, "yuv420p"
        arrays = []
        for number, frame in enumerate(islice(source.decode(stream), frames)):
            arrays.append(ColourPath(ColourTags.of(frame), frame.height).to_rgb(frame))
            frame.pts, frame.time_base, frame.pict_type = number, 1 / stream.average_rate, 0
            file.mux(copy.encode(frame))
        file.mux(copy.encode(None))
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipeline = MADiffPipeline.from_pretrained(DEFAULT_CHECKPOINT).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.mp4", Path(folder) / "out.mp4"
        arrays = cut(args.clip, args.frames, source)

        def own() -> float:
            start, interpolator, prev = time.perf_counter(), FrameInterpolator(pipeline), SourceFrame(arrays[0])
            for array in arrays[1:]:
                next_ = SourceFrame(array)
                list(interpolator.between([Pair(prev, next_, [Fraction(1, 2)])]))
                prev = next_
            return (time.perf_counter() - start) / (len(arrays) - 1)

        def whole() -> float:
            start = time.perf_counter()
            # One pair at a time, as above.
            result = interpolate_video(
                pipeline, source, out, overwrite=True, progress=False, cut_threshold=2.0, batch=1
            )
            return (time.perf_counter() - start) / result.made

        own(), whole()
        seconds = [(own(), whole()) for _ in range(args.rounds)]
    own_seconds, whole_seconds = (statistics.median(each) for each in zip(*seconds))
    height, width = arrays[0].shape[:2]
    print(
        f"{width}x{height}, {args.device}, {torch.get_num_threads()} threads: pipeline {own_seconds:.3f} s, video {whole_seconds:.3f} s per made frame"
    )
    print(
        f"ratio {whole_seconds / own_seconds:.3f} (of rounds: {', '.join(f'{whole / own:.3f}' for own, whole in seconds)})"
    )


if __name__ == "__main__":
    main()
