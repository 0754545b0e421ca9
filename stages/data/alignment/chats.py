"""Reads conversations into Chats.

Reads one input slot a source: a file or a folder of JSON Lines (also .gz), JSON arrays and Parquet, in the order of
the sources, then of the relative paths, then of the records. Three layouts are known: `messages` (OpenAI: a list of
`role` and `content`, a text or text parts), `alpaca` (`instruction`, `input`, `output`, perhaps `system`) and
`sharegpt` (`conversations`, a list of `from` and `value`). Writes Chats; a chat is called `<source>/<id>`, or by file
and line.

Lost, counted by reason: chats with a message of an `unknown_role`, one that holds no text but a picture or a tool call
(`not_text`), `empty_content`, half a surrogate pair (`undecodable`), roles out of order (`broken_alternation`), no
last answer (`unanswered`; kept with `enable_unanswered`, for stages that write the answer), and repeats of an earlier
chat of any source (`duplicate`). A record that is malformed or lacks a field is an error.

Memory: one shard, 16 bytes a chat, and its id.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.conversations import Chat, Message, check_chats, fault, write_chats
from ropewalk.stages.data.reading.readers import list_files
from ropewalk.stages.schema import Artifact, Record, write_artifact

NAME = "chats"
VERSION = 1
check = check_chats

REASONS = (
    "unknown_role",
    "not_text",
    "empty_content",
    "undecodable",
    "broken_alternation",
    "unanswered",
    "duplicate",
)
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class ChatSource(Record):
    """Where one part of the chats comes from."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """The input slot that holds the files, the `source` of the chats and the beginning of their ids."""
    layout: Literal["messages", "alpaca", "sharegpt"] = "messages"
    """How a record spells a conversation."""
    messages_field: str | None = None
    """The field with the list of messages. None: `messages`, or `conversations` for sharegpt. Not for alpaca."""
    id_field: str | None = None
    """The field, a string or an integer, that names the chat; without it the file and line do."""
    metadata_fields: tuple[str, ...] = ()
    """Fields kept in `metadata`; each record must have them."""
    include: tuple[str, ...] = ("**/*",)
    """Globs of the files to read, below a folder."""
    exclude: tuple[str, ...] = ()
    """Globs of the files to leave out."""


class ChatsConfig(Record):
    """What to read."""

    sources: tuple[ChatSource, ...] = Field(min_length=1)
    """In order: of equal chats, the first is kept."""
    enable_unanswered: bool = False
    """Keep chats that end with the user: a stage that writes the answer reads these."""

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[ChatSource, ...]) -> tuple[ChatSource, ...]:
        names = Counter(source.name for source in sources)
        if twice := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}")
        return sources


def messages_of(source: ChatSource, record: Mapping[str, Any], place: str) -> list[Message] | None:
    """The messages of a record, or None if one of them is not text. Raises ValueError for a malformed record."""
    if source.layout == "alpaca":
        return _alpaca(record, place)
    listed, role, content = ("conversations", "from", "value") if source.layout == "sharegpt" else _OPENAI
    turns = _field(record, source.messages_field or listed, place)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{place}: field {source.messages_field or listed!r} is no list of messages")
    messages = []
    for turn in turns:
        name, text = str(_field(turn, role, place)), _text(_field(turn, content, place))
        if text is None:
            return None
        messages.append({"role": _SHAREGPT_ROLES.get(name, name) if role == "from" else name, "content": text})
    return messages


_OPENAI = ("messages", "role", "content")


def _alpaca(record: Mapping[str, Any], place: str) -> list[Message] | None:
    system = record.get("system") or ""
    values = [_field(record, "instruction", place), record.get("input") or "", _field(record, "output", place), system]
    if not all(isinstance(value, str) for value in values):
        return None
    instruction, given, answer, system = values
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    messages = [{"role": "system", "content": system}] if system.strip() else []
    messages.append({"role": "user", "content": question})
    # An instruction without an answer is a chat that ends with the user.
    return [*messages, {"role": "assistant", "content": answer}] if answer.strip() else messages


def _text(content: Any) -> str | None:
    """A text, or text parts joined; None for anything else (a null beside tool calls, a picture)."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    return None


