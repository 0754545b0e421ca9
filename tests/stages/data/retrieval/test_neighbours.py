import pickle
import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_invariants import run_stage, write_documents

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.retrieval import embed, neighbours
from ropewalk.stages.data.retrieval.embed import EmbedConfig
from ropewalk.stages.data.retrieval.neighbours import NeighboursConfig
from ropewalk.stages.data.retrieval.pool import Pool, cluster_doc_ids, num_clusters, open_pool
from ropewalk.stages.data.retrieval.search import Ready, queries
from ropewalk.stages.data.retrieval.tree import walk_key
from ropewalk.stages.schema import (
    Artifact,
    documents_schema,
    read_artifact,
    read_table,
    vectors_schema,
    write_artifact,
    write_shard,
    write_table,
)


def make_texts(num_documents, seed=0):
    """Documents of ten topics in nested folders."""
    draw = random.Random(seed)
    topics = [[f"w{draw.randint(0, 400)}" for _ in range(30)] for _ in range(10)]
    return {
        f"s/{'abc'[n % 3]}/{n % 4}/{n:04d}": " ".join(draw.choices(topics[n % 10], k=draw.randint(5, 40)))
        for n in range(num_documents)
    }


def write_vectors(folder, ids, vectors, cuts=()):
    """A Vectors artifact, cut into shards before the rows `cuts`."""
    folder.mkdir()
    bounds = [0, *cuts, len(ids)]
    size = vectors.shape[1]
    for shard, (begin, end) in enumerate(pairwise(bounds)):
        values = pa.array(vectors[begin:end].astype(np.float16).reshape(-1))
        table = pa.table({"doc_id": ids[begin:end], "vector": pa.FixedSizeListArray.from_arrays(values, size)})
        write_shard(folder, "vectors", shard, table.cast(vectors_schema(size)))
    write_artifact(folder, Artifact(kind="vectors", details={"num_dimensions": size}))
    return folder


def clustered(num_documents, seed=0):
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((20, 16))
    return topics[rng.integers(0, 20, num_documents)] + 0.5 * rng.standard_normal((num_documents, 16))


def documents_in(folder, texts, **options):
    folder.mkdir()
    if not options:
        return write_documents(folder, texts)
    rows = ({"doc_id": n, "text": t, "source": "s", "num_bytes": len(t), "metadata": "{}"} for n, t in texts.items())
    write_table(folder, "documents", documents_schema(), rows, **options)
    write_artifact(folder, Artifact(kind="documents"))
    return folder


def run(tmp_path, config, inputs, name="out"):
    output = run_stage(neighbours, config, inputs, tmp_path / name)
    neighbours.check(config, output)
    return output


def named_lists(folder):
    """Ids and scores of all lists by id, over all clusters."""
    lists = {}
    for cluster in range(num_clusters(folder)):
        pool = open_pool(folder, cluster)
        for doc_id, found, scores in zip(pool.doc_ids, pool.neighbours, pool.scores, strict=True):
            given = found >= 0
            lists[doc_id] = list(zip([pool.doc_ids[n] for n in found[given]], scores[given].tolist(), strict=True))
    return lists


def assert_lists_are_requeries(pool):
    everything = np.ones(len(pool.doc_ids), bool)
    for document in range(len(pool.doc_ids)):
        found, scores = pool.requery(document, pool.neighbours.shape[1], everything)
        given = pool.neighbours[document] >= 0
        assert pool.neighbours[document][given].tolist() == found.tolist()
        assert pool.scores[document][given].tolist() == scores.tolist()


def test_dense_lists_are_those_of_the_pool_in_memory(tmp_path):
    ids, vectors = [f"d{n * 7 % 501:03d}" for n in range(500)], clustered(500).astype(np.float16)
    output = run(
        tmp_path,
        NeighboursConfig(retriever="dense", num_neighbours=9),
        {"vectors": write_vectors(tmp_path / "v", ids, vectors, [100, 101])},
    )
    pool, expected = open_pool(output, 0), Pool.from_vectors(ids, vectors, 9)
    assert num_clusters(output) == 1
    assert pool.doc_ids == cluster_doc_ids(output, 0) == ids
    assert pool.neighbours.tolist() == expected.neighbours.tolist()
    assert pool.scores.tolist() == expected.scores.tolist()
    assert pool.similarity(3, 4) == expected.similarity(3, 4)
    counts = read_artifact(output).counts
    assert counts["num_in"] == counts["num_kept"] == 500
    assert counts["num_edges"] == counts["num_edges_in"] == 4500


