"""A training's state in files: written whole or not at all, verified, read for any number of servers.

The format: docs/checkpoint-format.md.
"""

from headwater.checkpoint.export import export, export_table, load_checkpoint
from headwater.checkpoint.find import (
    Latest,
    Listed,
    latest,
    list_checkpoints,
    next_generation,
    prune,
    resolve,
    verify_all,
)
from headwater.checkpoint.lock import DirectoryLock, FileLock, LockedError
from headwater.checkpoint.manifest import FORMAT, MANIFEST, Manifest, folder_name
from headwater.checkpoint.read import Checkpoint, open_checkpoint, read_part, read_programs
from headwater.checkpoint.spec_differences import differences
from headwater.checkpoint.verify import Verification, verify
from headwater.checkpoint.write import abandon, begin, commit, write_part

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Checkpoint",
    "DirectoryLock",
    "FileLock",
    "Latest",
    "Listed",
    "LockedError",
    "Manifest",
    "Verification",
    "abandon",
    "begin",
    "commit",
    "differences",
    "export",
    "export_table",
    "folder_name",
    "latest",
    "list_checkpoints",
    "load_checkpoint",
    "next_generation",
    "open_checkpoint",
    "prune",
    "read_part",
    "read_programs",
    "resolve",
    "verify",
    "verify_all",
    "write_part",
]
