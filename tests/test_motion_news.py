"""Latents of motion news, the networks that find motion, and the pipeline that is made of them."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from madiff_diffusers import (
    MADiffPipeline,
    ModelHints,
    MotionHintModel,
    RIFEFlowModel,
    SearchHints,
    VQMAGANModel,
    convert_rife_checkpoint,
    interpolate_frames,
    pipeline_madiff,
)
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.evaluation.hint_policies import NeighbourHints
from madiff_diffusers.frame_coding import EncodedFrames, FrameCoder
from madiff_diffusers.motion_hints import NullHints, StackedHints, goes_on
from madiff_diffusers.warping import correlate, warp
from tests.conftest import excite, moving_picture


def build(config: dict) -> MADiffPipeline:
    torch.manual_seed(0)
    settings = dict(config["scheduler"])
    pipeline = MADiffPipeline(
        vqvae=excite(VQMAGANModel(**config["vqvae"])).eval(),
        unet=UNet2DModel(**config["unet"]).eval(),
        scheduler=getattr(diffusers, settings.pop("class"))(**settings),
        hint_model=excite(MotionHintModel(**config["hint_model"])).eval(),
        hint_source="model",
        **config["pipeline"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(tiny_news) -> MADiffPipeline:
    return build(tiny_news)


def neighbours(pipeline: MADiffPipeline, size: tuple = (64, 96)) -> tuple:
    frames = [
        torch.from_numpy(moving_picture(time, *size)).permute(2, 0, 1)[None].float() / 127.5 - 1 for time in (-1, 1, 0)
    ]
    features = [pipeline.vqvae.encode(frame).features for frame in frames[:2]]
    return frames, features


# ---- the autoencoder ----


def test_news_are_zero_where_the_middle_frame_is_the_mean_of_its_warped_neighbours(pipeline):
    (prev, next_, mid), features = neighbours(pipeline)
    hints = pipeline.hint_model(prev, next_, 0.25)
    mean = 0.75 * warp(prev, hints[0]) + 0.25 * warp(next_, hints[1])
    assert pipeline.vqvae.encode_news(mean, *features, *hints, time=0.25).abs().max() < 1e-5
    assert pipeline.vqvae.encode_news(mid, *features, *hints, time=0.25).abs().max() > 1e-3


def test_news_have_variance_one_in_training_and_the_running_one_later(pipeline):
    (prev, next_, mid), features = neighbours(pipeline)
    hints = tuple(torch.zeros(1, 2, 64, 96) for _ in range(2))
    vqvae = pipeline.vqvae.train()
    for _ in range(1200):
        news = vqvae.encode_news(mid, *features, *hints)
    assert torch.allclose(news.square().mean(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(vqvae.eval().encode_news(mid, *features, *hints), news, rtol=0.02, atol=0.02)


def test_latents_move_the_first_offsets(pipeline):
    _, features = neighbours(pipeline)
    pipeline.vqvae.register_to_config(news_threshold=0.0)
    hints = tuple(torch.zeros(1, 2, 64, 96) for _ in range(2))
    latents = torch.zeros(1, 4, 16, 24)
    still = pipeline.vqvae.decode(latents, *features, *hints, force_not_quantize=True)
    moved = pipeline.vqvae.decode(latents + 1, *features, *hints, force_not_quantize=True)
    expected = pipeline.vqvae.decoder.to_offsets.weight.sum(dim=1).flatten()
    assert torch.allclose((moved.offsets[0] - still.offsets[0]).mean(dim=(0, 2, 3)), expected, atol=1e-5)


@pytest.mark.parametrize("difference", [0.0, 0.1, 0.5])
def test_news_are_told_where_the_warped_neighbours_differ(pipeline, difference):
    vqvae = pipeline.vqvae
    frame = torch.rand(1, 3, 64, 96) / 2
    features = [vqvae.encode(each).features for each in (frame, torch.roll(frame, 5, -1) + difference)]
    hints = (torch.zeros(1, 2, 64, 96), torch.tensor([5.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 64, 96))
    offsets = [
        vqvae.decode(latents, *features, *hints, force_not_quantize=True).offsets[0][..., :20]  # what is seen in both
        for latents in (torch.zeros(1, 4, 16, 24), torch.ones(1, 4, 16, 24))
    ]
    told = difference / (difference + vqvae.config.news_threshold)
    expected = told * vqvae.decoder.to_offsets.weight.sum(dim=1)
    assert torch.allclose(offsets[1] - offsets[0], expected.expand(1, 4, 16, 20), atol=1e-4)


def test_hints_are_followed_at_every_scale(tiny_news):
    """A decoder that learned nothing warps along the hints as they are, pixel by pixel: nothing of them is lost on the way."""
    vqvae = VQMAGANModel(**tiny_news["vqvae"])
    features = [vqvae.encode(torch.rand(1, 3, 64, 96)).features for _ in range(2)]
    hints = tuple(torch.randn(1, 2, 64, 96) for _ in range(2))
    decoded = vqvae.decode(torch.zeros(1, 4, 16, 24), *features, *hints, force_not_quantize=True)
    assert torch.allclose(decoded.offsets[-1], torch.cat(hints, dim=1), atol=1e-5)
    for offsets in decoded.offsets[:-1]:
        stride = 96 // offsets.shape[-1]
        assert torch.allclose(offsets, F.avg_pool2d(torch.cat(hints, dim=1), stride) / stride, atol=1e-5)


def test_correlation_is_the_mean_product_at_every_shift():
    first, second = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    result = correlate(first, second, 2)
    padded = F.pad(second, (2, 2, 2, 2))
    for y in range(5):
        for x in range(5):
            expected = (first * padded[..., y : y + 5, x : x + 7]).mean(dim=1)
            assert torch.allclose(result[:, 5 * y + x], expected, atol=1e-6)
    assert torch.allclose(correlate(first, second.clone().requires_grad_(), 2), result, atol=1e-6)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"news_threshold": -0.1}, "`news_threshold` must be at least 0.* is -0.1"),
        ({"news_latents": False}, "`news_threshold` must be .* 0 without `news_latents`, but is 0.1"),
        ({"still_threshold": -1}, "`still_threshold` must be at least 0, but is -1"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(tiny_news, setting, message):
    with pytest.raises(ValueError, match=message):
        VQMAGANModel(**{**tiny_news["vqvae"], **setting})


@pytest.mark.parametrize("setting", [{"stem_stride": 1}, {"time_conditioned": False}, {"vq_embed_dim": 3}])
def test_flags_that_do_not_fit_together_are_refused(tiny_news, setting):
    with pytest.raises(ValueError, match="news_latents"):
        VQMAGANModel(**{**tiny_news["vqvae"], **setting})


# ---- the networks that find motion ----


def shifted(by: tuple, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    picture = (
        F.interpolate(torch.rand(1, 3, 24, 24, generator=generator), size=(3 * size, 3 * size), mode="bicubic") * 2 - 1
    )
    return picture[..., size + by[1] : 2 * size + by[1], size + by[0] : 2 * size + by[0]].clamp(-1, 1)


@pytest.mark.parametrize("size", [(64, 96), (51, 67)])
def test_hints_have_the_frames_size_and_follow_the_instant(pipeline, size):
    prev, mid, next_ = (
        torch.from_numpy(moving_picture(time, *size)).permute(2, 0, 1)[None].float() / 127.5 - 1 for time in (-1, 0, 1)
    )
    model = pipeline.hint_model
    for pair in (
        model(prev, next_, 0.3),
        model.refine(prev, mid, next_),
        model.refine(prev, mid, next_, model(prev, next_)),
    ):
        assert [each.shape for each in pair] == [(1, 2, *size)] * 2 and all(
            each.dtype == torch.float32 for each in pair
        )
    assert not torch.equal(model(prev, next_, 0.3)[0], model(prev, next_, 0.7)[0])


def test_frames_are_seen_smaller_first_where_the_model_says_so(tiny_news):
    frames = [
        torch.from_numpy(moving_picture(time, 64, 128)).permute(2, 0, 1)[None].float() / 127.5 - 1 for time in (-1, 1)
    ]
    config = {**tiny_news["hint_model"], "start_scale": 2}
    twice = excite(MotionHintModel(**config))
    once = MotionHintModel(**{**config, "start_scale": 1})
    once.load_state_dict(twice.state_dict())
    small = once.starts(*(F.avg_pool2d(frame, 2) for frame in frames), 0.5)
    found = twice.starts(*frames, 0.5)
    count = len(small)
    assert len(found) == 2 * count
    assert all(torch.equal(one, other) for pair in zip(found[:count], small) for one, other in zip(*pair))
    # From there the frames' own scales go on: with flow that no layer changes, twice the pixels are left.
    for level in twice.start_levels:
        torch.nn.init.zeros_(level.conv_out.weight)
        torch.nn.init.constant_(level.conv_out.bias, 0.125)
    still = [each.mean().item() for pair in twice.starts(*frames, 0.5) for each in pair[:1]]
    scales = count - 1
    alone = 0.125 * sum(2**number for number in range(scales))  # pixels of the finest scale
    assert still[count - 1] == pytest.approx(4 * alone, rel=1e-5)
    assert still[-1] == pytest.approx(3 * 4 * alone, rel=1e-5), "twice as many of the small frames', and as many anew"


def test_a_start_scale_is_a_positive_number(tiny_news):
    with pytest.raises(ValueError, match="`start_scale` must be 1 or more, but is 0"):
        MotionHintModel(**{**tiny_news["hint_model"], "start_scale": 0})


def test_scales_of_equal_widths_share_their_layers():
    widths = {"start_channels": (4, 8, 8), "refine_channels": (4, 8, 8), "reach": (1, 2, 2)}
    model = MotionHintModel(channels=(4, 4, 8, 8), match_channels=4, **widths)
    assert model.level_of_scale == [0, 1, 1] and len(model.start_levels) == len(model.refine_levels) == 2
    frames = torch.rand(3, 1, 3, 32, 32) * 2 - 1
    assert model.refine(*frames, model(frames[0], frames[2]))[0].shape == (1, 2, 32, 32)


def test_a_small_model_learns_a_shift():
    """Gradients reach every part that `forward` and `refine` read, and the flow is in pixels of the frames."""
    torch.manual_seed(0)
    model = MotionHintModel(
        channels=(8, 12, 16), start_channels=(12, 16), refine_channels=(12, 16), match_channels=8, reach=(2, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    prev, mid, next_ = (
        shifted((4, 0)),
        shifted((0, 0)),
        shifted((-4, 0)),
    )  # what was at x in the middle was at x - 4 before
    truth = torch.tensor([-4.0, 0.0]).view(1, 2, 1, 1)
    for _ in range(150):
        to_prev, to_next = model(prev, next_)
        again_prev, again_next = model.refine(prev, mid, next_)
        loss = sum(
            (each - sign * truth).abs().mean()
            for each, sign in ((to_prev, 1), (to_next, -1), (again_prev, 1), (again_next, -1))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    errors = [
        (each - sign * truth).abs().mean()
        for each, sign in ((to_prev, 1), (to_next, -1), (again_prev, 1), (again_next, -1))
    ]
    assert max(errors) < 0.6
    warped = warp(prev, to_prev)[..., 8:-8, 8:-8]
    assert (warped - mid[..., 8:-8, 8:-8]).abs().mean() < 0.5 * (prev - mid)[..., 8:-8, 8:-8].abs().mean()


@pytest.fixture
def rife_file(tmp_path) -> Path:
    """What RIFE 4.0 publishes: more than the flow network, under the names of data parallelism."""
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in RIFEFlowModel().state_dict().items()}
    torch.save({**state, "module.unet.up.weight": torch.zeros(1)}, tmp_path / "flownet.pkl")
    return tmp_path / "flownet.pkl"


def test_rife_is_converted_saved_and_used_as_a_hint_model(rife_file, tmp_path, pipeline, pair):
    model = convert_rife_checkpoint(rife_file)
    model.save_pretrained(tmp_path / "rife")
    pipeline.hint_model = RIFEFlowModel.from_pretrained(tmp_path / "rife").eval()
    assert torch.equal(pipeline.hint_model.block3.lastconv.weight, model.block3.lastconv.weight)
    assert isinstance(pipeline.hints, ModelHints) and pipeline.hints.model is pipeline.hint_model
    frames = pipeline(*pair, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (2, 1, 3, 51, 67) and torch.isfinite(frames).all()


@torch.no_grad()
def test_rife_s_scales_are_each_pair_s_own():
    """A pair whose flow is so large that it is seen smaller, and one whose is not."""
    torch.manual_seed(0)
    model = RIFEFlowModel((16, 12, 8, 8)).eval()
    frames = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    frames[:, 1] = 0.1 * frames[:, 1] - 0.9

    def flows(*pairs: int) -> torch.Tensor:
        return torch.cat([model.flow_and_mask(frames[0, i : i + 1], frames[1, i : i + 1])[0] for i in pairs])

    # What the second block adds is made 32 pixels between the two.
    changes = []
    hook = model.block1.register_forward_hook(lambda module, given, output: changes.append(output[0].abs()))
    model.register_to_config(adaptive=False)
    flows(0, 1)
    hook.remove()
    first, second = (min(each[:, :2].max().item(), each[:, 2:].max().item()) for each in changes)
    assert max(first, second) > 1.05 * min(first, second)
    for parameter in model.block1.lastconv.parameters():
        parameter.mul_(32 / (first * second) ** 0.5)
    fixed = flows(0, 1)
    model.register_to_config(adaptive=True)
    alone, both = flows(0, 1), model.flow_and_mask(frames[0], frames[1])[0]
    assert sorted((alone - fixed).abs().amax(dim=(1, 2, 3)) > 1) == [False, True]
    assert torch.allclose(both, alone, atol=1e-3)


def test_convert_rife_is_a_command(rife_file, tmp_path, capsys):
    assert main(["convert-rife", str(rife_file), "-o", str(tmp_path / "rife")]) == 0
    assert RIFEFlowModel.from_pretrained(tmp_path / "rife").config.channels == [192, 128, 96, 64]
    assert main(["convert-rife", str(rife_file), "-o", str(tmp_path / "rife")]) == 2
    assert "must not exist" in capsys.readouterr().err
    (tmp_path / "text.pkl").write_text("no pickle")
    assert main(["convert-rife", str(tmp_path / "text.pkl"), "-o", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_files_that_are_no_rife_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert_rife_checkpoint(tmp_path / "none.pkl")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pkl")
    with pytest.raises(ValueError, match="no flow network of RIFE"):
        convert_rife_checkpoint(tmp_path / "other.pkl")
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="tensors alone"):
        convert_rife_checkpoint(tmp_path / "evil.pkl")


# ---- the pipeline ----


@pytest.mark.parametrize("steps", [1, 3])
def test_frames_come_at_any_instant(pipeline, pair, steps):
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(
        *pair, num_inference_steps=steps, times=[0.25, Fraction(1, 3), 0.5], generator=generator, output_type="np"
    ).frames
    assert frames.shape == (2, 3, 51, 67, 3)
    assert np.abs(frames[:, 0] - frames[:, 2]).max() > 1e-3


def test_streams_are_interpolated_by_news(pipeline):
    frames = [moving_picture(time) for time in range(3)]
    made = list(interpolate_frames(pipeline, frames, output_type="np"))
    alone = pipeline(frames[0], frames[1], output_type="np", generator=torch.Generator().manual_seed(0)).frames[0, 0]
    assert len(made) == 6 and np.abs(made[1] - alone).max() < 1e-5
    same = list(interpolate_frames(pipeline, frames, factor=1, output_type="np"))
    assert len(same) == 3 and np.abs(same[1] * 255 - frames[1]).max() < 1e-3


def test_hints_are_extracted_between_steps_alone(pipeline, pair):
    """The latents of the last step are news about the hints that it saw: none are extracted after it."""
    seen = []
    original = ModelHints.from_guess

    class Counting(ModelHints):
        def from_guess(self, frame_prev, frame_mid, frame_next, hints=None):
            seen.append((frame_mid.shape[-2:], hints is not None))
            return original(self, frame_prev, frame_mid, frame_next, hints)

    pipeline.hints = Counting(pipeline.hint_model)
    pipeline(*pair, num_inference_steps=1)
    assert seen == []
    pipeline(*pair, num_inference_steps=3)
    assert seen == [((28, 36), True)] * 2  # guesses of half the size, which is padded to multiples of 8


def test_news_of_a_smaller_guess_are_smaller_and_hints_are_not(pipeline, pair, monkeypatch):
    """Latents are news about hints of full size; the pixels of a guess that they are decoded to are twice as large."""
    made, decoded, sizes = [], [], []
    clean, decode = pipeline_madiff.clean_latents, FrameCoder.decode

    def noted(coder, prev, next_, latents, *others):
        decoded.append(latents)
        return decode(coder, prev, next_, latents, *others)

    def note(pipe, step, timestep, tensors):
        sizes.append(tuple(tensors["hints_prev"].shape[-2:]))

    monkeypatch.setattr(pipeline_madiff, "clean_latents", lambda *step: made.append(clean(*step)) or made[-1])
    monkeypatch.setattr(FrameCoder, "decode", noted)
    asked = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["hints_prev"]}
    pipeline(*pair, num_inference_steps=2, **asked)
    assert torch.equal(decoded[0], F.avg_pool2d(made[0], 2) / 2) and torch.equal(decoded[1], made[1])
    assert sizes == [(56, 72)] * 2


def test_saved_and_loaded_it_makes_the_same_frames(pipeline, pair, tmp_path):
    expected = pipeline(
        *pair, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
    ).frames
    pipeline.save_pretrained(tmp_path / "checkpoint")
    for load in (
        MADiffPipeline.from_pretrained,
        lambda folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
    ):
        loaded = load(str(tmp_path / "checkpoint"))
        loaded.set_progress_bar_config(disable=True)
        result = loaded(
            *pair, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
        ).frames
        assert torch.equal(result, expected)
    model = AutoModel.from_pretrained(str(tmp_path / "checkpoint" / "hint_model"), trust_remote_code=True)
    assert type(model).__name__ == "MotionHintModel"


def test_inference_imports_no_opencv(pipeline, pair, tmp_path):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    code = (
        "import sys; sys.modules['cv2'] = None\n"
        "import torch\n"
        "from madiff_diffusers import MADiffPipeline\n"
        f"pipe = MADiffPipeline.from_pretrained({str(tmp_path / 'checkpoint')!r})\n"
        "pipe(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40), num_inference_steps=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class HostCopies(TorchDispatchMode):
    """What is copied from a GPU to the host, or to it from there."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            places = {each.device.type for each in args if isinstance(each, torch.Tensor)}
            to_host = "cuda" in places and made.device.type == "cpu"
            if to_host or (func is torch.ops.aten._to_copy.default and places == {"cpu"} and made.is_cuda):
                self.seen.append((str(func), made.device.type, tuple(made.shape)))
        return made


