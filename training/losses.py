"""Losses that several stages share: LPIPS, Gram matrices, the discriminator's, and the weight that balances the adversarial one."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from madiff_diffusers.evaluation.metrics import build_lpips
from training.options import RunOptions


def discriminator_hinge_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4) at the last layer (Esser et al., 2021, eq. 7), at most 1e4."""
    reconstruction_grad = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


def lpips_loss(options: RunOptions, device: torch.device) -> nn.Module | None:
    """The frozen LPIPS network that the options name, on a device; None for `lpips_net` "none", or if nothing asks for it."""
    weighs = any(getattr(options, name, 0) > 0 for name in ("lpips_weight", "gram_weight"))
    if options.lpips_net == "none" or not (options.validation or weighs):
        return None
    return build_lpips(options.lpips_net, options.lpips_backbone or None).to(device)


def part_of_both(
    sample: torch.Tensor, truth: torch.Tensor, side: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same square of frames `(B, C, H, W)` and of true ones, somewhere, of `side` pixels or what there is of them."""
    places = []
    for size in sample.shape[-2:]:
        most = max(size - side, 0)
        begin = int(torch.randint(most + 1, (1,), generator=generator, device=generator.device))
        places.append(slice(begin, begin + side))
    return sample[..., places[0], places[1]], truth[..., places[0], places[1]]


def gram_loss(lpips: nn.Module, sample: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How far the textures of frames `(B, 3, H, W)` in [-1, 1] are apart, `(B,)`: the squared distance of the Gram matrices of the features
    that LPIPS compares, over that of the truth to zero, in the mean of the layers. FILM's style loss (Reda et al., 2022, eq. 7) but for
    that ratio, which gives every layer the same say.

    Args:
        lpips: what `lpips_loss` gave.
    """
    both = lpips.net(lpips.scaling_layer(torch.cat([sample, truth])))
    losses = []
    with torch.autocast(
        sample.device.type, enabled=False
    ):  # which would take products and their sums back to half precision
        for layer in both:
            features = layer.float().flatten(2)
            made, wanted = (features @ features.transpose(1, 2)).chunk(2)
            losses.append((made - wanted).square().sum(dim=(1, 2)) / wanted.square().sum(dim=(1, 2)).clamp(min=1e-12))
    return torch.stack(losses).mean(dim=0)
