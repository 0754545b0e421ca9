"""Report: one page that says whether the extension worked, and from which numbers, models and data.

Reads    `evaluation` (Predictions with their summary) and, as far as they are given, `synthesise` (the training mix),
         the evaluated checkpoints by the evaluation's names (`base`, `extended`) and `heldout`. Of the latter it shows
         what their `artifact.json`, `statistics.json` and `training.jsonl` hold, and relies on none of it.
Writes   `report.html` (self-contained: style and pictures inside, no scripts, no links), the pictures as PNG files
         for a light and a dark page, and `summary.json` with the exact values behind every number in the main table.
Loses    samples that are not among the few worst shown; they are in the evaluation.

Bytes depend on the inputs alone: no dates, no paths, no user's matplotlib settings.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ropewalk.stages.checkpoint import read_checkpoint
from ropewalk.stages.checks import check_report
from ropewalk.stages.context import Context, Output
from ropewalk.stages.evaluation import plots
from ropewalk.stages.evaluation.composition import Composition, read_composition
from ropewalk.stages.evaluation.summary import ALL_TASKS, Tree
from ropewalk.stages.evaluation.verdict import find, interval, judge, signed
from ropewalk.stages.schema import Artifact, Record, read_artifact, read_table, write_artifact

NAME = "report"
VERSION = 1
check = check_report


class ReportConfig(Record):
    """What the page shows."""

    title: str = "Does the longer window work?"
    model: str = "extended"
    """The evaluated model that the verdict is about; it is compared with the evaluation's baseline."""
    worst_samples: int = Field(default=3, ge=0)
    """Wrong answers shown for each task."""


class Picture(Record):
    """A figure for both page colours."""

    name: str
    """File name without its ending; the dark one ends in `-dark`."""
    alt: str
    png: dict[str, bytes]
    """PNG bytes by theme."""

    def uri(self, theme: str) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png[theme]).decode()


def main_table(summary: Tree, model: str) -> list[Tree]:
    """The rows of the main table: for each task and length every model's score and the compared model's difference."""
    tasks = list(dict.fromkeys(row["task"] for row in summary["scores"]))
    if len(tasks) == 2:  # one task and the mean over it
        tasks.remove(ALL_TASKS)
    tasks.sort(key=lambda task: task != ALL_TASKS)
    lengths = sorted({row["length_tokens"] for row in summary["scores"]})
    return [
        {
            "task": task,
            "length_tokens": length,
            "scores": {
                name: find(summary["scores"], model=name, task=task, length_tokens=length)
                for name in summary["windows"]
            },
            "difference": find(summary["comparisons"], model=model, task=task, length_tokens=length),
        }
        for task in tasks
        for length in lengths
    ]


def worst_samples(predictions: Sequence[Tree], samples: Mapping[str, Tree], num_samples: int) -> list[Tree]:
    """For each task the wrong answers at the shortest lengths, where they surprise most, and how many there are."""
    gallery = []
    for task in dict.fromkeys(row["task"] for row in predictions):
        mine = [row for row in predictions if row["task"] == task]
        wrong = [row for row in mine if row["score"] < 1]
        wrong.sort(key=lambda row: (row["length_tokens"], row["sample_id"]))
        shown = [{**row, **samples[row["sample_id"]]} for row in wrong[:num_samples]]
        gallery.append({"task": task, "num_wrong": len(wrong), "num_samples": len(mine), "shown": shown})
    return gallery


def draw_results(summary: Tree) -> dict[str, list[Picture]]:
    """The figures of the results, by section of the page."""
    windows = summary["windows"]
    tasks = list(dict.fromkeys(row["task"] for row in summary["scores"] if row["task"] != ALL_TASKS))
    scores = []
    for task in tasks:
        rows = [row for row in summary["scores"] if row["task"] == task]
        draw = plots.score_by_length(rows, windows, f"{task}: facts found by length")
        scores.append(_picture(f"score-{task}", _describe(rows, "length_tokens", f"Line chart, {task} score"), draw))
    losses = plots.loss_by_position(summary["losses"], windows, "Loss on held-out text by position")
    alt = _describe(summary["losses"], "position_end", "Step chart, loss by position")
    maps = []
    for task in tasks:
        for model in windows:
            cells = [r for r in summary["scores_by_depth"] if (r["model"], r["task"]) == (model, task)]
            low = min(cells, key=lambda cell: cell["mean"])
            alt_map = (
                f"Map of {model}'s {task} score by length and depth; lowest {low['mean']:.2f} at "
                f"{low['length_tokens']:,} tokens and depth {low['depth']:.0%}."
            )
            title = f"{model}, {task}"
            maps.append(
                _picture(f"map-{task}-{model}", alt_map, plots.depth_map(cells, windows[model], title), height=3.6)
            )
    return {"scores": scores, "losses": [_picture("loss-by-position", alt, losses)], "maps": maps}


