"""Stage 3: train the denoiser on the latents of a trained VQ-MAGAN.

    accelerate launch -m training.train_denoiser --config compact --data CLIPS --i2e runs/i2e/i2e \\
        --vqvae runs/vqvae/vqvae --output_dir runs/denoiser

Loss: ‖target − ε_θ(z_t, t, z_prev, z_next, m_prev, m_next)‖², the target being what the scheduler's `prediction_type`
says. Motion hints come from the true middle frame and are dropped for start hints with a probability of
`hint_dropout`; a share of `guess_share` of those given comes from a decoded guess instead, as in MA-Sampling. The EMA of
the weights is written to OUTPUT/unet at the end, and the whole pipeline to OUTPUT/pipeline. To resume, run the same
command again.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from madiff_diffusers.components import share_weights
from madiff_diffusers.pipeline_madiff import MADiffPipeline
from madiff_diffusers.vq_magan import VQMAGANModel
from training.data.datasets import build_dataset
from training.data.transforms import TripletTransform
from training.hints import draw_hints, load_hint_source, refine_as_sampling
from training.losses import lpips_loss
from training.options import (
    RunOptions,
    as_configured,
    check_resolution,
    one_line_errors,
    option,
    parse_options,
    refuse_news,
    training_scheduler,
)
from training.trainer import Trainer
from training.validation import decoded_panel, image_scores, to_frames, validation_windows


@dataclasses.dataclass
class DenoiserOptions(RunOptions):
    i2e: str = option("", "folder of the trained EventGANModel; not needed where hints are flow alone")
    vqvae: str = option("", "folder of the trained VQMAGANModel")
    hint_source: str = option(
        "", "where motion hints come from, such as MODULE:CLASS, see docs/hint-sources.md; empty: the configuration's"
    )
    init: str = option("", "folder of a trained UNet2DModel to start from")
    adam_betas: tuple[float, ...] = option((0.9, 0.999), "betas of AdamW", least=0, less_than=1, count=2)
    adam_weight_decay: float = option(0.01, "weight decay of AdamW", least=0)
    ema_decay: float = option(
        0.9999, "decay of the moving average of the weights, which is exported; 0: no average", least=0, less_than=1
    )
    lpips_net: str = option(
        "alex",
        "features of LPIPS in validations, which are the field's score; none: no LPIPS",
        choices=("alex", "vgg", "none"),
    )
    hint_dropout: float = option(0.5, "share of samples with start hints instead of refined ones", least=0, most=1)
    guess_share: float = option(
        0.0, "share of the refined hints that comes from a guess and not from the true middle frame", least=0, most=1
    )
    guess_rounds: int = option(1, "such a guess is refined up to this many times", least=1)
    absent_share: float = option(0.0, "share of the start hints that zeros take the place of", least=0, most=1)


def load_unet(folder: str) -> UNet2DModel:
    """
    Raises:
        ValueError: if the folder lacks weights of its network.
    """
    unet, info = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"`init` {folder!r} does not hold the weights of a UNet2DModel: it lacks {sorted(info['missing_keys'])[0]}."
        )
    return unet


def main(argv: list[str] | None = None) -> None:
    options, config = parse_options(DenoiserOptions, "train_denoiser", argv, __doc__)
    trainer = Trainer(options, "unet")
    device = trainer.accelerator.device

    # 1. models; only the U-Net is trained
    if not options.vqvae:
        raise ValueError("`vqvae` is needed: the folder of a trained VQMAGANModel.")
    refuse_news(config)
    bare_unet = UNet2DModel(**config["unet"])
    if options.init:
        bare_unet = as_configured(load_unet(options.init), bare_unet)
    vqvae = VQMAGANModel.from_pretrained(options.vqvae).to(device).requires_grad_(False).eval()
    check_resolution(options, vqvae.downsample_factor * 2 ** (len(bare_unet.config.block_out_channels) - 1))
    source, i2e = load_hint_source(config, options.i2e, device)
    scheduler = training_scheduler(config)
    optimizer = torch.optim.AdamW(
        bare_unet.parameters(),
        lr=options.learning_rate,
        betas=options.adam_betas,
        weight_decay=options.adam_weight_decay,
    )

    def build_pipeline(network: UNet2DModel) -> MADiffPipeline:
        parts = {"vqvae": vqvae, "unet": network, "i2e": i2e, "scheduler": scheduler}
        return MADiffPipeline(**parts, hint_source=config["hint_source"], **config["pipeline"])

    pipeline = build_pipeline(bare_unet)  # what does not fit together shows before training, not after it
    unet, optimizer = trainer.prepare(bare_unet.train(), optimizer)

    # 2. data, validation, export
    data = build_dataset(options, TripletTransform(options.window, options.any_time))

    def export(folder: Path) -> None:
        state = trainer.weights()
        if trainer.accelerator.is_main_process:
            exported = UNet2DModel.from_config(bare_unet.config).eval()
            exported.load_state_dict(state)
            exported.save_pretrained(folder)
            share_weights(folder)

    trainer.set_export(export)
    if options.validation:
        windows = validation_windows(options, frames=3, multiple=vqvae.downsample_factor)
        lpips = lpips_loss(options, device)
        pipeline.set_progress_bar_config(disable=True)

        def score(index: int, shown: bool) -> tuple[dict[str, float], np.ndarray | None]:
            prev, mid, next_ = frames = to_frames(windows[index], device)
            bare_unet.eval()
            generator = torch.Generator().manual_seed(index)
            made = pipeline((prev + 1) / 2, (next_ + 1) / 2, generator=generator, output_type="pt").frames
            bare_unet.train()
            result = made.reshape(mid.shape).to(device) * 2 - 1
            scores = image_scores(result, mid, lpips)
            if not shown:
                return scores, None
            hints, decoded = refine_as_sampling(vqvae, source, prev, mid, next_)
            seen = (hints, config["hint_source"], source, decoded.offsets[-1], decoded.gates[-1])
            return scores, decoded_panel(frames, result, *seen)

        trainer.set_validation(score, len(windows), "l1" if lpips is None else "lpips")
    trainer.resume()

    # 3. loop
    damped = config["pipeline"].get("default_hint_policy") == "damped"
    for batch in trainer.batches(data):
        generator = trainer.generator()
        with torch.no_grad():
            # 3.1 latents and conditions
            frames = torch.cat([batch["frame_mid"], batch["frame_prev"], batch["frame_next"]])
            latents = vqvae.encode(frames).latents  # [3B,C,h,w]
            mid, prev, next_ = (each * vqvae.config.scaling_factor for each in latents.chunk(3))
            shares = (
                1 - options.hint_dropout,
                options.guess_share,
                options.guess_rounds,
                options.absent_share,
                damped,
            )
            hints = draw_hints(vqvae, source, batch, *shares, generator)
            hints = [vqvae.resize_hints(each, mid.shape[-2:]) for each in hints]

            # 3.2 noise
            noise = torch.randn(mid.shape, generator=generator).to(mid.device)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(mid),), generator=generator)
            timesteps = timesteps.to(mid.device)
            noisy = scheduler.add_noise(mid, noise, timesteps)
            target = {
                "epsilon": lambda: noise,
                "sample": lambda: mid,
                "v_prediction": lambda: scheduler.get_velocity(mid, noise, timesteps),
            }[scheduler.config.prediction_type]()

        with trainer.accumulate(unet):
            inputs = torch.cat([noisy, prev, next_, *hints], dim=1).to(bare_unet.dtype)
            told = {"class_labels": 1000 * batch["time"]} if bare_unet.config.class_embed_type == "timestep" else {}
            prediction = unet(inputs, timesteps, return_dict=False, **told)[0]
            loss = F.mse_loss(prediction.float(), target.float())
            trainer.backward(loss)
            trainer.optimizer_step(unet, optimizer)

        # 3.3 count, log, save
        trainer.finish_micro_batch({"loss": loss})
    trainer.finish(
        lambda folder: build_pipeline(UNet2DModel.from_pretrained(folder / "unet")).save_pretrained(
            folder / "pipeline"
        )
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
