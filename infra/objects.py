"""Small named objects under a root, with the one primitive that all coordination rests on: exclusive creation.

`create` makes an object that did not exist, whole or not at all, and of any number of callers exactly one is told
that it was the one. Commits, leases and ledgers are numbered objects made with it; nothing needs a lock, a rename or
a compare-and-swap. A name is a relative posix path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

PIECE_BYTES = 2**18


class Objects(Protocol):
    """Where objects lie. Errors of the place itself (no permission, disk full, no answer) are OSErrors."""

    uri: str

    def read(self, name: str) -> bytes:
        """The content of an object. Raises FileNotFoundError."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Make or replace an object, whole or not at all; for objects that have one writer."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Make an object that does not exist yet; False if somebody else has made it.

        Two callers never give the same content, so that one whose answer was lost can tell that it was first.
        """
        ...

    def names(self, folder: str) -> list[str]:
        """Sorted names (last part) of the objects and folders directly in a folder; empty if there is none."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object below a folder, by name relative to it. Symbolic links are no objects."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object, or a folder with all that is in it; nothing happens if it is gone."""
        ...

    def upload(self, files: Mapping[str, Path]) -> None:
        """Make or replace objects from files, each whole or not at all."""
        ...

    def sha256(self, name: str) -> str:
        """sha256 of an object's content, in hex. Raises FileNotFoundError."""
        ...


class LocalObjects:
    """Objects as files of a local (or shared) folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def read(self, name: str) -> bytes:
        """See `Objects.read`."""
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `Objects.write`."""
        temporary = self._synced(name, content)
        temporary.replace(self.root / name)

    def create(self, name: str, content: bytes) -> bool:
        """See `Objects.create`: a hard link of a complete, synced file; the second link is refused."""
        temporary = self._synced(name, content)
        try:
            os.link(temporary, self.root / name)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder((self.root / name).parent)
        return True

    def names(self, folder: str) -> list[str]:
        """See `Objects.names`."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Objects.sizes`."""
        found: dict[str, int] = {}
        top = str(self.root / folder)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # Relative to a handle of its folder: looking up the whole path of every file takes as long again.
            for path, _, names, handle in os.fwalk(top, onerror=_raise_unless_gone):
                prefix = f"{path}/"[len(top) + 1 :]
                for name in names:
                    try:
                        status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # Removed since it was listed.
                    if stat.S_ISREG(status.st_mode):
                        found[prefix + name] = status.st_size
        return found

    def remove(self, name: str) -> None:
        """See `Objects.remove`."""
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_unless_gone)
        else:
            path.unlink(missing_ok=True)

    def upload(self, files: Mapping[str, Path]) -> None:
        """See `Objects.upload`."""
        for name, source in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                with naming(path):
                    shutil.copyfile(source, temporary)
                    sync_file(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)

    def sha256(self, name: str) -> str:
        """See `Objects.sha256`."""
        return file_sha256(self.root / name)

    def _synced(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with naming(path), temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing (disk full) tell the file, which Python leaves out once a file is open."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def file_sha256(path: Path | str) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    # Without the buffer of `open` and `file_digest`, which takes longer than the digest of a small file.
    handle = os.open(path, os.O_RDONLY)
    try:
        while piece := os.read(handle, PIECE_BYTES):
            digest.update(piece)
    finally:
        os.close(handle)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _unless_gone(function: Any, path: str, failure: Any) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
