import copy
import pickle
from fractions import Fraction

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import PipelineCallback

from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel, interpolate_frames
from madiff_diffusers.frame_coding import EncodedFrames
from tests.conftest import build_pipeline, excite, moving_picture


def generators(*seeds: int) -> list:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipeline: MADiffPipeline, pair: tuple, **arguments) -> torch.Tensor:
    arguments = {"generator": generators(0, 1), "output_type": "pt", **arguments}
    return pipeline(*pair, **arguments).frames


def test_same_seed_same_frames_bit_for_bit(pipeline, pair):
    first = run(pipeline, pair)
    assert first.shape == (2, 1, 3, 51, 67) and first.dtype == torch.float32
    assert 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, run(pipeline, pair))
    assert not torch.equal(first, run(pipeline, pair, generator=generators(2, 3)))


def test_batch_of_two_equals_two_singles(pipeline, pair):
    both = run(pipeline, pair, num_frames=3)
    singles = [
        run(pipeline, tuple(frame[i : i + 1] for frame in pair), num_frames=3, generator=generators(i)) for i in (0, 1)
    ]
    assert (both - torch.cat(singles)).abs().max() <= 1e-4


@pytest.mark.parametrize("size", [(16, 16), (33, 100), (64, 64)])
def test_any_size_is_padded_and_cropped_back(pipeline, size):
    frames = [torch.from_numpy(moving_picture(time, *size)).permute(2, 0, 1) for time in (-1, 1)]
    assert run(pipeline, frames, generator=None).shape == (1, 1, 3, *size)


def test_input_and_output_types_agree(pipeline, pair):
    expected = run(pipeline, pair)
    as_uint8 = [(frame * 255).round().to(torch.uint8) for frame in pair]
    as_arrays = [frame.permute(0, 2, 3, 1).numpy() for frame in as_uint8]
    as_images = [[PIL.Image.fromarray(image) for image in array] for array in as_arrays]
    as_floats = [list(array.astype(np.float32) / 255) for array in as_arrays]
    for given in (as_uint8, as_arrays, as_images, as_floats, [list(frame) for frame in pair]):
        assert torch.allclose(run(pipeline, given), expected, atol=1e-5)
    array = run(pipeline, pair, output_type="np")
    assert array.shape == (2, 1, 51, 67, 3) and np.allclose(array, expected.permute(0, 1, 3, 4, 2).numpy())
    images = run(pipeline, pair, output_type="pil")
    assert len(images) == 2 and len(images[0]) == 1 and images[0][0].size == (67, 51)
    assert np.array_equal(np.array(images[1][0]), (array[1, 0] * 255).round().astype(np.uint8))
    assert torch.equal(pipeline(*pair, generator=generators(0, 1), output_type="pt", return_dict=False)[0], expected)


def test_every_instant_is_made_straight_from_the_two_frames(pipeline, pair):
    # With the noise given, each frame of several can be made on its own.
    noise = torch.randn(2, 4, 3, 8, 10, generator=torch.Generator().manual_seed(5))
    four = run(pipeline, pair, num_frames=4, latents=noise)
    assert four.shape == (2, 4, 3, 51, 67)
    for number in range(4):
        alone = run(pipeline, pair, times=[Fraction(number + 1, 5)], latents=noise[:, number])
        assert torch.equal(four[:, number : number + 1], alone)
    assert torch.equal(run(pipeline, pair, times=[0.5]), run(pipeline, pair))
    backwards = run(pipeline, pair, times=[0.8, 0.2], latents=noise[:, [3, 0]])
    assert torch.equal(backwards, four[:, [3, 0]]), "instants come in the order given"


