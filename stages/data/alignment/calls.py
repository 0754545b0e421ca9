"""Calls of a language model, each made once: settings, keys, and the places where answers are kept.

A call is its request: model, messages, sampling settings, seed. Its key is the sha256 of the request's canonical JSON,
so it does not depend on the stage, on its other settings, or on where the endpoint is. An answer is looked up, in
order,

1. in `context.work`: what this step has asked before a crash or a failure;
2. in the cache folder: `ROPEWALK_CALL_CACHE`, otherwise `$XDG_CACHE_HOME/ropewalk/calls` or `~/.cache/ropewalk/calls`.
   It is what makes a rerun with other settings (other samples, a longer plan limit, a new format) cost nothing: it
   outlives commits and is shared by all steps of a machine, or of a cluster if the variable names a shared folder.
   `ROPEWALK_CALL_CACHE=off` turns it off. Files are never removed: delete the folder to ask anew;
3. in the slot `calls`: an earlier artifact of such a stage, for a machine without that cache. Every stage that asks a
   model writes what it was answered as `calls-*.parquet`, so that an artifact alone is enough to make it again.

An answer that came from the model is written to 1 and 2 as it arrives: to a file of a new name that is then linked to
its own, so a reader sees it whole or not at all. Failures are not kept: a rerun asks again for these only.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, model_validator

from ropewalk.stages.context import Context
from ropewalk.stages.data.alignment.conversations import Message
from ropewalk.stages.data.alignment.endpoint import Completion, Endpoint, EndpointSettings, Tally
from ropewalk.stages.data.alignment.local_model import LocalModel, model_name
from ropewalk.stages.schema import Record, iterate_table, stable_id

if TYPE_CHECKING:
    import pyarrow as pa


class GenerationConfig(Record):
    """Which model answers, and how."""

    model: str | None = Field(default=None, min_length=1)
    """The model's name at the endpoint of ROPEWALK_CHAT_URL. None: the model of the slot `model`."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    max_new_tokens: int = Field(default=4096, ge=1)
    """Length of an answer, in tokens. A sample with an answer that was cut there is dropped as `truncated`."""
    seed: int | None = 0
    """Of sampling: each call has its own, made of this one and which of several tries of the same it is. None sends
    no seed, for endpoints that refuse one."""
    max_tokens_field: str = Field(default="max_tokens", pattern=r"^max_(completion_)?tokens$")
    """What the endpoint calls `max_new_tokens`."""
    extra_fields: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request's body, such as `chat_template_kwargs` of vLLM. Endpoint only."""
    max_failed_fraction: float = Field(default=0.0, ge=0, le=1)
    """Samples, as a share of all, that may be dropped because a call of theirs has failed for good; the step fails at
    the first one beyond."""

    @model_validator(mode="after")
    def _no_field_twice(self) -> GenerationConfig:
        own = {
            "model",
            "messages",
            "temperature",
            "top_p",
            "max_tokens",
            "max_completion_tokens",
            "seed",
            "stream",
            "n",
        }
        if clash := sorted(own & set(self.extra_fields)):
            raise ValueError(f"extra_fields: {clash[0]!r} has a field of its own, or cannot be changed")
        return self


class Backend(Protocol):
    """Who answers: `Endpoint` or `LocalModel`."""

    @property
    def num_threads(self) -> int:
        """Requests at a time."""
        ...

    def complete(self, request: dict[str, Any]) -> Completion:
        """The answer. Raises CallFailedError."""
        ...

    def close(self) -> None:
        """Calls that wait for another try fail."""
        ...


@dataclass(frozen=True)
class Call:
    """A call and its answer."""

    key: str
    model: str
    completion: Completion

    def record(self) -> dict[str, Any]:
        """The row of `calls`."""
        return {"key": self.key, "model": self.model, **self.completion.model_dump()}


def calls_schema() -> pa.Schema:
    """Arrow schema of the calls beside an artifact: key of the request, and its answer."""
    import pyarrow as pa

    strings = [pa.field(name, pa.string(), nullable=False) for name in ("key", "model", "text", "finish_reason")]
    numbers = [pa.field(name, pa.int64(), nullable=False) for name in ("num_prompt_tokens", "num_completion_tokens")]
    return pa.schema([*strings, *numbers])


