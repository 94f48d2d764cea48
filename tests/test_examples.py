"""The examples: as programs, by the command, and what they say about wrong arguments."""

import gzip
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from waiting import wait_until

import headwater as hw
from headwater.cli.app import app

EXAMPLES = Path(__file__).parent.parent / "examples"


def program(name, *arguments, seconds=100):
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def data_folder():
    """Where data files are: the folder that HEADWATER_DATA names, or one beside the repository."""
    return Path(os.environ.get("HEADWATER_DATA", EXAMPLES.parent.parent / "shared" / "data"))


def accuracy_in(output):
    printed = re.findall(r"test accuracy (0\.\d+|1\.0+)", output)
    assert len(printed) == 1, output
    return float(printed[0])


def test_numpy_only_finds_the_weights():
    assert "w = [ 3.  -2.   0.5]" in program("numpy_only.py")


@pytest.mark.long
def test_digits_reaches_97_percent_in_synchronous_training():
    assert accuracy_in(program("digits.py", "--workers", 4, "--servers", 2)) >= 0.97


@pytest.mark.long
def test_jax_digits_reaches_95_percent():
    pytest.importorskip("jax", reason="needs JAX: the extra `jax`")
    assert accuracy_in(program("jax_digits.py", "--workers", 2, "--servers", 2)) >= 0.95


