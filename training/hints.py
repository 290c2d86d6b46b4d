"""Motion hints as training draws them: from the true middle frame, from a guess of it, or none yet."""

from typing import Any

import torch

from madiff_diffusers.eventgan import EventGANModel
from madiff_diffusers.hint_registry import build_hint_source, hint_parts
from madiff_diffusers.motion_hints import HintPair, HintSource, damp_hints
from madiff_diffusers.vq_magan import VQMAGANModel


def load_hint_source(
    config: dict[str, Any], i2e: str, device: torch.device
) -> tuple[HintSource, EventGANModel | None]:
    """The hint source of a configuration, and its frozen image-to-event generator if it has one.

    Raises:
        ValueError: if the source needs a generator and `i2e` is empty, or lacks weights of one.
    """
    name, settings, event_scale = (
        config["hint_source"],
        config["pipeline"].get("hint_settings"),
        config["pipeline"].get("event_scale", 1),
    )
    if "events" not in hint_parts(name):
        return build_hint_source(name, settings=settings), None
    if not i2e:
        raise ValueError(f"`i2e` is needed with `hint_source` {name}: the folder of a trained EventGANModel.")
    model = EventGANModel.from_pretrained(i2e).to(device, memory_format=torch.channels_last)
    model = model.requires_grad_(False).eval()
    return build_hint_source(name, model, settings=settings, event_scale=event_scale), model


def draw_hints(
    model: VQMAGANModel,
    source: HintSource,
    batch: dict[str, torch.Tensor],
    probability: float,
    guess_share: float,
    guess_rounds: int,
    absent_share: float,
    damped: bool,
    generator: torch.Generator,
) -> HintPair:
    """Motion hints for each sample of a batch: with `probability` refined ones, of which a share of `guess_share` comes
    from a decoded guess and the rest from the true middle frame; start hints otherwise, or zeros for a share of `absent_share` of those.

    Sampling never sees the true middle frame. A guess is made as it makes one: decoded from latents of any quality with
    start hints, and then, up to `guess_rounds` times in all, with the hints that the guess before gave, `damped` or not.
    """
    prev, mid, next_, time = batch["frame_prev"], batch["frame_mid"], batch["frame_next"], batch["time"]
    # Written into below: what a source gives may be one tensor for both, or its own.
    hints_prev, hints_next = (each.clone() for each in start_hints(source, prev, next_, time))
    # Counts are drawn rather than each sample's fate, so that a batch comes in two sizes at most: for convolutions,
    # every new size is a new kernel to be made.
    order = torch.randperm(len(mid), generator=generator).to(mid.device)

    # One number rounds them all, so that a kind whose share is nothing gets nothing.
    chance = torch.rand((), generator=generator, dtype=torch.float64).item()

    def drawn(share: float, chance: float) -> int:
        return int(len(mid) * share + chance)

    found = drawn(probability, chance)
    guessed = min(drawn(probability * guess_share, chance), found)
    true = found - guessed
    absent = min(drawn((1 - probability) * absent_share, 1 - chance), len(mid) - found)
    rounds = int(torch.randint(1, guess_rounds + 1, (), generator=generator))
    chosen = order[:guessed]
    for number in range(1, 1 + (rounds if len(chosen) else 0)):
        noise = latent_noise(model, mid[chosen], 1.0, generator)
        guess = model(
            mid[chosen],
            prev[chosen],
            next_[chosen],
            hints_prev[chosen],
            hints_next[chosen],
            latent_noise=noise,
            time=time[chosen],
        ).sample.clamp(-1, 1)
        refined = source.from_guess(prev[chosen], guess, next_[chosen])
        if damped:
            refined = damp_hints((hints_prev[chosen], hints_next[chosen]), refined, number)
        hints_prev[chosen], hints_next[chosen] = refined
    chosen = order[guessed : guessed + true]
    if len(chosen):
        hints_prev[chosen], hints_next[chosen] = source.from_guess(prev[chosen], mid[chosen], next_[chosen])
    chosen = order[guessed + true : guessed + true + absent]
    hints_prev[chosen], hints_next[chosen] = 0.0, 0.0
    return hints_prev, hints_next


def start_hints(source: HintSource, prev: torch.Tensor, next_: torch.Tensor, time: torch.Tensor) -> HintPair:
    """Start hints of a batch whose samples are at instants `time` `(B,)`, each its own."""
    instants = time.tolist()
    if len(set(instants)) == 1:
        return source.start(prev, next_, instants[0])
    parts = {}
    for instant in sorted(set(instants)):
        chosen = [i for i, other in enumerate(instants) if other == instant]
        for i, *pair in zip(chosen, *source.start(prev[chosen], next_[chosen], instant)):
            parts[i] = pair
    hints_prev, hints_next = (torch.stack(side) for side in zip(*(parts[i] for i in range(len(instants)))))
    return hints_prev, hints_next


def latent_noise(model: VQMAGANModel, frames: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise in the shape of the frames' latents; each sample's strength is uniform in [0, level]."""
    batch, _, height, width = frames.shape
    f = model.downsample_factor
    noise = torch.randn(batch, model.quantize.vq_embed_dim, height // f, width // f, generator=generator)
    return (noise * level * torch.rand(batch, 1, 1, 1, generator=generator)).to(frames.device)


def refine_as_sampling(
    model: VQMAGANModel, source: HintSource, prev: torch.Tensor, mid: torch.Tensor, next_: torch.Tensor
) -> tuple[HintPair, dict]:
    """The true latents decoded as sampling decodes its own: with start hints, then with hints refined from that guess. Returns the
    last hints and what the decoder gave for them."""
    guess = model(mid, prev, next_, *source.start(prev, next_)).sample.clamp(-1, 1)
    hints = source.from_guess(prev, guess, next_)
    return hints, model(mid, prev, next_, *hints)