def test_quarters_can_be_middles_of_middles(pipeline, pair):
    pair = tuple(frames[..., :48, :64] for frames in pair)  # which need no padding
    noise = torch.randn(2, 3, 3, 6, 8, generator=torch.Generator().manual_seed(5))
    three = run(pipeline, pair, num_frames=3, latents=noise, recursive=True)
    middle = run(pipeline, pair, latents=noise[:, 1])
    assert torch.equal(three[:, 1:2], middle)
    quarter = run(pipeline, (pair[0], middle[:, 0]), latents=noise[:, 0])
    assert torch.allclose(three[:, :1], quarter, atol=1e-5)
    assert torch.equal(
        three[:, :1], run(pipeline, pair, times=[0.25, 0.5], latents=noise[:, :2], recursive=True)[:, :1]
    )
    thirds = {"num_frames": 2, "latents": noise[:, :2]}
    assert torch.equal(run(pipeline, pair, recursive=True, **thirds), run(pipeline, pair, **thirds)), (
        "others are made straight"
    )
    sixteenth = {"times": [0.0625], "latents": noise[:, :1]}
    assert torch.equal(run(pipeline, pair, recursive=True, **sixteenth), run(pipeline, pair, **sixteenth))
    assert run(pipeline, pair, times=[0.375], recursive=True).shape == (2, 1, 3, 48, 64)
    assert pipeline.num_timesteps == 3 * len(pipeline.scheduler.timesteps), "of those that it is made of, too"
    latents = run(pipeline, pair, num_frames=3, latents=noise, recursive=True, output_type="latent")
    assert torch.equal(latents[:, 1:2], run(pipeline, pair, latents=noise[:, 1], output_type="latent"))
    assert not torch.equal(
        latents[:, :1], run(pipeline, pair, times=[0.25], latents=noise[:, :1], output_type="latent")
    )


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_frames_in_a_batch_are_what_they_are_one_by_one(pipeline, pair, scheduler):
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 1.1}

    arguments = {"num_frames": 5, "num_inference_steps": 2, "callback_on_step_end": callback}
    expected = run(pipeline, pair, **arguments)
    calls, shape = len(seen), (2, 3, 8, 10)
    assert seen == [(0, shape), (1, shape)] * 5
    together = run(pipeline, pair, frames_per_batch=3, **arguments)
    # A guess that a batch changes by a millionth can be rounded to another grey level, and flow around that pixel differ.
    assert (together - expected).abs().mean() <= 1e-4
    assert seen[calls:] == [(0, shape)] * 3 + [(1, shape)] * 3 + [(0, shape)] * 2 + [(1, shape)] * 2


def test_every_pair_has_its_own_generator_in_a_batch_of_instants_too(pipeline, pair):
    """Of a scheduler that draws noise at every step."""
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    arguments = {"num_frames": 2, "num_inference_steps": 2, "frames_per_batch": 2}
    frames = run(pipeline, pair, **arguments)
    assert torch.equal(run(pipeline, pair, **arguments), frames)
    changed = run(pipeline, pair, **arguments, generator=generators(0, 2))
    assert torch.equal(changed[0], frames[0]) and not torch.equal(changed[1], frames[1])


def test_networks_are_told_the_instant(tiny, pair):
    tiny["vqvae"]["time_conditioned"], tiny["unet"]["class_embed_type"] = True, "timestep"
    pipeline = build_pipeline(tiny)
    told, gates = [], []
    pipeline.unet.class_embedding.register_forward_hook(lambda module, inputs, output: told.append(inputs[0]))
    pipeline.vqvae.decoder.register_forward_hook(
        lambda module, inputs, output: gates.append(output[2][-1].mean().item())
    )
    run(pipeline, pair, times=[0.1, 0.9], num_inference_steps=1, hint_policy="start", frames_per_batch=2)
    labels = pipeline.unet.time_proj(torch.tensor([100.0, 100.0, 900.0, 900.0]))
    assert torch.allclose(told[0], labels, atol=1e-3)
    for time in (0.1, 0.5, 0.9):
        run(pipeline, pair, times=[time], num_inference_steps=1, hint_policy="start")
    _, early, middle, late = gates
    assert early > 0.7 > middle > 0.3 > late, "the nearer neighbour has the larger share"


