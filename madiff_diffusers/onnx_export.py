# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's networks as ONNX graphs, for runtimes other than torch; `docs/onnx.md` shows how to run them.

Every graph takes and gives tensors by name: what one of them gives, another takes under the same name, with `_prev` or `_next` behind it where it
is a neighbour's. The table there says what; tensors that a checkpoint's networks do not read are left out. All are float32.
Frames are `(B, 3, H, W)` in [-1, 1], with H and W multiples of what `madiff.json` says; hints have the frames' size; `time`
and `timestep` are `(B,)`. Latents are what a scheduler works with: scaling is inside the graphs.
"""

import importlib.util
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
from diffusers import SchedulerMixin, UNet2DModel

from .decoder_inputs import FrameFeatures
from .motion_flow import MotionHintModel
from .vq_magan import VQMAGANModel


Tensors = dict[str, torch.Tensor]

DESCRIPTION = "madiff.json"


class Graph(nn.Module):
    """A part of the pipeline as a function of named tensors. `inputs` and `outputs` are the names, in order."""

    inputs: Sequence[str]
    outputs: Sequence[str]


class EncodeGraph(Graph):
    def __init__(self, vqvae: VQMAGANModel):
        super().__init__()
        self.vqvae = vqvae
        self.inputs = ["frames"]
        self.outputs = ["latents"] * (not vqvae.config.news_latents) + _feature_names(vqvae)

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        encoded = self.vqvae.encode(tensors["frames"])
        latents = [] if encoded.latents is None else [encoded.latents * self.vqvae.config.scaling_factor]
        return (*latents, *encoded.features.pyramid)


class HintGraph(Graph):
    def __init__(self, hint_model: MotionHintModel):
        super().__init__()
        self.hint_model = hint_model
        self.inputs, self.outputs = ["frame_prev", "frame_next", "time"], ["hints_prev", "hints_next"]

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        return self.hint_model(tensors["frame_prev"], tensors["frame_next"], tensors["time"])


class RefineGraph(Graph):
    def __init__(self, hint_model: MotionHintModel):
        super().__init__()
        self.hint_model = hint_model
        self.inputs = ["frame_prev", "frame_mid", "frame_next", "hints_prev", "hints_next"]
        self.outputs = ["refined_prev", "refined_next"]

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        prev, mid, next_ = (tensors[f"frame_{which}"] for which in ("prev", "mid", "next"))
        return self.hint_model.refine(prev, mid, next_, (tensors["hints_prev"], tensors["hints_next"]))


class MotionGraph(Graph):
    def __init__(self, vqvae: VQMAGANModel):
        super().__init__()
        self.vqvae = vqvae
        names = _feature_names(vqvae)
        self.unread = len(names) - vqvae.motion_scales
        self.features = [_of_both(name) for name in names[self.unread :]]
        self.inputs = ["time", *_of_both("begun"), *(name for pair in self.features for name in pair)]
        self.outputs = [*_of_both("motion")]

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        begun = [tensors[name] for name in _of_both("begun")]
        pyramids = ([tensors[pair[side]] for pair in self.features] for side in (0, 1))
        # Neither the frames nor their finer features are read.
        sides = (FrameFeatures(begun[0], (*pyramid[:1] * self.unread, *pyramid)) for pyramid in pyramids)
        return self.vqvae.guess_motion(*sides, *begun, time=tensors["time"])


class DenoiseGraph(Graph):
    def __init__(self, vqvae: VQMAGANModel, unet: UNet2DModel):
        super().__init__()
        self.vqvae, self.unet = vqvae, unet
        self.timed = unet.config.class_embed_type == "timestep"
        self.seen = _feature_names(vqvae)[-1] if vqvae.config.news_latents else "latents"
        self.inputs = ["latents", "timestep", *["time"] * self.timed, *_of_both(self.seen), *_of_both("hints")]
        self.outputs = ["prediction"]

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        latents, (prev, next_), hints = (
            tensors["latents"],
            *([tensors[name] for name in _of_both(each)] for each in (self.seen, "hints")),
        )
        if self.vqvae.config.news_latents:
            seen = [latents, self.vqvae.condition(prev, next_, *hints)]
        else:
            seen = [latents, prev, next_, *(self.vqvae.resize_hints(each, latents.shape[-2:]) for each in hints)]
        labels = 1000 * tensors["time"] if self.timed else None
        return self.unet(torch.cat(seen, dim=1), tensors["timestep"], class_labels=labels, return_dict=False)


class DecodeGraph(Graph):
    def __init__(self, vqvae: VQMAGANModel):
        super().__init__()
        self.vqvae = vqvae
        self.features = [_of_both(name) for name in _feature_names(vqvae)]
        timed = ["time"] * vqvae.config.time_conditioned
        self.inputs = [
            "latents",
            *timed,
            *_of_both("frame"),
            *_of_both("hints"),
            *(name for pair in self.features for name in pair),
        ]
        self.outputs = ["frame"]

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        prev, next_ = (
            FrameFeatures(tensors[_of_both("frame")[side]], tuple(tensors[pair[side]] for pair in self.features))
            for side in (0, 1)
        )
        latents = tensors["latents"] / self.vqvae.config.scaling_factor
        sample = self.vqvae.decode(
            latents, prev, next_, tensors["hints_prev"], tensors["hints_next"], time=tensors.get("time", 0.5)
        ).sample
        return (sample.clamp(-1, 1),)


def _feature_names(vqvae: VQMAGANModel) -> list[str]:
    # Latents of news have no bottleneck, which would be one scale more.
    count = len(vqvae.config.block_out_channels) + (not vqvae.config.news_latents)
    return [f"features_{number}" for number in range(1, 1 + count)]


def _of_both(name: str) -> tuple[str, str]:
    return f"{name}_prev", f"{name}_next"


def build_graphs(
    vqvae: VQMAGANModel, unet: UNet2DModel, hint_model: MotionHintModel | None = None
) -> dict[str, Graph]:
    """A checkpoint's graphs by name, in the order in which a step of sampling needs them. They share the networks that are given."""
    graphs: dict[str, Graph] = {"encode": EncodeGraph(vqvae)}
    if hint_model is not None:
        graphs["hints"] = HintGraph(hint_model)
    if vqvae.motion_scales:
        graphs["motion"] = MotionGraph(vqvae)
    graphs["denoise"] = DenoiseGraph(vqvae, unet)
    graphs["decode"] = DecodeGraph(vqvae)
    if hint_model is not None:
        graphs["refine"] = RefineGraph(hint_model)
    return {name: graph.eval() for name, graph in graphs.items()}


