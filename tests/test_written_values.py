"""What a program writes to parameters between steps counts, once, or is refused."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import UsageError, WorkerError
from headwater.messages import ProgramWrite
from headwater.shard.writes import Writes


def train(function, **options):
    return hw.run(function, **{"engine": "inline", "patience": 5, "deadline": 60, "workers": 1, **options})


def weight(dtype=torch.float32, size=2, value=0.0):
    net = nn.Linear(size, 1, bias=False, dtype=dtype)
    nn.init.constant_(net.weight, value)
    return net


def optimizer(worker, net, rule=None, **options):
    return hw.torch.DistributedOptimizer(worker, net, rule or hw.SGD(lr=1.0), **options)


def turn(opt, net):
    """A step whose gradient is 1 for every element."""
    opt.zero_grad()
    net(torch.ones(1, net.in_features, dtype=net.weight.dtype)).sum().backward()
    opt.step()


def elements(net):
    return net.weight.detach().float().reshape(-1).tolist()


# ── what is noticed ─────────────────────────────────────────────────────────────────────────────


def _load(net):
    net.load_state_dict({"weight": torch.full_like(net.weight, 5.0)})


def _init(net):
    nn.init.constant_(net.weight, 5.0)


def _copy(net):
    with torch.no_grad():
        net.weight.copy_(torch.full_like(net.weight, 5.0))


def _data(net):
    net.weight.data.fill_(5.0)


def _numpy(net):
    net.weight.detach().numpy()[...] = 5.0


def _in_a_view(net):
    with torch.no_grad():
        net.weight.view(-1)[0:] = 5.0


WRITES = [_load, _init, _copy, _data, _numpy, _in_a_view]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("options", [{}, {"servers": 2}, {"transport": "tcp"}, {"sync": "async"}])
def test_what_is_written_after_construction_and_between_steps_is_trained_on(write, options):
    def work(worker):
        net = weight(size=1500)
        opt = optimizer(worker, net)
        seen = []
        for _ in range(2):
            write(net)
            assert net(torch.ones(1, 1500)).item() == 7500.0
            for _ in range(2):
                turn(opt, net)
                seen.append(set(elements(net)))
        return seen

    result = train(work, **options)
    assert result.values == [[{4.0}, {3.0}, {4.0}, {3.0}]]
    assert (result.parameters["model"]["weight"] == 3.0).all()


@pytest.mark.parametrize("write", [_load, _init, _copy])
def test_what_is_written_to_parameters_of_another_type_is_noticed(write):
    def work(worker):
        net = weight(torch.bfloat16)
        opt = optimizer(worker, net)
        turn(opt, net)
        write(net)
        turn(opt, net)
        return elements(net)

    assert train(work).values == [[4.0, 4.0]]


def test_one_element_of_a_small_parameter_is_noticed_however_it_was_written():
    def work(worker):
        net = nn.Linear(10, 10, bias=False)
        nn.init.zeros_(net.weight)
        opt = optimizer(worker, net)
        net.weight.data[3, 4] = 7.0
        net.weight.grad = torch.zeros(10, 10)
        opt.step()
        assert net.weight.sum().item() == net.weight[3, 4].item() == 7.0
        with torch.no_grad():
            net.weight[5, 6] = 2.0
        opt.step()

    assert train(work).parameters["model"]["weight"].sum() == 9.0


def test_the_first_noticed_write_is_told_and_the_later_ones_quietly(caplog):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        for _ in range(3):
            _copy(net)
            turn(opt, net)

    with caplog.at_level(logging.INFO, logger="headwater.torch"):
        train(work)
    told = [one for one in caplog.records if "what the program wrote to 'weight'" in one.message]
    assert [one.levelname for one in told] == ["WARNING", "INFO", "INFO"]
    assert "since its last step is assigned to the servers" in told[0].message


def test_a_module_that_nobody_writes_to_costs_no_entry():
    def work(worker):
        net = weight()
        other = nn.Linear(2, 2)
        opt, second = optimizer(worker, net), optimizer(worker, other, name="other")
        for k in range(3):
            turn(opt, net)
            net.eval()
            with torch.no_grad():
                net(torch.ones(1, 2))
            assert worker.version == 2 * k + 1
            second.step()
            assert worker.version == 2 * k + 2

    train(work)


def test_a_plain_step_that_reads_everything_neither_loses_writes_nor_invents_them():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        plain = worker.model("plain", {"v": np.zeros(1, np.float32)}, hw.Accumulate())
        turn(opt, net)
        plain.push({"v": np.ones(1)})
        worker.step()
        assert worker.version == 2
        _copy(net)
        plain.push({"v": np.ones(1)})
        worker.step()
        assert (elements(net), worker.version) == ([5.0, 5.0], 4)
        turn(opt, net)
        return elements(net)

    assert train(work).values == [[4.0, 4.0]]


def test_the_rules_state_stays():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, hw.SGD(lr=1.0, momentum=0.5))
        turn(opt, net)
        _copy(net)
        turn(opt, net)
        return elements(net)

    assert train(work).values == [[3.5, 3.5]]


def test_what_is_written_and_written_back_is_no_write_where_others_may_have_trained_on():
    def work(worker):
        net = weight(size=400)
        opt = optimizer(worker, net)
        turn(opt, net)
        if worker.rank == 0:
            kept = net.weight.detach().clone()
            nn.init.constant_(net.weight, 9.0)
            worker.barrier()
            worker.barrier()
            with torch.no_grad():
                net.weight.copy_(kept)
        else:
            worker.barrier()
            turn(opt, net)
            worker.barrier()
        turn(opt, net)
        worker.barrier()
        opt.pull_parameters()
        return set(elements(net))

    assert train(work, workers=2, sync="async").values == [{-5.0}] * 2


def test_a_pull_that_was_asked_for_replaces_what_was_written_and_says_so(caplog):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        turn(opt, net)
        _copy(net)
        opt.pull_parameters()
        assert elements(net) == [-1.0, -1.0]
        turn(opt, net)
        return elements(net)

    assert train(work).values == [[-2.0, -2.0]]
    assert any("is replaced by the servers' values: push_parameters()" in one for one in caplog.messages)


def test_local_steps_notice_the_programs_writes_and_not_their_own():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, push_every=2, pull_every=2)
        for _ in range(2):
            turn(opt, net)
        assert (elements(net), worker.version) == ([-2.0, -2.0], 1)
        _copy(net)
        for _ in range(2):
            turn(opt, net)
        return elements(net), worker.version

    assert train(work, sync="async").values == [([3.0, 3.0], 3)]


# ── several ranks ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sync", ["sync", "async", "ssp:0"])
def test_what_all_ranks_write_alike_counts_once(sync):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, hw.SGD(lr=0.0))
        _load(net)
        turn(opt, net)
        worker.barrier()
        _init(net)
        turn(opt, net)
        worker.barrier()
        opt.pull_parameters()
        return elements(net)

    assert train(work, workers=3, servers=2, sync=sync).values == [[5.0, 5.0]] * 3


def test_a_rank_that_loads_later_does_not_undo_what_others_have_trained_since():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        worker.barrier()
        if worker.rank == 1:
            worker.barrier()
        _load(net)
        turn(opt, net)
        if worker.rank == 0:
            for _ in range(3):
                turn(opt, net)
            worker.barrier()
        worker.barrier()
        opt.pull_parameters()
        return elements(net)

    assert train(work, workers=2, sync="async").values == [[0.0, 0.0]] * 2  # 5 and five updates of −1


@pytest.mark.parametrize("who", [0, 1])
def test_one_rank_may_write_alone(who):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        if worker.rank == who:
            _load(net)
        turn(opt, net)
        return elements(net)

    assert train(work, workers=2).values == [[4.0, 4.0]] * 2


@pytest.mark.parametrize("sync", ["sync", "async"])
def test_ranks_that_write_different_values_are_refused_with_the_names(sync):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        with torch.no_grad():
            net.weight.fill_(float(worker.rank))
        worker.barrier()
        if worker.rank == 0:
            net.weight.data.fill_(7.0)
        turn(opt, net)

    with pytest.raises(WorkerError, match=r"UsageError: the program wrote to 'weight': the ranks disagree"):
        train(work, workers=2, sync=sync)


def test_weights_that_every_rank_clips_after_each_step_stay_clipped():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, hw.SGD(lr=1.0 + worker.rank))
        for _ in range(4):
            turn(opt, net)
            for parameter in net.parameters():
                parameter.data.clamp_(-0.25, 0.25)
        opt.step()
        return elements(net)

    assert train(work, workers=2).values == [[-1.25, -1.25]] * 2


# ── buffers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["rank0", "mean"])
def test_buffers_that_are_loaded_reach_everybody(mode):
    def work(worker):
        net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        opt = optimizer(worker, net, hw.SGD(lr=0.0), buffers=mode)
        state = {name: torch.full_like(value, 3) for name, value in net.state_dict().items()}
        net.load_state_dict(state)
        net.eval()
        net(torch.ones(2, 1)).sum().backward()
        opt.step()
        assert all((value == 3).all() for value in net.state_dict().values())

    result = train(work, workers=2)
    assert result.parameters["model.buffers"]["1.running_mean"].tolist() == [3.0]


@pytest.mark.parametrize("mode", ["rank0", "mean"])
@pytest.mark.parametrize("kind", ["nonfinite", "scaler", "empty"])
def test_a_skipped_step_keeps_the_statistics_of_its_batch(mode, kind):
    def batch(step, rank):
        return torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * step + rank)) + step

    def passes(net, scaler, step, rank):
        scaler.scale(net(batch(step, rank)).mean()).backward()
        if step < 2:
            for parameter in net.parameters():
                parameter.grad = None if kind == "empty" else torch.full_like(parameter, torch.inf)

    def work(worker):
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        opt = optimizer(worker, net, hw.SGD(lr=0.1), buffers=mode, nonfinite="skip")
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=100, enabled=kind == "scaler")
        for step in range(4):
            opt.zero_grad()
            passes(net, scaler, step, worker.rank)
            scaler.step(opt)
            scaler.update()
        return net[0].running_mean.tolist()

    torch.manual_seed(0)
    plain = [nn.BatchNorm1d(3) for _ in range(2)]
    for step in range(4):
        for rank, norm in enumerate(plain):
            norm(batch(step, rank))
        if step >= 2:  # a step that was applied makes them equal
            if mode == "rank0":
                plain[1].load_state_dict(plain[0].state_dict())
            else:
                mean = (plain[0].running_mean + plain[1].running_mean) / 2
                for norm in plain:
                    norm.running_mean.copy_(mean)
    result = train(work, workers=2)
    for values in result.values:
        np.testing.assert_allclose(values, plain[0].running_mean.numpy(), rtol=1e-5, atol=1e-6)


# ── programs that begin again ───────────────────────────────────────────────────────────────────


def program(steps, seen):
    """PyTorch's order: make both, load both, train; BatchNorm besides."""

    def work(worker):
        net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
        opt = optimizer(worker, net)
        state = net.state_dict()
        for name in state:
            state[name] = torch.full_like(state[name], 5)
        net.load_state_dict(state)
        for _ in range(steps):
            opt.zero_grad()
            net(torch.ones(2, 2))
            seen.append((net[0].weight.tolist(), net[1].running_mean.item()))
            net[0].weight.grad = torch.ones(1, 2)
            opt.step()
        return net[0].weight.tolist()

    return work


