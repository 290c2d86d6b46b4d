"""Progress of a video, shown by a bar or told to a callback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..terminal import bar_settings


# It gets the name of what is being done, the frames that are done, and all of them if that is known.
Progress = Callable[[str, int, int | None], None]


@contextmanager
def progress_bar(
    show: bool | Progress, name: str, total: int | None = None, done: int = 0
) -> Iterator["tqdm | CallbackBar"]:
    """
    A bar to be updated with each frame.

    Args:
        show: whether to show it; or a callback that gets the progress instead.
        name: the name of what is being done.
        total: all frames, if they are known.
        done: frames that are done already.
    """
    if callable(show):
        yield CallbackBar(show, name, done, total)
        return
    with tqdm(disable=not show, **bar_settings("frame", "frames"), desc=name, total=total, initial=done) as bar:
        yield bar


class CallbackBar:
    """What stands for a bar where a callback gets the progress."""

    def __init__(self, tell: Progress, name: str, done: int, total: int | None):
        self._tell, self._name, self._done, self._total = tell, name, done, total
        tell(name, done, total)

    def update(self, count: int = 1) -> None:
        self._done += count
        self._tell(self._name, self._done, self._total)
