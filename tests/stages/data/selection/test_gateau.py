import math

import numpy as np
import pytest
import torch
from judges import SENTENCE, write_chats, write_judge
from row_invariants import run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropewalk.stages.data.selection import gateau
from ropewalk.stages.data.selection.gateau import GateauConfig
from ropewalk.stages.data.selection.language_model import TextEncoder
from ropewalk.stages.data.selection.long_exchange import LongExchange, UnusableError, lay_out
from ropewalk.stages.data.selection.scores import read_scores, scores_table
from ropewalk.stages.schema import read_artifact

RNG = np.random.default_rng(1)
CONFIG = GateauConfig(max_tokens=200, segment_tokens=16, part_tokens=12, batch_tokens=100)


def words(count):
    return " ".join(RNG.choice(SENTENCE.split(), count))


def exchange(context, instruction, response):
    return [("user", f"{context}\n\n{instruction}"), ("assistant", response)]


def good_chats():
    """Long and short contexts, instructions and responses, a heading in a context, and two paragraphs."""
    return {
        "books/a": exchange(words(40), words(4), words(6)),
        "books/b": exchange(words(150), words(3), words(5)),
        "books/c": exchange(words(30) + "\n\n ### Response: " + words(9), words(20), words(30)),
        "code/d": [("system", "be brief"), *exchange(words(20) + "\n \n" + words(15), words(2), "\u00e9" + words(3))],
        "code/e": exchange(words(44), words(4), words(1)),
        "code/f": exchange(words(60), words(6), words(9)),
        "code/g": exchange(words(33), words(2), words(4)),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "short_model": write_judge(folder / "short", seed=1, window=64),
        "long_model": write_judge(folder / "long", seed=2, window=256),
    }


class Slow:
    """GATEAU one sample at a time: stock transformers, eager attention, float64, plain loops."""

    def __init__(self, models, config):
        self.config = config
        self.folders = models
        self.tokenizer = AutoTokenizer.from_pretrained(models["short_model"])
        self.long = self.load("long_model")

    def load(self, name, **options):
        return AutoModelForCausalLM.from_pretrained(
            self.folders[name], dtype=torch.float64, attn_implementation="eager", **options
        )

    def run(self, model, ids):
        with torch.no_grad():
            return model(torch.tensor([ids]), output_attentions=True)

    def mean_loss(self, model, ids, num_targets):
        logits = self.run(model, ids).logits[0].log_softmax(-1)
        places = range(len(ids) - num_targets, len(ids))
        return -sum(logits[place - 1, ids[place]].item() for place in places) / num_targets

    def tokens(self, turns):
        user, response = turns[-2][1], turns[-1][1]
        cut = user.rindex("\n\n") + 2
        if "\n \n" in user and user.rindex("\n \n") > cut - 2:
            cut = user.rindex("\n \n") + 3
        pieces = ["### Input:" + user[:cut], "\n\n ### Instruction: ", user[cut:], "\n\n ### Response: ", response]
        encoded = self.tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        ends = np.cumsum([len(piece) for piece in pieces])
        parts = [[] for _ in pieces]
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            parts[int(np.searchsorted(ends, end))].append(token)
        return parts

    def score(self, turns):
        config, bos = self.config, [self.tokenizer.bos_token_id]
        context, head, instruction, between, response = self.tokens(turns)
        room = config.max_tokens - 1 - len(head + instruction + between + response)
        context = context[-room:]
        ids = bos + context + head + instruction + between + response
        rope = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10_000.0}
        short = self.load("short_model", rope_parameters=rope)
        found = {
            "ppl_short": math.exp(self.mean_loss(short, ids, len(response))),
            "ppl_long": math.exp(self.mean_loss(self.long, ids, len(response))),
            "num_tokens": len(ids),
            "num_response_tokens": len(response),
        }
        y = response[: config.part_tokens]
        behind = head + instruction[: config.part_tokens] + between + y
        segments = [context[at : at + config.segment_tokens] for at in range(0, len(context), config.segment_tokens)]
        alone = [math.exp(self.mean_loss(self.long, bos + segment + behind, len(y))) for segment in segments]
        ids = bos + context + behind
        attentions = self.run(self.long, ids).attentions
        means, place = [], 1
        for segment in segments:
            weights = [
                layer[0, head, row, column].item()
                for layer in attentions
                for head in range(layer.shape[1])
                for row in range(len(ids) - len(y), len(ids))
                for column in range(place, place + len(segment))
            ]
            means.append(sum(weights) / len(weights))
            place += len(segment)
        if config.segment_scale == "standardised":
            means, alone = ((np.asarray(vector) - np.mean(vector)) / np.std(vector) for vector in (means, alone))
        a, p = ([math.exp(v - max(vector)) for v in vector] for vector in (means, alone))
        dot = sum(x * y for x, y in zip(a, p, strict=True))
        found["cas"] = dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in p))
        return found


