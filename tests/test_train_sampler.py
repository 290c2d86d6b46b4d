"""Training of motion news: clips held on the device, composed scenes, and the stage that trains all parts through the sampler."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

from madiff_diffusers import MADiffPipeline, RIFEFlowModel, SearchHints, VQMAGANModel
from madiff_diffusers.frame_coding import EncodedFrames, FrameCoder
from madiff_diffusers.motion_hints import FlowHints
from madiff_diffusers.warping import warp
from tests.conftest import REPOSITORY, build_pipeline, excite, moving_picture
from tests.processes import layout_script, run_python, run_two_ranks
from tests.test_metrics import backbone_file, random_backbone_file, random_lpips
from tests.video_files import drifting, write_video
from training.crop_cache import CropCache, compressed, write_crops
from training.frame_bank import FrameBank, augment, composed
from training.losses import gram_loss, part_of_both
from training.train_sampler import SamplerNetwork, distance, disturbed, easiness


CPU = torch.device("cpu")
TWO_PROCESSES = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def bank(clips) -> FrameBank:
    return FrameBank(str(clips), CPU, least=48)


# ---- data ----


def test_triplets_are_frames_of_one_clip_in_their_order(bank):
    """The clips drift by (3, 1) pixels a frame, so that a crop of a frame is another's, moved by that."""
    batch = bank.triplets(6, 48, (0, 1.0), any_time=0.5, candidates=1, generator=generator())
    assert set(batch["time"].tolist()) <= {0.25, 0.5, 0.75} and len(set(batch["time"].tolist())) > 1
    for prev, mid, next_, instant in zip(*(batch[name] for name in ("frame_prev", "frame_mid", "frame_next", "time"))):
        errors = {}
        for sign in (-1, 1):
            for away, other in ((instant, prev), (1 - instant, next_)):
                direction = sign if other is prev else -sign
                shift = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1) * 4 * away * direction
                moved = warp(other[None], shift.expand(1, 2, 48, 48))
                errors[sign] = errors.get(sign, 0) + (moved - mid)[..., 16:-16, 16:-16].abs().mean().item()
        assert min(errors.values()) < 0.12 < 1.5 * max(errors.values())


