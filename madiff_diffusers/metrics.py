"""Image metrics: PSNR and SSIM of scikit-image, LPIPS of the `lpips` package. Needs the extra `eval`."""

from typing import Optional

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two `(H, W, 3)` uint8 images; 120 for identical ones."""
    from skimage.metrics import mean_squared_error

    return float(-10 * np.log10(max(mean_squared_error(image / 255.0, truth / 255.0), 1e-12)))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of two `(H, W, 3)` uint8 images: Gaussian window of 11 pixels, σ = 1.5, mean over RGB."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            image, truth, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def build_lpips(net: str = "alex", backbone: Optional[str] = None) -> nn.Module:
    """The LPIPS metric of the `lpips` package as a frozen module; takes frames `(B, 3, H, W)` in [-1, 1].

    Args:
        net: `"alex"` or `"vgg"`.
        backbone: safetensors file with the ImageNet weights of torchvision's feature layers (`features.N.weight`). If
            not given, torchvision downloads them on first use.

    Raises:
        ValueError: if the backbone's file is not that, or lpips cannot be imported beside this torch.
    """
    try:
        import lpips
    except RuntimeError as error:  # what a torchvision that was built for another torch raises
        raise ValueError(f"The lpips package cannot be imported: {error}") from error

    metric = lpips.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
    if backbone is not None:
        # lpips keeps each layer under its torchvision index, inside the slice whose output it compares.
        names = {name: ".".join(["features", *name.split(".")[1:]]) for name in metric.net.state_dict()}
        try:
            state = load_file(backbone)
            metric.net.load_state_dict({name: state[original] for name, original in names.items()}, strict=True)
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"`backbone` must hold the feature layers of {net!r}, but {backbone} does not: {error}") from error
    return metric.requires_grad_(False).eval()


@torch.no_grad()
def lpips_distance(metric: nn.Module, image: np.ndarray, truth: np.ndarray) -> float:
    """LPIPS of two `(H, W, 3)` uint8 images by what `build_lpips` gave."""
    tensors = [torch.from_numpy(each.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for each in (image, truth)]
    return float(metric(*tensors))
