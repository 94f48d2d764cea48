"""The page on schedulers tells the truth: its commands run, its table has every option, and TCP works too."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import typer
from serving import codes, site
from waiting import wait_until

import headwater as hw
from headwater.cli.serve import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deploy.md").read_text()


@pytest.mark.long
def test_the_commands_for_plain_processes_run_as_they_stand(tmp_path):
    shutil.copy(ROOT / "examples" / "numpy_only.py", tmp_path / "train.py")
    command = tmp_path / "headwater"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m headwater "$@"\n')
    command.chmod(0o755)
    block = re.search(r"## Plain processes\n\n```bash\n(.*?)```", PAGE, re.DOTALL).group(1)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    ran = subprocess.Popen(
        ["bash", "-e", "-c", block],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = ran.communicate(timeout=120)
    finally:
        if ran.poll() is None:
            os.killpg(ran.pid, 9)
    assert ran.returncode == 0, output
    assert (tmp_path / "model.safetensors").exists(), output
    assert np.allclose(hw.load_checkpoint(tmp_path / "runs")["line"]["w"], [3, -2, 0.5], atol=0.01)


def test_every_option_and_its_variable_are_in_the_table():
    table = PAGE[PAGE.index("## Options and environment") : PAGE.index("## Slurm")]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    commands = typer.main.get_command(app).commands
    for name in ("coordinator", "server", "worker"):
        for parameter in commands[name].params:
            option = parameter.opts[0] if parameter.opts[0].startswith("--") else "SCRIPT"
            row = next((line for line in rows if f"`{option}" in line), None)
            assert row is not None or option == "--help", f"{name} {option}"
            assert f"| {name}" in row or f", {name}" in row or "| all" in row, f"{name} {option}"
            variable = f"HEADWATER_{option.removeprefix('--').replace('-', '_').upper()}"
            assert variable in row or ", …" in row, variable


@pytest.mark.fresh
def test_nodes_with_a_token_find_together_over_tcp_and_without_it_are_refused(tmp_path):
    with site(tmp_path) as cluster:
        token = {"HEADWATER_TOKEN": "a secret of thirty-two characters"}
        options = ("--workers", 1, "--bind", "127.0.0.1", "--checkpoint", "runs")
        options += ("--metrics", "127.0.0.1:0")
        coordinator = cluster.start("coordinator", *options, **token)
        address = wait_until(lambda: [line for line in list(coordinator.lines) if line.startswith("tcp:")])
        cluster.address = address[0].strip()
        stranger = cluster.start("server")
        assert stranger.code() == 75
        assert "token" in stranger.text
        server = cluster.start("server", "--bind", "127.0.0.1", **token)
        worker = cluster.start("worker", "count.py", **token)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(coordinator.metrics_url(), timeout=30)
        known = urllib.request.Request(
            coordinator.metrics_url(), headers={"Authorization": f"Bearer {token['HEADWATER_TOKEN']}"}
        )
        with urllib.request.urlopen(known, timeout=30) as answer:
            assert "headwater_version " in answer.read().decode()
        cluster.stop()
        assert codes(coordinator, server, worker) == [0, 0, 0]