def test_a_program_that_is_started_again_does_not_undo_training_with_what_it_loads(caplog):
    seen = []
    with hw.Cluster(workers=1, patience=5, deadline=60) as cluster:
        for _ in range(2):
            with cluster.worker() as worker:
                program(3, seen)(worker)
    assert [values for values, _ in seen] == [[[5.0 - k] * 2] for k in range(6)]
    mean = 5.0
    for k, (_, seen_mean) in enumerate(seen):
        mean = 0.9 * mean + 0.1 * 2 * (5.0 - k)
        assert seen_mean == pytest.approx(mean)
    assert any("is not taken; push_parameters()" in one for one in caplog.messages)


def test_a_resumed_program_trains_on_from_the_checkpoint_whatever_it_loads(tmp_path):
    seen = []
    train(program(2, seen), checkpoint=tmp_path)
    train(program(2, seen), checkpoint=tmp_path, resume=True)
    assert [values for values, _ in seen] == [[[5.0 - k] * 2] for k in range(4)]


def test_what_a_resumed_program_writes_after_its_first_step_counts(tmp_path):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        turn(opt, net)
        _init(net)
        turn(opt, net)
        return elements(net)

    assert train(work, checkpoint=tmp_path).values == [[4.0, 4.0]]
    assert train(work, checkpoint=tmp_path, resume=True).values == [[4.0, 4.0]]


