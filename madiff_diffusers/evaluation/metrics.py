"""Image metrics: PSNR and SSIM of scikit-image, LPIPS of the `lpips` package, FloLPIPS on torchvision's RAFT, FID of
`torch-fidelity`. Needs the extra `eval`."""

import contextlib
import hashlib
import importlib
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file


class MetricKind(NamedTuple):
    title: str
    higher_is_better: bool
    digits: int
    of_items: bool = True  # else of a run alone
    least_side: int = 1  # pixels that frames must have: a window's, or what a network's strides leave something of


METRICS: dict[str, MetricKind] = {
    "psnr": MetricKind("PSNR", True, 2),
    "ssim": MetricKind("SSIM", True, 4, least_side=11),
    "lpips": MetricKind("LPIPS", False, 4, least_side=31),
    "lpips_vgg": MetricKind("LPIPS (VGG)", False, 4, least_side=16),
    "flolpips": MetricKind("FloLPIPS", False, 4, least_side=31),
    "fid": MetricKind("FID", False, 3, of_items=False),
    "step_ratio": MetricKind("step ratio", False, 2, of_items=False),
}

# Previous frame, true frame, next frame and result, each `(H, W, 3)` uint8.
ScoredFrames = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two `(H, W, 3)` uint8 images; 120 for identical ones."""
    from skimage.metrics import mean_squared_error

    return float(-10 * np.log10(max(mean_squared_error(image / 255.0, truth / 255.0), 1e-12)))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of two `(H, W, 3)` uint8 images: Gaussian window of 11 pixels, σ = 1.5, mean over RGB."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            image,
            truth,
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def build_lpips(net: str = "alex", backbone: str | None = None) -> nn.Module:
    """The LPIPS metric of the `lpips` package as a frozen module; takes frames `(B, 3, H, W)` in [-1, 1].

    Args:
        net: `"alex"` or `"vgg"`.
        backbone: safetensors file with the ImageNet weights of torchvision's feature layers (`features.N.weight`). If
            not given, torchvision downloads them on first use.

    Raises:
        ValueError: if the backbone's file is not that, or lpips cannot be imported beside this torch.
        OSError: if the backbone's file is missing, or the download fails.
    """
    try:
        import lpips
    except RuntimeError as error:  # what a torchvision that was built for another torch raises
        raise ValueError(f"The lpips package cannot be imported: {error}") from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by arguments of old
        metric = lpips.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
    if backbone is not None:
        # lpips keeps each layer under its torchvision index, inside the slice whose output it compares.
        names = {name: ".".join(["features", *name.split(".")[1:]]) for name in metric.net.state_dict()}
        try:
            state = load_file(backbone)
            metric.net.load_state_dict({name: state[original] for name, original in names.items()}, strict=True)
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"`backbone` must hold the feature layers of {net!r}, but {backbone} does not: {error}"
            ) from error
    return metric.requires_grad_(False).eval()


class FloLPIPS(nn.Module):
    r"""LPIPS weighted by how wrongly the result moves (Danier et al., *FloLPIPS*, PCS 2022).

    The distance maps of every layer of LPIPS are averaged with the weights ‖F(truth → neighbour) − F(result → neighbour)‖,
    once for each neighbour, and the two values are averaged. Where the flows are the same everywhere, every place weighs the same.
    The flow is RAFT's (Teed & Deng, ECCV 2020) and not the original's PWC-Net, so that values differ from those published.

    Args:
        lpips: what `build_lpips` gave.
        raft: one of torchvision's RAFT models.
    """

    def __init__(self, lpips: nn.Module, raft: nn.Module):
        super().__init__()
        self.lpips, self.raft = lpips, raft

    def forward(
        self, prev: torch.Tensor, truth: torch.Tensor, next_: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """Distances `(B,)` of frames `(B, 3, H, W)` in [-1, 1]."""
        true_features, features = (self._features(frames) for frames in (truth, result))
        maps = []
        for layer, true_feature, feature in zip(self.lpips.get_submodule("lins").children(), true_features, features):
            unit = [each / (each.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for each in (true_feature, feature)]
            maps.append(layer((unit[0] - unit[1]).square()))  # [B,1,h,w]
        distance = torch.zeros(len(truth), device=truth.device)
        for neighbour in (prev, next_):
            error = self._flow(truth, neighbour) - self._flow(result, neighbour)
            for each in maps:
                resized = F.interpolate(error, each.shape[-2:], mode="bilinear", align_corners=False)
                weight = resized.norm(dim=1, keepdim=True)
                weight = torch.where(weight.sum(dim=(1, 2, 3), keepdim=True) > 0, weight, torch.ones_like(weight))
                distance = distance + (each * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))
        return distance / 2

    def _features(self, frames: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.lpips.get_submodule("net")(self.lpips.get_submodule("scaling_layer")(frames))

    def _flow(self, frames_from: torch.Tensor, frames_to: torch.Tensor) -> torch.Tensor:
        """Flow `(B, 2, H, W)` in pixels."""
        height, width = frames_from.shape[-2:]
        # RAFT works on an eighth of the size, and wants 16 pixels of it at least.
        padding = (0, max(-width % 8, 128 - width), 0, max(-height % 8, 128 - height))
        padded = [F.pad(frames, padding, mode="replicate") for frames in (frames_from, frames_to)]
        return self.raft(*padded)[-1][..., :height, :width]


def build_raft(weights: str | None = None) -> nn.Module:
    """torchvision's `raft_large`, frozen.

    Args:
        weights: file of its state dict, `.safetensors` or `.pth`. If not given, torchvision downloads it on first use.

    Raises:
        ValueError: if the file is not that.
        OSError: if the file is missing, or the download fails.
    """
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    if weights is None:
        model = raft_large(weights=Raft_Large_Weights.C_T_SKHT_V2, progress=False)
    else:
        model = raft_large()
        try:
            model.load_state_dict(_load_tensors(weights))
        except (AttributeError, RuntimeError) as error:
            raise ValueError(
                f"`weights` must hold torchvision's raft_large, but {weights} does not: {error}"
            ) from error
    return model.requires_grad_(False).eval()


def _load_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or of a pickle that holds nothing else.

    Raises:
        ValueError: if it is neither.
        OSError: if there is no such file.
    """
    try:
        return (
            load_file(path)
            if Path(path).suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be a file of weights and of nothing else, but cannot be read as one: {error}"
        ) from error


