"""How fast the stages train, how fast the loader feeds them, and how much memory they take.

    python -m benchmarks.training --config compact --data CLIPS --lpips_backbone FILE

Starts the training scripts as a user does, on the networks of `--checkpoint`, for a few steps each, and prints Markdown
tables: samples per second (the median over the logged steps after a warm-up) and peak memory of the process, plain and
with each option; at several crops; and what the loader gives by itself, with the same options and loader processes.
Nothing else should run on the machine.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from training.data.datasets import build_dataset
from training.data.transforms import EventTransform, TripletTransform
from training.options import one_line_errors, parse_options
from training.train_denoiser import DenoiserOptions
from training.train_i2e import I2EOptions
from training.train_vq_magan import VQMAGANOptions


STAGES = {"train_i2e": I2EOptions, "train_vq_magan": VQMAGANOptions, "train_denoiser": DenoiserOptions}
VARIANTS: dict[str, list[str]] = {
    "as configured": [],
    "without channels_last": ["--channels_last", "false"],
    "torch.compile": ["--compile", "true"],
    "bf16": ["--mixed_precision", "bf16"],
    "gradient checkpointing": ["--gradient_checkpointing", "true"],
}


def flags_of(stage: str, args: argparse.Namespace, output: str) -> list[str]:
    flags = ["--config", args.config, "--data", args.data, "--output_dir", output]
    if args.workers is not None:
        flags += ["--dataloader_num_workers", str(args.workers)]
    if stage != "train_i2e":
        flags += ["--i2e", str(args.checkpoint / "i2e"), "--lpips_backbone", args.lpips_backbone]
    if stage == "train_vq_magan":  # every loss from the first step on, as in most of a run
        flags += ["--init", str(args.checkpoint / "vqvae"), "--lpips_start", "0"]
    if stage == "train_denoiser":
        flags += ["--vqvae", str(args.checkpoint / "vqvae")]
    return flags


def measure(stage: str, args: argparse.Namespace, extra: list[str]) -> tuple[float, float]:
    """Samples per second and peak memory in GiB of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        steps = args.warmup + args.steps
        command = [
            sys.executable,
            "-m",
            f"training.{stage}",
            *flags_of(stage, args, folder),
            "--max_train_steps",
            str(steps),
        ]
        command += ["--log_steps", "5", "--checkpointing_steps", str(steps), "--report_to", "none", *extra]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        speeds = []
        for line in process.stdout or ():
            found = re.match(r"step=(\d+) .*\(([\d.]+) samples/s\)", line)
            if found and int(found.group(1)) > args.warmup:
                speeds.append(float(found.group(2)))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise ValueError(f"{' '.join(command)} ended with {process.returncode}.")
        return statistics.median(speeds), usage.ru_maxrss / 2**20


def loader_speed(stage: str, args: argparse.Namespace) -> float:
    """Samples per second of the loader alone."""
    options, config = parse_options(STAGES[stage], stage, flags_of(stage, args, "unused"), "")
    transform = (
        EventTransform(config["i2e"]["num_bins"], options.frames) if stage == "train_i2e" else TripletTransform()
    )
    samples = build_dataset(options, transform)
    count = options.train_batch_size * 40
    batches = iter(
        DataLoader(
            Subset(samples, range(count)),
            batch_size=options.train_batch_size,
            num_workers=options.dataloader_num_workers,
        )
    )
    for _ in range(10):  # the workers' start and what they have made ahead
        next(batches)
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["unreadable"])
    return seen / (time.perf_counter() - start)


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="compact", help="as in the training scripts")
    parser.add_argument("--data", required=True, help="as in the training scripts")
    parser.add_argument("--lpips_backbone", default="", help="as in the training scripts")
    shipped = Path(__file__).parents[1] / "madiff_diffusers" / "checkpoints" / "madiff-compact"
    parser.add_argument(
        "--checkpoint", type=Path, default=shipped, help="pipeline folder whose networks are trained on"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--crops", nargs="*", type=int, default=[], help="also measure these crops, at as many pixels a batch"
    )
    parser.add_argument("--workers", type=int, help="loader processes; as configured if not given")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=30, help="measured steps")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for stage in args.stages:
        options, _ = parse_options(STAGES[stage], stage, flags_of(stage, args, "unused"), "")
        shape = f"batch {options.train_batch_size}, crop {options.resolution}, {options.dataloader_num_workers} loader process(es)"
        results = {name: measure(stage, args, VARIANTS[name]) for name in args.variants}
        rows = [[name, f"{speed:.1f}", f"{memory:.2f}"] for name, (speed, memory) in results.items()]
        if rows:
            table(f"{stage}, {shape}", ["", "samples/s", "peak memory, GiB"], rows)
        rows = []
        for crop in args.crops:
            batch = max(round(options.train_batch_size * (options.resolution / crop) ** 2), 1)
            speed, memory = measure(stage, args, ["--resolution", str(crop), "--train_batch_size", str(batch)])
            rows.append([str(crop), str(batch), f"{speed:.1f}", f"{speed * crop**2 / 1e6:.2f}", f"{memory:.2f}"])
        if rows:
            table(f"{stage}, crops", ["crop", "batch", "samples/s", "megapixels/s", "peak memory, GiB"], rows)
        if "as configured" in results:
            loaded, used = loader_speed(stage, args), results["as configured"][0]
            rows = [["loader alone", f"{loaded:.1f}"], ["training", f"{used:.1f}"], ["ratio", f"{loaded / used:.1f}"]]
            table(f"{stage}, loader", ["", "samples/s"], rows)


if __name__ == "__main__":
    with one_line_errors():
        main()