def test_push_parameters_sets_the_servers_also_before_the_first_step(tmp_path):
    def work(worker):
        net = weight(value=5.0)
        opt = optimizer(worker, net)
        if worker.settings["push"]:
            _copy(net)
            opt.push_parameters()
        turn(opt, net)
        return elements(net)

    assert train(work, settings={"push": False}, checkpoint=tmp_path).values == [[4.0, 4.0]]
    again = train(work, settings={"push": True}, checkpoint=tmp_path, resume=True)
    assert again.values == [[4.0, 4.0]]


# ── frozen parameters ───────────────────────────────────────────────────────────────────────────


def test_a_layer_that_was_frozen_at_construction_and_needs_a_gradient_later_is_named():
    def work(worker):
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        net[0].requires_grad_(False)
        opt = optimizer(worker, net)
        net(torch.ones(1, 2)).sum().backward()
        opt.step()
        net[0].requires_grad_(True)
        with pytest.raises(UsageError, match=r"'0.weight' needs a gradient now.*freeze it afterwards"):
            opt.step()
        assert worker.version == 1
        late = optimizer(worker, net[0], name="backbone")
        start = net[0].weight.detach().clone()
        opt.zero_grad()
        net(torch.ones(1, 2)).sum().backward()
        opt.step()
        late.step()
        assert not net[0].weight.equal(start)
        net[0].requires_grad_(False)
        opt.step()

    train(work)