class UnaskingScheduler(DDIMScheduler):
    """Diffusers' own looks at the timestep, in every step; here it has no value either, though it lies on the host."""

    def step(self, model_output, timestep, sample, **kwargs):
        return DDIMSchedulerOutput(prev_sample=sample, pred_original_sample=model_output)


@pytest.mark.parametrize(
    "source, guesses", [(None, False), (SearchHints(), False), (SearchHints(), True)], ids=["model", "search", "guess"]
)
def test_steps_leave_nothing_to_the_host(pipeline, source, guesses):
    """On a GPU whose tensors have no values: whoever asked for one would fail."""
    pipeline.hints = source
    pipeline.register_to_config(guess_motion=guesses)
    pipeline.scheduler = UnaskingScheduler.from_config(pipeline.scheduler.config)
    copies = {}
    assert pipeline.hints.device_bound
    with FakeTensorMode(allow_non_fake_inputs=True):
        pipeline.to("cuda")
        for steps in (2, 5):
            prev, next_ = (EncodedFrames(torch.rand(1, 3, 64, 96, device="cuda"), (64, 96)) for _ in range(2))
            latents = torch.randn(1, 1, 4, 16, 24, device="cuda")
            with HostCopies() as seen:
                pipeline(prev, next_, num_inference_steps=steps, output_type="latent", latents=latents)
            assert pipeline.scheduler.timesteps.device.type == "cpu"
            copies[steps] = seen.seen
    assert all(place == "cuda" for _, place, _ in copies[5]), copies
    assert len(copies[5]) - len(copies[2]) == 3, "more is copied in a step than its timestep"


