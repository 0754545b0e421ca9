"""Stages that score with a model give the same bytes for any number of workers, in any order of work."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
from judges import SENTENCE, write_chats, write_judge
from row_invariants import run_stage, write_documents

from ropewalk.stages.context import LocalContext, Output, is_class
from ropewalk.stages.data.selection import gateau, ladm, long_attn, perplexity_gap, select_scored
from ropewalk.stages.data.selection.gateau import GateauConfig
from ropewalk.stages.data.selection.ladm import LadmConfig
from ropewalk.stages.data.selection.long_attn import LongAttnConfig
from ropewalk.stages.data.selection.perplexity_gap import PerplexityGapConfig
from ropewalk.stages.data.selection.select_scored import SelectConfig

STAGES = {
    "gateau": (gateau, GateauConfig(max_tokens=120, segment_tokens=16)),
    "perplexity_gap": (perplexity_gap, PerplexityGapConfig(segment_tokens=8, num_pairs=5, max_segments=6)),
    "ladm": (ladm, LadmConfig(chunk_tokens=4, interval_chunks=1, stride_chunks=1, max_tokens=60)),
    "long_attn": (long_attn, LongAttnConfig(max_tokens=50)),
}


@dataclass
class TwoWorkers(LocalContext):
    """Two workers, of which one takes the shards from the end; functions travel as they do between processes."""

    def map(self, function, items, *, resources=None):
        items = list(items)
        workers = [pickle.loads(pickle.dumps(function)) for _ in range(2)]
        workers = [worker() if is_class(worker) else worker for worker in workers]
        results = {}
        for number in reversed(range(len(items))):
            results[number] = workers[number % 2](items[number])
        return iter([results[number] for number in range(len(items))])


def run_with_two(stage, config, inputs, folder: Path):
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    stage.run(config, inputs, output, TwoWorkers(folder / "work"))
    return output.data


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    words = SENTENCE.split() * 9
    texts = {f"d{number}": " ".join(words[number : number + 20 + 15 * (number % 4)]) for number in range(7)}
    chats = {f"s/{name}": [("user", f"{text}\n\ngo on"), ("assistant", text[:20])] for name, text in texts.items()}
    documents = folder / "documents"
    for number, name in enumerate(texts):
        part = write_documents(folder / name, {name: texts[name]})
        documents.mkdir(exist_ok=True)
        (part / "documents-00000.parquet").rename(documents / f"documents-{number:05d}.parquet")
        (documents / "artifact.json").write_bytes((part / "artifact.json").read_bytes())
    return {
        "documents": documents,
        "model": write_judge(folder / "model"),
        "chats": write_chats(folder / "chats", chats, shard_records=1),
        "short_model": write_judge(folder / "short", seed=1, window=32),
        "long_model": write_judge(folder / "long", seed=2),
    }


@pytest.mark.parametrize("name", STAGES)
def test_two_workers_write_what_one_writes(inputs, tmp_path, name):
    stage, config = STAGES[name]
    slots = ("chats", "short_model", "long_model") if name == "gateau" else ("documents", "model")
    given = {slot: inputs[slot] for slot in slots}
    one, two = run_stage(stage, config, given, tmp_path / "one"), run_with_two(stage, config, given, tmp_path / "two")
    assert contents(one) == contents(two) and len(list(one.glob("scores-*"))) == 7
    table = slots[0]
    best = {"scores": one, table: inputs[table]}
    config = SelectConfig(num_samples=3)
    kept = [
        run_stage(select_scored, config, best, tmp_path / "best"),
        run_with_two(select_scored, config, best, tmp_path / "same"),
    ]
    assert contents(kept[0]) == contents(kept[1])