@pytest.mark.parametrize("retriever", ["dense", "bm25", "tree"])
def test_lists_say_what_a_requery_of_everything_says(tmp_path, retriever):
    documents = documents_in(tmp_path / "d", make_texts(150))
    vectors = run_stage(embed, EmbedConfig(encoder="hashed"), {"documents": documents}, tmp_path / "v")
    inputs = {"vectors": vectors} if retriever == "dense" else {"documents": documents}
    output = run(tmp_path, NeighboursConfig(retriever=retriever, num_neighbours=7), inputs)
    pool = open_pool(output, 0, num_probes=1000)
    assert (pool.neighbours >= 0).sum() > 150
    assert_lists_are_requeries(pool)


def test_fewer_query_terms_hold_for_the_requery_too(tmp_path):
    documents = documents_in(tmp_path / "d", make_texts(100))
    output = run(tmp_path, NeighboursConfig(retriever="bm25", max_query_terms=2), {"documents": documents}, "few")
    whole = run(tmp_path, NeighboursConfig(retriever="bm25"), {"documents": documents}, "whole")
    assert_lists_are_requeries(open_pool(output, 0))
    assert named_lists(output) != named_lists(whole)


@pytest.mark.parametrize("retriever", ["dense", "bm25"])
def test_a_large_corpus_is_divided_and_each_cluster_is_a_corpus_of_its_own(tmp_path, retriever):
    texts = make_texts(240)
    documents = documents_in(tmp_path / "d", texts, shard_records=50)
    vectors = run_stage(embed, EmbedConfig(encoder="hashed"), {"documents": documents}, tmp_path / "v")
    inputs = {"documents": documents, "vectors": vectors}
    config = NeighboursConfig(retriever=retriever, num_neighbours=5, cluster_documents=60)
    output = run(tmp_path, config, inputs)
    clusters = [cluster_doc_ids(output, cluster) for cluster in range(num_clusters(output))]
    assert len(clusters) > 4
    assert sorted(name for ids in clusters for name in ids) == sorted(texts)
    sizes = [len(ids) for ids in clusters]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= 60 and sizes[-1] >= 1
    place = {name: number for number, name in enumerate(texts)}
    for number, ids in enumerate(clusters):
        assert ids == sorted(ids, key=lambda name: place[name])
        if number < 2:
            alone = documents_in(tmp_path / f"d{number}", {name: texts[name] for name in ids})
            theirs = {"documents": alone}
            if retriever == "dense":
                rows = read_table(vectors, "vectors").to_pylist()
                kept = {row["doc_id"]: row["vector"] for row in rows}
                theirs = {"vectors": write_vectors(tmp_path / f"v{number}", ids, np.array([kept[n] for n in ids]))}
            single = NeighboursConfig(retriever=retriever, num_neighbours=5)
            expected = open_pool(run(tmp_path, single, theirs, f"single{number}"), 0)
            assert open_pool(output, number).neighbours.tolist() == expected.neighbours.tolist()
    topic = {name: number % 10 for number, name in enumerate(texts)}
    assert np.mean([len({topic[name] for name in ids}) for ids in clusters if len(ids) > 9]) < 6


