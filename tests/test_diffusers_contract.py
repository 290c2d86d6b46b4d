"""What Diffusers' users may expect of a pipeline and of its components, beyond making frames."""

import json
import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file

from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel
from tests.conftest import build_pipeline, excite


NETWORKS = ("vqvae", "unet", "i2e")


def make(pipeline: MADiffPipeline, pair: tuple, seeds: tuple = (0, 1), **arguments) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(*pair, generator=generator, output_type="pt", **arguments).frames


def same_weights(one: MADiffPipeline, other: MADiffPipeline) -> bool:
    return all(
        mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        for name in NETWORKS
        for mine, theirs in zip(
            getattr(one, name).state_dict().values(), getattr(other, name).state_dict().values(), strict=True
        )
    )


# ---- saved and loaded ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_survive(dtype, pipeline, tmp_path):
    pipeline.to(dtype=dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for name in ("dtype", "torch_dtype"):
        loaded = MADiffPipeline.from_pretrained(tmp_path, **{name: dtype})
        assert loaded.dtype == dtype and same_weights(loaded, pipeline)
    mixed = MADiffPipeline.from_pretrained(tmp_path, dtype={"vqvae": torch.float32, "default": torch.bfloat16})
    assert (mixed.vqvae.dtype, mixed.unet.dtype, mixed.i2e.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


def test_variants_lie_side_by_side(pipeline, pair, tmp_path):
    expected = make(pipeline, pair)
    pipeline.save_pretrained(tmp_path)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(make(MADiffPipeline.from_pretrained(tmp_path), pair), expected)
    half = MADiffPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert same_weights(half, pipeline)
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    MADiffPipeline.from_pretrained(tmp_path, variant="fp16")  # the parts that have no variant are taken without it
    with pytest.raises(ValueError, match="variant=bf16"):
        MADiffPipeline.from_pretrained(tmp_path, variant="bf16")


def test_shards(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="50KB")
    pipeline.save_pretrained(tmp_path, max_shard_size="50KB", variant="fp16")
    for name in ("vqvae", "unet"):
        index = json.loads((tmp_path / name / "diffusion_pytorch_model.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
        assert len(shards) > 2 and all((tmp_path / name / shard).is_file() for shard in shards)
        assert not (tmp_path / name / "diffusion_pytorch_model.safetensors").exists()
    assert same_weights(MADiffPipeline.from_pretrained(tmp_path), pipeline)
    assert same_weights(MADiffPipeline.from_pretrained(tmp_path, variant="fp16"), pipeline)
    assert isinstance(VQMAGANModel.from_pretrained(tmp_path / "vqvae"), VQMAGANModel)


@pytest.mark.parametrize(
    "options", [{"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}], ids=str
)
def test_ways_of_loading(options, pipeline, pair, tmp_path):
    expected = make(pipeline, pair)
    pipeline.save_pretrained(tmp_path)
    loaded = MADiffPipeline.from_pretrained(tmp_path, **options)
    assert torch.equal(make(loaded, pair), expected)
    assert not any(part.training for part in (loaded.vqvae, loaded.unet, loaded.i2e))


def test_the_package_s_checkpoint_is_in_half_precision_already():
    loaded = MADiffPipeline.from_pretrained("madiff-compact", variant="fp16", dtype=torch.float16)
    assert loaded.dtype == torch.float16
    with pytest.raises(ValueError, match="variant=bf16"):
        MADiffPipeline.from_pretrained("madiff-compact", variant="bf16")


@pytest.mark.parametrize("part", ["vqvae", "i2e"])
def test_arguments_of_saving_are_in_diffusers_order(part, pipeline, tmp_path):
    model = getattr(pipeline, part)
    model.save_pretrained(tmp_path / "other process", False)
    assert not (tmp_path / "other process" / "config.json").exists(), "which the main process alone writes"
    model.save_pretrained(tmp_path / "named", True, None, True, "fp16", "8KB", False)
    assert len(list((tmp_path / "named").glob("*.fp16-*.safetensors"))) > 2
    pipeline.save_pretrained(tmp_path / "pipeline", True, None, None, False, False)
    pipeline.save_pretrained(tmp_path / "pipeline", use_flashpack=False)
    with pytest.raises(ValueError, match="`use_flashpack` False"):
        pipeline.save_pretrained(tmp_path / "pipeline", use_flashpack=True)


def test_losses_can_be_added_to(pipeline):
    model, hints = pipeline.vqvae, torch.zeros(2, pipeline.vqvae.config.hint_channels, 32, 32)
    frames = torch.rand(3, 2, 3, 32, 32)
    with torch.no_grad():
        out = model(*frames, hints, hints)
    before = out.commit_loss.clone()
    out.commit_loss += torch.tensor([1.0, 2.0])
    assert torch.equal(out.commit_loss, before + torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("part, kind", [("vqvae", VQMAGANModel), ("i2e", EventGANModel)])
def test_components_save_and_load_as_any_model(part, kind, pipeline, tmp_path):
    model = getattr(pipeline, part)
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.fp16-*.safetensors"))) > 2
    loaded = kind.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16, device_map={"": "cpu"})
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(model.state_dict().values(), loaded.state_dict().values())
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"}
    again = kind.from_config(loaded.config)
    assert {**again.config, "_name_or_path": None} == {**loaded.config, "_name_or_path": None}


def test_no_configuration_is_reported_as_unknown(pipeline, tmp_path, diffusers_log):
    pipeline.save_pretrained(tmp_path)
    MADiffPipeline.from_pretrained(tmp_path)
    assert "not expected" not in diffusers_log.text


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_may_read_a_configuration_may_read_the_weights(pipeline, tmp_path, umask):
    before = os.umask(umask)
    try:
        pipeline.save_pretrained(tmp_path / "whole")
        pipeline.vqvae.save_pretrained(tmp_path / "part", max_shard_size="8KB")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "save", [lambda pipe: pipe, lambda pipe: pipe.vqvae, lambda pipe: pipe.i2e], ids=["pipeline", "vqvae", "i2e"]
)
def test_pickles_are_not_written(save, pipeline, tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        save(pipeline).save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_an_optional_component_may_be_missing(tiny, pair, tmp_path):
    tiny["hint_source"], tiny["vqvae"]["hint_channels"], tiny["unet"]["in_channels"] = "flow", 2, 13
    pipeline = build_pipeline(tiny)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert pipeline.i2e is None and index["i2e"] == [None, None] and not (tmp_path / "i2e").exists()
    assert torch.equal(make(MADiffPipeline.from_pretrained(tmp_path), pair), make(pipeline, pair))


def test_components_can_be_given_instead_of_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    i2e = excite(EventGANModel.from_config(pipeline.i2e.config), seed=5)
    loaded = MADiffPipeline.from_pretrained(tmp_path, scheduler=scheduler, i2e=i2e)
    assert loaded.scheduler is scheduler and loaded.i2e is i2e
    loaded.save_pretrained(tmp_path / "second")
    again = MADiffPipeline.from_pretrained(tmp_path / "second")
    assert isinstance(again.scheduler, EulerDiscreteScheduler) and same_weights(again, loaded)
    again.scheduler = DDIMScheduler.from_config(again.scheduler.config)
    assert again.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type


def test_from_pipe_shares_the_components(pipeline, pair):
    pipeline.enable_tiling(4096)
    other = MADiffPipeline.from_pipe(pipeline)
    assert other.tiling.pixels == 4096
    assert other.unet is pipeline.unet and dict(other.config) == dict(pipeline.config)
    assert torch.equal(make(other, pair), make(pipeline, pair))


def test_what_takes_the_place_of_none_is_saved(pipeline, pair, tmp_path):
    expected, i2e = make(pipeline, pair), pipeline.i2e
    pipeline.i2e = None
    pipeline.i2e = i2e
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = MADiffPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.i2e is not None and torch.equal(make(loaded, pair), expected)


# ---- called ----


def test_a_batch_of_one_is_a_single_pair(pipeline, pair):
    batch = make(pipeline, tuple(frame[:1] for frame in pair), (0,))
    assert torch.equal(make(pipeline, tuple(frame[0] for frame in pair), (0,)), batch)


def test_a_list_of_generators_is_each_pair_s_own(pipeline, pair):
    both = make(pipeline, pair)
    swapped = make(pipeline, tuple(frame.flip(0) for frame in pair), (1, 0)).flip(0)
    assert (both - swapped).abs().max() <= 1e-4


def test_to_moves_every_network(pipeline):
    pipeline.to("cpu", torch.bfloat16)
    assert {part.dtype for part in (pipeline.vqvae, pipeline.unet, pipeline.i2e)} == {torch.bfloat16}
    assert pipeline.dtype == torch.bfloat16 and pipeline.device == torch.device("cpu")
    pipeline.to(torch.float32)
    assert {part.dtype for part in (pipeline.vqvae, pipeline.unet, pipeline.i2e)} == {torch.float32}


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.enable_attention_slicing("max"),
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        lambda pipe: pipe.enable_group_offload(
            torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, exclude_modules="i2e"
        ),
        lambda pipe: [getattr(pipe, name).to(memory_format=torch.channels_last) for name in NETWORKS],
    ],
    ids=["slicing", "max slicing", "model offload", "group offload", "group offload of blocks", "channels_last"],
)
def test_helpers_keep_the_frames(enable, pipeline, pair):
    expected = make(pipeline, pair)
    enable(pipeline)
    assert (make(pipeline, pair) - expected).abs().max() <= 1e-4
    assert (make(pipeline, pair) - expected).abs().max() <= 1e-4, "a second call, too"


def test_what_is_excluded_from_group_offloading_is_excluded_beside_the_autoencoder(pipeline, monkeypatch):
    told = []
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "enable_group_offload", lambda self, exclude_modules: told.append(exclude_modules)
    )
    for excluded in (None, "i2e", ["unet", "i2e"]):
        pipeline.enable_group_offload(exclude_modules=excluded)
    assert told == [["vqvae"], ["i2e", "vqvae"], ["i2e", "unet", "vqvae"]]


def test_layerwise_casting_stays_close(pipeline, pair):
    expected = make(pipeline, pair)
    for name in NETWORKS:
        getattr(pipeline, name).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    frames = make(pipeline, pair)
    assert frames.isfinite().all() and 0 < (frames - expected).abs().mean() < 0.02


def test_gradient_checkpointing_is_switched(pipeline):
    for name in NETWORKS:
        model = getattr(pipeline, name)
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing


def test_every_documented_callback_tensor_can_be_asked_for(pipeline, pair):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tensor.shape[0] for name, tensor in tensors.items()}))
        return tensors

    names = pipeline._callback_tensor_inputs
    expected = make(pipeline, pair, num_inference_steps=3)
    frames = make(
        pipeline, pair, num_inference_steps=3, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names
    )
    assert torch.equal(frames, expected), "what is handed back unchanged changes nothing"
    assert [step for step, *_ in seen] == [0, 1, 2] and all(sizes == dict.fromkeys(names, 2) for *_, sizes in seen)


