"""Windows: both sides see one memory, a renewed window is another, and nothing is left behind."""

import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from headwater.errors import EnvironmentFailure, ProtocolError
from headwater.machines.row_buffer import RowBuffer
from headwater.wire.scratch import Scratch, ScratchView
from headwater.wire.shared_memory import filled_file, windows_possible
from headwater.wire.window import Window, WindowView

pytestmark = pytest.mark.skipif(not windows_possible(), reason="no memfd on this system")

ELEMENTS = 4096


def mapped():
    """Return the mappings of this process that are windows."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "memfd:headwater-window" in line]


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def resident():
    """Return the bytes of this process that are in memory and mapped."""
    with open("/proc/self/statm") as pages:
        return mmap.PAGESIZE * int(pages.read().split()[1])


@pytest.fixture
def window():
    window = Window(ELEMENTS)
    yield window
    window.release()


def view_of(window, start=0, stop=ELEMENTS):
    return WindowView(os.dup(window.descriptor), size=window.size, elements=ELEMENTS, start=start, stop=stop)


def sealed_file(size, seals=fcntl.F_SEAL_SHRINK):
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_a_new_window_is_zero_and_writable(window):
    assert window.size == 2 * ELEMENTS * 4
    assert window.generation == 0
    for half in (window.gradients, window.parameters):
        assert half.dtype == np.float32
        assert half.shape == (ELEMENTS,)
        assert half.flags.writeable
        assert half.ctypes.data % 4096 == 0
        assert not half.any()


def test_each_side_sees_what_the_other_writes_in_its_range(window):
    view = view_of(window, 1024, 3072)
    assert view.gradients.shape == view.parameters.shape == (2048,)
    window.gradients[:] = np.arange(ELEMENTS)
    assert np.array_equal(view.gradients, np.arange(1024, 3072))
    assert not view.parameters.any()
    view.parameters[:] = 7
    assert window.parameters.sum() == 7 * 2048
    assert window.parameters[1023] == 0 == window.parameters[3072]
    assert window.parameters[1024] == 7 == window.parameters[3071]


def test_renew_keeps_content_and_addresses_and_leaves_old_views_behind(window):
    torch = pytest.importorskip("torch")
    gradients, parameters = window.gradients, window.parameters
    tensor = torch.from_numpy(parameters)
    gradients[:] = 1
    parameters[:] = np.arange(ELEMENTS)
    old = view_of(window)
    addresses = gradients.ctypes.data, parameters.ctypes.data
    window.renew()
    assert window.generation == 1
    assert window.gradients is gradients
    assert (window.gradients.ctypes.data, window.parameters.ctypes.data) == addresses
    assert np.array_equal(parameters, np.arange(ELEMENTS))
    assert gradients.sum() == ELEMENTS
    new = view_of(window)
    tensor += 1
    old.parameters[:] = -1
    assert np.array_equal(new.parameters, np.arange(1, ELEMENTS + 1))
    assert np.array_equal(parameters, np.arange(1, ELEMENTS + 1))
    new.gradients[5] = 3
    assert gradients[5] == 3
    assert old.gradients[5] == 1


def test_renewing_often_leaks_nothing(window):
    window.gradients[:] = 2
    count = len(mapped()), len(descriptors())
    for _ in range(20):
        window.renew()
    assert (len(mapped()), len(descriptors())) == count
    assert window.generation == 20
    assert window.gradients.sum() == 2 * ELEMENTS


def test_arrays_and_tensors_outlive_the_window():
    torch = pytest.importorskip("torch")
    gc.collect()
    before = len(mapped())
    window = Window(ELEMENTS)
    kept = torch.from_numpy(window.parameters)[10:20]
    window.release()
    window.release()
    assert window.descriptor == -1
    del window
    gc.collect()
    assert len(mapped()) == before + 1
    kept += 4
    assert kept.sum() == 40
    del kept
    gc.collect()
    assert len(mapped()) == before


def test_a_window_that_is_dropped_gives_everything_back():
    gc.collect()
    before = descriptors(), len(mapped())
    Window(ELEMENTS)
    gc.collect()
    assert (descriptors(), len(mapped())) == before


def test_views_that_are_dropped_or_refused_leave_no_mapping(window):
    gc.collect()
    before = len(mapped())
    view = view_of(window, 0, 1024)
    assert len(mapped()) == before + 2
    del view
    with pytest.raises(ProtocolError):
        view_of(window, 0, 1000)
    gc.collect()
    assert len(mapped()) == before


def test_a_view_outlives_the_window_and_its_other_half():
    window = Window(ELEMENTS)
    gradients = view_of(window, 0, 1024).gradients
    window.gradients[:] = 5
    window.release()
    del window
    gc.collect()
    assert gradients.sum() == 5 * 1024


@pytest.mark.parametrize("start", [0, 2048, ELEMENTS])
def test_an_empty_range_is_a_view_of_nothing(window, start):
    view = view_of(window, start, start)
    assert view.gradients.shape == view.parameters.shape == (0,)


def test_a_window_of_nothing_works():
    window = Window(0)
    view = WindowView(os.dup(window.descriptor), size=0, elements=0, start=0, stop=0)
    assert window.size == 0
    assert window.gradients.size == window.parameters.size == view.gradients.size == 0
    window.renew()
    assert window.generation == 1
    window.release()


@pytest.mark.parametrize(
    ("start", "stop", "reason"),
    [
        (-1024, 0, "outside"),
        (0, ELEMENTS + 1024, "outside"),
        (2048, 1024, "outside"),
        (512, 1024, "multiples of 1024"),
        (0, 1000, "multiples of 1024"),
    ],
)
def test_a_range_outside_or_unaligned_is_refused(window, start, stop, reason):
    with pytest.raises(ProtocolError, match=reason):
        view_of(window, start, stop)


def test_a_size_that_does_not_fit_the_model_is_refused(window):
    for size in (0, window.size - 4096, window.size + 4096, 2**63):
        with pytest.raises(ProtocolError, match="expected"):
            WindowView(os.dup(window.descriptor), size=size, elements=ELEMENTS, start=0, stop=1024)


def test_a_file_smaller_than_announced_is_refused(window):
    with pytest.raises(ProtocolError, match="the file has"):
        WindowView(os.dup(window.descriptor), size=2 * window.size, elements=2 * ELEMENTS, start=0, stop=1024)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE])
def test_a_file_that_may_shrink_or_may_not_be_written_is_refused(seals):
    with pytest.raises(ProtocolError, match="sealed against shrinking"):
        WindowView(
            sealed_file(8 * ELEMENTS, seals), size=8 * ELEMENTS, elements=ELEMENTS, start=0, stop=ELEMENTS
        )


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * ELEMENTS))
    reading, writing = os.pipe()
    os.close(writing)
    for descriptor in (os.open(path, os.O_RDWR), reading, os.open("/dev/null", os.O_RDWR)):
        with pytest.raises(ProtocolError, match="must be"):
            WindowView(descriptor, size=8 * ELEMENTS, elements=ELEMENTS, start=0, stop=ELEMENTS)


def test_a_window_can_neither_shrink_nor_grow(window):
    for size in (0, window.size - 4096, window.size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(window.descriptor, size)


def test_a_window_is_in_memory_from_the_start():
    window = Window(1 << 20)
    assert os.fstat(window.descriptor).st_blocks * 512 == window.size
    before = resident()
    window.parameters[:] = 1
    window.gradients[:] = 1
    assert resident() - before < window.size / 4
    window.release()


def test_a_forked_child_closes_the_descriptor_and_keeps_the_memory():
    program = """
