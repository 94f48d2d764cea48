"""Every rule, through whole clusters, against torch.optim in one process."""

import numpy as np
import pytest
import torch

import headwater as hw

SHAPES = {"w": (13, 7), "b": (29,)}
STEPS = 100


def reference_ftrl(parameters, lr, l1, l2, initial_accumulator):
    """FTRL-Proximal as a plain loop: McMahan et al. 2013, algorithm 1, with TensorFlow's parametrisation."""
    z = {name: np.zeros(p.shape) for name, p in parameters.items()}
    n = {name: np.full(p.shape, initial_accumulator) for name, p in parameters.items()}

    def step(gradients):
        for name, g in gradients.items():
            grown = n[name] + g * g
            z[name] += g - (np.sqrt(grown) - np.sqrt(n[name])) / lr * parameters[name]
            n[name] = grown
            shrunk = np.sign(z[name]) * l1 - z[name]
            parameters[name] = np.where(np.abs(z[name]) <= l1, 0, shrunk / (np.sqrt(grown) / lr + 2 * l2))

    return step


class TorchReference:
    def __init__(self, make):
        self._make = make

    def __call__(self, initial):
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in initial.items()}
        optimizer = self._make(tensors.values())

        def step(gradients):
            for name, g in gradients.items():
                tensors[name].grad = torch.from_numpy(g)
            optimizer.step()

        return step, lambda: {name: tensor.numpy() for name, tensor in tensors.items()}


def ftrl(initial):
    parameters = {name: value.astype(np.float64) for name, value in initial.items()}
    step = reference_ftrl(parameters, lr=0.1, l1=0.01, l2=0.02, initial_accumulator=0.1)
    return step, lambda: parameters


optim = torch.optim
CASES = {
    "sgd": (hw.SGD(0.1), TorchReference(lambda p: optim.SGD(p, 0.1))),
    "sgd momentum": (
        hw.SGD(0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
        TorchReference(lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.3, weight_decay=0.01)),
    ),
    "sgd nesterov": (
        hw.SGD(0.05, momentum=0.9, nesterov=True),
        TorchReference(lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True)),
    ),
    "adagrad": (hw.Adagrad(0.1), TorchReference(lambda p: optim.Adagrad(p, 0.1))),
    "rmsprop": (hw.RMSprop(0.01), TorchReference(lambda p: optim.RMSprop(p, 0.01))),
    "rmsprop centered": (
        hw.RMSprop(0.01, centered=True, momentum=0.9),
        TorchReference(lambda p: optim.RMSprop(p, 0.01, centered=True, momentum=0.9)),
    ),
    "adam": (hw.Adam(0.01), TorchReference(lambda p: optim.Adam(p, 0.01))),
    "adam amsgrad": (
        hw.Adam(0.01, amsgrad=True, weight_decay=0.01),
        TorchReference(lambda p: optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.01)),
    ),
    "adamw": (hw.AdamW(0.01), TorchReference(lambda p: optim.AdamW(p, 0.01))),
    "ftrl": (hw.Ftrl(lr=0.1, l1=0.01, l2=0.02), ftrl),
}


def initial():
    numbers = np.random.default_rng(11)
    return {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(rank, step, values):
    """Of a noisy quadratic, so that an error in one step is seen in all later ones."""
    noise = np.random.default_rng([rank, step])
    return {name: 0.1 * values[name] + noise.standard_normal(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_synchronous_steps_agree_with_one_process(case, workers):
    rule, reference = CASES[case]

    def train(worker):
        model = worker.model("net", initial(), rule)
        for k in range(STEPS):
            model.push(gradients(worker.rank, k, model.pull()))
            worker.step()

    result = hw.run(train, workers=workers, servers=2, engine="inline", deadline=60).parameters["net"]
    step, values = reference(initial())
    for k in range(STEPS):
        each = [gradients(rank, k, values()) for rank in range(workers)]
        step({name: np.mean([one[name] for one in each], axis=0) for name in SHAPES})
    for name, expected in values().items():
        scale = np.abs(expected).max()
        assert np.abs(result[name] - expected).max() <= 1e-5 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_every_rule_gives_the_same_bits_for_any_number_of_servers(case):
    rule, _ = CASES[case]
    shapes = {"w": (83, 71), "b": (513,)}

    def train(worker):
        numbers = np.random.default_rng(worker.rank)
        model = worker.model(
            "net", {name: np.full(shape, 0.25, np.float32) for name, shape in shapes.items()}, rule
        )
        for _ in range(5):
            model.push({name: numbers.standard_normal(shape) for name, shape in shapes.items()})
            worker.step()

    def bits(servers):
        result = hw.run(train, workers=3, servers=servers, engine="inline", deadline=60)
        return {name: array.tobytes() for name, array in result.parameters["net"].items()}

    expected = bits(1)
    assert all(bits(servers) == expected for servers in (2, 3, 5))
