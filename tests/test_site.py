"""The documentation: its programs run, its commands exist, and the site is built of all its pages."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import typer
from torch.nn import functional

import headwater as hw
from headwater.cli.app import app
from headwater.cli.faults import FAILED, INTERRUPTED, USAGE
from headwater.cli.serving import AGAIN
from headwater.cluster import NodeConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

HERE = {
    *("README.md", "index.md", "tutorial.md", "compare.md", "modes.md", "security.md", "weights-format.md"),
    *("recommender.md", "rollouts.md", "far-apart.md", "readers.md", "lbfgs.md", "observe.md"),
}
"""Pages whose programs are run here. The test that runs another page's names that page."""


def blocks(page, language):
    """The texts of the page's blocks in this language."""
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def defined(block):
    """The names that a program defines, without its main block."""
    names = {"__name__": "page"}
    exec(compile(block, "page", "exec"), names)
    return names


def run(train, **options):
    return hw.run(train, **{"engine": "inline", "workers": 2, "patience": 5, "deadline": 60, **options})


# ── programs ────────────────────────────────────────────────────────────────────────────────────


def test_every_page_with_programs_has_a_test_that_runs_them():
    others = [
        path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name
    ]
    for page in PAGES:
        if blocks(page, "python") and page.name not in HERE:
            assert any(f'"{page.name}"' in text for text in others), (
                f"nothing runs the programs of {page.name}"
            )


def test_the_first_program_of_the_site_finds_the_weights():
    (block,) = blocks(DOCS / "index.md", "python")
    assert run(defined(block)["train"]).values == [pytest.approx(3, abs=0.1)] * 2


@pytest.mark.long
def test_the_recommender_has_rows_for_ids_that_came_twice():
    (block,) = blocks(DOCS / "guides" / "recommender.md", "python")
    (rows, same) = run(defined(block)["train"], servers=2).values
    assert rows == same
    assert 0 < rows <= 64


def test_the_values_of_a_checkpoint_are_read_without_a_cluster(tmp_path):
    (block,) = blocks(DOCS / "guides" / "rollouts.md", "python")
    run(defined(block)["train"], checkpoint=tmp_path / "runs", every="5steps")
    assert np.allclose(hw.load_checkpoint(tmp_path / "runs")["net"]["w"], 1 - 0.5**10)


@pytest.mark.long
def test_a_model_whose_gradients_are_few_bytes_is_trained():
    (block,) = blocks(DOCS / "guides" / "far-apart.md", "python")
    assert run(defined(block)["train"]).values == [pytest.approx(1 - 0.9**30, rel=0.02)] * 2


def line(worker):
    """A model, one batch, one step for fragments to take."""
    return worker.model("line", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=0.1))


def test_a_reader_reads_as_the_page_says():
    one_view, changes, waits = blocks(DOCS / "readers.md", "python")
    with hw.Cluster(engine="inline", workers=1) as cluster, cluster.worker() as worker:
        model = worker.model("net", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=1.0))
        table = worker.table("users", 4, hw.SGD(lr=1.0))
        model.push({"w": -np.ones(3, np.float32)})
        table.push(np.array([7]), -np.ones((1, 4), np.float32))
        worker.step()
        names = {"ids": np.array([7, 8]), "written": []}
        names["engine"] = type("", (), {"write": lambda *run: names["written"].append(run[2].tolist())})
        one_view = one_view.replace('"tcp:node1:7000"', repr(cluster.address)).replace(", token=secret", "")
        changes = textwrap.indent(f"{changes}\n    break\n", "    ")
        exec(one_view.replace("print(", "told = (") + changes, names)
        assert names["weights"]["w"].tolist() == [1, 1, 1]
        assert names["rows"] is not None
        assert names["told"][0].number == 1
        assert names["written"] == [[1, 1, 1]]
    assert waits == "version = await asyncio.to_thread(follower.wait, deadline=5)\n"


@pytest.mark.long
def test_the_programs_about_lbfgs_run():
    import torch

    minimise, portions, vectors = blocks(DOCS / "lbfgs.md", "python")

    def part(rank, workers):
        x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))[rank::workers]
        return x, (x.sum(1) + 0.3 * x[:, 0].sin() * 9 > 0).float()

    names = {"torch": torch, "hw": hw, "F": functional, "part_of_the_data": part}
    exec(minimise.replace("epochs(10)", "epochs(2)") + "    return loss", names)
    losses = run(names["train"]).values
    assert losses[0] == losses[1] < 60 * np.log(2)

    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    names = {"hw": hw, "np": np, "x": x, "y": (x.sum(1) > 0.5).astype(np.float32), "d": 3}
    small = portions.replace("portions=64, workers=4", 'portions=8, workers=2, engine="inline"')
    exec(small, names)
    assert names["found"].report.loss < 64 * np.log(2)

    def train(worker):
        own = {"worker": worker, "hw": hw, "parameters": {"w": np.ones(4, np.float32)}}
        changed = 'model.push({"w": -np.ones(4, np.float32)}); worker.step()'
        exec(vectors.replace("...  # training", changed), own | {"np": np}, own)
        return own["squares"], own["model"].pull()["w"].tolist()

    assert run(train, workers=1).values == [(4.0, [1.5] * 4)]


