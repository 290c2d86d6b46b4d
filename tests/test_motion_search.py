import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from madiff_diffusers import MADiffPipeline, SearchHints, build_hint_source, motion_search
from madiff_diffusers.motion_search import search_flow
from madiff_diffusers.warping import warp
from tests.conftest import REPOSITORY, build_pipeline, drifting, moving_patch


def inner(hints: torch.Tensor) -> torch.Tensor:
    return hints[..., 16:-16, 16:-16]


@pytest.mark.parametrize("finest_scale", [0, 1])
@pytest.mark.parametrize("time", [0.5, 0.25, 2 / 3])
def test_flow_of_any_instant_leads_to_both_neighbours(time, finest_scale):
    prev, next_ = drifting(0, 4)
    hints_prev, hints_next = SearchHints(finest_scale).start(prev, next_, time)
    assert hints_prev.shape == hints_next.shape == (1, 2, 96, 128) and hints_prev.dtype == torch.float32
    whole = torch.tensor([12.0, 4.0]).view(1, 2, 1, 1)
    assert (inner(hints_prev) + time * whole).norm(dim=1).median() < 0.25
    assert (inner(hints_next) - (1 - time) * whole).norm(dim=1).median() < 0.25


@pytest.mark.parametrize("steps", [10, 20])
def test_motion_as_long_as_half_of_the_frame_is_found(steps):
    prev, next_ = drifting(0, steps)
    hints_prev, _ = SearchHints().start(prev, next_)
    way = 0.5 * steps * torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)
    seen_in_both = hints_prev[..., 20:-20, 32:-32]
    assert (seen_in_both + way).norm(dim=1).median() < 0.5


def test_a_plain_thing_moves_as_a_whole():
    """In its middle nothing tells how it moves but that it is not what is around it."""
    ground = drifting(0, height=160, width=224)[0]
    frames = []
    for left in (60, 76, 92):
        frame = ground.clone()
        frame[..., 50:110, left : left + 60] = torch.tensor([0.8, -0.6, -0.4]).view(1, 3, 1, 1)
        frames.append(frame)
    prev, mid, next_ = frames
    hints_prev, hints_next = SearchHints().start(prev, next_)
    inside = np.s_[:, :, 54:106, 80:132]
    assert (hints_prev[inside] - torch.tensor([-16.0, 0]).view(1, 2, 1, 1)).norm(dim=1).mean() < 4
    mean = (warp(prev, hints_prev) + warp(next_, hints_next)) / 2
    assert (mean - mid)[inside].abs().mean() < 0.01


@pytest.mark.parametrize("along", [2, 3])
def test_pixels_in_a_row_agree_on_the_steps_that_cost_least_in_all(along):
    """Without a ring of pixels, what each was told is exact: the best of all ways to choose, found by trying them."""
    count, generator = 4, torch.Generator().manual_seed(0)
    shape = [1, 9, 1, 1]
    shape[along] = count
    costs, flow = 0.06 * torch.rand(shape, generator=generator), torch.randn(1, 2, *shape[2:], generator=generator)
    chosen = motion_search._with_neighbours(costs, flow, reach=1).argmin(dim=1).flatten().tolist()
    ways = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))

    def cost(choice: tuple[int, ...]) -> float:
        flows = flow.flatten(1)[0].view(2, count).T + ways[list(choice)]
        apart = flows.diff(dim=0).abs().sum(dim=1).clamp(max=motion_search.MOST_APART)
        own = costs.view(9, count)[list(choice), range(count)]
        return (own.sum() + motion_search.APART_COST * apart.sum()).item()

    assert count - 1 <= motion_search.ROUNDS
    assert tuple(chosen) == min(itertools.product(range(9), repeat=count), key=cost)
    alone = costs.argmin(dim=1).flatten().tolist()
    assert cost(chosen) < cost(alone) - 0.01


def test_what_moves_over_a_still_picture_is_found_within_its_edges():
    prev, mid, next_ = moving_patch()
    hints_prev, hints_next = SearchHints().start(prev, next_)
    inside, outside = np.s_[:, :, 36:60, 72:96], np.s_[:, :, 10:86, 120:150]
    assert (hints_prev[inside] - torch.tensor([-8.0, 0]).view(1, 2, 1, 1)).norm(dim=1).median() < 0.25
    assert hints_prev[outside].norm(dim=1).median() < 0.1
    mean = (warp(prev, hints_prev) + warp(next_, hints_next)) / 2
    assert (mean - mid).abs().mean() < 0.5 * ((prev + next_) / 2 - mid).abs().mean()


def test_polished_flow_keeps_closer_to_edges():
    prev, mid, next_ = moving_patch()
    errors = []
    for polish in (False, True):
        hints_prev, hints_next = SearchHints(polish=polish).start(prev, next_)
        errors.append(((warp(prev, hints_prev) + warp(next_, hints_next)) / 2 - mid).abs().mean())
    assert errors[1] < 0.9 * errors[0]


def test_flow_bends_little_where_frames_are_noisy():
    noise = 0.2 * torch.randn(2, 1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    prev, next_ = (frame + added for frame, added in zip(drifting(0, 2), noise))
    hints_prev, _ = SearchHints().start(prev, next_)
    assert (inner(hints_prev) + torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)).norm(dim=1).mean() < 0.25


def test_a_change_of_light_is_not_motion():
    prev, next_ = drifting(0, 2)
    hints_prev, _ = SearchHints().start(prev * 0.6, next_ * 0.6 + 0.3)
    assert (inner(hints_prev) + torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)).norm(dim=1).median() < 0.3


