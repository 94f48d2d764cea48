"""`headwater serve certificates`: nodes accept what it writes, nobody else does, and it stays as it is."""

import contextlib
import os
import stat
import sys

import pytest
from connections import DEADLINE, attended
from typer.testing import CliRunner

from headwater.cli.app import app
from headwater.cli.certificates import make_certificates
from headwater.errors import ConfigurationError, RefusedError
from headwater.wire.certificates import new_authority, new_node, write_new
from headwater.wire.listener import dial
from headwater.wire.security import TLS, Security


def files(directory, node):
    return Security(tls=TLS(directory / "ca.pem", directory / f"{node}.pem", directory / f"{node}.key"))


def test_nodes_of_one_command_accept_each_other_and_those_of_another_do_not(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_certificates(ours, ["node1,127.0.0.1", "node2"])
    make_certificates(theirs, ["node1,127.0.0.1"])
    with attended(security=files(ours, "node1")) as at:
        with contextlib.closing(dial(at.address, timeout=DEADLINE, security=files(ours, "node2"))):
            at.next_channel().close()
        with pytest.raises(RefusedError):
            dial(at.address, timeout=DEADLINE, security=files(theirs, "node1"))


def test_a_machine_added_later_belongs_to_the_same_authority(tmp_path):
    make_certificates(tmp_path, ["127.0.0.1"])
    make_certificates(tmp_path, ["::1,late"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("127.0.0.1.key", "127.0.0.1.pem", "__1.key", "__1.pem", "ca.key", "ca.pem")
    ]
    with (
        attended(security=files(tmp_path, "127.0.0.1")) as at,
        contextlib.closing(dial(at.address, timeout=DEADLINE, security=files(tmp_path, "__1"))),
    ):
        at.next_channel().close()


def test_keys_are_the_owners_alone(tmp_path):
    make_certificates(tmp_path / "new", [])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "node.pem": 0o644, "node.key": 0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_nothing_is_overwritten(tmp_path):
    make_certificates(tmp_path, ["node1"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigurationError, match=r"node1\.pem exists: remove it first"):
        make_certificates(tmp_path, ["node2", "node1"])
    with pytest.raises(ConfigurationError, match=r"cannot write .*ca\.key: .*exists"):
        write_new(new_authority(), tmp_path / "ca.pem", tmp_path / "ca.key")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("gone", ["ca.pem", "ca.key"])
def test_half_an_authority_is_not_made_whole(tmp_path, gone):
    make_certificates(tmp_path, ["node1"])
    os.remove(tmp_path / gone)
    with pytest.raises(ConfigurationError, match="cannot read the authority"):
        make_certificates(tmp_path, ["node2"])


def test_an_authority_with_the_key_of_another_is_refused(tmp_path):
    write_new(new_authority(), tmp_path / "ca.pem", tmp_path / "one.key")
    write_new(new_authority(), tmp_path / "two.pem", tmp_path / "ca.key")
    with pytest.raises(ConfigurationError, match="is not the key of"):
        make_certificates(tmp_path, ["node1"])


@pytest.mark.parametrize("name", ["", "../etc", "a b", "-x", "a..b", "*.example", "x" * 64, "ca", "node\n1"])
def test_what_is_no_host_name_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ConfigurationError):
        make_certificates(tmp_path / "new", [name])
    assert not (tmp_path / "new").exists()


def test_the_same_machine_twice_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="those of another"):
        make_certificates(tmp_path, ["node1,10.0.0.1", "node1"])


def test_names_beyond_ascii_are_written_as_dns_has_them():
    names = new_node(new_authority(), ["bücher.example"]).certificate.extensions
    assert "xn--bcher-kva.example" in str(list(names))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[tls\]'"):
        new_authority()


def test_the_command_says_what_it_wrote_and_refuses_the_second_time(tmp_path):
    command = ["serve", "certificates", str(tmp_path), "--host", "node1,10.0.0.1", "--host", "node2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    first, *nodes = done.output.splitlines()
    assert "ca.key makes nodes: keep it secret" in first
    assert [line.partition(": ")[2].partition(";")[0] for line in nodes] == ["node1, 10.0.0.1", "node2"]
    assert CliRunner().invoke(app, command).exit_code == 2
