"""Chooses a mixture of tasks and the samples of each: SMART (arXiv 2403.08370).

Reads `samples` (Chats or Documents; `source` is the task) and `vectors` of them (by `sample_id`; the paper embeds the
prompts with gte-large). Writes the chosen samples, in the order of the table.

1. A task's embedding is the mean of its samples' unit vectors. Tasks are chosen greedily for graph cut (lambda 0.4) on
   the cosines of their embeddings; g is the gain of each when it was chosen.
2. A task's share is 1 + g + g^2 / 2 (a softmax to second order), normalised. Budgets are the shares of `num_samples` by
   the largest remainder; a task that has fewer samples gives all, and the rest is shared again among the others.
3. Inside a task, facility location on cosines, greedily.

Source of the rules: the paper's algorithm 1 and kowndinya-renduchintala/SMART (get_SMART_mixture.py). Different from
that code: it rounds budgets down and deals the remainder out one by one in the order of choice, and hands what a task
lacks to the others one by one; both as largest remainders here, which follow the shares. It splits the similarities of
a task of more than 150,000 samples at 100,000 in the order of the table (40 GB of them); here tasks are cut into equal
parts of at most `part_samples`, drawn by id. It divides a budget by FLAN's four template types; here a task is a task.

Lost, and counted: samples of tasks that were not chosen, with a zero vector, and those that were not chosen. Memory:
the ids of all samples; a worker holds one part's similarities, 4 bytes times its square. Tasks: at most 16,384.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.quotas import largest_remainder
from ropewalk.stages.data.selection.representatives import Part, choose_representatives, run_positions
from ropewalk.stages.data.selection.sample_vectors import SampleVectors, place_vectors
from ropewalk.stages.data.selection.samples import Samples, check_samples, open_samples, write_samples_artifact
from ropewalk.stages.data.selection.submodular import graph_cut_order, similarity_kernel, split_parts, unit_vectors
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "smart"
VERSION = 1
check = check_samples

_MAX_TASKS = 16_384  # Their similarities are a square of 1 GiB.
_READ_SAMPLES = 65_536


class SmartConfig(Record):
    """How many samples, of how many tasks."""

    num_samples: int = Field(ge=1)
    num_tasks: int | None = Field(default=None, ge=1)
    """Tasks to choose. None: all, so that only their budgets differ."""
    penalty: float = Field(default=0.4, ge=0)
    """Graph cut's lambda: how much likeness among the chosen tasks counts against them. Monotone up to 0.5."""
    part_samples: int = Field(default=8_192, ge=1)
    """Samples of a task whose similarities are held at once, by each worker; 8,192 take 256 MiB."""


@dataclass(frozen=True)
class Task:
    """A source and where its samples lie."""

    name: str
    parts: list[np.ndarray]
    """Numbers of its samples in the table, by part."""

    @property
    def num_samples(self) -> int:
        """Samples of the task, those with a zero vector included."""
        return sum(map(len, self.parts))


def taylor_shares(gains: Sequence[float]) -> list[float]:
    """Gains to shares: the second-order Taylor polynomial of exp, normalised. It is never below 1/2."""
    values = [1 + gain + gain**2 / 2 for gain in gains]
    return [value / sum(values) for value in values]


