"""Makes `motion.gif`: a scene at 6.25 frames a second, and beside it the same with three frames made between each two.

    python examples/make_motion.py

The scene is that of `make_frames.py`, made from two CC0 photographs, swaying to and fro.
"""

import math
from pathlib import Path

import numpy as np
from make_frames import frame
from PIL import Image, ImageDraw

from madiff_diffusers import MADiffPipeline, interpolate_frames


SOURCE_FRAMES, FACTOR = 12, 4  # of one sway
HUNDREDTHS = 4  # of a second, that each frame of the result is shown
WIDTH, HEIGHT, BAR = 312, 208, 18
COLOURS = 160


def scene(number: int) -> np.ndarray:
    return frame(2.2 * math.sin(2 * math.pi * number / SOURCE_FRAMES))


def panel(picture: Image.Image, caption: str) -> Image.Image:
    made = Image.new("RGB", (WIDTH, HEIGHT + BAR), "white")
    made.paste(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), (0, BAR))
    ImageDraw.Draw(made).text((4, 3), caption, fill="black")
    return made


def side_by_side(source: Image.Image, result: Image.Image) -> Image.Image:
    rate = 100 / HUNDREDTHS
    both = Image.new("RGB", (2 * WIDTH + 6, HEIGHT + BAR), "white")
    both.paste(panel(source, f"source: {rate / FACTOR:g} frames a second"), (0, 0))
    both.paste(panel(result, f"madiff: {rate:g} frames a second"), (WIDTH + 6, 0))
    return both


def write_gif(frames: list[Image.Image], path: Path) -> None:
    """With one palette, of all frames, and without dithering, which would not compress."""
    sheet = np.concatenate([np.array(each)[::4, ::4] for each in frames])
    palette = Image.fromarray(sheet).quantize(COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=3)
    first, *others = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in frames]
    first.save(path, save_all=True, append_images=others, duration=10 * HUNDREDTHS, loop=0, optimize=False)


if __name__ == "__main__":
    pipe = MADiffPipeline.from_pretrained("madiff-fast")
    pipe.set_progress_bar_config(disable=True)
    sources = [Image.fromarray(scene(number)) for number in range(SOURCE_FRAMES + 1)]  # the last is the first again
    results = list(interpolate_frames(pipe, sources, FACTOR))[: SOURCE_FRAMES * FACTOR]
    frames = [side_by_side(sources[number // FACTOR], result) for number, result in enumerate(results)]
    write_gif(frames, Path(__file__).with_name("motion.gif"))
