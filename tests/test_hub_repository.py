"""A saved pipeline as others meet it: without this package, over the Hub's protocol, and when it means harm."""

import filecmp
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin  # noqa: F401, Diffusers looks for it beside a part's class
from diffusers.utils.dynamic_modules_utils import get_relative_import_files, get_relative_imports
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file

import madiff_diffusers
from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel
from madiff_diffusers.commands.madiff_cli import main
from madiff_diffusers.components import standalone_code
from madiff_diffusers.hub_repository import CHECKPOINT_FOLDER, upload_repository
from tests.conftest import REPOSITORY, build_pipeline, load_config, moving_picture
from tests.local_hub import ADDRESS, local_hub


PACKAGE = Path(madiff_diffusers.__file__).parent

# What the README says is needed to load a pipeline without this package.
NEEDED = ["torch", "diffusers", "accelerate", "safetensors", "einops", "opencv-python-headless"]

# Loads argv[1] with Diffusers alone and saves the middle of argv[2] as argv[3].
STRANGER = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline

name, frames, output, *options = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **dict(option.split("=") for option in options))
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
assert "madiff_diffusers" not in sys.modules
np.save(output, pipe(*np.load(frames), generator=torch.Generator().manual_seed(0), output_type="np").frames)
"""


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """What `madiff export --variant fp16` makes of a checkpoint that ships."""
    folder = tmp_path_factory.mktemp("export") / "madiff-compact"
    assert main(["export", str(folder), "--checkpoint", "madiff-compact", "--variant", "fp16"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "madiff-tiny"
    build_pipeline(load_config("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("frames") / "frames.npy"
    np.save(path, np.stack([moving_picture(time, 96, 128) for time in (-1, 1)]))
    return path


@pytest.fixture(scope="session")
def expected(frames) -> np.ndarray:
    """What the package makes of them."""
    pipe = MADiffPipeline.from_pretrained("madiff-compact")
    pipe.set_progress_bar_config(disable=True)
    return pipe(*np.load(frames), generator=torch.Generator().manual_seed(0), output_type="np").frames


def installed(names: list) -> set:
    """Distributions that these need, themselves included, as this environment has them."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name.lower() in found:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # what another platform needs
        found.add(name.lower())
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


