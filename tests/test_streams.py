"""Streams of events: each is read once, from where the log has it, whatever stops or starts again."""

import json
import subprocess
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater import messages as m
from headwater.errors import ConfigurationError, DataError
from headwater.log.positions import Positions, owner_of


def write(path, first, count, end="\n"):
    """Events whose ids go on from `first`."""
    with path.open("a") as file:
        for id in range(first, first + count):
            file.write(json.dumps({"id": id, "x": id / 2}) + end)


def read_all(stream):
    """Every event that is there, in small pieces."""
    found = []
    for partition in stream.partitions():
        offset = ""
        while events := stream.read(partition, offset, 3):
            offset = events[-1].offset
            found += [event.value for event in events if event.value is not None]
    return found


# ── Tail ────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_an_event_once_its_end_is_there(tmp_path):
    stream = hw.data.Tail(tmp_path, "*.jsonl")
    assert stream.partitions() == []
    write(tmp_path / "a.jsonl", 0, 4)
    write(tmp_path / "a.jsonl", 4, 1, end="")
    (tmp_path / "other.txt").write_text("no event\n")
    assert stream.partitions() == ["a.jsonl"]
    assert [event["id"] for event in read_all(stream)] == [0, 1, 2, 3]
    write(tmp_path / "a.jsonl", 5, 0)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n")
    assert [event["id"] for event in read_all(stream)] == [0, 1, 2, 3, 4]


def test_csv_has_a_line_of_names(tmp_path):
    stream = hw.data.Tail(tmp_path)
    (tmp_path / "a.csv").write_text('id,name,x\n1,"one, two",0.5\r\n2,b,3\n')
    assert read_all(stream) == [{"id": 1, "name": "one, two", "x": 0.5}, {"id": 2, "name": "b", "x": 3}]


@pytest.mark.parametrize("bad", ["{", "[1]", "{}", "no"])
def test_a_malformed_event_is_named_or_skipped_and_counted(tmp_path, bad):
    write(tmp_path / "a.jsonl", 0, 1)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(f"{bad}\n")
    write(tmp_path / "a.jsonl", 1, 1)
    with pytest.raises(DataError, match=r"a\.jsonl, byte 20: .* is no event"):
        read_all(hw.data.Tail(tmp_path))
    skipping = hw.data.Tail(tmp_path, malformed="skip")
    assert [event["id"] for event in read_all(skipping)] == [0, 1]
    assert skipping.skipped == 1


def test_a_file_that_shrank_or_vanished_is_named(tmp_path):
    stream = hw.data.Tail(tmp_path)
    write(tmp_path / "a.jsonl", 0, 9)
    offset = stream.read("a.jsonl", "", 9)[-1].offset
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=f"has 0 bytes, and was read up to byte {offset}"):
        stream.read("a.jsonl", offset, 9)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        stream.read("a.jsonl", offset, 9)


def test_what_cannot_be_a_stream_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is no directory"):
        hw.data.Tail(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="malformed must be 'raise' or 'skip', got 'ignore'"):
        hw.data.Tail(tmp_path, malformed="ignore")
    stream = hw.data.Tail(tmp_path, endless=False)

    def train(worker):
        with pytest.raises(ConfigurationError, match="a stream is read once, in its order"):
            worker.batches(stream, 4, epochs=2)

    hw.run(train, workers=1, engine="inline")


# ── in a training ───────────────────────────────────────────────────────────────────────────────


def count(worker, stream, most=None):
    """Each event adds 1 to the row of its id; the largest batch."""
    table = worker.table("seen", 1, hw.Accumulate())
    longest = 0
    for number, batch in enumerate(worker.batches(stream, 4), start=1):
        longest = max(longest, len(batch["id"]))
        table.push(batch["id"], np.ones((len(batch["id"]), 1), np.float32))
        worker.step()
        if number == most:
            worker.stop()
            worker.checkpoint()
            raise SystemExit
    return longest, {int(id): row[0] for ids, rows in table.scan() for id, row in zip(ids, rows, strict=True)}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_event_is_read_once_by_one_worker(tmp_path, workers):
    for name in "abcdef":
        write(tmp_path / f"{name}.jsonl", ord(name) * 100, 7)
    stream = hw.data.Tail(tmp_path, endless=False)

    def train(worker):
        found = count(worker, stream)
        worker.barrier()
        return found[0], count(worker, hw.data.Tail(tmp_path, "none*", endless=False))[1]

    result = hw.run(train, workers=workers, servers=2, sync="async", engine="inline", deadline=60)
    assert {longest for longest, _ in result.values} <= {1, 2, 3, 4}
    expected = {ord(name) * 100 + k: 1.0 for name in "abcdef" for k in range(7)}
    assert result.values[0][1] == expected


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_training_goes_on_after_the_last_event_of_the_checkpoint(tmp_path, after):
    """Also with another number of workers: each partition goes on where the one who read it was."""
    events, runs = tmp_path / "events", tmp_path / "runs"
    events.mkdir()
    for name in "abcd":
        write(events / f"{name}.jsonl", ord(name) * 100, 5)
    stream = hw.data.Tail(events, endless=False)

    def part(worker):
        """Some batches, a step each, and then the last checkpoint is of there."""
        table = worker.table("seen", 1, hw.Accumulate())
        batches = worker.batches(stream, 3)
        for _ in range(after):
            batch = next(batches, None)
            if batch is None:
                break
            table.push(batch["id"], np.ones((len(batch["id"]), 1), np.float32))
            worker.step()
        worker.checkpoint()
        raise RuntimeError("it is interrupted")

    options = {"sync": "async", "engine": "inline", "checkpoint": runs, "every": 1000, "deadline": 60}
    with pytest.raises(hw.errors.WorkerError, match="it is interrupted"):
        hw.run(part, workers=1, **options)
    result = hw.run(lambda worker: count(worker, stream)[1], workers=1, resume=True, **options)
    assert result.values[0] == {ord(name) * 100 + k: 1.0 for name in "abcd" for k in range(5)}


