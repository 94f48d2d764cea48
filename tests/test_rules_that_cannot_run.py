"""A rule that cannot be run is refused when it is declared, and never ends a server."""

import math
import threading
from dataclasses import dataclass

import numpy as np
import pytest

import headwater as hw
from headwater.errors import ConfigurationError

AT = 1002
"""An update that nobody asks for beforehand."""


def plain(value, gradient, lr):
    return value - lr * gradient


def squash(value, gradient, lr):
    return value - lr * math.exp(gradient)


def takes_more(value, gradient, lr, other):
    return value - lr * gradient * other


def gives_more(value, gradient, lr):
    return value - lr * gradient, gradient


@dataclass(frozen=True)
class Base(hw.Rule):
    lr: float = 1.0

    def function(self):
        return plain

    def scalars(self, updates, count):
        return (self.lr,)


@hw.register
@dataclass(frozen=True)
class Squashing(Base):
    def function(self):
        return squash


@hw.register
@dataclass(frozen=True)
class TakingMore(Base):
    def function(self):
        return takes_more


@hw.register
@dataclass(frozen=True)
class GivingMore(Base):
    def function(self):
        return gives_more


@hw.register
@dataclass(frozen=True)
class WithoutFunction(Base):
    def function(self):
        return None


@hw.register
@dataclass(frozen=True)
class StatesOfAnotherKind(Base):
    def states(self):
        return ["sum"]


@hw.register
@dataclass(frozen=True)
class Fading(Base):
    def scalars(self, updates, count):
        return (self.lr / (3 - updates),)


@hw.register
@dataclass(frozen=True)
class ByCount(Base):
    def scalars(self, updates, count):
        return (math.log(900 - count),)


@hw.register
@dataclass(frozen=True)
class Vanishing(Base):
    def scalars(self, updates, count):
        return (self.lr,) if updates < 10 else ()


@hw.register
@dataclass(frozen=True)
class Endless(Base):
    def scalars(self, updates, count):
        return (math.inf,)


@hw.register
@dataclass(frozen=True)
class InWords(Base):
    def scalars(self, updates, count):
        return ("fast",)


@hw.register
@dataclass(frozen=True)
class FailingLate(Base):
    def scalars(self, updates, count):
        return (self.lr / (AT - updates),)


CHECKED, GO_ON = threading.Event(), threading.Event()


@hw.register
@dataclass(frozen=True)
class Slow(Base):
    """Takes a server as long as somebody else takes for some steps."""

    def scalars(self, updates, count):
        if "-server-" in threading.current_thread().name:
            CHECKED.set()
            assert GO_ON.wait(20)
        return (self.lr,)


CANNOT_RUN = {
    Squashing: r"squash, line 2: 'math.exp\(gradient\)' cannot be in a rule",
    TakingMore: "takes_more|TakingMore",
    GivingMore: "gives_more|GivingMore",
    WithoutFunction: "must be a plain function of a module|WithoutFunction cannot be compiled",
    StatesOfAnotherKind: "takes 3 arguments, its rule passes 4|StatesOfAnotherKind cannot be compiled",
    Fading: r"Fading: scalars\(updates=3, count=4\) raised ZeroDivisionError",
    ByCount: r"ByCount: scalars\(updates=899, count=900\) raised ValueError",
    Vanishing: "Vanishing: scalars|Vanishing cannot",
    Endless: r"Endless: scalars\(updates=0, count=1\) gave \(inf,\)",
    InWords: r"InWords: scalars\(updates=0, count=1\) raised ValueError",
}


