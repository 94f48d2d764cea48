"""Checkpoints behind fsspec, on its file system in memory: manifest last, no rename, ranges read alone."""

import uuid

import fsspec
import pytest
import safetensors.numpy
from checkpoints import assert_same, model, part_of_model, part_of_table, table, write

import headwater as hw
from headwater import checkpoint
from headwater.errors import CheckpointError, ConfigurationError
from headwater.spec.layout import Layout


@pytest.fixture
def url():
    name = f"memory://{uuid.uuid4().hex}"
    yield f"{name}/runs/a"
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


def _names(url):
    memory = fsspec.filesystem("memory")
    return sorted(path.rpartition("/")[2] for path in memory.ls(url, detail=False))


def test_what_is_written_is_read_back_by_any_number_of_servers(url):
    write(url, 0, 9, servers=3)
    assert checkpoint.verify(f"{url}/g000-v000000009").sound
    path = checkpoint.latest(url).checkpoint.path
    assert path == f"{url}/g000-v000000009"
    for server in range(2):
        (read,), (rows,) = checkpoint.read_part(path, server, 2)
        assert_same(read, part_of_model(model(), server, 2))
        assert_same(rows, part_of_table(table(), server, 2))


def test_loading_and_exporting_take_urls(url, tmp_path):
    write(url)
    expected = Layout(model().spec.tensors).views(model().values)["w"]
    assert hw.load_checkpoint(url + "/")["net"]["w"].tobytes() == expected.tobytes()
    checkpoint.export(url, tmp_path / "out")
    assert safetensors.numpy.load_file(tmp_path / "out")["w"].tobytes() == expected.tobytes()
    checkpoint.export(url, f"{url}/out.safetensors")
    remote = fsspec.filesystem("memory").cat_file(f"{url}/out.safetensors")
    assert remote == (tmp_path / "out").read_bytes()


def test_without_its_manifest_a_folder_is_no_checkpoint(url):
    write(url, 0, 1, [model(seed=1)], [])
    checkpoint.begin(url, 0, 2)
    checkpoint.write_part(url, 0, 2, 0, 1, [model(seed=2)], [])
    assert "g000-v000000002" in _names(url)
    assert checkpoint.latest(url).checkpoint.manifest.version == 1
    with pytest.raises(ConfigurationError, match="its writing was interrupted"):
        checkpoint.open_checkpoint(f"{url}/g000-v000000002")
    assert checkpoint.prune(url, 1, writing=(0, 2)) == ()
    assert checkpoint.prune(url, 1) == (f"{url}/g000-v000000002",)
    assert _names(url) == ["g000-v000000001"]


def test_begun_again_and_abandoned(url):
    checkpoint.begin(url, 0, 2)
    checkpoint.write_part(url, 0, 2, 0, 1, [model()], [])
    write(url, 0, 2)
    found = checkpoint.verify(f"{url}/g000-v000000002")
    assert (found.problems, found.extras) == ((), ())
    with pytest.raises(ConfigurationError, match="exists"):
        checkpoint.begin(url, 0, 2)
    checkpoint.abandon(url, 0, 2)
    checkpoint.abandon(url, 0, 3)
    assert _names(url) == ["g000-v000000002"]
    assert checkpoint.next_generation(url) == 1


def test_damage_is_noticed_and_the_last_good_one_used(url):
    write(url, 0, 1)
    manifest = write(url, 0, 2)
    memory, first, second = fsspec.filesystem("memory"), *manifest.files()[:2]
    path = f"{url}/g000-v000000002/{first.name}"
    data = bytearray(memory.cat_file(path))
    data[-1] ^= 64
    memory.pipe_file(path, bytes(data))
    memory.rm(f"{url}/g000-v000000002/{second.name}")
    first_problem, second_problem = checkpoint.verify(f"{url}/g000-v000000002").problems
    assert "sha256" in first_problem
    assert second_problem == f"{second.name} is missing"
    assert checkpoint.latest(url).checkpoint.manifest.version == 1
    with pytest.raises(
        CheckpointError, match=f"cannot read {url}/g000-v000000002/{second.name}: FileNotFound"
    ):
        checkpoint.read_part(f"{url}/g000-v000000002", 0, 1)


def test_prune_keeps_the_last_ones(url):
    for version in range(4):
        write(url, 0, version, [model(shapes={"w": (1,)})], [])
    checkpoint.prune(url, 2)
    assert _names(url) == ["g000-v000000002", "g000-v000000003"]


def test_urls_that_cannot_be_opened_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="fsspec cannot open pigeon://"):
        checkpoint.latest("pigeon://coop")
    with pytest.raises(ConfigurationError, match="there is no directory memory://nowhere"):
        checkpoint.latest("memory://nowhere")
    with checkpoint.DirectoryLock("memory://nowhere"), checkpoint.DirectoryLock("memory://nowhere"):
        pass  # such stores have no locks
