"""Chats in a scratch file, for stages that need them in another order than they lie in: memory-mapped, not loaded."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.alignment.conversations import Chat, chat_of

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_CHATS = 256


@dataclass(frozen=True)
class ChatPile:
    """Chats by place."""

    table: pa.Table
    """Memory-mapped."""
    lengths: list[int]
    """Tokens of each chat."""
    path: Path
    """The scratch file, for workers to map."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: int) -> Chat:
        record = {name: self.table.column(name)[place].as_py() for name in self.table.column_names}
        return chat_of({**record, "messages": json.loads(record["messages"])})


def write_pile(work: Path, name: str, chats: Iterable[tuple[Chat, int]]) -> ChatPile:
    """Write chats, given with their lengths, to a new file below `work` and map it."""
    import pyarrow as pa

    work.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.large_string()) for name in ("sample_id", "source", "messages", "metadata")])
    lengths: list[int] = []
    path = work / f"{name}-{uuid.uuid4().hex}.arrow"  # An attempt that was given up may still write to an older one.
    for older in work.glob(f"{name}-*.arrow"):
        older.unlink()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in _batches(chats):
            lengths += [length for _, length in batch]
            rows = [{**chat.record(), "messages": json.dumps(chat.messages)} for chat, _ in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return ChatPile(map_pile(path), lengths, path)


def map_pile(path: Path) -> Any:
    """The table of a scratch file, mapped."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _batches(chats: Iterable[tuple[Chat, int]]) -> Iterator[list[tuple[Chat, int]]]:
    batch: list[tuple[Chat, int]] = []
    for item in chats:
        batch.append(item)
        if len(batch) == _BATCH_CHATS:
            yield batch
            batch = []
    if batch:
        yield batch
