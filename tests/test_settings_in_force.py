"""Whose settings count, what is shown of them, and what a restarted or resumed program finds."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import headwater as hw
from headwater import messages as m
from headwater.errors import ConfigurationError, RegistrationError, WorkerError
from headwater.log.state import LogState
from headwater.shard.governed import GovernedRules


def train(function, **options):
    return hw.run(function, **{"engine": "inline", "patience": 5, "deadline": 60, "workers": 1, **options})


def zeros(name="w"):
    return {name: np.zeros(1, np.float32)}


def weight(value=0.0):
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def optimizer(worker, net, rule=None, **options):
    return hw.torch.DistributedOptimizer(worker, net, rule or hw.SGD(lr=1.0), **options)


def turn(opt, net):
    """A step with a gradient of 1; how far it moved the parameter, which with SGD is the rate."""
    before = net.weight.item()
    net.weight.grad = torch.ones(1, 1)
    opt.step()
    return round(before - net.weight.item(), 6)


# ── what can be set ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(2), 1, np.float16(0.25)])
def test_numbers_of_any_kind_are_set(value):
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        table = worker.table("t", 1, hw.SGD(lr=1.0))
        model.push({"w": -np.ones(1)})
        table.push([7], -np.ones((1, 1)))
        model.set(lr=value)
        table.set(lr=value)
        worker.step()
        assert model.pull()["w"].tolist() == [float(value)]
        assert table.pull([7]).tolist() == [[float(value)]]

    train(work)


def test_settings_that_are_true_or_false_are_set():
    def work(worker):
        rule = hw.SGD(lr=1.0, momentum=0.5)
        model, table = worker.model("m", zeros(), rule), worker.table("t", 1, rule)
        for _ in range(2):
            model.set(nesterov=True)
            table.set(nesterov=True)
            model.push({"w": -np.ones(1)})
            table.push([7], -np.ones((1, 1)))
            worker.step()
        assert model.rules == [hw.SGD(lr=1.0, momentum=0.5, nesterov=True)]
        assert (model.pull()["w"].item(), table.pull([7]).item()) == (1.5 + 1.75, 1.5 + 1.75)

    train(work)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": None},
        {"lr": "fast"},
        {"lr": np.nan},
        {"lr": -1.0},
        {"lr": np.ones(2)},
        {"lr": True},
        {"lr": 1j},
        {"lr": 10**400},
        {"rate": 1.0},
        {"momentum": 0.5},
        {"nesterov": 1},
        {"nesterov": np.array([True])},
    ],
)
def test_what_cannot_be_set_is_refused_at_the_call_and_nothing_is_lost(values):
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        table = worker.table("t", 1, hw.SGD(lr=1.0))
        model.push({"w": -np.ones(1)})
        table.push([7], -np.ones((1, 1)))
        for owner in (model, table):
            with pytest.raises(ConfigurationError):
                owner.set(**values)
        worker.step()
        assert (model.pull()["w"].item(), table.pull([7]).item()) == (1.0, 1.0)

    train(work)


def test_the_last_of_orders_for_all_groups_and_for_one_wins():
    def work(worker):
        groups = [hw.Group(["b"], hw.SGD(lr=2.0))]
        model = worker.model("m", {**zeros("a"), **zeros("b")}, hw.SGD(lr=1.0), groups=groups)
        model.set(lr=3.0)
        model.set(group=1, lr=4.0)
        model.set(lr=5.0)
        model.push({"a": -np.ones(1), "b": -np.ones(1)})
        worker.step()
        assert [value.item() for value in model.pull().values()] == [5.0, 5.0]
        with pytest.raises(ConfigurationError, match="group must be an integer ≥ 0, got True"):
            model.set(group=True, lr=1.0)

    train(work)


# ── whose settings count ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sync", ["sync", "async", "ssp:1"])
@pytest.mark.parametrize("who", [0, 1])
def test_the_lowest_ranks_param_groups_count_and_every_rank_shows_what_the_servers_used(sync, who):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, hw.SGD(lr=0.5))
        turn(opt, net)
        worker.barrier()
        for step in range(3):
            if worker.rank == who and step == 1:
                opt.param_groups[0]["lr"] = 0.25
            for rank in range(worker.workers):  # asynchronous updates one after the other, rank 0's first
                if sync == "sync" or rank == worker.rank:
                    turn(opt, net)
                    if sync == "sync":
                        break
                worker.barrier()
        opt.param_groups[0]["lr"] = 99.0  # what is never sent is never in force
        return opt.result is not None and opt._groups[0].shown["lr"]

    assert train(work, workers=2, sync=sync).values == [0.25 if who == 0 else 0.5] * 2


def test_the_lowest_ranks_unchanged_rate_is_the_one_that_moves_the_parameters():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        moves = []
        for step in range(4):
            opt.param_groups[0]["lr"] = 1.0 if worker.rank == 0 else 1.0 / (step + 2)
            moves.append(turn(opt, net))
            assert opt.param_groups[0]["lr"] == 1.0
        return moves

    assert train(work, workers=3).values == [[1.0] * 4] * 3


def test_the_next_rank_governs_once_the_lowest_has_left():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        moves = [turn(opt, net)]
        if worker.rank == 0:
            return moves
        for _ in range(3):
            opt.param_groups[0]["lr"] = 0.5 * opt.param_groups[0]["lr"]
            moves.append(turn(opt, net))
        return moves

    assert train(work, workers=2).values == [[1.0], [1.0, 0.5, 0.25, 0.125]]


def test_a_scheduler_on_every_rank_lowers_the_rate_once_also_in_asynchronous_training():
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        turn(opt, net)
        scheduler = lr_scheduler.StepLR(opt, 2, gamma=0.5)
        for _ in range(4):
            for rank in range(worker.workers):
                if rank == worker.rank:
                    turn(opt, net)
                worker.barrier()
            scheduler.step()
        turn(opt, net)
        return opt._model.rules[0].lr

    assert min(train(work, workers=3, sync="async").values) == 0.25


def test_an_order_takes_effect_whoever_gives_it():
    def work(worker):
        model, table = worker.model("m", zeros(), hw.SGD(lr=1.0)), worker.table("t", 1, hw.SGD(lr=1.0))
        if worker.rank == 1:
            model.set(lr=0.5)
            table.set(lr=0.25)
        model.push({"w": -np.ones(1)})
        table.push([7], -np.ones((1, 1)))
        worker.step()
        assert (model.rules[0].lr, table.rule.lr) == (0.5, 0.25)
        return model.pull()["w"].item(), table.pull([7]).item()

    assert train(work, workers=2).values == [(0.5, 0.25)] * 2


def test_rates_of_tables_are_those_of_the_lowest_rank():
    class Net(nn.Module):
        def __init__(self, worker):
            super().__init__()
            self.rows = hw.torch.Embedding(worker, "rows", 1, hw.SGD(lr=1.0), initializer=hw.Zeros())

    def work(worker):
        net = Net(worker)
        opt = hw.torch.DistributedOptimizer(worker, net)
        rates = [1.0, 0.5, 0.5] if worker.rank == 0 else [0.1, 0.2, 0.3]
        for rate in rates:
            opt.param_groups[0]["lr"] = rate
            (-net.rows([7])).sum().backward()
            opt.step()
        return opt.param_groups[0]["lr"], net.rows.table.pull([7]).item()

    assert train(work, workers=2).values == [(0.5, 2.0)] * 2


def test_a_rank_whose_settings_do_not_count_is_told(caplog):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net)
        for _ in range(3):
            if worker.rank == 1:
                opt.param_groups[0]["lr"] = 0.5
            turn(opt, net)

    with caplog.at_level(logging.INFO, logger="headwater.torch"):
        train(work, workers=2)
    (line,) = [one for one in caplog.messages if "lowest rank" in one]
    assert line.startswith("model 'model': this worker's param_groups have lr=0.5, but")
    assert line.endswith("1.0 is in force")


def test_a_schedule_of_the_servers_that_a_scheduler_replaces_is_told(caplog):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, hw.SGD(lr=hw.StepDecay(1.0, every=1, factor=0.5)))
        plateau = lr_scheduler.ReduceLROnPlateau(opt, factor=0.1, patience=0)
        moves, shown = [], []
        for loss in (3.0, 2.0, 4.0, 1.0):
            moves.append(turn(opt, net))
            shown.append(opt.param_groups[0]["lr"])
            plateau.step(loss)
        assert shown == pytest.approx(moves)
        return moves

    assert train(work).values[0] == pytest.approx([1.0, 0.5, 0.25, 0.025])
    (line,) = [one for one in caplog.messages if "followed the schedule" in one]
    assert "model 'model': lr followed the schedule StepDecay(lr=1.0" in line
    assert "which 0.025 from param_groups has replaced" in line


@pytest.mark.parametrize("servers", [1, 2])
def test_settings_that_go_back_before_a_push_are_not_sent(servers):
    def work(worker):
        net = weight()
        opt = optimizer(worker, net, push_every=3, pull_every=3)
        for rate in (1.0, 0.25, 1.0):
            opt.param_groups[0]["lr"] = rate
            turn(opt, net)
        return opt._model.rules[0].lr, net.weight.item()

    assert train(work, sync="async", servers=servers).values == [(1.0, -3.0)]


# ── pure ────────────────────────────────────────────────────────────────────────────────────────


def standings(*ranks):
    """Members 1, 2, … of ranks 0, 1, …, each of a phase and whether its batches are over."""
    state = LogState()
    newcomers = tuple(m.Newcomer(rank + 1, rank) for rank in range(len(ranks)))
    state.apply(m.Enrolled(1, len(ranks), newcomers))
    for member, (phase, over) in enumerate(ranks, start=1):
        state.standing(member).phase, state.standing(member).over = phase, over
    return state


ACTIVE = ("active", False)


def test_the_lowest_rank_that_trains_governs_whoever_comes_first():
    rules = GovernedRules([hw.SGD(lr=1.0).to_spec()])
    assert rules.obeys(2, governs=False)
    rules.claim(2, standings(ACTIVE, ACTIVE))
    assert rules.obeys(2, governs=True)
    rules.claim(1, standings(ACTIVE, ACTIVE))
    for waiting in (ACTIVE, ("meeting", False)):
        rules.claim(2, standings(waiting, ACTIVE))
        assert rules.obeys(1, governs=True)
        assert not rules.obeys(2, governs=True)
    again = GovernedRules([hw.SGD(lr=1.0).to_spec()])
    again.restore(rules.specs, rules.record())
    assert again.obeys(1, governs=True)
    for ended in (("ended", True), ("meeting", True)):
        rules.claim(1, standings(ACTIVE, ACTIVE))
        rules.claim(2, standings(ended, ACTIVE))
        assert rules.obeys(2, governs=True)


def test_what_a_member_knows_is_not_told_again_but_for_schedules():
    rules = GovernedRules([hw.SGD(lr=1.0).to_spec()])
    other = GovernedRules([hw.SGD(lr=0.5).to_spec()])
    known = hw.spec.declaration.fingerprint(rules.specs)
    assert not rules.differ(known)
    assert other.differ(known)
    rules.set(0, {"lr": 0.5})
    assert rules.differ(known)
    rules.set(-1, {"lr": hw.Constant(0.5).to_spec()})
    assert rules.differ(hw.spec.declaration.fingerprint(rules.specs))


# ── programs that begin again ───────────────────────────────────────────────────────────────────


def steps(count, make_scheduler=None, lr=1.0, before_the_first_step=None):
    """A program of `count` steps; what each moved and showed."""

    def work(worker):
        net = weight()
        opt = optimizer(worker, net, hw.SGD(lr=lr))
        scheduler = make_scheduler(opt) if make_scheduler else None
        if before_the_first_step:
            before_the_first_step(opt)
        moves = []
        for _ in range(count):
            moves.append(turn(opt, net))
            assert opt.param_groups[0]["lr"] == pytest.approx(moves[-1], abs=1e-5)
            if scheduler:
                scheduler.step()
        return moves

    return work


def resume(tmp_path, first, second, **options):
    """What the second program's rank 0 returned, and the warnings while it ran."""
    train(first, checkpoint=tmp_path, **options)
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("headwater").addHandler(handler)
    try:
        return train(second, checkpoint=tmp_path, resume=True, **options).values[0], lines
    finally:
        logging.getLogger("headwater").removeHandler(handler)


