"""Models and tables as arrays, written as any number of servers would: for tests of checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import forking
import numpy as np
import pytest

from headwater import checkpoint
from headwater.messages import ModelSpec, ProgramRecord, RuleSpec, TableSpec, TensorSpec
from headwater.shard.snapshot import ModelSnapshot, TableSnapshot
from headwater.spec.layout import Layout
from headwater.spec.placement import slots_of, slots_of_server

LOCAL = Path(__file__).parent
SGD = RuleSpec("SGD", {"lr": 0.1, "momentum": 0.9})
SCHEDULED = RuleSpec("Adam", {"lr": RuleSpec("Cosine", {"start": 0.1, "steps": 1000})})
ADAGRAD = RuleSpec("Adagrad", {"lr": 0.05})
ZEROS = RuleSpec("Zeros", {})
AFTER_10_STEPS = RuleSpec("AfterSteps", {"steps": 10})


def random_bits(rng, count, dtype=np.float32):
    """Any bit pattern, NaNs with payloads too: what is kept is bits."""
    return np.frombuffer(rng.bytes(count * np.dtype(dtype).itemsize), dtype=dtype).copy()


def model(name="net", shapes=None, states=("momentum_buffer",), seed=0, rules=(SGD,), updates=7):
    """A whole model with random bits."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (30, 70), "b": (9,)} if shapes is None else shapes
    spec = ModelSpec(name, tuple(TensorSpec(key, shape, "float32") for key, shape in shapes.items()), (SGD,))
    length = Layout(spec.tensors).elements
    return ModelSnapshot(
        spec=spec,
        rules=rules,
        start=0,
        stop=length,
        values=random_bits(rng, length),
        states={state: random_bits(rng, length) for state in states},
        counts=rng.integers(0, 9, len(shapes)),
        updates=updates,
        program=ProgramRecord(vectors=("direction", "s 0/é"), note=b"\x00 far"),
        vectors=(random_bits(rng, length), random_bits(rng, length)),
    )


def table(name="users", rows=50, dim=3, states=None, expiry=None, pending=20, seed=1, last=None):
    """A whole table with random ids and bits, in slot order."""
    rng = np.random.default_rng(seed)
    ids = in_slot_order(np.unique(random_bits(rng, rows, np.int64)))
    waiting = in_slot_order(np.unique(random_bits(rng, pending, np.int64)))
    rows = len(ids)
    states = {"sum": dim} if states is None else states
    lasts = random_bits(rng, rows, np.int32) if last is None else np.full(rows, last, np.int32)
    return TableSnapshot(
        spec=TableSpec(name, dim, ADAGRAD, ZEROS, 5, RuleSpec("AfterCount", {"count": 2}), expiry),
        rule=ADAGRAD,
        ids=ids,
        counts=random_bits(rng, rows, np.int32),
        last=lasts if expiry else np.empty(0, np.int32),
        values=random_bits(rng, rows * dim).reshape(rows, dim),
        states={key: random_bits(rng, rows * width).reshape(rows, width) for key, width in states.items()},
        pending_ids=waiting,
        pending_counts=random_bits(rng, len(waiting), np.int32),
        updates=11,
    )


def in_slot_order(ids):
    return ids[np.argsort(slots_of(ids), kind="stable")]


def part_of_model(whole, server, servers):
    """The plain reference of a cut."""
    start, stop = Layout(whole.spec.tensors).cut(servers)[server]
    states = {name: state[start:stop] for name, state in whole.states.items()}
    return ModelSnapshot(
        whole.spec,
        whole.rules,
        start,
        stop,
        whole.values[start:stop],
        states,
        whole.counts,
        whole.updates,
        whole.program,
        tuple(array[start:stop] for array in whole.vectors),
    )


def part_of_table(whole, server, servers):
    """The plain reference of a cut."""
    slots = slots_of_server(server, servers)
    here = np.isin(slots_of(whole.ids), slots)
    waiting = np.isin(slots_of(whole.pending_ids), slots)
    return TableSnapshot(
        spec=whole.spec,
        rule=whole.rule,
        ids=whole.ids[here],
        counts=whole.counts[here],
        last=whole.last[here] if whole.spec.expiry else whole.last,
        values=whole.values[here],
        states={name: state[here] for name, state in whole.states.items()},
        pending_ids=whole.pending_ids[waiting],
        pending_counts=whole.pending_counts[waiting],
        updates=whole.updates,
    )


def write(directory, generation=0, version=1, models=None, tables=None, servers=2, **opaque):
    """Write a checkpoint as `servers` servers and a coordinator; returns its manifest."""
    models = [model()] if models is None else models
    tables = [table()] if tables is None else tables
    checkpoint.begin(directory, generation, version)
    parts = [
        checkpoint.write_part(
            directory,
            generation,
            version,
            server,
            servers,
            [part_of_model(whole, server, servers) for whole in models],
            [part_of_table(whole, server, servers) for whole in tables],
        )
        for server in range(servers)
    ]
    opaque = {"members": {}, "splits": {}, **opaque}
    return checkpoint.commit(directory, generation, version, parts, **opaque)


def assert_same(got, expected):
    """Snapshots are equal, arrays to the bit."""
    for name in type(expected).__slots__:
        mine, theirs = getattr(got, name), getattr(expected, name)
        if isinstance(theirs, dict):
            assert list(mine) == list(theirs), name
            pairs = [(mine[key], theirs[key]) for key in theirs]
        elif isinstance(theirs, tuple):
            pairs = list(zip(mine, theirs, strict=True))
        else:
            pairs = [(mine, theirs)]
        for one, other in pairs:
            if isinstance(other, np.ndarray):
                assert (one.dtype, one.shape) == (other.dtype, other.shape), name
                assert one.tobytes() == other.tobytes(), name
            else:
                assert one == other, name


def python(code, *arguments, **options):
    """A Python process that can import this module and this headwater."""
    paths = os.pathsep.join([str(LOCAL.parent), str(LOCAL)])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return forking.spawn(command, env={**os.environ, "PYTHONPATH": paths}, **pipes, **options)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "headwater-test", str(path)]
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    if subprocess.run(mount, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True, timeout=20)
