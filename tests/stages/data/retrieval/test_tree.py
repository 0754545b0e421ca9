import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.retrieval.tree import TreeRequery, distance, followers, walk_key

WALK = ["s/README", "s/setup", "s/a/one", "s/a/two", "s/a/b/three", "s/a/b/c/four", "s/a-/five", "s/z", "t/six"]


def make_tree(tmp_path, seed):
    """A random directory tree on disk; its files in the order that a recursive walk of it lists."""
    draw = random.Random(seed)
    for _ in range(40):
        folder = tmp_path.joinpath(*draw.choices(["x", "y", "x-", "Z"], k=draw.randint(0, 3)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{draw.randint(0, 9)}.txt").touch()

    def walk(folder):
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
        yield from (path.relative_to(tmp_path).as_posix() for path in entries if path.is_file())
        for path in entries:
            if path.is_dir():
                yield from walk(path)

    return list(walk(tmp_path))


def test_the_order_is_a_depth_first_walk_with_files_before_folders(tmp_path):
    assert sorted(WALK, key=walk_key) == ["s/README", "s/setup", "s/z", *WALK[2:7], "t/six"]
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        expected = make_tree(tmp_path / str(seed), seed)
        assert len(expected) > 15
        assert sorted(sorted(expected), key=walk_key) == expected


def test_distance_counts_the_steps_between_folders():
    assert distance("s/a/one", "s/a/two") == 0
    assert distance("s/a/one", "s/a/b/three") == 1
    assert distance("s/a/b/c/four", "s/z") == 3
    assert distance("s/a/b/three", "t/six") == 4
    assert distance("s/ab/one", "s/a/one") == 2


def test_lists_are_the_next_documents_and_begin_again_after_the_last():
    ids = ["s/a", "s/x/b", "s/x/c", "s/y/d"]
    found, scores = followers(ids, range(1, 4), 2)
    assert found.tolist() == [[2, 3], [3, 0], [0, 1]]
    assert scores.tolist() == [[1, np.float32(1 / 3)], [np.float32(1 / 3), 0.5], [0.5, np.float32(1 / 3)]]
    assert followers(ids, range(4), 9)[0].tolist()[0] == [1, 2, 3, -1, -1, -1, -1, -1, -1]
    assert followers(["s/a"], range(1), 2)[0].tolist() == [[-1, -1]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data(), st.integers(1, 5))
def test_a_requery_is_the_next_unused_in_the_walk(mask, data, k):
    ids = [f"s/{number // 3}/{number:02d}" for number in range(len(mask))]
    document = data.draw(st.integers(0, len(mask) - 1))
    found, scores = TreeRequery(ids)(document, k, np.array(mask))
    around = [*range(document + 1, len(mask)), *range(document)]
    assert found.tolist() == [number for number in around if mask[number]][:k]
    assert scores.tolist() == [np.float32(1 / (1 + distance(ids[document], ids[n]))) for n in found.tolist()]
