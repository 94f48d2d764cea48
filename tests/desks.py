"""A coordinator's machine driven by hand: time is a number, so are connections, and hosts answer at once."""

from headwater.machines.actions import Close, Dial, Note, Perform, Persist, Send, Tell
from headwater.machines.coordinator import CheckAddresses, CoordinatorMachine, Identity
from headwater.messages import (
    Acknowledged,
    Ask,
    DataProgress,
    Heartbeat,
    Hello,
    Join,
    JoinWaits,
    Rejoin,
    Roster,
    ServerStatistics,
    Welcome,
)
from headwater.spec.cluster import ClusterConfig

IDENTITY = Identity("c1", b"secret", returns=True, pid=1)


class Node:
    """One end of a connection to the desk."""

    def __init__(self, desk, conn):
        self.desk = desk
        self.conn = conn
        self.said = []
        self.closed = False

    def say(self, message):
        self.desk.does(lambda machine, now: machine.received(self.conn, message, None, now))
        return self

    def hangs_up(self):
        if not self.closed:
            self.closed = True
            self.desk.ends(self.conn)

    def last(self, kind=object):
        """The last message of this kind; None without one."""
        return next((one for one in reversed(self.said) if isinstance(one, kind)), None)

    @property
    def welcome(self):
        return self.last(Welcome)

    @property
    def member(self):
        return self.welcome.member if self.welcome is not None else None

    @property
    def waits(self):
        waits = self.last(JoinWaits)
        return waits.reason if waits is not None else None


class Desk:
    """A machine and what it asked for.

    Attributes:
        said: messages in order, as (connection, message); kept: records; told, notes, tasks: in order.
        deaf: ids of hosts that answer nothing; unreachable: of those that cannot be dialled, and whether
            that is since nobody listens there.
        recorded, enrolled: what server 0 says that the log recorded, and which workers are in it.
        beating: whether members say that they live whenever time passes.
    """

    def __init__(self, *, workers=1, servers=1, record=None, enlists=False, identity=IDENTITY, **settings):
        settings = {"patience": 10.0, "deadline": 60.0, "lease": 15.0, **settings}
        if settings.pop("rewinds", False):
            settings["checkpoint"] = "runs/a"
        self.now = 1000.0
        self.settings = ClusterConfig(workers=workers, servers=servers, **settings)
        self.machine = CoordinatorMachine(
            self.settings, identity, self.now, record=record, enlists=enlists, answer_s=2.0
        )
        self.nodes = {}
        self.hosts = {}
        self.said, self.kept, self.told, self.notes, self.tasks, self.done = [], [], [], [], [], []
        self.deaf = set()
        self.unreachable = {}
        self.recorded = DataProgress()
        self.enrolled = ()
        self.reachable = True
        self.ended = set()
        self._unheard = {}
        self._last = 0
        self._todo = []
        self._busy = False
        self.does(lambda machine, now: machine.begin(now))

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def does(self, event):
        """Let something happen, and whatever follows."""
        self._todo.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._todo:
                self._take(self._todo.pop(0)(self.machine, self.now))
        finally:
            self._busy = False

    def ends(self, conn):
        self.does(lambda machine, now: machine.closed(conn, now))

    def connect(self):
        node = Node(self, self._number())
        self.nodes[node.conn] = node
        self.does(lambda machine, now: machine.opened(node.conn, None, now))
        return node

    def joins(self, role, index=None, cluster=""):
        return self.connect().say(Join(role, index, 7, "there", (f"unix:@{role}",), cluster=cluster))

    def rejoins(self, welcome, **changed):
        shown = {"key": welcome.key, "generation": welcome.generation, "cluster": welcome.cluster, **changed}
        return self.connect().say(Rejoin(welcome.member.id, **shown))

    def passes(self, seconds, beating=True):
        """Let time pass, with ticks when they are due; members say now and then that they live."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, max(self.machine.due, self.now))
            if beating:
                for node in self.members():
                    node.say(Heartbeat())
            self.does(lambda machine, now: machine.tick(now))

    def stands_still(self, seconds):
        """The process does not run for so long, and its clock is the first that it looks at."""
        self.now += seconds
        self.does(lambda machine, now: machine.tick(now))

    # ── what there is ───────────────────────────────────────────────────────────────────────────

    @property
    def book(self):
        return self.machine.state.book

    def members(self):
        return [node for node in self.nodes.values() if node.welcome is not None and not node.closed]

    def roster(self, id):
        """The last that a host was told."""
        return next(
            (m for conn, m in reversed(self.said) if self.hosts.get(conn) == id and _is_roster(m)), None
        )

    def running(self, *roles):
        """A running cluster: its servers, then a node of each role."""
        servers = [self.joins("server", index) for index in range(self.settings.servers)]
        return [*servers, *(self.joins(role) for role in roles)]

    def record(self):
        """What a coordinator that is started again finds."""
        return self.kept[-1] if self.kept else None

    # ── as a driver does ────────────────────────────────────────────────────────────────────────

    def _number(self):
        self._last += 1
        return self._last

    def _take(self, actions):
        for action in actions:
            self.done.append(action)
            if isinstance(action, Send):
                self.said.append((action.conn, action.message))
                if action.conn in self.nodes:
                    self.nodes[action.conn].said.append(action.message)
                else:
                    self._unheard.setdefault(action.conn, []).append(action.message)
                    self._answer(action.conn)
            elif isinstance(action, Close):
                self.ended.add(action.conn)
                if action.conn in self.nodes:
                    self.nodes[action.conn].closed = True
                self.does(lambda machine, now, conn=action.conn: machine.closed(conn, now))
            elif isinstance(action, Dial):
                self._dial(action)
            elif isinstance(action, Persist):
                self.kept.append(action.record)
            elif isinstance(action, Tell):
                self.told.append(action.event)
            elif isinstance(action, Note):
                self.notes.append(action.text)
            elif isinstance(action, Perform):
                self.tasks.append(action)
                if isinstance(action.task, CheckAddresses) and self.reachable:
                    self.performs(action, None)

    def performs(self, action, result):
        self.does(lambda machine, now: machine.performed(action.tag, result, now))

    def _dial(self, dial):
        id = dial.member.id
        if id in self.unreachable:
            nobody = self.unreachable[id]
            self.does(
                lambda machine, now: machine.unreachable(dial.tag, "connection refused", now, nobody=nobody)
            )
            return
        conn = self._number()
        self.hosts[conn] = id
        self.does(lambda machine, now: machine.opened(conn, dial.tag, now))

    def _answer(self, conn):
        """A host answers what it was told, in order, unless it is deaf now."""
        id = self.hosts[conn]
        while self._unheard[conn] and id not in self.deaf:
            message = self._unheard[conn].pop(0)
            assert isinstance(message, Hello | Roster | Ask), message
            if not isinstance(message, Hello):
                answer = Acknowledged() if isinstance(message, Roster) else self._statistics(id)
                self.does(
                    lambda machine, now, answer=answer: (
                        machine.received(conn, answer, None, now) if conn not in self.ended else []
                    )
                )

    def _statistics(self, id):
        member = self.book.member(id)
        role, index = (member.role, member.index) if member is not None else ("server", 0)
        known = (id, role, index, 3, 4, self.book.term, 0, (), (), {}, self.recorded)
        return ServerStatistics(*known, enrolled=self.enrolled)


def _is_roster(message):
    return isinstance(message, Roster)
