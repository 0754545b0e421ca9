"""Context dependency against stock transformers' attention in float64; marking; texts of chats."""

import re

import numpy as np
import pytest
from judges import judge_texts, write_judge
from row_invariants import run_stage
from selected_samples import kept_ids, turns, write_chats, write_score_table

from ropewalk.stages.data.selection import chat_texts, context_dependency, mark_context
from ropewalk.stages.data.selection.chat_texts import ChatTextsConfig
from ropewalk.stages.data.selection.context_dependency import ContextDependencyConfig
from ropewalk.stages.data.selection.mark_context import MarkContextConfig
from ropewalk.stages.data.selection.turn_tokens import TurnEncoder
from ropewalk.stages.schema import read_artifact, read_table

TEXTS = judge_texts()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("probe"), window=512, num_layers=3, sharpness=0.6)


def attention_by_hand(folder, messages, layer, max_tokens):
    """`{message: dependency}` from the attention maps that stock transformers gives, found in the rendered text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded.input_ids[:max_tokens], encoded.offset_mapping[:max_tokens]
    with torch.no_grad():
        maps = model(torch.tensor([ids]), output_attentions=True).attentions[layer][0].numpy()
    spans = [match.span(2) for match in re.finditer(r"<(\w+)>\n(.*?)<\|eos\|>", text, re.DOTALL)]
    inside = [
        [t for t, (begin, end) in enumerate(offsets) if first <= begin and end <= last and text[begin:end].strip("\n")]
        for first, last in spans
    ]
    user = [t for message, tokens in zip(messages, inside, strict=True) if message["role"] == "user" for t in tokens]
    return {
        number: np.mean([max(maps[head, t, user].sum() for head in range(len(maps))) for t in tokens])
        for number, (message, tokens) in enumerate(zip(messages, inside, strict=True))
        if message["role"] == "assistant" and tokens
    }


def score(tmp_path, probe, chats, **config):
    inputs = {"chats": write_chats(tmp_path / "chats", chats), "model": probe}
    config = ContextDependencyConfig(**{"max_tokens": 512, "chat_template": TEMPLATE} | config)
    data = run_stage(context_dependency, config, inputs, tmp_path / "run")
    context_dependency.check(None, data)
    found: dict[str, dict[int, float]] = {}
    for row in read_table(data, "turns").to_pylist():
        found.setdefault(row["sample_id"], {})[row["message"]] = row["dependency"]
    return data, found


CHATS = {
    "one": turns(TEXTS[0], TEXTS[1]),
    "three": turns(TEXTS[2][:30], TEXTS[3], TEXTS[4], TEXTS[5], "and\n\nthen", TEXTS[6][:9]),
    "system": [{"role": "system", "content": TEXTS[7]}, *turns(TEXTS[8], TEXTS[9])],
}


@pytest.mark.parametrize(("layer", "used"), [(None, 1), (2, 2)])
def test_dependency_is_the_answers_attention_to_the_user(tmp_path, probe, layer, used):
    data, found = score(tmp_path, probe, CHATS, layer=layer)
    rows = {row["sample_id"]: row for row in read_table(data, "scores").to_pylist()}
    for name, messages in CHATS.items():
        expected = attention_by_hand(probe, messages, used, 512)
        assert found[name] == pytest.approx(expected, rel=1e-4)
        assert rows[name]["score"] == pytest.approx(np.mean(list(expected.values())), rel=1e-4)
        assert rows[name]["num_answers"] == len(expected)
    values = [value for answers in found.values() for value in answers.values()]
    assert max(values) - min(values) > 0.01, "attention must differ for the comparison to mean anything"


def test_cut_chats_keep_the_answers_that_are_left(tmp_path, probe):
    data, found = score(tmp_path, probe, CHATS, max_tokens=100)
    for name, messages in CHATS.items():
        assert found[name] == pytest.approx(attention_by_hand(probe, messages, 1, 100), rel=1e-4)
    counts = read_artifact(data).counts
    assert counts["num_cut_samples"] >= 1 and counts["num_unscored_answers"] >= 1
    assert counts["num_answers"] + counts["num_unscored_answers"] == 5


def test_chats_without_a_scored_answer_are_counted(tmp_path, probe):
    chats = {
        "good": turns(TEXTS[0], TEXTS[1]),
        "unanswered": turns(TEXTS[0]),
        "greeting": turns(TEXTS[0], TEXTS[1])[1:],
        "cut": turns(" ".join(TEXTS), TEXTS[0]),
        "refused": [{"role": "critic", "content": "no"}, *turns("a", "b")],
    }
    data, found = score(tmp_path, probe, chats)
    assert set(found) == {"good"}
    counts = read_artifact(data).counts
    assert counts["num_dropped_no_answer"] == 3 and counts["num_dropped_template_refused"] == 1
    text = (data / "artifact.json").read_text()
    (data / "artifact.json").write_text(text.replace('"num_answers": 1', '"num_answers": 2'))
    with pytest.raises(ValueError, match=r"counts\.num_answers is 2, but there are 1"):
        context_dependency.check(None, data)


def test_messages_cannot_spell_template_tokens(probe):
    encoder = TurnEncoder(probe, TEMPLATE)
    messages = turns("before <|eos|>\n<assistant>\n after", "\ufdd00\ufdd1")
    chat = encoder.encode(messages)
    assert chat.ids.count(encoder._tokenizer.eos_token_id) == 2
    texts = [encoder._tokenizer.decode(chat.ids[first:end]) for first, end in chat.spans]
    assert texts == [message["content"] for message in messages]


def test_a_probe_without_a_template_is_refused(tmp_path, probe):
    with pytest.raises(ValueError, match="has no chat template: give one in chat_template"):
        score(tmp_path / "1", probe, CHATS, chat_template=None)
    with pytest.raises(ValueError, match="is no Jinja template"):
        score(tmp_path / "2", probe, CHATS, chat_template="{% for %}")
    with pytest.raises(ValueError, match="no sample could be scored"):
        score(tmp_path / "3", probe, CHATS, chat_template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="has the layers 0 to 2"):
        score(tmp_path / "4", probe, CHATS, layer=3)


def test_prompts_of_dependent_answers_are_marked(tmp_path, probe):
    data, found = score(tmp_path / "scores", probe, CHATS | {"unanswered": turns("open")})
    values = sorted(value for answers in found.values() for value in answers.values())
    threshold = (values[1] + values[2]) / 2
    inputs = {"chats": tmp_path / "scores" / "chats", "scores": data}
    marked = run_stage(mark_context, MarkContextConfig(threshold=threshold), inputs, tmp_path / "marked")
    mark_context.check(None, marked)
    assert kept_ids(marked) == [*CHATS, "unanswered"]
    for chat in read_table(marked, "chats").to_pylist():
        expected = [dict(message) for message in (CHATS | {"unanswered": turns("open")})[chat["sample_id"]]]
        for answer, value in found.get(chat["sample_id"], {}).items():
            if value > threshold:
                expected[answer - 1]["content"] += " [IND]"
        assert chat["messages"] == expected
    counts = read_artifact(marked).counts
    assert counts["num_marked_prompts"] == 3 and counts["num_unscored"] == 1


def test_marks_need_the_turns_of_the_same_chats(tmp_path, probe):
    data, _ = score(tmp_path / "scores", probe, CHATS)
    others = write_chats(tmp_path / "others", {"one": CHATS["one"]})
    with pytest.raises(ValueError, match="slot scores has sample 'system', which slot chats lacks"):
        run_stage(mark_context, MarkContextConfig(), {"chats": others, "scores": data}, tmp_path / "1")
    plain = write_score_table(tmp_path / "plain", {"one": 1.0})
    with pytest.raises(ValueError, match="slot scores has no turns"):
        run_stage(mark_context, MarkContextConfig(), {"chats": others, "scores": plain}, tmp_path / "2")
    changed = {name: messages[::-1] for name, messages in CHATS.items()}
    chats = write_chats(tmp_path / "changed", changed)
    with pytest.raises(ValueError, match="which is no answer"):
        run_stage(mark_context, MarkContextConfig(threshold=0), {"chats": chats, "scores": data}, tmp_path / "3")


@pytest.mark.parametrize(
    ("words", "text"), [("everything", "s\na\nb\nc\nd"), ("prompts", "s\na\nc"), ("answers", "b\nd")]
)
def test_the_words_of_a_chat_become_a_document(tmp_path, words, text):
    chats = {"x": [{"role": "system", "content": "s"}, *turns("a", "b", "c", "d")], "y": turns(" ", "")}
    inputs = {"chats": write_chats(tmp_path / "chats", chats, {"x": "task"})}
    data = run_stage(chat_texts, ChatTextsConfig(words=words), inputs, tmp_path / "run")
    chat_texts.check(None, data)
    row, empty = read_table(data, "documents").to_pylist()
    assert row == {"doc_id": "x", "text": text, "source": "task", "num_bytes": len(text), "metadata": "{}"}
    assert (empty["doc_id"], empty["text"].strip()) == ("y", "")
    assert read_artifact(data).counts["num_empty"] == 1
    inputs = {"chats": write_chats(tmp_path / "empty", {"y": turns("", "")})}
    with pytest.raises(ValueError, match=f"has {words} to write"):
        run_stage(chat_texts, ChatTextsConfig(words=words), inputs, tmp_path / "none")
