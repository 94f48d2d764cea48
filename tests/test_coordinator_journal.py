"""Whatever a coordinator says, the next one on its record knows: at no moment may its end change the past."""

import random

import pytest
from desks import IDENTITY, Desk

from headwater.machines.actions import Persist, Send, Tell
from headwater.machines.coordinator import CoordinatorMachine, Ended
from headwater.messages import (
    CaughtUp,
    Departed,
    Finished,
    Heartbeat,
    Lease,
    Roster,
    ServerAddresses,
    Welcome,
)


def shown(action):
    """The term that an action lets somebody see; 0 for none."""
    if isinstance(action, Send):
        message = action.message
        if isinstance(message, Roster | Welcome | ServerAddresses):
            return message.term
    return 0


def a_life(seed, **settings):
    """A desk at which all kinds of things have happened."""
    chance = random.Random(seed)
    desk = Desk(servers=2, workers=2, replicas=1, rewinds=True, lease=5.0, **settings)
    for _ in range(60):
        living = [node for node in desk.nodes.values() if not node.closed]
        members = [node for node in living if node.welcome is not None]
        what = chance.randrange(10)
        if what < 4 or not members:
            desk.joins(chance.choice(["server", "server", "standby", "worker", "observer"]), None)
        elif what == 4:
            chance.choice(living).hangs_up()
        elif what == 5:
            node = chance.choice(members)
            node.say(Departed(node.member.id, chance.random() < 0.5))
        elif what == 6:
            standbys = [node for node in members if node.member.role == "standby"]
            if standbys:
                members[0].say(CaughtUp(chance.choice(standbys).member.id))
        elif what == 7:
            node = chance.choice(members)
            node.say(Finished(node.member.id) if node.member.role == "worker" else Heartbeat())
        elif what == 8:
            node = chance.choice(members)
            if node.member.role == "worker":
                node.say(Lease(desk.now, 1, 1, 64, False, 0, 4, 0))
            desk.deaf ^= {chance.choice(members).member.id}
        else:
            desk.passes(chance.uniform(0.1, 4.0), beating=chance.random() < 0.7)
        if desk.machine.stage == "ended":
            break
    return desk


@pytest.mark.parametrize("seed", range(40))
def test_nobody_sees_a_term_that_is_not_kept(seed):
    desk, kept = a_life(seed), 0
    for action in desk.done:
        if isinstance(action, Persist):
            kept = action.record.roster.term
        assert shown(action) <= kept
        if isinstance(action, Tell) and isinstance(action.event, Ended):
            assert desk.kept[-1].ended


@pytest.mark.parametrize("seed", range(40))
def test_wherever_it_ends_the_next_one_gives_no_term_to_another_roster(seed):
    """The process may end between any two actions."""
    desk = a_life(seed)
    told = {message.term: message for _, message in desk.said if isinstance(message, Roster)}
    kept, before = None, 0
    for action in desk.done:
        if isinstance(action, Persist):
            kept = action.record
        before = max(before, shown(action))
        if kept is None or kept.ended:
            continue
        machine = CoordinatorMachine(desk.settings, IDENTITY, 0.0, record=kept)
        roster = machine.state.book.view()
        assert roster.term >= before
        if roster.term in told:
            assert roster == told[roster.term]
