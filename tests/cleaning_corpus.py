"""Documents and Tokens of several sources and shards, for the tests of cleaning and mixing."""

from row_invariants import tokenizer_info

from ropewalk.stages.schema import Artifact, documents_schema, read_table, tokens_schema, write_artifact, write_table


def write_corpus(folder, documents, *, shard_records=3):
    """A Documents artifact of `{doc_id: text}`; the source is what an id has before its slash."""
    rows = [
        {
            "doc_id": name,
            "text": text,
            "source": name.split("/")[0],
            "num_bytes": len(text.encode()),
            "metadata": '{"n": 1}',
        }
        for name, text in documents.items()
    ]
    write_table(folder, "documents", documents_schema(), rows, shard_records=shard_records)
    counts = {"num_kept": len(rows), "num_kept_bytes": sum(row["num_bytes"] for row in rows)}
    write_artifact(folder, Artifact(kind="documents", counts=counts))
    return folder


def write_token_corpus(folder, documents, *, shard_records=3, info=None):
    """A Tokens artifact of `{doc_id: ids}`; the source is what an id has before its slash."""
    rows = [{"doc_id": name, "source": name.split("/")[0], "input_ids": list(ids)} for name, ids in documents.items()]
    write_table(folder, "tokens", tokens_schema(), rows, shard_records=shard_records)
    counts = {"num_kept": len(rows), "num_tokens": sum(map(len, documents.values()))}
    write_artifact(folder, Artifact(kind="tokens", tokenizer=info or tokenizer_info(), counts=counts))
    return folder


def texts(folder):
    """`{doc_id: text}` of a Documents artifact, in order."""
    return {row["doc_id"]: row["text"] for row in read_table(folder, "documents").to_pylist()}


def file_bytes(folder):
    """The bytes of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
