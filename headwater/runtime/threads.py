"""A thread for every connection of a node, and the end of all of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

from headwater.errors import ConnectionLostError, HeadwaterError
from headwater.loggers import logger
from headwater.messages import Traffic
from headwater.wire.channel import Channel
from headwater.wire.endpoint import Endpoint
from headwater.wire.listener import Listener

_log = logger("headwater")


class ConnectionThreads:
    """The threads and channels of one node; what one connection does wrong ends that connection only.

    `name` prefixes the threads' names and the log lines.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._channels: set[Channel] = set()
        self._threads: set[threading.Thread] = set()
        self._sent: Counter[str] = Counter()  # over connections that have ended, by transport
        self._received: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()  # connections that were ended here, by why
        self._closed = False

    def listen(
        self, reach: Endpoint, serve: Callable[[Channel], None], *, towards: str = ""
    ) -> tuple[str, ...]:
        """Accept connections from now on; `serve` runs in each one's thread until it ends.

        Returns what others dial, the nearest first; `towards` as `Endpoint.listen`, which also raises.
        """
        listeners, addresses = reach.listen(towards=towards)
        self._listeners += listeners
        for listener in listeners:
            self.start(partial(self._accept, listener, serve), "listen")
        return addresses

    def start(self, run: Callable[[], None], what: str) -> None:
        """Run something else in a thread of this node; its errors are logged."""
        thread = threading.Thread(target=self._guard, args=(run,), name=f"{self.name}-{what}", daemon=True)
        with self._lock:
            if self._closed:
                return
            self._threads.add(thread)
            thread.start()

    def own(self, channel: Channel) -> Channel:
        """Close `channel` with the node."""
        with self._lock:
            self._channels.add(channel)
            closed = self._closed
        if closed:
            channel.close()
        return channel

    def channels(self) -> list[Channel]:
        """All that are open, for whoever looks whether their peers live."""
        with self._lock:
            return [channel for channel in self._channels if channel.fileno() >= 0]

    def traffic(self) -> Traffic:
        """What this node has sent and received so far."""
        with self._lock:
            sent, received, refused = self._sent.copy(), self._received.copy(), self._refused.copy()
            channels = list(self._channels)
        for channel in channels:
            sent[channel.transport] += channel.sent
            received[channel.transport] += channel.received
        for listener in self._listeners:
            refused.update(listener.refused)
        return Traffic(len(channels), dict(sent), dict(received), dict(refused))

    def close_channels(self) -> None:
        """Stop accepting and wake every thread that reads; idempotent."""
        with self._lock:
            self._closed = True
            channels = list(self._channels)
        for listener in self._listeners:
            listener.close()
        for channel in channels:
            channel.close()

    def join(self) -> None:
        """Block until every thread but the calling one has ended."""
        with self._lock:
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in threads:
            thread.join()

    def _accept(self, listener: Listener, serve: Callable[[Channel], None]) -> None:
        while (channel := listener.accept()) is not None:
            self.start(partial(self.converse, channel, serve), "connection")

    def converse(self, channel: Channel, serve: Callable[[Channel], None]) -> None:
        """Own `channel` while `serve` uses it, in this thread; then close it."""
        try:
            serve(self.own(channel))
        finally:
            channel.close()
            with self._lock:
                self._channels.discard(channel)
                self._sent[channel.transport] += channel.sent
                self._received[channel.transport] += channel.received

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except ConnectionLostError as error:
            _log.info("%s lost a connection: %s", self.name, error)  # the coordinator tells deaths
        except HeadwaterError as error:
            if not self._closed:
                self._refused["protocol"] += 1
                _log.warning("%s closes a connection: %s", self.name, error)
        except TimeoutError as error:
            self._refused["silent"] += 1
            _log.warning("%s closes a silent connection: %s", self.name, error)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())
