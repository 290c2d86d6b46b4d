"""Stage 2: train the motion-aware autoencoder (VQ-MAGAN).

    accelerate launch -m training.train_vq_magan --config compact --data CLIPS --i2e runs/i2e/i2e --output_dir runs/vqvae

Loss: L1 + LPIPS + vector quantization + λ · hinge patch-GAN, λ balanced at the last layer (Esser et al., 2021). Motion
hints come from the true middle frame and are given with a probability of `hint_probability`; otherwise the decoder gets
start hints, as the first sampling step does. Of the hints given, a share of `guess_share` comes from a guess that the
network itself decoded, as in MA-Sampling. The model is written to OUTPUT/vqvae at the end, its `scaling_factor`
measured. To resume, run the same command again.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, IterableDataset

from madiff_diffusers.hint_registry import hint_parts
from madiff_diffusers.motion_hints import FlowHints
from madiff_diffusers.vq_magan import ComparingConv2d, VQMAGANModel
from training.adversary import Adversary
from training.codes import CodeUsage
from training.data.datasets import build_dataset
from training.data.transforms import TripletTransform
from training.hints import draw_hints, latent_noise, load_hint_source, refine_as_sampling
from training.losses import adaptive_weight, lpips_loss
from training.options import (
    RunOptions,
    check_resolution,
    one_line_errors,
    option,
    parse_options,
    refuse_news,
)
from training.trainer import Trainer
from training.validation import decoded_panel, image_scores, to_frames, validation_windows


@dataclasses.dataclass
class VQMAGANOptions(RunOptions):
    i2e: str = option("", "folder of the trained EventGANModel; not needed where hints are flow alone")
    hint_source: str = option(
        "", "where motion hints come from, such as MODULE:CLASS, see docs/hint-sources.md; empty: the configuration's"
    )
    init: str = option(
        "",
        "folder of a trained VQMAGANModel to start from; where the configuration's takes in more channels, they begin at 0",
    )
    adam_betas: tuple[float, ...] = option((0.5, 0.9), "betas of AdamW", least=0, less_than=1, count=2)
    adam_weight_decay: float = option(0.0, "weight decay of AdamW", least=0)
    l1_epsilon: float = option(0.0, "softens the L1 around zero: sqrt(d² + ε²), the Charbonnier loss", least=0)
    lpips_weight: float = option(1.0, "weight of LPIPS; 0: none", least=0)
    lpips_start: int = option(0, "step at which LPIPS starts", least=0)
    vq_weight: float = option(1.0, "weight of the quantization loss (codebook + 0.25 · commitment)", least=0)
    anchor_weight: float = option(
        0.0, "weight of the latents' squared distance to the mean colours of their cells", least=0
    )
    revive_every: int = option(
        0, "steps after which codes that nothing used are moved to latents of the batch; 0: never", least=0
    )
    begin_codes: bool = option(
        False, "whether the first step moves what it does not use of a codebook of `init`, too, as of a new one"
    )
    disc_start: int = option(10000, "step at which the discriminator starts", least=0)
    disc_weight: float = option(0.8, "weight of the balanced adversarial loss; 0: none", least=0)
    disc_channels: int = option(64, "channels of the discriminator's first layer", least=1)
    hint_probability: float = option(
        0.5, "share of samples with refined hints; the others get start hints", least=0, most=1
    )
    guess_share: float = option(
        0.0, "share of the refined hints that comes from a guess and not from the true middle frame", least=0, most=1
    )
    guess_rounds: int = option(1, "such a guess is refined up to this many times", least=1)
    absent_share: float = option(0.0, "share of the start hints that zeros take the place of", least=0, most=1)
    latent_noise: float = option(
        0.0, "noise on the latents, uniform up to this many of their standard deviations per sample", least=0
    )
    flow_weight: float = option(
        0.0, "weight of the offsets' distance to flow from the true middle frame, at the start …", least=0
    )
    flow_weight_end: float = option(0.0, "… and at the end, linear in between", least=0)


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


def offset_loss(offsets: tuple[torch.Tensor, ...], flow: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Distance of the offsets at every scale to flow from the true middle frame, in pixels of that scale."""
    truth = torch.cat(flow, dim=1)  # [B,4,H,W]
    height = truth.shape[-2]
    losses = []
    for estimate in offsets:
        ratio = height // estimate.shape[-2]
        losses.append(((F.avg_pool2d(truth, ratio) / ratio - estimate) ** 2 + 1e-4).sqrt().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def start_from(model: VQMAGANModel, trained: VQMAGANModel) -> None:
    """Give a model the weights of a trained one, so that both do the same; channels that its layers take in besides get zeros.

    Raises:
        ValueError: if they differ in other ways.
    """
    weights = trained.state_dict()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in shapes.items():
        given = tuple(weights[name].shape) if name in weights else None
        if (
            given is None
            or len(given) != len(shape)
            or (*given[:1], *given[2:]) != (*shape[:1], *shape[2:])
            or given[1:2] > shape[1:2]
        ):
            raise ValueError(f"`init` has {given} for {name}, where the configuration's network has {shape}.")
        if given == shape:
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        # Of hints, optical flow comes last: without it, what is more comes behind.
        is_flow = trained.config.offset_hints
        if isinstance(layer, ComparingConv2d):  # what is more of each of its parts
            parts = weights[name].split(trained.get_submodule(name.rpartition(".")[0]).sizes, dim=1)
            if any(part.shape[1] > size for part, size in zip(parts, layer.sizes)):
                raise ValueError(f"`init` has {given} for {name}, where the configuration's network has {shape}.")
            weights[name] = torch.cat(
                [
                    F.pad(part, (0, 0, 0, 0, more, 0) if is_flow else (0, 0, 0, 0, 0, more))
                    for part, more in zip(parts, (size - part.shape[1] for part, size in zip(parts, layer.sizes)))
                ],
                dim=1,
            )
        else:
            more = shape[1] - given[1]
            is_first = is_flow and name.startswith("hint_encoder.")
            weights[name] = F.pad(weights[name], (0, 0, 0, 0, more, 0) if is_first else (0, 0, 0, 0, 0, more))
    surplus = sorted(set(weights) - set(shapes))
    if surplus:
        raise ValueError(f"`init` has {surplus[0]}, which the configuration's network has not.")
    model.load_state_dict(weights)
    model.register_to_config(scaling_factor=trained.config.scaling_factor)


def first_frames(data: Dataset, count: int = 96) -> torch.Tensor:
    """The middle frames `(count, 3, H, W)` of the first training samples."""
    samples = iter(data) if isinstance(data, IterableDataset) else (data[i] for i in range(count))
    return torch.stack([sample["frame_mid"] for _, sample in zip(range(count), samples)])


@torch.no_grad()
def measure_scaling_factor(model: VQMAGANModel, frames: torch.Tensor) -> float:
    """1 / standard deviation of the latents over training frames (Rombach et al., 2022, appendix G)."""
    device = model.device
    latents = [model.encode(part.to(device)).latents.float().cpu() for part in frames.split(8)]
    return 1 / torch.cat(latents).std().item()


def main(argv: list[str] | None = None) -> None:
    options, config = parse_options(VQMAGANOptions, "train_vq_magan", argv, __doc__)
    trainer = Trainer(options, "vqvae")
    device = trainer.accelerator.device

    # 1. models
    refuse_news(config)
    bare_model = VQMAGANModel(**config["vqvae"])
    check_resolution(options, bare_model.downsample_factor)
    if options.init:
        start_from(bare_model, VQMAGANModel.from_pretrained(options.init))
    source, _ = load_hint_source(config, options.i2e, device)
    if source.hint_channels != bare_model.config.hint_channels:
        raise ValueError(
            f"`hint_source` {config['hint_source']} gives {source.hint_channels} channels, but the configuration's vqvae takes "
            f"`hint_channels` {bare_model.config.hint_channels}."
        )
    flow_source = FlowHints(fine="fine_flow" in hint_parts(config["hint_source"]))
    lpips = lpips_loss(options, device)
    optimizer = torch.optim.AdamW(
        bare_model.parameters(),
        lr=options.learning_rate,
        betas=options.adam_betas,
        weight_decay=options.adam_weight_decay,
    )
    model, optimizer = trainer.prepare(bare_model.train(), optimizer)
    adversary = None
    if options.disc_weight > 0:
        channels = bare_model.config.out_channels
        adversary = Adversary(trainer, channels, options.disc_channels, options.adam_betas, options.disc_start)
    codes = CodeUsage(
        trainer,
        bare_model,
        options.revive_every or options.log_steps,
        revives=options.revive_every > 0,
        begun=bool(options.init) and not options.begin_codes,
    )
    trainer.register(codes)

    # 2. data, validation, export
    data = build_dataset(options, TripletTransform(options.window, options.any_time))
    measured = first_frames(data) if trainer.accelerator.is_main_process else None

    def export(folder: Path) -> None:
        state = trainer.weights()
        if trainer.accelerator.is_main_process:
            exported = VQMAGANModel.from_config(bare_model.config).eval()
            exported.load_state_dict(state)
            exported.to(device)
            exported.register_to_config(scaling_factor=measure_scaling_factor(exported, measured))
            exported.save_pretrained(folder)

    trainer.set_export(export)
    if options.validation:
        windows = validation_windows(options, frames=3, multiple=bare_model.downsample_factor)

        def score(index: int, shown: bool) -> tuple[dict[str, float], np.ndarray | None]:
            prev, mid, next_ = frames = to_frames(windows[index], device)
            bare_model.eval()
            hints, decoded = refine_as_sampling(bare_model, source, prev, mid, next_)
            bare_model.train()
            scores = image_scores(decoded.sample, mid, lpips)
            if not shown:
                return scores, None
            seen = (hints, config["hint_source"], source, decoded.offsets[-1], decoded.gates[-1])
            return scores, decoded_panel(frames, decoded.sample, *seen)

        trainer.set_validation(score, len(windows), "l1" if lpips is None else "lpips")
    trainer.resume()

    # 3. loop
    damped = config["pipeline"].get("default_hint_policy") == "damped"
    for batch in trainer.batches(data):
        step, generator = trainer.progress.step, trainer.generator()
        # Networks run fastest where frames and hints come in the layout of their weights.
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        batch = {
            name: value.contiguous(memory_format=layout) if value.ndim == 4 else value for name, value in batch.items()
        }
        prev, truth, next_ = batch["frame_prev"], batch["frame_mid"], batch["frame_next"]
        with torch.no_grad():
            shares = (
                options.hint_probability,
                options.guess_share,
                options.guess_rounds,
                options.absent_share,
                damped,
            )
            hints = draw_hints(bare_model, source, batch, *shares, generator)
            hints = [each.contiguous(memory_format=layout) for each in hints]
            noise = latent_noise(bare_model, truth, options.latent_noise, generator)
        adversarial = adversary is not None and adversary.active

        with trainer.accumulate(model, *([adversary.network] if adversary else [])):
            # 3.1 autoencoder
            decoded = model(truth, prev, next_, *hints, noise, time=batch["time"])
            zero = torch.zeros((), device=device)
            l1 = softened_l1(decoded.sample, truth, options.l1_epsilon)
            perceptual = zero
            if options.lpips_weight > 0 and step >= options.lpips_start:
                perceptual = lpips(decoded.sample, truth).mean()
            reconstruction = l1 + options.lpips_weight * perceptual
            vq = decoded.commit_loss.mean()
            anchor = anchor_loss(decoded.latents, truth) if options.anchor_weight > 0 else zero
            flow, progress = zero, step / options.max_train_steps
            flow_weight = (1 - progress) * options.flow_weight + progress * options.flow_weight_end
            if flow_weight > 0:
                flow = offset_loss(decoded.offsets, flow_source.from_guess(prev, truth, next_))
            loss = reconstruction + options.vq_weight * vq + options.anchor_weight * anchor + flow_weight * flow
            gan = zero
            if adversarial:
                gan = adversary.loss(decoded.sample)
                weight = adaptive_weight(reconstruction, gan, bare_model.last_layer)
                loss = loss + options.disc_weight * weight * gan
            trainer.backward(loss)
            trainer.optimizer_step(model, optimizer)
            codes.note(decoded.code_indices, decoded.latents)

            # 3.2 discriminator
            disc_loss = adversary.update(truth, decoded.sample) if adversarial else zero

        # 3.3 count, log, save
        trainer.finish_micro_batch(
            {
                "l1": l1,
                "lpips": perceptual,
                "vq": vq,
                "anchor": anchor,
                "flow": flow,
                "gan": gan,
                "disc": disc_loss,
                "codes_in_use": codes.share,
                "codes_revived": codes.revived,
            }
        )
    trainer.finish()


if __name__ == "__main__":
    with one_line_errors():
        main()
