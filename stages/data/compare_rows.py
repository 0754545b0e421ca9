"""Compares packing methods: one table over several Rows artifacts made from the same corpus.

Reads   any number of Rows, one a slot, of equal `row_tokens`; slot `vectors` (Vectors), by which similarity is judged
        for all of them alike, whatever they retrieved by.
Writes  `comparison.json`, `comparison.md` and `report.html`: for each slot similarity, fill, waste, documents and roots
        a row, and what attention over a long distance could use (`row_measures.py`); under observed a plot.
Loses   nothing; pair sums are taken over at most `max_rows` rows of each slot, drawn by `seed` (the table says how
        many). Counts are of all rows.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.row_measures import RowMeasures, measure_row
from ropewalk.stages.schema import Artifact, Record, iterate_table, read_artifact, seeded_rng, write_artifact

if TYPE_CHECKING:
    import numpy as np

NAME = "compare_rows"
VERSION = 1
COLUMNS = {
    "similarity_adjacent": "similarity of adjacent documents",
    "similarity_in_row": "of all documents of a row",
    "documents_per_row": "documents a row",
    "roots_per_row": "roots a row",
    "fill_fraction": "fill",
    "waste_fraction": "waste",
    "whole_fraction": "documents in one piece",
    "visible_distance_tokens": "mean distance of visible pairs",
    "related_distance_tokens": "of related pairs",
    "far_potential": "far potential",
    "num_rows": "rows",
}


class CompareRowsConfig(Record):
    """How to measure."""

    far_tokens: int | None = Field(default=None, ge=0)
    """Distance that counts as far. None: an eighth of the rows."""
    max_rows: int | None = Field(default=512, ge=1)
    """Pair sums are taken over so many rows of each slot. None: all."""
    seed: int = 0
    """Draws these rows."""


def check(config: CompareRowsConfig, output: Path) -> None:
    """The tables are there, and every number of them is finite."""
    read_artifact(output, "report")
    for name in ("comparison.json", "comparison.md", "report.html"):
        if not (output / name).is_file() or not (output / name).stat().st_size:
            raise ValueError(f"{output / name} is missing or empty")
    json.loads((output / "comparison.json").read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(name: str) -> float:
    raise ValueError(f"comparison.json holds {name}")


def run(config: CompareRowsConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Compare the Rows of all slots but `vectors`. Raises ValueError if they do not belong together."""
    if "vectors" not in inputs:
        raise ValueError("compare_rows needs the slot vectors, by which similarity is judged")
    slots = {name: inputs[name] for name in sorted(inputs) if name != "vectors"}
    artifacts = check_slots(slots)
    row_tokens = next(iter(artifacts.values())).row_tokens or 0
    far = row_tokens // 8 if config.far_tokens is None else config.far_tokens
    samples = {slot: sample_rows(config, slot, folder) for slot, folder in slots.items()}
    vectors = load_vectors(inputs["vectors"], {s["doc_id"] for rows in samples.values() for r in rows for s in r[0]})
    table = {}
    for done, (slot, rows) in enumerate(samples.items(), 1):
        measures = [measure_row(segments, policy, vectors, row_tokens, far) for segments, policy in rows if segments]
        table[slot] = summarise(measures, artifacts[slot]) | {"whole_fraction": whole_fraction(slots[slot])}
        context.progress(done, len(samples), "methods")
    settings = {"row_tokens": row_tokens, "far_tokens": far}
    write_comparison(output.data, table, settings)
    counts = {f"num_rows_{slot}": artifact.counts["num_rows"] for slot, artifact in artifacts.items()}
    write_artifact(output.data, Artifact(kind="report", row_tokens=row_tokens, counts=counts, details=settings))
    draw(table, output.observed / "packing.png")
    context.log({f"{slot}.{name}": value for slot, row in table.items() for name, value in row.items() if value})


def check_slots(slots: Mapping[str, Path]) -> dict[str, Artifact]:
    """The artifacts. Raises ValueError if there is none or they differ in `row_tokens` or tokenizer."""
    artifacts = {slot: read_artifact(folder, "rows") for slot, folder in slots.items()}
    if not artifacts:
        raise ValueError("compare_rows needs at least one slot of Rows beside vectors")
    first, *others = artifacts
    for slot in others:
        for name in ("row_tokens", "tokenizer"):
            if getattr(artifacts[slot], name) != getattr(artifacts[first], name):
                raise ValueError(
                    f"slots {first!r} and {slot!r} differ in {name}: compare rows of one length and corpus"
                )
    return artifacts


