"""Where a module's parameters live and what may not be done to them."""

import gc
import io

import pytest
import safetensors.torch
import torch
from torch import nn

import headwater as hw
from headwater.errors import ClosedError, ConfigurationError, GradientError, RegistrationError, UsageError


def alone(function, **options):
    """Run `function(worker)` as the only worker of a cluster, in this thread."""
    with hw.Cluster(workers=1, patience=5, deadline=60, **options) as cluster, cluster.worker() as worker:
        return function(worker)


def optimizer(worker, module, rule=None, **options):
    return hw.torch.DistributedOptimizer(worker, module, rule or hw.SGD(lr=1.0), **options)


def turn(opt, module, size=2):
    opt.zero_grad()
    module(torch.ones(1, size)).sum().backward()
    opt.step()


def test_it_is_a_torch_optimizer():
    def work(worker):
        opt = optimizer(worker, nn.Linear(2, 1), hw.Adam(lr=0.1))
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.defaults == {
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "amsgrad": False,
        }
        calls = []
        opt.register_step_post_hook(lambda *_: calls.append("after"))
        opt.step()
        assert calls == ["after"]

    alone(work)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_parameters_and_gradients_lie_in_the_memory_of_the_model(transport):
    def work(worker):
        net = nn.Linear(2, 3)
        opt = optimizer(worker, net)
        net(torch.ones(1, 2)).sum().backward()
        model = opt._model
        for name, parameter in net.named_parameters():
            assert parameter.data_ptr() == model.parameters[name].ctypes.data
            assert parameter.grad.data_ptr() == model.gradients[name].ctypes.data
        opt.zero_grad()
        assert net.weight.grad is None

    alone(work, transport=transport)


def test_every_parameter_has_a_storage_of_its_own_so_that_files_are_as_large_as_the_tensors(tmp_path):
    def work(worker):
        net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
        plain = io.BytesIO()
        torch.save(net.state_dict(), plain)
        opt = optimizer(worker, net)
        turn(opt, net, 100)
        ours = io.BytesIO()
        torch.save(net.state_dict(), ours)
        assert len(ours.getvalue()) == pytest.approx(len(plain.getvalue()), rel=0.02)
        for parameter in net.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
        safetensors.torch.save_file(net.state_dict(), tmp_path / "net.safetensors")
        loaded = safetensors.torch.load_file(tmp_path / "net.safetensors")
        assert all(loaded[name].equal(value) for name, value in net.state_dict().items())

    alone(work)


def test_parameters_stay_valid_after_the_worker_has_left_and_the_optimizer_is_gone():
    net = nn.Linear(2, 1, bias=False)
    with hw.Cluster(workers=1) as cluster:
        with cluster.worker() as worker:
            net.weight.data.fill_(3.0)
            opt = optimizer(worker, net)
            turn(opt, net)
        with pytest.raises(ClosedError, match="step"):
            opt.step()
    kept = net.weight.grad
    del opt, worker, cluster
    gc.collect()
    assert net.weight.tolist() == [[2, 2]]
    assert kept.tolist() == [[1, 1]]
    net.zero_grad()
    net(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert net.weight.tolist() == [[1, 1]]
    assert not net.weight._post_accumulate_grad_hooks


def test_a_module_can_be_trained_again_in_another_cluster():
    net = nn.Linear(2, 1, bias=False)
    net.weight.data.fill_(3.0)
    for _ in range(2):
        alone(lambda worker: turn(optimizer(worker, net), net))
    assert net.weight.tolist() == [[1, 1]]


def test_empty_and_scalar_parameters_are_trained():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.other_empty = nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return x * self.scalar + self.empty.sum() + self.other_empty.sum()

    def work(worker):
        net = Odd()
        opt = optimizer(worker, net)
        turn(opt, net)
        assert net.scalar.item() == 0.0

    alone(work)


def test_push_parameters_sets_the_servers_and_pull_parameters_the_module():
    def work(worker):
        net, saved = nn.Linear(2, 1, dtype=torch.bfloat16), nn.Linear(2, 1, dtype=torch.bfloat16)
        net.register_buffer("seen", torch.zeros(1))
        saved.register_buffer("seen", torch.ones(1))
        opt = optimizer(worker, net, buffers="mean")
        net.load_state_dict(saved.state_dict())
        opt.push_parameters()
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.zero_()
        opt.pull_parameters()
        for name, value in saved.state_dict().items():
            assert net.state_dict()[name].equal(value), name

    alone(work, servers=2)


def test_push_parameters_of_one_worker_reaches_the_others():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        opt = optimizer(worker, net)
        if worker.rank == 1:
            torch.nn.init.constant_(net.weight, 5.0)
            opt.push_parameters()
        worker.barrier()
        opt.pull_parameters()
        return net.weight.tolist()

    result = hw.run(work, workers=2, servers=2, engine="inline", patience=5, deadline=60)
    assert result.values == [[[5, 5]]] * 2


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


def _convert(net):
    net.double()


def _give_other_data(net):
    net.weight.data = net.weight.data.clone()


def _load_by_assignment(net):
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)


def _share_memory(net):
    net.share_memory()


@pytest.mark.parametrize(
    ("move", "advice"),
    [
        (_convert, "is float64 on cpu now and was float32 on cpu.*before you make it"),
        (_give_other_data, "moved off the memory.*copy_"),
        (_load_by_assignment, r"was replaced.*load_state_dict\(assign=True\)"),
        (_share_memory, "moved off the memory"),
    ],
)
def test_a_parameter_moved_off_the_window_is_an_error_that_names_it(move, advice):
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        opt = optimizer(worker, net)
        turn(opt, net)
        move(net)
        for call in (opt.step, opt.pull_parameters, opt.push_parameters):
            with pytest.raises(UsageError, match=f"'weight'.*{advice}"):
                call()
        assert worker.version == 1

    alone(work)


