"""Makes `limits.png`, which shows where `madiff-compact` fails: for each scene the neighbours, what is made, and the truth.

    python examples/make_limits.py

A ball flies three times its size between the frames; a thin rod turns; the photograph "astronaut" (NASA, public domain) turns
and comes closer fast. Backgrounds are of the CC0 photograph "coffee" by Rachel Michetti. All come with scikit-image.
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

from madiff_diffusers import MADiffPipeline


SIZE = (256, 192)  # width, height


def background(time: float) -> np.ndarray:
    matrix = np.float32([[0.6, 0, -60 + 2 * time], [0, 0.6, -20]])
    return cv2.warpAffine(data.coffee(), matrix, SIZE, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)


def ball(time: float) -> np.ndarray:
    centre = (int(16 * (128 + 30 * time)), int(16 * (80 + 12 * time**2)))
    return cv2.circle(background(time), centre, 16 * 10, (235, 200, 40), -1, cv2.LINE_AA, shift=4)


def rod(time: float) -> np.ndarray:
    angle = np.deg2rad(60 + 12 * time)
    end = (int(16 * (128 + 110 * np.cos(angle))), int(16 * (170 - 150 * np.sin(angle))))
    return cv2.line(background(time), (16 * 128, 16 * 170), end, (20, 20, 20), 2, cv2.LINE_AA, shift=4)


def face(time: float) -> np.ndarray:
    matrix = cv2.getRotationMatrix2D((225, 110), 10 * time, 0.9 * 1.15**time)
    matrix[:, 2] += (-97 + 10 * time, -20)
    return cv2.warpAffine(data.astronaut(), matrix, SIZE, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)


def row(pipe: MADiffPipeline, scene: Callable[[float], np.ndarray]) -> np.ndarray:
    prev, truth, next_ = (scene(time) for time in (-1.0, 0.0, 1.0))
    made = pipe(Image.fromarray(prev), Image.fromarray(next_)).frames[0][0]
    return np.concatenate([prev, next_, np.array(made), truth], axis=1)


if __name__ == "__main__":
    pipe = MADiffPipeline.from_pretrained("madiff-compact")
    rows: list[np.ndarray] = [row(pipe, scene) for scene in (ball, rod, face)]
    Image.fromarray(np.concatenate(rows)).save(Path(__file__).with_name("limits.png"), optimize=True)
