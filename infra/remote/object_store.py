"""Objects in an object store: Amazon S3 and what speaks its protocol (s3://), Google (gs://), Azure (az://).

Exclusive creation is the store's own conditional write (`If-None-Match: *` and its like). Endpoint, region and
credentials come from the usual environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ..., `aws_profile`, or the machine's own identity), never from the URI, so that no record
holds a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from ropewalk.infra.artifact import num_threads
from ropewalk.infra.key import sha256_hex
from ropewalk.infra.objects import file_sha256, naming
from ropewalk.infra.remote.aws_profile import profile_credentials
from ropewalk.infra.remote.reachable import s3_endpoint
from ropewalk.infra.step import UserError

CHUNK_BYTES = 8 << 20
MAX_PARTS = 9_000
"""Of a multipart upload; S3 allows 10,000."""
FILES_AT_ONCE = 4
PARTS_AT_ONCE = 4
"""Together they bound the memory of a transfer: 4 x 4 x 8 MiB for files below 70 GiB."""
RETRY_SECONDS = 60
"""How long a request is sent again before it is given up."""
ANSWER_SECONDS = 30
"""How long one request for a small object may take; for a part of a large one, `PART_SECONDS`."""
PART_SECONDS = 300
CREATE_TRIES = 10
_NO_ANSWER = re.compile(r"HTTP error|status code: (5\d\d|429)|error decoding response|timed out", re.IGNORECASE)
"""Of a request that was sent again until it was given up: not the store says no, but the way to it or its load."""
_NOT_ALLOWED = re.compile(r"status code: (401|403)")
_IDENTITY = re.compile(r"169\.254\.169\.254|/latest/api/token|metadata\.google\.internal|/metadata/identity")
"""Of a request to the service from which a machine in a cloud has its identity: asked where nothing else is set."""
NO_CREDENTIALS = (
    "there are no credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and"
    " boto3, or for gs://"
    " GOOGLE_APPLICATION_CREDENTIALS, for az:// AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY), and the"
    " machine has no identity of its own"
)


def scratch_folder(uri: str) -> Path:
    """Where this machine keeps the files of an object store: below `ROPEWALK_SCRATCH`, ~/.cache/ropewalk by default."""
    base = os.environ.get("ROPEWALK_SCRATCH") or "~/.cache/ropewalk"
    return Path(base).expanduser().absolute() / sha256_hex(uri)[:16]


@cache
def open_objects(uri: str) -> ObjectStoreObjects:
    """The objects below a URI; one client for a process. Raises UserError for a URI that is none or holds more."""
    uri = uri.rstrip("/")
    place = uri.partition("://")[2]
    if any(mark in place for mark in "@?#") or not {"", ".", ".."}.isdisjoint(place.split("/")):
        raise UserError(
            f"{_without_secret(uri)}: write it as s3://bucket/prefix; credentials come from the environment"
        )
    try:
        profile = profile_credentials() if uri.startswith("s3://") else None
        return ObjectStoreObjects(uri, _client(uri, ANSWER_SECONDS, profile), _client(uri, PART_SECONDS, profile))
    except (BaseError, ValueError) as error:
        raise UserError(f"{uri}: {_first_line(error)}") from None


def _client(uri: str, seconds: float, profile: Any) -> Any:
    """A client of which each request may take so long. A server that is silent is given up after two of them."""
    endpoint = s3_endpoint(uri)
    # Without encryption only where the user has named such an endpoint.
    is_plain = endpoint is not None and endpoint[1].startswith("http://")
    options: Any = {"timeout": timedelta(seconds=seconds), "allow_http": is_plain}
    # By default the pauses between retries hardly grow, and a busy store is given up after a second.
    backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 3}
    again = timedelta(seconds=min(RETRY_SECONDS * seconds / ANSWER_SECONDS, 2 * seconds))
    retries: Any = {"max_retries": 1000, "retry_timeout": again, "backoff": backoff}
    return from_url(uri, client_options=options, retry_config=retries, credential_provider=profile)


class Entry(NamedTuple):
    """An object as a listing shows it."""

    size: int
    tag: str
    """Another one for another content."""
    changed_at: float
    """Seconds since 1970, on the store's clock."""


