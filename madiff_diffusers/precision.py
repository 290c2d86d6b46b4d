# SPDX-License-Identifier: Apache-2.0
"""Which number type the networks are fastest in, on which device."""

from typing import Union

import torch


def fastest_dtype(device: Union[str, torch.device]) -> torch.dtype:
    """The dtype that a device computes in fastest by itself: bfloat16 on a CPU with AMX or AVX512-BF16 and on a GPU that has it, float16
    on other CUDA GPUs, else float32. Frames, offsets and hints stay in float32 whatever the networks' dtype."""
    kind = torch.device(device).type
    if kind == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if kind == "cuda":
        # Without emulation, which is slower than float16.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32
