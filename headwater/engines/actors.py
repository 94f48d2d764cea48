"""Nodes as actors of a Ray cluster: the engine that `RayEngine` starts.

Ray carries what a node starts with, the lines it prints and what `train` returns; everything else goes over
Headwater's own connections. Ray restarts nothing by itself: a node that ended is reported, and whoever starts
another one in its stead gets a place where Ray has one left.
"""

from __future__ import annotations

import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

from headwater.engines.actor import Message, NodeActor, machine
from headwater.engines.engine import Failure, Launch, Outcome, Process
from headwater.engines.logs import Logs
from headwater.engines.output import Output, prefixed
from headwater.engines.packing import pack_train, unpack_outcome
from headwater.engines.places import Places, RayConnection
from headwater.engines.ray import RayEngine
from headwater.engines.seating import BundleSlots, seats_of_shards
from headwater.loggers import logger
from headwater.messages import Assignment
from headwater.wire.endpoint import Endpoint
from headwater.worker import Worker

_log = logger("headwater.engine")

_STOP_S = 1.5
"""How long killed actors may take to be gone, in seconds."""
_UNREAD = 16
"""Messages of one actor that may wait to be taken; then it waits."""
_WORDS = 400


class _Group:
    """The places of one kind of node, who has them, and what its actors are created with."""

    def __init__(self, places: Places, seats: BundleSlots, runtime_env: dict[str, Any]) -> None:
        self.places, self.seats = places, seats
        self._runtime_env = runtime_env

    def create(self, place: int) -> Any:
        """Create an actor there; does not wait for it."""
        options = {**self.places.options(place), "runtime_env": self._runtime_env, "max_restarts": 0}
        return ray.remote(NodeActor).options(**options).remote()


