"""Motion models that are not this package's: built, trained, saved with their code, loaded elsewhere, refused where they do not fit."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.utils import HF_MODULES_CACHE
from PIL import Image

from madiff_diffusers import (
    EventGANModel,
    EventHints,
    FlowHints,
    MADiffPipeline,
    StackedHints,
    VQMAGANModel,
    build_hint_source,
    register_hint_source,
)
from madiff_diffusers.hint_registry import _SOURCES, TRAVELLING, load_hint_code, saved_name
from madiff_diffusers.motion_hints import NullHints
from tests.conftest import REPOSITORY, build_pipeline, excite, load_config, moving_picture
from tests.local_hub import local_hub
from tests.processes import run_python


TOY = '''
import torch


class ToyHints:
    """The difference to the neighbour's brightness, `scale` times."""

    hint_channels = 2

    def __init__(self, scale=1.0):
        self.config = {"scale": scale}

    def _hints(self, a, b):
        return (self.config["scale"] * (b - a)[:, :2]).float()

    def start(self, frame_prev, frame_next, time=0.5):
        return time * self._hints(frame_next, frame_prev), (1 - time) * self._hints(frame_prev, frame_next)

    def from_guess(self, frame_prev, frame_mid, frame_next):
        return self._hints(frame_mid, frame_prev), self._hints(frame_mid, frame_next)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch) -> str:
    """The name of a source in a module that can be imported, here and in processes started from here."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "toy_hints.py").write_text(TOY)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", dict(_SOURCES))
    yield "toy_hints:ToyHints"
    sys.modules.pop("toy_hints", None)


def config_for(name: str, channels: int, **settings) -> dict:
    config = load_config("tiny")
    config.update(hint_source=name, pipeline={**config["pipeline"], **settings})
    config["vqvae"].update(hint_channels=channels)
    config["unet"].update(in_channels=9 + 2 * channels)
    return config


MAKE = """
import sys, torch
from {module} import {kind}
pipe = {kind}.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
frames = torch.load(sys.argv[2])
made = pipe(*frames, generator=torch.Generator().manual_seed(0), output_type="pt").frames
torch.save({{"frames": made, "source": pipe.config.hint_source, "settings": pipe.config.hint_settings}}, sys.argv[3])
if len(sys.argv) > 4:
    pipe.save_pretrained(sys.argv[4])
