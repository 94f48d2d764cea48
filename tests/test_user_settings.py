"""The user's own settings: nested plain data arrives as it was given; anything else is refused by its
name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headwater as hw
from headwater.spec.user_settings import checked, pack, unpack

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
)
PLAIN = st.recursive(SCALARS, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=12)


@given(st.dictionaries(st.text(), PLAIN))
def test_plain_data_arrives_as_it_was_given(settings):
    assert unpack(pack(checked(settings))) == settings


def test_tuples_become_lists_and_numpys_scalars_python():
    settings = checked({"layers": (1, (2,)), "lr": np.float32(0.5), "n": np.int64(3), "on": np.bool_(True)})
    assert settings == {"layers": [1, [2]], "lr": 0.5, "n": 3, "on": True}
    assert [type(settings[name]) for name in ("lr", "n", "on")] == [float, int, bool]


CIRCLE: list = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"path": Path("a")}, r"settings\['path'\] is a PosixPath.*str\("),
        ({"a": {"b": [0, {1, 2}]}}, r"settings\['a'\]\['b'\]\[1\] is a set"),
        ({"array": np.zeros(3)}, r"settings\['array'\] is a ndarray"),
        ({"raw": b"x"}, r"settings\['raw'\] is a bytes"),
        ({3: 1}, r"settings: the key 3 is a int"),
        ({"a": {None: 1}}, r"settings\['a'\]: the key None"),
        ({"n": 2**70}, r"settings\['n'\] is 1180591620717411303424, expected an integer of 64 bits"),
        ({"deep": CIRCLE}, "contains itself"),
        ({"text": "x" * (2 << 20)}, r"settings take 2,097,1\d\d bytes, at most 1,048,576"),
        ([("a", 1)], "settings: got a list"),
    ],
)
def test_anything_else_is_refused_at_once_and_named(settings, complaint):
    with pytest.raises(hw.errors.ConfigurationError, match=complaint):
        hw.run(lambda worker: None, settings=settings, engine="inline")


def test_a_worker_gets_them_nested():
    settings = {"layers": [64, 32], "optimizer": {"name": "adam", "betas": [0.9, 0.999]}, "seed": None}
    result = hw.run(lambda worker: worker.settings, workers=1, settings=settings, engine="inline")
    assert result.values == [settings]
