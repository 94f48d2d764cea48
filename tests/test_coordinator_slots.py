"""Servers that come by themselves: which one becomes which, and what they begin with."""

import pytest
from desks import Desk

from headwater.errors import CheckpointError, ProtocolError
from headwater.machines.coordinator import ChooseCheckpoint, Ended
from headwater.machines.slots import SlotAllocator
from headwater.messages import (
    Ask,
    Assignment,
    ClusterStatistics,
    Finished,
    Join,
    NoSlot,
    Refused,
    RequestSlot,
)

ANY = RequestSlot(None, None)


def desk(checkpoint="runs/g000-v000000001", **settings):
    """A desk whose owner chooses this checkpoint; None: not before it is told to."""
    made = Desk(enlists=True, **settings)
    made.chosen = []

    def takes(actions, take=made._take):
        take(actions)
        for action in actions:
            if isinstance(getattr(action, "task", None), ChooseCheckpoint):
                made.chosen.append(action)
                if checkpoint is not None:
                    made.performs(action, checkpoint)

    made._take = takes
    return made


def asks(made, role=None, index=None):
    return made.connect().say(RequestSlot(role, index))


def becomes(node):
    """It joins as what it was told to be."""
    assigned = node.last(Assignment)
    return node.say(Join(assigned.role, assigned.index, 7, "there", ("unix:@x",)))


def slot(node):
    assigned = node.last(Assignment)
    return None if assigned is None else (assigned.role, assigned.index)


def test_servers_come_first_then_standbys_then_spares():
    made = desk(servers=2, replicas=1)
    nodes = [asks(made) for _ in range(5)]
    assert [slot(node) for node in nodes] == [
        ("server", 0),
        ("server", 1),
        ("standby", 0),
        ("standby", 1),
        None,
    ]
    assert nodes[4].last() == NoSlot("no server or standby is missing: it waits as a spare")
    first = nodes[0].last(Assignment)
    assert (first.servers, first.sync, first.replicas, first.min_workers) == (2, "sync", 1, 1)
    assert (first.restore, first.cluster) == ("runs/g000-v000000001", "c1")
    assert nodes[2].last(Assignment).restore == "", "a standby begins with what its server has"
    assert len(made.chosen) == 1
    for node in nodes[:4]:
        becomes(node)
    assert [node.member.role for node in nodes[:4]] == ["server", "server", "standby", "standby"]
    assert made.connect().say(Ask()).last(ClusterStatistics).spares == 1


def test_all_that_begin_as_servers_wait_for_the_choice_of_a_checkpoint_and_standbys_do_not():
    made = desk(checkpoint=None, servers=2, replicas=1)
    nodes = [asks(made) for _ in range(3)]
    assert [slot(node) for node in nodes] == [None, None, ("standby", 0)]
    (choice,) = made.chosen
    assert (choice.task.begun, choice.task.first) == (False, 0)
    made.performs(choice, "")
    assert [slot(node) for node in nodes] == [("server", 0), ("server", 1), ("standby", 0)]
    assert nodes[0].last(Assignment).restore == ""


def test_without_a_good_checkpoint_the_cluster_ends_with_the_reason():
    made = desk(checkpoint=None)
    node = asks(made)
    made.performs(made.chosen[0], CheckpointError("none is good"))
    assert node.last() == Refused("CheckpointError", "none is good")
    assert made.told == [Ended(Refused("CheckpointError", "none is good"))]


def test_a_slot_that_was_kept_for_a_node_that_is_gone_is_the_next_ones():
    made = desk()
    first, spare = asks(made), asks(made)
    assert slot(first) == ("server", 0)
    first.hangs_up()
    assert slot(spare) == ("server", 0)
    assert "server 0 was kept for a node that is gone" in made.notes


def test_a_slot_of_a_node_that_is_gone_while_it_joins_is_the_next_ones():
    made = desk()
    made.reachable = False
    first, spare = asks(made), asks(made)
    becomes(first)
    first.hangs_up()
    assert slot(spare) == ("server", 0)


def test_a_slot_is_not_kept_for_a_node_that_does_not_come_for_longer_than_the_deadline():
    made = desk(deadline=5.0)
    late, spare = asks(made), asks(made)
    made.passes(6.0)
    assert late.closed
    assert slot(spare) == ("server", 0)
    assert "a node that has not said to become server 0 in time is hung up on" in made.notes


def test_a_node_that_joins_as_something_else_than_it_was_told_breaks_the_protocol():
    made = desk(servers=2)
    node = asks(made)
    with pytest.raises(ProtocolError, match="Join as server 1 came after Assignment, expected server 0"):
        node.say(Join("server", 1, 7, "there"))


def test_a_lost_standby_is_replaced_by_a_spare_and_a_lost_server_only_in_the_next_generation():
    made = desk(servers=2, replicas=1, rewinds=True)
    nodes = [asks(made) for _ in range(5)]
    first, second, standby, _, spare = nodes
    for node in nodes[:4]:
        becomes(node)
    standby.hangs_up()
    assert slot(spare) == ("standby", 0)
    becomes(spare)
    again = asks(made, "server")
    assert again.last() == NoSlot("no server is missing: it waits as a spare")
    first.hangs_up()
    assert slot(again) == ("server", 0), "everything begins anew"
    assert second.closed
    assert [action.task.begun for action in made.chosen] == [False, True]


def test_a_choice_for_a_generation_that_is_over_counts_for_nobody():
    made = desk(checkpoint=None, servers=2, rewinds=True)
    first, second = asks(made), asks(made)
    made.performs(made.chosen[0], "old")
    becomes(first)
    becomes(second)
    first.hangs_up()
    third = asks(made)
    made.performs(made.chosen[0], "older")
    assert slot(third) is None
    made.performs(made.chosen[1], "new")
    assert third.last(Assignment).restore == "new"


@pytest.mark.parametrize(
    ("request_", "error", "reason"),
    [
        (RequestSlot("server", 2), "ConfigurationError", "there can be no server 2: this cluster has 2"),
        (RequestSlot("standby", None), "ConfigurationError", "this cluster has no standbys"),
    ],
)
def test_a_slot_that_can_never_be_is_refused(request_, error, reason):
    node = desk(servers=2).connect().say(request_)
    assert node.last().error == error
    assert node.last().reason.startswith(reason)
    assert node.closed


def test_a_cluster_whose_servers_are_started_for_it_invites_nobody():
    node = Desk().connect().say(ANY)
    assert node.last() == Refused("RefusedError", "whoever started this cluster starts its servers too")


def test_nobody_is_invited_while_the_cluster_ends():
    made = desk()
    server = asks(made)
    becomes(server)
    after = Desk(enlists=True, record=made.record())
    after.does(lambda machine, now: machine.finish(Finished(), now))
    assert after.machine.stage == "finishing"
    spare = asks(after)
    after.rejoins(server.welcome)
    assert spare.last() == Finished()


def test_a_servers_slot_is_free_only_while_the_generation_forms():
    wanted = RequestSlot(None, None)
    assert SlotAllocator(1, 0).reserve(wanted, (), forming=False) is None
    assert str(SlotAllocator(1, 0).reserve(wanted, (), forming=True)) == "server 0"
