import json

import numpy as np
import pytest
from row_invariants import run_stage, tokenizer_info, write_tokens

from ropewalk.stages.data import compare_rows, pack
from ropewalk.stages.data.compare_rows import CompareRowsConfig
from ropewalk.stages.schema import Artifact, vectors_schema, write_artifact, write_table

TOPICS = {"sea": [1.0, 0.0], "forge": [0.0, 1.0]}
DOCUMENTS = {f"{topic}/{number}": [200 + number] * 10 for number in range(40) for topic in TOPICS}


def write_vectors(folder, documents=DOCUMENTS):
    records = [{"doc_id": name, "vector": np.float16(TOPICS[name.split("/")[0]])} for name in documents]
    write_table(folder, "vectors", vectors_schema(2), records)
    write_artifact(folder, Artifact(kind="vectors"))
    return folder


def write_rows(folder, documents, **config):
    tokens = write_tokens(folder / "tokens", documents)
    return run_stage(pack, pack.PackConfig(row_tokens=60, **config), {"tokens": tokens}, folder)


def compared(tmp_path, **config):
    by_topic = dict(sorted(DOCUMENTS.items()))
    inputs = {
        "together": write_rows(tmp_path / "a", by_topic, attention="causal"),
        "masked": write_rows(tmp_path / "b", by_topic, attention="document"),
        "mixed": write_rows(tmp_path / "c", DOCUMENTS, attention="causal", method="concatenate"),
        "vectors": write_vectors(tmp_path / "vectors"),
    }
    folder = run_stage(compare_rows, CompareRowsConfig(**config), inputs, tmp_path / "out")
    compare_rows.check(CompareRowsConfig(**config), folder)
    return json.loads((folder / "comparison.json").read_text()), folder


def test_rows_of_like_documents_are_told_from_mixed_ones(tmp_path):
    found, folder = compared(tmp_path)
    methods = found["methods"]
    assert methods["together"]["similarity_adjacent"] == 1.0
    assert 0.3 < methods["mixed"]["similarity_adjacent"] < 0.7
    assert methods["together"]["far_potential"] > methods["mixed"]["far_potential"] > methods["masked"]["far_potential"]
    assert methods["together"]["documents_per_row"] == 5
    assert methods["together"]["whole_fraction"] == 1.0 > methods["mixed"]["whole_fraction"]
    assert methods["together"]["fill_fraction"] == pytest.approx(50 / 60, abs=1e-6)
    assert "| masked |" in (folder / "comparison.md").read_text()
    assert "<td>mixed</td>" in (folder / "report.html").read_text()
    assert (folder.parent / "observed" / "packing.png").stat().st_size > 1000


def test_a_sample_of_rows_is_said_to_be_one(tmp_path):
    found, _ = compared(tmp_path, max_rows=3, far_tokens=5)
    assert found["far_tokens"] == 5
    assert {row["num_rows_measured"] for row in found["methods"].values()} == {3}
    assert found["methods"]["together"]["num_rows"] == 16


def test_rows_that_do_not_belong_together_are_refused(tmp_path):
    vectors = write_vectors(tmp_path / "vectors")
    rows = write_rows(tmp_path / "a", DOCUMENTS)
    tokens = write_tokens(tmp_path / "tokens", DOCUMENTS, tokenizer_info(digest="1" * 64))
    other = run_stage(pack, pack.PackConfig(row_tokens=60), {"tokens": tokens}, tmp_path / "b")
    with pytest.raises(ValueError, match="'a' and 'b' differ in tokenizer"):
        run_stage(compare_rows, CompareRowsConfig(), {"a": rows, "b": other, "vectors": vectors}, tmp_path / "x")
    with pytest.raises(ValueError, match="needs the slot vectors"):
        run_stage(compare_rows, CompareRowsConfig(), {"a": rows}, tmp_path / "y")
    few = write_vectors(tmp_path / "few", dict(list(DOCUMENTS.items())[:10]))
    with pytest.raises(ValueError, match="slot vectors lacks"):
        run_stage(compare_rows, CompareRowsConfig(), {"a": rows, "vectors": few}, tmp_path / "z")