def sample_rows(config: CompareRowsConfig, slot: str, folder: Path) -> list[tuple[list[dict[str, Any]], str]]:
    """Segments and policy of the rows that are measured."""
    import numpy as np

    num_rows = read_artifact(folder, "rows").counts["num_rows"]
    taken = np.ones(num_rows, bool)
    if config.max_rows is not None and config.max_rows < num_rows:
        taken[seeded_rng(NAME, config.seed, slot).permutation(num_rows)[config.max_rows :]] = False
    found, first = [], 0
    for batch in iterate_table(folder, "rows", ["segments", "attention"]):
        here = batch.filter(_mask(taken[first : first + batch.num_rows]))
        found += zip(here.column("segments").to_pylist(), here.column("attention").to_pylist(), strict=True)
        first += batch.num_rows
    return found


def _mask(values: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(values)


def load_vectors(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Unit vectors of these documents. Raises ValueError if one is missing."""
    import numpy as np

    read_artifact(folder, "vectors")
    found: dict[str, np.ndarray] = {}
    for batch in iterate_table(folder, "vectors", ["doc_id", "vector"]):
        names = batch.column("doc_id").to_pylist()
        column: Any = batch.column("vector")
        matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(len(names), -1).astype(np.float32)
        matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
        found |= {name: matrix[place] for place, name in enumerate(names) if name in wanted}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"slot vectors lacks {missing[0]!r} and {len(missing) - 1} more documents of the rows")
    return found


def summarise(measures: Sequence[RowMeasures], artifact: Artifact) -> dict[str, float | int | None]:
    """The columns of one method: means over pairs and rows."""
    total = {field.name: sum(getattr(row, field.name) for row in measures) for field in fields(RowMeasures)}
    counts, row_tokens = artifact.counts, artifact.row_tokens or 0
    num_positions = counts["num_rows"] * row_tokens
    lost = counts.get("num_tokens_trimmed", 0) + counts.get("num_tokens_dropped_partial_row", 0)
    used = counts["num_tokens_in"] - counts.get("num_tokens_dropped_over_limit", 0)
    return {
        "similarity_adjacent": _ratio(total["sum_adjacent"], total["num_adjacent"]),
        "similarity_in_row": _ratio(total["sum_all"], total["num_all"]),
        "documents_per_row": _ratio(total["num_documents"], len(measures)),
        "roots_per_row": artifact.details.get("roots_per_row"),
        "fill_fraction": _ratio(counts["num_tokens_kept"], num_positions),
        "waste_fraction": _ratio(lost, used),
        "visible_distance_tokens": _ratio(total["visible_distance"], total["visible_pairs"]),
        "related_distance_tokens": _ratio(total["related_distance"], total["related_pairs"]),
        "far_potential": _ratio(total["far_potential"], len(measures)),
        "num_rows": counts["num_rows"],
        "num_rows_measured": len(measures),
    }


def _ratio(value: float, by: float) -> float | None:
    return round(value / by, 6) if by else None


def whole_fraction(folder: Path) -> float | None:
    """Share of the documents, of those in any row, that lie in one segment."""
    from collections import Counter

    pieces: Counter[str] = Counter()
    for batch in iterate_table(folder, "rows", ["segments"]):
        column: Any = batch.column("segments")
        pieces.update(column.flatten().field("doc_id").to_pylist())
    return _ratio(sum(number == 1 for number in pieces.values()), len(pieces))


def write_comparison(
    folder: Path, table: Mapping[str, Mapping[str, float | int | None]], settings: Mapping[str, int]
) -> None:
    """The table as JSON, Markdown and a page."""
    text = json.dumps({**settings, "methods": table}, indent=1, sort_keys=True, allow_nan=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    header = ["method", *COLUMNS.values()]
    body = [[slot, *(show(row.get(name)) for name in COLUMNS)] for slot, row in table.items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body]]
    (folder / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cells = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    cells += ["".join(f"<td>{html.escape(value)}</td>" for value in row) for row in body]
    note = (
        f"Rows of {settings['row_tokens']:,} tokens; pairs more than {settings['far_tokens']:,} tokens apart are far."
    )
    page = (
        '<!doctype html><meta charset="utf-8"><title>Packing methods compared</title>'
        "<style>body{font:15px system-ui;margin:2em}td,th{padding:.3em .7em;text-align:right}"
        "tr{border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}</style>"
        f"<h1>Packing methods compared</h1><p>{note}</p><table>"
        + "".join(f"<tr>{row}</tr>" for row in cells)
        + "</table>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def show(value: float | int | None) -> str:
    """A number for people: thousands separated, three digits behind the point."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}"


def draw(table: Mapping[str, Mapping[str, float | int | None]], path: Path) -> None:
    """Bars: similarity of adjacent documents, fill, far potential."""
    from matplotlib.figure import Figure

    shown = ("similarity_adjacent", "fill_fraction", "far_potential")
    figure = Figure(figsize=(10, 0.6 + 0.35 * len(table)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        axes.barh(list(table), [row[name] or 0.0 for row in table.values()])
        axes.set(title=COLUMNS[name])
        axes.invert_yaxis()
    figure.savefig(path)