def test_offsets_go_to_whoever_reads_the_partition_when_there_are_more_workers():
    partitions = [f"p{k}" for k in range(8)]
    positions = Positions(m.DataProgress(workers=2))
    for rank in range(2):
        own = tuple((one, f"{rank}-{one}") for one in partitions if owner_of(one, 2) == rank)
        stale = tuple((one, "stale") for one in partitions if owner_of(one, 2) != rank)
        streams = (m.StreamProgress(0, own + stale),)
        positions.record(m.Position(rank, 0, streams=streams))
    positions.cut_for(3)
    expected = tuple((one, f"{owner_of(one, 2)}-{one}") for one in partitions)
    for rank in range(3):
        assert positions.of(rank).streams == (m.StreamProgress(0, expected),)


def test_an_endless_stream_waits_for_more_and_a_view_says_how_far_training_was(tmp_path):
    """What a reader sees is the events up to the offsets that its view names, once each."""
    write(tmp_path / "a.jsonl", 0, 5)
    addresses, ended = [], threading.Event()

    def train(worker):
        table = worker.table("seen", 1, hw.Accumulate())
        read = 0
        for batch in worker.batches(hw.data.Tail(tmp_path), 4, linger=0.01):
            table.push(batch["id"], np.ones((len(batch["id"]), 1), np.float32))
            worker.step()
            read += len(batch["id"])
            if read == 40:
                ended.wait(60)
                break

    options = {"workers": 1, "sync": "async", "engine": "inline", "deadline": 60}
    thread = threading.Thread(target=hw.run, args=(train,), kwargs={"started": addresses.append, **options})
    thread.start()
    try:
        wait_until(lambda: addresses)
        with hw.follow(addresses[0], models=(), tables="seen", every=1) as follower:
            write(tmp_path / "a.jsonl", 5, 35)
            content = (tmp_path / "a.jsonl").read_bytes()
            seen = 0
            while seen < 40:
                with follower.pin() as view:
                    version = view.version.number
                    streams = view.positions.last[0].streams if view.positions.last else ()  # before a step
                    read = [int(offset) for stream in streams for _, offset in stream.offsets]
                    seen = content[: sum(read)].count(b"\n")
                    rows = {
                        int(id): row[0]
                        for ids, rows in view.scan("seen")
                        for id, row in zip(ids, rows, strict=True)
                    }
                    assert rows == dict.fromkeys(range(seen), 1.0)
                if seen < 40:
                    follower.wait(version + 1, deadline=30)  # which may be shown by now
    finally:
        ended.set()
        thread.join(60)


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    """A redis-server of our own on a Unix socket; its path."""
    package = pytest.importorskip("redis")
    folder = tmp_path_factory.mktemp("redis")
    path = f"{folder}/socket"
    command = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", str(folder)]
    try:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        pytest.skip("no redis-server is installed")
    client = package.Redis(unix_socket_path=path)

    def answers():
        try:
            return client.ping()
        except package.ConnectionError:
            return False

    try:
        wait_until(answers)
        client.close()
        yield path
    finally:
        client.close()
        server.terminate()
        server.wait(30)


@pytest.fixture
def redis(redis_server):
    """A client, and the server's URL. Each test has its own: a client may connect anew whenever it finds
    something unread on its connection, and that would look like a connection that the test has left."""
    with pytest.importorskip("redis").Redis(unix_socket_path=redis_server) as client:
        yield client, f"unix://{redis_server}"


def test_entries_of_redis_streams_are_events(redis):
    client, url = redis
    for key in ("a", "b"):
        for id in range(6):
            client.xadd(key, {"id": id, "name": f"n{id}", "x": json.dumps([id, 1])})
    stream = hw.data.RedisStream(url, ["a", "b", "later"], endless=False)
    found = read_all(stream)
    assert found[1] == {"id": 1, "name": "n1", "x": [1, 1]}
    assert [event["id"] for event in found] == [*range(6), *range(6)]

    def train(worker):
        return count(worker, hw.data.RedisStream(url, ["a", "b", "later"], endless=False))[1]

    result = hw.run(train, workers=1, sync="async", engine="inline", deadline=60)
    assert result.values[0] == dict.fromkeys(range(6), 2.0)
    stream.close()


def test_entries_that_were_trimmed_before_they_were_read_are_an_error(redis):
    client, url = redis
    for id in range(8):
        client.xadd("trimmed", {"id": id})
    stream = hw.data.RedisStream(url, "trimmed")
    ids = [event.offset for event in stream.read("trimmed", "", 9)]
    client.xtrim("trimmed", maxlen=4, approximate=False)
    assert [event.value["id"] for event in stream.read("trimmed", ids[4], 9)] == [5, 6, 7]
    with pytest.raises(DataError, match=r"was trimmed beyond .*: 2 entries are lost"):
        stream.read("trimmed", ids[1], 9)
    assert [event.value["id"] for event in stream.read("trimmed", ids[3], 9)] == [4, 5, 6, 7]
    client.delete("trimmed")
    with pytest.raises(DataError, match="no longer exists"):
        stream.read("trimmed", ids[4], 9)
    stream.close()
    gone = hw.data.RedisStream("unix:///nowhere/redis", "a")
    with pytest.raises(DataError, match="unix:///nowhere/redis"):
        gone.read("a", "", 1)
