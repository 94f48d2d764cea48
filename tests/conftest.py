"""What every test shares: nothing it starts may be left when it ends."""

import gc
import os
import threading

import psutil
import pytest


def _left() -> dict[str, list[str]]:
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:", "pipe:")):
            descriptors.append(f"{name} {target}")
    return {
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("headwater")],
        "processes": [str(child) for child in psutil.Process().children(recursive=True)],
        "descriptors": sorted(descriptors),
    }


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = _left()
    yield
    after = _left()
    if after != before:
        gc.collect()
        after = _left()
    left = {kind: [one for one in after[kind] if one not in before[kind]] for kind in after}
    assert not any(left.values()), f"the test left {left}"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="tests that run for a while run for longer")


@pytest.fixture
def long(request):
    """Whether tests that run for a while should run for longer."""
    return request.config.getoption("--long")
