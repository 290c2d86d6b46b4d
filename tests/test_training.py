"""Each training script as a user starts it: real processes, the `tiny` configuration, clips in a folder."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel

from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel
from tests.conftest import REPOSITORY, load_config, moving_picture
from training.data import EventSamples, TripletSamples, move_still, read_clip, read_clips
from training.losses import PatchDiscriminator, adaptive_weight, discriminator_hinge_loss

STAGES = {"i2e": "train_i2e", "vqvae": "train_vq_magan", "unet": "train_denoiser"}


def command(stage: str, clips: Path, runs: Path, *flags: str) -> list:
    needs = {"i2e": [], "vqvae": ["i2e"], "unet": ["i2e", "vqvae"]}[stage]
    folders = [part for name in needs for part in (f"--{name}", str(runs / name / name))]
    base = [sys.executable, "-m", f"training.{STAGES[stage]}", "--config", "tiny", "--data", str(clips)]
    return [*base, "--output", str(runs / stage), *folders, *flags]


def launch(arguments: list, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, **keywords)


def rows(folder: Path) -> list:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory) -> Path:
    """All three stages, 20 steps each."""
    runs = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        done = launch(command(stage, clips, runs))
        assert done.returncode == 0, done.stderr
    return runs


def test_three_stages_make_a_pipeline(trained):
    for stage in STAGES:
        assert [int(row["step"]) for row in rows(trained / stage)] == list(range(1, 21))
        assert [path.name for path in (trained / stage / "checkpoints").iterdir()] == ["step_00000020"]
        assert yaml.safe_load((trained / stage / "args.yaml").read_text())["steps"] == 20
    i2e = EventGANModel.from_pretrained(trained / "i2e" / "i2e")
    assert not any("parametrizations" in name for name in i2e.state_dict()), "spectral norm is folded"
    vqvae = VQMAGANModel.from_pretrained(trained / "vqvae" / "vqvae")
    assert vqvae.config.scaling_factor != 1
    pipeline = MADiffPipeline.from_pretrained(trained / "unet" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    frames = [torch.from_numpy(moving_picture(time)).permute(2, 0, 1) for time in (-1, 1)]
    assert pipeline(*frames, output_type="pt").frames.isfinite().all()
    unet = UNet2DModel.from_pretrained(trained / "unet" / "unet")
    assert torch.equal(unet.conv_in.weight, pipeline.unet.conv_in.weight)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_and_accumulation(stage, clips, trained, tmp_path):
    for name in STAGES:
        if name != stage:
            (tmp_path / name).symlink_to(trained / name)
    done = launch(
        command(stage, clips, tmp_path, "--mixed_precision", "bf16", "--accumulation", "2", "--steps", "6")
    )
    assert done.returncode == 0, done.stderr
    assert [int(row["samples"]) for row in rows(tmp_path / stage)] == list(range(4, 28, 4))


def test_discriminators_take_part_from_their_first_step_on(trained):
    for stage in ("i2e", "vqvae"):
        adversarial = [float(row["gan"]) != 0 for row in rows(trained / stage)]
        assert adversarial == [False] * 4 + [True] * 16


@pytest.mark.parametrize("stage", STAGES)
def test_loss_falls_on_one_fixed_batch(stage, clips, trained, tmp_path):
    # One clip of three frames as large as the crop: every sample is the same picture, turned or mirrored.
    import cv2

    fixed = tmp_path / "fixed"
    fixed.mkdir()
    writer = cv2.VideoWriter(str(fixed / "only.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (32, 32))
    for i in range(3):
        writer.write(cv2.cvtColor(moving_picture(2 * i, 32, 32), cv2.COLOR_RGB2BGR))
    writer.release()
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in STAGES:
        if name != stage:
            (runs / name).symlink_to(trained / name)
    flags = ["--steps", "60", "--disc_start", "1000"] if stage != "unet" else ["--steps", "60"]
    done = launch(command(stage, fixed, runs, *flags))
    assert done.returncode == 0, done.stderr
    name = {"i2e": "l1", "vqvae": "l1", "unet": "loss"}[stage]
    losses = [float(row[name]) for row in rows(runs / stage)]
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_started_again_goes_on_from_where_it_was(stage, clips, trained, tmp_path):
    for name in STAGES:
        if name != stage:
            (tmp_path / name).symlink_to(trained / name)
    arguments = command(stage, clips, tmp_path)
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:  # the checkpoint of step 10 is whole once step 11 is logged
        if line.startswith("step=11 "):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / stage / stage).exists()
    done = launch(arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed at step 1[05]\b", done.stdout), "it may have come to the next checkpoint before it died"
    assert rows(tmp_path / stage) == rows(trained / stage)
    done = launch(arguments)
    assert done.returncode == 0 and "resumed at step 20" in done.stdout, "a finished run finishes at once"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config", "giant"], "--config must be one of compact, paper, tiny"),
        (["--steps", "5", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--data", "/nowhere"], "'/nowhere' has none"),
        (["--steps", "1e5x"], "--steps must be of type int"),
        (["--gaps", "0.5,0.5"], "--gaps must be of type"),
        (["--mixed_precision", "fp16", "--accumulation", "2"], "fp16 with `accumulation` > 1"),
    ],
)
def test_wrong_options_are_named(clips, tmp_path, flags, message):
    done = launch(command("i2e", clips, tmp_path, *flags))
    assert done.returncode != 0 and message in done.stderr


def test_unknown_keys_of_a_configuration_are_named(clips, tmp_path, tiny):
    tiny["train_i2e"]["stepz"] = 3
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny))
    done = launch(command("i2e", clips, tmp_path, "--config", str(path)))
    assert done.returncode == 2 and "unknown key(s) stepz" in done.stderr


def samples(clips: Path, **changes) -> TripletSamples:
    settings = {"crop": 32, "gaps": (0.5, 0.5), "candidates": 2, "length": 40, "seed": 0, **changes}
    return TripletSamples(read_clips(str(clips)), **settings)


def test_samples_follow_from_seed_and_index(clips):
    first, second = samples(clips), samples(clips)
    assert all(torch.equal(first[7][name], second[7][name]) for name in first[7])
    assert not torch.equal(first[7]["frame_mid"], first[8]["frame_mid"])
    assert not torch.equal(first[7]["frame_mid"], samples(clips, seed=1)[7]["frame_mid"])
    assert first[0]["frame_prev"].shape == (3, 32, 32)
    assert -1 <= first[0]["frame_prev"].min() and first[0]["frame_prev"].max() <= 1


def test_the_middle_frame_lies_between_the_others(clips):
    for sample in (samples(clips)[i] for i in range(10)):
        prev, mid, next_ = (sample[name] for name in ("frame_prev", "frame_mid", "frame_next"))
        assert (prev - mid).abs().mean() < (prev - next_).abs().mean()


def test_event_samples_match_their_frames(clips):
    settings = {"crop": 32, "gaps": (1.0,), "candidates": 1, "length": 20, "seed": 0}
    for share in (0.0, 1.0):
        data = EventSamples(
            read_clips(str(clips)), num_bins=5, frames=3, upsampling=2, moved_still_share=share, **settings
        )
        change, events = [], []
        for i in range(20):
            sample = data[i]
            assert sample["events"].shape == (10, 32, 32)
            change.append(float((sample["frame_second"] - sample["frame_first"]).mean()))
            events.append(float(sample["events"][:5].mean() - sample["events"][5:].mean()))
        assert np.corrcoef(change, events)[0, 1] > 0.5, "where it gets brighter, increases prevail"


def test_a_moved_still_moves_smoothly():
    frames = move_still(moving_picture(0)[..., 0], 9, np.random.default_rng(0)).astype(float)
    steps = [np.abs(a - b).mean() for a, b in zip(frames[:-1], frames[1:])]
    assert frames.shape == (9, 64, 96) and max(steps) < 0.5 * np.abs(frames[0] - frames[-1]).mean()


def test_clips_that_are_too_small_or_unreadable_are_named(clips, tmp_path):
    with pytest.raises(ValueError, match="`crop` 80"):
        samples(clips, crop=80)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(ValueError, match="broken.mp4"):
        read_clip(broken)


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (weight * torch.tensor([3.0, 4.0])).sum(), (weight * torch.tensor([0.0, 2.0])).sum()
    assert adaptive_weight(reconstruction, adversarial, weight).item() == pytest.approx(5 / 2.0001, rel=1e-4)


def test_discriminator_learns_to_tell_noise_from_flat_patches():
    torch.manual_seed(0)
    network = PatchDiscriminator(3, base_channels=8, num_layers=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32)
        loss = discriminator_hinge_loss(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("config", ["tiny", "compact"])
def test_every_parameter_of_the_denoiser_receives_a_gradient(config):
    settings = load_config(config)["unet"]
    torch.manual_seed(0)
    model = UNet2DModel(**settings)
    sample = torch.randn(2, settings["in_channels"], 8, 8)
    model(sample, torch.tensor([3, 900])).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
