"""The paper's scale: builds without memory, and one forward pass of each part at 256×256."""

import pytest
import torch
from diffusers import UNet2DModel

from madiff_diffusers import EventGANModel, VQMAGANModel
from tests.conftest import load_config


PARTS = {"i2e": EventGANModel, "vqvae": VQMAGANModel, "unet": UNet2DModel}


def build(part: str) -> torch.nn.Module:
    return PARTS[part](**load_config("paper")[part])


def test_has_the_papers_numbers():
    config = load_config("paper")
    with torch.device("meta"):
        vqvae, unet, i2e = (build(part) for part in ("vqvae", "unet", "i2e"))
    assert vqvae.downsample_factor == 32
    assert vqvae.quantize.embedding.weight.shape == (8192, 3)
    assert i2e.conv_out.weight.shape == (18, 32, 1, 1)
    assert unet.conv_in.weight.shape[:2] == (256, 45) and config["hint_source"] == "events"
    assert all(parameter.is_meta for model in (vqvae, unet, i2e) for parameter in model.parameters())


@torch.no_grad()
def test_i2e_forward():
    model = build("i2e").eval()
    assert model(torch.zeros(1, 1, 256, 256), torch.zeros(1, 1, 256, 256)).events.shape == (1, 18, 256, 256)


@torch.no_grad()
def test_vqvae_forward():
    model = build("vqvae").eval()
    frame, hints = torch.zeros(1, 3, 256, 256), torch.zeros(1, 18, 256, 256)
    out = model(frame, frame, frame, hints, hints)
    assert out.sample.shape == (1, 3, 256, 256)
    assert [offsets.shape[-1] for offsets in out.offsets] == [8, 16, 32, 64, 128, 256], "a warp at every scale"


@torch.no_grad()
def test_unet_forward():
    model = build("unet").eval()
    assert model(torch.zeros(1, 45, 8, 8), 999).sample.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("config", ["paper", "compact", "tiny"])
def test_every_config_fits_together(config):
    settings = load_config(config)
    channels = {"events": 18, "events+flow": 20, "events+fine_flow": 20}[settings["hint_source"]]
    assert settings["vqvae"]["hint_channels"] == channels
    assert settings["unet"]["in_channels"] == 9 + 2 * channels
