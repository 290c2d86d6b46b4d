"""Stage 2: train the motion-aware autoencoder (VQ-MAGAN).

    accelerate launch -m training.train_vq_magan --config compact --data CLIPS --i2e runs/i2e/i2e --output runs/vqvae

Loss: L1 + LPIPS + vector quantisation + λ · hinge patch-GAN, λ balanced at the last layer (Esser et al., 2021). Motion
hints come from the true middle frame and are given with a probability of `hint_probability`; otherwise the decoder gets
start hints, as the first sampling step does. Of the hints given, a share of `guess_share` comes from a guess that the
network itself decoded, as in MA-Sampling. The model is written to OUTPUT/vqvae at the end, its `scaling_factor`
measured. To resume, run the same command again.
"""

import dataclasses
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from einops import rearrange

from madiff_diffusers.eventgan import EventGANModel
from madiff_diffusers.metrics import build_lpips
from madiff_diffusers.motion_hints import FlowHints, HintSource, build_hint_source
from madiff_diffusers.vq_magan import VQMAGANModel
from training.data import TripletSamples, read_clips
from training.losses import PatchDiscriminator, adaptive_weight, discriminator_hinge_loss
from training.run import Run, RunOptions, parse_options


@dataclasses.dataclass
class VQMAGANOptions(RunOptions):
    i2e: str = ""  # folder of the trained EventGANModel; not needed where hints are flow alone
    init: str = ""  # folder of a trained VQMAGANModel to start from
    adam_betas: Tuple[float, ...] = (0.5, 0.9)
    weight_decay: float = 0.0
    l1_epsilon: float = 0.0  # softens the L1 around zero: sqrt(d² + ε²), the Charbonnier loss
    lpips_net: str = "vgg"
    lpips_backbone: str = ""  # safetensors file with the backbone's weights; downloaded by torchvision if empty
    lpips_weight: float = 1.0
    lpips_start: int = 0  # step
    vq_weight: float = 1.0
    anchor_weight: float = 0.0  # of the latents' squared distance to the mean colours of their cells, see anchor_loss
    revive_every: int = 0  # steps after which codes that nothing used are moved to latents of the batch; 0: never
    disc_start: int = 10000  # step
    disc_weight: float = 0.8
    disc_channels: int = 64
    hint_probability: float = 0.5
    guess_share: float = 0.0
    latent_noise: float = 0.0  # noise on the latents, uniform up to this many of their standard deviations per sample
    flow_weight: float = 0.0  # supervision of the offsets by flow from the true middle frame, at the start …
    flow_weight_end: float = 0.0  # … and at the end, linear in between


