import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage, write_documents

from ropewalk.stages.data.alignment import long_questions, short_to_long
from ropewalk.stages.data.alignment.long_questions import LongQuestionsConfig, deal
from ropewalk.stages.data.alignment.questions import cut_chunks, parse_questions
from ropewalk.stages.data.alignment.short_to_long import ShortToLongConfig
from ropewalk.stages.schema import read_artifact, read_table

TEXTS = {
    f"d{number}": "\n\n".join(
        f"Part {number}.{part} tells of rope {part}. {'It is long. ' * 8}" for part in range(number + 1)
    )
    for number in range(7)
}
GENERATION = {"model": "asker"}
QUESTIONS = {"num_questions": 2, "chunk_characters": 150}


def asker(messages):
    """Asks for the parts it sees; answers with what it sees of them."""
    text = messages[-1]["content"]
    parts = re.findall(r"Part (\d\.\d)", text)
    if "Give nothing but the questions" in text:
        if "Part 6.6" in text:
            return "no idea"
        return f"1: What of {parts[0]}?\n2: What of {parts[-1]} again?"
    return "all of " + " ".join(sorted(set(parts)))


@pytest.fixture
def run(tmp_path, server):
    server.answer = asker
    documents = write_documents(tmp_path / "documents", TEXTS)

    def run(stage, config, name="out", **slots):
        config = (LongQuestionsConfig if stage is long_questions else ShortToLongConfig).model_validate(config)
        folder = run_stage(stage, config, {"documents": documents, **slots}, tmp_path / name)
        stage.check(config, folder)
        table = "chats" if stage is long_questions else "preferences"
        return read_table(folder, table).to_pylist(), read_artifact(folder, table).counts

    return run


@given(st.text("ab. \n", max_size=600), st.integers(100, 200))
def test_pieces_are_the_text_and_none_is_too_long(text, limit):
    chunks = cut_chunks(text, limit)
    assert "".join(text[begin:end] for begin, end in chunks) == text
    assert all(0 < end - begin <= limit for begin, end in chunks)
    assert all(end - begin > limit // 2 for begin, end in chunks[:-1])


def test_pieces_end_at_paragraphs_where_they_can():
    text = "a" * 80 + "\n\n" + "b. " * 10 + "c" * 300
    assert cut_chunks(text, 120)[0] == (0, 82)
    assert cut_chunks(text[82:], 100)[0] == (0, 100)
    assert cut_chunks("", 100) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1: why?\n2: how?", ["why?", "how?"]),
        ("**1.** why?\n\n2) how?", ["why?", "how?"]),
        ("1: why?", None),
        ("Sure!\n1: why?\n2: how?", None),
        ("2: why?\n1: how?", None),
        ("1: why?\n2: how?\n3: who?", None),
    ],
)
def test_numbered_questions_are_parsed_or_they_are_not(text, found):
    assert parse_questions(text, 2) == found


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 5), st.integers(20, 150), st.integers(0, 5))
def test_every_document_is_dealt_once_or_dropped(sizes, most, limit, seed):
    config = LongQuestionsConfig(max_documents=most, max_sample_bytes=limit, min_document_bytes=5, seed=seed)
    groups, counts = deal(config, [f"d{n}" for n in range(len(sizes))], sizes)
    used = [place for group in groups for place in group]
    assert sorted(used) == [place for place, size in enumerate(sizes) if 5 <= size <= limit]
    assert all(len(group) <= most and sum(sizes[place] for place in group) <= limit for group in groups)
    assert counts["num_documents_used"] == len(used)


def test_a_question_is_asked_and_answered_with_the_document_in_sight(run):
    rows, counts = run(long_questions, {"generation": GENERATION, "questions": QUESTIONS})
    assert (counts["num_in"], counts["num_kept"], counts["num_dropped_unparsable_questions"]) == (7, 6, 1)
    for row in rows:
        metadata = json.loads(row["metadata"])
        (name,) = metadata["doc_ids"]
        number = int(name[1:])
        assert row["messages"][0]["content"] == f"{TEXTS[name].strip()}\n\n{metadata['question']}"
        assert metadata["question"] in (f"What of {number}.0?", f"What of {number}.{number} again?")
        parts = {f"{number}.{part}" for part in range(number + 1)}
        assert row["messages"][1]["content"] == "all of " + " ".join(sorted(parts))
    assert len({json.loads(row["metadata"])["question"][-6:] == "again?" for row in rows}) == 2


def test_several_documents_stand_in_one_prompt(run):
    rows, counts = run(long_questions, {"generation": GENERATION, "questions": QUESTIONS, "max_documents": 4})
    sizes = [len(json.loads(row["metadata"])["doc_ids"]) for row in rows]
    assert max(sizes) > 1
    for row, size in zip(rows, sizes, strict=True):
        headings = re.findall(r"^Document (\d):$", row["messages"][0]["content"], re.MULTILINE)
        assert headings == ([str(number) for number in range(1, size + 1)] if size > 1 else [])
    assert counts["num_documents_used"] == counts["num_documents_in"] == 7