def test_a_callback_may_return_nothing(pipeline, pair):
    expected = make(pipeline, pair, num_inference_steps=2)
    assert torch.equal(
        make(pipeline, pair, num_inference_steps=2, callback_on_step_end=lambda *arguments: None), expected
    )
    with pytest.raises(
        TypeError, match="`callback_on_step_end` must return a dict of tensors, or None, but gave a int"
    ):
        make(pipeline, pair, callback_on_step_end=lambda *arguments: 3)


def test_numpy_s_integers_are_integers(pipeline, pair):
    expected = make(pipeline, pair, num_inference_steps=3, hint_interval=2, num_frames=2)
    counts = {"num_inference_steps": np.int64(3), "hint_interval": np.int32(2), "num_frames": np.uint8(2)}
    assert torch.equal(make(pipeline, pair, **counts), expected)
    for name in counts:
        with pytest.raises(ValueError, match=f"`{name}` must be a positive integer, but is True"):
            make(pipeline, pair, **{name: True})


def test_final_latents(pipeline, pair):
    """What the result is decoded from."""
    arguments = {
        "num_inference_steps": 2,
        "hint_policy": "start",
        "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)],
    }
    latents = pipeline(*pair, num_frames=3, output_type="latent", **arguments).frames
    factor, multiple = pipeline.vqvae.downsample_factor, pipeline.frame_processor.multiple
    sides = [(side + -side % multiple) // factor for side in pair[0].shape[-2:]]
    assert latents.shape == (2, 3, pipeline.vqvae.config.latent_channels, *sides)
    kept = []
    hook = pipeline.vqvae.post_quant_conv.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    make(pipeline, pair, num_frames=3, num_inference_steps=2, hint_policy="start", force_not_quantize=True)
    hook.remove()
    recursive = {**arguments, "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)], "recursive": True}
    assert pipeline(*pair, num_frames=3, output_type="latent", **recursive).frames.shape == latents.shape
    assert torch.equal(torch.stack(kept, dim=1) * pipeline.vqvae.config.scaling_factor, latents)


def test_schedulers_that_do_not_fit_are_named(pipeline, pair):
    """Whatever Diffusers has is taken, or refused by name: at once, where it cannot have a schedule of noise."""
    kinds = [
        getattr(diffusers, name)
        for name in dir(diffusers)
        if name.endswith("Scheduler") and name.startswith(("Flow", "EDM"))
    ]
    assert diffusers.FlowMatchEulerDiscreteScheduler in kinds
    for kind in kinds:
        pipeline.scheduler = kind()
        with pytest.raises(
            ValueError, match=f"`scheduler` must be one of Diffusers' with a noise schedule .* but is {kind.__name__}"
        ):
            make(pipeline, pair)
        with pytest.raises(ValueError, match=kind.__name__):
            MADiffPipeline(**pipeline.components, hint_source=pipeline.config.hint_source)


@pytest.mark.parametrize("settings", [{"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}])
def test_a_scheduler_of_flow_matching_by_its_settings_is_refused(pipeline, settings):
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **settings)
    with pytest.raises(ValueError, match="`scheduler` must not be of flow matching"):
        MADiffPipeline(**{**pipeline.components, "scheduler": scheduler}, hint_source=pipeline.config.hint_source)


@pytest.mark.parametrize(
    "name, value",
    [("default_num_inference_steps", 0), ("default_hint_interval", 1.5), ("default_hint_policy", "magic")],
)
def test_wrong_defaults_are_named(name, value, pipeline):
    with pytest.raises(ValueError, match=f"`{name}` must be .* but is {value!r}"):
        MADiffPipeline(**pipeline.components, **{"hint_source": pipeline.config.hint_source, name: value})


def test_no_file_is_left_where_saving_failed(pipeline, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError):
        pipeline.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious" and list(Path(tmp_path).iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("part", [MADiffPipeline, VQMAGANModel, EventGANModel])
def test_a_folder_that_is_not_there_is_an_oserror(part, tmp_path):
    with pytest.raises(OSError, match="is neither a folder that is there nor the name of a repository"):
        part.from_pretrained(str(tmp_path / "no" / "such"))


@pytest.mark.parametrize("name", ["guess_scale", "event_scale"])
def test_scales_are_whole_numbers(pipeline, name):
    with pytest.raises(ValueError, match=f"`{name}` must be 1, 2, 4 or 8, but is 2.0"):
        MADiffPipeline.from_pipe(pipeline, **{name: 2.0})


def test_only_a_checkpoint_of_events_is_told_that_they_are_zeros(checkpoint, diffusers_log):
    MADiffPipeline.from_pretrained("madiff-fast", i2e=None)
    assert "event hints are zeros" not in diffusers_log.text
    MADiffPipeline.from_pretrained(checkpoint, i2e=None)
    assert "event hints are zeros" in diffusers_log.text
