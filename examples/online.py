"""Learn from events as they arrive, and serve what was learned from another process.

    python examples/online.py --events 40000 --workers 2 --servers 2

Three kinds of processes. A producer appends clicks to growing files. Workers read them as a stream and train
a table of weights, asynchronously. A ranker follows the training: it scores pairs of users and items that
nobody has trained on, and prints which version it serves, how far that is behind the newest event (lag), the
area under the ROC curve (AUC) of its scores, and how many events are in what it serves. That number is
counted twice: by the table, and from the offsets that the version names. They are equal, whatever was killed
before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import headwater as hw

USERS, ITEMS, PARTITIONS = 400, 200, 4
DEFAULTS = {"folder": "", "lr": 0.3, "batch": 64}


class UntilDone(hw.data.Tail):
    """Events that are appended to files, until there is a file `done`."""

    @property
    def endless(self) -> bool:
        return not (self.directory / "done").exists()

    @endless.setter
    def endless(self, value: bool) -> None:
        pass


def chances(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The planted model: how likely these users click these items."""
    rng = np.random.default_rng(0)
    of_user, of_item = rng.normal(0, 1.5, USERS), rng.normal(0, 1.5, ITEMS)
    return 1 / (1 + np.exp(-of_user[users] - of_item[items]))


def produce(folder: Path, events: int, rate: float) -> None:
    """Append so many events, about `rate` a second; each has the time of its making."""
    rng = np.random.default_rng(1)
    began, made = time.monotonic(), 0
    files = [(folder / f"clicks-{number}.jsonl").open("a") for number in range(PARTITIONS)]
    while made < events:
        due = min(events, int((time.monotonic() - began) * rate) + 1)
        users, items = rng.integers(0, USERS, due - made), rng.integers(0, ITEMS, due - made)
        clicks = (rng.random(due - made) < chances(users, items)).astype(int)
        for user, item, click in zip(users.tolist(), items.tolist(), clicks.tolist(), strict=True):
            event = {"user": user, "item": item, "click": click, "time": time.time()}
            files[user % PARTITIONS].write(json.dumps(event) + "\n")
        for file in files:
            file.flush()
        made = due
        time.sleep(0.02)
    for file in files:
        file.close()
    (folder / "done").touch()


def ids_of(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """One id for each user and each item, int64[n, 2]."""
    return np.stack([users, USERS + items], axis=1)


def train(worker: hw.Worker) -> int:
    """Train on this worker's partitions until no more events come; returns how many there were."""
    options = {**DEFAULTS, **worker.settings}
    weights = worker.table("weights", 1, hw.Adagrad(lr=options["lr"]))
    counts = worker.table("counts", 1, hw.Accumulate())
    seen = 0
    for batch in worker.batches(UntilDone(options["folder"], "*.jsonl"), options["batch"], linger=0.05):
        ids = ids_of(batch["user"], batch["item"])
        score = weights.pull(ids)[:, :, 0].sum(axis=1)
        slope = (1 / (1 + np.exp(-score)) - batch["click"]).astype(np.float32)
        weights.push(ids.reshape(-1), np.repeat(slope, 2)[:, np.newaxis])
        counts.push(batch["item"], np.ones((len(slope), 1), np.float32))
        worker.step()
        seen += len(slope)
        worker.log(lag=time.time() - batch["time"].max())
    return seen


def area_under_curve(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a clicked pair has a higher score than one that was not."""
    rank = np.empty(len(scores))
    rank[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    positive = labels.sum()
    above = rank[labels > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(labels) - positive)))


def offsets_of(view: hw.View) -> Iterator[tuple[str, int]]:
    """How many bytes of each file are in this version."""
    for position in view.positions.last:
        for stream in position.streams:
            for name, offset in stream.offsets:
                yield name, int(offset)


def serve(address: str, folder: Path, every: float) -> None:
    """Score what nobody trains on with every version that comes; ends with the training."""
    rng = np.random.default_rng(2)
    users, items = rng.integers(0, USERS, 4000), rng.integers(0, ITEMS, 4000)
    labels = rng.random(4000) < chances(users, items)
    tables = ["weights", "counts"]
    with hw.follow(address, models=(), tables=tables, every=f"{every:g}s") as follower:
        while True:
            with follower.pin() as view:
                report(view, folder, labels, view.rows("weights", ids_of(users, items)).sum(axis=(1, 2)))
            time.sleep(every)
            try:
                follower.wait()
            except hw.errors.StalledError:
                print(f"the training has ended: {follower.failure}", flush=True)
                return


def report(view: hw.View, folder: Path, labels: np.ndarray, scores: np.ndarray) -> tuple[int, int | None]:
    """One line about a version; how many events the table has counted in it, and how many its offsets say,
    which are there for as long as every worker reads."""
    read, newest = 0, 0.0
    for name, offset in offsets_of(view):
        with (folder / name).open("rb") as file:
            lines = file.read(offset).splitlines()
        read += len(lines)
        if lines:
            newest = max(newest, json.loads(lines[-1])["time"])
    counted = sum(int(rows.sum()) for _, rows in view.scan("counts"))
    reading = all(position.streams for position in view.positions.last)
    lag = f"lag {time.time() - newest:.2f} s, " if newest else ""
    by = f"{read} by its offsets" if reading else "no more come"
    quality = area_under_curve(labels, scores)
    print(f"{view.version}: {lag}AUC {quality:.3f}, {counted} events, {by}", flush=True)
    return counted, read if reading else None


def run(options: argparse.Namespace) -> int:
    """Start a producer, the training and a ranker; returns how many events the workers were given."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        me = [sys.executable, __file__]
        rate = ["--events", str(options.events), "--rate", str(options.rate)]
        producer = subprocess.Popen([*me, "--produce", str(folder), *rate])
        rankers: list[subprocess.Popen[bytes]] = []

        def started(address: str) -> None:
            serving = ["--serve", address, "--folder", str(folder), "--every", str(options.every)]
            rankers.append(subprocess.Popen([*me, *serving]))

        try:
            result = hw.run(
                train,
                workers=options.workers,
                servers=options.servers,
                replicas=options.replicas,
                sync="async",
                settings={"folder": str(folder)},
                started=started,
            )
            for ranker in rankers:
                ranker.wait(60)
        finally:
            for process in (producer, *rankers):
                process.kill()
                process.wait()
    return sum(result.values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=40_000)
    parser.add_argument("--rate", type=float, default=4000, help="events a second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two versions of the ranker")
    parser.add_argument("--folder", default="", help="for the events; without, a temporary one")
    parser.add_argument("--produce", default="", metavar="FOLDER", help="be the producer")
    parser.add_argument("--serve", default="", metavar="ADDRESS", help="be a ranker of that cluster")
    options = parser.parse_args()
    if options.produce:
        produce(Path(options.produce), options.events, options.rate)
    elif options.serve:
        serve(options.serve, Path(options.folder), options.every)
    else:
        print(f"{run(options)} events")


if __name__ == "__main__":
    main()
