"""Benchmarks: find the triplets of a set, predict their middle frames, score them, tabulate ablations."""

import json
import time
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from .image_io import read_image, write_image
from .metrics import build_lpips, lpips_distance, psnr, ssim
from .pipeline_madiff import MADiffPipeline


class Triplet(NamedTuple):
    name: str
    prev: Path
    next: Path
    truth: Path


def find_triplets(root: str) -> List[Triplet]:
    """The triplets of a benchmark folder, in either of two layouts:

        input/NAME/frame10.png, input/NAME/frame11.png, gt/NAME/frame10i11.png          (Middlebury-OTHER, DAVIS)
        NAME/frame_00.png, NAME/frame_02.png, NAME/frame_01_gt.png                       (UCF101)

    Raises:
        ValueError: if the folder has neither layout.
        FileNotFoundError: if a file of a triplet is missing.
    """
    folder = Path(root)
    if (folder / "gt").is_dir():
        found = [
            Triplet(
                path.name,
                folder / "input" / path.name / "frame10.png",
                folder / "input" / path.name / "frame11.png",
                path / "frame10i11.png",
            )
            for path in sorted((folder / "gt").iterdir())
        ]
    else:
        found = [
            Triplet(path.name, path / "frame_00.png", path / "frame_02.png", path / "frame_01_gt.png")
            for path in sorted(folder.glob("*"), key=lambda path: (len(path.name), path.name))
            if (path / "frame_01_gt.png").is_file()
        ]
    if not found:
        layouts = "input/NAME/frame10.png, frame11.png with gt/NAME/frame10i11.png, or NAME/frame_00.png, frame_02.png, frame_01_gt.png"
        raise ValueError(f"`root` must hold triplets as {layouts}, but {root!r} does not.")
    for triplet in found:
        for path in triplet[1:]:
            if not path.is_file():
                raise FileNotFoundError(f"No such image file: {path}")
    return found


class Evaluator:
    """Scores a pipeline on triplets; keeps the metric's network between calls.

    Args:
        pipeline: what is scored.
        triplets: on what.
        lpips_backbone: see `build_lpips`.
        seed: of the noise, the same for every triplet.
    """

    def __init__(
        self, pipeline: MADiffPipeline, triplets: Sequence[Triplet], lpips_backbone: Optional[str] = None, seed: int = 0
    ):
        self.pipeline, self.triplets, self.seed = pipeline, list(triplets), seed
        import skimage.metrics  # noqa: F401  what PSNR and SSIM need: if it is missing, that is known before a long run

        self.lpips = build_lpips("alex", lpips_backbone)
        self.pipeline.set_progress_bar_config(disable=True)

    def score(self, output: Optional[Path] = None, **arguments) -> Dict[str, float]:
        """Mean PSNR, SSIM, LPIPS and seconds per frame over the triplets, with 8-bit frames as users see them.

        Args:
            output: folder to write the frames to, as NAME.png.
            arguments: handed to the pipeline.
        """
        rows = []
        for triplet in self.triplets:
            frames = [read_image(path) for path in (triplet.prev, triplet.next)]
            generator = torch.Generator().manual_seed(self.seed)
            start = time.perf_counter()
            image = self.pipeline(*frames, generator=generator, **arguments).frames[0][0]
            seconds = time.perf_counter() - start
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                write_image(image, output / f"{triplet.name}.png")
            made, truth = np.array(image), np.array(read_image(triplet.truth))
            if made.shape != truth.shape:
                raise ValueError(f"{triplet.truth} has shape {truth.shape}, but its neighbours {made.shape}.")
            rows.append((psnr(made, truth), ssim(made, truth), lpips_distance(self.lpips, made, truth), seconds))
        means = np.mean(rows, axis=0)
        return dict(zip(("psnr", "ssim", "lpips", "seconds"), map(float, means)))

    def ablate(self, policies: Iterable[str], steps: Iterable[int]) -> Iterable[str]:
        """Rows of a Markdown table: every hint policy with every number of steps, as they are measured."""
        yield "| motion hints | steps | PSNR | SSIM | LPIPS | s/frame |"
        yield "|---|---|---|---|---|---|"
        steps = list(steps)
        for policy in policies:
            for count in steps:
                means = self.score(hint_policy=policy, num_inference_steps=count)
                yield (
                    f"| {policy} | {count} | {means['psnr']:.2f} | {means['ssim']:.4f} | {means['lpips']:.4f} | "
                    f"{means['seconds']:.2f} |"
                )


def summary(name: str, count: int, means: Dict[str, float]) -> str:
    return json.dumps({"set": name, "n": count, **{key: round(value, 4) for key, value in means.items()}})
