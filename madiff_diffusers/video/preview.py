"""A strip of the latest frames of a video, to look at while it is made."""

from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..image_io import write_image


PREVIEW_FRAMES, PREVIEW_HEIGHT = 8, 180


class PreviewStrip:
    """
    The latest frames, side by side in an image file.

    Args:
        path: the image file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._frames: deque[tuple[str, Image.Image]] = deque(maxlen=PREVIEW_FRAMES)

    def add(self, caption: str, frame: np.ndarray) -> None:
        """Add a frame: `(H, W, 3)` float32 RGB, of which values outside [0, 1] are cut off."""
        self._frames.append((caption, _small(frame)))

    def write(self) -> None:
        """Write the file."""
        width = sum(image.width for _, image in self._frames)
        strip = Image.new("RGB", (width, PREVIEW_HEIGHT + 14), "white")
        draw, left = ImageDraw.Draw(strip), 0
        for caption, image in self._frames:
            strip.paste(image, (left, 0))
            draw.text((left + 2, PREVIEW_HEIGHT + 1), caption, fill="black")
            left += image.width
        write_image(strip, self._path)


def _small(array: np.ndarray) -> Image.Image:
    image = Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize(
        (max(1, round(image.width * PREVIEW_HEIGHT / image.height)), PREVIEW_HEIGHT), Image.Resampling.BOX
    )
