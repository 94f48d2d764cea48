"""Comparisons of modes: stragglers, predictions in virtual time, real runs with delays, the report."""

import json
import math
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import headwater as hw
from headwater.bench.predictions import pace_while_all_train
from headwater.cli.compare import repeated
from headwater.comparison.comparison import Comparison, figures_of
from headwater.comparison.experiment import Experiment
from headwater.comparison.intervals import mean_interval, t_quantile
from headwater.comparison.measure import compare
from headwater.comparison.prediction import Costs, predict
from headwater.comparison.report import page, results
from headwater.comparison.target import parse_target
from headwater.comparison.text import lines
from headwater.comparison.trials import TrialRun
from headwater.comparison.verdict import pairs
from headwater.errors import ConfigurationError, WorkerError
from headwater.spec.cluster import ClusterConfig
from headwater.spec.stragglers import LogNormal, Pareto, Slow, parse_straggler
from headwater.worker.trial import IncarnationNotes, LoggedNote, StepNote

ONE = Costs((1.0,))
KINDS = [
    "none",
    "slow:rank=0,factor=3",
    "lognormal:sigma=1,median=0.5",
    "lognormal:sigma=0.5,median=1,rank=2",
    "pareto:shape=2",
    "pause:rank=0,step=20,seconds=2",
    "death:rank=1,step=20",
    "return:rank=1,step=20,after=5",
]


# ── stragglers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", KINDS)
def test_a_straggler_is_its_text(text):
    assert str(parse_straggler(text)) == text
    assert parse_straggler(str(parse_straggler(text))) == parse_straggler(text)


def test_delays_follow_from_seed_rank_and_step_alone():
    for text in KINDS:
        straggler = parse_straggler(text)
        whole = straggler.factors(3, 1, 0, 1000)
        assert (whole >= 1).all()
        for first, count in ((0, 1), (255, 2), (256, 300), (999, 1)):
            assert straggler.factors(3, 1, first, count).tolist() == whole[first : first + count].tolist()
    drawn = Pareto(shape=2.0)
    assert drawn.factors(3, 1, 0, 9).tolist() != drawn.factors(4, 1, 0, 9).tolist()
    assert drawn.factors(3, 1, 0, 9).tolist() != drawn.factors(3, 2, 0, 9).tolist()


def test_delays_have_the_distribution_that_their_kind_says():
    log_normal = LogNormal(sigma=0.7, median=0.5).factors(0, 0, 0, 100_000) - 1
    assert np.median(log_normal) == pytest.approx(0.5, rel=0.02)
    assert np.log(log_normal).std() == pytest.approx(0.7, rel=0.02)
    pareto = Pareto(shape=3.0).factors(0, 0, 0, 100_000)
    assert (pareto > 2).mean() == pytest.approx(2**-3, rel=0.05)
    assert pareto.mean() == pytest.approx(1.5, rel=0.02)
    assert Slow(0, 3.0).factors(0, 0, 0, 5).tolist() == [3.0] * 5
    assert Slow(0, 3.0).factors(0, 1, 0, 5).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "slwo:rank=0,factor=3",
            "the kinds are none, slow:.*, lognormal:.*, pareto:.*, pause:.*, death:.*, return:",
        ),
        ("slow:rank=0", "factor"),
        ("slow:rank=0,factor=0.5", "≥ 1"),
        ("slow:rank=0,factor=fast", "finite number"),
        ("slow:rank=-1,factor=2", "≥ 0"),
        ("pareto:shape=1", "> 1"),
        ("pareto:shape=2,size=3", "no setting"),
        ("pause:rank=0,step=1,seconds=-1", "seconds"),
        (3, "expected none, slow"),
    ],
)
def test_a_wrong_straggler_is_told_with_the_right_ones(text, told):
    with pytest.raises(ConfigurationError, match=told):
        parse_straggler(text)


