"""Losses that several stages share: LPIPS, and the adversarial loss with its discriminator and how it is balanced."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from madiff_diffusers.evaluation.metrics import build_lpips
from training.options import RunOptions
from training.run import Run


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., 2017): a map of logits, one per overlapping patch.

    GroupNorm takes the place of BatchNorm, so that a sample's logits do not depend on its batch.
    """

    def __init__(self, in_channels: int, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = base_channels
        for i in range(1, num_layers + 1):
            out_channels = base_channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(channels, out_channels, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, out_channels),
                nn.LeakyReLU(0.2),
            ]
            channels = out_channels
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def discriminator_hinge_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4) at the last layer (Esser et al., 2021, eq. 7), at most 1e4."""
    reconstruction_grad = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


class Adversary:
    """A patch discriminator that is trained beside a network, from step `start` on.

    Args:
        run: must not have been resumed yet.
        in_channels: of what is judged.
        channels: of the discriminator's first layer.
        betas: of its Adam.
        start: step at which it begins to take part.
    """

    def __init__(self, run: Run, in_channels: int, channels: int, betas: tuple[float, ...], start: int):
        self.run, self.start = run, start
        self.bare = PatchDiscriminator(in_channels, channels)
        optimizer = torch.optim.Adam(self.bare.parameters(), lr=run.options.learning_rate, betas=tuple(betas))
        self.schedule = run.schedule(optimizer)
        self.network, self.optimizer = run.accelerator.prepare(self.bare, optimizer)
        self.bare = run.accelerator.unwrap_model(self.network)

    @property
    def active(self) -> bool:
        return self.run.progress.step >= self.start

    def loss(self, fake: torch.Tensor) -> torch.Tensor:
        """What the network has to pay for being found out; no gradient goes to the discriminator."""
        self.bare.requires_grad_(False)
        loss = -self.bare(fake).mean()
        self.bare.requires_grad_(True)
        return loss

    def update(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """A pass of the discriminator, and its step where the network makes one. Returns its loss."""
        # One pass for both: data parallelism wants one forward for each backward.
        logits_real, logits_fake = self.network(torch.cat([real, fake.detach()])).chunk(2)
        loss = discriminator_hinge_loss(logits_real, logits_fake)
        self.run.backward(loss)
        self.run.update(self.network, self.optimizer)
        if self.run.ends_step:
            self.schedule.step()
        return loss.detach()


def lpips_loss(options: RunOptions, device: torch.device) -> nn.Module | None:
    """The frozen LPIPS network that the options name, on a device; None for `lpips_net` "none", or if nothing asks for it."""
    if options.lpips_net == "none" or not (options.validation or getattr(options, "lpips_weight", 0) > 0):
        return None
    return build_lpips(options.lpips_net, options.lpips_backbone or None).to(device)