def _picture(name: str, alt: str, draw: plots.Draw, *, height: float = 3.7) -> Picture:
    png = {theme: plots.render(draw, theme, height_inches=height) for theme in plots.THEMES}
    return Picture(name=name, alt=alt, png=png)


def _describe(rows: Sequence[Tree], x: str, what: str) -> str:
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row[x])
        first, last = mine[0], mine[-1]
        parts.append(f"{model} from {first['mean']:.2f} at {first[x]:,} to {last['mean']:.2f} at {last[x]:,}")
    return f"{what}: {'; '.join(parts)}."


def draw_training(inputs: Mapping[str, Path], summary: Tree) -> list[Picture]:
    """The training curve of each evaluated checkpoint that has one."""
    pictures = []
    for number, (model, window) in enumerate(summary["windows"].items()):
        path = inputs[model] / "training.jsonl" if model in inputs else None
        if path is None or not path.exists():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "step" in line and "loss" in line]
        if steps:
            alt = (
                f"Training loss of {model}: {steps[0]['loss']:.2f} at step {steps[0]['step']:,}, "
                f"{steps[-1]['loss']:.2f} at step {steps[-1]['step']:,}."
            )
            title = f"{model}: training loss at {window:,} tokens"
            pictures.append(_picture(f"training-{model}", alt, plots.training_curve(steps, number, title), height=3.0))
    return pictures


def draw_composition(composition: Composition | None) -> list[Picture]:
    """The make-up of the training mix, one bar a breakdown; none if nothing is known of it."""
    if composition is None or not composition.shares:
        return []
    parts = "; ".join(
        f"{title}: " + ", ".join(f"{name} {value / sum(values.values()):.0%}" for name, value in values.items())
        for title, values in composition.shares.items()
    )
    draw = plots.shares(composition.shares, "Where the training tokens came from")
    return [_picture("composition", f"Stacked bars. {parts}.", draw, height=1.2 + 0.75 * len(composition.shares))]


def _artifacts(inputs: Mapping[str, Path]) -> dict[str, Artifact]:
    return {
        slot: read_checkpoint(folder) if (folder / "config.json").exists() else read_artifact(folder)
        for slot, folder in sorted(inputs.items())
    }


def render_page(view: Mapping[str, Any]) -> str:
    """The page from its template. Everything that comes from data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        grouped=lambda value: f"{value:,}",
        signed=signed,
        interval=interval,
        p_value=lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
        pretty=lambda value: json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False),
    )
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(view)


def run(config: ReportConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the report (see the module)."""
    if "evaluation" not in inputs:
        raise ValueError("report has no input 'evaluation': give it the output of evaluate")
    artifacts = _artifacts(inputs)
    if artifacts["evaluation"].kind != "predictions":
        raise ValueError(f"report's input 'evaluation' holds {artifacts['evaluation'].kind}, not predictions")
    summary: Tree = json.loads((inputs["evaluation"] / "summary.json").read_text(encoding="utf-8"))
    verdict = judge(summary, config.model)
    table = main_table(summary, config.model)
    composition = read_composition(inputs["synthesise"]) if "synthesise" in inputs else None
    predictions = read_table(inputs["evaluation"] / config.model, "predictions").to_pylist()
    samples = {row["sample_id"]: row for row in read_table(inputs["evaluation"], "samples").to_pylist()}

    sections = {
        **draw_results(summary),
        "composition": draw_composition(composition),
        "training": draw_training(inputs, summary),
    }
    pictures = [picture for group in sections.values() for picture in group]
    for picture in pictures:
        for theme, ending in (("light", ""), ("dark", "-dark")):
            (output.data / f"{picture.name}{ending}.png").write_bytes(picture.png[theme])
    page = render_page(
        {
            "title": config.title,
            "verdict": verdict,
            "summary": summary,
            "table": table,
            "sections": sections,
            "composition": composition,
            "gallery": worst_samples(predictions, samples, config.worst_samples),
            "counts": artifacts["evaluation"].counts,
            "artifacts": {slot: artifact.model_dump(mode="json") for slot, artifact in artifacts.items()},
        }
    )
    (output.data / "report.html").write_text(page, encoding="utf-8")
    numbers = {"verdict": verdict, "table": table, "effective_lengths": summary["effective_lengths"]}
    text = json.dumps(numbers, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (output.data / "summary.json").write_text(text + "\n", encoding="utf-8")
    counts = {"pictures": len(pictures), "table_rows": len(table)}
    write_artifact(output.data, Artifact(kind="report", counts=counts, details={"headline": verdict["headline"]}))
    context.log(
        {
            "effective_length_before_tokens": float(verdict["effective_tokens_before"]),
            "effective_length_after_tokens": float(verdict["effective_tokens_after"]),
        }
    )
