"""Checkpoints: what is written is read back to the bit, by any number of servers, by anybody."""

import json
import os
import re
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from checkpoints import (
    AFTER_10_STEPS,
    SCHEDULED,
    SGD,
    assert_same,
    model,
    part_of_model,
    part_of_table,
    python,
    table,
    write,
)
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import headwater as hw
from examples import examples
from headwater import checkpoint
from headwater.checkpoint.manifest import decode, parse_name
from headwater.checkpoint.store import LocalFolder, write_all
from headwater.checkpoint.tensors import open_tensors
from headwater.errors import CheckpointError, ConfigurationError
from headwater.spec.layout import Layout

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=1, max_size=4)
MODELS = st.builds(
    model,
    name=NAMES,
    shapes=SHAPES,
    states=st.lists(NAMES, unique=True, max_size=2).map(tuple),
    seed=st.integers(0, 2**32),
    rules=st.sampled_from([(SGD,), (SCHEDULED, SGD)]),
)
TABLES = st.builds(
    table,
    name=NAMES,
    rows=st.integers(0, 300),
    dim=st.integers(1, 5),
    states=st.dictionaries(NAMES, st.integers(1, 5), max_size=2),
    expiry=st.sampled_from([None, AFTER_10_STEPS]),
    pending=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
SERVERS = st.integers(1, 9)


@examples(40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(MODELS, max_size=3), st.lists(TABLES, max_size=2), SERVERS, SERVERS)
def test_any_number_of_servers_reads_its_parts_bit_for_bit(tmp_path_factory, models, tables, before, after):
    directory = tmp_path_factory.mktemp("recut")
    write(directory, 3, 45, models, tables, servers=before)
    for server in range(after):
        read_models, read_tables = checkpoint.read_part(directory / "g003-v000000045", server, after)
        for got, whole in zip(read_models, models, strict=True):
            assert_same(got, part_of_model(whole, server, after))
        for got, whole in zip(read_tables, tables, strict=True):
            assert_same(got, part_of_table(whole, server, after))


def test_arrays_that_are_read_are_the_callers_own(tmp_path):
    write(tmp_path, models=[model()], tables=[table()])
    path = tmp_path / "g000-v000000001"
    (first,), _ = checkpoint.read_part(path, 0, 1)
    first.values[:] = 0.0
    (second,), (rows,) = checkpoint.read_part(path, 0, 1)
    assert_same(second, model())
    assert rows.ids.flags.writeable


def test_files_are_safetensors_that_the_library_reads(tmp_path):
    manifest = write(tmp_path, servers=3)
    folder = tmp_path / "g000-v000000001"
    for server in range(3):
        held = part_of_model(model(), server, 3)
        found = safetensors.numpy.load_file(folder / manifest.models[0].files[server].name)
        assert found["values"].tobytes() == held.values.tobytes()
        assert found["state.momentum_buffer"].tobytes() == held.states["momentum_buffer"].tobytes()
        rows = part_of_table(table(), server, 3)
        found = safetensors.numpy.load_file(folder / manifest.tables[0].files[server].name)
        assert found["ids"].tolist() == rows.ids.tolist()
        assert found["values"].tobytes() == rows.values.tobytes()


def test_files_of_the_library_can_be_read_in_pieces(tmp_path):
    values = np.arange(1000, dtype=np.float32).reshape(100, 10)
    safetensors.numpy.save_file({"v": values, "i": np.arange(5)}, tmp_path / "a", {"some": "metadata"})
    with open_tensors(LocalFolder(tmp_path), "a", (tmp_path / "a").stat().st_size) as opened:
        assert opened.read("v", 20, 31).tolist() == values[20:31].tolist()
        assert opened.read("i").tolist() == [0, 1, 2, 3, 4]


def test_a_file_larger_than_one_piece_is_whole(tmp_path):
    large = model(shapes={"w": (5_000_000,)}, states=())
    write(tmp_path, models=[large], tables=[], servers=1)
    assert checkpoint.verify(tmp_path / "g000-v000000001").sound
    (read,), _ = checkpoint.read_part(tmp_path / "g000-v000000001", 0, 1)
    assert_same(read, large)


# ── the manifest ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("folder", ["the usual disk", "memory"])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 4 << 20, (4 << 20) + 1, (9 << 20) + 4099])
def test_a_file_of_any_size_is_written_as_it_is(size, folder):
    if folder == "memory" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no file system in memory")
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if folder == "memory" else None) as place:
        with LocalFolder(Path(place)).write("file") as sink:
            for at in range(0, size, 1_000_003):
                write_all(sink, memoryview(content)[at : at + 1_000_003])
        assert os.listdir(place) == ["file"]
        assert (Path(place) / "file").read_bytes() == content


