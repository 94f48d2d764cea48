"""L-BFGS over all workers: torch's points, a textbook's two loops, the same bits however it is run."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from test_lbfgs import Driven, rosenbrock

import headwater as hw
from headwater.errors import ConfigurationError, StalledError, UsageError, WorkerError
from headwater.machines.lbfgs import LBFGS as Settings
from headwater.machines.model_buffer import ModelBuffer
from headwater.spec.layout import LINE, PAGE
from headwater.torch import LBFGS

CLASSES = 10


def digits(count=400):
    from sklearn.datasets import load_digits  # takes a second, in each process that collects tests

    data = load_digits()
    x, y = data.data[:count].astype(np.float32) / 16, data.target[:count]
    return np.hstack([x, np.ones((count, 1), np.float32)]), y


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(65, CLASSES))


def loss_of(module, x, y, share):
    """The sum over these samples, and a share of the regularisation."""
    losses = torch.nn.functional.cross_entropy((x @ module.w).double(), y, reduction="sum")
    return losses + share * 0.5 * (module.w.double() ** 2).sum()


def part_of(rank, workers):
    """A worker's samples; parts are whole multiples of 100 samples, so several workers' make one's."""
    x, y = digits()
    mine = slice(400 * rank // workers, 400 * (rank + 1) // workers)
    return torch.from_numpy(x[mine]), torch.from_numpy(y[mine])


def closure_of(opt, module, x, y, share):
    def closure():
        opt.zero_grad()
        loss = loss_of(module, x, y, share)
        loss.backward()
        return loss

    return closure


def train(worker):
    x, y = part_of(worker.rank, worker.workers)
    module = Linear()
    opt = LBFGS(worker, module, **worker.settings["lbfgs"])
    closure, losses = closure_of(opt, module, x, y, 1 / worker.workers), []
    for _ in range(worker.settings["calls"]):
        losses.append(float(opt.step(closure)))
    return losses, opt.report, module.w.detach().numpy().copy()


def ran(program=train, workers=1, *, calls=1, **settings):
    how = {name: settings.pop(name) for name in list(settings) if name in Settings.__dataclass_fields__}
    options = {"engine": "inline", "deadline": 60, "settings": {"lbfgs": how, "calls": calls}}
    return hw.run(program, workers=workers, **{**options, **settings}).values


class TwoLoops(Driven):
    """NumPy vectors; directions are those of a textbook's two loops over pairs of changes, not of dots."""

    def do(self, command):
        if getattr(command, "out", "") == "direction":
            pairs = [(self.vectors[f"s{k}"], self.vectors[f"y{k}"]) for k in self.state.slots]
            q, alphas = -self.vectors["gradient"], []
            for s, y in reversed(pairs):
                alphas.append((s @ q) / (s @ y))
                q = q - alphas[-1] * y
            if pairs:
                s, y = pairs[-1]
                q = q * ((s @ y) / (y @ y))
            for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
                q = q + (alpha - (y @ q) / (s @ y)) * s
            self.vectors["direction"] = q
            return None
        return super().do(command)


def softmax_regression():
    x, y = digits()
    x, hot = x.astype(np.float64), np.eye(CLASSES)[y]

    def function(flat):
        w = flat.reshape(65, CLASSES)
        scores = x @ w
        scores -= scores.max(axis=1, keepdims=True)
        sums = np.exp(scores).sum(axis=1, keepdims=True)
        loss = (np.log(sums) - (scores * hot).sum(axis=1, keepdims=True)).sum() + 0.5 * (w**2).sum()
        return loss, (x.T @ (np.exp(scores) / sums - hot) + w).reshape(-1)

    return function


def test_the_iterates_are_those_of_two_loops_in_numpy():
    reference = TwoLoops(softmax_regression(), np.zeros(650), Settings(max_iter=1, max_eval=30))
    expected = []
    for _ in range(30):
        expected.append(reference.step().first_loss)
    losses, _, w = ran(workers=2, servers=2, calls=30, max_iter=1, max_eval=30)[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert w.reshape(-1) == pytest.approx(reference.vectors["parameters"], abs=1e-5 * float(np.abs(w).max()))


def test_the_losses_are_those_of_torch():
    x, y = part_of(0, 1)
    x, module = x.double(), Linear().double()
    theirs = torch.optim.LBFGS(module.parameters(), max_iter=4, history_size=5, line_search_fn="strong_wolfe")
    closure, expected = closure_of(theirs, module, x, y, 1.0), []
    for _ in range(5):
        expected.append(float(theirs.step(closure)))
    for workers in (1, 3):
        losses, report, w = ran(workers=workers, servers=2, calls=5, max_iter=4, history_size=5)[0]
        assert losses == pytest.approx(expected, rel=1e-5)
        assert w == pytest.approx(module.w.detach().numpy(), abs=1e-4)
        assert 0 < report.evaluations <= 6


def test_the_bits_do_not_depend_on_servers_and_all_workers_see_the_same():
    first = ran(workers=2, servers=1, calls=2, max_iter=6)
    for servers, more in ((2, {}), (3, {"transport": "tcp"}), (5, {"sync": "async"})):
        values = ran(workers=2, servers=servers, calls=2, max_iter=6, **more)
        for losses, report, w in values:
            assert (losses, report) == first[0][:2] == first[1][:2]
            assert w.tobytes() == first[0][2].tobytes() == first[1][2].tobytes()


def test_rosenbrock_is_solved_as_far_as_float32_goes():
    class Point(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.tensor([-1.2, 1.0]))

    def program(worker):
        module = Point()
        opt = LBFGS(worker, module, max_iter=100, max_eval=1000)

        def closure():
            opt.zero_grad()
            x = module.x.double()
            loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
            loss.backward()
            return loss

        return float(opt.step(closure)), opt.report, module.x.tolist()

    first, report, x = ran(program, servers=2)[0]
    assert first == pytest.approx(24.2, rel=1e-6)
    assert report.loss < 1e-10
    assert x == pytest.approx([1, 1], abs=1e-4)
    assert rosenbrock(np.array(x))[0] == pytest.approx(report.loss, rel=1e-6, abs=1e-12)


def test_between_workers_and_servers_go_one_model_down_and_one_gradient_up_an_evaluation(monkeypatch):
    counted = {"up": 0, "down": 0}
    meet, incoming = ModelBuffer.meet, ModelBuffer.incoming

    def up(self, request, server):
        frame = meet(self, request, server)
        counted["up"] += sum(array.nbytes for array in frame.buffers)
        return frame

    def down(self, server):
        arrays = incoming(self, server)
        counted["down"] += sum(array.nbytes for array in arrays)
        return arrays

    monkeypatch.setattr(ModelBuffer, "meet", up)
    monkeypatch.setattr(ModelBuffer, "incoming", down)
    _, report, w = ran(servers=2, transport="tcp", max_iter=8)[0]
    model = 4 * PAGE  # ranges are whole pages of 1,024 elements, tensors whole lines of 16
    assert counted["up"] == report.evaluations * 4 * LINE * -(-w.size // LINE)
    # Besides at registration, at the beginning and, where the last point was not the best one, at the end.
    assert counted["down"] <= (3 + report.evaluations) * model


# ── sums and weighted means ─────────────────────────────────────────────────────────────────────


def test_weighted_means_of_uneven_parts_are_the_mean_over_all_samples():
    cuts = {1: [0, 400], 3: [0, 40, 150, 400]}

    def program(worker):
        x, y = digits()
        low, high = cuts[worker.workers][worker.rank : worker.rank + 2]
        x, y, module = torch.from_numpy(x[low:high]), torch.from_numpy(y[low:high]), Linear()
        opt = LBFGS(worker, module, max_iter=8)

        def closure():
            opt.zero_grad()
            loss = loss_of(module, x, y, 0.0) / len(x)
            loss.backward()
            return loss

        return float(opt.step(closure, weight=len(x))), opt.report.loss

    one, three = ran(program)[0], ran(program, workers=3)
    assert one[0] == pytest.approx(math.log(CLASSES), rel=1e-6)
    assert all(found == pytest.approx(one, rel=1e-5) for found in three)


def test_a_parameter_that_a_worker_does_not_use_has_a_gradient_of_zeros_there():
    def program(worker):
        module = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3)) for _ in range(3)])
        opt = LBFGS(worker, module, max_iter=20)

        def closure():
            opt.zero_grad()
            loss = ((module[worker.rank] - 5.0) ** 2).sum()
            loss.backward()
            return loss

        opt.step(closure)
        return [parameter.tolist() for parameter in module]

    for found in ran(program, workers=2, servers=2):
        assert found == [pytest.approx([5.0] * 3, abs=1e-5)] * 2 + [[1.0] * 3]


