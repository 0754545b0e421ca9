"""Outside data that pipelines name: adopted files, repositories of the Hugging Face hub, objects of object stores.

    adopted/<name>/<000000>.json     a version of adopted data: source, files and digest; the highest counts
    adopted/<name>/files/<digest>/   its files, if they were copied into the store
    externals/<digest>.json          what else a run has read from outside, by the digest that is in the keys

Versions are created exclusively and never change. Files that were not copied stay where they are: whether they still
are what was adopted is seen from size and time of change whenever a pipeline that uses them is planned.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ropewalk.infra.external import digest_files, external_files, matches
from ropewalk.infra.key import canonical_json, sha256_hex
from ropewalk.infra.objects import file_sha256
from ropewalk.infra.step import External, UserError, unknown
from ropewalk.infra.store import SCHEMES, Store, StoreError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
HUB = re.compile(r"hf://(?:(?P<type>datasets|spaces)/)?(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True)
class Outside:
    """Outside data, resolved."""

    digest: str
    uri: str
    """What `fetch` takes; it says exactly which version."""


def adopt(store: Store, source: str, name: str, external: External, *, copy: bool) -> dict[str, Any]:
    """Register outside data under a name and return the record. The same data again makes no new version.

    Args:
        store: Where to register it.
        source: As the user gave it: a path, or `hf://datasets/owner/repo@<commit>`.
        name: How pipelines will call it.
        external: The files that are meant.
        copy: Keep a copy of the files in the store.

    Raises:
        UserError: A name that cannot be, no such files, a hub repository without its commit.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name}: must be letters, digits, '-', '_' and '.', and begin with a letter or digit")
    if source.startswith("hf://"):
        document = _hub_document(external, source)
    elif "://" in source:
        raise UserError(f'{source}: pipelines name it themselves, as External("{source}"); files and hf:// are adopted')
    else:
        document = _path_document(store, external, source)
    if copy:
        document = _copied(store, name, document)
    newest = _numbers(store, name)[-1:]
    if newest:
        known = _read_version(store, name, newest[0])
        if all(known.get(field) == value for field, value in document.items()):
            return known
    record = {**document, "name": name, "number": newest[0] + 1 if newest else 0}
    record |= {"adopted_at": time.time(), "by": uuid.uuid4().hex}
    if not store.objects.create(_version(name, record["number"]), _json(record)):
        return adopt(store, source, name, external, copy=copy)
    return record


def resolve(external: External, place: str, store: Store, *, note: bool = False) -> Outside:
    """What an external input that is no local path is at the moment; with `note`, so that `fetch` finds it.

    Raises UserError naming `place`.
    """
    scheme, _, rest = external.path.partition("://")
    if scheme == "adopted":
        return _resolve_adopted(store, rest, place)
    if scheme == "hf":
        document = _hub_document(external, place)
    elif scheme in SCHEMES:
        document = _objects_document(external, place)
    else:
        raise UserError(
            f"{place}: {external.path} is neither a path nor begins with adopted://, hf://, s3://, gs://, az://"
        )
    if note:
        store.objects.write(f"externals/{document['digest']}.json", _json(document))
    return Outside(document["digest"], f"external://{document['digest']}")


def fetch(store: Store, uri: str) -> Path:
    """The file or folder that a resolved URI names, brought to this machine. Raises UserError or StoreError."""
    scheme, _, rest = uri.partition("://")
    if scheme == "adopted":
        name, _, number = rest.partition("/")
        document = _read_version(store, name, int(number))
    elif scheme == "external":
        document = json.loads(store.objects.read(f"externals/{rest}.json"))
    else:
        raise StoreError(f"{uri}: not an address of an input")
    kind = document["kind"]
    if kind == "path":
        _check_files(document, uri)
        return Path(document["source"])
    if kind == "copy":
        return _fetch_copy(store, document)
    return _fetch_hub(store, document) if kind == "hub" else _fetch_objects(store, document)


def _resolve_adopted(store: Store, name: str, place: str) -> Outside:
    known = _numbers(store, name)
    if not known:
        raise UserError(f"{place}: {unknown('adopted data', name, store.objects.names('adopted'))}; see ropewalk adopt")
    document = _read_version(store, name, known[-1])
    if document["kind"] == "path":
        _check_files(document, place)
    return Outside(document["digest"], f"adopted://{name}/{known[-1]:06d}")


def _path_document(store: Store, external: External, source: str) -> dict[str, Any]:
    root = Path(external.path).expanduser().resolve()
    entries = digest_files(external, "adopt", store.external_cache)
    paths = dict(external_files(external, "adopt"))
    files = [
        {"path": path, "size": size, "sha256": digest, "mtime_ns": paths[path].stat().st_mtime_ns}
        for path, size, digest in entries
    ]
    digest = sha256_hex(canonical_json(entries))
    return {"kind": "path", "source": str(root), "is_file": root.is_file(), "digest": digest, "files": files}


def _check_files(document: dict[str, Any], place: str) -> None:
    root = Path(document["source"])
    for entry in document["files"]:
        path = root if document["is_file"] else root / entry["path"]
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{place}: {path} was adopted and cannot be read now: {error.strerror}") from None
        if (stat.st_size, stat.st_mtime_ns) != (entry["size"], entry["mtime_ns"]):
            if stat.st_size == entry["size"] and file_sha256(path) == entry["sha256"]:
                continue
            raise UserError(
                f"{place}: {path} has changed since it was adopted; adopt it anew, or bring the old file back"
            )