# ── predictions ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [2, 4, 16])
def test_a_worker_that_is_three_times_slower_slows_each_mode_as_arithmetic_says(workers):
    slow = parse_straggler("slow:rank=0,factor=3")
    expected = {
        "sync": 1 / 3,
        "async": (workers - 1 + 1 / 3) / workers,
        "ssp:3": 1 / 3,
        f"sync:quorum={workers - 1}": (workers - 1) / workers,
    }
    for mode, pace in expected.items():
        found = predict(mode, workers=workers, costs=ONE, straggler=slow, steps=600)
        assert found.relative == pytest.approx(pace, rel=0.02), mode
    late = predict(f"sync:quorum={workers - 1}", workers=workers, costs=ONE, straggler=slow, steps=600).late
    assert late == pytest.approx((1 / 3) / (workers - 1 + 1 / 3), rel=0.05)


@pytest.mark.parametrize("workers", [2, 4])
def test_exponential_steps_give_a_round_the_pace_of_the_harmonic_number(workers):
    """The largest of n exponential times is H_n times the mean."""
    drawn = np.random.default_rng(7).exponential(size=(workers, 12_000)).tolist()
    harmonic = sum(1 / k for k in range(1, workers + 1))
    found = predict(
        "sync", workers=workers, costs=ONE, steps=6000, times=lambda rank, step: drawn[rank][step]
    )
    assert found.relative == pytest.approx(1 / harmonic, rel=0.02)
    free = predict(
        "async", workers=workers, costs=ONE, steps=6000, times=lambda rank, step: drawn[rank][step]
    )
    assert free.relative == pytest.approx(1, rel=0.02)


def test_staleness_and_waiting_are_what_arithmetic_says():
    even = predict("async", workers=10, costs=ONE, steps=300)
    assert (even.staleness, even.waiting) == (pytest.approx(9, rel=0.02), 0)
    rounds = predict("sync", workers=4, costs=ONE, straggler=Slow(0, 3.0), steps=300)
    assert rounds.staleness == 0
    assert rounds.waiting == pytest.approx(3 / 4 * 2 / 3, rel=0.02)


def test_servers_that_are_busy_limit_every_mode():
    """1,000 updates a second at most, and 100 workers could send 10,000."""
    costs = Costs((0.01,), update=0.001)
    for mode in ("sync", "async"):
        assert predict(mode, workers=100, costs=costs, steps=300).steps_per_s == pytest.approx(1000, rel=0.1)


def test_a_death_leaves_the_others_their_pace_and_a_pause_costs_its_seconds():
    gone = predict("sync", workers=4, costs=ONE, straggler=parse_straggler("death:rank=1,step=20"), steps=300)
    assert gone.relative == pytest.approx(3 / 4, rel=0.02)
    back = predict(
        "sync", workers=4, costs=ONE, straggler=parse_straggler("return:rank=1,step=20,after=20"), steps=300
    )
    assert back.relative == pytest.approx(1, rel=0.02)
    pause = parse_straggler("pause:rank=1,step=150,seconds=50")
    assert predict("sync", workers=4, costs=ONE, straggler=pause, steps=300).relative == pytest.approx(
        0.75, rel=0.02
    )


def test_a_prediction_is_a_function_of_its_arguments():
    costs, slow = Costs((1.0, 1.2, 0.9), 0.05, 0.01), parse_straggler("lognormal:sigma=1,median=0.5")
    for mode in ("sync", "ssp:2", "sync:quorum=3,grace=0.2"):
        first = predict(mode, workers=4, costs=costs, straggler=slow, steps=100, seed=5)
        assert first == predict(mode, workers=4, costs=costs, straggler=slow, steps=100, seed=5)
        assert first != predict(mode, workers=4, costs=costs, straggler=slow, steps=100, seed=6)


# ── intervals and verdicts ──────────────────────────────────────────────────────────────────────


