"""Ctrl-C and SIGTERM, for processes that end cleanly when they are told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals_to(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with the number of the first signal, in the main thread; a second one ends this process
    at once. For the main thread.

    A forked child, such as torch's DataLoader has, ends with the first.
    """
    owner = os.getpid()

    def first(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            _end_now(number, frame)
        for other in _SIGNALS:
            signal.signal(other, _end_now)
        receive(number)

    before = {number: signal.signal(number, first) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_now(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
