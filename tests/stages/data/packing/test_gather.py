import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import numbered_documents, tokenizer_info, write_tokens

from ropewalk.stages.context import LocalContext
from ropewalk.stages.data.packing import gather
from ropewalk.stages.data.packing.gather import gather_tokens
from ropewalk.stages.schema import Artifact, tokens_schema, write_artifact, write_table


def write_neighbours(folder, clusters):
    """A neighbours artifact with these documents in its clusters, none of which is like another."""
    folder.mkdir(parents=True)
    for number, doc_ids in enumerate(clusters):
        columns = {
            "doc_id": pa.array(doc_ids, pa.string()),
            "neighbours": pa.array([[]] * len(doc_ids), pa.list_(pa.int32())),
            "scores": pa.array([[]] * len(doc_ids), pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), folder / f"neighbours-{number:05d}.parquet")
    details = {"retriever": "tree", "num_neighbours": 1, "num_clusters": len(clusters)}
    write_artifact(folder, Artifact(kind="neighbours", details=details))
    return folder


def gathered(tmp_path, documents, clusters):
    (tmp_path / "work").mkdir(parents=True, exist_ok=True)
    tokens = write_tokens(tmp_path / "tokens", documents)
    found = gather_tokens(
        LocalContext(tmp_path / "work"), tokens, write_neighbours(tmp_path / "neighbours", clusters), tokenizer_info()
    )
    return [found.corpus(number, doc_ids) for number, doc_ids in enumerate(clusters)]


@given(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30))
@settings(deadline=None, max_examples=25)
def test_each_cluster_has_its_documents_in_the_order_of_its_numbers(tmp_path_factory, data, lengths):
    documents = numbered_documents(lengths)
    names = data.draw(st.permutations([*documents, "without-tokens"]))
    cut = data.draw(st.integers(0, len(names)))
    clusters = [list(part) for part in (names[:cut], names[cut:])]
    corpora = gathered(tmp_path_factory.mktemp("gather"), documents, clusters)
    for corpus, doc_ids in zip(corpora, clusters, strict=True):
        assert list(corpus.doc_ids) == doc_ids
        for number, doc_id in enumerate(doc_ids):
            begin, end = corpus.offsets[number : number + 2].tolist()
            assert corpus.ids[begin:end].tolist() == documents.get(doc_id, [])


def test_a_document_that_the_neighbours_lack_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"slot neighbours lacks 'd001' and 1 more documents.*same documents"):
        gathered(tmp_path, numbered_documents([3, 4, 5]), [["d000", "other"]])


def test_a_document_that_is_there_twice_is_refused(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", {})
    write_table(tokens, "tokens", tokens_schema(), [{"doc_id": "d", "source": "s", "input_ids": [200]}] * 2)
    (tmp_path / "work").mkdir()
    neighbours = write_neighbours(tmp_path / "neighbours", [["d"]])
    found = gather_tokens(LocalContext(tmp_path / "work"), tokens, neighbours, tokenizer_info())
    with pytest.raises(ValueError, match="holds document 'd' twice"):
        found.corpus(0, ["d"])


def test_documents_whose_ids_have_one_hash_are_never_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "hash_id", lambda doc_id: 7)
    with pytest.raises(ValueError, match="one hash"):
        gathered(tmp_path, numbered_documents([3, 4]), [["d000", "d001"]])


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="outside the vocabulary of 1000"):
        gathered(tmp_path, {"d000": [1000]}, [["d000"]])
