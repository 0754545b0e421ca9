"""Information gain: the oracle against a step by hand, the learner, and the scores."""

import numpy as np
import pyarrow as pa
import pytest
from judges import SENTENCE, judge_texts, write_judge
from row_invariants import run_stage, tokenizer_info, write_documents, write_tokens

from ropewalk.stages.data.selection import information_gain
from ropewalk.stages.data.selection.information_gain import (
    GainOracle,
    InformationGainConfig,
    heldout_count,
    measured_candidates,
    rank_correlation,
)
from ropewalk.stages.data.vocabulary import load_tokenizer, tokenizer_digest
from ropewalk.stages.schema import read_artifact, read_table, write_shard

TEXTS = judge_texts()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("model"), sharpness=0.1)


def windows(model, num_windows, length=12):
    tokenizer = load_tokenizer(model)
    return [tokenizer(text, add_special_tokens=False).input_ids[:length] for text in TEXTS[:num_windows]]


def gain_by_hand(folder, window, objective, make, max_norm):
    """One step of a stock optimizer in float64, the model loaded anew."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def loss(ids):
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return -torch.stack([logs[place - 1, ids[place]] for place in range(1, len(ids))]).mean()

    def objective_loss():
        with torch.no_grad():
            return float(torch.stack([loss(ids) for ids in objective]).mean())

    before = objective_loss()
    loss(window).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    for parameter in model.parameters():
        parameter.grad *= min(1, max_norm / float(norm))
    make(torch, model.parameters()).step()
    return before - objective_loss()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_oracle_is_the_drop_of_the_objectives_loss_after_one_step(model, optimizer):
    objective, candidates = windows(model, 6), windows(model, 12)[6:]
    rate = 2e-3 if optimizer == "adam" else 0.05
    config = InformationGainConfig(optimizer=optimizer, learning_rate=rate, max_gradient_norm=0.7)
    oracle = GainOracle(config, model, objective)
    base = oracle.objective_loss()
    for window in candidates:
        make = {
            "adam": lambda torch, parameters: torch.optim.Adam(parameters, lr=rate),
            "sgd": lambda torch, parameters: torch.optim.SGD(parameters, lr=rate),
        }[optimizer]
        expected = gain_by_hand(model, window, objective, make, 0.7)
        assert oracle.gain(window) == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert oracle.objective_loss() == base, "the model must be put back"


def test_gains_do_not_depend_on_what_was_measured_before(model):
    objective, candidates = windows(model, 3), windows(model, 8)[3:]
    config = InformationGainConfig(learning_rate=1e-3)
    forth = GainOracle(config, model, objective)
    back = GainOracle(config, model, objective)
    assert [forth.gain(w) for w in candidates] == [back.gain(w) for w in candidates[::-1]][::-1]


def corpus(num_documents):
    """Documents of the objective's words and of others, by turns."""
    rng = np.random.default_rng(0)
    words, letters = SENTENCE.split(), list("qxzjkvwy")
    texts = {}
    for number in range(num_documents):
        picked = rng.choice(words, 30) if number % 2 else ["".join(rng.choice(letters, 4)) for _ in range(30)]
        texts[f"{'near' if number % 2 else 'far'}{number:03d}"] = " ".join(picked)
    return texts


CONFIG = {
    "context_tokens": 16,
    "num_objective": 8,
    "num_oracle": 60,
    "learning_rate": 1e-3,
    "learner_learning_rate": 1e-3,
    "learner_epochs": 8,
    "learner_batch": 16,
    "heldout_fraction": 0.25,
}


def test_the_learner_finds_the_candidates_that_help(tmp_path, model):
    texts = corpus(160) | {"tiny": "a"}
    inputs = {
        "model": model,
        "objective": write_documents(tmp_path / "objective", {f"o{n}": text for n, text in enumerate(TEXTS)}),
        "candidates": write_documents(tmp_path / "candidates", texts),
    }
    data = run_stage(information_gain, InformationGainConfig(**CONFIG), inputs, tmp_path / "run")
    information_gain.check(None, data)
    scores = {row["sample_id"]: row["score"] for row in read_table(data, "scores").to_pylist()}
    assert set(scores) == set(texts) - {"tiny"}
    oracle = {row["sample_id"]: row["gain"] for row in read_table(data, "oracle").to_pylist()}
    artifact = read_artifact(data)
    assert len(oracle) == artifact.counts["num_measured"] == 60
    assert artifact.counts["num_dropped_too_short"] == 1 and artifact.counts["num_objective"] == 8
    assert np.isclose(artifact.details["gain_mean"], np.mean(list(oracle.values())))
    best = sorted(scores, key=lambda name: -scores[name])[:80]
    unmeasured = [name for name in best if name not in oracle]
    assert np.mean([name.startswith("near") for name in unmeasured]) > 0.9
    assert artifact.details["heldout_correlation"] > 0.3
    assert artifact.details["selection_rule"]["first_least_score"] == 1.0
    again = run_stage(information_gain, InformationGainConfig(**CONFIG), inputs, tmp_path / "again")
    for path in sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file()):
        assert (data / path).read_bytes() == (again / path).read_bytes(), path


