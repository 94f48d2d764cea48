"""Simulated clusters: whatever goes wrong, every invariant holds, and a run is a function of its schedule."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from modes import Deaf, Pairs

from headwater import messages as m
from headwater import testing
from headwater.errors import ConfigurationError
from headwater.machines import log_link
from headwater.spec.rules import Adam
from headwater.spec.sync import Mode
from headwater.testing import (
    Crash,
    Cut,
    Exploration,
    Faults,
    Invariant,
    Partition,
    Schedule,
    Stop,
    Violation,
    explore,
    run,
    shrink,
    simulate,
)
from headwater.testing.invariants import (
    ALWAYS,
    COUNTED,
    ENLISTED,
    FOLLOWED,
    REWOUND,
    TRACED,
    EachPortionOnce,
)
from headwater.testing.processes import host
from headwater.testing.schedule import PROGRAMS, random_schedule

MODES = ["sync", "async", "ssp:1", "sync:quorum=2,grace=0.002"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_no_random_schedule_breaks_an_invariant(mode, long, seed_base):
    schedules = 2000 if long else 500
    some = schedules // 5 if mode.startswith("sync:") else 0  # of which what comes too late goes out again
    found = explore(mode, schedules - some, seed=seed_base)
    assert found.schedules == schedules - some
    assert found.faults > 2 * found.schedules
    if some:
        explore(f"{mode},late=carry", some, seed=seed_base)


def test_no_random_schedule_of_local_steps_breaks_an_invariant(long, seed_base):
    """Changes that are averaged over who carries them, rounds that are held open by their workers' pace."""
    schedules = 500 if long else 20
    for mode in ("sync:quorum=2,grace=slack,late=carry,cap=0.004", "sync"):
        explore(mode, schedules, seed=seed_base, outer=True, rule=Adam(lr=0.1))


@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_run_again_is_the_same_run_message_by_message(mode):
    for seed in range(4):
        schedule = random_schedule(mode, seed, Faults())
        first = run(schedule, trace=True)
        assert run(schedule, trace=True) == first
        assert run(schedule).log == first.log


def test_schedules_have_something_of_everything():
    schedules = [random_schedule("async", seed, Faults()) for seed in range(100)]
    results = [run(schedule) for schedule in schedules[:60]]
    done = {type(fault) for result in results for fault in result.faults}
    assert done == {Crash, Stop, Cut, Partition}
    nodes = {fault.node for result in results for fault in result.faults if isinstance(fault, Crash)}
    assert {"worker 0", "server 0", "server 1", "standby 0", "standby 1", "coordinator"} <= nodes
    entries = [entry for result in results for entry in result.log]
    tickets = [ticket for entry in entries if isinstance(entry, m.Committed) for ticket in entry.updates]
    assert any(ticket.connection_epoch > 0 for ticket in tickets), "no exchange was ever repeated"
    kinds = {type(entry) for entry in entries}
    assert {
        m.Committed,
        m.Measured,
        m.Served,
        m.Registered,
        m.Retired,
        m.Met,
        m.Checkpointed,
        m.Assigned,
    } <= kinds
    fields = ["shares", "splits", "readers", "meets", "checkpoints", "rule", "clip_norm", "replicas", "rows"]
    fields += ["spares", "rewinds", "asks", "traces"]
    for field in (*fields, "keeps", "ahead", "verifies", "weighted", "merge"):
        assert len({bool(getattr(schedule, field)) for schedule in schedules}) == 2, field
    assert {schedule.program for schedule in schedules} == set(PROGRAMS)
    assert any(result.rewinds for result in results)


def test_what_waits_to_be_sent_is_joined_as_servers_join_it(monkeypatch):
    made = []

    def joined(first, second):
        made.append(log_link.joined(first, second))
        return made[-1]

    monkeypatch.setattr(host, "joined", joined)
    for seed in range(4):
        run(random_schedule("async", seed, Faults(), replicas=1, servers=2))
    assert {m.AppendAck, m.Entries, m.Reports} <= {type(message) for message in made}


def test_a_deposed_server_that_goes_on_in_the_middle_of_a_pass_changes_nothing():
    """Its lease ends while it stands still, its standby takes over, and then it writes the rest."""
    stop = Stop(0.1, "server 0", seconds=0.6, in_pass=True)
    for seed in range(10):
        result = simulate("sync", replicas=1, seed=seed, steps=8, faults=(stop,), trace=True)
        told = [text for _, text in result.trace]
        assert result.faults == (stop,)
        assert any("stops in the middle of a pass" in text for text in told)
        assert any("takes over" in text for text in told)
        assert result.version == 8


def test_late_steps_of_a_round_with_a_quorum_are_seen():
    results = [simulate("sync:quorum=1", workers=3, seed=seed) for seed in range(5)]
    assert any(isinstance(entry, m.Late) for result in results for entry in result.log)


