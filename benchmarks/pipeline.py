"""Where the pipeline's time goes, stage by stage, and how it compares with another method's.

    python -m benchmarks.pipeline [--size 640x480] [--peer module:function] [--factor 4] [--tile-pixels N] [--json FILE]

The frames are a made picture that moves by some pixels. After a warm-up, the medians of some rounds are printed; what is compared is run
turn by turn in this process. Nothing else should run on the machine.
"""

import argparse
import functools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.commands.common import (
    DEFAULT_CHECKPOINT,
    CommandError,
    checkpoint_folder,
    chosen_dtype,
    load_pipeline,
    parse_dtype,
)
from madiff_diffusers.evaluation.methods import FunctionMethod
from madiff_diffusers.evaluation.runs import describe_environment
from madiff_diffusers.motion_hints import finishes
from madiff_diffusers.video.memory import freed_memory_kept


STAGES = (
    "encode",
    "hints start",
    "motion guess",
    "hints finish",
    "hints from guess",
    "denoise",
    "decode guess",
    "decode last",
    "rest",
)
# What is counted where several frames are made, by the stages that it sums up.
CALLS = {
    "encodes": ("encode",),
    "denoiser calls": ("denoise",),
    "decodes": ("decode guess", "decode last"),
    "hint starts": ("hints start",),
    "hint extractions": ("hints from guess", "hints finish"),
}


class Stage(NamedTuple):
    """A stage's part in a call of the pipeline: how often it ran, and its seconds and floating-point operations in all."""

    calls: int
    seconds: float
    flop: int


