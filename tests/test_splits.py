"""Who reads which part of a data set: orders, parts, and splits leased on demand."""

import heapq
import itertools
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater import messages as m
from headwater.errors import ConfigurationError, ProtocolError
from headwater.log.positions import Positions
from headwater.machines.splits import LeaseBook, Order, part_of, unvisited_parts

lengths = st.integers(0, 200)
small = st.integers(1, 8)
seeds = st.integers(0, 2**40)
group_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8).map(tuple)


def batches_of(positions, size):
    """Cut into batches; the last one may be smaller."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def order(length, *, shuffle=True, seed=0, epoch=0, groups=None):
    return Order(length, groups, shuffle=shuffle, seed=seed, epoch=epoch)


def whole(length, **options):
    return order(length, **options).at(range(length))


def batches(length, batch_size, rank, workers, shuffle=True, seed=0, epoch=0):
    part = part_of(length, rank, workers, grouped=False)
    one = order(length, shuffle=shuffle, seed=seed, epoch=epoch)
    return [one.at(batch) for batch in batches_of(part, batch_size)]


# ── orders and static parts ─────────────────────────────────────────────────────────────────────


@given(lengths, small, small, st.booleans(), seeds, st.integers(0, 5))
def test_all_workers_together_visit_every_sample_once(length, batch_size, workers, shuffle, seed, epoch):
    parts = [batches(length, batch_size, rank, workers, shuffle, seed, epoch) for rank in range(workers)]
    visited = [i for part in parts for batch in part for i in batch.tolist()]
    assert sorted(visited) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        assert all(len(batch) == batch_size for batch in part[:-1])
        assert all(1 <= len(batch) <= batch_size for batch in part)


@given(lengths, seeds, st.integers(0, 5))
def test_an_order_is_a_permutation_and_the_same_every_time(length, seed, epoch):
    one = whole(length, seed=seed, epoch=epoch)
    assert one.dtype == np.int64
    assert sorted(one.tolist()) == list(range(length))
    assert one.tolist() == whole(length, seed=seed, epoch=epoch).tolist()


@given(lengths, seeds, st.integers(0, 5), small)
def test_a_part_is_every_nth_sample_of_numpys_permutation(length, seed, epoch, workers):
    """The very bits matter: they are those that synchronous training is reproduced from."""
    expected = np.random.default_rng([seed, epoch]).permutation(length)[workers - 1 :: workers]
    found = [i for batch in batches(length, 7, workers - 1, workers, True, seed, epoch) for i in batch]
    assert found == expected.tolist()


def test_epochs_and_seeds_shuffle_differently():
    orders = [whole(100, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({one.tobytes() for one in orders}) == 9


def test_without_shuffling_each_worker_reads_every_nth_sample_in_order():
    assert whole(5, shuffle=False, seed=3, epoch=2).tolist() == [0, 1, 2, 3, 4]
    assert [batch.tolist() for batch in batches(7, 2, 1, 2, shuffle=False)] == [[1, 3], [5]]


@given(group_sizes, seeds, st.integers(0, 3), st.booleans(), small)
def test_groups_are_shuffled_within_and_among_themselves_but_never_mixed(sizes, seed, epoch, shuffle, step):
    length = sum(sizes)
    one = order(length, groups=sizes, shuffle=shuffle, seed=seed, epoch=epoch)
    found = np.concatenate([one.at(batch) for batch in batches_of(range(length), step)])
    assert sorted(found.tolist()) == list(range(length))
    group_of = np.repeat(np.arange(len(sizes)), sizes)[found]
    assert np.count_nonzero(np.diff(group_of)) == len(sizes) - 1
    if not shuffle:
        assert found.tolist() == list(range(length))


@given(lengths, small)
def test_parts_of_groups_are_stretches_that_add_up(length, workers):
    parts = [part_of(length, rank, workers, grouped=True) for rank in range(workers)]
    assert [i for part in parts for i in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shuffled_groups_differ_by_epoch_inside_too():
    first, second = whole(40, groups=(40,), epoch=0), whole(40, groups=(40,), epoch=1)
    assert first.tolist() != second.tolist()


# ── leases ──────────────────────────────────────────────────────────────────────────────────────


def lease(number=1, call=0, *, epochs=1, size=100, shuffle=False, seed=0, batch=1, pending=0):
    return m.Lease(number, call, epochs, size, shuffle, seed, batch, pending)


def spans(replies):
    return {member: (r.span.epoch, r.span.start, r.span.stop) for member, r in replies if hasattr(r, "span")}


class Reader:
    """A simulated worker: asks, hands out its batches one by one, commits them when it steps."""

    def __init__(self, member, rank):
        self.member, self.rank, self.batch = member, rank, 1 + rank
        self.number = 0
        self.split = None
        self.waits = self.over = False
        self.pending = []


class Machine:
    """A lease book, its workers, and the log that records what they commit."""

    def __init__(self, workers, size, epochs, recorded=None):
        self.size, self.epochs = size, epochs
        self.book = LeaseBook(workers, recorded)
        self.log = Positions(recorded)
        self.readers = {}
        self.steps_at_end = False
        self.handed = np.zeros((epochs, size), int)
        self.committed = np.zeros((epochs, size), int)
        for rank in range(workers):
            self.join(rank)

    def join(self, rank):
        member = 1 + max(self.readers, default=0)
        while member in self.readers:
            member += 1
        self.readers[member] = Reader(member, rank)

    def advance(self, reader, steps):
        """One move of a worker; `steps`: whether it takes a step after this batch."""
        if reader.waits or reader.over:
            return False
        if reader.split is None:
            reader.number += 1
            pending = sum(span.stop - span.start for span in reader.pending)
            reader.waits = True
            self.deliver(
                self.book.lease(
                    reader.member,
                    reader.rank,
                    lease(
                        reader.number,
                        epochs=self.epochs,
                        size=self.size,
                        batch=reader.batch,
                        pending=pending,
                    ),
                )
            )
            return True
        epoch, start, stop = reader.split
        middle = min(start + reader.batch, stop)
        self.handed[epoch, start:middle] += 1
        reader.pending.append(m.Span(epoch, start, middle))
        reader.split = (epoch, middle, stop) if middle < stop else None
        if steps:
            self.step(reader)
        return True

    def step(self, reader):
        visit = m.DynamicProgress(0, self.epochs, self.size, tuple(reader.pending))
        for span in reader.pending:
            self.committed[span.epoch, span.start : span.stop] += 1
        self.log.record(m.Position(reader.rank, 0, (), (visit,)))
        reader.pending = []

    def deliver(self, replies):
        for member, reply in replies:
            reader = self.readers[member]
            assert reply.number == reader.number
            assert reader.waits, "an answer to nobody's question"
            if isinstance(reply, m.Leased):
                reader.split, reader.waits = (reply.span.epoch, reply.span.start, reply.span.stop), False
                assert 0 < reply.handed <= reply.total
            elif reply.over:
                reader.over, reader.waits = True, False
                if self.steps_at_end:
                    self.step(reader)
            else:
                assert "waits for" in reply.reason
        self.check()

    def check(self):
        leased = np.zeros((self.epochs, self.size), int)
        for reader in self.readers.values():
            if reader.split is not None:
                epoch, start, stop = reader.split
                leased[epoch, start:stop] += 1
        assert leased.max(initial=0) <= 1, "a sample was leased to two workers at a time"

    def die(self, reader):
        del self.readers[reader.member]
        self.deliver(self.book.gone(reader.member, self.log.recorded()))

    def finish(self, rng, steps):
        """Everybody goes on to the end."""
        while not all(reader.over for reader in self.readers.values()):
            going = [reader for reader in self.readers.values() if not (reader.waits or reader.over)]
            assert going, "everybody waits"
            self.advance(rng.choice(going), steps)


@given(small, st.integers(1, 60), st.integers(1, 3), seeds, st.booleans())
def test_without_a_death_every_sample_is_handed_out_exactly_once_an_epoch(workers, size, epochs, seed, steps):
    machine = Machine(workers, size, epochs)
    machine.finish(random.Random(seed), steps)
    assert (machine.handed == 1).all()
    assert machine.book.unvisited() == []


@examples(300)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), seeds)
def test_with_deaths_and_joins_every_sample_is_committed_at_least_once_an_epoch(workers, size, epochs, seed):
    rng = random.Random(seed)
    machine = Machine(workers, size, epochs)
    machine.steps_at_end = True  # or who dies later has read batches that nobody took a step for
    for _ in range(rng.randrange(4 * size)):
        reader = rng.choice(list(machine.readers.values()))
        event = rng.random()
        if event < 0.05:
            machine.die(reader)
            machine.join(reader.rank)
        elif event < 0.07:
            machine.join(len(machine.readers))
        else:
            machine.advance(reader, steps=rng.random() < 0.7)
    machine.finish(rng, steps=True)
    assert (machine.committed >= 1).all()


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 3), seeds)
def test_what_the_log_recorded_is_never_leased_again_after_a_restart_of_everything(
    workers, size, epochs, seed
):
    rng = random.Random(seed)
    before = Machine(workers, size, epochs)
    for _ in range(rng.randrange(2 * size)):
        before.advance(rng.choice(list(before.readers.values())), steps=rng.random() < 0.7)
    recorded = msgspec.msgpack.decode(msgspec.msgpack.encode(before.log.recorded()), type=m.DataProgress)
    after = Machine(workers, size, epochs, recorded)
    after.finish(rng, steps=True)
    assert (before.committed + after.committed == 1).all()
    assert (after.handed == after.committed).all()


def test_a_dead_workers_split_goes_on_from_where_the_log_recorded_it():
    book, log = LeaseBook(workers=1), Positions()
    assert spans(book.lease(1, 0, lease(size=64, batch=2))) == {1: (0, 0, 8)}
    log.record(m.Position(0, 0, (), (m.DynamicProgress(0, 1, 64, (m.Span(0, 0, 6),)),)))
    assert book.gone(1, log.recorded()) == []
    assert spans(book.lease(2, 0, lease(size=64, batch=2))) == {2: (0, 6, 12)}


def test_uncommitted_batches_of_earlier_splits_go_back_too():
    book = LeaseBook(workers=1)
    for number, pending in enumerate((0, 5, 3), start=1):
        book.lease(1, 0, lease(number, size=80, pending=pending))
    # splits of 10, 8 and 7 samples; the last three samples before the third were not committed
    book.gone(1, m.DataProgress())
    assert spans(book.lease(2, 0, lease(size=80))) == {2: (0, 15, 23)}


def test_the_end_waits_for_the_last_splits_of_others_and_says_whose():
    book = LeaseBook(workers=2)
    book.lease(1, 0, lease(size=2))
    book.lease(2, 1, lease(size=2))
    assert book.lease(1, 0, lease(2, size=2)) == [
        (
            1,
            m.Unleased(
                2,
                False,
                "the end of call 0 of batches waits for its last splits: worker 1 has samples 1–1 of epoch 0",
            ),
        )
    ]
    assert [(member, r.over) for member, r in book.lease(2, 1, lease(2, size=2))] == [(1, True), (2, True)]


def test_a_request_that_is_repeated_has_the_same_answer_and_leases_nothing_more():
    book = LeaseBook(workers=2)
    first = book.lease(1, 0, lease(1, size=64))
    assert book.lease(1, 0, lease(1, size=64)) == first
    assert spans(book.lease(2, 1, lease(1, size=64))) == {2: (0, 4, 7)}
    assert spans(book.lease(1, 0, lease(2, size=64))) == {1: (0, 7, 10)}


def test_a_wait_ends_with_what_a_dead_worker_held():
    book = LeaseBook(workers=2)
    book.lease(1, 0, lease(size=2))
    book.lease(2, 1, lease(size=2))
    book.lease(1, 0, lease(2, size=2))
    assert spans(book.gone(2, m.DataProgress())) == {1: (0, 1, 2)}


def test_what_a_worker_gives_back_is_leased_to_another_but_after_a_stop_nothing_is():
    book = LeaseBook(workers=2)
    book.lease(1, 0, lease(size=64))
    book.lease(2, 1, lease(size=64))
    assert book.finish(1, m.Finish(0, left=3, stopped=False)) == []
    assert spans(book.lease(2, 1, lease(2, size=64))) == {2: (0, 1, 4)}
    book.finish(2, m.Finish(0, left=0, stopped=True))
    (reply,) = book.lease(1, 0, lease(3, size=64))
    assert reply[1].over
    assert book.unvisited() == []


def test_workers_that_wait_for_each_other_in_two_calls_do_not_wait_for_ever():
    """`zip` of two data sets: each worker holds the last split of the call that the other waits in."""
    book = LeaseBook(workers=2)
    assert spans(book.lease(1, 0, lease(1, 0, size=1))) == {1: (0, 0, 1)}
    assert spans(book.lease(2, 1, lease(1, 1, size=1))) == {2: (0, 0, 1)}
    assert not book.lease(2, 1, lease(2, 0, size=1))[0][1].over
    replies = book.lease(1, 0, lease(2, 1, size=1))
    assert [(member, reply.over) for member, reply in replies] == [(2, True), (1, False)]
    # worker 2's zip is over with its first part, so it closes the second and gives its split back
    assert spans(book.finish(2, m.Finish(1, left=1, stopped=False))) == {1: (0, 0, 1)}


def test_other_arguments_in_another_worker_are_refused_with_both():
    book = LeaseBook(workers=2)
    book.lease(1, 0, lease(size=64))
    with pytest.raises(ConfigurationError, match="worker 1 reads 1 × 65 samples in order, others 1 × 64"):
        book.lease(2, 1, lease(size=65))
    with pytest.raises(ProtocolError, match="asks for splits of 0 samples"):
        book.lease(2, 1, lease(size=0))


def test_a_call_that_is_over_leases_nothing_to_a_late_joiner_and_is_forgotten():
    book = LeaseBook(workers=1)
    for call in range(50):
        assert spans(book.lease(1, 0, lease(2 * call, call, size=1)))
        assert book.lease(1, 0, lease(2 * call + 1, call, size=1))[0][1].over
    assert len(book._calls) <= 1
    assert book.lease(2, 1, lease(call=7))[0][1].over


def test_what_dead_workers_left_and_nobody_took_over_is_told():
    book = LeaseBook(workers=1)
    book.lease(1, 0, lease(size=64))
    assert book.unvisited() == []
    book.gone(1, m.DataProgress())
    assert book.unvisited() == [m.Unvisited(0, None, 64)]


def test_what_is_left_of_a_dead_ranks_part_is_told_unless_the_rank_lives_again():
    position = m.Position(2, 1, (m.StaticProgress(1, epochs=3, size=10, epoch=1, done=4),))
    recorded = m.DataProgress((m.Position(0, 2), position))
    assert unvisited_parts(recorded, {0}) == [m.Unvisited(1, 2, 16)]
    assert unvisited_parts(recorded, {0, 2}) == []


# ── how long it takes ───────────────────────────────────────────────────────────────────────────


def time_of(workers, size, slow, batch=1):
    """Seconds until the last batch, where worker 0 takes `slow` seconds for a batch and the others one."""
    book = LeaseBook(workers)
    due = [(0.0, rank) for rank in range(workers)]
    numbers = itertools.count(1)
    last = 0.0
    while due:
        now, rank = heapq.heappop(due)
        for member, reply in book.lease(rank + 1, rank, lease(next(numbers), size=size, batch=batch)):
            if isinstance(reply, m.Leased):
                batches = -(-(reply.span.stop - reply.span.start) // batch)
                end = now + batches * (slow if member == 1 else 1)
                last = max(last, end)
                heapq.heappush(due, (end, member - 1))
    return last


@pytest.mark.parametrize("workers", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("per_worker", [40, 100, 1000])
@pytest.mark.parametrize("slow", [1, 2, 5, 8])
def test_a_slow_worker_delays_the_end_by_less_than_two_of_its_batches(workers, per_worker, slow):
    """The ideal: all work at their speed until the end."""
    size = workers * per_worker
    ideal = size / (workers - 1 + 1 / slow)
    assert time_of(workers, size, slow) <= ideal + 2 * slow
    if slow <= 5:
        assert time_of(workers, size, slow) <= 1.15 * ideal


def test_few_leases_are_needed():
    """Each one costs a message each way; they grow with the logarithm of the data set."""
    book, number = LeaseBook(workers=4), 0
    while isinstance(book.lease(1, 0, lease(number, size=1_000_000, batch=100))[0][1], m.Leased):
        number += 1
    assert number < 250
