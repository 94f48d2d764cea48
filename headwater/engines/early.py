"""Processes that begin before it is known what they are to be, while the script is loaded.

Loading a script that imports torch takes more than a second, and its workers then import the same. So the
command line has them begin first. Where the script changes the environment, the path or the folder, they are
discarded and others are started.
"""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from headwater.engines.cores import available_cores
from headwater.engines.process import Child, LaunchContext

_HEAVY = ("numpy", "torch", "jax", "sklearn", "scipy", "pandas")
"""What is imported ahead where a script imports it: modules whose import takes long and changes nothing."""
_ALSO = {"torch": ("headwater.torch",), "jax": ("headwater.jax",)}

_lock = threading.Lock()
_waiting: dict[str, list[Child]] = {}
"""Children by what they are good for: "server" or "worker"."""


@contextlib.contextmanager
def begun(script: Path, *, workers: int, servers: int) -> Iterator[None]:
    """Have the children of a run begin; those that no engine has taken in the end are ended.

    `script`: what workers will need is read from its text; its folder leads their path.
    """
    context = LaunchContext.here(sharing_cores(workers), str(script.resolve().parent))
    modules = heavy_imports(script)
    with contextlib.suppress(OSError, ValueError), _lock:  # the engine will say what is wrong
        for part, count, wanted in (("server", servers, ()), ("worker", workers, modules)):
            for _ in range(count):
                _waiting.setdefault(part, []).append(Child(context, wanted))
    try:
        yield
    finally:
        with _lock:
            left = [child for children in _waiting.values() for child in children]
            _waiting.clear()
        for child in left:
            child.discard()


def take(part: str, context: LaunchContext) -> Child | None:
    """A child that has begun like that, if there is one."""
    while True:
        with _lock:
            children = _waiting.get(part)
            child = children.pop() if children else None
        if child is None or child.context == context:
            return child
        child.discard()


def sharing_cores(workers: int) -> dict[str, str]:
    """More environment of a child: torch and NumPy of `workers` processes share the cores out."""
    return {"OMP_NUM_THREADS": str(max(1, available_cores() // workers))}


def heavy_imports(script: Path) -> Sequence[str]:
    """What the script's text imports at its top that takes long; nothing where it cannot be read."""
    try:
        parsed = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    roots = set()
    for node in parsed.body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return [name for root in _HEAVY if root in roots for name in (root, *_ALSO.get(root, ()))]
