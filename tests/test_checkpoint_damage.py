"""Damaged checkpoints: every change of a file is noticed and named, and the last good one is used."""

import hashlib
import random
import re
import shutil
from contextlib import suppress

import msgspec
import pytest
from checkpoints import ADAGRAD, AFTER_10_STEPS, SCHEDULED, assert_same, model, table, write

import headwater as hw
from headwater import checkpoint
from headwater.checkpoint.manifest import encode
from headwater.errors import CheckpointError, ConfigurationError, HeadwaterError
from headwater.messages import ModelSpec, RuleSpec, TensorSpec

NEWER = "g000-v000000002"


@pytest.fixture
def directory(tmp_path):
    """Two checkpoints, of which tests damage the newer."""
    write(tmp_path, 0, 1, [model(seed=1)], [table(seed=1)])
    write(tmp_path, 0, 2, [model(seed=2)], [table(seed=2)])
    return tmp_path


def _files(directory):
    return sorted(path for path in (directory / NEWER).iterdir())


def _flip(path, at, by=1):
    data = bytearray(path.read_bytes())
    data[at] ^= by
    path.write_bytes(data)


def _assert_older_is_used(directory, reason):
    found = checkpoint.latest(directory)
    assert found.checkpoint.manifest.version == 1
    assert any(reason in text and NEWER in text for text in found.skipped), found.skipped
    (read,), _ = checkpoint.read_part(found.checkpoint.path, 0, 1)
    assert_same(read, model(seed=1))


def test_an_untouched_checkpoint_is_sound_and_the_newest_is_used(directory):
    assert checkpoint.verify(directory / NEWER) == checkpoint.Verification(str(directory / NEWER), ())
    found = checkpoint.latest(directory)
    assert (found.checkpoint.manifest.version, found.skipped) == (2, ())


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_is_noticed_wherever_it_is(directory, seed):
    rng = random.Random(seed)
    for path in _files(directory):
        at, by = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        _flip(path, at, by)
        found = checkpoint.verify(directory / NEWER)
        assert len(found.problems) == 1, (path, at, by)
        assert path.name in found.problems[0]
        _assert_older_is_used(directory, path.name)
        _flip(path, at, by)
    assert checkpoint.verify(directory / NEWER).sound


def test_every_byte_of_the_manifest_is_covered(directory):
    path = directory / NEWER / "manifest.json"
    good = path.read_bytes()
    rng = random.Random(5)
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= rng.randrange(1, 256)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            checkpoint.manifest.decode(bytes(data), str(path))


@pytest.mark.parametrize("left", [0, 1, 7, 0.5, -1])
def test_a_truncated_file_is_noticed(directory, left):
    for path in _files(directory):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * left) if left == 0.5 else left])
        assert path.name in checkpoint.verify(directory / NEWER).problems[0]
        _assert_older_is_used(directory, path.name)
        path.write_bytes(whole)


def test_a_longer_file_is_noticed(directory):
    for path in _files(directory):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n")
        assert path.name in checkpoint.verify(directory / NEWER).problems[0]
        path.write_bytes(whole)


def test_a_missing_file_is_named(directory):
    for path in _files(directory):
        if path.name == "manifest.json":
            continue
        whole = path.read_bytes()
        path.unlink()
        assert checkpoint.verify(directory / NEWER).problems == (f"{path.name} is missing",)
        _assert_older_is_used(directory, "is missing")
        with pytest.raises(CheckpointError, match=f"cannot read .*{path.name}.*it is not there"):
            checkpoint.read_part(directory / NEWER, 0, 1)
        path.write_bytes(whole)


def test_all_problems_are_named_at_once(directory):
    files = [path for path in _files(directory) if path.name != "manifest.json"]
    _flip(files[0], -1)
    files[1].unlink()
    files[2].write_bytes(b"")
    problems = checkpoint.verify(directory / NEWER).problems
    assert [files[i].name in text for i, text in enumerate(problems)] == [True] * 3


