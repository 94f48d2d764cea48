"""Followers that are followed: what their readers see, in this process and in processes of their own."""

import gc
from contextlib import contextmanager

import numpy as np
import pytest
from serving import Node
from test_follower import is_right
from trained import trained
from waiting import wait_until

import headwater as hw
from headwater.cli.certificates import make_certificates
from headwater.errors import ConfigurationError, ProtocolError, RefusedError, StalledError
from headwater.follower.keeper import Wish
from headwater.follower.served import FollowerNode
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import PLAIN, Security

HERE = Endpoint()
BY_TCP = Endpoint("127.0.0.1", local=False)
"""So readers of this machine are sent versions as those of others are."""

WAYS = pytest.mark.parametrize("reach", [HERE, BY_TCP], ids=["lent", "sent"])


@pytest.fixture(scope="module")
def training():
    with trained(steps=3) as training:
        training.step(ids=[1, 2, 3])
        yield training


@contextmanager
def served(address, reach=HERE, *, every=1, dtype="float32", models=None, tables=None, security=PLAIN):
    wish = Wish.of(address, models, tables, every, security, dtype, bounded=True)
    node = FollowerNode(wish, reach, deadline=60)
    try:
        yield node
    finally:
        node.close()


def shows(follower, training, version):
    """Waits for a version and asks whether all of it is right."""
    follower.wait(version, deadline=60)
    with follower.pin() as view:
        rows = np.array_equal(view.rows("users", np.arange(60)), training.pull(np.arange(60)))
        return view.version.number == version and is_right(view, training) and rows


@WAYS
def test_readers_of_a_follower_see_what_it_sees(training, reach):
    with (
        served(training.address, reach) as node,
        hw.follow(node.address, every=1) as one,
        hw.follow(node.address, every=1) as other,
    ):
        for turn in range(6):
            version = training.step(ids=[turn, 50 - turn])
            assert shows(one, training, version)
            assert shows(other, training, version)
        counts = node.statistics()
        assert counts.readers == 2
        assert (counts.lent > 0, counts.sent > 0) == (reach is HERE, reach is BY_TCP)
        assert one.statistics().received < 10_000 or reach is BY_TCP


@pytest.mark.parametrize("ways", [(HERE, HERE), (BY_TCP, BY_TCP), (BY_TCP, HERE)], ids=str)
def test_a_follower_of_a_follower_is_followed_too(training, ways):
    first, second = ways
    with (
        served(training.address, first) as node,
        served(node.address, second) as further,
        hw.follow(further.address, every=1) as follower,
    ):
        for turn in range(4):
            assert shows(follower, training, training.step(ids=[turn, 30 + turn]))


@WAYS
def test_what_a_reader_has_pinned_stays_and_holds_up_nobody(training, reach):
    with (
        served(training.address, reach) as node,
        hw.follow(node.address, every=1) as slow,
        hw.follow(node.address, every=1) as other,
    ):
        views = [slow.pin()]
        slow.wait(training.step(ids=[1]), deadline=60)
        views.append(slow.pin())
        kept = [(view.parameters("net")["w"].copy(), view.rows("users", np.arange(60))) for view in views]
        for turn in range(8):
            assert shows(other, training, training.step(ids=[turn]))
        for view, (values, rows) in zip(views, kept, strict=True):
            assert np.array_equal(view.parameters("net")["w"], values)
            assert np.array_equal(view.rows("users", np.arange(60)), rows)
            view.close()
        assert shows(slow, training, training.step())


@WAYS
def test_changes_of_a_follower_lead_from_version_to_version(training, reach):
    with served(training.address, reach) as node, hw.follow(node.address, every=1) as follower:
        rows, changes = {}, follower.changes()
        found = [next(changes)]
        for turn in range(4):
            version = training.step(ids=[turn, 40 + turn])
            while found[-1].version.number < version:
                found.append(next(changes))
        training.do(lambda worker, model, table: table.delete([1]))
        version = training.step(ids=[2])
        while found[-1].version.number < version:
            found.append(next(changes))
        for change in found:
            for id in change.tables["users"].deleted.tolist():
                rows.pop(id, None)
            rows.update(zip(change.tables["users"].ids.tolist(), change.tables["users"].rows, strict=True))
        assert [change.tables["users"].full for change in found] == [True] + [False] * (len(found) - 1)
        with follower.pin() as view:
            (ids, values) = next(view.scan("users"))
            assert rows.keys() == set(ids.tolist())
            assert all(np.array_equal(rows[id], row) for id, row in zip(ids.tolist(), values, strict=True))
        changes.close()


@WAYS
def test_a_bounded_read_of_a_follower_asks_the_cluster(training, reach):
    with (
        served(training.address, reach) as node,
        hw.follow(node.address, every="1000s", max_behind=0) as follower,
    ):
        version = training.step()
        with follower.pin(deadline=60) as view:
            assert view.version.number == version


