"""How long the networks of a step of sampling take on the CPU in torch, compiled by torch, in onnxruntime and in OpenVINO.

    python -m benchmarks.runtimes --size 640x480
    python -m benchmarks.runtimes --config training/configs/motion.yaml   # untrained networks: the time is the same

Every network runs alone, on the same threads, in one runtime after the other: several rounds that do not count, then the median of
those that do. Both neighbours are encoded in one batch. Needs onnxruntime and openvino, and a C++ compiler for torch.compile.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pipeline import parse_count, parse_size, table
from madiff_diffusers.commands.common import DEFAULT_CHECKPOINT, CommandError, checkpoint_folder, load_pipeline
from madiff_diffusers.evaluation.runs import describe_environment
from madiff_diffusers.onnx_export import Graph, Tensors, build_graphs, example_tensors, export_onnx, frame_multiple


Runner = Callable[[], Sequence[Any]]
WARM_UP = 2


def in_torch(graph: Graph, inputs: Tensors, path: Path, threads: int) -> Runner:
    # The pipeline's layout.
    given = {
        name: each.contiguous(memory_format=torch.channels_last) if each.ndim == 4 else each
        for name, each in inputs.items()
    }
    return lambda: graph(given)


def compiled(graph: Graph, inputs: Tensors, path: Path, threads: int) -> Runner:
    torch.compiler.reset()
    return in_torch(torch.compile(graph, fullgraph=True, dynamic=False), inputs, path, threads)


def in_onnxruntime(graph: Graph, inputs: Tensors, path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {name: each.numpy() for name, each in inputs.items()}
    return lambda: session.run(None, given)


def in_openvino(graph: Graph, inputs: Tensors, path: Path, threads: int) -> Runner:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    given = {name: each.numpy() for name, each in inputs.items()}
    return lambda: list(model(given).values())


RUNTIMES: dict[str, Callable[[Graph, Tensors, Path, int], Runner]] = {
    "torch": in_torch,
    "torch.compile": compiled,
    "onnxruntime": in_onnxruntime,
    "OpenVINO": in_openvino,
}


def measure(run: Runner, rounds: int) -> tuple[float, list[np.ndarray]]:
    """Median seconds, and what came out."""
    seconds = []
    for _ in range(WARM_UP + rounds):
        start = time.perf_counter()
        values = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:]), [np.asarray(each) for each in values]


def networks_of(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """VQ-MAGAN, U-Net, scheduler and hint model, of a checkpoint or of a training configuration."""
    if args.config is None:
        pipeline = load_pipeline(checkpoint_folder(args.checkpoint), "cpu", torch.float32)
        return pipeline.vqvae, pipeline.unet, pipeline.scheduler, getattr(pipeline, "hint_model", None)
    import diffusers
    import yaml

    from madiff_diffusers.motion_flow import MotionHintModel
    from madiff_diffusers.vq_magan import VQMAGANModel

    try:
        config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
        scheduler = dict(config["scheduler"])
        return (
            VQMAGANModel(**config["vqvae"]),
            diffusers.UNet2DModel(**config["unet"]),
            getattr(diffusers, scheduler.pop("class"))(**scheduler),
            MotionHintModel(**config["hint_model"]) if "hint_model" in config else None,
        )
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CommandError(
            f"--config must be a training configuration, but {str(args.config)!r} is not: {error}"
        ) from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        type=parse_size,
        default=(640, 480),
        metavar="WxH",
        help="of the frames, padded as the networks need it (default: 640x480)",
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="C", help="as for `madiff interpolate`")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="measure the untrained networks of this training configuration instead",
    )
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="DIR",
        help="graphs of the same networks, by `madiff export --onnx` (default: made anew, which takes minutes)",
    )
    parser.add_argument(
        "--threads", type=parse_count, metavar="N", help="of every runtime (default: as torch chooses)"
    )
    parser.add_argument("--rounds", type=parse_count, default=7, metavar="N", help="that medians are of (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, too")
    args = parser.parse_args(argv)
    missing = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"needs packages that are not installed: pip install {' '.join(missing)}")
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"argument --json: must be a file in a folder that is there, but is {str(args.json)!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    try:
        vqvae, unet, scheduler, hint_model = networks_of(args)
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.onnx
            if folder is None:
                folder = Path(temporary)
                export_onnx(folder, vqvae, unet, scheduler, hint_model)
            graphs = build_graphs(vqvae, unet, hint_model)
            absent = [name for name in graphs if not (folder / f"{name}.onnx").is_file()]
            if absent:
                raise CommandError(
                    f"--onnx must hold graphs of these networks, but {str(folder)!r} lacks {absent[0]}.onnx"
                )
            seconds, differences, size = compare(
                graphs, folder, args.size, frame_multiple(vqvae, unet, hint_model), threads, args.rounds
            )
    except (CommandError, ImportError, ValueError) as error:
        parser.error(str(error))

    environment = describe_environment(processes=1)
    print(
        f"{size[0]}x{size[1]}, float32, {threads} threads: {environment['hardware']['cpu']}, torch {torch.__version__}\n"
    )
    rows = [[name, *(f"{own[runtime]:.4f}" for runtime in RUNTIMES)] for name, own in seconds.items()]
    whole = {runtime: sum(own[runtime] for own in seconds.values()) for runtime in RUNTIMES}
    rows.append(["together", *(f"{each:.4f}" for each in whole.values())])
    rows.append(["largest difference", *(f"{each:.0e}" if each else "–" for each in differences.values())])
    table(["seconds", *RUNTIMES], rows)
    fastest = min(whole, key=whole.get)
    print(f"The fastest together is {fastest}: {whole['torch'] / whole[fastest]:.2f} times as fast as torch")
    if args.json is not None:
        result = {
            "size": "x".join(map(str, size)),
            "rounds": args.rounds,
            "seconds": seconds,
            "differences": differences,
            "environment": environment,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def compare(
    graphs: dict[str, Graph], folder: Path, asked: tuple[int, int], multiple: int, threads: int, rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, float], tuple[int, int]]:
    """Median seconds by graph and runtime; each runtime's largest difference from torch, of all that the graphs give; and the frames'
    width and height, padded."""
    width, height = (side + -side % multiple for side in asked)
    tensors = example_tensors(graphs, (height, width))
    seconds: dict[str, dict[str, float]] = {}
    differences = dict.fromkeys(RUNTIMES, 0.0)
    for name, graph in graphs.items():
        seconds[name] = {}
        inputs = {each: tensors[each].contiguous() for each in graph.inputs}
        graph.to(memory_format=torch.channels_last)
        for runtime, prepare in RUNTIMES.items():
            run = prepare(graph, inputs, folder / f"{name}.onnx", threads)
            seconds[name][runtime], values = measure(run, rounds)
            if runtime == "torch":
                expected = values
            found = max(float(np.abs(mine - theirs).max()) for mine, theirs in zip(values, expected))
            differences[runtime] = max(differences[runtime], found)
            del run
            gc.collect()  # threads of one runtime that wait would slow the next
    return seconds, differences, (width, height)


if __name__ == "__main__":
    main()
