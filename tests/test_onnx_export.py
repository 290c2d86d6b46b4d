"""The networks as ONNX graphs give what they give in torch, at any size."""

import importlib.util
import json
import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from madiff_diffusers import VQMAGANModel, onnx_export
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.motion_flow import MotionHintModel, RIFEFlowModel
from madiff_diffusers.onnx_export import build_graphs, example_tensors, export_onnx, frame_multiple
from madiff_diffusers.warping import warp
from tests.conftest import REPOSITORY, build_pipeline, excite, load_config, load_tiny_news, moving_picture


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def build(config: dict) -> tuple:
    """VQ-MAGAN, U-Net, scheduler and hint model of a configuration, moved from where they start."""
    torch.manual_seed(0)
    scheduler = dict(config["scheduler"])
    return (
        excite(VQMAGANModel(**config["vqvae"])).eval(),
        excite(UNet2DModel(**config["unet"])).eval(),
        getattr(diffusers, scheduler.pop("class"))(**scheduler),
        excite(MotionHintModel(**config["hint_model"])).eval() if "hint_model" in config else None,
    )


def run(path, tensors: dict) -> list:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {each.name: tensors[each.name].contiguous().numpy() for each in session.get_inputs()})


def check(folder, parts: tuple) -> None:
    """Graphs in a folder against torch, at two sizes and batches, neither of them what was exported with."""
    vqvae, unet, _, hint_model = parts
    graphs, multiple = build_graphs(vqvae, unet, hint_model), frame_multiple(vqvae, unet, hint_model)
    assert {path.name for path in folder.iterdir()} == {f"{name}.onnx" for name in graphs} | {"madiff.json"}
    for size, batch in (((multiple, 2 * multiple), 1), ((5 * multiple, 3 * multiple), 3)):
        tensors = example_tensors(graphs, size, batch)
        for name, graph in graphs.items():
            with torch.no_grad():
                expected = graph(tensors)
            assert b'File "' not in (folder / f"{name}.onnx").read_bytes(), "no lines of code, nor where they are"
            given = run(folder / f"{name}.onnx", tensors)
            assert len(given) == len(expected) == len(graph.outputs)
            for mine, theirs in zip(given, expected):
                assert mine.shape == tuple(theirs.shape)
                assert np.allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-4), name


def test_warps_are_exported_without_writing_into_parts():
    """What is written into a part of a tensor becomes a choice between two whole ones, pixel by pixel, in every run."""

    class Warp(torch.nn.Module):
        def forward(self, image: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return warp(image, offsets)

    program = torch.export.export(Warp(), (torch.rand(2, 3, 8, 12), torch.rand(2, 2, 8, 12))).run_decompositions()
    operations = [str(node.target) for node in program.graph.nodes]
    assert any("grid_sampler" in each for each in operations)
    assert not any(name in each for each in operations for name in ("where", "scatter", "index_put")), operations


def example(*arguments) -> np.ndarray:
    """What the page's function gives."""
    names: dict = {}
    exec(
        re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "onnx.md").read_text(), flags=re.DOTALL).group(1),
        names,
    )
    return names["interpolate"](*arguments)


@pytest.fixture(scope="module")
def news(tmp_path_factory) -> tuple:
    """Networks with latents of news, and the folder of their graphs."""
    folder, parts = tmp_path_factory.mktemp("news"), build(load_tiny_news())
    export_onnx(folder, *parts)
    return folder, parts


@pytest.mark.slow
def test_latents_of_news(news):
    folder, parts = news
    check(folder, parts)
    about = json.loads((folder / "madiff.json").read_text())
    assert list(about["graphs"]) == ["encode", "hints", "motion", "denoise", "decode", "refine"]
    assert about["graphs"]["motion"]["outputs"] == ["motion_prev", "motion_next"] and about["motion_stride"] == 4
    sizes = [about[name] for name in ("frame_multiple", "downsample_factor", "latent_channels", "hint_channels")]
    assert sizes == [16, 4, 4, 2]
    assert about["graphs"]["denoise"]["inputs"][:3] == ["latents", "timestep", "time"]


@pytest.mark.slow
@torch.no_grad()
def test_the_page_s_example_makes_a_step_with_learned_hints(news):
    folder, (vqvae, unet, _, hint_model) = news
    prev, next_ = (moving_picture(time, 32, 48) for time in (-1, 1))  # multiples of 16: nothing is padded
    noise = torch.randn(1, 4, 8, 12)
    frame = example(folder, prev, next_, 0.25, None, noise.numpy())

    first, second = (torch.from_numpy(each).permute(2, 0, 1)[None] / 127.5 - 1 for each in (prev, next_))
    features, time = [vqvae.encode(each).features for each in (first, second)], torch.tensor([0.25])
    hints = hint_model(first, second, time)
    seen = torch.cat([noise, vqvae.condition(*(each.pyramid[-1] for each in features), *hints)], dim=1)
    latents = unet(seen, 999, class_labels=1000 * time).sample
    expected = (
        ((vqvae.decode(latents, *features, *hints, time=time).sample.clamp(-1, 1) + 1) * 127.5)
        .round()[0]
        .permute(1, 2, 0)
    )
    assert frame.shape == (32, 48, 3) and np.abs(frame - expected.numpy()).max() <= 1


