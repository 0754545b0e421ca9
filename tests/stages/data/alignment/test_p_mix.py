import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import run_stage

from ropewalk.stages.data.alignment import p_mix
from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.data.alignment.p_mix import PMixConfig, draw_conversations
from ropewalk.stages.schema import read_artifact, read_table

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, LENGTHS, st.floats(0, 1), st.integers(50, 200), st.integers(0, 9))
def test_conversations_begin_short_fit_and_use_each_chat_once(long, short, fraction, limit, seed):
    lengths = {"long": long, "short": short}
    drawn = list(draw_conversations(PMixConfig(long_fraction=fraction, max_tokens=limit, seed=seed), lengths))
    placed = [chat for conversation in drawn for chat in conversation]
    assert len(placed) == len(set(placed))
    assert sum(pile == "short" for pile, _ in placed) == len(short)
    for conversation in drawn:
        assert conversation[0][0] == "short"
        assert sum(lengths[pile][place] for pile, place in conversation) <= limit


def test_the_share_of_long_chats_is_the_probability():
    lengths = {"long": [1] * 5000, "short": [1] * 5000}
    drawn = list(draw_conversations(PMixConfig(max_tokens=100), lengths))
    later = [pile for conversation in drawn if len(conversation) == 100 for pile, _ in conversation[1:]]
    assert later.count("long") / len(later) == pytest.approx(0.4, abs=0.03)


def test_turns_are_laid_end_to_end_and_losses_counted(tmp_path, write_chats, tokenizer_folder):
    short = {f"s{n}": [user(f"q{n}"), assistant("a")] for n in range(6)}
    long = {f"l{n}": [user("x " * 30), assistant(f"b{n}")] for n in range(6)}
    short["system"] = [{"role": "system", "content": "s"}, *short["s1"]]
    long["giant"] = [user("x" * 2000), assistant("b")]
    slots = {"long": write_chats(long, "l"), "short": write_chats(short, "s"), "tokenizer": tokenizer_folder}
    config = PMixConfig(max_tokens=150)
    folder = run_stage(p_mix, config, slots, tmp_path / "out")
    p_mix.check(config, folder)
    both = {**short, **long}
    for row in read_table(folder, "chats").to_pylist():
        parts = json.loads(row["metadata"])["parts"]
        assert row["messages"] == [message for part in parts for message in both[part["sample_id"]]]
    counts = read_artifact(folder).counts
    assert counts["num_short_dropped_has_system"] == counts["num_long_dropped_too_long"] == 1
    for pile in ("long", "short"):
        lost = counts[f"num_{pile}_dropped_has_system"] + counts[f"num_{pile}_dropped_too_long"]
        assert counts[f"num_{pile}_in"] == 7 == lost + counts[f"num_{pile}_used"] + counts[f"num_{pile}_unused"]
    assert counts["num_long_used"] > 0


def test_without_a_short_chat_nothing_begins(tmp_path, write_chats, tokenizer_folder):
    chats = write_chats({"a": [user("a" * 50), assistant("b")]})
    slots = {"long": chats, "short": chats, "tokenizer": tokenizer_folder}
    with pytest.raises(ValueError, match="slot short holds no chat"):
        run_stage(p_mix, PMixConfig(max_tokens=3), slots, tmp_path / "out")
