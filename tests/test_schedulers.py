"""The pipeline with Diffusers' schedulers: each against its update rule, written out here."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.sampling_steps import clean_latents


# ᾱ of the tiny configuration's schedule, and where two steps of it lie.
ALPHAS = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2, 0)
FIRST, SECOND = 999, 499

# A network: of latents of variance 1 and a timestep, the clean latents and the noise that it tells.
Network = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Draw = Callable[[], torch.Tensor]


def noised(clean: torch.Tensor, noise: torch.Tensor, time: int) -> torch.Tensor:
    return ALPHAS[time].sqrt() * clean + (1 - ALPHAS[time]).sqrt() * noise


def sigma(time: int) -> torch.Tensor:
    """Noise for a signal of 1."""
    return ((1 - ALPHAS[time]) / ALPHAS[time]).sqrt()


# Each rule takes two steps from noise and gives the clean latents of the last one.


def ddim(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Song et al., 2021, eq. 12 with η = 0."""
    z = noised(*network(z, FIRST), SECOND)
    return network(z, SECOND)[0]


def ddpm(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Ho et al., 2020, eq. 7, for a step from t to s: α = ᾱ_t / ᾱ_s."""
    clean, _ = network(z, FIRST)
    alpha, rest, rest_before = ALPHAS[FIRST] / ALPHAS[SECOND], 1 - ALPHAS[FIRST], 1 - ALPHAS[SECOND]
    mean = (ALPHAS[SECOND].sqrt() * (1 - alpha) * clean + alpha.sqrt() * rest_before * z) / rest
    z = mean + ((1 - alpha) * rest_before / rest).sqrt() * draw()
    return network(z, SECOND)[0]


def dpm_solver(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """DPM-Solver++ of first order (Lu et al., 2022, eq. 4.1), which its first step and the last of so few are."""
    clean, _ = network(z, FIRST)
    log_snr = [(ALPHAS[time] / (1 - ALPHAS[time])).log() / 2 for time in (FIRST, SECOND)]
    before, after = ((1 - ALPHAS[time]).sqrt() for time in (FIRST, SECOND))
    z = after / before * z - ALPHAS[SECOND].sqrt() * torch.expm1(log_snr[0] - log_snr[1]) * clean
    return network(z, SECOND)[0]


def euler(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """x' = x + (σ' − σ)·ε̂ (Karras et al., 2022, algorithm 1)."""
    x = sigma(FIRST) * z
    _, slope = network(x / (sigma(FIRST) ** 2 + 1).sqrt(), FIRST)
    x = x + (sigma(SECOND) - sigma(FIRST)) * slope
    return network(x / (sigma(SECOND) ** 2 + 1).sqrt(), SECOND)[0]


def euler_ancestral(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """As `euler` down to a smaller σ, and noise up to σ' again."""
    x = sigma(FIRST) * z
    _, slope = network(x / (sigma(FIRST) ** 2 + 1).sqrt(), FIRST)
    up = (sigma(SECOND) ** 2 * (sigma(FIRST) ** 2 - sigma(SECOND) ** 2) / sigma(FIRST) ** 2).sqrt()
    down = (sigma(SECOND) ** 2 - up**2).sqrt()
    x = x + (down - sigma(FIRST)) * slope + up * draw()
    return network(x / (sigma(SECOND) ** 2 + 1).sqrt(), SECOND)[0]


