"""Nothing grows with the steps: the short form of `headwater bench soak`."""

import pytest

from headwater.bench.soak import Usage, judged, soak
from headwater.machines.row_buffer import RowBuffer

STEPS, MORE_STEPS = 200, 5_000


def grown(looks, steps):
    """What costs more at the end than before, and how much; processor time only where it is plain."""
    figures = judged(looks, steps)
    return [f"{one.case}: {one.ratio:.2f}" for one in figures if one.ratio > max(one.target, SLACK[one.unit])]


SLACK = {"µs": 1.5, "MB": 1.02, "": 1.1}


def test_small_steps_cost_at_their_end_what_they_cost_before(long):
    steps = MORE_STEPS if long else STEPS
    assert grown(soak(steps, engine="inline"), steps) == []


def test_what_grows_is_said():
    flat = [Usage(1.0, 100.0, 50, 40) for _ in range(20)]
    assert grown(flat, 20) == []
    for number, name in enumerate(Usage.__dataclass_fields__):
        looks = []
        for look, usage in enumerate(flat):
            fields = [usage.seconds, usage.memory, usage.descriptors, usage.threads]
            fields[number] *= 1.2**look
            looks.append(Usage(*fields))
        assert len(grown(looks, 20)) == 1, name


@pytest.mark.long  # it is seen in the memory of the process, beside that of other tests
def test_scratch_memory_that_is_never_given_back_is_found(monkeypatch):
    monkeypatch.setattr(RowBuffer, "reset", lambda self: None)
    assert any("memory" in line for line in grown(soak(STEPS, engine="inline"), STEPS))