def test_students_quantiles_are_those_of_the_tables():
    table = {(1, 0.95): 12.706, (2, 0.95): 4.303, (9, 0.95): 2.262, (30, 0.99): 2.750, (2, 0.975): 6.205}
    for (freedom, confidence), value in table.items():
        assert t_quantile(freedom, confidence) == pytest.approx(value, rel=1e-3)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    random = np.random.default_rng(3)
    covered = [(found := mean_interval(random.normal(5, 2, 4))).low <= 5 <= found.high for _ in range(2000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def noted(mode, seed, seconds, *, straggler="none", reaches=True, stale=0):
    """A run of one worker, whose loss falls from 1 to 0 in a line over `seconds`; or stays above 0.6."""
    steps = [
        StepNote(100 + seconds * i / 20, 0.5, 0.25, 0.25, i + 1, stale, i % 4 > 0, 10 * (i + 1))
        for i in range(21)
    ]
    lowest = 0.0 if reaches else 0.6
    logged = [
        LoggedNote(100 + seconds * i / 20, i + 1, 10 * (i + 1), i + 1, 1 - (1 - lowest) * i / 20)
        for i in range(21)
    ]
    notes = IncarnationNotes(0, 99.0, tuple(steps), tuple(logged), ("loss",))
    return TrialRun(mode, straggler, seed, 1, (notes,), 21, {0: None})


def comparison(runs, *, seeds=3, modes=("sync", "async"), stragglers=("none",)):
    experiment = Experiment.of(
        ClusterConfig(workers=1),
        modes=modes,
        stragglers=stragglers,
        seeds=seeds,
        until="loss=0.5",
        smooth=1,
        simulate=(),
        step_s=None,
        engine="inline",
    )
    return Comparison(experiment, 1, figures_of(runs, experiment), ONE, (), {})


def test_the_numbers_of_a_run_are_those_of_its_steps():
    (one,) = comparison([noted("sync", 0, 8.0, stale=2)], seeds=1).figures
    assert one.reached == pytest.approx(4.0)
    assert (one.samples, one.steps, one.version, one.seconds) == (210, 21, 21, 8.0)
    assert one.waiting == pytest.approx(0.25)
    assert one.late == pytest.approx(6 / 21)
    assert one.staleness == {2: 15}
    assert one.last == 0.0


def test_a_difference_that_all_seeds_show_is_told_with_its_interval():
    runs = [noted("sync", seed, 8.0 + 0.1 * seed) for seed in range(3)]
    runs += [noted("async", seed, 4.0 + 0.06 * seed) for seed in range(3)]
    (pair,) = pairs(comparison(runs))
    assert (pair.mode, pair.other, pair.count) == ("async", "sync", 3)
    assert pair.low < 0.5 < pair.high < 1
    assert "async reaches loss ≤ 0.5 in 0.50 of the time of sync" in comparison(runs).verdict


def test_where_seeds_differ_more_than_modes_no_difference_is_shown():
    runs = [noted("sync", seed, 8.0 + 3 * seed) for seed in range(3)]
    runs += [noted("async", seed, 14.0 - 3 * seed) for seed in range(3)]
    assert comparison(runs).verdict == "without stragglers: no difference shown"
    assert "one seed" in comparison([runs[0], runs[3]], seeds=1).verdict
    assert "no difference shown" in comparison([runs[0], runs[3]], seeds=1).verdict


def test_modes_that_do_not_differ_are_rarely_said_to():
    """Of all comparisons of five modes that are the same, at most one in twenty shows any difference."""
    random, modes = np.random.default_rng(5), ("sync", "async", "ssp:1", "ssp:2", "ssp:3")
    wrong = 0
    for _ in range(60):
        runs = [noted(mode, seed, 8 * math.exp(random.normal(0, 0.1))) for mode in modes for seed in range(4)]
        wrong += any(pair.is_shown for pair in pairs(comparison(runs, seeds=4, modes=modes)))
    assert wrong <= 6


def test_a_target_that_is_not_reached_is_told():
    runs = [noted("sync", seed, 8.0, reaches=False) for seed in range(3)]
    assert comparison(runs, modes=("sync",)).verdict.startswith("no mode reached loss ≤ 0.5")
    mixed = [*runs, *[noted("async", seed, 8.0, reaches=seed > 0) for seed in range(3)]]
    said = comparison(mixed).verdict
    assert "sync without stragglers did not reach it in 3 of 3 runs" in said
    assert "async without stragglers did not reach it in 1 of 3 runs" in said


def test_a_terminal_shows_a_table_with_bars_in_eighty_columns():
    slow = "slow:rank=0,factor=3"
    runs = [noted("sync", seed, 8.0 + seed, stale=2) for seed in range(3)]
    runs += [noted("async", seed, 4.0, reaches=seed > 0) for seed in range(3)]
    runs += [noted("sync", seed, 8.0, reaches=False, straggler=slow) for seed in range(3)]
    shown = list(lines(comparison(runs, stragglers=("none", slow))))
    assert shown[0] == "without stragglers"
    assert re.split(" {2,}| (?=waits|stale)", shown[1]) == [
        "mode",
        "seconds to loss ≤ 0.5",
        "steps/s predicted",
        "waits",
        "stale",
    ]
    sync, other, missed = shown[2], shown[3], shown[7]
    assert sync.split()[:6] == ["sync", "4.50", "(3.26", "to", "5.74)", "██████████"]
    assert other.count("█") == 4
    assert missed.split()[:3] == ["sync", "not", "reached"]
    assert "–" in sync
    assert max(map(len, shown)) <= 80


def test_quality_is_compared_at_equal_samples():
    fast, slow = noted("sync", 0, 4.0), noted("async", 0, 4.0)
    short = slow.notes[0].logged[:11]
    slow = TrialRun(
        "async", "none", 0, 1, (IncarnationNotes(0, 99.0, slow.notes[0].steps, short, ("loss",)),), 21, {}
    )
    figures = comparison([fast, slow], seeds=1).figures
    assert [one.at_equal_samples for one in figures] == [pytest.approx(0.5), pytest.approx(0.5)]
    assert [one.last for one in figures] == [0.0, pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("text", "metric", "value", "rises"),
    [
        ("loss=0.35", "loss", 0.35, False),
        ("loss<=1e-3", "loss", 1e-3, False),
        ("acc >= 0.9", "acc", 0.9, True),
    ],
)
def test_targets_are_read(text, metric, value, rises):
    target = parse_target(text)
    assert (target.metric, target.value, target.rises) == (metric, value, rises)
    assert target.is_reached(value)
    assert not target.is_reached(math.nan)


# ── the report ──────────────────────────────────────────────────────────────────────────────────


def test_a_report_needs_no_other_file_and_survives_what_is_not_finite():
    runs = [noted("sync", 0, 8.0), noted("async", 0, 8.0, reaches=False)]
    whole = page(comparison(runs, seeds=1, stragglers=("none",)), "/* script */ </sc")
    assert not re.findall(r'(?:src|href)="', whole)
    assert "http" not in whole.replace("http-equiv", "")
    figures = re.search(r"const FIGURES = (.*?);\n", whole).group(1)
    drawn = json.loads(figures.replace("<\\/", "</"))
    assert len(drawn) == len(re.findall(r'id="plot-\d+"', whole)) == 6
    assert "NaN" not in figures
    told = results(comparison(runs, seeds=1))
    assert [one["reached"] for one in told["runs"]] == [pytest.approx(4.0), None]


# ── wrong arguments ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"until": "loss"}, "loss=0.35"),
        ({"until": "loss=low"}, "loss=0.35"),
        ({"modes": ["sinc"]}, "expected 'sync"),
        ({"modes": []}, "at least one"),
        ({"modes": "sync"}, "a list"),
        ({"modes": ["sync", "sync"]}, "twice"),
        ({"stragglers": ["slow:rank=2,factor=3"]}, "ranks are 0 to 1"),
        ({"stragglers": ["death:rank=1,step=2"]}, "threads of this one"),
        ({"stragglers": ["wait"]}, "the kinds are"),
        ({"seeds": 0}, "≥ 1"),
        ({"smooth": 0}, "≥ 1"),
        ({"simulate": [0]}, "simulate must be an integer ≥ 1"),
        ({"step_s": -1.0}, "> 0"),
        ({"engine": "ray"}, "'local'"),
        ({"splits": "leased"}, "'static' or 'dynamic'"),
        ({"sync": "async"}, "no place in a comparison"),
        ({"checkpoint": "runs"}, "no place in a comparison"),
        ({"workers": 0}, "workers"),
    ],
)
def test_wrong_arguments_are_told_before_anything_starts(options, told):
    with pytest.raises(ConfigurationError, match=told):
        compare(print, **{"until": "loss=1", "engine": "inline", **options})


