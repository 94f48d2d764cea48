"""Rows of tables for other tools: from a worker, a running cluster, a checkpoint; all of one version."""

import numpy as np
import pytest
from trained import trained
from typer.testing import CliRunner

import headwater as hw
from headwater.cli.app import app
from headwater.errors import ConfigurationError

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    options = {"checkpoint": directory, "every": 1000}
    with trained(start=options, expiry=hw.AfterSteps(1000)) as training:
        training.directory = directory
        training.step(ids=range(40))
        training.step(2, ids=range(10, 20))
        training.do(lambda worker, model, table: table.delete([39]))
        training.do(lambda worker, model, table: worker.checkpoint())
        yield training


def rows_of(file):
    if file.suffix == ".parquet":
        found = parquet.read_table(file).to_pydict()
        return {name: np.array(column) for name, column in found.items()}
    from safetensors.numpy import load_file

    return load_file(file)


def run(*command):
    result = CliRunner().invoke(app, list(map(str, command)))
    return result.exit_code, result.output


def test_a_scan_of_a_worker_brings_every_row_in_pieces(training):
    def scan(worker, model, table):
        parts = list(table.scan(batch=7))
        return [np.concatenate(column) for column in zip(*parts, strict=True)], max(len(p[0]) for p in parts)

    (ids, rows), longest = training.do(scan)
    assert longest == 7
    assert sorted(ids.tolist()) == list(range(39))
    assert np.array_equal(rows, training.pull(ids))
    with pytest.raises(ConfigurationError, match="batch must be an integer ≥ 1"):
        training.do(lambda worker, model, table: table.scan(0))


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_a_running_clusters_table_is_written(training, tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"users{suffix}"
    code, output = run("table", training.address, "users", "--export", file)
    assert code == 0, output
    assert "39 rows of version" in output
    found = rows_of(file)
    assert sorted(found["ids"].tolist()) == list(range(39))
    assert np.array_equal(found["values"].astype(np.float32), training.pull(found["ids"]))


def test_a_checkpoints_table_is_written_with_what_is_asked_for(training, tmp_path):
    file = tmp_path / "users.parquet"
    code, output = run(
        "checkpoint", "export", training.directory, file, "--table", "users", "--counts", "--last", "--state"
    )
    assert code == 0, output
    found = rows_of(file)
    counts = dict(zip(found["ids"].tolist(), found["counts"].tolist(), strict=True))
    assert counts == {id: 3 if 10 <= id < 20 else 1 for id in range(39)}
    last = dict(zip(found["ids"].tolist(), found["last"].tolist(), strict=True))
    assert {last[id] for id in range(10, 20)} == {3}
    assert np.array_equal(found["values"].astype(np.float32), training.pull(found["ids"]))


def test_what_cannot_be_written_is_told(training, tmp_path):
    for command, told in [
        (("table", training.address, "items", "--export", tmp_path / "a.parquet"), "its tables are 'users'"),
        (("table", training.address, "users", "--export", tmp_path / "a.csv"), ".parquet or .safetensors"),
        (
            ("checkpoint", "export", training.directory, tmp_path / "a.parquet", "--table", "x"),
            "no table 'x'",
        ),
        (
            ("checkpoint", "export", training.directory, tmp_path / "a.parquet", "--counts"),
            "pass --table NAME",
        ),
    ]:
        code, output = run(*command)
        assert code == 2
        assert told in " ".join(output.split())
    code, output = run("table", training.address, "users", "--export", tmp_path / "no" / "a.parquet")
    assert code == 1
    assert not (tmp_path / "no").exists()
