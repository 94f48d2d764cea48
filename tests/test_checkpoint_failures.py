"""What happens to checkpoints when processes are killed, disks fill up and clusters collide: for real."""

import json
import os
import signal
import socket
import subprocess

import pytest
from checkpoints import assert_same, model, python, small_disk, table, write
from waiting import wait_until

from headwater import checkpoint
from headwater.errors import CheckpointError, ConfigurationError

__all__ = ["small_disk"]

KILLED = """
import os, signal, sys
from checkpoints import model, table, write
from headwater.checkpoint.store import LocalFolder

class Fuse:
    def __init__(self, steps):
        self.left = steps
    def burn(self, steps=1):
        self.left -= steps
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def kill_before_file_operation(directory, step):
    fuse = Fuse(step)
    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename") and directory in str(arguments[0]):
            fuse.burn()
    sys.addaudithook(hook)

def kill_after_bytes(directory, step):
    fuse, plain = Fuse(step * 3000 + 1), LocalFolder.write
    class Sink:
        def __init__(self, sink):
            self.sink = sink
        def write(self, data):
            written = self.sink.write(data[: fuse.left])
            fuse.burn(written + (written < len(data)))
            return written
    from contextlib import contextmanager
    @contextmanager
    def write_until(self, name):
        with plain(self, name) as sink:
            yield Sink(sink)
    LocalFolder.write = write_until

root, arm = sys.argv[1], globals()[sys.argv[2]]
for step in range(500):
    directory = f"{root}/{step}"
    write(directory, 0, 1, [model(seed=1)], [table(seed=1)])
    child = os.fork()
    if child == 0:
        arm(directory, step)
        write(directory, 0, 2, [model(seed=2)], [table(seed=2)])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(step)
"""


def _assert_usable(directory):
    """The last good one is read, leftovers go, the next can be written; returns which was good."""
    found = checkpoint.latest(directory)
    assert all("partial: it is not complete" in text for text in found.skipped)
    version = found.checkpoint.manifest.version
    (read,), (rows,) = checkpoint.read_part(found.checkpoint.path, 0, 1)
    assert_same(read, model(seed=version))
    assert_same(rows, table(seed=version))
    if version == 1:
        write(directory, 0, 2, [model(seed=2)], [table(seed=2)])
    checkpoint.prune(directory, 1)
    assert os.listdir(directory) == ["g000-v000000002"]
    return version


@pytest.mark.parametrize(("arm", "fewest"), [("kill_before_file_operation", 10), ("kill_after_bytes", 10)])
def test_a_writer_killed_at_any_moment_costs_only_what_it_was_writing(tmp_path, arm, fewest):
    output, errors = python(KILLED, tmp_path, arm).communicate(timeout=100)
    assert errors == ""
    kills = int(output)
    assert kills >= fewest
    versions = [_assert_usable(tmp_path / str(step)) for step in range(kills + 1)]
    assert versions == sorted(versions)
    assert (versions[0], versions[-1]) == (1, 2)


# ── full disks, directories that are not ours ───────────────────────────────────────────────────

WRITES = """
import sys
from checkpoints import model, table, write
from headwater.errors import CheckpointError
def attempt():
    try:
        write(sys.argv[1], 0, 2, [model(shapes={"w": (100_000,)})], [table()])
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_reported_and_costs_nothing_that_was_there(small_disk):
    write(small_disk, 0, 1, [model(seed=1)], [table(seed=1)])
    with pytest.raises(CheckpointError) as caught:
        write(small_disk, 0, 2, [model(shapes={"w": (30_000,)})], [])
    text = str(caught.value)
    assert f"cannot write {small_disk}/g000-v000000002.partial/model-00-net.server-001.safetensors" in text
    assert "No space left on device" in text
    assert "MB are free: free some space or use another directory" in text
    checkpoint.abandon(small_disk, 0, 2)
    assert os.listdir(small_disk) == ["g000-v000000001"]
    assert _assert_usable(small_disk) == 1


def test_a_limit_on_file_sizes_is_reported_as_a_full_disk(tmp_path):
    write(tmp_path, 0, 1, [model(seed=1)], [table(seed=1)])
    limited = (
        "import resource\n" + WRITES + "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\nattempt()"
    )
    output, errors = python(limited, tmp_path).communicate(timeout=60)
    assert "File too large: free some space or use another directory" in output, errors
    assert _assert_usable(tmp_path) == 1


def test_a_directory_that_is_not_writable_is_reported(tmp_path):
    path = tmp_path / "runs"
    path.mkdir(mode=0o555)
    as_nobody = WRITES + "import os\nif os.getuid() == 0: os.setuid(65534)\nattempt()"
    output, errors = python(as_nobody, path).communicate(timeout=60)
    assert f"{path}" in output, errors
    assert "Permission denied: give this user the right to, or use another directory" in output


def test_a_directory_below_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="a part of that path is a file"):
        checkpoint.begin(tmp_path / "file" / "runs", 0, 1)
    write(tmp_path / "runs")
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere/out"):
        checkpoint.export(tmp_path / "runs", tmp_path / "nowhere" / "out")


# ── one cluster at a time ───────────────────────────────────────────────────────────────────────

HOLDS = """
import os, sys
from headwater.checkpoint import DirectoryLock
lock = DirectoryLock(sys.argv[1])
if os.fork() == 0:
    os.close(1)
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_clusters_cannot_use_one_directory(tmp_path):
    with (
        checkpoint.DirectoryLock(tmp_path),
        pytest.raises(ConfigurationError, match="in use by another cluster") as caught,
    ):
        checkpoint.DirectoryLock(tmp_path)
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    lock = checkpoint.DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    with checkpoint.DirectoryLock(tmp_path):
        assert checkpoint.list_checkpoints(tmp_path) == ()


def test_the_lock_of_a_killed_process_is_gone_even_while_a_child_of_it_lives(tmp_path):
    holder = python(HOLDS, tmp_path / "new", stdin=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigurationError, match=f"process {holder.pid} on"):
            checkpoint.DirectoryLock(tmp_path / "new")
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=20)

        def free():  # once the child, which was just forked, has closed what it inherited
            try:
                return checkpoint.DirectoryLock(tmp_path / "new")
            except ConfigurationError:
                return None

        with wait_until(free):
            assert json.loads((tmp_path / "new" / "headwater.lock").read_text())["pid"] == os.getpid()
    finally:
        holder.kill()
        holder.communicate(timeout=20)


def test_a_lock_is_refused_while_its_holder_has_not_signed_yet(tmp_path):
    with checkpoint.DirectoryLock(tmp_path):
        (tmp_path / "headwater.lock").write_text("")
        with pytest.raises(ConfigurationError, match="a process that is just starting"):
            checkpoint.DirectoryLock(tmp_path)


def test_a_directory_that_cannot_be_locked_is_reported(tmp_path):
    (tmp_path / "headwater.lock").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*headwater\.lock: Is a directory"):
        checkpoint.DirectoryLock(tmp_path)
