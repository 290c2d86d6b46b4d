"""The event camera against cases whose events can be told beforehand."""

import numpy as np
import pytest
import torch

from tests.conftest import moving_picture
from training.evaluate_i2e import spread_evenly
from training.event_simulation import LOG_EPS, EventCamera, event_volume, upsample_frames


IDEAL = {"threshold_mismatch": 0.0, "refractory": 0.0, "settled": True}


def intensity(log: np.ndarray) -> np.ndarray:
    return (np.exp(log) - LOG_EPS).astype(np.float32)


RAMP = 2.0  # pixels


def moving_edge(speed: float, contrast: float, width: int = 1000, height: int = 4, frames: int = 2001) -> np.ndarray:
    """An edge that moves to the right by `speed` pixels over the interval: behind it, the log-intensity is higher by
    `contrast`; on it, over `RAMP` pixels, it falls at a constant rate. Its middle starts 30 pixels from the left."""
    x = np.arange(width)
    front = 30 + speed * np.linspace(0, 1, frames)[:, None]
    start = np.log((0.2 if contrast > 0 else 0.8) + LOG_EPS)
    log = start + contrast * np.clip((front - x) / RAMP + 0.5, 0, 1)
    return intensity(np.broadcast_to(log[:, None], (frames, height, width)))


@pytest.mark.parametrize("speed, contrast, threshold", [(800, 0.85, 0.2), (600, 1.27, 0.15), (900, -0.9, 0.25)])
def test_a_moving_edge_fires_its_contrast_over_the_threshold_wherever_it_passes(speed, contrast, threshold):
    camera = EventCamera(threshold_decrease=threshold, threshold_increase=threshold, **IDEAL)
    x, y, t, polarity = camera.simulate(moving_edge(speed, contrast), np.random.default_rng(0))
    assert (polarity == (contrast > 0)).all()
    # A pixel fires its k-th event once its log-intensity has changed by k thresholds. The pixels that the edge takes that
    # far are `speed` in a row, plus the ramp, less what of the ramp has passed too little of a pixel at either end.
    k = np.arange(1, int(abs(contrast) / threshold) + 1)
    expected = 4 * (speed + RAMP - 2 * RAMP * k * threshold / abs(contrast)).sum()
    assert len(t) == pytest.approx(expected, rel=0.02)
    # The edge moves at a constant rate, so that events come at one; half a kernel of the outer bins lies outside.
    volume = event_volume(x, y, t, polarity, 4, 1000).reshape(2, 9, -1).sum(-1)
    share = np.array([0.5, *[1] * 7, 0.5]) / 8
    assert volume[0 if contrast > 0 else 1] == pytest.approx(expected * share, rel=0.02)
    assert volume.sum() == pytest.approx(len(t))


@pytest.mark.parametrize("start, end", [(0.1, 0.9), (0.9, 0.1)])
def test_a_wandering_pixel_is_half_an_event_short_of_a_settled_one_on_average(start, end):
    log = np.linspace(np.log(start + LOG_EPS), np.log(end + LOG_EPS), 33)
    frames = intensity(np.broadcast_to(log[:, None, None], (33, 64, 64)))
    camera = EventCamera(threshold_mismatch=0, refractory=0)
    x, y, t, polarity = camera.simulate(frames, np.random.default_rng(0))
    # The first event is one threshold away on average, then they are one threshold apart: E[floor(n + u)] = n - 1/2.
    assert len(t) / 4096 == pytest.approx(abs(log[-1] - log[0]) / 0.2 - 0.5, rel=0.02)
    assert (polarity == (end > start)).all()
    assert x.min() == y.min() == 0 and x.max() == y.max() == 63


