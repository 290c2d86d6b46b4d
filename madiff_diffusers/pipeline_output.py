# SPDX-License-Identifier: Apache-2.0
"""What the pipeline gives."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


Frames = list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


@dataclass
class MADiffPipelineOutput(BaseOutput):
    """
    Args:
        frames: the frames between the neighbours, in the order of `times`, or evenly spaced. For `output_type="pil"` a list of PIL images
            for each pair; for `"np"` an array `(B, F, H, W, 3)` and for `"pt"` a tensor `(B, F, 3, H, W)`, float32 in
            [0, 1]; for `"latent"` a tensor `(B, F, C, h, w)`.
    """

    frames: Frames
