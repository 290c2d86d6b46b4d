"""Fixtures: the networks of the `tiny` configuration, pictures, and video clips made from CC0 photographs."""

import os
import sys
from functools import lru_cache
from pathlib import Path


# Before torch and OpenCV start their threads: tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tests.local_hub  # noqa: F401, before anything that imports the Hub's client


# isort: split

import cv2
import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from skimage import data

from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel
from tests.processes import free_port


REPOSITORY = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


def load_config(name: str) -> dict:
    return yaml.safe_load((REPOSITORY / "training" / "configs" / f"{name}.yaml").read_text())


def excite(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter a little from where it starts, so that layers which start at zero take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def tiny() -> dict:
    return load_config("tiny")


def load_tiny_news() -> dict:
    """The `motion` configuration at the smallest size that has every part."""
    config = load_config("motion")
    config["hint_model"] = {
        "channels": [4, 8, 8],
        "start_channels": [8, 8],
        "refine_channels": [8, 8],
        "match_channels": 4,
        "reach": [1, 2],
        "start_scale": 2,
    }
    small = {
        "block_out_channels": [6, 8],
        "num_vq_embeddings": 32,
        "refine_channels": 4,
        "news_block_out_channels": [6, 8],
        "evidence_channels": 4,
    }
    config["vqvae"].update(small)
    channels = VQMAGANModel(**config["vqvae"]).condition_channels + config["vqvae"]["latent_channels"]
    small = {"in_channels": channels, "block_out_channels": [8, 16], "norm_num_groups": 4}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config["unet"].update(small, **blocks)
    return config


@pytest.fixture
def tiny_news() -> dict:
    return load_tiny_news()


def drifting(*times: float, height: int = 96, width: int = 128) -> list[torch.Tensor]:
    """A picture that drifts by (3, 1) pixels per unit of time, as frames in [-1, 1]."""
    pictures = (torch.from_numpy(moving_picture(time, height, width)) for time in times)
    return [picture.permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in pictures]


def moving_patch() -> list[torch.Tensor]:
    """Three frames of a patch that moves by 16 pixels across a still picture; in the second it is at [32:64, 68:100]."""
    still, patch = drifting(0, 30, width=160)
    pictures = [still.clone() for _ in range(3)]
    for left, picture in zip((60, 68, 76), pictures):
        picture[..., 32:64, left : left + 32] = patch[..., 32:64, 60:92]
    return pictures


def two_processes(module_and_options: list) -> list:
    """The command that runs a module on two processes; on CPUs (ACCELERATE_USE_CPU=true) they talk through gloo."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--num_processes",
        "2",
    ]
    return [
        *launch,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
        "-m",
        *module_and_options,
    ]


def build_pipeline(config: dict) -> MADiffPipeline:
    torch.manual_seed(0)
    settings = dict(config["scheduler"])
    scheduler = getattr(diffusers, settings.pop("class"))(**settings)
    i2e = EventGANModel(**config["i2e"]) if "events" in config["hint_source"] else None
    pipeline = MADiffPipeline(
        vqvae=excite(VQMAGANModel(**config["vqvae"])).eval(),
        unet=UNet2DModel(**config["unet"]).eval(),
        scheduler=scheduler,
        i2e=None if i2e is None else i2e.eval(),
        hint_source=config["hint_source"],
        **config["pipeline"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(tiny: dict) -> MADiffPipeline:
    return build_pipeline(tiny)


@pytest.fixture
def checkpoint(pipeline, tmp_path) -> Path:
    """The tiny pipeline, saved."""
    pipeline.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


photograph = lru_cache(data.coffee)


def moving_picture(time: float, height: int = 64, width: int = 96) -> np.ndarray:
    """RGB uint8 view of a photograph that drifts by (3, 1) pixels per unit of time."""
    matrix = np.float32([[0.5, 0, -60 + 3 * time], [0, 0.5, -40 + time]])
    return cv2.warpAffine(photograph(), matrix, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)


@pytest.fixture
def pair() -> tuple:
    """Two batches `(2, 3, 51, 67)` in [0, 1]: a size that no network divides."""
    frames = [
        torch.stack([torch.from_numpy(moving_picture(time + shift, 51, 67)) for shift in (0, 9)]) for time in (-1, 1)
    ]
    return tuple(frame.permute(0, 3, 1, 2).float() / 255 for frame in frames)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of two short video files."""
    folder = tmp_path_factory.mktemp("clips")
    for name, direction in (("right", 1), ("left", -1)):
        writer = cv2.VideoWriter(str(folder / f"{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (96, 64))
        for i in range(12):
            writer.write(cv2.cvtColor(moving_picture(direction * i), cv2.COLOR_RGB2BGR))
        writer.release()
    return folder


@pytest.fixture
def diffusers_log(caplog):
    """What Diffusers' loggers say, ours among them; by themselves they hand nothing on to where `caplog` listens."""
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        yield caplog
    diffusers.utils.logging.disable_propagation()


@pytest.fixture
def shared_data() -> Path:
    """Folder of benchmark sets and clips, where there is one."""
    if "MADIFF_DATA" not in os.environ:
        pytest.skip("MADIFF_DATA is not set")
    return Path(os.environ["MADIFF_DATA"])
