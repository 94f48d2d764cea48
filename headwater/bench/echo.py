"""The other end of a copy through Headwater's own wire: takes a frame with some bytes and sends them back.

Run as a program: `python -m headwater.bench.echo BYTES [CA CERTIFICATE KEY]` prints its address and ends at
the end of its standard input.
"""

from __future__ import annotations

import os
import sys
import threading

from headwater.messages import Answer
from headwater.wire.channel import Channel
from headwater.wire.listener import Listener
from headwater.wire.security import TLS, Security


def main(size: int, *files: str) -> None:
    """Serve until standard input ends."""
    listener = Listener("tcp", security=Security(tls=TLS(*files) if files else None))
    print(listener.address, flush=True)
    threading.Thread(target=_accept, args=(listener, size), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


def _accept(listener: Listener, size: int) -> None:
    while (channel := listener.accept()) is not None:
        threading.Thread(target=_echo, args=(channel, size), daemon=True).start()


def _echo(channel: Channel, size: int) -> None:
    memory = memoryview(bytearray(size))
    while channel.receive(lambda message, length: [memory]) is not None:
        channel.send(Answer(1, 1), buffers=[memory])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
