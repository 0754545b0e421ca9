"""Writes, reads, draws and checks Scores: one row a sample, so that a new threshold does not score again.

Workers turn a shard of samples into a table of `scores_table` and write it with `write_shard`; the stage then hands all
tables, in order, to `write_scores`. A method that weighs its parts over the whole data set lets its workers write the
parts alone, and puts `score` beside them afterwards (`with_scores`).

A part called `num_tokens` is taken for the length of the sample: it is drawn against the score.

Memory: a row a sample (id, source, score and length; some 200 bytes), for the test that ids are unique and the plots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.context import Context, Output
from ropewalk.stages.schema import (
    Artifact,
    TokenizerInfo,
    iterate_table,
    read_artifact,
    read_table,
    scores_schema,
    shard_paths,
    write_artifact,
    write_shard,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

LENGTH_PART = "num_tokens"
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_MAX_SOURCES = 8  # Lines that can be told apart in a plot.
_REST = "(other)"


def scores_table(
    sample_ids: Sequence[str], sources: Sequence[str], columns: Mapping[str, Sequence[float] | np.ndarray]
) -> pa.Table:
    """A table of `sample_id`, `source` and float64 columns: `score` and its parts, or at first the parts alone."""
    import numpy as np
    import pyarrow as pa

    arrays = [pa.array(list(sample_ids), pa.string()), pa.array(list(sources), pa.string())]
    arrays += [pa.array(np.asarray(values, dtype=np.float64)) for values in columns.values()]
    names = ["sample_id", "source", *columns]
    fields = [pa.field(name, array.type, nullable=False) for name, array in zip(names, arrays, strict=True)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def records_table(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
    """The same of records that hold `sample_id`, `source` and the columns."""
    ids, sources = ([record[name] for record in records] for name in ("sample_id", "source"))
    return scores_table(ids, sources, {name: [record[name] for record in records] for name in columns})


def with_scores(tables: Iterable[pa.Table], scores: np.ndarray) -> Iterator[pa.Table]:
    """Tables of parts with the column `score`, whose values follow each other as the tables' rows do."""
    import pyarrow as pa

    first = 0
    for table in tables:
        column = pa.array(scores[first : first + table.num_rows], pa.float64())
        yield table.add_column(2, pa.field("score", pa.float64(), nullable=False), column)
        first += table.num_rows
    if first != len(scores):
        raise RuntimeError(f"{len(scores)} scores for {first} samples")


def write_scores(
    output: Output,
    context: Context,
    tables: Iterable[pa.Table],
    *,
    parts: Sequence[str] = (),
    counts: Mapping[str, int],
    details: Mapping[str, Any] | None = None,
    tokenizer: TokenizerInfo | None = None,
) -> dict[str, int]:
    """Write a Scores artifact, one shard a table, with plots under observed, and report its counts.

    Args:
        output: Where to.
        context: Is told the counts and the mean score.
        tables: As `scores_table` makes them, with `score` and `parts`; all their ids are distinct.
        parts: Columns that the score was made of.
        counts: `num_in` and what was dropped of it, `num_dropped_<reason>`; others as the stage likes.
        details: For people; statistics of the scores are added.
        tokenizer: What the samples were read with, where there is one.

    Returns the counts, with `num_scored`. Raises ValueError for an id that occurs twice, a score or part that is no
    finite number, or where nothing was scored; RuntimeError if the counts do not add up.
    """
    rows = _Rows()
    for number, table in enumerate(tables):
        table = table.select(["sample_id", "source", "score", *parts]).cast(scores_schema(parts))
        rows.add(table)
        write_shard(output.data, "scores", number, table)
    found = {**counts, "num_scored": len(rows.ids)}
    _check_sum(found)
    if not rows.ids:
        raise ValueError(f"no sample could be scored: {found}")
    statistics = rows.statistics()
    write_artifact(
        output.data,
        Artifact(
            kind="scores", tokenizer=tokenizer, counts=found, details={**(details or {}), "statistics": statistics}
        ),
    )
    draw_scores(output.observed, rows.sources, rows.array("score"), rows.array("lengths"))
    context.log({**found, "score_mean": statistics["all"]["mean"]})
    return found


def read_scores(folder: Path) -> pa.Table:
    """All rows of a Scores artifact. Raises ValueError if it is none, or an id occurs twice."""
    read_artifact(folder, "scores")
    table = read_table(folder, "scores")
    _check_unique(table.column("sample_id").to_pylist(), folder)
    return table


