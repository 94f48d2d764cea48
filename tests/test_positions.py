"""What the log records of where workers are in their data."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater import messages as m
from headwater.log.positions import Positions, Ranges

edits = st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 30)), max_size=30)


@given(edits)
def test_ranges_are_the_set_of_integers_that_were_added_and_not_removed(edits):
    ranges, expected = Ranges(), set()
    for add, start, stop in edits:
        (ranges.add if add else ranges.remove)(start, stop)
        expected = expected | set(range(start, stop)) if add else expected - set(range(start, stop))
        assert [i for first, last in ranges for i in range(first, last)] == sorted(expected)
        assert len(ranges) == len(expected)
        bounds = [bound for pair in ranges for bound in pair]
        assert bounds == sorted(set(bounds)), "ranges that touch are one"


def visit(*spans, call=0, epochs=2, size=10):
    return m.DynamicProgress(call, epochs, size, tuple(m.Span(*span) for span in spans))


def test_the_last_position_of_each_rank_is_kept_and_visits_add_up():
    positions = Positions()
    place = m.StaticProgress(0, epochs=2, size=5, epoch=1, done=3)
    positions.record(m.Position(1, 0, (place,)))
    positions.record(m.Position(0, 0, (), (visit((0, 0, 4)),)))
    positions.record(m.Position(0, 0, (), (visit((0, 4, 6), (1, 0, 2)),)))
    assert positions.of(1) == m.Position(1, 0, (place,))
    assert positions.of(7) is None
    assert positions.recorded().visited == (m.Visited(0, 2, 10, 0, (m.Span(0, 0, 6), m.Span(1, 0, 2))),)


def test_complete_epochs_and_complete_calls_take_no_room():
    positions = Positions()
    positions.record(m.Position(0, 0, (), (visit((0, 0, 10), (1, 0, 9)),)))
    assert positions.recorded().visited == (m.Visited(0, 2, 10, 1, (m.Span(1, 0, 9),)),)
    positions.record(m.Position(1, 0, (), (visit((1, 9, 10)),)))
    assert positions.recorded() == m.DataProgress((m.Position(0, 0), m.Position(1, 0)), (), 1)


def test_calls_that_every_rank_is_done_with_take_no_room():
    positions = Positions()
    for call in range(100):
        for rank in range(2):
            one = visit((0, rank, rank + 1), call=call)
            positions.record(m.Position(rank, call, (), (one,)))
    assert [visited.call for visited in positions.recorded().visited] == [99]
    assert positions.recorded().first == 99


def test_a_visit_of_another_size_begins_the_unfinished_epochs_anew():
    positions = Positions()
    positions.record(m.Position(0, 0, (), (visit((0, 0, 10), (1, 0, 5)),)))
    positions.record(m.Position(0, 0, (), (visit((1, 0, 2), size=20),)))
    assert positions.recorded().visited == (m.Visited(0, 2, 20, 1, (m.Span(1, 0, 2),)),)


@given(st.lists(st.tuples(*[st.integers(0, n) for n in (3, 2, 2, 9, 9)]), max_size=20))
def test_positions_survive_the_way_through_a_message(steps):
    positions = Positions()
    for rank, over, epoch, start, stop in steps:
        positions.record(m.Position(rank, over, (), (visit((epoch, start, stop), call=over, epochs=3),)))
    recorded = positions.recorded()
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(recorded), type=m.DataProgress)
    assert again == recorded == msgspec.json.decode(msgspec.json.encode(recorded), type=m.DataProgress)
    assert Positions(again).recorded() == recorded


@pytest.mark.parametrize("size", [0, -3])
def test_an_impossible_visit_breaks_nothing(size):
    positions = Positions()
    positions.record(m.Position(0, 0, (), (visit((0, 5, 2), (0, 3, 3), size=size),)))
    assert positions.of(0) == m.Position(0, 0)
