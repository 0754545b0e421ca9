"""Preference pairs that carry a model's short-context skill over to long contexts.

Reads `documents`, and the optional slots `model` and `calls` (see `ropewalk.stages.data.alignment.calls`). Writes
Preferences and `calls-*.parquet`. Of a long document, a piece is drawn; the model writes a question about the piece;
`chosen` is its answer when it sees the piece (`short_prompt`), `rejected` its answer when it sees the whole document
(`prompt`). The policy is trained on `prompt`, the reference model reads `short_prompt`.

Method: LongPO (Chen et al., 2025, arXiv 2502.13922; DAMO-NLP-SG/LongPO: data_prepare). Published there: pieces of 16K
to 30K tokens of documents of up to 128K, 4 questions asked for and one drawn, at most 2 pieces a document. A
multi-turn sample of LongPO is the pairs of one document (`metadata.doc_id`), which a trainer may join.

Lost, counted by reason: documents of one piece (`num_documents_dropped_too_short`: there is no long context) or longer
than `max_document_characters` (`_too_long`); pairs of equal answers (`same_answer`: nothing to prefer), questions that
do not parse (`unparsable_questions`), and samples lost in a call. Memory: one shard of documents, and the plan.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.calls import GenerationConfig, open_caller
from ropewalk.stages.data.alignment.conversations import check_preferences, fill_in, require_placeholders, user
from ropewalk.stages.data.alignment.generation import CALL_REASONS, Ask, DroppedError, SampleWriter, generate
from ropewalk.stages.data.alignment.questions import QuestionConfig, ask_question, cut_chunks
from ropewalk.stages.schema import (
    Artifact,
    Record,
    preferences_schema,
    read_artifact,
    seeded_rng,
    shard_paths,
    write_artifact,
)

NAME = "short_to_long"
VERSION = 1
check = check_preferences

REASONS = ("unparsable_questions", "same_answer", *CALL_REASONS)


class ShortToLongConfig(Record):
    """How pairs are made."""

    generation: GenerationConfig = GenerationConfig(max_new_tokens=1024)
    """The model that asks and answers: the one that will be trained."""
    questions: QuestionConfig = QuestionConfig()
    """How it is asked for questions, and how long the pieces are."""
    num_chunks: int = Field(default=2, ge=1)
    """Pieces drawn from each document, at most; one pair each."""
    max_document_characters: int | None = Field(default=None, gt=0)
    """Longer documents are dropped: what the model can read. None keeps them."""
    prompt: str = "{text}\n\n{question}"
    """The user's message, long and short, with {text} and {question}."""
    seed: int = 0
    """Draws pieces and questions."""

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        return require_placeholders("prompt", prompt, "text", "question")


@dataclass(frozen=True)
class Piece:
    """A piece of a document, in characters."""

    row: int
    """Place of the document in its shard."""
    begin: int
    end: int


@dataclass(frozen=True)
class Sample:
    """A document and a piece of it."""

    doc_id: str
    source: str
    text: str
    piece: Piece


def draw_pieces(config: ShortToLongConfig, doc_id: str, text: str) -> list[tuple[int, int]] | str:
    """Pieces of a document in its order, or why it is dropped."""
    if config.max_document_characters is not None and len(text) > config.max_document_characters:
        return "too_long"
    chunks = [
        (begin, end) for begin, end in cut_chunks(text, config.questions.chunk_characters) if text[begin:end].strip()
    ]
    if len(chunks) < 2:
        return "too_short"
    rng = seeded_rng(config.seed, NAME, doc_id)
    drawn = rng.choice(len(chunks), size=min(config.num_chunks, len(chunks)), replace=False)
    return [chunks[place] for place in sorted(drawn.tolist())]


def make_pair(config: ShortToLongConfig, sample: Sample, ask: Ask) -> dict[str, Any]:
    """The pair of a piece. Raises DroppedError and CallFailedError."""
    piece = sample.piece
    text = sample.text[piece.begin : piece.end].strip()
    question = ask_question(config.questions, text, ask, config.seed, sample.doc_id, piece.begin)
    short = [user(fill_in(config.prompt, text=text, question=question))]
    long = [user(fill_in(config.prompt, text=sample.text.strip(), question=question))]
    chosen, rejected = ask(short), ask(long)
    if chosen == rejected:
        raise DroppedError("same_answer")
    metadata = {"doc_id": sample.doc_id, "begin": piece.begin, "end": piece.end, "question": question}
    return {
        "sample_id": f"{sample.doc_id}#{piece.begin}",
        "source": sample.source,
        "prompt": long,
        "short_prompt": short,
        "chosen": chosen,
        "rejected": rejected,
        "metadata": json.dumps(metadata, sort_keys=True, ensure_ascii=False),
    }


def _plan(config: ShortToLongConfig, folder: Path) -> tuple[list[tuple[Path, list[Piece]]], Counter[str]]:
    import pyarrow.parquet as pq

    plan, counts = [], Counter()
    for path in shard_paths(folder, "documents"):
        table = pq.read_table(path, columns=["doc_id", "text"])
        pieces = []
        for row, (doc_id, text) in enumerate(
            zip(*(table.column(n).to_pylist() for n in table.column_names), strict=True)
        ):
            drawn = draw_pieces(config, doc_id, text)
            counts["num_documents_in"] += 1
            counts[f"num_documents_dropped_{drawn}" if isinstance(drawn, str) else "num_documents_used"] += 1
            pieces += [] if isinstance(drawn, str) else [Piece(row, begin, end) for begin, end in drawn]
        plan.append((path, pieces))
    return plan, counts


def _samples(plan: list[tuple[Path, list[Piece]]]) -> Iterator[Sample]:
    import pyarrow.parquet as pq

    for path, pieces in plan:
        documents = pq.read_table(path, columns=["doc_id", "source", "text"])
        for piece in pieces:
            doc_id, source, text = (documents.column(name)[piece.row].as_py() for name in documents.column_names)
            yield Sample(doc_id, source, text, piece)


def run(config: ShortToLongConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Make a pair of every piece. Raises ValueError on bad input, or if nothing is left."""
    read_artifact(inputs["documents"], "documents")
    plan, documents = _plan(config, inputs["documents"])
    num_samples = sum(len(pieces) for _, pieces in plan)
    names = (
        "num_documents_in",
        "num_documents_used",
        "num_documents_dropped_too_short",
        "num_documents_dropped_too_long",
    )
    ledger = {name: documents[name] for name in names}
    if not num_samples:
        raise ValueError(
            f"no document of {inputs['documents']} has two pieces of questions.chunk_characters within "
            f"max_document_characters: {ledger}"
        )
    caller = open_caller(config.generation, inputs, context)
    writer = SampleWriter(
        output, "preferences", preferences_schema(), REASONS, num_samples, config.generation.max_failed_fraction
    )
    counts = generate(writer, _samples(plan), partial(make_pair, config), caller, context)
    write_artifact(
        output.data, Artifact(kind="preferences", counts={**counts, **ledger}, details={"model": caller.model})
    )
