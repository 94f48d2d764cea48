"""The checkpoints of a directory: which there are, the newest good one, and which may go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headwater.checkpoint.manifest import MANIFEST, folder_name, parse_name
from headwater.checkpoint.read import Checkpoint, open_checkpoint
from headwater.checkpoint.store import DRAFT, Folder, Location, open_folder, split
from headwater.checkpoint.verify import Verification, verify_files
from headwater.checkpoint.verify import verify as verify_one
from headwater.errors import CheckpointError, ConfigurationError, HeadwaterError
from headwater.loggers import logger

_log = logger("headwater.checkpoint")


@dataclass(frozen=True, slots=True)
class Listed:
    """A folder with a manifest.

    Attributes:
        checkpoint: None where the manifest cannot be used, as `error` says.
    """

    path: str
    generation: int
    version: int
    checkpoint: Checkpoint | None
    error: HeadwaterError | None


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest good checkpoint; `skipped`: why each newer one is not good or not complete."""

    checkpoint: Checkpoint
    skipped: tuple[str, ...]


def list_checkpoints(directory: Location) -> tuple[Listed, ...]:
    """All checkpoints in a directory, oldest first; only manifests are read.

    Raises:
        ConfigurationError: there is no such directory.
        CheckpointError: it cannot be read.
    """
    folder = open_folder(directory)
    if not folder.exists():
        raise ConfigurationError(f"there is no directory {folder.url}: nothing was written to it")
    return tuple(
        _listed(folder, generation, version)
        for generation, version in _named(folder)
        if _complete(folder, generation, version)
    )


def latest(directory: Location, *, verify: bool = True, since: int = 0) -> Latest:
    """The newest checkpoint that is good: its manifest and, with `verify`, every byte of its files.

    `since`: the first generation that counts.

    Blocks for reading all of that. Newer ones that are damaged are skipped; the caller should say so.

    Raises:
        ConfigurationError: there is none at all, or the newest good one has a newer format.
        CheckpointError: none is good; the text names each and why.
    """
    listed = [found for found in list_checkpoints(directory) if found.generation >= since]
    if not listed:
        raise ConfigurationError(f"{open_folder(directory).url} holds no checkpoint")
    skipped: list[str] = []
    for found in reversed(listed):
        if isinstance(found.error, ConfigurationError):  # not damaged: an older one would silently lose work
            raise found.error
        problems = _problems(found, verify)
        if found.checkpoint is not None and not problems:
            skipped += _interrupted(found)
            return Latest(found.checkpoint, tuple(skipped))
        skipped += [f"{found.path}: {problem}" for problem in problems]
    raise CheckpointError("no checkpoint is good:\n" + "\n".join(skipped))


def resolve(path: Location, *, verify: bool = True) -> Checkpoint:
    """The good checkpoint at `path`, or the latest good one where `path` is a directory of several.

    Blocks to verify it. Where newer ones are damaged, the log says why another is used.

    Raises:
        ConfigurationError: neither, or of a newer format.
        CheckpointError: damaged.
    """
    if _holds_several(path):
        found = latest(path, verify=verify)
        for reason in found.skipped:
            _log.warning("%s is used, since a newer one is not good: %s", found.checkpoint.path, reason)
        return found.checkpoint
    checkpoint = open_checkpoint(path)
    problems = verify_files(checkpoint).problems if verify else ()
    if problems:
        raise CheckpointError(f"{checkpoint.path} is damaged, use another checkpoint: {'; '.join(problems)}")
    return checkpoint


def verify_all(path: Location) -> tuple[Verification, ...]:
    """Verify the checkpoint at `path`, or each of the directory `path`, oldest first; blocks to read all.

    Raises:
        ConfigurationError: no checkpoint; that it has a newer format is a problem in a directory only.
        CheckpointError: the directory cannot be read.
    """
    if not _holds_several(path):
        return (verify_one(path),)
    listed = list_checkpoints(path)
    if not listed:
        raise ConfigurationError(f"{open_folder(path).url} holds no checkpoint")
    return tuple(
        verify_one(found.path) if found.checkpoint else Verification(found.path, (str(found.error),))
        for found in listed
    )