def frame_multiple(vqvae: VQMAGANModel, unet: UNet2DModel, hint_model: MotionHintModel | None = None) -> int:
    """What the height and width of frames must be multiples of, for all graphs."""
    multiple = vqvae.downsample_factor * 2 ** (len(unet.config.block_out_channels) - 1)
    return multiple if hint_model is None else math.lcm(multiple, hint_model.multiple)


@torch.no_grad()
def example_tensors(graphs: dict[str, Graph], size: tuple[int, int], batch: int = 1) -> Tensors:
    """Random tensors of a step of sampling, all that any of the graphs takes, with what they give for one another.

    Args:
        graphs: of `build_graphs`.
        size: height and width of the frames, multiples of `frame_multiple`.
        batch: pairs of frames.
    """
    generator = torch.Generator().manual_seed(0)
    vqvae = cast(DecodeGraph, graphs["decode"]).vqvae
    tensors: Tensors = {"time": torch.full((batch,), 0.5), "timestep": torch.full((batch,), 999.0)}
    for name in ("frame_prev", "frame_next", "frame_mid"):
        tensors[name] = torch.rand(batch, 3, *size, generator=generator) * 2 - 1
    tensors["frames"] = torch.cat([tensors["frame_prev"], tensors["frame_next"]])
    for name, tensor in zip(graphs["encode"].outputs, graphs["encode"](tensors)):
        tensors.update(zip(_of_both(name), tensor.chunk(2)))
    shape = (
        vqvae.config.vq_embed_dim or vqvae.config.latent_channels,
        *(side // vqvae.downsample_factor for side in size),
    )
    tensors["latents"] = torch.randn(batch, *shape, generator=generator)
    for name in _of_both("hints"):
        tensors[name] = torch.randn(batch, vqvae.config.hint_channels, *size, generator=generator)
    if "motion" in graphs:
        for begun, whole in zip(_of_both("begun"), _of_both("hints")):
            tensors[begun] = vqvae.resize_hints(tensors[whole], [side // vqvae.motion_stride for side in size])
    return tensors


def check_packages() -> None:
    """
    Raises:
        ImportError: if packages are missing that exporting needs.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"Exporting to ONNX needs {' and '.join(missing)}: pip install 'madiff_diffusers[onnx]'")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what exporters tell of their own work: names of axes, constants that stay, ways that they tried first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _forget_code(path: Path) -> None:
    """Take the lines of code that each node was made by out of a graph's file: they name places on this machine, and are most of it."""
    import onnx

    model = onnx.load(path)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            del node.metadata_props[:]
    onnx.save(model, path)


def export_onnx(
    folder: str | os.PathLike,
    vqvae: VQMAGANModel,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    hint_model: MotionHintModel | None = None,
) -> None:
    """
    Write a checkpoint's networks as ONNX graphs of any batch and frame size, one file each, and `madiff.json`: what a sampler must know.

    Args:
        folder: to write into; it must be there.
        vqvae, unet, scheduler, hint_model: the checkpoint's, the networks in float32 on the CPU.

    Raises:
        ImportError: if packages are missing.
        ValueError: for networks in another dtype or on another device, or a hint model of another class.
    """
    check_packages()
    if hint_model is not None and not isinstance(hint_model, MotionHintModel):
        raise ValueError(
            f"`hint_model` must be a MotionHintModel or None to become a graph, but is a {type(hint_model).__name__}."
        )
    if hint_model is not None and vqvae.config.hint_channels != 2:
        raise ValueError(
            f"`hint_model` must make all hints to become a graph, but `vqvae` takes {vqvae.config.hint_channels} channels of them, and it makes 2."
        )
    for name, network in (("vqvae", vqvae), ("unet", unet), ("hint_model", hint_model)):
        if network is not None and (network.dtype, network.device.type) != (torch.float32, "cpu"):
            raise ValueError(f"`{name}` must be in float32 on the CPU, but is in {network.dtype} on {network.device}.")
    graphs, multiple = build_graphs(vqvae, unet, hint_model), frame_multiple(vqvae, unet, hint_model)
    # Unlike numbers, of which none is 1: what is equal or 1 here would be taken to be so always.
    sizes = (3 * multiple, 4 * multiple)
    tensors = example_tensors(graphs, sizes, batch=2)
    for name, graph in graphs.items():
        # From 64 on, Diffusers' U-Net takes another way to the same result, which an exporter will not have in one graph.
        batch, rows, columns = torch.export.Dim("batch", max=63), torch.export.Dim("rows"), torch.export.Dim("columns")
        given = {each: tensors[each] for each in graph.inputs}
        shapes = {}
        for each, tensor in given.items():
            shapes[each] = {0: batch}
            if tensor.ndim == 4:
                stride = sizes[0] // tensor.shape[2]
                shapes[each].update({2: multiple // stride * rows, 3: multiple // stride * columns})
        path = Path(folder) / f"{name}.onnx"
        with _quiet_exporter(), torch.no_grad():  # with gradients, networks compute some things in another way
            torch.onnx.export(
                graph,
                f=path,
                kwargs={"tensors": given},  # a dictionary at the end of `args` would be taken for keyword arguments
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes={"tensors": shapes},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        _forget_code(path)
    description = {
        "frame_multiple": multiple,
        "downsample_factor": vqvae.downsample_factor,
        "latent_channels": tensors["latents"].shape[1],
        "hint_channels": vqvae.config.hint_channels,
        **({"motion_stride": vqvae.motion_stride} if "motion" in graphs else {}),
        "graphs": {
            name: {"inputs": list(graph.inputs), "outputs": list(graph.outputs)} for name, graph in graphs.items()
        },
        "scheduler": json.loads(scheduler.to_json_string()),
    }
    (Path(folder) / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
