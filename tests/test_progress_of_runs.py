"""What a person sees of a run: who is slowest, in the display, in `status` and at the end."""

import io
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import headwater as hw
from headwater.cli.status import page
from headwater.cli.summary import summarize
from headwater.errors import ConfigurationError
from headwater.messages import CheckpointCounts, ClusterStatistics, NodeStatistics, WorkerTotals
from headwater.observe.display import LiveDisplay, PlainDisplay
from headwater.observe.exposure import Exposure, RecentExposure, exposures


def train(worker):
    model = worker.model("m", {"x": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
    for _ in range(10):
        if worker.rank == worker.settings["slow"]:
            time.sleep(0.02)
        model.push({"x": np.ones(8, np.float32)})
        worker.step()
    return worker.rank


def test_a_sleep_in_one_worker_is_named_at_the_end_of_a_run():
    for slow in (0, 1):
        result = hw.run(train, workers=2, engine="inline", settings={"slow": slow})
        first = exposures(result.statistics.totals)[0]
        assert (first.rank, first.stage) == (slow, "compute")
        assert first.seconds > 0.15
        assert f"exposed time: worker {slow} compute {first.share:.0%}" in "\n".join(summarize(result))


def totals(rank, **exposed):
    return WorkerTotals(rank, exposed={stage: round(1e9 * seconds) for stage, seconds in exposed.items()})


def statistics(*ranks, **changed):
    nodes = (
        NodeStatistics("coordinator", 1, "tcp:127.0.0.1:7000", 3, 7, None, index=0),
        NodeStatistics("server", 2, "tcp:127.0.0.1:7001", 3, 7, None, index=0, silence=2.4),
        *(NodeStatistics("worker", 3 + i, "here", 3, 7, None, rank=i) for i in range(len(ranks))),
    )
    return ClusterStatistics(3, 0, 7, len(ranks), "sync", nodes, (), (), (), totals=ranks, **changed)


def test_parts_of_exposed_time_are_ordered_and_add_up():
    found = exposures([totals(0, compute=1.0, push=0.5), totals(3, compute=4.0, pull=0.5)])
    assert [(one.rank, one.stage) for one in found] == [
        (3, "compute"),
        (0, "compute"),
        (0, "push"),
        (3, "pull"),
    ]
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert str(found[0]) == "worker 3 · compute · 67 % of exposed time".replace(" %", "%")
    assert exposures([totals(0)]) == []


def test_the_live_display_names_who_is_slowest_of_late():
    recent = RecentExposure(10.0)
    assert recent.look([totals(0)], 0.0) is None
    assert recent.look([totals(0, compute=5.0), totals(1)], 1.0).rank == 0
    later = [totals(0, compute=5.0), totals(1, pull=3.0)]
    assert recent.look(later, 12.0) == Exposure(1, "pull", 3.0, 1.0)
    assert recent.look(later, 30.0).rank == 0, "nothing moved of late: of all"


def shown(renderable, width=80):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


def test_status_says_who_is_slowest_when_members_were_heard_and_which_checkpoint_was_last():
    checkpoints = CheckpointCounts(3, 1, 30_000_000, 6.0, 1200, 10_000_000, 2.0, 65.0)
    text = shown(page(statistics(totals(0, compute=1.0), totals(1, data=3.0), checkpoints=checkpoints)))
    assert text.startswith("healthy\n")
    assert "slowest: worker 1 · data · 75% of exposed time" in text
    assert "last checkpoint: version 1200, 1:05 ago, 10.0 MB in 2.0 s, 1 failed" in text
    server = next(line for line in text.splitlines() if line.startswith("server 0"))
    assert "2 s" in server
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", [LiveDisplay, PlainDisplay])
def test_both_displays_name_the_slowest(kind):
    out = io.StringIO()
    console = Console(file=out, force_terminal=kind is LiveDisplay, width=80, color_system=None)
    clock = {} if kind is LiveDisplay else {"clock": iter([0.0, 9.0, 9.0, 9.0, 9.0]).__next__}
    with kind(console, workers=2, script="train.py", **clock) as display:
        display.show(statistics(totals(0, compute=1.0), totals(1, data=3.0)))
    assert "slowest: worker 1 · data · 75% of exposed time" in out.getvalue()


def test_run_shows_its_progress_where_it_is_asked_to(capsys):
    def speaks(worker):
        print("worker speaks")  # inline, so not through `output`
        return train(worker)

    settings = {"slow": -1}
    hw.run(speaks, workers=1, engine="inline", settings=settings)
    assert capsys.readouterr().err == "", "no terminal and no notebook"
    result = hw.run(speaks, workers=1, engine="inline", settings=settings, progress=True)
    err = capsys.readouterr().err
    assert "cluster address: unix:@" in err
    assert repr(result).count("\n") == 0
    with pytest.raises(ConfigurationError, match="progress: got 'yes', expected True, False or None"):
        hw.run(speaks, progress="yes")


def test_a_users_own_watch_and_started_are_called_too_where_progress_is_shown(capsys):
    addresses, seen = [], []
    hw.run(
        lambda worker: time.sleep(0.6),
        workers=1,
        engine="inline",
        progress=True,
        started=addresses.append,
        watch=seen.append,
    )
    assert addresses
    assert addresses[0] in capsys.readouterr().err
    assert {type(one) for one in seen} == {ClusterStatistics}


def test_a_terminal_or_a_notebook_is_watched(monkeypatch):
    from headwater.observe.display import is_watched

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert not is_watched()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_watched()
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_watched()
