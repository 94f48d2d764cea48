"""Random programs, interrupted at random places, end as if nothing had been: bits, meetings and data read.

Synchronous, static parts, and nothing is committed while a worker is missing (`min_workers`).
"""

import contextlib
import functools
import os
import random
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater.errors import HeadwaterError, RefusedError, RewoundError
from headwater.worker import Worker, batches, program

WORKERS = 2
KINDS = ("exception", "SIGTERM", "kill -9", "rewind")
SEEDS, MORE_SEEDS = 14, 200
"""Programs by default, and with `--long`."""


class Interrupted(Exception):
    pass


@dataclass
class Plan:
    """A program, and what happens to it: at which of a rank's steps, over all its incarnations."""

    seed: int
    epochs: int
    size: int
    batch: int
    meets: tuple[str, ...]
    patience: int
    interrupts: dict[tuple[int, int], str] = field(default_factory=dict)
    resumes_at: int = 0

    @classmethod
    def draw(cls, seed):
        chance = random.Random(seed)
        epochs, size, batch = chance.randint(2, 4), chance.randint(8, 20), chance.randint(1, 3)
        meets = tuple(chance.choice(("sum", "gather", "broadcast", "barrier")) for _ in range(3))
        plan = cls(seed, epochs, size, batch, meets, chance.choice((0, 0, 2)))
        steps = epochs * (size // WORKERS // batch)
        for _ in range(chance.randint(1, 3)):
            where = chance.randrange(WORKERS), chance.randint(1, max(1, steps - 1))
            plan.interrupts[where] = chance.choice(KINDS)
        plan.resumes_at = chance.choice((0, chance.randint(1, max(1, steps - 1))))
        if plan.resumes_at:
            plan.size = max(1, size // (WORKERS * batch)) * WORKERS * batch  # all stop after the same round
        return plan


@dataclass
class Seen:
    """What came of a program: by rank, epoch and step the batch, and by rank and epoch what meetings gave."""

    read: dict = field(default_factory=dict)
    met: dict = field(default_factory=dict)
    values: bytes = b""


def die(worker):
    worker._session.close()
    worker._close()


def train(worker, plan, seen, interrupt):
    rank, rate = worker.rank, worker.kept.get("rate", 1.0)
    model = worker.model("m", {"w": np.full(3, 0.5, np.float32)}, hw.SGD(lr=rate))
    table = worker.table("t", 2, hw.Adagrad(lr=0.5), initializer=hw.Normal(std=1))
    told = worker.broadcast({"offset": plan.seed % 7} if rank == 0 else None)
    for epoch in worker.epochs(plan.epochs):
        data = np.arange(plan.size)
        for batch in worker.batches(data, plan.batch, shuffle=True, seed=epoch + told["offset"]):
            w = model.pull()["w"]
            model.push({"w": (w - batch.mean()) / 8})
            table.push(batch % 5, table.pull(batch % 5) / 4)
            worker.step()
            before = seen.read.setdefault((rank, epoch, worker.steps), batch.tolist())
            assert before == batch.tolist(), "what is read again after a rewind is what was read"
            interrupt(worker)
        worker.barrier()  # who has fewer batches sees the others' last steps from here on
        found = [meet(worker, kind, epoch, model) for kind in plan.meets]
        before = seen.met.setdefault((rank, epoch), found)
        assert before == found, "the same meetings came to the same before"
        best = min(worker.kept.get("best", 1e9), found[0] if isinstance(found[0], float) else 1e9)
        bad = worker.kept.get("bad", 0) + 1 if best == worker.kept.get("best", best) and epoch else 0
        rate = rate / 2
        model.set(lr=rate)
        worker.keep(best=best, bad=bad, rate=rate, history=[*worker.kept.get("history", []), epoch])
        if plan.patience and bad >= plan.patience:
            break
    seen.met[rank, "end"] = dict(worker.sum(of="all", steps=worker.steps)), worker.kept["history"]


def meet(worker, kind, epoch, model):
    if kind == "sum":
        return float(worker.sum(loss=model.pull()["w"].sum() + worker.rank)["loss"])
    if kind == "gather":
        return [array.tolist() for array in worker.gather(w=model.pull()["w"] + worker.rank)["w"]]
    if kind == "broadcast":
        return worker.broadcast((epoch, model.pull()["w"].tolist()))
    return worker.barrier()


def incarnations(cluster, rank, plan, seen, stops_at):
    """Run the program of a rank to its end, or to `stops_at`, however often it is interrupted."""
    while True:
        try:
            worker = Worker(cluster.address, rank)
        except (RefusedError, RewoundError):
            continue  # the death of the one before is not known yet, or everything begins anew

        def interrupt(worker=worker):
            if worker.steps == stops_at:
                raise Interrupted("all stop here")
            kind = plan.interrupts.pop((rank, worker.steps), "")
            if kind == "exception":
                raise Interrupted
            if kind == "rewind":
                cluster._engine._servers[-1].close()
            if kind == "SIGTERM":
                worker.dismiss(143)
            if kind == "kill -9":
                die(worker)
                raise Interrupted

        try:
            with worker:
                train(worker, plan, seen, lambda worker: interrupt())
            return
        except (Interrupted, RewoundError, SystemExit) as error:
            if error.args == ("all stop here",):
                return


def ends(plan, folder, resumes_at=0):
    """What comes of a plan; with `resumes_at` everything is resumed from a checkpoint in the middle."""
    seen, errors = Seen(), []

    def body(cluster, rank, stops_at):
        try:
            incarnations(cluster, rank, plan, seen, stops_at)
        except BaseException as error:  # noqa: BLE001 - the test raises it
            errors.append(error)

    for part, stops_at in enumerate([resumes_at, -1] if resumes_at else [-1]):
        keeps = resumes_at or "rewind" in plan.interrupts.values()
        options = {"checkpoint": folder, "every": "3steps", "resume": part > 0} if keeps else {}
        with hw.Cluster(
            workers=WORKERS, servers=2 + part, min_workers=WORKERS, patience=5, deadline=8, **options
        ) as cluster:
            threads = [
                threading.Thread(target=body, args=(cluster, rank, stops_at)) for rank in range(WORKERS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            if errors:
                raise errors[0]
            if stops_at > 0:
                cluster.take_last_checkpoint()
            _, values = cluster.parameters()
            seen.values = values["m"]["w"].tobytes()
    return seen


def holds(seed, folder):
    """Whether a plan comes to the same with and without what interrupts it; says what does not."""
    whole = ends(Plan(**{**vars(Plan.draw(seed)), "interrupts": {}}), folder)
    plan = Plan.draw(seed)
    try:
        found = ends(plan, folder / "runs", plan.resumes_at)
    except (AssertionError, HeadwaterError) as error:
        return f"seed {seed}: {type(error).__name__}: {error}"
    for what in ("read", "met", "values"):
        if getattr(found, what) != getattr(whole, what):
            return f"seed {seed}: {what} is {getattr(found, what)}, expected {getattr(whole, what)}"
    return ""


@pytest.mark.parametrize("seed", range(SEEDS))
def test_an_interrupted_program_ends_with_the_same_bits_meetings_and_data(seed, tmp_path):
    assert holds(seed, tmp_path) == ""


@pytest.mark.long
def test_many_interrupted_programs_do(tmp_path, seed_base):
    for seed in range(max(SEEDS, seed_base), max(SEEDS, seed_base) + MORE_SEEDS):
        assert holds(seed, tmp_path / str(seed)) == ""


def _paired_by_arrival(monkeypatch):
    make = program.Program.__init__

    def begin(self, recalled):
        make(self, recalled)
        self.meetings = recalled.met

    monkeypatch.setattr(program.Program, "__init__", begin)
    monkeypatch.setattr(program.Program, "begin_loop", lambda self, calls: _begun(self, calls))


def _begun(self, calls):
    recorded = self._recorded.pop(self._loops_begun, None)
    self._loops_begun += 1
    if recorded is not None:
        calls.begun = recorded.calls
    return self._enter(recorded or hw.messages.LoopProgress(0, 0, calls.begun, self.meetings, 1, 0))


def _ended_by_a_finaliser(monkeypatch):
    def ends_it(self):
        if self._call is not None and not self._over:
            self._end(interrupted=True)

    monkeypatch.setattr(batches._Reading, "__del__", ends_it)


def _not_restored(monkeypatch):
    monkeypatch.setattr(program, "_fields", lambda kept: {})


@pytest.mark.parametrize("plant", [_paired_by_arrival, _ended_by_a_finaliser, _not_restored])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_planted_fault_is_found(plant, tmp_path, monkeypatch):
    plant(monkeypatch)
    for seed in range(12):
        if holds(seed, tmp_path / str(seed)):
            return
    pytest.fail("no seed showed the fault")


def test_the_program_in_the_docs_continues_after_a_resume(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "restarts.md").read_text()
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    whole = hw.run(names["train"], workers=2, engine="inline", deadline=30)

    class Stopping:
        """A worker that fails in its third epoch."""

        def __init__(self, worker):
            self._worker = worker

        def __getattr__(self, name):
            if name == "batches" and self._worker.steps >= 12:
                raise Interrupted
            return getattr(self._worker, name)

    with hw.Cluster(workers=2, checkpoint=tmp_path, deadline=30) as cluster:

        def body(worker):
            with contextlib.suppress(Interrupted), worker:
                names["train"](Stopping(worker))

        threads = [threading.Thread(target=body, args=(cluster.worker(),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        cluster.checkpoint()
    resumed = hw.run(
        names["train"], workers=2, engine="inline", checkpoint=tmp_path, resume=True, deadline=30
    )
    assert resumed.values == whole.values
    assert resumed.parameters["m"]["w"].tobytes() == whole.parameters["m"]["w"].tobytes()


def loses_its_process(worker, folder):
    """The program of `train`; with a folder, rank 1 is killed once."""
    plan, seen = Plan(3, 3, 14, 2, ("sum", "gather"), 0), Seen()

    def interrupt(worker):
        if folder and worker.rank == 1 and worker.steps == 5 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train(worker, plan, seen, interrupt)
    return seen.met[worker.rank, "end"], seen.met[worker.rank, plan.epochs - 1]


def test_a_run_whose_process_is_killed_ends_as_one_in_which_nobody_died(tmp_path):
    options = {"workers": WORKERS, "min_workers": WORKERS, "deadline": 60, "patience": 10}
    whole = hw.run(functools.partial(loses_its_process, folder=None), engine="inline", **options)
    killed = hw.run(
        functools.partial(loses_its_process, folder=tmp_path),
        engine="local",
        output=lambda line: None,
        **options,
    )
    assert (tmp_path / "died").exists()
    assert killed.values == whole.values
    assert killed.version == whole.version
    assert killed.parameters["m"]["w"].tobytes() == whole.parameters["m"]["w"].tobytes()
