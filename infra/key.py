"""Identity: canonical JSON and the key of a step.

The key of a step is the sha256 of what its output bytes depend on, and of nothing else: the stage's name and version,
its config with defaults resolved, the output digests of its inputs by slot, and the digests of external inputs.
Resources, paths, URIs, retries and machines are of other types and cannot get in.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

FORMAT_VERSION = 1


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no blanks, UTF-8, ints and floats distinct, sets sorted.

    Raises TypeError or ValueError naming the place (`config.sources[0].path`) for what has no canonical form: paths,
    bytes, callables, NaN, infinities, keys that are not strings.
    """
    return json.dumps(_plain(value, ""), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_hex(text: str) -> str:
    """sha256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def identity(
    stage: str,
    version: int,
    config: BaseModel,
    inputs: Mapping[str, str],
    externals: Mapping[str, str],
    code_digest: str | None = None,
) -> dict[str, Any]:
    """The document whose canonical JSON is hashed to the key. `code_digest` only under policy `strict`."""
    document: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "stage": stage,
        "version": version,
        "config": plain_config(config),
        "inputs": dict(inputs),
        "externals": dict(externals),
    }
    if code_digest is not None:
        document["code"] = code_digest
    return document


def step_key(document: Mapping[str, Any]) -> str:
    """The key of an identity document."""
    return sha256_hex(canonical_json(document))


def plain_config(config: BaseModel) -> dict[str, Any]:
    """A config as JSON values, defaults resolved."""
    return _plain(config, "config")


def _plain(value: Any, place: str) -> Any:
    if value is None or (isinstance(value, (bool, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, place)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place or 'value'} is {value}: only finite numbers have a canonical form")
        return value
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name), f"{place}.{name}") for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{place or 'value'} has the key {name!r}: keys must be strings")
        return {name: _plain(item, f"{place}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, f"{place}{{}}") for item in value), key=canonical_json)
    if isinstance(value, PurePath):
        raise TypeError(f"{place or 'value'} is a path: paths are no part of an identity; make it an external input")
    raise TypeError(f"{place or 'value'} is a {type(value).__name__}, which has no canonical form")