def test_the_manifest_says_what_there_is(tmp_path):
    written = write(tmp_path, 2, 1200, members={7: {"step": 4}}, splits=[[1, 2], "three"], servers=3)
    path = tmp_path / "g002-v000001200"
    found = checkpoint.open_checkpoint(path).manifest
    assert (found.format, found.headwater, found.servers) == (1, hw.__version__, 3)
    assert (found.generation, found.version) == (2, 1200)
    assert found.models[0].rules == (SGD,)
    assert found.models[0].counts == tuple(model().counts.tolist())
    assert (found.models[0].updates, found.tables[0].updates) == (7, 11)
    assert (found.tables[0].rows, found.tables[0].pending) == (len(table().ids), len(table().pending_ids))
    assert msgspec.json.decode(found.members, type=dict[int, dict[str, int]]) == {7: {"step": 4}}
    assert msgspec.json.decode(found.splits) == [[1, 2], "three"]
    assert found.files() == written.files()
    assert {file.name for file in found.files()} | {"manifest.json"} == {p.name for p in path.iterdir()}
    assert json.loads((path / "manifest.json").read_text())["servers"] == 3


def test_names_that_no_file_can_have_are_written_all_the_same(tmp_path):
    models = [model("../../etc/passwd", {"../x": (3,)}), model("名" * 300), model("")]
    tables = [table("../../etc/passwd"), table("a\0b\n")]
    manifest = write(tmp_path, models=models, tables=tables)
    assert all(re.fullmatch(r"[\w-]+\.server-\d{3}\.safetensors", f.name, re.ASCII) for f in manifest.files())
    got, _ = checkpoint.read_part(tmp_path / "g000-v000000001", 0, 1)
    assert [one.spec.name for one in got] == [one.spec.name for one in models]


def test_folder_names_sort_as_generations_and_versions():
    places = [(0, 7), (0, 1200), (1, 3), (12, 0), (999, 999_999_999)]
    names = [checkpoint.folder_name(*place) for place in places]
    assert names == sorted(names)
    assert [parse_name(name) for name in names] == places
    assert parse_name(checkpoint.folder_name(1234, 10**12)) == (1234, 10**12)
    assert [
        parse_name(n) for n in ("g0-v1", "g000-v000000001.partial", "lost+found", "g0000-v000000001")
    ] == ([None] * 4)


def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "g000-v000000001" / "manifest.json"
    good = checkpoint.open_checkpoint(path.parent).manifest
    (only,) = good.models
    away = msgspec.structs.replace(only.files[0], name="../manifest.json")
    bad = msgspec.structs.replace(good, models=(msgspec.structs.replace(only, files=(away, only.files[1])),))
    path.write_bytes(checkpoint.manifest.encode(bad))
    with pytest.raises(CheckpointError, match=r"contradicts itself.*\.\./manifest\.json"):
        decode(path.read_bytes(), str(path))


# ── committing ──────────────────────────────────────────────────────────────────────────────────


def _parts(directory, servers=2, updates=(7, 7)):
    checkpoint.begin(directory, 0, 1)
    return [
        checkpoint.write_part(
            directory, 0, 1, i, servers, [part_of_model(model(updates=updates[i]), i, servers)], []
        )
        for i in range(servers)
    ]


def _commit(directory, parts):
    return checkpoint.commit(directory, 0, 1, parts, members={}, splits={})