class ObjectStoreObjects:
    """See `Objects`. Methods are safe to call from several threads."""

    def __init__(self, uri: str, client: Any, bulk: Any) -> None:
        self.uri = uri
        self._client = client
        self._bulk = bulk
        """For the data, of which a request may take long."""
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
        for _ in range(CREATE_TRIES):
            try:
                with self._errors(name, missing_is_error=True):
                    obstore.put(self._client, name, content, mode="create")
                return True
            except FileExistsError:
                # S3 also refuses while another's creation is under way, which may come to nothing.
                with contextlib.suppress(FileNotFoundError):
                    return self.read(name) == content
        raise ConnectionError(f"{self.uri}/{name}: the store says again and again that it exists and that it does not")

    def names(self, folder: str) -> list[str]:
        """See `Objects.names`."""
        with self._errors(folder, missing_is_error=True):
            found = obstore.list_with_delimiter(self._client, folder)
        paths = [*(str(entry["path"]) for entry in found["objects"]), *map(str, found["common_prefixes"])]
        return sorted(path.rpartition("/")[2] for path in paths)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Objects.sizes`."""
        return {name: entry.size for name, entry in self.entries(folder).items()}

    def entries(self, folder: str) -> dict[str, Entry]:
        """Every object below a folder, by name relative to it."""
        with self._errors(folder, missing_is_error=True):
            found = [entry for batch in obstore.list(self._client, folder) for entry in batch]
        return {
            str(entry["path"]).removeprefix(f"{folder}/"): Entry(
                int(entry["size"]), str(entry["e_tag"]), entry["last_modified"].timestamp()
            )
            for entry in found
        }

    def remove(self, name: str) -> None:
        """See `Objects.remove`."""
        self.remove_all([name, *(f"{name}/{inner}" for inner in self.sizes(name))])

    def remove_all(self, names: Sequence[str]) -> None:
        """Remove objects by their names, no folders; those that are gone already do not matter."""
        if names:
            with self._errors(names[0]), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._client, names)

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

    def download(self, files: Sequence[tuple[str, Path, int, str | None]], checked_at: float | None = None) -> None:
        """Bring objects, each given as (name, path, size, sha256 if known), to paths of this machine, if need be.

        A file appears whole and verified or not at all. One that is there and was not touched since `checked_at`
        (seconds since 1970) is left as it is, another one is compared. Raises OSError for content that is not the
        expected.
        """
        with ThreadPoolExecutor(max_workers=num_threads()) as pool:
            there = list(pool.map(lambda file: _is_there(file[1], file[2], file[3], checked_at), files))
        missing = [file for file, is_there in zip(files, there, strict=True) if not is_there]
        for folder in {path.parent for _, path, _, _ in missing}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=FILES_AT_ONCE) as pool:
            list(pool.map(lambda file: self._download(*file), missing))

    def _upload(self, name: str, path: Path) -> None:
        part = max(CHUNK_BYTES, -(-path.stat().st_size // MAX_PARTS))
        with self._errors(name, missing_is_error=True):
            obstore.put(self._bulk, name, path, chunk_size=part, max_concurrency=PARTS_AT_ONCE)

    def _download(self, name: str, path: Path, size: int, sha256: str | None) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with naming(path), temporary.open("wb") as file:
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
                chunk = obstore.get_range(self._bulk, name, start=start, end=min(start + CHUNK_BYTES, size))
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
            raise PermissionError(_not_allowed(f"{self.uri}/{name}", error)) from None
        except BaseError as error:
            if "NoSuchBucket" in str(error):
                raise OSError(f"{self._bucket}: there is no such bucket") from None
            has_identity = not _IDENTITY.search(str(error))
            if has_identity and _NOT_ALLOWED.search(str(error)):  # Of a listing: the client does not know it for one.
                raise PermissionError(_not_allowed(f"{self.uri}/{name}", error)) from None
            kind = ConnectionError if _NO_ANSWER.search(str(error)) else OSError
            raise kind(f"{self.uri}/{name}: {_first_line(error) if has_identity else NO_CREDENTIALS}") from None
        except ValueError:
            raise UserError(
                f"{self.uri}: {name!r} cannot be the name of an object; give the file another one"
            ) from None


def _is_there(path: Path, size: int, sha256: str | None, checked_at: float | None) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        return False
    is_untouched = checked_at is not None and status.st_ctime <= checked_at
    return is_untouched or sha256 in (None, file_sha256(path))


def _not_allowed(place: str, error: BaseException) -> str:
    """A refusal with the store's own word for it, such as AccessDenied."""
    match = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{place}: the credentials of this machine do not allow it ({match[1] if match else _first_line(error)})"


def _first_line(error: BaseException) -> str:
    """What went wrong, without the query of a URL, where some stores put their signature."""
    return re.sub(r"\?\S*", "", str(error).strip().splitlines()[0])


def _without_secret(uri: str) -> str:
    scheme, _, place = uri.partition("://")
    return f"{scheme}://{place.rpartition('@')[2].partition('?')[0]}"
