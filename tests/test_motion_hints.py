import math

import cv2
import numpy as np
import pytest
import torch

from madiff_diffusers import EventGANModel, EventHints, FlowHints, StackedHints, build_hint_source
from madiff_diffusers.evaluation.hint_policies import from_neighbours
from madiff_diffusers.motion_hints import cut_events, damp_hints
from madiff_diffusers.optical_flow import dis_flow, single_threaded_opencv
from madiff_diffusers.vq_magan import warp
from tests.conftest import drifting, moving_patch, moving_picture
from training.hints import load_hint_source, start_hints


@pytest.fixture
def i2e() -> EventGANModel:
    torch.manual_seed(0)
    return EventGANModel(num_bins=5, base_channels=4, num_encoders=2, num_residual_blocks=1).eval()


def test_flow_hints_are_offsets_from_the_middle_frame_to_the_neighbours():
    # The picture drifts by (3, 1) pixels per unit of time, so that what is at p in the middle was at p - (3, 1).
    prev, mid, next_ = drifting(-1, 0, 1)
    hints_prev, hints_next = FlowHints().from_guess(prev, mid, next_)
    assert hints_prev.shape == (1, 2, 96, 128) and hints_prev.dtype == torch.float32
    inner = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    expected = torch.tensor([3.0, 1.0])
    assert torch.allclose(hints_prev[inner].flatten(2).median(-1).values[0], -expected, atol=0.15)
    assert torch.allclose(hints_next[inner].flatten(2).median(-1).values[0], expected, atol=0.15)


def test_flow_starts_from_half_of_the_flow_between_the_neighbours():
    prev, next_ = drifting(-1, 1)
    start_prev, start_next = FlowHints().start(prev, next_)
    assert torch.equal(start_next, 0.5 * FlowHints().from_guess(prev, prev, next_)[1])
    assert torch.equal(start_prev, 0.5 * FlowHints().from_guess(prev, next_, next_)[0])


def test_flow_of_frames_that_were_made_without_versions():
    with torch.inference_mode():
        prev, next_ = drifting(-1, 1)
        found, source = [], FlowHints()
        for frames in ((prev, next_), (next_, prev)):
            found.append(source.start(*frames)[1])
    assert torch.equal(found[0], FlowHints().start(*drifting(-1, 1))[1]) and not torch.equal(*found)


def test_fine_flow_starts_from_the_motion_that_passes_the_middle():
    """Half-way along a patch's way across a still picture, offsets lead to where it is in the neighbours."""
    pictures = prev, mid, next_ = moving_patch()

    def wrong(hints, frame) -> float:
        """Share of the middle's patch and its surroundings that is not what the offsets lead to."""
        return ((warp(frame, hints) - mid).abs().mean(1)[:, 24:72, 56:112] > 0.1).float().mean().item()

    plain, fine = FlowHints().start(prev, next_), FlowHints(fine=True).start(prev, next_)
    for side in (0, 1):
        assert fine[side].shape == plain[side].shape and fine[side].dtype == torch.float32
        assert wrong(fine[side], pictures[2 * side]) < 0.6 * wrong(plain[side], pictures[2 * side])


@pytest.mark.parametrize("fine", [False, True])
def test_flow_does_not_depend_on_threads_or_batch(fine):
    prev, mid, next_ = drifting(-1, 0, 1)
    alone = FlowHints(fine).from_guess(prev, mid, next_)[0]
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(7)
        assert torch.equal(alone, FlowHints(fine).from_guess(prev, mid, next_)[0])
        assert cv2.getNumThreads() == 7
    finally:
        cv2.setNumThreads(threads)
    batched = FlowHints(fine).from_guess(*(torch.cat([frame, frame.flip(-1)]) for frame in (prev, mid, next_)))[0]
    assert torch.equal(alone[0], batched[0])


