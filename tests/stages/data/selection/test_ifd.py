"""Instruction-following difficulty against a plain float64 computation with a tiny model."""

import numpy as np
import pytest
from judges import judge_texts, write_judge
from row_invariants import run_stage
from selected_samples import turns, write_chats

from ropewalk.stages.data.selection import ifd
from ropewalk.stages.data.selection.ifd import IfdConfig, scores_of
from ropewalk.stages.schema import read_artifact, read_table

TEXTS = judge_texts()


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge"))


class PlainModel:
    """Stock transformers in float64, one text at a time."""

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def losses(self, ids):
        with self.torch.no_grad():
            logs = self.model(self.torch.tensor([ids])).logits[0].log_softmax(-1)
        return [-float(logs[place - 1, ids[place]]) for place in range(1, len(ids))]

    def ppl(self, before, answer):
        return np.exp(np.mean(self.losses([self.tokenizer.bos_token_id, *before, *answer])[len(before) :]))


def score(tmp_path, judge, chats, **config):
    inputs = {"chats": write_chats(tmp_path / "chats", chats), "model": judge}
    data = run_stage(ifd, IfdConfig(**{"max_tokens": 256} | config), inputs, tmp_path / "run")
    ifd.check(None, data)
    return {row["sample_id"]: row for row in read_table(data, "scores").to_pylist()}, read_artifact(data).counts


def test_ifd_is_the_ratio_of_perplexities(tmp_path, judge):
    chats = {f"s{n:02d}": turns(TEXTS[n], TEXTS[-n][: 20 + 5 * n]) for n in range(20)}
    chats["long"] = [{"role": "system", "content": "be brief"}, *turns(TEXTS[0], "yes", TEXTS[1], TEXTS[2])]
    rows, counts = score(tmp_path, judge, chats)
    plain = PlainModel(judge)
    for name, messages in chats.items():
        before = plain.ids("".join(message["content"] + "\n" for message in messages[:-1]))
        answer = plain.ids(messages[-1]["content"])
        given, alone = plain.ppl(before, answer), plain.ppl([], answer)
        assert rows[name]["ppl_given_prompt"] == pytest.approx(given, rel=1e-4)
        assert rows[name]["ppl"] == pytest.approx(alone, rel=1e-4)
        ratio = given / alone
        assert rows[name]["ifd"] == pytest.approx(ratio, rel=1e-4)
        assert rows[name]["score"] == pytest.approx(ratio if ratio < 1 else -ratio, rel=1e-4)
        assert rows[name]["num_tokens"] == 1 + len(before) + len(answer)
    misaligned = sum(row["ifd"] >= 1 for row in rows.values())
    assert 0 < misaligned < len(rows), "both sides of 1 must occur"
    assert counts["num_misaligned"] == misaligned == sum(row["score"] < 0 for row in rows.values())


def test_misaligned_samples_come_last_the_worst_at_the_end():
    values = np.array([0.2, 0.999, 1.0, 1.5, 7.0, 0.9])
    order = np.argsort(-scores_of(values))
    assert values[order].tolist() == [0.999, 0.9, 0.2, 1.0, 1.5, 7.0]
    assert ((scores_of(values) >= 0) == (values < 1)).all()
    assert np.isfinite(scores_of(values)).all()


def test_long_answers_are_cut_in_both_perplexities(tmp_path, judge):
    answer = " ".join(TEXTS[:10])
    rows, counts = score(tmp_path, judge, {"a": turns(TEXTS[0], answer)}, max_tokens=64)
    plain = PlainModel(judge)
    before = plain.ids(TEXTS[0] + "\n")
    kept = plain.ids(answer)[: 64 - 1 - len(before)]
    assert rows["a"]["num_tokens"] == 64
    assert rows["a"]["ifd"] == pytest.approx(plain.ppl(before, kept) / plain.ppl([], kept), rel=1e-4)
    assert counts["num_cut_samples"] == 1
    assert counts["num_cut_tokens"] == len(plain.ids(answer)) - len(kept)


def test_chats_that_cannot_be_scored_are_counted_by_reason(tmp_path, judge):
    chats = {
        "good": turns(TEXTS[0], TEXTS[1]),
        "unanswered": turns(TEXTS[0]),
        "alone": turns(TEXTS[0], TEXTS[1])[1:],
        "empty": turns(TEXTS[0], ""),
        "long": turns(" ".join(TEXTS), TEXTS[0]),
    }
    rows, counts = score(tmp_path, judge, chats)
    assert set(rows) == {"good"}
    assert counts["num_in"] == 5 and counts["num_scored"] == 1
    assert {name: counts[f"num_dropped_{name}"] for name in ifd.REASONS} == dict.fromkeys(ifd.REASONS, 1) | {
        "no_prompt": 1
    }


def test_the_template_writes_the_prompt(tmp_path, judge):
    chats = {"a": turns(TEXTS[0], TEXTS[1])}
    rows, _ = score(tmp_path, judge, chats, message_template="{role} says {content}!")
    plain = PlainModel(judge)
    before, answer = plain.ids(f"user says {TEXTS[0]}!"), plain.ids(TEXTS[1])
    assert rows["a"]["ppl_given_prompt"] == pytest.approx(plain.ppl(before, answer), rel=1e-4)
    with pytest.raises(ValueError, match=r"message_template must hold \{content\}"):
        IfdConfig(message_template="{role}")


def test_bad_input_is_refused(tmp_path, judge):
    with pytest.raises(ValueError, match="no sample could be scored"):
        score(tmp_path / "1", judge, {"a": turns(TEXTS[0])})
    with pytest.raises(ValueError, match="reads 256 tokens, but 1024 are wanted"):
        score(tmp_path / "2", judge, {"a": turns(TEXTS[0], TEXTS[1])}, max_tokens=1024)
    chats = write_chats(tmp_path / "chats", {"a": turns("x", "y")})
    with pytest.raises(ValueError, match="holds no tokenizer"):
        run_stage(ifd, IfdConfig(), {"chats": chats, "model": chats}, tmp_path / "3")


def test_without_a_begin_token_the_first_token_counts_in_neither_perplexity(tmp_path, judge):
    import json
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(judge, bare)
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("bos_token", "eos_token")}
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    rows, counts = score(tmp_path, bare, {"a": turns(TEXTS[0], TEXTS[1]), "one token": turns(TEXTS[0], "q")})
    plain = PlainModel(judge)
    before, answer = plain.ids(TEXTS[0] + "\n"), plain.ids(TEXTS[1])
    losses = [plain.losses([*before, *answer])[len(before) :], plain.losses(answer)]
    assert len(losses[0]) == len(losses[1]) == len(answer) - 1
    assert rows["a"]["ppl_given_prompt"] == pytest.approx(np.exp(np.mean(losses[0])), rel=1e-4)
    assert rows["a"]["ppl"] == pytest.approx(np.exp(np.mean(losses[1])), rel=1e-4)
    assert set(rows) == {"a"} and counts["num_dropped_empty_answer"] == 1