def _field(record: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in record:
        raise ValueError(f"{place} has no field {name!r}")
    return record[name]


def read_records(path: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Pairs of place and record of a file called `name`. Raises ValueError if it cannot be read."""
    if name.endswith(".parquet"):
        yield from _read_parquet(path, name)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_lines(path, name)
    elif name.endswith(".json"):
        yield from _read_array(path, name)
    else:
        raise ValueError(f"{name} is none of .jsonl, .jsonl.gz, .json and .parquet: leave it out by `exclude`")


def _read_lines(path: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name}:{number}", _object(_parse(line, f"{name}:{number}"), f"{name}:{number}")


def _read_array(path: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = _parse(path.read_bytes(), name)
    if not isinstance(found, list):
        raise ValueError(f"{name} is not a JSON array of chats")
    for number, record in enumerate(found, 1):
        yield f"{name}:{number}", _object(record, f"{name}:{number}")


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", record


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode())
    except ValueError as error:
        raise ValueError(f"{place} is not JSON in UTF-8: {error}") from None


def _object(record: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object")
    return record


class Selection:
    """Decides which chats are kept, and counts."""

    def __init__(self, config: ChatsConfig) -> None:
        self._config = config
        self._ids: set[str] = set()
        self._texts: set[bytes] = set()
        self.counts: Counter[str] = Counter()

    def keep(self, source: ChatSource, place: str, record: Mapping[str, Any]) -> Chat | None:
        """The chat of a record, or None if it is dropped. Raises ValueError for a malformed record or a double id."""
        where = f"{source.name}/{place}"
        messages = messages_of(source, record, where)
        metadata = {name: _field(record, name, where) for name in source.metadata_fields}
        sample_id = self._name(source, place, record)
        self.counts["num_in"] += 1
        if reason := self._reason(messages):
            self.counts[f"num_dropped_{reason}"] += 1
            return None
        assert messages is not None
        self.counts["num_kept"] += 1
        return Chat(sample_id, source.name, messages, metadata)

    def _name(self, source: ChatSource, place: str, record: Mapping[str, Any]) -> str:
        name = place if source.id_field is None else _field(record, source.id_field, f"{source.name}/{place}")
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"{source.name}/{place}: field {source.id_field!r} is neither a string nor an integer")
        sample_id = f"{source.name}/{name}"
        if source.id_field is not None:
            if sample_id in self._ids:
                raise ValueError(
                    f"chat id {sample_id!r} occurs twice: id_field {source.id_field!r} does not name chats"
                )
            self._ids.add(sample_id)
        return sample_id

    def _reason(self, messages: list[Message] | None) -> str | None:
        if messages is None:
            return "not_text"
        if reason := fault(messages, enable_unanswered=self._config.enable_unanswered):
            return reason
        digest = hashlib.sha256(json.dumps(messages).encode()).digest()[:16]
        if digest in self._texts:
            return "duplicate"
        self._texts.add(digest)
        return None

    def totals(self) -> dict[str, int]:
        """All counts, every reason named. Raises RuntimeError if they do not add up."""
        names = ("num_in", "num_kept", *(f"num_dropped_{reason}" for reason in REASONS))
        totals = {name: self.counts[name] for name in names}
        if totals["num_in"] != sum(totals.values()) - totals["num_in"]:
            raise RuntimeError(f"chats lost count: {dict(self.counts)}")
        return totals


def _files(source: ChatSource, inputs: Mapping[str, Path]) -> list[tuple[str, Path]]:
    if source.name not in inputs:
        raise ValueError(f"source {source.name} has no input: connect a folder or file to the slot {source.name!r}")
    root = inputs[source.name]
    if root.is_file():
        return [(root.name, root)]
    names = list_files(root, source.include, source.exclude)
    if not names:
        raise ValueError(f"source {source.name}: no file matches include {source.include} and exclude {source.exclude}")
    return [(name, root / name) for name in names]


def run(config: ChatsConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Read every source into Chats. Raises ValueError on bad input, or if nothing is left."""
    if unknown := sorted(set(inputs) - {source.name for source in config.sources}):
        raise ValueError(f"input slot {unknown[0]!r} belongs to no source of chats.sources")
    selection = Selection(config)
    files = [(source, name, path) for source in config.sources for name, path in _files(source, inputs)]

    def records() -> Iterator[dict[str, Any]]:
        for done, (source, name, path) in enumerate(files, 1):
            for place, record in read_records(path, name):
                chat = selection.keep(source, place, record)
                if chat is not None:
                    yield _record(chat)
            context.progress(done, len(files), "files")

    write_chats(output.data, records())
    totals = selection.totals()
    if not totals["num_kept"]:
        raise ValueError(f"chats kept no chat: {totals}")
    write_artifact(output.data, Artifact(kind="chats", counts=totals))
    context.log(totals)


def _record(chat: Chat) -> dict[str, Any]:
    try:
        return chat.record()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{chat.sample_id}: metadata_fields cannot be written as JSON: {error}") from None
