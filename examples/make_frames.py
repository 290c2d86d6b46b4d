"""Makes the example frames beside this file: a coffee cup under a moving camera, and a cat that moves across it.

    python examples/make_frames.py

Both photographs are CC0 and come with scikit-image: "coffee" by Rachel Michetti, "chelsea" by Stéfan van der Walt.
`prev.png` and `next.png` are the neighbours; `truth.png` is the frame that lies in the middle of them. `madiff demo` offers the
neighbours as JPEG files of the package.
"""

from pathlib import Path

import cv2
import numpy as np
from skimage import data


SIZE = (480, 320)  # width, height


def frame(time: float) -> np.ndarray:
    """RGB picture of the scene at a time, -1 … 1."""
    # 1. the table: the camera turns and drifts, 6 pixels to each side
    matrix = cv2.getRotationMatrix2D((300, 200), 1.0 * time, 0.9 + 0.01 * time)
    matrix[:, 2] += (-60 + 6 * time, -35 + 3 * time)
    scene = cv2.warpAffine(data.coffee(), matrix, SIZE, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    # 2. the cat's head, 8 pixels to each side, in front
    matrix = cv2.getRotationMatrix2D((230, 130), -2.0 * time, 0.75)
    matrix[:, 2] += (-130 - 8 * time, 40 + 4 * time)
    cat = cv2.warpAffine(data.chelsea(), matrix, SIZE, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    oval = cv2.ellipse(np.zeros((300, 451), np.float32), (232, 140), (105, 115), 0, 0, 360, 1.0, -1, cv2.LINE_AA)
    mask = cv2.warpAffine(oval, matrix, SIZE)[..., None]
    return (scene * (1 - mask) + cat * mask).round().astype(np.uint8)


if __name__ == "__main__":
    for name, time in (("prev", -1.0), ("truth", 0.0), ("next", 1.0)):
        path = Path(__file__).with_name(f"{name}.png")
        picture = cv2.cvtColor(frame(time), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(path), picture)
        if name != "truth":
            cv2.imwrite(
                str(path.parent.parent / "madiff_diffusers" / "examples" / f"{name}.jpg"),
                picture,
                [cv2.IMWRITE_JPEG_QUALITY, 92],
            )
