import json

import numpy as np
import pytest

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.selection.scores import check_scores, read_scores, scores_table, with_scores, write_scores
from ropewalk.stages.schema import read_artifact, write_artifact


def make_output(folder):
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed):
        path.mkdir(parents=True)
    return output


def tables(ids=("a", "b", "c"), scores=(1.0, 3.0, 2.0)):
    columns = {"score": scores, "num_tokens": [5.0] * len(ids)}
    whole = scores_table(ids, ["books"] * len(ids), columns)
    return [whole.slice(0, 2), whole.slice(2)]


def write(folder, found=None, num_in=4, **counts):
    output = make_output(folder)
    reported = []
    counts = {"num_in": num_in, **(counts or {"num_dropped_short": 1})}
    write_scores(
        output,
        LocalContext(folder, reported.append),
        found or tables(),
        parts=("num_tokens",),
        counts=counts,
        details={"method": "x"},
    )
    return output, reported


def test_scores_are_read_as_they_were_written_and_drawn(tmp_path):
    output, reported = write(tmp_path)
    check_scores(None, output.data)
    assert read_scores(output.data).to_pydict() == {
        "sample_id": ["a", "b", "c"],
        "source": ["books"] * 3,
        "score": [1.0, 3.0, 2.0],
        "num_tokens": [5.0] * 3,
    }
    artifact = read_artifact(output.data, "scores")
    assert artifact.counts == {"num_in": 4, "num_dropped_short": 1, "num_scored": 3}
    assert artifact.details["statistics"]["sources"]["books"]["quantiles"]["0.5"] == 2.0
    assert reported[0]["metrics"]["score_mean"] == 2.0
    assert {path.name for path in output.observed.iterdir()} == {"scores.png", "scores_by_length.png"}
    assert not list(output.data.glob("*.png"))


def test_scores_join_their_parts_in_order():
    parts = [scores_table(["a", "b"], ["s", "s"], {"x": [1, 2]}), scores_table(["c"], ["s"], {"x": [3]})]
    joined = list(with_scores(parts, np.asarray([0.1, 0.2, 0.3])))
    assert [table.column("score").to_pylist() for table in joined] == [[0.1, 0.2], [0.3]]
    with pytest.raises(RuntimeError, match="4 scores for 3 samples"):
        list(with_scores(parts, np.zeros(4)))


def test_an_id_that_occurs_twice_a_score_that_is_no_number_and_lost_samples_are_errors(tmp_path):
    with pytest.raises(ValueError, match="'a' occurs twice among the samples"):
        write(tmp_path / "twice", tables(ids=("a", "b", "a")))
    with pytest.raises(ValueError, match="score of sample 'b' is nan, not a finite number"):
        write(tmp_path / "nan", tables(scores=(1.0, float("nan"), 2.0)))
    with pytest.raises(RuntimeError, match="lost count"):
        write(tmp_path / "lost", num_in=5)
    with pytest.raises(ValueError, match="no sample could be scored"):
        write(tmp_path / "none", [scores_table([], [], {"score": [], "num_tokens": []})], num_in=1, num_dropped_x=1)


def test_the_check_finds_what_is_not_as_the_artifact_says(tmp_path):
    output, _ = write(tmp_path)
    artifact = read_artifact(output.data)
    write_artifact(output.data, artifact.model_copy(update={"counts": {"num_scored": 2}}))
    with pytest.raises(ValueError, match="num_scored is 2, but there are 3"):
        check_scores(None, output.data)
    write_artifact(output.data, artifact)
    (output.data / "scores-00002.parquet").write_bytes((output.data / "scores-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match="'a' occurs twice among the scores of"):
        check_scores(None, output.data)
    (output.data / "artifact.json").write_text(json.dumps({"kind": "rows"}))
    with pytest.raises(ValueError, match="holds rows, not scores"):
        read_scores(output.data)
