"""The coordinator's journal, and coordinators of this process that end and go on where it ends."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import stat
import subprocess
import threading

import numpy as np
import pytest
from checkpoints import python
from members import ask_coordinator, join
from waiting import wait_until

import headwater as hw
from headwater.errors import (
    ConfigurationError,
    EngineError,
    JournalError,
    OtherClusterError,
    StalledError,
)
from headwater.machines.coordinator import CoordinatorRecord
from headwater.machines.roster import RosterBook, RosterRecord
from headwater.messages import Assignment, Join, Member, Rejoin, Welcome
from headwater.runtime.coordinator import CoordinatorNode
from headwater.runtime.journal import Journal
from headwater.runtime.server import ServerNode
from headwater.spec.cluster import ClusterConfig
from headwater.wire.endpoint import Endpoint
from headwater.wire.listener import Listener
from headwater.worker import Worker

SETTINGS = {"workers": 2, "sync": "sync", "settings": {"lr": 0.5}}
MEMBERS = (Member(3, "server", 0, 17, "here", ("unix:@a",)), Member(12, "standby", 0, 18, "there"))
BOOK = RosterRecord(7, 5, 1, 13, MEMBERS, (12,), {4: "worker 0 was declared dead"})
RECORD = CoordinatorRecord(BOOK)


def found(path, settings=SETTINGS):
    with contextlib.closing(Journal(path, settings)) as journal:
        return journal.found


def written(path, *records):
    with contextlib.closing(Journal(path, SETTINGS)) as journal:
        for record in records:
            journal.write(record)
    return path


# ── one file ────────────────────────────────────────────────────────────────────────────────────


def test_what_was_written_last_is_found(tmp_path):
    path = tmp_path / "journal"
    assert found(path) is None
    book = RosterBook(workers=2, servers=1)
    records = [book.record()]
    for role in ("server", "standby", "worker"):
        book.join(Join(role, None, 1, "here"))
        records.append(book.record())
    book.remove(2, "it was stopped")
    book.begin_anew()
    for record in [*records, book.record(), BOOK]:
        assert found(written(path, CoordinatorRecord(record))) == CoordinatorRecord(record)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "it holds a secret"


def test_in_memory_it_takes_everything_and_leaves_nothing():
    with contextlib.closing(Journal("", SETTINGS)) as journal:
        journal.write(RECORD)
    assert found("") is None


def test_a_cluster_is_the_same_after_a_restart_and_no_other_is(tmp_path):
    told = []
    for name in ("journal", "journal", "other", ""):
        with contextlib.closing(Journal(tmp_path / name if name else "", SETTINGS)) as journal:
            told.append((journal.cluster, journal.secret))
    assert told[0] == told[1]
    assert len({cluster for cluster, _ in told}) == len({secret for _, secret in told}) == 3
    assert len(told[0][1]) == 32


HOLDS = """
import sys
from headwater.runtime.journal import Journal
journal = Journal(sys.argv[1], {"workers": 2, "sync": "sync", "settings": {"lr": 0.5}})
print("held", flush=True)
sys.stdin.read()
"""


def test_two_coordinators_cannot_have_one_journal_until_the_first_is_gone(tmp_path):
    path = tmp_path / "journal"
    holder = python(HOLDS, path, stdin=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigurationError, match=rf"{path} is in use by another coordinator") as caught:
            Journal(path, SETTINGS)
        assert f"(process {holder.pid} on " in str(caught.value)
    finally:
        holder.kill()
        holder.communicate(timeout=20)
    with contextlib.closing(Journal(path, SETTINGS)):
        with pytest.raises(ConfigurationError, match="in use by another coordinator"):
            Journal(path, SETTINGS)
        with pytest.raises(ConfigurationError, match="in use by another coordinator"):
            Journal(path, SETTINGS)


def test_a_journal_of_a_cluster_with_other_settings_is_refused_with_what_differs(tmp_path):
    path = written(tmp_path / "journal", RECORD)
    with pytest.raises(
        ConfigurationError, match=r"other settings: servers was None, now 2; workers was 2, now 3:"
    ):
        Journal(path, {**SETTINGS, "workers": 3, "servers": 2})
    assert found(path) == RECORD


def test_a_journal_of_a_cluster_that_has_ended_serves_no_other(tmp_path):
    with contextlib.closing(Journal(tmp_path / "journal", SETTINGS)) as journal:
        journal.write(CoordinatorRecord(BOOK, "server 1 is gone, and nobody else has its shard"))
    with pytest.raises(
        ConfigurationError, match=r"has ended \(server 1 is gone.*\): remove it, or name another"
    ):
        Journal(tmp_path / "journal", SETTINGS)


# ── order and damage ────────────────────────────────────────────────────────────────────────────


def test_a_change_is_on_disk_before_write_returns_and_the_old_file_is_whole_until_then(tmp_path, monkeypatch):
    """Written beside, on disk, renamed, and the directory on disk: in this order."""
    done = []

    def noted(name, call):
        def passes_on(*arguments, **options):
            done.append(name)
            return call(*arguments, **options)

        monkeypatch.setattr(os, name, passes_on)

    path = tmp_path / "journal"
    with contextlib.closing(Journal(path, SETTINGS)) as journal:
        before = path.read_bytes()
        for name, call in (("write", os.write), ("fsync", os.fsync), ("replace", os.replace)):
            noted(name, call)
        replace = os.replace

        def looks(source, target):
            assert path.read_bytes() == before
            replace(source, target)

        monkeypatch.setattr(os, "replace", looks)
        journal.write(RECORD)
        assert done == ["write", "fsync", "replace", "fsync"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["journal", "journal.lock"]


@pytest.mark.parametrize("left", [0, 1, 50, -1])
def test_what_a_killed_coordinator_had_written_only_a_part_of_is_not_read(left, tmp_path):
    path = written(tmp_path / "journal", RECORD)
    (tmp_path / "journal.new").write_bytes(path.read_bytes()[:left])
    assert found(path) == RECORD


def edited(path, **changes):
    """The same journal with other content, and the checksum of that."""
    _, _, content = path.read_bytes().partition(b"\n")
    content = json.dumps({**json.loads(content), **changes}).encode()
    checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
    head = json.dumps({"journal": "headwater", "format": 2, "checksum": checksum}).encode()
    path.write_bytes(head + b"\n" + content)
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"secret": None}, "is damaged: Expected `str`, got `null`"),
        ({"record": {"ended": ""}}, "is damaged: .*missing required field `roster`"),
        ({"more": 1}, "is damaged: .*unknown field `more`"),
    ],
)
def test_a_journal_with_impossible_content_is_named_with_what_is_wrong(changes, text, tmp_path):
    path = edited(written(tmp_path / "journal", RECORD), **changes)
    with pytest.raises(JournalError, match=text) as caught:
        Journal(path, SETTINGS)
    assert f"the journal {path}" in str(caught.value)
    assert "put a copy in its place, or remove it" in str(caught.value)


def test_a_journal_of_another_format_is_named_with_the_version_that_reads_it(tmp_path):
    path = written(tmp_path / "journal", RECORD)
    path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":3', 1))
    with pytest.raises(
        JournalError, match="has format 3, this version of headwater reads 2: use the version"
    ):
        Journal(path, SETTINGS)


def test_every_flipped_byte_and_every_missing_end_is_found(tmp_path):
    whole = written(tmp_path / "journal", RECORD).read_bytes()
    path = tmp_path / "damaged"
    flipped = [
        whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :] for place in range(len(whole))
    ]
    for damaged in [*flipped, *(whole[:length] for length in range(len(whole)))]:
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"damaged|format"):
            Journal(path, SETTINGS)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "content", [b"this is no journal" * 100, b"SQLite format 3\0" + bytes(500), b"{}\n{}"]
)
def test_what_is_no_journal_is_refused_and_left_alone(content, tmp_path):
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(JournalError, match="is no journal of this version of headwater, or its beginning is"):
        Journal(tmp_path / "journal", SETTINGS)
    assert (tmp_path / "journal").read_bytes() == content


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    with pytest.raises(JournalError, match=r"cannot use the journal .*nowhere/journal: No such file or dir"):
        Journal(tmp_path / "nowhere" / "journal", SETTINGS)
    (tmp_path / "directory").mkdir()
    with pytest.raises(
        JournalError, match=r"cannot use the journal .*: Is a directory: name a file on a disk"
    ):
        Journal(tmp_path / "directory", SETTINGS)


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = written(tmp_path / "journal", RECORD)
    with contextlib.closing(Journal(path, SETTINGS)) as journal:
        (tmp_path / "journal.new").mkdir()
        with pytest.raises(JournalError, match=r"cannot use the journal .*: Is a directory"):
            journal.write(CoordinatorRecord(BOOK, "over"))
    (tmp_path / "journal.new").rmdir()
    assert found(path) == RECORD


# ── coordinators of this process ────────────────────────────────────────────────────────────────


class Small:
    """A coordinator that ends and goes on, and one server; `node` is the coordinator of now."""

    def __init__(self, folder, **settings):
        self._settings = ClusterConfig(workers=1, patience=0.2, **{"deadline": 30.0, **settings})
        self._journal = folder / "journal"
        self._place = f"@headwater-{secrets.token_hex(8)}"
        self.start()
        self.address = self.node.address
        self.server = ServerNode(self.address, Assignment(0, 1, "sync", patience=0.2))
        self.server.start()

    def start(self):
        self.node = CoordinatorNode(
            self._settings, journal=self._journal, reach=Endpoint(f"unix:{self._place}")
        )

    def ranks(self):
        return [node.rank for node in self.node.statistics().nodes if node.role == "worker"]

    def rejoin(self, member, key, generation=0):
        channel, answer = ask_coordinator(self.address, Rejoin(member, key, generation))
        channel.close()
        return answer

    def close(self):
        self.node.close()
        self.server.close()


@pytest.fixture
def small(tmp_path):
    with contextlib.ExitStack() as undo:
        yield lambda **settings: undo.enter_context(contextlib.closing(Small(tmp_path, **settings)))


def counted(worker, model):
    model.push({"a": np.ones(3)})
    return worker.step().version, float(model.pull()["a"][0])


def test_a_worker_steps_on_comes_back_and_leaves(small):
    cluster = small()
    with hw.connect(cluster.address) as worker:
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        for version in range(1, 4):
            cluster.node.halt()
            assert counted(worker, model) == (version, float(version))
            cluster.start()
            wait_until(lambda: not cluster.node.statistics().nodes[-1].waits_for)
        assert cluster.ranks() == [0]
    wait_until(lambda: cluster.ranks() == [])


def test_a_cut_connection_to_a_server_is_made_anew_without_a_coordinator(small):
    cluster = small()
    with hw.connect(cluster.address) as worker:
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        cluster.node.halt()
        for version in range(1, 4):
            worker._session.channels[0]._stream.shutdown(socket.SHUT_RDWR)
            assert counted(worker, model) == (version, float(version))
        cluster.start()


def test_a_worker_can_leave_while_the_coordinator_is_away(small):
    cluster = small(lease=3.0)
    worker = hw.connect(cluster.address)
    cluster.node.halt()
    worker.leave()
    cluster.start()
    assert cluster.ranks() == [0]
    wait_until(lambda: cluster.ranks() == [])


def test_who_does_not_come_back_within_its_lease_is_refused_with_the_reason(small):
    cluster = small(lease=1.0)
    channel, welcome = join(cluster.address, "worker", None)
    cluster.node.halt()
    channel.close()
    cluster.start()
    wait_until(lambda: cluster.ranks() == [])
    answer = cluster.rejoin(welcome.member.id, welcome.key)
    assert answer.error == "DeclaredDeadError"
    assert "was declared dead: nothing was heard of it for 1 s" in answer.reason
    cluster.node.halt()
    cluster.start()
    assert cluster.rejoin(welcome.member.id, welcome.key) == answer


def test_only_the_member_itself_can_come_back(small):
    cluster = small()
    channel, welcome = join(cluster.address, "worker", None)
    try:
        own = welcome.member.id
        for member, key in ((own, ""), (own, "0" * 64), (own + 1, welcome.key)):
            answer = cluster.rejoin(member, key)
            assert answer.error == "RefusedError"
            assert "did not show its key" in answer.reason
        answer = cluster.rejoin(own, welcome.key, generation=1)
        assert (answer.error, cluster.ranks()) == ("RewoundError", [0])
    finally:
        channel.close()


def test_of_two_connections_of_a_member_the_later_one_counts(small):
    cluster = small()
    first, welcome = join(cluster.address, "worker", None)
    request = Rejoin(welcome.member.id, welcome.key, 0)
    second, answer = ask_coordinator(cluster.address, request)
    assert isinstance(answer, Welcome)
    assert answer.member == welcome.member
    assert first.receive(timeout=20) is None
    first.close()
    assert cluster.ranks() == [0]
    second.close()
    wait_until(lambda: cluster.ranks() == [])


def test_a_server_ends_when_nobody_is_there_for_the_deadline(small):
    cluster = small(deadline=2.0)
    cluster.node.halt()
    with pytest.raises(EngineError, match=r"no coordinator for 2 s, and nobody to serve"):
        cluster.server.wait()


def test_a_worker_that_finds_no_server_waits_for_its_deadline_and_says_for_whom(small):
    cluster = small(deadline=3.0)
    worker = hw.connect(cluster.address)
    cluster.node.halt()
    cluster.server.close()
    with pytest.raises(StalledError, match=r"cannot connect to .*; the coordinator at .* is away for [1-9]"):
        worker.step()
    worker.leave()


def step_for_ever(worker):
    while True:
        worker.step()


def test_nodes_of_a_former_cluster_end_with_the_reason_where_they_find_the_next_one(small, tmp_path):
    cluster = small()
    worker = hw.connect(cluster.address)
    former = cluster.node.cluster
    cluster.node.halt()
    cluster._journal = tmp_path / "another"
    cluster.start()
    reason = (
        f"belongs to cluster {former}, and the coordinator that listens here now to {cluster.node.cluster}"
    )
    with pytest.raises(OtherClusterError, match=reason):
        step_for_ever(worker)
    assert isinstance(cluster.server.wait_for_parting(), OtherClusterError)
    with pytest.raises(OtherClusterError, match=reason):
        Worker(cluster.address, cluster=former)
    worker.leave()


def test_a_lost_shard_ends_the_cluster_after_a_restart_too(small):
    cluster = small()
    worker = hw.connect(cluster.address)
    cluster.node.halt()
    cluster.server.close()
    cluster.start()
    with pytest.raises(hw.errors.ConnectionLostError, match=r"server 0 .* nobody else has its shard"):
        worker.step()
    worker.leave()
    cluster.node.halt()
    with pytest.raises(ConfigurationError, match="has ended"):
        cluster.start()


def test_a_coordinator_that_cannot_keep_its_journal_ends_and_nobody_else(small, tmp_path):
    cluster = small()
    with hw.connect(cluster.address) as worker:
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        (tmp_path / "journal.new").mkdir()
        with pytest.raises(hw.errors.ConnectionLostError):
            join(cluster.address, "observer", None)
        with pytest.raises(JournalError, match="Is a directory: name a file on a disk with room"):
            cluster.node.wait()
        cluster.node.halt()
        (tmp_path / "journal.new").rmdir()
        assert counted(worker, model) == (1, 1.0)
        cluster.start()
        wait_until(lambda: cluster.ranks() == [0] and not cluster.node.statistics().nodes[-1].waits_for)


def test_nodes_that_wait_for_the_others_are_not_members_yet_and_are_forgotten(tmp_path):
    settings = ClusterConfig(workers=1, servers=2)
    node = CoordinatorNode(settings, journal=tmp_path / "journal")
    server = ServerNode(node.address, Assignment(0, 2, "sync"))

    def halt():
        wait_until(lambda: len(node.statistics().nodes) == 2)
        node.halt()

    halting = threading.Thread(target=halt)
    halting.start()
    with pytest.raises(hw.errors.ConnectionLostError):
        server.start()
    halting.join()
    server.close()
    node = CoordinatorNode(settings, journal=tmp_path / "journal")
    assert len(node.statistics().nodes) == 1
    node.close()


def test_a_path_that_a_killed_coordinator_left_is_listened_at_again_and_no_other_file_is_harmed(tmp_path):
    place = str(tmp_path / "coordinator")
    first = Listener("unix", place=place)
    with pytest.raises(ConfigurationError, match=r"cannot listen on unix:.*in use"):
        Listener("unix", place=place)
    first.close()
    Listener("unix", place=place).close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="cannot listen"):
        Listener("unix", place=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
