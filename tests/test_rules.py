"""Rules and schedules alone: their formulas against torch.optim, and what may be said about them."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import ConfigurationError
from headwater.kernels import dense
from headwater.messages import RuleSpec
from headwater.spec import rules
from headwater.spec.registry import load_rules, register
from headwater.spec.rules import (
    SGD,
    Accumulate,
    Adagrad,
    Adam,
    AdamW,
    Assign,
    Ftrl,
    Lamb,
    Lion,
    RMSprop,
    Rule,
    Yogi,
    from_spec,
)
from headwater.spec.schedules import Constant, Cosine, Linear, StepDecay

EXAMPLES = [
    SGD(0.1),
    SGD(Constant(0.1, warmup=3), momentum=0.9, dampening=0.1, weight_decay=0.01),
    SGD(0.1, momentum=0.9, nesterov=True),
    Adagrad(),
    RMSprop(Linear(0.1, over=10)),
    RMSprop(centered=True, momentum=0.9),
    Adam(betas=(0.8, 0.99)),
    Adam(StepDecay(0.1, every=5), amsgrad=True),
    AdamW(Cosine(0.1, over=100, end=0.01, warmup=5)),
    Ftrl(l1=0.1, l2=0.2, beta=1),
    Yogi(weight_decay=0.1, initial_accumulator=0.01),
    Lion(betas=(0.8, 0.9), weight_decay=0.1),
    Lamb(weight_decay=0.1),
    Accumulate(),
    Assign(),
]


def run(rule, gradients, value=0.5):
    """The rule's function itself, in float64, on one element: its value after each gradient."""
    states = list(rule.states().values())
    for i, gradient in enumerate(gradients):
        result = rule.function()(value, gradient, *states, *rule.scalars(i, i + 1))
        value, *states = result if states else (result,)
        yield value


# ── formulas ────────────────────────────────────────────────────────────────────────────────────