@pytest.mark.parametrize("retriever", ["dense", "bm25", "tree"])
@pytest.mark.parametrize("cluster_documents", [1000, 50])
def test_the_graph_does_not_depend_on_the_order_or_the_shards_of_the_corpus(tmp_path, retriever, cluster_documents):
    texts = make_texts(160)
    config = NeighboursConfig(retriever=retriever, num_neighbours=6, cluster_documents=cluster_documents)
    graphs = []
    for name, corpus, size in (("one", texts, 1000), ("two", dict(reversed(texts.items())), 23)):
        documents = documents_in(tmp_path / f"d-{name}", corpus, shard_records=size)
        vectors = run_stage(embed, EmbedConfig(encoder="hashed"), {"documents": documents}, tmp_path / f"v-{name}")
        graphs.append(named_lists(run(tmp_path, config, {"documents": documents, "vectors": vectors}, name)))
    assert graphs[0] == graphs[1]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    documents = documents_in(tmp_path / "d", make_texts(120), shard_records=30)
    vectors = run_stage(embed, EmbedConfig(encoder="hashed"), {"documents": documents}, tmp_path / "v")
    config = NeighboursConfig(retriever="bm25", cluster_documents=40, max_in_degree=10)
    one, other = (run(tmp_path, config, {"documents": documents, "vectors": vectors}, name) for name in "ab")
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir()) and len(files) > 6
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


@dataclass
class OtherProcesses(LocalContext):
    """Whatever is mapped travels as it does to other processes."""

    def map(self, function, items, *, resources=None):
        return super().map(pickle.loads(pickle.dumps(function)), (pickle.loads(pickle.dumps(item)) for item in items))


def test_the_work_can_travel_to_other_processes(tmp_path):
    documents = documents_in(tmp_path / "d", make_texts(60), shard_records=20)
    slots = {"documents": documents}
    for number, (stage, config) in enumerate(
        [
            (embed, EmbedConfig(encoder="hashed")),
            (neighbours, NeighboursConfig(retriever="bm25", cluster_documents=25)),
            (neighbours, NeighboursConfig(retriever="dense", cluster_documents=25)),
            (neighbours, NeighboursConfig(retriever="tree", cluster_documents=25)),
        ]
    ):
        folder = tmp_path / str(number)
        output = Output(folder / "data", folder / "observed")
        for path in (output.data, output.observed, folder / "work"):
            path.mkdir(parents=True)
        stage.run(config, slots, output, OtherProcesses(folder / "work"))
        stage.check(config, output.data)
        slots.setdefault("vectors", output.data)


def test_an_approximate_index_is_used_when_asked_for(tmp_path):
    inputs = {"vectors": write_vectors(tmp_path / "v", [f"d{n:04d}" for n in range(1100)], clustered(1100))}
    lists = []
    for num_probes in (1, 1000):
        config = NeighboursConfig(retriever="dense", index="ivf", num_probes=num_probes)
        output = run(tmp_path, config, inputs, f"probes-{num_probes}")
        assert read_artifact(output).details["clusters_by_index"] == {"ivf": 1}
        lists.append(named_lists(output))
    assert lists[0] != lists[1]
    assert lists[1] == named_lists(run(tmp_path, NeighboursConfig(retriever="dense"), inputs, "exact"))


def test_the_queries_of_few_clusters_are_shared_out_and_cover_each_document_once(tmp_path):
    few = [Ready(cluster, 20_000 - cluster, tmp_path) for cluster in range(3)]
    many = [Ready(cluster, 20_000 - cluster, tmp_path) for cluster in range(64)]
    assert len(dict(queries(few))) == 9 and len(dict(queries(many))) == 64
    for clusters in (few, many):
        covered = [(q.ready.cluster, n) for _, q in queries(clusters) for n in (q.start, q.stop - 1)]
        assert covered == sorted(covered)
        assert sum(q.stop - q.start for _, q in queries(clusters)) == sum(ready.num_documents for ready in clusters)


def test_tree_clusters_hold_whole_folders_in_the_order_of_the_walk(tmp_path):
    ids = [f"s/{folder}/{n}" for folder in ("a", "b", "c") for n in range(10, 20)] + ["s/readme"]
    random.Random(0).shuffle(ids)
    documents = documents_in(tmp_path / "d", dict.fromkeys(ids, "text"), shard_records=8)
    config = NeighboursConfig(retriever="tree", num_neighbours=3, cluster_documents=21)
    output = run(tmp_path, config, {"documents": documents})
    walk = sorted(ids, key=walk_key)
    assert [cluster_doc_ids(output, cluster) for cluster in (0, 1)] == [walk[:21], walk[21:]]
    details = read_artifact(output).details
    assert details["num_folders"] == 4
    assert details["largest_folder_fraction"] == round(10 / 31, 6)


