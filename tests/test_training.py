"""Each training script as a user starts it: real processes, the `tiny` configuration, clips in a folder."""

import csv
import dataclasses
import errno
import fcntl
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

from madiff_diffusers import EventGANModel, MADiffPipeline, VQMAGANModel
from tests.conftest import REPOSITORY, load_config, load_tiny_news, moving_picture, two_processes
from tests.local_hub import local_hub
from tests.processes import Forked, layout_script, run_python, run_two_ranks, start_python
from training.adversary import PatchDiscriminator
from training.checkpoints import Checkpoints
from training.losses import adaptive_weight, discriminator_hinge_loss
from training.normalisation import StepwiseNormalisation
from training.options import parse_options, training_scheduler
from training.progress import Progress
from training.run_log import append_row, take_back_rows
from training.train_denoiser import DenoiserOptions
from training.train_i2e import I2EOptions
from training.train_vq_magan import VQMAGANOptions, start_from
from training.trainer import Trainer


SLOW = pytest.mark.slow
STAGES = {"i2e": "train_i2e", "vqvae": "train_vq_magan", "unet": "train_denoiser"}
OPTIONS = {"train_i2e": I2EOptions, "train_vq_magan": VQMAGANOptions, "train_denoiser": DenoiserOptions}


def arguments(stage: str, clips: Path, runs: Path, *flags: str) -> list:
    """Module and options of a stage whose inputs lie in `runs`."""
    needs = {"i2e": [], "vqvae": ["i2e"], "unet": ["i2e", "vqvae"]}[stage]
    folders = [part for name in needs for part in (f"--{name}", str(runs / name / name))]
    base = [f"training.{STAGES[stage]}", "--config", "tiny", "--data", str(clips)]
    return [*base, "--output_dir", str(runs / stage), *folders, *flags]


def command(stage: str, clips: Path, runs: Path, *flags: str) -> list:
    return [sys.executable, "-m", *arguments(stage, clips, runs, *flags)]


def one_process(module_and_options: list) -> list:
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "-m",
        *module_and_options,
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(arguments: list, **environment: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, **environment}
    return run_python(arguments, cwd=REPOSITORY, env=environment)


def succeed(arguments: list, **environment: str) -> str:
    done = launch(arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


PIPED = {"cwd": REPOSITORY, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def start(arguments: list) -> subprocess.Popen | Forked:
    return start_python(arguments, **PIPED)


def start_launcher(arguments: list) -> subprocess.Popen:
    """Never forked: what it starts knows it by its command line."""
    return subprocess.Popen(arguments, text=True, **PIPED)


def stop_at(process: subprocess.Popen | Forked, line_start: str, number: int) -> str:
    """Signal a process once it prints a line; its output, after it has ended."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(line_start):
            process.send_signal(number)
    process.wait()
    return "".join(printed)


def rows(folder: Path, name: str = "summary.csv") -> list:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def link(stage: str, trained: Path, runs: Path) -> Path:
    """A new folder of runs that has what a stage needs."""
    runs.mkdir(exist_ok=True)
    for name in STAGES:
        if name != stage:
            (runs / name).symlink_to(trained / name)
    return runs


def flat(value, name: str = "") -> dict:
    """Every leaf of nested dictionaries and lists by its path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, each in items for path, leaf in flat(each, f"{name}/{key}").items()}
    return {name: value}


def checkpoint(folder: Path) -> dict:
    """All that a checkpoint holds: weights, optimisers, EMA, schedules, random states, the exported part."""
    content = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            content.update(flat(load_file(path), name))
        elif path.suffix in (".bin", ".pkl"):
            content.update(flat(torch.load(path, weights_only=False), name))
        elif path.is_file():
            content[name] = path.read_text()
    return content


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b))


VALIDATION = ["--validation_samples", "5", "--validation_crop", "32", "--validation_steps", "10", "--panels", "2"]


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory) -> Path:
    """All three stages, 20 steps each, validated at steps 10 and 20."""
    runs = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        succeed(command(stage, clips, runs, "--validation", f"videos:{clips}", *VALIDATION))
    return runs


# ---- what a run leaves ----


def test_three_stages_make_a_pipeline(trained):
    for stage in STAGES:
        assert [int(row["step"]) for row in rows(trained / stage)] == list(range(1, 21))
        assert yaml.safe_load((trained / stage / "args.yaml").read_text())["max_train_steps"] == 20
        environment = yaml.safe_load((trained / stage / "environment.yaml").read_text())
        assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
        assert re.fullmatch("[0-9a-f]{40}|unknown", environment["git_revision"])
        assert list((trained / stage / "log").rglob("events.out.tfevents.*")), "TensorBoard"
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


def test_the_newest_checkpoint_and_the_best_are_kept_and_can_be_loaded(trained):
    for stage, model in (("i2e", EventGANModel), ("vqvae", VQMAGANModel), ("unet", UNet2DModel)):
        folder = trained / stage / "checkpoints"
        scores = {int(row["step"]): float(row["l1"]) for row in rows(trained / stage, "validation.csv")}
        best = yaml.safe_load((folder / "best.yaml").read_text())
        assert set(scores) == {10, 20} and best["step"] == min(scores, key=scores.get)
        kept = {f"step_{step:08d}" for step in (best["step"], 15, 20)}
        assert {path.name for path in folder.iterdir()} == kept | {"best.yaml"}
        last = model.from_pretrained(trained / stage / stage)
        for name in sorted(kept):
            loaded = model.from_pretrained(folder / name / stage)
            is_last = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), last.parameters()))
            assert is_last == name.endswith("20")


def test_what_is_exported_is_the_moving_average(trained):
    folder = trained / "unet" / "checkpoints" / "step_00000020"
    exported = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert any(not torch.equal(exported[name], weights[name]) for name in weights)
    states = [torch.load(path, weights_only=False) for path in folder.glob("custom*")]
    average = next(state["shadow_params"] for state in states if "shadow_params" in state)
    names = [name for name, _ in UNet2DModel.from_pretrained(folder / "unet").named_parameters()]
    assert all(torch.equal(exported[name], value) for name, value in zip(names, average, strict=True))