def test_opencv_s_threads_are_set_back_once_the_last_of_two_at_once_is_done():
    threads = cv2.getNumThreads()
    first, second = single_threaded_opencv(), single_threaded_opencv()
    try:
        cv2.setNumThreads(7)
        first.__enter__()
        second.__enter__()  # begins while the first is at work, and ends after it
        first.__exit__(None, None, None)
        assert cv2.getNumThreads() == 1
        second.__exit__(None, None, None)
        assert cv2.getNumThreads() == 7
    finally:
        cv2.setNumThreads(threads)


def test_event_hints_start_from_nothing_and_run_towards_the_future(i2e):
    prev, mid, next_ = drifting(-1, 0, 1)
    source = EventHints(i2e)
    assert source.hint_channels == 10
    assert not any(hints.any() for hints in source.start(prev, next_))
    grey = [
        (frame * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        for frame in (prev, mid, next_)
    ]
    with torch.no_grad():
        hints_prev, hints_next = source.from_guess(prev, mid, next_)
        assert torch.allclose(hints_prev, i2e(grey[0], grey[1]).events, atol=1e-5)
        assert torch.allclose(hints_next, i2e(grey[1], grey[2]).events, atol=1e-5)
        for hints in from_neighbours(source, prev, next_):
            assert torch.allclose(hints, i2e(grey[0], grey[2]).events, atol=1e-5)


def volume_of(times: torch.Tensor, begin: float, end: float, bins: int = 9) -> torch.Tensor:
    """Events at those times, all of one pixel, those that become brighter in two thirds of the cases, as a volume from `begin` to `end`."""
    inside = times[(times >= begin) & (times <= end)]
    places = (bins - 1) * (inside - begin) / (end - begin)
    counts = (1 - (places[:, None] - torch.arange(bins)).abs()).clamp(min=0).sum(0)
    return torch.cat([2 / 3 * counts, counts / 3]).view(1, -1, 1, 1)


@pytest.mark.parametrize("begin, end", [(0.0, 0.5), (0.5, 1.0), (0.0, 0.3), (0.3, 1.0), (0.25, 0.75), (0.0, 1.0)])
def test_events_are_cut_to_those_between_two_instants(begin, end):
    # Ever more events as time goes on, at a rate that is linear and twice as high at the end.
    times = (1 + 3 * torch.linspace(0, 1, 40001)).sqrt() - 1
    whole, part = volume_of(times, 0, 1), volume_of(times, begin, end)
    cut = cut_events(whole, begin, end)
    assert cut.shape == whole.shape
    assert torch.allclose(cut, part, rtol=0.05)
    assert cut.sum().item() == pytest.approx(part.sum().item(), rel=0.02)


@pytest.mark.parametrize("time", [0.5, 1 / 3, 0.1, 0.9, 0.01])
def test_each_event_is_before_an_instant_or_after_it(time):
    for bin_ in range(9):
        volume = torch.zeros(1, 18, 1, 1)
        volume[:, bin_] = 1
        parts = cut_events(volume, 0.0, time).sum() + cut_events(volume, time, 1.0).sum()
        assert parts.item() == pytest.approx(1, abs=1e-3)


def test_events_of_one_bin_are_cut_by_their_share_of_time():
    assert torch.equal(cut_events(torch.full((1, 2, 1, 1), 8.0), 0.25, 1.0), torch.full((1, 2, 1, 1), 6.0))


@pytest.mark.parametrize("scale", [1, 2])
def test_event_hints_may_start_from_the_events_between_the_neighbours(i2e, scale):
    prev, mid, next_ = drifting(-1, 0, 1)
    source, plain = EventHints(i2e, scale=scale, between=True), EventHints(i2e, scale=scale)
    with torch.no_grad():
        whole = from_neighbours(plain, prev, next_)[0]
        for time in (0.25, 0.5):
            hints_prev, hints_next = source.start(prev, next_, time)
            assert torch.allclose(hints_prev, cut_events(whole, 0.0, time), atol=1e-6)
            assert torch.allclose(hints_next, cut_events(whole, time, 1.0), atol=1e-6)
        # The nearer in time, the fewer of the events lie between.
        assert source.start(prev, next_, 0.25)[0].sum() < source.start(prev, next_, 0.75)[0].sum()
        for one, other in zip(source.from_guess(prev, mid, next_), plain.from_guess(prev, mid, next_)):
            assert torch.equal(one, other)


def test_a_stack_holds_its_sources_side_by_side_with_flow_last(i2e):
    prev, mid, next_ = drifting(-1, 0, 1)
    source = build_hint_source("events+flow", i2e)
    assert isinstance(source, StackedHints) and source.hint_channels == 12
    with torch.no_grad():
        for stacked, events, flow in zip(
            source.from_guess(prev, mid, next_),
            EventHints(i2e).from_guess(prev, mid, next_),
            FlowHints().from_guess(prev, mid, next_),
        ):
            assert torch.equal(stacked, torch.cat([events, flow], dim=1))


def test_damped_hints_settle():
    hints = untouched = (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    for number in range(1, 201):  # every extraction errs by one pixel from the hints that led to it
        hints = damp_hints(hints, tuple(each + 1 for each in hints), number)
        if number in (1, 2):
            assert all(torch.allclose(each, torch.full_like(each, (1.0, 1.5)[number - 1])) for each in hints)
    assert all(torch.allclose(each, torch.full_like(each, math.e - 1)) for each in hints)
    assert all(torch.equal(each, torch.zeros_like(each)) for each in untouched)


def test_unknown_or_impossible_sources_are_named():
    with pytest.raises(ValueError, match="events, flow, fine_flow, search, .*events\\+fine_flow, .*but is 'sound'"):
        build_hint_source("sound")
    with pytest.raises(ValueError, match="`i2e` is None"):
        build_hint_source("events")
    with pytest.raises(ValueError, match="`i2e` is None"):
        build_hint_source("events+flow")  # of how many channels events would be is not told


def test_start_hints_of_a_batch_are_each_of_its_own_instant():
    pictures = drifting(-1, 1, 5)
    prev, next_ = (
        torch.cat([pictures[0], pictures[1], pictures[0]]),
        torch.cat([pictures[1], pictures[2], pictures[2]]),
    )
    times = torch.tensor([0.25, 0.75, 0.25])
    together = start_hints(FlowHints(), prev, next_, times)
    for i, time in enumerate(times.tolist()):
        for side, alone in zip(together, FlowHints().start(prev[i : i + 1], next_[i : i + 1], time)):
            assert torch.equal(side[i : i + 1], alone)


def test_events_of_smaller_frames_are_spread_over_as_many_pixels(i2e, tmp_path):
    """As the pipeline's setting says, in training too."""
    i2e.save_pretrained(tmp_path)
    source, _ = load_hint_source(
        {"hint_source": "events", "pipeline": {"event_scale": 2}}, str(tmp_path), torch.device("cpu")
    )
    prev, mid, next_ = drifting(-1, 0, 1)
    with torch.no_grad():
        hints = source.from_guess(prev, mid, next_)
        small = EventHints(i2e).from_guess(*(torch.nn.functional.avg_pool2d(frame, 2) for frame in (prev, mid, next_)))
    for spread, expected in zip(hints, small):
        assert spread.shape[-2:] == prev.shape[-2:]
        assert torch.allclose(spread, expected.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-4)


def test_optical_flow_is_opencv_s_from_nothing():
    """A flow that DIS is given, be it zeros, is where its search begins: another result."""
    earlier, later = (cv2.cvtColor(moving_picture(time, 96, 128), cv2.COLOR_RGB2GRAY) for time in (0, 6))
    expected = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(earlier, later, None)
    assert np.array_equal(dis_flow(earlier, later), expected)
    zeros = np.zeros_like(expected)
    assert not np.array_equal(
        cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(earlier, later, zeros), expected
    )