def test_a_source_without_its_model_is_refused(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if name not in ("hint_model", "i2e")}
    with pytest.raises(ValueError, match="hint_model"):
        MADiffPipeline(**parts, hint_source="model")


@pytest.mark.parametrize("cast", ["all", "storage"])
def test_half_precision_is_near_single(pipeline, pair, cast):
    def made() -> torch.Tensor:
        return pipeline(*pair, generator=torch.Generator().manual_seed(0), output_type="pt").frames

    single = made()
    if cast == "all":
        pipeline.to(torch.bfloat16)
    else:
        for name in ("vqvae", "unet", "hint_model"):
            getattr(pipeline, name).enable_layerwise_casting(torch.bfloat16, compute_dtype=torch.float32)
    assert 0 < (single - made()).abs().mean() < 0.02


def test_a_part_must_lie_within_the_features(pipeline):
    _, features = neighbours(pipeline)
    hints, latents = [torch.zeros(1, 2, 32, 32) for _ in range(2)], torch.zeros(1, 4, 8, 8)
    assert pipeline.vqvae.decode(latents, *features, *hints, origin=(32, 64)).sample.shape == (1, 3, 32, 32)
    for origin in ((5, 4), (32, 68), (-4, 0)):
        with pytest.raises(ValueError, match="`origin` must be multiples of 4 at which 32x32 pixels begin"):
            pipeline.vqvae.decode(latents, *features, *hints, origin=origin)