def test_a_parameter_under_another_name_is_still_trained():
    def work(worker):
        net = nn.Linear(2, 2)
        opt = optimizer(worker, net)
        nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))  # another module's is nobody's business
        nn.utils.parametrize.register_parametrization(net, "weight", nn.Identity())
        turn(opt, net)

    alone(work)


def test_a_sparse_gradient_is_an_error_that_names_the_parameter():
    def work(worker):
        net = nn.Embedding(3, 2, sparse=True)
        opt = optimizer(worker, net)
        net(torch.tensor([1])).sum().backward()
        with pytest.raises(GradientError, match=r"'weight' is sparse.*sparse=False"):
            opt.step()

    alone(work)


def test_different_parameters_that_share_memory_are_refused():
    def work(worker):
        net = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        net[1].weight.data = net[0].weight.data
        with pytest.raises(
            ConfigurationError, match=r"'0.weight' and '1.weight' share memory.*one Parameter"
        ):
            optimizer(worker, net)

    alone(work)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rule": torch.optim.SGD}, ConfigurationError, "rule must be a Rule such as"),
        ({"buffers": "rank1"}, ConfigurationError, "'rank0', 'mean' or 'local', got 'rank1'"),
        ({"nonfinite": "ignore"}, ConfigurationError, "'raise', 'skip' or 'off'"),
        ({"push_every": 2}, ConfigurationError, "push_every=2, pull_every=1 need sync='async' or 'ssp:N'"),
        ({"pull_every": 0}, ConfigurationError, "pull_every must be an integer ≥ 1, got 0"),
        ({"groups": [{"lr": 1.0}]}, ConfigurationError, "'params'"),
        (
            {"groups": [{"params": ["weigth"]}]},
            ConfigurationError,
            r"'weigth', the parameters are \['weight'",
        ),
        ({"groups": [{"params": [torch.ones(2)]}]}, ConfigurationError, r"shape \(2,\) that is no parameter"),
        ({"groups": [{"params": "bias"}, {"params": "bias"}]}, ConfigurationError, "'bias' is in two groups"),
        (
            {"groups": [{"params": "bias", "rate": 1}]},
            ConfigurationError,
            "no setting 'rate': choose from lr",
        ),
        ({"groups": [{"params": "bias", "lr": -1.0}]}, ConfigurationError, "lr=-1.0 is impossible"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_changes(options, error, text):
    def work(worker):
        net = nn.Linear(2, 1)
        before = net.weight.data_ptr()
        with pytest.raises(error, match=text):
            optimizer(worker, net, **options)
        assert net.weight.data_ptr() == before
        assert worker.models == {}

    alone(work)


@pytest.mark.parametrize(
    "wrong", [lambda net: net.parameters(), lambda net: list(net.parameters()), lambda net: net.state_dict()]
)
def test_parameters_where_the_module_is_expected_are_an_error_that_says_what_to_pass(wrong):
    def work(worker):
        net = nn.Linear(2, 1)
        with pytest.raises(
            ConfigurationError, match=r"takes the module itself, got .*where torch's optimizers"
        ):
            hw.torch.DistributedOptimizer(worker, wrong(net), hw.SGD(lr=0.1))
        with pytest.raises(ConfigurationError, match="takes the worker first, got Linear"):
            hw.torch.DistributedOptimizer(net, hw.SGD(lr=0.1))
        assert worker.models == {}

    alone(work)


def test_modules_that_cannot_be_trained_are_refused():
    def work(worker):
        with pytest.raises(RegistrationError, match=r"float64.*module.float\(\)"):
            optimizer(worker, nn.Linear(2, 1).double())
        with pytest.raises(RegistrationError, match="no tensors"):
            optimizer(worker, nn.Linear(2, 1).requires_grad_(False))
        with pytest.raises(ConfigurationError, match="'weight' has no shape yet: run the module once"):
            optimizer(worker, nn.LazyLinear(2))

    alone(work)


def test_local_steps_need_a_rule_with_a_rate():
    def work(worker):
        with pytest.raises(ConfigurationError, match="need a rule with lr"):
            optimizer(worker, nn.Linear(2, 1), hw.Accumulate(), push_every=2)

    alone(work, sync="async")


def test_groups_are_fixed_once_registered():
    def work(worker):
        opt = optimizer(worker, nn.Linear(2, 1))
        with pytest.raises(UsageError, match="add_param_group"):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})

    alone(work)


def test_groups_mirror_what_the_user_wrote_with_frozen_parameters_left_out():
    def work(worker):
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        net[0].requires_grad_(False)
        groups = [
            {"params": net[0].parameters(), "lr": 0.5},
            {"params": net[1].parameters(), "lr": 0.25},
            {"params": [net[2].weight], "lr": 1.0},
        ]
        opt = optimizer(worker, net, groups=groups)
        assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25, 1.0]
        assert [group["param_names"] for group in opt.param_groups] == [
            [],
            ["1.weight", "1.bias"],
            ["2.weight"],
        ]
        for group in opt.param_groups:
            group["lr"] *= 2
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        for parameter in net[1:].parameters():
            parameter.grad = torch.ones_like(parameter)
        opt.step()
        for name, rate in {"1.weight": 0.5, "1.bias": 0.5, "2.weight": 2.0}.items():
            assert net.get_parameter(name).equal(start[name] - rate), name

    alone(work)