def build_environment(folder: Path, names: list) -> Path:
    """A virtual environment with these distributions of this one, and those that they need, and no other. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in installed(names):
        for file in distribution(name).files:
            top, source = file.parts[0], Path(distribution(name).locate_file(file.parts[0]))
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(source)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> Path:
    return build_environment(tmp_path_factory.mktemp("venv"), NEEDED)


def run_stranger(python: Path, *arguments, cwd: Path) -> None:
    """Runs where neither the package nor the repository can be imported, with a cache of its own."""
    environment = {**os.environ, "HF_HOME": str(cwd / "cache")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", STRANGER, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- what is exported ----


def test_the_exported_code_is_the_package_s_own(exported):
    travelling = {
        PACKAGE / "pipeline_madiff.py",
        *map(Path, get_relative_import_files(PACKAGE / "pipeline_madiff.py")),
    }
    code = {exported / path.name: path for path in travelling}
    components = {exported / "vqvae" / "vq_magan.py", exported / "i2e" / "eventgan.py"}
    assert set(exported.rglob("*.py")) == set(code) | components
    assert all(filecmp.cmp(copy, original, shallow=False) for copy, original in code.items())
    for copy in components:
        assert copy.read_text() == standalone_code(PACKAGE / copy.name)
        assert not get_relative_imports(copy)
    assert not list(CHECKPOINT_FOLDER.rglob("*.py")), "there is no second copy of it in the package"


def test_code_that_travels_needs_no_file_that_stays():
    # Diffusers copies what the pipeline imports itself, and nothing further; of a component, one file.
    imported = {path.stem for path in map(Path, get_relative_import_files(PACKAGE / "pipeline_madiff.py"))}
    assert imported == set(get_relative_imports(PACKAGE / "pipeline_madiff.py"))


def test_export_warns_of_nothing(tiny_folder, tmp_path, capfd, diffusers_log):
    assert main(["export", str(tmp_path / "out"), "--checkpoint", str(tiny_folder), "--variant", "fp16", "bf16"]) == 0
    assert diffusers_log.text == "" and capfd.readouterr().err == ""


def test_export_is_complete(exported):
    assert (exported / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert (exported / "README.md").read_bytes() == (REPOSITORY / "model_card.md").read_bytes()
    shown = re.findall(r"!\[[^\]]*\]\((\S+)\)", (exported / "README.md").read_text())
    assert shown and all((exported / picture).is_file() for picture in shown)
    for part in ("vqvae", "unet", "i2e"):
        weights = {path.name for path in (exported / part).glob("*.safetensors")}
        assert weights == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
        assert "_name_or_path" not in (exported / part / "config.json").read_text(), "no place on this machine"
    assert not [path for path in exported.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_export_says_what_is_wrong_in_one_line(exported, tmp_path, capsys):
    (tmp_path / "runs.json").write_text('{"format": 1, "runs": [{"scores": {"psnr": 3}}]}')
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    change_index(damaged, vqvae=[])
    empty = shutil.copytree(exported, tmp_path / "empty")
    (empty / "vqvae" / "config.json").write_text("[]")
    there = set(tmp_path.iterdir())
    wrong = [
        ([str(tmp_path / "out"), "--checkpoint", str(damaged)], "damaged' cannot be loaded"),
        ([str(tmp_path / "out"), "--checkpoint", str(empty)], "empty' cannot be loaded"),
        ([str(tmp_path / "out"), "--results", str(tmp_path / "runs.json")], "no results.json that this version wrote"),
        ([str(tmp_path / ("n" * 300))], "File name too long"),
        ([str(exported)], "DIR must not exist yet"),
        (
            [str(tmp_path / "out"), "--checkpoint", "madiff-huge"],
            "--checkpoint must be a folder with a model_index.json, a repository",
        ),
        ([str(tmp_path / "no" / "out")], "DIR: no such folder: "),
        ([str(tmp_path / "out"), "--results", str(tmp_path / "none.json")], "none.json"),
        (
            [str(tmp_path / "out"), "--results", str(exported / "model_index.json")],
            "no results.json that this version wrote",
        ),
        ([str(tmp_path / "out"), "--max-shard-size", "much"], "--max-shard-size must be a number"),
    ]
    for arguments, message in wrong:
        assert main(["export", *arguments]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.startswith("madiff: error: ") and len(printed.splitlines()) == 1, printed
    assert set(tmp_path.iterdir()) == there


def test_scores_of_a_results_file_go_into_the_card(tiny_folder, tmp_path, capsys):
    for benchmark in ("first", "second"):
        for name, shift in (("frame_00", -1), ("frame_01_gt", 0), ("frame_02", 1)):
            (tmp_path / "set" / benchmark).mkdir(parents=True, exist_ok=True)
            Image.fromarray(moving_picture(shift, 32, 48)).save(tmp_path / "set" / benchmark / f"{name}.png")
    common = [
        "--benchmark",
        "ucf101",
        "--root",
        str(tmp_path / "set"),
        "--metrics",
        "psnr",
        "ssim",
        "-o",
        str(tmp_path / "results"),
    ]
    assert main(["evaluate", *common, "--checkpoint", str(tiny_folder), "--gallery", "0"]) == 0
    assert main(["evaluate", *common, "--checkpoint", str(tiny_folder), "--gallery", "0", "--steps", "1"]) == 0
    ablated = ["ablate", "latents", *common[:-1], str(tmp_path / "ablated"), "--checkpoint", str(tiny_folder)]
    assert main([*ablated, "--values", "zero"]) == 0
    capsys.readouterr()
    of_ablated = ["export", str(tmp_path / "other"), "--checkpoint", str(tiny_folder), "--results"]
    assert main([*of_ablated, str(tmp_path / "ablated" / "results.json")]) == 2
    assert "no run is of these weights" in capsys.readouterr().err, "latents were replaced"
    with local_hub() as hub:
        hub.add("somebody/madiff", tiny_folder)
        assert main(["evaluate", *common, "--checkpoint", "somebody/madiff", "--gallery", "0", "--steps", "1"]) == 0
        assert not [name for name in hub.downloads() if name.endswith(".py")]
    results = str(tmp_path / "results" / "results.json")
    assert (
        main(
            [
                "export",
                str(tmp_path / "out"),
                "--checkpoint",
                str(tiny_folder),
                "--results",
                results,
                "--license",
                "mit",
            ]
        )
        == 0
    )
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    runs = json.loads(Path(results).read_text())["runs"]
    scores = {run["label"]: run["scores"] for run in runs}
    assert scores["somebody/madiff steps=1"] == scores["madiff-tiny steps=1"]
    scores = scores["madiff-tiny"]
    assert [(each.metric_type, each.metric_value, each.dataset_type) for each in data.eval_results] == [
        ("psnr", round(scores["psnr"]["mean"], 2), "ucf101"),
        ("ssim", round(scores["ssim"]["mean"], 4), "ucf101"),
    ]
    assert data.license == "mit" and data.metrics == ["psnr", "ssim"] and data.library_name == "diffusers"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "other"), "--results", results]) == 2
    assert "no run is of these weights" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_shipped_card_has_the_metadata_that_it_tells(tmp_path):
    card = ModelCard.load(REPOSITORY / "model_card.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "diffusers",
        "video-to-video",
        "apache-2.0",
    )
    assert (CHECKPOINT_FOLDER / "madiff-compact" / "README.md").read_text() == (
        REPOSITORY / "model_card.md"
    ).read_text()
    scores = card.text[card.text.index("## Scores") : card.text.index("## What its parts are worth")]
    assert {each.dataset_type for each in card.data.eval_results} == {"middlebury", "davis", "ucf101"}
    digits = {"psnr": 2, "ssim": 4, "lpips": 4, "lpips_vgg": 4}
    for each in card.data.eval_results:
        section = scores[scores.index(f"### {each.dataset_name}\n") :]
        row = next(line for line in section.splitlines() if line.startswith("| madiff-compact |"))
        column = list(digits).index(each.metric_type) + 2
        assert row.split("|")[column].split()[0] == f"{each.metric_value:.{digits[each.metric_type]}f}", each
    for heading in ("## Training", "### Data", "## Limits", "## Licence and citation"):
        assert heading in card.text


def test_the_card_of_madiff_fast_has_the_scores_of_its_table():
    card = ModelCard.load(CHECKPOINT_FOLDER / "madiff-fast" / "README.md")
    header, row = (
        next(line for line in card.text.splitlines() if line.startswith(begin)).split("|")
        for begin in ("| method | Middlebury (12) |", "| madiff-fast |")
    )
    told = {}
    for name, cell in zip(header[2:5], row[2:5]):
        told[name.split()[0].lower()] = dict(zip(("psnr", "ssim", "lpips"), map(float, cell.split("/"))))
    vgg = re.search(r"LPIPS of VGG.*?(0\.\d{4}) .*?(0\.\d{4}) .*?(0\.\d{4}) ", card.text)
    for name, value in zip(("middlebury", "davis", "ucf101"), vgg.groups()):
        told[name]["lpips_vgg"] = float(value)
    found = {name: {} for name in told}
    for each in card.data.eval_results:
        found[each.dataset_type][each.metric_type] = each.metric_value
    assert found == told


@pytest.mark.parametrize("name", ["madiff-compact", "madiff-fast"])
def test_the_card_of_a_checkpoint_goes_with_it_until_it_is_changed(name, tmp_path):
    pipe = MADiffPipeline.from_pretrained(name)
    card = (CHECKPOINT_FOLDER / name / "README.md").read_text()

    def is_modest(folder: Path) -> bool:
        written = ModelCard.load(folder / "README.md")
        return written.data.eval_results is None and written.data.license is None and "PSNR" not in written.text

    pipe.to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / "README.md").read_text() == card, "as it is stored"
    MADiffPipeline.from_pretrained(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    assert is_modest(tmp_path / "rounded")
    with torch.no_grad():
        pipe.vqvae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    pipe.save_pretrained(tmp_path / "changed")
    assert is_modest(tmp_path / "changed")
    (tmp_path / "changed" / "README.md").write_text("written by hand")
    pipe.save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "README.md").read_text() == "written by hand"
    # In the folder whose card tells scores.
    pipe.save_pretrained(tmp_path / "half")
    assert is_modest(tmp_path / "half") and (tmp_path / "half" / ".README.previous.md").read_text() == card


def test_a_source_that_is_gone_does_not_keep_from_saving(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "source", variant="fp16")
    loaded = MADiffPipeline.from_pretrained(tmp_path / "source", variant="fp16")
    loaded.save_pretrained(tmp_path / "first", variant="fp16")
    card = (tmp_path / "first" / "README.md").read_text()
    assert 'from_pretrained("REPOSITORY", variant="fp16", trust_remote_code=True)' in card, (
        "there are no other weights"
    )
    shutil.rmtree(tmp_path / "source")
    loaded.save_pretrained(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "README.md").read_text()


def test_a_folder_goes_before_the_checkpoint_of_its_name(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "madiff-compact")
    tiny = MADiffPipeline.from_pretrained(tiny_folder)
    bundled = MADiffPipeline.from_pretrained("madiff-compact")
    monkeypatch.chdir(tmp_path)
    for name in ("madiff-compact", "./madiff-compact", Path("madiff-compact")):
        assert (
            MADiffPipeline.from_pretrained(name).unet.config.block_out_channels == tiny.unet.config.block_out_channels
        )
    (tmp_path / "madiff-fast").mkdir()  # as of an output; no checkpoint
    assert MADiffPipeline.from_pretrained("madiff-fast").vqvae.config.news_latents
    assert main(["export", "out", "--checkpoint", "./madiff-compact"]) == 0
    assert MADiffPipeline.from_pretrained("out").unet.config.block_out_channels == tiny.unet.config.block_out_channels
    assert bundled.unet.config.block_out_channels != tiny.unet.config.block_out_channels


class OwnPipeline(MADiffPipeline):
    pass


class OwnAutoencoder(VQMAGANModel):
    pass


def test_subclasses(pipeline, tmp_path, diffusers_log):
    mine = OwnPipeline(**pipeline.components, hint_source="events+flow")
    mine.save_pretrained(tmp_path / "mine")
    for kind in (OwnPipeline, MADiffPipeline):
        assert type(kind.from_pretrained(tmp_path / "mine")) is kind
    DiffusionPipeline.from_pretrained(tmp_path / "mine", trust_remote_code=True)
    # The code of a component of one's own is one's own to ship.
    own = OwnAutoencoder.from_config(pipeline.vqvae.config)
    MADiffPipeline(**{**pipeline.components, "vqvae": own}, hint_source="events+flow").save_pretrained(
        tmp_path / "own"
    )
    assert f"`vqvae` loads only where {__name__} was imported" in diffusers_log.text
    assert (
        not list((tmp_path / "own" / "vqvae").glob("*.py"))
        and "auto_map" not in (tmp_path / "own" / "vqvae" / "config.json").read_text()
    )
    assert type(MADiffPipeline.from_pretrained(tmp_path / "own").vqvae) is OwnAutoencoder


# ---- loaded without this package ----


@pytest.mark.parametrize("made", ["linked", pytest.param("installed", marks=pytest.mark.slow)])
def test_diffusers_alone_loads_it_and_makes_the_same_frames(made, bare_python, exported, frames, expected, tmp_path):
    python = bare_python
    if made == "installed":
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
        python = tmp_path / "venv" / "bin" / "python"
        names = [f"{name}=={version(name).partition('+')[0]}" for name in NEEDED]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *names], check=True)
    # As a folder that was moved, so that nothing points back.
    moved = shutil.copytree(exported, tmp_path / "moved")
    run_stranger(python, moved, frames, tmp_path / "mid.npy", cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "mid.npy"), expected)


def test_missing_packages_are_named(tiny_folder, tmp_path, monkeypatch, diffusers_log):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="'flow' cannot be built: ImportError: .*pip install opencv-python-headless"):
        MADiffPipeline.from_pretrained(tiny_folder)
    monkeypatch.setitem(sys.modules, "einops", None)
    message = "^MADiffPipeline needs packages that are not installed: pip install einops$"
    with local_hub() as hub, pytest.raises(ImportError, match=message):
        hub.add("somebody/madiff", tiny_folder)
        DiffusionPipeline.from_pretrained("somebody/madiff", trust_remote_code=True, cache_dir=tmp_path)
    assert "einops" in diffusers_log.text and "cv2" not in diffusers_log.text, (
        "nobody can install a package of that name"
    )


def test_what_a_stranger_saves_is_whole_again(bare_python, tiny_folder, tmp_path):
    code = (
        "import sys; from diffusers import DiffusionPipeline, AutoModel\n"
        "source, target = sys.argv[1:]\n"
        "DiffusionPipeline.from_pretrained(source, trust_remote_code=True).save_pretrained(target)\n"
        "DiffusionPipeline.from_pretrained(target, trust_remote_code=True)\n"
        "model = AutoModel.from_pretrained(target + '/vqvae', trust_remote_code=True)\n"
        "assert type(model).__name__ == 'VQMAGANModel' and 'madiff_diffusers' not in sys.modules\n"
        "model.save_pretrained(target + '-vqvae')\n"
    )
    target = tmp_path / "again"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [bare_python, "-c", code, tiny_folder, target], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr, "no configuration is reported as unknown"
    names = {path.relative_to(tiny_folder) for path in tiny_folder.rglob("*") if path.is_file()}
    assert {path.relative_to(target) for path in target.rglob("*") if path.is_file()} == names - {Path("LICENSE")}
    for name in names - {Path("LICENSE")}:
        assert filecmp.cmp(tiny_folder / name, target / name, shallow=False), name
    alone = VQMAGANModel.from_pretrained(tmp_path / "again-vqvae")
    for mine, theirs in zip(
        alone.state_dict().values(), MADiffPipeline.from_pretrained(target).vqvae.state_dict().values()
    ):
        assert torch.equal(mine, theirs)


def test_without_trust_the_refusal_is_diffusers_own(tiny_folder):
    for load in (
        lambda: DiffusionPipeline.from_pretrained(tiny_folder),
        lambda: AutoModel.from_pretrained(str(tiny_folder / "vqvae")),
        lambda: AutoModel.from_pretrained(str(tiny_folder / "i2e")),
    ):
        with pytest.raises(ValueError, match="contains custom code.*\n?.*`trust_remote_code=True`"):
            load()
    assert isinstance(MADiffPipeline.from_pretrained(tiny_folder), MADiffPipeline), "the package has code of its own"


@pytest.mark.parametrize("part, kind", [("vqvae", VQMAGANModel), ("i2e", EventGANModel)])
def test_components_load_by_their_class_and_by_automodel(part, kind, tiny_folder):
    own = kind.from_pretrained(tiny_folder, subfolder=part)
    other = AutoModel.from_pretrained(str(tiny_folder / part), trust_remote_code=True)
    assert type(other).__name__ == kind.__name__ and type(other) is not kind
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(own.state_dict().values(), other.state_dict().values())
    )


# ---- over the Hub's protocol ----


def test_download_breaks_off_and_goes_on(bare_python, exported, frames, expected, tmp_path):
    weights = "unet/diffusion_pytorch_model.safetensors"
    with local_hub() as hub:
        hub.add("somebody/madiff", exported)
        hub.cuts[weights] = 15_000_000
        run_stranger(bare_python, "somebody/madiff", frames, tmp_path / "mid.npy", cwd=tmp_path)
        assert np.array_equal(np.load(tmp_path / "mid.npy"), expected)
        ranges = [part for method, path, part in hub.requests if method == "GET" and path.endswith(weights)]
        assert (
            len(ranges) == 2
            and ranges[0] is None
            and int(ranges[1].removeprefix("bytes=").partition("-")[0]) > 10_000_000
        )
        assert not [name for name in hub.downloads() if "fp16" in name]
        first = len(hub.downloads())
        run_stranger(bare_python, "somebody/madiff", frames, tmp_path / "half.npy", "variant=fp16", cwd=tmp_path)
        parts = {f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("vqvae", "unet", "i2e")}
        assert set(hub.downloads()[first:]) == parts, "all else is in the cache"
    assert np.array_equal(np.load(tmp_path / "half.npy"), expected), "what ships has half precision"


@pytest.mark.slow
def test_a_killed_download_keeps_the_files_that_it_has(exported, frames, expected, tmp_path):
    code = "import sys; from madiff_diffusers.commands.madiff_cli import main; sys.exit(main(sys.argv[1:]))"
    pair = [str(tmp_path / f"{name}.png") for name in ("prev", "next")]
    for path, frame in zip(pair, np.load(frames)):
        Image.fromarray(frame).save(path)
    command = [
        sys.executable,
        "-c",
        code,
        "interpolate",
        *pair,
        "-o",
        str(tmp_path / "mid.png"),
        "--checkpoint",
        "somebody/madiff",
    ]
    weights = "unet/diffusion_pytorch_model.safetensors"
    with local_hub() as hub:
        hub.add("somebody/madiff", exported)
        hub.stalls[weights] = 15_000_000
        environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
        killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        others = {
            "vqvae/diffusion_pytorch_model.safetensors",
            "i2e/diffusion_pytorch_model.safetensors",
            "model_index.json",
        }
        snapshots = tmp_path / "cache" / "hub" / "models--somebody--madiff" / "snapshots"
        deadline = time.monotonic() + 120
        while hub.stalls or not all(list(snapshots.glob(f"*/{name}")) for name in others):
            assert time.monotonic() < deadline and killed.poll() is None
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        first = len(hub.downloads())
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not others & set(hub.downloads()[first:]) and weights in hub.downloads()[first:]
        assert not [name for name in hub.downloads() if name.endswith(".py")], (
            "the package runs its own code, and fetches none"
        )
    assert np.array_equal(np.array(Image.open(tmp_path / "mid.png")), (expected[0, 0] * 255).round().astype(np.uint8))


def test_revisions_variants_and_repositories_that_there_are_not(tiny, tiny_folder, tmp_path):
    other = build_pipeline({**tiny, "pipeline": {"default_num_inference_steps": 7, "default_hint_interval": 1}})
    other.save_pretrained(tmp_path / "other")
    other.to(dtype=torch.float16).save_pretrained(tmp_path / "other", variant="fp16")

    def steps(name="somebody/madiff", **options) -> int:
        pipe = MADiffPipeline.from_pretrained(name, cache_dir=tmp_path / "cache", **options)
        assert type(pipe) is MADiffPipeline and type(pipe.vqvae) is VQMAGANModel
        return pipe.config.default_num_inference_steps

    with local_hub() as hub:
        hub.add("somebody/madiff", tiny_folder)
        hub.add("somebody/madiff", tmp_path / "other", "second")
        hub.add("somebody/vqvae", tiny_folder / "vqvae")
        assert (steps(), steps(revision="second")) == (2, 7)
        first = len(hub.downloads())
        assert steps(revision="second", variant="fp16") == 7
        assert set(hub.downloads()[first:]) == {
            f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("vqvae", "unet", "i2e")
        }
        arguments = {"subfolder": "vqvae", "revision": "second", "cache_dir": tmp_path / "cache"}
        assert isinstance(VQMAGANModel.from_pretrained("somebody/madiff", **arguments), VQMAGANModel)
        alone = AutoModel.from_pretrained("somebody/vqvae", trust_remote_code=True, cache_dir=tmp_path / "cache")
        assert type(alone).__name__ == "VQMAGANModel"
        with pytest.raises(OSError, match="'somebody/nothing' cannot be fetched from the Hub: 404"):
            steps("somebody/nothing")
        with pytest.raises(OSError, match="'somebody/madiff' cannot be fetched from the Hub: 404"):
            steps(revision="third")
        with pytest.raises(ValueError, match="variant=int1"):
            steps(variant="int1")
        with pytest.raises(TypeError, match="`push_to_hub=True`"):
            other.save_pretrained(tmp_path / "more", private=True)
    # The server is gone, and the cache is enough.
    assert (steps(), steps(local_files_only=True), steps(revision="second")) == (2, 2, 7)


def test_uploads(tiny_folder, tmp_path, capsys):
    pipe = MADiffPipeline.from_pretrained(tiny_folder)
    with local_hub() as hub:
        pipe.push_to_hub("somebody/pipeline", private=True, commit_message="All of it")
        pipe.vqvae.push_to_hub("somebody/vqvae", commit_message="A part")
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="somebody/saved")
        folder = str(tiny_folder)
        assert (
            main(["push", folder, "somebody/branch", "--private", "--revision", "new", "--message", "On a branch"])
            == 0
        )
        assert main(["push", f"{folder}/i2e", "somebody/i2e"]) == 0
        assert main(["push", folder, "somebody/branch", "--create-pr"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{ADDRESS}/somebody/branch/discussions/1"

        files = {
            path.relative_to(tiny_folder).as_posix(): path.read_bytes()
            for path in tiny_folder.rglob("*")
            if path.is_file()
        }
        card = files.pop("README.md").decode()
        assert 'DiffusionPipeline.from_pretrained("REPOSITORY"' in card
        for name, branch in (("pipeline", "main"), ("saved", "main"), ("branch", "new")):
            sent = dict(hub.repositories[f"somebody/{name}"][branch])
            assert sent.pop("README.md").decode() == card.replace('"REPOSITORY"', f'"somebody/{name}"')
            assert sent == files, name
        assert hub.repositories["somebody/branch"]["main"] == {}, "neither the branch nor the pull request touched it"
        assert {"vq_magan.py", "config.json", "diffusion_pytorch_model.safetensors"} <= set(
            hub.repositories["somebody/vqvae"]["main"]
        )
        i2e = hub.repositories["somebody/i2e"]["main"]
        assert {"LICENSE", "README.md", "eventgan.py", "config.json", "diffusion_pytorch_model.safetensors"} == set(
            i2e
        )
        assert b'AutoModel.from_pretrained("somebody/i2e", trust_remote_code=True)' in i2e["README.md"]
        summaries = {(name.split("/")[1], branch): summary for name, branch, summary in reversed(hub.commits)}
        assert summaries["pipeline", "main"] == "All of it" and summaries["vqvae", "main"] == "A part"
        assert summaries["branch", "new"] == "On a branch"
        private = {
            name
            for name, request in hub.created.items()
            if request.get("private") or request.get("visibility") == "private"
        }
        assert private == {"somebody/pipeline", "somebody/branch"}


def test_an_upload_leaves_no_weights_that_it_takes_the_place_of(pipeline, tmp_path):
    def weights(model) -> list:
        return [tensor for part in (model.vqvae, model.unet, model.i2e) for tensor in part.state_dict().values()]

    pipeline.save_pretrained(tmp_path / "folder", max_shard_size="50KB")
    pipeline.save_pretrained(tmp_path / "folder", variant="fp16")
    with local_hub() as hub:
        upload_repository(tmp_path / "folder", "madiff")
        assert b'from_pretrained("somebody/madiff"' in hub.repositories["somebody/madiff"]["main"]["README.md"]
        hub.repositories["somebody/madiff"]["main"]["README.md"] = b"edited there"
        for part in (pipeline.vqvae, pipeline.unet, pipeline.i2e):
            for parameter in part.parameters():
                parameter.data *= 2
        pipeline.save_pretrained(tmp_path / "folder")
        pipeline.push_to_hub("madiff")
        loaded = [MADiffPipeline.from_pretrained(tmp_path / "folder")]
        loaded.append(MADiffPipeline.from_pretrained("somebody/madiff", cache_dir=tmp_path / "cache"))
        assert hub.repositories["somebody/madiff"]["main"]["README.md"] == b"edited there"
        there = set(hub.repositories["somebody/madiff"]["main"])
    for model in loaded:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights(pipeline), weights(model)))
    names = {path.name for path in (tmp_path / "folder" / "unet").iterdir()}
    assert names == {name.removeprefix("unet/") for name in there if name.startswith("unet/")}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    assert {path.name for path in (tmp_path / "folder").iterdir()} >= {"model_index.json", "README.md", "vqvae"}


def test_a_checkpoint_from_the_hub_keeps_its_card(exported, tmp_path):
    with local_hub() as hub:
        upload_repository(exported, "somebody/compact")
        pipe = MADiffPipeline.from_pretrained("somebody/compact", cache_dir=tmp_path / "cache")
        assert (
            pipe.name_or_path == "somebody/compact"
            and str(tmp_path) not in hub.repositories["somebody/compact"]["main"]["README.md"].decode()
        )
    pipe.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == (REPOSITORY / "model_card.md").read_text()
    picture = (REPOSITORY / "examples" / "limits.png").read_bytes()
    assert (tmp_path / "same" / "examples" / "limits.png").read_bytes() == picture, "which the card shows"
    pipe.register_to_config(default_num_inference_steps=9)
    pipe.save_pretrained(tmp_path / "changed")
    data = ModelCard.load(tmp_path / "changed" / "README.md").data
    assert data.base_model == "somebody/compact" and data.eval_results is None


def test_a_failed_upload_loses_nothing_and_says_what_to_run_again(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    command = ["push", str(folder), "somebody/madiff"]
    failures = [main(command)]  # nobody listens
    with local_hub() as hub:
        hub.refuses = True
        failures.append(main(command))
        hub.refuses = False
        assert failures == [2, 2] and main(command) == 0
        assert "model_index.json" in hub.repositories["somebody/madiff"]["main"]
    messages = capsys.readouterr().err.strip().splitlines()
    assert len(messages) == 2
    for message in messages:
        assert (
            message.startswith("madiff: error: The upload to somebody/madiff failed: ")
            and "the same command tries again" in message
        )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_only_what_is_whole_and_safe_is_uploaded(tiny_folder, tmp_path, capsys):
    assert main(["push", str(tiny_folder), "a name"]) == 2
    (tmp_path / "config.json").write_text('{"_class_name": "Unknown"}')
    assert main(["push", str(tmp_path), "somebody/madiff"]) == 2
    printed = capsys.readouterr().err
    assert "is no component's of this package" in printed and "again" not in printed, "it would not help"
    with pytest.raises(ValueError, match="`folder` must be what `save_pretrained` or `madiff export` wrote"):
        upload_repository(CHECKPOINT_FOLDER / "madiff-compact", "somebody/madiff")
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    (folder / "unet" / "optimizer.PT").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors alone, but has unet/optimizer.PT"):
        upload_repository(folder, "somebody/madiff")


# ---- repositories that mean harm ----


class Bomb:
    """Pickled, it touches a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def hostile(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "hostile")


