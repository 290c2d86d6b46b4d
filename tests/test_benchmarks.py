"""Every benchmark's layout, made here as its authors hand it out, and what is said where it is not so."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from madiff_diffusers.commands.evaluate import BENCHMARK_NAMES
from madiff_diffusers.evaluation.benchmarks import BENCHMARKS, XIPH_CLIPS, find_triplets
from tests.conftest import moving_picture


def picture(number: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.ascontiguousarray(moving_picture(number, height, width))


def save(path: Path, number: int, **size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number, **size)).save(path)


def make_inputs_and_truths(root: Path, inputs: str = "input", truths: str = "gt") -> None:
    for name, first in (("Walking", 0), ("Beanbags", 5)):
        for i, path in enumerate(
            (f"{inputs}/{name}/frame10.png", f"{truths}/{name}/frame10i11.png", f"{inputs}/{name}/frame11.png")
        ):
            save(root / path, first + i)


def make_ucf101(root: Path) -> None:
    for name, first in (("11", 0), ("2", 5)):
        for i, frame in enumerate(("frame_00", "frame_01_gt", "frame_02")):
            save(root / name / f"{frame}.png", first + i)
        save(root / name / "frame_01_ours.png", 9)  # in the set as it is handed out


def make_three_images(root: Path) -> None:
    for name, first in (("b", 0), ("a", 5)):
        for i in range(3):
            save(root / name / f"im{i + 1}.png", first + i)


def make_snu_film(root: Path, folder: str) -> None:
    for i in range(5):
        save(root / "test" / "GOPRO_test" / "clip" / f"{i:06d}.png", i)
    lines = [
        " ".join(f"data/SNU-FILM/test/GOPRO_test/clip/{j:06d}.png" for j in frames)
        for frames in ((1, 2, 3), (0, 2, 4))
    ]
    (root / folder).mkdir(exist_ok=True)
    (root / folder / "test-hard.txt").write_text("\n".join(lines) + "\n")


def make_vimeo(root: Path, list_name: str, frames: int) -> None:
    for name in ("00001/0389", "00002/0001"):
        for i in range(frames):
            save(root / "sequences" / name / f"im{i + 1}.png", i)
    (root / list_name).write_text("00002/0001\n00001/0389\n\n")


def numbers(triplet, **size) -> list:
    """Which pictures a triplet consists of."""
    return [next(i for i in range(15) if np.array_equal(picture(i, **size), image)) for image in triplet.read()]


@pytest.mark.parametrize(
    "name, make, expected",
    [
        ("middlebury", make_inputs_and_truths, {"Beanbags": [5, 6, 7], "Walking": [0, 1, 2]}),
        (
            "middlebury",
            lambda root: make_inputs_and_truths(root, "other-data", "other-gt-interp"),
            {"Beanbags": [5, 6, 7], "Walking": [0, 1, 2]},
        ),
        ("davis", make_inputs_and_truths, {"Beanbags": [5, 6, 7], "Walking": [0, 1, 2]}),
        ("ucf101", make_ucf101, {"2": [5, 6, 7], "11": [0, 1, 2]}),
        ("triplets", make_inputs_and_truths, {"Beanbags": [5, 6, 7], "Walking": [0, 1, 2]}),
        ("triplets", make_ucf101, {"2": [5, 6, 7], "11": [0, 1, 2]}),
        ("triplets", make_three_images, {"a": [5, 6, 7], "b": [0, 1, 2]}),
        ("snu-film-hard", lambda root: make_snu_film(root, "."), {"001": [1, 2, 3], "002": [0, 2, 4]}),
        ("snu-film-hard", lambda root: make_snu_film(root, "eval_modes"), {"001": [1, 2, 3], "002": [0, 2, 4]}),
        (
            "vimeo-triplet",
            lambda root: make_vimeo(root, "tri_testlist.txt", 3),
            {"00002/0001": [0, 1, 2], "00001/0389": [0, 1, 2]},
        ),
        (
            "vimeo-septuplet",
            lambda root: make_vimeo(root, "sep_testlist.txt", 7),
            {"00002/0001": [2, 3, 4], "00001/0389": [2, 3, 4]},
        ),
        ("frames", make_three_images, {"a/im2": [5, 6, 7], "b/im2": [0, 1, 2]}),
    ],
)
def test_layouts(name, make, expected, tmp_path):
    make(tmp_path)
    found = find_triplets(name, str(tmp_path))
    assert {triplet.name: numbers(triplet) for triplet in found} == expected
    assert [triplet.name for triplet in found] == list(expected), "in order"
    assert [triplet.name for triplet in find_triplets(name, str(tmp_path), limit=1)] == list(expected)[:1]


def test_septuplets_at_several_instants(tmp_path):
    make_vimeo(tmp_path, "sep_testlist.txt", 7)
    for skip, expected in (
        (5, {f"im{i + 1}": ([0, i, 6], Fraction(i, 6)) for i in range(1, 6)}),
        (2, {"im3": ([1, 2, 4], Fraction(1, 3)), "im4": ([1, 3, 4], Fraction(2, 3))}),
    ):
        found = find_triplets("vimeo-septuplet", str(tmp_path), skip=skip)
        assert {triplet.name: (numbers(triplet), triplet.time) for triplet in found} == {
            f"{clip}/{name}": each for clip in ("00002/0001", "00001/0389") for name, each in expected.items()
        }
        assert {triplet.sequence for triplet in found} == {"00002/0001", "00001/0389"}
    assert find_triplets("vimeo-septuplet", str(tmp_path), skip=1) == find_triplets("vimeo-septuplet", str(tmp_path))


@pytest.mark.parametrize("whole", [True, False])
def test_frames_with_some_left_out(whole, tmp_path):
    """Of nine frames 0, 4 and 8 stay at three left out, and 8 is too short of a next one at two."""
    root = tmp_path / "clips"
    for name in ["walk"] if whole else ["walk", "run"]:
        for i in range(9):
            save(root / name / f"{i}.png", i)
    (root / "notes").mkdir()
    found = find_triplets("frames", str(root / "walk" if whole else root), skip=3)
    expected = {f"walk/{i}": ([i // 4 * 4, i, i // 4 * 4 + 4], Fraction(i % 4, 4)) for i in (1, 2, 3, 5, 6, 7)}
    assert {each.name: (numbers(each), each.time) for each in found if each.sequence == "walk"} == expected
    assert {each.sequence for each in found} == ({"walk"} if whole else {"walk", "run"})
    assert [numbers(each)[1] for each in find_triplets("frames", str(root / "walk"), skip=2)] == [1, 2, 4, 5]
    assert [each.time for each in find_triplets("frames", str(root / "walk"))] == [Fraction(1, 2)] * 4


@pytest.mark.parametrize("folder", ["", "JPEGImages/480p"])
def test_davis_clips(folder, tmp_path):
    for i in range(11):
        save(tmp_path / folder / "bear" / f"{i:05d}.png", i)
    found = find_triplets("davis", str(tmp_path))
    # Frames 3, 5, 7 of eleven, as in LDMVFI's evaluation: range(0, 11 - 6, 2), each two further.
    assert {triplet.name: numbers(triplet) for triplet in found} == {
        "bear/00003": [2, 3, 4],
        "bear/00005": [4, 5, 6],
        "bear/00007": [6, 7, 8],
    }
    assert {triplet.sequence for triplet in found} == {"bear"}


def test_vfitex_takes_the_centre_of_4k_clips(tmp_path):
    for name in ("fire_2K", "water_4K_mitch"):
        for i in range(7):
            save(tmp_path / name / f"{i + 1:03d}.png", i)
    small, large = find_triplets("vfitex", str(tmp_path))
    assert (small.name, large.name) == ("fire_2K/004", "water_4K_mitch/004")
    assert np.array_equal(small.read()[0], picture(2))
    assert np.array_equal(large.read()[0], picture(2)[5:15, 6:18])


def test_xiph(tmp_path):
    for i in range(15):
        save(tmp_path / f"{i}.png", i)
    for clip in XIPH_CLIPS:
        for i in range(1, 101):
            (tmp_path / f"{clip}-{i:03d}.png").symlink_to(tmp_path / f"{i % 15}.png")
    for benchmark in ("xiph-2k", "xiph-4k"):
        found = find_triplets(benchmark, str(tmp_path))
        assert len(found) == 8 * 49 and len({triplet.sequence for triplet in found}) == 8
        assert [path.name for path in found[0].files] == [f"BoxingPractice-{i:03d}.png" for i in (1, 2, 3)]
        expected = {
            "xiph-2k": cv2.resize(picture(2), (12, 10), interpolation=cv2.INTER_AREA),
            "xiph-4k": picture(2)[5:15, 6:18],
        }
        assert np.array_equal(found[0].read()[1], expected[benchmark])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_folder_is_told_the_layout(name, tmp_path):
    with pytest.raises(ValueError, match=f"`root` must hold {name} as "):
        find_triplets(name, str(tmp_path))
    with pytest.raises(ValueError, match=f"`root` must hold {name} as "):
        find_triplets(name, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("missing", ["input/Walking/frame11.png", "gt/Walking/frame10i11.png"])
def test_a_missing_file_is_named(missing, tmp_path):
    make_inputs_and_truths(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        find_triplets("middlebury", str(tmp_path))


def test_a_missing_truth_is_not_a_triplet_less(tmp_path):
    make_ucf101(tmp_path)
    (tmp_path / "11" / "frame_01_gt.png").unlink()
    with pytest.raises(FileNotFoundError, match="11/frame_01_gt.png"):
        find_triplets("ucf101", str(tmp_path))


def test_a_truth_of_another_size_is_named(tmp_path):
    make_inputs_and_truths(tmp_path)
    save(tmp_path / "gt" / "Walking" / "frame10i11.png", 1, height=18)
    with pytest.raises(ValueError, match=r"Walking/frame10i11.png is 24x18, but .*Walking/frame10.png is 24x20"):
        find_triplets("middlebury", str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"no image",
        lambda data: data[:300] + b"\0\0\0\0" + data[304:],
    ],
)
def test_a_damaged_image_is_named(damage, tmp_path):
    make_inputs_and_truths(tmp_path)
    path = tmp_path / "gt" / "Walking" / "frame10i11.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="Walking/frame10i11.png as an image"):
        find_triplets("middlebury", str(tmp_path))


def test_other_errors_name_the_argument(tmp_path):
    make_three_images(tmp_path)
    save(tmp_path / "a" / "im4.png", 3)
    with pytest.raises(ValueError, match="a holds 4"):
        find_triplets("triplets", str(tmp_path))
    with pytest.raises(ValueError, match="`benchmark` must be one of"):
        find_triplets("imagenet", str(tmp_path))
    with pytest.raises(ValueError, match="`limit`"):
        find_triplets("triplets", str(tmp_path), limit=0)
    make_snu_film(tmp_path, ".")
    (tmp_path / "test-hard.txt").write_text("one two\n")
    with pytest.raises(ValueError, match="test-hard.txt must name 3 files, but line 1"):
        find_triplets("snu-film-hard", str(tmp_path))


def test_what_cannot_be_left_out_is_told(tmp_path):
    make_three_images(tmp_path)
    with pytest.raises(ValueError, match="`skip` is for vimeo-septuplet, frames, but `benchmark` is 'triplets'"):
        find_triplets("triplets", str(tmp_path), skip=1)
    with pytest.raises(ValueError, match="`skip` must be from 1 to 5 for vimeo-septuplet, but is 6"):
        find_triplets("vimeo-septuplet", str(tmp_path), skip=6)
    with pytest.raises(ValueError, match="`skip` must be from 1 to 999 for frames, but is 0"):
        find_triplets("frames", str(tmp_path), skip=0)
    with pytest.raises(ValueError, match="Each folder of frames must hold at least 4 images, but .*a holds 3"):
        find_triplets("frames", str(tmp_path), skip=2)
    save(tmp_path / "a" / "im2.jpg", 2)
    save(tmp_path / "a" / "im3.jpg", 2)
    with pytest.raises(
        ValueError, match="Names must differ in more than their endings, but 2 items of .* are called a/im2"
    ):
        find_triplets("frames", str(tmp_path / "a"), skip=3)


def test_the_command_names_them_all():
    assert tuple(BENCHMARKS) == BENCHMARK_NAMES