@pytest.mark.parametrize("sync", [pytest.param("async", marks=pytest.mark.long), "ssp:3"])
def test_digits_reaches_95_percent_without_rounds(sync, capfd):
    command = ["run", EXAMPLES / "digits.py", "--workers", 4, "--servers", 2, "--sync", sync]
    arguments = [*command, "--engine", "inline", "--set", "epochs=8"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert accuracy_in(result.output + capfd.readouterr().out) >= 0.95


def test_logistic_reaches_84_and_a_half_percent_on_a9a():
    train, test = data_folder() / "a9a.libsvm.gz", data_folder() / "a9a.test.libsvm.gz"
    if not (train.exists() and test.exists()):
        pytest.skip(f"no a9a.libsvm.gz in {data_folder()}: set HEADWATER_DATA to a folder that has it")
    output = program("logistic.py", train, "--test", test, "--workers", 2, "--servers", 2)
    assert accuracy_in(output) >= 0.845
    assert float(re.search(r"area under the curve (0\.\d+)", output)[1]) >= 0.89


def libsvm(path, rows=400):
    """A file whose label is the sign of feature 3 less that of feature 9; some rows have no feature."""
    rng = np.random.default_rng(0)
    lines = []
    for a, b in rng.standard_normal((rows, 2)):
        lines.append(f"{'+1' if a > b else '-1'} 3:{a:.3f} 9:{b:.3f} 12:1")
    lines.append("-1")
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_logistic_separates_generated_rows_and_holds_out_a_fifth(tmp_path):
    logistic = module("logistic")
    settings = {"train": str(libsvm(tmp_path / "rows.gz")), "test": None, "epochs": 10, "lr": 0.5}
    rows, test = logistic.load(settings)
    assert (len(rows.labels), len(test.labels)) == (320, 81)
    result = hw.run(logistic.train, workers=2, engine="inline", settings=settings)
    accuracy, area = result.values[0]
    assert accuracy > 0.95
    assert area > 0.99


def test_gradient_and_area_of_logistic_are_those_of_the_definition():
    logistic = module("logistic")
    rng = np.random.default_rng(1)
    dense = rng.standard_normal((6, 4)) * (rng.random((6, 4)) < 0.5)
    at, columns = np.nonzero(dense)
    starts = np.concatenate([[0], np.cumsum(np.bincount(at, minlength=6))])
    labels = np.array([0.0, 1, 1, 0, 1, 0])
    rows = logistic.Rows(labels, starts, columns, dense[at, columns])
    picked = np.array([4, 0, 5])
    weight = rng.standard_normal(4)
    margins = dense[picked] @ weight + 0.5
    errors = (1 / (1 + np.exp(-margins)) - labels[picked]) / 3
    by_weight, by_bias = rows.take(picked).gradient(weight, 0.5)
    np.testing.assert_allclose(by_weight, dense[picked].T @ errors)
    assert by_bias == pytest.approx(errors.sum())
    assert logistic.area_under_curve(np.array([0, 1, 0, 1.0]), np.array([1.0, 2, 2, 3])) == 3.5 / 4


# ── with tables ─────────────────────────────────────────────────────────────────────────────────


def figure_in(output, name):
    """The number that an example printed under this name, and that it printed its speed."""
    printed = re.findall(rf"test {name} (\d\.\d+), \d+ samples/s", output)
    assert len(printed) == 1, output
    return float(printed[0])


@pytest.mark.parametrize("sync", ["sync", "async"])
def test_recommender_predicts_the_last_tenth_of_movielens_within_0_96(sync):
    ratings = data_folder() / "ml-100k.ratings.tsv.gz"
    if not ratings.exists():
        pytest.skip(f"no {ratings.name} in {data_folder()}: set HEADWATER_DATA to a folder that has it")
    output = program("recommender.py", "--ratings", ratings, "--servers", 2, "--sync", sync)
    assert figure_in(output, "RMSE") <= 0.96


@pytest.mark.parametrize(("model", "bound"), [("dlrm", 0.88), ("mf", 0.99)])
def test_recommender_learns_generated_ratings(model, bound):
    recommender = module("recommender")
    settings = {"model": model, "epochs": 2}
    result = hw.run(recommender.train, workers=2, engine="inline", settings=settings)
    stars = recommender.generate()[:, 2]
    assert result.values[0] == result.values[1] < bound < stars.std()


def test_what_is_known_of_a_rating_is_what_came_in_earlier_seconds():
    recommender = module("recommender")
    rng = np.random.default_rng(0)
    keys, times, values = rng.integers(5, size=80), np.sort(rng.integers(30, size=80)), rng.random(80)
    earlier = recommender.Earlier(keys, times)
    last = earlier.last(np.arange(80), 4)
    for i in range(80):
        before = [j for j in range(80) if keys[j] == keys[i] and times[j] < times[i]]
        assert earlier.count[i] == len(before)
        assert earlier.sums(values)[i] == pytest.approx(values[before].sum())
        assert earlier.sums(values, last=3)[i] == pytest.approx(values[before[-3:]].sum())
        assert [j for j in last[i] if j >= 0] == before[::-1][:4]


def test_a_rating_of_the_last_tenth_changes_nothing_that_was_known_before():
    recommender = module("recommender")
    rows = recommender.read("")
    changed = rows.copy()
    changed[-100:, 2] = 6 - changed[-100:, 2]
    plain, other = recommender.Ratings(rows), recommender.Ratings(changed)
    until = np.flatnonzero(rows[:, 3] <= rows[-100, 3])
    for one, two in zip(plain.batch(until)[:-1], other.batch(until)[:-1], strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("sync", ["sync", "async"])
def test_ctr_learns_the_planted_model(sync):
    ctr = module("ctr")
    result = hw.run(ctr.train, workers=2, engine="inline", sync=sync, settings={"most": 20_000})
    # 0.764 ± 0.005 and 0.779 ± 0.002 over 30 runs each, depending on who came first; 0.5 is guessing.
    assert result.values[0] == result.values[1] > 0.7


def test_ctr_reads_files_in_criteos_format(tmp_path):
    ctr = module("ctr")
    labels, _, _ = ctr.generate(400)
    rng = np.random.default_rng(0)
    lines = []
    for label in labels:
        numbers = ["" if rng.random() < 0.2 else str(rng.integers(-1, 9)) for _ in range(13)]
        categories = ["" if rng.random() < 0.2 else f"{int(label):08x}" for _ in range(26)]
        lines.append("\t".join([str(int(label)), *numbers, *categories]))
    path = tmp_path / "rows.tsv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    got, numbers, ids = ctr.read(str(path), 300)
    assert (got == labels[:300]).all()
    assert (numbers.shape, ids.shape, ids.dtype) == ((300, 13), (300, 26), np.int64)
    assert len(np.unique(ids)) == 3 * 26  # 0, 1 and missing, each apart in each column
    trained = hw.run(ctr.train, workers=2, engine="inline", settings={"rows": str(path), "epochs": 3})
    assert min(trained.values) > 0.9


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("recommender", ["--ratings", "/no/such/file"], "no file /no/such/file"),
        ("recommender", ["--ratings", __file__], "expected USER ITEM RATING TIMESTAMP"),
        ("recommender", ["--model", "svd"], "argument --model: invalid choice: 'svd'"),
        ("recommender", ["--sync", "sometimes"], "sync: got 'sometimes', expected"),
        ("ctr", ["--rows", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        ("ctr", ["--rows", __file__], "line 1: expected LABEL, 13 integers, 26 hexadecimal"),
        ("ctr", ["--most", "5"], "most must be 10 or more, got 5"),
        ("ctr", ["--workers", "0"], "workers must be an integer ≥ 1, got 0"),
        ("digits", ["--workers", "none"], "argument --workers: invalid int value"),
        ("digits", ["--workers", "0"], "workers must be an integer ≥ 1, got 0"),
        ("digits", ["--sync", "sometimes"], "sync: got 'sometimes', expected"),
        ("logistic", [], "the following arguments are required: train"),
        ("logistic", ["/no/such/file"], "No such file or directory: '/no/such/file'"),
        ("logistic", [__file__], "line 1: expected LABEL INDEX:VALUE"),
    ],
)
def test_wrong_arguments_give_a_message_and_exit_code_2(name, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        module(name).main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


# ── trained far apart ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "most"),
    [
        pytest.param("ddp", 1300.0, marks=pytest.mark.long),
        ("diloco", 120.0),
        ("decoupled", 25.0),
        pytest.param("async", 120.0, marks=pytest.mark.long),
    ],
)
def test_a_language_model_learns_by_each_method_and_says_what_it_sent(method, most, tmp_path):
    """Of words that follow a rule: each method comes below what guessing letters by frequency would give."""
    text = tmp_path / "text.txt"
    numbers = np.random.default_rng(0)
    text.write_text(" ".join(np.array(["alpha", "beta", "gamma", "delta"])[numbers.integers(0, 4, 4000)]))
    diloco = module("diloco")
    sizes = {"dim": 32, "layers": 1, "context": 16, "steps": 60, "every": 10, "lr": 1e-2}
    settings = {"text": str(text), "method": method, "overlap": 1, **sizes}
    result = hw.run(diloco.train, workers=2, engine="inline", sync=diloco.SYNC[method], settings=settings)
    found = result.values[0]
    assert found["loss"] < 2.2
    assert 0 < found["bytes/token"] < most


@pytest.mark.parametrize("rule", ["fedavg", pytest.param("fedadam", marks=pytest.mark.long)])
def test_clients_with_different_digits_that_come_and_go_learn_all_of_them(rule):
    federated = module("federated")
    settings = {"rule": rule, "rounds": 60, "away": 0.3}
    result = hw.run(federated.train, workers=3, engine="inline", settings=settings)
    # 0.776 ± 0.015 over 30 runs, in which threads drew from one generator; a client alone knows half.
    assert min(result.values) > 0.6
    assert len(set(result.values)) == 1


@pytest.mark.long
def test_local_steps_on_text8_come_close_to_synchronous_training_with_far_fewer_bytes():
    text = data_folder() / "text8.head.gz"
    if not text.exists():
        pytest.skip(f"no text8.head.gz in {data_folder()}: set HEADWATER_DATA to a folder that has it")
    sizes = ("--dim", 64, "--layers", 2, "--steps", 480)

    def trained(method):
        output = program("diloco.py", text, "--method", method, *sizes, seconds=900)
        return [float(re.search(rf"{name} ([0-9.e+]+)", output)[1]) for name in ("loss", "bytes/token")]

    (loss, together), (apart, few) = trained("ddp"), trained("diloco")
    assert apart < 1.08 * loss
    assert together / few >= 20


# ── events as they arrive, and readers beside training ──────────────────────────────────────────


def test_online_learns_from_a_stream_and_what_is_served_is_its_events(tmp_path):
    """Counted by a table and by the offsets that the version names; half of the events come later."""
    online = module("online")
    online.produce(tmp_path, 3000, rate=1e9)
    (tmp_path / "done").unlink()
    rng = np.random.default_rng(2)
    users, items = rng.integers(0, online.USERS, 4000), rng.integers(0, online.ITEMS, 4000)
    labels = rng.random(4000) < online.chances(users, items)
    scores = []

    def served(follower):
        with follower.pin() as view:
            scores.append(view.rows("weights", online.ids_of(users, items)).sum(axis=(1, 2)))
            return online.report(view, tmp_path, labels, scores[-1])

    addresses, results = [], []
    options = {"workers": 2, "servers": 2, "sync": "async", "engine": "inline", "deadline": 60}
    arguments = {"settings": {"folder": str(tmp_path)}, "started": addresses.append, **options}
    training = threading.Thread(target=lambda: results.append(hw.run(online.train, **arguments)))
    training.start()
    try:
        wait_until(lambda: addresses)
        with hw.follow(addresses[0], models=(), tables=["weights", "counts"], every=1) as follower:
            version = follower.version.number
            counts = [served(follower)]
            while counts[-1][0] < 3000:
                version = follower.wait(version + 1, deadline=60).number  # which may be shown by now
                counts.append(served(follower))
            online.produce(tmp_path, 3000, rate=1e9)
            training.join(60)
            wait_until(lambda: follower.failure)  # the training has ended
            counts.append(served(follower))
    finally:
        (tmp_path / "done").touch()
        training.join(60)
    assert all(counted == read for counted, read in counts if read is not None)
    assert (3000, 3000) in counts
    assert sum(results[0].values) == 6000
    assert 3000 <= counts[-1][0] <= 6000  # of the last versions some may not have come before the end
    assert online.area_under_curve(labels, scores[-1]) > 0.7


def test_rollouts_play_with_pinned_versions_and_the_learner_says_how_stale_they_were(tmp_path):
    rollouts = module("rollouts")
    threads, addresses = [], []

    def started(address):
        addresses.append(address)
        for number in range(2):
            arguments = address, tmp_path, number, 16
            threads.append(threading.Thread(target=rollouts.roll_out, args=arguments))
            threads[-1].start()

    settings = {"folder": str(tmp_path), "steps": 60}
    options = {"workers": 1, "sync": "async", "engine": "inline", "deadline": 60}
    result = hw.run(rollouts.train, settings=settings, started=started, **options)
    for thread in threads:
        thread.join(60)
    ((reward, mean, most),) = result.values
    assert reward > 0.6  # at first one in two walks to the left
    assert 0 <= mean <= most < 60


@pytest.mark.long
def test_online_serves_each_event_once_from_processes_of_their_own():
    told = program("online.py", "--events", 30_000, "--rate", 1500, "--every", 0.2)
    served = re.findall(r"(\d+) events, (\d+) by its offsets", told)
    assert served
    assert all(counted == read for counted, read in served)
    assert told.endswith("30000 events\n")


@pytest.mark.long
def test_rollouts_reach_the_right_end_from_processes_of_their_own():
    told = program("rollouts.py", "--steps", 80)
    assert float(re.findall(r"reward (-?\d\.\d+)", told)[0]) > 0.6