"""


def made_elsewhere(folder: Path, pair: tuple, tmp_path: Path, kind: str = "MADiffPipeline", again: str = "") -> dict:
    """What a process gives that has the checkpoint and nothing else of the source."""
    module = "madiff_diffusers" if kind == "MADiffPipeline" else "diffusers"
    torch.save([frame[:1] for frame in pair], tmp_path / "pair.pt")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # Code of checkpoints that were loaded before.
    shutil.rmtree(HF_MODULES_CACHE, ignore_errors=True)
    command = [
        sys.executable,
        "-c",
        MAKE.format(module=module, kind=kind),
        str(folder),
        str(tmp_path / "pair.pt"),
        str(tmp_path / "made.pt"),
    ]
    done = run_python([*command, *([again] if again else [])], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "made.pt")


def alike(made: torch.Tensor, expected: torch.Tensor) -> bool:
    """Another process, and weights that lie elsewhere in memory, may round otherwise."""
    return torch.allclose(made, expected, atol=1e-5)


def made_here(pipeline: MADiffPipeline, pair: tuple) -> torch.Tensor:
    return pipeline(
        *(frame[:1] for frame in pair), generator=torch.Generator().manual_seed(0), output_type="pt"
    ).frames


def test_a_source_travels_with_its_checkpoint(toy, pair, tmp_path):
    pipeline = build_pipeline(config_for(f"events+{toy}", 20, hint_settings={toy: {"scale": 3.0}}))
    assert isinstance(pipeline.hints, StackedHints) and pipeline.hints.sources[1].config == {"scale": 3.0}
    assert pipeline.hints is pipeline.hints, "built once"
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "toy_hints.py").read_text() == TOY
    expected = made_here(pipeline, pair)
    for kind in ("MADiffPipeline", "DiffusionPipeline"):
        made = made_elsewhere(tmp_path / "saved", pair, tmp_path, kind, again=str(tmp_path / kind))
        assert alike(made["frames"], expected)
        assert (made["source"], made["settings"]) == (f"events+{toy}", {toy: {"scale": 3.0}})
        again = made_elsewhere(tmp_path / kind, pair, tmp_path, "DiffusionPipeline")
        assert alike(again["frames"], expected), "what is loaded can be saved"
    plain = MADiffPipeline.from_pretrained(tmp_path / "saved")  # the class is known in this process
    plain.hints = StackedHints([EventHints(plain.i2e), FlowHints()])
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "model_index.json").read_text())["hint_source"] == "events+flow"
    assert not (tmp_path / "plain" / "toy_hints.py").exists()


def test_an_assigned_source_survives_and_goes_on_to_other_pipelines(toy, pair, tmp_path):
    from toy_hints import ToyHints

    pipeline = build_pipeline(config_for("flow", 2))
    flow = made_here(pipeline, pair)
    pipeline.hints = ToyHints(scale=2.0)
    expected = made_here(pipeline, pair)
    assert not torch.equal(expected, flow)
    assert torch.equal(made_here(MADiffPipeline.from_pipe(pipeline), pair), expected)
    assert torch.equal(made_here(MADiffPipeline.from_pipe(pipeline, hint_source="flow"), pair), flow), "as is asked"
    pipeline.save_pretrained(tmp_path / "saved")
    made = made_elsewhere(tmp_path / "saved", pair, tmp_path)
    assert f"Motion hints come from {toy}." in (tmp_path / "saved" / "README.md").read_text()
    assert alike(made["frames"], expected) and made["source"] == toy and made["settings"] == {toy: {"scale": 2.0}}
    pipeline.hints = None
    assert torch.equal(made_here(pipeline, pair), flow)


def test_what_does_not_fit_is_refused_where_it_is_set(pipeline, toy, tmp_path):
    from toy_hints import ToyHints

    with pytest.raises(ValueError, match="`hints` must have 20 `hint_channels`, as many as `vqvae` takes, but has 2"):
        pipeline.hints = ToyHints()
    with pytest.raises(ValueError, match="`hints` must be a hint source, but str lacks start, from_guess"):
        pipeline.hints = "flow"

    class Local(ToyHints):
        pass

    pipeline.hints = StackedHints([EventHints(pipeline.i2e), Local()])
    with pytest.raises(ValueError, match="cannot hold the hint source .*Local: the class is not at the top level"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    ToyHints.__init__ = lambda self, network: None
    pipeline.hints = StackedHints([EventHints(pipeline.i2e), ToyHints(3)])
    with pytest.raises(
        ValueError,
        match="cannot hold the hint source ToyHints with the `config` {}: missing a required argument: 'network'",
    ):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.hints = StackedHints([EventHints(EventGANModel.from_config(pipeline.i2e.config)), FlowHints()])
    with pytest.raises(ValueError, match="cannot hold EventHints of another `i2e` than the pipeline's"):
        pipeline.save_pretrained(tmp_path / "saved")


def test_classes_whose_files_cannot_travel_are_named(toy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "near").mkdir()
    for name, code in (("__init__", ""), ("helper", "SCALE = 2\n"), ("hints", TOY + "\nfrom .helper import SCALE\n")):
        (tmp_path / "near" / f"{name}.py").write_text(code)
    (tmp_path / "near" / "warping.py").write_text(TOY)
    for module, message in (
        ("near.hints", "is in hints.py, which imports from beside itself"),
        ("near.warping", "is in warping.py, as a file of this package is called"),
    ):
        with pytest.raises(ValueError, match=message):
            saved_name(importlib.import_module(module).ToyHints)


def test_code_that_fails_is_told_each_time_and_none_is_taken_from_outside(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "failing.py").write_text("class Hints: pass\nraise OSError('no licence')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="'failing:Hints' cannot be loaded: OSError: no licence"):
            load_hint_code(folder, "failing:Hints")
    (tmp_path / "outside.py").write_text(f"{TOY}\nraise AssertionError('this ran')\n")
    with pytest.raises(ValueError, match="has no file ../outside.py"):
        load_hint_code(folder, "../outside:ToyHints")


def test_names_and_settings_that_do_not_fit_are_refused(toy):
    for name, message in (
        ("toy", "a registered name or MODULE:CLASS, but is 'toy'|must be one of .*but is 'toy'"),
        ("no_such_module:Hints", "'no_such_module:Hints' cannot be loaded: ModuleNotFoundError"),
        ("toy_hints:Missing", "cannot be loaded: AttributeError"),
        ("subprocess:Popen", "cannot be loaded: TypeError: it must be a class with the methods start"),
        (f"{toy}+{toy}", "must be one of"),
        ("flow+events", "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            build_hint_source(name)
    with pytest.raises(ValueError, match="`hint_settings` must be for parts of `hint_source` 'flow', but has toy"):
        build_hint_source("flow", settings={"toy": {}})
    with pytest.raises(ValueError, match="`hint_settings` must be for parts of `hint_source` 'model', but has model"):
        build_hint_source("model", settings={"model": {}})
    with pytest.raises(ValueError, match="cannot be built: TypeError.*speed"):
        build_hint_source(toy, settings={toy: {"speed": 3}})
    with pytest.raises(ValueError, match="`name` must be letters"):
        register_hint_source("flow", FlowHints)
    from toy_hints import ToyHints

    register_hint_source("toy", ToyHints)
    assert isinstance(build_hint_source("toy+flow"), StackedHints)


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(toy, tmp_path, monkeypatch):
    build_pipeline(config_for(toy, 2)).save_pretrained(tmp_path / "saved")
    for name in [name for name in _SOURCES if ":" in name]:
        del _SOURCES[name]
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", {"flow": FlowHints})
    with pytest.raises(
        ValueError, match="'toy_hints:ToyHints', code that is not this package's. `trust_remote_code=True` runs"
    ):
        MADiffPipeline.from_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    path = tmp_path / "saved" / "model_index.json"
    path.write_text(json.dumps({**index, "hint_source": "subprocess:Popen"}))
    with pytest.raises(ValueError, match="'subprocess:Popen', but .* has no file subprocess.py"):
        MADiffPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    path.write_text(json.dumps(index))
    with local_hub() as hub:
        files = [each for each in (tmp_path / "saved").rglob("*") if each.is_file()]
        hub.repositories["some/toy"] = {
            "main": {str(each.relative_to(tmp_path / "saved")): each.read_bytes() for each in files}
        }
        with pytest.raises(ValueError, match="is not this package's"):
            MADiffPipeline.from_pretrained("some/toy", cache_dir=tmp_path / "cache")
        loaded = MADiffPipeline.from_pretrained("some/toy", cache_dir=tmp_path / "cache", trust_remote_code=True)
        assert type(loaded.hints).__name__ == "ToyHints"
    (tmp_path / "saved" / "toy_hints.py").write_text(TOY.replace("* (b - a)", "* (a - b)"))
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", {"flow": FlowHints})
    assert (
        type(MADiffPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True).hints).__module__
        != type(loaded.hints).__module__
    )
    (tmp_path / "saved" / "toy_hints.py").unlink()
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", {"flow": FlowHints})
    with pytest.raises(ValueError, match="has no file toy_hints.py"):
        MADiffPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)


def test_a_checkpoint_with_code_of_its_own_stays_as_it_is_and_keeps_its_card(toy, tmp_path, monkeypatch):
    build_pipeline(config_for(toy, 2)).save_pretrained(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    card.write_text(card.read_text() + "\nOf my own.\n")
    files = sorted(tmp_path.glob("saved/**/*"))
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", {"flow": FlowHints})
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    loaded = MADiffPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card.read_text()
    assert sorted(tmp_path.glob("saved/**/*")) == files, "no bytecode beside the weights"


def test_the_next_checkpoints_own_code_is_not_taken_for_the_last_ones(toy, tmp_path, monkeypatch):
    pipeline = build_pipeline(config_for(toy, 2))
    for name, code in (("first", TOY), ("second", TOY.replace("* (b - a)", "* (a - b)"))):
        pipeline.save_pretrained(tmp_path / name)
        (tmp_path / name / "toy_hints.py").write_text(code)
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", {"flow": FlowHints})
    monkeypatch.setattr("madiff_diffusers.hint_registry._OF_CHECKPOINTS", set())
    first = MADiffPipeline.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(MADiffPipeline.from_pretrained(tmp_path / "first", trust_remote_code=True).hints) is type(first.hints)
    with pytest.raises(ValueError, match="Another hint source 'toy_hints:ToyHints' is registered in this process"):
        MADiffPipeline.from_pretrained(tmp_path / "second", trust_remote_code=True)
    with pytest.raises(ValueError, match="'toy_hints:ToyHints', code that is not this package's"):
        MADiffPipeline.from_pretrained(tmp_path / "second")
    own = type("ToyHints", (type(first.hints),), {})
    register_hint_source(toy, own)
    assert type(MADiffPipeline.from_pretrained(tmp_path / "second").hints) is own, "what the user registered wins"


@pytest.mark.parametrize("scale", [1, 2])
def test_event_hints_keep_the_scale_that_they_were_assigned_with(checkpoint, tmp_path, scale):
    pipeline = MADiffPipeline.from_pretrained(checkpoint)
    assert pipeline.config.event_scale != 2 or scale == 1
    pipeline.hints = StackedHints([EventHints(pipeline.i2e, scale=scale), FlowHints()])
    pipeline.save_pretrained(tmp_path / "saved")
    assert MADiffPipeline.from_pretrained(tmp_path / "saved").hints.sources[0].scale == scale
    pipeline.hints = StackedHints([EventHints(pipeline.i2e, scale=3), FlowHints()])
    with pytest.raises(ValueError, match="cannot hold event hints whose `scale` is 3, but of 1, 2, 4, 8"):
        pipeline.save_pretrained(tmp_path / "other")


def test_event_hints_keep_what_they_start_from(pair, tmp_path):
    settings = {"events": {"between": True}}
    pipeline = build_pipeline(config_for("events+flow", 20, hint_settings=settings))
    excite(pipeline.i2e)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.hints.sources[0].between

    def made(pipe: MADiffPipeline) -> torch.Tensor:
        return pipe(*pair, hint_policy="start", generator=torch.Generator().manual_seed(0), output_type="pt").frames

    frames = made(pipeline)
    pipeline.save_pretrained(tmp_path / "built")
    loaded = MADiffPipeline.from_pretrained(tmp_path / "built")
    assert loaded.config.hint_settings == settings and loaded.hints.sources[0].between
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(made(loaded), frames)
    loaded.hints = StackedHints([EventHints(loaded.i2e), FlowHints()])
    assert not torch.equal(made(loaded), frames)
    loaded.save_pretrained(tmp_path / "plain")
    assert not MADiffPipeline.from_pretrained(tmp_path / "plain").hints.sources[0].between
    pipeline.hints = StackedHints([EventHints(pipeline.i2e, between=True), FlowHints()])
    pipeline.save_pretrained(tmp_path / "assigned")
    assert MADiffPipeline.from_pretrained(tmp_path / "assigned").hints.sources[0].between
    MADiffPipeline.from_pretrained(tmp_path / "built", i2e=None).save_pretrained(tmp_path / "without")
    assert MADiffPipeline.from_pretrained(tmp_path / "without", i2e=pipeline.i2e).hints.sources[0].between


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"between": "yes"}, "`between` must be true or false, but is 'yes'"),
        ({"bins": 3}, "unexpected keyword argument 'bins'"),
    ],
)
def test_settings_of_event_hints_that_they_do_not_have_are_named(settings, message):
    with pytest.raises(ValueError, match=f"`hint_source` 'events' cannot be built: .*{message}"):
        build_pipeline(config_for("events", 18, hint_settings={"events": settings}))


def test_without_i2e_event_hints_are_zeros(checkpoint, pair, tmp_path):
    pipeline = MADiffPipeline.from_pretrained(checkpoint, i2e=None)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.hints.sources[0], NullHints) and pipeline.hints.hint_channels == 20
    expected = made_here(pipeline, pair)
    pipeline.save_pretrained(tmp_path / "without")
    again = MADiffPipeline.from_pretrained(tmp_path / "without")
    assert again.i2e is None and torch.equal(made_here(again, pair), expected)


def test_files_that_travel_are_those_of_the_list(checkpoint):
    without_hint_model = set(TRAVELLING) - {"motion_flow"}
    assert {path.stem for path in checkpoint.rglob("*.py")} == without_hint_model


def test_trained_saved_loaded_and_used(toy, clips, pair, tmp_path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config_for("flow", 2, hint_settings={toy: {"scale": 2.0}})))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(tmp_path / "mine"),
    }
    shared = [
        "--config",
        str(tmp_path / "toy.yaml"),
        "--data",
        str(clips),
        "--max_train_steps",
        "5",
        "--report_to",
        "none",
        "--hint_source",
        toy,
    ]

    def train(stage: str, *flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", f"training.{stage}", *shared, *flags]
        return run_python(command, cwd=REPOSITORY, env=environment)

    for stage, flags in (
        ("train_vq_magan", ["--output_dir", str(tmp_path / "vqvae")]),
        ("train_denoiser", ["--output_dir", str(tmp_path / "unet"), "--vqvae", str(tmp_path / "vqvae" / "vqvae")]),
    ):
        done = train(stage, *flags)
        assert done.returncode == 0, done.stderr
    made = made_elsewhere(tmp_path / "unet" / "pipeline", pair, tmp_path)
    assert made["frames"].isfinite().all() and made["source"] == toy and made["settings"] == {toy: {"scale": 2.0}}
    for number, name in enumerate(("frame_00", "frame_01_gt", "frame_02")):
        (tmp_path / "bench" / "one").mkdir(parents=True, exist_ok=True)
        Image.fromarray(moving_picture(number)).save(tmp_path / "bench" / "one" / f"{name}.png")
    evaluate = [
        "evaluate",
        "--benchmark",
        "ucf101",
        "--root",
        str(tmp_path / "bench"),
        "--metrics",
        "psnr",
        "--gallery",
        "1",
        "-o",
        "out",
    ]
    evaluate = [
        sys.executable,
        "-m",
        "madiff_diffusers",
        *evaluate,
        "--checkpoint",
        str(tmp_path / "unet" / "pipeline"),
    ]
    done = run_python(evaluate, cwd=tmp_path)
    assert done.returncode == 2 and "code that is not this package's" in done.stderr, done.stderr
    done = run_python([*evaluate, "--trust-remote-code"], cwd=tmp_path)
    assert done.returncode == 0 and "| pipeline |" in done.stdout, done.stderr
    done = train("train_vq_magan", "--output_dir", str(tmp_path / "other"), "--hint_source", f"{toy}+flow")
    assert (
        done.returncode == 2
        and "gives 4 channels, but the configuration's vqvae takes `hint_channels` 2" in done.stderr
    ), done.stderr


def test_a_foreign_folder_does_not_load_as_drawn_weights(checkpoint):
    for kind, folder in (
        (EventGANModel, "unet"),
        (EventGANModel, "vqvae"),
        (VQMAGANModel, "i2e"),
        (VQMAGANModel, "unet"),
    ):
        # Diffusers' own message comes first where a layer of the same name has another shape.
        with pytest.raises(
            ValueError, match=f"does not hold the weights of this {kind.__name__}: it lacks|expected shape"
        ):
            kind.from_pretrained(checkpoint / folder)


def test_the_documented_example_runs(tmp_path, pair, monkeypatch):
    from torchvision.models.optical_flow import raft_small

    text = (REPOSITORY / "docs" / "hint-sources.md").read_text()
    code = re.search(r"```python\n(import torch.*?)```", text, flags=re.DOTALL)[1]
    (tmp_path / "raft_hints.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("madiff_diffusers.hint_registry._SOURCES", dict(_SOURCES))
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    name = settings["hint_source"]
    arguments = {
        "weights": str(tmp_path / "raft.pth"),
        **settings["pipeline"]["hint_settings"]["raft_hints:RAFTHints"],
    }
    pipeline = build_pipeline(config_for(name, 20, hint_settings={"raft_hints:RAFTHints": arguments}))
    assert made_here(pipeline, pair).isfinite().all()
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "raft_hints.py").is_file()
