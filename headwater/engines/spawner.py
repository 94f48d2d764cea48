"""The thread that starts an engine's processes.

Linux ends a child when the *thread* that started it ends (`child` asks for that). So none is started by a
thread of the user's, or of a supervisor, that may end before the engine is closed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from headwater.errors import EngineError


class Spawner:
    """Calls functions in a thread of its own that lives until `close`, or as long as this process."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="headwater-spawner", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Call it there; blocks until it has returned, and raises what it raises.

        Raises:
            EngineError: it is closed.
        """
        done: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed: it starts no more nodes")
            self._calls.put((function, done))
        done.result()

    def close(self) -> None:
        """End the thread, and with it every child that it started; idempotent."""
        with self._lock:
            self._closed = True
            self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, done = call
            try:
                function()
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that called
                done.set_exception(error)
            else:
                done.set_result(None)