def test_a_guess_tells_the_way_to_each_neighbour_by_itself():
    """The middle frame is not half-way: flow to the previous frame is a third of that to the next one."""
    prev, mid, next_ = drifting(0, 1, 4)
    hints_prev, hints_next = SearchHints(finest_scale=0).from_guess(prev, mid, next_)
    assert (inner(hints_prev) + torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)).norm(dim=1).median() < 0.5
    assert (inner(hints_next) - torch.tensor([9.0, 3.0]).view(1, 2, 1, 1)).norm(dim=1).median() < 0.5


@pytest.mark.parametrize("finest_scale", [0, 1])
def test_a_search_stops_half_way_and_goes_on_from_what_it_is_told(finest_scale):
    source = SearchHints(finest_scale)
    prev, next_ = drifting(0, 4)
    whole = torch.tensor([12.0, 4.0]).view(1, 2, 1, 1)
    begun = source.begin(prev, next_, 0.25)
    stride = 2 ** (finest_scale + 1)
    assert all(each.shape == (1, 2, 96 // stride, 128 // stride) for each in begun)
    assert (stride * begun[0][..., 4:-4, 4:-4] + 0.25 * whole).norm(dim=1).median() < 0.5
    for size in (1, stride, 8):  # of any scale
        told = [share * whole.expand(1, 2, 96 // size, 128 // size) / size for share in (-0.25, 0.75)]
        hints_prev, hints_next = source.finish(prev, next_, told, 0.25)
        assert hints_prev.shape == hints_next.shape == (1, 2, 96, 128)
        assert (inner(hints_prev) + 0.25 * whole).norm(dim=1).median() < 0.1
        assert (inner(hints_next) - 0.75 * whole).norm(dim=1).median() < 0.1
    far = [torch.zeros(1, 2, 96 // stride, 128 // stride) + way for way in (20.0, -20.0)]
    lost, _ = source.finish(prev, next_, far, 0.25)
    assert (inner(lost) + 0.25 * whole).norm(dim=1).median() > 5, "it seeks near what it is told"


def test_flow_does_not_depend_on_the_batch_and_every_item_has_its_instant():
    prev, next_ = drifting(0, 2)
    both = SearchHints().start(torch.cat([prev, next_]), torch.cat([next_, prev]), torch.tensor([0.5, 0.25]))
    for number, (pair, time) in enumerate([((prev, next_), 0.5), ((next_, prev), 0.25)]):
        for batched, alone in zip(both, SearchHints().start(*pair, time)):
            assert torch.allclose(batched[number], alone[0], atol=1e-4)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 9), (33, 130), (90, 45)])
def test_frames_of_any_size_have_flow_of_their_size(height, width):
    prev, next_ = drifting(0, 1, height=height, width=width)
    source = SearchHints()
    finished = source.finish(prev, next_, source.begin(prev, next_))
    for hints in (source.start(prev, next_), source.from_guess(prev, next_, next_), finished):
        assert all(each.shape == (1, 2, height, width) and each.isfinite().all() for each in hints)


def test_flat_frames_do_not_move():
    black, white = torch.full((1, 3, 64, 64), -1.0), torch.full((1, 3, 64, 64), 1.0)
    assert all(not each.any() for each in SearchHints().start(black, white))


def test_still_frames_do_not_move():
    (frame,) = drifting(0)
    flow = search_flow(*[(frame[:, :1] + 1) / 2] * 2, 0.5)
    assert flow.abs().max() < 1e-3


def test_settings_have_their_types():
    for value in (-1, 0.5, True, "1"):
        with pytest.raises(ValueError, match="`finest_scale` must be a whole number, 0 or more"):
            SearchHints(value)
    with pytest.raises(ValueError, match="`polish` must be true or false, but is 1"):
        SearchHints(polish=1)


def test_a_checkpoint_keeps_where_the_search_ends(tmp_path, tiny_news):
    for scale, polish, settings in ((1, True, None), (0, False, {"search": {"finest_scale": 0, "polish": False}})):
        config = {**tiny_news, "hint_source": "search"}
        config["pipeline"] = {**config["pipeline"], "hint_settings": settings}
        pipeline = build_pipeline(config)
        assert pipeline.hints.finest_scale == scale and pipeline.hints.device_bound
        pipeline.save_pretrained(tmp_path / str(scale))
        loaded = MADiffPipeline.from_pretrained(tmp_path / str(scale)).hints
        assert loaded.finest_scale == scale and loaded.polish == polish
    assert build_hint_source("search").finest_scale == 1


def test_a_source_that_was_assigned_is_kept_with_where_its_search_ends(tmp_path, tiny_news):
    pipeline = build_pipeline({**tiny_news, "hint_source": "flow"})
    pipeline.hints = SearchHints(finest_scale=2)
    pipeline.save_pretrained(tmp_path)
    loaded = MADiffPipeline.from_pretrained(tmp_path)
    assert loaded.config.hint_source == "search" and loaded.hints.finest_scale == 2


def test_frames_between_are_made_without_opencv(tmp_path):
    """By default settings of the command, and by the pipeline with two steps."""
    code = """
import sys
sys.modules["cv2"] = None  # whoever imports it fails
import torch
from madiff_diffusers import MADiffPipeline
from madiff_diffusers.commands.madiff_cli import main
assert main(["interpolate", "examples/prev.png", "examples/next.png", "-o", sys.argv[1]]) == 0
pipeline = MADiffPipeline.from_pretrained("madiff-fast")
prev, next_ = torch.rand(2, 1, 3, 64, 64)
print(pipeline(prev, next_, num_frames=2, num_inference_steps=2, output_type="pt").frames.shape)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "mid.png")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "[1, 2, 3, 64, 64]" in done.stdout, done.stderr
    assert (tmp_path / "mid.png").is_file()