def build_inception(weights: str | None = None) -> nn.Module:
    """The Inception network of FID as `torch-fidelity` has it; takes frames `(B, 3, H, W)` uint8.

    Args:
        weights: torch-fidelity's `.pth` file. If not given, it is downloaded on first use.

    Raises:
        ValueError: if the file is not that.
        OSError: if the file is missing, or the download fails.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        _load_tensors(weights)  # torch-fidelity itself would run what a pickle holds
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            ).eval()
    except (AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"`weights` must hold torch-fidelity's Inception network, but {weights} does not: {error}"
        ) from error


@torch.no_grad()
def fid(
    inception: nn.Module, results: Iterable[np.ndarray], truths: Iterable[np.ndarray], device: torch.device
) -> float:
    """Fréchet Inception distance (Heusel et al., 2017) between two sets of images, by torch-fidelity's arithmetic.

    Args:
        inception: what `build_inception` gave.
        results, truths: images `(H, W, 3)` uint8, at least 2 of each.
        device: where the network is.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = []
    for images in (results, truths):
        # One by one: images differ in size.
        features = [inception(torch.from_numpy(image).permute(2, 0, 1)[None].to(device))[0].cpu() for image in images]
        if len(features) < 2:
            raise ValueError(f"FID needs at least 2 images, but there are {len(features)}.")
        statistics.append(fid_features_to_statistics(torch.cat(features)))
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


