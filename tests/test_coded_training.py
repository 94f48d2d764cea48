"""Codecs in training: the same results whether bytes travel or not, what is lost is not, and only the coded
bytes cross a connection."""

import threading

import numpy as np
import pytest
from server_desks import Desk

import headwater as hw
from headwater import messages as m
from headwater.errors import ConfigurationError, ProtocolError, RegistrationError
from headwater.kernels.codecs import decode_rows, encode_rows
from headwater.machines.model_buffer import ModelBuffer
from headwater.spec.codecs import parse_codec
from headwater.spec.layout import PAGE
from headwater.testing import Violation, explore

ALL = ["bf16", "fp16", "int8", "q4", "topk:0.1", "2bit:0.01", "1bit:0.0"]
SHAPES = {"w": (83, 71), "b": (513,), "s": (), "none": (0, 3)}


def run(work, **options):
    return hw.run(work, **{"engine": "inline", "patience": 5, "deadline": 60, **options})


def bits(codec, values_codec=None, *, steps=4, clip_norm=None, merge=None, rule=None, **options):
    """Everything that training with these codecs comes to."""

    def work(worker):
        numbers = np.random.default_rng(worker.rank)
        values = {name: np.full(shape, 0.25, np.float32) for name, shape in SHAPES.items()}
        model = worker.model(
            "net",
            values,
            rule or hw.Adam(0.01),
            codec=codec,
            values_codec=values_codec,
            clip_norm=clip_norm,
            merge=merge,
        )
        table = worker.table(
            "rows", 6, hw.SGD(0.1), codec=codec if codec in ("bf16", "fp16", "int8") else None
        )
        for _ in range(steps):
            model.push({name: numbers.standard_normal(shape) for name, shape in SHAPES.items()})
            table.push(numbers.integers(0, 99, 40), numbers.standard_normal((40, 6)))
            worker.step(weight=1 + worker.rank)
        worker.barrier()
        rows = table.pull(np.arange(99))
        return b"".join(array.tobytes() for array in (*model.pull().values(), rows))

    result = run(work, **{"workers": 2, "servers": 2, **options})
    assert len(set(result.values)) == 1
    return result.values[0]


@pytest.mark.parametrize("codec", ALL)
def test_bytes_that_travel_and_bytes_that_do_not_come_to_the_same_bits_on_any_number_of_servers(codec):
    here = bits(codec, "bf16")
    assert here != bits(None, "bf16")
    assert bits(codec, "bf16", servers=3, transport="tcp") == here
    assert bits(codec, "bf16", servers=1, transport="tcp") == here


@pytest.mark.parametrize("how", [{"clip_norm": 0.5}, {"merge": "rda"}, {"merge": "median"}, {"replicas": 1}])
def test_coded_gradients_are_clipped_merged_and_replicated_like_others(how):
    here = bits("q4", "fp16", **how)
    assert bits("q4", "fp16", servers=3, transport="tcp", **how) == here


