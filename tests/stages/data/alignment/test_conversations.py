import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.stages.data.alignment import conversations
from ropewalk.stages.data.alignment.conversations import (
    RecordWriter,
    assistant,
    check_chats,
    fault,
    fill_in,
    iterate_chats,
    require_placeholders,
    user,
)
from ropewalk.stages.schema import Artifact, chats_schema, read_artifact, read_table, shard_paths, write_artifact

SYSTEM, TOOL = {"role": "system", "content": "be kind"}, {"role": "tool", "content": "42"}
Q, A = user("q"), assistant("a")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([Q, A], None),
        ([SYSTEM, Q, A, Q, A], None),
        ([Q, A, TOOL, TOOL, A], None),
        ([Q], "unanswered"),
        ([SYSTEM, Q, A, TOOL], "unanswered"),
        ([], "unanswered"),
        ([A, Q, A], "broken_alternation"),
        ([Q, Q, A], "broken_alternation"),
        ([Q, A, A], "broken_alternation"),
        ([Q, SYSTEM, A], "broken_alternation"),
        ([user(" \n"), A], "empty_content"),
        ([user("\ud800"), A], "undecodable"),
        ([{"role": "robot", "content": "x"}, A], "unknown_role"),
    ],
)
def test_a_chat_that_is_not_sound_says_why(messages, reason):
    assert fault(messages) == reason


def test_unanswered_chats_are_sound_only_where_they_are_wanted():
    assert fault([Q, A, Q], enable_unanswered=True) is None
    assert fault([Q, A, TOOL], enable_unanswered=True) == "unanswered"


@given(st.text(), st.sampled_from(["{b}", "{a}{b}", "{c}", "{"]))
def test_values_are_filled_in_once_whatever_braces_they_hold(text, braces):
    assert fill_in("{a}|{b}|{c}", a=text + braces, b="B") == f"{text}{braces}|B|{{c}}"


def test_a_prompt_without_its_placeholder_is_an_error():
    with pytest.raises(ValueError, match=r"plan_prompt must hold \{text\}"):
        require_placeholders("plan_prompt", "{a}", "a", "text")


def test_shards_are_closed_by_the_size_of_their_text(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "SHARD_BYTES", 60)
    writer = RecordWriter(tmp_path, "chats", chats_schema())
    for number in range(5):
        writer.write({"sample_id": str(number), "source": "s", "messages": [user("x" * 40)], "metadata": "{}"})
    assert writer.close() == 5
    assert len(shard_paths(tmp_path, "chats")) == 3
    assert read_table(tmp_path, "chats").column("sample_id").to_pylist() == list("01234")


def test_an_empty_table_has_its_schema(tmp_path):
    assert RecordWriter(tmp_path, "chats", chats_schema()).close() == 0
    assert read_table(tmp_path, "chats").schema.equals(chats_schema())


def test_the_check_tells_what_is_wrong(write_chats):
    check_chats(None, write_chats({"a": [Q, A], "b": [Q, A]}, "good"))
    broken = write_chats({"a": [Q, A], "b": [Q]}, "broken")
    with pytest.raises(ValueError, match="'b', whose messages are unanswered"):
        check_chats(None, broken)
    short = write_chats({"a": [Q, A]}, "short")
    write_artifact(short, Artifact(kind="chats", counts={"num_kept": 2}))
    with pytest.raises(ValueError, match=r"num_kept is 2, but there are 1"):
        check_chats(None, short)
    with pytest.raises(ValueError, match="is empty"):
        check_chats(None, write_chats({}, "none"))
    assert read_artifact(short).kind == "chats"


def test_metadata_that_is_no_object_is_an_error(write_chats):
    folder = write_chats({"a": ([Q, A], ["no"])})
    with pytest.raises(ValueError, match="metadata of sample_id 'a'"):
        list(iterate_chats(folder))
