"""A step on its way: sent, and not answered yet, while its worker goes on computing."""

from __future__ import annotations

from headwater.messages import StepResult
from headwater.runtime.client import Client


class PendingStep:
    """What `Worker.begin_step` returns. Used by the worker's thread.

    Until `result` has returned, the memory of models and tables is the servers': nothing can be pushed,
    pulled or assigned, and no other step or meeting begun (UsageError). Settings can be changed, data be
    read on and plain data kept: what is read or kept after the step was begun belongs to the next one. The
    end of the data, and leaving, wait for the answer.
    """

    def __init__(self, client: Client, what: str) -> None:
        self._client = client
        self._what = what
        self._result: StepResult | None = None
        client.under_way = what

    @property
    def done(self) -> bool:
        """Whether `result` would return, or raise, at once. Does not block."""
        return self._result is not None or self._client.poll()

    def result(self, timeout: float | None = None) -> StepResult:
        """What became of the step; blocks until it is answered. The values that it read are there then.

        The cluster's deadline counts from here on. `timeout`: seconds; with None only that deadline counts.

        Raises:
            TimeoutError: it is not answered yet; ask again later.
            StalledError, ConnectionLostError, RewoundError, ClosedError: as `Worker.step`, and as final.
        """
        if self._result is None and timeout is not None and not self._client.poll(max(timeout, 0.0)):
            raise TimeoutError(f"{self._what} has no answer after {timeout:g} s: ask again later")
        if self._result is None:
            self._client.finish()
        if self._result is None:
            self._client.under_way = ""
            self._client.check_open(self._what)
        assert self._result is not None
        return self._result

    def arrived(self, result: StepResult) -> None:
        """Its answer was taken: the memory is the worker's again."""
        self._client.under_way = ""
        self._result = result
