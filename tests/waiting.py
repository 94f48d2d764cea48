"""Waiting for what other processes do: looks again and again, for a bounded time."""

import threading
import time


def wait_until(condition, seconds=60.0, why=lambda: "", watch=None):
    """Look until it is true; returns what it then was. `why`: more to say where it never came true.

    `watch`: what has `next_outcome`, such as a cluster. A worker that ends meanwhile will not make the
    condition true, so its failure is raised at once.
    """
    until = time.monotonic() + seconds
    while not (came := condition()):
        if watch is not None and (ended := watch.next_outcome(0.02)) is not None:
            told = ended.failure.trace or ended.failure.summary if ended.failure else "without a failure"
            raise AssertionError(f"{ended.role} {ended.index} ended before it came true: {told} {why()}")
        assert time.monotonic() < until, f"it never came true {why()}"
        if watch is None:
            threading.Event().wait(0.02)
    return came