class Scorer:
    """Scores results by several metrics; each metric's network is built once.

    A metric whose network is to be downloaded, but cannot be, is left out: `left_out` says why.

    Args:
        metrics: names in `METRICS`.
        device: where the networks run.
        lpips_backbone: see `build_lpips`; of AlexNet, for `lpips` and `flolpips`.
        lpips_vgg_backbone: the same of VGG-16, for `lpips_vgg`.
        raft_weights: see `build_raft`.
        inception_weights: see `build_inception`.

    Attributes:
        names: the metrics that can be had.
        left_out: the others, each with the reason.
        networks: what each metric's network is: the SHA-256 of its file, or whose download it is.

    Raises:
        ValueError: for a metric that there is not, or a file that does not hold its network.
        OSError: if a file is missing.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("psnr", "ssim", "lpips"),
        device: torch.device = torch.device("cpu"),
        lpips_backbone: str | None = None,
        lpips_vgg_backbone: str | None = None,
        raft_weights: str | None = None,
        inception_weights: str | None = None,
    ):
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"`metrics` must be among {', '.join(METRICS)}, but are {', '.join(metrics) or 'none'}.")
        importlib.import_module("skimage.metrics")  # so that what is missing is known before a long run

        self.device = device
        self.left_out: dict[str, str] = {}
        self.networks: dict[str, str] = {}
        self._modules: dict[str, nn.Module] = {}
        wanted = [name for name in METRICS if name in metrics]
        if "lpips" in wanted or "flolpips" in wanted:
            with self._leaving_out([name for name in ("lpips", "flolpips") if name in wanted], lpips_backbone):
                self._modules["lpips"] = build_lpips("alex", lpips_backbone).to(device)
                self.networks["lpips"] = _identity(lpips_backbone, "torchvision's AlexNet")
        if "lpips_vgg" in wanted:
            with self._leaving_out(["lpips_vgg"], lpips_vgg_backbone):
                self._modules["lpips_vgg"] = build_lpips("vgg", lpips_vgg_backbone).to(device)
                self.networks["lpips_vgg"] = _identity(lpips_vgg_backbone, "torchvision's VGG-16")
        if "flolpips" in wanted and "lpips" in self._modules:
            with self._leaving_out(["flolpips"], raft_weights):
                flolpips = FloLPIPS(self._modules["lpips"], build_raft(raft_weights))
                self._modules["flolpips"] = flolpips.to(device).eval()
                flow = _identity(raft_weights, "torchvision's raft_large C_T_SKHT_V2")
                self.networks["flolpips"] = f"{self.networks['lpips']}; {flow}"
        if "fid" in wanted:
            with self._leaving_out(["fid"], inception_weights):
                self._modules["fid"] = build_inception(inception_weights).to(device)
                self.networks["fid"] = _identity(inception_weights, "torch-fidelity's Inception")
        if "lpips" not in wanted:
            self.networks.pop("lpips", None)
        self.names = [name for name in wanted if name not in self.left_out]

    @contextlib.contextmanager
    def _leaving_out(self, names: Sequence[str], file: str | None) -> Iterator[None]:
        """A download that fails leaves these metrics out; a file that was named and cannot be used is an error."""
        try:
            yield
        except OSError as error:
            if file is not None:
                raise
            self.left_out.update(dict.fromkeys(names, f"its network could not be downloaded ({error})"))

    @torch.no_grad()
    def score(self, batch: Sequence[ScoredFrames]) -> list[dict[str, float]]:
        """The scores of each of several results of one size, by the metrics that single ones have."""
        scores: list[dict[str, float]] = [{} for _ in batch]
        for row, (_, truth, _, result) in zip(scores, batch):
            for name, function in (("psnr", psnr), ("ssim", ssim)):
                if name in self.names:
                    row[name] = function(result, truth)
        if {"lpips", "lpips_vgg", "flolpips"} & set(self.names):
            prev, true, next_, made = [
                (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1).to(
                    self.device
                )
                for images in zip(*batch)
            ]
            values = {}
            if "lpips" in self.names:
                values["lpips"] = self._modules["lpips"](made, true).flatten()
            if "lpips_vgg" in self.names:
                values["lpips_vgg"] = self._modules["lpips_vgg"](made, true).flatten()
            if "flolpips" in self.names:
                values["flolpips"] = self._modules["flolpips"](prev, true, next_, made)
            for name, each in values.items():
                for row, value in zip(scores, each.tolist()):
                    row[name] = value
        return scores

    def fid(self, results: Iterable[np.ndarray], truths: Iterable[np.ndarray]) -> float:
        """See `fid`; for a scorer that has it among its `names`."""
        return fid(self._modules["fid"], results, truths, self.device)


def _identity(file: str | None, download: str) -> str:
    return download if file is None else "sha256:" + hashlib.sha256(Path(file).read_bytes()).hexdigest()
