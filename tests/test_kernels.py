"""Dense kernels against their plain reference, the source they are made from, and their cache."""

import fcntl
import json
import logging
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import plain_kernels as reference
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from examples import examples
from headwater.errors import ConfigurationError, EnvironmentFailure
from headwater.kernels import add_up, cache, copy_out, dense, finite, finite_sum, stage
from headwater.kernels.source import float32_source
from headwater.spec.rules import (
    SGD,
    Accumulate,
    Adagrad,
    Adam,
    AdamW,
    Assign,
    Ftrl,
    Lamb,
    Lion,
    RMSprop,
    Rule,
    Yogi,
)

LIMIT = 4.0
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3e38, 1e-20],
    np.float32,
)


def clipped_step(value, gradient, average, rate):
    """With all that a rule may use: a helper, a number of the module, if, abs, sqrt and a comparison."""
    if abs(gradient) > LIMIT:
        gradient = LIMIT * sign(gradient)
    average = 0.75 * average + 0.25 * gradient
    return value - rate * average / (1 + math.sqrt(abs(average))), average


def sign(x):
    return -1.0 if x < 0 else 1.0


@dataclass(frozen=True)
class Clipped(Rule):
    rate: float = 0.5

    def states(self):
        return {"average": 1.0}

    def function(self):
        return clipped_step

    def scalars(self, updates, count):
        return (self.rate / count,)


RULES = [
    SGD(0.1, weight_decay=0.1),
    SGD(0.1, momentum=0.9, nesterov=True),
    Adagrad(),
    RMSprop(),
    RMSprop(momentum=0.5),
    RMSprop(centered=True),
    RMSprop(centered=True, momentum=0.5),
    Adam(),
    AdamW(amsgrad=True),
    Ftrl(lr=0.1, l1=0.5, l2=0.1),
    Yogi(weight_decay=0.1),
    Lamb(0.1, weight_decay=0.1),
    Lion(0.1, weight_decay=0.1),
    Accumulate(),
    Assign(),
    Clipped(),
]


def addresses(arrays):
    return np.array([array.ctypes.data for array in arrays], np.int64)


