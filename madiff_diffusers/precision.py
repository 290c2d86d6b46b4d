# SPDX-License-Identifier: Apache-2.0
"""Which device the networks run on unless told otherwise, and which number type they are fastest in there."""

import platform

import torch


def fastest_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype that a device computes in fastest by itself: bfloat16 on a CPU with AMX or AVX512-BF16 and on a GPU that has it, float16
    on other CUDA GPUs, else float32. Frames, offsets and hints stay in float32 whatever the networks' dtype."""
    kind = torch.device(device).type
    if kind == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if kind == "cuda":
        # Without emulation, which is slower than float16. What is asked is asked of the current GPU.
        with torch.cuda.device(torch.device(device)):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def is_emulated(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes in a dtype by way of another and so more slowly: bfloat16 on an x86 CPU without AMX and AVX512-BF16. Nothing is
    known of other CPUs."""
    is_x86 = torch.device(device).type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return is_x86 and dtype == torch.bfloat16 and fastest_dtype(device) != dtype


def best_device() -> torch.device:
    """The first that is there of a CUDA GPU (or AMD's by the same name), Apple's MPS and Intel's XPU; else the CPU."""
    for name, is_there in (
        ("cuda", torch.cuda.is_available),
        ("mps", torch.backends.mps.is_available),
        ("xpu", torch.xpu.is_available),
    ):
        if is_there():
            return torch.device(name)
    return torch.device("cpu")
