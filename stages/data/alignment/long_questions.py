"""Question answering over long documents that a model makes for itself.

Reads `documents`, and the optional slots `model` and `calls` (see `ropewalk.stages.data.alignment.calls`). Writes
Chats: one or several documents and a question, and the answer; and `calls-*.parquet`. `metadata` names the documents
in order and the text that the question was written about, by document and characters.

Method: LongMagpie (Gao et al., 2025, arXiv 2505.17134): an aligned model is shown a document, writes what a user would
ask, and answers; several documents, up to 10, stand in one prompt. LongMagpie has the model go on writing at the
user's place of the template, which a chat endpoint does not offer: here it is asked for questions, as in LongPO (Chen
et al., 2025, arXiv 2502.13922; DAMO-NLP-SG/LongPO: data_prepare/generate_qa.py), which also writes the question, and
the answer, from a short piece of the document, where the model is at its best (`question_from` and `answer_from`).

Documents are taken once each: they are shuffled within their shard and dealt to samples of 1 to `max_documents`. Lost,
counted: documents outside the size limits (`num_documents_dropped_too_short`, `_too_long`), samples whose questions do
not parse (`unparsable_questions`), and those lost in a call. Memory: one shard of documents, and 100 bytes a document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.calls import GenerationConfig, open_caller
from ropewalk.stages.data.alignment.conversations import (
    Chat,
    assistant,
    check_chats,
    fill_in,
    require_placeholders,
    user,
)
from ropewalk.stages.data.alignment.generation import CALL_REASONS, Ask, SampleWriter, generate
from ropewalk.stages.data.alignment.questions import QuestionConfig, ask_question, cut_chunks
from ropewalk.stages.schema import (
    Artifact,
    Record,
    chats_schema,
    read_artifact,
    seeded_rng,
    shard_paths,
    stable_id,
    write_artifact,
)

NAME = "long_questions"
VERSION = 1
check = check_chats

REASONS = ("unparsable_questions", *CALL_REASONS)


class LongQuestionsConfig(Record):
    """How questions and answers are made."""

    generation: GenerationConfig = GenerationConfig(max_new_tokens=1024)
    """The model that asks and answers."""
    questions: QuestionConfig = QuestionConfig()
    """How it is asked for questions."""
    question_from: Literal["documents", "chunk"] = "documents"
    """Write the question about all documents of the sample, or about a piece of one, drawn by `seed`."""
    answer_from: Literal["documents", "chunk"] = "documents"
    """Answer with all documents in sight, or with the piece that the question was written about."""
    max_documents: int = Field(default=1, ge=1)
    """Documents of a sample: drawn uniformly from 1 to this. LongMagpie has up to 10."""
    min_document_bytes: int = Field(default=0, ge=0)
    """Shorter documents, in bytes of UTF-8, are dropped."""
    max_sample_bytes: int | None = Field(default=None, gt=0)
    """A sample takes no further document that would make its texts longer than this; documents longer than this are
    dropped."""
    prompt: str = "{documents}\n\n{question}"
    """The user's message, with {documents} and {question}."""
    seed: int = 0
    """Orders and deals the documents, and draws pieces and questions."""

    @model_validator(mode="after")
    def _consistent(self) -> LongQuestionsConfig:
        require_placeholders("prompt", self.prompt, "documents", "question")
        if self.answer_from == "chunk" and self.question_from != "chunk":
            raise ValueError('answer_from="chunk" needs question_from="chunk": the answer must lie in the piece')
        return self


@dataclass(frozen=True)
class Sample:
    """Documents that stand in one prompt."""

    source: str
    doc_ids: list[str]
    texts: list[str]


def deal(config: LongQuestionsConfig, doc_ids: list[str], sizes: list[int]) -> tuple[list[list[int]], Counter[str]]:
    """Which documents of a shard, by place, stand together, and how many were dropped."""
    counts = Counter(num_documents_in=len(doc_ids))
    places = []
    for place, size in enumerate(sizes):
        if size < config.min_document_bytes:
            counts["num_documents_dropped_too_short"] += 1
        elif config.max_sample_bytes is not None and size > config.max_sample_bytes:
            counts["num_documents_dropped_too_long"] += 1
        else:
            places.append(place)
    places.sort(key=lambda place: stable_id(config.seed, NAME, doc_ids[place]))
    groups: list[list[int]] = []
    while places:
        size = int(seeded_rng(config.seed, NAME, "size", doc_ids[places[0]]).integers(1, config.max_documents + 1))
        group, filled = [places[0]], sizes[places[0]]
        for place in places[1:size]:
            filled += sizes[place]
            if config.max_sample_bytes is not None and filled > config.max_sample_bytes:
                break
            group.append(place)
        places = places[len(group) :]
        groups.append(group)
    counts["num_documents_used"] = sum(map(len, groups))
    return groups, counts