@pytest.mark.parametrize("codec", ["int8", "q4", "topk:0.25", "2bit:0.5", "1bit:0.0"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_what_servers_added_up_and_what_is_left_are_all_that_was_pushed(codec, transport):
    """In multiples of a power of two, so exactly."""

    def work(worker):
        numbers = np.random.default_rng(worker.rank)
        model = worker.model("sums", {"a": np.zeros(5000, np.float32)}, hw.Accumulate(), codec=codec)
        pushed = np.zeros(5000)
        for _ in range(6):
            gradient = numbers.integers(-8, 9, 5000) * 0.125
            if codec == "int8":
                gradient[::256] = 127 * 0.125  # the scale of a block is a power of two
                gradient[1::256] = -127 * 0.125
            pushed += gradient
            model.push({"a": gradient})
            worker.step()
        worker.barrier()
        return pushed, model.residual["a"].copy(), model.pull(copy=True)["a"]

    values = run(work, workers=2, servers=2, transport=transport).values
    total = sum(value[2] for value in values) / 2
    if codec in ("int8", "q4"):
        np.testing.assert_allclose(
            total + values[0][1] + values[1][1], values[0][0] + values[1][0], atol=2e-5
        )
    else:
        assert (total + values[0][1] + values[1][1] == values[0][0] + values[1][0]).all()
    assert any(value[1].any() for value in values) or codec == "int8"


def test_values_come_down_rounded_and_stay_exact_on_the_servers():
    def work(worker):
        model = worker.model("net", {"a": np.float32([1 / 3, 1.0])}, hw.SGD(1.0), values_codec="bf16")
        seen = [model.pull(copy=True)["a"]]
        for _ in range(2):
            model.push({"a": np.float32([2**-12, 0])})
            worker.step()
            seen.append(model.pull(copy=True)["a"])
        model.assign({"a": np.float32([1 / 3, 1 / 3])})
        seen.append(model.pull(copy=True)["a"])
        return seen

    third = np.float32(0.333984375)
    for transport in ("unix", "tcp"):
        result = run(work, workers=1, transport=transport)
        first, *_, last = result.values[0]
        assert first.tolist() == [third, 1.0]
        assert last.tolist() == [third, third]
        assert result.parameters["net"]["a"].tolist() == [np.float32(1 / 3)] * 2, "servers keep float32"


def sent(codec, values_codec=None):
    def work(worker):
        size = 1 << 16
        model = worker.model(
            "net", {"a": np.zeros(size, np.float32)}, hw.SGD(1.0), codec=codec, values_codec=values_codec
        )
        table = worker.table("rows", 64, hw.SGD(1.0), codec="int8" if codec == "int8" else None)
        before = worker.statistics()
        for _ in range(4):
            model.push({"a": np.linspace(-1, 1, size)})
            table.push(np.arange(100), np.ones((100, 64)))
            worker.step()
        after = worker.statistics()
        return [getattr(after, n) - getattr(before, n) for n in ("sent", "received", "gradient_bytes")]

    return np.array([run(work, workers=1, servers=2, transport=t).values[0] for t in ("tcp", "unix")])


def test_only_coded_bytes_cross_a_connection_and_statistics_count_them():
    values, rows, ids = 4 * 4 * (1 << 16), 4 * 100 * 4 * 64, 4 * 100 * 8
    (up, down, represented), (shared_up, shared_down, same) = sent(None)
    assert represented == same == values + rows
    assert values + rows + ids <= up <= values + rows + ids + 8_000
    assert values <= down <= values + 8_000
    assert max(shared_up, shared_down) < 8_000, "memory that is shared does not travel"
    (up, down, represented), _ = sent("int8", "bf16")
    assert represented == values // 4 + values // 256 + 4 * 100 * (4 + 64)
    assert represented + ids <= up <= represented + ids + 8_000
    assert values // 2 <= down <= values // 2 + 8_000
    for codec, least in (("bf16", 2), ("q4", 7.8), ("topk:0.01", 49), ("2bit", 16), ("1bit", 32)):
        (up, _, represented), _ = sent(codec)
        assert values / (represented - rows) >= least * 0.99
        assert up <= represented + ids + 8_000


def test_a_repeat_sends_the_same_bytes_and_counts_once():
    """The connection is cut under the step, whose bytes then go to servers that may have them already."""

    def work(worker):
        model = worker.model("sums", {"a": np.zeros(3000, np.float32)}, hw.Accumulate(), codec="2bit:1.0")
        pushed = np.zeros(3000)
        numbers = np.random.default_rng(3)
        for step in range(8):
            gradient = numbers.integers(-4, 5, 3000) * 0.5
            pushed += gradient
            model.push({"a": gradient})
            channel = worker._session.channels[step % 2]
            timer = threading.Timer(0.002 * step, channel.close)
            timer.start()
            worker.step()
            timer.join()
        return (model.pull()["a"] + model.residual["a"] == pushed).all()

    assert run(work, workers=1, servers=2, transport="tcp").values == [True]


def test_a_carried_late_step_keeps_every_gradient():
    def work(worker):
        model = worker.model("sums", {"a": np.zeros(700, np.float32)}, hw.Accumulate(), codec="2bit:1.0")
        worker.barrier()
        pushed, late = np.zeros(700), 0
        numbers = np.random.default_rng(worker.rank)
        for _ in range(12):
            gradient = numbers.integers(-4, 5, 700) * 0.5
            pushed += gradient
            model.push({"a": gradient})
            late += not worker.step().applied
        while "a" in model.local.staged:
            worker.step()
        worker.barrier()
        return pushed - model.residual["a"], model.pull(copy=True)["a"], late

    values = run(work, workers=3, servers=2, sync="sync:quorum=1,late=carry").values
    assert (sum(value[0] for value in values) == values[0][1]).all()


def test_a_dropped_step_brings_back_nothing_and_a_skipped_one_loses_nothing():
    def work(worker):
        model = worker.model(
            "net", {"a": np.zeros(2, np.float32)}, hw.Accumulate(), codec="2bit:1.0", nonfinite="skip"
        )
        model.push({"a": [0.5, 3.0]})
        worker.step()
        model.push({"a": [np.nan, 1.0]})
        worker.step()
        model.push({"a": [1.0, 1.0]})
        worker.step(weight=0)
        return model.residual["a"].tolist(), model.pull()["a"].tolist()

    assert run(work, workers=1).values == [([0.5, 2.0], [0.0, 1.0])]


# ── simulated ───────────────────────────────────────────────────────────────────────────────────

CODED = {"rule": hw.Adam(0.1), "checkpoints": 0, "meets": 0, "readers": 0}


@pytest.mark.parametrize("mode", ["sync", "sync:quorum=1,late=carry"])
def test_no_random_schedule_makes_of_a_codecs_bytes_what_they_are_not(mode, long, seed_base):
    explore(mode, 300 if long else 6, seed=seed_base, codec="2bit:0.5", shares=False, **CODED)
    explore(mode, 300 if long else 6, seed=seed_base, codec="q4", **CODED)


def test_a_residual_that_is_lost_at_a_repeat_is_found(monkeypatch):
    """Bytes that are made anew when a step is repeated have the residual in them a second time."""
    take, coded = ModelBuffer.take, ModelBuffer.coded

    def taken(self, mask):
        self.kept_for_fault = mask, self.memory.gradients.copy(), -1
        take(self, mask)

    def made_anew(self, server):
        fault = getattr(self, "kept_for_fault", None)
        epoch = self._machine.connections.epoch
        if fault is not None and self._coded is not None:
            mask, gradients, first = fault
            if first not in (-1, epoch):
                self._coded.encode(mask, gradients.copy())
            self.kept_for_fault = mask, gradients, epoch
        return coded(self, server)

    monkeypatch.setattr(ModelBuffer, "take", taken)
    monkeypatch.setattr(ModelBuffer, "coded", made_anew)
    with pytest.raises(Violation) as caught:
        explore("sync", 200, codec="2bit:0.5", shares=False, **CODED)
    assert caught.value.invariant in ("ValuesOfTheirVersion", "EqualReplicas", "ConsistentCut")


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"codec": "int7"}, "'topk:FRACTION'"),
        ({"codec": "topk:0"}, "fraction must be in"),
        ({"values_codec": "int8"}, "values_codec: got 'int8', expected 'bf16', 'fp16' or None"),
    ],
)
def test_impossible_codecs_of_a_model_are_refused_with_the_possible_ones(arguments, text):
    def work(worker):
        with pytest.raises(ConfigurationError, match=text):
            worker.model("net", {"a": np.zeros(2, np.float32)}, hw.SGD(1.0), **arguments)
        with pytest.raises(ConfigurationError, match="for rows of a table, expected 'bf16', 'fp16', 'int8'"):
            worker.table("rows", 2, hw.SGD(1.0), codec="q4")
        with pytest.raises(RegistrationError, match="float64"):
            worker.model("net", {"a": np.zeros(2)}, hw.SGD(1.0), codec="int8")
        worker.model("net", {"a": np.zeros(2, np.float32)}, hw.SGD(1.0), codec="int8")
        with pytest.raises(RegistrationError, match="exists with codec='int8', got codec='bf16'"):
            worker.model("net", {"a": np.zeros(2, np.float32)}, hw.SGD(1.0), codec="bf16")
        worker.table("rows", 2, hw.SGD(1.0), codec="int8")
        with pytest.raises(RegistrationError, match="exists with codec int8, got codec None"):
            worker.table("rows", 2, hw.SGD(1.0))

    run(work, workers=1)


