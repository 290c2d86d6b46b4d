from fractions import Fraction
from math import ceil, floor

import pytest

from madiff_diffusers.video.frame_times import Timeline


FILM = Fraction(1001, 24000)


def shown(timeline: Timeline) -> list:
    return [frame for group in timeline.shown() for frame in group]


@pytest.mark.parametrize(
    "rate", [Fraction(60), Fraction(60000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(12), Fraction(1, 2)]
)
def test_a_rate_fills_the_duration(rate):
    timeline = Timeline([1001 * number for number in range(240)], 240 * 1001, Fraction(1, 24000), rate=rate)
    frames = shown(timeline)
    duration = 240 * FILM
    assert len(frames) == len(timeline) and abs(len(timeline) / rate - duration) <= 1 / rate / 2
    assert [frame.time for frame in frames] == list(range(len(frames))) and timeline.time_base == 1 / rate
    at = [(frame.index + frame.position) * FILM for frame in frames]
    times = [frame.time / rate for frame in frames]
    assert all(a == b for a, b in zip(at, times) if b <= 239 * FILM), "every frame is of its own instant"
    assert timeline.made() == sum(b % FILM != 0 for b in times if b < 239 * FILM)
    for first, last in ((0, 7), (7, 100), (100, 240)):
        assert timeline.count(first, last) == len([frame for group in timeline.shown(first, last) for frame in group])


def test_times_that_a_file_rounds_to_milliseconds_are_still_the_source_frames_own():
    # 24 frames a second as Matroska tells them, doubled: every second frame is the source's, though 83 ms are not 2/24 s.
    starts = [round(1000 * number / 24) for number in range(24)]
    timeline = Timeline(starts, 1000, Fraction(1, 1000), rate=Fraction(48))
    frames = shown(timeline)
    assert [frame.index for frame in frames if not frame.position] == [*range(24), 23] and timeline.made() == 23
    # A tick as long as a frame is no rounding.
    exact = Timeline(range(24), 24, Fraction(1, 24), rate=Fraction(60))
    assert [frame.position for group in exact.shown(0, 2) for frame in group] == [
        0,
        Fraction(2, 5),
        Fraction(4, 5),
        Fraction(1, 5),
        Fraction(3, 5),
    ]


@pytest.mark.parametrize("rounded", [floor, ceil])
def test_half_a_tick_is_rounding_too_and_slow_motion_stretches_it(rounded):
    # Of 16 frames a second, every second one begins half a millisecond off.
    starts = [rounded(Fraction(1000 * number, 16)) for number in range(16)]
    timeline = Timeline(starts, 1000, Fraction(1, 1000), rate=Fraction(16))
    assert [(frame.index, frame.position) for frame in shown(timeline)] == [(number, 0) for number in range(16)]
    slow = Timeline(starts, 1000, Fraction(1, 1000), rate=Fraction(16), slow_motion=Fraction(2))
    assert len(slow) == 32 and slow.made() == 15
    assert [frame.index for frame in shown(slow)[::2]] == list(range(16))


@pytest.mark.parametrize("second", [200 * 90000 - 1, 200 * 90000 + 1])
def test_no_instant_is_nearer_to_a_frame_than_networks_can_be_told(second):
    timeline = Timeline([0, second, 300 * 90000], 400 * 90000, Fraction(1, 90000), rate=Fraction(1, 100))
    assert [(frame.index, frame.position) for frame in shown(timeline)] == [
        (0, 0),
        (0, Fraction(100 * 90000, second)),
        (1, 0),
        (2, 0),
    ]


def test_a_factor_follows_uneven_frames_and_the_last_one_too():
    timeline = Timeline([0, 3, 9], 12, Fraction(1, 90), factor=2)
    frames = shown(timeline)
    assert [frame.time for frame in frames] == [0, 3, 6, 12, 18, 21] and timeline.time_base == Fraction(1, 180)
    assert [(frame.index, frame.position) for frame in frames] == [
        (0, 0),
        (0, Fraction(1, 2)),
        (1, 0),
        (1, Fraction(1, 2)),
        (2, 0),
        (2, 0),
    ]
    assert timeline.duration * timeline.time_base == Fraction(12, 90) and timeline.count(1, 3) == 4


def test_slow_motion_lasts_longer():
    timeline = Timeline([0, 1, 2], 3, Fraction(1, 30), factor=4, slow_motion=Fraction(4))
    assert timeline.duration * timeline.time_base == Fraction(12, 30) and [
        frame.time * timeline.time_base for frame in shown(timeline)
    ][:3] == [0, Fraction(1, 30), Fraction(2, 30)]
    slower = Timeline([0, 1, 2], 3, Fraction(1, 30), rate=Fraction(60), slow_motion=Fraction(5, 2))
    assert len(slower) == 15


def test_nothing_is_made_where_frames_are_held_and_across_dropped_ones_more_is():
    timeline = Timeline(range(6), 6, Fraction(1, 24), factor=2, dropped=[1], held=[3])
    places = [(frame.index, frame.position) for frame in shown(timeline)]
    half = Fraction(1, 2)
    assert places == [
        (0, 0),
        (0, half / 2),
        (0, half),
        (0, half * 3 / 2),
        (2, 0),
        (2, half),
        (3, 0),
        (3, 0),
        (4, 0),
        (4, half),
        (5, 0),
        (5, 0),
    ]
    for last in range(1, len(timeline.kept) + 1):
        assert timeline.count(0, last) == sum(map(len, timeline.shown(0, last))), "of frames that are not left out"
    at_a_rate = Timeline(range(4), 4, Fraction(1, 24), rate=Fraction(48), held=[1])
    assert [(frame.index, frame.position) for frame in shown(at_a_rate)] == [
        (0, 0),
        (0, half),
        (1, 0),
        (1, 0),
        (2, 0),
        (2, half),
        (3, 0),
        (3, 0),
    ]


def test_the_first_frame_behind_a_cut_is_shown_where_its_time_was_rounded_up():
    times = [round(1000 * number / 24) for number in range(12)]
    timeline = Timeline(times, 500, Fraction(1, 1000), rate=Fraction(24), held={0, 3, 6})
    assert [(frame.index, frame.position) for frame in shown(timeline)] == [(number, 0) for number in range(12)]


def test_a_file_of_one_frame_is_shown_as_it_is():
    assert [(frame.index, frame.position) for frame in shown(Timeline([0], 1, FILM, rate=Fraction(60)))] == [
        (0, 0)
    ] * 3  # 2.5 of them, to within half
    assert len(Timeline([0], 1, FILM, rate=Fraction(1))) == 1, "however short it is shown"
    with pytest.raises(ValueError, match="Either `factor` or `rate`"):
        Timeline([0], 1, FILM)