def same_bits(ours, theirs):
    """Equal to the sign of zero; any NaN equals any other."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return bool(np.all((a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))))


def numbers(generator, n, special):
    """float32[n] of many magnitudes, a share of them special, at an address of any alignment."""
    values = generator.standard_normal(n) * 10.0 ** generator.integers(-6, 7, n)
    chosen = np.where(generator.random(n) < special, generator.choice(SPECIAL, n), values)
    offset = int(generator.integers(0, 16))
    room = np.empty(n + 16, np.float32)
    room[offset : offset + n] = chosen
    return room[offset : offset + n]


def aligned(n):
    """float32[n] at an address that is a multiple of 64."""
    room = np.zeros(n + 16, np.float32)
    offset = -room.ctypes.data // 4 % 16
    return room[offset : offset + n]


# ── the fused pass ──────────────────────────────────────────────────────────────────────────────


@examples(150)
@given(
    rule=st.sampled_from(RULES),
    n=st.sampled_from([0, 1, 2, 15, 16, 17, 31, 127, 128, 129, 255, 300]),
    w=st.integers(1, 7),
    k=st.integers(0, 7),
    divisor=st.sampled_from([1.0, 2.0, 3.0, 7.0]),
    count=st.integers(1, 3),
    special=st.sampled_from([0.0, 0.2]),
    aliased=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(RULES[0], 129, 3, 2, 3.0, 1, 0.2, True, 0)
def test_the_fused_pass_gives_the_bits_of_the_plain_one(
    rule, n, w, k, divisor, count, special, aliased, seed
):
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, n, special) for _ in range(w)]
    values = numbers(generator, n, special)
    states = tuple(np.abs(numbers(generator, n, special)) for _ in rule.states())
    scalars = rule.scalars(5, count)
    answers = [gradients[i] if aliased and i < w else numbers(generator, n, 0) for i in range(k)]
    expected = [values.copy(), *(state.copy() for state in states)]
    written = [np.zeros(n, np.float32) for _ in range(k)]
    reference.update(rule, gradients, divisor, expected[0], expected[1:], scalars, written)
    dense(rule)(addresses(gradients), divisor, values, states, scalars, addresses(answers))
    for ours, theirs in zip((values, *states, *answers), (*expected, *written), strict=True):
        assert same_bits(ours, theirs)


@examples(20)
@given(
    st.sampled_from(RULES), st.integers(0, 700), st.integers(0, 700), st.integers(1, 3), st.integers(0, 99)
)
def test_the_result_does_not_depend_on_how_a_range_is_cut(rule, first, second, w, seed):
    n = 700
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, n, 0.1) for _ in range(w)]
    start = [np.abs(numbers(generator, n, 0.1)) for _ in range(1 + len(rule.states()))]
    whole, pieces = [part.copy() for part in start], [part.copy() for part in start]
    answer = np.zeros(n, np.float32)
    run, scalars = dense(rule), rule.scalars(0, 2)
    run(addresses(gradients), 3.0, whole[0], tuple(whole[1:]), scalars, addresses([]))
    for low, high in zip([0, *sorted([first, second])], [*sorted([first, second]), n], strict=True):
        here = [part[low:high] for part in pieces]
        places = addresses(gradients) + 4 * low, addresses([answer]) + 4 * low
        run(places[0], 3.0, here[0], tuple(here[1:]), scalars, places[1])
    assert all(same_bits(a, b) for a, b in zip(whole, pieces, strict=True))
    assert same_bits(answer, whole[0])


def test_answers_past_the_cache_are_the_same_as_through_it():
    n = (1 << 20) + 77
    gradients = [np.full(n, number, np.float32) for number in (1, 2, 3)]
    values = np.arange(n, dtype=np.float32)
    answers = [aligned(n), aligned(n + 1)[1:], gradients[1]]
    dense(SGD(0.5))(addresses(gradients), 3.0, values, (), (0.5, 0.0), addresses(answers))
    assert np.array_equal(values, np.arange(n, dtype=np.float32) - 1)
    copies = [aligned(n), aligned(n + 1)[1:]]
    copy_out(values, addresses(copies))
    for written in (*answers, *copies):
        assert np.array_equal(written, values)


def test_gradients_are_summed_in_the_order_given():
    gradients = [np.full(3, number, np.float32) for number in (1e8, 1.0, -1e8, 1.0)]
    values = np.zeros(3, np.float32)
    for order, total in (((0, 1, 2, 3), 1.0), ((0, 2, 1, 3), 2.0)):
        dense(Assign())(addresses([gradients[i] for i in order]), 1.0, values, (), (), addresses([]))
        assert values.tolist() == [total] * 3


@examples(60)
@given(st.integers(0, 700), st.integers(1, 5), st.sampled_from([0.0, 0.005, 0.3]), st.integers(0, 2**32))
def test_a_sum_made_beforehand_gives_the_bits_of_the_fused_pass(n, workers, special, seed):
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, n, special) for _ in range(workers)]
    total, expected = numbers(generator, n, 0.1), numbers(generator, n, 0.1)
    add_up(addresses(gradients), total)
    reference.add_up(gradients, expected)
    assert same_bits(total, expected)
    values = numbers(generator, n, 0.0)
    fused, apart = values.copy(), values.copy()
    for by, result in ((gradients, fused), ([total], apart)):
        dense(SGD(0.5))(addresses(by), 3.0, result, (), (0.5, 0.0), addresses([]))
    assert same_bits(fused, apart)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_sums_past_the_cache_are_the_same_as_through_it(workers, offset):
    """From 2**20 elements on results go past the cache, where the address allows it."""
    n = (1 << 20) + 3
    generator = np.random.default_rng(workers)
    gradients = [generator.standard_normal(n, dtype=np.float32) for _ in range(workers)]
    total, expected = aligned(n + offset)[offset:], np.empty(n, np.float32)
    add_up(addresses(gradients), total)
    reference.add_up(gradients, expected)
    assert same_bits(total, expected)
    assert stage(gradients[0], total, False)
    assert same_bits(total, gradients[0])


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one gradient"):
        add_up(addresses([]), np.ones(3, np.float32))


def test_one_compilation_serves_all_settings_that_share_a_function():
    assert dense(Adam(0.1)) is dense(AdamW(0.2, betas=(0.5, 0.5)))
    assert dense(Adam(0.1)) is not dense(Adam(0.1, amsgrad=True))


def test_arrays_that_do_not_fit_are_refused_and_nothing_changes():
    run, ones, none = dense(Adagrad()), np.ones(9, np.float32), addresses([])
    one, scalars = addresses([np.ones(9, np.float32)]), Adagrad().scalars(0, 1)
    with pytest.raises(ValueError, match="at least one gradient"):
        run(none, 1.0, ones, (ones.copy(),), scalars, none)
    with pytest.raises(ValueError, match="differ in length"):
        run(one, 1.0, ones, (np.ones(8, np.float32),), scalars, none)
    for values, states in (
        (ones.astype(np.float64), (ones.copy(),)),
        (np.ones(18, np.float32)[::2], (ones.copy(),)),
        (ones, ()),
        (ones, (ones.astype(np.float64),)),
    ):
        with pytest.raises(TypeError):
            run(one, 1.0, values, states, scalars, none)
    assert ones.tolist() == [1.0] * 9


def test_kernels_release_the_interpreter():
    """Another thread runs during a call, though no thread gives the interpreter up by itself."""
    vector, place = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    one, none = np.array([place.ctypes.data], np.int64), np.zeros(0, np.int64)
    calls = [
        lambda: moves_module().copy_out(vector, one),
        lambda: moves_module().total(one, vector),
        lambda: moves_module().stage(vector, place, False),
        lambda: moves_module().finite(vector),
        lambda: moves_module().finite_sum(vector, place),
        lambda: dense(Assign())(one, 1.0, vector, (), (), none),
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        for call in calls:
            call()
            gate, ran = threading.Lock(), []
            gate.acquire()
            thread = threading.Thread(target=lambda gate=gate, ran=ran: (gate.acquire(), ran.append(True)))
            thread.start()
            gate.release()
            for _ in range(100_000):
                call()
                if ran:
                    break
            assert ran
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def moves_module():
    from headwater.kernels import moves

    return moves.compiled()


# ── copies ──────────────────────────────────────────────────────────────────────────────────────


@examples(60)
@given(
    st.integers(0, 300),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.005, 0.3]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_copies_give_the_bits_of_the_plain_ones(n, k, special, add, seed):
    generator = np.random.default_rng(seed)
    source, destination = numbers(generator, n, special), numbers(generator, n, 0.1)
    source.flags.writeable = False
    expected = destination.copy()
    all_finite = reference.stage(source, expected, add)
    assert finite(source) is reference.finite(source)
    assert finite(expected) is all_finite
    assert not add or finite_sum(source, destination) is all_finite
    assert stage(source, destination, add) is all_finite
    assert same_bits(destination, expected)
    answers = [numbers(generator, n, 0.1) for _ in range(k)]
    copy_out(source, addresses(answers))
    assert all(same_bits(answer, source) for answer in answers)


@pytest.mark.parametrize("place", [0, 1, 499, 998, 999])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(place, bad):
    source, destination = np.full(1000, 3e38, np.float32), np.zeros(1000, np.float32)
    assert finite(source)
    source[place] = bad
    assert not finite(source)
    assert not stage(source, destination, False)
    assert not stage(source, destination, True)


@pytest.mark.parametrize("length", [(1 << 16) - 1, 1 << 16, (1 << 16) + 129])
@pytest.mark.parametrize("offset", [0, 1])
def test_large_arrays_are_staged_whole_and_what_is_not_finite_is_found_in_them(length, offset):
    """From 65,536 elements on they bypass the cache, where the destination is a multiple of 64 bytes."""
    source = numbers(np.random.default_rng(length), length, 0.0)
    memory = np.zeros(length + 32, np.float32)
    begin = -memory.ctypes.data // 4 % 16 + offset
    destination = memory[begin : begin + length]
    assert stage(source, destination, False)
    assert same_bits(destination, source)
    assert not memory[:begin].any()
    assert not memory[begin + length :].any()
    for place in (0, length // 2, length - 1):
        kept, source[place] = source[place], np.nan
        assert not stage(source, destination, False)
        source[place] = kept


@pytest.mark.parametrize("place", [0, 1, 499, 998, 999])
def test_a_sum_that_overflows_is_found_anywhere(place):
    source, destination = np.full(1000, 2e38, np.float32), np.zeros(1000, np.float32)
    assert finite_sum(source, destination)
    destination[place] = 2e38
    assert finite(destination)
    assert not finite_sum(source, destination)
    assert not stage(source, destination, True)


def test_copies_between_different_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        stage(np.ones(3, np.float32), np.ones(4, np.float32), False)
    with pytest.raises(ValueError, match="differ in length"):
        finite_sum(np.ones(3, np.float32), np.ones(4, np.float32))


# ── the source of a rule ────────────────────────────────────────────────────────────────────────


def decorated(function):
    return function


captured = 1.0


def text(value, gradient):
    return "value"


def power(value, gradient):
    return value - gradient**2


def exponential(value, gradient):
    return value - math.exp(gradient)


def other_modules(value, gradient):
    return value - np.sqrt(gradient)


def unknown(value, gradient):
    return value - gradient * no_such_name  # noqa: F821


def array_of_module(value, gradient):
    return value - gradient * SPECIAL


def looped(value, gradient):
    for _ in range(3):
        value -= gradient
    return value


def with_default(value, gradient=1.0):
    return value - gradient


def keyword_call(value, gradient):
    return value - sign(x=gradient)


def endless(value, gradient):
    return endless(value, gradient)


def one_way(value, gradient):
    return other_way(value, gradient)


def other_way(value, gradient):
    return one_way(value, gradient)


def too_many(value, gradient, momentum):
    return value - gradient, momentum


def infinite(value, gradient):
    return value - 1e999 * gradient


def float32_named(value, float32):
    return value - float32


def effect(value, gradient):
    print(value)
    return value


@decorated
def with_decorator(value, gradient):
    return value


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (text, "only finite numbers"),
        (power, r"line 2: 'gradient \*\* 2' cannot be in a rule: Pow is not among \+ - \* /, math.sqrt"),
        (exponential, "math.exp is neither math.sqrt, abs nor a function of test_kernels"),
        (other_modules, "np.sqrt is neither"),
        (unknown, "'no_such_name' cannot be in a rule: neither a parameter"),
        (array_of_module, "'SPECIAL' cannot be"),
        (looped, "For is not among"),
        (with_default, "only plain parameters"),
        (keyword_call, "keyword is not among"),
        (endless, "endless calls itself"),
        (one_way, "one_way calls itself"),
        (too_many, "takes 3 arguments, its rule passes 2: value, gradient, 0 states, 0 scalars"),
        (infinite, "only finite numbers"),
        (float32_named, "no variable of a rule may be called float32"),
        (effect, "a statement without effect"),
        (with_decorator, "without decorators"),
        (lambda value, gradient: value, "plain function of a module"),
        (math.sqrt, "plain function of a module"),
    ],
)
def test_what_a_rule_may_not_say_is_refused_with_the_reason(function, reason):
    with pytest.raises(ConfigurationError, match=reason):
        float32_source(function, 0, 0)


def test_a_function_that_returns_too_little_for_its_states_is_refused():
    with pytest.raises(ConfigurationError, match=r"sign takes 1 .* passes 4"):
        float32_source(sign, 1, 1)
    with pytest.raises(ConfigurationError, match=r"returns 2 values .* needs 3: the value, then 2 states"):
        float32_source(clipped_step, 2, 0)


def test_names_of_generated_code_may_be_names_of_rules():
    @dataclass(frozen=True)
    class Named(Rule):
        def function(self):
            return update

    values, gradient = np.full(3, 5, np.float32), np.ones(3, np.float32)
    dense(Named())(addresses([gradient]), 1.0, values, (), (), addresses([]))
    assert values.tolist() == [3.0] * 3


def update(value, gradient):
    return value - load(gradient)


def load(x):
    return x + x


# ── the cache ───────────────────────────────────────────────────────────────────────────────────

HALVE = """
from dataclasses import dataclass
from headwater.spec.rules import Rule, register