def test_validation_shows_pictures(trained):
    for stage, columns in (("i2e", 4), ("vqvae", 11), ("unet", 11)):
        for step in (10, 20):
            sheet = np.array(Image.open(trained / stage / "panels" / f"step_{step:08d}.png"))
            assert sheet.shape == (2 * (32 + 16), columns * 32, 3)
        assert all(int(row["count"]) == 5 for row in rows(trained / stage, "validation.csv"))
        truth = sheet[16:48, 64:96].astype(float)
        if stage != "i2e":
            result = sheet[16:48, 96:128]
            l1 = float(rows(trained / stage, "validation.csv")[-1]["l1"])
            assert np.abs(truth - result).mean() / 255 < 4 * l1


def test_discriminators_take_part_from_their_first_step_on(trained):
    for stage in ("i2e", "vqvae"):
        adversarial = [float(row["gan"]) != 0 for row in rows(trained / stage)]
        assert adversarial == [False] * 4 + [True] * 16


def test_a_discriminator_s_learning_rate_falls_until_the_run_ends(clips, tmp_path):
    flags = ["--disc_start", "2", "--max_train_steps", "4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "0"]
    succeed(command("i2e", clips, tmp_path, *flags))
    (saved,) = (tmp_path / "i2e" / "checkpoints").glob("step_00000004")
    for name in ("optimizer.bin", "optimizer_1.bin"):
        (group,) = torch.load(saved / name, weights_only=True)["param_groups"]
        assert group["lr"] == pytest.approx(0, abs=1e-9) and group["initial_lr"] > 0, name


def test_a_codebook_that_was_trained_stays_where_training_goes_on(clips, trained, tmp_path):
    runs = link("vqvae", trained, tmp_path / "runs")
    flags = ["--revive_every", "5", "--max_train_steps", "2", "--log_steps", "1"]
    init = ["--init", str(trained / "vqvae" / "vqvae")]
    for name, more, revived in (("new", [], True), ("on", init, False), ("anew", [*init, "--begin_codes"], True)):
        succeed(command("vqvae", clips, runs, *flags, *more, "--output_dir", str(tmp_path / name)))
        assert (float(rows(tmp_path / name)[1]["codes_revived"]) > 0) == revived


def test_a_step_after_a_resume_has_as_many_passes_as_are_asked_for_then(clips, tmp_path):
    script = (
        "import sys; from training import train_i2e, trainer\n"
        "backward = trainer.Trainer.backward\n"
        "def told(self, loss):\n"
        "    print('pass of step', self.progress.step, flush=True)\n"
        "    backward(self, loss)\n"
        "trainer.Trainer.backward = told\n"
        "train_i2e.main(sys.argv[1:])\n"
    )
    (tmp_path / "script.py").write_text(script)
    flags = ["--max_train_steps", "5", "--disc_start", "9"]
    arguments = [sys.executable, str(tmp_path / "script.py"), *command("i2e", clips, tmp_path, *flags)[3:]]
    path = {"PYTHONPATH": str(REPOSITORY)}
    assert succeed([*arguments, "--stop_step", "3"], **path).count("pass of step 2") == 1
    printed = succeed([*arguments, "--gradient_accumulation_steps", "2"], **path)
    assert [printed.count(f"pass of step {step}") for step in (2, 3, 4)] == [0, 2, 2]


@pytest.mark.parametrize("stage", ["i2e", pytest.param("vqvae", marks=SLOW), pytest.param("unet", marks=SLOW)])
def test_loss_falls_on_one_fixed_batch(stage, trained, tmp_path):
    # One clip of three frames as large as the crop: every sample is the same picture, turned or mirrored.
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    writer = cv2.VideoWriter(str(fixed / "only.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (32, 32))
    for i in range(3):
        writer.write(cv2.cvtColor(moving_picture(2 * i, 32, 32), cv2.COLOR_RGB2BGR))
    writer.release()
    flags = [
        "--max_train_steps",
        "60",
        "--checkpointing_steps",
        "100",
        *(["--disc_start", "1000"] if stage != "unet" else []),
    ]
    runs = link(stage, trained, tmp_path / "runs")
    succeed(command(stage, fixed, runs, *flags))
    name = {"i2e": "l1", "vqvae": "l1", "unet": "loss"}[stage]
    losses = [float(row[name]) for row in rows(runs / stage)]
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


@pytest.mark.parametrize("stage", [pytest.param("i2e", marks=SLOW), "vqvae", pytest.param("unet", marks=SLOW)])
def test_speed_and_memory_options_keep_training_going(stage, clips, trained, tmp_path):
    runs = link(stage, trained, tmp_path / "runs")
    flags = [
        "--mixed_precision",
        "bf16",
        "--gradient_accumulation_steps",
        "2",
        "--gradient_checkpointing",
        "--channels_last",
        "false",
    ]
    motion = ["--random_motion_share", "0.5", "--colour_jitter", "0.1", "--max_train_steps", "6"]
    succeed(command(stage, clips, runs, *flags, *motion, "--report_to", "none", "--dataloader_num_workers", "1"))
    assert [int(row["samples"]) for row in rows(runs / stage)] == list(range(4, 28, 4))


def test_the_result_is_sent_to_the_hub_with_a_filled_card(clips, trained):
    with local_hub() as hub:
        flags = ["--push_to_hub", "somebody/madiff-tiny", "--report_to", "none"]
        # The run is finished: the same command with a destination trains nothing more.
        succeed(command("unet", clips, trained, *flags, "--hub_private_repo"))
        sent = hub.repositories["somebody/madiff-tiny"]["main"]
        request = hub.created["somebody/madiff-tiny"]
        assert request.get("visibility") == "private" or request.get("private"), (
            "by whichever name the client gives it"
        )
        folder = trained / "unet" / "pipeline"
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert b'"REPOSITORY"' in files["README.md"]
        files["README.md"] = files["README.md"].replace(b'"REPOSITORY"', b'"somebody/madiff-tiny"')
        assert sent == files and {
            "model_index.json",
            "pipeline_madiff.py",
            "unet/diffusion_pytorch_model.safetensors",
        } <= set(sent)
        card = sent["README.md"].decode()
        header = yaml.safe_load(card.split("---")[1])
        assert header["library_name"] == "diffusers"
        score = rows(trained / "unet", "validation.csv")[-1]["psnr"]
        assert f" {score} " in card and 'DiffusionPipeline.from_pretrained("somebody/madiff-tiny", trust' in card
        assert "max_train_steps: 20" in card and torch.__version__.split("+")[0] in card

        hub.refuses = True
        done = launch(command("i2e", clips, trained, *flags))
        assert done.returncode == 1 and "Run the same command again to upload it" in done.stderr
        assert "Traceback" not in done.stderr
        assert EventGANModel.from_pretrained(trained / "i2e" / "i2e")


# ---- several processes ----


def launch_two(arguments: list) -> subprocess.CompletedProcess:
    return launch(two_processes(arguments))


def fork_two(arguments: list) -> subprocess.CompletedProcess:
    environment = dict(ENVIRONMENT)
    if not torch.accelerator.is_available():
        del environment["ACCELERATE_USE_CPU"]  # as torchrun starts them
    return run_two_ranks([sys.executable, "-m", *arguments], cwd=REPOSITORY, env=environment)


def compare_launches(run_two, stage, clips, trained, tmp_path, *flags) -> None:
    """Two processes, and one that accumulates two passes, come to the same weights, scores and log."""
    folders = []
    for name in ("two", "one"):
        runs = link(stage, trained, tmp_path / name)
        options = ["--max_train_steps", "5", *flags, "--validation", f"videos:{clips}", *VALIDATION]
        options += ["--validation_steps", "5", *(["--disc_start", "1"] if stage != "unet" else [])]
        if name == "two":
            done = run_two(arguments(stage, clips, runs, *options))
            assert done.returncode == 0, done.stderr
            environment = yaml.safe_load((runs / stage / "environment.yaml").read_text())
            assert environment["processes"] == 2 and environment["distribution"] == "MULTI_CPU"
        else:
            succeed(command(stage, clips, runs, *options, "--gradient_accumulation_steps", "2"))
        folders.append(runs / stage)
    last = [folder / "checkpoints" / "step_00000005" for folder in folders]
    weights = [{path.name: load_file(path) for path in folder.glob("*.safetensors")} for folder in last]
    assert set(weights[0]) == set(weights[1]) and len(weights[0]) == (1 if stage == "unet" else 2)
    for file in weights[0]:
        for name, value in weights[0][file].items():
            assert (value.float() - weights[1][file][name].float()).abs().max() <= 1e-5, (file, name)
    for name in ("summary.csv", "validation.csv"):
        for two, one in zip(rows(folders[0], name), rows(folders[1], name)):
            assert list(map(float, two.values())) == pytest.approx(list(map(float, one.values())), rel=1e-4, abs=1e-6)
    assert rows(folders[0], "validation.csv")[0]["count"] == "5", "five samples on two processes, each once"


def test_two_processes_equal_accumulation(clips, trained, tmp_path):
    compare_launches(fork_two, "vqvae", clips, trained, tmp_path, "--revive_every", "2")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["i2e", "unet"])
def test_two_processes_equal_accumulation_in_the_other_stages(stage, clips, trained, tmp_path):
    compare_launches(launch_two, stage, clips, trained, tmp_path)


# ---- interrupted runs ----


@pytest.mark.parametrize("stage", [pytest.param("i2e", marks=SLOW), pytest.param("vqvae", marks=SLOW), "unet"])
def test_four_steps_are_two_a_kill_and_two_more(stage, clips, trained, tmp_path):
    flags = [
        "--max_train_steps",
        "4",
        "--checkpointing_steps",
        "2",
        "--checkpoints_total_limit",
        "2",
        "--report_to",
        "none",
    ]
    flags += {"i2e": ["--disc_start", "1"], "vqvae": ["--disc_start", "1", "--ema_decay", "0.9"], "unet": []}[stage]
    straight, broken = (link(stage, trained, tmp_path / name) for name in ("straight", "broken"))
    succeed(command(stage, clips, straight, *flags))
    process = start(command(stage, clips, broken, *flags))
    printed = stop_at(process, "step=3 ", signal.SIGKILL)  # the checkpoint of step 2 is whole by then
    assert process.returncode == -signal.SIGKILL and not (broken / stage / stage).exists(), printed
    (broken / stage / "checkpoints" / "writing_00000004").mkdir(exist_ok=True)  # as a kill while saving leaves it
    assert "resumed at step 2" in succeed(command(stage, clips, broken, *flags))
    # Step 3 is logged again: that its losses are those of the straight run tells that it saw the same batch.
    assert rows(broken / stage) == rows(straight / stage)
    whole, resumed = (checkpoint(runs / stage / "checkpoints" / "step_00000004") for runs in (straight, broken))
    assert set(whole) == set(resumed) and any("shadow_params" in name for name in whole) == (stage != "i2e")
    assert any("exp_avg" in name for name in whole) and any("rng" in name or "random" in name for name in whole)
    assert [name for name in whole if not same(whole[name], resumed[name])] == []
    names = {path.name for path in (broken / stage / "checkpoints").iterdir()}
    assert names == {"step_00000002", "step_00000004"}


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_killed(clips, trained, tmp_path):
    flags = [
        "--max_train_steps",
        "4",
        "--checkpointing_steps",
        "2",
        "--revive_every",
        "3",
        "--disc_start",
        "1",
        "--report_to",
        "none",
    ]
    straight, broken = (link("vqvae", trained, tmp_path / name) for name in ("straight", "broken"))
    succeed(two_processes(arguments("vqvae", clips, straight, *flags)))
    process = start_launcher(two_processes(arguments("vqvae", clips, broken, *flags)))
    for line in process.stdout:
        if line.startswith("step=3 "):
            family = psutil.Process(process.pid)
            for member in (*family.children(recursive=True), family):
                member.kill()
            break
    process.stdout.close()
    process.wait()
    assert "resumed at step 2" in succeed(two_processes(arguments("vqvae", clips, broken, *flags)))
    assert rows(broken / "vqvae") == rows(straight / "vqvae")
    whole, resumed = (checkpoint(runs / "vqvae" / "checkpoints" / "step_00000004") for runs in (straight, broken))
    assert set(whole) == set(resumed) and any("random_states_1" in name for name in whole)
    assert [name for name in whole if not same(whole[name], resumed[name])] == []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=SLOW)])