def check_scores(config: Any, output: Path) -> None:
    """Schema, finite numbers, ids that are unique, and the counts. Raises ValueError naming file and field."""
    import pyarrow.parquet as pq

    artifact = read_artifact(output, "scores")
    names: list[str] | None = None
    for path in shard_paths(output, "scores"):
        found = pq.read_schema(path)
        expected = scores_schema(found.names[3:])
        if not found.equals(expected) or (names is not None and found.names != names):
            raise ValueError(f"{path}: columns {found.names} are not sample_id, source, score and its parts")
        names = found.names
    ids: list[str] = []
    for batch in iterate_table(output, "scores"):
        ids += batch.column("sample_id").to_pylist()
        _check_finite(batch, output)
    _check_unique(ids, output)
    if not ids or artifact.counts.get("num_scored") != len(ids):
        raise ValueError(
            f"{output / 'artifact.json'}: counts.num_scored is {artifact.counts.get('num_scored')}, but there are "
            f"{len(ids)} scores"
        )


def draw_scores(folder: Path, sources: Sequence[str], scores: np.ndarray, lengths: np.ndarray | None = None) -> None:
    """`scores.png`, a histogram by source; and, where lengths are known, `scores_by_length.png`."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    labels, index = common_sources(sources)
    edges = np.histogram_bin_edges(scores, bins=40)
    groups = [scores[index == number] for number in range(len(labels))]
    axes.hist(groups, bins=edges.tolist(), stacked=True, label=labels)
    axes.set(xlabel="score", ylabel="samples")
    axes.legend(fontsize="small")
    figure.savefig(folder / "scores.png")
    if lengths is None or not len(lengths):
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    drawn = axes.hexbin(np.log2(np.maximum(lengths, 1)), scores, gridsize=40, bins="log", mincnt=1)
    axes.set(xlabel="length in tokens, log2", ylabel="score")
    figure.colorbar(drawn, label="samples")
    figure.savefig(folder / "scores_by_length.png")


class _Rows:
    """What is kept in memory of all rows."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.sources: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {"score": [], "lengths": []}

    def add(self, table: pa.Table) -> None:
        """Keep a table. Raises ValueError for an id that was there before, or a number that is not finite."""
        for name in table.column("sample_id").to_pylist():
            if name in self.ids:
                raise ValueError(f"sample_id {name!r} occurs twice among the samples: deduplicate them first")
            self.ids.add(name)
        for batch in table.to_batches():
            _check_finite(batch, None)
        self.sources += table.column("source").to_pylist()
        self._columns["score"].append(table.column("score").to_numpy())
        if LENGTH_PART in table.schema.names:
            self._columns["lengths"].append(table.column(LENGTH_PART).to_numpy())

    def array(self, name: str) -> np.ndarray:
        """A column of all rows; empty where the rows do not have it."""
        import numpy as np

        return np.concatenate([np.zeros(0), *self._columns[name]])

    def statistics(self) -> dict[str, Any]:
        """Quantiles, mean and number of scores, of all and by source."""
        import numpy as np

        scores, sources = self.array("score"), np.asarray(self.sources, dtype=object)
        by_source = {name: _describe(scores[sources == name]) for name in sorted(set(self.sources))}
        return {"all": _describe(scores), "sources": by_source}


def _describe(scores: np.ndarray) -> dict[str, Any]:
    import numpy as np

    quantiles = np.quantile(scores, _QUANTILES).tolist()
    return {
        "num_scored": len(scores),
        "mean": float(scores.mean()),
        "quantiles": {f"{share:g}": value for share, value in zip(_QUANTILES, quantiles, strict=True)},
    }


def common_sources(sources: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The sources that a plot names, most frequent first, and the place of each sample's among them."""
    from collections import Counter

    import numpy as np

    frequent = sorted(Counter(sources).items(), key=lambda item: (-item[1], item[0]))
    labels = [name for name, _ in frequent[:_MAX_SOURCES]]
    if len(frequent) > _MAX_SOURCES:
        labels[-1] = _REST
    places = {name: number for number, name in enumerate(labels)}
    return labels, np.asarray([places.get(name, len(labels) - 1) for name in sources])


def _check_finite(batch: pa.RecordBatch, folder: Path | None) -> None:
    import numpy as np

    for name in batch.schema.names[2:]:
        values: Any = batch.column(name).to_numpy(zero_copy_only=False)
        wrong = ~np.isfinite(values)
        if wrong.any():
            sample = batch.column("sample_id")[int(wrong.argmax())].as_py()
            where = f"{folder}: " if folder is not None else ""
            raise ValueError(
                f"{where}{name} of sample {sample!r} is {values[wrong][0]}, not a finite number: a model that "
                "overflows needs a wider dtype"
            )


def _check_unique(ids: Sequence[str], folder: Path) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise ValueError(f"{folder}: sample_id {name!r} occurs twice in the scores")
        seen.add(name)


def _check_sum(counts: Mapping[str, int]) -> None:
    dropped = sum(value for name, value in counts.items() if name.startswith("num_dropped_"))
    if counts["num_in"] != counts["num_scored"] + dropped:
        raise RuntimeError(f"scoring lost count of samples: {dict(counts)}")
