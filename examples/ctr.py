"""Click prediction with a DeepFM (Guo et al. 2017) on rows in Criteo's format: one table for all ids.

    python examples/ctr.py --rows day_0.tsv.gz --workers 2 --servers 2 --sync async
    headwater run examples/ctr.py --set rows=day_0.tsv.gz --set most=1000000

A line is LABEL, 13 integers and 26 hexadecimal categories between tabs, where any but the label may be
missing; plain or .gz. Without a file there are generated rows: zipf-distributed categories, clicks of a
planted model. Trains on the first nine tenths and prints the area under the ROC curve on the last tenth.
"""

import argparse
import gzip
import itertools
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import headwater as hw

NUMBERS, CATEGORIES = 13, 26
DEFAULTS = {"rows": "", "most": 100_000, "epochs": 1, "lr": 0.02, "batch": 256}
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Labels float32[n], numbers float32[n, 13] and ids int64[n, 26]."""


def ids_of(categories: np.ndarray) -> np.ndarray:
    """Ids int64[n, 26] that are different in each column; of a missing category (−1) it is a negative one."""
    column = np.arange(CATEGORIES)
    return np.where(categories < 0, -1 - column, categories + (column << 32))


def generate(count: int) -> Rows:
    """Rows whose clicks depend on the numbers, on each category and on pairs of them; the same each time."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(count, NUMBERS)).astype(np.float32)
    kinds = np.geomspace(4, 50_000, CATEGORIES).astype(np.int64)
    categories = rng.zipf(1.4, (count, CATEGORIES)) % kinds
    categories[rng.random((count, CATEGORIES)) < 0.02] = -1
    weights = [rng.normal(0, 0.4, (kind + 1, 3)) for kind in kinds]  # the last is that of a missing one
    drawn = np.stack([w[c] for w, c in zip(weights, categories.T, strict=True)])
    score = drawn[:, :, 0].sum(axis=0) + numbers @ rng.normal(0, 0.2, NUMBERS) - 1
    score += (2 * drawn[:13, :, 1:] * drawn[13:, :, 1:]).sum(axis=(0, 2))
    labels = (rng.random(count) < 1 / (1 + np.exp(-score))).astype(np.float32)
    return labels, numbers, ids_of(categories)


def read(path: str, most: int) -> Rows:
    """The first rows of a file, `most` at most.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line that is not in that format; names it.
    """
    labels, numbers, categories = [], [], []
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for number, line in enumerate(itertools.islice(lines, most), start=1):
            label, *cells = line.rstrip("\n").split("\t")
            try:
                if len(cells) != NUMBERS + CATEGORIES:
                    raise ValueError(f"{len(cells)} cells")
                labels.append(float(label))
                numbers.append([float(cell or 0) for cell in cells[:NUMBERS]])
                categories.append([int(cell, 16) if cell else -1 for cell in cells[NUMBERS:]])
            except ValueError as error:
                expected = f"LABEL, {NUMBERS} integers, {CATEGORIES} hexadecimal categories between tabs"
                raise ValueError(f"{path}, line {number}: expected {expected}: {error}") from error
    if len(labels) < 10:
        raise ValueError(f"{path}: {len(labels)} rows, expected 10 or more")
    counts = np.log1p(np.maximum(numbers, 0)).astype(np.float32)
    return np.array(labels, np.float32), counts, ids_of(np.array(categories, np.int64))


def load(rows: str, most: int) -> Rows:
    """Rows of a file, or generated ones."""
    if most < 10:
        raise ValueError(f"most must be 10 or more, got {most}")
    return read(rows, most) if rows else generate(most)


class DeepFm(nn.Module):
    """A weight for each id, a product of vectors for each pair of ids, and a network of all of them."""

    def __init__(self, worker: hw.Worker, lr: float, dim: int = 8) -> None:
        super().__init__()
        rule, rare = hw.Adagrad(lr=lr), hw.AfterCount(2)  # ids of one batch only get no row
        self.ids = hw.torch.Embedding(worker, "ids", 1 + dim, rule, admission=rare)
        self.numbers = nn.Linear(NUMBERS, 1)
        self.deep = nn.Sequential(
            nn.Linear(NUMBERS + CATEGORIES * dim, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def forward(self, numbers: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = self.ids(ids)
        vectors = rows[:, :, 1:]
        pairs = vectors.sum(dim=1).square() - vectors.square().sum(dim=1)
        deep = self.deep(torch.cat([numbers, vectors.flatten(1)], dim=1))
        return (self.numbers(numbers) + deep).squeeze(1) + rows[:, :, 0].sum(dim=1) + pairs.sum(dim=1) / 2


def area_under_curve(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a clicked row has a higher score than one that was not; ties count half."""
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    average = np.cumsum(count) - (count - 1) / 2
    positive, negative = labels.sum(), (1 - labels).sum()
    above = average[rank][labels > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative)) if positive * negative else float("nan")


def train(worker: hw.Worker) -> float:
    """Train on this worker's part; returns the area under the curve on the last tenth."""
    if unknown := worker.settings.keys() - DEFAULTS.keys():
        raise hw.errors.ConfigurationError(
            f"unknown settings {sorted(unknown)}: choose from {list(DEFAULTS)}"
        )
    options = {**DEFAULTS, **worker.settings}
    torch.manual_seed(0)
    labels, numbers, ids = map(torch.from_numpy, load(options["rows"], options["most"]))
    known = len(labels) - len(labels) // 10
    model = DeepFm(worker, options["lr"])
    opt = hw.torch.DistributedOptimizer(worker, model, hw.Adam(lr=1e-3))
    began = time.perf_counter()
    data = labels[:known], numbers[:known], ids[:known]
    for y, *inputs in worker.batches(data, options["batch"], epochs=options["epochs"], shuffle=True):
        opt.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(*inputs), y)
        loss.backward()
        opt.step()
        worker.log(loss=loss.item())

    worker.barrier()  # everybody has pushed everything: from here on all see one version
    rate = known * options["epochs"] / (time.perf_counter() - began)
    opt.pull_parameters()
    with torch.no_grad():
        scores = model(numbers[known:], ids[known:])
    area = area_under_curve(labels[known:].numpy(), scores.numpy())
    if worker.rank == 0:
        print(f"test AUC {area:.4f}, {rate:.0f} samples/s, {len(model.ids.table)} rows")
    return area


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="file in Criteo's format, plain or .gz")
    parser.add_argument("--most", type=int, default=DEFAULTS["most"], help="rows to read or generate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--sync", default="sync", help="sync, async or ssp:N")
    parser.add_argument("--epochs", type=int, default=DEFAULTS["epochs"])
    parser.add_argument("--lr", type=float, default=DEFAULTS["lr"], help="of the table")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("rows", "most", "epochs", "lr")}
    try:
        load(options.rows, min(options.most, 1000))  # what is wrong with a file's start is said here, once
        hw.run(train, workers=options.workers, servers=options.servers, sync=options.sync, settings=settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