def test_a_folder_that_cannot_be_made_is_told_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot make the folder"):
        compare(print, until="loss=1", engine="inline", out=tmp_path / "file")


def test_words_after_an_option_are_its_values():
    given = ["a.py", "--modes", "sync", "ssp:3", "--seeds", "3", "--simulate", "4", "16", "--out", "b"]
    same = ["--modes", "sync", "--modes", "ssp:3", "--seeds", "3", "--simulate", "4", "--simulate", "16"]
    assert repeated(given) == ["a.py", *same, "--out", "b"]


# ── real runs ───────────────────────────────────────────────────────────────────────────────────


def line(worker):
    """Fit y = x · w; one log a step, every value of which says what it was computed from."""
    x = np.random.default_rng(0).standard_normal((240, 3), dtype=np.float32)
    y = x @ np.array([3.0, -2.0, 0.5], np.float32)
    model = worker.model("line", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=0.1))
    read = []
    for rows, targets in worker.batches((x, y), batch_size=20, epochs=2, shuffle=True):
        errors = rows @ model.pull()["w"] - targets
        model.push({"w": 2 * rows.T @ errors / len(rows)})
        worker.step()
        worker.log(loss=float((errors**2).mean()))
        read.append(float(rows.sum()))
    return read, model.pull()["w"].tobytes()


