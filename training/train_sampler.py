"""Train a checkpoint of motion news as a whole: hints, autoencoder and denoiser together, through the pipeline's own steps.

    accelerate launch -m training.train_sampler --config motion --data CLIPS --output_dir runs/motion --teacher runs/rife

Every sample goes the way that the pipeline goes: hints of the instant from the two neighbours, evidence, a denoising step from pure
noise, decoding. A share of the batches takes a second step, with hints that were extracted from the first step's guess at half size, or with
`guess_motion` from the motion that the decoder makes of its latents.
The latents that are decoded are the denoised ones, or the true ones, or zeros, in the shares of `latent_shares`.

Loss: Charbonnier + LPIPS (+ Gram matrices of its features, late) of the frame; the latents' squared error; flow of the hints and the decoder's offsets against flow
from the true middle frame, which is exact in composed scenes, and in clips comes from a teacher that sees that frame and counts
only where it warps better than what is trained; vector quantization. At the end the parts are written to OUTPUT/pipeline. To
resume, run the same command again.

With `trained`, some parts are trained and the others stay as `init` has them, their codebook, too.

With no denoised latents in `latent_shares` and a `latent_weight` of 0, the denoiser is left out: a control, or a first stage of the rest.

`--data crops:FOLDER` trains on what `training.crop_cache` made: its hints, such as OpenCV's flow, take the hint model's place.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DModel

from madiff_diffusers.evaluation.metrics import build_lpips
from madiff_diffusers.frame_coding import EncodedFrames, FrameCoder
from madiff_diffusers.motion_flow import MotionHintModel, RIFEFlowModel
from madiff_diffusers.motion_hints import HintSource
from madiff_diffusers.pipeline_madiff import MADiffPipeline
from madiff_diffusers.vq_magan import VQMAGANModel
from madiff_diffusers.warping import warp
from training.codes import CodeUsage
from training.crop_cache import CropCache
from training.data.sources import parse_sources
from training.frame_bank import FrameBank, augment, composed
from training.losses import gram_loss, lpips_loss, part_of_both
from training.options import (
    RunOptions,
    as_configured,
    check_resolution,
    check_unused,
    one_line_errors,
    option,
    parse_options,
    training_scheduler,
)
from training.trainer import Trainer
from training.validation import image_scores, panel, to_frames, to_image, validation_windows


VGG_SIDE = 96  # pixels of the part of a frame that VGG sees

# Options of the other stages' loader and loop, which this one has not.
UNUSED = (
    "window",
    "colour_jitter",
    "random_motion_share",
    "cache_gib",
    "columns",
    "on_unreadable",
    "dataloader_num_workers",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "ema_decay",
)


@dataclasses.dataclass
class SamplerOptions(RunOptions):
    init: str = option("", "folder of a pipeline to start from")
    teacher: str = option(
        "", "folder of a RIFEFlowModel, see `madiff convert-rife`; empty: flow is supervised in composed scenes alone"
    )
    adam_betas: tuple[float, ...] = option((0.9, 0.99), "of AdamW", least=0, less_than=1, count=2)
    adam_weight_decay: float = option(1e-4, "of AdamW", least=0)
    composed_share: float = option(
        0.4,
        "share of samples composed of pieces of frames, with exact flow; a sample of each batch at least is a clip's",
        least=0,
        most=1,
    )
    layers: int = option(5, "pieces of a composed scene, beside its background", least=1)
    scales: tuple[float, ...] = option(
        (1.0, 1.0, 1.25), "sizes of crops before they are resized, of which each batch draws one", more_than=0
    )
    latent_shares: tuple[float, ...] = option(
        (0.6, 0.2, 0.2), "of samples decoded from denoised latents, true ones, and zeros", least=0, count=3
    )
    denoised_from: float = option(
        0.15,
        "share of the training after which denoised latents are decoded; true ones stand in before",
        least=0,
        most=1,
    )
    last_noise_share: float = option(
        0.6,
        "share of samples at the last timestep, where sampling begins; the rest is drawn from all",
        least=0,
        most=1,
    )
    hints_until: float = option(
        0.0,
        "share of the training in which the hint model alone is trained, by flow and by what it warps, many times as fast",
        least=0,
        most=1,
    )
    two_step_share: float = option(0.25, "share of batches that take two steps …", least=0, most=1)
    two_steps_from: float = option(0.4, "… from this share of the training on", least=0, most=1)
    corrupted_share: float = option(0.2, "share of samples whose hints are disturbed", least=0, most=1)
    lpips_weight: float = option(0.4, "of LPIPS", least=0)
    lpips_from: float = option(0.12, "share of the training after which LPIPS counts", least=0, most=1)
    lpips_vgg_weight: float = option(
        0.0, "of LPIPS by VGG beside it, of half of the samples, in a part of 96x96 pixels …", least=0
    )
    lpips_vgg_backbone: str = option("", "… safetensors file with VGG's weights; downloaded by torchvision if empty")
    gram_weight: float = option(0.0, "of the Gram matrices of LPIPS's features …", least=0)
    gram_from: float = option(0.5, "… from this share of the training on", least=0, most=1)
    easiness_power: float = option(
        0.0,
        "a sample's frame counts by its hints' error to minus this: with 1, what is easy counts as much as what is hard",
        least=0,
    )
    latent_weight: float = option(0.02, "of the latents' squared error", least=0)
    vq_weight: float = option(0.02, "of the quantization loss", least=0)
    flow_weight: float = option(
        0.02,
        "of the hints' and offsets' distance to flow from the true middle frame, a pixel, at the start …",
        least=0,
    )
    flow_weight_end: float = option(0.005, "… and at the end", least=0)
    revive_every: int = option(
        50, "steps after which codes that nothing used are moved to latents of the batch; 0: never", least=0
    )
    begin_codes: bool = option(
        False, "whether the first step moves what it does not use of a codebook of `init`, too, as of a new one"
    )
    trained: str = option(
        "",
        "how the names of the parameters begin that are trained, such as vqvae.decoder.head, with commas between several; the others stay as "
        "they are; empty: all are trained",
    )
    time_limit: float = option(
        0.0, "minutes of training after which the run ends, its schedule in step with them; 0: none", least=0
    )


def distance(flow: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean distance of flow `(B, 2n, h, w)` to flow of frames `(B, 2n, H, W)`, in pixels of the frames; `weight` is `(B, n, H, W)`."""
    ratio = truth.shape[-1] // flow.shape[-1]
    weight = F.avg_pool2d(weight, ratio) if ratio > 1 else weight
    truth = F.avg_pool2d(truth, ratio) if ratio > 1 else truth
    squared = ((ratio * flow - truth) ** 2).unflatten(1, (-1, 2)).sum(dim=2)
    return (weight * (squared + 0.01).sqrt()).mean()