def test_a_flat_directory_is_cut_into_slices_and_reported(tmp_path):
    ids = [f"s/{n}" for n in range(100, 150)]
    documents = documents_in(tmp_path / "d", dict.fromkeys(ids, "text"))
    output = run(tmp_path, NeighboursConfig(retriever="tree", cluster_documents=20), {"documents": documents})
    assert sorted(name for cluster in range(3) for name in cluster_doc_ids(output, cluster)) == ids
    assert read_artifact(output).details["largest_folder_fraction"] == 1


def test_a_hub_stands_in_the_lists_where_it_scores_best(tmp_path):
    ids, vectors = [f"d{n:03d}" for n in range(300)], clustered(300)
    inputs = {"vectors": write_vectors(tmp_path / "v", ids, vectors)}
    free = named_lists(run(tmp_path, NeighboursConfig(retriever="dense", num_neighbours=12), inputs, "free"))
    config = NeighboursConfig(retriever="dense", num_neighbours=12, max_in_degree=15)
    output = run(tmp_path, config, inputs, "limited")
    limited = named_lists(output)
    offers = {}
    for owner, hits in free.items():
        for hit, score in hits:
            offers.setdefault(hit, []).append((-score, owner))
    allowed = {hit: {owner for _, owner in sorted(found)[:15]} for hit, found in offers.items()}
    assert limited == {owner: [h for h in hits if owner in allowed[h[0]]] for owner, hits in free.items()}
    counts = read_artifact(output).counts
    assert counts["num_edges_dropped_in_degree"] == 3600 - counts["num_edges"] > 0
    assert read_artifact(output).details["max_in_degree"] == 15


def test_one_document_is_a_cluster_without_neighbours(tmp_path):
    documents = documents_in(tmp_path / "d", {"s/only": "rope walk"})
    vectors = run_stage(embed, EmbedConfig(encoder="hashed"), {"documents": documents}, tmp_path / "v")
    for retriever in ("dense", "bm25", "tree"):
        inputs = {"documents": documents, "vectors": vectors}
        output = run(tmp_path, NeighboursConfig(retriever=retriever), inputs, retriever)
        pool = open_pool(output, 0)
        assert pool.doc_ids == ["s/only"] and (pool.neighbours == -1).all()
        assert read_artifact(output).counts["num_without_neighbours"] == 1


def test_copies_only_find_each_other_by_id(tmp_path):
    texts = {f"s/{n:02d}": "hemp yarn rope" for n in range(30)}
    documents = documents_in(tmp_path / "d", texts)
    vectors = run_stage(embed, EmbedConfig(encoder="hashed"), {"documents": documents}, tmp_path / "v")
    for retriever in ("dense", "bm25"):
        config = NeighboursConfig(retriever=retriever, num_neighbours=3, cluster_documents=8)
        lists = named_lists(run(tmp_path, config, {"documents": documents, "vectors": vectors}, retriever))
        assert len(lists) == 30
        assert all([hit for hit, _ in hits] == sorted(hit for hit, _ in hits) for hits in lists.values())
        assert all(len({score for _, score in hits}) == 1 for hits in lists.values())


def test_vectors_of_another_corpus_are_refused(tmp_path):
    documents = documents_in(tmp_path / "d", make_texts(20))
    others = make_texts(20)
    others["s/new"] = others.pop("s/b/1/0001")
    vectors = run_stage(
        embed, EmbedConfig(encoder="hashed"), {"documents": documents_in(tmp_path / "o", others)}, tmp_path / "v"
    )
    for retriever in ("bm25", "dense"):
        with pytest.raises(ValueError, match=r"slot vectors is of another corpus: .* lacks 's/b/1/0001'"):
            run(
                tmp_path,
                NeighboursConfig(retriever=retriever, cluster_documents=10),
                {"documents": documents, "vectors": vectors},
                retriever,
            )
    cut = documents_in(tmp_path / "cut", make_texts(20), shard_records=9)
    with pytest.raises(ValueError, match=r"slot vectors is not of the documents .* 's/b/1/0001'"):
        run(tmp_path, NeighboursConfig(retriever="dense"), {"documents": cut, "vectors": vectors}, "cut-out")


