import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import SENTENCE, write_judge
from pydantic import ValidationError
from row_invariants import run_stage, tokenizer_info, write_documents, write_tokens
from scipy import special, stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropewalk.stages.checkpoint import tokenizer_digest
from ropewalk.stages.data.selection import ladm, long_attn, perplexity_gap
from ropewalk.stages.data.selection.ladm import LadmConfig
from ropewalk.stages.data.selection.long_attn import LongAttnConfig
from ropewalk.stages.data.selection.perplexity_gap import PerplexityGapConfig, draw_pairs, draw_segments, specificity
from ropewalk.stages.data.selection.scores import read_scores
from ropewalk.stages.schema import Artifact, read_artifact, write_artifact

GAP = PerplexityGapConfig(segment_tokens=6, max_segments=8, num_pairs=12, threshold=0.01, batch_tokens=40)
LADM = LadmConfig(chunk_tokens=4, interval_chunks=2, stride_chunks=3, min_spans=3, max_tokens=100)
LONG = LongAttnConfig(max_tokens=60, num_layers=2, min_tokens=12)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("models") / "judge", seed=5)


@pytest.fixture(scope="module")
def stock(judge):
    return AutoModelForCausalLM.from_pretrained(judge, dtype=torch.float64, attn_implementation="eager")


def documents():
    rng = np.random.default_rng(2)
    lengths = {"a": 12, "b": 40, "c": 90, "d": 130, "e": 70, "f": 3}
    return {name: " ".join(rng.choice(SENTENCE.split(), length)) for name, length in lengths.items()}


def encode(judge, text, *, begin):
    tokenizer = AutoTokenizer.from_pretrained(judge)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if begin else ids


def score(stage, config, judge, tmp_path, *, texts=None, name="out"):
    inputs = {"documents": write_documents(tmp_path / f"{name}-documents", texts or documents()), "model": judge}
    data = run_stage(stage, config, inputs, tmp_path / name)
    stage.check(config, data)
    return data


def losses(stock, ids):
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-logits[place - 1, ids[place]].item() for place in range(1, len(ids))]


def attentions(stock, ids):
    with torch.no_grad():
        return [layer[0].numpy() for layer in stock(torch.tensor([ids]), output_attentions=True).attentions]


def slow_gap(stock, config, name, ids):
    segments = draw_segments(config, name, ids)
    pairs = draw_pairs(config, name, len(segments))
    alone = [math.exp(np.mean(losses(stock, segment))) for segment in segments]
    given_pair = {}
    for i, j in pairs:
        found = losses(stock, list(segments[j]) + list(segments[i]))
        given_pair[i, j] = math.exp(np.mean(found[-(config.segment_tokens - 1) :]))
    total = 0.0
    for i in range(len(segments)):
        logits = np.asarray([alone[i] - given_pair[i, j] for j in range(i) if (i, j) in given_pair])
        if not len(logits):
            continue
        specific = 1.0 if len(logits) == 1 else 1 - stats.entropy(special.softmax(logits)) / np.log(len(logits))
        for j in range(i):
            if (i, j) in given_pair:
                gap = (alone[i] - given_pair[i, j]) / alone[i]
                if gap > config.threshold:
                    total += (gap + (i - j) / (config.max_segments - 1)) * specific
    return total


def test_perplexity_gaps_are_those_of_a_plain_computation(tmp_path):
    # A milder model than the others: gaps of a few, so that specificities lie between 0 and 1.
    judge = write_judge(tmp_path / "mild", sharpness=0.02)
    stock = AutoModelForCausalLM.from_pretrained(judge, dtype=torch.float64, attn_implementation="eager")
    data = score(perplexity_gap, GAP, judge, tmp_path)
    found = {row["sample_id"]: row for row in read_scores(data).to_pylist()}
    assert list(found) == ["a", "b", "c", "d", "e"]
    for name, row in found.items():
        ids = encode(judge, documents()[name], begin=False)
        assert row["score"] == pytest.approx(slow_gap(stock, GAP, name, ids), rel=1e-4)
        assert row["num_tokens"] == len(ids)
    assert found["d"]["num_pairs"] == 12 and found["a"]["num_pairs"] < 12
    assert (
        found["d"]["score"] > 0
        and 0.1 < found["d"]["mean_specificity"] < 0.9
        and 0 < found["d"]["num_dependent_pairs"] < 12
    )
    counts = read_artifact(data).counts
    assert (counts["num_in"], counts["num_dropped_too_short"], counts["num_cut_tokens"]) == (6, 1, 0)
    mean = score(perplexity_gap, GAP.model_copy(update={"reduction": "mean"}), judge, tmp_path, name="mean")
    for row in read_scores(mean).to_pylist():
        sum_row = found[row["sample_id"]]
        assert row["score"] == pytest.approx(sum_row["score"] / sum_row["num_pairs"])


