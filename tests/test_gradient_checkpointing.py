"""Gradient checkpointing in each of the three networks: the same gradients, with less kept for the backward pass."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel

from madiff_diffusers import EventGANModel, VQMAGANModel
from tests.conftest import excite, load_config


PARTS = {"i2e": EventGANModel, "vqvae": VQMAGANModel, "unet": UNet2DModel}


def loss_of(part: str, settings: dict) -> Callable[[torch.nn.Module], torch.Tensor]:
    torch.manual_seed(0)
    frames = torch.rand(3, 2, 3, 64, 64)
    if part == "i2e":
        return lambda model: model(frames[0, :, :1], frames[1, :, :1]).events.square().mean()
    if part == "vqvae":
        hints = torch.rand(2, 2, settings["hint_channels"], 64, 64)
        return lambda model: model(*frames, *hints).sample.square().mean()
    latents = torch.randn(2, settings["in_channels"], 8, 8)
    return lambda model: model(latents, torch.tensor([3, 900])).sample.square().mean()


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Size of the tensors that a forward pass keeps for the backward pass."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run().backward()
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values())


@pytest.mark.parametrize("config", ["tiny", "compact"])
@pytest.mark.parametrize("part", PARTS)
def test_same_gradients_from_less_memory(part, config):
    settings = load_config(config)[part]
    torch.manual_seed(0)
    model = excite(PARTS[part](**settings)).train()
    loss = loss_of(part, settings)
    gradients, kept, counted = [], [], []
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        for name, each in model.named_buffers():
            each.copy_(buffers[name])
        kept.append(kept_bytes(lambda: loss(model)))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        counted.append({name: each.clone() for name, each in model.named_buffers()})
    assert all(torch.equal(counted[0][name], counted[1][name]) for name in buffers), "batch norms count a batch once"
    assert gradients[0].keys() == gradients[1].keys()
    assert all((gradients[0][name] - gradients[1][name]).abs().max() <= 1e-5 for name in gradients[0])
    print(f"\n{config} {part}: {kept[0] / 2**20:.1f} MiB kept, {kept[1] / 2**20:.1f} with gradient checkpointing")
    assert kept[1] < 0.8 * kept[0]