OF_TORCH = [
    (rules.SGD, torch.optim.SGD, {"lr": 0.1}),
    (rules.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    (rules.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    (rules.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (rules.Adagrad, torch.optim.Adagrad, {}),
    (
        rules.Adagrad,
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    (rules.RMSprop, torch.optim.RMSprop, {}),
    (rules.RMSprop, torch.optim.RMSprop, {"alpha": 0.9, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.5}),
    (rules.RMSprop, torch.optim.RMSprop, {"centered": True, "weight_decay": 0.1}),
    (rules.RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    (rules.Adam, torch.optim.Adam, {}),
    (rules.Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 0.1, "weight_decay": 0.1}),
    (rules.Adam, torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (rules.AdamW, torch.optim.AdamW, {}),
    (rules.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5, "amsgrad": True}),
]


@pytest.mark.parametrize(("rule", "optimizer", "settings"), OF_TORCH)
def test_a_rule_computes_what_the_optimizer_of_torch_computes(rule, optimizer, settings):
    gradients = np.random.default_rng(3).standard_normal(30).tolist()
    value = torch.tensor(0.5, dtype=torch.float64)
    reference = optimizer([value], **settings)
    for ours, gradient in zip(run(rule(**settings), gradients), gradients, strict=True):
        value.grad = torch.tensor(gradient, dtype=torch.float64)
        reference.step()
        assert ours == pytest.approx(value.item(), rel=1e-11)


@pytest.mark.parametrize(("rule", "optimizer", "settings"), OF_TORCH)
def test_a_rule_keeps_the_states_of_torch_under_the_names_of_torch(rule, optimizer, settings):
    value = torch.tensor(0.5)
    reference = optimizer([value], **settings)
    value.grad = torch.tensor(1.0)
    reference.step()
    theirs = {name for name, state in reference.state[value].items() if state is not None} - {"step"}
    assert set(rule(**settings).states()) == theirs


def test_ftrl_follows_the_proximal_form_that_it_was_derived_from():
    lr, l1, l2, beta = 0.3, 3.0, 0.2, 1.0
    gradients = np.random.default_rng(5).standard_normal(50).tolist()
    squares, linear, value, zeros = 0.1, 0.0, 0.5, 0
    for ours, g in zip(run(Ftrl(lr, l1, l2, beta=beta), gradients), gradients, strict=True):
        sigma = ((squares + g * g) ** 0.5 - squares**0.5) / lr
        squares, linear = squares + g * g, linear + g - sigma * value
        strength = (beta + squares**0.5) / lr + 2 * l2
        value = -np.sign(linear) * max(abs(linear) - l1, 0) / strength
        zeros += value == 0
        assert ours == pytest.approx(value, rel=1e-11)
    assert 0 < zeros < 50


def test_yogi_moves_its_average_of_squares_by_at_most_a_bounded_amount():
    lr, eps, beta1, beta2, decay = 0.1, 0.01, 0.8, 0.9, 0.2
    gradients = (np.random.default_rng(5).standard_normal(50) * 3).tolist()
    rule = Yogi(lr, (beta1, beta2), eps, decay, initial_accumulator=0.3)
    value, m, v = 0.5, 0.0, 0.3
    for ours, gradient in zip(run(rule, gradients), gradients, strict=True):
        g = gradient + decay * value
        m = beta1 * m + (1 - beta1) * g
        v = v - (1 - beta2) * np.sign(v - g * g) * g * g
        value -= lr * m / (v**0.5 + eps)
        assert ours == pytest.approx(value, rel=1e-11)


def test_lion_moves_by_the_rate_in_the_direction_of_a_sign():
    lr, beta1, beta2, decay = 0.1, 0.8, 0.95, 0.3
    gradients = [0.0, *np.random.default_rng(5).standard_normal(50)]
    value, m = 0.5, 0.0
    for ours, g in zip(run(Lion(lr, (beta1, beta2), decay), gradients), gradients, strict=True):
        value = value - lr * (np.sign(beta1 * m + (1 - beta1) * g) + decay * value)
        m = beta2 * m + (1 - beta2) * g
        assert ours == pytest.approx(value, rel=1e-11)
    assert list(run(Lion(0.25), [3.0, 1e-9, 0.0], value=0.0)) == [-0.25, -0.5, -0.75]


def test_centred_rmsprop_stays_a_number_where_the_variance_rounds_below_zero():
    step = RMSprop(centered=True, eps=0.1).function()
    value, _, _ = step(1.0, 1.0, 1.0, 1.1, 0.1, 0.1, 0.0, 0.5, 0.5)
    assert value == pytest.approx(0.0)


def test_plain_sgd_has_no_state_and_assign_and_accumulate_neither():
    assert SGD(0.1).states() == Accumulate().states() == Assign().states() == {}
    assert list(run(Accumulate(), [1.0, 2.0, 3.0], value=0.0)) == [1.0, 3.0, 6.0]
    assert list(run(Assign(), [1.0, 2.0])) == [1.0, 2.0]


def test_only_accumulate_is_always_a_sum():
    assert [rule.name for rule in EXAMPLES if rule.always_sum] == ["Accumulate"]


def test_schedules_count_the_updates_of_the_model_and_bias_correction_those_of_the_tensor():
    rule = Adam(Linear(1.0, over=10), betas=(0.5, 0.75))
    step, correction = rule.scalars(updates=5, count=2)[:2]
    assert step == 0.5 / (1 - 0.5**2)
    assert correction == 1 / math.sqrt(1 - 0.75**2)


# ── travel ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", EXAMPLES, ids=str)
def test_a_rule_comes_back_equal_from_its_message(rule):
    bytes_ = msgspec.msgpack.encode(rule.to_spec())
    assert from_spec(msgspec.msgpack.decode(bytes_, type=RuleSpec)) == rule


@given(st.floats(0, 1e30), st.floats(0, 1, exclude_max=True))
def test_settings_travel_to_the_last_bit(lr, beta):
    rule = Adam(lr=lr, betas=(beta, 0.5))
    assert from_spec(msgspec.json.decode(msgspec.json.encode(rule.to_spec()), type=RuleSpec)) == rule


def test_numbers_of_any_kind_make_equal_rules():
    assert SGD(1) == SGD(np.float32(1)) == SGD(1.0)
    assert Adam(betas=[0, np.float64(0.5)]) == Adam(betas=(0.0, 0.5))


def test_an_unknown_rule_names_the_loaded_ones_and_the_option_and_imports_nothing():
    before = set(sys.modules)
    with pytest.raises(ConfigurationError, match=r"no rule 'antigravity'.* only .*SGD, .*Assign.*--rules"):
        from_spec(RuleSpec("antigravity", {}))
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (RuleSpec("SGD", {"lr": 0.1, "momentun": 0.9}), "no setting 'momentun': choose from lr, momentum"),
        (RuleSpec("SGD", {"momentum": 0.9}), "SGD needs lr"),
        (RuleSpec("SGD", {"lr": "0.1"}), "lr must be a finite number or a Schedule, got '0.1'"),
        (RuleSpec("SGD", {"lr": True}), "lr must be a finite number"),
        (RuleSpec("SGD", {"lr": float("nan")}), "lr must be a finite number"),
        (RuleSpec("SGD", {"lr": RuleSpec("Adam", {})}), "no schedule 'Adam': choose from Constant, Linear"),
        (RuleSpec("SGD", {"lr": RuleSpec("Linear", {"lr": 0.1})}), "Linear needs over"),
        (RuleSpec("SGD", {"lr": 0.1, "nesterov": 1.0}), "nesterov must be True or False"),
        (RuleSpec("Adam", {"beta1": 0.5}), "Adam needs beta2 too"),
        (RuleSpec("Adam", {"beta1": None, "beta2": 0.5}), "betas must be a finite number, got None"),
        (RuleSpec("Accumulate", {"lr": 0.1}), "Accumulate has no setting 'lr'"),
    ],
)
def test_settings_that_no_rule_has_are_refused(spec, text):
    with pytest.raises(ConfigurationError, match=text):
        from_spec(spec)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SGD(-0.1), "SGD: lr=-0.1 is impossible: pass lr at least 0"),
        (lambda: SGD(0.1, momentum=-1), "momentum at least 0"),
        (lambda: SGD(0.1, nesterov=True), "nesterov needs momentum above 0"),
        (lambda: SGD(0.1, momentum=0.9, dampening=0.1, nesterov=True), "and dampening 0"),
        (lambda: Adagrad(initial_accumulator_value=-1), "initial_accumulator_value at least 0"),
        (lambda: RMSprop(alpha=1.1), "alpha from 0 to 1"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas of at least 0 and below 1"),
        (lambda: Adam(betas=0.9), "betas must be 2 finite numbers, got 0.9"),
        (lambda: AdamW(eps=-1e-8), "eps at least 0"),
        (lambda: Ftrl(0), "lr above 0"),
        (lambda: Ftrl(Cosine(0.1, over=10)), "a schedule that ends above 0"),
        (lambda: Ftrl(StepDecay(0.1, every=10)), "a schedule that ends above 0"),
        (lambda: Constant(-1), "Constant: lr=-1.0 is impossible"),
        (lambda: Constant(1, warmup=-1), "warmup at least 0"),
        (lambda: Constant(1, warmup=1.5), "warmup must be a whole number, got 1.5"),
        (lambda: Linear(1, over=0), "over at least 1"),
        (lambda: Cosine(1, over=10, end=-1), "end at least 0"),
        (lambda: StepDecay(1, every=0), "every at least 1"),
        (lambda: StepDecay(1, every=1, factor=2), "factor from 0 to 1"),
        (lambda: StepDecay(1, every=1, end=2), "end from 0 to lr"),
    ],
)
def test_an_impossible_setting_is_refused_where_it_is_made(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


# ── changes while training ──────────────────────────────────────────────────────────────────────


def test_changed_settings_make_a_changed_copy():
    rule = Adam(Linear(1.0, over=10), betas=(0.8, 0.9))
    assert rule.with_settings(beta1=0.5) == Adam(Linear(1.0, over=10), betas=(0.5, 0.9))
    assert rule.with_settings(lr=0.25, eps=1) == Adam(0.25, betas=(0.8, 0.9), eps=1.0)
    assert SGD(0.1, momentum=0.9).with_settings(momentum=0.5) == SGD(0.1, momentum=0.5)
    assert rule == Adam(Linear(1.0, over=10), betas=(0.8, 0.9))


@pytest.mark.parametrize(
    ("rule", "values", "text"),
    [
        (SGD(0.1), {"learning_rate": 1.0}, "SGD has no setting 'learning_rate': choose from lr, momentum"),
        (SGD(0.1), {"lr": -1.0}, "lr=-1.0 is impossible"),
        (SGD(0.1), {"momentum": 0.9}, "would change which states it has"),
        (SGD(0.1, momentum=0.9), {"momentum": 0.0}, "would change which states it has"),
        (Adam(), {"betas": 0.5}, "no setting 'betas': choose from lr, beta1, beta2"),
    ],
)
def test_a_change_that_cannot_be_is_refused(rule, values, text):
    with pytest.raises(ConfigurationError, match=text):
        rule.with_settings(**values)


# ── schedules ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Constant(0.5), [0.5, 0.5]),
        (Constant(1, warmup=4), [0.25, 0.5, 0.75, 1.0, 1.0]),
        (Linear(1, over=4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Linear(1, over=2, end=2, warmup=2), [0.5, 1.0, 1.0, 1.5, 2.0, 2.0]),
        (Cosine(2, over=2), [2.0, 1.0, 0.0, 0.0]),
        (Cosine(3, over=2, end=1, warmup=1), [3.0, 3.0, 2.0, 1.0]),
        (StepDecay(1, every=2, factor=0.5), [1.0, 1.0, 0.5, 0.5, 0.25]),
        (StepDecay(1, every=1, factor=0.5, end=0.3, warmup=2), [0.5, 1.0, 1.0, 0.5, 0.3, 0.3]),
    ],
    ids=str,
)
def test_a_schedule_gives_the_rates_of_its_formula(schedule, rates):
    assert [schedule.at(updates) for updates in range(len(rates))] == pytest.approx(rates, abs=1e-15)


