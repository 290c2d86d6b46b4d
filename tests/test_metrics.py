"""Each metric against an independent computation, and what happens where its network cannot be had."""

import importlib.util
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from madiff_diffusers.evaluation.metrics import (
    FloLPIPS,
    Scorer,
    build_inception,
    build_raft,
    fid,
    psnr,
    ssim,
)
from tests.conftest import moving_picture


def load_scorer(shared_data: Path):
    spec = importlib.util.spec_from_file_location("score", shared_data / "tools" / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_lpips(net: str = "alex") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()


def backbone_file(path: Path, metric: nn.Module) -> str:
    """A file of the feature layers of a metric's network."""
    layers = metric.net.state_dict().items()
    save_file({".".join(["features", *name.split(".")[1:]]): value for name, value in layers}, path)
    return str(path)


def random_backbone_file(path: Path, seed: int) -> str:
    """A file of AlexNet's feature layers, with random weights."""
    torch.manual_seed(seed)
    return backbone_file(path, random_lpips())


@pytest.fixture(scope="module")
def random_backbone(tmp_path_factory) -> str:
    return random_backbone_file(tmp_path_factory.mktemp("backbone") / "alexnet.safetensors", 0)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 127.5 - 1


def test_agrees_with_an_independent_scorer(shared_data, tmp_path):
    score = load_scorer(shared_data)
    images = [moving_picture(time, 72, 91) for time in (-1, 0, 1, 2)]
    for name, image in zip("ab", images[1:]):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    a, b = (score.load(tmp_path / f"{name}.png") for name in "ab")
    scorer = Scorer(lpips_backbone=str(shared_data / "weights" / "lpips_alexnet_features.safetensors"))
    (scores,) = scorer.score([(images[0], images[1], images[3], images[2])])
    assert scores["psnr"] == pytest.approx(score.psnr(a, b), abs=1e-3)
    assert scores["ssim"] == pytest.approx(score.ssim(a, b), abs=1e-4)
    assert scores["lpips"] == pytest.approx(score.LPIPS(str(shared_data / "weights"))(a, b), abs=1e-4)


def test_known_values():
    black, grey = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    assert psnr(grey, black) == pytest.approx(-20 * np.log10(0.2))
    assert psnr(grey, grey) == pytest.approx(120)
    assert ssim(grey, grey) == 1
    assert ssim(grey, black) == pytest.approx(1e-4 / (0.04 + 1e-4))  # luminance alone: C1 / (μ² + C1)


def test_lpips_is_the_package_s(random_backbone):
    frames = [moving_picture(time, 64, 80) for time in (-1, 0, 1, 2)]
    torch.manual_seed(0)
    package = random_lpips()
    expected = package(tensor(frames[3]), tensor(frames[1])).item()
    scorer = Scorer(["lpips"], lpips_backbone=random_backbone)
    assert scorer.score([(frames[0], frames[1], frames[2], frames[3])]) == [{"lpips": expected}]
    both = scorer.score([(frames[0], frames[1], frames[2], frames[3]), (frames[0], frames[2], frames[1], frames[3])])
    assert both[0]["lpips"] == pytest.approx(expected, rel=1e-5)


def test_lpips_of_vgg_is_the_package_s(tmp_path, random_backbone):
    frames = [moving_picture(time, 64, 80) for time in (-1, 0, 1, 2)]
    torch.manual_seed(0)
    package = random_lpips("vgg")
    file = backbone_file(tmp_path / "vgg.safetensors", package)
    expected = package(tensor(frames[3]), tensor(frames[1])).item()
    scorer = Scorer(["lpips_vgg", "lpips"], lpips_backbone=random_backbone, lpips_vgg_backbone=file)
    (scores,) = scorer.score([(frames[0], frames[1], frames[2], frames[3])])
    assert list(scores) == ["lpips", "lpips_vgg"] and scores["lpips_vgg"] == expected != scores["lpips"]
    assert scorer.networks["lpips_vgg"] != scorer.networks["lpips"]
    with pytest.raises(ValueError, match="`backbone` must hold the feature layers of 'vgg'"):
        Scorer(["lpips_vgg"], lpips_vgg_backbone=random_backbone)


def test_batches_score_as_single_items(random_backbone):
    scorer = Scorer(lpips_backbone=random_backbone)
    items = [tuple(moving_picture(time + shift, 48, 64) for time in (-1, 0, 1, 2)) for shift in (0, 4, 9)]
    singles = [scorer.score([item])[0] for item in items]
    for row, single in zip(scorer.score(items), singles):
        assert row == pytest.approx(single, rel=1e-4)


class ShiftFlow(nn.Module):
    """Stands in for RAFT where a test needs to know the flow: the difference of mean brightness, to the right."""

    def forward(self, first, second):
        shift = (first - second).mean(dim=1, keepdim=True)
        return [torch.cat([shift, torch.zeros_like(shift)], dim=1)]


def test_flolpips_weighs_by_how_wrongly_it_moves():
    torch.manual_seed(0)
    metric = FloLPIPS(random_lpips(), ShiftFlow())
    frames = [tensor(moving_picture(time, 136, 152)) for time in (-1, 0, 1, 3)]
    prev, truth, next_, result = frames
    with torch.no_grad():
        value = metric(prev, truth, next_, result).item()
        features = [metric.lpips.net(metric.lpips.scaling_layer(each)) for each in (truth, result)]
        error = (truth - result).mean(dim=1)[0]  # of the flow; the neighbour cancels out
        expected = 0.0
        for layer, a, b in zip(metric.lpips.lins, *features):
            distance = layer((lpips.normalize_tensor(a) - lpips.normalize_tensor(b)) ** 2)[0, 0]
            weight = F.interpolate(error[None, None], distance.shape, mode="bilinear", align_corners=False)[0, 0].abs()
            expected += (distance * weight).sum().item() / weight.sum().item()
        assert value == pytest.approx(expected, rel=1e-4)
        assert metric(prev, truth, next_, truth).item() == 0


@pytest.mark.parametrize("size, seen", [((20, 300), (128, 304)), ((130, 128), (136, 128)), ((128, 136), (128, 136))])
def test_raft_sees_frames_of_the_sizes_that_it_takes(size, seen):
    def still(first: torch.Tensor, second: torch.Tensor) -> list:
        assert first.shape[-2:] == second.shape[-2:] == seen
        return [torch.zeros(1, 2, *seen)]

    frames = torch.zeros(1, 3, *size)
    assert FloLPIPS._flow(SimpleNamespace(raft=still), frames, frames).shape == (1, 2, *size)


def test_flolpips_on_raft(random_backbone, tmp_path):
    """The real network, with random weights, for frames smaller than it takes and of a size that it does not divide."""
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    torch.save(raft_large().state_dict(), tmp_path / "raft.pth")
    scorer = Scorer(["flolpips", "lpips"], lpips_backbone=random_backbone, raft_weights=str(tmp_path / "raft.pth"))
    prev, truth, next_, result = (moving_picture(time, 50, 70) for time in (-1, 0, 1, 3))
    (scores,) = scorer.score([(prev, truth, next_, result)])
    assert scorer.names == ["lpips", "flolpips"] and 0 < scores["flolpips"] < 10
    assert scorer.score([(prev, truth, next_, truth)])[0]["flolpips"] == 0
    assert scorer.networks["flolpips"].count("sha256:") == 2


class Means(nn.Module):
    """Eight features of an image: enough to check the arithmetic of the distance."""

    def forward(self, images):
        return (F.adaptive_avg_pool2d(images.float().mean(dim=1, keepdim=True), (2, 4)).flatten(1),)


def test_fid_is_the_distance_of_two_normal_distributions():
    sets = [[moving_picture(time + shift, 40 + i, 60) for i, time in enumerate(range(14))] for shift in (0, 25)]
    value = fid(Means(), iter(sets[0]), iter(sets[1]), torch.device("cpu"))
    features = [
        torch.cat([Means()(torch.from_numpy(image).permute(2, 0, 1)[None])[0] for image in each]).numpy()
        for each in sets
    ]
    (mean_a, cov_a), (mean_b, cov_b) = ((each.mean(0), np.cov(each, rowvar=False)) for each in features)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert value == pytest.approx(expected, rel=1e-3)
    assert fid(Means(), sets[0], sets[0], torch.device("cpu")) == pytest.approx(0, abs=1e-2)
    with pytest.raises(ValueError, match="at least 2 images, but there are 1"):
        fid(Means(), sets[0][:1], sets[1], torch.device("cpu"))


@pytest.fixture
def inception_file(tmp_path) -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **names):
            return None

    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    network = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return str(tmp_path / "inception.pth")