# ---- motion that the decoder guesses ----


@pytest.fixture
def guessing(pipeline) -> MADiffPipeline:
    parts = {name: part for name, part in pipeline.components.items() if name not in ("hint_model", "i2e")}
    made = MADiffPipeline(**parts, hint_source="search", guess_motion=True, default_num_inference_steps=1)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("told", [False, True])
def test_motion_is_guessed_as_a_decoding_finds_it(pipeline, told):
    (prev, next_, _), features = neighbours(pipeline)
    hints, latents = pipeline.hint_model(prev, next_, 0.25), torch.randn(1, 4, 16, 24)
    decoded = pipeline.vqvae.decode(latents if told else 0 * latents, *features, *hints, not told, time=0.25)
    small = FrameCoder(pipeline.vqvae).resize_hints(hints, (16, 24))
    given = (latents,) if told else ()
    guessed = pipeline.vqvae.guess_motion(*features, *small, *given, time=0.25)
    # How much of the latents counts is seen at half of their stride, finer than the hints that a guess is given here.
    assert torch.allclose(torch.cat(guessed, dim=1), decoded.offsets[-3], atol=1e-3 if told else 1e-5)
    assert not torch.allclose(torch.cat(guessed, dim=1), torch.cat(small, dim=1), atol=1e-2), "it adds to the hints"


