"""What servers copy for followers, and what a copy becomes of it: the same rows that a pull would give."""

import numpy as np
import pytest
from clusters import model_spec
from hypothesis import given
from hypothesis import strategies as st
from small_tables import INT64, make, pull, push, servers_of, spec

from examples import examples
from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.kernels.cast import cast_bfloat16
from headwater.shard import Vector
from headwater.shard import touched as touched_module
from headwater.shard.publications import Publications
from headwater.shard.table_copy import TableCopy
from headwater.shard.tables import Tables
from headwater.shard.touched import Touched
from headwater.shard.version_copy import VersionCopy
from headwater.spec.initializers import Uniform
from headwater.spec.layout import Layout
from headwater.spec.lifetime import AfterCount, AfterSteps, LeastRecentlyUsed
from headwater.spec.placement import SLOTS, slots_of, slots_of_server
from headwater.spec.rules import Accumulate
from headwater.weights.bfloat16 import to_bfloat16

_crowded = np.arange(200_000)
CROWDED = _crowded[slots_of(_crowded) < 3][:12]
"""Ids of three slots, so that a table with room for one row a slot drops some with every push."""

LIFETIMES = [
    {},
    {"expiry": AfterSteps(2)},
    {"expiry": LeastRecentlyUsed(SLOTS)},
    {"admission": AfterCount(2)},
]


class Servers:
    """One table on several servers, changed version by version."""

    def __init__(self, servers, **lifetime):
        self.spec = spec(Accumulate(), initializer=Uniform(-1.0, 1.0), **lifetime)
        self.tables = [
            make(slots=slots_of_server(i, servers), initializer=Uniform(-1.0, 1.0), **lifetime)
            for i in range(servers)
        ]
        self.version = 0
        for table in self.tables:
            table.touched.begin(0)

    def parts(self, ids):
        at = servers_of(ids, len(self.tables))
        return [(table, ids[at == i]) for i, table in enumerate(self.tables)]

    def do(self, what, ids):
        self.version += 1
        for table, own in self.parts(np.unique(ids)):
            if what == "push":
                push(table, own, self.version, self.version)
            elif what == "delete":
                table.delete(own, self.version)
            else:
                rows = np.full((len(own), 2), -float(self.version), np.float32)
                table.assign(own, rows, False, self.version)

    def cuts(self, have):
        return [table.cut(have, self.version) for table in self.tables]

    def pulled(self, ids):
        out = np.empty((len(ids), 2), np.float32)
        for i, (table, own) in enumerate(self.parts(ids)):
            out[servers_of(ids, len(self.tables)) == i] = pull(table, own, self.version)
        return out


actions = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "delete", "assign"]),
        st.lists(st.sampled_from([*CROWDED.tolist(), INT64.min, INT64.max]), min_size=1, max_size=4),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=25,
)


@examples(60)
@given(actions, st.sampled_from(LIFETIMES), st.sampled_from([1, 3]))
def test_a_copy_brought_up_to_date_from_any_version_reads_as_a_pull_does(drawn, lifetime, servers):
    """Deletes, expiry and admission arrive like any change; three copies of different age take turns."""
    there = Servers(servers, **lifetime)
    copies = [TableCopy(there.spec, servers) for _ in range(3)]
    asked = np.array([*CROWDED, INT64.min, INT64.max, 77], np.int64)
    for what, ids, turn in drawn:
        there.do(what, np.array(ids, np.int64))
        copy = copies[turn]
        copy.install(there.cuts(copy.version), there.version)
        assert np.array_equal(copy.read(asked), there.pulled(asked))
        assert len(copy) == sum(table.count(there.version) for table in there.tables)


@examples(30)
@given(actions, st.sampled_from(LIFETIMES))
def test_changes_one_by_one_or_together_come_to_the_same(drawn, lifetime):
    there = Servers(2, **lifetime)
    often, seldom = TableCopy(there.spec, 2), TableCopy(there.spec, 2)
    seldom.install(there.cuts(-1), 0)
    for what, ids, _ in drawn:
        there.do(what, np.array(ids, np.int64))
        often.install(there.cuts(often.version), there.version)
    seldom.install(there.cuts(seldom.version), there.version)
    known = TableCopy(there.spec, 2)
    known.become(often)
    rows = [{int(id): row.tobytes() for id, row in zip(*part, strict=True)} for copy in (often, seldom, known)
            for part in [next(copy.scan(1000), ([], []))]]  # fmt: skip
    assert rows[0] == rows[1] == rows[2]


def test_what_a_server_no_longer_knows_comes_whole():
    there = Servers(1)
    there.do("push", CROWDED)
    copy = TableCopy(there.spec, 1)
    copy.install(there.cuts(-1), there.version)
    there.tables[0].touched.end()  # as on a standby that has taken over
    there.tables[0].touched.begin(there.version + 1)
    there.do("delete", CROWDED[:3])
    (cut,) = there.cuts(copy.version)
    assert cut.base == -1
    assert len(cut.ids) == len(CROWDED) - 3
    copy.install([cut], there.version)
    assert len(copy) == len(CROWDED) - 3


