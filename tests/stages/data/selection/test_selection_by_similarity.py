"""Diversify, represent and SMART on artifacts, against plain computations."""

import numpy as np
import pytest
from row_invariants import run_stage, write_documents
from selected_samples import kept_ids, turns, write_chats, write_score_table, write_vectors

from ropewalk.stages.context import LocalContext, Output, is_class
from ropewalk.stages.data.retrieval import embed
from ropewalk.stages.data.retrieval.embed import EmbedConfig
from ropewalk.stages.data.selection import chat_texts, diversify, represent, smart
from ropewalk.stages.data.selection.chat_texts import ChatTextsConfig
from ropewalk.stages.data.selection.diversify import DiversifyConfig
from ropewalk.stages.data.selection.represent import RepresentConfig
from ropewalk.stages.data.selection.smart import SmartConfig, capped_quotas, taylor_shares
from ropewalk.stages.schema import read_artifact, read_table


def drawn(num_samples, num_dimensions=4, seed=0):
    """`{sample_id: half-precision vector}` and scores, some of them equal."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_samples, num_dimensions)).astype(np.float16)
    scores = np.round(rng.normal(size=num_samples), 1)
    names = [f"s{number:03d}" for number in rng.permutation(num_samples)]
    return dict(zip(names, vectors, strict=True)), dict(zip(names, scores.tolist(), strict=True))


def unit(vectors):
    rows = np.array(list(vectors.values()), dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def slots(folder, vectors, scores=None, sources=None):
    """Input artifacts; Vectors lie in another order than the samples."""
    inputs = {
        "samples": write_chats(folder / "chats", {name: turns(name, "answer") for name in vectors}, sources),
        "vectors": write_vectors(folder / "vectors", dict(sorted(vectors.items(), reverse=True))),
    }
    return inputs | ({"scores": write_score_table(folder / "scores", scores)} if scores else {})


def test_diversify_is_the_greedy_walk_in_order_of_score(tmp_path):
    vectors, scores = drawn(150)
    data = run_stage(diversify, DiversifyConfig(max_similarity=0.6), slots(tmp_path, vectors, scores), tmp_path / "run")
    names, units = list(vectors), unit(vectors)
    kept = []
    for number in sorted(range(150), key=lambda n: (-scores[names[n]], names[n])):
        if all(units[number] @ units[other] <= 0.6 for other in kept):
            kept.append(number)
    assert kept_ids(data) == [names[n] for n in sorted(kept)]
    assert 3 < len(kept) < 100
    diversify.check(None, data)
    chats = read_table(data, "chats").to_pylist()
    assert all(chat["messages"][0]["content"] == chat["sample_id"] for chat in chats)


def test_diversify_stops_at_its_quota(tmp_path):
    vectors, scores = drawn(60)
    inputs = slots(tmp_path, vectors, scores)
    data = run_stage(diversify, DiversifyConfig(max_similarity=1, num_samples=5), inputs, tmp_path / "run")
    best = sorted(scores, key=lambda name: (-scores[name], name))[:5]
    assert sorted(kept_ids(data)) == sorted(best)
    assert read_artifact(data).counts["num_dropped_after_quota"] == 55
    assert read_artifact(data).details["lowest_score"] == scores[best[-1]]


def test_duplicates_only_leave_the_best_one(tmp_path):
    vectors = {f"s{number}": np.ones(3) for number in range(20)}
    scores = {name: float(number) for number, name in enumerate(vectors)}
    data = run_stage(diversify, DiversifyConfig(), slots(tmp_path, vectors, scores), tmp_path / "run")
    assert kept_ids(data) == ["s19"]
    assert read_artifact(data).counts["num_dropped_too_similar"] == 19


def test_one_sample_is_kept_by_every_method(tmp_path):
    inputs = slots(tmp_path, {"only": np.array([1.0, 2.0])}, {"only": 3.0})
    for stage, config in (
        (diversify, DiversifyConfig()),
        (represent, RepresentConfig()),
        (smart, SmartConfig(num_samples=1)),
    ):
        assert kept_ids(run_stage(stage, config, inputs, tmp_path / stage.NAME)) == ["only"]


def test_zero_vectors_and_missing_scores_are_counted(tmp_path):
    vectors = {"a": [1, 0], "b": [0, 0], "c": [0, 1], "d": [1, 1]}
    inputs = slots(tmp_path, vectors, {"a": 1.0, "b": 2.0, "c": 0.0})
    data = run_stage(diversify, DiversifyConfig(), inputs, tmp_path / "diversify")
    assert kept_ids(data) == ["a", "c"]
    assert read_artifact(data).counts["num_dropped_zero_vector"] == 1
    assert read_artifact(data).counts["num_dropped_no_score"] == 1
    config = RepresentConfig(pool_fraction=1, fraction=1)
    data = run_stage(represent, config, inputs, tmp_path / "represent")
    assert kept_ids(data) == ["a", "c"]
    assert read_artifact(data).counts["num_dropped_zero_vector"] == 1
    data = run_stage(smart, SmartConfig(num_samples=3), inputs, tmp_path / "smart")
    assert kept_ids(data) == ["a", "c", "d"]


def greedy_coverage(similar, budget):
    """Plain greedy facility location in float64."""
    chosen = []
    for _ in range(budget):
        values = [
            np.maximum(similar[:, [*chosen, j]].max(axis=1), 0).sum() if j not in chosen else -1
            for j in range(len(similar))
        ]
        chosen.append(int(np.argmax(values)))
    return chosen


def test_represent_covers_the_top_of_the_ranking(tmp_path):
    vectors, scores = drawn(100)
    config = RepresentConfig(pool_fraction=0.4, fraction=0.07, min_score=-0.5)
    data = run_stage(represent, config, slots(tmp_path, vectors, scores), tmp_path / "run")
    ranked = sorted((name for name in scores if scores[name] >= -0.5), key=lambda name: (-scores[name], name))
    pool = ranked[:40]
    units = unit({name: vectors[name] for name in pool})
    similar = 1 - np.linalg.norm(units[:, None] - units[None], axis=2) / 2
    expected = [pool[number] for number in greedy_coverage(similar, 7)]
    assert sorted(kept_ids(data)) == sorted(expected)
    counts = read_artifact(data).counts
    assert counts["num_dropped_low_score"] == 100 - len(ranked)
    assert counts["num_dropped_below_pool"] == len(ranked) - 40


def test_represent_splits_a_pool_into_parts_and_gives_each_its_share(tmp_path):
    vectors, scores = drawn(90)
    config = RepresentConfig(pool_fraction=1, fraction=0.2, part_samples=25)
    data = run_stage(represent, config, slots(tmp_path, vectors, scores), tmp_path / "run")
    assert len(kept_ids(data)) == 18
    assert read_artifact(data).details["num_parts"] == 4


class BackwardsContext(LocalContext):
    """Works through the items from the last to the first; gives results in item order."""

    def map(self, function, items, *, resources=None):
        build = function() if is_class(function) else function
        items = list(items)
        return iter([build(item) for item in items[::-1]][::-1])


@pytest.mark.parametrize("stage", [represent, smart], ids=lambda stage: stage.NAME)
def test_the_order_of_the_work_does_not_change_a_bit(tmp_path, stage):
    vectors, scores = drawn(120)
    sources = {name: f"t{number % 3}" for number, name in enumerate(vectors)}
    inputs = slots(tmp_path, vectors, scores, sources)
    config = SmartConfig(num_samples=40, part_samples=11)
    config = config if stage is smart else RepresentConfig(pool_fraction=1, fraction=0.3, part_samples=11)
    forth = run_stage(stage, config, inputs, tmp_path / "forth")
    output = Output(tmp_path / "back", tmp_path / "observed")
    for path in (output.data, output.observed, tmp_path / "work"):
        path.mkdir()
    stage.run(config, inputs, output, BackwardsContext(tmp_path / "work"))
    assert {path.name: path.read_bytes() for path in output.data.iterdir()} == {
        path.name: path.read_bytes() for path in forth.iterdir()
    }


def test_shares_are_those_of_their_decimal_spelling():
    assert represent.share_of(0.29, 100) == 29
    assert represent.share_of(0.001, 100) == 1


def test_represent_refuses_a_floor_above_all_scores(tmp_path):
    vectors, scores = drawn(5)
    with pytest.raises(ValueError, match="no score reaches min_score 99"):
        run_stage(represent, RepresentConfig(min_score=99), slots(tmp_path, vectors, scores), tmp_path / "run")
    with pytest.raises(ValueError, match=r"fraction 0\.5 is more than pool_fraction 0\.2"):
        RepresentConfig(fraction=0.5)


def tasks_by_hand(vectors, sources):
    """Means, graph cut gains and shares of all tasks, as SMART's paper has them."""
    units = dict(zip(vectors, unit(vectors), strict=True))
    names = sorted(set(sources.values()))
    means = np.array([np.mean([units[s] for s in sources if sources[s] == name], axis=0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    similar = means @ means.T
    chosen, gains = [], []
    for _ in names:
        values = {
            j: similar[j].sum() - 0.8 * sum(similar[j, i] for i in chosen) - 0.4 * similar[j, j]
            for j in range(len(names))
            if j not in chosen
        }
        best = max(values, key=lambda j: values[j])
        chosen.append(best)
        gains.append(values[best])
    shares = np.array([1 + g + g * g / 2 for g in gains])
    return [names[j] for j in chosen], gains, shares / shares.sum()


def test_smart_budgets_and_choices_follow_the_paper(tmp_path):
    vectors, _ = drawn(120, 6, seed=2)
    sources = {name: "abc"[number % 3] if number % 7 else "d" for number, name in enumerate(vectors)}
    data = run_stage(smart, SmartConfig(num_samples=30), slots(tmp_path, vectors, None, sources), tmp_path / "run")
    names, gains, shares = tasks_by_hand(vectors, sources)
    found = read_artifact(data).details["tasks"]
    assert [entry["task"] for entry in found] == names
    assert np.allclose([entry["gain"] for entry in found], gains, atol=1e-5)
    assert np.allclose([entry["share"] for entry in found], shares, atol=1e-6)
    assert all(abs(entry["num_samples"] - 30 * share) < 1 for entry, share in zip(found, shares, strict=True))
    kept = kept_ids(data)
    for entry in found:
        members = [name for name in vectors if sources[name] == entry["task"]]
        units = unit({name: vectors[name] for name in members})
        expected = {members[n] for n in greedy_coverage(units @ units.T, entry["num_samples"])}
        assert {name for name in kept if sources[name] == entry["task"]} == expected


def test_smart_takes_some_tasks_of_many(tmp_path):
    vectors, _ = drawn(100, seed=3)
    sources = {name: f"t{number % 10}" for number, name in enumerate(vectors)}
    config = SmartConfig(num_samples=12, num_tasks=4, part_samples=4)
    data = run_stage(smart, config, slots(tmp_path, vectors, None, sources), tmp_path / "run")
    kept = kept_ids(data)
    assert len(kept) == 12
    names, _, _ = tasks_by_hand(vectors, sources)
    assert {sources[name] for name in kept} <= set(names[:4])
    assert read_artifact(data).counts["num_dropped_task"] == 60


def test_chats_are_embedded_and_selected(tmp_path):
    topics = ["rope yarn hemp strand", "ship mast sail harbour", "bread oven flour yeast"]
    chats = {f"s{n:02d}": turns(topics[n % 3], f"{topics[n % 3]} answer {n // 3}") for n in range(12)}
    chats["silent"] = turns(" ", "")
    samples = write_chats(tmp_path / "chats", chats, {name: f"t{n % 2}" for n, name in enumerate(chats)})
    documents = run_stage(chat_texts, ChatTextsConfig(words="prompts"), {"chats": samples}, tmp_path / "texts")
    config = EmbedConfig(encoder="hashed", num_dimensions=32)
    vectors = run_stage(embed, config, {"documents": documents}, tmp_path / "embed")
    scores = write_score_table(tmp_path / "scores", {name: float(n) for n, name in enumerate(chats)})
    inputs = {"samples": samples, "vectors": vectors, "scores": scores}
    data = run_stage(diversify, DiversifyConfig(), inputs, tmp_path / "diversify")
    assert kept_ids(data) == ["s09", "s10", "s11"], "the best of each topic"
    assert read_artifact(data).counts["num_dropped_zero_vector"] == 1
    del inputs["scores"]
    data = run_stage(smart, SmartConfig(num_samples=6), inputs, tmp_path / "smart")
    topics_kept = {name: int(name[1:]) % 3 for name in kept_ids(data)}
    assert set(topics_kept.values()) == {0, 1, 2}


def test_smart_reads_documents(tmp_path):
    vectors, _ = drawn(20)
    inputs = {
        "samples": write_documents(tmp_path / "documents", {name: name * 3 for name in vectors}),
        "vectors": write_vectors(tmp_path / "vectors", vectors),
    }
    data = run_stage(smart, SmartConfig(num_samples=6), inputs, tmp_path / "run")
    smart.check(None, data)
    assert len(kept_ids(data)) == 6
    assert read_artifact(data).counts["num_kept_bytes"] == 6 * 12


def test_quotas_beyond_what_a_task_has_go_to_the_others():
    available = {"a": 3, "b": 100, "c": 100}
    assert capped_quotas({"a": 0.5, "b": 0.3, "c": 0.2}, available, 53) == {"a": 3, "b": 30, "c": 20}
    assert capped_quotas({"a": 0.5, "b": 0.3, "c": 0.2}, available, 203) == available
    with pytest.raises(ValueError, match="num_samples is 204, but the chosen tasks have 203"):
        capped_quotas({"a": 0.5, "b": 0.3, "c": 0.2}, available, 204)
    assert taylor_shares([0, 2]) == [1 / 6, 5 / 6]


@pytest.mark.parametrize("stage", [diversify, represent, smart], ids=lambda stage: stage.NAME)
def test_vectors_that_are_not_numbers_or_not_of_these_samples_are_refused(tmp_path, stage):
    vectors, scores = drawn(30)
    config = SmartConfig(num_samples=5) if stage is smart else RepresentConfig(pool_fraction=1, fraction=0.5)
    config = DiversifyConfig() if stage is diversify else config
    good = slots(tmp_path, vectors, scores)
    bad = dict(vectors) | {"s007": np.array([np.nan, 1, 2, 3])}
    inputs = good | {"vectors": write_vectors(tmp_path / "nan", bad)}
    with pytest.raises(ValueError, match="the vector of 's007' holds NaN"):
        run_stage(stage, config, inputs, tmp_path / "run1")
    others = {f"other{number}": vector for number, vector in enumerate(vectors.values())}
    inputs = good | {"vectors": write_vectors(tmp_path / "others", others)}
    with pytest.raises(ValueError, match=r"no vector of sample .* \(30 of 30 lack one\): embed the same samples"):
        run_stage(stage, config, inputs, tmp_path / "run2")
    inputs = good | {"vectors": write_vectors(tmp_path / "zero", {name: np.zeros(4) for name in vectors})}
    with pytest.raises(ValueError, match=r"zero vectors alone|0 sources with vectors"):
        run_stage(stage, config, inputs, tmp_path / "run3")
    inputs = good | {"samples": tmp_path / "vectors"}
    with pytest.raises(ValueError, match="slot samples takes chats or documents"):
        run_stage(stage, config, inputs, tmp_path / "run4")


def test_scores_of_other_samples_are_refused(tmp_path):
    vectors, scores = drawn(10)
    inputs = slots(tmp_path, vectors, scores | {"stranger": 1.0})
    with pytest.raises(ValueError, match=r"slot scores has sample 'stranger', which slot samples lacks \(1 of 11\)"):
        run_stage(diversify, DiversifyConfig(), inputs, tmp_path / "run")


def test_samples_that_occur_twice_are_refused(tmp_path):
    vectors, scores = drawn(10)
    inputs = slots(tmp_path, vectors, scores)
    twice = write_chats(tmp_path / "twice", {"s001": turns("a", "b")})
    (twice / "chats-00000.parquet").rename(inputs["samples"] / "chats-00009.parquet")
    with pytest.raises(ValueError, match="slot samples has sample 's001' twice"):
        run_stage(diversify, DiversifyConfig(), inputs, tmp_path / "run")


def test_a_selection_whose_counts_are_wrong_is_not_committed(tmp_path):
    vectors, scores = drawn(10)
    data = run_stage(diversify, DiversifyConfig(), slots(tmp_path, vectors, scores), tmp_path / "run")
    text = (data / "artifact.json").read_text()
    (data / "artifact.json").write_text(text.replace('"num_kept": ', '"num_kept": 9'))
    with pytest.raises(ValueError, match=r"counts\.num_kept is 9"):
        diversify.check(None, data)