def crop_multiple(hint_model: MotionHintModel | None, pipeline: MADiffPipeline) -> int:
    """What sizes of frames must be multiples of, so that they are seen without padding as a guess is, at half size, and as at the start."""
    if hint_model is None:
        return pipeline.frame_processor.multiple
    return math.lcm(hint_model.config.start_scale, 2) * 2 ** len(hint_model.config.channels)


def charbonnier(sample: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Mean over a batch, of which each sample may have a `weight`, `(B,)`."""
    return (weight * ((sample - truth) ** 2 + 1e-6).sqrt().mean(dim=(1, 2, 3))).mean()


def easiness(errors: torch.Tensor, power: float) -> torch.Tensor:
    """Weights `(B,)` of mean 1 of samples whose warps have errors `(B, 2, H, W)`: the less of them, the more a sample weighs."""
    weight = (errors.mean(dim=(1, 2, 3)) + 0.02) ** -power
    return weight / weight.mean()


def disturbed(hints: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Hints `(B, 4, H, W)`, of which a share is scaled by 0.6 to 1.4 and moved by smooth fields of up to some pixels."""
    count, device = len(hints), hints.device
    chosen = (torch.rand(count, generator=generator, device=device) < share).view(-1, 1, 1, 1)
    scale = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator, device=device)
    field = torch.randn(count, 4, 5, 5, generator=generator, device=device) * 2
    field = F.interpolate(field, size=hints.shape[-2:], mode="bicubic", align_corners=False)
    return torch.where(chosen, hints.detach() * scale + field, hints)