import os
from headwater.wire.window import Window
window = Window(1024)
window.gradients[:] = 3
held = window.descriptor
child = os.fork()
if child == 0:
    try:
        os.fstat(held)
    except OSError:
        os._exit(int(window.gradients[0]))
    os._exit(99)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.fstat(held).st_size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["3", "8192"], done.stderr


def users_of(inode):
    """Return the processes that have the window with this inode mapped."""
    users = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/maps") as maps:
                if any("memfd:headwater-window" in line and line.split()[4] == inode for line in maps):
                    users.add(int(process))
        except OSError:
            continue  # it has ended, or is another user's
    return users


def test_nothing_stays_after_kill_9():
    program = """
import os, sys
from headwater.wire.shared_memory import windows_possible
from headwater.wire.window import Window, WindowView
window = Window(1 << 20)
view = WindowView(os.dup(window.descriptor), size=window.size, elements=1 << 20, start=0, stop=1 << 20)
window.renew()
print(os.fstat(window.descriptor).st_ino, flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        inode = process.stdout.readline().strip()
        assert users_of(inode) == {process.pid}
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    # A file without a name is gone with its last user.
    assert users_of(inode) == set()
    assert not any("headwater" in name for name in os.listdir("/dev/shm"))


def test_offsets_work_on_systems_with_larger_pages(window, monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 14)
    window.gradients[1024:] = 3
    window.parameters[1024] = 9
    view = view_of(window, 1024, 2048)
    assert view.gradients.sum() == 3 * 1024
    assert view.parameters[0] == 9
    assert view.parameters[1:].sum() == 0


def test_a_system_without_such_files_says_so(monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert not windows_possible.__wrapped__()
    with pytest.raises(EnvironmentFailure, match=r"cannot make a window of 32768 bytes: .*not implemented"):
        Window(ELEMENTS)
    monkeypatch.delattr(os, "memfd_create")
    assert not windows_possible.__wrapped__()


def test_a_window_that_cannot_be_filled_is_refused_and_closed(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    before = descriptors()
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(EnvironmentFailure, match="No space left"):
        Window(ELEMENTS)
    assert descriptors() == before


def test_a_renewal_that_fails_changes_nothing(window, monkeypatch):
    window.parameters[:] = 3
    before = window.descriptor, descriptors()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(EnvironmentFailure, match="No space left"):
        window.renew()
    assert (window.descriptor, descriptors()) == before
    assert window.generation == 0
    assert view_of(window).parameters.sum() == 3 * ELEMENTS


def test_a_server_is_given_memory_for_rows_once_a_connection_and_again_when_it_is_another():
    buffer = RowBuffer(SimpleNamespace(connections=SimpleNamespace(buffers=[])), Scratch(shared=True))
    assert buffer.offer(0, True, anew=True) is None, "there is none yet"
    buffer._scratch.take(8)
    first = buffer.offer(0, True, anew=False)
    assert buffer.offer(0, True, anew=False) is None
    assert buffer.offer(0, True, anew=True) == first, "whoever is there now knows nothing"
    assert buffer.offer(1, False, anew=True) is None, "memory does not travel there"
    before = os.fstat(first.descriptors[0]).st_ino
    buffer.renew()
    assert os.fstat(buffer.offer(0, True, anew=False).descriptors[0]).st_ino != before
    buffer.release()


@pytest.mark.parametrize(("offset", "size"), [(0, 65), (64, 4), (60, 8), (-4, 4), (2, 4), (0, -4)])
def test_no_part_of_memory_for_rows_reaches_outside_of_it(offset, size):
    view = ScratchView(filled_file(64), 64)
    assert len(view.part(0, 64)) == 64
    with pytest.raises(ProtocolError, match="of a scratch window of 64"):
        view.part(offset, size)