def test_vectors_with_a_document_too_many_or_in_another_order_are_refused(tmp_path):
    documents = documents_in(tmp_path / "d", {"a": "rope", "b": "walk"})
    for name, ids in (("more", ["a", "b", "c"]), ("turned", ["b", "a"])):
        vectors = write_vectors(tmp_path / name, ids, clustered(len(ids)))
        with pytest.raises(ValueError, match=r"of another corpus: .* has '[bc]' where"):
            run(
                tmp_path,
                NeighboursConfig(retriever="dense"),
                {"documents": documents, "vectors": vectors},
                f"{name}-out",
            )


def test_a_vector_that_is_not_finite_is_named(tmp_path):
    vectors = clustered(5)
    vectors[3, 2] = np.inf
    inputs = {"vectors": write_vectors(tmp_path / "v", list("abcde"), vectors)}
    with pytest.raises(ValueError, match="document 'd' holds NaN or infinity"):
        run(tmp_path, NeighboursConfig(retriever="dense"), inputs)


def test_an_id_that_occurs_twice_is_named(tmp_path):
    inputs = {"vectors": write_vectors(tmp_path / "v", ["a", "b", "a"], clustered(3))}
    with pytest.raises(ValueError, match="'a' occurs twice"):
        run(tmp_path, NeighboursConfig(retriever="dense"), inputs)


def test_missing_slots_and_empty_corpora_are_named(tmp_path):
    documents = documents_in(tmp_path / "d", make_texts(20))
    with pytest.raises(ValueError, match="needs an input slot `vectors`"):
        run(tmp_path, NeighboursConfig(retriever="dense"), {"documents": documents}, "a")
    with pytest.raises(ValueError, match="20 documents, cluster_documents is 10: give bm25 a slot `vectors`"):
        run(tmp_path, NeighboursConfig(retriever="bm25", cluster_documents=10), {"documents": documents}, "b")
    empty = {"documents": documents_in(tmp_path / "e", {})}
    with pytest.raises(ValueError, match="slot documents is empty"):
        run(tmp_path, NeighboursConfig(retriever="tree"), empty, "c")
    signs = {"documents": documents_in(tmp_path / "f", {"a": "+ -", "b": "*"})}
    with pytest.raises(ValueError, match="no word of two letters"):
        run(tmp_path, NeighboursConfig(retriever="bm25"), signs, "d")
    with pytest.raises(ValueError, match=r"no artifact\.json"):
        run(tmp_path, NeighboursConfig(retriever="dense"), {"vectors": tmp_path / "nowhere"}, "g")


def test_zero_vectors_only_cannot_be_divided(tmp_path):
    inputs = {"vectors": write_vectors(tmp_path / "v", [f"d{n}" for n in range(9)], np.zeros((9, 4)))}
    with pytest.raises(ValueError, match="only 0 vectors that are not zeros"):
        run(tmp_path, NeighboursConfig(retriever="dense", cluster_documents=4), inputs)


def test_the_check_refuses_a_document_that_lists_itself(tmp_path):
    inputs = {"vectors": write_vectors(tmp_path / "v", ["a", "b", "c"], clustered(3))}
    output = run(tmp_path, NeighboursConfig(retriever="dense"), inputs)
    path = output / "neighbours-00000.parquet"
    table = pq.read_table(path)
    for wrong, message in (([[0, 1]] * 3, "the document itself"), ([[1, 7], [0, 2], [0, 1]], "outside its 3")):
        pq.write_table(table.set_column(1, table.schema.field(1), pa.array(wrong, pa.list_(pa.int32()))), path)
        with pytest.raises(ValueError, match=message):
            neighbours.check(None, output)


def test_a_cluster_that_is_not_there_is_an_error(tmp_path):
    inputs = {"vectors": write_vectors(tmp_path / "v", ["a", "b"], clustered(2))}
    output = run(tmp_path, NeighboursConfig(retriever="dense"), inputs)
    with pytest.raises(ValueError, match="has no cluster 1"):
        open_pool(output, 1)
