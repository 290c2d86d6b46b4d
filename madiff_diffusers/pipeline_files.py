# SPDX-License-Identifier: Apache-2.0
"""A pipeline as files: read from safetensors alone, and saved with its code beside its weights, here and on the Hub."""

import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from huggingface_hub import ModelCard

from .components import check_repository_name, check_safetensors, share_weights
from .hint_registry import describe_hint_source, hint_parts, load_hint_code, parts_of_checkpoints
from .hub_repository import download_repository, local_checkpoint, replaced_weights, upload_repository
from .model_cards import PLACEHOLDER, model_card
from .motion_hints import EventHints
from .precision import fastest_dtype


PIPELINE_FILE = Path(__file__).with_name("pipeline_madiff.py")

# Files with the code of components, by their stems.
COMPONENT_MODULES = ("eventgan", "motion_flow", "vq_magan")

PipelineT = TypeVar("PipelineT", bound="CheckpointPipeline")

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)


class CheckpointPipeline(_Base):
    """Mixin for a [`~diffusers.DiffusionPipeline`], before it in the order of bases; what is saved of any subclass is the class of
    `PIPELINE_FILE`. The files that this one imports are imported by `PIPELINE_FILE` too: of a pipeline in a folder, Diffusers
    copies that file and what it imports itself."""

    # The folder that this was loaded from, and the repository if it is one's.
    _source: tuple[Path, str | None] | None = None

    @classmethod
    def from_pretrained(cls: type[PipelineT], pretrained_model_name_or_path: str | Path, **kwargs) -> PipelineT:
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
        check_safetensors(kwargs.pop("use_safetensors", None))
        for name in ("torch_dtype", "dtype"):
            if kwargs.get(name) == "auto":
                kwargs[name] = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
        name, repository = str(pretrained_model_name_or_path), None
        folder = local_checkpoint(pretrained_model_name_or_path)
        if folder is None:
            check_repository_name(name)
            folder, repository = Path(cls.download(name, **kwargs)), name
        elif folder != Path(name) and kwargs.get("variant") == "fp16":
            del kwargs["variant"]  # a checkpoint that comes with the package has one set of weights, which is that
        if __package__ == "madiff_diffusers":
            # Diffusers loads components only from modules imported before.
            for module in COMPONENT_MODULES:
                importlib.import_module(f".{module}", __package__)
            if "hint_source" not in kwargs:
                cls._take_hint_code(folder, repository, **kwargs)
        check_safetensors(None, folder.glob("*/*.index*.json"))
        pipeline = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
        if kwargs.get("i2e", False) is None and "events" in pipeline.config.hint_source.split("+"):
            logger.warning("`i2e` is None: event hints are zeros.")
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
        if not isinstance(name, str) or ":" not in name or not parts_of_checkpoints(name):
            return
        if not trust_remote_code:
            raise ValueError(
                f"The checkpoint's hint source is {name!r}, code that is not this package's. `trust_remote_code=True` runs what lies "
                "beside the weights; `register_hint_source` takes a class of yours in its place."
            )
        parts = parts_of_checkpoints(name)
        if repository is not None:
            folder = Path(cls.download(repository, code=[f"{part.partition(':')[0]}.py" for part in parts], **kwargs))
        for part in parts:
            load_hint_code(folder, part)

    @classmethod
    def from_pipe(cls: type[PipelineT], pipeline: DiffusionPipeline, **kwargs) -> PipelineT:
        """As [`~DiffusionPipeline.from_pipe`]."""
        # Diffusers hands on only parts of the very class that a constructor names; ours must take them wherever their code lies.
        parts = {name: part for name, part in pipeline.components.items() if name in cls._get_signature_keys(cls)[0]}
        made = super().from_pipe(pipeline, **{**parts, **kwargs})
        if not {"hint_source", "hint_settings", "i2e", "hint_model"} & set(kwargs):  # of which other hints are made
            made._hints = getattr(pipeline, "_hints", None)
        if getattr(pipeline, "tiling", None) is not None:
            made.enable_tiling(pipeline.tiling.pixels)
        return made

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """A saved pipeline's index. Where this is the package's own code, what it says of code beside the weights is read as the
        package's modules."""
        index = super()._dict_from_json_file(json_file)
        if __package__ == "madiff_diffusers":
            if index.get("_class_name") == [PIPELINE_FILE.stem, "MADiffPipeline"]:
                index["_class_name"] = cls.__name__
            for name, entry in index.items():
                if isinstance(entry, list) and entry[0] in COMPONENT_MODULES:
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
        index["_class_name"] = [PIPELINE_FILE.stem, "MADiffPipeline"]
        index.pop("_name_or_path", None)  # a place on this machine
        index["hint_source"], settings, _ = self._describe_hints()
        index["hint_settings"] = settings or None
        for part in getattr(self._hints, "sources", [self._hints]):
            if type(part) is EventHints:
                index["event_scale"] = part.scale
        for name, entry in index.items():
            if name in self.components and entry[0] is not None:
                origin, _, module = entry[0].rpartition(".")
                if module in COMPONENT_MODULES and origin.split(".")[0] in ("madiff_diffusers", "diffusers_modules"):
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
        # Diffusers goes on taking for none what took the place of none.
        self.register_modules(
            **{
                name: part
                for name, part in self.components.items()
                if part is not None and self.config[name][0] is None
            }
        )
        if hub and not push_to_hub:
            raise TypeError(f"`save_pretrained` takes {', '.join(hub)} with `push_to_hub=True` alone.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            saved = Path(temporary)
            super().save_pretrained(saved, variant=variant, max_shard_size=max_shard_size)
            for component in saved.glob("*/"):
                share_weights(component)
            for path in saved.glob("*/config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None):  # a place on this machine
                    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for code in (PIPELINE_FILE, *get_relative_import_files(PIPELINE_FILE)):
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
        pipeline_code = saved / PIPELINE_FILE.name
        code = pipeline_code.read_text(encoding="utf-8").partition(mark)[0]
        lines = ["from .hint_registry import register_hint_source  # noqa: E402\n"]
        files: dict[str, bytes] = {}
        for kind in self._describe_hints()[2]:
            file = Path(inspect.getfile(kind))
            if files.setdefault(file.name, file.read_bytes()) != file.read_bytes():
                raise ValueError(
                    f"A checkpoint cannot hold two hint sources from different files of the name {file.name}."
                )
            (saved / file.name).write_bytes(files[file.name])
            lines.append(f"from .{file.stem} import {kind.__name__}  # noqa: E402\n")
            lines.append(f'register_hint_source("{file.stem}:{kind.__name__}", {kind.__name__})\n')
        pipeline_code.write_text(code + (mark + "".join(lines) if files else ""), encoding="utf-8")

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
        source, repository = self._source or (None, None)
        # A variant is of the weights beside it.
        if card.exists() and (variant is not None or not (self._tells_scores(card) or self._is_of(source, card))):
            return
        if source is not None and not ((source / "README.md").is_file() and self._equals(source)):
            source = None
        alone = variant if not any(card.parent.glob("*/diffusion_pytorch_model*.safetensors")) else None
        modest = model_card(self, variant=alone, base_model=repository)
        if card.exists():
            # One that says no more than the weights themselves tell is true of others of their kind, too.
            if source is not None or not self._tells_scores(card) and _same_text(card.read_text("utf-8"), str(modest)):
                return
            os.replace(card, card.with_name(".README.previous.md"))
            logger.warning(f"{card} tells of other weights; it is {card.with_name('.README.previous.md')} now.")
        if source is not None:
            text = (source / "README.md").read_text(encoding="utf-8")
            text = text.replace(f'from_pretrained("{repository}"', f'from_pretrained("{PLACEHOLDER}"')
            (saved / "README.md").write_text(text, encoding="utf-8")
            for picture in source.glob("examples/*.png"):  # which the card shows
                (saved / "examples").mkdir(exist_ok=True)
                shutil.copyfile(picture, saved / "examples" / picture.name)
        else:
            modest.save(saved / "README.md")

    @staticmethod
    def _is_of(source: Path | None, card: Path) -> bool:
        """Whether a card is that of the checkpoint in a folder, or was copied from it."""
        own = None if source is None else source / "README.md"
        return own is not None and own.is_file() and _same_text(own.read_text("utf-8"), card.read_text("utf-8"))

    @staticmethod
    def _tells_scores(card: Path) -> bool:
        return "\nmodel-index:" in card.read_text(encoding="utf-8").partition("\n---")[0]

    def _equals(self, checkpoint: Path) -> bool:
        """Whether this is, value by value, what a folder holds."""
        if type(self).__module__ != f"madiff_diffusers.{PIPELINE_FILE.stem}" or self._hints is not None:
            return False
        try:
            # With its hint source by name, code that came with a checkpoint, which has run here, is not asked for again.
            other = type(self).from_pretrained(checkpoint, hint_source=self.config.hint_source)
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


def _same_text(card: str, other: str) -> bool:
    """Whether two cards say the same below their headers, of whatever repository."""
    texts = (ModelCard(each, ignore_metadata_errors=True).text for each in (card, other))
    return len({re.sub(r'from_pretrained\("[^"]*"', "from_pretrained(", text).strip() for text in texts}) == 1
