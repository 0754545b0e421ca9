"""A stage that writes a broken artifact fails before the commit, and its files are kept to be looked at."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine import run
from row_invariants import numbered_documents, write_tokens

from ropewalk.infra.step import External, Pipeline, Step
from ropewalk.infra.store import Store
from ropewalk.stages import schema
from ropewalk.stages.data import pack


@pytest.fixture
def pipeline(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([40, 13, 30, 25, 64]))
    step = Step("pack", pack, pack.PackConfig(row_tokens=32), inputs={"tokens": External(str(tokens))})
    return Pipeline("packing", (step,))


def shorten_a_row(path):
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["input_ids"].pop()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shorten_a_row, r"rows-00000.parquet: input_ids has 31 entries in a row, row_tokens is 32"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), r"rows-00000.parquet is no Parquet file"),
    ],
)
def test_a_broken_artifact_fails_its_step_by_file_and_field_and_is_kept(
    tmp_path, pipeline, monkeypatch, break_it, message
):
    write = schema.write_shard

    def broken(folder, name, *rest, **options):
        path = write(folder, name, *rest, **options)
        break_it(path)
        return path

    monkeypatch.setattr("ropewalk.stages.data.packing.units.write_shard", broken)
    result = run(pipeline, tmp_path / "store")
    (step,) = result.steps
    assert (result.status, step.status) == ("failed", "failed")
    assert message in step.reason
    store = Store(tmp_path / "store")
    assert store.numbers(step.key) == []
    (attempt,) = (store.root / "objects" / step.key / "attempts").iterdir()
    assert (attempt / "data" / "rows-00000.parquet").is_file()
    monkeypatch.undo()
    assert run(pipeline, tmp_path / "store").status == "succeeded"
