"""What a folder may hold after a loss of power, at every moment of what is done to its files.

A file's bytes are safe once its descriptor was synced, and a name once its folder was. Of everything else a
disk may have all or nothing when power fails. `crashes` looks at these extremes after every call that changes
a file.
"""

import os
import shutil
from pathlib import Path

CHANGES = ("open", "write", "ftruncate", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Disk:
    """A folder whose changes are followed; what it holds at the start is safe."""

    def __init__(self, folder):
        self.folder = folder
        self._bytes, self._names = {}, {}  # by inode: what is safe
        for path, _, files in os.walk(folder):
            for file in files:
                self._keep_bytes(Path(path) / file)
            self._keep_names(Path(path))

    def synced(self, descriptor):
        """What a descriptor leads to is safe from now on."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.folder):
            (self._keep_names if path.is_dir() else self._keep_bytes)(path)

    def _keep_bytes(self, path):
        self._bytes[path.stat().st_ino] = path.read_bytes()

    def _keep_names(self, path):
        self._names[path.stat().st_ino] = {
            entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)
        }

    def power_fails(self, into, *, names_first):
        """Write to the folder `into` what is left: safe bytes, under all names or under safe ones."""
        self._restore(self.folder.stat().st_ino, self.folder if names_first else None, into)

    def _restore(self, inode, now, into):
        into.mkdir()
        names = self._names.get(inode, {})
        if now is not None:
            names = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(now)}
        for name, (below, is_folder) in names.items():
            if is_folder:
                self._restore(below, now and now / name, into / name)
            else:
                (into / name).write_bytes(self._bytes.get(below, b""))


def crashes(folder, monkeypatch, change):
    """Run `change()`; returns for each moment (what had just been done, folders as they may be then).

    The first of the folders is what a process that is killed then leaves, the others what a loss of power
    leaves.
    The last moment is when `change` has returned.
    """
    disk, moments = Disk(folder), []
    root = folder.parent / "after"
    root.mkdir()

    def moment(done):
        place = root / str(len(moments))
        place.mkdir()
        shutil.copytree(folder, place / "killed")
        disk.power_fails(place / "names", names_first=True)
        disk.power_fails(place / "safe", names_first=False)
        moments.append((done, [place / kind for kind in ("killed", "names", "safe")]))

    def watched(name, plain):
        def call(*arguments, **options):
            result = plain(*arguments, **options)
            if name != "open" or arguments[1] & os.O_CREAT:
                if name == "fsync":
                    disk.synced(arguments[0])
                with monkeypatch.context() as paused:
                    for other, original in plains.items():
                        paused.setattr(os, other, original)
                    moment(f"{name}{arguments}")
            return result

        return call

    plains = {name: getattr(os, name) for name in CHANGES}
    with monkeypatch.context() as patched:
        for name, plain in plains.items():
            patched.setattr(os, name, watched(name, plain))
        change()
    moment("all was done")
    return moments
