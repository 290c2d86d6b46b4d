"""One way for colours: every frame, made or not, goes from its file's pixels to RGB in floating point and back by the same numbers."""

from typing import NamedTuple, Optional, Tuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

# FFmpeg's numbers of matrices (of files) and its scaler's.
_SCALER_MATRIX = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601, 7: Colorspace.SMPTE240M, 9: Colorspace.BT2020, 10: Colorspace.BT2020}  # fmt: skip

# Planar floating point: 8-bit RGB loses what the eye sees in flat areas (47 dB instead of above 60).
_RGB = "gbrpf32le"
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


class ColourTags(NamedTuple):
    """
    What a file tells of its colours, in FFmpeg's numbers (of ITU-T H.273).

    Args:
        range: 1 for limited, 2 for full, 0 for not told.
        matrix, primaries, transfer: 2 for not told.
    """

    range: int
    matrix: int
    primaries: int
    transfer: int

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "ColourTags":
        return cls(int(frame.color_range), int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc))


class ColourPath:
    """
    Between pixels as a file has them and RGB.

    Args:
        tags: what is written about the pixels.
        height: rows; what has fewer than 720 and does not tell its matrix has BT.601's, else BT.709's.
    """

    def __init__(self, tags: ColourTags, height: int):
        self.tags = tags
        self._matrix = _SCALER_MATRIX.get(tags.matrix, Colorspace.ITU709 if height >= 720 else Colorspace.ITU601)
        self._range = ColorRange.JPEG if tags.range == 2 else ColorRange.MPEG
        # One for each direction, which may have a thread each.
        self._reader, self._writer = VideoReformatter(), VideoReformatter()

    def to_rgb(self, frame: av.VideoFrame, size: Optional[Tuple[int, int]] = None) -> np.ndarray:
        """A frame as `(H, W, 3)` float32 in [0, 1]; scaled to `(height, width)` if it has another size."""
        height, width = size or (frame.height, frame.width)
        rgb = is_rgb(frame.format)
        converted = self._reader.reformat(
            frame,
            width=width,
            height=height,
            format=_RGB,
            interpolation=Interpolation.BICUBIC | _EXACT,
            src_colorspace=None if rgb else self._matrix,
            src_color_range=ColorRange.JPEG if rgb else self._range,
            dst_color_range=ColorRange.JPEG,
        )
        return converted.to_ndarray()

    def from_rgb(self, array: np.ndarray, pixel_format: str) -> av.VideoFrame:
        """The reverse of `to_rgb`."""
        rgb = is_rgb(av.VideoFormat(pixel_format))
        converted = self._writer.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=_RGB),
            format=pixel_format,
            # Of what the scaler has, areas undo bicubic chroma best: 50 dB and more for 4:2:0, saturated edges included.
            interpolation=Interpolation.AREA | _EXACT,
            src_color_range=ColorRange.JPEG,
            dst_colorspace=None if rgb else self._matrix,
            dst_color_range=ColorRange.JPEG if rgb else self._range,
        )
        converted.color_range, converted.colorspace = self.tags.range, self.tags.matrix
        converted.color_primaries, converted.color_trc = self.tags.primaries, self.tags.transfer
        return converted


def is_rgb(pixel_format: av.VideoFormat) -> bool:
    """Whether pixels are red, green and blue, by palette or not, and have no matrix."""
    return pixel_format.is_rgb or "pal" in pixel_format.name