def test_lent_memory_cannot_be_written_and_outlives_the_follower(training):
    with served(training.address) as node:
        follower = hw.follow(node.address, every=1)
        follower.wait(training.step(ids=[1, 2]), deadline=60)
        view = follower.pin()
        with pytest.raises(ValueError, match="read-only"):
            view.parameters("net")["w"][0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view._slot.copy.vectors[0].flags.writeable = True
    rows = view.rows("users", [1, 2])
    gc.collect()
    assert is_right(view, training)
    assert np.array_equal(view.rows("users", [1, 2]), rows)
    view.close()
    follower.close()


def test_readers_come_back_to_a_follower_that_was_started_again(training, tmp_path):
    reach = Endpoint(f"unix:{tmp_path}/readers")
    with served(training.address, reach) as node:
        follower = hw.follow(node.address, every=1)
    before = follower.version
    version = training.step(ids=[7])
    with pytest.raises(StalledError, match=r"did not come.*(has ended|cannot connect|gone)"):
        follower.wait(version, deadline=2)
    assert follower.version == before
    with served(training.address, reach), follower:
        assert shows(follower, training, version)
        assert shows(follower, training, training.step(ids=[8]))
        assert follower.statistics().reconnects


def test_a_follower_has_one_type_of_parameters_and_sends_the_narrower_one_too(training):
    pytest.importorskip("ml_dtypes")
    with (
        served(training.address) as node,
        hw.follow(node.address, tables=(), every=1, dtype="bfloat16") as narrow,
        hw.follow(training.address, tables=(), every=1, dtype="bfloat16") as direct,
    ):
        version = training.step()
        narrow.wait(version, deadline=60)
        direct.wait(version, deadline=60)
        with narrow.pin() as one, direct.pin() as other:
            bits = [view.parameters("net")["w"].view(np.uint16) for view in (one, other)]
            assert np.array_equal(*bits)
    with served(training.address, dtype="bfloat16") as node:
        with pytest.raises(ConfigurationError, match=r"keeps parameters as bfloat16, and float32 was asked"):
            hw.follow(node.address)
        with hw.follow(node.address, tables=(), dtype="bfloat16") as lent:
            assert lent.version.number == version


def test_a_part_of_what_there_is_can_be_served_and_a_part_of_that_followed(training):
    with served(training.address, models=(), tables="users") as node:
        with pytest.raises(ConfigurationError, match="no model 'net': its models are none"):
            hw.follow(node.address, models="net")
        with hw.follow(node.address) as follower, follower.pin() as view:
            assert np.array_equal(view.rows("users", [1]), training.pull([1]))


TOKEN = "0123456789abcdef0123"


def node_of(folder):
    """Certificates of an authority of its own."""
    pytest.importorskip("cryptography")
    make_certificates(folder, ["127.0.0.1"])
    return hw.TLS(folder / "ca.pem", folder / "127.0.0.1.pem", folder / "127.0.0.1.key")


def test_who_has_another_secret_or_certificate_is_refused_by_cluster_and_follower(tmp_path):
    ours, theirs = node_of(tmp_path / "ours"), node_of(tmp_path / "theirs")
    security = Security(TOKEN, ours)
    reach = Endpoint("127.0.0.1", security=security, local=False)
    start = {"bind": "127.0.0.1", "tls": ours, "token": TOKEN}
    wrong = [
        {"tls": ours, "token": TOKEN + "x"},
        {"tls": theirs, "token": TOKEN},
        {"token": TOKEN},
        {"tls": ours},
    ]
    with (
        trained(steps=1, start=start) as training,
        served(training.address, reach, security=security) as node,
    ):
        for address in (training.address, node.address):
            assert address.startswith("tcp:")
            with hw.follow(address, tls=ours, token=TOKEN) as follower:
                assert follower.version.number > 0
            for other in wrong:
                with pytest.raises((RefusedError, ProtocolError)):
                    hw.follow(address, deadline=20, **other)
        stranger = Security(TOKEN, theirs)
        with pytest.raises((RefusedError, ProtocolError)), served(training.address, security=stranger):
            pass


def test_a_table_larger_than_a_chunk_is_read_where_it_lies():
    """More rows than one chunk of the index's pages, or of rows, has room for; rows come and go."""
    with trained(steps=1, dim=64, expiry=hw.AfterSteps(50)) as training, served(training.address) as node:
        many = np.arange(150_000)
        training.step(ids=many)
        version = training.step(ids=[3])
        with hw.follow(node.address, every=1) as follower:
            follower.wait(version, deadline=60)
            with follower.pin() as view:
                assert sum(len(ids) for ids, _ in view.scan("users")) == len(many)
                asked = np.array([0, 3, 77_777, 149_999, 150_000, 999_999])
                assert np.array_equal(view.rows("users", asked), training.pull(asked))
            training.do(lambda worker, model, table: table.delete(many[1000:]))
            follower.wait(training.step(ids=[3]), deadline=60)
            with follower.pin() as view:
                assert sum(len(ids) for ids, _ in view.scan("users")) == 1000


def test_a_process_that_is_served_ends_with_its_training(tmp_path):
    with trained(steps=2) as training:
        node = Node(tmp_path, "follower", training.address, "--every", "1", "--health", "127.0.0.1:0")
        address = wait_until(lambda: next((line for line in node.lines if line.startswith("unix:")), None))
        with hw.follow(address.strip(), every=1) as follower:
            assert shows(follower, training, training.step(ids=[4]))
            assert node.says("a reader on")
    assert node.code() in (0, 75)
    assert "Traceback" not in node.text
