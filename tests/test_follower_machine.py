"""Which versions a follower keeps and shows, whatever comes and whoever reads."""

import pytest
from clusters import model_spec
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.follower import FollowerMachine
from headwater.shard.version_copy import VersionCopy
from headwater.spec.rules import Accumulate
from headwater.spec.version import Version

MODEL = model_spec(shapes={"w": (4,)}, rules=(Accumulate(),))


def empty():
    return VersionCopy({0: MODEL}, {}, "float32", 1)


def follower(pins=2, generation=0):
    machine = FollowerMachine(pins)
    machine.joined(generation, empty)
    return machine


def publish(machine, number, generation=None):
    """A whole publication whose values are its number; the version that the machine shows, if it is new."""
    fill = machine.begin()
    assert fill is not None
    return complete(machine, fill, number)


def complete(machine, fill, number):
    fill.begin()
    asked = fill.request(0, 1, "float32", 0)
    changed = (0,) if number > asked.models[0].have else ()
    part = m.Publication(1, number, number, changed)
    if changed:
        (place,) = fill.slot.copy.place(0, part)
        place[...] = number
    return machine.arrived(fill.install([part]), 0.0)


def content(slot):
    """The version that a copy's values say."""
    (value,) = set(slot.copy.vectors[0].tolist())
    return int(value)


@examples(150)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(
            st.sampled_from(["publish", "publish", "same", "fail", "pin", "unpin", "rewind"]),
            st.integers(0, 9),
        ),
        max_size=60,
    ),
)  # fmt: skip
def test_what_is_pinned_stays_and_what_is_shown_is_complete_and_only_grows(pins, events):
    machine, number, generation = follower(pins), 0, 0
    views, shown = [], Version(0, -1)
    for what, chance in events:
        if what in ("publish", "same", "fail"):
            fill = machine.begin()
            assert (fill is None) == machine.held_up
            if fill is None:
                continue
            assert fill.slot is not machine.current
            assert fill.slot.pins == 0
            if what == "fail":
                fill.begin()
                fill.slot.copy.vectors[0][:1] = -5  # half of it came
                machine.failed()
            else:
                number += what == "publish"
                complete(machine, fill, number)
        elif what == "pin" and machine.current is not None:
            slot = machine.pin()
            views.append((slot, slot.version))
        elif what == "unpin" and views:
            machine.unpin(views.pop(chance % len(views))[0])
        elif what == "rewind":
            generation, number = generation + 1, max(0, number - 2)
            machine.joined(generation, empty)
        readable = {id(slot) for slot, _ in views}
        if machine.current is not None:
            assert content(machine.current) == machine.shown.number
            assert machine.shown >= shown
            shown = machine.shown
        assert len(readable) <= pins
        for slot, version in views:
            assert slot.version == version
            assert content(slot) == version.number


def test_pins_hold_up_newer_versions_and_nothing_else():
    machine = follower(pins=2)
    assert publish(machine, 1) == Version(0, 1)
    first = machine.pin()
    publish(machine, 2)
    second = machine.pin()
    assert machine.held_up
    assert machine.begin() is None
    assert (content(first), content(second)) == (1, 2)
    machine.unpin(first)
    assert publish(machine, 3) == Version(0, 3)


def test_a_version_that_is_complete_while_all_pins_are_taken_is_shown_once_one_is_gone():
    machine = follower(pins=1)
    publish(machine, 1)
    fill = machine.begin()
    held = machine.pin()
    complete(machine, fill, 2)
    assert machine.shown == Version(0, 1)
    machine.unpin(held)
    assert machine.shown == Version(0, 2)


def test_a_stale_copy_asks_for_what_has_changed_since_its_own_version():
    machine = follower(pins=2)
    for number in (5, 6, 7):
        publish(machine, number)
    fill = machine.begin()
    assert fill.source is None
    assert fill.request(0, 1, "float32", 8).models == (m.Wanted(0, 6),)
    machine.failed()
    again = machine.begin()
    again.begin()
    assert again.source is machine.current  # nobody knows how much of the other one came
    assert again.request(0, 1, "float32", 8).models[0].have == 7


def test_an_empty_copy_begins_as_the_current_one():
    machine = follower(pins=2)
    publish(machine, 5)
    fill = machine.begin()
    fill.begin()
    assert fill.source is machine.current
    assert fill.request(0, 1, "float32", 0).models == (m.Wanted(0, 5),)


def test_an_older_generation_is_refused_and_an_older_version_not_shown():
    machine = follower(generation=3)
    publish(machine, 5)
    with pytest.raises(ProtocolError, match="generation 2 after one of 3"):
        machine.joined(2, empty)
    assert publish(machine, 4) is None
    assert machine.shown == Version(3, 5)


def test_hearing_that_a_version_is_still_the_newest_makes_it_younger():
    machine = follower()
    publish(machine, 5)
    machine.heard(5, 8.0)
    assert machine.current.as_of == 8.0
    machine.heard(7, 9.0)
    assert machine.current.as_of == 8.0
    assert machine.behind(machine.shown) == 2
