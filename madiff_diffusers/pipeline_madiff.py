# SPDX-License-Identifier: Apache-2.0
"""MA-Sampling: latent diffusion that re-reads the motion from its own guess at every step (MADiff, arXiv 2404.13534)."""

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Optional

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput, logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import randn_tensor


# This file travels with checkpoints, to where nobody installed what it needs.
_REQUIREMENTS = {"accelerate": "accelerate", "einops": "einops"}
_missing = [package for module, package in _REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
if _missing:
    raise ImportError(f"MADiffPipeline needs packages that are not installed: pip install {' '.join(_missing)}")

from .hub_repository import download_repository, local_checkpoint, replaced_weights, upload_repository  # noqa: E402
from .image_processor import OUTPUT_TYPES, FrameInput, FrameProcessor, check_same_size  # noqa: E402
from .model_cards import PLACEHOLDER, model_card  # noqa: E402
from .motion_hints import (  # noqa: E402
    HintPair,
    HintSource,
    ModelHints,
    build_hint_source,
    check_hint_source,
    damp_hints,
    describe_hint_source,
    hint_parts,
    is_registered,
    load_hint_code,
    register_hint_source,  # noqa: F401, for the lines that a saved copy of this file ends with
)
from .precision import fastest_dtype  # noqa: E402
from .tiling import Tiling  # noqa: E402


HINT_POLICIES = ("sampling", "damped", "start", "neighbours", "none")

# Files with the code of components, by their stems.
_COMPONENT_MODULES = ("eventgan", "motion_flow", "vq_magan")

logger = logging.get_logger(__name__)


def _check_count(value: Any, name: str) -> None:
    """NumPy's integers count, too."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, but is {value!r}.")


def _check_scheduler(scheduler: Any) -> None:
    needed = ("scale_model_input", "init_noise_sigma", "alphas_cumprod")
    if not all(hasattr(scheduler, name) for name in needed) or "prediction_type" not in scheduler.config:
        raise ValueError(
            "`scheduler` must be one of Diffusers' with a noise schedule in `alphas_cumprod` and a `prediction_type`, such as DDIMScheduler, "
            f"but is {type(scheduler).__name__}; flow matching needs a network trained for it."
        )


@dataclass
class MADiffPipelineOutput(BaseOutput):
    """
    Args:
        frames: the frames between the neighbours, in the order of time. For `output_type="pil"` a list of PIL images
            for each pair; for `"np"` an array `(B, F, H, W, 3)` and for `"pt"` a tensor `(B, F, 3, H, W)`, float32 in
            [0, 1]; for `"latent"` a tensor `(B, F, C, h, w)`.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


@dataclass
class EncodedFrames:
    """
    Frames as neighbours, with what the networks make of each on its own, once for all that it is next to. Made by
    [`MADiffPipeline.encode_frames`].

    Args:
        frames (`torch.Tensor` of shape `(B, 3, H', W')`): padded, in [-1, 1].
        size (`tuple` of `int`): height and width before padding.
        latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): before quantisation, times the scaling factor; None where
            the autoencoder's latents are news, which a frame alone has not.
        features (`tuple` of `torch.Tensor`, *optional*): see [`VQMAGANEncoderOutput`].
        coarse ([`EncodedFrames`], *optional*): the same frames at the size of guesses, where that is another.
    """

    frames: torch.Tensor
    size: tuple[int, int]
    latents: torch.Tensor | None = None
    features: tuple[torch.Tensor, ...] | None = None
    coarse: Optional["EncodedFrames"] = None


def _neighbours_of(times: list[Fraction], recursive: bool) -> dict[Fraction, tuple[Fraction, Fraction]]:
    """Between which two frames each instant's is made, in an order in which these are there; 0 and 1 are given."""
    plan: dict[Fraction, tuple[Fraction, Fraction]] = {}

    def add(time: Fraction) -> None:
        if time in plan or time in (0, 1):
            return
        between = (Fraction(0), Fraction(1))
        if recursive and time.denominator in (4, 8):
            step = Fraction(1, time.denominator)
            between = (time - step, time + step)
        for neighbour in between:
            add(neighbour)
        plan[time] = between

    for time in times:
        add(time)
    return plan


class MADiffPipeline(DiffusionPipeline):
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
        hint_source (`str`): `"events"` (the paper's), `"flow"`, `"fine_flow"`, `"model"`, a registered name, `"MODULE:CLASS"`, or several of these joined
            by `+`, see [`build_hint_source`]. With events among others and no `i2e`, event hints are zeros.
        default_num_inference_steps (`int`): what `num_inference_steps=None` stands for.
        default_hint_interval (`int`): what `hint_interval=None` stands for.
        default_hint_policy (`str`): what `hint_policy=None` stands for; `"sampling"` is the paper's.
        guess_scale (`int`): guesses of the frame, and the hints from them, are made of frames this many times smaller (1, 2, 4 or 8);
            only the result is decoded at full size. 1 is the paper's.
        event_scale (`int`): event hints are extracted from frames this many times smaller (1, 2, 4 or 8); 1 is the paper's.
        default_recursive (`bool`): what `recursive=None` stands for.
        hint_settings (`dict`, *optional*): arguments of the constructors of hint sources that are not this package's, by their names in
            `hint_source`.

    Raises:
        ValueError: for a setting out of its range, or parts that do not fit together.
    """

    model_cpu_offload_seq = "vqvae->unet->i2e->hint_model"
    _optional_components = ["i2e", "hint_model"]
    # The codebook's weight is read without a forward pass of its own, which sequential offloading waits for.
    _exclude_from_cpu_offload = ["vqvae"]
    _callback_tensor_inputs = ["latents", "hints_prev", "hints_next"]
    # The folder that this was loaded from, and the repository if it is one's.
    _source: tuple[Path, str | None] | None = None

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
    ):
        super().__init__()
        for name, scale in (("guess_scale", guess_scale), ("event_scale", event_scale)):
            if scale not in (1, 2, 4, 8):
                raise ValueError(f"`{name}` must be 1, 2, 4 or 8, but is {scale!r}.")
        for name, value in (
            ("default_num_inference_steps", default_num_inference_steps),
            ("default_hint_interval", default_hint_interval),
        ):
            _check_count(value, name)
        if default_hint_policy not in HINT_POLICIES:
            raise ValueError(
                f"`default_hint_policy` must be one of {', '.join(HINT_POLICIES)}, but is {default_hint_policy!r}."
            )
        _check_scheduler(scheduler)
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
        )
        for network in (vqvae, unet, i2e, hint_model):
            if network is not None:  # convolutions of few channels are up to twice as fast in this layout
                network.to(memory_format=torch.channels_last)
        self._hints: HintSource | None = None
        self._built_hints: tuple[tuple, HintSource] | None = None  # what they were built of, and they
        # Set by `enable_tiling`.
        self.tiling: Tiling | None = None
        latent_channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
        self._tells_news = bool(getattr(vqvae.config, "news_latents", False))
        expected = latent_channels + vqvae.condition_channels
        if vqvae.config.hint_channels != self.hints.hint_channels or unet.config.in_channels != expected:
            raise ValueError(
                f"`hint_source={hint_source!r}` gives {self.hints.hint_channels} channels towards each neighbour, so "
                f"`vqvae` must have as many `hint_channels` (it has {vqvae.config.hint_channels}) and `unet` "
                f"{expected} `in_channels` (it has {unet.config.in_channels})."
            )
        # The U-Net halves the latents' size between its blocks; frames are padded so that it always can.
        unet_factor = 2 ** (len(unet.config.block_out_channels) - 1)
        self.frame_processor = FrameProcessor(vqvae.downsample_factor * max(unet_factor, guess_scale))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MADiffPipeline":
        """
        As [`~DiffusionPipeline.from_pretrained`], from safetensors alone. The names of the package's own checkpoints load without a
        network, unless a folder has that name. Code that lies beside the weights is not run: this package's takes its place.

        `dtype="auto"` loads the weights in the dtype that is fastest where they will run (`fastest_dtype`): on a CUDA GPU
        if there is one, else on the CPU.

        Raises:
            ValueError: for `use_safetensors=False`, an index that names other files, or, without `trust_remote_code=True`, code that
                is not this package's.
            OSError: if there is no such checkpoint.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors` must not be False: pickled weights are not read.")
        for name in ("torch_dtype", "dtype"):
            if kwargs.get(name) == "auto":
                kwargs[name] = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
        if kwargs.get("i2e", False) is None:
            logger.warning("`i2e` is None: event hints are zeros.")
        name, repository = str(pretrained_model_name_or_path), None
        folder = local_checkpoint(pretrained_model_name_or_path)
        if folder is None:
            folder, repository = Path(cls.download(name, **kwargs)), name
        elif folder != Path(name) and kwargs.get("variant") == "fp16":
            del kwargs["variant"]  # a checkpoint that comes with the package has one set of weights, which is that
        if __package__ == "madiff_diffusers":
            # Diffusers loads components only from modules imported before.
            for module in _COMPONENT_MODULES:
                importlib.import_module(f".{module}", __package__)
            if "hint_source" not in kwargs:
                cls._take_hint_code(folder, repository, **kwargs)
        for index in folder.glob("*/*.index*.json"):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if not all(str(shard).endswith(".safetensors") for shard in shards):
                raise ValueError(f"{index} must name .safetensors files alone: pickled weights are not read.")
        pipeline = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
        pipeline._source = folder.resolve(), repository
        pipeline.register_to_config(_name_or_path=name)
        return pipeline

    @classmethod
    def _take_hint_code(cls, folder: Path, repository: str | None, trust_remote_code: bool = False, **kwargs) -> None:
        """Make the hint sources known whose code lies beside a checkpoint's weights.

        Raises:
            ValueError: if there are any, and they are neither registered nor trusted.
        """
        path = folder / cls.config_name
        name = json.loads(path.read_text(encoding="utf-8")).get("hint_source") if path.is_file() else None
        if not isinstance(name, str) or ":" not in name or is_registered(name):
            return
        if not trust_remote_code:
            raise ValueError(
                f"The checkpoint's hint source is {name!r}, code that is not this package's. `trust_remote_code=True` runs what lies "
                "beside the weights; `register_hint_source` takes a class of yours in its place."
            )
        parts = [part for part in name.split("+") if not is_registered(part)]
        if repository is not None:
            folder = Path(cls.download(repository, code=[f"{part.partition(':')[0]}.py" for part in parts], **kwargs))
        for part in parts:
            load_hint_code(folder, part)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "MADiffPipeline":
        """As [`~DiffusionPipeline.from_pipe`]."""
        # Diffusers hands on only parts of the very class that a constructor names; ours must take them wherever their code lies.
        parts = {name: part for name, part in pipeline.components.items() if name in cls._get_signature_keys(cls)[0]}
        made = super().from_pipe(pipeline, **{**parts, **kwargs})
        made._hints = getattr(pipeline, "_hints", None)
        return made

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """A saved pipeline's index. Where this is the package's own code, what it says of code beside the weights is read as the
        package's modules."""
        index = super()._dict_from_json_file(json_file)
        if __package__ == "madiff_diffusers":
            if index.get("_class_name") == [Path(__file__).stem, "MADiffPipeline"]:
                index["_class_name"] = cls.__name__
            for name, entry in index.items():
                if isinstance(entry, list) and entry[0] in _COMPONENT_MODULES:
                    index[name] = [f"{__package__}.{entry[0]}", *entry[1:]]
        return index

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str | Path:
        """As [`~DiffusionPipeline.download`]; where this is the package's own code, without a repository's code."""
        if __package__ != "madiff_diffusers":
            return super().download(pretrained_model_name, **kwargs)
        names = ("variant", "cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return download_repository(pretrained_model_name, code=kwargs.get("code", ()), **given)

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Write `model_index.json`, which names code by the files that `save_pretrained` puts beside the weights."""
        super().save_config(save_directory, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"] = [Path(__file__).stem, "MADiffPipeline"]
        index.pop("_name_or_path", None)  # a place on this machine
        index["hint_source"], settings, _ = self._describe_hints()
        index["hint_settings"] = settings or None
        for name, entry in index.items():
            if name in self.components and entry[0] is not None:
                origin, _, module = entry[0].rpartition(".")
                if module in _COMPONENT_MODULES and origin.split(".")[0] in ("madiff_diffusers", "diffusers_modules"):
                    index[name] = [module, *entry[1:]]
                elif entry[0].split(".")[0] not in ("diffusers", "transformers"):
                    logger.warning(f"`{name}` loads only where {entry[0]} was imported: its code is not saved.")
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        repo_id: str | None = None,
        **hub,
    ) -> None:
        """
        Save a folder that is a whole repository of the Hub. Beside weights and configurations, it holds the code: the pipeline's at
        its root, each component's in the component's folder. `DiffusionPipeline.from_pretrained` loads it, with
        `trust_remote_code=True`, where nothing but Diffusers and what the code imports is installed; what is saved of a subclass
        is a `MADiffPipeline` there.

        A licence for the code and a model card are added where the folder has none: the card of the checkpoint that this one was
        loaded from if it is still the same, else one that claims nothing. A card whose header has scores gives way to the latter if
        the weights are others now, and becomes `.README.previous.md`.

        Args:
            save_directory: folder to write into; made if there is none. What is there stays until all is written, variants of other
                names and other files beyond that.
            safe_serialization: True; weights are written as safetensors alone.
            variant: name of this precision or kind of weights, such as `"fp16"`, in their files' names.
            max_shard_size: bytes (or a text like `"5GB"`) above which a component's weights become several files.
            push_to_hub: upload the folder afterwards.
            use_flashpack: False; see `safe_serialization`.
            repo_id: repository for that; the folder's name if not given.
            hub: further arguments of `push_to_hub`.

        Raises:
            ValueError: for `safe_serialization=False`, or a source on `hints` that could not be built again.
            OSError: if the folder cannot be written, or the upload fails.
        """
        if not safe_serialization or use_flashpack:
            raise ValueError(
                "`safe_serialization` must be True and `use_flashpack` False: weights are written as safetensors alone."
            )
        self._describe_hints()
        if hub and not push_to_hub:
            raise TypeError(f"`save_pretrained` takes {', '.join(hub)} with `push_to_hub=True` alone.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            saved = Path(temporary)
            super().save_pretrained(saved, variant=variant, max_shard_size=max_shard_size)
            for path in saved.glob("*/config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None):  # a place on this machine
                    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for code in (__file__, *get_relative_import_files(__file__)):
                shutil.copyfile(code, saved / Path(code).name)
            self._add_hint_code(saved)
            licence = Path(__file__).with_name("LICENSE")
            if licence.is_file() and not (folder / "LICENSE").exists():
                shutil.copyfile(licence, saved / "LICENSE")
            self._write_card(saved, folder / "README.md", variant)

            names = [path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()]
            before = [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if saved not in path.parents]
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(saved / name, folder / name)
            for name in replaced_weights(before, names):
                (folder / name).unlink()
        if push_to_hub:
            upload_repository(folder, repo_id or folder.resolve().name, **hub)

    def _describe_hints(self) -> tuple[str, dict[str, dict[str, Any]], list[type]]:
        known = None
        if self._hints is None:
            settings = self.config.hint_settings or {}
            known = [settings.get(part, {}) for part in hint_parts(self.config.hint_source)]
        return describe_hint_source(self.hints, self.i2e, known, self.hint_model)

    def _add_hint_code(self, saved: Path) -> None:
        """Put the files of hint sources that are not this package's beside the pipeline's, which imports them there."""
        mark = "\n\n# What this checkpoint's hints come from.\n"
        pipeline_code = saved / Path(__file__).name
        code = pipeline_code.read_text(encoding="utf-8").partition(mark)[0]
        lines, files = [], {}
        for kind in self._describe_hints()[2]:
            file = Path(inspect.getfile(kind))
            if files.setdefault(file.name, file.read_bytes()) != file.read_bytes():
                raise ValueError(
                    f"A checkpoint cannot hold two hint sources from different files of the name {file.name}."
                )
            (saved / file.name).write_bytes(files[file.name])
            lines.append(f"from .{file.stem} import {kind.__name__}  # noqa: E402\n")
            lines.append(f'register_hint_source("{file.stem}:{kind.__name__}", {kind.__name__})\n')
        pipeline_code.write_text(code + (mark + "".join(lines) if lines else ""), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        variant: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
        **hub,
    ) -> str:
        """
        Save into a temporary folder and upload it in one commit. A model card that the repository has stays.

        Args:
            repo_id: `user/name`; made if there is no such repository.
            variant, safe_serialization, max_shard_size: see `save_pretrained`.
            hub: `private`, `revision` (a branch), `commit_message`, `create_pr` and `token`.

        Returns:
            address of the commit, or of the pull request.

        Raises:
            OSError: if the Hub cannot be reached or refuses; the pipeline is as it was.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return upload_repository(folder, repo_id, keep_card=True, **hub)

    def _write_card(self, saved: Path, card: Path, variant: str | None) -> None:
        """Write the card for a folder, in place of what is there if that tells scores of other weights."""
        # A variant is of the weights beside it.
        if card.exists() and (variant is not None or not self._tells_scores(card)):
            return
        source, repository = self._source or (None, None)
        same = source is not None and (source / "README.md").is_file() and self._equals(source)
        if card.exists():
            if same:
                return
            os.replace(card, card.with_name(".README.previous.md"))
            logger.warning(f"{card} tells scores of other weights; it is {card.with_name('.README.previous.md')} now.")
        if same:
            text = (source / "README.md").read_text(encoding="utf-8")
            text = text.replace(f'from_pretrained("{repository}"', f'from_pretrained("{PLACEHOLDER}"')
            (saved / "README.md").write_text(text, encoding="utf-8")
            for picture in source.glob("examples/*.png"):  # which the card shows
                (saved / "examples").mkdir(exist_ok=True)
                shutil.copyfile(picture, saved / "examples" / picture.name)
        else:
            alone = variant if not any(card.parent.glob("*/diffusion_pytorch_model*.safetensors")) else None
            model_card(self, variant=alone, base_model=repository).save(saved / "README.md")

    @staticmethod
    def _tells_scores(card: Path) -> bool:
        return "\nmodel-index:" in card.read_text(encoding="utf-8").partition("\n---")[0]

    def _equals(self, checkpoint: Path) -> bool:
        """Whether this is, value by value, what a folder holds."""
        if __package__ != "madiff_diffusers" or type(self) is not MADiffPipeline or self._hints is not None:
            return False
        try:
            other = MADiffPipeline.from_pretrained(checkpoint)
        except Exception:  # of whatever kind: it is not known to be the same
            return False

        def settings(config: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in config.items() if not key.startswith("_")}

        def equal(part: Any, twin: Any) -> bool:
            if type(part) is not type(twin) or part is not None and settings(part.config) != settings(twin.config):
                return False
            if not isinstance(part, torch.nn.Module):
                return True
            pairs = zip(part.state_dict().values(), twin.state_dict().values())
            return all(torch.equal(mine.cpu().float(), theirs.float()) for mine, theirs in pairs)

        return settings(self.config) == settings(other.config) and all(
            equal(part, getattr(other, name)) for name, part in self.components.items()
        )

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
        parts = (self.config.hint_source, self.i2e, self.tiling, self.config.event_scale, self.hint_model)
        if self._built_hints is None or any(old is not new for old, new in zip(self._built_hints[0], parts)):
            channels = self.vqvae.config.hint_channels
            self._built_hints = parts, build_hint_source(*parts[:3], self.config.hint_settings, channels, *parts[3:])
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

    def enable_tiling(self, tile_pixels: int = 1024 * 1024) -> None:
        """
        Encode, decode and extract event hints by overlapping tiles, blended, where frames have more pixels: memory then grows little
        with the frames' size. Optical flow and the denoiser see whole frames.

        Args:
            tile_pixels (`int`, defaults to 1024 * 1024): pixels of a tile.

        Raises:
            ValueError: if that is not positive.
        """
        if tile_pixels < 1:
            raise ValueError(f"`tile_pixels` must be positive, but is {tile_pixels}.")
        self.tiling = Tiling(tile_pixels, self.frame_processor.multiple)

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.tiling = None

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop. Steps that are left are skipped, and their frames are not what they would be:
        those not begun yet are decoded from noise."""
        return self._interrupt

    def check_inputs(
        self,
        num_inference_steps: Any,
        num_frames: Any,
        times: Any,
        frames_per_batch: Any,
        hint_policy: str,
        hint_interval: Any,
        output_type: str,
        generator: Any,
        batch_size: int,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("hint_interval", hint_interval),
            ("num_frames", num_frames),
            ("frames_per_batch", frames_per_batch),
        ):
            _check_count(value, name)
        if times is not None:
            if num_frames != 1:
                raise ValueError(
                    f"Either `num_frames` or `times` can be given, but both are: {num_frames!r} and {times!r}."
                )
            given = list(times) if isinstance(times, (Sequence, np.ndarray)) and not isinstance(times, str) else []
            if not given or not all(isinstance(time, Real) and 0 < time < 1 for time in given):  # NaN fails, too
                raise ValueError(
                    f"`times` must be a list of numbers between 0 and 1, both excluded, but is {times!r}."
                )
            if len(set(map(float, given))) < len(given):
                raise ValueError(f"`times` must not repeat an instant, but is {times!r}.")
        if hint_policy not in HINT_POLICIES:
            raise ValueError(f"`hint_policy` must be one of {', '.join(HINT_POLICIES)}, but is {hint_policy!r}.")
        if output_type not in (*OUTPUT_TYPES, "latent"):
            raise ValueError(
                f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, latent, but is {output_type!r}."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` as a list must hold one generator per pair ({batch_size}), but holds {len(generator)}."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, but has {unknown}."
            )

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
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        times: Sequence[float | Fraction] | None = None,
        frames_per_batch: int = 1,
        recursive: bool | None = None,
    ) -> MADiffPipelineOutput | tuple:
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
                their errors do not add up over many steps (`damp_hints`). For ablations: `"start"`, start hints all along; `"neighbours"`, what the
                two neighbours tell without a guess; `"none"`, zeros.
            hint_interval (`int`, *optional*): with `"sampling"` and `"damped"`, re-extract the hints after the first step and every
                `hint_interval` steps from there; the checkpoint's default if not given.
            generator (`torch.Generator` or one per pair, *optional*): makes the result repeatable.
            latents (`torch.Tensor` of shape `(B, F, C, h, w)`, or `(B, C, h, w)` for one frame, *optional*):
                noise to start from, of variance 1, for each frame in the order of the result; h and w are those of the
                padded frames' latents. Drawn from `generator` if not given.
            force_not_quantize (`bool`, defaults to `False`): decode latents as they are, not moved to their nearest codes;
                for ablations.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the final latents `(B, F, C, h, w)` of the padded frames,
                before quantisation and times the autoencoder's `scaling_factor`; the last decoding is left out then.
            return_dict (`bool`): whether to return a [`MADiffPipelineOutput`] or a plain tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each
                step of each frame; returns a dict whose tensors replace the pipeline's, or None.
            callback_on_step_end_tensor_inputs: tensors to hand to it: `"latents"`, `"hints_prev"`, `"hints_next"`.
            times (list of `float` or `Fraction`, *optional*): instants of the frames to make, in place of `num_frames`: each between
                0 (the previous frame's) and 1 (the next one's), both excluded; frames come in the order given.
            frames_per_batch (`int`, defaults to 1): frames between each pair that the networks make at once; more take more memory,
                and less time on a GPU. With schedulers that draw noise at every step, the result depends on it.
            recursive (`bool`, *optional*): make frames at quarters and eighths of the way as middles of middles, with the frames
                half-way between their neighbours made first, as networks do best that were trained half-way alone; the
                checkpoint's default if not given.

        Returns:
            [`MADiffPipelineOutput`], or a tuple of its `frames`.

        Raises:
            ValueError, TypeError: for an argument out of its range; the message names it.
        """
        # 0. Resolve defaults from the checkpoint.
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if hint_interval is None:
            hint_interval = self.config.default_hint_interval
        if hint_policy is None:
            hint_policy = self.config.default_hint_policy
        if recursive is None:
            recursive = self.config.default_recursive

        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs.
        _check_scheduler(self.scheduler)
        prev = self._as_neighbours(image_prev, "image_prev")
        next_ = self._as_neighbours(image_next, "image_next")
        batch_size = len(prev.frames)
        check_same_size((batch_size, *prev.size), (len(next_.frames), *next_.size), ("image_prev", "image_next"))
        self.check_inputs(
            num_inference_steps,
            num_frames,
            times,
            frames_per_batch,
            hint_policy,
            hint_interval,
            output_type,
            generator,
            batch_size,
            callback_on_step_end_tensor_inputs,
        )
        num_inference_steps, num_frames = int(num_inference_steps), int(num_frames)
        if times is None:
            times = [Fraction(number, num_frames + 1) for number in range(1, num_frames + 1)]
        times = [Fraction(time) for time in times]
        noise = self._check_latents(latents, len(times), prev.frames)  # [B,F,C,h,w] or None
        plan = _neighbours_of(times, recursive)

        # 2. Make the frames, some of those between the same two at once.
        self._interrupt = False
        self.scheduler.set_timesteps(num_inference_steps, device=prev.frames.device)
        # Some schedulers (Heun's) call the network more than once a step.
        self._num_timesteps = len(self.scheduler.timesteps) * len(plan)
        frames: dict[Fraction, EncodedFrames] = {Fraction(0): prev, Fraction(1): next_}
        final_latents: dict[Fraction, torch.Tensor] = {}
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for (low, high), between in itertools.groupby(plan, key=plan.get):
                between = list(between)
                for first in range(0, len(between), frames_per_batch):
                    chosen = between[first : first + frames_per_batch]
                    given = [
                        None if noise is None or time not in times else noise[:, times.index(time)] for time in chosen
                    ]
                    latents_made, made = self._interpolate(
                        frames[low],
                        frames[high],
                        [float((time - low) / (high - low)) for time in chosen],
                        num_inference_steps,
                        hint_policy,
                        hint_interval,
                        generator,
                        given,
                        force_not_quantize,
                        callback_on_step_end,
                        callback_on_step_end_tensor_inputs,
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
            result = torch.stack([final_latents[time] for time in times], dim=1)  # [B,F,C,h,w]
        else:
            result = torch.stack([frames[time].frames for time in times], dim=1)
            result = self.frame_processor.crop(result, prev.size)  # [B,F,3,H,W]
            result = self.frame_processor.postprocess(result, output_type)
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
        neighbours = self._as_neighbours(images, "images")
        self._encode(neighbours)
        return neighbours

    def _as_neighbours(self, images: FrameInput | EncodedFrames, name: str) -> EncodedFrames:
        """Frames, padded and on the device; not encoded unless they were."""
        if isinstance(images, EncodedFrames):
            return images
        frames = self.frame_processor.to_tensor(images, name)  # [B,3,H,W]
        return EncodedFrames(self.frame_processor.pad(frames).to(self._execution_device), tuple(frames.shape[-2:]))

    def _encode(self, *neighbours: EncodedFrames) -> None:
        """Encode those that are not encoded yet, together."""
        left = [each for each in neighbours if each.features is None]
        if left:
            frames = torch.cat([each.frames for each in left])

            def encode(frames: torch.Tensor) -> list[torch.Tensor]:
                encoded = self.vqvae.encode(frames)
                return [*encoded.features, *([] if encoded.latents is None else [encoded.latents])]

            made = encode(frames) if self.tiling is None else self.tiling(encode, [frames], *frames.shape[-2:])
            if not self._tells_news:
                latents = (made.pop() * self.vqvae.config.scaling_factor).chunk(len(left))
                for each, own in zip(left, latents):
                    each.latents = own
            for each, own in zip(left, zip(*(feature.chunk(len(left)) for feature in made))):
                each.features = own

    def _coarse(self, each: EncodedFrames, scale: int) -> EncodedFrames:
        """The same frames, `scale` times smaller; made once."""
        if scale == 1:
            return each
        if each.coarse is None:
            each.coarse = EncodedFrames(
                F.avg_pool2d(each.frames, scale), (each.size[0] // scale, each.size[1] // scale)
            )
        return each.coarse

    def _interpolate(
        self,
        prev: EncodedFrames,
        next_: EncodedFrames,
        times: list[float],
        num_inference_steps: int,
        hint_policy: str,
        hint_interval: int,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: list[torch.Tensor | None],
        force_not_quantize: bool,
        callback: Callable | None,
        callback_inputs: Sequence[str],
        progress_bar: Any,
        with_frames: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """MA-Sampling of frames at some instants between each of B pairs: their latents `(T * B, C, h, w)`, instant by instant, and where
        `with_frames` they themselves, `(T * B, 3, H, W)` in [-1, 1]."""
        batch_size, device, dtype = prev.frames.shape[0], prev.frames.device, self.vqvae.dtype
        hint_source, count = self.hints, len(times)
        instants = torch.tensor(times, dtype=torch.float32).repeat_interleave(batch_size).to(device)  # [TB]
        # What the hints are extracted from: guesses at this scale.
        extracts = hint_policy in ("sampling", "damped")
        coarse_prev, coarse_next = (
            self._coarse(each, self.config.guess_scale if extracts else 1) for each in (prev, next_)
        )

        def for_each_instant(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if count == 1 else tensor.repeat(count, 1, 1, 1)  # [B,…] to [TB,…]

        # 1. Encode the neighbours, once for all steps.
        self._encode(prev, next_)
        scaling_factor = self.vqvae.config.scaling_factor
        features_prev, features_next = ([for_each_instant(each) for each in side.features] for side in (prev, next_))

        def condition(hints: HintPair) -> torch.Tensor:
            """What the denoiser sees beside the noisy latents, `(TB, …, h, w)`."""
            if self._tells_news:
                return self.vqvae.condition(features_prev, features_next, *hints)
            small = [
                self.vqvae.resize_hints(each, prev.latents.shape[-2:]).to(dtype) for each in hints
            ]  # [TB,K,h,w] twice
            return torch.cat([for_each_instant(torch.cat([prev.latents, next_.latents], dim=1)), *small], dim=1)

        def decode(prev: EncodedFrames, next_: EncodedFrames, latents: torch.Tensor, hints: HintPair) -> torch.Tensor:
            self._encode(prev, next_)
            features = [for_each_instant(each) for each in (*prev.features, *next_.features)]
            images = [(latents / scaling_factor).to(dtype), *hints, *features]

            def decode_images(latents, hints_prev, hints_next, *features):
                features_prev, features_next = features[: len(prev.features)], features[len(prev.features) :]
                neighbours = (features_prev, features_next, hints_prev, hints_next)
                return [self.vqvae.decode(latents, *neighbours, force_not_quantize, time=instants).sample]

            size = prev.frames.shape[-2:]
            if self.tiling is None:
                (decoded,) = decode_images(*images)
            else:
                # Warps reach as far as the hints tell.
                scale = size[0] / hints[0].shape[-2]
                reach = (
                    max(each[:, -2:].abs().max().item() for each in hints) * scale
                    if self.vqvae.config.offset_hints
                    else 0.0
                )
                (decoded,) = self.tiling(decode_images, images, *size, reach)
            return decoded.float().clamp(-1, 1)

        # 2. Hints to begin with: nothing is known of the frames yet. News are about hints of full size.
        frames_prev, frames_next = (
            (prev.frames, next_.frames) if self._tells_news else (coarse_prev.frames, coarse_next.frames)
        )
        if hint_policy == "neighbours":
            hints = tuple(for_each_instant(each) for each in hint_source.from_neighbours(frames_prev, frames_next))
        else:
            starts = [hint_source.start(frames_prev, frames_next, time) for time in times]
            hints = starts[0] if count == 1 else tuple(torch.cat(each) for each in zip(*starts))  # [TB,K,H,W] twice
        if hint_policy == "none":
            hints = tuple(torch.zeros_like(each) for each in hints)
        frames_prev, frames_next = for_each_instant(coarse_prev.frames), for_each_instant(coarse_next.frames)

        # 3. Noise, at the end of the schedule.
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (batch_size, self.unet.config.out_channels, *features_prev[-1].shape[-2:])
        drawn = [
            randn_tensor(shape, generator=generator, device=device, dtype=torch.float32) if given is None else given
            for given in noise
        ]
        clean_latents = noise = torch.cat(drawn)
        latents = noise * self.scheduler.init_noise_sigma  # [TB,C,h,w]
        step_kwargs, unet_kwargs = {}, {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator * count if isinstance(generator, list) else generator
        if self.unet.config.class_embed_type == "timestep":
            unet_kwargs["class_labels"] = 1000 * instants

        # 4. Denoise. Latents stay in float32 whatever the networks' dtype.
        for i, t in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                continue
            # 4.1 one step of the scheduler
            model_input = self.scheduler.scale_model_input(latents, t)
            unet_input = torch.cat([model_input.to(dtype), condition(hints)], dim=1)
            model_output = self.unet(unet_input.to(self.unet.dtype), t, return_dict=False, **unet_kwargs)[0].float()
            step = self.scheduler.step(model_output, t, latents, **step_kwargs)
            clean_latents = self._clean_latents(step, model_output, model_input, t)  # ẑ_0, [TB,C,h,w]
            latents = step.prev_sample

            # 4.2 hints from the frames that these latents stand for; after the last step, news would be about other hints
            if (
                extracts
                and i % hint_interval == 0
                and not (self._tells_news and i == len(self.scheduler.timesteps) - 1)
            ):
                scale = prev.frames.shape[-1] // frames_prev.shape[-1]
                known = tuple(self.vqvae.resize_hints(each, frames_prev.shape[-2:]) for each in hints)
                coarse_latents = F.avg_pool2d(clean_latents, scale)
                if self._tells_news:  # which are as much smaller, too
                    coarse_latents = coarse_latents / scale
                guess = decode(coarse_prev, coarse_next, coarse_latents, known)
                continued = (known,) if isinstance(hint_source, ModelHints) else ()
                refined = hint_source.from_guess(frames_prev, guess, frames_next, *continued)
                refined = tuple(self.vqvae.resize_hints(each, hints[0].shape[-2:]) for each in refined)
                hints = damp_hints(hints, refined, 1 + i // hint_interval) if hint_policy == "damped" else refined

            # 4.3 the caller's turn, frame by frame
            if callback is not None:
                available = {"latents": latents, "hints_prev": hints[0], "hints_next": hints[1]}
                parts = {name: list(tensor.split(batch_size)) for name, tensor in available.items()}
                replaced = set()
                for number in range(count):
                    returned = callback(self, i, t, {name: parts[name][number] for name in callback_inputs})
                    if not isinstance(returned, (dict, type(None))):
                        raise TypeError(
                            f"`callback_on_step_end` must return a dict of tensors, or None, but gave a {type(returned).__name__}."
                        )
                    for name, tensor in (returned or {}).items():
                        if name in parts and tensor is not parts[name][number]:
                            parts[name][number] = tensor
                            replaced.add(name)
                available.update({name: torch.cat(parts[name]) for name in replaced})
                latents, hints = available["latents"], (available["hints_prev"], available["hints_next"])
                if "latents" in replaced and i == len(self.scheduler.timesteps) - 1:
                    clean_latents = latents
            progress_bar.update(count)

        # 5. The frames.
        return clean_latents, decode(prev, next_, clean_latents, hints) if with_frames else None

    def _clean_latents(
        self, step: BaseOutput, model_output: torch.Tensor, model_input: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """ẑ_0 of a step: the scheduler's own where it gives one, else ẑ_0 = (z_t − √(1−ᾱ_t)·ε̂) / √ᾱ_t."""
        for name in ("denoised", "pred_original_sample"):
            if getattr(step, name, None) is not None:
                return getattr(step, name)
        # Schedulers that work on scaled latents (Euler's family) still hand the network variance-preserving ones.
        alpha_bar = self.scheduler.alphas_cumprod.to(model_input.device)[t.long()].float()
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return (model_input - sigma * model_output) / signal
        if prediction_type == "v_prediction":
            return signal * model_input - sigma * model_output
        return model_output

    def _check_latents(
        self, latents: torch.Tensor | None, num_frames: int, frames: torch.Tensor
    ) -> torch.Tensor | None:
        if latents is None:
            return None
        f = self.vqvae.downsample_factor
        channels = self.vqvae.config.vq_embed_dim or self.vqvae.config.latent_channels
        shape = (frames.shape[0], num_frames, channels, frames.shape[-2] // f, frames.shape[-1] // f)
        if num_frames == 1 and latents.ndim == 4:
            latents = latents[:, None]
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, but has {tuple(latents.shape)}.")
        return latents.to(device=frames.device, dtype=torch.float32)
