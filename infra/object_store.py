"""Objects in an object store: Amazon S3 and what speaks its protocol (s3://), Google (gs://), Azure (az://).

Exclusive creation is the store's own conditional write (`If-None-Match: *` and its like). Endpoint, region and
credentials come from the usual environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ..., or the machine's own identity), never from the URI, so that no record holds a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from ropewalk.infra.key import sha256_hex
from ropewalk.infra.step import UserError

CHUNK_BYTES = 8 << 20
MAX_PARTS = 9_000
"""Of a multipart upload; S3 allows 10,000."""
FILES_AT_ONCE = 4
PARTS_AT_ONCE = 4
"""Together they bound the memory of a transfer: 4 x 4 x 8 MiB for files below 70 GiB."""
RETRY_SECONDS = 60
_NO_ANSWER = re.compile(r"HTTP error|status code: (5\d\d|429)|error decoding response|timed out", re.IGNORECASE)
"""Of a request that was sent again until it was given up: not the store says no, but the way to it or its load."""


def scratch_folder(uri: str) -> Path:
    """Where this machine keeps the files of an object store: below `ROPEWALK_SCRATCH`, ~/.cache/ropewalk by default."""
    base = os.environ.get("ROPEWALK_SCRATCH") or "~/.cache/ropewalk"
    return Path(base).expanduser().absolute() / sha256_hex(uri)[:16]


@cache
def open_objects(uri: str) -> ObjectStoreObjects:
    """The objects below a URI; one client for a process. Raises UserError for a URI that is none or holds more."""
    place = uri.partition("://")[2]
    bucket = place.partition("/")[0]
    if not bucket or any(mark in place for mark in "@?#"):
        raise UserError(
            f"--store {_without_secret(uri)}: write it as s3://bucket/prefix; credentials come from the environment"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    # Without encryption only where the user has named such an endpoint.
    options: Any = {"allow_http": True} if uri.startswith("s3://") and endpoint.startswith("http://") else {}
    # By default the pauses between retries hardly grow, and a busy store is given up after a second.
    backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 3}
    limits = {"max_retries": 1000, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    retries: Any = {**limits, "backoff": backoff}
    try:
        client = from_url(uri.rstrip("/"), client_options=options, retry_config=retries)
    except (BaseError, ValueError) as error:
        raise UserError(f"--store {uri}: {_first_line(error)}") from None
    return ObjectStoreObjects(uri.rstrip("/"), client)


class ObjectStoreObjects:
    """See `Objects`. Methods are safe to call from several threads."""

    def __init__(self, uri: str, client: Any) -> None:
        self.uri = uri
        self._client = client
        self._bucket = "/".join(uri.split("/")[:3])

    def read(self, name: str) -> bytes:
        """See `Objects.read`."""
        with self._errors(name):
            return bytes(obstore.get(self._client, name).bytes())

    def write(self, name: str, content: bytes) -> None:
        """See `Objects.write`."""
        with self._errors(name, missing_is_error=True):
            obstore.put(self._client, name, content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Objects.create`. A request that is repeated because its answer was lost finds its own object."""
        try:
            with self._errors(name, missing_is_error=True):
                obstore.put(self._client, name, content, mode="create")
        except FileExistsError:
            return self.read(name) == content
        return True

    def names(self, folder: str) -> list[str]:
        """See `Objects.names`."""
        with self._errors(folder, missing_is_error=True):
            found = obstore.list_with_delimiter(self._client, folder)
        paths = [*(str(entry["path"]) for entry in found["objects"]), *map(str, found["common_prefixes"])]
        return sorted(path.rpartition("/")[2] for path in paths)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Objects.sizes`."""
        return {name: size for name, (size, _) in self.entries(folder).items()}

    def entries(self, folder: str) -> dict[str, tuple[int, str]]:
        """Bytes and entity tag of every object below a folder, by name relative to it."""
        with self._errors(folder, missing_is_error=True):
            found = [entry for batch in obstore.list(self._client, folder) for entry in batch]
        return {
            str(entry["path"]).removeprefix(f"{folder}/"): (int(entry["size"]), str(entry["e_tag"])) for entry in found
        }

    def remove(self, name: str) -> None:
        """See `Objects.remove`."""
        with self._errors(name):
            paths = [name, *(f"{name}/{inner}" for inner in self.sizes(name))]
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._client, paths)

    def upload(self, files: Mapping[str, Path]) -> None:
        """See `Objects.upload`. Large files go in parts, in parallel."""
        with ThreadPoolExecutor(max_workers=FILES_AT_ONCE) as pool:
            list(pool.map(self._upload, files.keys(), files.values()))

    def sha256(self, name: str) -> str:
        """See `Objects.sha256`."""
        digest = hashlib.sha256()
        with self._errors(name):
            size = int(obstore.head(self._client, name)["size"])
        for chunk in self._chunks(name, size):
            digest.update(chunk)
        return digest.hexdigest()

    def download(self, files: Sequence[tuple[str, Path, int, str | None]]) -> None:
        """Bring objects, each given as (name, path, size, sha256 if known), to paths of this machine, if need be.

        A file appears whole and verified or not at all. Raises OSError for content that is not the expected.
        """
        missing = [file for file in files if not _is_there(file[1], file[2])]
        for folder in {path.parent for _, path, _, _ in missing}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=FILES_AT_ONCE) as pool:
            list(pool.map(lambda file: self._download(*file), missing))

    def _upload(self, name: str, path: Path) -> None:
        part = max(CHUNK_BYTES, -(-path.stat().st_size // MAX_PARTS))
        with self._errors(name, missing_is_error=True):
            obstore.put(self._client, name, path, chunk_size=part, max_concurrency=PARTS_AT_ONCE)

    def _download(self, name: str, path: Path, size: int, sha256: str | None) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for chunk in self._chunks(name, size):
                    file.write(chunk)
                    digest.update(chunk)
            if sha256 not in (None, digest.hexdigest()):
                raise OSError(f"{self.uri}/{name}: content changed since it was committed")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _chunks(self, name: str, size: int) -> Iterator[Any]:
        """The content in pieces: each is a request of its own, which is repeated if it fails."""
        for start in range(0, size, CHUNK_BYTES):
            with self._errors(name):
                chunk = obstore.get_range(self._client, name, start=start, end=min(start + CHUNK_BYTES, size))
            yield chunk

    @contextlib.contextmanager
    def _errors(self, name: str, *, missing_is_error: bool = False) -> Iterator[None]:
        """Turn the client's errors into OSErrors of one line. A bucket that is missing is no empty folder."""
        try:
            yield
        except AlreadyExistsError:
            raise FileExistsError(f"{self.uri}/{name}: exists") from None
        except FileNotFoundError:
            if missing_is_error:
                raise OSError(f"{self._bucket}: there is no such bucket") from None
            raise FileNotFoundError(f"{self.uri}/{name}: there is no such object") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(f"{self.uri}/{name}: not allowed: {_first_line(error)}") from None
        except BaseError as error:
            if "NoSuchBucket" in str(error):
                raise OSError(f"{self._bucket}: there is no such bucket") from None
            kind = ConnectionError if _NO_ANSWER.search(str(error)) else OSError
            raise kind(f"{self.uri}/{name}: {_first_line(error)}") from None
        except ValueError as error:
            raise OSError(f"{self.uri}/{name!r}: not a name for an object: {_first_line(error)}") from None


def _is_there(path: Path, size: int) -> bool:
    try:
        return not path.is_symlink() and path.stat().st_size == size
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    """What went wrong, without the query of a URL, where some stores put their signature."""
    return re.sub(r"\?\S*", "", str(error).strip().splitlines()[0])


def _without_secret(uri: str) -> str:
    scheme, _, place = uri.partition("://")
    return f"{scheme}://{place.rpartition('@')[2].partition('?')[0]}"
