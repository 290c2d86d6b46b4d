"""Networks on overlapping tiles."""

import os
import platform
import sys

import cv2
import numpy as np
import pytest
import torch

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.hint_registry import build_hint_source
from madiff_diffusers.hub_repository import bundled_checkpoints
from madiff_diffusers.tiling import TILE_PIXELS, Tiling
from madiff_diffusers.video.memory import bytes_per_pixel, memory_errors, tile_pixels_for
from tests.conftest import moving_picture, photograph
from tests.processes import run_python


@pytest.mark.parametrize(
    "height, width", [(64, 64), (256, 1920), (1088, 1920), (2176, 3840), (3840, 2176), (448, 320), (64, 8192)]
)
@pytest.mark.parametrize("pixels", [1, 100_000, 400_000, 1_500_000])
def test_tiles_cover_a_frame_and_overlap(height, width, pixels):
    tiling = Tiling(pixels, 64)
    rows, columns = tiling.tiles(height, width)
    largest = max(b - a for a, b in rows) * max(b - a for a, b in columns)
    assert largest <= max(pixels, 256 * 256) or len(rows) == len(columns) == 1
    for spans, length in ((rows, height), (columns, width)):
        assert spans[0][0] == 0 and spans[-1][1] == length and all(start % 64 == 0 for start, _ in spans)
        assert all(before[1] - after[0] >= 64 for before, after in zip(spans, spans[1:]))


@pytest.mark.parametrize("height, width", [(288, 512), (352, 640), (1088, 440)])
def test_what_fits_a_tile_is_not_cut(height, width):
    """Guesses and frames for events may be half as large as what frames are padded to."""
    assert Tiling(480_000, 64).tiles(height, width) == ([(0, height)], [(0, width)])


@pytest.mark.parametrize("height, width", [(704, 1216), (1088, 256), (320, 320)])
def test_tiles_are_put_together_where_they_were(height, width):
    image, coarse = torch.rand(1, 3, height, width), torch.rand(1, 4, height // 32, width // 32)
    seen = []

    def network(tile, image, coarse):
        seen.append(image.shape[-2:])
        return [image * 2, coarse, torch.nn.functional.avg_pool2d(image, 8)]

    doubled, same, small = Tiling(1, 64)(network, [image, coarse], height, width)
    assert len(seen) > 1 and max(seen)[0] <= 320
    assert (doubled - 2 * image).abs().max() < 1e-5 and (same - coarse).abs().max() < 1e-5
    assert (small - torch.nn.functional.avg_pool2d(image, 8)).abs().max() < 1e-5


@pytest.mark.parametrize("name", bundled_checkpoints())
def test_fast_motion_is_followed_across_the_borders_of_tiles(name):
    """A pan of 100 pixels, which is more than tiles overlap by."""
    pipeline = MADiffPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    picture = cv2.resize(photograph(), (1200, 800), interpolation=cv2.INTER_AREA)
    prev, truth, next_ = (np.ascontiguousarray(picture[200:520, 200 + shift : 840 + shift]) for shift in (0, 50, 100))

    def error() -> np.ndarray:
        made = pipeline(
            prev, next_, generator=torch.Generator().manual_seed(0), output_type="np", hint_policy="start"
        ).frames[0, 0]
        return ((made * 255 - truth)[:, 100:-100] ** 2).mean()

    whole = error()
    pipeline.enable_tiling(256 * 256)
    assert len(pipeline.tiling.tiles(320, 640)[1]) > 2
    assert error() - whole <= 1.6, "squared grey levels that tiles add, whatever whole frames lack"


@pytest.mark.parametrize("name", bundled_checkpoints())
def test_tiled_frames_are_what_whole_ones_are(name):
    """The shipped networks; the least tiles that there can be."""
    pipeline = MADiffPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    frames = [moving_picture(time, 320, 576) for time in (-1, 1)]

    def made() -> np.ndarray:
        return pipeline(*frames, generator=torch.Generator().manual_seed(0), output_type="np").frames[0, 0] * 255

    whole = made()
    pipeline.enable_tiling(1)
    rows, columns = pipeline.tiling.tiles(320, 576)
    assert len(rows) > 1 and len(columns) > 1
    tiled = made()
    error = np.abs(tiled - whole)
    border = np.zeros(error.shape[:2], bool)
    for start, end in columns:
        border[:, max(0, start - 2) : start + 2] = border[:, end - 2 : end + 2] = True
    for start, end in rows:
        border[max(0, start - 2) : start + 2] = border[end - 2 : end + 2] = True
    assert error[~border].mean() <= 1 and error[border].mean() <= 1
    # A step at a border would be a difference from pixel to pixel that the whole frame has not.
    for axis, spans in ((1, columns), (0, rows)):
        steps = np.abs(np.diff(tiled - whole, axis=axis)).mean(axis=(1 - axis, 2))
        for start, end in spans:
            for place in (start, end):
                if 0 < place < len(steps):
                    assert steps[place - 1] <= 2 * steps.mean() + 0.1
    pipeline.disable_tiling()
    assert np.array_equal(made(), whole)
    for wrong in (0, 1e4, float("nan"), "1M"):
        with pytest.raises(ValueError, match="`tile_pixels` must be a positive integer, but is"):
            pipeline.enable_tiling(wrong)


def test_tiles_fit_a_memory(pipeline):
    each = bytes_per_pixel(pipeline)
    assert each == bytes_per_pixel(pipeline) and each > 500
    assert tile_pixels_for(pipeline, 640 * 480, 8 * 2**30) is None
    four_k = 3840 * 2160
    tiles = [tile_pixels_for(pipeline, four_k, gigabytes * 2**30) for gigabytes in (1, 5, 8)]
    for size, one_by_one in ((tiles[1], True), (tiles[2], False)):
        assert build_hint_source("fine_flow", tiling=Tiling(size, 64)).one_by_one == one_by_one
    assert tiles[0] == 1 < tiles[1] < tiles[2] == TILE_PIXELS


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
@pytest.mark.parametrize("take", [lambda: torch.empty(2**60), lambda: np.empty(2**60, np.uint8)])
def test_errors_of_memory_are_of_one_kind(take):
    """Of a CPU, torch's has no class of its own."""
    with pytest.raises(MemoryError, match="^there is not enough memory: .*allocate") as caught, memory_errors():
        take()
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="size of tensor"), memory_errors():
        torch.ones(2) + torch.ones(3)


def test_freed_memory_is_given_back_at_the_end():
    code = (
        "import numpy as np\n"
        "from madiff_diffusers.video.memory import freed_memory_kept\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 // 2**20\n"
        "def take(count, size): [np.ones(size * 2**20, np.uint8) for _ in range(count)]\n"
        "take(1, 64); before = resident()\n"
        "with freed_memory_kept(sparing=True):\n"
        "    take(1, 64); whole = resident() - before\n"
        "    take(6, 16); tiles = resident() - before\n"
        "given_back = resident() - before\n"
        "with freed_memory_kept(sparing=False): take(1, 64); kept = resident() - before\n"
        "print(whole, tiles, given_back, kept, resident() - before)"
    )
    result = run_python([sys.executable, "-c", code])
    whole, tiles, given_back, kept, after = map(int, result.stdout.split())
    assert whole < 8 and tiles >= 90 and given_back < 8, result.stderr
    assert kept >= 60 and after < 8, result.stderr
    own = run_python([sys.executable, "-c", code], env={**os.environ, "MALLOC_ARENA_MAX": "4"})
    assert int(own.stdout.split()[3]) < 8, "settings of the user's own are left as they are"
