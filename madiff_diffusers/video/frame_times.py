"""Exact times: when frames are shown, which of them are made, and at which instants.

Times are fractions of a second, never floating point: 30000/1001 frames a second stay in step with the sound for hours.
"""

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil


# Seconds. Files that round times (Matroska) round them to this or finer units; times in coarser units are exact.
LONGEST_TICK = Fraction(1, 1000)

# A frame that is due nearer to a source frame than the way to the next one over this is that frame itself: networks, which are told instants in
# single precision, could not tell it apart.
NEAREST = 1_000_000


@dataclass(frozen=True)
class ShownFrame:
    """
    A frame of the result.

    Args:
        time: when it is shown, in units of the timeline's `time_base` from the first frame.
        index: the number of the source frame that it is, or that comes before it.
        position: 0 for a source frame; else the instant, from that source frame to the next that is kept, at which the frame is made.
    """

    time: int
    index: int
    position: Fraction


class Timeline:
    """
    The frames that an interpolated video shows, and their times.

    Args:
        starts: when each source frame begins, in units of `unit` from the first; strictly increasing from 0.
        end: when the last source frame ends.
        unit: seconds.
        factor: the number of frames in the place of each source frame, evenly within its time.
        rate: frames a second, in the place of `factor`.
        slow_motion: how many times as long as the source the result lasts.
        dropped: numbers of source frames that are left out, so that frames are made across them; neither first nor last.
        held: numbers of source frames that are shown until the next begins, without made frames behind them.

    Raises:
        ValueError: unless either `factor` or `rate` is given.
    """

    def __init__(
        self,
        starts: Sequence[int],
        end: int,
        unit: Fraction,
        *,
        factor: int | None = None,
        rate: Fraction | None = None,
        slow_motion: Fraction = Fraction(1),
        dropped: Collection[int] = (),
        held: Collection[int] = (),
    ):
        if (factor is None) == (rate is None):
            raise ValueError(f"Either `factor` or `rate` must be given, but they are {factor} and {rate}.")
        self._boundaries = array("q", [*starts, end])
        self._unit, self._factor, self._rate = unit * slow_motion, 1 if factor is None else factor, rate
        gone = set(dropped)
        # Numbers of the source frames that are not left out.
        self.kept = array("q", (index for index in range(len(starts)) if index not in gone))
        self._held = set(held)
        # Seconds by which a source frame's time may be rounded. A frame that is due within them is the source frame itself.
        self._rounding = min(unit, LONGEST_TICK) * slow_motion / 2
        # The unit, in seconds, of the times of shown frames.
        self.time_base: Fraction = 1 / rate if rate is not None else self._unit / self._factor
        # Frames of a rate fill the duration to within half a frame.
        self._frames_of_rate = 0 if rate is None else max(1, ceil(end * self._unit * rate - Fraction(1, 2)))

    @property
    def rate(self) -> Fraction | None:
        """Frames a second; None if times follow the source's."""
        return self._rate

    @property
    def duration(self) -> int:
        """The duration of the result, in units of `time_base`."""
        return self._frames_of_rate if self._rate is not None else self._boundaries[-1] * self._factor

    def __len__(self) -> int:
        """The number of frames that are shown."""
        return self._frames_of_rate if self._rate is not None else (len(self._boundaries) - 1) * self._factor

    def shown(self, first: int = 0, last: int | None = None) -> Iterator[list[ShownFrame]]:
        """
        The frames that are shown from one kept source frame up to another.

        Args:
            first, last: places of the two in `kept`; without `last`, up to the end.

        Yields:
            for each kept source frame, the frames from its time up to the next.
        """
        last = len(self.kept) if last is None else last
        for place in range(first, last):
            index = self.kept[place]
            following = self.kept[place + 1] if place + 1 < len(self.kept) else None
            times = list(self._times(index, len(self._boundaries) - 1 if following is None else following))
            if following is None:
                yield [ShownFrame(time, index, Fraction(0)) for time in times]
                continue
            start, end = self._at(index), self._at(following)
            rounding = self._rounding / self.time_base
            if index in self._held:
                yield [ShownFrame(time, index if end - time > rounding else following, Fraction(0)) for time in times]
                continue
            frames, near = [], max(rounding, (end - start) / NEAREST)
            for time in times:
                if time - start <= near:
                    frames.append(ShownFrame(time, index, Fraction(0)))
                elif end - time <= near:
                    frames.append(ShownFrame(time, following, Fraction(0)))
                else:
                    frames.append(ShownFrame(time, index, (time - start) / (end - start)))
            yield frames

    def made(self) -> int:
        """The number of shown frames that are not the source's."""
        return sum(bool(frame.position) for frames in self.shown() for frame in frames)

    def count(self, first: int, last: int) -> int:
        """The number of frames that `shown` gives."""
        begin = self.kept[first]
        end = self.kept[last] if last < len(self.kept) else len(self._boundaries) - 1
        if self._rate is None:
            return (end - begin) * self._factor
        return len(range(*self._numbers(begin, end)))

    def _at(self, boundary: int) -> Fraction:
        """When a source frame begins in the result, in units of `time_base`."""
        return self._boundaries[boundary] * self._unit / self.time_base

    def _numbers(self, index: int, following: int) -> tuple[int, int]:
        """Numbers of frames of a rate: of the first at or after one boundary, and of the first at or after another."""
        end = ceil(self._at(following)) if following < len(self._boundaries) - 1 else self._frames_of_rate
        return min(ceil(self._at(index)), self._frames_of_rate), min(end, self._frames_of_rate)

    def _times(self, index: int, following: int) -> Iterator[int]:
        if self._rate is not None:
            yield from range(*self._numbers(index, following))
            return
        for start, end in zip(self._boundaries[index:following], self._boundaries[index + 1 : following + 1]):
            for step in range(self._factor):
                yield start * self._factor + step * (end - start)
