"""What every test shares: which tests run and on how many processes, and nothing they start may be left."""

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import forking
import psutil
import pytest
from hypothesis import settings
from promises import PromisedTests
from rays import is_rays_own, ray_engine, ray_nodes, rays_descriptors, wait_for_actors
from xdist.scheduler import LoadScopeScheduling

from headwater.engines import process

__all__ = ["ray_engine", "ray_nodes"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Whoever started this in the background has it ignored, and every child of ours would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each of the many interpreters that tests start would compile every module again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

for profile, examples in {"default": 40, "long": 100, "nightly": 1000}.items():
    settings.register_profile(profile, print_blob=True, deadline=None, max_examples=examples)
LONGEST = (
    "test_ray.py",
    "test_simulator.py",
    "test_simulator_planted.py",
    "test_serve_ends.py",
    "test_serve.py",
    "test_log_clipping.py",
    "test_examples.py",
)
"""Files with tests that take long: they begin first, so that no process is alone with them at the end."""

_LONG_TIMEOUT_S = 1800
"""Of a test with `--long`, in seconds: it takes more schedules and examples."""

_ENDING_S = 5.0
"""How long what has been told to end may take to be gone, as a thread that nobody joins."""


# ── which tests run, and where ──────────────────────────────────────────────────────────────────


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="run the tests marked long too, and others for longer"
    )
    parser.addoption(
        "--seed-base",
        type=int,
        default=0,
        metavar="N",
        help="first seed of simulated schedules, such as a date; also gives hypothesis more examples",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes long; runs with --long only")
    config.addinivalue_line(
        "markers", "fresh: nodes are fresh interpreters, as for a user, and none is forked"
    )
    usual = "long" if config.getoption("--long") else "default"
    settings.load_profile("nightly" if config.getoption("--seed-base") else usual)
    if config.getoption("--long") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(PromisedTests(whole=_is_whole(config)))


def pytest_sessionstart(session):
    """Each process first imports its share of the files, so that in a fresh checkout one compiles each."""
    if (worker := getattr(session.config, "workerinput", None)) and _is_whole(session.config):
        first = int(worker["workerid"].removeprefix("gw"))
        for path in sorted(Path(__file__).parent.glob("test_*.py"))[first :: worker["workercount"]]:
            with contextlib.suppress(Exception, pytest.skip.Exception):  # told when it is collected
                importlib.import_module(path.stem)


def pytest_xdist_auto_num_workers(config):
    """Two processes more than cores, as tests often wait; none for single files, which start sooner alone."""
    return len(os.sched_getaffinity(0)) + 2 if _is_whole(config) else 0


class OneRay(LoadScopeScheduling):
    """Each test goes to the next free process, but all that need Ray to one, so that Ray starts once.

    By names, since the marker `xdist_group` of pytest-xdist 3.8 has no effect with pytest 9.2.
    """

    def _split_scope(self, nodeid):
        return "ray" if "test_ray.py" in nodeid or "[ray" in nodeid else nodeid


def pytest_xdist_make_scheduler(config, log):
    return OneRay(config, log)


def _is_whole(config):
    """Whether the whole suite runs, and not the files, tests or words that somebody named."""
    return config.args_source is not config.ArgsSource.ARGS and not config.option.keyword


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        for item in items:
            item.add_marker(pytest.mark.timeout(_LONG_TIMEOUT_S), append=False)
        return
    for_long = [item for item in items if item.get_closest_marker("long") is not None]
    if for_long:
        config.hook.pytest_deselected(items=for_long)
        items[:] = [item for item in items if item.get_closest_marker("long") is None]
    if _is_whole(config):
        items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish(session):
    """What was imported stays, so it need not be looked through whenever a test looks for garbage."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """Quiet runs print no header, and who wants this order again needs the seed."""
    if not terminalreporter.no_header and terminalreporter.verbosity >= 0:
        return
    terminalreporter.line(f"Using --randomly-seed={config.getoption('randomly_seed', None)}")


@pytest.fixture
def long(request):
    """Whether tests that run for a while should run for longer."""
    return request.config.getoption("--long")


@pytest.fixture
def seed_base(request):
    """The first seed of random schedules: the same in every run, another one every night."""
    return request.config.getoption("--seed-base")


@pytest.fixture(autouse=True)
def nodes_are_forked(request, monkeypatch):
    """Processes of nodes are forked from a warm interpreter; with `--long` they are fresh, as for a user."""
    if not request.config.getoption("--long") and request.node.get_closest_marker("fresh") is None:
        monkeypatch.setattr(process, "subprocess", forking.Subprocess())
        monkeypatch.setattr(forking, "spawn", forking.Popen)


# ── nothing is left ─────────────────────────────────────────────────────────────────────────────


def _direct(pid):
    """Ids of the children of a process."""
    found = []
    with contextlib.suppress(OSError):  # the process has ended meanwhile
        for thread in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has
                found += [int(child) for child in thread.read_text().split()]
    return found


def _children(pid):
    """Ids of all processes that descend from this one."""
    return [below for child in _direct(pid) for below in (child, *_children(child))]


def _started():
    """Ids of all processes that tests have started: not the warm interpreter, nor who waits for its own."""
    if not (warm := forking.warm()[:1]):
        return _children(os.getpid())
    forked = [below for keeper in _direct(*warm) for below in _children(keeper)]
    return [
        pid for child in _direct(os.getpid()) if child not in warm for pid in (child, *_children(child))
    ] + forked


def _describe(pid):
    """A process that is ours, or None."""
    try:
        process = psutil.Process(pid)
        return None if is_rays_own(process) else str(process)
    except psutil.NoSuchProcess:
        return None


def _left():
    descriptors, rays = [], rays_descriptors()
    foreign = rays | {str(number) for number in forking.warm()[1:]}
    for name in sorted(set(os.listdir("/proc/self/fd")) - foreign - rays_descriptors()):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:", "pipe:")):
            descriptors.append(f"{name} {target}")
    return {
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("headwater")],
        "processes": [told for pid in _started() if (told := _describe(pid))],
        "descriptors": sorted(descriptors),
    }


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = _left()
    yield

    def left():
        after = _left()
        return {
            kind: more for kind in after if (more := [one for one in after[kind] if one not in before[kind]])
        }

    if left():
        gc.collect()
        wait_for_actors()
    until = time.monotonic() + _ENDING_S
    while (found := left()) and time.monotonic() < until:
        threading.Event().wait(0.02)
    assert not found, f"the test left {found}"
