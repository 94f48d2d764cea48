"""What a worker trains on: samples by index, from memory or from files."""

from headwater.data.csv import Csv
from headwater.data.event_stream import Stream, StreamEvent
from headwater.data.fetch import fetch, groups_of, length_of
from headwater.data.files import Batch, Files, Group, Reader
from headwater.data.parquet import Parquet
from headwater.data.redis_stream import RedisStream
from headwater.data.tail import Tail

__all__ = [
    "Batch",
    "Csv",
    "Files",
    "Group",
    "Parquet",
    "Reader",
    "RedisStream",
    "Stream",
    "StreamEvent",
    "Tail",
    "fetch",
    "groups_of",
    "length_of",
]