def heun(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Karras et al., 2022, algorithm 1: the mean of the slopes at both ends; none is at the end of the last step."""
    x = sigma(FIRST) * z
    _, slope = network(x / (sigma(FIRST) ** 2 + 1).sqrt(), FIRST)
    there = x + (sigma(SECOND) - sigma(FIRST)) * slope
    _, slope_there = network(there / (sigma(SECOND) ** 2 + 1).sqrt(), SECOND)
    x = x + (sigma(SECOND) - sigma(FIRST)) * (slope + slope_there) / 2
    return network(x / (sigma(SECOND) ** 2 + 1).sqrt(), SECOND)[0]


def lcm(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Luo et al., 2023: clean latents of a consistency model, and noise anew."""

    def consistent(z: torch.Tensor, time: int) -> torch.Tensor:
        share = 0.5**2 / ((10 * time) ** 2 + 0.5**2)
        return share * z + (1 - share) ** 0.5 * network(z, time)[0]

    return consistent(noised(consistent(z, FIRST), draw(), SECOND), SECOND)


def pndm(network: Network, z: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Pseudo linear multi-step (Liu et al., 2022): the first step again with the mean of the noise at its ends, then
    (3ε̂ − ε̂') / 2. What a transfer does (eq. 11) is what DDIM does. Its last clean latents are of that noise, for which the
    pipeline takes the network's own."""
    clean, first = network(z, FIRST)
    _, there = network(noised(clean, first, SECOND), SECOND)
    mean = (first + there) / 2
    clean = (z - (1 - ALPHAS[FIRST]).sqrt() * mean) / ALPHAS[FIRST].sqrt()
    return network(noised(clean, mean, SECOND), SECOND)[0]


RULES = {
    "DDIMScheduler": ddim,
    "DDPMScheduler": ddpm,
    "DPMSolverMultistepScheduler": dpm_solver,
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "HeunDiscreteScheduler": heun,
    "LCMScheduler": lcm,
    "LMSDiscreteScheduler": euler,  # which its first step is
    "PNDMScheduler": pndm,
    "UniPCMultistepScheduler": dpm_solver,  # which a predictor of first order is
}


def check(pipeline: MADiffPipeline, pair: tuple, name: str, **settings) -> None:
    """Every latent that the denoiser sees, and the last clean ones, against the rule for what the denoiser answered."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)
    prediction_type, calls = pipeline.scheduler.config.prediction_type, []
    hook = pipeline.unet.register_forward_hook(
        lambda module, inputs, output: calls.append((inputs[0][:, :3].double(), int(inputs[1]), output[0].double()))
    )
    start = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(3))
    arguments = {"latents": start, "num_inference_steps": 2, "output_type": "latent"}

    def made() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipeline(*pair, generator=generators, **arguments).frames[:, 0]

    found = made()
    hook.remove()
    left = iter(calls)

    def network(z: torch.Tensor, time: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen, told, output = next(left)
        assert told == time
        assert (seen - z).abs().max() <= 1e-4 * z.abs().max(), "the denoiser sees what the rule says"
        signal, noise = ALPHAS[time].sqrt(), (1 - ALPHAS[time]).sqrt()
        if prediction_type == "epsilon":
            return (z - noise * output) / signal, output
        if prediction_type == "sample":
            return output, (z - signal * output) / noise
        return signal * z - noise * output, signal * output + noise * z

    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = RULES[name](
        network, start.double(), lambda: torch.cat([torch.randn(1, 3, 8, 10, generator=each) for each in draws])
    )
    assert next(left, None) is None, "the denoiser is asked as often as the rule asks it"
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(found, made()), "the same noise, the same latents"


@pytest.mark.parametrize("name", RULES)
def test_any_scheduler(pipeline, pair, name):
    check(pipeline, pair, name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "LCMScheduler"],
)
def test_prediction_types(pipeline, pair, name, prediction_type):
    check(pipeline, pair, name, prediction_type=prediction_type)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_schedulers_of_more_steps_at_once(pipeline, pair, name):
    """What comes after the first step of these, or before it, is Diffusers' own matter; the frames must be frames."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    frames = pipeline(
        *pair, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).frames
    assert frames.isfinite().all() and frames.std() > 0.05


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_clean_latents_do_not_depend_on_who_computes_them(pipeline, prediction_type):
    """The formula for schedulers that give no clean latents, against DDIM's own."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    pipeline.scheduler.set_timesteps(4)
    z, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in pipeline.scheduler.timesteps:
        step = pipeline.scheduler.step(output, t, z)
        own = step.pred_original_sample
        step.pred_original_sample = None
        assert torch.allclose(clean_latents(pipeline.scheduler, step, output, z, t), own, rtol=1e-3, atol=1e-4)
