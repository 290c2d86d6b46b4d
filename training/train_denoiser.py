"""Stage 3: train the denoiser on the latents of a trained VQ-MAGAN.

    accelerate launch -m training.train_denoiser --config compact --data CLIPS --i2e runs/i2e/i2e \\
        --vqvae runs/vqvae/vqvae --output runs/denoiser

Loss: ‖target − ε_θ(z_t, t, z_prev, z_next, m_prev, m_next)‖², the target being what the scheduler's `prediction_type`
says. Motion hints come from the true middle frame and are dropped for start hints with a probability of
`hint_dropout`; a share of `guess_share` of those given comes from a decoded guess instead, as in MA-Sampling. The EMA of
the weights is written to OUTPUT/unet at the end, and the whole pipeline to OUTPUT/pipeline. To resume, run the same
command again.
"""

import dataclasses
from typing import List, Optional, Tuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from madiff_diffusers.eventgan import EventGANModel
from madiff_diffusers.motion_hints import build_hint_source
from madiff_diffusers.pipeline_madiff import MADiffPipeline
from madiff_diffusers.vq_magan import VQMAGANModel
from training.data import TripletSamples, read_clips
from training.run import Run, RunOptions, parse_options
from training.train_vq_magan import draw_hints


@dataclasses.dataclass
class DenoiserOptions(RunOptions):
    i2e: str = ""  # folder of the trained EventGANModel; not needed where hints are flow alone
    vqvae: str = ""  # folder of the trained VQMAGANModel
    init: str = ""  # folder of a trained UNet2DModel to start from
    adam_betas: Tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    ema_decay: float = 0.9999
    hint_dropout: float = 0.5
    guess_share: float = 0.0


def main(argv: Optional[List[str]] = None) -> None:
    options, config = parse_options(DenoiserOptions, "train_denoiser", argv, __doc__)
    run = Run(options)
    accelerator = run.accelerator

    # 1. models; only the U-Net is trained
    unet = UNet2DModel.from_pretrained(options.init) if options.init else UNet2DModel(**config["unet"])
    unet.train()
    vqvae = VQMAGANModel.from_pretrained(options.vqvae).to(accelerator.device).requires_grad_(False).eval()
    i2e = None
    if "events" in config["hint_source"]:
        i2e = EventGANModel.from_pretrained(options.i2e).to(accelerator.device).requires_grad_(False).eval()
    source = build_hint_source(config["hint_source"], i2e)
    scheduler_config = dict(config["scheduler"])
    scheduler = getattr(diffusers, scheduler_config.pop("class"))(**scheduler_config)
    ema = EMAModel(unet.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75)

    # 2. data
    data = TripletSamples(
        read_clips(options.data),
        crop=options.crop,
        gaps=options.gaps,
        candidates=options.candidates,
        length=options.steps * run.samples_per_step,
        seed=options.seed,
    )

    # 3. optimiser
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=options.learning_rate, betas=options.adam_betas, weight_decay=options.weight_decay
    )
    schedule = get_scheduler(
        options.lr_schedule, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=options.steps
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(schedule, ema)
    run.resume()
    ema.to(accelerator.device)  # checkpoints are loaded to the CPU

    # 4. loop
    for batch in run.loader(data):
        generator = run.generator()
        with torch.no_grad():
            # 4.1 latents and conditions
            frames = torch.cat([batch["frame_mid"], batch["frame_prev"], batch["frame_next"]])
            latents = vqvae.encode(frames).latents  # [3B,C,h,w]
            mid, prev, next_ = latents.chunk(3)
            mid, prev, next_ = (each * vqvae.config.scaling_factor for each in (mid, prev, next_))
            hints = draw_hints(vqvae, source, batch, 1 - options.hint_dropout, options.guess_share, generator)
            hints = [vqvae.resize_hints(each, mid.shape[-2:]) for each in hints]

            # 4.2 noise
            noise = torch.randn(mid.shape, generator=generator).to(mid.device)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(mid),), generator=generator)
            timesteps = timesteps.to(mid.device)
            noisy = scheduler.add_noise(mid, noise, timesteps)
            target = {
                "epsilon": lambda: noise,
                "sample": lambda: mid,
                "v_prediction": lambda: scheduler.get_velocity(mid, noise, timesteps),
            }[scheduler.config.prediction_type]()

        with accelerator.accumulate(unet):
            prediction = unet(torch.cat([noisy, prev, next_, *hints], dim=1), timesteps, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), target.float())
            accelerator.backward(loss)
            run.clip_gradients(unet)
            optimizer.step()
            optimizer.zero_grad()

        # 4.3 count, log, save
        if accelerator.sync_gradients:
            schedule.step()
            ema.step(unet.parameters())
            run.progress.step += 1
            run.log({"loss": loss})
            if run.progress.step % options.save_every == 0 or run.progress.step == options.steps:
                run.save()

    # 5. the average of the weights, and the whole pipeline
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet)
        ema.copy_to(unet.parameters())
        unet.eval().save_pretrained(run.folder / "unet")
        pipeline = MADiffPipeline(
            vqvae=vqvae, unet=unet, scheduler=scheduler, i2e=i2e, hint_source=config["hint_source"], **config["pipeline"]
        )
        pipeline.save_pretrained(run.folder / "pipeline")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