@pytest.mark.slow
def test_the_command_and_the_page_s_example_make_what_the_pipeline_makes(tmp_path, capfd):
    config = load_config("tiny")
    config["vqvae"].update(
        block_out_channels=[8],
        hint_channels=2,
        norm_num_groups=None,
        mid_block_add_attention=False,
        still_threshold=0.03,
    )
    config["unet"].update(in_channels=13, down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)
    config["hint_source"] = "flow"
    pipeline = build_pipeline(config)
    pipeline.vqvae.register_to_config(scaling_factor=2.0)
    pipeline.save_pretrained(tmp_path / "checkpoint")
    assert main(["export", "--onnx", str(tmp_path / "graphs"), "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{tmp_path / 'graphs'}\n" and not captured.err
    check(tmp_path / "graphs", (pipeline.vqvae, pipeline.unet, pipeline.scheduler, None))

    prev, next_ = (moving_picture(time, 27, 41) for time in (-1, 1))
    noise = torch.randn(1, 3, 8, 12)
    encoded = [pipeline.encode_frames(each) for each in (prev, next_)]
    hints = tuple(each.numpy() for each in pipeline.hints.start(*(each.frames for each in encoded)))
    frame = example(tmp_path / "graphs", prev, next_, 0.5, hints, noise.numpy())
    expected = pipeline(*encoded, num_inference_steps=1, hint_policy="start", latents=noise).frames[0][0]
    assert frame.shape == (27, 41, 3) and np.abs(frame - np.float32(expected)).max() <= 1


def test_what_cannot_be_exported_is_named(tmp_path):
    vqvae, unet, scheduler, hint_model = build(load_tiny_news())
    with pytest.raises(
        ValueError, match="`hint_model` must be a MotionHintModel or None to become a graph, but is a RIFEFlowModel"
    ):
        export_onnx(tmp_path, vqvae, unet, scheduler, RIFEFlowModel(channels=(8, 8, 8, 8)))
    with pytest.raises(ValueError, match="`hint_model` must make all hints to become a graph, but `vqvae` takes 20"):
        tiny = build_pipeline(load_config("tiny"))
        export_onnx(tmp_path, tiny.vqvae, tiny.unet, tiny.scheduler, hint_model)
    with pytest.raises(ValueError, match="`unet` must be in float32 on the CPU, but is in torch.bfloat16 on cpu"):
        export_onnx(tmp_path, vqvae, unet.bfloat16(), scheduler, hint_model)
    assert not list(tmp_path.iterdir())


def test_missing_packages_and_bad_options_are_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "graphs")
    for arguments, message in (
        ([], "DIR or --onnx must be given"),
        (["--onnx", out, "--license", "mit"], "--license is for DIR, which is not given"),
        (["--onnx", str(checkpoint)], "--onnx must not exist yet"),
        ([out, "--onnx", out], f"DIR and --onnx: {out} would be written twice"),
        ([out, "--onnx", f"{out}/onnx"], f"DIR and --onnx: {out}/onnx would be written into {out}"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    found = importlib.util.find_spec
    monkeypatch.setattr(
        onnx_export.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxscript" else found(name, *rest),
    )
    assert main(["export", "--onnx", out, "--checkpoint", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert error == "madiff: error: Exporting to ONNX needs onnxscript: pip install 'madiff_diffusers[onnx]'\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"], "nothing half-written is left"


@pytest.mark.slow
def test_the_benchmark_compares_runtimes(tmp_path, capsys):
    pytest.importorskip("openvino")
    import yaml

    from benchmarks.runtimes import RUNTIMES
    from benchmarks.runtimes import main as benchmark

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(load_tiny_news()))
    benchmark(["--size", "30x20", "--config", str(config), "--rounds", "1", "--json", str(tmp_path / "out.json")])
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert result["size"] == "32x32" and list(result["seconds"]) == [
        "encode",
        "hints",
        "motion",
        "denoise",
        "decode",
        "refine",
    ]
    assert all(list(own) == list(RUNTIMES) and min(own.values()) > 0 for own in result["seconds"].values())
    assert max(result["differences"].values()) < 1e-3
    assert (
        all(f"| {name} |" in printed for name in [*result["seconds"], "together"])
        and "The fastest together is" in printed
    )


def test_the_benchmark_says_what_it_lacks(capsys, monkeypatch):
    from benchmarks.runtimes import main as benchmark

    found = importlib.util.find_spec
    monkeypatch.setattr(
        sys.modules["importlib.util"],
        "find_spec",
        lambda name, *rest: None if name == "openvino" else found(name, *rest),
    )
    with pytest.raises(SystemExit, match="2"):
        benchmark([])
    assert "needs packages that are not installed: pip install" in capsys.readouterr().err