def slow_combination(parts, alpha, percentile):
    def scaled(name):
        values = [part[name] for part in parts]
        top = float(np.percentile(values, percentile))
        values = [min(value, top) for value in values]
        return [(value - min(values)) / (max(values) - min(values)) for value in values]

    def soft(values):
        return [math.exp(value) / sum(map(math.exp, values)) for value in values]

    gaps = [short - long for short, long in zip(scaled("ppl_short"), scaled("ppl_long"), strict=True)]
    hmg, cas = soft(gaps), soft([part["cas"] for part in parts])
    return hmg, [alpha * h + (1 - alpha) * c for h, c in zip(hmg, cas, strict=True)]


# Raw attention means are so small that their softmax hides an error in them; standardised ones show it.
@pytest.mark.parametrize("segment_scale", ["softmax", "standardised"])
def test_scores_are_those_of_a_plain_computation(models, tmp_path, segment_scale):
    chats, config = good_chats(), CONFIG.model_copy(update={"segment_scale": segment_scale})
    data = run_stage(gateau, config, {"chats": write_chats(tmp_path / "chats", chats), **models}, tmp_path / "out")
    gateau.check(config, data)
    found = read_scores(data).to_pylist()
    slow = Slow(models, config)
    parts = [slow.score(turns) for turns in chats.values()]
    hmg, scores = slow_combination(parts, CONFIG.alpha, CONFIG.clip_percentile)
    assert [row["sample_id"] for row in found] == list(chats)
    for row, part, guidance, score in zip(found, parts, hmg, scores, strict=True):
        expected = {**part, "hmg": guidance, "score": score}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-4), (row["sample_id"], name)
    counts = read_artifact(data).counts
    cut = [slow.tokens(turns) for turns in chats.values()]
    num_cut = [max(0, 1 + sum(map(len, pieces)) - CONFIG.max_tokens) for pieces in cut]
    assert counts["num_cut_tokens"] == sum(num_cut) > 0
    assert counts["num_cut_samples"] == sum(n > 0 for n in num_cut) < len(chats)
    assert counts["num_cut_instructions"] == sum(len(pieces[2]) > 12 for pieces in cut) > 0
    assert counts["num_cut_responses"] == sum(len(pieces[4]) > 12 for pieces in cut) > 0
    assert counts["num_in"] == counts["num_scored"] == len(chats)


def test_chats_that_cannot_be_scored_are_counted_by_reason(models, tmp_path):
    long = words(40)
    chats = good_chats() | {
        "x/turns": [*exchange(long, "go on", "yes"), ("user", "more")],
        "x/order": [("assistant", "hello")],
        "x/context": [("user", "just a question\n\n"), ("assistant", "yes")],
        "x/response": exchange(long, "go on", " \n"),
        "x/null": [("user", None), ("assistant", None)],
        "x/room": exchange(long, "go on", words(250)),
        "x/segment": exchange("a", "go on", "yes"),
    }
    data = run_stage(gateau, CONFIG, {"chats": write_chats(tmp_path / "chats", chats), **models}, tmp_path / "out")
    counts = read_artifact(data).counts
    assert {name: n for name, n in counts.items() if name.startswith("num_dropped_")} == {
        "num_dropped_not_one_exchange": 2,
        "num_dropped_no_context": 2,
        "num_dropped_no_response": 1,
        "num_dropped_no_room": 1,
        "num_dropped_one_segment": 1,
    }
    assert counts["num_in"] == 14 and counts["num_scored"] == 7


@pytest.mark.parametrize("shard_records", [1, 2, 100])
def test_scores_do_not_depend_on_how_the_chats_are_cut_into_shards(models, tmp_path, shard_records):
    chats = dict(list(good_chats().items())[:3])
    tables = []
    for records in (3, shard_records):
        folder = write_chats(tmp_path / f"chats{records}-{len(tables)}", chats, shard_records=records)
        out = run_stage(gateau, CONFIG, {"chats": folder, **models}, tmp_path / f"out{len(tables)}")
        tables.append(read_scores(out))
    assert tables[0].equals(tables[1])


