"""Killed stages go on where they stopped, and the order in which workers finish changes nothing."""

import random

import pytest
from cleaning_corpus import file_bytes, write_corpus, write_token_corpus

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data import upsample
from ropewalk.stages.data.cleaning import decontaminate, deduplicate, describe, filter_documents
from ropewalk.stages.data.cleaning.decontaminate import DecontaminateConfig
from ropewalk.stages.data.cleaning.deduplicate import DeduplicateConfig
from ropewalk.stages.data.cleaning.describe import DescribeConfig
from ropewalk.stages.data.cleaning.filter_documents import FilterDocumentsConfig
from ropewalk.stages.data.upsample import UpsampleConfig

CASES = {
    "deduplicate": (deduplicate, DeduplicateConfig(num_permutations=16, threshold=0.7), "documents"),
    "decontaminate": (decontaminate, DecontaminateConfig(common_documents=5), "documents"),
    "filter_documents": (filter_documents, FilterDocumentsConfig(drop_most_repetitive_fraction=0.2), "documents"),
    "describe": (describe, DescribeConfig(), "documents"),
    "upsample": (upsample, UpsampleConfig(min_long_tokens=30, short_keep_fraction=0.5), "tokens"),
}


class KilledError(Exception):
    """The stage's process dies."""


class DyingContext(LocalContext):
    """Dies after so many items of work."""

    items_left = 0

    def map(self, function, items, *, resources=None):
        for result in super().map(function, items, resources=resources):
            if not self.items_left:
                raise KilledError
            self.items_left -= 1
            yield result


class BackwardContext(LocalContext):
    """Works on the last item first."""

    def map(self, function, items, *, resources=None):
        items = list(items)
        return iter(list(super().map(function, items[::-1], resources=resources))[::-1])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    documents = {}
    for number in range(24):
        words = [f"w{rng.randrange(500)}" for _ in range(rng.randrange(20, 90))]
        documents[f"{'ab'[number % 2]}/{number}"] = " ".join(words)
    documents |= {f"a/copy{n}": documents["b/3"] + f" {n}" for n in range(3)}
    tokens = {name: [100] * len(text.split()) for name, text in documents.items()}
    question = {"bench/q": " ".join(documents["a/4"].split()[:15])}
    return {
        "documents": write_corpus(root / "documents", documents, shard_records=9),
        "tokens": write_token_corpus(root / "tokens", tokens, shard_records=9),
        "bench": write_corpus(root / "bench", question),
    }


def run(stage, config, inputs, folder, context):
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed):
        path.mkdir(parents=True)
    context.work.mkdir(exist_ok=True)
    stage.run(config, inputs, output, context)
    return file_bytes(output.data)


@pytest.mark.parametrize("name", list(CASES))
def test_killed_stages_give_the_same_bytes_when_they_go_on(name, inputs, tmp_path):
    stage, config, slot = CASES[name]
    mine = {slot: inputs[slot], **({"bench": inputs["bench"]} if stage is decontaminate else {})}
    whole = run(stage, config, mine, tmp_path / "whole", LocalContext(tmp_path / "work-whole"))
    backward = run(stage, config, mine, tmp_path / "backward", BackwardContext(tmp_path / "work-backward"))
    assert backward == whole
    work = tmp_path / "work"
    kills = 0
    for attempt in range(60):
        context = DyingContext(work)
        context.items_left = 1
        try:
            assert run(stage, config, mine, tmp_path / f"attempt{attempt}", context) == whole
            break
        except KilledError:
            kills += 1
    else:
        raise AssertionError("the stage never ended")
    assert kills
