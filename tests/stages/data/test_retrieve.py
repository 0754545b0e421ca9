import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import candidate_lists

from ropewalk.stages.data.retrieve import RandomNeighbours, build_index

quick = settings(deadline=None, max_examples=40)
WORDS = ["rope", "walk", "strand", "hemp", "yarn", "tar", "lane", "hook", "sled", "top"]


def make_texts(num_documents, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(num_documents)]


def index_of(texts, **options):
    ids = [f"d{number:03d}" for number in range(len(texts))]
    return build_index(ids, zip(ids, texts, strict=True), **options)


def slow_scores(texts, query):
    """BM25 of every text for the text number `query`, from the formula, without the constant factor k1 + 1."""
    documents = [text.split() for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in documents[query]:
            frequency = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
            count = document.count(term)
            score += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(document) / average))
        scores.append(score)
    scores[query] = 0.0
    return scores


def test_scores_are_bm25_of_the_whole_document():
    texts = make_texts(25)
    index = index_of(texts)
    for query in (0, 7, 24):
        np.testing.assert_allclose(index.scores(query), slow_scores(texts, query), rtol=1e-5)


def test_similarity_is_the_cosine_of_tf_idf_vectors():
    texts = make_texts(12)
    index = index_of(texts)
    counts = [Counter(text.split()) for text in texts]
    idf = {
        word: math.log(1 + (12 - df + 0.5) / (df + 0.5)) for word in WORDS for df in [sum(word in c for c in counts)]
    }
    vectors = np.array([[count[word] * idf[word] for word in WORDS] for count in counts])
    expected = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert index.similarity(3, 8) == pytest.approx(expected[3, 8])
    assert index.similarity(5, 5) == pytest.approx(1)
    assert index.similarity(0, 11) == pytest.approx(expected[0, 11])


def test_terms_are_lower_cased_and_identifiers_fall_apart_at_underscores():
    index = index_of(["def read_Table(x): pass", "READ the table", "write_rows"])
    assert np.flatnonzero(index.scores(0) > 0).tolist() == [1]


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 12))
def test_nearest_is_the_full_sort_by_score_then_document_id(levels, k):
    ids = [f"d{(number * 7) % 41:02d}" for number in range(len(levels))]
    index = build_index(ids, ((name, "rope") for name in ids))
    expected = sorted((n for n in range(len(levels)) if levels[n]), key=lambda n: (-levels[n], ids[n]))
    assert index.nearest(np.array(levels, dtype=float), k).tolist() == expected[:k]


def test_a_document_never_finds_itself_though_its_copies_come_first():
    index = index_of(["hemp yarn", "rope walk", "rope walk", "rope walk", "rope lane"])
    assert index.nearest(index.scores(2), 3).tolist() == [1, 3, 4]


@quick
@given(st.data(), st.integers(1, 4), st.integers(1, 6))
def test_the_nearest_unused_are_those_of_a_query_made_anew(data, k, num_candidates):
    texts = make_texts(20, seed=3)
    index = index_of(texts)
    neighbours = candidate_lists(index, num_candidates)
    unused = np.array(data.draw(st.lists(st.booleans(), min_size=20, max_size=20)))
    document = data.draw(st.integers(0, 19))
    hits = neighbours.nearest_unused(document, k, unused, np.random.default_rng(0))
    scores = index.scores(document)
    ranking = [n for n in sorted(range(20), key=lambda n: (-scores[n], n)) if scores[n] > 0]
    assert [hit.document for hit in hits] == [n for n in ranking if unused[n]][:k]
    for hit in hits:
        assert hit.score == scores[hit.document]
        place = ranking.index(hit.document)
        assert hit.rank == (place if place < num_candidates else -1)
    in_lists = sum(bool(unused[n]) for n in ranking[:num_candidates])
    assert neighbours.num_fallbacks == (in_lists < k)
    assert neighbours.num_lookups == 1


def test_fewer_query_terms_are_the_strongest_by_tf_idf():
    texts = ["rope rope rope walk", "rope", "walk", "hemp hemp", "hemp hemp"]
    assert np.flatnonzero(index_of(texts).scores(0) > 0).tolist() == [1, 2]
    assert np.flatnonzero(index_of(texts, max_query_terms=1).scores(0) > 0).tolist() == [1]


def test_documents_without_words_find_nothing():
    index = index_of(["rope walk", "+ - *", "rope"])
    assert index.scores(1).tolist() == [0, 0, 0]
    assert index.similarity(0, 1) == 0


def test_random_neighbours_are_unused_and_distinct_and_uniform():
    unused = np.array([True, False, True, True, False, True])
    rng = np.random.default_rng(0)
    drawn = Counter()
    for _ in range(2000):
        hits = RandomNeighbours().nearest_unused(0, 2, unused, rng)
        assert len({hit.document for hit in hits}) == 2
        drawn.update(hit.document for hit in hits)
    assert set(drawn) == {0, 2, 3, 5}
    assert all(900 < count < 1100 for count in drawn.values())
    assert len(RandomNeighbours().nearest_unused(0, 9, unused, rng)) == 4
    assert RandomNeighbours().nearest_unused(0, 1, np.zeros(6, dtype=bool), rng) == []


def test_a_missing_text_is_named():
    with pytest.raises(ValueError, match=r"lacks 'b' and 1 more"):
        build_index(["a", "b", "c"], [("a", "rope"), ("other", "walk")])


def test_texts_without_any_word_are_refused():
    with pytest.raises(ValueError, match="no word of two letters"):
        build_index(["a"], [("a", "+ x")])
