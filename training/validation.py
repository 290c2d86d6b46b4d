"""What a validation scores and shows: fixed windows of clips, image metrics, and pictures of what the network sees."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from madiff_diffusers.evaluation.metrics import psnr, ssim
from madiff_diffusers.evaluation.visualization import gate_image, hints_images, offsets_image
from madiff_diffusers.motion_hints import HintSource
from training.data.sources import Clips, NoWindow, parse_sources, read_source
from training.options import RunOptions


def validation_windows(options: RunOptions, frames: int, multiple: int) -> list[np.ndarray]:
    """Windows of consecutive frames, `validation_samples` in number, each `(frames, h, w, 3)` uint8.

    They lie in the middle of clips spread evenly over the data, and are cropped in the centre to `validation_crop`, or to
    the largest multiple of `multiple` pixels that a frame has.

    Raises:
        ValueError: if the data has no clip that is long enough, or holds still pictures or recorded events.
    """
    drawn = parse_sources(options.data) if options.data else []
    trained = {Path(path).resolve() for name, path, _ in drawn if name.startswith("datasets")}
    # Videos are read where a window lies, not whole.
    options = dataclasses.replace(options, data=options.validation, cache_gib=0.0)
    windows: list[np.ndarray] = []
    sources = parse_sources(options.validation)
    for place, (name, path, _) in enumerate(sources):
        if name in ("stills", "mvsec", "datasets-stream"):
            raise ValueError(f"`validation` must be clips that are there to be read, but has the format {name}.")
        clips = read_source(name, path, options, split="test")
        if name == "datasets" and Path(path).resolve() in trained and clips.split in (None, "train"):
            raise ValueError(f"`validation`: {path!r} has no split `test` or `validation`, and `data` is all of it.")
        long_enough = np.flatnonzero(clips.lengths >= frames)
        if not len(long_enough):
            raise ValueError(f"`validation`: no clip in {path!r} has {frames} frames.")
        count = len(range(place, options.validation_samples, len(sources)))
        for i in range(count):
            number = int(long_enough[i * len(long_enough) // count])
            # Several windows of one clip lie apart.
            same = [j for j in range(count) if j * len(long_enough) // count == i * len(long_enough) // count]
            spare = int(clips.lengths[number]) - frames
            first = spare * (2 * same.index(i) + 1) // (2 * len(same))
            window = _nearest_window(clips, number, first, frames)
            height, width = (min(options.validation_crop, side) // multiple * multiple for side in window.shape[1:3])
            if not height or not width:
                raise ValueError(
                    f"`validation`: frames of {window.shape[1]}x{window.shape[2]} in {path!r} are smaller than {multiple} pixels."
                )
            top, left = (window.shape[1] - height) // 2, (window.shape[2] - width) // 2
            windows.append(window[:, top : top + height, left : left + width].copy())
    return windows


def _nearest_window(clips: Clips, number: int, first: int, frames: int) -> np.ndarray:
    """The window of a clip that begins nearest to a frame and has no scene cut.

    Raises:
        ValueError: if there is none.
    """
    starts = range(int(clips.lengths[number]) - frames + 1)
    for start in sorted(starts, key=lambda start: (abs(start - first), start)):
        try:
            return clips.read(number, range(start, start + frames))
        except NoWindow:
            continue
    raise ValueError(f"`validation`: clip {number} has no {frames} frames without a scene cut.")


def to_frames(window: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Each frame of a window as `(1, 3, H, W)` float32 in [-1, 1]."""
    frames = torch.from_numpy(window).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
    return tuple(frame[None] for frame in frames)


def to_image(frame: torch.Tensor) -> np.ndarray:
    """`(1, 3, H, W)` in [-1, 1] as `(H, W, 3)` uint8."""
    return ((frame[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def image_scores(result: torch.Tensor, truth: torch.Tensor, lpips: torch.nn.Module | None) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of two frames `(1, 3, H, W)`, as 8-bit pictures."""
    images = [to_image(frame) for frame in (result, truth)]
    scores = {
        "l1": float(np.abs(images[0].astype(np.float32) - images[1]).mean()) / 255,
        "psnr": psnr(*images),
        "ssim": ssim(*images),
    }
    if lpips is not None:
        shown = [
            torch.from_numpy(image).permute(2, 0, 1)[None].float().to(truth.device) / 127.5 - 1 for image in images
        ]
        scores["lpips"] = lpips(*shown).item()
    return scores


# ---- pictures ----


def panel(images: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Named pictures of one size side by side, `(H + 16, n * W, 3)` uint8."""
    labelled = []
    for name, image in images:
        title = np.full((16, image.shape[1], 3), 255, np.uint8)
        cv2.putText(title, name, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        labelled.append(np.concatenate([title, image]))
    return np.concatenate(labelled, axis=1)


def decoded_panel(
    frames: Sequence[torch.Tensor],
    result: torch.Tensor,
    hints: Sequence[torch.Tensor],
    hint_source: str,
    source: HintSource,
    offsets: torch.Tensor,
    gate: torch.Tensor,
) -> np.ndarray:
    """What the decoder saw and made of one sample.

    Args:
        frames: previous, middle and next frame, each `(1, 3, H, W)`.
        result: `(1, 3, H, W)`.
        hints: towards the previous and the next frame, each `(1, C, H, W)`.
        hint_source, source: the name of what made them, and itself.
        offsets (`(1, 4, U, V)`), gate (`(1, 1, U, V)`): of the finest warp; resized to the frames' size for display.
    """
    height, width = result.shape[-2:]
    prev, truth, next_ = frames
    images = [
        ("previous", to_image(prev)),
        ("next", to_image(next_)),
        ("truth", to_image(truth)),
        ("result", to_image(result)),
    ]
    for side, each in zip(("previous", "next"), hints):
        images += [(f"{name} to {side}", image) for name, image in hints_images(each[0], hint_source, source)]
    size = (width, height)
    images.append(("gate", gate_image(gate[0], (height, width))))
    for side, each in zip(("previous", "next"), offsets[0].chunk(2)):
        image = cv2.resize(offsets_image(each), size, interpolation=cv2.INTER_NEAREST)
        images.append((f"offsets to {side}", image))
    return panel(images)