def test_what_the_program_writes_before_a_step_is_where_it_begins():
    def program(worker):
        module = Linear()
        opt = LBFGS(worker, module, max_iter=2)
        with torch.no_grad():
            module.w.fill_(3.0)
        x, y = part_of(worker.rank, worker.workers)
        return float(opt.step(closure_of(opt, module, x, y, 1 / worker.workers)))

    from sklearn.datasets import load_digits  # takes a second, in each process that collects tests

    data = load_digits()
    assert len(data.target) > 400
    assert ran(program, workers=2) == [pytest.approx(400 * math.log(CLASSES) + 0.5 * 9 * 650, rel=1e-6)] * 2


# ── through deaths and restarts ─────────────────────────────────────────────────────────────────


def interrupted(worker):
    """Rank 1 dies in the middle of a line search, once."""
    x, y = part_of(worker.rank, worker.workers)
    module, seen = Linear(), 0
    opt = LBFGS(worker, module, max_iter=6)
    inner = closure_of(opt, module, x, y, 1 / worker.workers)

    def closure():
        nonlocal seen
        seen += 1
        if worker.rank == 1 and seen == worker.settings["dies_at"] and not worker.restarted:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner()

    losses = [float(opt.step(closure)) for _ in range(2)]
    return losses, opt.report, module.w.detach().numpy().copy()


