"""BatchNorm and spectral norm that advance once per optimiser step.

Both keep buffers that move at every forward pass in training. A step that is made of several passes would then move them
several times, and one that is spread over processes once on each, so that the same samples would give other weights.
"""

import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations

from madiff_diffusers.eventgan import EventGANModel
from training.trainer import Trainer


class StepwiseNormalisation:
    """The norms of an image-to-event generator. Call `begin_pass` before and `end_pass` after every forward pass.

    Args:
        model: its BatchNorms are found; their momentum becomes 1, so that after a pass the running statistics are those
            of its batch, and the moving average is taken here.
        with_spectral_norm: put a spectral norm on the residual blocks and decoders, as EventGAN does.
    """

    def __init__(self, model: EventGANModel, with_spectral_norm: bool):
        self.batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.momentums = [norm.momentum for norm in self.batch_norms]
        self.normed = []
        if with_spectral_norm:
            self.normed = [
                module
                for block in (*model.mid_blocks, *model.up_blocks)
                for module in block.modules()
                if isinstance(module, nn.Conv2d)
            ]
        for module in self.normed:
            spectral_norm(module)
        for norm in self.batch_norms:
            norm.momentum = 1.0
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # running means and variances as the step began
        self._sums: list[tuple[torch.Tensor, torch.Tensor]] = []  # means of those of its passes
        self._steps: list[torch.Tensor] = []

    @torch.no_grad()
    def begin_pass(self, first: bool) -> None:
        """Args: first: whether the pass is the first of its step."""
        if not first:
            return
        self._kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self.batch_norms]
        self._sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in self._kept]
        self._steps = [norm.num_batches_tracked.clone() for norm in self.batch_norms]
        for module in self.normed:
            norm = module.parametrizations.weight[0]
            norm.train()
            _ = module.weight  # a power iteration is made by looking at the weight
            norm.eval()

    @torch.no_grad()
    def end_pass(self, trainer: Trainer) -> None:
        for (mean, var), norm in zip(self._sums, self.batch_norms):
            mean += norm.running_mean / trainer.options.gradient_accumulation_steps
            var += norm.running_var / trainer.options.gradient_accumulation_steps
        if not trainer.sync_gradients:
            return
        for norm, momentum, kept, sums in zip(self.batch_norms, self.momentums, self._kept, self._sums):
            for running, old, new in zip((norm.running_mean, norm.running_var), kept, sums):
                running.copy_(torch.lerp(old, trainer.accelerator.reduce(new, "mean"), momentum))
        for norm, steps in zip(self.batch_norms, self._steps):
            norm.num_batches_tracked.copy_(steps + 1)

    def fold(self) -> None:
        """Make the spectral norms part of the weights."""
        for module in self.normed:
            module.parametrizations.weight[
                0
            ].eval()  # as it was in training: a look in training mode is a power iteration more
            remove_parametrizations(module, "weight")
