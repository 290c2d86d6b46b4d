# SPDX-License-Identifier: Apache-2.0
"""Hint sources by name: built from a configuration, kept in a checkpoint, and loaded from one."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.utils.dynamic_modules_utils import get_relative_imports

from .motion_hints import SCALES, EventHints, FlowHints, HintSource, ModelHints, NullHints, SearchHints, StackedHints
from .tiling import TILE_PIXELS, Tiling


HINT_SOURCES = (
    "events",
    "flow",
    "fine_flow",
    "search",
    "model",
    "events+flow",
    "events+fine_flow",
    "events+search",
    "events+model",
)

# Files of this package that a checkpoint holds, by their stems.
TRAVELLING = (
    "components",
    "decoder_inputs",
    "eventgan",
    "frame_coding",
    "hint_registry",
    "hub_repository",
    "image_processor",
    "model_cards",
    "motion_flow",
    "motion_hints",
    "motion_search",
    "optical_flow",
    "pipeline_files",
    "pipeline_inputs",
    "pipeline_madiff",
    "pipeline_output",
    "precision",
    "sampling_steps",
    "tiling",
    "vq_magan",
    "warping",
)

_OWN = ("events", "flow", "fine_flow", "search", "model")
# What the parts of a hint source's name stand for; `events` needs the pipeline's `i2e`, and `model` its `hint_model`.
_SOURCES: dict[str, Callable[..., HintSource]] = {
    "flow": FlowHints,
    "fine_flow": partial(FlowHints, fine=True),
    "search": SearchHints,
}
_METHODS = ("start", "from_guess")
# Those that came with checkpoints: the next checkpoint's file of the same name may hold another class.
_OF_CHECKPOINTS: set[str] = set()


def register_hint_source(name: str, kind: type) -> None:
    """
    Make a class known as a hint source: by a name for `hint_source`, and by `FILE:CLASS`, which a checkpoint says.

    Args:
        name: letters, digits and underscores; or `MODULE:CLASS`.
        kind: a class that has what [`HintSource`] has. A class of the same name before it gives way.

    Raises:
        ValueError: for a name that is taken by this package, or has other characters.
        TypeError: if it is no such class.
    """
    if name in _OWN or not all(each.isidentifier() for each in name.replace(":", ".", 1).split(".")):
        raise ValueError(
            f"`name` must be letters, digits and underscores, and none of {', '.join(_OWN)}, but is {name!r}."
        )
    _check_kind(kind, "`kind`")
    names = {name}
    with suppress(ValueError):  # it cannot be saved, as is said where somebody tries
        names.add(saved_name(kind))
    _SOURCES.update(dict.fromkeys(names, kind))
    _OF_CHECKPOINTS.difference_update(names)


def parts_of_checkpoints(name: str) -> list[str]:
    """The parts of a hint source's name that this process does not know but from checkpoints' own code."""
    return [part for part in name.split("+") if part in _OF_CHECKPOINTS or part not in (*_OWN, *_SOURCES)]


def _check_kind(kind: Any, what: str) -> None:
    missing = [each for each in _METHODS if not callable(getattr(kind, each, None))]
    if not isinstance(kind, type) or missing:
        raise TypeError(
            f"{what} must be a class with the methods {', '.join(_METHODS)}, but {kind!r} lacks {', '.join(missing) or 'a constructor'}."
        )


def _kind_of(part: str) -> Callable[..., HintSource]:
    """What a part of a hint source's name other than `events` stands for; `MODULE:CLASS` is imported if need be."""
    if part not in _SOURCES and ":" in part:
        module, _, attribute = part.partition(":")
        try:
            kind = getattr(importlib.import_module(module), attribute)
            _check_kind(kind, "it")
        except Exception as error:  # whatever somebody else's module does when it is imported
            raise ValueError(f"`hint_source` {part!r} cannot be loaded: {type(error).__name__}: {error}") from error
        register_hint_source(part, kind)
    if part not in _SOURCES:
        own = sorted(set(_SOURCES) - set(_OWN))
        known = ", ".join([*HINT_SOURCES, *own])
        raise ValueError(
            f"`hint_source` must be one of {known}, MODULE:CLASS, or several of these joined by +, but is {part!r}."
        )
    return _SOURCES[part]


