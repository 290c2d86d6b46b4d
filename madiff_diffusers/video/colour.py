"""Colours: every frame, made or not, goes from a file's pixels to RGB in floating point and back by the same numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter


# The weights of red and of blue in luma, by FFmpeg's numbers of matrices: BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020 twice.
_LUMA = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
_YCGCO = 8
# Matrices whose pixels are converted as their tags say. 2 is not told: BT.601's or BT.709's by the height.
KNOWN_MATRICES = frozenset({2, _YCGCO, *_LUMA})

# Formats by how many pixels across and down share one colour.
PLANAR = {
    (1, 1): "yuv444p",
    (2, 1): "yuv422p",
    (2, 2): "yuv420p",
    (1, 2): "yuv440p",
    (4, 1): "yuv411p",
    (4, 4): "yuv410p",
}

# FFmpeg's scaler rounds changes of range and matrix to up to 1 of 255, cuts off what lies outside of RGB, moves chroma where two
# frames tell different places for it, and rounds integers to floats by up to 49 of 65535. So it only rearranges samples here, and the
# conversion between samples and RGB is done in floating point.
_FLOAT_RGB = "gbrpf32le"


class ColourTags(NamedTuple):
    """
    Tags by which a file tells of its colours, in FFmpeg's numbers (of ITU-T H.273).

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
        """The tags of a frame."""
        return cls(int(frame.color_range), int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc))


class ColourPath:
    """
    Conversion between pixels as a file has them and RGB.

    Args:
        tags: the tags of the pixels.
        height: the height of frames. Where the matrix is not told or is none of `KNOWN_MATRICES`, it is BT.601's for fewer than 720 rows, else
            BT.709's.
    """

    def __init__(self, tags: ColourTags, height: int):
        self.tags = tags
        self._luma = _LUMA.get(tags.matrix, _LUMA[1] if height >= 720 else _LUMA[6])
        # Each direction has one, since each may have a thread of its own.
        self._reader, self._writer = VideoReformatter(), VideoReformatter()

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """
        Convert a frame to `(H, W, 3)` float32, with what is transparent on black. Values lie in [0, 1], but for colours that YUV has and
        RGB does not have.
        """
        alpha, rgb = opacity(frame), self._opaque_to_rgb(frame)
        # OpenEXR's pixels, the only ones in floating point that have opacity, are multiplied by it already.
        return rgb if alpha is None or planar_format(frame.format) == _FLOAT_RGB else rgb * alpha[..., None]

    def _opaque_to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        planar = planar_format(frame.format)
        # Planes of formats with transparency or a J are read as they are: the scaler would change their samples.
        own = frame.format.name.replace("yuva", "yuv").replace("yuvj", "yuv").replace("gbrap", "gbrp")
        if own != planar:
            # With several threads, FFmpeg spoils rows of P010.
            threads = 1 if frame.format.name.startswith("p0") else 0
            same = self._same(is_rgb(frame.format))
            frame = self._reader.reformat(
                frame, format=planar, interpolation=Interpolation.BICUBIC, threads=threads, **same
            )
        if planar == _FLOAT_RGB:
            return frame.to_ndarray()[..., :3]
        if is_rgb(frame.format):
            green, blue, red = (_samples(plane, frame.format) for plane in frame.planes[:3])
            return np.multiply(
                cv2.merge([red, green, blue]), 1 / (2 ** frame.format.components[0].bits - 1), dtype=np.float32
            )
        luma, *chroma = (_samples(plane, frame.format).astype(np.float32) for plane in frame.planes[:3])
        bits = frame.format.components[0].bits
        chroma = [_grown(plane, luma.shape) for plane in chroma] or [np.full_like(luma, 2 ** (bits - 1))] * 2
        to_yuv = self._to_yuv(bits)
        inverse = np.linalg.inv(to_yuv[:, :3])
        return cv2.transform(cv2.merge([luma, *chroma]), np.column_stack([inverse, -inverse @ to_yuv[:, 3]]))

    def from_rgb(self, array: np.ndarray, pixel_format: str) -> av.VideoFrame:
        """Convert RGB to a frame. The result of `to_rgb` becomes the same frame again, bit for bit."""
        target = av.VideoFormat(pixel_format)
        bits, planar = target.components[0].bits, planar_format(target)
        channels: Sequence[np.ndarray]
        if is_rgb(target):
            red, green, blue = cv2.split(np.clip(array, 0, 1) * (2**bits - 1))
            channels = [green, blue, red]
        else:
            channels = cv2.split(cv2.transform(np.ascontiguousarray(array), self._to_yuv(bits)))
        frame = av.VideoFrame(array.shape[1], array.shape[0], planar)
        for plane, channel in zip(frame.planes, channels):
            row = plane.line_size // (2 if bits > 8 else 1)
            values = np.zeros((plane.height, row), np.uint16 if bits > 8 else np.uint8)
            values[:, : plane.width] = np.rint(_shrunk(channel, (plane.height, plane.width))).clip(0, 2**bits - 1)
            plane.update(values.tobytes())
        if planar != pixel_format:
            frame = self._writer.reformat(
                frame, format=pixel_format, interpolation=Interpolation.BICUBIC, **self._same(is_rgb(target))
            )
        frame.color_range, frame.colorspace = self.tags.range, self.tags.matrix
        frame.color_primaries, frame.color_trc = self.tags.primaries, self.tags.transfer
        return frame

    def _same(self, rgb: bool) -> dict[str, int]:
        """Settings with which the scaler leaves range and matrix as they are."""
        one = ColorRange.JPEG if rgb or self.tags.range == 2 else ColorRange.MPEG
        settings: dict[str, int] = {"src_color_range": one, "dst_color_range": one}
        if not rgb:
            settings.update(src_colorspace=Colorspace.ITU709, dst_colorspace=Colorspace.ITU709)
        return settings

    def _to_yuv(self, bits: int) -> np.ndarray:
        """The matrix `(3, 4)` from RGB in [0, 1] to luma and chroma of some number of bits (ITU-T H.273, 8.3)."""
        if self.tags.matrix == _YCGCO:
            # Its chroma has the steps of red, green and blue, of which it is made without multiplications.
            weights, chroma_steps = np.array([[0.25, 0.5, 0.25], [-0.25, 0.5, -0.25], [0.5, 0, -0.5]]), 219
        else:
            red, blue = self._luma
            luma = np.array([red, 1 - red - blue, blue])
            weights = np.stack(
                [luma, (np.array([0, 0, 1]) - luma) / (2 - 2 * blue), (np.array([1, 0, 0]) - luma) / (2 - 2 * red)]
            )
            chroma_steps = 224
        if self.tags.range == 2:
            scales, offsets = [2**bits - 1] * 3, [0, 2 ** (bits - 1), 2 ** (bits - 1)]
        else:
            scales, offsets = (
                np.array(values) * 2 ** (bits - 8) for values in ([219, chroma_steps, chroma_steps], [16, 128, 128])
            )
        return np.column_stack([weights * np.reshape(scales, (3, 1)), offsets])


