"""Whether a checkpoint's files are, to the bit, what was written."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import msgspec

from headwater.checkpoint.manifest import MANIFEST
from headwater.checkpoint.read import Checkpoint, open_checkpoint
from headwater.checkpoint.store import Folder, Location, open_folder
from headwater.errors import CheckpointError
from headwater.messages import FileRecord

_BUFFER = 1 << 20
_MOST_THREADS = 8


class Verification(msgspec.Struct, frozen=True):
    """What `verify` found.

    Attributes:
        path: of the checkpoint.
        problems: a text for each file that is missing, or whose size or sha256 is not the written one.
        extras: names of files that do not belong to the checkpoint; they do no harm.
    """

    path: str
    problems: tuple[str, ...]
    extras: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether every file is as it was written."""
        return not self.problems


def verify(path: Location) -> Verification:
    """Read every file of the checkpoint at `path`, several at a time, and compare size and sha256; blocks.

    Raises:
        ConfigurationError: no checkpoint, or one of a newer format.
    """
    try:
        return verify_files(open_checkpoint(path))
    except CheckpointError as error:
        return Verification(open_folder(path).url, (str(error),))


def verify_files(checkpoint: Checkpoint) -> Verification:
    """As `verify`, for one whose manifest is read.

    Raises:
        CheckpointError: its folder cannot be listed.
    """
    folder, files = checkpoint.folder, checkpoint.manifest.files()
    found = folder.entries()
    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(files)) or 1
    with ThreadPoolExecutor(threads, thread_name_prefix="headwater-verify") as pool:
        texts = list(pool.map(lambda file: _problem(folder, file, found), files))
    names = {MANIFEST, *(file.name for file in files)}
    extras = tuple(sorted(name for name in found if name not in names))
    return Verification(checkpoint.path, tuple(text for text in texts if text), extras)


def _problem(folder: Folder, file: FileRecord, found: dict[str, int | None]) -> str:
    """What is wrong with a file; "" where nothing is."""
    if file.name not in found:
        return f"{file.name} is missing"
    if found[file.name] != file.size:
        return f"{file.name} has {found[file.name]} bytes, {file.size} were written"
    try:
        digest = _sha256(folder, file.name)
    except CheckpointError as error:
        return str(error)
    return "" if digest == file.sha256 else f"{file.name} has sha256 {digest}, {file.sha256} was written"


def _sha256(folder: Folder, name: str) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with folder.read(name) as source:
        while got := source.readinto(buffer):
            digest.update(buffer[:got])
    return digest.hexdigest()