def test_a_signal_saves_and_ends_the_run(number, code, clips, trained, tmp_path):
    flags = ["--max_train_steps", "400", "--checkpointing_steps", "1000", "--dataloader_num_workers", "1"]
    process = start(command("i2e", clips, tmp_path, *flags))
    printed = stop_at(process, "step=3 ", number)
    assert process.returncode == code, printed
    step = int(re.search(rf"stopped by {number.name} at step (\d+), which is saved", printed).group(1))
    assert 3 <= step < 400
    assert [path.name for path in (tmp_path / "i2e" / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    process = start(command("i2e", clips, tmp_path, *flags))
    assert f"resumed at step {step}" in stop_at(process, f"step={step + 1} ", number)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_launcher_saves(processes, clips, tmp_path):
    flags = ["--max_train_steps", "400", "--checkpointing_steps", "1000"]
    launcher = two_processes if processes == 2 else one_process
    process = start_launcher(launcher(arguments("i2e", clips, tmp_path, *flags)))
    printed = stop_at(process, "step=3 ", signal.SIGTERM)
    assert process.returncode != 0
    step = int(re.search(r"stopped by SIGTERM at step (\d+), which is saved", printed).group(1))
    assert [path.name for path in (tmp_path / "i2e" / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    process = start_launcher(launcher(arguments("i2e", clips, tmp_path, *flags)))
    assert f"resumed at step {step}" in stop_at(process, f"step={step + 1} ", signal.SIGTERM)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_always_goes_on(clips, trained, tmp_path):
    straight, broken = (link("vqvae", trained, tmp_path / name) for name in ("straight", "broken"))
    # A checkpoint at every step: most of the time goes into saving.
    flags = [
        "--max_train_steps",
        "40",
        "--checkpointing_steps",
        "1",
        "--checkpoints_total_limit",
        "2",
        "--report_to",
        "none",
    ]
    succeed(command("vqvae", clips, straight, *flags))
    rng = random.Random(0)
    reached, checkpoints = [], broken / "vqvae" / "checkpoints"
    for _ in range(20):
        process = start(command("vqvae", clips, broken, *flags))
        for line in process.stdout:
            if line.startswith(("step=", "resumed")):
                break
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.stdout.close()
        process.wait()
        whole = sorted(checkpoints.glob("step_*"))
        for folder in whole:
            assert checkpoint(folder)
            VQMAGANModel.from_pretrained(folder / "vqvae")
        reached.append(int(whole[-1].name[5:]) if whole else 0)
    assert reached == sorted(reached) and reached[-1] > 3
    succeed(command("vqvae", clips, broken, *flags))
    whole, resumed = (checkpoint(runs / "vqvae" / "checkpoints" / "step_00000040") for runs in (straight, broken))
    assert [name for name in whole if not same(whole[name], resumed[name])] == []
    assert rows(broken / "vqvae") == rows(straight / "vqvae")


def test_a_batch_that_breaks_training_is_saved(clips, tmp_path):
    done = launch(command("i2e", clips, tmp_path, "--learning_rate", "1e30", "--gradient_accumulation_steps", "2"))
    assert done.returncode == 1
    match = re.search(
        r"error: The gradient's norm is (nan|inf) at step (\d+); the batches that caused it are in (\S+)\.\n",
        done.stderr,
    )
    assert match, done.stderr
    batches = load_file(match.group(3))
    assert {name.split(".")[0] for name in batches} == {"pass_0", "pass_1"}
    assert batches["pass_1.frame_first"].shape == (2, 1, 32, 32) and batches["pass_0.events"].isfinite().all()
    assert "Traceback" not in done.stderr


# ---- options ----


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config", "giant"], "--config must be one of compact, motion, paper, tiny"),
        (["--max_train_steps", "5", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--max_train_steps", "1e5x"], "--max_train_steps must be of type int"),
        (["--max_train_steps", "0"], "--max_train_steps must be at least 1"),
        (["--max_train_steps", "true"], "--max_train_steps must be of type int"),
        (["--gaps", "0.5,0.5"], "--gaps must be of type"),
        (["--gaps", "[0, 0]"], "--gaps must be chances"),
        (["--validation_steps", "0"], "--validation_steps must be at least 1"),
        (["--frames", "1"], "--frames must be at least 2"),
        (["--resolution", "[1"], "--resolution must be of type int"),
        (["--resolutio", "64"], "unrecognized arguments: --resolutio 64"),
        (["--mixed_precision", "fp8"], "--mixed_precision must be one of (empty), no, bf16, fp16, but is 'fp8'"),
        (["--output_dir", ""], "--output_dir is required"),
        (["--learning_rate", "true"], "--learning_rate must be of type float"),
        (["--squared_weight", ".nan"], "--squared_weight must be at least 0, but is nan"),
    ],
)
def test_wrong_options_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(I2EOptions, "train_i2e", ["--config", "tiny", "--data", "x", "--output_dir", "y", *flags], "")
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("stage", OPTIONS)
def test_every_option_has_a_range_and_nothing_outside_of_it_is_taken(stage, capsys):
    free = {
        "data",
        "output_dir",
        "columns",
        "validation",
        "lpips_backbone",
        "push_to_hub",
        "hub_revision",
        "hub_message",
        "init",
        "i2e",
        "vqvae",
        "hint_source",
    }
    for field in dataclasses.fields(OPTIONS[stage]):
        default, allowed = field.default, field.metadata["allowed"]
        if isinstance(default, bool) or field.name in free:
            continue
        outside = {"less": -1, "infinite": float("inf")}
        outside.update(
            most=allowed.most and allowed.most + 1, less_than=allowed.less_than, more_than=allowed.more_than
        )
        if isinstance(default, str):
            outside = {"choices": "else"}
        for value in outside.values():
            if value is None or value == float("inf") and isinstance(default, int):
                continue
            if isinstance(default, tuple):
                value = [value] * len(default)
            text = yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()
            with pytest.raises(SystemExit):
                parse_options(
                    OPTIONS[stage],
                    stage,
                    ["--config", "tiny", "--data", "x", "--output_dir", "y", f"--{field.name}={text}"],
                    "",
                )
            assert f"error: --{field.name} must be {allowed}, but is " in capsys.readouterr().err, (field.name, value)
    with pytest.raises(SystemExit):
        parse_options(
            OPTIONS[stage], stage, ["--config", "tiny", "--data", "x", "--output_dir", "y", "--gaps", "[]"], ""
        )
    assert "--gaps must be" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["pipeline", "vqvae", "train_i2e", "scheduler", "unet"])
@pytest.mark.parametrize("content", [None, [], "text"])
def test_an_empty_section_is_one_without_keys(section, content, tmp_path, tiny, capsys):
    tiny[section] = content
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny))
    given = ["--config", str(path), "--data", "x", "--output_dir", "y"]
    if content is None and section != "scheduler":
        _, config = parse_options(I2EOptions, "train_i2e", given, "")
        assert config[section] == {}
        return
    with pytest.raises(SystemExit):
        parse_options(I2EOptions, "train_i2e", given, "")
    wanted = (
        "class must be a scheduler of diffusers"
        if content is None
        else f"must be a mapping of keys to values, but is {content!r}"
    )
    assert f"mine.yaml: section {section}" in (said := capsys.readouterr().err) and wanted in said


@pytest.mark.parametrize(
    "section, key, message",
    [
        ("train_i2e", "stepz", "section train_i2e: unknown key(s) stepz"),
        ("vqvae", "widths", "section vqvae: unknown key(s) widths"),
        ("unet", "widths", "section unet: unknown key(s) widths"),
        ("scheduler", "steps", "section scheduler: unknown key(s) steps"),
        ("pipeline", "steps", "section pipeline: unknown key(s) steps"),
        (None, "train_everything", "unknown section(s) train_everything"),
    ],
)
def test_unknown_keys_of_a_configuration_are_named(section, key, message, tmp_path, tiny, capsys):
    (tiny if section is None else tiny[section])[key] = 3
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny))
    with pytest.raises(SystemExit):
        parse_options(I2EOptions, "train_i2e", ["--config", str(path), "--data", "x", "--output_dir", "y"], "")
    assert message in capsys.readouterr().err


