"""The ComfyUI node: its contract, as ComfyUI's loader and executor use it, and what it makes. ComfyUI itself is not needed."""

import importlib.util
import inspect
import json
import sys
import types

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY, moving_picture


WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


@pytest.fixture(scope="module")
def module():
    """Loaded as ComfyUI loads what lies in `custom_nodes`: by its path, under a name that is not its own."""
    folder = REPOSITORY / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_madiff", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    loaded = sys.modules["custom_nodes_madiff"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def node(module):
    return module.NODE_CLASS_MAPPINGS["MADiffInterpolate"]


@pytest.fixture
def images() -> torch.Tensor:
    return (
        torch.stack([torch.from_numpy(moving_picture(moment)) for moment in (0, 3, 7)]).float() / 255
    )  # [B,H,W,C], ComfyUI's IMAGE


def defaults(node) -> dict:
    return {
        name: declared[1]["default"] if isinstance(declared[0], str) else declared[0][0]
        for inputs in node.INPUT_TYPES().values()
        for name, declared in inputs.items()
        if declared[0] != "IMAGE"
    }


def test_contract(module, node):
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"} and inputs["required"]["images"] == ("IMAGE",)
    for group in inputs.values():
        for name, declared in group.items():
            assert isinstance(declared, tuple) and 1 <= len(declared) <= 2, name
            if isinstance(declared[0], str) and declared[0] in WIDGETS:
                settings = declared[1]
                assert isinstance(settings["default"], WIDGETS[declared[0]]), name
                assert declared[0] == "STRING" or settings["min"] <= settings["default"] <= settings["max"], name
            else:
                assert declared[0] == "IMAGE" or all(isinstance(each, str) for each in declared[0]), name
    # ComfyUI makes an object without arguments and calls its function by the inputs' names.
    parameters = inspect.signature(getattr(node(), node.FUNCTION)).parameters
    assert set(parameters) == {*inputs["required"], *inputs["optional"]}
    assert all(parameters[name].default is not inspect.Parameter.empty for name in inputs["optional"])
    assert (
        isinstance(node.RETURN_TYPES, tuple)
        and len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        and isinstance(node.CATEGORY, str)
    )


def test_makes_what_the_pipeline_makes(node, images, pipeline, checkpoint):
    result, rate = node().interpolate(
        images,
        **{
            **defaults(node),
            "multiplier": 3,
            "seed": 5,
            "device": "cpu",
            "dtype": "fp32",
            "checkpoint": str(checkpoint),
            "steps": 2,
        },
    )
    assert (
        result.shape == (7, 64, 96, 3) and result.dtype == torch.float32 and result.device.type == "cpu" and rate == 72
    )
    assert torch.equal(result[::3], images) and result.min() >= 0 and result.max() <= 1
    for first in (0, 1):
        for number, instant in ((1, 1 / 3), (2, 2 / 3)):
            made = pipeline(
                images[first].numpy(),
                images[first + 1].numpy(),
                times=[instant],
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(5),
                output_type="np",
            ).frames[0, 0]
            assert np.abs(made - result[3 * first + number].numpy()).max() < 1e-5


def test_a_target_rate(node, images, checkpoint):
    settings = {
        **defaults(node),
        "source_fps": 10.0,
        "target_fps": 25.0,
        "device": "cpu",
        "dtype": "fp32",
        "checkpoint": str(checkpoint),
    }
    result, rate = node().interpolate(images, **settings)
    assert rate == 25 and len(result) == 7, "three frames of a tenth of a second, by 25 a second"
    assert (
        torch.equal(result[0], images[0]) and torch.equal(result[5], images[2]) and torch.equal(result[6], images[2])
    )
    (single, _), (transparent, _) = (
        node().interpolate(each, **{**settings, "target_fps": 0.0})
        for each in (images[:1], torch.cat([images[:1], torch.ones(1, 64, 96, 1)], 3))
    )
    assert torch.equal(single, images[:1]) and torch.equal(transparent, single)


def test_progress_and_cancel_are_comfyuis(node, images, checkpoint, monkeypatch):
    """By the two functions of ComfyUI that nodes call for them."""
    told, asked = [], []
    bars, management = types.ModuleType("comfy.utils"), types.ModuleType("comfy.model_management")

    class ProgressBar:
        def __init__(self, total):
            told.append(total)

        def update(self, value):
            told.append(value)

    def throw_exception_if_processing_interrupted():
        asked.append(len(asked))
        if len(asked) == 3:
            raise InterruptedError

    bars.ProgressBar, management.throw_exception_if_processing_interrupted = (
        ProgressBar,
        throw_exception_if_processing_interrupted,
    )
    for name, each in (
        ("comfy", types.ModuleType("comfy")),
        ("comfy.utils", bars),
        ("comfy.model_management", management),
    ):
        monkeypatch.setitem(sys.modules, name, each)
    with pytest.raises(InterruptedError):
        node().interpolate(
            images, **{**defaults(node), "device": "cpu", "dtype": "fp32", "checkpoint": str(checkpoint)}
        )
    assert told == [5, 1, 1] and len(asked) == 3


def test_the_workflow_fits_the_node(node):
    workflow = json.loads((REPOSITORY / "comfyui" / "workflows" / "interpolate.json").read_text())
    nodes = {each["id"]: each for each in workflow["nodes"]}
    for number, source, output, target, place, kind in workflow["links"]:
        assert nodes[target]["inputs"][place] == {
            "name": nodes[target]["inputs"][place]["name"],
            "type": kind,
            "link": number,
        }
        assert nodes[source]["outputs"][output]["type"] == kind and number in nodes[source]["outputs"][output]["links"]
    (ours,) = [each for each in nodes.values() if each["type"] == "MADiffInterpolate"]
    assert [each["type"] for each in ours["outputs"]] == list(node.RETURN_TYPES)
    values = list(ours["widgets_values"])
    del values[4]  # what is behind every seed: whether it changes after a run
    declared = {
        name: each for group in node.INPUT_TYPES().values() for name, each in group.items() if each[0] != "IMAGE"
    }
    assert len(values) == len(declared)
    for value, (name, each) in zip(values, declared.items()):
        assert isinstance(value, WIDGETS[each[0]]) if isinstance(each[0], str) else value in each[0], name