def test_what_a_resumed_program_declares_anew_wins_over_the_checkpoint_with_a_line_that_names_both(tmp_path):
    def program(lr):
        def work(worker):
            groups = [hw.Group(["b"], hw.SGD(lr=8.0, weight_decay=lr))]
            model = worker.model("m", {**zeros("a"), **zeros("b")}, hw.SGD(lr=lr), groups=groups)
            table = worker.table("t", 1, hw.SGD(lr=lr))
            before = model.pull(copy=True)["a"].item(), table.pull([7]).item()
            model.push({"a": -np.ones(1)})
            table.push([7], -np.ones((1, 1)))
            worker.step()
            assert model.rules == [hw.SGD(lr=lr), hw.SGD(lr=8.0, weight_decay=lr)]
            return model.pull()["a"].item() - before[0], table.pull([7]).item() - before[1]

        return work

    moved, lines = resume(tmp_path, program(1.0), program(0.25), servers=2)
    assert moved == (0.25, 0.25)
    assert lines == [
        "model 'm': lr of group 0 was 1.0 and is 0.25 from now on, as the program declares it; "
        "weight_decay of group 1 was 1.0 and is 0.25 from now on, as the program declares it",
        "table 't': lr was 1.0 and is 0.25 from now on, as the program declares it",
    ]


