"""What of the true middle frame can reach a denoiser: another true frame, and what the denoiser sees then."""

import diffusers
import pytest
import torch
from diffusers import UNet2DModel

from madiff_diffusers import MADiffPipeline, MotionHintModel, VQMAGANModel
from tests.conftest import excite, moving_picture
from training.hints import draw_hints
from training.train_sampler import SamplerNetwork


def batch_of(truth: float) -> dict:
    """Two samples whose neighbours are always the same, and whose true frames are the picture at another time."""
    pictures = [
        torch.stack([torch.from_numpy(moving_picture(time + shift, 64, 96)) for shift in (0, 9)])
        for time in (-1, truth, 1)
    ]
    names = ("frame_prev", "frame_mid", "frame_next")
    batch = {name: each.permute(0, 3, 1, 2).float() / 127.5 - 1 for name, each in zip(names, pictures)}
    return {**batch, "time": torch.full((2,), 0.5)}


def hints(pipeline: MADiffPipeline, truth: float, probability: float, guess_share: float) -> torch.Tensor:
    shares = (probability, guess_share, 2, 0.0, False)
    with torch.no_grad():
        drawn = draw_hints(pipeline.vqvae, pipeline.hints, batch_of(truth), *shares, torch.Generator().manual_seed(0))
    return torch.cat(drawn)


def test_hints_of_the_training_of_a_denoiser_know_the_truth_by_its_share_alone(pipeline):
    start, true, guessed = (0.0, 0.0), (1.0, 0.0), (1.0, 1.0)
    assert torch.equal(hints(pipeline, 0.0, *start), hints(pipeline, 5.0, *start))
    assert not torch.equal(hints(pipeline, 0.0, *true), hints(pipeline, 5.0, *true)), (
        "whose hints are extracted from it"
    )
    # A guess is decoded from the true latents, noised, and from nothing else of the true frame.
    assert not torch.equal(hints(pipeline, 0.0, *guessed), hints(pipeline, 5.0, *guessed))
    hook = pipeline.vqvae.quant_conv.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    assert torch.equal(hints(pipeline, 0.0, *guessed), hints(pipeline, 5.0, *guessed))
    hook.remove()


class OneTensor:
    """A source whose start hints are one tensor for both neighbours."""

    hint_channels = 2

    def __init__(self):
        self.start_hints = torch.zeros(2, 2, 64, 96)

    def start(self, frame_prev, frame_next, time=0.5):
        return self.start_hints, self.start_hints

    def from_guess(self, frame_prev, frame_mid, frame_next):
        return self.start_hints - 3, self.start_hints + 3


def test_hints_of_a_source_are_not_written_into(pipeline):
    source = OneTensor()
    prev, next_ = draw_hints(
        pipeline.vqvae, source, batch_of(0.0), 1.0, 0.0, 1, 0.0, False, torch.Generator().manual_seed(0)
    )
    assert (prev == -3).all() and (next_ == 3).all() and not source.start_hints.any()


