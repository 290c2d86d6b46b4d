"""The benchmarks of the field: the files of their triplets, and how these are read."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from ..files import WRITABLE_FORMATS, natural_order
from ..image_io import read_image


class Triplet(NamedTuple):
    """Two neighbours and the true frame between them.

    Args:
        name: unique name in its benchmark, folders included; also that of a result's file.
        prev, truth, next: image files.
        sequence: clip that it comes from, where scores are averaged over each clip first.
        view: what of the files is read: `"whole"`, `"half"` of their size (areas averaged), or the `"centre"`, their central quarter.
        time: instant of the true frame, between 0 (the previous frame's) and 1 (the next one's).
    """

    name: str
    prev: Path
    truth: Path
    next: Path
    sequence: str | None = None
    view: str = "whole"
    time: Fraction = Fraction(1, 2)

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.prev, self.truth, self.next

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(prev, truth, next)`, each `(H, W, 3)` uint8 RGB.

        Raises:
            OSError, ValueError: if a file is missing or no image, or the three differ in size; the message names it.
        """
        prev, truth, next_ = (look(np.asarray(read_image(path)), self.view) for path in self.files)
        _check_sizes(self, [(image.shape[1], image.shape[0]) for image in (prev, truth, next_)])
        return prev, truth, next_

    @property
    def least_side(self) -> int:
        """The shorter side of its frames, in pixels, without decoding them."""
        with Image.open(self.truth) as image:
            side = min(image.size)
        return side if self.view == "whole" else side // 2 if self.view == "half" else side - 2 * (side // 4)


class Benchmark(NamedTuple):
    """
    Args:
        layout: contents of its folder, in words.
        find: function that gives the triplets of a folder, in order; none if the folder has another layout.
        skipping: possible numbers of frames that are left out between two neighbours and made; if there is a choice, `find` takes
            the number as a second argument.
    """

    layout: str
    find: Callable[..., list[Triplet]]
    skipping: range | None = None


def look(image: np.ndarray, view: str) -> np.ndarray:
    """An image `(H, W, 3)` uint8 in one of the views of a [`Triplet`]."""
    height, width = image.shape[:2]
    if view == "half":
        return cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    if view == "centre":
        top, left = height // 4, width // 4
        return np.ascontiguousarray(image[top : height - top, left : width - left])
    return image


def benchmark_title(benchmark: str, skip: int | None = None) -> str:
    """The name of a benchmark in tables and folders; with several instants, it is another than with middles alone."""
    return benchmark if skip in (None, 1) else f"{benchmark}-skip-{skip}"


def find_triplets(benchmark: str, root: str, limit: int | None = None, skip: int | None = None) -> list[Triplet]:
    """The triplets of a benchmark, whose files are checked: all exist, are whole, and have one size in each triplet.

    Args:
        benchmark: a name in `BENCHMARKS`.
        root: its folder.
        limit: number of triplets, from the first on; all if not given.
        skip: number of true frames between two neighbours; 1 if not given.

    Raises:
        ValueError: if an argument is out of range, the folder does not hold the benchmark, or a file of it is not whole.
        FileNotFoundError: if a file of a triplet is missing.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"`benchmark` must be one of {', '.join(BENCHMARKS)}, but is {benchmark!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but is {limit}.")
    layout, find, skipping = BENCHMARKS[benchmark]
    if skip is not None and skipping is None:
        choices = ", ".join(name for name, each in BENCHMARKS.items() if each.skipping is not None)
        raise ValueError(f"`skip` is for {choices}, but `benchmark` is {benchmark!r}.")
    if skip is not None and skipping is not None and skip not in skipping:
        raise ValueError(f"`skip` must be from {skipping[0]} to {skipping[-1]} for {benchmark}, but is {skip}.")
    found = find(Path(root)) if skipping is None else find(Path(root), skip or 1)
    if not found:
        raise ValueError(f"`root` must hold {benchmark} as {layout}; {root!r} does not.")
    found = found[:limit]
    name, count = Counter(triplet.name for triplet in found).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"Names must differ in more than their endings, but {count} items of {root!r} are called {name}."
        )
    checked: dict[Path, tuple[int, int]] = {}
    for triplet in found:
        for path in triplet.files:
            if path not in checked:
                checked[path] = _verified_size(path)
        _check_sizes(triplet, [checked[path] for path in triplet.files])
    return found


def _verified_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file whose container is sound (for PNG, every checksum).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No such image file: {path}")
    try:
        with Image.open(path) as image:
            size = image.size
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {path} as an image: {error}") from error
    return size


def _check_sizes(triplet: Triplet, sizes: Sequence[tuple[int, int]]) -> None:
    for path, size in zip(triplet.files, sizes):
        if size != sizes[0]:
            raise ValueError(
                f"{path} is {size[0]}x{size[1]}, but {triplet.prev} is {sizes[0][0]}x{sizes[0][1]} (width x height)."
            )


def _folders(folder: Path) -> list[Path]:
    """The subfolders of a folder, in natural order."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: natural_order(path.name),
    )


