# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints are: beside this file, in a folder, or in a repository of the Hugging Face Hub; upload and download."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, snapshot_download
from huggingface_hub.utils import validate_repo_id

from .model_cards import PLACEHOLDER


# Checkpoints that come with the package, by name.
CHECKPOINT_FOLDER = Path(__file__).parent / "checkpoints"

# The index of a saved pipeline or component, and the code that a reader without the package needs.
_MARKS = (
    ("model_index.json", "pipeline_madiff.py"),
    ("config.json", "vq_magan.py"),
    ("config.json", "eventgan.py"),
    ("config.json", "motion_flow.py"),
)

_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")

# Weights as Diffusers names them, and the index of those that are several files.
_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
_WEIGHTS_INDEX = re.compile(r"diffusion_pytorch_model\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")


def bundled_checkpoints() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in CHECKPOINT_FOLDER.glob("*/model_index.json"))


def local_checkpoint(name: str | os.PathLike) -> Path | None:
    """The folder of a checkpoint on this machine: the folder of that name if there is one, else the checkpoint of that name that comes
    with the package, also where that folder is no checkpoint; None for what can only be a repository of the Hub."""
    bundled = CHECKPOINT_FOLDER / name if isinstance(name, str) and name in bundled_checkpoints() else None
    if Path(name).is_dir() and (bundled is None or (Path(name) / "model_index.json").is_file()):
        return Path(name)
    return bundled


def weights_kind(name: str) -> tuple[str, str | None] | None:
    """The folder and the variant of a file of weights, or of their index; None of any other file."""
    folder, _, file = name.rpartition("/")
    match = _WEIGHTS.fullmatch(file) or _WEIGHTS_INDEX.fullmatch(file)
    return None if match is None else (folder, match["variant"])


def replaced_weights(before: Iterable[str], after: Iterable[str]) -> set[str]:
    """
    Names of files of weights that newly saved ones replace: an index and its files where there is one file now, or the other
    way round. Variants that were not saved stay.

    Args:
        before: names of the files that were there.
        after: names of those that were saved.
    """
    after = set(after)
    kinds = {weights_kind(name) for name in after} - {None}
    return {name for name in before if weights_kind(name) in kinds} - after


def upload_repository(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    keep_card: bool = False,
    spare_card: ModelCard | None = None,
) -> str:
    """
    Send a saved pipeline or component to the Hub in one commit, so that all of it arrives, or nothing. Weights in the repository that
    these replace are removed. In the card, `REPOSITORY` becomes the repository's name.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: `user/name`; made if there is no such repository.
        private: whether a new repository is private; the account's default if not given.
        revision: branch, made from the main one if there is none of that name; the main one if not given.
        commit_message: message of the commit; a general one if not given.
        create_pr: open a pull request instead of committing to the branch.
        token: the account's token; that of `hf auth login` if not given.
        keep_card: leave the repository's own model card, where it has one.
        spare_card: model card that is used if neither the folder nor the repository has one.

    Returns:
        address of the commit, or of the pull request.

    Raises:
        ValueError: if the folder is no saved pipeline or component, or holds pickled weights, or `repo_id` is not a possible name.
        OSError: if the Hub cannot be reached or refuses.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    names = repository_files(folder)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if keep_card and "README.md" in there:
            names.remove("README.md")
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, folder / name) for name in names if name != "README.md"
        ]
        card = (folder / "README.md").read_bytes().decode("utf-8") if "README.md" in names else None
        if card is None and spare_card is not None and "README.md" not in there:
            card = str(spare_card)
        if card is not None:
            card = card.replace(f'from_pretrained("{PLACEHOLDER}"', f'from_pretrained("{repo_id}"')
            operations.append(CommitOperationAdd("README.md", card.encode()))
        licence = Path(__file__).with_name("LICENSE")
        if licence.is_file() and "LICENSE" not in {*names, *there}:
            operations.append(CommitOperationAdd("LICENSE", licence))
        operations += [CommitOperationDelete(name) for name in sorted(replaced_weights(there, names))]
        message = commit_message or "Upload with madiff_diffusers"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    except Exception as error:  # by whatever name the client's libraries raise it
        raise OSError(f"The upload to {repo_id} failed: {str(error).strip()}") from error
    return commit.pr_url or commit.commit_url


def repository_files(folder: Path) -> list[str]:
    """Names of the files of a saved pipeline or component.

    Raises:
        ValueError: if the folder is none, or holds pickled weights.
    """
    if not any((folder / index).is_file() and (folder / code).is_file() for index, code in _MARKS):
        raise ValueError(
            f"`folder` must be what `save_pretrained` or `madiff export` wrote, with model_index.json or config.json and the code beside "
            f"it, but is {str(folder)!r}."
        )
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hidden = [name for name in names if any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))]
    names = [name for name in names if name not in hidden]
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        raise ValueError(f"`folder` must hold safetensors alone, but has {', '.join(pickles)}.")
    return names


def download_repository(repo_id: str, variant: str | None = None, code: Sequence[str] = (), **hub) -> str:
    """
    Fetch a repository's configurations, weights and model card into the Hub's cache, and of its code what `code` names. Files in the
    cache are not fetched again; they are enough where the Hub cannot be reached.

    Args:
        repo_id: `user/name`.
        variant: variant of the weights, for the parts that have it.
        code: names of code files at its root that are fetched, too.
        hub: arguments of [`~huggingface_hub.snapshot_download`]: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`.

    Returns:
        folder of the repository in the cache.

    Raises:
        OSError: if neither the Hub nor the cache has it.
        ValueError: for a name that no repository can have.
    """

    def weights(variant: str | None) -> list[str]:
        stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
        return [f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"]

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                **hub,
                allow_patterns=[
                    "README.md",
                    "examples/*.png",
                    "*.json",
                    *code,
                    *(f"*/{name}" for name in weights(variant)),
                ],
            )
        )
        parts = [path.parent for path in folder.glob("*/config.json")]
        without = [part.name for part in parts if not any(list(part.glob(name)) for name in weights(variant))]
        if variant and 0 < len(without) < len(parts):  # else none has it, as who loads the folder will say
            snapshot_download(
                repo_id, **hub, allow_patterns=[f"{part}/{name}" for part in without for name in weights(None)]
            )
    except ValueError:
        raise
    except Exception as error:  # unreachable, or it refuses, by whatever name the client's libraries raise it
        raise OSError(f"{repo_id!r} cannot be fetched from the Hub: {str(error).strip()}") from error
    return str(folder)
