from fractions import Fraction
from itertools import product

import pytest

from madiff_diffusers.frame_times import divided_times, nearest_places, regular_times, shown_frames

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


@pytest.mark.parametrize("rate", [Fraction(60), Fraction(60000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(12)])
def test_regular_times_fill_the_duration(rate):
    sources = [number * FILM for number in range(240)]
    duration = 240 * FILM
    times = list(regular_times(duration, rate))
    assert abs(len(times) / rate - duration) <= 1 / rate / 2 and times[1] - times[0] == 1 / rate
    shown = shown_frames(sources, times)
    assert [frame.time for frame in shown] == times
    at = [sources[frame.index] + frame.position * FILM for frame in shown]
    assert at == sorted(at) and max(abs(a - b) for a, b in zip(at, times) if b <= sources[-1]) <= FILM / 2
    for index in range(len(sources)):
        assert is_made_of_shown([frame.position for frame in shown if frame.index == index])


def test_divided_times_follow_uneven_frames():
    sources = [Fraction(0), Fraction(1, 30), Fraction(1, 10)]
    times = list(divided_times(sources, 2))
    assert times == [0, Fraction(1, 60), Fraction(1, 30), Fraction(1, 15), Fraction(1, 10)]
    shown = shown_frames(sources, times)
    assert [(frame.index, frame.position) for frame in shown] == [(0, 0), (0, Fraction(1, 2)), (1, 0), (1, Fraction(1, 2)), (2, 0)]


def test_one_frame_is_shown_as_it_is():
    assert [frame.index for frame in shown_frames([Fraction(0)], list(regular_times(FILM, Fraction(60))))] == [0, 0, 0]