@pytest.mark.parametrize(
    "mode", ["async", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("sync", "ssp:2"))]
)
def test_many_workers_are_simulated_in_little_time(mode, long):
    workers = 200 if long else 60
    result = simulate(mode, workers=workers, servers=4, steps=20, seed=1)
    assert result.version == (20 if mode == "sync" else 20 * workers)


@pytest.mark.long
def test_a_thousand_workers_take_a_hundred_steps_in_less_than_two_minutes():
    """The time is computing time: a busy machine takes longer."""
    begin = time.process_time()
    assert simulate("async", workers=1000, servers=4, steps=100).version == 100_000
    assert time.process_time() - begin < 120


# ── own modes, rules and invariants ─────────────────────────────────────────────────────────────


class NothingIsDropped(Invariant):
    """Every step is applied."""

    def answered(self, member, call, answer):
        if answer.result is not None and not answer.result.applied:
            self.fail(f"a step of {member.name} was dropped")


def test_a_mode_of_ones_own_is_explored_like_any_other():
    assert explore(Pairs(wanted=1000), 20).schedules == 20  # everybody's updates: like `sync`
    assert explore(Pairs(wanted=1000), 10, rule=Adam()).schedules == 10


def test_a_mode_that_lets_everybody_wait_for_ever_is_found_and_shrunk_to_nothing():
    with pytest.raises(Violation) as caught:
        explore(Deaf(), 10)
    violation = caught.value
    assert violation.invariant == "StalledError"
    assert "everybody waits for each other: worker 0 waits in step 1" in str(violation)
    shortest = violation.schedule
    assert (shortest.workers, shortest.servers, shortest.steps, shortest.faults) == (1, 1, 1, ())


def test_an_invariant_of_ones_own_is_checked_besides():
    assert isinstance(explore("sync", 20, invariants=(NothingIsDropped,)), Exploration)
    with pytest.raises(Violation, match=r"NothingIsDropped: a step of worker \d was dropped"):
        explore("sync:quorum=1", 50, invariants=(NothingIsDropped,))


# ── what fails can be run again ─────────────────────────────────────────────────────────────────


def test_a_failing_seed_is_named_and_what_is_printed_replays_the_violation():
    with pytest.raises(Violation) as caught:
        explore("sync:quorum=1", 50, seed=7, invariants=(NothingIsDropped,))
    text = str(caught.value)
    (printed,) = [line for line in text.splitlines() if "run(" in line]
    assert f"seed={caught.value.seed}" in text
    call = printed.partition(": ")[2]
    with pytest.raises(Violation) as again:
        eval(call, {**vars(testing), "Adam": Adam, "NothingIsDropped": NothingIsDropped})
    assert again.value.reason == caught.value.reason
    assert again.value.trace == caught.value.trace != ()


def test_a_violation_is_shrunk_to_the_faults_that_it_needs():
    class NobodyTakesOver(Invariant):
        """Does not hold where server 0 dies."""

        def processed(self, host, shard, entry):
            if host.name == "server 0b" and host.role == "server":
                self.fail("another server 0")

    crash = Crash(0.2, "server 0")
    faults = (Cut(0.05, "worker 0", "server 1"), Crash(0.1, "worker 1"), crash, Stop(0.2, "worker 0", 0.05))
    schedule = Schedule(
        "async", workers=3, servers=3, replicas=1, steps=8, seed=3, meets=4, checkpoints=2, readers=2,
        faults=faults, rule=Adam(), invariants=(NobodyTakesOver,),
    )  # fmt: skip
    with pytest.raises(Violation) as caught:
        run(schedule)
    shortest = shrink(caught.value).schedule
    assert shortest.faults == (crash,)
    assert (shortest.meets, shortest.checkpoints, shortest.readers) == (0, 0, 0)
    assert shortest.rule is None


def test_impossible_schedules_are_refused():
    for wrong in ({"workers": 0}, {"replicas": 2}, {"min_workers": 3}, {"steps": 0}):
        with pytest.raises(ConfigurationError, match="expected at least one"):
            simulate("sync", **wrong)
    with pytest.raises(ConfigurationError, match="expected 'sync'"):
        simulate("asink")


def test_importing_headwater_does_not_import_the_simulator():
    code = "import sys, headwater, headwater.cli; print('headwater.testing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stdout + done.stderr


@pytest.mark.long
def test_the_page_on_simulated_clusters_tells_the_truth(capsys, monkeypatch):
    monkeypatch.setattr(Mode.registry, "_classes", dict(Mode.registry._classes))
    page = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, scope)
    assert capsys.readouterr().out.startswith("NothingIsDropped: a step of worker ")
    checked = {
        kind.__name__
        for kind in (*ALWAYS, *COUNTED, *FOLLOWED, *ENLISTED, *REWOUND, *TRACED, EachPortionOnce)
    }
    assert set(re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE)) == checked
