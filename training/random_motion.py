"""Motion made from still pictures, where every moment is known.

A scene is a background and layers cut out of other pictures, each moving on a path of its own: shift with acceleration,
rotation and scale. Layers hide what lies behind them. Any moment can be rendered, so that the true middle frame, and
frames at any time between, are known; frames can be blurred by an exposure time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class Layer:
    """A picture that moves. Times run from -1 (previous frame) to 1 (next frame); it lies at `centre` at time 0."""

    picture: np.ndarray  # (h, w, 4) uint8: colours times opacity, and opacity
    centre: np.ndarray  # (2,) x, y in pixels of the scene
    velocity: np.ndarray  # (2,) pixels per unit of time
    acceleration: np.ndarray  # (2,) pixels per squared unit of time
    angle: float  # degrees at time 0
    spin: float  # degrees per unit of time
    growth: float  # of the logarithm of the scale, per unit of time
    scale: float = 1.0  # at time 0

    def matrix(self, time: float) -> np.ndarray:
        """Affine map `(2, 3)` from the picture's pixels to the scene's."""
        height, width = self.picture.shape[:2]
        scale = self.scale * float(np.exp(self.growth * time))
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), self.angle + self.spin * time, scale)
        place = self.centre + self.velocity * time + 0.5 * self.acceleration * time**2
        matrix[:, 2] += place - np.array([(width - 1) / 2, (height - 1) / 2])
        return matrix


class MovingScene:
    """A background and layers, drawn at random.

    Args:
        stills: pictures `(H, W, 3)` uint8; the first is the background, each of the others becomes a layer.
        height, width: of the scene, in pixels.
        rng: of every draw.
        speed: largest shift between the previous and the middle frame, in pixels.
    """

    def __init__(
        self, stills: Sequence[np.ndarray], height: int, width: int, rng: np.random.Generator, speed: float = 12.0
    ):
        self.height, self.width = height, width
        self.layers: list[Layer] = []
        for number, still in enumerate(stills):
            background = number == 0
            size = np.array([width, height]) * (1.0 if background else rng.uniform(0.2, 0.7, 2))
            # Most scenes move little and some fast; a background moves as a camera does.
            direction = rng.normal(size=2)
            velocity = direction / np.linalg.norm(direction) * speed * rng.beta(1, 2)
            centre = np.array([width - 1, height - 1]) / 2
            if not background:
                centre = rng.uniform(0, 1, 2) * np.array([width - 1, height - 1])
            self.layers.append(
                Layer(
                    picture=self._cut_out(still, size, rng, whole=background),
                    centre=centre,
                    velocity=velocity,
                    acceleration=rng.normal(size=2) * speed * 0.1,
                    angle=0.0 if background else float(rng.uniform(0, 360)),
                    spin=float(rng.normal() * (1 if background else 6)),
                    growth=float(rng.normal() * (0.01 if background else 0.04)),
                )
            )

    @staticmethod
    def _cut_out(still: np.ndarray, size: np.ndarray, rng: np.random.Generator, whole: bool) -> np.ndarray:
        """A piece of a picture of about `size` (x, y), with a smooth random outline unless it is `whole`."""
        height, width = still.shape[:2]
        wanted = np.maximum(size.round().astype(int), 8)
        # A piece is not magnified, unless the picture is smaller than what is wanted.
        piece = np.minimum(wanted, [width, height])
        left, top = (rng.integers(side - part + 1) for side, part in zip((width, height), piece))
        picture = still[top : top + piece[1], left : left + piece[0]]
        picture = cv2.resize(picture, tuple(int(side) for side in wanted), interpolation=cv2.INTER_LINEAR)
        if whole:
            return np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
        # Radius over angle: a circle with a few random harmonics.
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        radius = np.ones(64)
        for harmonic in range(2, 6):
            radius += rng.normal() * 0.25 / harmonic * np.cos(harmonic * angles + rng.uniform(0, 2 * np.pi))
        radius *= 0.95 / radius.max()
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None] * (wanted / 2) + wanted / 2
        opacity = np.zeros((wanted[1], wanted[0]), np.uint8)
        cv2.fillPoly(opacity, [(points * 16).round().astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
        colours = picture.astype(np.float32) * (opacity[..., None].astype(np.float32) / 255)
        return np.dstack([colours.round().astype(np.uint8), opacity])

    def render(self, time: float, exposure: float = 0.0) -> np.ndarray:
        """The scene `(H, W, 3)` uint8 at a time in [-1, 1].

        Args:
            exposure: time over which the frame is exposed, around `time`; 0 gives a sharp frame. A blurred one is the mean
                of moments between which nothing moves much farther than a pixel.
        """
        moments = int(np.clip(np.ceil(self.largest_shift / 2 * exposure), 2, 16)) + 1 if exposure else 1
        times = time + exposure * (np.linspace(-0.5, 0.5, moments) if exposure else np.zeros(1))
        frame = sum(self._sharp(moment) for moment in times) / len(times)
        return np.clip(frame.round(), 0, 255).astype(np.uint8)

    def _sharp(self, time: float) -> np.ndarray:
        size = (self.width, self.height)
        background, *layers = self.layers
        matrix = background.matrix(time)
        frame = cv2.warpAffine(
            background.picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        frame = frame[..., :3].astype(np.float32)
        for layer in layers:
            moved = cv2.warpAffine(layer.picture, layer.matrix(time), size, flags=cv2.INTER_LINEAR).astype(np.float32)
            frame = moved[..., :3] + (1 - moved[..., 3:] / 255) * frame
        return frame

    @property
    def largest_shift(self) -> float:
        """Upper bound of how far a point of the scene moves between times -1 and 1, in pixels."""
        shifts = []
        for layer in self.layers:
            reach = float(np.hypot(*layer.picture.shape[:2])) / 2 * layer.scale
            turning = reach * (np.radians(abs(layer.spin)) + abs(layer.growth)) * 1.1
            shifts.append(2 * (np.linalg.norm(layer.velocity) + np.linalg.norm(layer.acceleration) + turning))
        return float(max(shifts))