def test_a_server_whose_part_is_missing_is_noticed(tmp_path):
    parts = _parts(tmp_path)
    with pytest.raises(CheckpointError, match=r"got those of \[1\]"):
        _commit(tmp_path, parts[1:])
    with pytest.raises(CheckpointError, match="covered from 0 to 3072 by 1 files"):
        _commit(tmp_path, parts[:1])
    assert checkpoint.list_checkpoints(tmp_path) == ()


def test_parts_of_different_positions_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"'net' on server 1 differs.*8 and 7 updates"):
        _commit(tmp_path, _parts(tmp_path, updates=(7, 8)))


def test_a_part_written_on_another_machines_disk_is_noticed(tmp_path):
    parts = _parts(tmp_path)
    (tmp_path / "g000-v000000001.partial" / parts[1].models[0].files[0].name).unlink()
    with pytest.raises(CheckpointError, match="was written but is not seen from here"):
        _commit(tmp_path, parts)


def test_parts_may_arrive_in_any_order(tmp_path):
    _commit(tmp_path, _parts(tmp_path)[::-1])
    assert_same(checkpoint.read_part(tmp_path / "g000-v000000001", 0, 1)[0][0], model())


def test_an_existing_checkpoint_is_not_written_over(tmp_path):
    write(tmp_path)
    before = (tmp_path / "g000-v000000001" / "manifest.json").read_bytes()
    with pytest.raises(ConfigurationError, match="g000-v000000001 exists: take the next generation"):
        checkpoint.begin(tmp_path, 0, 1)
    checkpoint.abandon(tmp_path, 0, 1)
    assert (tmp_path / "g000-v000000001" / "manifest.json").read_bytes() == before


def test_what_an_interrupted_write_left_is_not_taken_into_the_next(tmp_path):
    _parts(tmp_path)
    stranger = tmp_path / "g000-v000000001.partial" / "old"
    stranger.write_text("left")
    parts = _parts(tmp_path)
    assert not stranger.exists()
    stranger.write_text("again")
    _commit(tmp_path, parts)
    assert checkpoint.verify(tmp_path / "g000-v000000001").extras == ()


def test_abandoning_leaves_nothing(tmp_path):
    _parts(tmp_path)
    checkpoint.abandon(tmp_path, 0, 1)
    checkpoint.abandon(tmp_path, 0, 1)
    assert list(tmp_path.iterdir()) == []


# ── for people ──────────────────────────────────────────────────────────────────────────────────


def test_load_checkpoint_gives_tensors_and_rows_by_name(tmp_path):
    write(tmp_path, models=[model(), model("other", {"s": (), "e": (0, 3)})], servers=3)
    loaded = hw.load_checkpoint(tmp_path)
    assert set(loaded) == {"net", "other", "users"}
    expected = Layout(model().spec.tensors).views(model().values)
    assert {name: array.shape for name, array in loaded["net"].items()} == {"w": (30, 70), "b": (9,)}
    assert all(loaded["net"][name].tobytes() == expected[name].tobytes() for name in expected)
    assert {name: array.shape for name, array in loaded["other"].items()} == {"s": (), "e": (0, 3)}
    assert loaded["users"]["ids"].tolist() == table().ids.tolist()
    assert loaded["users"]["values"].tobytes() == table().values.tobytes()


def test_load_checkpoint_takes_a_checkpoint_or_the_directory_of_several(tmp_path):
    write(tmp_path, 0, 9, [model(seed=1)], [])
    write(tmp_path, 1, 2, [model(seed=2)], [])
    newest = Layout(model().spec.tensors).views(model(seed=2).values)["b"]
    assert hw.load_checkpoint(tmp_path)["net"]["b"].tobytes() == newest.tobytes()
    older = Layout(model().spec.tensors).views(model(seed=1).values)["b"]
    named = hw.load_checkpoint(str(tmp_path / "g000-v000000009") + "/")
    assert named["net"]["b"].tobytes() == older.tobytes()


