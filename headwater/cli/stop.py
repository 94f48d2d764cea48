"""`headwater stop`: end a running cluster in order."""

from __future__ import annotations

import getpass
import os
import socket
import time
from typing import Annotated

import typer

from headwater.cli.options import Address, command, credentials, the
from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError, StalledError
from headwater.messages import Acknowledged, EndCluster
from headwater.runtime.inquiry import ANSWER_S, ask
from headwater.wire.listener import dial
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_AGAIN_S = 0.2


@command(app, security=credentials())
def stop(
    address: Address = None,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long the cluster may take to end.")
    ] = 60.0,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """End a running cluster, with a last checkpoint where it keeps some; returns once it has ended.

    Workers are told that the cluster is closed, in the middle of what they do. `headwater run` and `run` then
    end with an error that says who has ended it.

    [bold]Example[/bold]

    headwater stop tcp:node1:7000 --token-file token

    Exit codes: 0 it has ended, 1 it has not, 2 a wrong argument.
    """
    where = the(address)
    until = time.monotonic() + wait
    _ask_for_the_end(where, security)
    while _answers(where, security):
        if time.monotonic() > until:
            raise StalledError(f"the cluster at {where} has not ended within {wait:g} s; it still answers")
        time.sleep(_AGAIN_S)
    print(f"the cluster at {where} has ended")


def _ask_for_the_end(address: str, security: Security) -> None:
    channel = dial(address, timeout=ANSWER_S, security=security)
    try:
        channel.send(EndCluster(f"headwater stop ({who()})"), timeout=ANSWER_S)
        received = channel.receive(timeout=ANSWER_S)
    except TimeoutError as error:
        raise ConnectionLostError(f"{address} did not answer for {ANSWER_S:g} s") from error
    finally:
        channel.close()
    if received is None or not isinstance(received.message, Acknowledged):
        raise ProtocolError(f"what listens at {address} is no coordinator: give the address of the cluster")


def who() -> str:
    """Who gives this command, for the log of the cluster."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        name = f"user {os.getuid()}"
    return f"{name}, pid {os.getpid()} on {socket.gethostname()}"


def _answers(address: str, security: Security) -> bool:
    try:
        ask(address, security)
    except HeadwaterError:
        return False
    return True
