"""`torch.compile` takes the networks whole, and once for all frame sizes."""

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.decoder_inputs import FrameFeatures
from madiff_diffusers.onnx_export import build_graphs, example_tensors, frame_multiple
from madiff_diffusers.warping import correlate
from tests.conftest import build_pipeline, load_config, load_tiny_news
from tests.test_onnx_export import build


CONFIGS = {"latents of frames": lambda: load_config("tiny"), "latents of news": load_tiny_news}


def mark_sizes(value) -> None:
    """Heights and widths are dynamic."""
    if isinstance(value, torch.Tensor) and value.ndim == 4:
        torch._dynamo.mark_dynamic(value, (2, 3))
    elif isinstance(value, (list, tuple)):
        for each in value:
            mark_sizes(each)


def tensors_in(value) -> list:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value if each is not None for tensor in tensors_in(each)]


@pytest.fixture(params=CONFIGS)
def graphs(request) -> dict:
    vqvae, unet, _, hint_model = build(CONFIGS[request.param]())
    found = build_graphs(vqvae, unet, hint_model)
    for graph in found.values():
        graph.to(memory_format=torch.channels_last)  # as in the pipeline
    return {"graphs": found, "multiple": frame_multiple(vqvae, unet, hint_model)}


def calls(graphs: dict, name: str):
    """A method of the networks, and what gives its arguments of all tensors."""
    vqvae, unet = graphs["decode"].vqvae, graphs["denoise"].unet
    channels_in = unet.config.in_channels

    def neighbours(tensors: dict) -> list:
        features = graphs["decode"].features
        return [
            FrameFeatures(tensors[f"frame_{which}"], tuple(tensors[pair[side]] for pair in features))
            for side, which in enumerate(("prev", "next"))
        ]

    def hints(tensors: dict) -> list:
        return [tensors["hints_prev"], tensors["hints_next"]]

    def unet_input(tensors: dict) -> torch.Tensor:
        return tensors["latents"].repeat(1, channels_in, 1, 1)[:, :channels_in]

    labels = {"class_labels": torch.full((2,), 500.0)} if unet.config.class_embed_type == "timestep" else {}
    found = {
        "encode": (vqvae.encode, lambda t: ([t["frames"]], {"return_dict": False})),
        "decode": (
            vqvae.decode,
            lambda t: ([t["latents"], *neighbours(t), *hints(t)], {"return_dict": False, "time": t["time"]}),
        ),
        "unet": (unet, lambda t: ([unet_input(t), torch.tensor(999)], {"return_dict": False, **labels})),
        "condition": (vqvae.condition, lambda t: ([*(each.pyramid[-1] for each in neighbours(t)), *hints(t)], {})),
    }
    if "hints" in graphs:
        model = graphs["hints"].hint_model
        found["hints"] = (model, lambda t: ([t["frame_prev"], t["frame_next"], t["time"]], {}))
        found["refine"] = (model.refine, lambda t: ([t["frame_prev"], t["frame_mid"], t["frame_next"], hints(t)], {}))
    return found[name]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "encode",
        "condition",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("decode", "unet", "hints", "refine")),
    ],
)
def test_one_graph_for_all_sizes(name, backend, graphs):
    multiple, graphs = graphs["multiple"], graphs["graphs"]
    if name in ("condition", "hints", "refine") and "hints" not in graphs:
        pytest.skip("of latents of news alone")
    function, arguments = calls(graphs, name)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for number, (rows, columns) in enumerate([(3, 4), (5, 2), (2, 7)]):
        tensors = example_tensors(graphs, (rows * multiple, columns * multiple), batch=2)
        given, named = arguments(
            {
                key: each.contiguous(memory_format=torch.channels_last) if each.ndim == 4 else each
                for key, each in tensors.items()
            }
        )
        mark_sizes(given)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = compiled(*given, **named)
        for mine, theirs in zip(tensors_in(found), tensors_in(function(*given, **named)), strict=True):
            # The other backend takes operations apart, whose parts round differently.
            assert torch.allclose(mine, theirs, atol=1e-5 if backend == "eager" else 1e-3), (mine - theirs).abs().max()
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    )


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_correlation_is_one_thing_with_and_without_gradients(reach):
    first, second = (torch.randn(2, 5, 6, 9) for _ in range(2))
    windows = F.unfold(second, 2 * reach + 1, padding=reach).view(2, 5, -1, 6, 9)
    expected = (first.unsqueeze(2) * windows).mean(dim=1)
    assert torch.allclose(correlate(first, second, reach), expected, atol=1e-6)
    assert torch.allclose(correlate(first, second.requires_grad_(), reach), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "eager"},
        {"backend": "eager", "mode": "reduce-overhead"},
        pytest.param({"mode": "reduce-overhead"}, marks=pytest.mark.slow),
    ],
    ids=["eager", "eager, copied", "reduce-overhead"],
)
@pytest.mark.parametrize("news", [False, True])
def test_a_compiled_pipeline_makes_the_same_frames(news, options, pair):
    if news:
        vqvae, unet, scheduler, _ = build(load_tiny_news())
        pipeline = MADiffPipeline(vqvae.eval(), unet.eval(), scheduler, hint_source="search", guess_motion=True)
        pipeline.set_progress_bar_config(disable=True)
    else:
        pipeline = build_pipeline(load_config("tiny"))

    def made() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        first, second = (pipeline.encode_frames(each) for each in pair)
        return torch.cat(
            [
                pipeline(*each, generator=generator, output_type="pt").frames
                for each in ((first, second), (second, first))
            ]
        )

    expected = made()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):  # what is compiled takes the place of what was compiled before
        pipeline.compile(fullgraph=True, **options)
    found = made()
    assert torch.allclose(found, expected, atol=1e-3), (found - expected).abs().max()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= (4 if news else 3), "a graph for each method that is called, and not for `forward` alone"


