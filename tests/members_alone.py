"""A member's machine without a world around it: what it asks for is kept, and the test says what happens."""

from dataclasses import dataclass, field

from headwater import messages as m
from headwater.machines.actions import Close, Dial, Note, Send, Tell
from headwater.machines.client import Asked, Call, ClientMachine
from headwater.machines.connections import Frame
from headwater.machines.membership import COORDINATOR

ADDRESS = "tcp:coordinator:7000"
PATIENCE, DEADLINE, HEARTBEAT = 10.0, 60.0, 5.0


def server(index, id=None):
    return m.Member(100 + index if id is None else id, "server", index, 1, "there", (f"tcp:server{index}:1",))


def welcome(servers=1, *, role="worker", index=0, id=7, returns=False, **more):
    return m.Welcome(
        member=m.Member(id, role, index, 1, "here"),
        term=5,
        servers=tuple(server(index) for index in range(servers)),
        workers=2,
        sync="async",
        settings={},
        patience=PATIENCE,
        deadline=DEADLINE,
        heartbeat=HEARTBEAT,
        key="secret",
        generation=3,
        cluster="this one",
        returns=returns,
        **more,
    )


def addresses(*ids):
    return m.ServerAddresses(6, tuple(server(index, id) for index, id in enumerate(ids)))


@dataclass
class Memory:
    """A buffer that says what happens to it."""

    renewed: int = 0
    known: set = field(default_factory=set)

    def renew(self):
        self.renewed += 1

    def offer(self, server, shared, anew):
        if not anew and server in self.known:
            return None
        self.known.add(server)
        return Frame(m.Renew(server, None), (), ("memory",) if shared else ())


class Alone:
    """`machine`, its connections by number, and what it has asked for since it was last looked at.

    Attributes:
        now: seconds; `conn`: of the last connection; `asked`: the last request, if there was one.
    """

    def __init__(self, role="worker", deadline=None):
        self.machine = ClientMachine(ADDRESS, m.Join(role, None, 1, "here"), deadline=deadline)
        self.now = 0.0
        self.conn = 0
        self.actions = []
        self.asked = None

    @property
    def membership(self):
        return self.machine.membership

    def _did(self, actions):
        self.actions += actions
        for event in [action.event for action in actions if isinstance(action, Tell)]:
            if isinstance(event, Asked):
                self.asked = event
        return self

    def taken(self, *kinds):
        """What it asked for since the last look, of these kinds, or all; events for `Tell`."""
        actions, self.actions = self.actions, []
        found = [action for action in actions if not kinds or isinstance(action, kinds)]
        return [action.event if isinstance(action, Tell) else action for action in found]

    def events(self, *kinds):
        return [event for event in self.taken(Tell) if not kinds or isinstance(event, kinds)]

    def sent(self):
        return [send.message for send in self.taken(Send)]

    def notes(self):
        return [note.text for note in self.taken(Note)]

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def at(self, now):
        """Let time pass, tick by tick, until then."""
        while (due := self.machine.due) is not None and due <= now:
            self.now = max(self.now, due)
            self._did(self.machine.tick(self.now))
        self.now = now
        return self

    def open(self, tag, shared=False):
        self.conn += 1
        self._did(self.machine.opened(self.conn, tag, self.now, shared=shared))
        return self.conn

    def says(self, message, conn=None):
        """The coordinator, or the server at `conn`."""
        conn = self.membership.conn if conn is None else conn
        return self._did(self.machine.received(conn, message, None, self.now))

    def server_says(self, index, message):
        return self.says(message, self.machine.connections.links[index])

    def loses(self, conn):
        return self._did(self.machine.closed(conn, self.now))

    def fails(self, tag, error, nobody=False):
        why = str(error)
        return self._did(self.machine.unreachable(tag, why, self.now, error=error, nobody=nobody))

    def does(self, verb, *arguments):
        return self._did(verb(*arguments))

    # ── several at once ─────────────────────────────────────────────────────────────────────────

    def dials(self):
        """The tags that it has dialled since the last look, the last one last."""
        return [dial.tag for dial in self.taken(Dial)]

    def connect(self, shared=False):
        """Every server that is dialled is there."""
        while dialled := [action for action in self.actions if isinstance(action, Dial)]:
            self.actions = [action for action in self.actions if not isinstance(action, Dial)]
            self.open(dialled[-1].tag, shared)
        return self

    def joined(self, servers=1, *, shared=False, **more):
        """A member with all its connections."""
        self.does(self.machine.join, self.now)
        self.open(COORDINATOR)
        self.taken()
        self.says(welcome(servers, **more)).connect(shared)
        assert self.machine.connections.stage == "connected"
        self.taken()
        return self

    def call(self, what="pull", **more):
        """Begin an exchange."""
        self.does(self.machine.call, pull(what, **more), self.now)
        return self

    def answer(self, index=0, version=1, **more):
        return self.server_says(index, m.Answer(self.machine.number, version, **more))


def pull(what="pull", **more):
    return Call(what, lambda server, number: Frame(m.Pull(number, (server,), -1)), **more)


def closed(actions):
    return [action.conn for action in actions if isinstance(action, Close)]