def test_a_layer_frozen_after_construction_trains_once_it_is_unfrozen():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        moved = []
        for step in range(4):
            net.weight.requires_grad_(step >= 2)
            net.weight.grad = torch.ones(1, 2) if step >= 2 else None
            opt.step()
            moved.append(elements(net)[0])
        return moved

    assert train(work).values == [[0.0, 0.0, -1.0, -2.0]]


# ── pure ────────────────────────────────────────────────────────────────────────────────────────


def test_what_another_rank_wrote_at_one_place_is_taken_once_or_refused():
    writes = Writes("model 'm'")
    first, other = ProgramWrite(digest=1, step=0), ProgramWrite(digest=2, step=0)
    assert writes.admit("values", first, member=1, updates=0)
    assert not writes.admit("values", first, member=2, updates=0)
    assert writes.admit("states", other, member=2, updates=0)
    with pytest.raises(UsageError, match="the ranks disagree about the values of model 'm'"):
        writes.admit("values", other, member=3, updates=0)
    assert not writes.admit("values", first, member=3, updates=10)  # the same place of its program
    with pytest.raises(UsageError):
        writes.admit("values", other, member=3, updates=10)
    assert writes.admit("values", ProgramWrite(digest=3, step=5), member=2, updates=10)
    assert not writes.admit("values", ProgramWrite(digest=3, step=9), member=1, updates=10)
    assert writes.admit("values", ProgramWrite(digest=4, step=5), member=2, updates=10)
    again = Writes("model 'm'", writes.records())
    assert not again.admit("values", ProgramWrite(digest=4, step=5), member=1, updates=12)
    assert len(writes.records()) == 4


def test_writes_are_remembered_for_a_while_only():
    writes = Writes("model 'm'")
    for step in range(100):
        assert writes.admit("values", ProgramWrite(step, step), member=1, updates=step)
    assert len(writes.records()) == 16
    assert not writes.admit("values", ProgramWrite(90, 90), member=2, updates=100)