def test_one_worker_without_stragglers_computes_the_same_bits_in_every_mode():
    found = hw.compare(
        line,
        until="loss=0.01",
        modes=["sync", "ssp:3", "async"],
        seeds=1,
        engine="inline",
        workers=1,
        smooth=1,
    )
    values = {mode: found.values[mode, "none", 0][0] for mode in ("sync", "ssp:3", "async")}
    assert values["sync"] == values["ssp:3"] == values["async"]
    ends = {(one.samples, one.steps, one.version, one.last, one.late) for one in found.figures}
    assert len(ends) == 1
    assert "no difference shown" in found.verdict
    assert len(found.rows()) == 3


def test_every_mode_reads_the_same_data_and_the_delays_are_planted():
    slow = "slow:rank=1,factor=3"
    found = hw.compare(
        line,
        until="loss=0.01",
        modes=["sync", "async"],
        stragglers=[slow],
        seeds=1,
        engine="inline",
        step_s=0.004,
    )
    read = {mode: [found.values[mode, slow, 0][rank][0] for rank in (0, 1)] for mode in ("sync", "async")}
    assert read["sync"] == read["async"]
    for one in found.figures:
        planted = {rank.rank: rank.planted for rank in one.ranks}
        steps = one.steps // 2
        assert planted[1] >= (steps - 1) * 2 * 0.004
        assert planted[0] < planted[1] / 2
        assert one.steps == 24


ahead = threading.Event()


def uneven(worker):
    """Rank 1 reads its second batch once rank 0 has read more than half of all; returns how many it read."""
    x = np.arange(240, dtype=np.float32)
    model = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=0.1))
    read = 0
    for _ in worker.batches(x, batch_size=10):
        read += 1
        if read > 12:
            ahead.set()
        if worker.rank == 1:
            assert ahead.wait(60), "rank 0 got no more than its half"
        model.push({"w": np.ones(1, np.float32)})
        worker.step()
        worker.log(loss=1.0)
    return read


