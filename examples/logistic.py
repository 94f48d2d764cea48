"""Sparse logistic regression on a file in libsvm's format, plain or .gz, with NumPy alone.

    python examples/logistic.py a9a.libsvm.gz --test a9a.test.libsvm.gz --workers 4

Each line is `LABEL INDEX:VALUE INDEX:VALUE …`; a label above 0 is the positive class. Without `--test`
every fifth line is held out. Prints accuracy and area under the ROC curve there.
"""

import argparse
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import headwater as hw


@dataclass(frozen=True)
class Rows:
    """Sparse rows with labels 0 or 1; row i has `columns` and `values` from starts[i] to starts[i + 1]."""

    labels: np.ndarray
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        """A copy of some rows."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        at = np.repeat(self.starts[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        return Rows(self.labels[rows], starts, self.columns[at], self.values[at])

    def margins(self, weight: np.ndarray, bias: float) -> np.ndarray:
        """x · weight + bias of each row."""
        row_of = np.repeat(np.arange(len(self.labels)), np.diff(self.starts))
        return np.bincount(row_of, self.values * weight[self.columns], len(self.labels)) + bias

    def gradient(self, weight: np.ndarray, bias: float) -> tuple[np.ndarray, float]:
        """Of the mean logistic loss, with respect to weight and bias."""
        errors = (1 / (1 + np.exp(-self.margins(weight, bias))) - self.labels) / len(self.labels)
        by_value = np.repeat(errors, np.diff(self.starts)) * self.values
        return np.bincount(self.columns, by_value, len(weight)), errors.sum()


def read(path: str) -> Rows:
    """Read a libsvm file.

    Raises:
        ValueError: a line that is not in that format; names it.
        OSError: the file cannot be read.
    """
    labels, lengths, columns, values = [], [0], [], []
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for number, line in enumerate(lines, start=1):
            label, *features = line.split() or [""]
            try:
                labels.append(float(label) > 0)
                pairs = [feature.split(":") for feature in features]
                columns.extend(int(index) for index, _ in pairs)
                values.extend(float(value) for _, value in pairs)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected LABEL INDEX:VALUE …, got {line!r}"
                ) from error
            lengths.append(len(pairs))
    if not labels or min(columns, default=0) < 0:
        raise ValueError(f"{path}: no rows, or an index below 0")
    return Rows(
        np.array(labels, np.float64), np.cumsum(lengths), np.array(columns, np.int64), np.array(values)
    )


def load(settings: dict) -> tuple[Rows, Rows]:
    """The rows to train on and those to test on."""
    rows = read(settings["train"])
    if settings["test"]:
        return rows, read(settings["test"])
    held_out = np.arange(len(rows.labels)) % 5 == 0
    return rows.take(np.flatnonzero(~held_out)), rows.take(np.flatnonzero(held_out))


def area_under_curve(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a positive row has a higher score than a negative one; ties count half."""
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    average = np.cumsum(count) - (count - 1) / 2
    positive, negative = labels.sum(), (1 - labels).sum()
    above = average[rank][labels > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative)) if positive * negative else float("nan")


def train(worker: hw.Worker) -> tuple[float, float]:
    """Train on this worker's rows; returns accuracy and area under the curve on the test rows."""
    rows, test = load(worker.settings)
    features = 1 + max(part.columns.max(initial=0) for part in (rows, test))
    zeros = {"weight": np.zeros(features, np.float32), "bias": np.zeros(1, np.float32)}
    model = worker.model("logistic", zeros, hw.Adagrad(lr=worker.settings["lr"]))
    order = np.arange(len(rows.labels))
    for batch in worker.batches(order, batch_size=256, epochs=worker.settings["epochs"], shuffle=True):
        now = model.pull()
        weight, bias = rows.take(batch).gradient(now["weight"], now["bias"][0])
        model.push({"weight": weight, "bias": [bias]})
        worker.step()

    worker.barrier()
    now = model.pull()
    margins = test.margins(now["weight"], now["bias"][0])
    accuracy = float(((margins > 0) == test.labels).mean())
    area = area_under_curve(test.labels, margins)
    if worker.rank == 0:
        print(f"test accuracy {accuracy:.4f}, area under the curve {area:.4f}")
    return accuracy, area


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", help="libsvm file, plain or .gz")
    parser.add_argument("--test", help="libsvm file to test on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--sync", default="sync", help="sync, async or ssp:N")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    options = parser.parse_args()
    settings = {
        "train": str(Path(options.train).resolve()),
        "test": options.test and str(Path(options.test).resolve()),
        "epochs": options.epochs,
        "lr": options.lr,
    }
    try:
        load(settings)  # what is wrong with a file is said here, once
        hw.run(train, workers=options.workers, servers=options.servers, sync=options.sync, settings=settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
