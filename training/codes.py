"""Which codes of a codebook are used in training, and the revival of those that are not."""

import torch
from einops import rearrange

from madiff_diffusers.vq_magan import VQMAGANModel
from training.trainer import Trainer


class CodeUsage:
    """Which codes of the codebook were used in a period of steps; at its end, unused ones can be revived.

    Saved with every checkpoint; all processes call `state_dict`, of which one is saved.

    Args:
        every: steps of a period.
        revives: whether codes that no process used are moved to latents of the step.
        begun: whether the codebook was trained before. Of one that was not, the first step moves what it does not use, which is nearly all.
    """

    def __init__(self, trainer: Trainer, model: VQMAGANModel, every: int, revives: bool, begun: bool):
        self.trainer, self.every, self.revives, self.begun = trainer, every, revives, begun
        self.codebook = model.quantize.embedding.weight
        self.used = torch.zeros(len(self.codebook), dtype=torch.bool, device=trainer.accelerator.device)
        # Of the last period: share of the codes that were in use, and number of those that were revived at its end.
        self.share, self.revived = 0.0, 0.0
        self._next = (0.0, 0.0)
        self.latents: list[torch.Tensor] = []  # of the passes of a step that ends with a revival

    def state_dict(self) -> dict[str, torch.Tensor]:
        used = self.trainer.accelerator.reduce(self.used.float(), "sum") > 0
        return {"used": used, "reported": torch.tensor([self.share, self.revived, *self._next])}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.used.copy_(state["used"])
        self.share, self.revived, *following = state["reported"].tolist()
        self._next = tuple(following)

    @torch.no_grad()
    def note(self, indices: torch.Tensor, latents: torch.Tensor) -> None:
        """Take down the codes of a pass. A period ends with every step whose number is a multiple of `every`; with the first step, 0, only
        where the codebook begins."""
        self.share, self.revived = self._next  # the same in all passes of a step
        self.used[indices] = True
        step = self.trainer.progress.step
        if step % self.every or step == 0 and self.begun:
            return
        self.latents.append(rearrange(latents.detach().float(), "b c h w -> (b h w) c"))
        if self.trainer.sync_gradients:
            alive = self.trainer.accelerator.reduce(self.used.float(), "sum") > 0
            if self.revives:
                self._revive(alive)
            self._next = (alive.float().mean().item(), float((~alive).sum()) * self.revives)
            self.used.zero_()
            self.latents = []

    def _revive(self, alive: torch.Tensor) -> None:
        """Move the codes that are not alive to latents of this step."""
        accelerator = self.trainer.accelerator
        latents = accelerator.gather(torch.stack(self.latents))  # [processes * passes, n, c]
        # In the order that the passes of one process would have.
        latents = rearrange(latents, "(w p) n c -> (p w n) c", w=accelerator.num_processes)
        generator = torch.Generator().manual_seed(self.trainer.progress.step)  # every process draws the same
        index = torch.randint(len(latents), (int((~alive).sum()),), generator=generator)
        jitter = torch.randn(len(index), latents.shape[1], generator=generator).to(latents.device)
        self.codebook[~alive] = latents[index.to(latents.device)] + 0.1 * latents.std() * jitter
        self.trainer.reset_average(self.codebook, ~alive)
