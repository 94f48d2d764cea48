"""Power may fail at any moment: what was complete is there afterwards, and nothing else is taken for it."""

import numpy as np
import pytest
from checkpoints import model, table, write
from disk import crashes

from headwater import checkpoint
from headwater.errors import ConfigurationError


def version_in(folder):
    """Of the newest good checkpoint, None where there is none; nothing newer may look complete."""
    try:
        found = checkpoint.latest(folder)
    except ConfigurationError:
        return None
    assert all("is not complete" in text for text in found.skipped), found.skipped
    return found.checkpoint.manifest.version


def test_a_checkpoint_is_there_once_it_is_committed_and_not_before(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    write(runs, 0, 1, [model(seed=1)], [table(seed=1)])
    moments = crashes(runs, monkeypatch, lambda: write(runs, 0, 2, [model(seed=2)], [table(seed=2)]))
    versions = [[version_in(folder) for folder in folders] for _, folders in moments]
    assert len(moments) > 20
    assert all(set(found) <= {1, 2} for found in versions), list(zip(moments, versions, strict=True))
    assert versions[0] == [1, 1, 1]
    assert versions[-1] == [2, 2, 2], "power failed after the commit, and the checkpoint is gone"


def test_the_first_checkpoint_of_a_directory_that_is_made_for_it_is_safe_too(tmp_path, monkeypatch):
    def change():
        write(tmp_path / "root" / "a" / "runs", 0, 1, [model()], [])

    (tmp_path / "root").mkdir()
    moments = crashes(tmp_path / "root", monkeypatch, change)
    for folder in moments[-1][1]:
        assert version_in(folder / "a" / "runs") == 1


def test_pruning_never_leaves_what_looks_complete_and_is_not(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for version in (1, 2, 3):
        write(runs, 0, version, [model(seed=version)], [table()])
    moments = crashes(runs, monkeypatch, lambda: checkpoint.prune(runs, 1))
    assert len(moments) > 5
    for done, (killed, *_) in moments:
        assert version_in(killed) == 3
        for listed in checkpoint.list_checkpoints(killed):
            assert not checkpoint.verify_all(listed.path)[0].problems, (done, listed.path)
    assert [found.version for found in checkpoint.list_checkpoints(runs)] == [3]


@pytest.mark.parametrize("before", [False, True], ids=["new", "over an existing file"])
def test_an_export_is_the_old_file_or_the_new_one_and_nothing_between(before, tmp_path, monkeypatch):
    write(tmp_path / "runs", 0, 1, [model(seed=1, shapes={"w": (3000,)})], [])
    out = tmp_path / "out"
    out.mkdir()
    if before:
        checkpoint.export(tmp_path / "runs", out / "net.safetensors")
    old = (out / "net.safetensors").read_bytes() if before else None
    write(tmp_path / "runs", 0, 2, [model(seed=2, shapes={"w": (3000,)})], [])
    moments = crashes(out, monkeypatch, lambda: checkpoint.export(tmp_path / "runs", out / "net.safetensors"))
    new = (out / "net.safetensors").read_bytes()
    assert old != new
    assert np.frombuffer(new[-12_000:], np.float32).size == 3000
    for done, folders in moments:
        for folder in folders:
            file = folder / "net.safetensors"
            assert (file.read_bytes() if file.exists() else None) in (old, new), (done, folder.name)
    for folder in moments[-1][1]:
        assert (folder / "net.safetensors").read_bytes() == new