def capped_quotas(shares: Mapping[str, float], available: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` by shares, nobody getting more than is available; what is left over is shared again.

    Raises ValueError if there is less than `total` altogether.
    """
    if total > sum(available[name] for name in shares):
        raise ValueError(
            f"num_samples is {total}, but the chosen tasks have {sum(available[name] for name in shares)} samples: "
            "lower it, or choose more tasks"
        )
    quotas: dict[str, int] = {}
    while len(quotas) < len(shares):
        rest = {name: share for name, share in shares.items() if name not in quotas}
        found = largest_remainder(rest, total - sum(quotas.values()))
        full = {name: available[name] for name in rest if found[name] >= available[name]}
        quotas.update(full or found)
    return quotas


def tasks_of(samples: Samples, part_samples: int) -> list[Task]:
    """The sources in the order of their names, cut into parts. Raises ValueError if there are too many."""
    import numpy as np

    names = np.asarray(samples.sources.to_pylist(), dtype=object)
    ids = np.asarray(samples.ids.to_pylist(), dtype=object)
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    if len(members) > _MAX_TASKS:
        raise ValueError(f"slot samples has {len(members)} sources, smart compares at most {_MAX_TASKS}: merge them")
    tasks = []
    for name in sorted(members):
        numbers = np.array(members[name])
        tasks.append(Task(name, [numbers[part] for part in split_parts(ids[numbers].tolist(), part_samples)]))
    return tasks


def task_embeddings(tasks: Sequence[Task], vectors: SampleVectors) -> np.ndarray:
    """Unit vectors [t, d]: the direction of the mean of each task's unit vectors."""
    import numpy as np

    from ropewalk.stages.data.compiled.submodular import add_rows

    sums = np.zeros((len(tasks), vectors.num_dimensions))
    groups = np.repeat(np.arange(len(tasks)), [task.num_samples for task in tasks])
    for begin in range(0, vectors.num_samples, _READ_SAMPLES):
        end = min(begin + _READ_SAMPLES, vectors.num_samples)
        add_rows(vectors.rows(begin, end), groups[begin:end], sums)
    sums /= np.array([[task.num_samples] for task in tasks])
    return unit_vectors(sums)[0]


def choose_tasks(
    config: SmartConfig, tasks: Sequence[Task], embeddings: np.ndarray, available: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The chosen tasks, first the best, each with its gain, share and budget."""
    usable = [number for number, task in enumerate(tasks) if available[task.name]]
    num_tasks = len(usable) if config.num_tasks is None else config.num_tasks
    if not 0 < num_tasks <= len(usable):
        raise ValueError(f"num_tasks is {num_tasks}, but slot samples has {len(usable)} sources with vectors")
    order, gains = graph_cut_order(similarity_kernel(embeddings[usable], "cosine"), num_tasks, config.penalty)
    names = [tasks[usable[number]].name for number in order.tolist()]
    shares = dict(zip(names, taylor_shares(gains.tolist()), strict=True))
    quotas = capped_quotas(shares, available, config.num_samples)
    return [
        {"task": name, "gain": gain, "share": shares[name], "num_samples": quotas[name], "available": available[name]}
        for name, gain in zip(names, gains.tolist(), strict=True)
    ]


def _jobs(
    tasks: Sequence[Task], quotas: Mapping[str, int], vectors: SampleVectors, zero: np.ndarray
) -> dict[str, tuple[np.ndarray, Part]]:
    """By name: the numbers of a part's samples, and the work. Tasks without a quota have none."""
    jobs: dict[str, tuple[np.ndarray, Part]] = {}
    end = 0
    for number, task in enumerate(tasks):
        names = [f"{number:05d}-{part:05d}" for part in range(len(task.parts))]
        alive = {name: int((~zero[part]).sum()) for name, part in zip(names, task.parts, strict=True)}
        quota = quotas.get(task.name, 0)
        budgets = largest_remainder(alive, quota) if quota else {}
        for name, part in zip(names, task.parts, strict=True):
            end += len(part)
            if quota:
                jobs[name] = part, Part(vectors, end - len(part), end, budgets[name], "cosine")
    return jobs


def run(config: SmartConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the chosen samples. Raises ValueError if vectors are those of other samples, or samples are too few."""
    import numpy as np

    samples = open_samples(inputs["samples"], "samples")
    tasks = tasks_of(samples, config.part_samples)
    parts = [part for task in tasks for part in task.parts]
    vectors, zero = place_vectors(inputs["vectors"], samples.ids, run_positions(parts, len(samples.ids)), context.work)
    available = {task.name: sum(int((~zero[part]).sum()) for part in task.parts) for task in tasks}
    chosen = choose_tasks(config, tasks, task_embeddings(tasks, vectors), available)
    jobs = _jobs(tasks, {entry["task"]: entry["num_samples"] for entry in chosen}, vectors, zero)
    keep = np.zeros(len(samples.ids), dtype=np.bool_)
    for name, picked in choose_representatives(context, {name: part for name, (_, part) in jobs.items()}):
        keep[jobs[name][0][picked]] = True
    num_open = sum(entry["available"] for entry in chosen)
    counts = {
        **samples.write(keep, output.data),
        "num_dropped_task": sum(available.values()) - num_open,
        "num_dropped_zero_vector": int(zero.sum()),
        "num_dropped_not_chosen": num_open - int(keep.sum()),
        "num_tasks": len(tasks),
        "num_tasks_kept": len(chosen),
    }
    write_samples_artifact(samples, output.data, counts, {"tasks": chosen})
    context.log(counts)