class _Node:
    """One actor, and the thread that creates it, takes what it says and notices its end."""

    def __init__(self, role: str, index: int, group: _Group, timeout: float, output: Output) -> None:
        self.role, self.index = role, index
        self._group, self._timeout, self._output = group, timeout, output
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._actor: Any = None
        self._descriptor: int | None = None
        self.process: Process | None = None
        self._ended_for = ""
        self._place = group.seats.take(index)
        self._thread = threading.Thread()

    def start(self, start: bytes, done: Callable[[Outcome], None]) -> None:
        """Begin; `done` is told of its end, unless it was stopped."""
        name = f"headwater-actor-{self.role}-{self.index}"
        self._thread = threading.Thread(target=self._run, args=(start, done), name=name, daemon=True)
        self._thread.start()

    def _run(self, start: bytes, done: Callable[[Outcome], None]) -> None:
        if self._place is None:  # the former node there is not known to be gone yet
            self._place = self._group.seats.wait(self.index, self._stopping)
        if self._place is None:
            return
        outcome = self._follow(self._place, start)
        self._kill()
        self._see_it_end()
        self._group.seats.release(self._place)
        if not self._stopping.is_set():
            done(outcome)

    def _follow(self, place: int, start: bytes) -> Outcome:
        """Create the actor and block until it has ended."""
        try:
            messages = self._create(place, start)
            if not self._placed(messages):
                return self._failed(f"Ray found no place for it within {self._timeout:g} s")
            for reference in messages:
                message: Message = ray.get(reference)
                if isinstance(message, bytes):
                    value, failure = unpack_outcome(message)
                    return Outcome.of(self.role, self.index, value, failure, process=self.process)
                if isinstance(message, tuple):
                    where, pid, host = message
                    self._descriptor, self.process = _open_process(where, pid), (pid, host)
                    continue
                for line in message:
                    self._output(prefixed(self.role, self.index, line))
            return self._failed("its actor ended without a result", died=True)
        except (RayTaskError, RuntimeEnvSetupError) as error:  # it would be the same again
            return self._failed(f"its actor could not run: {_words(error)}")
        except RayError as error:
            return self._failed(f"its actor ended: {_words(error)}", died=True)
        except Exception as error:  # noqa: BLE001 - it is handed to the caller of `run`
            return Outcome(self.role, self.index, failure=Failure.of(error), process=self.process)

    def _create(self, place: int, start: bytes) -> Any:
        with self._lock:
            self._actor = self._group.create(place)
        if self._stopping.is_set():
            self._kill()
        method = self._actor.run.options(num_returns="streaming", _generator_backpressure_num_objects=_UNREAD)
        return method.remote(start)

    def _placed(self, messages: Any) -> bool:
        """Block for the first message. A standby may wait for ever: training goes on without it."""
        while not ray.wait([messages], timeout=self._timeout)[0]:
            if self.role != "standby":
                return False
            _log.warning("standby %d: Ray has had no place for it for %g s", self.index, self._timeout)
        return True

    def _see_it_end(self) -> None:
        """Ray says that an actor is gone while its process still ends; on this machine that can be seen."""
        if self._descriptor is not None:
            end = select.poll()
            end.register(self._descriptor, select.POLLIN)
            end.poll(1000 * _STOP_S)
            os.close(self._descriptor)

    def _failed(self, summary: str, *, died: bool = False) -> Outcome:
        failure = Failure(self._ended_for or summary, "", None, died)
        return Outcome(self.role, self.index, failure=failure, process=self.process)

    def end(self, why: str) -> None:
        """Kill it; its end is reported, with this reason."""
        self._ended_for = why
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._actor is not None and ray.is_initialized():
                ray.kill(self._actor)

    def stop(self) -> None:
        """Kill it; its end is not reported."""
        self._stopping.set()
        self._group.seats.wake()
        self._kill()

    def join(self, until: float) -> None:
        """Block until it is gone, at most until then (monotonic seconds)."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            _log.warning("%s %d: Ray does not say that its actor is gone", self.role, self.index)


class ActorEngine:
    """Servers and workers in places reserved when the first of a kind is started; see `RayEngine`."""

    nearby = False

    def __init__(self, launch: Launch, options: RayEngine) -> None:
        self._launch, self._options = launch, options
        self._output = Output(launch.output)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._connection: RayConnection | None = None
        self._groups: dict[str, _Group] = {}
        self._nodes: list[_Node] = []

    def start_server(self, address: str, assignment: Assignment, reach: Endpoint) -> None:
        """Start a server or standby. The first call blocks until Ray has reserved places for all.

        Raises:
            EngineError: there is no such Ray cluster, or no room in it.
            ConfigurationError: what only a running Ray cluster shows to be impossible.
        """
        group = self._group("server", address, reach.bind)
        self._start(assignment.role, assignment.index, group, "server", (address, assignment, reach))

    def start_worker(self, address: str, rank: int, train: Callable[[Worker], Any]) -> None:
        """Start a worker. The first call blocks until Ray has reserved places for all. Raises as above."""
        argument = address, rank, pack_train(train), self._launch.security
        self._start("worker", rank, self._group("worker", address), "worker", argument)

    def _start(self, name: str, index: int, group: _Group, role: str, argument: Any) -> None:
        path = [os.path.abspath(place) for place in sys.path]
        start = cloudpickle.dumps((path, role, self._launch.rules, argument, Logs.here()))
        node = _Node(name, index, group, self._options.timeout, self._output)
        with self._lock:
            self._nodes.append(node)
        node.start(start, self._outcomes.put)

    def _group(self, kind: str, address: str, bind: str | None = None) -> _Group:
        with self._lock:
            if self._connection is None:
                self._connection = RayConnection(self._options)
            if kind not in self._groups:
                self._groups[kind] = self._reserve(kind, address, bind, self._connection)
            return self._groups[kind]

    def _reserve(self, kind: str, address: str, bind: str | None, connection: RayConnection) -> _Group:
        launch, options = self._launch, self._options
        if kind == "server":
            resources, strategy = options.server_resources, "SPREAD"
            count = launch.servers * (1 + launch.replicas)
        else:
            resources, strategy, count = options.worker_resources, options.strategy, launch.workers
        places = Places(count, resources, strategy, options.timeout)
        try:
            places.check_reachable(address, bind)
        except BaseException:
            places.remove()
            raise
        shards = launch.servers if kind == "server" else launch.workers
        seats = BundleSlots(seats_of_shards(places.machines, shards))
        return _Group(places, seats, connection.environment(resources))

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next actor ended."""
        try:
            return self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None

    def end_process(self, process: Process, why: str) -> None:
        """Kill the actor of a node that is no member any more; its end is reported."""
        with self._lock:
            nodes = [node for node in self._nodes if node.process == process]
        for node in nodes:
            node.end(why)

    def stop_servers(self) -> None:
        """Kill the actors of servers and standbys."""
        self._end(lambda node: node.role != "worker")

    def close(self) -> None:
        """Kill all actors, give their places back, and leave Ray where this engine began to use it."""
        self._end(lambda node: True)
        with self._lock:
            groups, self._groups = self._groups, {}
            connection, self._connection = self._connection, None
        if connection is not None and ray.is_initialized():
            for group in groups.values():
                group.places.remove()
            connection.close()

    def _end(self, chosen: Callable[[_Node], bool]) -> None:
        with self._lock:
            nodes = [node for node in self._nodes if chosen(node)]
            self._nodes = [node for node in self._nodes if node not in nodes]
        until = time.monotonic() + _STOP_S
        for node in nodes:
            node.stop()
        for node in nodes:
            node.join(until)


def _open_process(where: str, number: int) -> int | None:
    """A descriptor that becomes readable when that process ends; None for one of another machine."""
    if not where or where != machine():
        return None
    try:
        return os.pidfd_open(number)
    except OSError:
        return None  # it has ended already


def _words(error: RayError) -> str:
    """What Ray says, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _WORDS else f"{text[:_WORDS]}…"
