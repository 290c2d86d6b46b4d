"""Destinations of a video: the files that are written, and what is refused before anything is decoded."""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..files import check_outputs, is_clutter
from ..image_io import image_format
from .decoding import Source
from .encoding import usual_codecs
from .errors import VideoError
from .formats import FOLDER, check_encoding, container_of
from .options import CheckedOptions


def parts_folder(output: Path) -> Path:
    """The folder where parts lie until an output is complete."""
    return output.with_name(output.name + ".parts")


def partial_path(output: Path) -> Path:
    """The file that gets the good part of an output that is not completed, with `keep_partial`."""
    return output.with_name(f"{output.stem}.partial{output.suffix}")


def read_plan(path: Path) -> dict[str, Any]:
    """What a folder of parts says of the job that they are of.

    Raises:
        VideoError: if it says nothing, as after a power failure.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plan, dict):
            raise ValueError("no plan")
        return plan
    except ValueError as error:
        raise VideoError(f"{path} does not tell whose parts these are; `overwrite` or delete {path.parent}") from error


def outputs_of(
    output: Path, resume: bool, overwrite: bool, keep_partial: bool, preview: Path | None = None
) -> list[tuple[Path, bool]]:
    """
    All files and folders that a video writes, each with whether it may be there already, as `check_outputs` takes them. The contents of
    folders that are there are checked by `VideoJob.prepare`.
    """
    job = parts_folder(output) / "job.json"
    begun = resume and job.is_file()
    written = [(output, overwrite or output.is_dir()), (parts_folder(output), True)]
    written += [(partial_path(output), overwrite or begun)] if keep_partial else []
    if preview is None:
        return written
    own = overwrite or (begun and read_plan(job).get("preview") == str(preview.absolute()))
    return [*written, (preview, own)]


def what_stays(output: Path, keep_partial: bool) -> Path | None:
    """What is there of a video that is not to be gone on with: the video, or where such a one may be written, a partial one without parts."""
    if output.exists():
        return output
    partial = partial_path(output)
    is_foreign = keep_partial and partial.exists() and not (parts_folder(output) / "job.json").is_file()
    return partial if is_foreign else None


def check_preview(preview: Path) -> None:
    """
    Refuse a preview that cannot be written.

    Raises:
        ValueError: if it is not the name of an image file, or there is no folder for it.
    """
    image_format(preview)
    if not preview.absolute().parent.is_dir():
        raise VideoError(f"there is no folder {preview.parent} for `preview`")


def check_folder(folder: Path) -> None:
    """
    Refuse a folder that cannot be replaced as a whole by one of frames.

    Raises:
        VideoError: if it is a link or a mounted disk, or holds anything but frames.
    """
    if folder.is_symlink() or os.path.ismount(folder):
        raise VideoError(
            f"{folder} is a link or a mounted disk, which cannot be replaced as a whole; name a folder inside it"
        )
    if folder.is_dir() and not all(
        re.fullmatch(r"\d{8}\.png", path.name) or is_clutter(path.name) for path in folder.iterdir()
    ):
        raise VideoError(f"{folder} holds other files than frames that were written before")


def check_output(output: Path, options: CheckedOptions, keep_partial: bool = False) -> None:
    """
    Refuse an output that is known to fail whatever the source is.

    Args:
        output: the file or folder.
        options: the options.
        keep_partial: whether the good part of it may be written, too.

    Raises:
        VideoError: if the output cannot be written where it is, or as asked; see `formats.check_encoding`.
    """
    is_folder = container_of(output) is FOLDER
    if not output.absolute().parent.is_dir():
        raise VideoError(f"there is no folder {output.parent} to write into")
    if output.exists() and output.is_dir() != is_folder:
        raise VideoError(f"{output} is {'a folder' if output.is_dir() else 'a file'} already")
    for folder in [output, *([partial_path(output)] if keep_partial else [])] if is_folder else []:
        check_folder(folder)
    usual = usual_codecs(container_of(output))
    check_encoding(output, options.codec, options.crf, options.preset, options.fps, usual)


def check_places(
    source: str | Path,
    output: Path,
    options: CheckedOptions,
    resume: bool,
    overwrite: bool,
    keep_partial: bool,
    preview: Path | None,
) -> None:
    """
    Refuse, before anything is decoded, to write over what must stay, and what `check_output` refuses.

    Args:
        source, output, options, resume, overwrite, keep_partial, preview: see `interpolate_video`.

    Raises:
        VideoError: if something would be lost, or cannot be written as asked.
        ValueError: if `preview` is not the name of an image file.
    """
    container_of(output)  # refuses names that have no place beside them for parts
    read = Source(source, options.image_fps)
    if preview is not None:
        check_preview(preview)
    try:
        check_outputs(
            outputs_of(output, resume, overwrite, keep_partial, preview),
            read.images or [read.path],
            "; `overwrite` replaces it",
        )
    except ValueError as error:
        raise VideoError(str(error)) from error
    if preview is not None and read.takes(preview):
        raise VideoError(f"`preview` {preview} would become one of the images of {source}")
    check_output(output, options, keep_partial)