def request_key(request: Mapping[str, Any]) -> str:
    """sha256 hex of a request's canonical JSON."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class CallFolder:
    """Answers as files `<two digits of the key>/<key>.json`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str) -> Completion | None:
        """The answer, or None if there is none that can be read."""
        try:
            return Completion.model_validate_json(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, key: str, completion: Completion) -> Completion:
        """Keep an answer; returns the one that is kept, which is another's if that was faster."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{key}.{uuid.uuid4().hex}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(completion.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            if (kept := self.get(key)) is not None:
                return kept
            temporary.replace(path)  # What is there cannot be read.
            return completion
        finally:
            temporary.unlink(missing_ok=True)
        return completion

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / f"{key}.json"


def cache_folder() -> Path | None:
    """Where answers are kept for all steps of this machine, None if that is turned off."""
    named = os.environ.get("ROPEWALK_CALL_CACHE", "")
    if named == "off":
        return None
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ropewalk" / "calls"


@dataclass
class Caller:
    """Asks a model, each question once. Safe for several threads."""

    config: GenerationConfig
    model: str
    """What the model is called in requests."""
    backend: Backend
    folders: Sequence[CallFolder]
    earlier: Mapping[str, Completion]
    tally: Tally
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def request(self, messages: Sequence[Message], attempt: int = 0) -> dict[str, Any]:
        """The body of a call; calls that differ in `attempt` alone are samples of the same."""
        config = self.config
        length = "max_tokens" if self.model.startswith("local:") else config.max_tokens_field
        seed = {} if config.seed is None else {"seed": int(stable_id(config.seed, attempt)[:7], 16)}
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": config.temperature,
            "top_p": config.top_p,
            length: config.max_new_tokens,
            **seed,
            **config.extra_fields,
        }

    def ask(self, messages: Sequence[Message], attempt: int = 0) -> Call:
        """The answer of the model, or of an earlier call. Raises CallFailedError."""
        request = self.request(messages, attempt)
        key = request_key(request)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        try:
            with lock:  # Two samples with the same question at once: the second waits for the first's answer.
                return Call(key, self.model, self._kept(key) or self._fresh(key, request))
        finally:
            with self._lock:
                self._locks.pop(key, None)

    def _kept(self, key: str) -> Completion | None:
        for folder in self.folders:
            if (found := folder.get(key)) is not None:
                self.tally.add(num_cached_calls=1)
                return found
        if key in self.earlier:
            self.tally.add(num_cached_calls=1)
            return self.earlier[key]
        return None

    def _fresh(self, key: str, request: dict[str, Any]) -> Completion:
        completion = self.backend.complete(request)
        self.tally.add(
            num_fresh_calls=1,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_completion_tokens=completion.num_completion_tokens,
        )
        for folder in reversed(self.folders):
            completion = folder.put(key, completion)
        return completion


class _Later:
    """A backend that is opened at the first call: a rerun whose calls are all kept needs neither model nor endpoint."""

    def __init__(self, open_backend: Callable[[], Backend], num_threads: int) -> None:
        self._open, self.num_threads = open_backend, num_threads
        self._backend: Backend | None = None
        self._lock = threading.Lock()

    def complete(self, request: dict[str, Any]) -> Completion:
        """See `Backend.complete`."""
        with self._lock:
            backend = self._backend = self._backend or self._open()
        return backend.complete(request)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._backend is not None:
            self._backend.close()


def open_caller(config: GenerationConfig, inputs: Mapping[str, Path], context: Context) -> Caller:
    """The caller of a stage with the slots `model` and `calls`, both optional.

    Raises ValueError unless exactly one of `generation.model` and the slot `model` is given.
    """
    folder, tally = inputs.get("model"), Tally()
    if (folder is None) == (config.model is None):
        raise ValueError("generation.model names an endpoint's model, the slot `model` holds a local one: give one")
    if folder is not None:
        if config.extra_fields:
            raise ValueError("generation.extra_fields does not apply to the slot `model`")
        name, backend = model_name(folder), _Later(lambda: LocalModel(folder, tally), 1)
    else:
        assert config.model is not None
        threads = EndpointSettings.threads_from_environment()
        name = config.model
        backend = _Later(lambda: Endpoint(EndpointSettings.from_environment(), tally), threads)
    folders = [CallFolder(context.work / "calls"), *_shared_folder(tally)]
    return Caller(config, name, backend, folders, _earlier_calls(inputs.get("calls")), tally)


def _shared_folder(tally: Tally) -> list[CallFolder]:
    """The cache folder, made if need be. Where no one asked for it, a machine without a home does without."""
    folder = cache_folder()
    if folder is None:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return [CallFolder(folder)]
        cause = "it may not be written"
    except OSError as error:
        cause = error.strerror or "it cannot be made"
    if os.environ.get("ROPEWALK_CALL_CACHE"):
        raise ValueError(f"ROPEWALK_CALL_CACHE names a folder that cannot be used: {cause}")
    tally.add(num_unusable_cache_folders=1)
    return []


def _earlier_calls(folder: Path | None) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    if folder is not None:
        for batch in iterate_table(folder, "calls"):
            for row in batch.to_pylist():
                found[row["key"]] = Completion(**{name: row[name] for name in Completion.model_fields})
    return found