def test_a_compiled_pipeline_takes_many_sizes_and_pairs():
    """Each method is compiled anew so many times on its own."""
    vqvae, unet, scheduler, _ = build(load_tiny_news())
    pipeline = MADiffPipeline(vqvae.eval(), unet.eval(), scheduler, hint_source="search", guess_motion=True)
    pipeline.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    pipeline.compile(backend="eager", fullgraph=True)  # which raises where there would be one too many
    for count, height, width in ((1, 32, 48), (1, 48, 32), (2, 32, 48)):
        frames = torch.rand(2, count, 3, height, width)
        made = pipeline(*frames, num_inference_steps=1, output_type="pt").frames
        assert made.shape == (count, 1, 3, height, width)


def test_an_offloaded_pipeline_is_compiled(pair):
    pipeline = build_pipeline(load_config("tiny"))
    pipeline.enable_model_cpu_offload(device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        *pair, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).frames
    torch._dynamo.reset()
    pipeline.compile(backend="eager")
    torch._dynamo.utils.counters.clear()
    found = pipeline(*pair, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    assert torch.allclose(found, expected, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, "of each network that is called"


def test_the_copy_of_a_compiled_pipeline_has_weights_of_its_own(pair):
    pipeline = build_pipeline(load_config("tiny"))
    pipeline.set_progress_bar_config(disable=True)

    def made(by: MADiffPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return by(*pair, num_inference_steps=1, generator=generator, output_type="pt").frames

    torch._dynamo.reset()
    pipeline.compile(backend="eager")
    before, copied = made(pipeline), copy.deepcopy(pipeline)
    assert torch.allclose(made(copied), before, atol=1e-3)
    for parameter in copied.vqvae.decoder.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    assert (made(copied) - before).abs().max() > 0.01
    assert torch.equal(made(pipeline), before)


def test_what_the_next_replay_writes_over_is_copied(pair):
    """Each call gives the memory of the one before, as CUDA graphs' do."""
    memory: dict[int, list[torch.Tensor]] = {}

    def replaying(graph, inputs, **options):
        def call(*arguments):
            made = graph(*arguments)
            kept = memory.setdefault(id(graph), [each.clone() for each in made])
            for old, new in zip(kept, made):
                old.copy_(new)
            return tuple(kept)

        return call

    pipeline = build_pipeline(load_config("tiny"))
    torch._dynamo.reset()
    pipeline.compile(backend=replaying, mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        frames = [torch.nn.functional.pad(each, (0, 13, 0, 13)) for each in pair]
        first = pipeline.vqvae.encode(frames[0]).latents
        before = first.clone()
        second = pipeline.vqvae.encode(frames[1]).latents
    assert memory and torch.equal(first, before) and not torch.equal(first, second)