def _copied(store: Store, name: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document of a copy in the store; files that are there already are not copied again."""
    source = _fetch_hub(store, document) if document["kind"] == "hub" else Path(document["source"])
    if document["kind"] == "hub":
        digested = _path_document(store, External(str(source)), document["source"])
        document = {**document, "files": digested["files"], "is_file": False}
    folder = f"adopted/{name}/files/{document['digest']}"
    there = store.objects.sizes(folder)
    missing = [entry["path"] for entry in document["files"] if there.get(entry["path"]) != entry["size"]]
    store.objects.upload({f"{folder}/{path}": source if source.is_file() else source / path for path in missing})
    files = [{key: entry[key] for key in ("path", "size", "sha256")} for entry in document["files"]]
    return {**document, "kind": "copy", "files": files, "folder": folder}


def _fetch_copy(store: Store, document: dict[str, Any]) -> Path:
    folder = store.root / document["folder"]
    for entry in document["files"]:
        _confined(entry["path"], store.uri)
    try:
        problems = store.bring(document["folder"], document["files"], since=document["adopted_at"])
    except FileNotFoundError as error:
        problems = [str(error)]
    if problems:
        raise StoreError(f"{problems[0]}; adopt the data again")
    return folder / document["files"][0]["path"] if document["is_file"] else folder


def _hub_document(external: External, place: str) -> dict[str, Any]:
    match = HUB.fullmatch(external.path)
    if not match:
        raise UserError(
            f"{place}: {external.path}: write it as hf://datasets/owner/repo@<commit> or hf://owner/repo@<commit>,"
            " with the 40 hex digits of the commit"
        )
    repo = {"type": (match["type"] or "models").removesuffix("s"), "repo": match["repo"], "commit": match["commit"]}
    patterns = {"include": list(external.include), "exclude": list(external.exclude)}
    digest = sha256_hex(canonical_json({**repo, **patterns}))
    source = {"kind": "hub", "source": external.path, "revision": match["commit"]}
    return {**source, **repo, **patterns, "digest": digest, "files": []}


def _fetch_hub(store: Store, document: dict[str, Any]) -> Path:
    folder = store.root / "cache" / "hub" / document["digest"]
    if folder.is_dir():
        return folder
    from huggingface_hub import HfApi, snapshot_download

    repo = {"repo_id": document["repo"], "repo_type": document["type"], "revision": document["commit"]}
    wanted = _matching(document["include"], document["exclude"])
    names = [name for name in HfApi().list_repo_files(**repo) if wanted(name)]
    if not names:
        raise UserError(f"{document['source']}: no file matches {', '.join(document['include'])}")
    part = folder.with_suffix(".part")
    # Globs of the hub differ from ours, so the names are given; none has a meaning as a pattern once it is escaped.
    snapshot_download(**repo, local_dir=part, allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names])
    shutil.rmtree(part / ".cache", ignore_errors=True)  # The client's own notes are no part of the data.
    with contextlib.suppress(FileNotFoundError, FileExistsError):  # Another process has brought it meanwhile.
        part.rename(folder)
    return folder


def _objects_document(external: External, place: str) -> dict[str, Any]:
    from ropewalk.infra.remote.object_store import open_objects

    wanted = _matching(external.include, external.exclude)
    found = open_objects(external.path).entries("")
    files = [{"path": p, "size": entry.size, "tag": entry.tag} for p, entry in sorted(found.items()) if wanted(p)]
    if not files:
        raise UserError(f"{place}: no object in {external.path} matches {', '.join(external.include)}")
    digest = sha256_hex(canonical_json([[entry["path"], entry["size"], entry["tag"]] for entry in files]))
    return {"kind": "objects", "source": external.path, "digest": digest, "files": files}


def _fetch_objects(store: Store, document: dict[str, Any]) -> Path:
    from ropewalk.infra.remote.object_store import open_objects

    source = open_objects(document["source"])
    now = source.entries("")
    for entry in document["files"]:
        _confined(entry["path"], document["source"])
        there = now.get(entry["path"])
        if there is None or (there.size, there.tag) != (entry["size"], entry["tag"]):
            raise UserError(f"{document['source']}/{entry['path']}: changed since the step was planned; run again")
    folder = store.root / "cache" / "objects" / document["digest"]
    source.download([(e["path"], folder / e["path"], e["size"], None) for e in document["files"]])
    return folder


def _matching(include: Any, exclude: Any) -> Callable[[str], bool]:
    return lambda name: matches(name, tuple(include)) and not matches(name, tuple(exclude))


def _confined(path: str, place: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise StoreError(f"{place}: path {path!r} leaves its folder")


def _numbers(store: Store, name: str) -> list[int]:
    names = store.objects.names(f"adopted/{name}") if NAME.fullmatch(name) else []
    return [int(found[:-5]) for found in names if re.fullmatch(r"\d{6,}\.json", found)]


def _version(name: str, number: int) -> str:
    return f"adopted/{name}/{number:06d}.json"


def _read_version(store: Store, name: str, number: int) -> dict[str, Any]:
    return json.loads(store.objects.read(_version(name, number)))


def _json(document: dict[str, Any]) -> bytes:
    return (canonical_json(document) + "\n").encode()