def test_hints_are_finished_from_the_motion_that_is_guessed(guessing, pair):
    """Before the first step from what the source begins with, before the second from the first's latents."""
    vqvae, source, seen = guessing.vqvae, SearchHints(), []

    def note(pipeline, step, timestep, tensors):
        seen.append((tensors["hints_prev"], tensors["hints_next"]))
        return {}

    names = ["hints_prev", "hints_next"]
    called = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names, "output_type": "pt"}
    frames = [guessing.encode_frames(each) for each in pair]
    sides = [each.features for each in frames]
    begun = source.begin(frames[0].frames, frames[1].frames)
    size = [side // 4 for side in frames[0].frames.shape[-2:]]
    coder = FrameCoder(vqvae)
    motion = vqvae.guess_motion(*sides, *coder.resize_hints(begun, size))
    expected = source.finish(frames[0].frames, frames[1].frames, motion)
    guessing(*pair, generator=torch.Generator().manual_seed(0), **called)
    assert all(torch.allclose(*each, atol=1e-4) for each in zip(seen[-1], expected))
    started = source.start(frames[0].frames, frames[1].frames)
    assert not torch.allclose(expected[0], started[0], atol=0.01), "the decoder has a say"

    guessing(
        *pair, num_inference_steps=2, hint_policy="sampling", generator=torch.Generator().manual_seed(0), **called
    )
    made = guessing(
        *pair, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames[:, 0]
    assert not torch.allclose(seen[1][0], expected[0], atol=1e-4), "hints of the first step's latents"
    motion = vqvae.guess_motion(*sides, *coder.resize_hints(expected, size), made)
    again = source.finish(frames[0].frames, frames[1].frames, motion)
    assert all(torch.allclose(*each, atol=1e-3) for each in zip(seen[1], again))

    # Of several instants, each at its own.
    pictures, instants = [each.frames for each in frames], torch.tensor([0.25, 0.75])
    together = coder.motion_hints(source, *frames, instants.tolist(), instants.repeat_interleave(2))
    for number, instant in enumerate(instants):
        begun = coder.resize_hints(source.begin(*pictures, instant.item()), size)
        motion = vqvae.guess_motion(*sides, *begun, time=instant.expand(2))
        for made, alone in zip(together, source.finish(*pictures, motion, instant.item())):
            assert torch.allclose(made.chunk(2)[number], alone, atol=1e-4)


def test_a_source_that_cannot_finish_is_asked_as_before(guessing, pair):
    def made(source, **settings) -> torch.Tensor:
        guessing.hints = source
        return guessing(*pair, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).frames

    search = SearchHints()
    own = made(None)
    guessing.register_to_config(guess_motion=False)
    plain = made(None)
    guessing.register_to_config(guess_motion=True)
    assert torch.equal(made(NeighbourHints(search)), plain) and not torch.allclose(own, plain, atol=1e-4)


def test_every_pair_and_instant_guesses_its_own_motion(guessing, pair):
    def made(*images, **settings) -> torch.Tensor:
        latents = torch.zeros(len(images[0]), 3, 4, 14, 18)
        return guessing(*images, num_frames=3, latents=latents, output_type="pt", **settings).frames

    prev, next_ = pair
    turned = (prev.flip(-1), next_.flip(-1))
    both = made(*(torch.cat(each) for each in zip(pair, turned)))
    for number, images in enumerate((pair, turned)):
        assert torch.allclose(both[2 * number : 2 * number + 2], made(*images), atol=1e-3)


def test_a_guess_of_motion_survives_saving_and_tiles(guessing, tmp_path):
    pair = [torch.from_numpy(moving_picture(time, 160, 224)).permute(2, 0, 1)[None] / 255 for time in (-1, 1)]

    def made(pipeline) -> torch.Tensor:
        return pipeline(*pair, generator=torch.Generator().manual_seed(0), output_type="pt").frames

    guessing.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path), trust_remote_code=True, custom_pipeline=str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.guess_motion
    whole = made(guessing)
    assert torch.equal(made(loaded), whole)
    guessing.enable_tiling(128 * 128)
    assert (made(guessing) - whole).abs().mean() < 0.02


def test_who_cannot_guess_motion_says_so(tiny, pipeline):
    _, features = neighbours(pipeline)
    vqvae = VQMAGANModel(**tiny["vqvae"])
    with pytest.raises(ValueError, match="`guess_motion` needs `news_latents=True`"):
        vqvae.guess_motion(*features, torch.zeros(1, 2, 16, 24), torch.zeros(1, 2, 16, 24))
    parts = dict(pipeline.components, vqvae=vqvae, unet=UNet2DModel(**tiny["unet"]))
    with pytest.raises(ValueError, match="`guess_motion` needs `news_latents=True`"):
        MADiffPipeline(**parts, hint_source=tiny["hint_source"], guess_motion=True)


# ---- hints that go on from others ----


class ZoomFlow(RIFEFlowModel):
    """A network that is exact for two frames of which the second is larger by a fifth around the middle."""

    def flow_and_mask(self, frame_prev, frame_next, time=0.5):
        batch, _, height, width = frame_prev.shape
        y, x = torch.meshgrid(
            torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
        )
        onward = 0.2 * torch.stack([x, y])[None].expand(batch, -1, -1, -1) / (1 + 0.2 * time)
        return torch.cat([-time * onward, (1 - time) * onward], dim=1), onward[:, :1]


def test_flow_of_a_guess_is_seen_from_the_guess():
    frames = [torch.zeros(1, 3, 64, 96) for _ in range(3)]
    network = ZoomFlow(channels=(8, 8, 8, 8))
    expected = (
        1.1 * network(*frames[:2], 0.5)[1] * 2
    )  # 0.2 of the way from the middle, at each pixel of the first frame
    for flow in network.refine(*frames):
        assert torch.allclose(flow[..., 8:-8, 12:-12], expected[..., 8:-8, 12:-12], atol=0.01)


def test_known_hints_reach_a_network_beside_other_sources(pipeline):
    model = pipeline.hint_model
    frames = [torch.rand(1, 3, 32, 32) * 2 - 1 for _ in range(3)]
    known = tuple(torch.randn(1, 5, 32, 32) for _ in range(2))
    stack = StackedHints([NullHints(3), ModelHints(model)])
    expected = model.refine(*frames, tuple(each[:, 3:] for each in known))
    for made, right in zip(stack.from_guess(*frames, known), expected):
        assert torch.equal(made[:, 3:], right) and not made[:, :3].any()
    assert not torch.allclose(model.refine(*frames, None)[0], expected[0])
    assert goes_on(stack) and not goes_on(StackedHints([NullHints(3), NullHints(2)]))


def test_hints_of_a_smaller_guess_keep_finer_detail(pipeline):
    coder = FrameCoder(pipeline.vqvae, None, False)
    hints = tuple(torch.randn(1, 2, 64, 96) for _ in range(2))
    known = coder.resize_hints(hints, (32, 48))
    for made, before in zip(coder.detailed(hints, known, known), hints):
        assert torch.allclose(made, before, atol=1e-5), "nothing was told, nothing changes"
    moved = tuple(each + 1 for each in known)
    for made, before in zip(coder.detailed(hints, known, moved), hints):
        assert torch.allclose(made, before + 2, atol=1e-5), "a pixel of half the size is two"


def test_a_part_is_that_part_of_the_whole(pipeline):
    """Away from its borders: what is known of the neighbours, they reach out of it."""
    (prev, next_, _), features = neighbours(pipeline, (128, 160))
    hints = pipeline.hint_model(prev, next_, 0.5)
    latents = torch.randn(1, 4, 32, 40)
    whole = pipeline.vqvae.decode(latents, *features, *hints, force_not_quantize=True)
    part = np.s_[..., 32:112, 48:128]
    coarse = np.s_[..., 8:28, 12:32]
    tile = pipeline.vqvae.decode(
        latents[coarse], *features, *(each[part] for each in hints), force_not_quantize=True, origin=(32, 48)
    )
    inner = np.s_[..., 24:-24, 24:-24]
    assert torch.allclose(tile.sample[inner], whole.sample[part][inner], atol=1e-4)
    inner = np.s_[..., 3:-3, 3:-3]
    assert torch.allclose(tile.offsets[0][inner], whole.offsets[0][coarse][inner], atol=1e-5)


def test_tiles_give_what_whole_frames_give(pipeline):
    frames = [
        torch.from_numpy(moving_picture(time, 192, 256)).permute(2, 0, 1)[None].float() / 255 for time in (-1, 1)
    ]
    whole = pipeline(*frames, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    pipeline.enable_tiling(128 * 128)
    tiled = pipeline(*frames, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    assert (whole - tiled).abs().mean() < 0.0005


@pytest.mark.parametrize("side", [64, 66, 67])
def test_hints_of_smaller_frames_are_as_long_in_frames_of_any_size(side):
    """Frames seen four times smaller first, by a network that says the same of every place."""
    model = MotionHintModel(
        channels=(4, 8), start_channels=(8,), refine_channels=(8,), match_channels=4, reach=(1,), start_scale=4
    ).eval()
    with torch.no_grad():
        for level in model.start_levels:
            level.conv_out.bias.fill_(1.0)
        found = model(torch.zeros(1, 3, side, side), torch.zeros(1, 3, side, side))[0]
        usual = model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))[0]
    assert found.shape[-2:] == (side, side) and torch.allclose(found[..., :48, :48], usual[..., :48, :48], atol=1e-4)
