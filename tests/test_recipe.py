"""The recipe of the shipped checkpoint: its commands, and that the first steps give what its tables say."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from madiff_diffusers import VQMAGANModel
from tests.conftest import REPOSITORY, load_config
from training.options import check_config, parse_options
from training.train_denoiser import DenoiserOptions
from training.train_i2e import I2EOptions
from training.train_vq_magan import VQMAGANOptions


RECIPE = REPOSITORY / "training" / "recipes" / "madiff-compact"
OPTIONS = {"train_i2e": I2EOptions, "train_vq_magan": VQMAGANOptions, "train_denoiser": DenoiserOptions}


def table(name: str) -> list:
    with (RECIPE / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def commands() -> dict:
    """The stages of the script by the folder that each writes: its module and flags."""
    text = (RECIPE / "train.sh").read_text().replace("\\\n", " ")
    shared = " ".join(re.search(r"^fine=\((.*?)\)$", text, flags=re.MULTILINE | re.DOTALL)[1].split())
    text = text.replace('"${fine[@]}"', shared)
    found = re.findall(r"^(?:stage|two) (\S+) training\.(\S+) (.*)$", text, flags=re.MULTILINE)
    return {part.split("/")[0]: (module, shlex.split(flags)) for part, module, flags in found}


def test_every_command_is_understood_and_has_its_table():
    found = commands()
    assert list(found) == ["i2e", "vqvae_base", "vqvae_fine", "vqvae", "unet"]
    for name, (module, flags) in found.items():
        flags = [flag.replace("$recipe", str(RECIPE)) for flag in flags]
        options, config = parse_options(
            OPTIONS[module], module, [*flags, "--data", "clips", "--output_dir", "runs"], ""
        )
        check_config(config)
        last = table(name)[-1]
        assert (
            int(last["step"]) <= options.max_train_steps
            and int(last["step"]) > (options.stop_step or options.max_train_steps) - options.log_steps
        )
        assert int(last["samples"]) % (int(last["step"]) * options.train_batch_size) == 0


def test_the_configuration_is_that_of_the_shipped_networks():
    folder = REPOSITORY / "madiff_diffusers" / "checkpoints" / "madiff-compact"
    index = json.loads((folder / "model_index.json").read_text())
    assert load_config("compact")["pipeline"].items() <= index.items()
    shipped = VQMAGANModel.load_config(folder / "vqvae")
    for key, value in load_config("compact")["vqvae"].items():
        assert shipped[key] == value, key
    final = load_config("compact")["vqvae"]
    for earlier in ("base", "fine"):
        config = yaml.safe_load((RECIPE / f"{earlier}.yaml").read_text())["vqvae"]
        assert {key: final[key] for key in config} == config, "later stages start from its weights"


@pytest.mark.slow
def test_the_first_steps_are_those_of_the_tables(shared_data, tmp_path):
    """Bit for bit on the machine that trained it; sums are rounded otherwise on another."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    shipped = REPOSITORY / "madiff_diffusers" / "checkpoints" / "madiff-compact"
    places = {
        "$recipe": str(RECIPE),
        "$features": str(shared_data / "weights" / "lpips_alexnet_features.safetensors"),
        "$out/i2e/i2e": str(shipped / "i2e"),  # rounded to half precision
    }
    clips = tmp_path / "clips"
    clips.mkdir()
    with (RECIPE / "clips.tsv").open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            (clips / row["file"]).symlink_to(shared_data / "train" / "open" / row["file"])
    for name in ("i2e", "vqvae_base"):
        module, flags = commands()[name]
        for place, path in places.items():
            flags = [flag.replace(place, path) for flag in flags]
        flags = [
            *flags,
            "--data",
            str(clips),
            "--output_dir",
            str(tmp_path / name),
            "--dataloader_num_workers",
            "1",
            "--stop_step",
            "50",
        ]
        subprocess.run(
            [sys.executable, "-m", f"training.{module}", *flags], cwd=REPOSITORY, env=environment, check=True
        )
        with (tmp_path / name / "summary.csv").open(newline="") as file:
            made = {key: float(value) for key, value in next(csv.DictReader(file)).items()}
        expected = {key: float(value) for key, value in table(name)[0].items()}
        assert made == pytest.approx(expected, rel=0.02, abs=1e-3)