@pytest.mark.parametrize("kind", CANNOT_RUN)
def test_a_rule_that_cannot_be_run_is_refused_when_it_is_declared_and_the_worker_goes_on(kind):
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=60) as cluster, cluster.worker() as worker:
        with pytest.raises(ConfigurationError, match=CANNOT_RUN[kind]):
            worker.model("bad", {"w": np.zeros(3, np.float32)}, kind())
        with pytest.raises(ConfigurationError, match=CANNOT_RUN[kind]):
            worker.table("bad", 2, kind())
        model = worker.model("good", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=1.0))
        model.push({"w": np.ones(3)})
        worker.step()
        assert model.pull()["w"].tolist() == [-1.0] * 3


@pytest.mark.parametrize("servers", [1, 3])
def test_a_rule_that_fails_in_a_later_update_fails_that_step_on_all_servers_and_changes_nothing(servers):
    with (
        hw.Cluster(workers=1, servers=servers, patience=5, deadline=60) as cluster,
        cluster.worker() as worker,
    ):
        model = worker.model("m", {"w": np.zeros(5000, np.float32)}, FailingLate())
        other = worker.model("other", {"v": np.zeros(2, np.float32)}, hw.SGD(lr=1.0))
        model.load_state({"w": {"step": AT}}, updates=AT - 1)
        model.push({"w": np.ones(5000)})
        worker.step()
        assert (model.pull()["w"] == -1.0).all()
        for _ in range(2):
            model.push({"w": np.ones(5000)})
            other.push({"v": np.ones(2)})
            with pytest.raises(
                ConfigurationError, match=r"updates=1002, count=1004\) raised ZeroDivisionError"
            ):
                worker.step()
        other.push({"v": np.ones(2)})
        assert worker.step().applied
        assert other.pull()["v"].tolist() == [-1.0, -1.0]
        assert (model.pull()["w"] == -1.0).all()
        model.load_state({"w": {"step": 1}})
        model.push({"w": np.ones(5000)})
        worker.step()
        assert (model.pull()["w"] < -1.0).all()


def test_a_tables_rule_that_fails_in_a_later_update_fails_that_step_and_changes_nothing():
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=60) as cluster, cluster.worker() as worker:
        table = worker.table("t", 1, FailingLate(lr=1.0))
        for _ in range(AT):
            table.push([1], np.zeros((1, 1)))
            worker.step()
        table.push([1, 2, 3], np.ones((3, 1)))
        with pytest.raises(ConfigurationError, match="FailingLate"):
            worker.step()
        assert len(table) == 1
        assert table.pull([1]).item() == 0.0


def test_settings_that_exclude_each_other_end_no_server():
    """Each of them is possible when it is asked for, and the second is not any more when it takes effect."""
    rule = hw.SGD(lr=1.0, momentum=0.5)

    def work(worker):
        model = worker.model("m", {"w": np.zeros(1, np.float32)}, rule)
        if worker.rank == 0:
            model.set(dampening=0.5)
        else:
            model.set(nesterov=True)
        for _ in range(2):
            model.push({"w": np.ones(1)})
            worker.step()
        return model.rules[0].nesterov, model.rules[0].dampening

    values = hw.run(work, workers=2, servers=2, engine="inline", patience=5, deadline=60).values
    assert values == [(True, 0.0)] * 2


@pytest.mark.parametrize("declare", ["model", "table"])
def test_while_a_rule_is_compiled_and_tried_others_take_their_steps(declare):
    CHECKED.clear()
    GO_ON.clear()

    def work(worker):
        if worker.rank:
            if declare == "model":
                return worker.model("slow", {"w": np.zeros(1, np.float32)}, Slow()).pull()["w"].tolist()
            return worker.table("slow", 1, Slow()).pull([1]).tolist()
        model = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
        assert CHECKED.wait(20)
        for _ in range(3):
            model.push({"w": np.ones(1)})
            worker.step()
        GO_ON.set()
        return model.pull()["w"].tolist()

    options = {"engine": "inline", "patience": 5, "deadline": 15}
    values = hw.run(work, workers=2, servers=2, sync="async", **options).values
    assert values[0] == [-3.0]
    assert np.ravel(values[1]).tolist() == [0.0]
