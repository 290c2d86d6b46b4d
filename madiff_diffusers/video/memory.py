"""The memory that the interpolation of frames takes, measured on a small frame; the tiles that keep it below a limit; and freed memory that
is kept."""

import ctypes
import os
import platform
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..pipeline_madiff import MADiffPipeline
from ..tiling import TILE_PIXELS
from .interpolation import without_bar


PROBE = 256  # Height and width of the frame that memory is measured on.

# Bytes by which the process grows for each byte of tensors: convolutions have buffers of their own, and freed memory is kept (1.8 were measured).
BESIDE_TENSORS = 2.5
PROCESS_BYTES = 1.1e9  # Memory of a process that has made no frame: torch, and the weights of a small checkpoint.
FRAME_BYTES = 250  # Memory for each pixel of frames that wait to be used or encoded, and of the encoder.
WHOLE_BYTES = 200  # Memory for each pixel of motion hints and features, which are of the whole frame even with tiles.
USUAL_MEMORY = 8 * 2**30  # Bytes that the process may take, where nothing else is said.
USUAL_PIXELS = 2**21  # Of a frame: the networks that ship need less than `USUAL_MEMORY` for so many.
MOST_PAIRS = 8  # Pairs of frames that are made at once of themselves.
# Of torch's CPUs, on Windows too, and of Apple's GPUs.
_NO_MEMORY = ("can't allocate memory", "DefaultCPUAllocator: not enough memory", "MPS backend out of memory")
LARGEST_KEPT = 32 * 2**20  # Bytes: the largest block that glibc can be told to keep when larger ones are given back.


class _LiveBytes(TorchDispatchMode):
    """Counter of the bytes of tensors that are made inside it: `now`, and `most` of all times."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return result

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def lacks_memory(error: BaseException) -> bool:
    """Whether an error tells that there is not enough memory: NumPy's, torch's of a GPU, or torch's of a CPU, which has no class of its own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Every error that tells of too little memory is a `MemoryError` of one line.

    Raises:
        MemoryError: for those of `lacks_memory`.
    """
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise MemoryError(f"there is not enough memory: {' '.join(str(error).split()) or 'none is left'}") from error


def bytes_per_pixel(pipeline: MADiffPipeline, steps: int | None = None) -> float:
    """Measure, on a small frame, the bytes for each pixel that the interpolation of a frame takes."""
    frame = torch.zeros(1, 3, PROBE, PROBE)
    with _LiveBytes() as tensors, without_bar(pipeline):
        pipeline(frame, frame, num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(0))
    return tensors.most * BESIDE_TENSORS / PROBE**2


def free_gpu_bytes(device: torch.device) -> int:
    """Memory of a GPU that tensors could take: what is free, and what torch keeps of tensors that are gone."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tile_pixels_for(
    pipeline: MADiffPipeline,
    pixels: int,
    max_memory: int = USUAL_MEMORY,
    steps: int | None = None,
    at_once: int = 1,
) -> int | None:
    """
    Choose the size of tiles with which a process stays below a limit of memory; on a GPU, with which the networks fit into its own.

    Args:
        pipeline: the pipeline that makes the frames.
        pixels: the number of pixels of a frame.
        max_memory: bytes that the process may take in all.
        steps: sampling steps; the checkpoint's own if not given.
        at_once: the number of frames that are made at once.

    Returns:
        the number of pixels of a tile, or None if no tiles are needed.
    """
    if pixels <= PROBE**2:
        return None
    device = pipeline._execution_device
    each = at_once * bytes_per_pixel(pipeline, steps)
    if device.type == "cuda":
        left, most = float(free_gpu_bytes(device)), pixels
    else:
        left, most = max_memory - PROCESS_BYTES - pixels * FRAME_BYTES * at_once, TILE_PIXELS
    if pixels * each <= left:
        return None
    # Hints, features and frames are whole, however small the tiles.
    left -= pixels * WHOLE_BYTES * at_once
    return max(1, min(most, int(left / each)))


def pairs_that_fit(pipeline: MADiffPipeline, pixels: int, steps: int | None = None) -> int:
    """
    Choose how many pairs of frames are made at once: on an NVIDIA GPU, which small batches leave idle, as many as its memory holds; elsewhere
    one, which is as fast on a CPU.

    Args: as for `tile_pixels_for`.
    """
    device = pipeline._execution_device
    if device.type != "cuda":
        return 1
    return max(1, min(MOST_PAIRS, int(free_gpu_bytes(device) / (pixels * bytes_per_pixel(pipeline, steps)))))


@contextmanager
def freed_memory_kept(sparing: bool) -> Iterator[None]:
    """
    Let the C library keep freed memory for a while: all of it, or if `sparing` what tiles free, but not what is of whole frames.

    glibc gives large blocks back to the system as soon as they are freed, and the system clears them anew for the next layer, which
    takes up to a third of the time of large frames. Other C libraries are left as they are, and so are settings of the user's own.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    if sparing:
        library.mallopt(mmap_threshold, LARGEST_KEPT)
        library.mallopt(trim_threshold, 2**30)
    else:
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        # To where glibc's own thresholds go once large blocks were freed: after a call they no longer move by themselves.
        library.mallopt(mmap_max, 65536)
        library.mallopt(mmap_threshold, LARGEST_KEPT)
        library.mallopt(trim_threshold, 64 * 2**20)
        library.malloc_trim(0)


@contextmanager
def tiled(pipeline: MADiffPipeline, tile_pixels: int | None) -> Iterator[None]:
    """Give a pipeline tiles of that many pixels for a while; with None, it keeps what tiles it has."""
    before = pipeline.tiling
    if tile_pixels is not None:
        pipeline.enable_tiling(tile_pixels)
    try:
        yield
    finally:
        pipeline.tiling = before