def test_a_segment_that_repeats_an_earlier_one_is_specific():
    assert specificity([5.0]) == 1.0
    assert specificity([2.0, 2.0, 2.0]) == pytest.approx(0.0, abs=1e-12)
    assert specificity([900.0, 0.0, 0.0]) == 1.0
    assert 0 < specificity([2.0, 1.0, 1.0]) < specificity([4.0, 1.0, 1.0]) < 1


@given(st.integers(2, 30), st.integers(1, 60), st.text(max_size=3))
@settings(deadline=None, max_examples=60)
def test_pairs_are_distinct_and_look_back(num_segments, num_pairs, doc_id):
    config = PerplexityGapConfig(num_pairs=num_pairs)
    pairs = draw_pairs(config, doc_id, num_segments)
    assert len(set(pairs)) == len(pairs) == min(num_pairs, num_segments * (num_segments - 1) // 2)
    assert all(0 <= earlier < later < num_segments for later, earlier in pairs)
    assert pairs == sorted(pairs) == draw_pairs(config, doc_id, num_segments)


def test_draws_reach_every_pair_and_depend_on_the_document():
    config = PerplexityGapConfig(num_pairs=40)
    drawn = [set(draw_pairs(config, f"d{number}", 12)) for number in range(30)]
    assert set().union(*drawn) == {(later, earlier) for later in range(12) for earlier in range(later)}
    assert drawn[0] != drawn[1]
    segments = draw_segments(GAP, "d", list(range(100)))
    assert len(segments) == 8 and segments == sorted(segments) and all(len(part) == 6 for part in segments)


def slow_ladm(stock, config, ids):
    """The chunks' own softmax from stock attention: eager weights of earlier keys, made to sum to 1 again."""
    length, chunk = len(ids), config.chunk_tokens
    interval, stride = chunk * config.interval_chunks, chunk * config.stride_chunks
    layers = []
    for weights in attentions(stock, ids):
        scores = []
        begin = length - chunk
        while begin > chunk + config.min_spans * interval:
            before = weights[:, begin : begin + chunk, :begin]
            before = (before / before.sum(-1, keepdims=True)).sum(1).mean(0)
            focus, distances, distance = [], [], interval
            while begin - distance >= chunk:
                focus.append(sum(before[begin - distance + step] for step in range(chunk)))
                distances.append(distance / length)
                distance += interval
            mean = sum(focus) / len(focus)
            std = math.sqrt(sum((value - mean) ** 2 for value in focus) / (len(focus) - 1))
            scores.append(sum(f * d for f, d in zip(focus, distances, strict=True)) * std * begin / length)
            begin -= stride
        layers.append(sum(scores) / len(scores))
    return sum(layers) / len(layers)


def test_ladm_is_that_of_a_plain_computation(judge, stock, tmp_path):
    data = score(ladm, LADM, judge, tmp_path)
    found = {row["sample_id"]: row for row in read_scores(data).to_pylist()}
    cut = 0
    for name, row in found.items():
        ids = encode(judge, documents()[name], begin=True)
        cut += max(0, len(ids) - LADM.max_tokens)
        ids = ids[: LADM.max_tokens]
        assert row["score"] == pytest.approx(slow_ladm(stock, LADM, ids), rel=1e-4)
        assert row["num_tokens"] == len(ids)
    counts = read_artifact(data).counts
    short = [n for n, text in documents().items() if len(encode(judge, text, begin=True)) < LADM.min_tokens]
    assert counts["num_cut_tokens"] == cut > 0 and counts["num_dropped_too_short"] == len(short) > 0
    assert sorted([*short, *found]) == sorted(documents())


def test_the_shortest_document_of_ladm_has_one_chunk():
    assert ladm.chunk_begins(LADM, LADM.min_tokens - 1) == []
    assert len(ladm.chunk_begins(LADM, LADM.min_tokens)) == 1
    published = LadmConfig()
    assert ladm.chunk_begins(published, 32_768)[0] == 32_640
    assert ladm.chunk_begins(published, 32_768)[1] == 32_640 - 512
    assert ladm.chunk_begins(published, 32_768)[-1] > 128 + 4 * 512


def slow_long_attn(stock, ids):
    length = len(ids)
    size = 3 * (length // 4)
    mask = np.zeros((length, length))
    mask[length - size :, :size] = np.tril(np.ones((size, size)))
    parts = []
    for weights in attentions(stock, ids):
        parts += [((head * mask).sum() / length, (head * mask).var(ddof=1)) for head in weights]
    return np.mean(parts, axis=0)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_long_attention_is_that_of_a_plain_computation(judge, stock, tmp_path, num_layers):
    config = LONG.model_copy(update={"num_layers": num_layers})
    data = score(long_attn, config, judge, tmp_path)
    found = read_scores(data).to_pylist()
    assert [row["sample_id"] for row in found] == ["a", "b", "c", "d", "e"]
    expected = []
    for row in found:
        ids = encode(judge, documents()[row["sample_id"]], begin=True)[: LONG.max_tokens]
        few = AutoModelForCausalLM.from_pretrained(
            judge, dtype=torch.float64, attn_implementation="eager", num_hidden_layers=num_layers
        )
        expected.append(slow_long_attn(few, ids))
        assert (row["dependency"], row["spread"]) == pytest.approx(tuple(expected[-1]), rel=1e-4)
    low, high = np.min(expected, axis=0), np.max(expected, axis=0)
    scaled = (np.asarray(expected) - low) / (high - low)
    assert [row["score"] for row in found] == pytest.approx((scaled[:, 0] - 0.5 * scaled[:, 1]).tolist(), abs=1e-3)
    assert read_artifact(data).counts["num_dropped_too_short"] == 1


def test_attention_that_goes_far_and_even_scores_best():
    dependency, spread = np.asarray([0.1, 0.5, 0.5]), np.asarray([0.0, 0.0, 1.0])
    assert long_attn.combine(LongAttnConfig(), dependency, spread).tolist() == [0.0, 1.0, 0.5]
    assert long_attn.combine(LongAttnConfig(), dependency[1:], np.zeros(2)).tolist() == [0.25, 0.25]


def test_far_attention_is_summed_in_blocks_as_it_is_at_once(judge, tmp_path, monkeypatch):
    whole = read_scores(score(long_attn, LONG, judge, tmp_path))
    monkeypatch.setattr("ropewalk.stages.data.selection.language_model._BLOCK_ELEMENTS", 700)
    parts = read_scores(score(long_attn, LONG, judge, tmp_path, name="blocks"))
    for name in ("dependency", "spread"):
        np.testing.assert_allclose(whole.column(name).to_numpy(), parts.column(name).to_numpy(), rtol=1e-6)


@pytest.mark.parametrize("stage, config", [(perplexity_gap, GAP), (ladm, LADM), (long_attn, LONG)])
def test_tokens_score_as_the_documents_they_were_made_of(judge, tmp_path, stage, config):
    expected = read_scores(score(stage, config, judge, tmp_path))
    ids = {name: encode(judge, text, begin=False) for name, text in documents().items()}
    tokens = write_tokens(tmp_path / "tokens", ids)
    write_artifact(tokens, Artifact(kind="tokens", tokenizer=tokenizer_info(digest=tokenizer_digest(judge))))
    found = read_scores(run_stage(stage, config, {"tokens": tokens, "model": judge}, tmp_path / "from-tokens"))
    for name in expected.schema.names:
        if name != "source":
            assert found.column(name).to_pylist() == expected.column(name).to_pylist()


def test_bad_inputs_are_named(judge, tmp_path):
    tokens = write_tokens(tmp_path / "tokens", {"a": [1] * 90})
    with pytest.raises(ValueError, match="slot tokens was encoded by another tokenizer than slot model's"):
        run_stage(ladm, LADM, {"tokens": tokens, "model": judge}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"slots model and one of documents, tokens, not \['model'\]"):
        run_stage(ladm, LADM, {"model": judge}, tmp_path / "b")
    with pytest.raises(ValueError, match=r"no document of .* can be scored: .*'num_dropped_too_short': 1"):
        score(ladm, LADM, judge, tmp_path, texts={"a": ""}, name="c")
    with pytest.raises(ValueError, match=r"reads 256 tokens, but 32768 are wanted"):
        score(long_attn, LongAttnConfig(), judge, tmp_path, name="d")
    with pytest.raises(ValueError, match=r"has 2 layers, not 5"):
        score(long_attn, LONG.model_copy(update={"num_layers": 5}), judge, tmp_path, name="e")
    with pytest.raises(ValidationError, match="max_tokens 100 is less than the 2305 that a chunk needs"):
        LadmConfig(max_tokens=100)
    with pytest.raises(ValidationError, match="less than two segments of 128"):
        PerplexityGapConfig(batch_tokens=200)


def test_a_model_that_overflows_is_an_error_not_a_score(tmp_path):
    import safetensors.torch as st_torch

    folder = write_judge(tmp_path / "broken")
    weights = st_torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    st_torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"a segment of document 'a' has the mean loss nan"):
        score(perplexity_gap, GAP, folder, tmp_path)
