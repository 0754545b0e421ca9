import json
import math
from collections import Counter

import pytest
from cleaning_corpus import file_bytes, write_corpus, write_token_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import run_stage

from ropewalk.stages.data.cleaning import describe
from ropewalk.stages.data.cleaning.describe import DescribeConfig
from ropewalk.stages.schema import Artifact, read_artifact, write_artifact

TEXTS = {"web/a": "x" * 5, "web/b": "y" * 8, "code/c": "é" * 8, "code/d": "", "web/e": "z\0" * 500}


def run(tmp_path, folder, slot="documents", name="out"):
    out = run_stage(describe, DescribeConfig(), {slot: folder}, tmp_path / name)
    describe.check(None, out)
    return out, json.loads((out / "statistics.json").read_text())


def test_documents_are_counted_by_source_and_length(tmp_path):
    out, report = run(tmp_path, write_corpus(tmp_path / "in", TEXTS))
    assert read_artifact(out, "report").counts == {
        "num_documents": 5,
        "num_bytes": 1029,
        "num_documents_with_nul_bytes": 1,
    }
    assert [(row["from"], row["to"], row["num_documents"], row["num_bytes"]) for row in report["by_length"]] == [
        (0, 0, 1, 0),
        (1, 1, 0, 0),
        (2, 3, 0, 0),
        (4, 7, 1, 5),
        (8, 15, 1, 8),
        (16, 31, 1, 16),
        *((2**k, 2 ** (k + 1) - 1, 0, 0) for k in range(5, 9)),
        (512, 1023, 1, 1000),
    ]
    web = report["by_source"]["web"]
    assert (web["num_documents"], web["num_bytes"], web["longest_bytes"]) == (3, 1013, 1000)
    assert web["quantiles_bytes"] == {"0.05": 5, "0.25": 5, "0.5": 8, "0.75": 1000, "0.95": 1000}
    assert report["by_source"]["code"]["bytes_fraction"] == 16 / 1029
    assert sum(row["bytes_fraction"] for row in web["by_length"]) == pytest.approx(1)
    assert (out.parent / "observed/lengths.png").read_bytes().startswith(b"\x89PNG")


@settings(deadline=None, max_examples=12)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=20), cut=st.integers(4, 20))
def test_tokens_are_counted_alike_however_they_are_cut(lengths, cut, tmp_path_factory):
    root = tmp_path_factory.mktemp("describe")
    documents = {f"{'abc'[n % 3]}/{n}": [100] * length for n, length in enumerate(lengths)}
    _, report = run(root, write_token_corpus(root / "in", documents, shard_records=cut), "tokens")
    assert report["num_tokens"] == sum(lengths) and report["unit"] == "tokens"
    expected = Counter(2 ** int(math.log2(length)) if length else 0 for length in lengths)
    assert {row["from"]: row["num_documents"] for row in report["by_length"] if row["num_documents"]} == expected
    for source, row in report["by_source"].items():
        mine = sorted(length for n, length in enumerate(lengths) if "abc"[n % 3] == source)
        assert (row["num_tokens"], row["longest_tokens"]) == (sum(mine), mine[-1])
        assert row["quantiles_tokens"]["0.5"] == mine[math.ceil(len(mine) / 2) - 1]


def test_many_sources_are_all_in_the_tables_and_bytes_repeat(tmp_path):
    folder = write_corpus(tmp_path / "in", {f"s{n}/d": "x" * (n + 1) for n in range(14)})
    out, report = run(tmp_path, folder)
    assert len(report["by_source"]) == 14
    assert file_bytes(run(tmp_path, folder, name="again")[0]) == file_bytes(out)


def test_bad_inputs_are_named(tmp_path):
    tokens = write_token_corpus(tmp_path / "tokens", {"a/1": [100]})
    documents = write_corpus(tmp_path / "documents", {"a/1": "x"})
    with pytest.raises(ValueError, match="either slot `documents` or slot `tokens`"):
        run_stage(describe, DescribeConfig(), {"tokens": tokens, "documents": documents}, tmp_path / "1")
    with pytest.raises(ValueError, match="holds tokens, not documents"):
        run(tmp_path, tokens, name="2")
    empty = write_corpus(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="has no document to describe"):
        run(tmp_path, empty, name="3")


def test_tables_that_do_not_add_up_are_refused(tmp_path):
    out, report = run(tmp_path, write_corpus(tmp_path / "in", TEXTS))
    report["by_length"][0]["num_documents"] += 1
    (out / "statistics.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="by_length has 6 num_documents"):
        describe.check(None, out)
    write_artifact(out, Artifact(kind="documents"))
    with pytest.raises(ValueError, match="not report"):
        describe.check(None, out)