def test_the_program_about_histories_runs(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="needs pandas")
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    import pandas

    (block,) = blocks(DOCS / "observe.md", "python")
    monkeypatch.chdir(tmp_path)

    def train(worker):
        model = line(worker)
        for step in range(3):
            worker.log(loss=step)
            model.push({"w": np.ones(3, np.float32)})
            worker.step()

    names = {"hw": hw, "pandas": pandas, "train": train}
    exec(block.replace("hw.run(train, ", 'hw.run(train, engine="inline", '), names)
    assert names["losses"].tolist() == [0, 1, 2]


def test_fragments_about_steps_are_taken_as_they_stand():
    weighted, background = blocks(DOCS / "modes.md", "python")

    def train(worker):
        model = line(worker)
        names = {"worker": worker, "opt": worker, "x": [1, 2, 3], "n": 3}
        model.push({"w": np.ones(3, np.float32)})
        exec(weighted, names)
        model.push({"w": np.ones(3, np.float32)})
        exec(background, names)
        return names["result"].version

    assert run(train).values == [2, 2]


def test_fragments_about_security_say_what_run_takes():
    """With the arguments that they pass, as far as these can be checked without two machines."""
    for block in blocks(DOCS / "security.md", "python"):
        keywords = {"TLS": hw.TLS, "run": lambda train, **options: NodeConfig(**options)}
        names = {"hw": type("hw", (), keywords), "train": line, "secret": "x" * 20}
        exec(block.replace("hw.run", "config = hw.run"), names)
        assert names["config"].bind is not None
        assert names["config"].tls or names["config"].token


def test_published_weights_are_read_as_the_page_says(tmp_path, monkeypatch, capsys):
    from headwater.weights import WeightsWriter

    monkeypatch.chdir(tmp_path)
    with WeightsWriter(tmp_path / "published") as writer:
        writer.write({"w": np.ones(3, np.float32)})
    (block,) = blocks(DOCS / "weights-format.md", "python")
    exec(block, {})
    assert capsys.readouterr().out == "1 {'w': (3,)}\n"


def test_the_comparison_of_the_page_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(DOCS / "compare.md", "python")

    def train(worker):
        model = line(worker)
        for step in range(12):
            model.push({"w": np.ones(3, np.float32)})
            worker.step()
            worker.log(loss=1 / (1 + step))

    block = block.replace("seeds=3", 'seeds=1, engine="inline", step_s=0.001')
    names = {"train": train}
    exec(block, names)
    assert len(names["rows"]) == 2
    assert (tmp_path / "compare" / "report.html").exists()


def test_the_programs_of_the_readme_run():
    first, tables, keeps = blocks(ROOT / "README.md", "python")
    import torch

    class Net(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(4, 3))

    names = {"Net": Net, "F": functional, "dataset": (torch.randn(128, 4), torch.randint(0, 3, (128,)))}
    exec(first[: first.index("result =")], names)
    assert np.isfinite(run(names["train"]).values).all()

    def train(worker):
        exec("\n".join(tables.splitlines()[:2]), names | {"worker": worker, "hw": hw})
        state = {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(Net().parameters(), 1.0), 2)}
        own = {
            "worker": worker,
            "train_set": (np.arange(8), np.arange(8)),
            "model": None,
            "test_part": 0,
            **state,
        }
        own["count"] = lambda model, part: worker.rank + 1
        exec(keeps, own)
        return worker.kept["best"]

    assert run(train).values == [3, 3]
    assert "hw.run(train, workers=4, servers=2, replicas=1, checkpoint=" in tables


# ── commands ────────────────────────────────────────────────────────────────────────────────────


def commands():
    """Every `headwater …` of every page, as (page, words)."""
    for page in [*PAGES, *sorted((ROOT / "examples").glob("*.md"))]:
        for block in blocks(page, "bash"):
            for raw in block.replace("\\\n", " ").splitlines():
                line = raw.split(" #")[0].replace(" &", "").replace(";", " ; ")
                words = [re.sub(r"^\$\w+$", "1", one) for one in shlex.split(line, comments=True)]
                for at, word in enumerate(words):
                    if (
                        word.endswith("headwater")
                        and at + 1 < len(words)
                        and words[0] not in ("pip", "docker")
                    ):
                        rest = words[at + 1 :]
                        end = next((i for i, one in enumerate(rest) if one in ("&&", "|", ";", "done")), None)
                        yield page.name, [one.rstrip(";") for one in rest[:end]]


