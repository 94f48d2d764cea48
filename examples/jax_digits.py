"""A small network in plain JAX on scikit-learn's handwritten digits.

    python examples/jax_digits.py --workers 4 --servers 2 --sync ssp:3 --epochs 10
    headwater run examples/jax_digits.py --workers 4 --servers 2 --sync ssp:3 --set epochs=10

Prints the accuracy on a fixed fifth of the images that no worker trains on.
"""

import argparse
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import headwater as hw

Params: TypeAlias = list[dict[str, Any]]
SIZES = (64, 128, 64, 10)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images float32[n, 64] in [0, 1] and labels int32[n], for training and then for testing."""
    from sklearn.datasets import load_digits  # slow to import, and only workers need it

    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    test = np.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def initial(key: jax.Array) -> Params:
    layers = zip(jax.random.split(key, len(SIZES) - 1), SIZES[:-1], SIZES[1:], strict=True)
    return [
        {"w": jax.random.normal(own, (inputs, outputs)) * (2 / inputs) ** 0.5, "b": jnp.zeros(outputs)}
        for own, inputs, outputs in layers
    ]


def logits(params: Params, x: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    by_class = jax.nn.log_softmax(logits(params, x))
    return -jnp.take_along_axis(by_class, y[:, None], axis=1).mean()


def train(worker: hw.Worker) -> float:
    """Train on this worker's part; returns the test accuracy of the final model."""
    epochs, lr = worker.settings.get("epochs", 10), worker.settings.get("lr", 3e-3)
    images, labels, test_images, test_labels = data()
    opt = hw.jax.DistributedOptimizer(worker, initial(jax.random.key(0)), hw.Adam(lr=lr))
    loss_and_grads = jax.jit(jax.value_and_grad(loss))
    params = opt.params
    for x, y in worker.batches((images, labels), batch_size=16, epochs=epochs, shuffle=True, seed=0):
        value, grads = loss_and_grads(params, x, y)
        params = opt.step(grads)
        worker.log(loss=value.item())

    worker.barrier()  # everybody has pushed everything: from here on all see one version
    params = opt.pull()
    mine = slice(worker.rank, None, worker.workers)
    right = (logits(params, test_images[mine]).argmax(axis=1) == test_labels[mine]).sum().item()
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