def test_rows_that_changed_since_another_version_are_refused():
    there = Servers(1)
    copy = TableCopy(there.spec, 1)
    there.do("push", CROWDED[:1])
    copy.install(there.cuts(-1), 1)
    there.do("push", CROWDED[1:2])
    there.do("push", CROWDED[2:3])
    with pytest.raises(ProtocolError, match="since version 2 came for a copy of version 1"):
        copy.install(there.cuts(2), 3)
    assert copy.version == -1  # of none: the next request asks for all rows
    copy.install(there.cuts(copy.version), 3)
    assert np.array_equal(copy.read(CROWDED), there.pulled(CROWDED))


def test_an_id_of_another_server_is_refused():
    there = Servers(2)
    there.do("push", CROWDED)
    copy = TableCopy(there.spec, 2)
    with pytest.raises(ProtocolError, match=r"server 1 sent id .* of another"):
        copy.install(there.cuts(-1)[::-1], 1)


# ── which ids were touched ──────────────────────────────────────────────────────────────────────


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 3)), max_size=60)
)
def test_touched_ids_are_never_too_few_and_their_memory_is_bounded(drawn):
    touched, history, version = Touched(), [], 0
    touched.begin(0)
    least, touched_module._LEAST = touched_module._LEAST, 16
    try:
        for ids, step in drawn:
            version += step
            history.append((version, set(ids)))
            touched.add(np.unique(np.array(ids, np.int64)), version, rows=10)
            for have in range(version + 1):
                known = touched.after(have)
                wanted = set().union(*(ids for at, ids in history if at > have))
                assert known is None or wanted <= set(known.tolist())
            assert sum(len(ids) for _, ids in touched._parts) <= 20
    finally:
        touched_module._LEAST = least


def test_nothing_is_noted_while_nobody_follows():
    touched = Touched()
    touched.add(np.arange(5), 1, 5)
    assert touched.after(0) is None
    touched.begin(1)
    assert touched.after(0) is None
    assert touched.after(1).tolist() == []


# ── the cut ─────────────────────────────────────────────────────────────────────────────────────


def publications(servers=1):
    model = model_spec(shapes={"w": (3000,), "b": (7,)}, rules=(Accumulate(),))
    parts = []
    for index, (start, stop) in enumerate(Layout(model.tensors).cut(servers)):
        values = np.arange(start, stop, dtype=np.float32)
        vectors = {0: Vector(model, start, stop, values, 3)}
        parts.append((vectors, Publications(vectors, Tables(index, servers))))
    return model, parts


def request(have=-1, dtype="float32"):
    return m.Publish(1, (m.Wanted(0, have),), (), dtype)


def taken_by(published, member, asked, version=5):
    published.follow(member, asked, version)
    published.cut(member, asked, version, 40 + version, m.DataProgress())
    return published.take(member)


def test_what_was_copied_stays_until_the_follower_has_it_everywhere():
    _, [(vectors, published)] = publications()
    cut = taken_by(published, 9, request())
    first = cut.models[0]
    expected = first.copy()
    vectors[0].values += 1
    other = taken_by(published, 8, request(), 6).models[0]
    assert np.array_equal(first, expected)
    assert other is not first
    published.taken(9)
    assert taken_by(published, 7, request(), 7).models[0] is first  # used again


def test_memory_of_a_follower_that_is_gone_is_not_used_again():
    """Some of it may still be on its way to it."""
    _, [(_, published)] = publications()
    first = taken_by(published, 9, request()).models[0]
    taken_by(published, 8, request())
    published.forget(9)
    published.taken(9)
    assert taken_by(published, 7, request(), 6).models[0] is not first


def test_followers_of_one_entry_share_a_copy_until_the_last_has_it():
    _, [(_, published)] = publications()
    one, other = (taken_by(published, member, request()).models[0] for member in (1, 2))
    assert one is other
    published.taken(1)
    assert taken_by(published, 1, request(), 6).models[0] is not one
    published.taken(2)
    assert taken_by(published, 2, request(), 7).models[0] is one


def test_a_model_that_has_not_changed_since_is_left_out():
    _, [(_, published)] = publications()
    assert list(taken_by(published, 1, request(have=2)).models) == [0]
    assert list(taken_by(published, 1, request(have=3)).models) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_all_servers_are_one_version_of_the_model(dtype):
    model, parts = publications(servers=3)
    copy = VersionCopy({0: model}, {}, dtype, 3)
    heads = []
    for server, (_, published) in enumerate(parts):
        copy.expect(server)
        cut = taken_by(published, 1, request(dtype=dtype))
        heads.append(cut.message(1))
        if cut.arrays():
            (place,) = copy.place(server, heads[-1])
            place[...] = cut.arrays()[0]
    assert copy.install(heads) == 5
    values = np.arange(len(copy.vectors[0]), dtype=np.float32)
    expected = to_bfloat16(values) if dtype == "bfloat16" else values
    assert np.array_equal(copy.vectors[0], expected)
    heads[1] = m.Publication(1, 6, heads[1].position, heads[1].models)
    with pytest.raises(ProtocolError, match="servers 0 and 1 published versions 5 and 6"):
        copy.install(heads)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_the_cast_rounds_to_nearest_even_and_keeps_nan(words):
    values = np.array(words, np.uint32).view(np.float32)
    out = np.empty(len(values), np.uint16)
    cast_bfloat16(values, out)
    assert np.array_equal(out, to_bfloat16(values))
