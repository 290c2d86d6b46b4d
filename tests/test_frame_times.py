from fractions import Fraction
from itertools import product

import pytest

from madiff_diffusers.video.frame_times import Timeline, nearest_places

FILM = Fraction(1001, 24000)


def is_made_of_shown(places: list) -> bool:
    """Whether each place between 0 and 1 is the middle of two others, 0 and 1 among them, and shown once."""
    known = {Fraction(0), Fraction(1)}
    made = [place for place in places if place not in known]
    if len(set(made)) < len(made):
        return False  # a frame made is shown once
    for place in sorted(made, key=lambda place: place.denominator):
        step = Fraction(1, place.denominator)
        if not {place - step, place + step} <= known:
            return False
        known.add(place)
    return True


def cost(places: tuple, wanted: tuple) -> Fraction:
    return sum((place - want) ** 2 for place, want in zip(places, wanted))


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_powers_of_two_are_exact(factor):
    wanted = tuple(Fraction(k, factor) for k in range(factor))
    assert nearest_places(wanted) == wanted


@pytest.mark.parametrize("wanted", [(0.3,), (0.05,), (0.2, 0.9), (0, 1 / 3, 2 / 3), (0.4, 0.45, 0.95), (0.1, 0.3, 0.5, 0.7)])
def test_no_choice_is_nearer(wanted):
    wanted = tuple(Fraction(place).limit_denominator(100) for place in wanted)
    places = nearest_places(wanted)
    assert list(places) == sorted(places) and is_made_of_shown(places)
    grid = [Fraction(k, 16) for k in range(17)]
    least = min(cost(each, wanted) for each in product(grid, repeat=len(wanted)) if list(each) == sorted(each) and is_made_of_shown(each))
    assert cost(places, wanted) == least


def shown(timeline: Timeline) -> list:
    return [frame for group in timeline.shown() for frame in group]


@pytest.mark.parametrize("rate", [Fraction(60), Fraction(60000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(12), Fraction(1, 2)])
def test_a_rate_fills_the_duration(rate):
    timeline = Timeline([1001 * number for number in range(240)], 240 * 1001, Fraction(1, 24000), rate=rate)
    frames = shown(timeline)
    duration = 240 * FILM
    assert len(frames) == len(timeline) and abs(len(timeline) / rate - duration) <= 1 / rate / 2
    assert [frame.time for frame in frames] == list(range(len(frames))) and timeline.time_base == 1 / rate
    at = [(frame.index + frame.position) * FILM for frame in frames]
    times = [frame.time / rate for frame in frames]
    assert at == sorted(at) and max(abs(a - b) for a, b in zip(at, times) if b <= 239 * FILM) <= FILM / 2
    for index in range(240):
        assert is_made_of_shown([frame.position for frame in frames if frame.index == index])
    for first, last in ((0, 7), (7, 100), (100, 240)):
        assert timeline.count(first, last) == len([frame for group in timeline.shown(first, last) for frame in group])


def test_a_factor_follows_uneven_frames_and_the_last_one_too():
    timeline = Timeline([0, 3, 9], 12, Fraction(1, 90), factor=2)
    frames = shown(timeline)
    assert [frame.time for frame in frames] == [0, 3, 6, 12, 18, 21] and timeline.time_base == Fraction(1, 180)
    assert [(frame.index, frame.position) for frame in frames] == [(0, 0), (0, Fraction(1, 2)), (1, 0), (1, Fraction(1, 2)), (2, 0), (2, 0)]
    assert timeline.duration * timeline.time_base == Fraction(12, 90) and timeline.count(1, 3) == 4


def test_slow_motion_lasts_longer():
    timeline = Timeline([0, 1, 2], 3, Fraction(1, 30), factor=4, slow_motion=Fraction(4))
    assert timeline.duration * timeline.time_base == Fraction(12, 30) and [frame.time * timeline.time_base for frame in shown(timeline)][:3] == [0, Fraction(1, 30), Fraction(2, 30)]
    slower = Timeline([0, 1, 2], 3, Fraction(1, 30), rate=Fraction(60), slow_motion=Fraction(5, 2))
    assert len(slower) == 15


def test_nothing_is_made_where_frames_are_held_and_across_dropped_ones_more_is():
    timeline = Timeline(range(6), 6, Fraction(1, 24), factor=2, dropped=[1], held=[3])
    places = [(frame.index, frame.position) for frame in shown(timeline)]
    half = Fraction(1, 2)
    assert places == [(0, 0), (0, half / 2), (0, half), (0, half * 3 / 2), (2, 0), (2, half), (3, 0), (3, 0), (4, 0), (4, half), (5, 0), (5, 0)]


def test_a_file_of_one_frame_is_shown_as_it_is():
    assert [(frame.index, frame.position) for frame in shown(Timeline([0], 1, FILM, rate=Fraction(60)))] == [(0, 0)] * 3  # 2.5 of them, to within half
    with pytest.raises(ValueError, match="Either `factor` or `rate`"):
        Timeline([0], 1, FILM)