def test_inception_from_a_file(inception_file):
    network = build_inception(inception_file)
    (features,) = network(torch.from_numpy(moving_picture(0)).permute(2, 0, 1)[None])
    assert features.shape == (1, 2048)
    assert Scorer(["fid"], inception_weights=inception_file).names == ["fid"]


@pytest.mark.slow
def test_fid_of_a_scorer(inception_file):
    scorer = Scorer(["fid"], inception_weights=inception_file)
    images = [moving_picture(time, 64, 80) for time in range(4)]
    other = [moving_picture(time + 30, 64, 80) for time in range(4)]
    assert scorer.fid(images, other) > scorer.fid(images, images) > -1e-2


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("build", [build_raft, build_inception])
def test_pickles_that_hold_more_than_weights_are_refused(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bomb.pth").write_bytes(pickle.dumps({"weight": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match="bomb.pth must be a file of weights and of nothing else"):
        build("bomb.pth")
    assert not Path("exploded").exists()
    torch.save({"weight": torch.zeros(1)}, "other.pth")
    with pytest.raises(ValueError, match="other.pth does not"):
        build("other.pth")
    with pytest.raises(OSError, match="nowhere.pth"):
        build("nowhere.pth")


def test_a_network_that_cannot_be_downloaded_is_left_out_by_name(random_backbone, tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    scorer = Scorer(["psnr", "lpips", "lpips_vgg", "flolpips", "fid"])
    assert scorer.names == ["psnr"] and set(scorer.left_out) == {"lpips", "lpips_vgg", "flolpips", "fid"}
    assert all("could not be downloaded" in reason for reason in scorer.left_out.values())
    scorer = Scorer(["psnr", "lpips", "flolpips"], lpips_backbone=random_backbone)
    assert scorer.names == ["psnr", "lpips"] and set(scorer.left_out) == {"flolpips"}


def test_a_file_that_was_named_and_cannot_be_used_is_an_error(random_backbone, tmp_path):
    with pytest.raises(OSError):
        Scorer(["lpips"], lpips_backbone=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ValueError, match="feature layers of 'alex'"):
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        Scorer(["lpips"], lpips_backbone=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="nothing else"):
        (tmp_path / "raft.pth").write_text("no weights")
        Scorer(["flolpips"], lpips_backbone=random_backbone, raft_weights=str(tmp_path / "raft.pth"))
    with pytest.raises(ValueError, match="`metrics` must be among"):
        Scorer(["psnr", "vmaf"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(random_backbone):
    frames = tuple(moving_picture(time, 64, 80) for time in (-1, 0, 1, 2))
    on_cpu, on_gpu = (
        Scorer(lpips_backbone=random_backbone, device=torch.device(name)).score([frames])[0]
        for name in ("cpu", "cuda")
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
