"""What a process prints, cut into lines: every line once, progress bars now and then, nothing for ever."""

import logging
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from headwater.engines.lines import LONGEST, LineSplitter
from headwater.engines.output import Output, prefixed


@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\r", b"").replace(b"\n", b"")), max_size=8),
    st.data(),
)
def test_finished_lines_come_once_and_in_order_however_they_are_cut(lines, data):
    printed = b"".join(line + b"\n" for line in lines)
    splitter, shown = LineSplitter(), []
    while printed:
        size = data.draw(st.integers(1, len(printed)))
        shown += splitter.feed(printed[:size], now=0.0)
        printed = printed[size:]
    assert shown + splitter.end() == lines


def test_a_progress_bar_is_shown_at_most_once_a_second_and_its_last_state_always():
    splitter, shown = LineSplitter(), []
    for eighth in range(41):
        shown += [(eighth / 8, line) for line in splitter.feed(b"\r%d/40" % eighth, eighth / 8)]
    shown += [(5.5, line) for line in splitter.feed(b"\nnext\n", 5.5)]
    assert shown[0] == (0.125, b"0/40")
    assert shown[-2:] == [(5.5, b"40/40"), (5.5, b"next")]
    times = [time for time, _ in shown[:-2]]
    assert len(times) == 5
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(times))


def test_a_bar_that_lasts_for_hours_does_not_fill_a_log():
    splitter = LineSplitter()
    shown = [line for second in range(4 * 3600) for line in splitter.feed(b"%d s\r" % second, float(second))]
    assert 60 < len(shown) < 350
    assert len(splitter._rest) < 20


def test_a_slow_bar_shows_its_newest_state_and_no_state_twice():
    splitter = LineSplitter()
    assert splitter.feed(b"\rfirst", 0.0) == []
    assert splitter.due == 0.5
    assert splitter.tick(0.4) == []
    assert splitter.tick(0.5) == [b"first"]
    assert splitter.due is None
    assert splitter.feed(b"\n", 30.0) == []


def test_the_beginning_of_a_line_is_shown_when_nothing_follows_and_the_whole_line_at_its_end():
    splitter = LineSplitter()
    assert splitter.feed(b"downloading ... ", 0.0) == []
    assert splitter.tick(0.6) == [b"downloading ... "]
    assert splitter.feed(b"done\n", 20.0) == [b"downloading ... done"]


def test_windows_line_ends_and_cleared_bars_leave_no_trace():
    splitter = LineSplitter()
    assert splitter.feed(b"one\r\ntwo\r\n", 0.0) == [b"one", b"two"]
    assert splitter.feed(b"\r50 %\r     \rthree\n", 0.1)[-1] == b"three"


def test_a_line_without_an_end_is_cut():
    splitter = LineSplitter()
    shown = [line for _ in range(10) for line in splitter.feed(b"x" * LONGEST, 0.0)]
    assert len(shown) >= 5
    assert sum(map(len, [*shown, *splitter.end()])) == 10 * LONGEST


def test_a_callback_that_raises_loses_its_line_only_and_is_told_once(caplog):
    taken = []

    def output(line):
        if line != "good":
            raise OSError("the disk is full")
        taken.append(line)

    show = Output(output)
    with caplog.at_level(logging.WARNING):
        for line in ("bad", "good", "bad", "good"):
            show(line)
    assert taken == ["good", "good"]
    (record,) = caplog.records
    assert "output raised" in record.getMessage()
    assert record.exc_info is not None


def test_characters_that_a_stream_cannot_encode_are_escaped():
    written = []
    Output(lambda line: written.append(line.encode("ascii")))("50 % █")
    assert written == [b"50 % \\u2588"]


def test_a_node_is_named_once():
    assert prefixed("worker", 3, b"worker 3: step 1 waits\n") == "[worker 3] step 1 waits"
    assert prefixed("worker", 3, b"worker 33: hello") == "[worker 3] worker 33: hello"
