"""What a node that comes by itself makes of what the coordinator says, and when it asks again."""

import pytest

from headwater import messages as m
from headwater.errors import (
    ClusterEndedError,
    ConnectionLostError,
    DeclaredDeadError,
    FinishedError,
    OtherClusterError,
    ProtocolError,
    RefusedError,
    RewoundError,
)
from headwater.machines.enlistment import Enlistment, asks_again


def test_a_spare_waits_and_says_why_until_it_is_told_what_it_is():
    enlistment = Enlistment("standby", 1)
    assert enlistment.request == m.RequestSlot("standby", 1)
    assert enlistment.heard(m.NoSlot("no standby 1 is missing")) is None
    assert enlistment.reason == "no standby 1 is missing"
    assignment = m.Assignment(1, 2, "sync", "standby", cluster="c1")
    assert enlistment.heard(assignment) is assignment
    assert enlistment.reason == ""
    assert enlistment.request == m.RequestSlot("standby", 1, "c1")  # of another cluster it is nothing


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (m.Refused("ConfigurationError", "there can be no server 5"), "there can be no server 5"),
        (m.Finished(), "training has finished"),
        (m.Heartbeat(), "the coordinator answered Heartbeat"),
    ],
)
def test_who_can_be_nothing_is_told_why(message, error):
    with pytest.raises(Exception, match=error):
        Enlistment().heard(message)


def test_who_was_declared_dead_or_rewound_asks_again_and_nobody_else():
    assert all(asks_again(kind("")) for kind in (DeclaredDeadError, RefusedError, RewoundError))
    ends = (FinishedError, OtherClusterError, ClusterEndedError, ConnectionLostError, ProtocolError)
    assert not any(asks_again(kind("")) for kind in ends)