def test_every_command_on_a_page_is_one_with_these_options(monkeypatch):
    for name in [name for name in os.environ if name.startswith("HEADWATER_")]:
        monkeypatch.delenv(name)
    found = [(page, words) for page, words in commands() if words != ["--version"]]
    assert len(found) > 40
    for _, words in found:
        command, rest = resolved(words)
        command.make_context(command.name, rest)  # what is no option, or is missing, raises


def resolved(words):
    """The command that these words name, and its own words."""
    command, rest = typer.main.get_command(app), words
    while hasattr(command, "commands"):
        context = command.make_context("headwater", [], resilient_parsing=True)
        _, command, rest = command.resolve_command(context, rest)
    return command, rest


def test_every_exit_code_is_in_the_table():
    page = (DOCS / "reference" / "command-line.md").read_text()
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert table == {0, FAILED, USAGE, AGAIN, INTERRUPTED, 143}
    group = typer.main.get_command(app)
    for name in group.commands:
        _, command, _ = group.resolve_command(group.make_context("headwater", []), [name])
        for one in getattr(command, "commands", {"": command}).values():
            said = re.search(r"Exit codes?: (.*)", one.help or "", re.DOTALL)
            assert said is None or {int(code) for code in re.findall(r"\b(\d+)\b", said.group(1))} <= table


# ── the tutorial ────────────────────────────────────────────────────────────────────────────────


def shape(text):
    """A line without its numbers and names of checkpoints."""
    return re.sub(r"[\d.,:]+", "#", text).strip()


def steps():
    """The blocks of the tutorial in their order: (language, title, text)."""
    page = (DOCS / "tutorial.md").read_text()
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    assert {language for language, *_ in found} == {"python", "bash", "text"}
    return found


def place(folder):
    """Write the tutorial's files into the folder."""
    for language, title, text in steps():
        if language == "python":
            (folder / title).write_text(text)


def test_the_tutorials_cluster_learns_what_its_single_process_does(tmp_path, monkeypatch):
    place(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"__name__": "page"}
    exec((tmp_path / "train.py").read_text(), names)
    monkeypatch.delitem(sys.modules, "single")
    single = {"__name__": "__main__"}
    exec((tmp_path / "single.py").read_text(), single)
    alone = single["accuracy"](single["w"], single["x"], single["y"])
    assert run(names["train"]).values == [pytest.approx(alone, abs=0.005)] * 2


@pytest.mark.long
def test_the_commands_of_the_tutorial_print_what_it_shows(tmp_path):
    place(tmp_path)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, arguments in {"headwater": "-m headwater ", "python": ""}.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        (binaries / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    printed = ""
    for language, _, text in steps():
        if language == "bash":
            done = subprocess.run(
                ["bash", "-e", "-c", text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, text + done.stdout + done.stderr
            printed = {shape(line) for line in (done.stdout + done.stderr).splitlines()}
        elif language == "text":
            missing = {shape(line) for line in text.splitlines()} - printed
            assert not missing, (missing, printed)


# ── the site ────────────────────────────────────────────────────────────────────────────────────


def test_every_page_of_the_navigation_exists():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert len(listed) > 30
    assert not [name for name in listed if not (DOCS / name).exists()]


def test_the_pages_say_that_linux_is_needed_and_promise_no_index():
    install = (DOCS / "install.md").read_text()
    assert all(word in install for word in ("Linux", "macOS", "Windows", "on no package index"))
    classifiers = re.findall(r'"(Operating System :: [^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert classifiers == ["Operating System :: POSIX :: Linux"]
    for page in PAGES:
        for line in page.read_text().splitlines():
            promised = re.search(r"pip install (?:-q )?['\"]?headwater", line)
            assert promised is None or "something else" in line, (page.name, line)


@pytest.mark.long
def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "python.html").read_text()
    for name in ("Worker.step", "Comparison.verdict", *hw.__all__):
        assert f'id="headwater.{name}"' in reference or name in ("kvstore", "initializers"), name
    for page in DOCS.rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(DOCS).with_suffix(".html")).exists(), page
    first = (tmp_path / "site" / "index.html").read_text()
    for page in DOCS.glob("*.md"):
        assert f'href="{page.stem}.html"' in first, f"{page.name} is in no menu"
    assert "on_server_loss" in reference
    fetched = [
        found
        for page in (tmp_path / "site").rglob("*.html")
        for found in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:[^"]+', page.read_text())
    ]
    assert not fetched
