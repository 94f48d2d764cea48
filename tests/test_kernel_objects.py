"""Stored machine code of kernels: the same functions without numba, or numba where it cannot be used."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater import kernels
from headwater.kernels import cache, fused, objects
from headwater.kernels.rows import row_source

TEXT = """
from headwater.kernels.primitives import outer

@outer(
    "int64(int64[::1], float64, float32[:, ::1], UniTuple(float32[::1], 2), UniTuple(float64, 1), Tuple(()), "
    "boolean)"
)
def everything(whole, number, rows, pair, single, nothing, add):
    if not len(whole):
        raise ValueError("nothing is there")
    for i in range(len(whole)):
        rows[i, 0] = whole[i] * number + pair[0][i] - pair[1][i] + single[0]
    return 7 if add else 8

@outer("boolean(Array(float32, 1, 'C', readonly=True))")
def positive(array):
    return array[0] > 0
"""


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """Loads a module: the first time numba compiles it, after that it is loaded as by another process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def load():
        monkeypatch.setattr(cache, "_loaded", {})
        return cache.load(TEXT)

    return load


def called(module):
    rows, pair = np.zeros((2, 3), np.float32), (np.ones(2, np.float32), np.full(2, 0.25, np.float32))
    given = (np.array([1, 2]), 0.5, rows, pair, (3.0,), (), True)
    return module.everything(*given), rows.tolist(), given


def is_numbas(module):
    return hasattr(module.positive, "overloads")


def test_stored_code_gives_what_numba_gave_and_refuses_what_it_refused(twice):
    compiled, stored = twice(), twice()
    assert is_numbas(compiled)
    assert not is_numbas(stored)
    for module in (compiled, stored):
        result, rows, given = called(module)
        assert (result, rows) == (7, [[4.25, 0, 0], [4.75, 0, 0]])
        fixed = np.ones(1, np.float32)
        fixed.flags.writeable = False
        assert module.positive(fixed) is True
        with pytest.raises(ValueError, match="nothing is there"):
            module.everything(np.zeros(0, np.int64), *given[1:])
        frozen = np.zeros((2, 3), np.float32)
        frozen.flags.writeable = False
        wrong = [
            (0, np.array([1, 2], np.int32)),
            (0, np.arange(4)[::2]),
            (0, [1, 2]),
            (1, "0.5"),
            (2, np.zeros((2, 3))),
            (2, np.zeros(6, np.float32)),
            (2, np.zeros((3, 2), np.float32).T),
            (2, frozen),
            (3, given[3][:1]),
            (3, (given[3][0], np.zeros(2))),
            (3, given[3][0]),
            (4, (1.0, 2.0)),
            (4, ("a",)),
            (5, (1.0,)),
        ]
        for place, bad in wrong:
            with pytest.raises(TypeError):
                module.everything(*given[:place], bad, *given[place + 1 :])
        with pytest.raises(TypeError):
            module.everything(*given[:-1])
    with pytest.raises(TypeError, match=r"positive takes float32\[:\], got float64\[2\]"):
        stored.positive(np.ones(2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, monkeypatch: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda path, monkeypatch: path.write_bytes(b""),
        lambda path, monkeypatch: path.unlink(),
        lambda path, monkeypatch: monkeypatch.setitem(objects._HELPERS, "numba.gone", ("gone", "")),
    ],
    ids=["a byte", "empty", "gone", "another numba"],
)
def test_where_stored_code_cannot_be_used_numba_loads_the_module(twice, tmp_path, monkeypatch, damage):
    twice()
    (path,) = tmp_path.rglob("objects")
    damage(path, monkeypatch)
    objects._helpers.cache_clear()
    module = twice()
    assert is_numbas(module)
    assert called(module)[0] == 7


LATER = """
import sys
import numpy as np
from headwater.kernels import finite
assert finite(np.ones(4, np.float32))
assert "numba" not in sys.modules, "numba was imported"
import numba

@numba.njit
def mean(values):
    return np.sqrt(values * values).sum() / len(values)

assert mean(np.full(8, 3.0)) == 3.0
assert finite(np.ones(4, np.float32))
"""


def test_a_process_that_finds_stored_code_imports_no_numba_and_may_do_so_later():
    from headwater.kernels import finite

    assert finite(np.ones(4, np.float32))  # it is stored now, if it was not
    subprocess.run([sys.executable, "-c", LATER], check=True, timeout=100)


FOLDER = Path(kernels.__file__).parent
LOOPS = {
    **{
        one.name: importlib.import_module(f"headwater.kernels.{one.name}").TEXT
        for one in pkgutil.iter_modules(kernels.__path__)
        if hasattr(importlib.import_module(f"headwater.kernels.{one.name}"), "TEXT")
    },
    **{path.stem: path.read_text() for path in FOLDER.glob("*_loops.py")},
    **{f"rows of {rule.name}": row_source(rule) for rule in (hw.SGD(lr=1.0), hw.RowwiseAdagrad(lr=1.0))},
    "a rule's pass": fused._module_text(hw.Adam()),
}


@pytest.mark.parametrize("loops", LOOPS)
def test_every_module_of_loops_is_linked_without_numba(loops, monkeypatch):
    """Numba, which takes a process half a second to import, is for who compiles."""

    def imported(name, path):
        raise AssertionError(f"{loops} are loaded by numba")

    cache.load(LOOPS[loops])  # compiled by now, by this process or another one
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_imported", imported)
    cache.load(LOOPS[loops])
