"""Cuts documents into chunks that are documents themselves, for retrieval of chunks (`nextlong` with `level="chunk"`).

Reads   slot `documents`: Documents.
Writes  Documents, shard by shard: chunk n of document d is `d#00000n`, has its source and metadata, and in the metadata
        `chunk_start_characters`. The chunks of a document, joined, are its text.
Loses   documents without text, counted.

As NExtLong does (arXiv 2501.12766, section 3.1.1), lines are put together until the next one would make the chunk
longer than `chunk_characters`; a longer line is cut. Lines keep their ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from ropewalk.stages.checks import check_documents
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.units import sum_counts
from ropewalk.stages.schema import Artifact, Record, documents_schema, read_artifact, shard_paths, write_artifact
from ropewalk.stages.shards import map_shards

NAME = "chunk"
VERSION = 1
check = check_documents


class ChunkConfig(Record):
    """How long chunks are."""

    chunk_characters: int = Field(default=2048, ge=1)
    """No chunk is longer. 2,048 was NExtLong's best of 512 to 32K."""


def cut_text(text: str, most: int) -> Iterator[str]:
    """The chunks of a text, in order, none of them empty or of more than `most` characters."""
    begin = end = 0
    for line in text.splitlines(keepends=True):
        if begin < end and end + len(line) - begin > most:
            yield text[begin:end]
            begin = end
        end += len(line)
        while end - begin > most:
            yield text[begin : begin + most]
            begin += most
    if begin < end:
        yield text[begin:end]


def chunks_of(document: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The records of a document's chunks."""
    start, metadata = 0, json.loads(document["metadata"])
    for number, text in enumerate(cut_text(document["text"], most)):
        yield {
            "doc_id": f"{document['doc_id']}#{number:06d}",
            "text": text,
            "source": document["source"],
            "num_bytes": len(text.encode()),
            "metadata": json.dumps({**metadata, "chunk_start_characters": start}, ensure_ascii=False),
        }
        start += len(text)


def _cut_shard(most: int, item: tuple[int, Path], folder: Path) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ropewalk.stages.schema import write_shard

    number, path = item
    documents = pq.read_table(path).to_pylist()
    chunks = [chunk for document in documents for chunk in chunks_of(document, most)]
    write_shard(folder, "documents", number, pa.Table.from_pylist(chunks, schema=documents_schema()))
    return {
        "num_in": len(documents),
        "num_dropped_empty": sum(not document["text"] for document in documents),
        "num_kept": len(chunks),
        "num_kept_bytes": sum(chunk["num_bytes"] for chunk in chunks),
    }


def run(config: ChunkConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Cut the documents of slot `documents`. Raises ValueError if there is no text."""
    read_artifact(inputs["documents"], "documents")
    paths = shard_paths(inputs["documents"], "documents")
    items = {path.name: (number, path) for number, path in enumerate(paths)}
    shards = list(map_shards(context, partial(_cut_shard, config.chunk_characters), items))
    counts = sum_counts(shards)
    if not counts["num_kept"]:
        raise ValueError(f"{inputs['documents']} holds no text to cut: every document is empty")
    for shard in shards:
        shard.link_into(output.data)
    # What came in are documents and what is kept are chunks: documents add up among themselves.
    counts["num_documents_cut"] = counts["num_in"] - counts["num_dropped_empty"]
    write_artifact(output.data, Artifact(kind="documents", counts=counts))
    context.log({name: float(value) for name, value in counts.items()})