@pytest.mark.parametrize("absent, zeros", [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_a_share_of_start_hints_is_left_out(pipeline, absent, zeros):
    source = OneTensor()
    source.start_hints += 1
    hints = draw_hints(
        pipeline.vqvae, source, batch_of(0.0), 0.0, 0.0, 1, absent, False, torch.Generator().manual_seed(0)
    )
    for side in hints:
        assert sorted(each.mean().item() for each in side) == [0.0] * zeros + [1.0] * (2 - zeros)


@pytest.mark.parametrize("two_steps", [False, True])
def test_a_denoiser_of_news_sees_the_truth_in_its_noisy_latents_alone(tiny_news, two_steps):
    torch.manual_seed(0)
    settings = dict(tiny_news["scheduler"])
    scheduler = getattr(diffusers, settings.pop("class"))(**settings)
    network = SamplerNetwork(
        excite(MotionHintModel(**tiny_news["hint_model"])),
        excite(VQMAGANModel(**tiny_news["vqvae"])),
        excite(UNet2DModel(**tiny_news["unet"])),
        scheduler,
    ).eval()
    noise = torch.randn(2, 4, 16, 24)
    draws = {"noise": noise, "timesteps": torch.full((2,), 999), "choice": torch.zeros(2)}

    def seen(truth: float) -> list:
        inputs = []
        hook = network.unet.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        with torch.no_grad():
            network(batch_of(truth), draws, lambda hints: hints, two_steps)
        hook.remove()
        return inputs

    noisy, others = seen(0.0), seen(5.0)
    assert len(noisy) == 1 + two_steps
    assert torch.equal(noisy[0][:, 4:], others[0][:, 4:]), "all that it sees beside"
    assert not torch.equal(noisy[0][:, :4], others[0][:, :4])
    # In sampling, noise stands in the place of the noisy latents, and nothing is left of the truth: not in the second step either,
    # whose hints are from the first one's guess.
    scheduler.add_noise = lambda clean, noise, timesteps: noise
    assert all(torch.equal(one, other) for one, other in zip(seen(0.0), seen(5.0), strict=True))


@pytest.mark.parametrize("batch, guess_share", [(1, 0.5), (3, 0.5), (8, 0.7)])
def test_hints_that_are_never_dropped_are_of_each_kind_by_its_share(pipeline, batch, guess_share):
    class Counting:
        """Zeros, and how many of the frames that were shown were the true ones."""

        hint_channels = pipeline.vqvae.config.hint_channels
        shown = true = 0

        def start(self, frame_prev, frame_next, time=0.5):
            zeros = torch.zeros(len(frame_prev), self.hint_channels, *frame_prev.shape[-2:])
            return zeros, zeros

        def from_guess(self, frame_prev, frame_mid, frame_next):
            self.shown += len(frame_mid)
            self.true += int((frame_mid == 0.25).all(dim=(1, 2, 3)).sum())
            return self.start(frame_prev, frame_next)

    source, side = Counting(), pipeline.vqvae.downsample_factor
    sample = {name: torch.full((batch, 3, side, side), 0.25) for name in ("frame_prev", "frame_mid", "frame_next")}
    sample["time"] = torch.full((batch,), 0.5)
    generator, draws = torch.Generator().manual_seed(0), 200
    with torch.no_grad():
        for _ in range(draws):
            draw_hints(pipeline.vqvae, source, sample, 1.0, guess_share, 1, 0.0, False, generator)
    assert source.shown == batch * draws, "refined ones for all"
    assert source.true / source.shown == pytest.approx(1 - guess_share, abs=0.1)


@pytest.mark.parametrize("batch, probability, absent", [(5, 0.5, 1.0), (3, 0.5, 0.0), (10, 0.75, 0.0), (4, 0.9, 1.0)])
def test_kinds_of_hints_that_are_not_asked_for_are_not_given(pipeline, batch, probability, absent):
    """None of the true frame where all that are refined come from guesses, and no start hints where all others are absent."""
    side = pipeline.vqvae.downsample_factor

    class Marked:
        hint_channels = pipeline.vqvae.config.hint_channels
        shown = true = 0

        def start(self, frame_prev, frame_next, time=0.5):
            ones = torch.ones(len(frame_prev), self.hint_channels, *frame_prev.shape[-2:])
            return ones, ones

        def from_guess(self, frame_prev, frame_mid, frame_next):
            self.shown += len(frame_mid)
            self.true += int((frame_mid == 0.25).all(dim=(1, 2, 3)).sum())
            return tuple(2 * each for each in self.start(frame_prev, frame_next))

    sample = {name: torch.full((batch, 3, side, side), 0.25) for name in ("frame_prev", "frame_mid", "frame_next")}
    sample["time"] = torch.full((batch,), 0.5)
    source, generator, draws, left = Marked(), torch.Generator().manual_seed(0), 100, 0
    with torch.no_grad():
        for _ in range(draws):
            shares = (probability, 1.0, 1, absent, False)
            hints = draw_hints(pipeline.vqvae, source, sample, *shares, generator)[0]
            left += int((hints == 1).all(dim=(1, 2, 3)).sum())
    assert source.true == 0 and source.shown / (batch * draws) == pytest.approx(probability, abs=0.05)
    assert left == 0 if absent == 1 else left == batch * draws - source.shown