def _samples(plane: av.video.plane.VideoPlane, pixel_format: av.VideoFormat) -> np.ndarray:
    values = np.frombuffer(memoryview(plane), np.uint16 if pixel_format.components[0].bits > 8 else np.uint8)
    return values.reshape(plane.height, -1)[:, : plane.width]


def _grown(chroma: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Chroma for every pixel: bicubic, corrected so that its means are the samples again (without the correction, some 45 dB)."""
    down, across = (-(-whole // part) for whole, part in zip(size, chroma.shape))
    if down == across == 1:
        return chroma
    height, width = size
    grown = cv2.resize(chroma, (chroma.shape[1] * across, chroma.shape[0] * down), interpolation=cv2.INTER_CUBIC)[
        :height, :width
    ]
    lost = chroma - _shrunk(grown, chroma.shape)
    return grown + lost.repeat(down, axis=0).repeat(across, axis=1)[:height, :width]


def _shrunk(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A plane of some size whose samples are the means of the pixels that share them."""
    if channel.shape == size:
        return channel
    down, across = (-(-whole // part) for whole, part in zip(channel.shape, size))
    missing = (size[0] * down - channel.shape[0], size[1] * across - channel.shape[1])
    if any(missing):
        channel = np.pad(channel, ((0, missing[0]), (0, missing[1])), mode="edge")
    return cv2.resize(channel, size[::-1], interpolation=cv2.INTER_AREA)


def opacity(frame: av.VideoFrame) -> np.ndarray | None:
    """The opacity of a frame's pixels, `(H, W)` float32 in [0, 1]; None if all are opaque."""
    kind = frame.format
    if len(kind.components) not in (2, 4) and not kind.has_palette:
        return None
    bits = max(component.bits for component in kind.components)
    if kind.is_planar and not kind.is_big_endian and kind.name.startswith(("yuva", "gbrap")) and bits <= 16:
        alpha = _samples(frame.planes[3], kind)
    else:
        bits = 8 if bits <= 8 else 16
        alpha = frame.reformat(format="rgba" if bits == 8 else "rgba64le").to_ndarray()[..., 3]
    return None if alpha.min() == 2**bits - 1 else alpha.astype(np.float32) / (2**bits - 1)


def planar_format(source: av.VideoFormat) -> str:
    """The planar format with a source's samples, but no transparency; in floating point if the source is."""
    bits = max(component.bits for component in source.components)
    if is_rgb(source) and (bits > 16 or "f16" in source.name):
        return _FLOAT_RGB
    depth = "" if bits <= 8 else f"{bits}le" if bits in (9, 10, 12, 14, 16) else "16le"
    if is_rgb(source):
        return f"gbrp{depth}"
    if len(source.components) < 3:
        return f"gray{depth}"
    return f"{PLANAR[chroma_of(source)]}{depth}"


def chroma_of(pixel_format: av.VideoFormat) -> tuple[int, int]:
    """How many pixels across and down share one colour."""
    if len(pixel_format.components) < 3 or is_rgb(pixel_format):
        return 1, 1
    return 1024 // pixel_format.chroma_width(1024), 1024 // pixel_format.chroma_height(1024)


def is_rgb(pixel_format: av.VideoFormat) -> bool:
    """Whether pixels are red, green and blue, by palette or not, and have no matrix."""
    return pixel_format.is_rgb or "pal" in pixel_format.name