def panned_frames(width: int, height: int, count: int, step: int = 4) -> list[np.ndarray]:
    """RGB uint8 frames `(height, width, 3)` of a picture with coarse and fine detail that moves by `step` pixels a frame."""
    generator, whole = np.random.default_rng(0), width + step * (count - 1)
    picture = np.zeros((height, whole, 3), np.float32)
    for cell in (64, 16, 4):
        noise = generator.random((height // cell + 2, whole // cell + 2, 3), dtype=np.float32)
        picture += cell**0.5 * cv2.resize(noise, (whole, height), interpolation=cv2.INTER_CUBIC)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    return [np.ascontiguousarray(picture[:, step * i : step * i + width]) for i in range(count)]


def clock(pipeline: MADiffPipeline) -> float:
    """Seconds, once the device has done all that it was told."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter()


@contextmanager
def watched(pipeline: MADiffPipeline, flop: Callable[[], int]) -> Iterator[list[tuple[str, Stage]]]:
    """The list that the pipeline's networks and hint source add to whenever they are called inside the block."""
    seen: list[tuple[str, Stage]] = []
    methods = [
        (pipeline.vqvae, "encode", "encode"),
        (pipeline.vqvae, "decode", "decode"),
        (pipeline.unet, "forward", "denoise"),
        (pipeline.hints, "start", "hints start"),
        (pipeline.hints, "from_guess", "hints from guess"),
    ]
    if pipeline.config.guess_motion and finishes(pipeline.hints):
        methods += [
            (pipeline.hints, "begin", "hints start"),
            (pipeline.vqvae, "guess_motion", "motion guess"),
            (pipeline.hints, "finish", "hints finish"),
        ]

    def watch(method: Callable, stage: str) -> Callable:
        @functools.wraps(method)
        def measured(*args, **kwargs):
            start, before = clock(pipeline), flop()
            result = method(*args, **kwargs)
            seen.append((stage, Stage(1, clock(pipeline) - start, flop() - before)))
            return result

        return measured

    for owner, name, stage in methods:
        setattr(owner, name, watch(getattr(owner, name), stage))
    try:
        yield seen
    finally:
        for owner, name, _ in methods:
            delattr(owner, name)  # the class's own shows again


def stages_of(
    pipeline: MADiffPipeline, call: Callable[[], Any], flop: Callable[[], int] = lambda: 0
) -> dict[str, Stage]:
    """Runs a function that calls the pipeline, and tells what each stage had part in it. `flop` counts operations up to now."""
    with watched(pipeline, flop) as seen:
        start, before = clock(pipeline), flop()
        call()
        whole = Stage(1, clock(pipeline) - start, flop() - before)
    # The frame's own decodes, one for each of its tiles, follow on everything that is not one.
    last = max((i for i, (name, _) in enumerate(seen) if name != "decode"), default=-1)
    stages = {name: Stage(0, 0.0, 0) for name in STAGES}
    for i, (name, part) in enumerate(seen):
        if name == "decode":
            name = "decode last" if i > last else "decode guess"
        stages[name] = Stage(*(sum(each) for each in zip(stages[name], part)))
    stages["rest"] = Stage(
        0,
        whole.seconds - sum(each.seconds for each in stages.values()),
        whole.flop - sum(each.flop for each in stages.values()),
    )
    return stages


def in_turn(pipeline: MADiffPipeline, calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + rounds):
        for call, own in zip(calls, seconds):
            start = clock(pipeline)
            call()
            own.append(clock(pipeline) - start)
    return [own[1:] for own in seconds]


def peak_gib(pipeline: MADiffPipeline) -> dict[str, float]:
    """The most memory that was taken up to now: by the process, and of the GPU by tensors."""
    unit = 2**30 if platform.system() == "Darwin" else 2**20  # bytes there, KiB elsewhere
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if pipeline.device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(pipeline.device) / 2**30
    return peak


def measure_stages(pipeline: MADiffPipeline, call: Callable[[], Any], rounds: int) -> dict[str, dict[str, float]]:
    """By stage: calls, GFLOP, median seconds, and the share of the sum of these."""
    with FlopCounterMode(display=False) as counter:
        counted = stages_of(pipeline, call, counter.get_total_flops)
    timed = [stages_of(pipeline, call) for _ in range(rounds)]
    seconds = {name: statistics.median(each[name].seconds for each in timed) for name in STAGES}
    whole = sum(seconds.values())
    return {
        name: {
            "calls": counted[name].calls,
            "seconds": seconds[name],
            "gflop": counted[name].flop / 1e9,
            "share": seconds[name] / whole,
        }
        for name in STAGES
    }


def measure_factor(
    make: Callable, pipeline: MADiffPipeline, frames: list[np.ndarray], rounds: int
) -> dict[str, dict[str, Any]]:
    """Calls of the networks and median seconds for as many frames, made in three ways: between two straight, between two as middles of
    middles, and one each between neighbours that have nothing in common."""
    count = len(frames) - 1
    ways = {
        "straight": lambda: make(frames[0], frames[1], num_frames=count, recursive=False),
        "recursive": lambda: make(frames[0], frames[1], num_frames=count, recursive=True),
        "separate pairs": lambda: [make(*pair) for pair in zip(frames, frames[1:])],
    }
    results = {}
    for (name, way), seconds in zip(ways.items(), in_turn(pipeline, list(ways.values()), rounds)):
        stages = stages_of(pipeline, way)
        calls = {kind: sum(stages[stage].calls for stage in parts) for kind, parts in CALLS.items()}
        results[name] = {"calls": calls, "seconds": statistics.median(seconds)}
    return results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 0 and int(height) > 0):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 640x480, but is {text!r}")
    return int(width), int(height)


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, but is {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=parse_size, default=(640, 480), metavar="WxH", help="of the frames (default: 640x480)"
    )
    parser.add_argument(
        "--peer", metavar="M:F", help="a function of two frames to compare with, as for `madiff evaluate --method`"
    )
    parser.add_argument(
        "--factor",
        type=int,
        choices=(4, 8),
        help="also make so many frames of one, straight, recursively and as separate pairs",
    )
    parser.add_argument("--tile-pixels", type=parse_count, metavar="N", help="work by tiles of at most so many pixels")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="keep memory that is freed for what comes next, as `madiff video` does (Linux)",
    )
    parser.add_argument(
        "--threads", type=parse_count, metavar="N", help="of torch and OpenCV (default: as they choose)"
    )
    parser.add_argument("--dtype", default="float32", type=parse_dtype, metavar="T", help="as for `madiff evaluate`")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="C", help="as for `madiff interpolate`")
    parser.add_argument("--device", default="cpu", metavar="D", help="as for `madiff interpolate`")
    parser.add_argument("--rounds", type=parse_count, default=5, metavar="N", help="that medians are of (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, too")
    args = parser.parse_args(argv)
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"argument --json: must be a file in a folder that is there, but is {str(args.json)!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(args.threads)
    try:
        pipeline = load_pipeline(checkpoint_folder(args.checkpoint), args.device, chosen_dtype(args))
    except CommandError as error:
        parser.error(str(error))
    pipeline.set_progress_bar_config(disable=True)
    if args.tile_pixels is not None:
        pipeline.enable_tiling(args.tile_pixels)
    with freed_memory_kept(sparing=args.tile_pixels is not None) if args.keep_memory else nullcontext():
        measure(parser, args, pipeline)


