import numpy as np
import pytest

from tests.conftest import moving_picture
from training.event_simulation import LOG_EPS, event_volume, simulate_events, upsample_frames


def fade(start: float, end: float, steps: int = 9) -> np.ndarray:
    """Frames whose log-intensity changes at a constant rate from one end to the other."""
    log = np.linspace(np.log(start + LOG_EPS), np.log(end + LOG_EPS), steps)
    return np.broadcast_to(((np.exp(log) - LOG_EPS) * 255).round()[:, None, None], (steps, 32, 32)).astype(np.uint8)


@pytest.mark.parametrize("start, end", [(0.1, 0.9), (0.9, 0.1)])
def test_a_fade_fires_its_contrast_divided_by_the_threshold_evenly_in_time(start, end):
    frames = fade(start, end)
    x, y, t, polarity = simulate_events(
        frames, threshold=0.2, rng=np.random.default_rng(0), threshold_mismatch=0, refractory=0
    )
    contrast = abs(np.log(end + LOG_EPS) - np.log(start + LOG_EPS))
    # The first event is one threshold away on average, so that half an event is missing, in the first quarter.
    expected = np.full(4, contrast / 0.2 / 4) - [0.5, 0, 0, 0]
    assert len(t) / 1024 == pytest.approx(expected.sum(), rel=0.02)
    assert (polarity == (end > start)).all()
    assert np.histogram(t, 4, (0, 1))[0] / 1024 == pytest.approx(expected, rel=0.06)
    assert x.min() == y.min() == 0 and x.max() == y.max() == 31


def test_a_still_scene_fires_nothing():
    events = simulate_events(np.full((5, 8, 8), 100, np.uint8), 0.2, np.random.default_rng(0))
    assert all(len(part) == 0 for part in events)
    assert not event_volume(*events, height=8, width=8).any()


def test_a_refractory_pixel_is_silent():
    frames = fade(0.05, 1.0)
    count = [len(simulate_events(frames, 0.1, np.random.default_rng(0), refractory=r)[2]) for r in (0, 0.1)]
    assert count[1] < count[0]
    x, y, t, _ = simulate_events(frames, 0.1, np.random.default_rng(0), refractory=0.1)
    for pixel in ((0, 0), (7, 20)):
        times = np.sort(t[(x == pixel[0]) & (y == pixel[1])])
        assert (np.diff(times) >= 0.1 - 1e-6).all()


def test_thresholds_differ_between_pixels():
    frames = fade(0.1, 0.9)
    x, y, t, _ = simulate_events(frames, 0.2, np.random.default_rng(0), threshold_mismatch=0.05, refractory=0)
    counts = np.bincount(y * 32 + x, minlength=1024)
    x, y, t, _ = simulate_events(frames, 0.2, np.random.default_rng(0), threshold_mismatch=0, refractory=0)
    assert counts.std() > 1.5 * np.bincount(y * 32 + x, minlength=1024).std()


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


def test_upsampling_keeps_the_frames_and_moves_what_lies_between():
    frames = np.stack([moving_picture(2 * i)[..., 0] for i in range(3)])
    between = upsample_frames(frames, 4)
    assert len(between) == 9 and np.array_equal(between[::4], frames)
    inner = (slice(12, -12), slice(12, -12))
    half = moving_picture(1)[..., 0].astype(float)[inner]
    moved = np.abs(between[2][inner] - half).mean()
    blended = np.abs(frames[:2].mean(0)[inner] - half).mean()
    assert moved < 0.5 * blended
    assert np.array_equal(upsample_frames(frames, 1), frames)