def halve(value, gradient):
    return FACTOR * value

@register
@dataclass(frozen=True)
class Halve(Rule):
    def function(self):
        return halve
"""

USE = """
import json, sys, numpy as np
from headwater.kernels import dense
from my_rule import Halve
run, values = dense(Halve()), np.ones(2, np.float32)
print("ready", flush=True)
run(np.array([values.ctypes.data]), 1.0, values, (), (), np.array([], np.int64))
print(json.dumps([int("numba" in sys.modules), values.tolist()]))
"""


def start(folder):
    paths = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, "-c", USE], env=environment, stdout=subprocess.PIPE, text=True)


def result(process):
    """(compilations, values) of a process of `start`."""
    with process:
        return json.loads(process.communicate(timeout=100)[0].splitlines()[-1])


def compiled_files(folder):
    return sorted(
        (str(path), path.stat().st_mtime_ns)
        for path in (folder / "cache").rglob("*")
        if path.suffix != ".pyc"
    )


@pytest.mark.long
def test_of_several_processes_one_compiles_and_an_edited_rule_is_compiled_again(tmp_path):
    rule = tmp_path / "my_rule.py"
    rule.write_text("FACTOR = 0.5\n" + HALVE)
    at_once = [result(process) for process in [start(tmp_path), start(tmp_path)]]
    assert sorted(at_once) == [[0, [0.5, 0.5]], [1, [0.5, 0.5]]]
    before = compiled_files(tmp_path)
    assert result(start(tmp_path)) == [0, [0.5, 0.5]]
    assert compiled_files(tmp_path) == before
    rule.write_text("FACTOR = 0.25\n" + HALVE)
    assert result(start(tmp_path)) == [1, [0.25, 0.25]]


TRIVIAL = "number = 7\n"

UNCOMPILABLE = """
from headwater.kernels.primitives import outer

