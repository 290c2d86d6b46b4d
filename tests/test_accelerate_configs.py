"""The launch configurations parse, and their plugins build, as `accelerate launch` does it, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from diffusers import UNet2DModel
from diffusers.utils import is_accelerate_version, is_torch_version

from tests.conftest import REPOSITORY, load_config
from tests.processes import run_python


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
    arguments = parsed(
        "multi_node.yaml",
        "--machine_rank",
        "2",
        "--num_machines",
        "3",
        "--num_processes",
        "24",
        "--main_process_ip",
        "10.0.0.1",
    )
    assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes) == (2, 3, 24)
    assert arguments.main_process_ip == "10.0.0.1"


needs_fsdp2 = pytest.mark.skipif(
    is_accelerate_version("<", "1.6") or is_torch_version("<", "2.8"),
    reason="FSDP2, on a CPU too, needs newer versions",
)


@needs_fsdp2
def test_fsdp_plugin(monkeypatch):
    for name, value in prepare_multi_gpu_env(parsed("fsdp.yaml")).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"].lower() == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing
    network = UNet2DModel(**load_config("tiny")["unet"])
    plugin.set_auto_wrap_policy(network)
    wrapped = [
        module for module in network.modules() if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0)
    ]
    assert {type(module).__name__ for module in wrapped} == {"ResnetBlock2D", "Attention"}


CHILD = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from tests.conftest import load_config
mesh = init_device_mesh("cpu", (1,))
settings = load_config("tiny")["unet"]
network = UNet2DModel(**settings)
for module in list(network.modules()):
    if isinstance(module, (ResnetBlock2D, Attention)):
        fully_shard(module, mesh=mesh)
fully_shard(network, mesh=mesh)
loss = network(torch.randn(2, settings["in_channels"], 8, 8), torch.tensor([3, 900])).sample.square().mean()
loss.backward()
assert all(p.grad is not None for p in network.parameters())
print("sharded")
"""


@needs_fsdp2
def test_the_denoiser_can_be_sharded():
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run_python([sys.executable, "-c", CHILD], cwd=REPOSITORY, env=environment)
    assert done.stdout.strip().endswith("sharded"), done.stderr


def test_deepspeed_plugin(monkeypatch):
    pytest.importorskip("deepspeed")
    arguments = parsed("deepspeed_zero2.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""  # as the launcher sets it for what flags do not override
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    for name, value in environment.items():
        if name.startswith("ACCELERATE"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2


def test_slurm_script_is_shell():
    done = subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (FOLDER / "slurm.sh").read_text()
    assert "--signal=TERM" in script and "multi_node.yaml" in script
