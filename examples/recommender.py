"""Rating prediction with tables: a small DLRM, or matrix factorisation, on ratings in MovieLens' format.

    python examples/recommender.py --ratings ml-100k/u.data --workers 2 --servers 2 --sync async
    headwater run examples/recommender.py --set ratings=ml-100k/u.data --set model=mf

A line is `USER ITEM RATING TIMESTAMP`, plain or .gz; without a file there are generated ones. Trains on the
first nine tenths by time and prints the root mean squared error on the last tenth.

There most users are new, so what a table has learned of a user does not help. The DLRM predicts each rating
from what came before that second: counts and averages of the user's and the item's ratings, and the user's
last 100 items. In the last tenth, earlier ratings of that tenth are such inputs too; nothing is trained on
them. Matrix factorisation knows users and items by their tables alone.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import headwater as hw

NOBODY = -1
HISTORY = 100
DEFAULTS = {"ratings": "", "model": "dlrm", "epochs": 4, "lr": 0.05, "batch": 256}


def generate(users: int = 500, items: int = 800, count: int = 30_000) -> np.ndarray:
    """Ratings int64[count, 4] of users who come one after another; the same each time."""
    rng = np.random.default_rng(0)
    user = np.minimum(rng.zipf(1.3, count) * rng.integers(1, users, count) % users, users - 1)
    item = rng.zipf(1.2, count) % items
    taste, kind = rng.normal(0, 0.5, (users, 4)), rng.normal(0, 0.5, (items, 4))
    score = 3.5 + rng.normal(0, 0.5, users)[user] + rng.normal(0, 0.5, items)[item]
    score += (taste[user] * kind[item]).sum(axis=1) + rng.normal(0, 0.7, count)
    when = 10_000 * user + rng.integers(0, 50_000, count)
    return np.stack([user, item, np.clip(score.round(), 1, 5).astype(np.int64), when], axis=1)


def read(path: str) -> np.ndarray:
    """Ratings int64[n, 4] of a file, or generated ones, in order of time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not in that format.
    """
    if path and not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        rows = np.loadtxt(path, dtype=np.int64, ndmin=2) if path else generate()
    except ValueError as error:
        raise ValueError(f"{path}: expected USER ITEM RATING TIMESTAMP: {error}") from error
    if rows.shape[1] != 4 or len(rows) < 10:
        raise ValueError(f"{path}: expected 10 or more lines of 4 columns, got {rows.shape}")
    return rows[np.argsort(rows[:, 3], kind="stable")]


class Ratings:
    """Ratings with what was known before the second in which each was given."""

    def __init__(self, rows: np.ndarray) -> None:
        self.users, self.items, stars, self.times = rows.T
        self.stars = stars.astype(np.float32)
        self.of_item = Earlier(self.items, self.times)
        popular = self.of_item.sums(self.stars - 3.5) / (self.of_item.count + 4)
        self.deviations = self.stars - 3.5 - popular
        self.of_user = by = Earlier(self.users, self.times)
        features = [popular, np.log1p(self.of_item.count) / 3, np.log1p(by.count) / 3]
        for of_rating in (self.deviations, self.deviations**2, self.stars == 5, self.stars <= 2):
            features.append(by.sums(of_rating) / (by.count + 4))
        features.append(by.sums(self.deviations, last=10) / (np.minimum(by.count, 10) + 4))
        self.features = np.stack(features, axis=1).astype(np.float32)

    def batch(self, rows: np.ndarray) -> list[torch.Tensor]:
        """users, items, features [n, 8], history [n, HISTORY] of items and their weights, stars."""
        past = self.of_user.last(rows, HISTORY)
        length = np.maximum((past >= 0).sum(axis=1, keepdims=True), 1)
        history = np.where(past >= 0, self.items[past], NOBODY)
        weights = np.where(past >= 0, self.deviations[past] / np.sqrt(length), 0).astype(np.float32)
        parts = self.users[rows], self.items[rows], self.features[rows], history, weights, self.stars[rows]
        return [torch.from_numpy(part) for part in parts]


class Earlier:
    """For each event, those of the same key at strictly earlier times; `count` of them."""

    def __init__(self, keys: np.ndarray, times: np.ndarray) -> None:
        self.order = np.lexsort((times, keys))
        key, moment, at = keys[self.order], times[self.order], np.arange(len(keys))
        begins = np.append(True, key[1:] != key[:-1])
        later = begins | np.append(True, moment[1:] != moment[:-1])
        self.start, self.stop = np.empty_like(at), np.empty_like(at)
        self.start[self.order] = np.maximum.accumulate(np.where(begins, at, 0))
        self.stop[self.order] = np.maximum.accumulate(np.where(later, at, 0))
        self.count = self.stop - self.start

    def sums(self, values: np.ndarray, last: int | None = None) -> np.ndarray:
        """Of each event, the sum of the values of the earlier ones, or of the last so many."""
        totals = np.append(0.0, np.cumsum(values[self.order], dtype=np.float64))
        start = self.start if last is None else np.maximum(self.start, self.stop - last)
        return totals[self.stop] - totals[start]

    def last(self, events: np.ndarray, most: int) -> np.ndarray:
        """Of some events, the last earlier ones, the latest first: [n, most], -1 where there are fewer."""
        at = self.stop[events, None] - 1 - np.arange(most)
        return np.where(at >= self.start[events, None], self.order[at], -1)


class Factorisation(nn.Module):
    """3.5 + the user's bias + the item's bias + their vectors' product."""

    def __init__(self, worker: hw.Worker, lr: float) -> None:
        super().__init__()
        table = {"rule": hw.Adagrad(lr=lr, weight_decay=3e-4), "initializer": hw.Normal(std=0.01)}
        self.users = hw.torch.Embedding(worker, "users", 33, **table)
        self.items = hw.torch.Embedding(worker, "items", 33, **table)

    def forward(self, users, items, features, history, weights):
        user, item = self.users(users), self.items(items)
        return 3.5 + (user[:, 1:] * item[:, 1:]).sum(dim=1) + user[:, 0] + item[:, 0]


