"""A patch discriminator, and how it is trained beside a network."""

import torch
import torch.nn as nn

from training.losses import discriminator_hinge_loss
from training.trainer import Trainer


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


class Adversary:
    """A patch discriminator that is trained beside a network, from step `start` on.

    Args:
        trainer: must not have been resumed yet.
        in_channels: of what is judged.
        channels: of the discriminator's first layer.
        betas: of its Adam.
        start: step at which it begins to take part.
    """

    def __init__(self, trainer: Trainer, in_channels: int, channels: int, betas: tuple[float, ...], start: int):
        self.trainer, self.start = trainer, start
        self.bare = PatchDiscriminator(in_channels, channels)
        optimizer = torch.optim.Adam(
            self.bare.parameters(), lr=trainer.options.learning_rate, betas=(betas[0], betas[1])
        )
        self.schedule = trainer.schedule(optimizer, first_step=start)
        self.network, self.optimizer = trainer.accelerator.prepare(self.bare, optimizer)
        self.bare = trainer.accelerator.unwrap_model(self.network)

    @property
    def active(self) -> bool:
        return self.trainer.progress.step >= self.start

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
        self.trainer.backward(loss)
        self.trainer.optimizer_step(self.network, self.optimizer)
        if self.trainer.sync_gradients:
            self.schedule.step()
        return loss.detach()
