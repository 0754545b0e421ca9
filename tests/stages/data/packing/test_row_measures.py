import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.packing.row_measures import measure_row

VECTORS = {
    "a": np.array([1.0, 0.0]),
    "b": np.array([0.6, 0.8]),
    "c": np.array([0.0, 1.0]),
    "opposite": np.array([-1.0, 0.0]),
}


def lay(pieces, gap=1):
    segments, at = [], 1
    for name, size in pieces:
        segments.append({"doc_id": name, "num_tokens": size, "row_start": at})
        at += size + gap
    return segments, at


def by_positions(segments, policy, row_tokens, far):
    """The same sums, position by position."""
    owner, run, number = {}, {}, -1
    for place, segment in enumerate(segments):
        if place == 0 or segments[place - 1]["doc_id"] != segment["doc_id"]:
            number += 1
        for position in range(segment["row_start"], segment["row_start"] + segment["num_tokens"]):
            owner[position], run[position] = segment["doc_id"], number
    pairs = distance = related = related_distance = potential = 0.0
    for later in owner:
        for earlier in owner:
            if earlier >= later or (policy != "causal" and run[earlier] != run[later]):
                continue
            same = owner[earlier] == owner[later]
            weight = 1.0 if same else max(0.0, float(VECTORS[owner[earlier]] @ VECTORS[owner[later]]))
            pairs, distance = pairs + 1, distance + later - earlier
            related, related_distance = related + weight, related_distance + weight * (later - earlier)
            potential += weight * (later - earlier > far)
    return pairs, distance, related, related_distance, potential / row_tokens**2


@given(
    pieces=st.lists(st.tuples(st.sampled_from(sorted(VECTORS)), st.integers(1, 9)), min_size=1, max_size=6),
    policy=st.sampled_from(["causal", "document", "anchor"]),
    far=st.integers(0, 20),
)
@settings(deadline=None, max_examples=60)
def test_the_sums_over_pairs_are_those_position_by_position(pieces, policy, far):
    segments, row_tokens = lay(pieces)
    found = measure_row(segments, policy, VECTORS, row_tokens, far)
    expected = by_positions(segments, policy, row_tokens, far)
    names = ("visible_pairs", "visible_distance", "related_pairs", "related_distance", "far_potential")
    assert [getattr(found, name) for name in names] == pytest.approx(expected)


def test_similarity_counts_pairs_of_different_documents_once():
    segments, row_tokens = lay([("a", 3), ("b", 2), ("b", 2), ("a", 1), ("c", 4)])
    found = measure_row(segments, "causal", VECTORS, row_tokens, 4)
    assert found.num_documents == 3
    assert (found.num_adjacent, found.sum_adjacent) == (3, pytest.approx(0.6 + 0.6 + 0.0))
    assert (found.num_all, found.sum_all) == (3, pytest.approx(0.6 + 0.0 + 0.8))


def test_a_row_of_one_document_has_the_largest_potential():
    one, row_tokens = lay([("a", 101)])
    many, _ = lay([("a", 33), ("c", 33), ("a", 33)])
    whole = measure_row(one, "causal", VECTORS, row_tokens, 20).far_potential
    parts = measure_row(many, "causal", VECTORS, row_tokens, 20).far_potential
    masked = measure_row(many, "document", VECTORS, row_tokens, 20).far_potential
    assert whole > parts > masked > 0
    assert whole == pytest.approx(80 * 81 / 2 / row_tokens**2)