@pytest.mark.parametrize("scale", [2, 4])
def test_guesses_are_made_at_a_smaller_scale(tiny, pair, scale):
    tiny["pipeline"]["guess_scale"] = scale
    pipeline = build_pipeline(tiny)
    pipeline.hints = Recorder(pipeline.hints)
    decoded = []
    pipeline.vqvae.decoder.register_forward_hook(
        lambda module, inputs, output: decoded.append(tuple(output[0].shape[-2:]))
    )
    assert run(pipeline, pair, num_inference_steps=2).shape == (2, 1, 3, 51, 67)
    *guesses, result = decoded
    size = (result[0] // scale, result[1] // scale)
    assert guesses == [size] * 2
    assert all(
        frame.shape[-2:] == size
        for _, frames, _ in pipeline.hints.calls
        for frame in frames
        if isinstance(frame, torch.Tensor)
    )
    decoded.clear()
    run(pipeline, pair, num_inference_steps=2, hint_policy="start")
    assert decoded == [result], "what no guess refines is full size all along"


@pytest.mark.parametrize("scale, height, width", [(2, 16, 96), (4, 32, 192), (8, 33, 40), (4, 5, 5)])
def test_guesses_of_small_frames_have_flow(tiny, scale, height, width):
    """Smaller than 16 pixels, which OpenCV's flow reads outside of."""
    tiny["pipeline"]["guess_scale"] = scale
    pipeline = build_pipeline(tiny)
    assert run(pipeline, torch.rand(2, 1, 3, height, width), generator=None).isfinite().all()


def test_events_of_smaller_frames_fit_smaller_guesses(tiny):
    tiny["vqvae"]["block_out_channels"] = [12]
    tiny["pipeline"].update(event_scale=8, guess_scale=2)
    assert run(build_pipeline(tiny), torch.rand(2, 1, 3, 20, 20), generator=None).shape == (1, 1, 3, 20, 20)


def test_what_is_encoded_serves_every_scale_of_guesses(pipeline):
    pair = torch.rand(2, 2, 3, 64, 64)  # of which no scale has to be padded
    halves, quarters = (MADiffPipeline.from_pipe(pipeline, guess_scale=scale) for scale in (2, 4))
    encoded = [quarters.encode_frames(frames) for frames in pair]
    for own in (quarters, halves, quarters):
        assert (run(own, encoded) - run(own, pair)).abs().max() <= 1e-5


def test_what_was_encoded_otherwise_is_refused(pipeline, tiny, pair):
    encoded = [pipeline.encode_frames(frames) for frames in pair]
    copied = copy.deepcopy(pipeline)
    small, narrow = ([pipeline.encode_frames(frames[..., :48, :side]) for frames in pair] for side in (48, 64))
    for own, given, message in (
        (copied, encoded, "`image_prev` was encoded by another autoencoder"),
        (build_pipeline(tiny), encoded, "`image_prev` was encoded by another autoencoder"),
        (MADiffPipeline.from_pipe(pipeline, guess_scale=8), small, "`image_prev` is padded to 48x48"),
        (MADiffPipeline.from_pipe(pipeline, guess_scale=8), narrow, "`image_prev` is padded to 48x64"),
    ):
        with pytest.raises(ValueError, match=message):
            run(own, given)
    expected = run(pipeline, encoded)
    assert torch.equal(run(pipeline, copy.deepcopy(encoded)), expected), "a copy is taken"
    assert torch.equal(run(pipeline, pickle.loads(pickle.dumps(encoded))), expected), "from another process, too"
    parts = [EncodedFrames.together(each.one_by_one()) for each in encoded]
    assert torch.equal(run(pipeline, parts), expected)
    for given in (parts, [each.one_by_one()[0] for each in encoded]):
        with pytest.raises(ValueError, match="`image_prev` was encoded by another autoencoder"):
            run(copied, given)
    pipeline.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match="`image_prev` was encoded in float32, which does not fit this pipeline, of bfloat16"
    ):
        run(pipeline, encoded)


