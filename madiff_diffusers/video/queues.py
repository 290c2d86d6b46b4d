"""Queues by which frames are decoded ahead and encoded behind, each in a thread of its own."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar


T = TypeVar("T")


class _End:
    """What marks the end of the items."""


@contextmanager
def prefetch_queue(items: Iterable[T], depth: int, stop: threading.Event | None = None) -> Iterator[Iterator[T]]:
    """
    Let a thread get items while earlier ones are used.

    Args:
        items: the items. Where they are a generator, it is closed at the end.
        depth: the greatest number of items that wait to be used.
        stop: is set at the end, for items that are long in coming.
    """
    end, iterator = _End(), iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def take() -> Iterator[T]:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while not isinstance(item := waiting.popleft().result(), _End):
            waiting.append(pool.submit(next, iterator, end))
            yield item

    try:
        yield take()
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        if hasattr(iterator, "close"):
            iterator.close()


class CallQueue:
    """
    Calls that a thread makes one after the other. An error of a call is raised by a later `submit` or by `wait`.

    Args:
        depth: the greatest number of calls that wait to be made; `submit` waits while there are as many.
    """

    def __init__(self, depth: int):
        self._depth, self._pool = depth, ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._waiting: deque[Future[None]] = deque()

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call once those before it are made."""
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))

    def wait(self) -> None:
        """Wait until all calls are made."""
        while self._waiting:
            self._waiting.popleft().result()

    def cancel(self) -> None:
        """Drop the calls that wait, and wait for the one that is being made, whatever it raises."""
        for future in self._waiting:
            future.cancel()
        for future in self._waiting:
            if not future.cancelled():
                future.exception()
        self._waiting.clear()

    def __enter__(self) -> "CallQueue":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
