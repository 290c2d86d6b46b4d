# SPDX-License-Identifier: Apache-2.0
"""MA-Sampling: latent diffusion that re-reads the motion from its own guess at every step (MADiff, arXiv 2404.13534)."""

import copy
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import math
import types
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Rational
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor


# This file travels with checkpoints, to where nobody installed what it needs.
if _missing := [name for name in ("accelerate", "einops") if importlib.util.find_spec(name) is None]:
    raise ImportError(f"MADiffPipeline needs packages that are not installed: pip install {' '.join(_missing)}")

# Of a pipeline in a folder, Diffusers copies the files that are imported here, and none that only those import: what is
# imported under its own name is for them.
from .components import check_safetensors as check_safetensors
from .decoder_inputs import HintLayout as HintLayout
from .frame_coding import EncodedFrames, FrameCoder, repeated
from .hint_registry import build_hint_source, check_hint_source
from .hub_repository import upload_repository as upload_repository
from .image_processor import FrameInput, FrameProcessor, check_same_size
from .model_cards import model_card as model_card
from .motion_hints import HintSource, damp_hints, finishes, goes_on, together
from .motion_search import search_flow as search_flow
from .optical_flow import dis_flow as dis_flow
from .pipeline_files import CheckpointPipeline
from .pipeline_inputs import (
    CALLBACK_TENSORS,
    Callback,
    Sampling,
    check_count,
    check_inputs,
    check_latents,
    check_scheduler,
    check_settings,
    neighbours_of,
)
from .pipeline_output import Frames, MADiffPipelineOutput
from .precision import fastest_dtype as fastest_dtype
from .sampling_steps import call_back, clean_latents, in_own_dtype
from .tiling import TILE_PIXELS, Tiling
from .warping import warp as warp


