"""What is to leave over one connection, in the order in which it was put there.

Any thread puts; one thread at a time is the *sender*. Whoever puts into an outbox that has no sender
becomes it, and sends what the kernel takes at once; if that is not all, another thread goes on. So nobody
blocks for a peer who did not come for that, and an outbox that is empty needs no thread.

The thread that reads from the connection may be the sender for longer. While the machine decides what
follows from a message, and while the connection is paused, it waits here for what is to be sent: so a
member's own thread sends its answer, and whoever decided it goes on.

What waits may be joined: `join` makes one message of two.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from headwater.errors import ConnectionLostError
from headwater.loggers import logger
from headwater.machines.actions import Close, Send
from headwater.messages import AnyMessage
from headwater.wire.channel import Channel

_log = logger("headwater")

Join: TypeAlias = Callable[[AnyMessage, AnyMessage], AnyMessage | None]


class _Resume:
    """Stands in the queue where the connection's thread reads on."""


RESUME: Final = _Resume()

Item: TypeAlias = Send | Close | _Resume


class Outbox:
    """Of `channel`. Only `drain`, `finish` and `wait_until_empty` block."""

    def __init__(self, channel: Channel, join: Join | None = None) -> None:
        self._channel = channel
        self._join = join
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for those who wait until it is empty
        self._items: deque[Item] = deque()
        self._sending = False  # somebody is the sender
        self._parked = False  # the connection's thread is the sender, and waits for something to send
        self._heir = False  # it waits to become the sender
        self._resumed = False  # another sender came past RESUME
        self._bell = threading.Lock()
        self._bell.acquire()
        self._watched = 0
        self._begun = False  # a part of a message has left, and the sender sends the rest first

    # ── any thread ──────────────────────────────────────────────────────────────────────────────

    def put(self, item: Item) -> bool:
        """Let this leave after what was put before. True: the caller is the sender now, and calls `push`."""
        with self._lock:
            self._items.append(item)
            if not self._sending:
                self._sending = True
                return True
            if not self._parked:
                return False
            self._parked = False
        self._bell.release()
        return False

    def push(self) -> bool:
        """As the sender: send what the kernel takes at once. False: any thread is to call `drain`."""
        while (item := self._next()) is not None:
            try:
                if isinstance(item, Send) and not self._channel.try_send(
                    item.message, request=item.request, buffers=item.buffers, descriptors=item.descriptors
                ):
                    self._begun = True
                    return False
                if isinstance(item, Close):
                    self._channel.finish()
            except ConnectionLostError as error:
                _log.debug("not sent: %s", error)  # whoever reads from it finds the end
        return True

    def drain(self) -> None:
        """As the sender: send until nothing is left; what cannot be sent any more is dropped."""
        if self._begun:
            self._begun = False
            try:
                self._channel.flush()
            except ConnectionLostError as error:
                _log.debug("not sent: %s", error)  # whoever reads from it finds the end
        while (item := self._next()) is not None:
            self._send(item)

    def wait_until_empty(self, seconds: float) -> bool:
        """Block until all has left, for at most so long; whether it has."""
        with self._changed:
            self._watched += 1
            try:
                return self._changed.wait_for(lambda: not self._sending, seconds)
            finally:
                self._watched -= 1

    # ── the thread that reads from the connection ───────────────────────────────────────────────

    def claim(self) -> bool:
        """Become the sender before anything is put, if nobody is; whether that worked."""
        with self._lock:
            if self._sending:
                return False
            self._sending = True
            return True

    def send_ready(self) -> None:
        """As the sender: send what is there, and stay the sender."""
        while self._items:
            item = self._items[0]
            if item is RESUME:
                return
            self._send(self._items.popleft())

    def finish(self, claimed: bool, paused: bool) -> None:
        """Send what is there; where the connection is paused, whatever comes until it is not."""
        if not paused:
            if claimed:
                self.drain()
            return
        if not claimed and not self._inherit():
            return
        while (item := self._wait()) is not RESUME:
            self._send(item)
            if isinstance(item, Close):
                break  # the machine takes nothing more, so what comes is read until the end
        self.drain()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _next(self) -> Send | Close | None:
        """What the sender sends next; None: it is the sender no more."""
        with self._lock:
            while self._items and not self._heir:
                item = self._items.popleft()
                if not isinstance(item, _Resume):
                    return item if self._join is None or not self._items else self._joined(item)
                self._resumed = True
            if not self._heir:
                self._sending = False
                if self._watched:
                    self._changed.notify_all()
                return None
            self._heir = False
        self._bell.release()
        return None

    def _joined(self, item: Send | Close) -> Send | Close:
        """The item, with what follows it where that makes one message."""
        if self._join is None or not isinstance(item, Send):
            return item
        while self._items and isinstance(following := self._items[0], Send):
            if item.buffers or following.buffers or item.descriptors or following.descriptors:
                return item
            message = self._join(item.message, following.message)
            if message is None:
                return item
            self._items.popleft()
            item = item._replace(message=message)
        return item

    def _inherit(self) -> bool:
        """Become the sender after the one who is; False where what this would wait for came by meanwhile."""
        with self._lock:
            if self._resumed:
                self._resumed = False
                return False
            if not self._sending:
                self._sending = True
                return True
            self._heir = True
        self._bell.acquire()
        with self._lock:
            resumed, self._resumed = self._resumed, False
        if resumed:
            self.drain()
        return not resumed

    def _wait(self) -> Item:
        while True:
            with self._lock:
                if self._resumed:
                    self._resumed = False
                    return RESUME
                if self._items:
                    return self._items.popleft()
                self._parked = True
            self._bell.acquire()

    def _send(self, item: Item) -> None:
        if type(item) is Send:
            try:
                self._channel.send(
                    item.message, request=item.request, buffers=item.buffers, descriptors=item.descriptors
                )
            except ConnectionLostError as error:
                _log.debug("not sent: %s", error)  # whoever reads from it finds the end
        elif type(item) is Close:
            self._channel.finish()
