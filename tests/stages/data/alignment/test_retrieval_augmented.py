import json
import math
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage, write_documents

from ropewalk.stages.data.alignment import retrieval_augmented
from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.data.alignment.passages import PassageIndex, alternate_inwards, insert_at_depth
from ropewalk.stages.data.alignment.retrieval_augmented import RetrievalAugmentedConfig
from ropewalk.stages.schema import read_artifact, read_table

NAMES = ("json", "csv", "gzip", "queue", "heapq", "bisect", "shutil", "glob", "fnmatch", "tempfile", "copy", "types")
PASSAGES = {name: (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py") for name in NAMES}
PASSAGES = {
    name: (path if path.is_file() else path.with_suffix("") / "__init__.py").read_text()[:1500]
    for name, path in PASSAGES.items()
}
QUESTIONS = {
    f"q-{name}": ([user(f"Which module is about {text[20:90]}"), assistant(f"the {name} one")], {"gold": name})
    for name, text in PASSAGES.items()
}


def slow_scores(texts, question):
    """BM25 by its formula."""

    def terms(text):
        return re.findall(r"[^\W_]+", text.lower())

    bags = [Counter(terms(text)) for text in texts]
    mean = sum(sum(bag.values()) for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        total = 0.0
        for term in terms(question):
            df = sum(term in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            if df:
                total += idf * bag[term] / (bag[term] + 1.2 * (1 - 0.75 + 0.75 * sum(bag.values()) / mean))
        scores.append(total)
    return scores


def test_scores_are_bm25_and_the_best_come_in_order():
    index = PassageIndex.build(list(PASSAGES), list(PASSAGES.values()))
    for (question, _), _ in QUESTIONS.values():
        slow = slow_scores(list(PASSAGES.values()), question["content"])
        scores = index.scores(question["content"])
        assert scores.tolist() == pytest.approx(slow, rel=1e-4)
        order = sorted(range(len(slow)), key=lambda place: -slow[place])
        assert index.best(scores, 4, lambda place: True) == order[:4]
        assert index.best(scores, 4, set(order[1:]).__contains__) == order[1:5]


def test_ties_go_by_id():
    ids = [f"d{number:03d}" for number in range(300)][::-1]
    index = PassageIndex.build(ids, ["same words here"] * 300)
    found = index.best(index.scores("words"), 3, lambda place: True)
    assert [ids[place] for place in found] == ["d000", "d001", "d002"]
    assert index.best(index.scores("unknown"), 3, lambda place: True) == []


def test_many_rejected_passages_do_not_end_the_search():
    index = PassageIndex.build([f"d{n}" for n in range(300)], ["words" + " pad" * n for n in range(300)])
    scores = index.scores("words")
    assert index.best(scores, 3, lambda place: place >= 250) == [250, 251, 252]
    assert index.best(scores, 3, lambda place: place >= 298) == [298, 299]


def test_the_best_passages_stand_first_and_last():
    assert alternate_inwards([1, 2, 3, 4, 5]) == [1, 3, 5, 4, 2]
    assert alternate_inwards([1, 2, 3, 4]) == [1, 3, 4, 2]
    assert alternate_inwards([]) == []


@given(st.lists(st.integers(), max_size=20), st.floats(0, 1))
def test_gold_stands_at_its_depth(others, depth):
    placed = insert_at_depth(others, ["gold"], depth)
    before = placed.index("gold")
    assert [*placed[:before], *placed[before + 1 :]] == others
    assert abs(before - depth * len(others)) <= 0.5 + 1e-9


@pytest.fixture
def run(tmp_path, write_chats):
    documents = write_documents(tmp_path / "documents", PASSAGES)

    def run(config, chats=QUESTIONS, name="out", **inputs):
        config = RetrievalAugmentedConfig.model_validate(config)
        slots = {"chats": write_chats(chats, f"{name}-chats"), "documents": documents, **inputs}
        folder = run_stage(retrieval_augmented, config, slots, tmp_path / name)
        retrieval_augmented.check(config, folder)
        rows = read_table(folder, "chats").to_pylist()
        return rows, [json.loads(row["metadata"]) for row in rows], read_artifact(folder).counts

    return run


def test_gold_stands_among_the_hardest_negatives(run):
    rows, metadata, counts = run({"num_passages": 5, "gold_field": "gold", "enable_answer_exclusion": False})
    texts = list(PASSAGES.values())
    for row, found in zip(rows, metadata, strict=True):
        question = QUESTIONS[row["sample_id"]][0][0]["content"]
        slow = dict(zip(PASSAGES, slow_scores(texts, question), strict=True))
        others = sorted((name for name in PASSAGES if name != found_gold(row)), key=lambda name: -slow[name])[:4]
        assert found["passages"] == sorted([*others, found_gold(row)], key=lambda name: -slow[name])
        assert [found["passages"][place] for place in found["gold"]] == [found_gold(row)]
        content = row["messages"][0]["content"]
        assert content.endswith(f"Question: {question}")
        shown = re.findall(r"Passage (\d):\n", content)
        assert shown == list("12345")
        assert all(PASSAGES[name].strip() in content for name in found["passages"])
        assert row["messages"][1] == QUESTIONS[row["sample_id"]][0][1]
    assert counts["num_in"] == counts["num_kept"] == len(QUESTIONS)


def found_gold(row):
    return row["sample_id"].removeprefix("q-")


def test_orders_hold_the_same_passages_in_other_places(run):
    plain = {"num_passages": 5, "gold_field": "gold"}
    _, retrieved, _ = run(plain, name="a")
    _, reordered, _ = run({**plain, "order": "reordered"}, name="b")
    _, shuffled, _ = run({**plain, "order": "shuffled"}, name="c")
    _, deep, _ = run({**plain, "order": "gold_at_depth", "gold_depth_fraction": 1}, name="d")
    for one, two, three, four in zip(retrieved, reordered, shuffled, deep, strict=True):
        assert two["passages"] == alternate_inwards(one["passages"])
        assert sorted(three["passages"]) == sorted(one["passages"]) == sorted(four["passages"])
        assert four["gold"] == [4]
    assert any(one["passages"] != three["passages"] for one, three in zip(retrieved, shuffled, strict=True))


def test_negatives_that_hold_the_answer_are_not_taken(run):
    chats = {"q": ([user("who made json csv gzip queue"), assistant("IMPORT")], {"gold": "json"})}
    _, _, counts = run({"num_passages": 12, "gold_field": "gold"}, chats)
    _, metadata, _ = run({"num_passages": 12, "gold_field": "gold"}, chats, "again")
    holding = {name for name, text in PASSAGES.items() if "import" in text.casefold() and name != "json"}
    assert holding and not holding & set(metadata[0]["passages"])
    assert counts["num_passages_excluded"] == len(holding)
    assert set(metadata[0]["passages"]) == set(PASSAGES) - holding


def test_too_few_hits_are_filled_up_by_chance(run):
    chats = {"q": ([user("zzzz"), assistant("x")], {})}
    _, metadata, counts = run({"num_passages": 4}, chats)
    assert len(set(metadata[0]["passages"])) == 4 == counts["num_passages_random"]
    _, again, _ = run({"num_passages": 4}, chats, "again")
    _, other, _ = run({"num_passages": 4, "seed": 1}, chats, "other")
    assert metadata == again != other


def test_no_passage_is_shown_twice(run):
    chats = {"q": ([user("the priority queue heapq"), assistant("x")], {})}
    _, metadata, counts = run({"num_passages": 50}, chats)
    assert sorted(metadata[0]["passages"]) == sorted(PASSAGES)
    assert 0 < counts["num_passages_random"] < len(PASSAGES)


def test_every_drop_is_counted(run):
    chat = [user("json"), assistant("x")]
    chats = {
        "fine": (chat, {"gold": ["json"], "reasoning": "because"}),
        "none": (chat, {}),
        "unknown": (chat, {"gold": "nowhere"}),
        "many": (chat, {"gold": list(PASSAGES)[:4]}),
        "mute": (chat, {"gold": "csv", "reasoning": " "}),
        "turns": (chat * 2, {"gold": "csv"}),
    }
    config = {"num_passages": 4, "gold_field": "gold", "reasoning": "given"}
    rows, _, counts = run(config, chats)
    assert rows[0]["messages"][1]["content"] == "because\n\nAnswer: x"
    assert "first say which ones are" in rows[0]["messages"][0]["content"]
    reasons = {name: value for name, value in counts.items() if name.startswith("num_dropped")}
    assert reasons == {f"num_dropped_{reason}": 1 for reason in retrieval_augmented.REASONS}
    assert (counts["num_in"], counts["num_kept"]) == (6, 1)


def test_a_model_writes_the_reasoning_from_passages_question_and_answer(run, server):
    server.answer = lambda messages: f"reason {'The answer is: the json one' in messages[0]['content']}"
    config = {"num_passages": 3, "gold_field": "gold", "reasoning": "generated", "generation": {"model": "m"}}
    rows, metadata, counts = run(config)
    answers = {row["sample_id"]: row["messages"][1]["content"] for row in rows}
    assert answers["q-json"] == "reason True\n\nAnswer: the json one"
    assert answers["q-csv"] == "reason False\n\nAnswer: the csv one"
    assert all("shown" not in found for found in metadata)
    assert counts["num_calls"] == len(QUESTIONS) == server.num_requests
    run({**config, "answer_format": "{reasoning} => {answer}"}, name="again")
    assert server.num_requests == len(QUESTIONS)


def test_contradictions_are_named(run, tmp_path):
    with pytest.raises(ValidationError, match="gold_at_depth"):
        RetrievalAugmentedConfig(order="gold_at_depth")
    with pytest.raises(ValidationError, match=r"prompt must hold \{question\}"):
        RetrievalAugmentedConfig(prompt="{passages}")
    with pytest.raises(ValueError, match="slot 'model' is for"):
        run({}, model=tmp_path)
    with pytest.raises(ValueError, match=r"no chat of .* is left"):
        run({"gold_field": "absent"}, name="b")