def test_frames_are_encoded_once(pipeline, pair):
    calls = []
    pipeline.vqvae.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    expected = run(pipeline, pair)
    assert calls == [4]
    encoded = [pipeline.encode_frames(frames) for frames in pair]
    assert calls == [4, 2, 2] and encoded[0].size == (51, 67)
    assert (run(pipeline, encoded) - expected).abs().max() <= 1e-5
    assert torch.equal(run(pipeline, encoded), run(pipeline, encoded)) and len(calls) == 3
    run(pipeline, (encoded[1], pair[0]), num_frames=3)
    assert calls[3:] == [2], "the frame that was not"
    with pytest.raises(ValueError, match="`image_prev` and `image_next` must have the same size"):
        run(pipeline, (encoded[0], pair[1][..., :-1]))


def test_follows_the_published_algorithm(pipeline, pair):
    """MA-Sampling written out step by step for DDIM, against the pipeline."""
    steps, f = 3, pipeline.vqvae.downsample_factor
    pad = torch.nn.functional.pad(torch.cat(pair) * 2 - 1, (0, 80 - 67, 0, 64 - 51), mode="replicate")
    prev, next_ = pad.chunk(2)
    noise = torch.randn(2, 3, 64 // f, 80 // f, generator=torch.Generator().manual_seed(3))
    alphas = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2, 0)
    with torch.no_grad():
        e_prev, e_next = pipeline.vqvae.encode(prev), pipeline.vqvae.encode(next_)
        hints = pipeline.hints.start(prev, next_)
        z = noise
        for i, t in enumerate((999, 666, 332)):
            small = [pipeline.vqvae.resize_hints(hint, z.shape[-2:]) for hint in hints]
            epsilon = pipeline.unet(torch.cat([z, e_prev.latents, e_next.latents, *small], 1), t).sample
            z0 = (z - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
            following = alphas[(666, 333)[i]] if i < 2 else alphas[0]
            z = following.sqrt() * z0 + (1 - following).sqrt() * epsilon
            guess = pipeline.vqvae.decode(z0, e_prev.features, e_next.features, *hints).sample.clamp(-1, 1)
            hints = pipeline.hints.from_guess(prev, guess, next_)
        final = pipeline.vqvae.decode(z0, e_prev.features, e_next.features, *hints).sample.clamp(-1, 1)
    expected = (final[..., :51, :67] / 2 + 0.5)[:, None]
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert torch.allclose(run(pipeline, pair, latents=noise, num_inference_steps=steps), expected, atol=1e-4)


class Recorder:
    """A hint source that writes down what it is asked and answers as the real one does."""

    def __init__(self, source):
        self.source, self.hint_channels, self.calls = source, source.hint_channels, []

    def __getattr__(self, name):
        method = getattr(self.source, name)

        def recorded(*frames):
            result = method(*frames)
            self.calls.append((name, frames, result))
            return result

        return recorded


def test_hints_start_at_nothing_and_come_from_the_last_guess(tiny, pair):
    tiny["hint_source"], tiny["vqvae"]["hint_channels"], tiny["unet"]["in_channels"] = "events", 18, 45
    tiny["vqvae"]["offset_hints"] = False
    pipeline = build_pipeline(tiny)
    pipeline.hints = Recorder(pipeline.hints)
    decoded, seen, timesteps = [], [], []
    decode, unet = pipeline.vqvae.decode, pipeline.unet.forward

    def watch_decode(*arguments, **keywords):
        result = decode(*arguments, **keywords)
        decoded.append(result.sample)
        return result

    def watch_unet(sample, timestep, **keywords):
        seen.append(sample)
        timesteps.append(int(timestep))
        return unet(sample, timestep, **keywords)

    pipeline.vqvae.decode, pipeline.unet.forward = watch_decode, watch_unet
    run(pipeline, pair, num_inference_steps=3)

    assert timesteps == [999, 666, 332]
    names = [name for name, _, _ in pipeline.hints.calls]
    assert names == ["start", "from_guess", "from_guess", "from_guess"]
    assert not seen[0][:, 9:].any(), "events are null hints at the first step"
    for k in (1, 2):
        _, (prev, guess, next_), hints = pipeline.hints.calls[k]
        assert torch.equal(guess, decoded[k - 1].clamp(-1, 1)), "the guess is the one decoded a step before"
        small = [pipeline.vqvae.resize_hints(hint, seen[k].shape[-2:]) for hint in hints]
        assert torch.equal(seen[k][:, 9:], torch.cat(small, dim=1)), "the denoiser sees the hints of the last guess"
        assert seen[k][:, 9:].any()
    assert len(decoded) == 4, "one guess a step, and the result"
    # Beside its own latents, the denoiser sees the neighbours' and the hints, the same or known at every step.
    latents = [pipeline.vqvae.encode(frame).latents for frame in (prev, next_)]
    assert all(torch.allclose(x[:, 3:9], torch.cat(latents, 1), atol=1e-5) for x in seen)


@pytest.mark.parametrize(
    "policy, interval, asked",
    [
        ("sampling", 1, ["start"] + ["from_guess"] * 4),
        ("sampling", 2, ["start"] + ["from_guess"] * 2),
        ("sampling", 9, ["start", "from_guess"]),
        ("damped", 2, ["start"] + ["from_guess"] * 2),
        ("start", 1, ["start"]),
    ],
)
def test_hint_policies(pipeline, pair, policy, interval, asked):
    pipeline.hints = Recorder(pipeline.hints)
    run(pipeline, pair, num_inference_steps=4, hint_policy=policy, hint_interval=interval)
    assert [name for name, _, _ in pipeline.hints.calls] == asked


@pytest.mark.parametrize("interval", [1, 2])
def test_damped_hints_move_less_with_every_extraction(pipeline, pair, interval):
    used = []

    def note(pipe, step, timestep, tensors):
        used.append(tensors["hints_prev"])
        return {}

    pipeline.hints = Recorder(pipeline.hints)
    inputs = ["hints_prev"]
    run(
        pipeline,
        pair,
        num_inference_steps=2 * interval + 1,
        hint_policy="damped",
        hint_interval=interval,
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=inputs,
    )
    extracted = [result[0] for name, _, result in pipeline.hints.calls if name == "from_guess"]
    first, second, third = extracted
    used = used[::interval]
    assert torch.equal(used[0], first)
    assert torch.allclose(used[1], (first + second) / 2, atol=1e-5)
    assert torch.allclose(used[2], used[1] + (third - used[1]) / 6, atol=1e-5)


def test_the_checkpoint_says_which_policy_is_the_default(pipeline, pair, tmp_path):
    settings = {
        **{name: pipeline.config[name] for name in ("hint_source", "default_num_inference_steps")},
        "default_hint_policy": "damped",
    }
    damping = MADiffPipeline(**pipeline.components, **settings)
    damping.save_pretrained(tmp_path)
    loaded = MADiffPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    own = run(loaded, pair, num_inference_steps=3)
    assert torch.equal(own, run(pipeline, pair, num_inference_steps=3, hint_policy="damped"))
    assert not torch.equal(own, run(pipeline, pair, num_inference_steps=3))


def test_hint_policies_differ(pipeline, pair):
    policies = ("sampling", "damped", "start")
    results = [run(pipeline, pair, num_inference_steps=3, hint_policy=policy) for policy in policies]
    for i, first in enumerate(results):
        assert not any(torch.equal(first, second) for second in results[i + 1 :])


def test_save_and_load_gives_identical_frames(pipeline, pair, tmp_path):
    expected = run(pipeline, pair)
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = MADiffPipeline.from_pretrained(tmp_path)
    assert set(loaded.components) == {"vqvae", "unet", "scheduler", "i2e", "hint_model"}
    assert isinstance(loaded.vqvae, VQMAGANModel)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, pair), expected)


