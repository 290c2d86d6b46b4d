"""The checkpoints that come with the package, with their default settings."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.evaluation.evaluate import evaluate
from madiff_diffusers.evaluation.methods import MADiffMethod, checkpoint_digest
from madiff_diffusers.evaluation.metrics import Scorer, psnr
from madiff_diffusers.hub_repository import CHECKPOINT_FOLDER, bundled_checkpoints
from madiff_diffusers.precision import fastest_dtype
from tests.conftest import REPOSITORY, moving_picture


EXAMPLES = REPOSITORY / "examples"
MOST_BYTES = {"madiff-compact": 24 * 10**6, "madiff-fast": 12 * 10**6}
MOST_PARAMETERS = {"madiff-compact": 15_000_000, "madiff-fast": 6_000_000}


def test_these_are_all():
    assert bundled_checkpoints() == [*MOST_BYTES]


@pytest.fixture(scope="module", params=MOST_BYTES)
def name(request) -> str:
    return request.param


def load(name: str | Path, **options) -> MADiffPipeline:
    pipeline = MADiffPipeline.from_pretrained(name, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def shipped(name) -> MADiffPipeline:
    return load(name)


@pytest.fixture(scope="module")
def compact() -> MADiffPipeline:
    return load("madiff-compact")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_is_small_and_safe(shipped, name):
    files = [path for path in (CHECKPOINT_FOLDER / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= MOST_BYTES[name]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}
    models = [model for model in (shipped.vqvae, shipped.unet, shipped.i2e) if model is not None]
    assert sum(p.numel() for model in models for p in model.parameters()) <= MOST_PARAMETERS[name]
    assert all(model.dtype == torch.float32 for model in models)


@pytest.fixture(scope="module")
def fresh_process(name, tmp_path_factory) -> subprocess.CompletedProcess:
    """One that has no network and only a new cache; it loads the checkpoint, makes the frame between a pair of 720p, and tells its peak memory."""
    code = (
        "import resource, numpy as np; from madiff_diffusers import MADiffPipeline; "
        f"pipe = MADiffPipeline.from_pretrained({name!r}); print('loaded'); "
        "frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8); "
        "pipe(frame, frame[:, ::-1].copy()); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    folder = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


def test_loads_without_a_network(fresh_process):
    assert fresh_process.stdout.startswith("loaded"), fresh_process.stderr


def test_half_precision_makes_the_same_frames(shipped, name):
    """What `dtype="auto"` may choose, where bfloat16 is native."""
    prev, next_ = (np.array(Image.open(EXAMPLES / f"{name}.png")) for name in ("prev", "next"))
    half = load(name, dtype=torch.bfloat16)
    made, expected = (pipe(prev, next_, generator=seeded(), output_type="np").frames for pipe in (half, shipped))
    assert 0 < np.abs(made - expected).mean() <= 0.5 / 255


def test_auto_is_half_precision_where_the_device_computes_in_it(compact):
    auto = MADiffPipeline.from_pretrained("madiff-compact", dtype="auto")
    assert auto.vqvae.dtype == auto.unet.dtype == fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and platform.machine() == "x86_64":
        native = {"amx_bf16", "avx512_bf16"} & set(flags.read_text().split())
        assert (fastest_dtype("cpu") == torch.bfloat16) == bool(native)
    assert fastest_dtype("mps") == torch.float32


def test_example_frames_come_out_better_than_their_average(shipped):
    prev, next_, truth = (np.array(Image.open(EXAMPLES / f"{name}.png")) for name in ("prev", "next", "truth"))
    mid = np.array(shipped(prev, next_, generator=seeded()).frames[0][0])
    average = ((prev.astype(float) + next_) / 2).round().astype(np.uint8)
    assert psnr(mid, truth) > psnr(average, truth) + 5


def test_events_alone_are_read_where_the_method_has_nothing_else():
    """The checkpoint that is not in the package: on this pair its own hints make the frame better, and without them it is better than an average."""
    pipeline = load(REPOSITORY / "training" / "recipes" / "events" / "madiff-events")
    assert pipeline.config.hint_source == "events" and not pipeline.vqvae.config.match_neighbours
    prev, next_, truth = (np.array(Image.open(EXAMPLES / f"{name}.png")) for name in ("prev", "next", "truth"))
    average = ((prev.astype(float) + next_) / 2).round().astype(np.uint8)
    told, untold = (
        np.array(pipeline(prev, next_, generator=seeded(), hint_policy=policy).frames[0][0])
        for policy in ("sampling", "start")
    )
    assert psnr(told, truth) > psnr(untold, truth) + 0.4
    assert psnr(untold, truth) > psnr(average, truth) + 2


def test_what_does_not_move_comes_back_unchanged(shipped):
    frame = np.array(Image.open(EXAMPLES / "prev.png"))
    assert np.array_equal(np.array(shipped(frame, frame, generator=seeded()).frames[0][0]), frame)
    changed = frame.copy()
    changed[100:140, 200:260] = 0
    mid = np.array(shipped(frame, changed, generator=seeded()).frames[0][0])
    far = np.ones(frame.shape[:2], bool)
    far[90:150, 190:270] = False
    assert np.array_equal(mid[far], frame[far])


def test_odd_sizes(shipped):
    frames = [moving_picture(time, 251, 333) for time in (-1, 1)]
    mid = np.array(shipped(*frames, generator=seeded()).frames[0][0])
    assert mid.shape == (251, 333, 3)
    assert psnr(mid, moving_picture(0, 251, 333)) > 28


def test_same_seed_same_picture_and_batch_equals_singles(shipped):
    frames = [
        torch.stack([torch.from_numpy(moving_picture(time + shift, 96, 130)).permute(2, 0, 1) for shift in (0, 6)])
        for time in (-1, 1)
    ]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    both = shipped(*frames, generator=generators, output_type="pt").frames
    for i in range(2):
        arguments = {"generator": torch.Generator().manual_seed(i), "output_type": "pt"}
        single = shipped(frames[0][i], frames[1][i], **arguments).frames
        assert (both[i] - single[0]).abs().max() <= 1e-4
        arguments["generator"] = torch.Generator().manual_seed(i)
        assert torch.equal(single, shipped(frames[0][i], frames[1][i], **arguments).frames)


def test_event_hints_are_used(compact):
    """The frame changes where the events among the hints are replaced by zeros, and flow is left."""
    frames = [moving_picture(time, 96, 130) for time in (-2, 2)]
    arguments = {"num_inference_steps": 3, "output_type": "pt"}

    def without_events(pipe, step, timestep, tensors):
        return {name: torch.cat([0 * hints[:, :-2], hints[:, -2:]], dim=1) for name, hints in tensors.items()}

    with_events = compact(*frames, generator=seeded(), **arguments).frames
    without = compact(
        *frames,
        generator=seeded(),
        callback_on_step_end=without_events,
        callback_on_step_end_tensor_inputs=["hints_prev", "hints_next"],
        **arguments,
    ).frames
    assert (with_events - without).abs().max() > 1 / 255


def test_peak_memory_of_a_720p_pair(fresh_process):
    assert fresh_process.returncode == 0, fresh_process.stderr
    kilobytes = int(fresh_process.stdout.split()[-1]) // (1024 if sys.platform == "darwin" else 1)
    assert kilobytes <= 3 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark, least_psnr, most_lpips",
    [("middlebury", 32.9, 0.0211), ("davis", 25.8, 0.0908), ("ucf101", 33.6, 0.0292)],
)
def test_benchmarks_stay_better_than_those_of_rife(compact, shared_data, tmp_path, benchmark, least_psnr, most_lpips):
    """LPIPS below that of RIFE 4.0 on the same triplets, PSNR no more than about 0.3 dB below."""
    root = shared_data / "bench" / {"middlebury": "middlebury_others"}.get(benchmark, benchmark)
    scorer = Scorer(lpips_backbone=str(shared_data / "weights" / "lpips_alexnet_features.safetensors"))
    method = MADiffMethod(compact, "madiff-compact", checkpoint_digest(CHECKPOINT_FOLDER / "madiff-compact"))
    (summary,) = evaluate(benchmark, str(root), tmp_path, [method], scorer, gallery=0)
    assert summary["scores"]["psnr"]["mean"] >= least_psnr and summary["scores"]["lpips"]["mean"] <= most_lpips


@pytest.mark.slow
def test_the_guess_of_motion_is_worth_its_time(shared_data, tmp_path):
    root = str(shared_data / "bench" / "davis")
    scorer = Scorer(lpips_backbone=str(shared_data / "weights" / "lpips_alexnet_features.safetensors"))
    lpips = {}
    for guesses in (True, False):
        fast = load("madiff-fast")
        assert fast.config.guess_motion
        fast.register_to_config(guess_motion=guesses)
        method = MADiffMethod(fast, "madiff-fast", checkpoint_digest(CHECKPOINT_FOLDER / "madiff-fast"))
        (summary,) = evaluate("davis", root, tmp_path / str(guesses), [method], scorer, gallery=0)
        lpips[guesses] = summary["scores"]["lpips"]["mean"]
    assert lpips[True] < 0.084 and lpips[True] < lpips[False] - 0.0005, lpips


@pytest.mark.parametrize("motion", [1.5, 6.0])
def test_instants_near_a_neighbour_are_made_as_well_as_others(motion):
    """Such as those of 23.976 frames a second made into 24."""
    pipeline = load("madiff-fast")

    def seen(time: float) -> np.ndarray:
        return moving_picture(motion / 3 * time, 160, 160)  # which moves by 3 pixels in a unit

    def quality(time: float) -> float:
        made = pipeline(seen(0), seen(1), times=[time], generator=seeded(), output_type="np").frames[0, 0]
        error = (made - seen(time) / 255)[16:-16, 16:-16]
        return float(-10 * np.log10((error**2).mean()))

    usual = quality(0.1)
    for time in (0.02, 1 / 1001, 1e-6, 0.98, 1000 / 1001):
        assert quality(time) > usual - 1, time
