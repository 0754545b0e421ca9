"""Turns what a run record holds into what MLflow accepts: names, params, metrics, datasets, the files to upload.

MLflow 3.17 cuts param values at 6000 and tags at 8000 characters without a word, refuses names over 250 characters or
with unusual ones and dataset digests over 36, and stores an infinite metric as 1.8e308. Here long values are cut so
that it shows, and an infinity becomes NaN, which MLflow keeps for runs (for models it would store 0: left out there).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

from ropewalk.infra.scrub import scrub, scrub_text

MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 5000
MAX_NAME_CHARACTERS = 250
DIGEST_CHARACTERS = 32
UPLOADED_SUFFIXES = {".png", ".html", ".json", ".jsonl", ".csv", ".md", ".txt"}
MAX_UPLOAD_BYTES = 5 * 2**20
MAX_UPLOADS = 50

Item = TypeVar("Item")


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def name_for_mlflow(name: str) -> str:
    """A metric, param or tag name with everything MLflow refuses replaced by `_`."""
    cleaned = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    parts = [part if part.strip(".") else "_" for part in cleaned.split("/")]
    return "/".join(parts)[:MAX_NAME_CHARACTERS]


def model_name(name: str) -> str:
    """A name that a logged model may have."""
    return re.sub(r"[/:.%\"']", "-", name) or "model"


def cut(text: str, limit: int, where: str = "") -> str:
    """The text, or its beginning with a mark that says it was cut and `where` the whole can be read."""
    mark = f" ... [cut{where and '; see ' + where}]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def tag_value(value: Any) -> str:
    """A tag's text: secrets taken out, cut visibly; booleans as `true` and `false`, None as `unknown`."""
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "true", False: "false"}[value]
    return cut(scrub_text(str(value)), MAX_TAG_CHARACTERS)


def params_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The config as flat params: nested names joined by dots, lists and other values as JSON, secrets taken out."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from walk(f"{prefix}.{name}" if prefix else str(name), item)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield name_for_mlflow(prefix), cut(text, MAX_PARAM_CHARACTERS, "config.json")

    return dict(walk("", scrub(config))) if config else {}


def metric_value(value: float) -> float:
    """The number that MLflow can hold: an infinity becomes NaN."""
    return float(value) if math.isfinite(value) else math.nan


def milliseconds(seconds: float) -> int:
    """An event's time as MLflow wants it."""
    return round(seconds * 1000)


def dataset_input(name: str, reference: Mapping[str, Any], context: str, facts: Mapping[str, Any]) -> Any:
    """A `DatasetInput` for an artifact or external file: named, located by URI, identified by digest.

    MLflow's digest is the first 32 hex digits; the whole one is a tag.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {key: facts[key] for key in ("kind", "row_tokens", "counts") if facts.get(key) is not None}
    dataset = Dataset(
        name=name[:500],
        digest=reference["digest"][:DIGEST_CHARACTERS],
        source_type="local",
        source=json.dumps({"uri": scrub_text(reference["uri"])}),
        profile=json.dumps(profile),
    )
    tags = {"mlflow.data.context": context, "ropewalk.digest": reference["digest"]}
    return DatasetInput(dataset, [InputTag(key, value) for key, value in tags.items()])


def shown_files(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Which files of a committed attempt are worth showing, and how many others are left out.

    `entries` are the `files` of its manifest. Taken are small files that people read, and the manifest itself.
    """
    readable = [entry for entry in entries if PurePosixPath(entry["path"]).suffix.lower() in UPLOADED_SUFFIXES]
    chosen = [entry["path"] for entry in readable if entry["size"] <= MAX_UPLOAD_BYTES and _confined(entry["path"])]
    chosen = sorted(chosen, key=lambda path: (not path.startswith("data/"), path))[:MAX_UPLOADS]
    return [*chosen, *(["manifest.json"] if entries else [])], len(readable) - len(chosen)


def _confined(path: str) -> bool:
    return path.startswith(("data/", "observed/")) and ".." not in PurePosixPath(path).parts
