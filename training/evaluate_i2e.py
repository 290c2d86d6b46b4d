"""Score an image-to-event generator on events simulated from clips that it was not trained on.

    python -m training.evaluate_i2e --data CLIPS --i2e runs/i2e/i2e

Prints the mean absolute error per volume element of the model, of predicting no events, and of spreading the change of
log-intensity evenly over the time bins (with the true contrast thresholds, which the model is not told).
"""

import argparse
import json

import torch

from madiff_diffusers.eventgan import EventGANModel
from training.data.datasets import build_dataset
from training.data.transforms import EventTransform
from training.event_simulation import LOG_EPS
from training.options import RunOptions, one_line_errors


def spread_evenly(
    frame_first: torch.Tensor, frame_second: torch.Tensor, thresholds: torch.Tensor, num_bins: int
) -> torch.Tensor:
    """Event volume `(2 * num_bins, H, W)` of a brightness that changes at a constant rate between two grey frames."""
    change = torch.log((frame_second + 1) / 2 + LOG_EPS) - torch.log((frame_first + 1) / 2 + LOG_EPS)  # [1,H,W]
    decrease, increase = thresholds
    counts = torch.cat([change.clamp(min=0) / increase, (-change).clamp(min=0) / decrease])  # [2,H,W]
    # Events are told to the two bins that they are next to, so that the first and the last one get half as many as others.
    shares = torch.full((num_bins,), 1.0 / max(num_bins - 1, 1))
    if num_bins > 1:
        shares[[0, -1]] /= 2
    return (counts[:, None] * shares[None, :, None, None]).flatten(0, 1)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="FORMAT:PATH as in training; a folder of video files without a format"
    )
    parser.add_argument("--i2e", required=True, help="folder of a trained EventGANModel")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--frames", type=int, default=3, help="pairs are 1 to FRAMES - 1 source frames apart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in (("samples", 1), ("resolution", 1), ("frames", 2), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` must be {least} or more, but is {getattr(args, name)}.")
    model = EventGANModel.from_pretrained(args.i2e).eval()
    num_bins = model.config.num_bins
    options = RunOptions(data=args.data, resolution=args.resolution, gaps=(1.0,), candidates=1, seed=args.seed)
    data = build_dataset(options, EventTransform(num_bins, args.frames))
    errors: dict[str, float] = {}
    for i in range(args.samples):
        sample = data[i]
        first, second, truth = sample["frame_first"], sample["frame_second"], sample["events"]
        predictions = {"model": model(first[None], second[None]).events[0], "zeros": torch.zeros_like(truth)}
        if sample["thresholds"].isfinite().all():  # of recorded events nobody knows them
            predictions["spread_evenly"] = spread_evenly(first, second, sample["thresholds"], num_bins)
        for name, prediction in predictions.items():
            errors[name] = errors.get(name, 0.0) + (prediction - truth).abs().mean().item() / args.samples
    print(json.dumps({name: round(error, 5) for name, error in errors.items()}))


if __name__ == "__main__":
    with one_line_errors():
        main()