def test_with_dynamic_splits_a_fast_worker_reads_what_a_slow_one_does_not():
    ahead.clear()
    found = hw.compare(
        uneven, until="loss=1", modes=["async"], seeds=1, engine="inline", step_s=0.001, splits="dynamic"
    )
    read = found.values["async", "none", 0]
    assert sum(read.values()) == 24
    assert read[0] > 12


def silent(worker):
    """Takes a step, and logs something else."""
    worker.model("m", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=0.1))
    worker.step()
    worker.log(accuracy=1.0)


def test_a_function_that_never_logs_the_metric_is_told_after_one_run():
    with pytest.raises(ConfigurationError, match="never logged 'loss': it logged accuracy"):
        hw.compare(silent, until="loss=1", modes=["sync"], engine="inline", workers=1, step_s=0.001)


def nothing(worker):
    """Does nothing."""


def test_a_function_that_does_nothing_is_told():
    with pytest.raises(ConfigurationError, match="it logged nothing"):
        hw.compare(nothing, until="loss=1", modes=["sync"], engine="inline", workers=1, step_s=0.001)


def broken(worker):
    raise ValueError("no bread")


def test_what_a_training_function_raises_ends_the_comparison():
    with pytest.raises(WorkerError, match="no bread"):
        hw.compare(broken, until="loss=1", modes=["sync"], engine="inline", workers=1, step_s=0.001)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["death:rank=1,step=5", "return:rank=1,step=5,after=1"])
def test_a_worker_that_is_killed_as_planned_is_no_error(kind):
    found = hw.compare(
        line, until="loss=9", modes=["sync", "async"], stragglers=[kind], seeds=1, step_s=0.001, smooth=1
    )
    for one in found.figures:
        values = found.values[one.mode, kind, 0]
        assert (values[1] is None) == kind.startswith("death")
        assert one.steps == (12 + 5 if kind.startswith("death") else 24)
        assert one.reached is not None


def sleepy(worker):
    """Steps that take time and no processor."""
    model = worker.model("m", {"w": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
    for step in range(120):
        time.sleep(0.02)
        model.push({"w": np.ones(8, np.float32)})
        worker.step()
        worker.log(loss=1 / (1 + step))


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 4])
def test_what_is_predicted_is_what_is_measured(workers):
    slow = "slow:rank=0,factor=3"
    modes = ["sync", "async", "ssp:3"]
    found = hw.compare(
        sleepy,
        until="loss=0.01",
        modes=modes,
        stragglers=["none", slow],
        seeds=1,
        workers=workers,
        simulate=[workers],
    )
    for one in found.predictions:
        (run,) = found.of(one.mode, one.straggler)
        # Until the first worker is at its end: from then on the measured cluster has fewer workers.
        assert one.steps_per_s == pytest.approx(pace_while_all_train(run), rel=0.1), one


@pytest.mark.long
def test_the_command_writes_a_report(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import numpy as np\n\nimport headwater as hw\n\n\ndef train(worker):\n"
        "    model = worker.model('m', {'w': np.ones(4, np.float32)}, hw.SGD(lr=0.1))\n"
        "    for step in range(40):\n"
        "        model.push({'w': model.pull()['w']})\n"
        "        worker.step()\n"
        "        worker.log(loss=float((model.pull()['w'] ** 2).sum()))\n"
    )
    command = (
        f"compare {script} --modes sync async --stragglers none slow:rank=0,factor=3 --seeds 2 "
        f"--until loss=0.5 --simulate 4 16 --out {tmp_path / 'out'} --smooth 1"
    )
    done = subprocess.run(
        [sys.executable, "-m", "headwater", *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "without stragglers: " in done.stdout
    assert re.search(r"^sync +\d+\.\d\d .*█", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80 or "reaches" in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(told["runs"]) == 8
    assert len(told["predictions"]) == 2 * 2 * 3
