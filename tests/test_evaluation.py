import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from madiff_diffusers.evaluation import Evaluator, find_triplets
from madiff_diffusers.image_io import read_image
from madiff_diffusers.metrics import build_lpips, lpips_distance, psnr, ssim
from tests.conftest import moving_picture


@pytest.fixture
def layouts(tmp_path) -> list:
    """The same two triplets in both layouts."""
    names = {
        "middlebury": ("input/{}/frame10.png", "gt/{}/frame10i11.png", "input/{}/frame11.png"),
        "ucf101": ("{}/frame_00.png", "{}/frame_01_gt.png", "{}/frame_02.png"),
    }
    for layout, patterns in names.items():
        for name, shift in (("2", 0), ("11", 5)):
            for pattern, time in zip(patterns, (-1, 0, 1)):
                path = tmp_path / layout / pattern.format(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(moving_picture(time + shift, 40, 48)).save(path)
    return [tmp_path / layout for layout in names]


def test_both_layouts_hold_the_same_triplets(layouts):
    for root in layouts:
        triplets = find_triplets(str(root))
        assert {triplet.name for triplet in triplets} == {"2", "11"}
        for triplet in triplets:
            truth = np.array(read_image(triplet.truth))
            assert np.array_equal(truth, moving_picture(0 if triplet.name == "2" else 5, 40, 48))


def test_missing_files_and_empty_folders_are_named(layouts, tmp_path):
    (layouts[1] / "11" / "frame_02.png").unlink()
    with pytest.raises(FileNotFoundError, match="11/frame_02.png"):
        find_triplets(str(layouts[1]))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="`root` must hold triplets"):
        find_triplets(str(empty))


def load_scorer(shared_data: Path):
    spec = importlib.util.spec_from_file_location("score", shared_data / "tools" / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_metrics_agree_with_an_independent_scorer(shared_data, tmp_path):
    score = load_scorer(shared_data)
    images = [moving_picture(time, 72, 91) for time in (0, 1)]
    for name, image in zip(("a", "b"), images):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    a, b = (score.load(tmp_path / f"{name}.png") for name in ("a", "b"))
    metric = build_lpips("alex", str(shared_data / "weights" / "lpips_alexnet_features.safetensors"))
    assert psnr(*images) == pytest.approx(score.psnr(a, b), abs=1e-3)
    assert ssim(*images) == pytest.approx(score.ssim(a, b), abs=1e-4)
    assert lpips_distance(metric, *images) == pytest.approx(score.LPIPS(str(shared_data / "weights"))(a, b), abs=1e-4)
    assert psnr(images[0], images[0]) == pytest.approx(120)


def test_scores_are_of_the_files_that_are_written(pipeline, layouts, shared_data, tmp_path):
    backbone = str(shared_data / "weights" / "lpips_alexnet_features.safetensors")
    triplets = find_triplets(str(layouts[0]))
    means = Evaluator(pipeline, triplets, backbone).score(tmp_path / "out")
    written = [psnr(np.array(read_image(tmp_path / "out" / f"{t.name}.png")), np.array(read_image(t.truth))) for t in triplets]
    assert means["psnr"] == pytest.approx(np.mean(written))
    assert means["seconds"] > 0


def test_commands(pipeline, layouts, shared_data, tmp_path):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    common = ["--root", str(layouts[0]), "--checkpoint", str(tmp_path / "checkpoint")]
    common += ["--lpips-backbone", str(shared_data / "weights" / "lpips_alexnet_features.safetensors")]

    def madiff(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "madiff_diffusers", *arguments], capture_output=True, text=True)

    done = madiff("evaluate", *common, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 2 and len(list((tmp_path / "out").glob("*.png"))) == 2
    done = madiff("ablate", *common, "--steps", "1", "2", "--policies", "none", "sampling")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["none", "1"], ["none", "2"], ["sampling", "1"], ["sampling", "2"],
    ]
    done = madiff("evaluate", "--root", str(tmp_path), *common[2:])
    assert done.returncode == 2 and "`root` must hold triplets" in done.stderr