def hint_parts(name: str) -> list[str]:
    """The parts of a hint source's name, in the order of their channels.

    Raises:
        ValueError: if it is unknown.
    """
    parts = name.split("+") if isinstance(name, str) else []
    if not parts or len(set(parts)) < len(parts) or set(parts) <= set(_OWN) and name not in HINT_SOURCES:
        raise ValueError(
            f"`hint_source` must be one of {', '.join(HINT_SOURCES)}, a registered name or MODULE:CLASS, but is {name!r}."
        )
    for part in parts:
        if part not in ("events", "model"):
            _kind_of(part)
    return parts


def named_parts(name: str, source: HintSource) -> list[tuple[str, HintSource]]:
    """The parts of a hint source with their names, in the order of their channels.

    Raises:
        ValueError: if the name is unknown.
    """
    return list(zip(hint_parts(name), source.sources if isinstance(source, StackedHints) else [source]))


def build_hint_source(
    name: str,
    i2e: ModelMixin | None = None,
    tiling: Tiling | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    hint_channels: int | None = None,
    event_scale: int = 1,
    hint_model: ModelMixin | None = None,
) -> HintSource:
    """
    The hint source of a name: one of `HINT_SOURCES`, a registered one, `MODULE:CLASS`, or several joined by `+`. Flow stands last in a
    stack, where decoders look for offsets.

    Args:
        name: of the source.
        i2e: makes event hints.
        tiling: for `i2e`; where tiles have fewer pixels than `TILE_PIXELS`, flows are found one at a time, too.
        settings: arguments of the parts' constructors, by the parts' names.
        hint_channels: of all parts together. Where it is given and `i2e` is None, event hints are zeros, unless there would be nothing else.
        event_scale: see [`EventHints`].
        hint_model: see [`ModelHints`].

    Raises:
        ValueError: if the name is unknown, a part cannot be built, or events are asked for without an `i2e` model, or `model` without a
            `hint_model`.
    """
    parts, settings = hint_parts(name), settings or {}
    surplus = sorted(set(settings) - (set(parts) - {"model"}))
    if surplus:
        raise ValueError(f"`hint_settings` must be for parts of `hint_source` {name!r}, but has {', '.join(surplus)}.")
    stack: dict[str, HintSource] = {}
    for part in parts:
        if part == "events":
            continue
        if part == "model":
            if hint_model is None:
                raise ValueError(f"`hint_source={name!r}` needs a `hint_model`, but it is None.")
            stack[part] = ModelHints(hint_model)
            continue
        try:
            source = stack[part] = _kind_of(part)(**settings.get(part, {}))
        except Exception as error:  # whatever somebody else's class does
            raise ValueError(f"`hint_source` {part!r} cannot be built: {type(error).__name__}: {error}") from error
        check_hint_source(source, f"`hint_source` {part!r}")
        if isinstance(source, FlowHints):  # tiles smaller than is fastest are for where memory is very short
            source.one_by_one = tiling is not None and tiling.pixels < TILE_PIXELS
    if "events" in parts:
        left = (hint_channels or 0) - sum(source.hint_channels for source in stack.values())
        if i2e is None and (not stack or left < 1):
            raise ValueError(f"`hint_source={name!r}` needs an `i2e` model, but `i2e` is None.")
        if i2e is None:
            stack["events"] = NullHints(left)
        else:
            try:
                stack["events"] = EventHints(i2e, tiling, event_scale, **settings.get("events", {}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"`hint_source` 'events' cannot be built: {type(error).__name__}: {error}") from error
    sources = [stack[part] for part in parts]
    return sources[0] if len(sources) == 1 else StackedHints(sources)


def check_hint_source(source: Any, what: str) -> None:
    """
    Raises:
        ValueError: if an object is no hint source.
    """
    missing = [each for each in _METHODS if not callable(getattr(source, each, None))]
    channels = getattr(source, "hint_channels", None)
    if missing or not isinstance(channels, int) or channels < 1:
        lacks = ", ".join(
            [*missing, *([] if isinstance(channels, int) and channels > 0 else ["a positive `hint_channels`"])]
        )
        raise ValueError(f"{what} must be a hint source, but {type(source).__name__} lacks {lacks}.")


def saved_name(kind: type) -> str:
    """`FILE:CLASS` of a class whose file can travel with a checkpoint.

    Raises:
        ValueError: if it cannot.
    """
    module = sys.modules.get(kind.__module__)
    file = Path(getattr(module, "__file__", None) or "")
    reason = None
    if kind.__module__ == "__main__" or not file.is_file() or file.suffix != ".py":
        reason = "is not in a module of its own"
    elif kind.__qualname__ != kind.__name__ or not file.stem.isidentifier():
        reason = "is not at the top level of its module"
    elif file.stem in TRAVELLING:
        reason = f"is in {file.name}, as a file of this package is called"
    elif get_relative_imports(file):
        reason = f"is in {file.name}, which imports from beside itself"
    if reason is not None:
        raise ValueError(f"A checkpoint cannot hold the hint source {kind.__qualname__}: the class {reason}.")
    return f"{file.stem}:{kind.__name__}"


def describe_hint_source(
    source: HintSource,
    i2e: ModelMixin | None,
    known: Sequence[dict[str, Any]] | None = None,
    hint_model: ModelMixin | None = None,
) -> tuple[str, dict[str, dict[str, Any]], list[type]]:
    """
    What a checkpoint keeps of a hint source: its name, its parts' settings, and the classes whose code must travel.

    Args:
        source: to be kept.
        i2e: the pipeline's.
        known: settings of each part; each part's own `config` if not given.
        hint_model: the pipeline's.

    Raises:
        ValueError: if it could not be built again from that.
    """
    names: list[str] = []
    settings: dict[str, dict[str, Any]] = {}
    kinds: list[type] = []
    parts = source.sources if isinstance(source, StackedHints) and type(source) is StackedHints else [source]
    for number, part in enumerate(parts):
        kind = type(part)  # subclasses are classes of others
        if (
            kind is EventHints
            and isinstance(part, EventHints)
            and part.i2e is i2e
            or kind is NullHints
            and i2e is None
        ):
            if isinstance(part, EventHints) and part.scale not in SCALES:
                raise ValueError(
                    f"A checkpoint cannot hold event hints whose `scale` is {part.scale!r}, but of {', '.join(map(str, SCALES))}."
                )
            names.append("events")
            if isinstance(part, EventHints) and part.between:
                settings["events"] = dict(part.config)
            elif kind is NullHints and known is not None and known[number]:
                settings["events"] = known[number]
        elif kind is ModelHints and isinstance(part, ModelHints) and part.model is hint_model:
            names.append("model")
        elif kind is FlowHints and isinstance(part, FlowHints):
            names.append("fine_flow" if part.fine else "flow")
        elif kind is SearchHints and isinstance(part, SearchHints):
            names.append("search")
            if part.config != SearchHints().config:
                settings["search"] = dict(part.config)
        elif kind in (EventHints, ModelHints):
            which = "`i2e`" if kind is EventHints else "`hint_model`"
            raise ValueError(
                f"A checkpoint cannot hold {kind.__name__} of another {which} than the pipeline's: assign `hints` made of that."
            )
        else:
            name = saved_name(kind)
            config = dict(getattr(part, "config", None) or {}) if known is None else known[number]
            config = {key: value for key, value in config.items() if not key.startswith("_")}
            try:
                inspect.signature(kind).bind(**config)
                json.dumps(config)
            except TypeError as error:
                raise ValueError(
                    f"A checkpoint cannot hold the hint source {kind.__name__} with the `config` {config!r}: {error}."
                ) from error
            names.append(name)
            kinds.append(kind)
            if config:
                settings[name] = config
    if len(set(names)) < len(names):
        raise ValueError(f"A checkpoint cannot hold the same hint source twice: {', '.join(names)}.")
    return "+".join(names), settings, kinds


def load_hint_code(folder: Path, part: str) -> None:
    """Run the file of a checkpoint that has the class of a hint source `FILE:CLASS`, and register that.

    Raises:
        ValueError: if there is none, or another one of its name is registered already.
    """
    stem, _, attribute = part.partition(":")
    path = folder / f"{stem}.py"
    if not (stem.isidentifier() and attribute.isidentifier() and path.is_file()):
        raise ValueError(f"The checkpoint's hint source is {part!r}, but {folder} has no file {stem}.py.")
    name = f"{stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "which a file of Python has"
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            # Not by the loader, which writes bytecode beside it, into the checkpoint.
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(
                f"The checkpoint's hint source {part!r} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    kind: Any = getattr(sys.modules[name], attribute, None)
    if part in _SOURCES and _SOURCES[part] is not kind:
        raise ValueError(
            f"Another hint source {part!r} is registered in this process already: the checkpoint's own code cannot take its place."
        )
    try:
        register_hint_source(part, kind)
    except TypeError as error:
        raise ValueError(f"The checkpoint's hint source {part!r} cannot be loaded: {error}") from error
    _OF_CHECKPOINTS.add(part)
