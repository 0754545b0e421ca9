import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.retrieval.bags import Bm25Requery, make_bags
from ropewalk.stages.data.retrieval.dense import tie_order

quick = settings(deadline=None, max_examples=40)
WORDS = ["rope", "walk", "strand", "hemp", "yarn", "tar", "lane", "hook", "sled", "top"]


def make_texts(num_documents, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(num_documents)]


def ids_of(texts):
    return [f"d{(number * 7) % 101:03d}" for number in range(len(texts))]


def index_of(texts, max_query_terms=None):
    return Bm25Requery(make_bags(texts)[0], tie_order(ids_of(texts)), max_query_terms)


def slow_idf(texts, term):
    frequency = sum(term in text.split() for text in texts)
    return math.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))


def slow_scores(texts, query):
    """BM25 of every text for the text number `query`, from the formula, without the constant factor k1 + 1."""
    documents = [text.split() for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in documents[query]:
            count = document.count(term)
            norm = 1.2 * (1 - 0.75 + 0.75 * len(document) / average)
            score += slow_idf(texts, term) * count / (count + norm)
        scores.append(score)
    return scores


def found_of(index, query, k, num):
    return index(query, k, np.ones(num, bool))[0].tolist()


def test_bags_count_the_terms_of_each_text_in_alphabetical_numbers():
    bags, terms = make_bags(["rope walk rope", "", "a tar_Rope!"])
    assert terms == ["rope", "tar", "walk"]
    assert bags.offsets.tolist() == [0, 2, 2, 4]
    assert bags.terms.tolist() == [0, 2, 0, 1]
    assert bags.counts.tolist() == [2, 1, 1, 1]


def test_scores_are_bm25_of_the_whole_document():
    texts = make_texts(25)
    index = index_of(texts)
    for query in (0, 7, 24):
        np.testing.assert_allclose(index.scores(query), slow_scores(texts, query), rtol=1e-5)


def test_similarity_is_the_cosine_of_tf_idf_vectors():
    texts = [*make_texts(12), "+"]
    index = index_of(texts)
    vectors = np.array([[text.split().count(word) * slow_idf(texts, word) for word in WORDS] for text in texts])
    norms = np.linalg.norm(vectors, axis=1)
    assert index.similarity(3, 8) == pytest.approx(vectors[3] @ vectors[8] / norms[3] / norms[8])
    assert index.similarity(5, 5) == pytest.approx(1)
    assert index.similarity(0, 12) == 0


@quick
@given(st.data(), st.integers(1, 6))
def test_a_requery_is_the_masked_ranking_by_score_then_id(data, k):
    texts = make_texts(10, seed=3) * 2
    ids, index = ids_of(texts), index_of(texts)
    unused = np.array(data.draw(st.lists(st.booleans(), min_size=20, max_size=20)))
    query = data.draw(st.integers(0, 19))
    found, scores = index(query, k, unused)
    expected = np.round(slow_scores(texts, query), 4)
    others = [n for n in range(20) if n != query and unused[n] and expected[n] > 0]
    assert found.tolist() == sorted(others, key=lambda n: (-expected[n], ids[n]))[:k]
    np.testing.assert_allclose(scores, expected[found], rtol=1e-4, atol=1e-4)


def test_scores_do_not_depend_on_the_order_of_documents():
    texts = make_texts(40, seed=5)
    one, other = index_of(texts), index_of(texts[::-1])
    for query in range(40):
        assert one.scores(query).tolist() == other.scores(39 - query)[::-1].tolist()


def test_terms_are_lower_cased_and_identifiers_fall_apart_at_underscores():
    index = index_of(["def read_Table(x): pass", "READ the table", "write_rows"])
    assert found_of(index, 0, 9, 3) == [1]


def test_a_document_never_finds_itself_though_its_copies_come_first():
    index = index_of(["hemp yarn", "rope walk", "rope walk", "rope walk", "rope lane"])
    assert found_of(index, 2, 3, 5) == [1, 3, 4]


def test_fewer_query_terms_are_the_strongest_by_tf_idf():
    texts = ["rope rope rope walk", "rope", "walk", "hemp hemp", "hemp hemp"]
    assert sorted(found_of(index_of(texts), 0, 9, 5)) == [1, 2]
    assert found_of(index_of(texts, max_query_terms=1), 0, 9, 5) == [1]


def test_documents_without_words_find_nothing():
    index = index_of(["rope walk", "+ - *", "rope"])
    assert found_of(index, 1, 3, 3) == []
    assert found_of(index, 0, 3, 3) == [2]
    assert found_of(index_of(["+", "-"]), 0, 3, 2) == []


def test_counts_of_terms_are_those_of_a_plain_count():
    texts = make_texts(30, seed=9)
    bags, terms = make_bags(texts)
    for number, text in enumerate(texts):
        place = slice(bags.offsets[number], bags.offsets[number + 1])
        pairs = zip(bags.terms[place].tolist(), bags.counts[place].tolist(), strict=True)
        assert {terms[term]: count for term, count in pairs} == Counter(text.split())
