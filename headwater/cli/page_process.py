"""The page beside `headwater run --page`: a process of its own, which takes no time from the coordinator."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from headwater.page.elements import check_library
from headwater.wire.security import Security

_END_S = 5.0


class PageProcess:
    """Starts with `begin`, ends with the block. A context manager.

    Args:
        say: gets a line once the page can be opened, and what the process says besides.

    Raises:
        ConfigurationError: the extra `page` is not installed; nothing was started.
    """

    def __init__(self, security: Security, say: Callable[[str], None]) -> None:
        check_library()
        self._security, self._say = security, say
        self._process: subprocess.Popen[str] | None = None

    def begin(self, address: str) -> None:
        """Start it, for the cluster at this address; does not block."""
        command = [sys.executable, "-m", "headwater", "page", address, *self._files()]
        command.append(f"--beside={os.getpid()}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
        if self._security.token:
            environment["HEADWATER_TOKEN"] = self._security.token
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, name="headwater-page-lines", daemon=True).start()

    def _files(self) -> list[str]:
        tls = self._security.tls
        if tls is None:
            return []
        return [f"--tls-ca={tls.ca}", f"--tls-certificate={tls.certificate}", f"--tls-key={tls.key}"]

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._say(line.rstrip())

    def __enter__(self) -> PageProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