class MADiffPipeline(CheckpointPipeline, DiffusionPipeline):
    r"""
    Pipeline for video frame interpolation: frames at any instants between two neighbouring frames.

    Args:
        vqvae ([`VQMAGANModel`]): encodes frames, and decodes latents beside the neighbours and motion hints.
        unet ([`UNet2DModel`]): predicts the noise in the middle frame's latents; its input channels are those latents,
            both neighbours' latents, and the hints towards both neighbours at the latents' size; or, where the autoencoder
            has `news_latents`, those latents and [`~VQMAGANModel.condition`]. With
            `class_embed_type="timestep"` it is told the instant, times 1000.
        scheduler ([`SchedulerMixin`]): any of Diffusers' that takes the checkpoint's `prediction_type`.
        i2e ([`EventGANModel`], *optional*): makes event hints; not needed where `hint_source` is flow alone.
        hint_model ([`MotionHintModel`] or a network with its methods, *optional*): makes the hints of a `hint_source` `"model"`.
        hint_source (`str`): `"events"` (the paper's), `"flow"`, `"fine_flow"`, `"search"`, `"model"`, a registered name, `"MODULE:CLASS"`, or several of these joined
            by `+`, see [`build_hint_source`]. With events among others and no `i2e`, event hints are zeros.
        default_num_inference_steps (`int`): what `num_inference_steps=None` stands for.
        default_hint_interval (`int`): what `hint_interval=None` stands for.
        default_hint_policy (`str`): what `hint_policy=None` stands for; `"sampling"` is the paper's.
        guess_scale (`int`): guesses of the frame, and the hints from them, are made of frames this many times smaller (1, 2, 4 or 8);
            only the result is decoded at full size. 1 is the paper's.
        event_scale (`int`): event hints are extracted from frames this many times smaller (1, 2, 4 or 8); 1 is the paper's.
        default_recursive (`bool`): what `recursive=None` stands for.
        hint_settings (`dict`, *optional*): arguments of the constructors of `"search"`, of hint sources that are not this package's, and of
            `"events"` (`between` alone), by their names in `hint_source`.
        guess_motion (`bool`): take hints from the motion that the decoder makes of the latents and the hints so far, in the place of the guessed
            frame: before the first step, of latents of zeros and the hints that a source begins with. So with sources that can `begin` and
            `finish` hints, such as `"search"`; others are asked as without it.

    Raises:
        ValueError: for a setting out of its range, or parts that do not fit together.
    """

    model_cpu_offload_seq = "vqvae->unet->i2e->hint_model"
    _optional_components = ["i2e", "hint_model"]
    # The codebook's weight is read without a forward pass of its own, which sequential offloading waits for.
    _exclude_from_cpu_offload = ["vqvae"]
    _callback_tensor_inputs = [*CALLBACK_TENSORS]

    def __init__(
        self,
        vqvae: ModelMixin,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        i2e: ModelMixin | None = None,
        hint_source: str = "events",
        default_num_inference_steps: int = 10,
        default_hint_interval: int = 1,
        default_hint_policy: str = "sampling",
        guess_scale: int = 1,
        event_scale: int = 1,
        default_recursive: bool = False,
        hint_settings: dict[str, dict[str, Any]] | None = None,
        hint_model: ModelMixin | None = None,
        guess_motion: bool = False,
    ):
        super().__init__()
        check_settings(
            guess_scale, event_scale, default_num_inference_steps, default_hint_interval, default_hint_policy
        )
        check_scheduler(scheduler)
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler, i2e=i2e, hint_model=hint_model)
        self.register_to_config(
            hint_source=hint_source,
            default_num_inference_steps=default_num_inference_steps,
            default_hint_interval=default_hint_interval,
            default_hint_policy=default_hint_policy,
            guess_scale=guess_scale,
            event_scale=event_scale,
            default_recursive=default_recursive,
            hint_settings=hint_settings,
            guess_motion=guess_motion,
        )
        if guess_motion:
            _ = vqvae.motion_stride  # says what is missing
        for network in (vqvae, unet, i2e, hint_model):
            if network is not None:  # convolutions of few channels are up to twice as fast in this layout
                network.to(memory_format=torch.channels_last)
        self._hints: HintSource | None = None
        self._built_hints: tuple[tuple, HintSource] | None = None  # what they were built of, and they
        # Set by `enable_tiling`.
        self.tiling: Tiling | None = None
        latent_channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
        expected = latent_channels + vqvae.condition_channels
        if vqvae.config.hint_channels != self.hints.hint_channels or unet.config.in_channels != expected:
            raise ValueError(
                f"`hint_source={hint_source!r}` gives {self.hints.hint_channels} channels towards each neighbour, so "
                f"`vqvae` must have as many `hint_channels` (it has {vqvae.config.hint_channels}) and `unet` "
                f"{expected} `in_channels` (it has {unet.config.in_channels})."
            )
        # The U-Net halves the latents' size between its blocks; frames are padded so that it always can.
        unet_factor = 2 ** (len(unet.config.block_out_channels) - 1)
        multiple = vqvae.downsample_factor * max(unet_factor, guess_scale)
        if "events" in hint_source.split("+"):  # of guesses, too, which are as much smaller
            multiple = math.lcm(multiple, guess_scale * event_scale)
        self.frame_processor = FrameProcessor(multiple)

    @property
    def hints(self) -> HintSource:
        """
        Where motion hints come from: `hint_source` with the current `i2e`, unless another source was assigned here. Such a one is
        saved, too, with its `config` and its class's file; None takes it away again.

        Raises:
            ValueError: on assignment, for what is no hint source, or has other channels than the decoder takes.
        """
        if self._hints is not None:
            return self._hints
        config = self.config
        channels, scale = self.vqvae.config.hint_channels, config.event_scale
        parts = (config.hint_source, self.i2e, self.tiling, config.hint_settings, channels, scale, self.hint_model)
        if self._built_hints is None or any(old is not new for old, new in zip(self._built_hints[0], parts)):
            self._built_hints = parts, build_hint_source(*parts)
        return self._built_hints[1]

    @hints.setter
    def hints(self, source: HintSource | None) -> None:
        if source is not None:
            check_hint_source(source, "`hints`")
            expected = self.vqvae.config.hint_channels
            if source.hint_channels != expected:
                raise ValueError(
                    f"`hints` must have {expected} `hint_channels`, as many as `vqvae` takes, but has {source.hint_channels}."
                )
        self._hints = source

    def enable_tiling(self, tile_pixels: int = TILE_PIXELS) -> None:
        """
        Encode, decode and extract event hints by overlapping tiles, blended, where frames have more pixels: memory then grows little
        with the frames' size. Optical flow and the denoiser see whole frames; flows are found one at a time where tiles are smaller than by default.

        Args:
            tile_pixels (`int`, defaults to 480,000): most pixels of a tile; larger tiles take longer on a CPU.

        Raises:
            ValueError: if that is no positive integer.
        """
        check_count(tile_pixels, "tile_pixels")
        self.tiling = Tiling(int(tile_pixels), self.frame_processor.multiple)

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.tiling = None

    def enable_group_offload(
        self, *args: Any, exclude_modules: str | Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """As [`~DiffusionPipeline.enable_group_offload`], but `vqvae` stays whole: its parts are called in other ways than by `forward`."""
        others = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        super().enable_group_offload(*args, exclude_modules=sorted({"vqvae", *others}), **kwargs)

    def compile(self, **options: Any) -> None:
        """
        Compile what MA-Sampling calls of its networks by [`torch.compile`], in place. The `compile` of a network takes its `forward` alone,
        which this pipeline does not call of `vqvae`. The first frames of each size then take minutes: for many frames of one size on a GPU.

        Args:
            options: those of `torch.compile`. With `mode="reduce-overhead"` or `"max-autotune"`, CUDA graphs are replayed on an NVIDIA GPU;
                what they give is copied, since the next replay overwrites it.
        """
        parts = (
            (self.unet, ("forward",)),
            (self.vqvae, ("encode", "condition", "guess_motion", "decode")),
            (self.hint_model, ("forward", "refine")),
            (self.i2e, ("forward",)),
        )
        for network, names in parts:
            for name in names if network is not None else ():
                method = getattr(network, name)
                setattr(network, name, _Compiled(getattr(method, "compiled_from", method), options))

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop. Steps that are left are skipped, and their frames are not what they would be:
        those not begun yet are decoded from noise."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image_prev: FrameInput | EncodedFrames,
        image_next: FrameInput | EncodedFrames,
        num_inference_steps: int | None = None,
        num_frames: int = 1,
        hint_policy: str | None = None,
        hint_interval: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        force_not_quantize: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        times: Sequence[float | Fraction] | None = None,
        frames_per_batch: int = 1,
        recursive: bool | None = None,
    ):
        r"""
        Interpolate between two frames, or between the frames of several pairs. Each frame is made straight from the two that are
        given, whatever its instant, unless `recursive` says otherwise.

        Args:
            image_prev, image_next: the neighbouring frames, of any size but the same: PIL images, numpy arrays
                `(H, W, 3)`, tensors `(3, H, W)`, batches `(B, …)` or lists of these; arrays and tensors are uint8, or
                floating point in [0, 1]. Or what `encode_frames` made of them: a frame with two neighbours needs that once.
            num_inference_steps (`int`, *optional*): sampling steps per frame; the checkpoint's default if not given.
            num_frames (`int`, defaults to 1): frames to make between each pair, evenly spaced in time.
            hint_policy (`str`, *optional*): where motion hints come from; the checkpoint's default if not given.
                `"sampling"`: start hints at the first step, then re-extracted from the current guess of the middle frame
                (MA-Sampling). `"damped"`: the same, but each further extraction moves the hints less, so that
                their errors do not add up over many steps (`damp_hints`). `"start"`: start hints all along.
            hint_interval (`int`, *optional*): with `"sampling"` and `"damped"`, re-extract the hints after the first step and every
                `hint_interval` steps from there; the checkpoint's default if not given.
            generator (`torch.Generator` or one per pair, *optional*): makes the result repeatable.
            latents (`torch.Tensor` of shape `(B, F, C, h, w)`, or `(B, C, h, w)` for one frame, *optional*):
                noise to start from, of variance 1, for each frame in the order of the result; h and w are those of the
                padded frames' latents. Drawn from `generator` if not given.
            force_not_quantize (`bool`, defaults to `False`): decode latents as they are, not moved to their nearest codes;
                for ablations.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the final latents `(B, F, C, h, w)` of the padded frames,
                before quantization and times the autoencoder's `scaling_factor`; the last decoding is left out then.
            return_dict (`bool`): whether to return a [`MADiffPipelineOutput`] or a plain tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each
                step of each frame; returns a dict whose tensors replace the pipeline's, or None.
            callback_on_step_end_tensor_inputs: tensors to hand to it: `"latents"`, `"hints_prev"`, `"hints_next"`.
            times (list of `float` or `Fraction`, *optional*): instants of the frames to make, in place of `num_frames`: each between
                0 (the previous frame's) and 1 (the next one's), both excluded (from 1e-30 to what float32 tells from 1); frames come in the
                order given.
            frames_per_batch (`int`, defaults to 1): frames between each pair that the networks make at once; more take more memory,
                and less time on a GPU. With schedulers that draw noise at every step, the result depends on it.
            recursive (`bool`, *optional*): make frames at quarters and eighths of the way as middles of middles, with the frames
                half-way between their neighbours made first, as networks do best that were trained half-way alone; the
                checkpoint's default if not given.

        Examples:
            ```py
            >>> from diffusers.utils import load_image
            >>> from madiff_diffusers import MADiffPipeline

            >>> pipe = MADiffPipeline.from_pretrained("madiff-fast")
            >>> middle = pipe(load_image("prev.png"), load_image("next.png")).frames[0][0]
            >>> middle.save("middle.png")
            ```

        Returns:
            [`MADiffPipelineOutput`], or a tuple of its `frames`.

        Raises:
            ValueError, TypeError: for an argument out of its range; the message names it.
        """
        # 0. Resolve defaults from the checkpoint.
        config = self.config
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        sampling = Sampling(
            config.default_num_inference_steps if num_inference_steps is None else num_inference_steps,
            config.default_hint_policy if hint_policy is None else hint_policy,
            config.default_hint_interval if hint_interval is None else hint_interval,
            generator,
            force_not_quantize,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 1. Check inputs.
        check_scheduler(self.scheduler)
        device = self._execution_device
        prev = self._as_neighbours(image_prev, "image_prev", device)
        next_ = self._as_neighbours(image_next, "image_next", device)
        batch_size = len(prev.frames)
        check_same_size((batch_size, *prev.size), (len(next_.frames), *next_.size), ("image_prev", "image_next"))
        check_inputs(sampling, num_frames, times, frames_per_batch, output_type, batch_size)
        if times is None:
            times = [Fraction(number, int(num_frames) + 1) for number in range(1, int(num_frames) + 1)]
        # Of NumPy's numbers, Python's alone knows float64.
        instants = [Fraction(time if isinstance(time, Rational) else float(time)) for time in times]
        noise = dict(zip(instants, check_latents(latents, len(instants), prev.frames, self.vqvae)))
        plan = neighbours_of(instants, config.default_recursive if recursive is None else recursive)

        # 2. Make the frames, some of those between the same two at once.
        self._interrupt = False
        self.scheduler.set_timesteps(int(sampling.num_inference_steps), device="cpu")
        # Some schedulers (Heun's) call the network more than once a step.
        self._num_timesteps = len(self.scheduler.timesteps) * len(plan)
        frames: dict[Fraction, EncodedFrames] = {Fraction(0): prev, Fraction(1): next_}
        final_latents: dict[Fraction, torch.Tensor] = {}
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for (low, high), group in itertools.groupby(plan, key=plan.__getitem__):
                between = list(group)
                for first in range(0, len(between), frames_per_batch):
                    chosen = between[first : first + frames_per_batch]
                    latents_made, made = self._interpolate(
                        frames[low],
                        frames[high],
                        [float((time - low) / (high - low)) for time in chosen],
                        [noise.get(time) for time in chosen],
                        sampling,
                        progress_bar,
                        with_frames=output_type != "latent"
                        or any(time in pair for time in chosen for pair in plan.values()),
                    )
                    final_latents.update(zip(chosen, latents_made.split(batch_size)))
                    if made is not None:
                        frames.update(
                            (time, EncodedFrames(each, prev.size))
                            for time, each in zip(chosen, made.split(batch_size))
                        )

        # 3. Crop and convert.
        if output_type == "latent":
            result: Frames = torch.stack([final_latents[time] for time in instants], dim=1)  # [B,F,C,h,w]
        else:
            made = torch.stack([frames[time].frames for time in instants], dim=1)
            made = self.frame_processor.crop(made, prev.size)  # [B,F,3,H,W]
            result = self.frame_processor.postprocess(made, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (result,)
        return MADiffPipelineOutput(frames=result)

    @torch.no_grad()
    def encode_frames(self, images: FrameInput) -> EncodedFrames:
        """
        What the networks make of frames on their own. Given to the pipeline in the place of `image_prev` and `image_next`, it saves
        that work where frames are neighbours more than once, as in a video.

        Args:
            images: as `image_prev` of the pipeline.

        Raises:
            ValueError, TypeError: as the pipeline for `image_prev`.
        """
        neighbours = self._as_neighbours(images, "images", self._execution_device)
        FrameCoder(self.vqvae, self.tiling).encode(neighbours)
        return neighbours

    def _as_neighbours(self, images: FrameInput | EncodedFrames, name: str, device: torch.device) -> EncodedFrames:
        """Frames, padded and on the device; not encoded unless they were."""
        if isinstance(images, EncodedFrames):
            misfit = images.misfit(self.vqvae, self.frame_processor.multiple, device)
            if misfit is not None:
                raise ValueError(
                    f"`{name}` {misfit}, which does not fit this pipeline, of {str(self.vqvae.dtype).removeprefix('torch.')} on {device} and "
                    f"multiples of {self.frame_processor.multiple} pixels: encode it anew by `encode_frames`."
                )
            return images
        frames = self.frame_processor.to_tensor(images, name)  # [B,3,H,W]
        height, width = frames.shape[-2:]
        return EncodedFrames(self.frame_processor.pad(frames).to(device), (height, width))

    def _interpolate(
        self,
        prev: EncodedFrames,
        next_: EncodedFrames,
        times: list[float],
        noise: list[torch.Tensor | None],
        sampling: Sampling,
        progress_bar: Any,
        with_frames: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """MA-Sampling of frames at some instants between each of B pairs: their latents `(T * B, C, h, w)`, instant by instant, and where
        `with_frames` they themselves, `(T * B, 3, H, W)` in [-1, 1]."""
        batch_size, device, count = len(prev.frames), prev.frames.device, len(times)
        coder, hint_source = FrameCoder(self.vqvae, self.tiling, sampling.force_not_quantize), self.hints
        instants = torch.tensor(times, dtype=torch.float32).repeat_interleave(batch_size).to(device)  # [TB]
        # What the hints are extracted from: the motion of guesses, or guesses at this scale.
        extracts = sampling.hint_policy in ("sampling", "damped")
        finishing = hint_source if self.config.guess_motion and finishes(hint_source) else None
        scale = self.config.guess_scale if extracts and finishing is None else 1
        coarse_prev, coarse_next = coder.coarse(prev, scale), coder.coarse(next_, scale)

        # 1. Encode the neighbours, once for all steps.
        features, _ = coder.encode(prev, next_)

        # 2. Hints to begin with: nothing is known of the frames yet. News are about hints of full size.
        sides = (prev, next_) if coder.tells_news else (coarse_prev, coarse_next)
        if finishing is not None:
            hints = coder.motion_hints(finishing, prev, next_, times, instants)
        else:
            hints = together(
                [hint_source.start(sides[0].frames, sides[1].frames, time) for time in times]
            )  # [TB,K,H,W] twice
        frames_prev, frames_next = repeated(coarse_prev.frames, count), repeated(coarse_next.frames, count)

        # 3. Noise, at the end of the schedule.
        generator = sampling.generator
        # On the host, where schedulers look at timesteps in every step: a GPU would have to be waited for.
        self.scheduler.set_timesteps(int(sampling.num_inference_steps), device="cpu")
        shape = (batch_size, self.unet.config.out_channels, *features.pyramid[-1].shape[-2:])
        drawn = [
            randn_tensor(shape, generator=generator, device=device, dtype=torch.float32) if given is None else given
            for given in noise
        ]
        clean = torch.cat(drawn)
        latents = clean * self.scheduler.init_noise_sigma  # [TB,C,h,w]
        step_kwargs, unet_kwargs = {}, {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator * count if isinstance(generator, list) else generator
        if self.unet.config.class_embed_type == "timestep":
            unet_kwargs["class_labels"] = 1000 * instants
            embedding = self.unet.class_embedding
            if in_own_dtype not in embedding._forward_pre_hooks.values():
                embedding.register_forward_pre_hook(in_own_dtype)

        # 4. Denoise. Latents stay in float32 whatever the networks' dtype.
        for i, t in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                continue
            # 4.1 one step of the scheduler
            model_input = self.scheduler.scale_model_input(latents, t)
            unet_input = torch.cat([model_input.to(self.vqvae.dtype), coder.condition(prev, next_, hints)], dim=1)
            model_output = self.unet(unet_input.to(self.unet.dtype), t, return_dict=False, **unet_kwargs)[0].float()
            step = self.scheduler.step(model_output, t, latents, **step_kwargs)
            clean = clean_latents(self.scheduler, step, model_output, model_input, t)  # ẑ_0, [TB,C,h,w]
            latents = step.prev_sample

            # 4.2 hints from the frames that these latents stand for; after the last step, news would be about other hints
            last = i == len(self.scheduler.timesteps) - 1
            if extracts and i % sampling.hint_interval == 0 and not (coder.tells_news and last):
                number = 1 + i // sampling.hint_interval
                damped = sampling.hint_policy == "damped" and number > 1
                if finishing is not None:
                    refined = coder.motion_hints(finishing, prev, next_, times, instants, hints, clean)
                    hints = damp_hints(hints, refined, number) if damped else refined
                    del refined
                else:
                    scale = prev.frames.shape[-1] // frames_prev.shape[-1]
                    known = coder.resize_hints(hints, frames_prev.shape[-2:])
                    coarse_latents = F.avg_pool2d(clean, scale)
                    if coder.tells_news:  # which are as much smaller, too
                        coarse_latents = coarse_latents / scale
                    guess = coder.decode(coarse_prev, coarse_next, coarse_latents, known, instants)
                    size = hints[0].shape[-2:]
                    smaller = known[0].shape[-2:] != size
                    # Hints are the largest tensors here: those that nothing reads any more go before others come.
                    before = (hints, known) if damped or smaller else None
                    continued = (known,) if goes_on(hint_source) else ()
                    del hints, known
                    refined = hint_source.from_guess(frames_prev, guess, frames_next, *continued)
                    hints = coder.resize_hints(refined, size) if before is None else coder.detailed(*before, refined)
                    if before is not None and damped:
                        hints = damp_hints(before[0], hints, number)
                    del refined, before, continued

            # 4.3 the caller's turn, frame by frame
            if sampling.callback is not None:
                tensors = {"latents": latents, "hints_prev": hints[0], "hints_next": hints[1]}
                untouched = latents.clone() if last else latents
                replaced = call_back(sampling.callback, sampling.callback_inputs, self, i, t, tensors, batch_size)
                hints = (replaced.get("hints_prev", hints[0]), replaced.get("hints_next", hints[1]))
                latents = replaced.get("latents", latents)
                if last and not torch.equal(latents, untouched):  # replaced, or written into
                    clean = latents
            progress_bar.update(count)

        # 5. The frames.
        return clean, coder.decode(prev, next_, clean, hints, instants) if with_frames else None


_HOOKED = apply_forward_hook(lambda network: None).__code__  # of every method that it wraps


class _Compiled:
    """`torch.compile` of a method, `compiled_from`, in its network's place of it. With CUDA graphs, what it gives is copied: the next replay
    writes into the same memory, and features of a frame are read by more than one pair."""

    def __init__(self, method: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, method)
        self.compiled_from, self._options = method, options
        self._owner: Any = getattr(method, "__self__", None)
        # What is compiled anew for other shapes is counted by function, and all that `apply_forward_hook` wraps would be one and the same.
        self._is_hooked = inspect.ismethod(method) and method.__func__.__code__ is _HOOKED
        if self._is_hooked:
            method = types.MethodType(inspect.unwrap(method.__func__), self._owner)  # type: ignore[attr-defined]
        self._call = torch.compile(method, **options)
        self._replays = options.get("mode") in ("reduce-overhead", "max-autotune")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook: Any = getattr(self._owner, "_hf_hook", None)
        if self._is_hooked and hasattr(hook, "pre_forward"):
            hook.pre_forward(self._owner)
        result = self._call(*args, **kwargs)
        return _copied(result) if self._replays else result

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Compiled":
        # A network's copy computes with weights of its own.
        return _Compiled(copy.deepcopy(self.compiled_from, memo), self._options)


def _copied(value: Any) -> Any:
    """Tensors copied, alone or in tuples, lists and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{each.name: _copied(getattr(value, each.name)) for each in dataclasses.fields(value)}
        )
    if isinstance(value, (tuple, list)):
        copies = [_copied(each) for each in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)  # a named tuple has fields
    return value
