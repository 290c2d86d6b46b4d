"""When frames are shown, and which of them are made: exact times, and the middles of middles that come nearest to them.

Times are fractions of a second, never floating point: 30000/1001 frames a second stay in step with the sound for hours.
"""

from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Iterator, List, NamedTuple, Sequence, Tuple


class ShownFrame(NamedTuple):
    """
    Args:
        time: when it is shown, in seconds from the first frame.
        index: number of the source frame that it is, or that comes before it.
        position: 0 for the source frame itself; else the place between it and the next where the frame is made, a fraction
            whose denominator is a power of two.
    """

    time: Fraction
    index: int
    position: Fraction


def regular_times(duration: Fraction, rate: Fraction) -> Iterator[Fraction]:
    """The times of frames at a rate, from 0 up to a duration that they fill to within half a frame."""
    for number in range(max(1, ceil(duration * rate - Fraction(1, 2)))):
        yield number / rate


def divided_times(sources: Sequence[Fraction], factor: int) -> Iterator[Fraction]:
    """The times of source frames, and `factor - 1` between each and the next, evenly."""
    for start, end in zip(sources, sources[1:]):
        for step in range(factor):
            yield start + (end - start) * step / factor
    yield sources[-1]


def shown_frames(sources: Sequence[Fraction], times: Sequence[Fraction]) -> List[ShownFrame]:
    """
    For each time, a source frame or one to be made between two; see `nearest_places`.

    Args:
        sources: times of the source frames, strictly increasing, from 0.
        times: times of the frames to show, increasing.
    """
    groups: List[List[Fraction]] = [[] for _ in sources]
    for time in times:
        groups[max(0, bisect_right(sources, time) - 1)].append(time)
    shown: List[ShownFrame] = []
    for index, group in enumerate(groups):
        if index == len(sources) - 1:
            shown += [ShownFrame(time, index, Fraction(0)) for time in group]
            continue
        start, distance = sources[index], sources[index + 1] - sources[index]
        places = nearest_places(tuple((time - start) / distance for time in group))
        shown += [ShownFrame(time, index + place.numerator // place.denominator, place % 1) for time, place in zip(group, places)]
    return shown


@lru_cache(maxsize=4096)
def nearest_places(wanted: Tuple[Fraction, ...]) -> Tuple[Fraction, ...]:
    """
    For each wanted place between two source frames at 0 and 1, one where a frame is: one of the two, or one that is made as the
    middle of two others. None is made that is not shown, or shown twice, and the squared distances from the wanted places add up to least.

    Args:
        wanted: increasing places in [0, 1).
    """

    @lru_cache(maxsize=None)
    def made(low: Fraction, high: Fraction, first: int, last: int) -> Tuple[Fraction, Tuple[Fraction, ...]]:
        """The places made for `wanted[first:last]` between two frames, and what they cost."""
        if first == last:
            return Fraction(0), ()
        middle = (low + high) / 2
        choices = []
        # The middle stands for one of the wanted places about it; to look at all would take minutes for some twenty of them.
        near = bisect_right(wanted, middle)
        for k in range(max(first, min(near, last) - 3), min(last, max(near, first) + 3)):
            left, before = made(low, middle, first, k)
            right, after = made(middle, high, k + 1, last)
            choices.append((left + (middle - wanted[k]) ** 2 + right, (*before, middle, *after)))
        return min(choices)

    count, choices = len(wanted), []
    for first in range(count + 1):
        for last in range(first, count + 1):
            cost, places = made(Fraction(0), Fraction(1), first, last)
            cost += sum(place**2 for place in wanted[:first]) + sum((1 - place) ** 2 for place in wanted[last:])
            choices.append((cost, (Fraction(0),) * first + places + (Fraction(1),) * (count - last)))
    return min(choices)[1]
