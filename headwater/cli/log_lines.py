"""How `headwater run` and `headwater serve` log: `--log-level`, `--log-format text|json`.

A line has the time, the level, the node and what it says. The handler is one of Headwater's own loggers, and
is silent where the program has configured logging itself: its handlers get the records then, and nothing is
said twice. The root logger is left alone.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from headwater.engines.logs import prints
from headwater.errors import ConfigurationError
from headwater.spec.words import option

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class LogStyle:
    """What the options say.

    Attributes:
        level: the least that is logged; None: as the command does without the option.
        format: "text" or "json".

    Raises:
        ConfigurationError: another level or format; lists those that there are.
    """

    level: str | None = None
    format: str = "text"

    def __post_init__(self) -> None:
        if self.level is not None and self.level.lower() not in LEVELS:
            raise ConfigurationError(f"{option('log_level')}: got {self.level!r}, expected {_or(LEVELS)}")
        if self.format not in FORMATS:
            raise ConfigurationError(f"{option('log_format')}: got {self.format!r}, expected {_or(FORMATS)}")

    def begin(self, role: str, default: str, show: Callable[[str], None] | None = None) -> NodeLog:
        """Log so in this process from now on, as a node of this role; `show` takes the lines, or they go to
        standard error."""
        level = (self.level or default).upper()
        formatter = JsonLines() if self.format == "json" else TextLines()
        logger = logging.getLogger("headwater")
        handler = NodeLog(role, formatter, show, logger.level)
        logger.setLevel(level)
        logger.addHandler(handler)
        return handler


class NodeLog(logging.Handler):
    """Of one node."""

    def __init__(
        self, role: str, formatter: logging.Formatter, show: Callable[[str], None] | None, before: int
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._role, self._index = role, -1
        self._show = show
        self._before = before

    def named(self, role: str, index: int) -> None:
        """The node knows who it is, or is somebody else now."""
        self._role, self._index = role, index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Log no longer; idempotent."""
        logger = logging.getLogger("headwater")
        logger.removeHandler(self)
        logger.setLevel(self._before)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, unless the program has handlers of its own."""
        if any(map(prints, logging.getLogger().handlers)):
            return
        try:
            record.role, record.index = self._role, self._index
            record.node = self._role if self._index < 0 else f"{self._role} {self._index}"
            line = self.format(record)
            if self._show is not None:
                self._show(line)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001 - as every handler of Python's does
            self.handleError(record)


class TextLines(logging.Formatter):
    """`14:03:07.250 WARNING server 0: what happened`; the node is said once."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows."""
        node = getattr(record, "node", record.name)
        at = time.strftime("%H:%M:%S", self.converter(record.created))
        text = (
            record.getMessage()
            .removeprefix(f"{node}: ")
            .removeprefix(f"headwater-{node.replace(' ', '-')}: ")
        )
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{at}.{int(record.msecs):03d} {record.levelname:<7} {node}: {text}{trace}"


class JsonLines(logging.Formatter):
    """A line of JSON: time (UTC), level, logger, role, index, pid, message, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": getattr(record, "role", ""),
            "index": getattr(record, "index", -1),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