def _images(folder: Path) -> list[Path]:
    """The image files of a folder, in natural order."""
    return sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in WRITABLE_FORMATS and path.name[0] != "."),
        key=lambda path: natural_order(path.name),
    )


def _triplet(name: str, files: Iterable[Path], sequence: str | None = None, view: str = "whole") -> Triplet:
    """A triplet of the middle frame, of three files in order."""
    prev, truth, next_ = files
    return Triplet(name, prev, truth, next_, sequence, view)


def _inputs_and_truths(root: Path) -> list[Triplet]:
    for inputs, truths in (("input", "gt"), ("other-data", "other-gt-interp")):
        if (root / inputs).is_dir() or (root / truths).is_dir():
            # A scene that one of the two lacks is a missing file, not a scene less.
            names = {path.name: path for folder in (inputs, truths) for path in _folders(root / folder)}
            return [
                Triplet(
                    name,
                    root / inputs / name / "frame10.png",
                    root / truths / name / "frame10i11.png",
                    root / inputs / name / "frame11.png",
                )
                for name in sorted(names, key=natural_order)
            ]
    return []


def _named_frames(names: tuple[str, str, str]) -> Callable[[Path], list[Triplet]]:
    """Subfolders with three files of these names, previous frame first."""

    def find(root: Path) -> list[Triplet]:
        folders = [path for path in _folders(root) if any((path / name).is_file() for name in names)]
        return [_triplet(folder.name, (folder / name for name in names)) for folder in folders]

    return find


def _three_images(root: Path) -> list[Triplet]:
    found = []
    for folder in _folders(root):
        images = _images(folder)
        if len(images) != 3:
            raise ValueError(f"Each folder of triplets must hold 3 images, but {folder} holds {len(images)}.")
        found.append(_triplet(folder.name, images))
    return found


def _first_of(*finders: Callable[[Path], list[Triplet]]) -> Callable[[Path], list[Triplet]]:
    def find(root: Path) -> list[Triplet]:
        return next((found for finder in finders if (found := finder(root))), [])

    return find


def _every_second_frame(root: Path, view: Callable[[str], str] = lambda name: "whole") -> list[Triplet]:
    """Triplets of each clip's frames, numbered from 0: 3 between 2 and 4, 5 between 4 and 6, …, as long as two more frames follow.
    Methods that look at four frames can make these, too (LDMVFI's evaluation)."""
    found = []
    for folder in _folders(root):
        frames = _images(folder)
        for i in range(2, len(frames) - 4, 2):
            name = f"{folder.name}/{frames[i + 1].stem}"
            found.append(_triplet(name, frames[i : i + 3], folder.name, view(folder.name)))
    return found


def _between(name: str, frames: Sequence[Path], view: str = "whole") -> list[Triplet]:
    """Triplets of the first frame, the last one, and each frame between them."""
    inner, last = frames[1:-1], len(frames) - 1
    return [
        Triplet(f"{name}/{truth.stem}", frames[0], truth, frames[last], name, view, Fraction(number, last))
        for number, truth in enumerate(inner, 1)
    ]


def _frames(root: Path, skip: int) -> list[Triplet]:
    """Triplets of each folder: frames 0 and `skip` + 1 with each frame between them, then on from there, as far as the frames reach."""
    if not root.is_dir():
        return []
    found = []
    for folder in [each for each in _folders(root) if _images(each)] or [root]:
        images = _images(folder)
        # `..` as a name would lead out of the folder that results are written into.
        name = folder.name if folder.name not in ("", "..") else folder.resolve().name
        if 0 < len(images) < skip + 2:
            raise ValueError(
                f"Each folder of frames must hold at least {skip + 2} images, but {folder} holds {len(images)}."
            )
        for first in range(0, len(images) - skip - 1, skip + 1):
            found += _between(name, images[first : first + skip + 2])
    return found


def _davis(root: Path) -> list[Triplet]:
    found = _inputs_and_truths(root)
    return found or _every_second_frame(
        next((path for path in (root / "JPEGImages" / "480p", root) if path.is_dir()), root)
    )


def _vfitex(root: Path) -> list[Triplet]:
    # 4K clips by their central quarter, as the benchmark's authors do.
    return _every_second_frame(root, lambda name: "centre" if "4K" in name else "whole")


