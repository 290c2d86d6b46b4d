"""Properties that sources have besides plain pixels: one table of all that FFmpeg and Pillow know, and of what becomes of them."""

from collections.abc import Collection
from fractions import Fraction
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageFile


# Kinds of outputs: video files by FFmpeg's names, GIF among them; folders of PNG files; single images.
OUTPUTS = ("mp4", "mov", "matroska", "webm", "avi", "gif", "yuv4mpegpipe", "folder", "image")
VIDEOS = OUTPUTS[:-1]
# Outputs that are muxed stream by stream, with a note for each stream that is left out.
STREAMED = ("mp4", "mov", "matroska", "webm", "avi", "yuv4mpegpipe")


class Property(NamedTuple):
    """
    A property that a source can have. If it is neither kept nor converted, a note says that it is lost.

    Args:
        name: its name in notes, and in the table of `docs/properties.md`.
        kept: outputs that have it as the source does; and codecs, of video or images, with which any output has it.
        converted: outputs in which pixels or packets are changed so that nothing is missing.
        meaningless: outputs that have no use for it.
        told: outputs for which more particular notes say what is lost.
        side_data: FFmpeg's numbers of its side data, of its AVFrameSideDataType.
        info: Pillow's names of it, in `Image.info`.
    """

    name: str
    kept: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    meaningless: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    side_data: tuple[int, ...] = ()
    info: tuple[str, ...] = ()

    def fate(self, output: str, codec: str | None = None) -> str:
        """
        What becomes of the property: "kept", "converted", "noted", or "" where it has no meaning.

        Args:
            output: one of `OUTPUTS`.
            codec: the codec that is written: a name in `formats.CODECS`, or Pillow's name of a format of images.
        """
        if output in self.meaningless:
            return ""
        if output in self.converted:
            return "converted"
        return "kept" if output in self.kept or codec in self.kept else "noted"


_NO_IMAGE = ("image",)

PROPERTIES = {
    # of a file
    "sound": Property("sound", ("mp4", "mov", "matroska", "avi"), ("webm",), _NO_IMAGE, STREAMED),
    "subtitles": Property("subtitles", ("matroska",), (), _NO_IMAGE, STREAMED),
    "attached": Property("cover pictures, attachments, further pictures", (), (), _NO_IMAGE, STREAMED),
    "data": Property("data streams, such as GPS tracks", meaningless=_NO_IMAGE),
    "chapters": Property("chapters", ("mp4", "mov", "matroska", "webm"), (), _NO_IMAGE),
    "metadata": Property("title and other metadata", ("mp4", "mov", "matroska", "webm", "avi"), (), _NO_IMAGE),
    "pages": Property("further pages or frames of an image file"),
    # of pictures
    "orientation": Property(
        "orientation",
        ("mp4", "mov", "matroska"),
        ("webm", "avi", "gif", "yuv4mpegpipe", "folder", "image"),
        side_data=(6,),
    ),
    "pixel aspect": Property(
        "pixels that are not square",
        ("mp4", "mov", "folder", "h264", "hevc", "gif", "PNG", "JPEG", "TIFF", "BMP"),
        info=("aspect", "jfif_density"),
    ),
    "resolution": Property(
        "resolution in pixels per inch", ("PNG", "JPEG", "TIFF", "BMP"), (), VIDEOS, info=("dpi", "resolution")
    ),
    "matrix": Property(
        "range and matrix of colours", ("mp4", "mov", "matroska", "webm", "h264"), ("gif", "folder"), _NO_IMAGE
    ),
    "primaries": Property(
        "primaries and transfer of colours", ("mp4", "mov", "matroska", "webm", "folder", "h264"), (), _NO_IMAGE
    ),
    "bits": Property("more than 8 bits", ("folder", "hevc", "vp9", "av1", "prores", "ffv1", "h264"), told=VIDEOS),
    "chroma": Property(
        "colours that are as fine as the picture", ("folder", "image", "gif", "ffv1", "prores"), told=VIDEOS
    ),
    "transparency": Property("transparency, which is shown on black", info=("transparency",)),
    "alpha stream": Property(
        "transparency beside the pictures (VP9's), so that what it hid is seen", (), (), _NO_IMAGE
    ),
    "profile": Property(
        "colour profile (ICC)", ("PNG", "JPEG", "TIFF", "WEBP"), side_data=(15,), info=("icc_profile",)
    ),
    "other profile": Property("colour profile (ICC) of grey or CMYK, where the result is RGB"),
    "gamma": Property("gamma and chromaticities of a PNG file", info=("gamma", "chromaticity")),
    "HDR10": Property(
        "HDR10 metadata: mastering display and light level", ("hevc", "av1"), (), _NO_IMAGE, side_data=(11, 14)
    ),
    "dynamic HDR": Property(
        "dynamic HDR metadata: HDR10+, Dolby Vision, HDR Vivid, ambient light",
        (),
        (),
        _NO_IMAGE,
        side_data=(17, 23, 24, 25, 26),
    ),
    "stereo": Property("stereo mode and further views", (), (), _NO_IMAGE, side_data=(2, 29, 30)),
    "stereo tag": Property("stereo mode that a Matroska file tells by itself", ("matroska", "webm"), (), _NO_IMAGE),
    "spherical": Property("spherical projection (360 degrees)", (), (), _NO_IMAGE, side_data=(13,)),
    "captions": Property("closed captions inside the pictures", (), (), _NO_IMAGE, side_data=(1,)),
    "pan": Property("pan-scan and active format", (), (), _NO_IMAGE, side_data=(0, 7)),
    "timecode": Property("timecodes of frames", (), (), _NO_IMAGE, side_data=(12, 16)),
    "enhancement": Property("enhancement layer (LCEVC)", (), (), _NO_IMAGE, side_data=(28,)),
    "EXIF": Property("EXIF metadata", side_data=(31,), info=("exif",)),
    "comments": Property(
        "comments, XMP and other text of an image", info=("comment", "xmp", "XML:com.adobe.xmp", "photoshop")
    ),
}