def draw_hints(
    model: VQMAGANModel,
    source: HintSource,
    batch: Dict[str, torch.Tensor],
    probability: float,
    guess_share: float,
    generator: torch.Generator,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Motion hints for each sample of a batch: with `probability` refined ones, of which a share of `guess_share` comes
    from a decoded guess and the rest from the true middle frame; start hints otherwise."""
    prev, mid, next_ = batch["frame_prev"], batch["frame_mid"], batch["frame_next"]
    hints_prev, hints_next = source.start(prev, next_)
    # Counts are drawn rather than each sample's fate, so that a batch comes in two sizes at most: for convolutions,
    # every new size is a new kernel to be made.
    order = torch.randperm(len(mid), generator=generator).to(mid.device)
    guessed, true = (
        int(len(mid) * share + torch.rand((), generator=generator).item())
        for share in (probability * guess_share, probability * (1 - guess_share))
    )
    chosen = order[:guessed]
    if len(chosen):
        # A guess is what the decoder makes of latents of any quality with start hints, as in the first sampling steps.
        noise = latent_noise(model, mid[chosen], 1.0, generator)
        guess = model(
            mid[chosen], prev[chosen], next_[chosen], hints_prev[chosen], hints_next[chosen], latent_noise=noise
        ).sample.clamp(-1, 1)
        hints_prev[chosen], hints_next[chosen] = source.from_guess(prev[chosen], guess, next_[chosen])
    chosen = order[guessed : guessed + true]
    if len(chosen):
        hints_prev[chosen], hints_next[chosen] = source.from_guess(prev[chosen], mid[chosen], next_[chosen])
    return hints_prev, hints_next


def latent_noise(
    model: VQMAGANModel, frames: torch.Tensor, level: float, generator: torch.Generator
) -> torch.Tensor:
    """Gaussian noise in the shape of the frames' latents; each sample's strength is uniform in [0, level]."""
    batch, _, height, width = frames.shape
    f = model.downsample_factor
    noise = torch.randn(batch, model.quantize.vq_embed_dim, height // f, width // f, generator=generator)
    return (noise * level * torch.rand(batch, 1, 1, 1, generator=generator)).to(frames.device)


def softened_l1(sample: torch.Tensor, truth: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Mean of √(d² + ε²), the Charbonnier loss; plain L1 for ε = 0, where the root would have no gradient at d = 0."""
    if epsilon == 0:
        return F.l1_loss(sample, truth)
    return ((sample - truth) ** 2 + epsilon**2).sqrt().mean()


def anchor_loss(latents: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Squared distance of latents `(B, 3, h, w)` to the mean colours of the cells that they stand for.

    A decoder that can copy from its neighbours hardly needs latents, and nothing else then keeps them from shrinking to
    one constant, which a denoiser cannot learn from.
    """
    return F.mse_loss(latents, F.avg_pool2d(frames, frames.shape[-1] // latents.shape[-1]))


def offset_loss(
    model: VQMAGANModel, offsets: Tuple[torch.Tensor, ...], flow: Tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Distance of the offsets at every scale to flow from the true middle frame, in pixels of that scale."""
    truth = torch.cat(flow, dim=1)  # [B,4,H,W]
    height = truth.shape[-2]
    losses = []
    for estimate in offsets:
        ratio = height // estimate.shape[-2]
        losses.append(((F.avg_pool2d(truth, ratio) / ratio - estimate) ** 2 + 1e-4).sqrt().mean())
    return torch.stack(losses).mean()


class CodeUsage:
    """Which codes of the codebook were used since unused ones were last revived; saved with every checkpoint."""

    def __init__(self, count: int, device: torch.device):
        self.used = torch.zeros(count, dtype=torch.bool, device=device)
        self.share = 0.0  # of the codes, in use over the whole of the last period

    def state_dict(self) -> Dict[str, torch.Tensor]:
        return {"used": self.used, "share": torch.tensor(self.share)}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        self.used.copy_(state["used"])
        self.share = state["share"].item()

    @torch.no_grad()
    def revive(self, run: Run, model: VQMAGANModel, frames: torch.Tensor) -> None:
        """Move the codes that no process used to latents of the current batches, and start to count anew."""
        alive = run.accelerator.reduce(self.used.float(), "sum") > 0
        latents = rearrange(run.accelerator.gather(model.encode(frames).latents), "b c h w -> (b h w) c")
        # Every process draws the same codes.
        generator = torch.Generator().manual_seed(run.progress.step)
        index = torch.randint(len(latents), (int((~alive).sum()),), generator=generator)
        jitter = torch.randn(len(index), latents.shape[1], generator=generator).to(latents.device)
        model.quantize.embedding.weight[~alive] = latents[index.to(latents.device)] + 0.1 * latents.std() * jitter
        self.used.zero_()
        self.share = alive.float().mean().item()


@torch.no_grad()
def measure_scaling_factor(model: VQMAGANModel, data: TripletSamples, device: torch.device, count: int = 256) -> float:
    """1 / standard deviation of the latents over training samples (Rombach et al., 2022, appendix G)."""
    latents = [model.encode(data[i]["frame_mid"][None].to(device)).latents for i in range(min(count, len(data)))]
    return 1 / torch.cat(latents).float().std().item()


def main(argv: Optional[List[str]] = None) -> None:
    options, config = parse_options(VQMAGANOptions, "train_vq_magan", argv, __doc__)
    run = Run(options)
    accelerator = run.accelerator

    # 1. models
    model = VQMAGANModel.from_pretrained(options.init) if options.init else VQMAGANModel(**config["vqvae"])
    model = model.train().to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator(model.config.out_channels, options.disc_channels)
    i2e = None
    if "events" in config["hint_source"]:
        i2e = EventGANModel.from_pretrained(options.i2e).to(accelerator.device, memory_format=torch.channels_last)
        i2e = i2e.requires_grad_(False).eval()
    source = build_hint_source(config["hint_source"], i2e)
    flow_source = FlowHints()
    lpips = None
    if options.lpips_weight > 0:
        lpips = build_lpips(options.lpips_net, options.lpips_backbone or None).to(accelerator.device)

    # 2. data
    data = TripletSamples(
        read_clips(options.data),
        crop=options.crop,
        gaps=options.gaps,
        candidates=options.candidates,
        length=options.steps * run.samples_per_step,
        seed=options.seed,
    )

    # 3. optimisers
    optimizer, disc_optimizer = (
        torch.optim.AdamW(
            module.parameters(),
            lr=options.learning_rate,
            betas=options.adam_betas,
            weight_decay=options.weight_decay,
        )
        for module in (model, discriminator)
    )
    schedules = [
        get_scheduler(
            options.lr_schedule, each, num_warmup_steps=options.warmup_steps, num_training_steps=options.steps
        )
        for each in (optimizer, disc_optimizer)
    ]
    model, discriminator, optimizer, disc_optimizer = accelerator.prepare(
        model, discriminator, optimizer, disc_optimizer
    )
    bare_model = accelerator.unwrap_model(model)
    codes = CodeUsage(bare_model.quantize.n_e, accelerator.device)
    accelerator.register_for_checkpointing(*schedules, codes)
    run.resume()
    revived_at = -1

    # 4. loop
    for batch in run.loader(data):
        step = run.progress.step
        generator = run.generator()
        # Networks run fastest where frames and hints come in the layout of their weights.
        batch = {name: frame.contiguous(memory_format=torch.channels_last) for name, frame in batch.items()}
        truth = batch["frame_mid"]
        if options.revive_every and step % options.revive_every == 0 and step != revived_at:
            revived_at = step
            codes.revive(run, bare_model, truth)
        with torch.no_grad():
            hints_prev, hints_next = draw_hints(
                bare_model, source, batch, options.hint_probability, options.guess_share, generator
            )
            hints_prev, hints_next = (
                hints.contiguous(memory_format=torch.channels_last) for hints in (hints_prev, hints_next)
            )
            noise = latent_noise(bare_model, truth, options.latent_noise, generator)

        with accelerator.accumulate(model, discriminator):
            # 4.1 autoencoder
            decoded = model(truth, batch["frame_prev"], batch["frame_next"], hints_prev, hints_next, noise)
            l1 = softened_l1(decoded.sample, truth, options.l1_epsilon)
            perceptual = torch.zeros_like(l1)
            if lpips is not None and step >= options.lpips_start:
                perceptual = lpips(decoded.sample, truth).mean()
            reconstruction = l1 + options.lpips_weight * perceptual
            vq = decoded.commit_loss.mean()
            flow = torch.zeros_like(l1)
            progress = step / options.steps
            flow_weight = (1 - progress) * options.flow_weight + progress * options.flow_weight_end
            if flow_weight > 0:
                flow = offset_loss(
                    bare_model,
                    decoded.offsets,
                    flow_source.from_guess(batch["frame_prev"], truth, batch["frame_next"]),
                )
            anchor = torch.zeros_like(l1)
            if options.anchor_weight > 0:
                anchor = anchor_loss(decoded.latents, truth)
            loss = reconstruction + options.vq_weight * vq + options.anchor_weight * anchor + flow_weight * flow
            adversarial = step >= options.disc_start and options.disc_weight > 0
            gan = torch.zeros_like(l1)
            if adversarial:
                discriminator.requires_grad_(False)
                gan = -discriminator(decoded.sample).mean()
                discriminator.requires_grad_(True)
                weight = adaptive_weight(reconstruction, gan, bare_model.last_layer)
                loss = loss + options.disc_weight * weight * gan
            accelerator.backward(loss)
            run.clip_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            codes.used[decoded.code_indices] = True

            # 4.2 discriminator
            disc_loss = torch.zeros_like(l1)
            if adversarial:
                disc_loss = discriminator_hinge_loss(discriminator(truth), discriminator(decoded.sample.detach()))
                accelerator.backward(disc_loss)
                disc_optimizer.step()
                disc_optimizer.zero_grad()

        # 4.3 count, log, save
        if accelerator.sync_gradients:
            schedules[0].step()
            if adversarial:
                schedules[1].step()
            run.progress.step += 1
            run.log(
                {
                    "l1": l1,
                    "lpips": perceptual,
                    "vq": vq,
                    "anchor": anchor,
                    "flow": flow,
                    "gan": gan,
                    "disc": disc_loss,
                    "codes_in_use": codes.share,
                }
            )
            if run.progress.step % options.save_every == 0 or run.progress.step == options.steps:
                run.save()

    # 5. the trained model, its latents' scale measured
    if accelerator.is_main_process:
        bare_model.eval()
        bare_model.register_to_config(scaling_factor=measure_scaling_factor(bare_model, data, accelerator.device))
        bare_model.save_pretrained(run.folder / "vqvae")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
