"""The repository keeps its own rules: lint, types, layers, public names, and docs that tell the truth."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from promises import promised, unkept

import headwater

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "headwater"

LAYERS = [
    ["errors", "loggers"],
    ["messages"],
    ["spec"],
    ["kernels"],
    ["log", "shard"],
    ["machines"],
    ["wire", "checkpoint", "data", "weights"],
    ["runtime"],
    ["worker", "follower"],
    ["torch", "jax"],
    ["engines"],
    ["observe"],
    ["kvstore", "cluster", "supervisor", "storage", "driver", "minimization", "standalone"],
    ["cli", "bench", "comparison", "page", "testing", "__main__", "__init__"],
]
"""A module imports from its own group and the groups above it (docs/architecture.md)."""


FROM_THE_NETWORK = [group for layer in LAYERS[:9] for group in layer if group not in ("errors", "loggers")]
"""Folders on the way of what comes from the network: all but those that a user starts things with."""

PURE = ["log", "machines", "shard", "spec"]
"""Folders that decide: given the same messages at the same times, they say the same."""

OUTSIDE = {
    "asyncio",
    "os",
    "queue",
    "random",
    "secrets",
    "select",
    "socket",
    "subprocess",
    "threading",
    "time",
}
"""What a decision must not come from, and must not wait for."""

FORMER_WORDS = """
    Advance Agreed Collector Company Course Enlist EnlistDesk Feed Followed Life Locate Mislaid Promise Reach
    Reception Resolved Seat Seats Shipment Shipped Standing Standings Ticket Turn Visit Whereabouts
    attempt attempts company
"""
"""Names that things had once; what they are called now is in docs/architecture.md."""


def _run(*command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    _run("ruff", "check", ".")
    _run("ruff", "format", "--check", ".")


@pytest.mark.long
def test_mypy_finds_nothing():
    """A step of its own in CI, which keeps what mypy found the last time: without that it takes long."""
    _run("mypy")


def _group_of(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return next(i for i, group in enumerate(LAYERS) if part in group)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "headwater":
            yield from (f"headwater.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _modules(*folders):
    """Paths of all modules, or of those in these folders."""
    found = sorted(PACKAGE.rglob("*.py"))
    return [path for path in found if not folders or _part(path) in folders]


def _part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_module_imports_only_from_its_own_group_and_those_above():
    wrong = []
    for path in _modules():
        for name in _imports(path):
            package, _, rest = name.partition(".")
            if package == "headwater" and rest:
                target = PACKAGE / rest.partition(".")[0]
                target = target if target.is_dir() else target.with_suffix(".py")
                if _group_of(target) > _group_of(path):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name} from a group below its own")
    assert not wrong


def test_what_decides_knows_no_thread_socket_clock_file_or_randomness():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _modules(*PURE)
        for name in _imports(path)
        if name.partition(".")[0] in OUTSIDE or name.startswith("headwater.wire")
    ]
    assert not wrong


def test_the_simulator_runs_what_runs_and_none_of_its_threads_and_sockets():
    """What it needs of members and servers is decided above both: in `machines`, `messages`, `spec`."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _modules("testing")
        for name in _imports(path)
        if name.startswith(("headwater.runtime", "headwater.wire", "headwater.worker"))
    ]
    assert not wrong


def test_the_page_on_the_protocol_names_every_message_and_no_other():
    page = (ROOT / "docs" / "protocol.md").read_text()
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", page))
    found = {
        node.name
        for path in (PACKAGE / "messages").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Message" for base in node.bases)
    }
    assert not found - named, f"docs/protocol.md names none of {sorted(found - named)}"
    assert not named & {"Advance", "Agreed", "Followed"}, "these have other names now"


def _evaluations(path):
    """Calls that make code of data: those whose argument is not written there as it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        plain = isinstance(node.func, ast.Name)
        given = node.args and not isinstance(node.args[0], ast.Constant)
        pickles = any(word.arg == "allow_pickle" for word in node.keywords)
        imports = name in ("import_module", "exec_module", "__import__") and given
        if (plain and name in ("eval", "exec", "compile")) or pickles or imports:
            yield f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"


BY_THE_USER = [
    "spec/registry.py: importlib.import_module(module_name)",  # a module that the user named to this process
    "weights/layout.py: importlib.import_module(module)",  # one of the libraries named beside it
    "kernels/cache.py: spec.loader.exec_module(module)",  # text that this process made
    "kernels/objects.py: loader.exec_module(module)",  # the machine code of numba's extension modules
    "kernels/objects.py: exec('\\n'.join(lines), known)",  # checks of arguments, from a private directory
]


@pytest.mark.parametrize("folder", FROM_THE_NETWORK)
def test_nothing_is_unpickled_on_the_way_of_what_comes_from_the_network(folder):
    for path in _modules(folder):
        assert not {"pickle", "cloudpickle", "marshal", "shelve", "dill"} & set(_imports(path)), path
        assert not set(_evaluations(path)) - set(BY_THE_USER)


def test_what_was_renamed_does_not_come_back():
    names = re.compile(rf"\b(?:{'|'.join(FORMER_WORDS.split())})\b")
    wrong = []
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("id", "attr", "name", "arg"):
                if isinstance(name := getattr(node, field, None), str) and names.fullmatch(name):
                    wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '')}: {name}")
    assert not wrong


SHARED_MODULES = """
    certificates client cluster codecs coordinator digest exchange faults layout lines measures
    meetings membership memory merges plain programs reader reading roster server shard splits state
    table tables verify worker writer
