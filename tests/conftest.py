"""What every test shares: nothing it starts may be left when it ends."""

import gc
import os
import signal
import threading

import psutil
import pytest
from rays import is_rays_own, ray_engine, ray_nodes, rays_descriptors, wait_for_actors

__all__ = ["ray_engine", "ray_nodes"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Whoever started this in the background has it ignored, and every child of ours would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _left() -> dict[str, list[str]]:
    descriptors, rays = [], rays_descriptors()
    for name in sorted(set(os.listdir("/proc/self/fd")) - rays - rays_descriptors()):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:", "pipe:")):
            descriptors.append(f"{name} {target}")
    return {
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("headwater")],
        "processes": [str(one) for one in psutil.Process().children(recursive=True) if not is_rays_own(one)],
        "descriptors": sorted(descriptors),
    }


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = _left()
    yield
    after = _left()
    if after != before:
        gc.collect()
        wait_for_actors()
        after = _left()
    left = {kind: [one for one in after[kind] if one not in before[kind]] for kind in after}
    assert not any(left.values()), f"the test left {left}"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="tests that run for a while run for longer")


@pytest.fixture
def long(request):
    """Whether tests that run for a while should run for longer."""
    return request.config.getoption("--long")
