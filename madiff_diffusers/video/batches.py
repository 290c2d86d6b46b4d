"""Folders of videos."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ..files import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .decoding import is_video
from .destinations import partial_path
from .errors import VideoError
from .formats import CONTAINERS


class VideoBatch(NamedTuple):
    """
    Videos that one command makes.

    Args:
        pairs: for each video, what is read and what is written.
        is_folder: whether they are the videos of a folder, and are written into another.
        left_out: other files of the folder.
    """

    pairs: list[tuple[Path, Path]]
    is_folder: bool
    left_out: list[Path]


def video_batch(source: Path, output: Path) -> VideoBatch:
    """
    Find out what is read and what is written: one pair, or one for each video file of a folder.

    Args:
        source: a file, a pattern, or a folder of images or of video files. Files are videos if FFmpeg opens them as such, whatever their
            names are.
        output: a file or folder. For the videos of a folder, a folder that gets files of the same names, and need not be there.

    Raises:
        VideoError: if a folder holds both images and videos, or neither.
    """
    if not source.is_dir():
        return VideoBatch([(source, output)], False, [])
    own = {path.absolute() for path in (output, partial_path(output))} if output.name else set()
    names = [
        path
        for path in sorted(source.iterdir())
        if not path.is_dir() and not path.name.startswith(".") and path.absolute() not in own
    ]
    images = [path for path in names if path.suffix.lower() in IMAGE_SUFFIXES]
    videos = [
        path for path in names if path not in images and (path.suffix.lower() in VIDEO_SUFFIXES or is_video(path))
    ]
    if videos and images:
        raise VideoError(f"{source} must hold images or videos, but holds {len(images)} and {len(videos)}")
    if not videos:
        return VideoBatch([(source, output)], False, [])
    if output.is_file() or (output.suffix and not output.is_dir()):
        raise VideoError(f"for the {len(videos)} videos of {source}, the output must be a folder, but is {output}")
    if output.exists() and output.samefile(source):
        raise VideoError(f"the results must not go into the folder of their sources, {source}")
    # Kinds of files that are not written become MP4. The old ending stays in the name if another video has the same name without it.
    names_of_videos = [path.name for path in videos]
    pairs = [
        (path, output / (path.name if path.suffix.lower() in CONTAINERS else _as_mp4(path, names_of_videos)))
        for path in videos
    ]
    makers: dict[str, Path] = {}
    for path, made in pairs:
        other = makers.setdefault(str(made).casefold(), path)
        if other != path:
            raise VideoError(f"{other} and {path} would both become {made}: rename one of them")
    return VideoBatch(pairs, True, [path for path in names if path not in videos])


def _as_mp4(path: Path, names: Collection[str]) -> str:
    others = {Path(name).stem.casefold() for name in names if name != path.name}
    return f"{path.name if path.stem.casefold() in others else path.stem}.mp4"