"""
"""Names of files that stand for several things still; none is added."""

SHARED_CLASSES = """
    Assign Call Checkpoint Client Constant DistributedOptimizer End Ended Entries EntryInputs Frame
    Group Host Identity Index LBFGS Listener Measures Member Members Outbox Outgoing Progress Roster Schedule
    OuterOptimizer Scratch Span State Stop Sums Table Update Verification Wait Window World
"""
"""Names of public classes that stand for several things still; none is added but by another framework."""


def _shared(names):
    """Name → where, for those that stand in several places."""
    found = defaultdict(list)
    for name, path in names:
        found[name].append(str(path.relative_to(ROOT)))
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_one_name_is_one_thing():
    modules = [(path.stem, path) for path in _modules() if not path.stem.startswith("__")]
    classes = [
        (node.name, path)
        for path in _modules()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    shared_modules, shared_classes = _shared(modules), _shared(classes)
    assert not {name: shared_modules[name] for name in shared_modules.keys() - set(SHARED_MODULES.split())}
    assert not {name: shared_classes[name] for name in shared_classes.keys() - set(SHARED_CLASSES.split())}


LONGEST = 500
"""Lines of a module: whoever opens one reads all of it. Most have fewer than 150."""

LONG_MODULES = {
    "worker/worker.py": "all that a user calls of a worker; two fifths are docstrings, and methods hand on",
    "machines/server.py": "one machine: each message to a server, and what couples its parts",
    "machines/fan_out.py": "one machine: each message between the holder of a copy and its readers",
    "runtime/client.py": "one thread's exchanges: sending, waiting and repeating share what is under way",
    "runtime/pump.py": "the threads of one node, whose order of locks is seen as a whole",
}
"""Modules that are longer, and why they are one idea all the same. None is added for want of a seam."""


def test_no_module_is_so_long_that_nobody_reads_it():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in _modules()}
    long = {name for name, lines in lengths.items() if lines > LONGEST}
    assert not long - LONG_MODULES.keys(), "split it where one idea ends and another begins"
    assert not LONG_MODULES.keys() - long, "it need not be named any more"
    assert max(lengths.values()) < 700


def test_decisions_are_numbered_one_after_the_other():
    pages = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("0*.md"))
    assert [int(page[:4]) for page in pages] == list(range(1, len(pages) + 1))


def test_no_decision_reads_a_clock_that_can_jump():
    """Dates are written into manifests, certificates and what is exported; everything that waits counts
    monotonic seconds."""
    dates = {"write.py", "certificates.py", "otlp.py", "recorder.py", "log_lines.py"}
    for path in PACKAGE.rglob("*.py"):
        jumps = re.findall(r"\btime\.(?:time|time_ns|localtime|gmtime)\b|\bdatetime\b", path.read_text())
        assert not jumps or path.name in dates or path.parent.name == "bench", (path, jumps)


def test_the_page_on_architecture_names_modules_that_exist_and_few_for_one_gradient():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?!headwater/)[a-z_]+/[a-z_/]*(?:\.py)?)`", page))
    assert not {name for name in named if not (PACKAGE / name).exists()}
    walk = page[page.index("## One exchange") : page.index("## A read")]
    assert 15 < len(set(re.findall(r"`([a-z_]+/[a-z_]*(?:\.py)?)`", walk))) < 25


def test_importing_headwater_loads_neither_torch_nor_ray_nor_jax_nor_the_compiler():
    code = "import sys, headwater; print([m for m in ('torch', 'ray', 'jax', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_public_names_are_the_same_for_type_checkers_and_at_run_time():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [
        node for node in tree.body if isinstance(node, ast.If) and not isinstance(node.test, ast.UnaryOp)
    ]
    typed = {
        alias.name: node.module.removeprefix("headwater").removeprefix(".")
        for node in block.body
        for alias in node.names
    }
    assert typed == {**headwater._MODULES, **dict.fromkeys(headwater._SUBMODULES, "")}
    assert {*headwater._MODULES, "errors", "kvstore"} == set(headwater.__all__)


def test_a_public_module_can_be_the_first_name_that_a_program_uses():
    """Those that are modules of a package are no attributes of it before somebody has imported them."""
    for first in ("sinks", "initializers", "kvstore"):
        done = subprocess.run(
            [sys.executable, "-c", f"import headwater\nheadwater.{first}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not done.stderr, done.stderr


IMPORT = """
from resource import RUSAGE_SELF, getrusage
before = getrusage(RUSAGE_SELF)
import headwater
after = getrusage(RUSAGE_SELF)
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def test_importing_headwater_takes_little_time():
    """CPU time beyond that of the interpreter: whoever uses little of it does not pay for the rest."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60)
    assert float(done.stdout) < 0.15, done.stderr


def test_every_public_name_exists_and_is_documented():
    documented = set(re.findall(r"^\| `(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert documented == set(headwater.__all__)
    for name in headwater.__all__:
        assert getattr(headwater, name).__doc__, name


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```bash\n(python3 -m venv.*)\n```", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_test_that_the_guarantees_name_exists():
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        defined |= {f"{path.name}::{name}" for name in names}
    assert len(promised()) > 15
    assert not promised() - defined


def test_with_long_a_promised_test_that_was_skipped_fails_the_run():
    names = {"test_a.py::test_one", "test_a.py::test_two", "test_a.py::test_three"}
    skipped = [("test_a.py::test_two", "needs a CUDA GPU"), ("test_b.py::test_other", "no bread")]
    assert unkept(names, {"test_a.py::test_one", "test_a.py::test_three"}, skipped) == []
    skipped += [("test_a.py::test_one", "only root can do this")]
    assert unkept(names, {"test_a.py::test_one"}, skipped) == [
        "test_a.py::test_one was skipped: only root can do this",
        "test_a.py::test_three did not run",
    ]


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