def _snu_film(level: str) -> Callable[[Path], list[Triplet]]:
    def find(root: Path) -> list[Triplet]:
        lists = [
            path for path in (root / f"test-{level}.txt", root / "eval_modes" / f"test-{level}.txt") if path.is_file()
        ]
        if not lists:
            return []
        found = []
        for number, line in enumerate(_lines(lists[0]), 1):
            names = line.split()
            if len(names) < 3:
                raise ValueError(f"Each line of {lists[0]} must name 3 files, but line {number} is {line!r}.")
            found.append(_triplet(f"{number:03d}", (_under(root, name) for name in names[:3])))
        return found

    return find


def _under(root: Path, name: str) -> Path:
    """The place of a file in a list, whose paths begin above the folder that they came in."""
    parts = Path(name).parts
    places = [root / folder / Path(*parts[i:]) for i in range(len(parts)) for folder in ("", "test")]
    return next((place for place in places if place.is_file()), places[0])


def _lines(path: Path) -> Iterable[str]:
    return (line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _vimeo(list_name: str, frames: Sequence[str]) -> Callable[[Path], list[Triplet]]:
    def find(root: Path) -> list[Triplet]:
        if not (root / list_name).is_file():
            return []
        folders = [(name, root / "sequences" / name) for name in _lines(root / list_name)]
        return [_triplet(name, (folder / frame for frame in frames)) for name, folder in folders]

    return find


def _vimeo_septuplet(root: Path, skip: int) -> list[Triplet]:
    first = (7 - skip) // 2
    frames = tuple(f"im{number}.png" for number in range(first, first + skip + 2))
    if skip == 1:
        return _vimeo("sep_testlist.txt", frames)(root)
    if not (root / "sep_testlist.txt").is_file():
        return []
    names = _lines(root / "sep_testlist.txt")
    return [
        triplet
        for name in names
        for triplet in _between(name, [root / "sequences" / name / frame for frame in frames])
    ]


XIPH_CLIPS = (
    "BoxingPractice",
    "Crosswalk",
    "DrivingPOV",
    "FoodMarket",
    "FoodMarket2",
    "RitualDance",
    "SquareAndTimelapse",
    "Tango",
)


def _xiph(view: str) -> Callable[[Path], list[Triplet]]:
    def find(root: Path) -> list[Triplet]:
        folder = root / "frames" if (root / "frames").is_dir() else root
        if not any(folder.glob("*-001.png")):
            return []
        return [
            _triplet(f"{clip}-{i:03d}", (folder / f"{clip}-{j:03d}.png" for j in (i - 1, i, i + 1)), clip, view)
            for clip in XIPH_CLIPS
            for i in range(2, 99, 2)
        ]

    return find


_MIDDLEBURY = "input/NAME/frame10.png and frame11.png with gt/NAME/frame10i11.png (or other-data and other-gt-interp)"
_UCF101 = "NAME/frame_00.png, frame_01_gt.png, frame_02.png"
_SEQUENCES = "NAME/FRAME.png or .jpg, whole clips"
_ucf101 = _named_frames(("frame_00.png", "frame_01_gt.png", "frame_02.png"))
_vimeo_triplet = _vimeo("tri_testlist.txt", ("im1.png", "im2.png", "im3.png"))

BENCHMARKS: dict[str, Benchmark] = {
    "middlebury": Benchmark(_MIDDLEBURY, _inputs_and_truths),
    "ucf101": Benchmark(_UCF101, _ucf101),
    "davis": Benchmark(f"{_MIDDLEBURY}, or {_SEQUENCES} (in JPEGImages/480p or directly)", _davis),
    **{
        f"snu-film-{level}": Benchmark(
            f"test-{level}.txt (there or in eval_modes) with the files that it names", _snu_film(level)
        )
        for level in ("easy", "medium", "hard", "extreme")
    },
    "vimeo-triplet": Benchmark("tri_testlist.txt with sequences/NAME/im1.png … im3.png", _vimeo_triplet),
    "vimeo-septuplet": Benchmark(
        "sep_testlist.txt with sequences/NAME/im1.png … im7.png; im4 is made from im3 and im5",
        _vimeo_septuplet,
        range(1, 6),
    ),
    "xiph-2k": Benchmark(
        "CLIP-001.png … CLIP-100.png of the eight clips (there or in frames), made half as large", _xiph("half")
    ),
    "xiph-4k": Benchmark(
        "CLIP-001.png … CLIP-100.png of the eight clips (there or in frames), central quarter", _xiph("centre")
    ),
    "vfitex": Benchmark(f"{_SEQUENCES}; of 4K clips the central quarter", _vfitex),
    "triplets": Benchmark(
        f"{_MIDDLEBURY}, or {_UCF101}, or folders of three images in the order of their names",
        _first_of(_inputs_and_truths, _ucf101, _three_images),
    ),
    "frames": Benchmark(
        "FRAME.png or .jpg in the order of their names, there or in folders, each a clip", _frames, range(1, 1000)
    ),
}
