"""Federated averaging on handwritten digits: clients with different digits, some of which come and go.

    python examples/federated.py --clients 6 --rule fedavg
    python examples/federated.py --clients 6 --rule fedadam --away 0.3

Each client has images of a few digits only. In each round it trains by itself for some steps, and what that
has changed, weighted by its samples, is a step on the servers: `fedavg` takes the mean (McMahan et al.
2017) of it, `fedadam` and `fedyogi` give it to Adam and Yogi (Reddi et al. 2021). With `--away P` a client
sits out a
round with probability P: it has no samples then, and counts for nothing. Prints the accuracy on a fifth of
the images, which nobody trains on, after each few rounds.
"""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import headwater as hw

RULES = {"fedavg": hw.SGD(1.0), "fedadam": hw.Adam(0.01, eps=1e-3), "fedyogi": hw.Yogi(0.01)}
DEFAULTS = {
    "rule": "fedavg",
    "rounds": 60,
    "every": 10,
    "batch": 16,
    "lr": 0.1,
    "away": 0.0,
    "kinds": 5,
    "seed": 0,
}


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images float32[n, 64] in [0, 1] and digits int64[n], for training and then for testing."""
    from sklearn.datasets import load_digits  # slow to import, and only clients need it

    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def part(labels: torch.Tensor, rank: int, clients: int, kinds: int) -> np.ndarray:
    """Which samples a client has: of `kinds` digits of its own choice, those that fall to it."""
    mine = (np.arange(kinds) * max(10 // kinds, 1) + 3 * rank) % 10
    places = np.flatnonzero(np.isin(labels.numpy(), mine))
    return places[rank % 2 :: 2] if clients > 1 else places


def train(client: hw.Worker) -> float:
    """Train on this client's part; returns the test accuracy of the final model."""
    chosen = {**DEFAULTS, **client.settings}
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = data()
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inner = torch.optim.SGD(net.parameters(), chosen["lr"])
    outer = hw.torch.OuterOptimizer(
        client, net, inner, RULES[chosen["rule"]], every=chosen["every"], weight="samples"
    )
    own = part(labels, client.rank, client.workers, chosen["kinds"])
    for round_ in range(client.kept.get("rounds", 0), chosen["rounds"]):
        numbers = np.random.default_rng([chosen["seed"], client.rank, round_])
        away = numbers.random() < chosen["away"]
        for _ in range(chosen["every"]):
            if not away:
                batch = torch.from_numpy(numbers.choice(own, chosen["batch"]))
                inner.zero_grad()
                functional.cross_entropy(net(images[batch]), labels[batch]).backward()
                inner.step()
            client.keep(rounds=round_ + 1)
            outer.step(0 if away else chosen["batch"])
        if client.rank == 0 and round_ % 5 == 4:
            print(f"round {round_ + 1}: {outer.result.contributors} clients, "
                  f"test accuracy {accuracy(net, test_images, test_labels):.3f}", flush=True)  # fmt: skip
    client.barrier()
    outer.pull_parameters()
    return accuracy(net, test_images, test_labels)


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--servers", type=int, default=1)
    for name, value in DEFAULTS.items():
        choices = list(RULES) if name == "rule" else None
        parser.add_argument(f"--{name}", type=type(value), default=value, choices=choices)
    options = vars(parser.parse_args())
    clients, servers = options.pop("clients"), options.pop("servers")
    result = hw.run(train, workers=clients, servers=servers, settings=options)
    print(f"{options['rule']}: final test accuracy {result.values[0]:.3f}")


if __name__ == "__main__":
    main()
