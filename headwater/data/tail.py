"""A directory of growing files as a stream of events: JSON lines, or CSV with a header."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import msgspec

from headwater.data.event_stream import BEGINNING, StreamEvent
from headwater.errors import ConfigurationError, DataError
from headwater.loggers import logger
from headwater.spec.amounts import flag, one_of, path, text

_log = logger("headwater.data")

_MOST_BYTES = 8 << 20
"""Bytes read at once; an event is no longer than this."""


class Tail:
    """Events of the files in `directory` that match `pattern`, as they are appended; a `Stream`.

    Each file is a partition; an offset is a number of bytes. A line is an event once its end is there.
    Files whose name ends with .csv begin with a line of names, and no field has a line break; all others have
    a JSON object a line. Files only grow: one that is rotated gets a new name, and keeps its content.

    Args:
        malformed: "raise" a DataError for a line that is no event, or "skip" it, counted and logged.
        endless: wait for more at the end; otherwise `batches` end there.

    Attributes:
        skipped: malformed lines so far.

    Raises:
        ConfigurationError: no directory, or an impossible argument.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        pattern: str = "*",
        *,
        malformed: Literal["raise", "skip"] = "raise",
        endless: bool = True,
    ) -> None:
        self.directory = Path(path("Tail: directory", directory)).absolute()
        self.pattern = text("Tail: pattern", pattern)
        self.endless = flag("Tail: endless", endless)
        self.skipped = 0
        one_of("Tail: malformed", malformed, ("raise", "skip"))
        if not self.directory.is_dir():
            raise ConfigurationError(
                f"Tail: {self.directory} is no directory: make it before training begins"
            )
        self._malformed = malformed
        self._headers: dict[str, list[str]] = {}

    def partitions(self) -> Sequence[str]:
        """As `Stream.partitions`: names of files."""
        try:
            names = [entry.name for entry in os.scandir(self.directory) if entry.is_file()]
        except OSError as error:
            raise DataError(f"{self.directory} cannot be listed: {error}") from error
        return sorted(name for name in names if fnmatch(name, self.pattern))

    def read(self, partition: str, offset: str, most: int) -> list[StreamEvent]:
        """As `Stream.read`."""
        start = int(offset or 0)
        path = self.directory / partition
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < start:
                    raise DataError(
                        f"{path} has {size} bytes, and was read up to byte {start}: files of a Tail only grow"
                    )
                if partition.endswith(".csv") and offset == BEGINNING:
                    start = self._skip_header(file)
                file.seek(start)
                data = file.read(_MOST_BYTES)
        except OSError as error:
            raise DataError(f"{path}, read up to byte {start}, cannot be read any more: {error}") from error
        return self._events(path, partition, data, start, most)

    def _skip_header(self, file: Any) -> int:
        line = file.readline(_MOST_BYTES)
        return len(line) if line.endswith(b"\n") else 0

    def _events(self, path: Path, partition: str, data: bytes, start: int, most: int) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        at = 0
        while len(events) < most and (end := data.find(b"\n", at)) >= 0:
            value = self._parsed(path, partition, data[at:end].rstrip(b"\r"), start + at)
            at = end + 1
            events.append(StreamEvent(value, str(start + at)))
        if not events and len(data) == _MOST_BYTES:
            raise DataError(f"{path}, byte {start}: a line of more than {_MOST_BYTES} bytes is no event")
        return events

    def _parsed(self, path: Path, partition: str, line: bytes, at: int) -> Mapping[str, Any] | None:
        try:
            if partition.endswith(".csv"):
                return self._row(path, partition, line)
            value = msgspec.json.decode(line, type=dict[str, Any])
            if not value:
                raise ValueError("an object without fields")
        except (ValueError, msgspec.MsgspecError) as error:
            told = f"{path}, byte {at}: {line[:80]!r} is no event: {error}"
            if self._malformed == "raise":
                raise DataError(told) from error
            self.skipped += 1
            _log.warning("%s; it is skipped, as %d before it", told, self.skipped - 1)
            return None
        return value

    def _row(self, path: Path, partition: str, line: bytes) -> Mapping[str, Any] | None:
        names = self._headers.get(partition)
        if names is None:
            with path.open("rb") as file:
                names = self._headers[partition] = next(csv.reader([file.readline().decode().rstrip("\r\n")]))
            if line.decode().rstrip("\r\n") == ",".join(names):
                return None  # the header itself was not complete when it was read first
        cells = next(csv.reader([line.decode()]), [])
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} cells, expected {len(names)}")
        return {name: _number(cell) for name, cell in zip(names, cells, strict=True)}

    def close(self) -> None:
        """As `Stream.close`: no file stays open."""

    def __repr__(self) -> str:
        return f"Tail({str(self.directory)!r}, {self.pattern!r})"


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