def measure(parser: argparse.ArgumentParser, args: argparse.Namespace, pipeline: MADiffPipeline) -> None:
    frames = panned_frames(*args.size, count=args.factor or 2)

    def make(prev: np.ndarray, next_: np.ndarray, **arguments) -> None:
        pipeline(prev, next_, generator=torch.Generator().manual_seed(0), **arguments)

    # 1. The stages, and the memory before anything else takes some.
    one = functools.partial(make, frames[0], frames[1])
    one()
    peak = peak_gib(pipeline)
    stages = measure_stages(pipeline, one, args.rounds)
    total, gflop = (sum(each[key] for each in stages.values()) for key in ("seconds", "gflop"))
    size, environment = "x".join(map(str, args.size)), describe_environment(processes=1)
    result = {
        "size": size,
        "checkpoint": args.checkpoint,
        "device": args.device,
        "dtype": str(pipeline.vqvae.dtype).removeprefix("torch."),
        "tile_pixels": args.tile_pixels,
        "memory_kept": args.keep_memory,
    }
    result.update(rounds=args.rounds, stages=stages, seconds=total, peak_gib=peak, environment=environment)
    machine = environment["hardware"]["gpu" if pipeline.device.type == "cuda" else "cpu"]
    print(
        f"{size}, {result['dtype']}, {args.device}: {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    rows = [
        [name, str(each["calls"] or ""), f"{each['seconds']:.4f}", f"{each['gflop']:.2f}", f"{each['share']:.1%}"]
        for name, each in stages.items()
    ]
    table(
        ["stage", "calls", "seconds", "GFLOP", "share"],
        [*rows, ["whole", "", f"{total:.4f}", f"{gflop:.2f}", "100.0%"]],
    )
    print(f"Peak memory: {', '.join(f'{gib:.2f} GiB ({what})' for what, gib in peak.items())}\n")

    # 2. The peer.
    if args.peer is not None:
        try:
            peer = FunctionMethod(args.peer)
            own, others = in_turn(pipeline, [one, lambda: peer([(frames[0], frames[1])])], args.rounds)
        except ValueError as error:
            parser.error(f"argument --peer: {error}")
        own_seconds, peer_seconds = statistics.median(own), statistics.median(others)
        ratios = [mine / other for mine, other in zip(own, others)]
        result["peer"] = {
            "name": args.peer,
            "seconds": peer_seconds,
            "own_seconds": own_seconds,
            "ratio": own_seconds / peer_seconds,
            "ratios": ratios,
        }
        print(
            f"Pipeline {own_seconds:.4f} s, {args.peer} {peer_seconds:.4f} s: ratio {own_seconds / peer_seconds:.3f} "
            f"(of rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})\n"
        )

    # 3. Several frames.
    if args.factor is not None:
        ways = measure_factor(make, pipeline, frames, args.rounds)
        result["factor"] = {"factor": args.factor, **ways}
        rows = [[name, *map(str, each["calls"].values()), f"{each['seconds']:.4f}"] for name, each in ways.items()]
        table([f"{args.factor - 1} frames", *CALLS, "seconds"], rows)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
