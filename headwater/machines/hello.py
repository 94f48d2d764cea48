"""Who may do what on a server: what becomes of a Hello, decided from what the server knows now.

Pure. A verdict carries its reason. `wait` means that the Hello came too early: it is judged again when the
server has joined, knows a newer roster, has caught up with the log, or when a connection has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from headwater import messages as m


class HelloVerdict(NamedTuple):
    """What becomes of a Hello.

    Attributes:
        what: `wait`; `refuse` it, and say why; `close` the connection; or the sender is a `coordinator`, a
            `member` to be served, a server that `reports` to the sequencer here, or one that is `followed`
            because this is its standby.
        why: of the first three.
        sender: of the last three.
    """

    what: Literal["wait", "refuse", "close", "coordinator", "member", "reports", "followed"]
    why: str = ""
    sender: m.Member | None = None


@dataclass(frozen=True, slots=True)
class Self:
    """What a server knows of itself.

    `id` is 0 before it has joined; `serving` says whether members can be served.
    """

    id: int
    index: int
    role: m.Role
    cluster: str
    roster: m.Roster
    serving: bool


def judge(hello: m.Hello, own: Self, former: int | None = None) -> HelloVerdict:
    """What becomes of `hello`; `former`: the epoch of the connection that this member has here already."""
    if not own.id:
        return HelloVerdict("wait", "this server has not joined the cluster yet")
    if hello.cluster and own.cluster and hello.cluster != own.cluster:
        return HelloVerdict("refuse", f"this server is of cluster {own.cluster}, not {hello.cluster}")
    if hello.role == "coordinator":
        return HelloVerdict("coordinator")
    term = own.roster.term
    if term < hello.term:
        return HelloVerdict("wait", f"this server knows term {term}, the Hello is of term {hello.term}")
    sender = next((one for one in own.roster.members if one.id == hello.member), None)
    if hello.role == "server":
        return _judge_server(hello, sender, own)
    if sender is None:
        why = f"member {hello.member} is not in the roster of term {term}: join the coordinator first"
        return HelloVerdict("refuse", why)
    if own.role != "server":
        why = f"member {hello.member} came to a standby: ask the coordinator where the servers are"
        return HelloVerdict("refuse", why)
    if former is not None and former >= hello.connection_epoch:
        return HelloVerdict("refuse", f"member {hello.member} is connected to this server already")
    if not own.serving:
        return HelloVerdict("wait", f"server {own.index} does not serve members yet", sender)
    if former is not None:
        return HelloVerdict(
            "wait", f"the former connection of member {hello.member} has not ended yet", sender
        )
    return HelloVerdict("member", sender=sender)


def _judge_server(hello: m.Hello, sender: m.Member | None, own: Self) -> HelloVerdict:
    if sender is None or sender.role != "server":
        return HelloVerdict("close", f"member {hello.member} is no server in term {own.roster.term}")
    if sender.index == own.index:
        if own.role == "standby":
            return HelloVerdict("followed", sender=sender)
        return HelloVerdict("close", f"member {hello.member} takes server {own.index} for its standby")
    if own.index == 0 and own.role == "server":
        return HelloVerdict("reports", sender=sender)
    return HelloVerdict("close", f"server {sender.index} wants to report to {own.role} {own.index}")