class SamplerNetwork(nn.Module):
    """The networks that are trained, and what they make of a batch. Without a hint model, batches have their hints, and those of guesses
    come from a hint source."""

    def __init__(
        self,
        hint_model: MotionHintModel | None,
        vqvae: VQMAGANModel,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.hint_model, self.vqvae, self.unet, self.scheduler = hint_model, vqvae, unet, scheduler

    def compile_parts(self) -> None:
        """In place: parameters keep their names."""
        for part in (self.unet, self.vqvae.encoder, self.vqvae.news_encoder, self.vqvae.decoder):
            part.compile(dynamic=False)
        if self.hint_model is not None:
            for name in ("features", "estimates", "refined"):
                setattr(self.hint_model, name, torch.compile(getattr(self.hint_model, name), dynamic=False))
        self.vqvae.condition = torch.compile(self.vqvae.condition, dynamic=False)

    def forward(
        self,
        batch: dict[str, torch.Tensor],
        draws: dict[str, torch.Tensor],
        disturb: Any,
        two_steps: bool,
        hints_only: bool = False,
        hint_source: HintSource | None = None,
        denoises: bool = True,
        guesses: bool = False,
        moves: bool = False,
    ) -> dict[str, Any]:
        """
        Args:
            batch: `frame_prev`, `frame_mid`, `frame_next`, `time`, and without a hint model `hints`.
            draws: `noise` of the latents' shape, `timesteps` `(B,)`, `choice` `(B,)`: 0 for denoised latents, 1 for true ones, 2 for zeros.
            disturb: what is done to hints `(B, 4, H, W)` before they are used.
            two_steps: whether a second step follows.
            hints_only: whether it ends with the hints, of the instant and of the true middle frame; nothing is drawn then.
            hint_source: makes hints from guesses where there is no hint model.
            guesses: whether the batch's hints are begun ones, which are finished from the motion that the decoder guesses.
            moves: whether further steps take their hints from the motion that the decoder makes of the latents (`guess_motion`), as the batch's do
                where they are begun.
            denoises: whether the denoiser is run; without it, there is one step and no denoised latents are chosen.
        """
        prev, mid, next_, time = (batch[name] for name in ("frame_prev", "frame_mid", "frame_next", "time"))
        vqvae = self.vqvae
        found: dict[str, Any] = {}

        # 1. hints of the instant, and what a guess (here the truth) would tell, at half size
        if not hints_only:
            both = vqvae.encode(torch.cat([prev, next_])).features
            of_prev, of_next = (both.map(lambda each: each.chunk(2)[side]) for side in (0, 1))

        def finish(hints: torch.Tensor, latents: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            """Motion that the decoder makes of hints and latents, and hints that are found from it on; no gradient leads back from these."""
            assert hint_source is not None, "what finishes hints"
            size = [side // vqvae.motion_stride for side in prev.shape[-2:]]
            known = (vqvae.resize_hints(each, size) for each in hints.split(2, dim=1))
            motion = vqvae.guess_motion(of_prev, of_next, *known, latents, force_not_quantize=True, time=time)
            finished = hint_source.finish(prev, next_, [each.detach() for each in motion], time)
            return torch.cat(motion, dim=1), torch.cat(finished, dim=1)

        if self.hint_model is None and guesses:
            found["motion"], finished = finish(batch["hints"], None)
            found["estimates"] = [finished]
        elif self.hint_model is None:
            found["estimates"] = [batch["hints"]]
        else:
            found["estimates"] = [torch.cat(each, dim=1) for each in self.hint_model.starts(prev, next_, time)]
        hints = disturb(found["estimates"][-1])

        small = [F.avg_pool2d(each, 2) for each in (prev, next_, mid)]

        def refine(guess: torch.Tensor, known: torch.Tensor) -> list[torch.Tensor]:
            if self.hint_model is None:
                assert hint_source is not None, "what makes hints"
                return [torch.cat(hint_source.from_guess(small[0], guess, small[1]), dim=1)]
            neighbours = self.hint_model.features(torch.cat(small[:2]))
            known = F.avg_pool2d(torch.cat([known[:, :2], known[:, 2:]]), 2) / 2
            refined = self.hint_model.refined(neighbours, self.hint_model.features(guess), guess.shape[-2:], known)
            return [torch.cat(each, dim=1) for each in refined]

        if hints_only:
            found["refined"] = refine(small[2], hints.detach())
            return found

        # 2. what the true frame tells beside them
        news = vqvae.encode_news(mid, of_prev, of_next, *hints.detach().split(2, dim=1), time)
        quantized, found["vq"], (_, _, found["codes"]) = vqvae.quantize(news.float())
        found["news"] = news

        # 3. a step of denoising
        def denoise(noisy: torch.Tensor, timesteps: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
            condition = vqvae.condition(of_prev.pyramid[-1], of_next.pyramid[-1], *hints.split(2, dim=1))
            seen = torch.cat([noisy.to(condition.dtype), condition], dim=1)
            return self.unet(seen, timesteps, class_labels=1000 * time, return_dict=False)[0].float()

        noise, timesteps = draws["noise"], draws["timesteps"]
        if denoises:
            clean = denoise(self.scheduler.add_noise(news.detach(), noise, timesteps), timesteps, hints)
            found["latent"] = F.mse_loss(clean, news.detach())
        else:
            clean, found["latent"] = torch.zeros_like(noise), noise.new_zeros(())
        choice = draws["choice"].view(-1, 1, 1, 1)

        if two_steps and moves:
            with torch.no_grad():
                hints = finish(hints, self._quantized(clean))[1]
            found["refined"] = []
        elif two_steps:
            # The guess at half size, hints from it, and the second step from where the scheduler goes on.
            with torch.no_grad():
                coarse = vqvae.encode(torch.cat(small[:2])).features
            coarse_prev, coarse_next = (coarse.map(lambda each: each.chunk(2)[side]) for side in (0, 1))
            code = self._quantized(F.avg_pool2d(clean, 2) / 2)
            known = (F.avg_pool2d(hints.detach(), 2) / 2).split(2, dim=1)
            guess = vqvae.decode(code, coarse_prev, coarse_next, *known, force_not_quantize=True, time=time).sample
            found["guess"] = charbonnier(guess, small[2])
            found["refined"] = refine(guess.detach().clamp(-1, 1), hints.detach())
            # As the pipeline does, the change at half size is added: finer detail stays.
            change = found["refined"][-1] - torch.cat(known, dim=1)
            change = 2 * F.interpolate(change, scale_factor=2.0, mode="bilinear", align_corners=False)
            hints = hints.detach() + change
        else:
            found["refined"] = [] if self.hint_model is None else refine(small[2], hints.detach())
        if two_steps:
            hints = disturb(hints)
            news = vqvae.encode_news(mid, of_prev, of_next, *hints.detach().split(2, dim=1), time)
            quantized, more, _ = vqvae.quantize(news.float())
            found["vq"] = (found["vq"] + more) / 2
            half_way = torch.full_like(timesteps, self.scheduler.config.num_train_timesteps // 2 - 1)
            clean = denoise(self.scheduler.add_noise(clean.detach(), noise, half_way), half_way, hints)
            found["latent"] = (found["latent"] + F.mse_loss(clean, news.detach())) / 2

        # 4. the frame
        latents = torch.where(
            choice == 0, self._quantized(clean), torch.where(choice == 1, quantized, torch.zeros_like(quantized))
        )
        decoded = vqvae.decode(latents, of_prev, of_next, *hints.split(2, dim=1), force_not_quantize=True, time=time)
        found["sample"], found["offsets"] = decoded.sample, decoded.offsets
        return found

    def _quantized(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents moved to their nearest codes, with a gradient as if they had not been; none goes to the codes."""
        codes = self.vqvae.quantize.embedding.weight.detach().float()
        flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        nearest = codes[torch.cdist(flat.detach(), codes).argmin(dim=1)].view(
            *latents.shape[:1], *latents.shape[2:], -1
        )
        return latents + (nearest.permute(0, 3, 1, 2) - latents).detach()


class Teacher:
    """Flow from the true middle frame to its neighbours, by a network that sees them at half size."""

    def __init__(self, folder: str, device: torch.device, compiled: bool):
        self.network = (
            RIFEFlowModel.from_pretrained(folder)
            .to(device, torch.float32, memory_format=torch.channels_last)
            .requires_grad_(False)
            .eval()
        )
        # Which would wait for the first flow, and may go through the batch in two parts.
        self.network.register_to_config(adaptive=False)
        if compiled:
            self.network.compile(dynamic=False)

    @torch.no_grad()
    def __call__(self, prev: torch.Tensor, mid: torch.Tensor, next_: torch.Tensor) -> torch.Tensor:
        """`(B, 4, H, W)` in pixels."""
        prev, mid, next_ = (
            F.avg_pool2d(each, 2).contiguous(memory_format=torch.channels_last) for each in (prev, mid, next_)
        )
        flow = self.network.flow_to(torch.cat([mid, mid]), torch.cat([prev, next_]))
        flow = 2 * F.interpolate(flow.float(), scale_factor=2.0, mode="bilinear", align_corners=False)
        return torch.cat(flow.chunk(2), dim=1)


def warp_errors(batch: dict[str, torch.Tensor], flow: torch.Tensor) -> torch.Tensor:
    """How far both neighbours, warped along flow `(B, 4, H, W)`, are from the middle frame around each pixel, `(B, 2, H, W)`."""
    errors = [
        (warp(batch[name], flow[:, 2 * side : 2 * side + 2]) - batch["frame_mid"]).abs().mean(dim=1, keepdim=True)
        for side, name in enumerate(("frame_prev", "frame_next"))
    ]
    return F.avg_pool2d(torch.cat(errors, dim=1), 5, stride=1, padding=2)


def check_data(options: SamplerOptions, config: dict[str, Any]) -> tuple[str, str]:
    """Whether the options name `videos` or `crops`, and their folder.

    Raises:
        ValueError: for data of another kind, an option that this stage does not use, or a configuration that it cannot train.
    """
    if not config["vqvae"].get("news_latents"):
        raise ValueError("`config` must be one with `news_latents`, such as motion.")
    if sum(options.latent_shares) == 0:
        raise ValueError(
            f"`latent_shares` must be shares, not all of them zero, but is {list(options.latent_shares)}."
        )
    check_unused(options, UNUSED, "by this stage")
    sources = parse_sources(options.data)
    if len(sources) != 1 or sources[0][0] not in ("videos", "crops"):
        raise ValueError(f"`data` must be one folder of videos or of crops in this stage, but is {options.data!r}.")
    kind, folder, _ = sources[0]
    if kind == "crops":
        of_videos = ("composed_share", "layers", "scales", "gaps", "any_time", "candidates")
        check_unused(options, of_videos, "with crops", config.get("train_sampler"))
        if options.hints_until:
            raise ValueError(
                f"`hints_until` must be 0 with crops, which have their hints, but is {options.hints_until}."
            )
    elif config["hint_source"] != "model":
        raise ValueError(
            f"`hint_source` must be model in the configuration where `data` is videos, but is {config['hint_source']}; others make crops "
            "first (training.crop_cache)."
        )
    return kind, folder


def build_parts(config: dict[str, Any], init: str) -> tuple[MotionHintModel | None, VQMAGANModel, UNet2DModel]:
    """The networks of a configuration, with the weights of the pipeline in the folder `init` if there is one.

    Raises:
        ValueError: if these are of another configuration.
    """
    learned = config["hint_source"] == "model"
    classes = {"hint_model": MotionHintModel if learned else None, "vqvae": VQMAGANModel, "unet": UNet2DModel}
    parts = []
    for name, kind in classes.items():
        if kind is None:
            parts.append(None)
        elif not init:
            parts.append(kind(**config[name]))
        else:
            parts.append(as_configured(kind.from_pretrained(init, subfolder=name), kind(**config[name]), name))
    return tuple(parts)


def validate(trainer: Trainer, pipeline: MADiffPipeline, network: SamplerNetwork, lpips: nn.Module | None) -> None:
    """Score held-out windows: the pipeline's frame; the frame of latents that are zero, and the mean of the warped neighbours; and how much of
    the true latents the denoiser tells, R² = 1 - mse / mean square, at the first step."""
    device = trainer.accelerator.device
    windows = validation_windows(trainer.options, frames=3, multiple=crop_multiple(network.hint_model, pipeline))

    def score(index: int, shown: bool) -> tuple[dict[str, float], np.ndarray | None]:
        prev, mid, next_ = to_frames(windows[index], device)
        network.eval()

        def sample(**settings) -> torch.Tensor:
            generator = torch.Generator().manual_seed(index)
            made = pipeline((prev + 1) / 2, (next_ + 1) / 2, generator=generator, **settings)
            return made.frames

        result = sample(output_type="pt").reshape(mid.shape).to(device) * 2 - 1
        latents = sample(output_type="latent", num_inference_steps=1)[:, 0]
        coder = FrameCoder(network.vqvae)
        neighbours = [EncodedFrames(each, tuple(each.shape[-2:])) for each in (prev, next_)]
        of_prev, of_next = coder.encode(*neighbours)
        if pipeline.config.guess_motion:
            hints = coder.motion_hints(pipeline.hints, *neighbours, [0.5], prev.new_full((1,), 0.5))
        else:
            hints = pipeline.hints.start(prev, next_)
        news = network.vqvae.encode_news(mid, of_prev, of_next, *hints)
        without = network.vqvae.decode(torch.zeros_like(news), of_prev, of_next, *hints).sample
        warps = (warp(prev, hints[0]) + warp(next_, hints[1])) / 2
        network.train()
        scores = image_scores(result, mid, lpips)
        for name, frame in (("zero", without), ("warps", warps)):
            scores.update(
                {
                    f"{key}_{name}": value
                    for key, value in image_scores(frame, mid, lpips).items()
                    if key in ("psnr", "lpips")
                }
            )
        scores["r2"] = float(1 - (latents - news).square().mean() / news.square().mean())
        named = (
            ("previous", prev),
            ("next", next_),
            ("truth", mid),
            ("result", result),
            ("zero latents", without),
            ("warps", warps),
        )
        return scores, panel([(name, to_image(frame)) for name, frame in named]) if shown else None

    trainer.set_validation(score, len(windows), "l1" if lpips is None else "lpips")


def main(argv: list[str] | None = None) -> None:
    options, config = parse_options(SamplerOptions, "train_sampler", argv, __doc__)
    kind, folder = check_data(options, config)
    trainer = Trainer(options, "pipeline")
    device = trainer.accelerator.device
    cache = None
    if kind == "crops":
        cache = CropCache(folder, device)
        config["hint_source"] = cache.hint_source
        guessed = cache.begun or cache.finished
        if config["pipeline"].get("guess_motion") and not guessed:
            raise ValueError(
                f"`guess_motion` needs crops with begun hints (training.crop_cache --begun, or --finished_by), which {folder} has not."
            )
        config["pipeline"]["guess_motion"] = guessed
        if cache.finished:
            config["pipeline"]["hint_settings"] = cache.hint_settings
    if options.hints_until and trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"`hints_until` must be 0 with several processes, which wait for every network's gradients, but is {options.hints_until}."
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    # 1. models
    scheduler = training_scheduler(config)
    bare = SamplerNetwork(*build_parts(config, options.init), scheduler).train()
    begins = tuple(options.trained.split(","))
    for begin in begins:
        if (options.trained and not begin) or not any(name.startswith(begin) for name, _ in bare.named_parameters()):
            raise ValueError(
                f"`trained` must be how names of parameters begin, but {begin!r} is not, in {options.trained!r}."
            )
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(name.startswith(begins))
    trained = [parameter for parameter in bare.parameters() if parameter.requires_grad]
    denoises = options.latent_shares[0] > 0 or options.latent_weight > 0
    idle = not denoises and any(parameter.requires_grad for parameter in bare.unet.parameters())
    if (not denoises and options.two_step_share > 0) or (idle and trainer.accelerator.num_processes > 1):
        raise ValueError(
            "`latent_weight` must be more than 0 where no denoised latents are decoded, so that the denoiser is trained, with "
            "`two_step_share` or several processes, but is 0. (Several may do with a denoiser that `trained` leaves as it is.)"
        )
    optimizer = torch.optim.AdamW(
        trained,
        lr=options.learning_rate,
        betas=options.adam_betas,
        weight_decay=options.adam_weight_decay,
        fused=device.type == "cuda",
    )
    parts = {"vqvae": bare.vqvae, "unet": bare.unet, "scheduler": scheduler, "hint_model": bare.hint_model}
    pipeline = MADiffPipeline(**parts, hint_source=config["hint_source"], **config["pipeline"])
    pipeline.set_progress_bar_config(disable=True)
    network, optimizer = trainer.prepare(bare, optimizer, compiles=False)
    lpips = lpips_loss(options, device)
    vgg = build_lpips("vgg", options.lpips_vgg_backbone or None).to(device) if options.lpips_vgg_weight > 0 else None
    teacher = Teacher(options.teacher, device, options.compile) if options.teacher else None
    if options.compile:  # a part at a time
        bare.compile_parts()
        if lpips is not None:
            lpips.compile(dynamic=False)

    def export(folder: Path) -> None:
        if trainer.accelerator.is_main_process:
            pipeline.save_pretrained(folder)

    revives = options.revive_every > 0 and bare.vqvae.quantize.embedding.weight.requires_grad
    codes = CodeUsage(
        trainer,
        bare.vqvae,
        options.revive_every or options.log_steps,
        revives=revives,
        begun=bool(options.init) and not options.begin_codes,
    )
    trainer.register(codes)
    trainer.set_export(export)
    if options.validation:
        validate(trainer, pipeline, bare, lpips)
    trainer.resume()

    # 2. data; frames at half size, too, must be what the hint model's scales divide
    check_resolution(options, crop_multiple(bare.hint_model, pipeline))
    sizes = [max(round(options.resolution * scale / 8) * 8, 8) for scale in options.scales]
    bank = FrameBank(folder, device, max(max(sizes), options.resolution)) if cache is None else None
    latent_size = options.resolution // bare.vqvae.downsample_factor
    count = options.train_batch_size
    made = 0 if bank is None else min(round(options.composed_share * count), count - 1)  # a clip's at least

    # 3. loop
    for passed in trainer.steps(options.time_limit):
        generator = torch.Generator(device).manual_seed(int(trainer.generator().initial_seed() % 2**63))
        size = sizes[int(torch.randint(len(sizes), (1,), generator=trainer.generator()))]
        hints_only = passed < options.hints_until
        two_steps = (
            not hints_only
            and passed >= options.two_steps_from
            and int((trainer.progress.step + 1) * options.two_step_share)
            > int(trainer.progress.step * options.two_step_share)
        )

        # 3.1 a batch, and flow from its true middle frames
        with torch.no_grad():
            if cache is not None:
                drawn = cache.triplets(count, options.resolution, generator)
            else:
                drawn = bank.triplets(
                    count - made, size, options.gaps, options.any_time, options.candidates, generator
                )
            batch = augment(drawn, options.resolution, generator)
            batch, flow = (
                {name: each.contiguous() for name, each in batch.items()},
                batch["time"].new_zeros(count - made, 4, options.resolution, options.resolution),
            )
            if teacher is not None:
                with trainer.accelerator.autocast():
                    flow = teacher(batch["frame_prev"], batch["frame_mid"], batch["frame_next"])
            if made:
                scenes, exact = composed(bank, made, options.resolution, options.layers, generator)
                batch = {name: torch.cat([each, scenes[name]]) for name, each in batch.items()}
                flow = torch.cat([flow, exact])
            layout = torch.channels_last if options.channels_last else torch.contiguous_format
            batch = {
                name: each.contiguous(memory_format=layout) if each.ndim == 4 else each for name, each in batch.items()
            }
            trainer.micro_batches[-1].update(batch)  # to be saved, should its gradients not be finite
            any_step = torch.randint(
                scheduler.config.num_train_timesteps, (count,), generator=generator, device=device
            )
            last = torch.rand(count, generator=generator, device=device) < options.last_noise_share
            timesteps = torch.where(last | two_steps, scheduler.config.num_train_timesteps - 1, any_step)
            shares = torch.tensor(options.latent_shares, device=device)
            choice = torch.multinomial(shares, count, replacement=True, generator=generator)
            if passed < options.denoised_from:
                choice = torch.where(choice == 0, 1, choice)
            else:  # where denoised latents are decoded, they come from where sampling begins
                timesteps = torch.where((choice == 0), scheduler.config.num_train_timesteps - 1, timesteps)
            noise = torch.randn(
                count, bare.vqvae.config.latent_channels, latent_size, latent_size, generator=generator, device=device
            )

        # 3.2 forward
        draws = {"noise": noise, "timesteps": timesteps, "choice": choice}
        found = network(
            batch,
            draws,
            lambda hints: disturbed(hints, options.corrupted_share, generator),
            two_steps,
            hints_only,
            None if cache is None else pipeline.hints,
            denoises,
            cache is not None and cache.begun,
            cache is not None and pipeline.config.guess_motion,
        )
        with torch.no_grad():
            weight, ours = torch.ones_like(flow[:, :2]), warp_errors(batch, found["estimates"][-1])
            if count > made:
                theirs = warp_errors(batch, flow)
                # Hints that are given are exact where they are right, as OpenCV's are: a teacher counts where it is clearly better.
                margin = -0.01 if cache is not None else 0.01
                better = (theirs < ours + margin).float() if teacher is not None else torch.zeros_like(ours)
                weight[: count - made] = better[: count - made]
            share = easiness(ours, options.easiness_power)

        # 3.3 losses
        flow_weight = options.flow_weight + (options.flow_weight_end - options.flow_weight) * passed
        losses = {"flow": flow.new_zeros(())}
        if bare.hint_model is not None:
            hint_losses = [distance(each, flow, weight) for each in found["estimates"]]
            half = F.avg_pool2d(flow, 2) / 2
            hint_losses += [2 * distance(each, half, F.avg_pool2d(weight, 2)) for each in found["refined"]]
            losses["flow"] = torch.stack(hint_losses).mean()
        if hints_only:
            of_prev, of_next = found["estimates"][-1].split(2, dim=1)
            warps = (warp(batch["frame_prev"], of_prev) + warp(batch["frame_next"], of_next)) / 2
            losses["warps"] = charbonnier(warps, batch["frame_mid"])
            trainer.backward(losses["warps"] + flow_weight * losses["flow"])
            trainer.optimizer_step(network, optimizer)
            trainer.finish_micro_batch(losses)
            continue
        seen = (choice != 2).float().view(-1, 1, 1, 1)
        offset_losses = [
            distance(each, flow, weight * seen if number == 0 else weight)
            for number, each in enumerate(found["offsets"])
        ]
        if "motion" in found:
            # Towards the best flow that is known: the teacher's, or else what was made of the guess.
            known = torch.where(weight.repeat_interleave(2, dim=1) > 0, flow, found["estimates"][-1])
            offset_losses.append(distance(found["motion"], known, torch.ones_like(weight)))
        losses["flow"] = losses["flow"] + torch.stack(offset_losses).mean()
        losses["l1"] = charbonnier(found["sample"], batch["frame_mid"], share)
        losses["latent"], losses["vq"] = found["latent"], found["vq"]
        loss = (
            losses["l1"]
            + flow_weight * losses["flow"]
            + options.latent_weight * losses["latent"]
            + options.vq_weight * losses["vq"]
        )
        if "guess" in found:
            loss = loss + 0.3 * found["guess"]
        if lpips is not None and passed >= options.lpips_from:
            with trainer.accelerator.autocast():
                each = lpips(found["sample"].clamp(-1.1, 1.1), batch["frame_mid"]).float().view(-1)
                losses["lpips"] = (share * each).mean()
            loss = loss + options.lpips_weight * losses["lpips"]
        if vgg is not None and passed >= options.lpips_from:
            # VGG takes long. Clips come first and composed scenes behind them, so that this is half of either.
            made_part, true_part = part_of_both(found["sample"][::2], batch["frame_mid"][::2], VGG_SIDE, generator)
            with trainer.accelerator.autocast():
                each = vgg(made_part.clamp(-1.1, 1.1), true_part).float().view(-1)
                losses["lpips_vgg"] = (share[::2] * each).mean()
            loss = loss + options.lpips_vgg_weight * losses["lpips_vgg"]
        if lpips is not None and options.gram_weight > 0 and passed >= options.gram_from:
            with trainer.accelerator.autocast():
                losses["gram"] = (
                    share * gram_loss(lpips, found["sample"].clamp(-1.1, 1.1), batch["frame_mid"])
                ).mean()
            loss = loss + options.gram_weight * losses["gram"]
        trainer.backward(loss)
        trainer.optimizer_step(network, optimizer)

        # 3.4 codes, log, save
        codes.note(found["codes"].view(-1), found["news"])
        losses["codes_used"] = torch.tensor(codes.share)
        trainer.finish_micro_batch(losses)
    trainer.finish()


if __name__ == "__main__":
    with one_line_errors():
        main()
