"""Published weights: what is written is read bit by bit, by us and by a stranger; damage is named."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import read_chain, read_file, write_version

import headwater as hw
from headwater.errors import ConfigurationError, WeightsError
from headwater.weights import Notification, TableDelta, WeightsReader, WeightsWriter, versions
from headwater.weights.bfloat16 import to_bfloat16, to_float32

ml_dtypes = pytest.importorskip("ml_dtypes")


def tensors(step, seed=0):
    """Two tensors and a scalar; a tenth of the first one moves with each step."""
    chance = np.random.default_rng(seed)
    matrix = chance.standard_normal((40, 25)).astype(np.float32)
    for k in range(step):
        matrix.flat[np.random.default_rng(1000 + k).choice(1000, 100, replace=False)] += 0.25
    return {
        "layer.weight": matrix,
        "layer.bias": np.arange(7, dtype=np.float32),
        "scale": np.float32(step)[...],
    }


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8).tobytes()


@pytest.mark.parametrize("dialect", ["sglang", "modelexpress"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_version_equals_the_cast_of_its_values_for_us_and_for_a_stranger(tmp_path, dialect, dtype):
    with WeightsWriter(tmp_path, dtype=dtype, dialect=dialect, full_every=4) as writer:
        written = [writer.write(tensors(step)) for step in range(10)]
    assert [one.number for one in written] == list(range(1, 11))
    assert [one.full for one in written] == [k % 4 == 0 for k in range(10)]
    for step in range(10):
        expected = {
            name: array.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else array
            for name, array in tensors(step).items()
        }
        ours, theirs = hw.load_weights(tmp_path, step + 1), read_chain(tmp_path, step + 1)
        assert ours.keys() == theirs.keys() == expected.keys()
        for name, array in expected.items():
            assert ours[name].shape == array.shape
            assert bits(ours[name]) == bits(theirs[name]) == bits(array), (step, name)
    assert hw.load_weights(tmp_path).version == 10


@pytest.mark.parametrize("dialect", ["sglang", "modelexpress"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_what_a_stranger_writes_is_read(tmp_path, dialect, encoding):
    states = [{name: np.atleast_1d(a) for name, a in tensors(step).items()} for step in range(4)]
    for number, state in enumerate(states, start=1):
        base = None if number == 1 else states[number - 2]
        write_version(tmp_path, number, state, base=base, dialect=dialect, encoding=encoding)
    for number, state in enumerate(states, start=1):
        loaded = hw.load_weights(tmp_path, number)
        assert {name: bits(a) for name, a in loaded.items()} == {n: bits(a) for n, a in state.items()}


def test_a_reader_that_moves_on_in_any_grouping_holds_the_same(tmp_path):
    with WeightsWriter(tmp_path, full_every=100) as writer:
        for step in range(8):
            writer.write(tensors(step))
    for stops in ([8], [1, 8], [1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 8], [5, 5, 8]):
        reader = WeightsReader(tmp_path)
        for stop in stops:
            reader.load(stop)
        assert all(bits(a) == bits(tensors(7)[name]) for name, a in reader.weights().items())


def test_every_bfloat16_comes_back_and_ties_round_to_even():
    every = np.arange(1 << 16, dtype=np.uint16)
    floats = to_float32(every)
    back = to_bfloat16(floats)
    nan = np.isnan(floats)
    assert np.array_equal(back[~nan], every[~nan])
    assert np.isnan(to_float32(back[nan])).all()
    assert np.array_equal(floats[~nan], every.view(ml_dtypes.bfloat16).astype(np.float32)[~nan])


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_that_of_ml_dtypes(values):
    array = np.array(values, dtype=np.float32)
    ours, theirs = to_bfloat16(array).view(ml_dtypes.bfloat16), array.astype(ml_dtypes.bfloat16)
    assert np.array_equal(ours.astype(np.float32), theirs.astype(np.float32), equal_nan=True)


def test_a_version_is_on_disk_whole_before_it_has_its_name_and_its_index_comes_last(tmp_path, monkeypatch):
    calls = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def seen(kind, real):
        def call(*arguments):
            name = (
                os.readlink(f"/proc/self/fd/{arguments[0]}") if kind == "fsync" else os.fspath(arguments[1])
            )
            calls.append((kind, os.path.basename(name)))
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", seen("fsync", fsync))
    monkeypatch.setattr(os, "replace", seen("replace", replace))
    monkeypatch.setattr(os, "rename", seen("rename", rename))
    with WeightsWriter(tmp_path) as writer:
        writer.write(tensors(0))
    index, file = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    order = [calls.index(one) for one in (("replace", file), ("replace", index))]
    published = calls.index(("rename", "weight_v000001"))
    assert order == sorted(order)
    assert order[-1] < published
    for name in (file, index):
        assert calls.index(("fsync", name + ".partial")) < calls.index(("replace", name))
    assert calls[published + 1] == ("fsync", tmp_path.name)


def test_a_wrong_base_a_second_application_a_missing_link_and_a_flipped_byte_are_named(tmp_path):
    with WeightsWriter(tmp_path, full_every=100) as writer:
        for step in range(5):
            writer.write(tensors(step))
    reader = WeightsReader(tmp_path)
    reader.load(2)
    with pytest.raises(WeightsError, match="version 4 is a delta of version 3, but this reader holds 2"):
        reader.apply(4)
    with pytest.raises(WeightsError, match="version 2 was applied already"):
        reader.apply(2)
    assert all(bits(a) == bits(tensors(1)[name]) for name, a in reader.weights().items())
    damaged = tmp_path / "weight_v000005" / "model-00001-of-00001.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-20] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"weight_v000005.*(damaged|expected)"):
        reader.load(5)
    assert reader.version == 2, "a version that does not verify changes nothing"
    for file in (tmp_path / "weight_v000003").iterdir():
        file.unlink()
    with pytest.raises(WeightsError, match="version 3, which version 4 is a delta of, is missing"):
        reader.load(4)


def test_every_flipped_byte_of_a_full_version_is_noticed(tmp_path):
    with WeightsWriter(tmp_path) as writer:
        writer.write({"w": np.arange(6, dtype=np.float32)})
    file = tmp_path / "weight_v000001" / "model-00001-of-00001.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(WeightsError):
            hw.load_weights(tmp_path)


def test_what_is_pruned_is_never_a_link_that_a_kept_version_needs(tmp_path):
    with WeightsWriter(tmp_path, full_every=5, keep=3) as writer:
        for step in range(13):
            writer.write(tensors(step))
            for number in versions(tmp_path)[-3:]:
                assert hw.load_weights(tmp_path, number).version == number
    assert versions(tmp_path) == [11, 12, 13]


def test_a_writer_that_comes_back_goes_on_with_a_full_version(tmp_path):
    with WeightsWriter(tmp_path) as writer:
        writer.write(tensors(0))
        writer.write(tensors(1))
    draft = tmp_path / "weight_v000003.partial"
    draft.mkdir()
    (draft / "model-00001-of-00001.safetensors").write_bytes(b"half of a file")
    with WeightsWriter(tmp_path) as writer:
        assert writer.write(tensors(2)).full
    assert not draft.exists()
    assert bits(hw.load_weights(tmp_path, 3)["layer.weight"]) == bits(tensors(2)["layer.weight"])


def test_a_delta_that_is_no_smaller_is_a_full_version_and_nothing_changed_is_a_delta_of_nothing(tmp_path):
    chance = np.random.default_rng(0)
    noise = [chance.integers(0, 1 << 32, 4000, dtype=np.uint32).view(np.float32) for _ in range(2)]
    with WeightsWriter(tmp_path) as writer:
        writer.write({"w": noise[0]})
        same = writer.write({"w": noise[0]})
        other = writer.write({"w": noise[1]})
    assert (same.full, same.changed, same.size) == (False, 0, 0)
    assert other.full
    assert bits(hw.load_weights(tmp_path, 2)["w"]) == bits(noise[0])


def test_tables_come_whole_and_then_as_changed_and_deleted_rows(tmp_path):
    none = np.empty(0, np.int64)
    rows = lambda *ids: np.array([[id, id + 0.5] for id in ids], np.float32).reshape(-1, 2)  # noqa: E731
    ids = lambda *ids: np.array(ids, np.int64)  # noqa: E731
    w = {"w": np.zeros(3, np.float32)}
    with WeightsWriter(tmp_path) as writer:
        writer.write(w, tables={"users": TableDelta(ids(5, -1, 9), rows(5, -1, 9), none, True)})
        changed = TableDelta(ids(9, 7), rows(90, 7), ids(-1), False)
        assert not writer.write(w, tables={"users": changed}, version=(0, 12), positions={"a": 3}).full
    first, second = hw.load_weights(tmp_path, 1), hw.load_weights(tmp_path, 2)
    assert first.tables["users"]["ids"].tolist() == [-1, 5, 9]
    assert second.tables["users"]["ids"].tolist() == [5, 7, 9]
    assert second.tables["users"]["values"].tolist() == rows(5, 7, 90).tolist()
    assert (second.training_version, second.positions) == ((0, 12), {"a": 3})
    table, metadata = read_file(tmp_path / "weight_v000002" / "table-users.safetensors")
    assert metadata == {"table": "users", "version": "2", "base_version": "1"}
    assert table["deleted"].tolist() == [-1]
    file = tmp_path / "weight_v000002" / "table-users.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"table-users\.safetensors is damaged"):
        hw.load_weights(tmp_path)


def test_a_fsspec_url_is_written_and_read(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}"
    with WeightsWriter(url, full_every=3) as writer:
        for step in range(5):
            writer.write(tensors(step))
    assert bits(hw.load_weights(url)["layer.weight"]) == bits(tensors(4)["layer.weight"])
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_names_of_the_engine_take_the_place_of_the_trainings(tmp_path):
    with WeightsWriter(tmp_path, names={"layer.weight": "model.embed.weight"}) as writer:
        writer.write(tensors(0))
    assert hw.load_weights(tmp_path).keys() == {"model.embed.weight", "layer.bias", "scale"}


def test_a_full_disk_costs_that_version_only(tmp_path, monkeypatch):
    from headwater.errors import CheckpointError
    from headwater.weights import writer as module

    with WeightsWriter(tmp_path) as writer:
        writer.write(tensors(0))

        def full(*arguments):
            raise CheckpointError("cannot write: No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(module, "write_tensors", full)
            with pytest.raises(WeightsError, match="No space left"):
                writer.write(tensors(1))
        assert versions(tmp_path) == [1]
        assert writer.write(tensors(2)).full
    assert versions(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16'"),
        ({"dialect": "vllm"}, "dialect must be 'modelexpress' or 'sglang', got 'vllm'"),
        ({"full_every": 0}, "full_every must be an integer ≥ 1"),
        ({"keep": True}, "keep must be an integer ≥ 1"),
        ({"checksum": "md5"}, "expected xxh3-128, blake3 or adler32"),
    ],
)
def test_impossible_settings_are_refused_at_once(tmp_path, arguments, what):
    with pytest.raises(ConfigurationError, match=what):
        WeightsWriter(tmp_path, **arguments)


def test_bad_calls_are_refused_and_change_nothing(tmp_path):
    with WeightsWriter(tmp_path) as writer:
        with pytest.raises(ConfigurationError, match="in use by another publisher"):
            WeightsWriter(tmp_path)
        writer.write(tensors(0))
        with pytest.raises(ConfigurationError, match="'w' is float64, expected float32"):
            writer.write({"w": np.zeros(3)})
        with pytest.raises(ConfigurationError, match=r"tensor 'layer\.bias' was"):
            writer.write({**tensors(0), "layer.bias": np.zeros(8, np.float32)})
        assert versions(tmp_path) == [1]
    with pytest.raises(ConfigurationError, match="has no complete version 7: there are 1 to 1"):
        hw.load_weights(tmp_path, 7)
    with pytest.raises(ConfigurationError, match="has no complete version: there are none"):
        hw.load_weights(tmp_path / "elsewhere")
    (tmp_path / "weight_v000001" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="is no index of a version"):
        hw.load_weights(tmp_path)


def test_an_engine_is_told_by_a_post():
    told = []

    class Engine(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.append((self.path, json.loads(body)))
            self.send_response(200 if self.path == "/pull_weights" else 503)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert Notification(f"{address}/pull_weights").post(3, 'a "b"', "c") == 200
            with pytest.raises(WeightsError, match="answered 503 to version 4"):
                Notification(f"{address}/other", body='{"weight_version": "{version}"}').post(4, "a", "c")
        finally:
            server.shutdown()
            thread.join()
    assert told == [
        ("/pull_weights", {"source_dir": 'a "b"', "target_version": 3}),
        ("/other", {"weight_version": "4"}),
    ]
    for url, body in (("ftp://x/y", "{}"), ("http://x/y", "{version")):
        with pytest.raises(ConfigurationError):
            Notification(url, body)