def test_extra_files_do_no_harm_and_are_named(directory):
    (directory / NEWER / ".DS_Store").write_text("x")
    (directory / "notes.txt").write_text("x")
    (directory / "g000-v7").mkdir()
    found = checkpoint.verify(directory / NEWER)
    assert (found.sound, found.extras) == (True, (".DS_Store",))
    assert checkpoint.latest(directory).checkpoint.manifest.version == 2


def test_two_files_that_changed_places_are_noticed(directory):
    first, second = (path for path in _files(directory) if path.name.startswith("model"))
    shutil.move(first, directory / "between")
    shutil.move(second, first)
    shutil.move(directory / "between", second)
    assert len(checkpoint.verify(directory / NEWER).problems) == 2


def test_a_damaged_header_is_an_error_of_the_tree_whatever_it_says(directory):
    rng = random.Random(7)
    for path in _files(directory):
        if path.name == "manifest.json":
            continue
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(700)] = rng.randrange(256)
            path.write_bytes(data)
            with suppress(CheckpointError):
                checkpoint.read_part(directory / NEWER, 0, 3)
        path.write_bytes(whole)


def test_without_a_good_one_each_is_named_with_its_reason(directory):
    for path in directory.glob("g*/model*server-000*"):
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(directory)
    lines = str(caught.value).splitlines()
    assert lines[0] == "no checkpoint is good:"
    assert [name in line for name, line in zip([NEWER, "g000-v000000001"], lines[1:], strict=True)] == [
        True
    ] * 2


def test_one_that_lost_its_manifest_is_named_among_the_skipped(directory):
    (directory / NEWER / "manifest.json").unlink()
    (directory / "g000-v000000000.partial").mkdir()
    (directory / "g001-v000000001.partial").mkdir()
    found = checkpoint.latest(directory)
    assert found.checkpoint.manifest.version == 1
    assert [text.partition(":")[0] for text in found.skipped] == [
        str(directory / NEWER),
        str(directory / "g001-v000000001.partial"),
    ]


def test_unverified_only_the_manifest_counts(directory):
    _flip(next((directory / NEWER).glob("model*")), -1)
    assert checkpoint.latest(directory, verify=False).checkpoint.manifest.version == 2
    assert checkpoint.latest(directory).checkpoint.manifest.version == 1


def test_a_damaged_one_that_was_named_is_not_replaced_by_another(directory):
    _flip(next((directory / NEWER).glob("table*")), -1)
    with pytest.raises(CheckpointError, match=r"is damaged, use another checkpoint: table.* has sha256"):
        hw.load_checkpoint(directory / NEWER)


def test_loading_from_a_directory_says_in_the_log_what_was_skipped(directory, caplog):
    _flip(next((directory / NEWER).glob("table*")), -1)
    hw.load_checkpoint(directory)
    assert "g000-v000000001 is used, since a newer one is not good" in caplog.text
    assert "sha256" in caplog.text


# ── what is no checkpoint, or not this one ──────────────────────────────────────────────────────


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "g000-v000000003").mkdir()
    (tmp_path / "g000-v000000004.partial").mkdir()
    (tmp_path / "file").write_text("x")
    for name, reason in {
        "nowhere": "no such folder",
        "empty": "holds no checkpoint",
        "g000-v000000003": "its writing was interrupted",
        "g000-v000000004.partial": "its writing was interrupted",
        "file": "no such folder",
    }.items():
        with pytest.raises((ConfigurationError, CheckpointError), match=reason):
            hw.load_checkpoint(tmp_path / name)
    for read in (checkpoint.open_checkpoint, checkpoint.verify):
        with pytest.raises(ConfigurationError, match=r"it has no manifest\.json"):
            read(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="there is no directory"):
        checkpoint.latest(tmp_path / "nowhere")