class Dlrm(nn.Module):
    """A network of the features, and the item's vector times two bags of the user's earlier items."""

    def __init__(self, worker: hw.Worker, lr: float) -> None:
        super().__init__()
        table = {"rule": hw.Adagrad(lr=lr, weight_decay=5e-4), "initializer": hw.Normal(std=0.05)}
        self.items = hw.torch.Embedding(worker, "items", 33, **table)
        bag = hw.torch.EmbeddingBag
        self.liked = bag(worker, "liked", 32, mode="sum", padding_idx=NOBODY, **table)
        self.seen = bag(worker, "seen", 32, mode="mean", padding_idx=NOBODY, **table)
        self.dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, users, items, features, history, weights):
        item = self.items(items)
        user = self.liked(history, per_sample_weights=weights) + self.seen(history)
        return 3.5 + (user * item[:, 1:]).sum(dim=1) + item[:, 0] + self.dense(features).squeeze(1)


def train(worker: hw.Worker) -> float:
    """Train on this worker's part; returns the root mean squared error on the last tenth."""
    if unknown := worker.settings.keys() - DEFAULTS.keys():
        raise hw.errors.ConfigurationError(
            f"unknown settings {sorted(unknown)}: choose from {list(DEFAULTS)}"
        )
    options = {**DEFAULTS, **worker.settings}
    torch.manual_seed(0)
    ratings = Ratings(read(options["ratings"]))
    known = len(ratings.stars) - len(ratings.stars) // 10
    kinds = {"dlrm": Dlrm, "mf": Factorisation}
    if options["model"] not in kinds:
        raise hw.errors.ConfigurationError(f"model={options['model']!r}: choose from {list(kinds)}")
    kind = kinds[options["model"]]
    model = kind(worker, options["lr"])
    opt = hw.torch.DistributedOptimizer(worker, model, hw.Adam(lr=5e-3))
    began = time.perf_counter()
    rows = np.arange(known)
    for part in worker.batches(rows, options["batch"], epochs=options["epochs"], shuffle=True):
        *inputs, stars = ratings.batch(part)
        opt.zero_grad()
        loss = functional.mse_loss(model(*inputs), stars)
        loss.backward()
        opt.step()
        worker.log(loss=loss.item())

    worker.barrier()  # everybody has pushed everything: from here on all see one version
    rate = known * options["epochs"] / (time.perf_counter() - began)
    opt.pull_parameters()
    mine = np.arange(known + worker.rank, len(ratings.stars), worker.workers)
    with torch.no_grad():
        *inputs, stars = ratings.batch(mine)
        error = (model(*inputs).clamp(1, 5) - stars).square().sum().item()
    rmse = (worker.sum(error=error)["error"] / (len(ratings.stars) - known)) ** 0.5
    if worker.rank == 0:
        print(f"test RMSE {rmse:.4f}, {rate:.0f} samples/s")
    return rmse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratings", default="", help="file of USER ITEM RATING TIMESTAMP, plain or .gz")
    parser.add_argument("--model", choices=["dlrm", "mf"], default="dlrm")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--sync", default="sync", help="sync, async or ssp:N")
    parser.add_argument("--epochs", type=int, default=DEFAULTS["epochs"])
    parser.add_argument("--lr", type=float, default=DEFAULTS["lr"], help="of the tables")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("ratings", "model", "epochs", "lr")}
    try:
        read(options.ratings)  # what is wrong with a file is said here, once
        hw.run(train, workers=options.workers, servers=options.servers, sync=options.sync, settings=settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