def test_components_build_another_pipeline(pipeline, pair):
    again = MADiffPipeline(**pipeline.components, hint_source="events+flow")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, pair, num_inference_steps=2), run(pipeline, pair, num_inference_steps=2))


def test_half_precision_stays_close(pipeline, pair):
    expected = run(pipeline, pair)
    frames = run(pipeline.to(dtype=torch.bfloat16), pair)
    assert frames.dtype == torch.float32
    assert (frames - expected).abs().mean() < 0.02


def test_what_is_offloaded_leaves_the_device_after_a_call(pipeline, pair, monkeypatch):
    freed = []
    monkeypatch.setattr(MADiffPipeline, "maybe_free_model_hooks", lambda self: freed.append(self))
    run(pipeline, pair)
    assert freed == [pipeline]


def test_another_i2e_takes_effect(pipeline, pair):
    expected = run(pipeline, pair)
    pipeline.i2e = excite(EventGANModel(**pipeline.i2e.config), seed=7).eval()
    assert not torch.equal(run(pipeline, pair), expected)


def test_half_precision_keeps_codes_and_large_offsets(pipeline):
    """Codes and hints stay in float32 where the networks do not."""
    vqvae = pipeline.vqvae.to(torch.bfloat16)
    frame = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    hints = torch.zeros(1, 20, 64, 64)
    hints[:, -2] = 33.3  # bf16 has no number between 33.25 and 33.5
    features = vqvae.encode(frame).features
    decoded = vqvae.decode(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), features, features, hints, hints)
    assert decoded.sample.dtype == torch.bfloat16
    assert all(offsets.dtype == torch.float32 for offsets in decoded.offsets)