def test_a_rate_that_training_had_reached_stays_where_the_program_declares_what_it_declared_before(tmp_path):
    def half(opt):
        return lr_scheduler.ExponentialLR(opt, 0.5)

    moves, lines = resume(tmp_path, steps(3, half), steps(3, half))
    assert moves == [0.25, 0.125, 0.0625]
    assert lines == ["model 'model': lr is 0.25 and stays so, this program declares 1.0"]


def test_a_rate_that_a_scheduler_writes_while_it_is_made_is_no_jump_after_a_resume(tmp_path):
    def one_cycle(opt):
        return lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=8, cycle_momentum=False)

    def kept(opt):
        scheduler = one_cycle(opt)
        scheduler.load_state_dict(states[-1])
        return scheduler

    states = []

    def first(worker):
        net = weight()
        opt = optimizer(worker, net)
        scheduler = one_cycle(opt)
        moves = []
        for _ in range(4):
            moves.append(turn(opt, net))
            states.append(scheduler.state_dict())
            scheduler.step()
        turn(opt, net)
        states.append(scheduler.state_dict())
        return moves

    whole = train(steps(7, one_cycle)).values[0]
    moves, lines = resume(tmp_path, first, steps(2, kept))
    assert whole[4] == pytest.approx(moves[0])  # the rate that was in force when it ended
    assert lines == [
        f"model 'model': lr is {whole_rate(whole[4], lines)} and stays so, this program declares 1.0"
    ]