def test_both_parts_weigh_on_the_score():
    rng = np.random.default_rng(3)
    short, long, cas = rng.lognormal(2, 1, 1000), rng.lognormal(2, 1, 1000), rng.uniform(0.9, 1, 1000)
    for scale in ("ranks", "standardised"):
        config = GateauConfig(scale=scale, alpha=0.5)
        hmg, score = gateau.combine(config, short, long, cas)
        assert np.corrcoef(score, hmg)[0, 1] > 0.6 and np.corrcoef(score, cas)[0, 1] > 0.6
    hmg, score = gateau.combine(GateauConfig(alpha=1.0), short, long, cas)
    assert score.tolist() == hmg.tolist()


def test_one_outlier_and_equal_perplexities_leave_the_others_apart():
    long, cas = np.full(200, 5.0), np.full(200, 0.5)
    short = np.append(np.linspace(1, 2, 199), 1e12)
    hmg, score = gateau.combine(GateauConfig(), short, long, cas)
    assert np.isfinite(score).all() and hmg[150] / hmg[0] > 1.5
    plain, _ = gateau.combine(GateauConfig(clip_percentile=100), short, long, cas)
    assert plain[150] / plain[0] < 1.0001
    assert gateau.combine(GateauConfig(perplexity_scale="ranks"), short, long, cas)[0][150] / hmg[0] > 1.5


def test_raw_softmax_hides_attention_and_the_standardised_one_does_not():
    perplexities = np.linspace(5, 6, 100)
    aligned, opposed = np.linspace(0.001, 0.002, 100), np.linspace(0.002, 0.001, 100)

    def both(scale):
        return [gateau.contextual_awareness(a, perplexities, scale) for a in (aligned, opposed)]

    raw, standardised = both("softmax"), both("standardised")
    assert raw[0] - raw[1] < 1e-3
    assert standardised[0] == pytest.approx(1) and standardised[1] < 0.6


def test_the_response_is_found_by_tokens_where_the_context_holds_its_heading(models):
    encoder = TextEncoder(models["short_model"])
    response = words(5)
    context = "### Response: wrong\n\n ### Response: wrong again"
    found = lay_out(LongExchange(context + "\n\n", "go on", response), encoder)
    tokenizer = AutoTokenizer.from_pretrained(models["short_model"])
    assert tokenizer.decode(found.response).strip() == response
    assert tokenizer.decode(found.context).startswith("### Input:### Response: wrong")
    text = f"### Input:{context}\n\n\n\n ### Instruction: go on\n\n ### Response: {response}"
    assert len(found) == len(encoder.encode(text).ids)


@pytest.mark.parametrize(
    "user, context, instruction",
    [("c\n\nx", "c\n\n", "x"), ("c\r\n\r\nx \n\n", "c\r\n\r\n", "x"), ("a\n\nb\n \t\nx\ny", "a\n\nb\n \t\n", "x\ny")],
)
def test_the_instruction_is_the_last_block(user, context, instruction):
    found = LongExchange.of([{"role": "user", "content": user}, {"role": "assistant", "content": "r"}])
    assert (found.context, found.instruction) == (context, instruction)
    with pytest.raises(UnusableError, match="no_context"):
        LongExchange.of([{"role": "user", "content": "\n\n" + instruction}, {"role": "assistant", "content": "r"}])


def test_bad_inputs_are_named(models, tmp_path):
    chats = write_chats(tmp_path / "chats", {"x/a": exchange("a", "go on", "yes")})
    with pytest.raises(ValueError, match=r"no chat of .* can be scored: .*num_dropped_one_segment': 1"):
        run_stage(gateau, CONFIG, {"chats": chats, **models}, tmp_path / "out1")
    with pytest.raises(ValueError, match=r"long reads 256 tokens, but 1000 are wanted: lower max_tokens"):
        run_stage(gateau, CONFIG.model_copy(update={"max_tokens": 1000}), {"chats": chats, **models}, tmp_path / "out2")
    other = AutoTokenizer.from_pretrained(models["short_model"])
    other.add_tokens(["<|new|>"])
    folder = write_judge(tmp_path / "short")
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="slot long_model lacks tokens of slot short_model"):
        run_stage(gateau, CONFIG, {"chats": chats, **models, "short_model": folder}, tmp_path / "out3")


def test_passes_over_different_samples_do_not_join():
    short = scores_table(["a", "b"], ["s", "s"], {"ppl_short": [1, 2]})
    long = scores_table(["a", "c"], ["s", "s"], {"ppl_long": [1, 2]})
    with pytest.raises(ValueError, match="scored different samples, such as 'b'"):
        gateau.join_parts(short, long)