@given(
    st.sampled_from([Constant(0.3, 5), Linear(0.3, 40, 0.1, 5), Cosine(0.3, 40, 0.1, 5), StepDecay(0.3, 7)]),
    st.integers(0, 10**12),
)
def test_a_rate_never_leaves_its_bounds(schedule, updates):
    assert 0 <= schedule.at(updates) <= 0.3 * (1 + 1e-15)
    assert updates < schedule.warmup or schedule.at(updates) >= schedule.lowest


# ── the user's rules ────────────────────────────────────────────────────────────────────────────


def forget_afterwards(monkeypatch):
    """What a test registers is unknown again after it."""
    monkeypatch.setattr(Rule.registry, "_classes", dict(Rule.registry._classes))


def test_a_module_of_rules_is_loaded_by_name_and_its_rules_by_message(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    forget_afterwards(monkeypatch)
    (tmp_path / "my_signs.py").write_text(
        "from dataclasses import dataclass\n"
        "from headwater.spec.rules import Rule, register\n"
        "@register\n"
        "@dataclass(frozen=True)\n"
        "class Signs(Rule):\n"
        "    lr: float\n"
        "    steps: int = 1\n"
    )
    spec = RuleSpec("Signs", {"lr": 0.5, "steps": 3})
    with pytest.raises(ConfigurationError, match="no rule 'Signs'"):
        from_spec(spec)
    load_rules("my_signs")
    assert repr(from_spec(spec)) == "Signs(lr=0.5, steps=3)"
    with pytest.raises(ConfigurationError, match="steps must be a whole number"):
        from_spec(RuleSpec("Signs", {"lr": 0.5, "steps": 3.5}))


def test_a_module_of_rules_that_cannot_be_imported_is_an_error_of_configuration():
    with pytest.raises(ConfigurationError, match=r"rules module 'no\.such' cannot be imported.*without \.py"):
        load_rules("no.such")


def test_what_is_no_rule_is_not_registered(monkeypatch):
    forget_afterwards(monkeypatch)

    class Loose(Rule):
        pass

    @dataclass(frozen=True)
    class Adam(Rule):
        pass

    @dataclass
    class Plain:
        pass

    with pytest.raises(ConfigurationError, match="Loose is not a frozen dataclass"):
        register(Loose)
    with pytest.raises(ConfigurationError, match="has the name of a rule of headwater"):
        register(Adam)
    with pytest.raises(ConfigurationError, match="a class derived from Rule"):
        register(Plain)
    assert Rule.registry.find("Adam") is rules.Adam


def test_the_rule_of_the_documentation_works(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    forget_afterwards(monkeypatch)
    page = (Path(__file__).parent.parent / "docs" / "rules.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_rules.py").write_text(example)
    load_rules("my_rules")
    rule = from_spec(RuleSpec("Signum", {"lr": 0.5, "beta": 0.25, "weight_decay": 0.5}))
    gradients = [np.array([2.0, -2.0, 0.0], np.float32)] * 2
    values, average = np.zeros(3, np.float32), np.zeros(3, np.float32)
    places = np.array([gradient.ctypes.data for gradient in gradients])
    dense(rule)(places, 2.0, values, (average,), rule.scalars(0, 1), np.array([], np.int64))
    assert values.tolist() == [-0.5, 0.5, 0.0]
    assert average.tolist() == [1.5, -1.5, 0.0]