# ── what a member may say ───────────────────────────────────────────────────────────────────────


def coded_desk():
    """A server that member 5, which shares no memory, trains a model of 100 elements with."""
    desk = Desk(sequencer="async")
    desk.serves(5)
    conn = desk.hello(5, term=2)
    spec = m.ModelSpec(
        "net", (m.TensorSpec("a", (100,), "float32"),), (hw.SGD(lr=1.0).to_spec(),), codec="int8"
    )
    desk.says(conn, m.Register(1, spec, None), buffers=[np.zeros(PAGE, np.float32)])
    return desk, conn


def coded_step(*coded):
    return m.Step(2, 1, 0, (m.Carried(0, b"\1"),), (), True, coded=coded)


def test_bytes_that_cannot_be_of_the_models_codec_end_the_connection_and_change_nothing():
    whole = np.zeros(104, np.uint8)
    for coded, buffers, text in (
        (m.Coded(0, 0, 100, 105), [np.zeros(105, np.uint8)], "105 bytes of int8 for 100 elements"),
        (m.Coded(0, 0, 100, -1), [np.zeros(1, np.uint8)], "-1 bytes"),
        (m.Coded(0, 0, 100, 103), [whole[:103]], "100 elements as int8 take 104 bytes, got 103"),
        (m.Coded(0, 0, 2000, 104), [whole], "payload for elements"),
        (m.Coded(0, 100, 0, 104), [whole], "payload for elements"),
        (m.Coded(0, 0, 100, 104), [], "it did not come"),
    ):
        desk, conn = coded_desk()
        desk.says(conn, coded_step(coded), buffers=buffers)
        assert text in desk.closed[conn]
        assert desk.machine.shard.version == 0
    desk, conn = coded_desk()
    whole[:4], whole[4:] = np.float32([0.5]).view(np.uint8), 2
    desk.says(conn, coded_step(m.Coded(0, 0, 100, 104)), buffers=[whole])
    assert conn not in desk.closed
    assert (desk.machine.shard.vectors[0].values[:100] == -1.0).all()