def test_a_newer_format_is_refused_even_where_an_older_checkpoint_would_do(directory):
    path = directory / NEWER / "manifest.json"
    newer = msgspec.structs.replace(checkpoint.open_checkpoint(path.parent).manifest, format=2)
    path.write_bytes(encode(newer).replace(b'"generation"', b'"unknown"', 1))
    path.write_bytes(_summed(path.read_bytes()))
    for call in (checkpoint.latest, hw.load_checkpoint):
        with pytest.raises(ConfigurationError, match=r"has format 2, this headwater reads formats up to 1"):
            call(directory)


def _summed(data):
    """With the sum of what it says now, as a newer headwater would write it."""
    old = re.search(rb"[0-9a-f]{64}", data)[0]
    blank = data.replace(old, b"0" * 64, 1)
    return data.replace(old, hashlib.sha256(blank).hexdigest().encode(), 1)


def test_another_training_is_told_what_differs(directory):
    manifest = checkpoint.open_checkpoint(directory / NEWER).manifest
    net, users = model().spec, table().spec
    assert checkpoint.differences(manifest, [net], [users]) == ()
    other = ModelSpec("net", (net.tensors[0], TensorSpec("c", (4,), "float32")), (SCHEDULED,))
    assert checkpoint.differences(manifest, [other, model("x").spec], []) == (
        "model 'net' has tensors (b float32[9]) in the checkpoint, (c float32[4]) here",
        "model 'net' has rules SGD in the checkpoint, Adam here",
        "the checkpoint has no model 'x', only 'net'",
    )
    changed = msgspec.structs.replace(users, dim=4, expiry=AFTER_10_STEPS, rule=RuleSpec("Adam", {}))
    assert checkpoint.differences(manifest, [], [changed]) == (
        "table 'users' has dim 3 in the checkpoint, 4 here",
        "table 'users' has rule Adagrad in the checkpoint, Adam here",
        "table 'users' has expiry none in the checkpoint, AfterSteps(steps=10) here",
    )
    slower = msgspec.structs.replace(users, rule=msgspec.structs.replace(ADAGRAD, settings={"lr": 0.001}))
    assert checkpoint.differences(manifest, [], [slower]) == ()


# ── which stay ──────────────────────────────────────────────────────────────────────────────────


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_prune_keeps_the_last_ones(tmp_path):
    for generation, version in [(0, 5), (0, 9), (1, 7), (1, 8)]:
        write(tmp_path, generation, version, [model(shapes={"w": (1,)})], [], servers=1)
    removed = checkpoint.prune(tmp_path, 3)
    assert removed == (str(tmp_path / "g000-v000000005"),)
    checkpoint.prune(tmp_path, 1)
    assert _names(tmp_path) == ["g001-v000000008"]
    assert checkpoint.prune(tmp_path, 1) == ()
    with pytest.raises(ConfigurationError, match="keep=0"):
        checkpoint.prune(tmp_path, 0)


def test_prune_removes_leftovers_but_not_what_is_being_written_or_is_not_ours(directory):
    for name in ["g000-v000000000.partial", "g000-v000000009", "g001-v000000003.partial", "logs", "g1"]:
        (directory / name).mkdir()
        (directory / name / "model").write_text("x")
    checkpoint.prune(directory, 9, writing=(1, 3))
    assert _names(directory) == ["g000-v000000001", NEWER, "g001-v000000003.partial", "g1", "logs"]


def test_prune_does_not_count_damaged_ones(directory):
    next((directory / NEWER).glob("model*")).unlink()
    assert checkpoint.prune(directory, 1) == ()
    write(directory, 0, 3, [model(shapes={"w": (1,)})], [])
    checkpoint.prune(directory, 1)
    assert _names(directory) == ["g000-v000000003"]


def test_generations_are_never_used_twice(directory):
    assert checkpoint.next_generation(directory) == 1
    assert checkpoint.next_generation(directory / "new") == 0
    (directory / "g007-v000000001.partial").mkdir()
    assert checkpoint.next_generation(directory) == 8


def test_errors_are_of_the_tree():
    assert issubclass(CheckpointError, hw.errors.EnvironmentFailure)
    assert issubclass(CheckpointError, HeadwaterError)
