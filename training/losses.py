"""Losses that several stages share: LPIPS, the discriminator's, and the weight that balances the adversarial one."""

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
    if options.lpips_net == "none" or not (options.validation or getattr(options, "lpips_weight", 0) > 0):
        return None
    return build_lpips(options.lpips_net, options.lpips_backbone or None).to(device)
