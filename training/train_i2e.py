"""Stage 1: train the image-to-event generator on events simulated from video clips.

    accelerate launch -m training.train_i2e --config compact --data CLIPS --output_dir runs/i2e

The model is written to OUTPUT/i2e at the end. To resume, run the same command again.
"""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from madiff_diffusers.evaluation.visualization import events_image
from madiff_diffusers.eventgan import EventGANModel
from training.adversary import Adversary
from training.data.datasets import build_dataset
from training.data.transforms import EventTransform
from training.normalisation import StepwiseNormalisation
from training.options import RunOptions, as_configured, check_unused, one_line_errors, option, parse_options
from training.trainer import Trainer
from training.validation import panel, validation_windows


@dataclasses.dataclass
class I2EOptions(RunOptions):
    init: str = option("", "folder of a trained EventGANModel to start from")
    frames: int = option(
        4, "frames of a clip that events are simulated from, at most; a pair is 1 to frames - 1 apart", least=2
    )
    spectral_norm: bool = option(
        True, "spectral norm on residual blocks and decoders, as in EventGAN; it is folded into the exported weights"
    )
    squared_weight: float = option(
        1.0, "weight of the squared error at the start; it falls linearly to 0 at squared_until", least=0
    )
    squared_until: float = option(0.7, "share of the steps after which the squared error is gone", more_than=0, most=1)
    adversarial_weight: float = option(0.01, "weight of the adversarial loss; 0: none", least=0)
    disc_start: int = option(0, "step at which the discriminator starts", least=0)
    disc_channels: int = option(32, "channels of the discriminator's first layer", least=1)


def volume_loss(events: torch.Tensor, truth: torch.Tensor, squared_weight: float) -> torch.Tensor:
    """L1 on the volume plus `squared_weight` times the squared error.

    Events are sparse and an L1 is least at the median, so that on its own, predicting no event anywhere is a minimum
    that a network hardly leaves. A squared error is least at the mean, and teaches where events are to be expected.
    """
    return F.l1_loss(events, truth) + squared_weight * F.mse_loss(events, truth)


def main(argv: list[str] | None = None) -> None:
    options, config = parse_options(I2EOptions, "train_i2e", argv, __doc__)
    if options.ema_decay:
        raise ValueError(
            f"`ema_decay` must be 0 here, but is {options.ema_decay}: BatchNorm's statistics are not those of averaged weights."
        )
    check_unused(options, ("window", "any_time", "lpips_net", "lpips_backbone"), "by this stage")
    trainer = Trainer(options, "i2e")
    device = trainer.accelerator.device

    # 1. models
    def build() -> tuple[EventGANModel, StepwiseNormalisation]:
        model = EventGANModel(**config["i2e"])
        if options.init:
            model = as_configured(EventGANModel.from_pretrained(options.init), model)
        return model, StepwiseNormalisation(model, options.spectral_norm)

    bare_model, normalisation = build()
    optimizer = torch.optim.Adam(bare_model.parameters(), lr=options.learning_rate, betas=(0.5, 0.999))
    model, optimizer = trainer.prepare(bare_model.train(), optimizer)
    adversary = None
    if options.adversarial_weight > 0:
        # It judges the volume of both polarities beside the two grey frames.
        channels = 2 * bare_model.config.num_bins + 2
        adversary = Adversary(trainer, channels, options.disc_channels, betas=(0.5, 0.999), start=options.disc_start)

    # 2. data, validation, export
    transform = EventTransform(num_bins=bare_model.config.num_bins, frames=options.frames)
    data = build_dataset(options, transform)

    def export(folder: Path) -> None:
        state = trainer.weights()
        if trainer.accelerator.is_main_process:
            exported, norms = build()
            exported.load_state_dict(state)
            norms.fold()
            exported.eval().save_pretrained(folder)

    trainer.set_export(export)
    if options.validation:
        windows = validation_windows(options, frames=2, multiple=2**bare_model.config.num_encoders)

        def score(index: int, shown: bool) -> tuple[dict[str, float], np.ndarray | None]:
            sample = transform(windows[index], np.random.default_rng(index))
            frames = [sample[name][None].to(device) for name in ("frame_first", "frame_second")]
            bare_model.eval()
            events = bare_model(*frames).events[0].cpu()
            bare_model.train()
            truth = sample["events"]
            scores = {"l1": (events - truth).abs().mean().item(), "l1_of_zeros": truth.abs().mean().item()}
            if not shown:
                return scores, None
            grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in windows[index]]
            frames = [cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB) for frame in grey]
            pictures = (*frames, events_image(truth), events_image(events))
            return scores, panel(list(zip(("first", "second", "truth", "result"), pictures)))

        trainer.set_validation(score, len(windows), "l1")
    trainer.resume()

    # 3. loop
    for batch in trainer.batches(data):
        frames = torch.cat([batch["frame_first"], batch["frame_second"]], dim=1)  # [B,2,H,W]
        truth = batch["events"]  # [B,18,H,W]
        adversarial = adversary is not None and adversary.active
        with trainer.accumulate(model, *([adversary.network] if adversary else [])):
            # 3.1 generator
            normalisation.begin_pass(first=len(trainer.micro_batches) == 1)
            events = model(batch["frame_first"], batch["frame_second"]).events
            progress = trainer.progress.step / options.max_train_steps
            squared_weight = options.squared_weight * max(1 - progress / options.squared_until, 0)
            loss, gan = volume_loss(events, truth, squared_weight), torch.zeros((), device=device)
            if adversarial:
                gan = adversary.loss(torch.cat([frames, events], dim=1))
                loss = loss + options.adversarial_weight * gan
            trainer.backward(loss)
            normalisation.end_pass(trainer)
            trainer.optimizer_step(model, optimizer)

            # 3.2 discriminator
            disc_loss = torch.zeros_like(gan)
            if adversarial:
                disc_loss = adversary.update(torch.cat([frames, truth], dim=1), torch.cat([frames, events], dim=1))

        # 3.3 count, log, save
        trainer.finish_micro_batch(
            {
                "l1": F.l1_loss(events, truth),
                "l1_of_zeros": truth.abs().mean(),
                "mse": F.mse_loss(events, truth),
                "mse_of_zeros": truth.square().mean(),
                "gan": gan,
                "disc": disc_loss,
            }
        )
    trainer.finish()


if __name__ == "__main__":
    with one_line_errors():
        main()
