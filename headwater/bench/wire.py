"""The wire alone: the bytes of a dense model to two processes and back, against plain sockets."""

from __future__ import annotations

import ssl
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from headwater.bench.figures import Effort, Figure
from headwater.bench.peer import tls_context
from headwater.bench.plain import make_socket_copy, peers, started
from headwater.bench.turns import take_turns
from headwater.messages import Pull, TensorSpec
from headwater.spec.layout import Layout
from headwater.wire.certificates import new_authority, new_node, write_new
from headwater.wire.channel import Outgoing
from headwater.wire.exchange import exchange
from headwater.wire.listener import dial
from headwater.wire.security import TLS, Security

_SERVERS = 2
_DEADLINE_S = 60.0


def measure_tcp(effort: Effort) -> list[Figure]:
    """Frames over loopback TCP against plain sockets."""
    return [_measure("tcp", effort, ())]


def measure_tls(effort: Effort) -> list[Figure]:
    """Frames over TLS on loopback against ssl sockets, with the same certificates."""
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as directory:
        ca, certificate, key = (Path(directory) / name for name in ("ca.pem", "node.pem", "node.key"))
        authority = new_authority()
        write_new(authority, ca, Path(directory) / "ca.key")
        write_new(new_node(authority, ["localhost", "127.0.0.1"]), certificate, key)
        return [_measure("tls", effort, (str(ca), str(certificate), str(key)))]


def _measure(kind: str, effort: Effort, files: tuple[str, ...]) -> Figure:
    specs = [TensorSpec(name, shape, "float32") for name, shape in effort.shapes.items()]
    size = 4 * Layout(specs).elements // _SERVERS
    echo = [sys.executable, "-m", "headwater.bench.echo", str(size), *files]
    with ExitStack() as running:
        plain = running.enter_context(peers(kind, _SERVERS, size, files))
        ours = running.enter_context(started(echo, _SERVERS))
        context = tls_context(ssl.PROTOCOL_TLS_CLIENT, *files) if files else None
        times = take_turns(
            {
                "frames": _make_frame_copy([address for address, _ in ours], size, files, running),
                "sockets": make_socket_copy([address for address, _ in plain], size, context),
            },
            repeats=effort.repeats,
            rounds=effort.rounds,
        )
    frames, sockets = median(times["frames"]), median(times["sockets"])
    return Figure(
        case=f"the dense model's bytes there and back, {kind}",
        figure=1 / frames,
        unit="rounds/s",
        limit_name="plain ssl sockets" if files else "plain sockets",
        limit=1 / sockets,
        ratio=sockets / frames,
        target=0.8,
        at_most=False,
    )


def _make_frame_copy(
    addresses: list[str], size: int, files: tuple[str, ...], running: ExitStack
) -> Callable[[], None]:
    """A function that sends `size` bytes to each echo and takes them back, all at once; as workers do."""
    security = Security(tls=TLS(*files) if files else None)
    channels = [dial(address, timeout=_DEADLINE_S, security=security) for address in addresses]
    for channel in channels:
        running.callback(channel.close)
    outgoing, incoming = ([memoryview(bytearray(size)) for _ in channels] for _ in range(2))

    def copy() -> None:
        exchange(
            channels,
            [Outgoing(Pull(1, (0,), 0), [payload]) for payload in outgoing],
            lambda index, received: True,
            lambda index, message, length: [incoming[index]],
            _DEADLINE_S,
            1,
        )

    return copy
