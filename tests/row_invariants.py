"""What holds for every Rows artifact, and small Tokens and Documents artifacts to make rows from."""

from pathlib import Path

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.schema import (
    Artifact,
    TokenizerInfo,
    documents_schema,
    read_artifact,
    read_table,
    tokens_schema,
    write_artifact,
    write_table,
)

BOS, EOS, VOCABULARY = 0, 1, 1000
FIRST_TEXT_ID = 100
"""Ids below are begin, end and markers; texts use this and above."""


def tokenizer_info(added=(), **changes):
    """A tokenizer whose added tokens have the ids 2, 3, ..."""
    ids = {token: number for number, token in enumerate(added, start=2)}
    fields = {"digest": "0" * 64, "vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS}
    return TokenizerInfo(**(fields | {"added_tokens": ids} | changes))


def numbered_documents(lengths):
    """Documents d000, d001, ... whose tokens tell document and place apart."""
    span = VOCABULARY - FIRST_TEXT_ID
    return {
        f"d{number:03d}": [FIRST_TEXT_ID + (number * 37 + place) % span for place in range(length)]
        for number, length in enumerate(lengths)
    }


def write_tokens(folder, documents, info=None):
    """A Tokens artifact of `{doc_id: ids}`."""
    rows = ({"doc_id": name, "source": "test", "input_ids": ids} for name, ids in documents.items())
    write_table(folder, "tokens", tokens_schema(), rows, shard_records=7)
    write_artifact(folder, Artifact(kind="tokens", tokenizer=info or tokenizer_info()))
    return folder


def write_documents(folder, texts):
    """A Documents artifact of `{doc_id: text}`."""
    rows = (
        {"doc_id": name, "text": text, "source": "test", "num_bytes": len(text.encode()), "metadata": "{}"}
        for name, text in texts.items()
    )
    write_table(folder, "documents", documents_schema(), rows)
    write_artifact(folder, Artifact(kind="documents"))
    return folder


def run_stage(stage, config, inputs, folder: Path, report=lambda event: None):
    """Run a stage into `folder` and return its data folder."""
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    stage.run(config, inputs, output, LocalContext(folder / "work", report))
    return output.data


def assert_rows_are_sound(folder, documents):
    """Check a Rows artifact against the documents that it was made of, `{doc_id: ids}`. Returns its rows.

    Length, order and disjointness of segments, provenance of every token, vocabulary, loss mask, unique ids, no token
    twice, and the counts.
    """
    artifact = read_artifact(folder, "rows")
    rows = read_table(folder, "rows").to_pylist()
    assert artifact.row_tokens is not None and artifact.tokenizer is not None
    placed: set[tuple[str, int]] = set()
    for row in rows:
        _assert_row_is_sound(row, artifact.row_tokens, artifact.tokenizer.vocab_size, documents)
        for segment in row["segments"]:
            places = {(segment["doc_id"], segment["start"] + i) for i in range(segment["num_tokens"])}
            assert not places & placed, "a token was placed twice"
            placed |= places
    assert len({row["row_id"] for row in rows}) == len(rows)
    counts = artifact.counts
    assert counts["num_rows"] == len(rows)
    assert counts["num_tokens_in"] == sum(map(len, documents.values()))
    assert counts["num_tokens_kept"] == len(placed)
    lost = [value for name, value in counts.items() if name.startswith("num_tokens_dropped_")]
    assert counts["num_tokens_in"] == len(placed) + counts.get("num_tokens_trimmed", 0) + sum(lost)
    extra = counts["num_tokens_inserted"] + counts["num_tokens_padding"]
    assert len(rows) * artifact.row_tokens == len(placed) + extra
    return rows


def _assert_row_is_sound(row, row_tokens, vocab_size, documents):
    ids = row["input_ids"]
    assert len(ids) == len(row["loss_mask"]) == row_tokens
    assert all(0 <= token < vocab_size for token in ids)
    assert ids[0] == BOS and not row["loss_mask"][0]
    assert row["segments"]
    end = 1
    for segment in row["segments"]:
        assert segment["num_tokens"] > 0
        assert segment["row_start"] >= end
        end = segment["row_start"] + segment["num_tokens"]
        text = documents[segment["doc_id"]][segment["start"] : segment["start"] + segment["num_tokens"]]
        assert ids[segment["row_start"] : end] == text
    assert end <= row_tokens