def _holds_several(path: Location) -> bool:
    """Whether `path` is a folder that is no checkpoint itself, not even half of one."""
    folder, name = open_folder(path), split(path)[1]
    return folder.exists() and MANIFEST not in folder.entries() and not parse_name(name.removesuffix(DRAFT))


def next_generation(directory: Location) -> int:
    """One more than any generation that was ever begun in the directory; 0 in a new one."""
    folder = open_folder(directory)
    names = [parse_name(name.removesuffix(DRAFT)) for name in folder.entries()]
    return max((name[0] + 1 for name in names if name), default=0)


def prune(directory: Location, keep: int, *, writing: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Remove all but the last `keep` checkpoints, and what interrupted writes left; returns their paths.

    A damaged checkpoint does not count, so `keep` good ones stay, by manifest and sizes; it goes when it
    is older than those. The caller holds the directory's lock.

    Args:
        writing: (generation, version) of a checkpoint that is being written, which is left alone.

    Raises:
        ConfigurationError: `keep` is below 1.
        CheckpointError: something cannot be removed.
    """
    if keep < 1:
        raise ConfigurationError(f"keep={keep}: the newest checkpoint always stays, pass 1 or more")
    folder = open_folder(directory)
    spared = _spared_from(folder, keep)
    removed = [
        name
        for name in sorted(folder.entries())
        if (place := parse_name(name.removesuffix(DRAFT)))
        and place != writing
        and (name.endswith(DRAFT) or place < spared or not _complete(folder, *place))
    ]
    for name in removed:
        folder.inside(name).delete(MANIFEST)  # first: half removed it must not look damaged
        folder.delete(name)
    return tuple(f"{folder.url}/{name}" for name in removed)


def _spared_from(folder: Folder, keep: int) -> tuple[int, int]:
    """The oldest (generation, version) that stays."""
    good = 0
    oldest = (0, 0)
    for found in reversed(list_checkpoints(folder.url)):
        sizes = folder.inside(folder_name(found.generation, found.version)).entries()
        files = found.checkpoint.manifest.files() if found.checkpoint else []
        good += found.checkpoint is not None and all(sizes.get(file.name) == file.size for file in files)
        oldest = (found.generation, found.version)
        if good == keep:
            break
    return oldest


def _interrupted(chosen: Listed) -> list[str]:
    """What newer folders that were never completed, or are half removed, are."""
    folder, _ = split(chosen.path)
    return [
        f"{folder.url}/{name}: it is not complete: still being written, or interrupted"
        for name in sorted(folder.entries())
        if (place := parse_name(name.removesuffix(DRAFT)))
        and place > (chosen.generation, chosen.version)
        and (name.endswith(DRAFT) or not _complete(folder, *place))
    ]


def _named(folder: Folder) -> Iterator[tuple[int, int]]:
    return iter(sorted(place for name in folder.entries() if (place := parse_name(name))))


def _complete(folder: Folder, generation: int, version: int) -> bool:
    return MANIFEST in folder.inside(folder_name(generation, version)).entries()


def _listed(folder: Folder, generation: int, version: int) -> Listed:
    path = f"{folder.url}/{folder_name(generation, version)}"
    try:
        return Listed(path, generation, version, open_checkpoint(path), None)
    except HeadwaterError as error:
        return Listed(path, generation, version, None, error)


def _problems(found: Listed, verify: bool) -> tuple[str, ...]:
    if found.checkpoint is None:
        return (str(found.error),)
    if not verify:
        return ()
    try:
        return verify_files(found.checkpoint).problems
    except CheckpointError as error:
        return (str(error),)
