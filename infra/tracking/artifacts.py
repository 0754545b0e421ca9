"""Reads what tracking shows of committed artifacts, in a local folder or through an object store."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.values import shown_files

MAX_LOG_BYTES = 200_000


class Artifacts:
    """The artifacts and logs of a store. What is missing or unreadable counts as empty: only a view suffers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._facts: dict[str, dict[str, Any]] = {}

    def facts(self, uri: str) -> dict[str, Any]:
        """What `artifact.json` says of an artifact; `{"kind": "checkpoint"}` for a bare Hugging Face folder, else `{}`.

        `uri` is that of a committed output's data, which never changes, or of an external file or folder.
        """
        if uri not in self._facts:
            found = self._json(f"{uri}/artifact.json")
            bare = {"kind": "checkpoint"} if "model_type" in self._json(f"{uri}/config.json") else {}
            self._facts[uri] = found or bare
        return self._facts[uri]

    @contextlib.contextmanager
    def small_files(self, uri: str) -> Iterator[tuple[list[tuple[Path, str]], int]]:
        """The files of a committed attempt worth showing, with the folder each goes to; how many others were left out.

        The paths are good within the `with` block.
        """
        attempt = uri.rpartition("/")[0]
        names, left_out = shown_files(self._json(f"{attempt}/manifest.json").get("files", []))
        with tempfile.TemporaryDirectory() as folder:
            found = [(self._path(f"{attempt}/{name}", Path(folder) / name), name) for name in names]
            yield [(path, name.rpartition("/")[0]) for path, name in found if path is not None], left_out

    def log(self, run_id: str, step: str, attempt: str) -> str:
        """The end of an attempt's log, without secrets."""
        path = self._store.root / "runs" / run_id / "logs" / step / f"{attempt}.log"
        if not path.exists():
            self._store.pull_runs(logs_of=run_id)
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - MAX_LOG_BYTES))
                content = file.read()
        except FileNotFoundError:
            content = b""
        return scrub_text(content.decode("utf-8", errors="replace"))

    def _json(self, uri: str) -> dict[str, Any]:
        try:
            found = json.loads(self._bytes(uri))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _bytes(self, uri: str) -> bytes:
        name = self._name(uri)
        try:
            return Path(uri).read_bytes() if name is None else self._store.objects.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def _path(self, uri: str, copy: Path) -> Path | None:
        """A local file with the content behind `uri`: itself, or a copy; None if it is gone, or a link."""
        name = self._name(uri)
        if name is None:
            path = Path(uri)
            return path if path.is_file() and not path.is_symlink() else None
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(self._bytes(uri))
        return copy

    def _name(self, uri: str) -> str | None:
        """The name of an object in the store; None for a path of this machine."""
        prefix = self._store.uri.rstrip("/") + "/"
        return uri.removeprefix(prefix) if "://" in uri and uri.startswith(prefix) else None
