"""What MLflow shows of a run beside what its record says, in the same form."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

Points = dict[str, Counter[tuple[str, int, float, int]]]
"""How often there is each point (name, step, value, time in milliseconds), by step of the pipeline."""


def recorded_points(root: Path, run_id: str) -> Points:
    """The metrics in the record of a run."""
    points: Points = {}
    for line in (root / "runs" / run_id / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["type"] == "metrics":
            when, step = round(event["time"] * 1000), event["metric_step"] or 0
            found = points.setdefault(event["step"], Counter())
            found.update((name, step, value, when) for name, value in event["metrics"].items())
    return points


def shown_points(client: Any, run_id: str) -> Points:
    """The same metrics, by MLflow; what tracking adds of its own (seconds, counts) is left out."""
    shown: Points = {}
    for name, run in shown_runs(client, run_id).items():
        history = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
        own = [p for p in history if p.key != "seconds" and not p.key.startswith(("output.", "counts."))]
        if own:
            shown[name] = Counter((p.key, p.step, p.value, p.timestamp) for p in own)
    return shown


def shown_runs(client: Any, run_id: str) -> dict[str, Any]:
    """MLflow's runs of a run, by name. One that is there twice fails here."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`ropewalk.run_id` = '{run_id}'")
    names = Counter(run.info.run_name for run in found)
    assert set(names.values()) <= {1}, names
    return {run.info.run_name: run for run in found}
