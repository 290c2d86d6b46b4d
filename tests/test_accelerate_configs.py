"""The launch configurations parse, and their plugins build, as `accelerate launch` does it, without a GPU."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "training" / "accelerate"


def parsed(name: str, *flags: str):
    arguments = ["--config_file", str(FOLDER / name), *flags, "-m", "training.train_denoiser", "--config", "paper"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_parsed(path: Path):
    arguments = parsed(path.name)
    assert arguments.mixed_precision == "bf16" and arguments.training_script == "training.train_denoiser"
    assert arguments.training_script_args == ["--config", "paper"]
    assert arguments.num_processes == (32 if path.stem == "multi_node" else 8)
    kinds = {"ddp": "multi_gpu", "multi_node": "multi_gpu", "fsdp": "use_fsdp", "deepspeed_zero2": "use_deepspeed"}
    for kind in set(kinds.values()):
        assert getattr(arguments, kind) == (kind == kinds[path.stem])


def test_nodes_are_told_apart_by_flags():
    arguments = parsed("multi_node.yaml", "--machine_rank", "2", "--num_machines", "3", "--num_processes", "24", "--main_process_ip", "10.0.0.1")
    assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes) == (2, 3, 24)
    assert arguments.main_process_ip == "10.0.0.1"


def test_fsdp_plugin(monkeypatch):
    for name, value in prepare_multi_gpu_env(parsed("fsdp.yaml")).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"].lower() == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.min_num_params == 1_000_000 and not plugin.activation_checkpointing


def test_deepspeed_plugin(monkeypatch):
    pytest.importorskip("deepspeed")
    arguments = parsed("deepspeed_zero2.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""  # as the launcher sets it for what flags do not override
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    for name, value in environment.items():
        if name.startswith("ACCELERATE"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2 and plugin.gradient_clipping == 1.0
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2


def test_slurm_script_is_shell():
    done = subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (FOLDER / "slurm.sh").read_text()
    assert "--signal=TERM" in script and "multi_node.yaml" in script
