"""Stage 1: train the image-to-event generator on events simulated from video clips.

    accelerate launch -m training.train_i2e --config compact --data CLIPS --output runs/i2e

The model is written to OUTPUT/i2e at the end. To resume, run the same command again.
"""

import dataclasses
from typing import List, Optional

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations

from madiff_diffusers.eventgan import EventGANModel
from training.data import EventSamples, read_clips
from training.losses import PatchDiscriminator, discriminator_hinge_loss
from training.run import Run, RunOptions, parse_options


@dataclasses.dataclass
class I2EOptions(RunOptions):
    init: str = ""  # folder of a trained EventGANModel to start from
    frames: int = 4  # frames of a clip that events are simulated from, at most; a pair is 1 to frames - 1 apart
    upsampling: int = 4  # frames made per source frame before events are simulated
    moved_still_share: float = 0.0  # share of samples that are one frame moved along an exactly known path
    spectral_norm: bool = True  # as EventGAN: on the residual blocks and decoders, folded into the weights at the end
    squared_weight: float = 1.0  # of the squared error at the start; falls linearly to 0 at squared_until of the steps
    squared_until: float = 0.7
    adversarial_weight: float = 0.01
    disc_start: int = 0  # step at which the discriminator starts
    disc_channels: int = 32


def volume_loss(events: torch.Tensor, truth: torch.Tensor, squared_weight: float) -> torch.Tensor:
    """L1 on the volume plus `squared_weight` times the squared error.

    Events are sparse and an L1 is least at the median, so that on its own, predicting no event anywhere is a minimum
    that a network hardly leaves. A squared error is least at the mean, and teaches where events are to be expected.
    """
    return F.l1_loss(events, truth) + squared_weight * F.mse_loss(events, truth)


def main(argv: Optional[List[str]] = None) -> None:
    options, config = parse_options(I2EOptions, "train_i2e", argv, __doc__)
    run = Run(options)
    accelerator = run.accelerator

    # 1. models
    model = EventGANModel.from_pretrained(options.init) if options.init else EventGANModel(**config["i2e"])
    model = model.train().to(memory_format=torch.channels_last)
    # Conv inputs are 2 grey frames beside the volume of both polarities.
    discriminator = PatchDiscriminator(2 * model.config.num_bins + 2, options.disc_channels)
    normed = [
        module
        for block in (*model.mid_blocks, *model.up_blocks)
        for module in block.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    if options.spectral_norm:
        for module in normed:
            spectral_norm(module)

    # 2. data
    data = EventSamples(
        read_clips(options.data),
        num_bins=model.config.num_bins,
        frames=options.frames,
        upsampling=options.upsampling,
        moved_still_share=options.moved_still_share,
        crop=options.crop,
        gaps=options.gaps,
        candidates=options.candidates,
        length=options.steps * run.samples_per_step,
        seed=options.seed,
    )

    # 3. optimisers
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.5, 0.999))
    disc_optimizer = torch.optim.Adam(discriminator.parameters(), lr=options.learning_rate, betas=(0.5, 0.999))
    schedules = [
        get_scheduler(
            options.lr_schedule,
            each,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=options.steps,
        )
        for each in (optimizer, disc_optimizer)
    ]
    model, discriminator, optimizer, disc_optimizer = accelerator.prepare(
        model, discriminator, optimizer, disc_optimizer
    )
    accelerator.register_for_checkpointing(*schedules)
    run.resume()

    # 4. loop
    for batch in run.loader(data):
        adversarial = run.progress.step >= options.disc_start and options.adversarial_weight > 0
        frames = torch.cat([batch["frame_first"], batch["frame_second"]], dim=1)  # [B,2,H,W]
        truth = batch["events"]  # [B,18,H,W]
        with accelerator.accumulate(model, discriminator):
            # 4.1 generator
            events = model(batch["frame_first"], batch["frame_second"]).events
            l1 = F.l1_loss(events, truth)
            squared_weight = options.squared_weight * max(1 - run.progress.step / options.steps / options.squared_until, 0)
            loss, gan = volume_loss(events, truth, squared_weight), torch.zeros_like(l1)
            if adversarial:
                discriminator.requires_grad_(False)
                gan = -discriminator(torch.cat([frames, events], dim=1)).mean()
                discriminator.requires_grad_(True)
                loss = loss + options.adversarial_weight * gan
            accelerator.backward(loss)
            run.clip_gradients(model)
            optimizer.step()
            optimizer.zero_grad()

            # 4.2 discriminator
            disc_loss = torch.zeros_like(l1)
            if adversarial:
                disc_loss = discriminator_hinge_loss(
                    discriminator(torch.cat([frames, truth], dim=1)),
                    discriminator(torch.cat([frames, events.detach()], dim=1)),
                )
                accelerator.backward(disc_loss)
                disc_optimizer.step()
                disc_optimizer.zero_grad()

        # 4.3 count, log, save
        if accelerator.sync_gradients:
            schedules[0].step()
            if adversarial:
                schedules[1].step()
            run.progress.step += 1
            run.log({"l1": l1, "l1_of_zeros": truth.abs().mean(), "mse": F.mse_loss(events, truth), "mse_of_zeros": truth.square().mean(), "gan": gan, "disc": disc_loss})
            if run.progress.step % options.save_every == 0 or run.progress.step == options.steps:
                run.save()

    # 5. the trained model, spectral norm folded into its weights
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        if options.spectral_norm:
            for module in normed:
                remove_parametrizations(module, "weight")
        model.eval().save_pretrained(run.folder / "i2e")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