def test_flags_go_before_the_file_and_the_file_before_defaults():
    flags = [
        "--config",
        "tiny",
        "--data",
        "x",
        "--output_dir",
        "y",
        "--resolution",
        "64",
        "--compile",
        "--adam_betas",
        "[0.8, 0.95]",
    ]
    options, config = parse_options(VQMAGANOptions, "train_vq_magan", flags, "")
    assert (options.resolution, options.compile, options.adam_betas) == (64, True, (0.8, 0.95))
    assert options.train_batch_size == 2 and options.adam_weight_decay == 0.0 and config["vqvae"]["stem_stride"] == 2


def test_bad_input_is_one_message_without_a_traceback(clips, tmp_path):
    done = launch(command("i2e", clips, tmp_path, "--data", "/nowhere", "--report_to", "none"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: `data`: '/nowhere' is not of the format videos: there is no such folder.")


def test_a_finished_run_finishes_at_once_and_one_that_goes_on_says_what_changed(clips, trained, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(trained / "i2e", runs / "i2e")
    before = rows(runs / "i2e")
    logs = sorted((runs / "i2e" / "log").rglob("*"))
    assert len([path for path in logs if path.is_dir()]) == 1, "no folder but the one with TensorBoard's file"
    assert "resumed at step 20" in succeed(command("i2e", clips, runs))
    assert rows(runs / "i2e") == before and sorted((runs / "i2e" / "log").rglob("*")) == logs, (
        "a start that logs nothing leaves nothing"
    )
    done = launch(command("i2e", clips, runs, "--max_train_steps", "22", "--learning_rate", "1e-4"))
    assert done.returncode == 0 and len(rows(runs / "i2e")) == 22
    assert "changed since the last start: learning_rate was 0.002, is 0.0001" in done.stderr
    assert {float(row["learning_rate"]) for row in rows(runs / "i2e")[20:]} == {1e-4}, "and what changed has effect"


def test_what_is_asked_for_anew_takes_the_place_of_what_a_checkpoint_had(clips, trained, tmp_path):
    """Of the optimiser and the moving average, too; and copies of checkpoints are their owner's."""
    runs = link("unet", trained, tmp_path / "runs")
    shutil.copytree(trained / "unet", runs / "unet")
    saved = runs / "unet" / "checkpoints"
    shutil.copytree(saved / "step_00000020", saved / "step_00000020_keep")
    flags = ["--max_train_steps", "21", "--checkpoints_total_limit", "1", "--learning_rate", "1e-4"]
    flags += ["--adam_betas", "[0.5, 0.6]", "--adam_weight_decay", "0.3", "--ema_decay", "0.25"]
    done = launch(command("unet", clips, runs, *flags))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in saved.glob("step_*")} >= {"step_00000020_keep", "step_00000021"}
    state = torch.load(saved / "step_00000021" / "optimizer.bin", weights_only=True)["param_groups"][0]
    assert (state["betas"], state["weight_decay"]) == ((0.5, 0.6), 0.3) and state["initial_lr"] == state["lr"] == 1e-4
    kept = checkpoint(saved / "step_00000021")
    assert [value for name, value in kept.items() if name.endswith(".pkl/decay")] == [0.25]
    assert float(rows(runs / "unet")[20]["learning_rate"]) == 1e-4


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_schedulers_that_make_noise_in_their_own_way_are_for_sampling(name):
    settings = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    with pytest.raises(ValueError, match=f"class must be one for training, such as DDPMScheduler .*, but is {name}"):
        training_scheduler({"scheduler": {"class": name, **settings}})
    for fit in ("DDPMScheduler", "DDIMScheduler", "LCMScheduler"):
        assert type(training_scheduler({"scheduler": {"class": fit, **settings}})).__name__ == fit


def test_what_does_not_fit_is_said_before_training(clips, trained, tmp_path):
    news = yaml.safe_dump({**load_tiny_news(), "hint_source": "search"})
    (tmp_path / "news.yaml").write_text(news)
    other = load_config("tiny")
    other["unet"]["block_out_channels"], other["i2e"]["base_channels"] = [24, 32], 6
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    cases = [
        ("vqvae", ["--config", str(tmp_path / "news.yaml")], "`config` must be one without `news_latents`"),
        ("unet", ["--config", str(tmp_path / "news.yaml")], "`config` must be one without `news_latents`"),
        ("vqvae", ["--resolution", "36"], "`resolution` must be a multiple of 8, but is 36"),
        ("unet", ["--resolution", "40"], "`resolution` must be a multiple of 16, but is 40"),
        ("vqvae", ["--data", f"videos:{clips}@nan"], "the weight behind @ must be a positive number, but is 'nan'"),
    ]
    for stage, option in (("unet", "block_out_channels"), ("i2e", "base_channels")):
        init = str(trained / stage / stage)
        flags = ["--config", str(tmp_path / "other.yaml"), "--init", init]
        cases.append((stage, flags, f"`init`: `{option}` must be "))
    for number, (stage, flags, message) in enumerate(cases):
        runs = link(stage, trained, tmp_path / str(number))
        done = launch(command(stage, clips, runs, *flags))
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (flags, done.stderr)


def test_rows_are_appended_and_those_after_the_checkpoint_are_taken_back_once(tmp_path):
    path = tmp_path / "summary.csv"
    for step in range(1, 4):
        append_row(path, {"step": step, "loss": step / 2})
    written = path.stat()
    append_row(path, {"step": 4, "loss": 2.0})
    assert path.stat().st_ino == written.st_ino, "the same file, longer"
    append_row(path, {"step": 5, "loss": 2.5, "unreadable": 1})
    assert [row["unreadable"] for row in rows(tmp_path)] == ["", "", "", "", "1"]
    with path.open("a") as file:
        file.write("6,3.")  # killed while it wrote
    take_back_rows(path, 4)
    append_row(path, {"step": 5, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("1", "0.5"),
        ("2", "1.0"),
        ("3", "1.5"),
        ("4", "2.0"),
        ("5", "9.0"),
    ]
    take_back_rows(path, 0)
    take_back_rows(path, 0)
    assert list(tmp_path.iterdir()) == [], "nothing is left of a run that has no checkpoint yet"


def averaging(number: int) -> Trainer:
    """A trainer with nothing but a network of zeros, whose moving average stayed there while its weights became a number."""
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator, trainer.progress, trainer.options = Accelerator(cpu=True), Progress(), I2EOptions("", "")
    trainer.log = SimpleNamespace(write_validation=lambda means, count, pictures: None)
    trainer._model = torch.nn.Linear(2, 3)
    torch.nn.init.zeros_(trainer._model.weight)
    trainer.ema = EMAModel(trainer._model.parameters(), decay=0.9)
    torch.nn.init.constant_(trainer._model.weight, number)
    return trainer


def test_validation_is_of_the_average_and_the_best_is_better_than_those_before():
    trainer, scores = averaging(1), iter([0.5, 0.5, float("nan"), 0.4])

    def score(number: int, is_shown: bool) -> tuple:
        assert not trainer._model.weight.any()
        return {"l1": next(scores)}, None

    assert [trainer._validate(score, 1, "l1") for _ in range(4)] == [True, False, False, True]
    assert trainer.progress.best["l1"] == 0.4 and (trainer._model.weight == 1).all()


def test_the_average_of_a_code_that_was_moved_begins_where_it_is_now():
    trainer = averaging(1)
    trainer.reset_average(trainer._model.weight, torch.tensor([False, True, False]))
    with trainer.averaged_weights():
        assert trainer._model.weight.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_a_run_stops_where_it_is_told_to(clips, trained, tmp_path):
    runs = link("vqvae", trained, tmp_path / "runs")
    part = command(
        "vqvae",
        clips,
        runs,
        "--max_train_steps",
        "9",
        "--checkpointing_steps",
        "9",
        "--checkpoints_total_limit",
        "1",
        "--stop_step",
    )
    for _ in range(2):  # the same command again changes nothing
        printed = succeed([*part, "2"])
        assert "stopped at step 2 of 9, which is saved" in printed
        assert [path.name for path in (runs / "vqvae" / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert not (runs / "vqvae" / "vqvae").exists()
    succeed([*part, "3"])
    assert [path.name for path in (runs / "vqvae" / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_wider_layers_start_where_the_narrow_ones_ended(tiny):
    torch.manual_seed(0)
    trained = VQMAGANModel(**tiny["vqvae"], scaling_factor=0.5)
    for parameter in trained.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    wide = VQMAGANModel(**tiny["vqvae"], compare_warps=True)
    start_from(wide, trained)
    frames, hints = torch.rand(3, 2, 3, 32, 32) * 2 - 1, torch.randn(2, 2, tiny["vqvae"]["hint_channels"], 32, 32)
    with torch.no_grad():
        assert torch.allclose(wide(*frames, *hints).sample, trained(*frames, *hints).sample, atol=1e-5)
    assert wide.config.scaling_factor == 0.5
    alone = VQMAGANModel(**{**tiny["vqvae"], "match_neighbours": False})
    for parameter in alone.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    matching = VQMAGANModel(**tiny["vqvae"])
    start_from(matching, alone)
    told = VQMAGANModel(**{**tiny["vqvae"], "hint_channels": tiny["vqvae"]["hint_channels"] + 3})
    start_from(told, trained)
    more = torch.cat([torch.zeros(2, 2, 3, 32, 32), hints], dim=2)  # flow stays last
    with torch.no_grad():
        expected = trained(*frames, *hints).sample
        assert torch.allclose(matching(*frames, *hints).sample, alone(*frames, *hints).sample, atol=1e-5)
        assert torch.allclose(told(*frames, *more).sample, expected, atol=1e-5)
    # Flow, to which events come in front, and events alone, behind which flow comes; read by an encoder of hints or not.
    for encoder, with_flow in ((0, True), (4, True), (0, False), (4, False)):
        settings = {**tiny["vqvae"], "hint_encoder_channels": encoder, "offset_hints": with_flow}
        few, many = (VQMAGANModel(**{**settings, "hint_channels": count}) for count in (4, 9))
        for parameter in few.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        start_from(many, few)
        own, added = torch.randn(2, 2, 4, 32, 32), torch.randn(2, 2, 5, 32, 32)
        all_hints = torch.cat([added, own] if with_flow else [own, added], dim=2)
        with torch.no_grad():
            assert torch.allclose(many(*frames, *all_hints).sample, few(*frames, *own).sample, atol=1e-5)
    for other, message in (
        ({"refine_channels": tiny["vqvae"]["refine_channels"] + 4}, "`init` has .* for decoder.head.refine"),
        ({"refine_channels": 0}, "`init` has decoder.head.refine"),
        ({"hint_channels": 3}, "`init` has .* for decoder.mid_warp.offset_net.0.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            start_from(VQMAGANModel(**{**tiny["vqvae"], **other}), trained)


def test_two_runs_do_not_share_a_folder(clips, tmp_path):
    process = start(command("i2e", clips, tmp_path, "--max_train_steps", "100000"))
    for line in process.stdout:
        if line.startswith("step=2 "):
            break
    done = launch(command("i2e", clips, tmp_path))
    process.kill()
    process.stdout.close()
    process.wait()
    assert done.returncode == 2 and "is being written by another run" in done.stderr, done.stderr


def test_help_says_what_every_option_is_and_the_defaults_of_the_configuration(capsys):
    def printed(*flags: str) -> str:
        with pytest.raises(SystemExit):
            parse_options(VQMAGANOptions, "train_vq_magan", [*flags, "--help"], "")
        return " ".join(capsys.readouterr().out.split())

    assert (
        "--latent_noise LATENT_NOISE noise on the latents" in printed()
        and "sample; at least 0 (default: 0.0)" in printed()
    )
    assert "give way to those of --config" in printed()
    assert "sample; at least 0 (default: 0.5)" in printed("--config", "compact")
    assert "one of alex, vgg, none (default: 'alex')" in printed("--config", "compact")


def test_a_damaged_checkpoint_is_named_with_the_one_before(clips, trained, tmp_path):
    shutil.copytree(trained / "unet", tmp_path / "unet")
    runs = link("unet", trained, tmp_path)
    names = sorted(path.name for path in (runs / "unet" / "checkpoints").glob("step_*"))
    assert len(names) >= 2, "by default, one is left when the newest is damaged"
    newest = runs / "unet" / "checkpoints" / names[-1]
    (newest / "model.safetensors").write_bytes(b"damaged")
    again = command("unet", clips, runs, "--max_train_steps", "21", "--report_to", "none")
    done = launch(again)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{newest}, cannot be loaded; once it is moved away, the run goes on from {names[-2]}." in done.stderr
    shutil.rmtree(newest)
    assert f"from {newest.with_name(names[-2])}" in succeed(again)


def test_a_damaged_result_does_not_take_the_place_of_one_that_is_whole(clips, trained, tmp_path):
    shutil.copytree(trained / "unet", tmp_path / "unet")
    runs = link("unet", trained, tmp_path)
    newest = max((runs / "unet" / "checkpoints").glob("step_*"))
    name = "diffusion_pytorch_model.safetensors"
    before = (runs / "unet" / "unet" / name).read_bytes()
    (newest / "unet" / name).write_bytes(before[: len(before) // 2])
    again = command("unet", clips, runs, "--max_train_steps", str(int(newest.name[5:])), "--report_to", "none")
    done = launch(again)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{name} in {newest} is damaged" in done.stderr
    assert (runs / "unet" / "unet" / name).read_bytes() == before


# ---- losses ----


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


def test_every_stage_can_be_told_the_instant(clips, tmp_path):
    config = load_config("tiny")
    config["hint_source"], config["vqvae"]["hint_channels"], config["unet"]["in_channels"] = "flow", 2, 13
    config["vqvae"]["time_conditioned"], config["unet"]["class_embed_type"] = True, "timestep"
    (tmp_path / "timed.yaml").write_text(yaml.safe_dump(config))
    instants = [
        "--config",
        str(tmp_path / "timed.yaml"),
        "--any_time",
        "1",
        "--window",
        "5",
        "--max_train_steps",
        "2",
        "--validation",
        "",
    ]
    for stage in ("vqvae", "unet"):
        given = ["--vqvae", str(tmp_path / "vqvae" / "vqvae")] if stage == "unet" else []
        succeed(
            [
                sys.executable,
                "-m",
                f"training.{STAGES[stage]}",
                "--data",
                str(clips),
                "--output_dir",
                str(tmp_path / stage),
                *given,
                *instants,
            ]
        )
    pipeline = MADiffPipeline.from_pretrained(tmp_path / "unet" / "pipeline")
    assert pipeline.vqvae.config.time_conditioned and pipeline.unet.config.class_embed_type == "timestep"
    early, late = (
        pipeline(
            *[moving_picture(t) for t in (0, 4)],
            times=[time],
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).frames
        for time in (0.2, 0.8)
    )
    assert not np.array_equal(early, late)


def test_a_loader_that_fails_ends_the_run(clips, tmp_path):
    """Loader processes ignore SIGTERM, by which they would otherwise be ended, and waited for without an end."""
    flags = ("--resolution", "80", "--dataloader_num_workers", "1")
    process = subprocess.Popen(
        command("i2e", clips, tmp_path, *flags), cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "are smaller than `resolution` 80" in said


def test_a_disk_that_is_full_is_one_line(trained, clips, tmp_path):
    runs = link("unet", trained, tmp_path / "runs")
    wanted = " ".join(map(shlex.quote, command("unet", clips, runs)))
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 150; exec {wanted}"],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: `output_dir`: the checkpoint of step" in done.stderr and "cannot be written" in done.stderr
    assert not list((runs / "unet" / "checkpoints").iterdir()), "half of a checkpoint does not keep the disk full"


@pytest.mark.parametrize("name, value", [("window", "7"), ("any_time", "0.9"), ("lpips_net", "none")])
def test_options_that_the_event_generator_does_not_read_are_refused(clips, tmp_path, name, value):
    done = launch(command("i2e", clips, tmp_path, f"--{name}", value))
    assert done.returncode == 2 and f"`{name}` is not used by this stage" in done.stderr


def test_the_denoiser_has_the_layout_that_is_asked_for(trained, clips, tmp_path):
    (tmp_path / "script.py").write_text(layout_script("train_denoiser"))
    for layout, expected in (("true", "last"), ("false", "contiguous")):
        runs = link("unet", trained, tmp_path / layout)
        flags = ("--max_train_steps", "1", "--channels_last", layout)
        script_and_options = [str(tmp_path / "script.py"), *arguments("unet", clips, runs, *flags)[1:]]
        printed = succeed([sys.executable, *script_and_options], PYTHONPATH=str(REPOSITORY))
        assert f"{expected}\n" in printed


def test_a_generator_of_events_is_exported_as_it_was_trained():
    torch.manual_seed(0)
    model = EventGANModel(**load_config("tiny")["i2e"]).train()
    normalisation = StepwiseNormalisation(model, with_spectral_norm=True)
    frames = torch.rand(2, 2, 1, 32, 32)
    normalisation.begin_pass(first=True)
    model.eval()
    expected = model(*frames).events
    model.train()
    normalisation.fold()
    assert torch.equal(model.eval()(*frames).events, expected)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--samples", "0"], "`samples` must be 1 or more, but is 0"),
        (["--frames", "1"], "`frames` must be 2 or more, but is 1"),
        (["--resolution", "0"], "`resolution` must be 1 or more, but is 0"),
        (["--seed", "-1"], "`seed` must be 0 or more, but is -1"),
    ],
)
def test_scores_of_events_need_numbers_that_can_be(trained, clips, flags, message):
    known = ["--data", str(clips), "--i2e", str(trained / "i2e" / "i2e")]
    done = launch([sys.executable, "-m", "training.evaluate_i2e", *known, *flags])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_checkpoints_are_flushed_as_windows_wants_it(tmp_path, monkeypatch):
    """Its FlushFileBuffers refuses what is open for reading alone."""

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), Progress(), 2)
    checkpoints.save("unet", None)
    assert [path.name for path in checkpoints.saved()] == ["step_00000000"]


@pytest.mark.parametrize("left", [b"", b"\0" * 900, b"\t: {"])
def test_a_run_goes_on_whatever_is_left_of_its_former_options(clips, tmp_path, left):
    flags = ("--max_train_steps", "5", "--report_to", "none")
    assert launch(command("i2e", clips, tmp_path, *flags)).returncode == 0
    (tmp_path / "i2e" / "args.yaml").write_bytes(left)
    done = launch(command("i2e", clips, tmp_path, "--max_train_steps", "6", "--report_to", "none"))
    assert done.returncode == 0 and "args.yaml cannot be read" in done.stderr
    assert len(rows(tmp_path / "i2e")) == 6
    assert yaml.safe_load((tmp_path / "i2e" / "args.yaml").read_text())["max_train_steps"] == 6


def test_clips_that_went_during_a_run_are_one_line_with_loaders_too(clips, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for path in clips.iterdir():
        (gone / path.name).write_bytes(path.read_bytes())
    script = tmp_path / "script.py"
    script.write_text(
        "import shutil, sys\nfrom training import train_i2e\nfrom training.options import one_line_errors\n"
        "from training.trainer import Trainer\nbegin = Trainer._begin\n"
        f"def begun(self):\n    begin(self)\n    shutil.rmtree({str(gone)!r})\nTrainer._begin = begun\n"
        "with one_line_errors():\n    train_i2e.main(sys.argv[1:])\n"
    )
    flags = ("--cache_gib", "0", "--on_unreadable", "skip", "--dataloader_num_workers", "1", "--report_to", "none")
    asked = command("i2e", gone, tmp_path, *flags)
    done = launch([asked[0], str(script), *asked[3:]], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: `data`: 100 draws in a row met nothing that can be used" in done.stderr


def test_a_disk_that_is_full_at_the_end_is_one_line_and_loses_nothing(clips, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal, sys\nfrom training import train_i2e\nfrom training.options import one_line_errors\n"
        "from training.trainer import Trainer\nfinish = Trainer.finish\n"
        "def full(self, *given):\n    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n    finish(self, *given)\nTrainer.finish = full\n"
        "with one_line_errors():\n    train_i2e.main(sys.argv[1:])\n"
    )
    asked = command("i2e", clips, tmp_path, "--max_train_steps", "5", "--report_to", "none")
    done = launch([asked[0], str(script), *asked[3:]], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: `output_dir`: the result cannot be written" in done.stderr and "step_00000005" in done.stderr
    assert launch(asked).returncode == 0 and (tmp_path / "i2e" / "i2e" / "README.md").is_file()


def test_a_configuration_is_read_as_utf8(tmp_path, monkeypatch):
    text = (REPOSITORY / "training" / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    (tmp_path / "own.yaml").write_text(f"# Á\n{text}", encoding="utf-8")
    read = Path.read_text  # as on Windows, where another encoding is usual
    monkeypatch.setattr(Path, "read_text", lambda self, encoding="cp1252", *more: read(self, encoding, *more))
    given = ["--config", str(tmp_path / "own.yaml"), "--data", "x", "--output_dir", "y"]
    assert parse_options(I2EOptions, "train_i2e", given, "")[0].frames == 3