def test_a_piece_can_be_asked_about_and_answered_from(run):
    config = {"generation": GENERATION, "questions": QUESTIONS, "question_from": "chunk", "answer_from": "chunk"}
    rows, _ = run(long_questions, config)
    shorter = 0
    for row in rows:
        metadata = json.loads(row["metadata"])
        chunk = metadata["chunk"]
        seen = re.findall(r"Part (\d\.\d)", TEXTS[chunk["doc_id"]][chunk["begin"] : chunk["end"]])
        asked = re.findall(r"\d\.\d", metadata["question"])
        assert asked[0] in seen
        assert set(row["messages"][1]["content"].split()[2:]) == set(seen)
        assert TEXTS[chunk["doc_id"]].strip() in row["messages"][0]["content"]
        shorter += len(seen) < len(re.findall("Part", TEXTS[chunk["doc_id"]]))
    assert shorter


def test_documents_outside_the_limits_are_counted(run):
    config = {"generation": GENERATION, "questions": QUESTIONS, "min_document_bytes": 200, "max_sample_bytes": 700}
    _, counts = run(long_questions, config)
    sizes = [len(text) for text in TEXTS.values()]
    assert counts["num_documents_dropped_too_short"] == sum(size < 200 for size in sizes) > 0
    assert counts["num_documents_dropped_too_long"] == sum(size > 700 for size in sizes) > 0
    with pytest.raises(ValueError, match="no document of"):
        run(long_questions, {**config, "min_document_bytes": 10**6}, "none")


def test_an_answer_from_a_piece_needs_a_question_from_it():
    with pytest.raises(ValidationError, match="the answer must lie in the piece"):
        LongQuestionsConfig(answer_from="chunk")


# --- preference pairs ---------------------------------------------------------------------------------------------


def test_the_short_answer_is_chosen_and_the_long_one_rejected(run):
    config = {"generation": GENERATION, "questions": QUESTIONS, "num_chunks": 2}
    rows, counts = run(short_to_long, config)
    assert rows
    for row in rows:
        metadata = json.loads(row["metadata"])
        text = TEXTS[metadata["doc_id"]]
        piece = text[metadata["begin"] : metadata["end"]]
        assert row["prompt"] == [{"role": "user", "content": f"{text.strip()}\n\n{metadata['question']}"}]
        assert row["short_prompt"] == [{"role": "user", "content": f"{piece.strip()}\n\n{metadata['question']}"}]
        parts = set(re.findall(r"Part (\d\.\d)", piece))
        assert set(row["chosen"].split()[2:]) == parts | set(re.findall(r"Part (\d\.\d)", metadata["question"]))
        assert set(row["rejected"].split()[2:]) > set(row["chosen"].split()[2:])
    assert counts["num_in"] == counts["num_kept"] + counts["num_dropped_unparsable_questions"]
    assert counts["num_documents_in"] == 7 == counts["num_documents_used"] + counts["num_documents_dropped_too_short"]
    assert counts["num_documents_dropped_too_short"] == 1
    assert counts["num_in"] == 2 * counts["num_documents_used"]


def test_equal_answers_are_no_pair(run, server):
    server.answer = lambda messages: "1: a?\n2: b?" if "numbered" in messages[0]["content"] else "same"
    with pytest.raises(ValueError, match="'num_dropped_same_answer': 12"):
        run(short_to_long, {"generation": GENERATION, "questions": QUESTIONS})


def test_documents_too_long_for_the_model_are_counted(run):
    config = {"generation": GENERATION, "questions": QUESTIONS, "max_document_characters": 500}
    _, counts = run(short_to_long, config)
    assert counts["num_documents_dropped_too_long"] == sum(len(text) > 500 for text in TEXTS.values()) > 0
    with pytest.raises(ValueError, match="has two pieces"):
        run(short_to_long, {**config, "max_document_characters": 100}, "none")


def test_pairs_and_questions_share_their_calls(run, server):
    config = {"generation": GENERATION, "questions": QUESTIONS}
    run(short_to_long, config)
    asked = server.num_requests
    rows, _ = run(short_to_long, {**config, "num_chunks": 1}, "fewer")
    again, _ = run(short_to_long, config, "again")
    assert len(rows) < len(again)
    assert server.num_requests <= asked + 3 * 6  # One piece may be another than the two.
    asked = server.num_requests
    run(short_to_long, config, "third")
    assert server.num_requests == asked


def test_the_check_of_pairs_tells_what_is_wrong(tmp_path):
    from ropewalk.stages.schema import Artifact, preferences_schema, write_artifact, write_table

    prompt = [{"role": "user", "content": "q"}]
    row = {"sample_id": "a", "source": "s", "prompt": prompt, "short_prompt": prompt, "chosen": "x", "rejected": "y",
           "metadata": "{}"}  # fmt: skip
    broken = [
        ([row, row], "sample_id 'a' occurs twice"),
        ([{**row, "rejected": "x"}], "chosen and rejected of sample_id 'a' are equal"),
        ([{**row, "prompt": []}], "prompt of sample_id 'a' does not await an answer"),
    ]
    for number, (rows, message) in enumerate(broken):
        write_table(tmp_path / str(number), "preferences", preferences_schema(), rows)
        write_artifact(tmp_path / str(number), Artifact(kind="preferences", counts={"num_kept": len(rows)}))
        with pytest.raises(ValueError, match=message):
            short_to_long.check(None, tmp_path / str(number))