def test_the_same_seed_draws_the_same_batch(bank):
    first, again = (bank.triplets(3, 48, (0.5, 0.5), 0.5, 3, generator(7)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_reversed_samples_have_the_other_instant(bank):
    batch = bank.triplets(64, 48, (0, 1.0), any_time=1.0, candidates=1, generator=generator(3))
    changed = augment(batch, 32, generator(3))
    assert changed["frame_mid"].shape == (64, 3, 32, 32)
    turned = changed["time"] != batch["time"]
    assert 10 < int(turned.sum()) and torch.equal(changed["time"][turned], 1 - batch["time"][turned])
    assert all(each.abs().max() <= 1 for name, each in changed.items() if name != "time")


def test_hints_follow_mirrored_and_reversed_frames(bank):
    scenes, flow = composed(bank, 32, 48, layers=0, generator=generator(1))

    def errors(batch: dict) -> tuple[float, float]:
        """Of neighbours warped along the hints, and as they are; away from borders, which the scenes move across."""
        sides = [
            (batch[f"frame_{name}"], batch["hints"][:, first : first + 2])
            for name, first in (("prev", 0), ("next", 2))
        ]
        middle = batch["frame_mid"][..., 16:-16, 16:-16]
        warped, still = (
            sum((each - middle).abs().mean().item() for each in pictures)
            for pictures in zip(*((warp(*side)[..., 16:-16, 16:-16], side[0][..., 16:-16, 16:-16]) for side in sides))
        )
        return warped, still

    before, after = errors({**scenes, "hints": flow}), errors(augment({**scenes, "hints": flow}, 48, generator(2)))
    assert before[0] < 0.5 * before[1] and after[0] < 0.6 * after[1]


def test_crops_are_kept_with_their_hints(clips, tmp_path):
    write_crops(str(clips), tmp_path / "crops", count=4, size=56)
    cache = CropCache(str(tmp_path / "crops"), CPU)
    batch = cache.triplets(6, 48, generator())
    assert batch["hints"].shape == (6, 4, 48, 48) and batch["frame_mid"].shape == (6, 3, 48, 48)
    assert ((batch["time"] > 0) & (batch["time"] < 1)).all()
    whole = cache.triplets(1, 56, generator())
    expected = torch.cat(FlowHints(fine=True).start(whole["frame_prev"], whole["frame_next"], whole["time"].item()), 1)
    assert torch.allclose(whole["hints"], expected, atol=0.02, rtol=0.01)
    with pytest.raises(ValueError, match="crops must be a folder made by training.crop_cache"):
        CropCache(str(tmp_path), CPU)


def test_crops_are_kept_with_hints_to_finish(clips, tmp_path):
    write_crops(str(clips), tmp_path / "crops", count=2, size=64, hint_source="search", begun=True)
    cache = CropCache(str(tmp_path / "crops"), CPU)
    whole = cache.triplets(1, 64, generator())
    begun = SearchHints().begin(whole["frame_prev"], whole["frame_next"], whole["time"].item())
    expected = 4 * F.interpolate(torch.cat(begun, dim=1), scale_factor=4.0, mode="bilinear", align_corners=False)
    assert cache.begun and torch.allclose(whole["hints"][..., 8:-8, 8:-8], expected[..., 8:-8, 8:-8], atol=0.5)
    assert whole["hints"].shape == (1, 4, 64, 64)
    with pytest.raises(ValueError, match="`begun` needs a `hint_source` that begins hints .*, but it is fine_flow"):
        write_crops(str(clips), tmp_path / "others", count=1, size=64, begun=True)
    assert not (tmp_path / "others").exists()


def test_crops_are_composed_as_often_as_asked_for(clips, tmp_path):
    for share in (0.0, 1.0):
        write_crops(str(clips), tmp_path / str(share), count=2, size=56, composed_share=share)
    drawn = generator(0)
    torch.rand((), generator=drawn)
    scene, _ = composed(FrameBank(str(clips), CPU, 56), 1, 56, 3, drawn)
    expected = ((scene["frame_mid"][0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    kept, clip = (CropCache(str(tmp_path / share), CPU).frames[0, 1] for share in ("1.0", "0.0"))
    assert (kept == expected).all() and (clip != expected).any()


def test_crops_are_cut_larger_and_made_smaller(clips, tmp_path):
    write_crops(str(clips), tmp_path / "crops", count=1, size=40, smaller_share=1.0)
    drawn = generator(0)
    torch.rand((), generator=drawn)
    side = round(40 * (1 + 0.5 * torch.rand((), generator=drawn).item())) // 2 * 2
    bank = FrameBank(str(clips), CPU, 40)
    assert bank.largest == 64 and 40 < side <= 60
    cut = bank.triplets(1, side, (0.3, 0.3, 0.22, 0.18), 0.35, 4, drawn)["frame_mid"]
    smaller = F.interpolate(cut, size=(40, 40), mode="bicubic", align_corners=False, antialias=True)[0]
    kept = torch.from_numpy(CropCache(str(tmp_path / "crops"), CPU).frames[0, 1].copy()).permute(2, 0, 1) / 127.5 - 1
    assert (kept - smaller.clamp(-1, 1)).abs().max() < 0.01


def test_no_crop_is_larger_than_its_clip(tmp_path):
    """A black clip of 96 by 64 pixels and a white one of 128 by 96: what is cut larger than the former is white."""
    for name, height, width, value in (("small", 64, 96, 0), ("large", 96, 128, 255)):
        frames = [np.full((height, width, 3), value, np.uint8)] * 6
        write_video(tmp_path / f"{name}.mp4", frames, range(6), Fraction(1, 25))
    bank = FrameBank(str(tmp_path), CPU, 48)
    assert bank.largest == 96
    means = {
        size: bank.triplets(16, size, (1.0,), 0.0, 1, generator())["frame_mid"].mean((1, 2, 3)) for size in (64, 90)
    }
    assert means[64].min() < -0.9 and means[64].max() > 0.9 and means[90].min() > 0.9


def test_folders_inside_are_not_trained_on(clips, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(clips, folder)
    shutil.copytree(clips, folder / "held_out")
    assert FrameBank(str(folder), CPU, 40).count == FrameBank(str(clips), CPU, 40).count


def test_crops_are_compressed_as_far_as_asked_for(clips, tmp_path):
    cut = FrameBank(str(clips), CPU, 56).triplets(1, 56, (1.0,), 0.0, 1, generator())
    frames = torch.cat([cut[name] for name in ("frame_prev", "frame_mid", "frame_next")])
    pixels = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    away = [abs(compressed(pixels, each).astype(float) - pixels).mean() for each in (1, 6, 31)]
    assert 0 < away[0] < 0.7 * away[1] < 0.7 * away[2] and away[1] < 12
    write_crops(str(clips), tmp_path / "crops", count=1, size=56, compressed_share=1.0)
    write_crops(str(clips), tmp_path / "plain", count=1, size=56)
    made, plain = (CropCache(str(tmp_path / name), CPU).frames[0].astype(float) for name in ("crops", "plain"))
    assert made.shape == plain.shape and abs(made - plain).mean() > 0.3


def test_crops_have_hints_that_a_checkpoint_finished(clips, tmp_path, tiny_news):
    """By its own hint source, of its own settings."""
    torch.manual_seed(0)
    unpolished = {"search": {"finest_scale": 1, "polish": False}}
    config = {**tiny_news["pipeline"], "hint_settings": unpolished}
    pipeline = build_pipeline({**tiny_news, "hint_source": "search", "pipeline": config})
    excite(pipeline.vqvae)
    pipeline.save_pretrained(tmp_path / "checkpoint")
    write_crops(str(clips), tmp_path / "crops", count=1, size=64, finished_by=str(tmp_path / "checkpoint"))
    cache = CropCache(str(tmp_path / "crops"), CPU)
    whole = cache.triplets(1, 64, generator())
    neighbours = [EncodedFrames(whole[f"frame_{name}"], (64, 64)) for name in ("prev", "next")]

    def close(source: SearchHints) -> float:
        with torch.no_grad():
            finished = FrameCoder(pipeline.vqvae).motion_hints(
                source, *neighbours, [whole["time"].item()], whole["time"]
            )
        return ((torch.cat(finished, dim=1) - whole["hints"]).abs() < 0.05).float().mean().item()

    assert not cache.begun and cache.hint_source == "search" and cache.hint_settings == unpolished
    assert close(SearchHints(polish=False)) > 0.95  # whole grey values of the crops may tip a choice
    assert close(SearchHints()) < 0.9


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "`output` must not be there yet"),
        ({"smaller_share": -0.5}, "`smaller_share` must be from 0 to 1, but is -0.5"),
        ({"compressed_share": 2.0}, "`compressed_share` must be from 0 to 1, but is 2.0"),
        ({"compressed_share": 1.0, "size": 55}, "`size` must be even where crops are compressed, but is 55"),
        (
            {"finished_by": "madiff-fast", "hint_source": "fine_flow"},
            "`hint_source` must be that of `finished_by` 'madiff-fast', search, or not be given, but is fine_flow",
        ),
        ({"finished_by": "madiff-fast", "hint_source": "search", "begun": True}, "`begun` must not be given with"),
        ({"finished_by": "/not/there"}, "`finished_by` must be a checkpoint, but '/not/there'"),
        (
            {"finished_by": "madiff-compact"},
            "`finished_by` must be a checkpoint whose decoder guesses motion and .*, but is 'madiff-compact'",
        ),
        ({"finished_by": "madiff-fast"}, "`size` must be a multiple of 32 .*, but is 56"),
        ({"composed_share": 1.5}, "`composed_share` must be from 0 to 1, but is 1.5"),
        ({"count": 0}, "`count` must be a positive integer, but is 0"),
        ({"size": 999}, "`data` must have videos of three frames or more that are at least 999 pixels"),
        ({"count": 10**12}, "`output` must lie where .* GiB are free"),
        ({"hint_source": "not_there"}, "not_there"),
    ],
)
def test_crops_that_cannot_be_made_leave_what_is_there(clips, tmp_path, arguments, message):
    output = tmp_path / ("new" if arguments else "kept")
    if not arguments:
        output.mkdir()
        (output / "frames.npy").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        write_crops(str(clips), output, **{"count": 1, "size": 56, **arguments})
    assert sorted(tmp_path.rglob("*")) == before
    if not arguments:
        assert (output / "frames.npy").read_bytes() == b"precious"


def test_what_is_easy_counts_as_much_as_it_is_easy():
    errors = torch.tensor([0.03, 0.08]).view(2, 1, 1, 1).expand(2, 2, 8, 8)
    assert torch.allclose(easiness(errors, 0.0), torch.ones(2))
    assert torch.allclose(
        easiness(errors, 1.0), torch.tensor([4 / 3, 2 / 3])
    )  # 0.05 and 0.1 with the 0.02 that are added


def test_flow_of_composed_scenes_is_exact(bank):
    """Where the layer on top is seen in a neighbour, too, warping that along the flow gives the middle frame."""
    scenes, flow = composed(bank, 8, 48, layers=0, generator=generator(1))
    for number, name in enumerate(("frame_prev", "frame_next")):
        way = flow[:, 2 * number : 2 * number + 2]
        pixel = torch.arange(48) + 0.5
        there = (pixel[None, None, :] + way[:, 0] > 1) & (pixel[None, None, :] + way[:, 0] < 47)
        there &= (pixel[None, :, None] + way[:, 1] > 1) & (pixel[None, :, None] + way[:, 1] < 47)
        warped = (warp(scenes[name], way) - scenes["frame_mid"]).abs().mean(dim=1)[there].mean()
        still = (scenes[name] - scenes["frame_mid"]).abs().mean(dim=1)[there].mean()
        assert warped < 0.5 * still
    layered, flow = composed(bank, 8, 48, layers=4, generator=generator(1))
    assert flow.shape == (8, 4, 48, 48) and torch.isfinite(flow).all()
    assert ((layered["time"] > 0) & (layered["time"] < 1)).all()


def test_clips_too_short_or_small_to_learn_from_are_left_out_by_name_and_damaged_ones_refused(clips, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(clips, folder)
    write_video(folder / "zz.mp4", drifting(2, 64, 96), range(2), Fraction(1, 25))
    write_video(folder / "small.mkv", drifting(6, 32, 96), range(6), Fraction(1, 25))
    mixed = FrameBank(str(folder), CPU, least=48)
    printed = capsys.readouterr().err
    whole = FrameBank(str(clips), CPU, least=48)
    assert "smaller than 48 pixels or of fewer than three frames in a scene: small.mkv, zz.mp4" in printed
    assert not capsys.readouterr().err
    good = (folder / "small.mkv").read_bytes()
    (folder / "small.mkv").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="`data`: cannot read .*small.mkv as a video: .*; mend it, or move it away"):
        FrameBank(str(folder), CPU, least=48)
    (folder / "small.mkv").write_bytes(good)
    assert torch.equal(mixed.textures(20, 48, generator()), whole.textures(20, 48, generator()))
    for path in folder.iterdir():
        path.unlink() if path.name != "zz.mp4" else None
    with pytest.raises(ValueError, match="`data` must have videos of three frames or more"):
        FrameBank(str(folder), CPU, least=48)


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`data` must have videos of three frames or more that are at least 32 pixels"
    ):
        FrameBank(str(tmp_path), CPU, 32)


def test_distance_is_in_pixels_of_the_frames_at_every_scale():
    truth = torch.tensor([6.0, -8.0]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    for stride in (1, 2, 4):
        assert distance(
            torch.zeros(1, 2, 16 // stride, 16 // stride), truth, torch.ones(1, 1, 16, 16)
        ).item() == pytest.approx(10, abs=0.1)
        assert distance(
            truth[..., ::stride, ::stride] / stride, truth, torch.ones(1, 1, 16, 16)
        ).item() == pytest.approx(0.1, abs=0.01)


def test_disturbed_hints_are_a_share():
    hints = torch.full((200, 4, 16, 16), 3.0)
    changed = (disturbed(hints, 0.3, generator()) != hints).flatten(1).any(dim=1)
    assert 0.2 < changed.float().mean() < 0.4
    assert torch.equal(disturbed(hints, 0.0, generator()), hints)


def test_gram_matrices_tell_textures_and_not_places():
    torch.manual_seed(0)
    metric = random_lpips()
    texture = torch.rand(1, 3, 1, 8).repeat(2, 1, 64, 12) * 2 - 1  # [2,3,64,96], the same every 8 pixels
    moved = texture.roll(4, dims=-1)
    blurred = torch.nn.functional.avg_pool2d(texture, (1, 9), 1, (0, 4))
    same, place, look = (gram_loss(metric, each, texture) for each in (texture, moved, blurred))
    assert same.tolist() == [0, 0] and look.shape == (2,)
    assert (place < 0.2 * look).all()
    assert metric(moved, texture).mean() > 0.3 * metric(blurred, texture).mean(), "LPIPS minds the place"
    bright = torch.cat([texture[:1], blurred[1:]]).requires_grad_()
    gram_loss(metric, bright, texture).sum().backward()
    assert bright.grad[0].abs().max() == 0 < bright.grad[1].abs().max(), "each sample has its own"


# ---- the stage ----


@pytest.fixture
def config(tiny_news, tmp_path) -> Path:
    tiny = {
        "max_train_steps": 6,
        "train_batch_size": 3,
        "resolution": 32,
        "lr_warmup_steps": 1,
        "mixed_precision": "no",
        "log_steps": 1,
    }
    tiny.update(
        scales=[1.0, 1.5],
        lpips_net="none",
        lpips_weight=0.0,
        report_to="none",
        two_steps_from=0.3,
        two_step_share=0.5,
        gaps=[1.0],
    )
    config = {**tiny_news, "train_sampler": tiny}
    path = tmp_path / "motion.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, clips: Path | str, output: Path, *flags: str) -> list:
    base = [
        sys.executable,
        "-m",
        "training.train_sampler",
        "--config",
        str(config),
        "--data",
        str(clips),
        "--output_dir",
        str(output),
    ]
    return [*base, *flags]


def train(*arguments) -> subprocess.CompletedProcess:
    return run_python(command(*arguments), cwd=REPOSITORY)


def weights(folder: Path) -> dict:
    return {
        f"{path.parent.name}.{name}": value
        for path in folder.glob("*/*.safetensors")
        for name, value in load_file(path).items()
    }


def test_it_trains_validates_exports_and_resumes_exactly(config, clips, tmp_path):
    torch.manual_seed(0)
    RIFEFlowModel().save_pretrained(tmp_path / "teacher")
    flags = [
        "--teacher",
        str(tmp_path / "teacher"),
        "--validation",
        str(clips),
        "--validation_samples",
        "2",
        "--validation_crop",
        "64",
    ]
    flags += ["--validation_steps", "6", "--revive_every", "3"]
    done = train(config, clips, tmp_path / "whole", *flags)
    assert done.returncode == 0, done.stderr
    done = train(config, clips, tmp_path / "parts", *flags, "--stop_step", "2")
    assert done.returncode == 0 and "stopped at step 2" in done.stdout, done.stderr
    done = train(config, clips, tmp_path / "parts", *flags)
    assert done.returncode == 0, done.stderr
    whole, parts = (weights(tmp_path / name / "pipeline") for name in ("whole", "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)

    with (tmp_path / "whole" / "validation.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {"psnr", "psnr_zero", "psnr_warps", "r2"} <= set(row)
    pipeline = MADiffPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    frames = torch.from_numpy(moving_picture(0, 40, 40)).permute(2, 0, 1)[None].float() / 255
    assert pipeline(frames, frames, output_type="pt").frames.shape == (1, 1, 3, 40, 40)
    assert (tmp_path / "whole" / "pipeline" / "README.md").is_file()
    done = train(
        config,
        clips,
        tmp_path / "again",
        *flags[:2],
        "--init",
        str(tmp_path / "whole" / "pipeline"),
        "--max_train_steps",
        "1",
    )
    assert done.returncode == 0, done.stderr


def test_all_processes_have_one_codebook(config, clips, tmp_path):
    """Codes that none of them used are moved to the same latents in each."""
    script = (
        "import sys; from training import train_sampler, codes; from pathlib import Path; import torch\n"
        "note = codes.CodeUsage.note\n"
        "def noted(self, *arguments):\n"
        "    note(self, *arguments)\n"
        "    rank = self.trainer.accelerator.process_index\n"
        "    torch.save(self.codebook.detach().clone(), Path(sys.argv[-1]) / f'codes{rank}.pt')\n"
        "codes.CodeUsage.note = noted\n"
        "train_sampler.main(sys.argv[1:-1])\n"
    )
    arguments = command(config, clips, tmp_path / "run", "--revive_every", "2")[3:]
    done = run_two_ranks([sys.executable, "-c", script, *arguments, str(tmp_path)], REPOSITORY, TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"codes{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)


def test_a_time_limit_ends_it_with_its_schedule(config, clips, tmp_path):
    limits = ["--max_train_steps", "100000", "--time_limit", "0.05", "--lr_warmup_steps", "0"]
    summaries, recorded = [], []
    for rate in ("1e-3", "1e-4"):  # the second time, it has come to its end
        done = train(config, clips, tmp_path / "run", *limits, "--learning_rate", rate)
        assert done.returncode == 0, done.stderr
        recorded.append((tmp_path / "run" / "args.yaml").read_text())
        with (tmp_path / "run" / "summary.csv").open() as file:
            summaries.append([*csv.DictReader(file)])
    rates = [float(row["learning_rate"]) for row in summaries[0]]
    assert 1 < len(rates) < 2000 and rates == sorted(rates, reverse=True) and rates[-1] < 0.1 * rates[0]
    assert summaries[0] == summaries[1] and recorded[0] == recorded[1], "what trained stays on record"
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_hints_can_be_trained_first_and_alone(config, clips, tmp_path):
    done = train(config, clips, tmp_path / "start", "--max_train_steps", "1")
    assert done.returncode == 0, done.stderr
    init = ["--init", str(tmp_path / "start" / "pipeline")]
    changed = yaml.safe_load(config.read_text())
    changed["vqvae"]["news_threshold"] = 0.3
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    done = train(tmp_path / "changed.yaml", clips, tmp_path / "other", *init)
    assert done.returncode == 2 and "`news_threshold` of vqvae must be 0.3, as configured, but is 0.1" in done.stderr
    for name, share in (("alone", "1"), ("first", "0.5")):
        done = train(config, clips, tmp_path / name, *init, "--hints_until", share)
        assert done.returncode == 0, done.stderr
    start, alone, first = (weights(tmp_path / name / "pipeline") for name in ("start", "alone", "first"))
    moved = {part.partition(".")[0] for part in start if not torch.equal(start[part], alone[part])}
    assert moved == {"hint_model"}
    assert {part.partition(".")[0] for part in start if not torch.equal(start[part], first[part])} == {
        "hint_model",
        "vqvae",
        "unet",
    }
    with (tmp_path / "alone" / "summary.csv").open() as file:
        assert set(next(csv.DictReader(file))) == {"step", "samples", "flow", "warps", "learning_rate"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_matrices_are_compared_in_single_precision(dtype):
    lpips = random_lpips()
    truth = torch.rand(2, 3, 64, 64, generator=generator()) * 2 - 1
    sample = (truth + 0.1 * torch.randn(truth.shape, generator=generator())).clamp(-1, 1)
    expected = gram_loss(lpips, sample, truth)
    with torch.autocast("cpu", dtype):
        found = gram_loss(lpips, sample, truth)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=0.05)


def test_gram_matrices_count_late(config, clips, tmp_path):
    backbone = random_backbone_file(tmp_path / "alexnet.safetensors", 0)
    flags = ["--lpips_net", "alex", "--lpips_backbone", backbone, "--gram_weight", "2", "--resolution", "64"]
    flags += ["--scales", "[1.0]"]
    done = train(config, clips, tmp_path / "run", *flags, "--max_train_steps", "4", "--two_step_share", "0")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "summary.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [bool(row.get("gram")) for row in rows] == [False, False, True, True]
    done = train(config, clips, tmp_path / "none", "--gram_weight", "2")
    assert done.returncode == 2 and "--gram_weight must be 0 with --lpips_net none" in done.stderr


def test_lpips_by_vgg_counts_beside_that_by_alexnet(config, clips, tmp_path):
    alex = random_backbone_file(tmp_path / "alexnet.safetensors", 0)
    vgg = backbone_file(tmp_path / "vgg.safetensors", random_lpips("vgg"))
    flags = ["--lpips_net", "alex", "--lpips_backbone", alex, "--resolution", "64", "--scales", "[1.0]"]
    flags += ["--lpips_from", "0.5", "--max_train_steps", "2", "--two_step_share", "0"]
    weights = []
    for name, more in (("alone", []), ("both", ["--lpips_vgg_weight", "2", "--lpips_vgg_backbone", vgg])):
        done = train(config, clips, tmp_path / name, *flags, *more)
        assert done.returncode == 0, done.stderr
        with (tmp_path / name / "summary.csv").open() as file:
            rows = [*csv.DictReader(file)]
        assert [bool(row.get("lpips_vgg")) for row in rows] == [False, name == "both"]
        weights.append(MADiffPipeline.from_pretrained(tmp_path / name / "pipeline").vqvae.decoder.head.conv_out.weight)
    assert not torch.equal(*weights)


def test_vgg_sees_composed_scenes_too(config, tmp_path):
    """Clips that stand still are decoded as they are by new networks, so that all that VGG tells is of composed scenes."""
    (tmp_path / "still").mkdir()
    write_video(tmp_path / "still" / "a.mkv", 3 * [moving_picture(0)], range(3), Fraction(1, 25), "ffv1", "bgr0")
    vgg = backbone_file(tmp_path / "vgg.safetensors", random_lpips("vgg"))
    flags = ["--resolution", "64", "--scales", "[1.0]", "--max_train_steps", "1", "--two_step_share", "0"]
    flags += ["--train_batch_size", "4", "--composed_share", "0.5", "--corrupted_share", "0"]
    flags += ["--lpips_from", "0", "--lpips_vgg_weight", "1", "--lpips_vgg_backbone", vgg]
    done = train(config, tmp_path / "still", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["lpips_vgg"]) > 1e-3


def test_a_part_is_cut_from_the_same_place_of_both():
    frames, generator = torch.arange(2.0 * 3 * 20 * 30).view(2, 3, 20, 30), torch.Generator().manual_seed(0)
    corners = set()
    for _ in range(20):
        sample, truth = part_of_both(frames, frames + 1, 16, generator)
        assert sample.shape == (2, 3, 16, 16) and torch.equal(sample + 1, truth)
        corners.add(sample[0, 0, 0, 0].item())
    assert len(corners) > 10
    assert part_of_both(frames, frames, 96, generator)[0].shape == frames.shape


def test_it_trains_on_kept_crops(config, clips, tmp_path):
    write_crops(str(clips), tmp_path / "crops", count=4, size=56)
    crops = f"crops:{tmp_path / 'crops'}"
    done = train(config, crops, tmp_path / "run", "--two_steps_from", "0")
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["hint_source"] == "fine_flow" and index["hint_model"] == [None, None] and not index["guess_motion"]
    start = tmp_path / "run" / "pipeline"
    without = ("--latent_shares", "[0, 0.5, 0.5]", "--latent_weight", "0", "--two_step_share", "0")
    done = train(config, crops, tmp_path / "control", "--init", str(start), *without)
    assert done.returncode == 0, done.stderr
    before, after = weights(start), weights(tmp_path / "control" / "pipeline")
    moved = {part.partition(".")[0] for part in before if not torch.equal(before[part], after[part])}
    assert moved == {"vqvae"}, "the denoiser was left out"
    only = ("--init", str(start), "--trained", "vqvae.decoder.head,vqvae.decoder.warps.1", "--revive_every", "1")
    done = train(config, crops, tmp_path / "some", *only)
    assert done.returncode == 0, done.stderr
    after = weights(tmp_path / "some" / "pipeline")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name[:15] for name in moved} == {"vqvae.decoder.h", "vqvae.decoder.w"}, "neither codes nor anything else"
    assert not any("warps.0" in name for name in moved)
    done = run_two_ranks(command(config, crops, tmp_path / "two", *only, *without), REPOSITORY, TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    for names, wrong in (("vqvae.decoder.head,decoder", "decoder"), ("vqvae.decoder.head,", "")):
        done = train(config, crops, tmp_path / "other", "--trained", names)
        assert done.returncode == 2 and f"names of parameters begin, but {wrong!r} is not" in done.stderr
    done = train(config, crops, tmp_path / "other", "--hints_until", "0.5")
    assert done.returncode == 2 and "`hints_until` must be 0 with crops" in done.stderr
    guessing = yaml.safe_load(config.read_text())
    guessing["pipeline"]["guess_motion"] = True
    (tmp_path / "guessing.yaml").write_text(yaml.safe_dump(guessing))
    done = train(tmp_path / "guessing.yaml", crops, tmp_path / "other")
    assert done.returncode == 2 and "`guess_motion` needs crops with begun hints" in done.stderr
    for name, value in (("layers", "2"), ("gaps", "[0, 0, 1]"), ("any_time", "1"), ("candidates", "9")):
        done = train(config, crops, tmp_path / "other", f"--{name}", value)
        assert done.returncode == 2 and f"`{name}` is not used with crops" in done.stderr


def test_guessed_motion_teaches_the_scales_that_it_comes_from(tiny_news):
    torch.manual_seed(0)
    vqvae, unet = VQMAGANModel(**tiny_news["vqvae"]), UNet2DModel(**tiny_news["unet"])
    network = SamplerNetwork(None, vqvae, unet, DDIMScheduler(prediction_type="sample"))
    prev, mid, next_ = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(3))
    frames = {"frame_prev": prev, "frame_mid": mid, "frame_next": next_}
    batch = {**frames, "time": torch.full((2,), 0.5), "hints": torch.rand(2, 4, 32, 32)}
    draws = {"noise": torch.zeros(2, 4, 8, 8), "timesteps": torch.full((2,), 999), "choice": torch.zeros(2, dtype=int)}
    found = network(batch, draws, lambda hints: hints, False, hint_source=SearchHints(), guesses=True)
    told = found["motion"].detach().split(2, dim=1)
    finished = SearchHints().finish(prev, next_, told, batch["time"])
    assert torch.allclose(found["estimates"][-1], torch.cat(finished, dim=1), atol=1e-4)
    found["motion"].sum().backward()
    coarse, fine = (block.conv_out.weight.grad for block in vqvae.decoder.warps)
    assert coarse.abs().max() > 0 and fine is None


def test_a_second_step_takes_its_hints_as_sampling_does(tiny_news):
    """Of the motion that the decoder makes of the first one's latents, where the pipeline does."""
    torch.manual_seed(0)
    vqvae, unet = excite(VQMAGANModel(**tiny_news["vqvae"])), excite(UNet2DModel(**tiny_news["unet"]))
    scheduler = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
    pipeline = MADiffPipeline(vqvae, unet, scheduler, hint_source="search", guess_motion=True)
    pipeline.set_progress_bar_config(disable=True)
    network = SamplerNetwork(None, vqvae, unet, scheduler).eval()
    prev, mid, next_ = (torch.rand(1, 3, 32, 32) * 2 - 1 for _ in range(3))
    begun = SearchHints().begin(prev, next_, 0.5)
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(torch.cat([tensors["hints_prev"], tensors["hints_next"]], dim=1))

    noise = torch.randn(1, 4, 8, 8)
    pipeline(
        (prev + 1) / 2,
        (next_ + 1) / 2,
        num_inference_steps=2,
        latents=noise,
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["hints_prev", "hints_next"],
    )
    batch = {"frame_prev": prev, "frame_mid": mid, "frame_next": next_, "time": torch.full((1,), 0.5)}
    size = [side // vqvae.motion_stride for side in prev.shape[-2:]]
    batch["hints"] = torch.cat([vqvae.resize_hints(each, size) for each in begun], dim=1)
    draws = {"noise": noise, "timesteps": torch.full((1,), 999), "choice": torch.zeros(1, dtype=int)}
    used = []

    def keep(hints: torch.Tensor) -> torch.Tensor:
        used.append(hints)
        return hints

    with torch.no_grad():
        network(batch, draws, keep, True, hint_source=SearchHints(), guesses=True, moves=True)
    assert len(used) == 2 and torch.allclose(used[1], seen[0], atol=1e-3), (used[1] - seen[0]).abs().max()


def test_options_of_layout_and_compilation_mean_what_they_say(config, clips, tmp_path):
    """Weights have the layout that is asked for, and what is recorded is what was asked."""
    without = "train_sampler.SamplerNetwork.compile_parts = lambda self: print('compiled')\n"
    (tmp_path / "script.py").write_text(layout_script("train_sampler").replace("step = ", f"{without}step = ", 1))
    for layout, expected in (("true", "last"), ("false", "contiguous")):
        flags = ("--max_train_steps", "1", "--channels_last", layout, "--compile", "true")
        arguments = command(config, clips, tmp_path / layout, *flags)[3:]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = run_python([sys.executable, str(tmp_path / "script.py"), *arguments], cwd=REPOSITORY, env=environment)
        assert done.returncode == 0, done.stderr
        assert "compiled\n" in done.stdout and f"{expected}\n" in done.stdout
        recorded = yaml.safe_load((tmp_path / layout / "args.yaml").read_text())
        assert recorded["compile"] is True and recorded["channels_last"] is (layout == "true")


def test_it_trains_on_hints_to_finish(config, clips, tmp_path):
    write_crops(str(clips), tmp_path / "crops", count=4, size=64, hint_source="search", begun=True)
    validation = ("--validation", str(clips), "--validation_samples", "1", "--validation_crop", "64")
    flags = (*validation, "--validation_steps", "6", "--two_steps_from", "0")
    done = train(config, f"crops:{tmp_path / 'crops'}", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["hint_source"] == "search" and index["guess_motion"] is True


@pytest.mark.parametrize("settings", [None, {"search": {"finest_scale": 1, "polish": False}}])
def test_it_trains_behind_a_checkpoint_that_finished_the_hints(config, clips, tmp_path, tiny_news, settings):
    """What comes out samples as it was trained, whatever the configuration says."""
    told = {**tiny_news["pipeline"], "hint_settings": settings}
    pipeline = build_pipeline({**tiny_news, "hint_source": "search", "pipeline": told})
    pipeline.save_pretrained(tmp_path / "checkpoint")
    write_crops(str(clips), tmp_path / "crops", count=4, size=64, finished_by=str(tmp_path / "checkpoint"))
    other = yaml.safe_load(config.read_text())
    other["pipeline"]["hint_settings"] = {"search": {"finest_scale": 0}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    flags = ("--init", str(tmp_path / "checkpoint"), "--trained", "vqvae.decoder.head", "--max_train_steps", "2")
    done = train(tmp_path / "other.yaml", f"crops:{tmp_path / 'crops'}", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["guess_motion"] is True and index.get("hint_settings") == settings
    before, after = weights(tmp_path / "checkpoint"), weights(tmp_path / "run" / "pipeline")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("vqvae.decoder.head.") for name in moved)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resolution", "40"], "`resolution` must be a multiple of 16, but is 40."),
        (["--dataloader_num_workers", "3"], "`dataloader_num_workers` is not used by this stage"),
        (["--data", "stills:photos"], "`data` must be one folder of videos or of crops"),
        (["--latent_shares", "[1, 0]"], "--latent_shares must be 3 numbers"),
        (["--latent_shares", "[0, 0, 0]"], "`latent_shares` must be shares, not all of them zero"),
        (
            ["--latent_shares", "[0, 1, 1]", "--latent_weight", "0"],
            "`latent_weight` must be more than 0 where no denoised latents are decoded",
        ),
        (["--config", "tiny"], "`config` must be one with `news_latents`"),
        (["--init", "/not/there"], "`init` must be a folder that is there, but is '/not/there'"),
    ],
)
def test_bad_options_are_one_line(config, clips, tmp_path, flags, message):
    done = train(config, clips, tmp_path / "run", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_loss_falls(config, clips, tmp_path):
    done = train(
        config,
        clips,
        tmp_path / "run",
        "--max_train_steps",
        "400",
        "--learning_rate",
        "2e-3",
        "--log_steps",
        "20",
        "--checkpointing_steps",
        "400",
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "summary.csv").open() as file:
        losses = [float(row["l1"]) for row in csv.DictReader(file)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
def test_a_signal_saves(config, clips, tmp_path):
    process = subprocess.Popen(
        command(config, clips, tmp_path / "run", "--max_train_steps", "100000", "--checkpointing_steps", "100000"),
        cwd=REPOSITORY,
    )
    while not (tmp_path / "run" / "summary.csv").exists():
        time.sleep(0.5)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_no_file_of_crops_is_open_when_their_folder_is_renamed(clips, tmp_path, monkeypatch):
    real = os.replace

    def replace(source, target):
        assert str(source) not in Path("/proc/self/maps").read_text(), "Windows renames no folder with open files"
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_crops(str(clips), tmp_path / "crops", 2, 32, "flow")
    assert (tmp_path / "crops" / "crops.json").is_file()
