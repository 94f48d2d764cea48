"""Redis streams as a stream of events."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from headwater.data.event_stream import BEGINNING, StreamEvent
from headwater.errors import ConfigurationError, DataError
from headwater.loggers import logger
from headwater.spec.amounts import flag, one_of, text

_log = logger("headwater.data")


class RedisStream:
    """The entries of Redis streams, each key a partition; a `Stream`.

    An offset is an entry's id and how many entries there had been up to it, which tells whether some were
    trimmed before they were read: that is an error. Redis 7 or newer.

    A field's value is taken as JSON where it is some, and as text otherwise.

    Args:
        url: as `redis.Redis.from_url` takes it.
        keys: of the streams; they need not exist yet.
        malformed, endless: as of `Tail`; malformed is an entry whose fields are no text.

    Attributes:
        skipped: malformed entries so far.

    Raises:
        ConfigurationError: the package redis is not installed, or an impossible argument.
    """

    def __init__(
        self,
        url: str,
        keys: str | Sequence[str],
        *,
        malformed: Literal["raise", "skip"] = "raise",
        endless: bool = True,
    ) -> None:
        self.url = text("RedisStream: url", url)
        several = keys if isinstance(keys, list | tuple) else [keys]
        self.keys = tuple([text("RedisStream: a key", key) for key in several])
        self.endless = flag("RedisStream: endless", endless)
        self.skipped = 0
        one_of("RedisStream: malformed", malformed, ("raise", "skip"))
        self._malformed = malformed
        self._client: Any = None
        _redis()

    def partitions(self) -> Sequence[str]:
        """As `Stream.partitions`: the keys."""
        return self.keys

    def read(self, partition: str, offset: str, most: int) -> list[StreamEvent]:
        """As `Stream.read`."""
        redis = _redis()
        id, _, count = offset.partition(" ")
        try:
            client = self._connection()
            removed = self._removed(client, partition, offset)
            read = removed if offset == BEGINNING else int(count)
            if removed > read:
                raise DataError(
                    f"stream {partition!r} at {self.url} was trimmed beyond {id}, up to which it was read: "
                    f"{removed - read} entries are lost; keep more of them, or begin a new training"
                )
            entries = client.xrange(partition, f"({id}" if id else "-", "+", count=most)
        except redis.RedisError as error:
            self.close()
            raise DataError(f"stream {partition!r} at {self.url}, after {id or '-'}: {error}") from error
        return [
            StreamEvent(self._parsed(partition, id, fields), f"{id.decode()} {number}")
            for number, (id, fields) in enumerate(entries, start=read + 1)
        ]

    def _removed(self, client: Any, key: str, offset: str) -> int:
        """How many entries the stream had and has no more."""
        if not client.exists(key):
            if offset == BEGINNING:
                return 0
            raise DataError(f"stream {key!r} at {self.url} was read up to {offset}, and no longer exists")
        about = client.xinfo_stream(key)
        return int(about["entries-added"]) - int(about["length"])

    def _parsed(self, key: str, id: bytes, fields: Mapping[bytes, bytes]) -> Mapping[str, Any] | None:
        try:
            return {name.decode(): _value(value) for name, value in fields.items()}
        except UnicodeDecodeError as error:
            told = f"stream {key!r}, entry {id.decode()}: {error}"
            if self._malformed == "raise":
                raise DataError(told) from error
            self.skipped += 1
            _log.warning("%s; it is skipped, as %d before it", told, self.skipped - 1)
            return None

    def _connection(self) -> Any:
        if self._client is None:
            self._client = _redis().Redis.from_url(self.url)
        return self._client

    def close(self) -> None:
        """As `Stream.close`."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def __repr__(self) -> str:
        return f"RedisStream({self.url!r}, {list(self.keys)!r})"


def _value(value: bytes) -> Any:
    try:
        return msgspec.json.decode(value)
    except msgspec.MsgspecError:
        return value.decode()


def _redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ImportError as error:
        raise ConfigurationError(
            "RedisStream needs the extra `streams`: pip install '.[streams]' in a clone (redis)"
        ) from error
