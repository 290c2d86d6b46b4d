"""Crops of three frames with motion hints that take long to compute, made once and kept in memory-mapped files.

    python -m training.crop_cache CLIPS OUTPUT [--count 6000] [--size 224] [--composed_share 0.2]

Hints are the optical flow that the pipeline starts with (`--hint_source`), found on crops larger than those of
training, so that what moves into the picture is seen; or, with `--begun`, those that it begins with, from which a decoder guesses motion. Gaps, instants and the choice by motion are fixed (`GAPS` and what stands beside it): options of the
same names of `training.train_sampler` are for clips. A share of the crops can be composed of pieces of frames, as `composed` does: things that cover each other, at an
exact instant; a share be cut larger and made smaller, which is sharper than clips are; a share be compressed, as old videos are.
`training.train_sampler --data crops:OUTPUT` trains on them.
"""

import argparse
import io
import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.files import filled_folder
from madiff_diffusers.frame_coding import EncodedFrames, FrameCoder
from madiff_diffusers.hint_registry import build_hint_source
from madiff_diffusers.motion_hints import finishes
from madiff_diffusers.motion_search import flow_of_size
from training.frame_bank import FrameBank, composed
from training.options import one_line_errors


FILES = {"frames": np.uint8, "hints": np.float16, "time": np.float32}

# Of the crops, see `FrameBank.triplets` and `composed`.
GAPS, ANY_TIME, CANDIDATES, LAYERS = (0.3, 0.3, 0.22, 0.18), 0.35, 4, 3

QUANTIZERS = (2, 7)  # of compressed crops, the last left out: from hardly seen to blocks and ringing