@pytest.mark.parametrize(
    ("version", "last", "there"), [(20, 10, True), (21, 10, False), (2**32 + 5, -5, True)]
)
def test_rows_that_had_expired_are_not_loaded_or_exported(tmp_path, version, last, there):
    whole = table(expiry=AFTER_10_STEPS, last=last)
    write(tmp_path, 0, version, [], [whole])
    loaded = hw.load_checkpoint(tmp_path)["users"]
    assert loaded["ids"].tolist() == (whole.ids.tolist() if there else [])
    checkpoint.export(tmp_path, tmp_path / "out.safetensors")
    exported = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert exported["users.values"].tobytes() == (whole.values.tobytes() if there else b"")


def _network():
    return torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 1))


def _model_of(name, tensors):
    """A model with the values of torch tensors."""
    whole = model(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    views = Layout(whole.spec.tensors).views(whole.values)
    for key, tensor in tensors.items():
        views[key][...] = tensor.detach().numpy()
    return whole


def test_an_export_is_a_state_dict_of_torch(tmp_path):
    network = _network()
    network[1].running_mean += 3.0
    buffers = {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    models = [_model_of("net", dict(network.named_parameters())), _model_of("net.buffers", buffers)]
    write(tmp_path, models=models, tables=[table()], servers=3)
    written = checkpoint.export(tmp_path, tmp_path / "net.safetensors")
    assert written.size == (tmp_path / "net.safetensors").stat().st_size
    loaded = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert loaded.pop("users.ids").tolist() == table().ids.tolist()
    assert loaded.pop("users.values").numpy().tobytes() == table().values.tobytes()
    fresh = _network()
    fresh.load_state_dict(loaded)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


def test_models_prefix_their_tensors_only_where_there_are_several(tmp_path):
    tensors = {"a": "w", "b": "w", "b.buffers": "v", "c.buffers": "w"}
    write(tmp_path, models=[model(name, {tensor: (2,)}) for name, tensor in tensors.items()], tables=[])
    checkpoint.export(tmp_path, tmp_path / "out")
    assert set(safetensors.numpy.load_file(tmp_path / "out")) == {"a.w", "b.w", "b.v", "c.buffers.w"}


def test_a_tensor_larger_than_one_piece_is_exported_whole(tmp_path):
    large = model(shapes={"w": (2_500, 2_001), "b": (5,)}, states=())
    write(tmp_path, models=[large], tables=[])
    checkpoint.export(tmp_path, tmp_path / "out")
    expected = Layout(large.spec.tensors).views(large.values)["w"]
    assert safetensors.numpy.load_file(tmp_path / "out")["w"].tobytes() == expected.tobytes()


def test_names_that_collide_are_refused_with_their_names(tmp_path):
    write(tmp_path / "a", models=[model("users", {"users.ids": (1,)})], tables=[table()])
    with pytest.raises(ConfigurationError, match=r"two tensors users\.ids"):
        checkpoint.export(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigurationError, match="both named 'users'"):
        hw.load_checkpoint(tmp_path / "a")


def test_local_paths_need_no_fsspec(tmp_path):
    code = """
import sys
sys.modules["fsspec"] = None
from checkpoints import write
from headwater import checkpoint, load_checkpoint
write(sys.argv[1])
print(len(load_checkpoint("file://" + sys.argv[1])))
try:
    checkpoint.begin("s3://bucket/run", 0, 1)
except Exception as error:
    print(type(error).__name__, error)
"""
    output, errors = python(code, tmp_path).communicate(timeout=60)
    assert output == (
        "2\nConfigurationError s3://bucket/run needs fsspec, which is not installed: "
        "pip install '.[files]' in a clone, or use a local path\n"
    ), errors


def test_the_one_name_a_safetensors_file_keeps_for_itself_is_refused(tmp_path):
    write(tmp_path, models=[model(shapes={"__metadata__": (2,)})], tables=[])
    with pytest.raises(ConfigurationError, match="two tensors __metadata__"):
        checkpoint.export(tmp_path, tmp_path / "out")
    assert hw.load_checkpoint(tmp_path)["net"]["__metadata__"].shape == (2,)


def test_importing_headwater_does_not_import_fsspec():
    code = "import sys, headwater; print('fsspec' in sys.modules)"
    assert python(code).communicate(timeout=60)[0] == "False\n"
