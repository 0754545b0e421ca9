"""Chats as the alignment stages handle them: reading, judging, writing, and checking what was written.

A sound chat is at most one system message, then turns of user and assistant; an assistant may ask tools, whose
answers come before its next message. No message is empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.schema import (
    chats_schema,
    iterate_table,
    preferences_schema,
    read_artifact,
    shard_paths,
    write_shard,
)

if TYPE_CHECKING:
    import pyarrow as pa

Message = dict[str, str]
"""`role` and `content`."""

SHARD_BYTES = 16 * 2**20
SHARD_RECORDS = 65_536
_FOLLOWS = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}
ROLES = ("system", "user", "assistant", "tool")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Chat:
    """One row of a Chats table."""

    sample_id: str
    source: str
    messages: list[Message]
    metadata: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The row to write."""
        return {
            "sample_id": self.sample_id,
            "source": self.source,
            "messages": self.messages,
            "metadata": json.dumps(self.metadata, sort_keys=True, ensure_ascii=False, allow_nan=False),
        }


def user(content: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}


def fault(messages: Sequence[Message], *, enable_unanswered: bool = False) -> str | None:
    """Why a chat is not sound, as a reason to count, or None.

    `unknown_role`, `empty_content`, `undecodable` (half a surrogate pair), `broken_alternation`, `unanswered` (it does
    not end with the assistant; allowed with `enable_unanswered` if it ends with the user).
    """
    previous = None
    for message in messages:
        if message["role"] not in ROLES:
            return "unknown_role"
        if not message["content"].strip():
            return "empty_content"
        if not _is_unicode(message["content"]):
            return "undecodable"
        if message["role"] not in _FOLLOWS[previous]:
            return "broken_alternation"
        previous = message["role"]
    if previous == "assistant" or (previous == "user" and enable_unanswered):
        return None
    return "unanswered"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def single_turn(chat: Chat) -> tuple[str, str] | None:
    """Question and answer of a chat that is nothing else, otherwise None."""
    roles = [message["role"] for message in chat.messages]
    if roles != ["user", "assistant"]:
        return None
    return chat.messages[0]["content"], chat.messages[1]["content"]


def fill_in(template: str, **values: str) -> str:
    """Replace `{name}` by its value, in one pass: braces inside a value stay text."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def require_placeholders(field: str, template: str, *names: str) -> str:
    """Return `template`. Raises ValueError if it lacks a placeholder."""
    if missing := [name for name in names if f"{{{name}}}" not in template]:
        raise ValueError(f"{field} must hold {{{missing[0]}}}, where its text goes")
    return template


def iterate_chats(folder: Path) -> Iterator[Chat]:
    """The chats of an artifact in order; memory is bounded by one row group."""
    for batch in iterate_table(folder, "chats"):
        yield from map(chat_of, batch.to_pylist())


def chat_of(record: Mapping[str, Any]) -> Chat:
    """A row of a Chats table. Raises ValueError if its metadata is no JSON object."""
    try:
        metadata = json.loads(record["metadata"])
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"chats: metadata of sample_id {record['sample_id']!r} is not a JSON object")
    return Chat(record["sample_id"], record["source"], record["messages"], metadata)


def count_records(folder: Path, name: str) -> int:
    """The rows of a table, from its footers."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in shard_paths(folder, name))


class RecordWriter:
    """Writes records as shards that are closed at 16 MiB of text or 65,536 records; `close` writes at least one."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._batch: list[Mapping[str, Any]] = []
        self._filled = self._shard = 0
        self.num_records = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        self._batch.append(record)
        self._filled += _text_bytes(record)
        self.num_records += 1
        if self._filled >= SHARD_BYTES or len(self._batch) == SHARD_RECORDS:
            self._flush()

    def close(self) -> int:
        """Write what is left and return how many records there were."""
        if self._batch or not self._shard:
            self._flush()
        return self.num_records

    def _flush(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_pylist([dict(record) for record in self._batch], schema=self._schema)
        write_shard(self._folder, self._name, self._shard, table)
        self._batch, self._filled, self._shard = [], 0, self._shard + 1


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


def write_chats(folder: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records of Chats and return how many there were."""
    writer = RecordWriter(folder, "chats", chats_schema())
    for record in records:
        writer.write(record)
    return writer.close()


def check_chats(config: Any, output: Path) -> None:
    """Schema, ids that occur once, sound conversations, and the count. Raises ValueError."""
    expected = read_artifact(output, "chats").counts["num_kept"]
    _check_schema(output, "chats", chats_schema())
    seen: set[str] = set()
    for chat in iterate_chats(output):
        _check_id(output, "chats", chat.sample_id, seen)
        if reason := fault(chat.messages, enable_unanswered=getattr(config, "enable_unanswered", False)):
            raise ValueError(f"{output}: chats holds sample_id {chat.sample_id!r}, whose messages are {reason}")
    _check_count(output, "chats", len(seen), expected)


def check_preferences(config: Any, output: Path) -> None:
    """Schema, ids that occur once, prompts that end with the user, answers that differ, and the count.

    Raises ValueError.
    """
    expected = read_artifact(output, "preferences").counts["num_kept"]
    _check_schema(output, "preferences", preferences_schema())
    seen: set[str] = set()
    for batch in iterate_table(output, "preferences"):
        for row in batch.to_pylist():
            _check_id(output, "preferences", row["sample_id"], seen)
            for name in ("prompt", "short_prompt"):
                if fault([*row[name], assistant("x")]):
                    raise ValueError(f"{output}: {name} of sample_id {row['sample_id']!r} does not await an answer")
            if row["chosen"] == row["rejected"]:
                raise ValueError(f"{output}: chosen and rejected of sample_id {row['sample_id']!r} are equal")
    _check_count(output, "preferences", len(seen), expected)


def _check_schema(output: Path, name: str, schema: pa.Schema) -> None:
    import pyarrow.parquet as pq

    for path in shard_paths(output, name):
        found = pq.read_schema(path)
        if not found.equals(schema):
            raise ValueError(f"{path}: its columns are {found.names}, or of other types, not those of {name}")


def _check_id(output: Path, name: str, sample_id: str, seen: set[str]) -> None:
    if sample_id in seen:
        raise ValueError(f"{output}: sample_id {sample_id!r} occurs twice in {name}")
    seen.add(sample_id)


def _check_count(output: Path, name: str, found: int, expected: int) -> None:
    if not found:
        raise ValueError(f"{output} is empty: {name} holds nothing")
    if found != expected:
        raise ValueError(f"{output / 'artifact.json'}: counts.num_kept is {expected}, but there are {found}")