def change_index(folder: Path, **entries) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("part", ["vqvae", "i2e", "unet"])
def test_pickled_weights_are_not_read(part, hostile, tmp_path):
    (hostile / part / "diffusion_pytorch_model.safetensors").unlink()
    with (hostile / part / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Bomb(tmp_path / "ran")}, file)
    with pytest.raises(OSError, match="safetensors"):
        MADiffPipeline.from_pretrained(hostile)
    with pytest.raises(
        OSError
    ):  # the code that came along is ours, and refuses them too; Diffusers' own classes read no such pickle
        DiffusionPipeline.from_pretrained(hostile, trust_remote_code=True)
    kind = {"vqvae": VQMAGANModel, "i2e": EventGANModel}.get(part)
    if kind is not None:
        with pytest.raises(OSError, match="safetensors"):
            kind.from_pretrained(hostile / part)
        with pytest.raises(ValueError, match="`use_safetensors` must not be False"):
            kind.from_pretrained(hostile / part, use_safetensors=False)
    with pytest.raises(ValueError, match="`use_safetensors` must not be False"):
        MADiffPipeline.from_pretrained(hostile, use_safetensors=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["vqvae", "i2e", "unet"])
def test_an_index_does_not_lead_to_pickles(part, hostile, tmp_path):
    weights = hostile / part / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), hostile / part / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "weights.bin")}
    (hostile / part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    with pytest.raises(ValueError, match="must name .safetensors files alone"):
        MADiffPipeline.from_pretrained(hostile)
    kind = {"vqvae": VQMAGANModel, "i2e": EventGANModel}.get(part)
    if kind is not None:
        with pytest.raises(ValueError, match="must name .safetensors files alone"):
            kind.from_pretrained(hostile / part)
        with local_hub() as hub, pytest.raises(ValueError, match="must name .safetensors files alone"):
            hub.add("somebody/hostile", hostile)
            kind.from_pretrained("somebody/hostile", subfolder=part, cache_dir=tmp_path / "cache")


def test_code_beside_weights_does_not_run(hostile, tmp_path):
    for path in hostile.rglob("*.py"):
        path.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    pipe = MADiffPipeline.from_pretrained(hostile)
    assert type(pipe) is MADiffPipeline and type(pipe.vqvae) is VQMAGANModel
    VQMAGANModel.from_pretrained(hostile / "vqvae")
    # Not even for one who trusts it: there is code of that name in the package.
    MADiffPipeline.from_pretrained(hostile, trust_remote_code=True)
    with pytest.raises(ValueError, match="`trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(hostile)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"_class_name": ["evil", "MADiffPipeline"]},
        {"_class_name": ["../evil", "MADiffPipeline"]},
        {"vqvae": ["evil", "VQMAGANModel"]},
        {"vqvae": ["../../evil", "VQMAGANModel"]},
        {"scheduler": ["../evil", "DDIMScheduler"]},
        {"vqvae": ["os", "system"]},
        {"unet": ["subprocess", "Popen"]},
        {"unet": ["antigravity", "UNet2DModel"]},
    ],
    ids=str,
)
def test_code_that_an_index_names_does_not_run(entries, hostile, tmp_path):
    change_index(hostile, **entries)
    for place in (tmp_path, hostile, hostile / "vqvae", hostile / "scheduler"):
        (place / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    for load in (MADiffPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        with pytest.raises((ValueError, OSError)):
            load(hostile)
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("part", ["vqvae", "unet"])
@pytest.mark.parametrize("name", ["../../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors"])
def test_an_index_of_shards_does_not_lead_elsewhere(part, name, hostile, tmp_path):
    weights = hostile / part / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, tmp_path / "outside.safetensors")
    (hostile / part / "sub").mkdir()
    shutil.copy(tmp_path / "outside.safetensors", hostile / part / "sub")
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": name}}
    (hostile / part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="path separator"):
        MADiffPipeline.from_pretrained(hostile)


def test_a_repository_does_not_write_outside_of_the_cache(tiny_folder, tmp_path):
    cache = tmp_path / "some" / "cache"
    with local_hub() as hub:
        hub.add("somebody/hostile", tiny_folder)
        files = hub.repositories["somebody/hostile"]["main"]
        for up in range(1, 6):
            files["../" * up + "escaped.json"] = b"{}"
            files["../" * up + "escaped/diffusion_pytorch_model.safetensors"] = b"{}"
        with pytest.raises((OSError, ValueError)):
            MADiffPipeline.from_pretrained("somebody/hostile", cache_dir=cache)
    snapshots = cache / "models--somebody--hostile" / "snapshots"
    assert [path for path in tmp_path.rglob("escaped*") if snapshots not in path.parents] == []


def test_a_copied_card_without_scores_does_not_stay_on_changed_weights(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "own")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe best weights there are.\n")
    pipe = MADiffPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "copy")
    assert "The best weights" in (tmp_path / "copy" / "README.md").read_text()
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    for saved in (tmp_path / "copy", folder):
        pipe.save_pretrained(saved)
        assert "The best weights" not in (saved / "README.md").read_text()
        assert "The best weights" in (saved / ".README.previous.md").read_text()


