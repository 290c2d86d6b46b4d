import pytest
import torch
import torch.nn.functional as F

from madiff_diffusers import EventGANModel, convert_eventgan_checkpoint


def model_and_frames():
    torch.manual_seed(0)
    model = EventGANModel(base_channels=4, num_encoders=2, num_residual_blocks=1)
    return model, torch.rand(2, 1, 37, 50) * 2 - 1, torch.rand(2, 1, 37, 50) * 2 - 1


def test_events_have_bins_for_both_polarities_and_are_never_negative():
    model, first, second = model_and_frames()
    events = model(first, second).events
    assert events.shape == (2, 18, 37, 50)
    assert events.min() >= 0 and events.max() > 0
    assert torch.equal(events, model(first, second, return_dict=False)[0])


def test_order_of_frames_matters():
    model, first, second = model_and_frames()
    model.eval()
    assert not torch.allclose(model(first, second).events, model(second, first).events)


def test_wrong_shapes_are_named():
    model, first, second = model_and_frames()
    with pytest.raises(ValueError, match=r"\(2, 3, 37, 50\)"):
        model(first.expand(-1, 3, -1, -1), second)


def test_every_parameter_receives_a_gradient():
    model, first, second = model_and_frames()
    model(first, second).events.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_save_and_load(tmp_path):
    model, first, second = model_and_frames()
    model.eval().save_pretrained(tmp_path)
    loaded = EventGANModel.from_pretrained(tmp_path)
    assert torch.equal(model(first, second).events, loaded(first, second).events)


def original_state(base: int = 4, encoders: int = 2, bins: int = 9, spectral: bool = True) -> dict:
    """A state dict with the names of https://github.com/alexzzhu/EventGAN (models/unet.py)."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    state = {"head.conv2d.weight": rand(base, 2, 3, 3), "head.conv2d.bias": rand(base)}
    state |= {"pred.conv2d.weight": rand(2 * bins, base, 1, 1), "pred.conv2d.bias": rand(2 * bins)}

    def norm(prefix: str, width: int) -> None:
        state[f"{prefix}.weight"], state[f"{prefix}.bias"] = rand(width), rand(width)
        state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"] = rand(width), rand(width).abs() + 0.5
        state[f"{prefix}.num_batches_tracked"] = torch.tensor(3)

    def conv(prefix: str, out_width: int, in_width: int, normed: bool) -> None:
        weight = rand(out_width, in_width, 3, 3)
        if not normed:
            state[f"{prefix}.weight"] = weight
            return
        state[f"{prefix}.module.weight_bar"] = weight
        # The vectors of a network that has trained for long: σ no longer changes from one iteration to the next.
        u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        state[f"{prefix}.module.weight_u"], state[f"{prefix}.module.weight_v"] = u[:, 0], v[0]

    for i in range(encoders):
        conv(f"encoders.{i}.conv2d", base * 2 ** (i + 1), base * 2**i, False)
        norm(f"encoders.{i}.norm_layer", base * 2 ** (i + 1))
    widest = base * 2**encoders
    for i in range(2):
        for j in (1, 2):
            conv(f"resblocks.{i}.conv{j}", widest, widest, spectral)
            norm(f"resblocks.{i}.bn{j}", widest)
    for i in range(encoders):
        width = widest // 2**i
        conv(f"decoders.{i}.conv2d", width // 2, width + width // 2, spectral)
        norm(f"decoders.{i}.norm_layer", width // 2)
    return state


def original_forward(state: dict, x: torch.Tensor, encoders: int = 2) -> torch.Tensor:
    """The original generator in eval mode, written from its description."""

    def weight(prefix: str) -> torch.Tensor:
        if f"{prefix}.weight" in state:
            return state[f"{prefix}.weight"]
        bar = state[f"{prefix}.module.weight_bar"]
        return bar / torch.linalg.matrix_norm(bar.flatten(1), 2)

    def norm(x: torch.Tensor, prefix: str) -> torch.Tensor:
        stats = [state[f"{prefix}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats)

    x = F.leaky_relu(F.conv2d(x, state["head.conv2d.weight"], state["head.conv2d.bias"], padding=1))
    skips = []
    for i in range(encoders):
        skips.append(x)
        x = F.conv2d(x, weight(f"encoders.{i}.conv2d"), stride=2, padding=1)
        x = F.leaky_relu(norm(x, f"encoders.{i}.norm_layer"))
    for i in range(2):
        y = F.relu(norm(F.conv2d(x, weight(f"resblocks.{i}.conv1"), padding=1), f"resblocks.{i}.bn1"))
        x = F.relu(x + norm(F.conv2d(y, weight(f"resblocks.{i}.conv2"), padding=1), f"resblocks.{i}.bn2"))
    for i in range(encoders):
        skip = skips.pop()
        x = torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1)
        x = F.leaky_relu(norm(F.conv2d(x, weight(f"decoders.{i}.conv2d"), padding=1), f"decoders.{i}.norm_layer"))
    return F.relu(F.conv2d(x, state["pred.conv2d.weight"], state["pred.conv2d.bias"]))


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_converted_checkpoint_computes_what_the_original_does(tmp_path, spectral, nested):
    state = original_state(spectral=spectral)
    path = tmp_path / "original.pt"
    torch.save({"gen": state, "epoch": 3} if nested else state, path)
    if not spectral:  # unwrapped layers have plain names
        assert not any("module" in name for name in state)
    model = convert_eventgan_checkpoint(path)
    frames = torch.rand(1, 2, 24, 36) * 2 - 1
    events = model(frames[:, :1], frames[:, 1:]).events
    expected = original_forward(state, frames)
    assert torch.allclose(events, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    path = tmp_path / "evil.pt"
    torch.save({"gen": Evil()}, path)
    with pytest.raises(ValueError, match="tensors alone"):
        convert_eventgan_checkpoint(path)


def test_other_checkpoints_are_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no EventGAN generator"):
        convert_eventgan_checkpoint(path)
    state = original_state()
    del state["pred.conv2d.bias"]
    torch.save({"gen": state}, path)
    with pytest.raises(ValueError, match="conv_out.bias"):
        convert_eventgan_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        convert_eventgan_checkpoint(tmp_path / "missing.pt")