@outer("int64()")
def f():
    return no_such
"""


def test_a_module_comes_from_a_private_directory_and_is_written_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", {})
    assert cache.load(TRIVIAL).number == 7
    folder = tmp_path / "headwater" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    (written,) = folder.rglob("*.py")
    written.write_text("numb")
    monkeypatch.setattr(cache, "_loaded", {})
    assert cache.load(TRIVIAL).number == 7
    assert written.read_text() == TRIVIAL


def test_a_directory_that_others_may_enter_or_own_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "headwater" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    with pytest.raises(ConfigurationError, match="must be a directory of this user with mode 700"):
        cache.load(TRIVIAL)
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="must be a directory of this user with mode 700"):
        cache.load(TRIVIAL)
    monkeypatch.undo()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="must be a directory"):
        cache.load(TRIVIAL)


def test_where_the_cache_cannot_be_written_a_private_temporary_directory_is_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", {})
    assert cache.load(TRIVIAL).number == 7
    (written,) = tmp_path.rglob("*.py")
    assert written.parents[1].name == f"headwater-kernels-{os.getuid()}"
    assert written.parents[1].stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_stored_or_compiled_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match="set XDG_CACHE_HOME"):
        cache.load(TRIVIAL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"(?s)cannot be compiled: .*no_such"):
        cache.load(UNCOMPILABLE)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of this test's own, of a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_PATIENCE_S", 0.05)
    return tmp_path


def held_by_another(folder):
    """The lock of every module in the cache, as a process that compiles has it."""
    locks = [os.open(path, os.O_RDWR) for path in folder.rglob("lock")]
    assert locks
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"4711", 0)
    return locks


def test_a_module_that_is_compiled_is_loaded_though_another_process_holds_the_lock(empty_cache, monkeypatch):
    cache.load(TRIVIAL)
    monkeypatch.setattr(cache, "_loaded", {})
    locks = held_by_another(empty_cache)
    assert cache.load(TRIVIAL).number == 7
    for lock in locks:
        os.close(lock)


def test_who_waits_for_another_to_compile_says_so_and_does_it_alone_after_a_while(
    empty_cache, monkeypatch, caplog
):
    cache.load(TRIVIAL)
    for marker in empty_cache.rglob("compiled"):
        marker.unlink()
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_LIMIT_S", 0.3)
    locks = held_by_another(empty_cache)
    with caplog.at_level(logging.WARNING):
        assert cache.load(TRIVIAL).number == 7
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "waits for process 4711",
        "process 4711 has compiled a kernel for 0 s: it is compiled here too",
    ]
    for lock in locks:
        os.close(lock)


def test_a_process_that_is_forked_while_a_kernel_is_compiled_has_nothing_of_its_lock(empty_cache):
    cache.load(TRIVIAL)
    (path,) = empty_cache.rglob("lock")
    with cache._only_one_process(path):
        (descriptor,) = cache._held
        forked = os.fork()
        if not forked:
            try:
                os.fstat(descriptor)
            except OSError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
        assert cache._held == {descriptor}