def test_official_callbacks_name_their_tensors(pipeline, pair):
    class Watch(PipelineCallback):
        tensor_inputs = ["hints_prev"]

        def __init__(self):
            super().__init__()
            self.seen = []

        def callback_fn(self, pipe, step, timestep, tensors):
            self.seen.append(set(tensors))
            return tensors

    watch = Watch()
    run(pipeline, pair, num_inference_steps=2, callback_on_step_end=watch)
    assert watch.seen == [{"hints_prev"}] * 2


def test_callback_sees_and_replaces_tensors(pipeline, pair):
    steps = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline and set(tensors) == {"latents", "hints_prev", "hints_next"}
        steps.append((step, int(timestep)))
        return {"hints_prev": torch.zeros_like(tensors["hints_prev"])}

    names = ["latents", "hints_prev", "hints_next"]
    changed = run(
        pipeline,
        pair,
        num_inference_steps=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert steps == [(0, 999), (1, 499)]
    assert not torch.equal(changed, run(pipeline, pair, num_inference_steps=2))


@pytest.mark.parametrize("in_place", [True, False])
def test_latents_that_a_callback_changes_after_the_last_step_are_decoded(pipeline, pair, in_place):
    def callback(pipe, step, timestep, tensors):
        if step == 1 and in_place:
            tensors["latents"].add_(1)
        elif step == 1:
            tensors["latents"] = tensors["latents"] + 1
        return tensors

    settings = {"num_inference_steps": 2, "output_type": "latent", "callback_on_step_end": callback}
    expected = run(pipeline, pair, num_inference_steps=2, output_type="latent")
    assert torch.allclose(run(pipeline, pair, **settings), expected + 1, atol=1e-4)


def test_a_stream_takes_what_the_pipeline_takes(pipeline):
    frames = [torch.rand(3, 32, 48, requires_grad=True) for _ in range(2)]
    made = list(interpolate_frames(pipeline, frames, factor=np.int64(2), steps=1, output_type="pt"))
    assert len(made) == 4 and torch.allclose(made[0], frames[0].detach(), atol=1e-5)
    for wrong, message in (
        ({"factor": 0}, "`factor` must be a positive integer, but is 0"),
        ({"steps": 0}, "`steps` must be a positive integer, but is 0"),
        ({"cut_threshold": float("nan")}, "`cut_threshold` must be at least 0, but is nan"),
        ({"cut_ratio": 0.5}, "`cut_ratio` must be at least 1, but is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            next(interpolate_frames(pipeline, frames[:1], **wrong))


def test_a_stream_has_no_bar_for_each_pair(pipeline, capfd):
    pipeline.set_progress_bar_config(desc="mine")
    list(interpolate_frames(pipeline, [moving_picture(time) for time in range(3)], steps=1))
    assert capfd.readouterr().err == ""
    pipeline(moving_picture(0), moving_picture(1), num_inference_steps=1)
    assert "mine" in capfd.readouterr().err, "the caller's own settings are as they were"


def test_interrupt_stops_the_denoising(pipeline, pair):
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append(step)
        pipe._interrupt = True
        return tensors

    frames = run(pipeline, pair, num_inference_steps=4, callback_on_step_end=callback)
    assert calls == [0] and frames.shape == (2, 1, 3, 51, 67)


def grey_images() -> dict:
    """One ramp of 16 bits, as PIL images of every mode that holds as many."""
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    return {
        "I;16": PIL.Image.fromarray(ramp),
        "I;16B": PIL.Image.frombytes("I;16B", (64, 48), ramp.astype(">u2").tobytes()),
        "I": PIL.Image.fromarray(ramp.astype(np.int32)),
        "F": PIL.Image.fromarray((ramp / 65535).astype(np.float32)),
    }


def test_grey_images_of_more_than_eight_bits(pipeline):
    images = grey_images()
    right = torch.from_numpy(np.array(images["I;16"]).astype(np.float32) / 65535)
    for mode, grey in images.items():
        assert grey.mode == mode
        tensor = pipeline.frame_processor.to_tensor(grey, "image_prev")
        assert (tensor[0] / 2 + 0.5 - right).abs().max() < 1e-6, mode
        given = next(interpolate_frames(pipeline, [grey], output_type="np"))
        assert np.abs(given - right.numpy()[..., None]).max() < 1e-6, mode
    for wrong, message in (
        (
            PIL.Image.fromarray(np.full((8, 8), 70000, np.int32)),
            r"mode I must lie in \[0, 65535\], but lies in \[70000, 70000\]",
        ),
        (
            PIL.Image.fromarray(np.full((8, 8), 255, np.float32)),
            r"mode F must lie in \[0, 1\], but lies in \[255, 255\]",
        ),
        (PIL.Image.fromarray(np.full((8, 8), np.nan, np.float32)), "mode F must lie in"),
    ):
        with pytest.raises(ValueError, match=f"`image_prev` as a PIL image of {message}"):
            pipeline(wrong, wrong)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "P", "RGB with a transparent colour"])
def test_what_transparency_hides_stays_hidden(pipeline, mode):
    image = PIL.Image.new("RGBA", (32, 32), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (0, 0, 16, 32))
    image = (
        image.convert("LA" if mode == "La" else "RGBA").convert(mode) if "with" not in mode else image.convert("RGB")
    )
    if "with" in mode:
        image.info["transparency"] = (10, 10, 10)
    tensor = pipeline.frame_processor.to_tensor(image, "image_prev")
    assert (tensor[..., :16] == -1).all() and (tensor[..., 16:] * 127.5 + 127.5 - 200).abs().max() < 0.01


def image(width: int = 32, height: int = 32) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_next": image(30, 32)}, r"same size, but are 32x32 and 30x32"),
        ({"image_prev": [image(), image()]}, r"as many frames, but hold 2 and 1"),
        ({"image_prev": [image(), image(16, 16)]}, r"`image_prev` must hold frames of one size"),
        ({"image_prev": []}, r"`image_prev` must hold at least one frame"),
        ({"image_prev": np.zeros((32, 32))}, r"`image_prev` as a numpy array must have shape"),
        ({"image_prev": torch.zeros(1, 32, 32)}, r"`image_prev` as a tensor must have shape"),
        ({"image_prev": torch.full((3, 32, 32), 2.0)}, r"`image_prev` as floating point must lie in \[0, 1\]"),
        ({"image_prev": torch.full((3, 32, 32), float("nan"))}, r"`image_prev` as floating point"),
        ({"image_prev": torch.zeros(3, 32, 32, dtype=torch.int64)}, r"`image_prev` must be uint8 or floating"),
        ({"image_prev": np.zeros((32, 32, 3), ">i4")}, r"`image_prev` must be uint8 or floating point, but is >i4"),
        ({"image_prev": torch.zeros(3, 0, 32)}, r"`image_prev` must not be empty"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be a positive integer, but is 0"),
        ({"hint_interval": 1.5}, r"`hint_interval` must be a positive integer, but is 1.5"),
        ({"num_frames": 0}, r"`num_frames` must be a positive integer, but is 0"),
        ({"frames_per_batch": 0}, r"`frames_per_batch` must be a positive integer, but is 0"),
        (
            {"times": np.array(0.5)},
            r"`times` must be a list of numbers between 0 and 1, both excluded.*, but is array\(0.5\)",
        ),
        ({"times": []}, r"`times` must be a list of numbers between 0 and 1, both excluded.*, but is \[\]"),
        ({"times": [0]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": [0.5, 1]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": [2]}, r"`times` must be a list of numbers between 0 and 1"),
        (
            {"times": [sum([0.1] * 10)]},
            r"`times` must be a list of numbers between 0 and 1, both excluded, from 1e-30 to what",
        ),
        ({"times": [1e-46]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": [Fraction(1, 10**400)]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": [10**400]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": [float("nan")]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": ["0.5"]}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": 0.5}, r"`times` must be a list of numbers between 0 and 1"),
        ({"times": [0.5, Fraction(1, 2)]}, r"`times` must not repeat an instant"),
        ({"times": [0.5], "num_frames": 2}, r"Either `num_frames` or `times` can be given"),
        ({"hint_policy": "guess"}, r"`hint_policy` must be one of sampling, damped, start, but is 'guess'"),
        ({"output_type": "jpg"}, r"`output_type` must be one of pil, np, pt"),
        ({"generator": generators(0, 1)}, r"one generator per pair \(1\), but holds 2"),
        ({"latents": torch.zeros(1, 3, 9, 9)}, r"`latents` must have shape \(1, 1, 3, 4, 4\)"),
        ({"image_prev": np.full((32, 32, 3), 1.0000005)}, r"`image_prev` .* lies in \[1.00000048, 1.00000048\]"),
        ({"callback_on_step_end_tensor_inputs": ["truth"]}, r"`callback_on_step_end_tensor_inputs`"),
    ],
)
def test_wrong_arguments_are_named(pipeline, arguments, message):
    arguments = {"image_prev": image(), "image_next": image(), **arguments}
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_prev": "frame.png"}, "`image_prev` must be a PIL image.*str"),
        ({"generator": 0}, "`generator` must be a torch.Generator or a list of them, but is 0"),
        ({"generator": tuple(generators(0))}, "`generator` must be a torch.Generator or a list of them, but is "),
        ({"generator": [None]}, "`generator` must be a torch.Generator or a list of them, but is "),
        ({"latents": np.zeros((1, 3, 4, 4))}, "`latents` must be a tensor, but is a ndarray"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be a function, but is 3"),
        ({"callback_on_step_end_tensor_inputs": None}, "`callback_on_step_end_tensor_inputs` must be .*, but is None"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "_inputs` must be a list of names, but is 'latents'"),
    ],
)
def test_wrong_types_are_named(pipeline, arguments, message):
    with pytest.raises(TypeError, match=message):
        pipeline(**{"image_prev": image(), "image_next": image(), **arguments})


def test_latents_of_any_dtype_are_gone_on_with_in_single_precision(pipeline, pair):
    noise = torch.randn(2, 3, 8, 10).double()
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].dtype)

    frames = run(pipeline, pair, latents=noise, callback_on_step_end=note)
    assert set(seen) == {torch.float32} and torch.equal(frames, run(pipeline, pair, latents=noise.float()))


def test_numbers_of_numpy_are_taken(pipeline):
    pair = [np.float32(moving_picture(time, 32, 32) / 255) for time in (-1, 1)]
    expected = run(pipeline, pair, times=[0.25, 0.5], generator=generators(0))
    for kind in (np.float16, np.float32, np.float64):
        assert torch.equal(run(pipeline, pair, times=np.array([0.25, 0.5], kind), generator=generators(0)), expected)
    for kind in (">f4", np.longdouble):
        assert torch.equal(
            run(pipeline, [each.astype(kind) for each in pair], times=[0.25, 0.5], generator=generators(0)), expected
        )


def test_components_that_do_not_fit_are_named(pipeline):
    with pytest.raises(ValueError, match="`hint_source='flow'` gives 2 channels"):
        MADiffPipeline(**pipeline.components, hint_source="flow")