def test_eight_bits_and_uneven_times_give_the_same_events():
    edge = moving_edge(100, 0.85, frames=241)
    camera = EventCamera(**IDEAL)
    exact = camera.simulate(edge, np.random.default_rng(0))
    rounded = camera.simulate((edge * 255).round().astype(np.uint8), np.random.default_rng(0))
    assert len(rounded[2]) == pytest.approx(len(exact[2]), rel=0.02)
    kept = np.array([*range(0, 120, 2), *range(120, 241)])
    uneven = camera.simulate(edge[kept], np.random.default_rng(0), kept / 240)
    counts = [np.histogram(events[2], 8, (0, 1))[0] for events in (exact, uneven)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_a_still_scene_fires_nothing_but_noise():
    still = np.full((5, 64, 64), 100, np.uint8)
    events = EventCamera().simulate(still, np.random.default_rng(0))
    assert all(len(part) == 0 for part in events)
    assert not event_volume(*events, height=64, width=64).any()
    x, y, t, polarity = EventCamera(noise=0.5).simulate(still, np.random.default_rng(0))
    assert len(t) == pytest.approx(2048, rel=0.1) and polarity.mean() == pytest.approx(0.5, abs=0.05)
    assert np.histogram(t, 4, (0, 1))[0] == pytest.approx(np.full(4, len(t) / 4), rel=0.15)


def test_a_refractory_pixel_is_silent():
    edge = moving_edge(20, 1.5, frames=101)  # the ramp takes a tenth of the time to pass
    times = {}
    for refractory in (0.0, 0.03):
        camera = EventCamera(0.1, 0.1, threshold_mismatch=0, refractory=refractory)
        x, y, t, _ = camera.simulate(edge, np.random.default_rng(0))
        times[refractory] = [np.sort(t[(x == column) & (y == 2)]) for column in (35, 42)]
    for often, seldom in zip(times[0.0], times[0.03]):
        assert 0 < len(seldom) < len(often)
        assert (np.diff(seldom) >= 0.03 - 1e-6).all() and np.diff(often).min() < 0.03


def test_thresholds_differ_between_pixels_polarities_and_cameras():
    log = np.linspace(np.log(0.1), np.log(0.9), 9)
    brighter = intensity(np.broadcast_to(log[:, None, None], (9, 32, 32)))
    counts = []
    for mismatch in (0.0, 0.05):
        camera = EventCamera(threshold_mismatch=mismatch, refractory=0, settled=True)
        x, y, _, _ = camera.simulate(brighter, np.random.default_rng(0))
        counts.append(np.bincount(y * 32 + x, minlength=1024))
    assert counts[0].std() == 0 and counts[1].std() > 1
    camera = EventCamera(threshold_decrease=0.1, threshold_increase=0.4, **IDEAL)
    up, down = (len(camera.simulate(frames, np.random.default_rng(0))[2]) for frames in (brighter, brighter[::-1]))
    assert down == pytest.approx(4 * up, rel=0.1)
    cameras = [EventCamera.draw(np.random.default_rng(i)) for i in range(20)]
    assert len({camera.threshold_increase for camera in cameras}) == 20


def test_volume_shares_an_event_between_the_bins_around_it():
    x, y = np.array([1, 2, 0]), np.array([0, 1, 1])
    t, polarity = np.array([0.0, 0.3, 1.0], np.float32), np.array([True, False, True])
    volume = event_volume(x, y, t, polarity, height=2, width=3, num_bins=5)
    assert volume.shape == (10, 2, 3)
    expected = np.zeros((10, 2, 3))
    expected[0, 0, 1] = 1  # t* = 0
    expected[5 + 1, 1, 2], expected[5 + 2, 1, 2] = 0.8, 0.2  # t* = 1.2, a decrease
    expected[4, 1, 0] = 1  # t* = 4
    assert volume == pytest.approx(expected, abs=1e-6)


def test_upsampling_adapts_to_the_motion_and_moves_what_lies_between():
    frames = np.stack([moving_picture(2 * i)[..., 0] for i in range(3)])  # 6 pixels from one to the next
    made, times = upsample_frames(frames, largest_shift=1.0)
    finer, _ = upsample_frames(frames, largest_shift=0.5)
    assert 12 <= len(made) - 1 <= 20 and len(finer) > 1.5 * len(made)
    assert times[0] == 0 and times[-1] == 1 and (np.diff(times) > 0).all()
    for i, frame in enumerate(frames):
        assert np.array_equal(made[np.flatnonzero(times == i / 2)[0]], frame)
    inner = (slice(12, -12), slice(12, -12))
    half = np.abs(times - 0.25).argmin()
    truth = moving_picture(4 * times[half])[..., 0].astype(float)[inner]
    moved = np.abs(made[half][inner] - truth).mean()
    assert moved < 0.5 * np.abs(frames[:2].mean(0)[inner] - truth).mean()
    still, times = upsample_frames(frames[[0, 0]])
    assert len(still) == 2 and len(upsample_frames(frames, most=3)[0]) == 7


@pytest.mark.parametrize("num_bins", [1, 2, 9])
def test_a_constant_rate_gives_the_first_and_the_last_bin_half(num_bins):
    """Against the volume of as many events, evenly in time."""
    count, times = 3000, (np.arange(3000) + 0.5) / 3000
    zeros = np.zeros(count, int)
    expected = event_volume(zeros, zeros, times, np.ones(count, int), 1, 1, num_bins)
    grey = torch.tensor([[[-0.5]]]), torch.tensor([[[0.5]]])
    change = np.log(0.75 + LOG_EPS) - np.log(0.25 + LOG_EPS)
    spread = spread_evenly(*grey, torch.tensor([change / count, change / count]), num_bins)
    assert np.allclose(spread.numpy().ravel(), np.asarray(expected).ravel(), rtol=0.01, atol=1.0)