def test_a_card_that_claims_nothing_stays_on_further_training(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "own")
    pipe, card = MADiffPipeline.from_pretrained(folder), (folder / "README.md").read_text()
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == card and not (folder / ".README.previous.md").exists()


def test_a_repository_that_is_exported_is_named_in_its_place(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    with local_hub() as hub:
        assert main(["push", str(tiny_folder), "somebody/first"]) == 0
        assert main(["export", str(tmp_path / "again"), "--checkpoint", "somebody/first"]) == 0
        assert main(["push", str(tmp_path / "again"), "somebody/second"]) == 0
        card = hub.repositories["somebody/second"]["main"]["README.md"].decode()
        assert 'from_pretrained("somebody/second"' in card and "somebody/first" not in card
        for checkpoint, name in (("somebody/first", "somebody/first"), (".", tiny_folder.name)):
            space = tmp_path / f"space-{name.rpartition('/')[2]}"
            assert main(["export", "--space", str(space), "--checkpoint", checkpoint]) == 0
            assert f"Demo(pipe, limits, {name!r})" in (space / "app.py").read_text()


def test_bytecode_is_not_uploaded(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "own.cpython-311.pyc").write_bytes(b"/home/somebody")
    with local_hub() as hub:
        assert main(["push", str(folder), "somebody/madiff"]) == 0
        assert not any("pycache" in name for name in hub.repositories["somebody/madiff"]["main"])
