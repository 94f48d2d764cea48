"""Loops that a request needs are compiled by who brings it, and never while everybody waits for an entry."""

import functools
import importlib
import pkgutil
import threading

import numpy as np
import pytest

import headwater as hw
from headwater import kernels
from headwater.machines import requests
from headwater.machines.member_memory import MemberMemory
from headwater.machines.standby_receiver import StandbyReceiver
from headwater.shard import Shard, checks, layers, table, tables, vector

GRADIENT = {"w": np.arange(4, dtype=np.float32) + 1, "b": np.ones(3, np.float32)}
ROWS = np.ones((3, 2), np.float32)


class Uses:
    """Which loops were asked for: by a thread that brings something, and by one that processes an entry."""

    def __init__(self, monkeypatch):
        self.brought = {"server": set(), "standby": set()}
        self.processed = {"server": set(), "standby": set()}
        self._standbys = set()
        self._now = threading.local()
        for one in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"headwater.kernels.{one.name}")
            if hasattr(module, "compiled"):
                monkeypatch.setattr(module, "compiled", self._noting(one.name, module.compiled))
        for module, name in ((checks, "dense"), (vector, "dense"), (layers, "dense")):
            monkeypatch.setattr(module, name, self._of_rule("dense", getattr(module, name)))
        for module in (tables, table):
            monkeypatch.setattr(module, "row_rule", self._of_rule("rows", module.row_rule))
        self._within(monkeypatch, MemberMemory, "unpack", lambda _: self.brought["server"])
        self._within(monkeypatch, requests, "compile_for", lambda _: self.brought["server"])
        self._within(monkeypatch, StandbyReceiver, "unpack", lambda _: self.brought["standby"])
        for name in ("process", "prepare", "commit"):
            self._within(monkeypatch, Shard, name, lambda shard: self.processed[self._role(shard)])
        follow = Shard.follow
        monkeypatch.setattr(Shard, "follow", lambda s, one: (self._standbys.add(id(s)), follow(s, one))[1])

    def _role(self, shard):
        return "standby" if id(shard) in self._standbys else "server"

    def _noting(self, name, compiled):
        @functools.wraps(compiled)
        def noting():
            self.note(name)
            return compiled()

        return noting

    def _of_rule(self, kind, loop):
        def noting(rule):
            self.note((kind, rule.function(), len(rule.states())))
            return loop(rule)

        return noting

    def note(self, what):
        if (known := getattr(self._now, "uses", None)) is not None:
            known.add(what)

    def _within(self, monkeypatch, kind, name, uses):
        method = getattr(kind, name)

        @functools.wraps(method)
        def within(one, *args, **more):
            before, self._now.uses = getattr(self._now, "uses", None), uses(one)
            try:
                return method(one, *args, **more)
            finally:
                self._now.uses = before

        monkeypatch.setattr(kind, name, within)

    def late(self):
        """By role what an entry was the first to ask for."""
        return {role: self.processed[role] - self.brought[role] for role in self.processed}


def steps(*, rule=None, weighted=False, **model):
    def train(worker):
        one = worker.model("m", GRADIENT, rule or hw.SGD(lr=0.1), **model)
        for _ in range(2):
            one.push(GRADIENT)
            worker.step(weight=1.0 + worker.rank if weighted else 1.0)

    return train


def rows(worker):
    one = worker.table(
        "t", 2, hw.Adagrad(lr=0.1), codec="int8", expiry=hw.AfterSteps(2), admission=hw.AfterCount(1)
    )
    one.assign([7, 8], ROWS[:2])
    for ids in ([1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]):
        one.push(ids, ROWS)
        one.prefetch(ids)
        worker.step()
        one.pull(ids)
    one.delete([1])
    return len(one), list(one.scan())


def vectors(worker):
    one = worker.model("m", GRADIENT, hw.SGD(lr=0.1))
    one.push(GRADIENT)
    one.vectors.create("v", value=2.0)
    one.vectors.combine("v", {"v": 2.0, "parameters": 1.0})
    one.vectors.dots([("v", "parameters")])


def followed(worker):
    one = worker.model("m", GRADIENT, hw.SGD(lr=0.1))
    one.push(GRADIENT)
    worker.step()
    if worker.rank == 0:
        with hw.follow(worker.address, dtype="bfloat16", every=1, deadline=60) as reader:
            reader.pin().close()
    worker.barrier()


KINDS = {
    "mean": steps(),
    "weights": steps(weighted=True),
    "clip_norm": steps(clip_norm=1.0),
    "rda": steps(merge="rda"),
    "median": steps(merge="median"),
    "trimmed": steps(merge="trimmed:1"),
    "layerwise": steps(rule=hw.Lamb(lr=0.1)),
    "outer": steps(outer=True),
    "codecs": steps(codec="int8", values_codec="bf16"),
    "rows": rows,
    "vectors": vectors,
    "follower": followed,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_entry_is_the_first_to_need_a_loop(kind, monkeypatch):
    uses = Uses(monkeypatch)
    hw.run(KINDS[kind], workers=3, servers=1, replicas=1, engine="inline", deadline=60, patience=20)
    assert uses.processed["server"], "a test that notes nothing shows nothing"
    assert uses.late() == {"server": set(), "standby": set()}


def test_every_module_of_loops_is_among_these(monkeypatch):
    """A new one needs a line in `headwater.kernels.ahead` and a kind above."""
    uses = Uses(monkeypatch)
    for kind in ("weights", "clip_norm", "codecs", "rows", "vectors", "follower"):
        hw.run(KINDS[kind], workers=3, servers=1, engine="inline", deadline=60, patience=20)
    found = {
        one.name
        for one in pkgutil.iter_modules(kernels.__path__)
        if hasattr(importlib.import_module(f"headwater.kernels.{one.name}"), "compiled")
    }
    assert found <= uses.brought["server"] | {"index"}