# Side data of sound, and of how pictures were encoded: motion vectors, regions, encoders' names, grain that is in the pixels already.
IRRELEVANT_SIDE_DATA = (3, 4, 5, 8, 9, 10, 18, 19, 20, 21, 22, 27)

# Pillow's names of how a file was written, and of how an animation plays, which is the property "pages".
IRRELEVANT_INFO = (
    "adobe",
    "adobe_transform",
    "background",
    "bbox",
    "blend",
    "compression",
    "default_image",
    "disposal",
    "duration",
    "extension",
    "flashpix",
    "interlace",
    "jfif",
    "jfif_unit",
    "jfif_version",
    "loop",
    "mp",
    "mpoffset",
    "progression",
    "progressive",
    "srgb",
    "timestamp",
    "version",
)

# Tags of how pixels lie in a TIFF file, which Pillow gives as EXIF, and of resolution and profile, which are properties of their own.
_TIFF_LAYOUT = {*range(254, 260), 262, 266, 273, *range(277, 285), 296, 317, 320, *range(322, 326), 338, 339, 34675}


def lost(found: Collection[str], output: str, codec: str | None = None) -> list[str]:
    """
    Notes on properties that a source has and its result does not have.

    Args:
        found: the source's properties, as keys of `PROPERTIES`.
        output, codec: see `Property.fate`.
    """
    gone = [
        each
        for key, each in PROPERTIES.items()
        if key in found and output not in each.told and each.fate(output, codec) == "noted"
    ]
    return [f"not kept: {each.name}" for each in gone]


def found_in_image(image: ImageFile.ImageFile) -> set[str]:
    """
    Find the properties of an image that Pillow has opened and not yet loaded, but for transparency, which only pixels tell.

    Returns:
        keys of `PROPERTIES`.
    """
    keys = {name: key for key, each in PROPERTIES.items() for name in each.info}
    names = {name for name, value in image.info.items() if value and name not in IRRELEVANT_INFO}
    # All other entries are text, by keywords of its own.
    found = {keys.get(str(name), "comments") for name in names} - {"pixel aspect", "transparency", "EXIF"}
    if "profile" in found and not is_for_rgb(image.info["icc_profile"]):
        found.symmetric_difference_update({"profile", "other profile"})
    tags = exif_tags(image)
    if tags.pop(ExifTags.Base.Orientation, 1) != 1:
        found.add("orientation")
    if set(tags) - (_TIFF_LAYOUT if image.format == "TIFF" else set()):
        found.add("EXIF")
    if pixel_aspect(image) is not None:
        found.add("pixel aspect")
    if getattr(image, "n_frames", 1) > 1:
        found.add("pages")
    if image.mode[0] in "IF" or ";16" in str([tile[3] for tile in image.tile]):
        found.add("bits")
    return found


def exif_tags(image: Image.Image) -> dict[int, Any]:
    """An image's EXIF tags by their numbers; none if they cannot be read."""
    try:
        return dict(image.getexif())
    except Exception:  # Faulty tags of any kind leave the picture as good as it is.
        return {}


def is_for_rgb(profile: bytes) -> bool:
    """Whether the header of a colour profile tells that it is for RGB, not for grey or CMYK."""
    return profile[16:20] == b"RGB "


def pixel_aspect(image: Image.Image) -> Fraction | None:
    """The width of a pixel by its height, told by the numbers of pixels to the inch; None if it is 1 or not told."""
    across, down = image.info.get("dpi") or image.info.get("aspect") or image.info.get("jfif_density") or (1, 1)
    if not (0 < across < 1e6 and 0 < down < 1e6):
        return None
    aspect = (Fraction(down) / Fraction(across)).limit_denominator(1000)
    return aspect if aspect != 1 else None
