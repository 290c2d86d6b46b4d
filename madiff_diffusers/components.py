# SPDX-License-Identifier: Apache-2.0
"""What all components of a checkpoint share: they are read from safetensors alone, and their code lies beside their weights."""

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def standalone_code(path: Path) -> str:
    """A module's code in one file, which is all that Diffusers downloads of a component: the code of the modules beside it takes the
    place of their imports, each of which is one line, `from .name import …`."""

    def code_of(match: re.Match) -> str:
        return path.with_name(f"{match[1]}.py").read_text(encoding="utf-8") + "\n"

    return re.sub(r"^from \.(\w+) import .+\n", code_of, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def check_safetensors(use_safetensors: bool | None, indexes: Iterable[Path] = ()) -> None:
    """
    Args:
        use_safetensors: what a caller says.
        indexes: files that name the shards of weights.

    Raises:
        ValueError: for False, or an index that names other files than safetensors.
    """
    if use_safetensors is False:
        raise ValueError("`use_safetensors` must not be False: pickled weights are not read.")
    for index in indexes:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if not all(str(shard).endswith(".safetensors") for shard in shards):
            raise ValueError(f"{index} must name .safetensors files alone: pickled weights are not read.")


if TYPE_CHECKING:
    from diffusers import ModelMixin as _Base
else:
    _Base = object


ComponentT = TypeVar("ComponentT", bound="CheckpointComponent")


def check_repository_name(name: str) -> None:
    """
    Raises:
        OSError: for the path of a folder that is not there, which cannot be a repository's name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise OSError(
            f"{name!r} is neither a folder that is there nor the name of a repository (USER/NAME)."
        ) from None


def share_weights(folder: Path) -> None:
    """Let whoever may read a component's configuration read its weights, too, which safetensors writes for their owner alone."""
    for config in folder.glob("config.json"):
        for path in folder.glob("*.safetensors"):
            shutil.copymode(config, path)


class CheckpointComponent(_Base):
    """Mixin for a [`~diffusers.ModelMixin`], before it in the order of bases. A class's file may import from files beside it that
    import nothing of this package themselves."""

    _auto_class: str | None = "AutoModel"

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # The code of a subclass that somebody else wrote is not among the files that are saved.
        here = cls.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]
        cls._auto_class = "AutoModel" if here else None

    @classmethod
    def from_pretrained(
        cls: type[ComponentT], pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> ComponentT:
        """As [`~ModelMixin.from_pretrained`], from safetensors alone.

        Raises:
            ValueError: for `use_safetensors=False`, an index that names other files, or a folder that lacks weights of this class.
        """
        check_safetensors(kwargs.pop("use_safetensors", None))
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            check_repository_name(str(pretrained_model_name_or_path))
            names = ("cache_dir", "local_files_only", "revision", "token")
            hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns="*.index*.json", **hub))
        check_safetensors(None, (folder / (kwargs.get("subfolder") or "")).glob("*.index*.json"))
        asked = kwargs.pop("output_loading_info", False)
        model, info = loaded = super().from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:  # which would be left as they were drawn
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} does not hold the weights of this {cls.__name__}: it lacks {missing[0]}"
                + (f" and {len(missing) - 1} more." if missing[1:] else ".")
            )
        return loaded if asked else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        *others,
        **kwargs,
    ) -> None:
        """As [`~ModelMixin.save_pretrained`], with this class's code beside the weights: `AutoModel` loads the folder, with
        `trust_remote_code=True`, where the package is not installed.

        Raises:
            ValueError: for `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: weights are never written as pickles.")
        super().save_pretrained(save_directory, is_main_process, save_function, True, *others, **kwargs)
        if is_main_process:
            share_weights(Path(save_directory))

    # With the signature in which pipelines look for `variant`.
    update_wrapper(save_pretrained, ModelMixin.save_pretrained, assigned=())

    def save_config(self, save_directory: str | os.PathLike, **kwargs) -> None:
        if self._auto_class is not None:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            own = Path(inspect.getfile(type(self)))
            (Path(save_directory) / own.name).write_text(standalone_code(own), encoding="utf-8")
        super().save_config(save_directory, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a place on this machine
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict[str, Any], ...]:
        # What `AutoModel` reads would be reported as an argument that nobody expected.
        return super().extract_init_dict(
            {key: value for key, value in config_dict.items() if key != "auto_map"}, **kwargs
        )