def test_tokens_are_read_if_they_are_the_models(tmp_path, model):
    tokenizer = load_tokenizer(model)
    texts = corpus(12)
    ids = {name: tokenizer(text, add_special_tokens=False).input_ids for name, text in texts.items()}
    info = tokenizer_info(digest=tokenizer_digest(model), vocab_size=len(tokenizer))
    documents = write_documents(tmp_path / "documents", texts)
    tokens = write_tokens(tmp_path / "tokens", ids, info)
    config = InformationGainConfig(**CONFIG | {"num_objective": 2, "learner_epochs": 1})
    results = [
        run_stage(information_gain, config, {"model": model, "objective": slot, "candidates": slot}, tmp_path / name)
        for name, slot in (("1", documents), ("2", tokens))
    ]
    found = [{row["sample_id"]: row["score"] for row in read_table(data, "scores").to_pylist()} for data in results]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    others = write_tokens(tmp_path / "others", ids)
    with pytest.raises(ValueError, match="slot candidates was encoded by another tokenizer"):
        slots = {"model": model, "objective": documents, "candidates": others}
        run_stage(information_gain, config, slots, tmp_path / "3")


def test_bad_input_is_refused(tmp_path, model):
    config = InformationGainConfig(**CONFIG)
    good = write_documents(tmp_path / "good", corpus(12))
    same = write_documents(tmp_path / "same", {f"d{n}": "q" * 16 for n in range(9)})
    short = write_documents(tmp_path / "short", {f"d{n}": "q" for n in range(9)})

    def run(number, objective, candidates, config=config):
        inputs = {"model": model, "objective": objective, "candidates": candidates}
        run_stage(information_gain, config, inputs, tmp_path / number)

    with pytest.raises(ValueError, match="all 9 measured candidates have one information gain: deduplicate"):
        run("1", good, same)
    with pytest.raises(ValueError, match="no document of slot objective has context_tokens 16 tokens"):
        run("2", short, good)
    with pytest.raises(ValueError, match="slot candidates has 0 documents of context_tokens 16 tokens"):
        run("3", good, short)
    with pytest.raises(ValueError, match=r"slot objective takes documents or tokens, but .* holds scores"):
        import shutil

        shutil.copytree(good, tmp_path / "scores")
        path = tmp_path / "scores" / "artifact.json"
        path.write_text(path.read_text().replace('"documents"', '"scores"'))
        run("4", tmp_path / "scores", good)
    with pytest.raises(ValueError, match=r"information gain is (nan|-?inf): lower learning_rate"):
        run("5", good, good, InformationGainConfig(**CONFIG | {"learning_rate": 1e30}))
    with pytest.raises(ValueError, match="diverged: lower learner_learning_rate"):
        run("6", good, good, InformationGainConfig(**CONFIG | {"learner_learning_rate": 1e20}))


def test_measured_candidates_are_drawn_by_id_and_seed(tmp_path):
    names = [f"s{number}" for number in range(50)]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, part in zip(folders, (names[:20], names[20:]), strict=True):
        windows = pa.array([[int(name[1:])] for name in part], pa.list_(pa.int32()))
        write_shard(folder, "windows", 0, pa.table({"sample_id": part, "window": windows}))
    config = InformationGainConfig(num_oracle=10)
    drawn, found = measured_candidates(config, folders)
    assert found == [[int(name[1:])] for name in drawn] and len(set(drawn)) == 10
    assert measured_candidates(config, folders[::-1]) == (drawn, found)
    other, _ = measured_candidates(InformationGainConfig(num_oracle=10, seed=1), folders)
    assert set(other) != set(drawn)


def test_a_shard_of_short_documents_only_scores_nothing(tmp_path, model):
    texts = corpus(12)
    documents = write_documents(tmp_path / "documents", texts)
    short = write_documents(tmp_path / "short", {"tiny": "a"})
    (short / "documents-00000.parquet").rename(documents / "documents-00001.parquet")
    inputs = {"model": model, "objective": documents, "candidates": documents}
    data = run_stage(information_gain, InformationGainConfig(**CONFIG), inputs, tmp_path / "run")
    assert read_artifact(data).counts["num_scored"] == 12
    (data / "oracle-00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"has no oracle-\*"):
        information_gain.check(None, data)


def test_some_pairs_are_always_held_out_and_some_are_not():
    assert heldout_count(InformationGainConfig(), 4) == 1
    assert heldout_count(InformationGainConfig(heldout_fraction=0.99), 4) == 3
    assert heldout_count(InformationGainConfig(), 10_000) == 1000


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    some, others = rng.integers(0, 5, 40).astype(float), rng.normal(size=40)
    assert rank_correlation(some, others) == pytest.approx(spearmanr(some, others).statistic)
    assert rank_correlation(np.ones(3), np.arange(3.0)) == 0


def test_the_best_epoch_of_the_learner_is_returned():
    import torch

    from ropewalk.stages.data.selection.gain_learner import Pairs, Training, train

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(30, 8, generator=generator)
    ids = torch.randint(0, 30, (80, 6), generator=generator)
    gains = torch.randn(80, generator=generator, dtype=torch.float64)
    # Noise cannot be learnt: after some epochs of a high rate the held-out error grows.
    state = torch.get_rng_state()
    learner, errors = train(
        embeddings, Training(1e-2, 12, 8, 0), Pairs(ids[:60], gains[:60]), Pairs(ids[60:], gains[60:])
    )
    assert torch.equal(torch.get_rng_state(), state), "others' random numbers are left alone"
    assert len(errors) == 12 and min(errors) < errors[-1]
    found = float((learner.predict(ids[60:]) - gains[60:]).square().mean())
    assert found == pytest.approx(min(errors))
