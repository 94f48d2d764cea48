"""Waiting for what other processes do: looks again and again, for a bounded time."""

import threading
import time


def wait_until(condition, seconds=60.0, why=lambda: ""):
    """Look until it is true; returns what it then was. `why`: more to say where it never came true."""
    until = time.monotonic() + seconds
    while not (came := condition()):
        assert time.monotonic() < until, f"it never came true {why()}"
        threading.Event().wait(0.02)
    return came
