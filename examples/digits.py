"""A small convolutional network on scikit-learn's handwritten digits.

    python examples/digits.py --workers 4 --servers 2 --sync ssp:3 --epochs 10
    headwater run examples/digits.py --workers 4 --servers 2 --sync ssp:3 --set epochs=10

Prints the accuracy on a fixed fifth of the images that no worker trains on.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional

import headwater as hw


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images float32[n, 1, 8, 8] in [0, 1] and labels int64[n], for training and then for testing."""
    from sklearn.datasets import load_digits  # slow to import, and only workers need it

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(worker: hw.Worker) -> float:
    """Train on this worker's part; returns the test accuracy of the final model."""
    epochs, lr = worker.settings.get("epochs", 10), worker.settings.get("lr", 3e-3)
    seed = worker.settings.get("seed", 0)
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = data()
    net = network()
    opt = hw.torch.DistributedOptimizer(worker, net, hw.Adam(lr=lr))
    for x, y in worker.batches((images, labels), batch_size=16, epochs=epochs, shuffle=True, seed=seed):
        opt.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        worker.log(loss=loss.item())

    worker.barrier()  # everybody has pushed everything: from here on all see one version
    opt.pull_parameters()
    mine = slice(worker.rank, None, worker.workers)
    with torch.no_grad():
        right = (net(test_images[mine]).argmax(dim=1) == test_labels[mine]).sum().item()
    accuracy = worker.sum(right=right)["right"] / len(test_labels)
    if worker.rank == 0:
        print(f"test accuracy {accuracy:.3f}")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--sync", default="sync", help="sync, async or ssp:N")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    try:
        hw.run(
            train,
            workers=options.workers,
            servers=options.servers,
            sync=options.sync,
            settings={"epochs": options.epochs, "lr": options.lr},
        )
    except hw.errors.ConfigurationError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