class CropCache:
    """
    Args:
        folder: written by `write_crops`.
        device: where batches are wanted.

    Attributes:
        hint_source: where the hints come from.
        begun: whether they are only begun, to be finished from motion that a decoder guesses.
        finished: whether a checkpoint finished them so when the crops were made, with `hint_settings` of the source.

    Raises:
        ValueError: if it is no such folder.
    """

    def __init__(self, folder: str, device: torch.device):
        root, self.device = Path(folder), device
        if not (root / "crops.json").is_file():
            raise ValueError(f"`data`: crops must be a folder made by training.crop_cache, but is {folder!r}.")
        about = json.loads((root / "crops.json").read_text())
        self.hint_source: str = about["hint_source"]
        # Folders of former versions do not say these.
        self.begun: bool = about.get("begun", False)
        self.finished: bool = bool(about.get("finished_by"))
        self.hint_settings: dict | None = about.get("hint_settings")
        arrays = {name: np.load(root / f"{name}.npy", mmap_mode="r") for name in FILES}
        self.frames, self.hints, self.time = arrays["frames"], arrays["hints"], arrays["time"]
        self.size: int = self.frames.shape[-2]

    def __len__(self) -> int:
        return len(self.time)

    def triplets(self, count: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """What [`FrameBank`]'s method gives, of parts of crops drawn at random, and `hints` `(N, 4, size, size)`.

        Raises:
            ValueError: if the crops are smaller than that.
        """
        if size > self.size:
            raise ValueError(f"`resolution` must be {self.size} at most, the size of the crops, but is {size}.")
        chosen = torch.randint(len(self), (count,), generator=generator, device=self.device).tolist()
        places = torch.randint(self.size - size + 1, (count, 2), generator=generator, device=self.device).tolist()
        frames, hints = [], []
        for number, (top, left) in zip(chosen, places):
            part = np.s_[number, :, top : top + size, left : left + size]
            frames.append(torch.from_numpy(self.frames[part].copy()))
            hints.append(torch.from_numpy(self.hints[part].astype(np.float32)))
        pixels = torch.stack(frames).to(self.device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # [N,3,3,h,w]
        prev, mid, next_ = pixels.unbind(1)
        return {
            "frame_prev": prev,
            "frame_mid": mid,
            "frame_next": next_,
            "time": torch.from_numpy(self.time[chosen]).to(self.device),
            "hints": torch.stack(hints).to(self.device),
        }


def compressed(frames: np.ndarray, quantizer: int) -> np.ndarray:
    """Frames `(N, H, W, 3)` uint8, of even height and width, after MPEG-4 (part 2) with this quantizer, from 1 to 31: the first by itself, each
    other by what it adds to the one before."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = quantizer
        stream.codec_context.max_b_frames = 0
        stream.bit_rate = 10**8  # no limit, so that the quantizer decides
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@torch.no_grad()
def write_crops(
    clips: str,
    output: Path,
    count: int,
    size: int,
    hint_source: str | None = None,
    seed: int = 0,
    composed_share: float = 0.0,
    begun: bool = False,
    smaller_share: float = 0.0,
    compressed_share: float = 0.0,
    finished_by: str = "",
) -> None:
    """Write a folder of crops; it is there when it is complete.

    Args:
        hint_source: where hints come from; `fine_flow`, or that of `finished_by`, if not given.
        finished_by: folder or name of a checkpoint whose decoder guesses motion from the hints that its own source, of its settings, begins
            with, which then finishes them.

    Raises:
        ValueError: if it is there already, or cannot be made of that.
    """
    if output.exists():
        raise ValueError(f"`output` must not be there yet, but {output} is.")
    for name, value in (("count", count), ("size", size)):
        if value < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {value}.")
    shares = {
        "composed_share": composed_share,
        "smaller_share": smaller_share,
        "compressed_share": compressed_share,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be from 0 to 1, but is {value}.")
    if begun and finished_by:
        raise ValueError(f"`begun` must not be given with `finished_by`, but is, with {finished_by!r}.")
    coder, settings = None, None
    if finished_by:
        try:
            pipeline = MADiffPipeline.from_pretrained(finished_by)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`finished_by` must be a checkpoint, but {finished_by!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        if not getattr(pipeline.vqvae, "motion_scales", 0) or not finishes(pipeline.hints):
            raise ValueError(
                "`finished_by` must be a checkpoint whose decoder guesses motion and whose hint source finishes it, such as madiff-fast, but "
                f"is {finished_by!r}."
            )
        own, settings = pipeline.config.hint_source, pipeline.config.hint_settings
        if hint_source not in (None, own):
            raise ValueError(
                f"`hint_source` must be that of `finished_by` {finished_by!r}, {own}, or not be given, but is {hint_source}."
            )
        multiple = pipeline.frame_processor.multiple
        if size % multiple:
            raise ValueError(
                f"`size` must be a multiple of {multiple} with `finished_by` {finished_by!r}, but is {size}."
            )
        hint_source, source, coder = own, pipeline.hints, FrameCoder(pipeline.vqvae)
    else:
        hint_source = hint_source or "fine_flow"
        source = build_hint_source(hint_source)
    if source.hint_channels != 2:
        raise ValueError(f"`hint_source` must be optical flow alone, such as fine_flow, but is {hint_source}.")
    if begun and not finishes(source):
        raise ValueError(
            f"`begun` needs a `hint_source` that begins hints and finishes them, such as search, but it is {hint_source}."
        )
    if compressed_share > 0 and size % 2:
        raise ValueError(f"`size` must be even where crops are compressed, but is {size}.")
    shapes = {"frames": (count, 3, size, size, 3), "hints": (count, 4, size, size), "time": (count,)}
    needed = sum(math.prod(shapes[name]) * np.dtype(dtype).itemsize for name, dtype in FILES.items())
    output.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(output.parent).free:
        raise ValueError(f"`output` must lie where {needed / 2**30:.1f} GiB are free, but is {output}.")
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    bank = FrameBank(clips, cpu, size)

    def chance(share: float) -> bool:
        return share > 0 and bool(torch.rand((), generator=generator) < share)

    with filled_folder(output) as folder:
        files = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shapes[name])
            for name, dtype in FILES.items()
        }
        for number in range(count):
            if chance(composed_share):
                drawn, _ = composed(bank, 1, size, LAYERS, generator)
            else:
                side = size
                if chance(smaller_share):
                    grown = round(size * (1 + 0.5 * torch.rand((), generator=generator).item()))
                    side = max(min(grown, bank.largest) // 2 * 2, size)
                drawn = bank.triplets(1, side, GAPS, ANY_TIME, CANDIDATES, generator)
            frames = torch.cat([drawn[name] for name in ("frame_prev", "frame_mid", "frame_next")])
            if chance(compressed_share):
                quantizer = int(torch.randint(*QUANTIZERS, (), generator=generator))
                pixels = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
                frames = torch.from_numpy(compressed(pixels, quantizer)).permute(0, 3, 1, 2).float() / 127.5 - 1
            if frames.shape[-1] > size:
                frames = F.interpolate(
                    frames, size=(size, size), mode="bicubic", align_corners=False, antialias=True
                ).clamp(-1, 1)
            time, (prev, _, next_) = drawn["time"].item(), frames.split(1)
            if coder is not None:
                neighbours = [EncodedFrames(each, (size, size)) for each in (prev, next_)]
                hints = coder.motion_hints(source, *neighbours, [time], torch.tensor([time]))
            else:
                ask = source.begin if begun else source.start
                hints = [flow_of_size(each, (size, size)) for each in ask(prev, next_, time)]
            files["frames"][number] = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            files["hints"][number] = torch.cat(tuple(hints), dim=1)[0].numpy()
            files["time"][number] = time
            if number % 500 == 0:
                print(f"{number} of {count}", flush=True)
        for name in FILES:
            files.pop(name).flush()  # and closed with that: Windows renames no folder with open files
        about = {
            "hint_source": hint_source,
            "hint_settings": settings,
            "clips": clips,
            "seed": seed,
            **shares,
            "begun": begun,
            "finished_by": finished_by,
        }
        (folder / "crops.json").write_text(json.dumps(about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", help="folder of video files")
    parser.add_argument("output", type=Path, help="folder that is written")
    parser.add_argument("--count", type=int, default=6000, help="of crops (default: 6000)")
    parser.add_argument("--size", type=int, default=224, help="of their sides, in pixels (default: 224)")
    parser.add_argument(
        "--hint_source", help="as the pipeline's (default: fine_flow, or that of the checkpoint of --finished_by)"
    )
    parser.add_argument("--composed_share", type=float, default=0.0, help="of crops that are composed (default: 0)")
    parser.add_argument(
        "--begun",
        action="store_true",
        help="hints that the source begins with, for a decoder that guesses motion from them (`guess_motion`), in the place of those of its start",
    )
    parser.add_argument(
        "--finished_by",
        default="",
        metavar="CHECKPOINT",
        help="hints that its decoder guesses motion from, finished: for parts that are trained behind a guess that stays as it is (`--trained`)",
    )
    parser.add_argument(
        "--smaller_share",
        type=float,
        default=0.0,
        help="of the crops of clips that are cut up to half as large again, and made smaller (default: 0)",
    )
    parser.add_argument(
        "--compressed_share", type=float, default=0.0, help="of crops that MPEG-4 goes over first (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0)
    write_crops(**vars(parser.parse_args()))


if __name__ == "__main__":
    with one_line_errors():
        main()