def test_bytes_of_a_codec_for_a_model_without_one_end_the_connection():
    desk = Desk(sequencer="async")
    (conn,), _ = desk.trains(5, window=False)
    desk.says(conn, coded_step(m.Coded(0, 0, 3, 7)), buffers=[np.zeros(7, np.uint8)])
    assert "7 bytes of None" in desk.closed[conn]


def test_a_model_with_a_codec_that_nobody_knows_is_refused():
    desk = Desk(sequencer="async")
    desk.serves(5)
    conn = desk.hello(5, term=2)
    spec = m.ModelSpec(
        "net", (m.TensorSpec("a", (9,), "float32"),), (hw.SGD(lr=1.0).to_spec(),), codec="int9"
    )
    desk.says(conn, m.Register(1, spec, None), buffers=[np.zeros(PAGE, np.float32)])
    assert desk.last(conn).failure.error == "ConfigurationError"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8"])
def test_rows_are_represented_each_by_itself(kind):
    codec = parse_codec(kind)
    rows = (np.random.default_rng(1).standard_normal((50, 7)) * 10.0 ** np.arange(-20, 30)[:, None]).astype(
        np.float32
    )
    rows = np.clip(rows, -60000, 60000) if kind == "fp16" else rows
    rows[3] = 0
    data = encode_rows(codec, rows)
    assert len(data) == 50 * codec.row_size(7)
    out = np.full((50, 7), np.nan, np.float32)
    decode_rows(codec, np.concatenate([[np.uint8(0)], data])[1:], out)
    if kind == "int8":
        scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        plain = np.where(scale > 0, np.rint(rows / np.where(scale > 0, scale, 1)) * scale, 0)
        np.testing.assert_array_equal(out, plain.astype(np.float32))
    elif kind == "fp16":
        np.testing.assert_array_equal(out, rows.astype(np.float16).astype(np.float32))
    else:
        np.testing.assert_allclose(out, rows, rtol=2**-8)
    with pytest.raises(ProtocolError, match="50 rows of 7 as"):
        decode_rows(codec, data[:-1], out)


def test_codecs_outlive_a_checkpoint_and_may_be_others_afterwards(tmp_path, caplog):
    def work(codec):
        def train(worker):
            model = worker.model("net", {"a": np.zeros(4, np.float32)}, hw.Accumulate(), codec=codec)
            model.push({"a": [1.5, 2.0, -2.0, 0.25]})
            worker.step()
            return model.pull()["a"].tolist()

        return train

    kept = {"checkpoint": str(tmp_path), "every": 1, "workers": 1}
    assert run(work("2bit:1.0"), **kept).values == [[1.0, 1.0, -1.0, 0.0]]
    assert run(work("bf16"), resume=True, **kept).values == [[2.5, 3.0, -3.0, 0.25]]
    assert "codec was 2bit:1.0 in the checkpoint and is bf16 from now on" in caplog.text


def softmax_regression(images, labels, codec):
    """Accuracy on a fifth that nobody trains on; decided by the arguments, as rounds have everybody."""

    def work(worker):
        test = np.arange(len(labels)) % 5 == 0
        x, y = images[~test][worker.rank :: 2], labels[~test][worker.rank :: 2]
        model = worker.model("net", {"w": np.zeros((64, 10), np.float32)}, hw.SGD(0.5), codec=codec)
        for _ in range(60):
            scores = x @ model.pull()["w"]
            likely = np.exp(scores - scores.max(1, keepdims=True))
            likely /= likely.sum(1, keepdims=True)
            likely[np.arange(len(y)), y] -= 1
            model.push({"w": x.T @ likely / len(y)})
            worker.step()
        return float((np.argmax(images[test] @ model.pull()["w"], 1) == labels[test]).mean())

    return run(work, workers=2, servers=2, transport="tcp").values[0]


@pytest.mark.long
def test_digits_are_told_apart_as_well_within_half_a_point_with_codecs():
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    digits = datasets.load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target
    plain = softmax_regression(images, labels, None)
    assert plain > 0.9
    for codec in ("bf16", "int8", "q4"):
        assert abs(softmax_regression(images, labels, codec) - plain) <= 0.005, codec
