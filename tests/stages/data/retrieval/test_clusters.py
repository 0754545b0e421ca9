from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.retrieval.clusters import Shard as CorpusShard
from ropewalk.stages.data.retrieval.clusters import (
    divide_by_vector,
    gather,
    group_folders,
    num_centroids,
    part_sizes,
    plan_groups,
    sample_shard,
    top_folder,
    train_on_samples,
    write_spread,
)
from ropewalk.stages.data.retrieval.dense import tie_order, unit_vectors
from ropewalk.stages.data.retrieval.tree import walk_key
from ropewalk.stages.schema import vectors_schema, write_shard

quick = settings(deadline=None, max_examples=60)


@quick
@given(st.integers(0, 5000), st.integers(2, 300), st.booleans())
def test_parts_fit_and_add_up_and_are_alike(num_documents, limit, halve):
    sizes = part_sizes(num_documents, limit, halve=halve)
    assert sum(sizes) == num_documents
    if num_documents:
        assert max(sizes) <= limit and max(sizes) - min(sizes) <= 1
        assert len(sizes) < 2 * -(-num_documents // limit)


def test_the_number_of_centroids_follows_from_the_sizes():
    assert [num_centroids(n, 100) for n in (1, 100, 101, 1000)] == [1, 1, 3, 20]


def test_a_group_is_divided_where_its_two_halves_part():
    rng = np.random.default_rng(0)
    left = rng.random(80) < 0.5
    vectors = unit_vectors(np.where(left[:, None], [1, 0], [0, 1]) + 0.1 * rng.standard_normal((80, 2)))
    half = int(left.sum())
    first, second = divide_by_vector(vectors, np.arange(80), [half, 80 - half], seed=0)
    assert sorted([*first, *second]) == list(range(80))
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
    purity = max(left[first].mean(), 1 - left[first].mean())
    assert purity > 0.9


def test_the_parts_do_not_depend_on_the_order_of_the_corpus():
    rng = np.random.default_rng(1)
    vectors, ids = unit_vectors(rng.standard_normal((100, 6))), [f"d{number:02d}" for number in range(100)]
    turned = rng.permutation(100)
    parts = []
    for order in (np.arange(100), turned):
        names = [ids[number] for number in order]
        divided = divide_by_vector(vectors[order], tie_order(names), part_sizes(100, 13, halve=True), seed=0)
        parts.append([{names[row] for row in rows} for rows in divided])
    assert len(parts[0]) == 8 and parts[0] == parts[1]


@pytest.mark.parametrize("vectors", [np.ones((9, 3)), np.zeros((9, 3))])
def test_a_group_of_copies_is_divided_all_the_same(vectors):
    parts = divide_by_vector(unit_vectors(vectors), np.arange(9), part_sizes(9, 3, halve=True), seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(9))
    assert max(map(len, parts)) <= 3


@quick
@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=4), st.integers(2, 5))
def test_every_document_reaches_one_cluster_in_the_order_of_the_corpus(tmp_path_factory, shards, limit):
    folder = tmp_path_factory.mktemp("spread")
    spreads = []
    for number, groups in enumerate(shards):
        (folder / str(number)).mkdir()
        ids = [f"{number}-{row:02d}" for row in range(len(groups))]
        table = pa.table({"doc_id": pa.array(ids, pa.string())})
        counts = write_spread(folder / str(number), table, np.array(groups, dtype=np.int32), 5)
        spreads.append((folder / str(number), counts["sizes"]))
    groups, sizes = plan_groups(spreads, limit, halve=True)
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == sum(map(len, shards))
    assert sorted(number for group in groups for number in group.clusters) == list(range(len(sizes)))
    present = sorted({group for shard in shards for group in shard})
    for wanted, group in zip(present, groups, strict=True):
        ids = gather(group.parts).column("doc_id").to_pylist()
        pairs = [(n, row) for n, shard in enumerate(shards) for row, value in enumerate(shard) if value == wanted]
        assert ids == [f"{n}-{row:02d}" for n, row in pairs]
        assert sum(sizes[number] for number in group.clusters) == len(ids)


def test_folders_share_a_group_while_they_fit_and_in_the_order_of_the_walk():
    ids = ["s/file", "s/a/1", "s/a/2/x", "s/b/1", "s/b/2", "s/b/3", "s/b/4", "t/1", "t-/1"]
    folders = Counter(map(top_folder, ids))
    assert folders == {"s": 1, "s/a": 2, "s/b": 4, "t": 1, "t-": 1}
    assert group_folders(folders, 3) == ["s", "s/b", "t"]
    assert group_folders(folders, 100) == ["s"]
    walk = list(dict.fromkeys(map(top_folder, sorted(ids, key=walk_key))))
    assert group_folders(folders, 1) == walk


def write_vectors(folder, shard, ids, vectors):
    size = vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).reshape(-1)), size)
    return write_shard(folder, "vectors", shard, pa.table({"doc_id": ids, "vector": column}).cast(vectors_schema(size)))


def test_centroids_do_not_depend_on_the_order_or_the_shards_of_the_corpus(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((900, 8))
    ids = [f"d{number}" for number in range(900)]
    trained = []
    for name, order, cuts in (("one", np.arange(900), [900]), ("two", rng.permutation(900), [300, 301, 900])):
        folders, start = [], 0
        for shard, end in enumerate(cuts):
            rows = order[start:end]
            path = write_vectors(tmp_path / name, shard, [ids[row] for row in rows], vectors[rows])
            folders.append(tmp_path / name / f"sample-{shard}")
            folders[-1].mkdir()
            sample_shard(0.5, CorpusShard(None, path, ("vector",)), folders[-1])
            start = end
        num_sampled = sum(len(np.load(folder / "vectors.npy")) for folder in folders)
        assert 350 < num_sampled < 550
        trained.append(train_on_samples(folders, 7, seed=1))
    for one, other in zip(*trained, strict=True):
        assert one.tobytes() == other.tobytes()
    cells, clusters = trained[0]
    assert cells.shape == (56, 8) and clusters.shape == (56,)
    assert clusters.min() >= 0 and clusters.max() < 7
