"""Writes, reads, draws and checks Scores: one row a sample, so that a new threshold does not score again.

Workers turn a shard of samples into a table of `scores_table` and write it with `write_shard`; the stage then hands all
tables, in order, to `write_scores`. A method that weighs its parts over the whole data set lets its workers write the
parts alone, and puts `score` beside them afterwards (`with_scores`).

A part called `num_tokens` is taken for the length of the sample: it is drawn against the score.

Memory: a row a sample (id, source, score and length, in Arrow's layout; some 60 bytes) for the test that ids are unique
and the plots.
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
    found = {**counts, "num_scored": rows.num_rows}
    _check_sum(found)
    if not rows.num_rows:
        raise ValueError(f"no sample could be scored: {found}")
    _check_unique(rows.column("sample_id"), "the samples: deduplicate them first")
    statistics = rows.statistics()
    write_artifact(
        output.data,
        Artifact(
            kind="scores", tokenizer=tokenizer, counts=found, details={**(details or {}), "statistics": statistics}
        ),
    )
    draw_scores(output.observed, rows.column("source"), rows.column("score").to_numpy(), rows.lengths)
    context.log({**found, "score_mean": statistics["all"]["mean"]})
    return found


def read_scores(folder: Path) -> pa.Table:
    """All rows of a Scores artifact. Raises ValueError if it is none, or an id occurs twice."""
    read_artifact(folder, "scores")
    table = read_table(folder, "scores")
    _check_unique(table.column("sample_id"), f"the scores of {folder}")
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
    for batch in iterate_table(output, "scores"):
        _check_finite(batch, output)
    ids = read_table(output, "scores", ["sample_id"]).column("sample_id")
    _check_unique(ids, f"the scores of {output}")
    if not len(ids) or artifact.counts.get("num_scored") != len(ids):
        raise ValueError(
            f"{output / 'artifact.json'}: counts.num_scored is {artifact.counts.get('num_scored')}, but there are "
            f"{len(ids)} scores"
        )


def draw_scores(folder: Path, sources: pa.ChunkedArray, scores: np.ndarray, lengths: np.ndarray | None = None) -> None:
    """`scores.png`, a histogram by source; and, where lengths are known, `scores_by_length.png`."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    groups = common_sources(*source_codes(sources))
    edges = np.histogram_bin_edges(scores, bins=40)
    labels = [name for name, _ in groups]
    axes.hist([scores[among] for _, among in groups], bins=edges.tolist(), stacked=True, label=labels)
    axes.set(xlabel="score", ylabel="samples")
    axes.legend(fontsize="small")
    figure.savefig(folder / "scores.png")
    if lengths is None:
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
        self._tables: list[pa.Table] = []

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return sum(table.num_rows for table in self._tables)

    def add(self, table: pa.Table) -> None:
        """Keep a table. Raises ValueError for a number that is not finite."""
        for batch in table.to_batches():
            _check_finite(batch, None)
        lengths = [LENGTH_PART] if LENGTH_PART in table.schema.names else []
        self._tables.append(table.select(["sample_id", "source", "score", *lengths]))

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        import pyarrow as pa

        return pa.concat_tables(self._tables).column(name)

    @property
    def lengths(self) -> np.ndarray | None:
        """Of all rows; None where they do not have them."""
        return self.column(LENGTH_PART).to_numpy() if LENGTH_PART in self._tables[0].schema.names else None

    def statistics(self) -> dict[str, Any]:
        """Quantiles, mean and number of scores, of all and by source."""
        scores = self.column("score").to_numpy()
        names, codes = source_codes(self.column("source"))
        by_source = {name: _describe(scores[codes == code]) for code, name in enumerate(names)}
        return {"all": _describe(scores), "sources": by_source}


def _describe(scores: np.ndarray) -> dict[str, Any]:
    import numpy as np

    quantiles = np.quantile(scores, _QUANTILES).tolist()
    return {
        "num_scored": len(scores),
        "mean": float(scores.mean()),
        "quantiles": {f"{share:g}": value for share, value in zip(_QUANTILES, quantiles, strict=True)},
    }


def source_codes(sources: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The names of the sources, sorted, and which of them each sample has."""
    import numpy as np
    import pyarrow.compute

    pc: Any = pyarrow.compute
    names = sorted(pc.unique(sources).to_pylist())
    codes = pc.index_in(sources, value_set=pyarrow.array(names, pyarrow.string()))
    return names, codes.to_numpy().astype(np.int32)


def common_sources(names: Sequence[str], codes: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The sources that a plot can name, the largest first, and the samples of each; the last may be all others."""
    import numpy as np

    sizes = np.bincount(codes, minlength=len(names))
    order = sorted(range(len(names)), key=lambda code: (-sizes[code], names[code]))
    if len(order) <= _MAX_SOURCES:
        return [(names[code], codes == code) for code in order]
    named, others = order[: _MAX_SOURCES - 1], order[_MAX_SOURCES - 1 :]
    return [*((names[code], codes == code) for code in named), (_REST, np.isin(codes, others))]


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


def _check_unique(ids: pa.ChunkedArray, where: str) -> None:
    import pyarrow.compute

    pc: Any = pyarrow.compute
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted: Any = ids.value_counts()
    twice = counted.filter(pc.greater(counted.field("counts"), 1))[0].as_py()["values"]
    raise ValueError(f"sample_id {twice!r} occurs twice among {where}")


def _check_sum(counts: Mapping[str, int]) -> None:
    dropped = sum(value for name, value in counts.items() if name.startswith("num_dropped_"))
    if counts["num_in"] != counts["num_scored"] + dropped:
        raise RuntimeError(f"scoring lost count of samples: {dict(counts)}")