def make_chat(config: LongQuestionsConfig, sample: Sample, ask: Ask) -> dict[str, Any]:
    """A question about the documents and its answer. Raises DroppedError and CallFailedError."""
    documents = join_documents(sample.texts)
    about, place = documents, {}
    if config.question_from == "chunk":
        about, place = _draw_chunk(config, sample)
    question = ask_question(config.questions, about, ask, config.seed, *sample.doc_ids)
    prompt = fill_in(config.prompt, documents=documents, question=question)
    shown = prompt if config.answer_from == "documents" else fill_in(config.prompt, documents=about, question=question)
    answer = ask([user(shown)])
    metadata = {"doc_ids": sample.doc_ids, "question": question, **place}
    name = f"{sample.source}/{stable_id(NAME, config.seed, *sample.doc_ids)}"
    return Chat(name, sample.source, [user(prompt), assistant(answer)], metadata).record()


def join_documents(texts: list[str]) -> str:
    """One text as it is, several with headings."""
    if len(texts) == 1:
        return texts[0].strip()
    return "\n\n".join(f"Document {number}:\n\n{text.strip()}" for number, text in enumerate(texts, 1))


def _draw_chunk(config: LongQuestionsConfig, sample: Sample) -> tuple[str, dict[str, Any]]:
    rng = seeded_rng(config.seed, NAME, "chunk", *sample.doc_ids)
    document = int(rng.integers(len(sample.texts)))
    text = sample.texts[document]
    chunks = [
        (begin, end) for begin, end in cut_chunks(text, config.questions.chunk_characters) if text[begin:end].strip()
    ]
    begin, end = chunks[int(rng.integers(len(chunks)))]
    return text[begin:end].strip(), {"chunk": {"doc_id": sample.doc_ids[document], "begin": begin, "end": end}}


def _plan(config: LongQuestionsConfig, folder: Path) -> tuple[list[tuple[Path, list[list[int]]]], Counter[str]]:
    import pyarrow.parquet as pq

    plan, counts = [], Counter()
    for path in shard_paths(folder, "documents"):
        table = pq.read_table(path, columns=["doc_id", "num_bytes"])
        groups, found = deal(config, table.column("doc_id").to_pylist(), table.column("num_bytes").to_pylist())
        plan.append((path, groups))
        counts.update(found)
    return plan, counts


def _samples(plan: list[tuple[Path, list[list[int]]]]) -> Iterator[Sample]:
    import pyarrow.parquet as pq

    for path, groups in plan:
        documents = pq.read_table(path, columns=["doc_id", "text", "source"])
        for group in groups:
            rows = documents.take(group).to_pylist()
            yield Sample(rows[0]["source"], [row["doc_id"] for row in rows], [row["text"] for row in rows])


def run(config: LongQuestionsConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Make a chat of every sample. Raises ValueError on bad input, or if nothing is left."""
    read_artifact(inputs["documents"], "documents")
    plan, documents = _plan(config, inputs["documents"])
    num_samples = sum(len(groups) for _, groups in plan)
    names = (
        "num_documents_in",
        "num_documents_used",
        "num_documents_dropped_too_short",
        "num_documents_dropped_too_long",
    )
    ledger = {name: documents[name] for name in names}
    if not num_samples:
        raise ValueError(
            f"no document of {inputs['documents']} is within min_document_bytes and max_sample_bytes: {ledger}"
        )
    caller = open_caller(config.generation, inputs, context)
    writer = SampleWriter(output, "chats", chats_schema(), REASONS, num_samples, config.generation.max_failed_fraction)
    counts = generate(writer, _samples(plan), partial(make_chat, config), caller, context)
    write_artifact(output.data, Artifact(kind="chats", counts={**counts, **ledger}, details={"model": caller.model}))