def whole_rate(rate, lines):
    """The rate in force as the line has it, which is that rate."""
    said = float(lines[0].split("lr is ")[1].split(" and")[0])
    assert said == pytest.approx(rate, abs=1e-6)
    return said


def test_a_rate_that_contradicts_what_is_in_force_after_a_resume_is_a_warning_with_both_numbers(tmp_path):
    def override(opt):
        opt.param_groups[0]["lr"] = 0.125

    moves, lines = resume(
        tmp_path,
        steps(3, lambda opt: lr_scheduler.ExponentialLR(opt, 0.5)),
        steps(2, before_the_first_step=override),
    )
    assert moves == [0.125, 0.125]
    assert lines[1].startswith(
        "model 'model': lr is 0.25 in force, as training left it, and this program sets"
    )
    assert "0.125 before its first step" in lines[1]


def test_a_restarted_rank_goes_on_with_the_rate_in_force():
    with hw.Cluster(workers=1, patience=5, deadline=60) as cluster:
        program = steps(3, lambda opt: lr_scheduler.ExponentialLR(opt, 0.5))
        with cluster.worker() as worker:
            assert program(worker) == [1.0, 0.5, 0.25]
        with cluster.worker() as worker:
            assert program(worker) == [0.25, 0.125, 0.0625]


def test_settings_that_need_other_states_are_refused_after_a_resume(tmp_path):
    def program(rule):
        def work(worker):
            model = worker.model("m", zeros(), rule)
            model.push({"w": np.ones(1)})
            worker.step()

        return work

    with pytest.raises(WorkerError, match=RegistrationError.__name__ + r".*momentum=0.0.*got .*momentum=0.5"):
        resume(tmp_path, program(hw.SGD(lr=1.0)), program(hw.SGD(lr=1.0, momentum=0.5)))


def test_a_worker_that_declares_other_settings_than_the_first_is_told(caplog):
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0 if worker.rank == 0 else 0.5))
        model.push({"w": -np.ones(1)})
        worker.step()
        assert model.rules == [hw.SGD(lr=1.0)]
        return model.pull()["w"].item()

    assert train(work, workers=2).values == [1.0, 1.0]
    assert "model 'm': lr is 1.0 and stays so, this program declares 0.5" in caplog.messages