@pytest.mark.long
@pytest.mark.parametrize("dies_at", [4, 9])
def test_a_worker_that_is_killed_in_a_line_search_changes_no_bit(dies_at):
    expected = ran(interrupted, workers=2, settings={"dies_at": 0})
    found = hw.run(
        interrupted,
        workers=2,
        servers=2,
        replicas=0,
        engine="local",
        settings={"dies_at": dies_at},
        deadline=60,
    ).values
    for (losses, report, w), (others, other, v) in zip(found, expected, strict=True):
        assert (losses, report) == (others, other)
        assert w.tobytes() == v.tobytes()


def test_a_resumed_program_goes_on_with_the_curvature_that_it_had(tmp_path):
    def program(worker):
        x, y = part_of(worker.rank, worker.workers)
        module = Linear()
        opt = LBFGS(worker, module, max_iter=3)
        closure, losses = closure_of(opt, module, x, y, 1 / worker.workers), []
        for _ in worker.epochs(worker.settings["epochs"]):
            losses.append(float(opt.step(closure)))
        return losses, module.w.detach().numpy().copy()

    whole = ran(program, workers=2, settings={"epochs": 4})[0]
    options = {"workers": 2, "checkpoint": tmp_path}
    first = ran(program, settings={"epochs": 2}, servers=2, **options)[0]
    second = ran(program, settings={"epochs": 4}, servers=3, resume=True, **options)[0]
    assert first[0] + second[0] == whole[0]
    assert second[1].tobytes() == whole[1].tobytes()


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────


def test_workers_whose_closures_differ_in_the_number_of_calls_are_named():
    def program(worker):
        x, y = part_of(worker.rank, worker.workers)
        module = Linear()
        opt = LBFGS(worker, module, max_iter=2)
        closure = closure_of(opt, module, x, y, 0.5)
        opt.step(closure)
        if worker.rank == 0:
            opt.step(closure)

    with pytest.raises(WorkerError, match=r"of all workers .* needs worker 1, which has finished") as error:
        ran(program, workers=2)
    assert "worker 0 waits in measure of model 'model', read" in str(error.value)


def test_workers_that_are_at_another_place_are_named():
    def program(worker):
        x, y = part_of(worker.rank, worker.workers)
        module = Linear()
        opt = LBFGS(worker, module, lr=1 + worker.rank)
        closure = closure_of(opt, module, x, y, 0.5)
        with pytest.raises(StalledError) as error:
            opt.step(closure)
        return str(error.value)

    for told in ran(program, workers=2):
        assert "different places" in told
        assert "worker 1 waits in" in told


def test_a_loss_that_is_not_a_number_is_said_and_nothing_moves():
    def program(worker):
        module = Linear()
        opt = LBFGS(worker, module)

        def closure():
            opt.zero_grad()
            loss = module.w.sum() * (math.nan if worker.rank == 1 else 1.0)
            loss.backward()
            return loss

        first = float(opt.step(closure))
        return math.isnan(first), opt.report.reason, float(module.w.abs().max())

    assert ran(program, workers=2) == [(True, "the loss is nan at the first point", 0.0)] * 2


def test_a_gradient_that_is_not_finite_is_stepped_back_from():
    def program(worker):
        module = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor([1.0]))])
        opt = LBFGS(worker, module, lr=40.0, max_iter=20, max_eval=200)

        def closure():
            opt.zero_grad()
            loss = torch.where(module[0] < -20, module[0] * 0 - 50, (module[0] - 3) ** 2).sum()
            loss.backward()
            if module[0].item() < -20 or module[0].item() > 30:
                module[0].grad.fill_(math.inf)
            return loss

        opt.step(closure)
        return module[0].item()

    assert ran(program) == [pytest.approx(3.0, abs=1e-3)]


def test_what_cannot_be_minimised_is_refused():
    def program(worker):
        with pytest.raises(ConfigurationError, match="no parameter"):
            LBFGS(worker, torch.nn.ReLU())
        with pytest.raises(ConfigurationError, match="max_iter must be an integer"):
            LBFGS(worker, Linear(), max_iter=0)
        with pytest.raises(ConfigurationError, match="as module"):
            LBFGS(worker, [torch.zeros(3)])
        table = hw.torch.Embedding(worker, "t", 4, hw.SGD(lr=0.1))
        with pytest.raises(ConfigurationError, match="dense parameters"):
            LBFGS(worker, torch.nn.Sequential(table, torch.nn.Linear(4, 1)))
        module = Linear()
        opt = LBFGS(worker, module)
        with pytest.raises(UsageError, match="needs a closure"):
            opt.step()
        with pytest.raises(ConfigurationError, match="weight=0"):
            opt.step(lambda: 0.0, weight=0)
        with pytest.raises(UsageError, match="one parameter group"):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        second = LBFGS(worker, module)
        with pytest.raises(UsageError, match="another optimizer was made"):
            opt.step(lambda: module.w.sum())
        assert second.param_groups[0]["history_size"] == 10

    ran(program)
