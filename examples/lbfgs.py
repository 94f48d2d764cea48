"""L-BFGS of several workers: logistic regression to its optimum, or a small physics-informed network.

    python examples/lbfgs.py a9a.libsvm.gz --c 1.0 --workers 4
    python examples/lbfgs.py --pinn --workers 2

The first reads a file in libsvm's format, plain or .gz (`LABEL INDEX:VALUE …`, a label above 0 is the
positive class) and minimises C · Σ logistic loss + ½ ‖weight‖². The second solves −u″ = π² sin πx with
u(0) = u(1) = 0, whose solution is sin πx. Prints iterations, f, ‖g‖, evaluations and time.
"""

import argparse
import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch

import headwater as hw


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """A libsvm file as float64[rows, features] and float64[rows] of labels 0 and 1.

    Raises:
        ValueError: a line that is not in that format; names it.
        OSError: the file cannot be read.
    """
    labels, rows, columns, values = [], [], [], []
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for number, line in enumerate(lines):
            try:
                label, *features = line.split()
                labels.append(float(label) > 0)
                for feature in features:
                    column, value = feature.split(":")
                    rows.append(number)
                    columns.append(int(column))
                    values.append(float(value))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number + 1}: expected LABEL INDEX:VALUE …, got {line!r}"
                ) from error
    if not labels or min(columns, default=0) < 0:
        raise ValueError(f"{path}: no rows, or an index below 0")
    x = np.zeros((len(labels), max(columns, default=0) + 1))
    x[rows, columns] = values
    return x, np.array(labels, np.float64)


def part_of(count: int, worker: hw.Worker) -> slice:
    """This worker's rows: all workers' together are each row once, for the loss is a sum over rows."""
    return slice(count * worker.rank // worker.workers, count * (worker.rank + 1) // worker.workers)


def minimise(worker: hw.Worker, module: torch.nn.Module, loss_of, calls: int) -> "hw.Report":
    """At most `calls` steps of 20 iterations each, until one stops by itself."""
    opt = hw.torch.LBFGS(worker, module, history_size=30, tolerance_grad=1e-5, tolerance_change=1e-12)
    began, iterations, evaluations = time.monotonic(), 0, 0

    def closure():
        opt.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    for _ in worker.epochs(calls):
        opt.step(closure)
        report = opt.report
        iterations, evaluations = iterations + report.iterations, evaluations + report.evaluations
        worker.log(loss=report.loss, norm=report.gradient_norm)
        if worker.rank == 0:
            print(
                f"iterations {iterations}, f {report.loss:.10g}, |g| {report.gradient_norm:.3g}, "
                f"evaluations {evaluations}, {time.monotonic() - began:.1f} s"
            )
        if not report.reason.startswith("max_"):
            break
    if worker.rank == 0:
        print(f"stopped: {report.reason}")
    return report


def logistic(worker: hw.Worker) -> tuple[np.ndarray, float, float]:
    """Weights, bias and objective of the regression."""
    x, y = (torch.from_numpy(array) for array in read(worker.settings["file"]))
    mine = part_of(len(y), worker)
    x, y, c = x[mine], y[mine], worker.settings["c"]
    module = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.zeros_(module.bias)

    def loss_of(module):
        weight = module.weight[0].double()  # a float32 loss could not tell points near the optimum apart
        scores = x @ weight + module.bias.double()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, y, reduction="sum")
        return c * losses + 0.5 * (weight**2).sum() / worker.workers  # the penalty counts once in all

    report = minimise(worker, module, loss_of, calls=25)
    return module.weight.detach().numpy()[0].copy(), module.bias.item(), report.loss


def pinn(worker: hw.Worker) -> float:
    """The largest error of the network on a fine grid."""
    torch.manual_seed(0)
    tanh, wide = torch.nn.Tanh(), 24
    module = torch.nn.Sequential(
        *(torch.nn.Linear(1, wide), tanh, torch.nn.Linear(wide, wide), tanh, torch.nn.Linear(wide, 1))
    )
    points = torch.linspace(0, 1, 65)[1:-1, None]
    points = points[part_of(len(points), worker)]
    ends = torch.tensor([[0.0], [1.0]])

    def loss_of(module):
        x = points.clone().requires_grad_()
        u = module(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = bend + math.pi**2 * torch.sin(math.pi * x)
        return (residual**2).double().sum() + 100 * (module(ends) ** 2).double().sum() / worker.workers

    minimise(worker, module, loss_of, calls=worker.settings["calls"])
    grid = torch.linspace(0, 1, 1001)[:, None]
    with torch.no_grad():
        error = float((module(grid) - torch.sin(math.pi * grid)).abs().max())
    if worker.rank == 0:
        print(f"largest error {error:.2g}")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="libsvm file, plain or .gz")
    parser.add_argument("--pinn", action="store_true", help="solve the differential equation instead")
    parser.add_argument("--c", type=float, default=1.0, help="weight of the losses beside the penalty")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=1)
    options = parser.parse_args()
    if options.pinn == bool(options.file):
        parser.error("name a file, or say --pinn")
    settings = {"file": options.file and str(Path(options.file).resolve()), "c": options.c, "calls": 20}
    try:
        if options.file:
            read(options.file)  # what is wrong with a file is said here, once
        hw.run(
            pinn if options.pinn else logistic,
            workers=options.workers,
            servers=options.servers,
            settings=settings,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
