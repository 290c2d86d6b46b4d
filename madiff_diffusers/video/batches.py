"""Folders of videos."""

from pathlib import Path
from typing import Collection, List, Tuple

from .reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError
from .writing import CONTAINERS


def video_batch(source: Path, output: Path) -> List[Tuple[Path, Path]]:
    """
    What to read and what to write: one pair, or one for each video file of a folder.

    Args:
        source: file, pattern, folder of images or of video files.
        output: file, or folder; for videos of a folder, one that is there or can be made, and that gets files of the same names.

    Raises:
        VideoError: if a folder holds both images and videos, or neither.
    """
    if not source.is_dir():
        return [(source, output)]
    names = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    videos = [path for path in names if path.suffix.lower() in VIDEO_SUFFIXES]
    images = [path for path in names if path.suffix.lower() in IMAGE_SUFFIXES]
    if videos and images:
        raise VideoError(f"{source} must hold images or videos, but holds {len(images)} and {len(videos)}")
    if not videos:
        return [(source, output)]
    if output.suffix or output.is_file():
        raise VideoError(f"for the {len(videos)} videos of {source}, the output must be a folder, but is {output}")
    if output.exists() and output.resolve() == source.resolve():
        raise VideoError(f"the results must not go into the folder of their sources, {source}")
    output.mkdir(parents=True, exist_ok=True)
    # What is read but not written becomes MP4, beside its old ending where another video has that name.
    names = {path.name for path in videos}
    return [(path, output / (path.name if path.suffix.lower() in CONTAINERS else _as_mp4(path, names))) for path in videos]


def _as_mp4(path: Path, names: Collection[str]) -> str:
    alone = path.stem not in {Path(name).stem for name in names if name != path.name}
    return f"{path.stem if alone else path.name}.mp4"
