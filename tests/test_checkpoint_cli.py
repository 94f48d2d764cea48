"""`headwater checkpoint`: what it prints and what it exits with."""

import json
import logging

import pytest
import safetensors.numpy
from checkpoints import model, table, write
from typer.testing import CliRunner

from headwater.cli.app import app


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, 0, 1200, servers=2)
    write(tmp_path, 1, 7, [model(), model("[bold]other", {"x": (5,)}, updates=9)], [], servers=3)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})


def flip(directory, pattern):
    path = next(directory.glob(pattern))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_list_shows_each_checkpoint(directory):
    result = run("list", directory)
    assert result.exit_code == 0, result.output
    heading, first, second = result.output.splitlines()
    assert heading.split() == ["name", "written", "(UTC)", "servers", "models", "tables", "size"]
    assert first.split()[0] == "g000-v000001200"
    assert first.split()[3:] == ["2", "1", "1", "0.1", "MB"]
    assert second.split()[0] == "g001-v000000007"


def test_list_says_which_cannot_be_used_and_why(directory):
    flip(directory, "g001*/manifest.json")
    result = run("list", directory)
    assert result.exit_code == 0
    assert "g001-v000000007  unusable" in result.output
    assert f"{directory}/g001-v000000007/manifest.json is damaged" in result.output
    first, second = json.loads(run("list", directory, "--json").output)
    assert (first["version"], first["servers"], first["problem"]) == (1200, 2, None)
    assert (second["version"], second["servers"]) == (7, None)
    assert "is damaged" in second["problem"]


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_a_directory_without_a_checkpoint_is_told_alike(tmp_path, command):
    result = run(command, tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"headwater: {tmp_path} holds no checkpoint\n"


def test_show_tells_what_a_checkpoint_holds(directory):
    result = run("show", directory / "g000-v000001200")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"{directory}/g000-v000001200"
    assert lines[1].startswith("generation 0, version 1200, written 20")
    assert lines[2].startswith("by 2 servers of headwater ")
    assert "model net: 2 tensors, " in result.output
    assert "  rule SGD(lr=0.1, momentum=0.9)\n  state momentum_buffer\n" in result.output
    assert f"table users: dim 3, {len(table().ids)} rows, " in result.output
    assert all(len(line) <= 80 for line in lines[1:])


def test_show_of_a_directory_takes_the_newest(directory):
    result = run("show", directory)
    assert "generation 1, version 7" in result.output
    assert "[bold]other" in result.output
    shown = json.loads(run("show", directory, "--json").output)
    assert shown["path"] == f"{directory}/g001-v000000007"
    assert [m["spec"]["name"] for m in shown["manifest"]["models"]] == ["net", "[bold]other"]
    assert shown["size"] == sum(f.stat().st_size for f in directory.glob("g001*/*.safetensors"))


def test_verify_names_what_is_damaged_and_exits_with_1(directory):
    result = run("verify", directory)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"{directory}/g000-v000001200: sound",
        f"{directory}/g001-v000000007: sound",
    ]
    damaged = flip(directory, "g000*/table*")
    (directory / "g001-v000000007" / "notes").write_text("x")
    result = run("verify", directory)
    assert result.exit_code == 1
    assert f"{directory}/g000-v000001200: damaged" in result.stdout
    assert "  notes does not belong to it" in result.stdout
    assert f"headwater: {directory}/g000-v000001200: {damaged.name} has sha256" in result.stderr
    assert run("verify", directory / "g001-v000000007").exit_code == 0
    result = run("verify", directory / "g000-v000001200", "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)
    assert damaged.name in found["problems"][0]


def test_verify_reports_a_damaged_manifest(directory):
    flip(directory, "g000*/manifest.json")
    result = run("verify", directory / "g000-v000001200")
    assert result.exit_code == 1
    assert "manifest.json is damaged" in result.stderr


def test_export_writes_one_file(directory):
    result = run("export", directory / "g000-v000001200", directory / "out.safetensors")
    assert (result.exit_code, result.output) == (0, f"{directory}/out.safetensors: 0.0 MB\n")
    found = safetensors.numpy.load_file(directory / "out.safetensors")
    assert set(found) == {"w", "b", "users.ids", "users.values"}


def test_export_of_a_directory_takes_the_last_good_one_and_says_so(directory, caplog):
    flip(directory, "g001*/model*")
    with caplog.at_level(logging.WARNING):
        result = run("export", directory, directory / "out")
    assert result.exit_code == 0
    assert "g000-v000001200 is used, since a newer one is not good" in caplog.text
    assert "w" in safetensors.numpy.load_file(directory / "out")


@pytest.mark.parametrize("command", ["list", "show", "verify", "export"])
def test_what_is_no_checkpoint_exits_with_2_and_one_text(tmp_path, command):
    result = run(command, tmp_path / "nowhere", *([tmp_path / "out"] if command == "export" else []))
    assert result.exit_code == 2
    assert result.stderr.startswith("headwater: there is no ")
    assert str(tmp_path / "nowhere") in result.stderr


def test_a_damaged_checkpoint_is_not_exported(directory):
    flip(directory, "g000*/model*")
    result = run("export", directory / "g000-v000001200", directory / "out")
    assert result.exit_code == 1
    assert "is damaged, use another checkpoint: model-00-net" in result.stderr
    assert not (directory / "out").exists()
