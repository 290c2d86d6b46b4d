"""The node: a batch of frames in, a smoother one out. All that is made, `madiff_diffusers` makes."""

import importlib
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.commands.common import DEFAULT_CHECKPOINT
from madiff_diffusers.precision import best_device, fastest_dtype
from madiff_diffusers.video.frame_times import Timeline
from madiff_diffusers.video.interpolation import FrameInterpolator, Pair, SourceFrame


DTYPES = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@lru_cache(maxsize=1)
def load(checkpoint: str, device: str, dtype: str) -> MADiffPipeline:
    """The latest pipeline stays loaded from one run of a workflow to the next."""
    place = best_device() if device == "auto" else torch.device(device)
    pipeline = MADiffPipeline.from_pretrained(checkpoint, dtype=DTYPES[dtype] or fastest_dtype(place)).to(place)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def host() -> tuple[Any, Any]:
    """ComfyUI's progress bar and its check for Cancel; None where this runs without ComfyUI."""
    try:
        return importlib.import_module("comfy.utils").ProgressBar, importlib.import_module(
            "comfy.model_management"
        ).throw_exception_if_processing_interrupted
    except ModuleNotFoundError:
        return None, None


class MADiffInterpolate:
    """Makes frames between the frames of a batch."""

    CATEGORY = "image/animation"
    DESCRIPTION = "Makes frames between the frames of a batch by motion-aware latent diffusion (MADiff)."
    FUNCTION = "interpolate"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return {
            "required": {
                "images": ("IMAGE",),
                "multiplier": (
                    "INT",
                    {
                        "default": 2,
                        "min": 1,
                        "max": 64,
                        "tooltip": "frames in the place of each one, where target_fps is 0",
                    },
                ),
                "source_fps": (
                    "FLOAT",
                    {
                        "default": 24.0,
                        "min": 0.01,
                        "max": 1000.0,
                        "step": 0.01,
                        "tooltip": "frames a second of images",
                    },
                ),
                "target_fps": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1000.0,
                        "step": 0.01,
                        "tooltip": "frames a second of the result; 0: by the multiplier",
                    },
                ),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "device": (["auto", "cpu", "cuda", "mps", "xpu"],),
                "dtype": (list(DTYPES),),
            },
            "optional": {
                "steps": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1000, "tooltip": "of sampling; 0: the checkpoint's own"},
                ),
                "checkpoint": (
                    "STRING",
                    {
                        "default": DEFAULT_CHECKPOINT,
                        "tooltip": "what comes with the package, a folder, or USER/NAME on the Hub",
                    },
                ),
            },
        }

    def interpolate(
        self,
        images: torch.Tensor,
        multiplier: int,
        source_fps: float,
        target_fps: float,
        seed: int,
        device: str,
        dtype: str,
        steps: int = 0,
        checkpoint: str = DEFAULT_CHECKPOINT,
    ) -> tuple[torch.Tensor, float]:
        """
        Args:
            images: `(B, H, W, C)` in [0, 1]; of four channels, transparency is left out.
            multiplier: frames in the place of each one, if `target_fps` is 0; the last frame is then not repeated.
            source_fps, target_fps: frames a second.

        Returns:
            frames `(B', H, W, 3)` in [0, 1] on the CPU, and their rate. With a target rate they last as long as the source; frames that
            fall on one of the source are that one.
        """
        pipeline = load(checkpoint, device, dtype)
        frames = images[..., :3].float().cpu().numpy()
        source_rate = Fraction(str(source_fps))
        rate = Fraction(str(target_fps)) if target_fps else None
        timeline = Timeline(
            range(len(frames)), len(frames), 1 / source_rate, factor=None if rate else multiplier, rate=rate
        )
        bar, check = host()
        progress = bar(len(timeline) if rate else (len(frames) - 1) * multiplier + 1) if bar else None
        interpolator = FrameInterpolator(pipeline, steps or None, seed)
        result, prev = [], SourceFrame(frames[0])
        for index, shown in enumerate(timeline.shown()):
            next_ = SourceFrame(frames[index + 1]) if index + 1 < len(frames) else None
            times = [frame.position for frame in shown if frame.position]
            made = interpolator.between([Pair(prev, next_, times)] if times else [])
            for frame in shown[:1] if next_ is None and rate is None else shown:
                result.append(torch.from_numpy(next(made) if frame.position else frames[frame.index]))
                if check:
                    check()
                if progress:
                    progress.update(1)
            prev = next_
        return torch.stack(result), float(rate or source_rate * multiplier)


NODE_CLASS_MAPPINGS = {"MADiffInterpolate": MADiffInterpolate}
NODE_DISPLAY_NAME_MAPPINGS = {"MADiffInterpolate": "MADiff frame interpolation"}
