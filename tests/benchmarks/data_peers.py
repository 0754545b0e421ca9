"""Other tools beside Ropewalk's data stages on one corpus: tables, and one JSON file with all numbers.

    python tests/benchmarks/data_peers.py --output measurements.json
    python tests/benchmarks/data_peers.py --only shared --tools datatrove --generations 1 --environments FOLDER

Parts: shared (what datatrove and Data-Juicer do too, from JSON Lines to Parquet: read, exact deduplication, MinHash
deduplication of word 5-grams at a Jaccard similarity of 0.8, tokenise with one tokenizer of 32,000 ids), packing
(SPLiCe beside BM25Chunk, see `bm25_chunk.py`; no tool packages either).

Shared tasks: each is a command of its own, interpreter and imports included, one worker, one thread; the tools take
turns. Each has its own environment, versions in `peers/`, and its natural settings but for these: 128 permutations in
Data-Juicer instead of 256; datatrove's default is 112 in 14 bands of 8. A row `words at spaces` is datatrove with
`str.split` in place of spaCy, its default, which takes most of its time. Neither verifies the pairs that its bands
find. Ropewalk's ingest removes exact duplicates as it reads, so both are one row, and `near` and `tokenise` are ingest
and deduplicate, ingest and encode. Data-Juicer has no operator that writes tokens. datatrove's tokens have the
tokenizer's begin token in front of each document, so one more a document. Peak memory is that of the largest process.
The corpus (`planted_duplicates.py`) says how many duplicates there are to find; for `tokenise` it is without the exact
copies, so that all have the same documents.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import bm25_chunk
import data_corpora
from measurements import write_measurements
from planted_duplicates import KINDS, Planted, plant
from timings import Sample, progress, show, summary, timed_command

PACKAGES = ("ropewalk", "tokenizers", "pyarrow", "numpy", "numba", "datasketch", "bm25s")
PARTS = ("shared", "packing")
PEERS = Path(__file__).parent / "peers"
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    **{f"{name}_NUM_THREADS": "1" for name in ("RAYON", "OMP", "OPENBLAS", "MKL")},
}
ONCE = {("datatrove", "near")}
"""Takes longer than all else together, so it is measured in the first round only."""
SMALL = 16
"""One in so many files of the library makes the corpus of the first round, which fills the caches."""


@dataclass(frozen=True)
class Tool:
    """A tool, its package, and where its tasks leave what they kept."""

    name: str
    package: str
    script: str
    tasks: Mapping[str, str]
    """By task: glob of the Parquet files of the documents that are left; nothing for tokens."""
    id_column: str = "id"


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "ropewalk",
            "ropewalk",
            "ropewalk_tasks.py",
            {
                "exact": "ingest/data/documents-*.parquet",
                "near": "deduplicate/data/documents-*.parquet",
                "tokenise": "",
            },
            "doc_id",
        ),
        Tool(
            "datatrove",
            "datatrove",
            "datatrove_tasks.py",
            {
                **dict.fromkeys(("read", "exact", "near", "near, words at spaces"), "kept/*.parquet"),
                "tokenise": "",
            },
        ),
        Tool(
            "data-juicer",
            "py-data-juicer",
            "data_juicer_tasks.py",
            dict.fromkeys(("read", "exact", "near"), "kept/*.parquet"),
        ),
    )
}
TITLES = {
    ("exact", "ropewalk"): "read and exact",
}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--generations", type=int, default=2, help="shared: size of the corpus, 44 MB each")
    parser.add_argument("--documents", type=int, default=20_000, help="packing: synthetic documents")
    others = [name for name in TOOLS if name != "ropewalk"]
    parser.add_argument("--tools", nargs="*", choices=others, default=others, metavar="TOOL", help=", ".join(others))
    parser.add_argument("--environments", type=Path, help="keep the tools' environments here, and use what is there")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    asked = parser.parse_args()
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ropewalk-benchmark-") as name:
        for part in asked.only:
            folder = Path(name) / part
            folder.mkdir()
            numbers[part] = found = _measure(part, asked, folder)
            show(f"{part}, seconds", found["times"])
            _show_found(found["found"])
            if asked.output:
                write_measurements(asked.output, numbers, PACKAGES)


def _measure(part: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if part == "packing":
        return bm25_chunk.measure(folder, asked.repetitions, asked.documents)
    environments = (asked.environments or folder / "environments").absolute()
    return measure_shared(folder, asked.repetitions, asked.generations, asked.tools, environments)


def _show_found(rows: Mapping[str, Mapping[str, Any]]) -> None:
    print()
    for name, row in rows.items():
        print(f"{name:<44} " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


@dataclass
class Measured:
    """What was found of one task of one tool."""

    samples: list[Sample] = field(default_factory=list)
    imports: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Beside the times."""
        numbers = {"import_seconds": round(statistics.median(self.imports), 2), "peak_mib": round(max(self.peaks))}
        return numbers | self.outcome


def measure_shared(
    folder: Path, repetitions: int, generations: int, names: Sequence[str], environments: Path
) -> dict[str, Any]:
    """Every task in every tool, in turns, after a round with a small corpus."""
    programs = {"ropewalk": Path(sys.executable)} | dict(install(names, environments))
    data_corpora.write_tokenizer(folder / "tokenizer")
    small, planted = plant(1, SMALL), plant(generations)
    sizes = {}
    for name, corpus in (("small", small), ("full", planted)):
        (folder / name).mkdir()
        sizes[name] = corpus.write(folder / name / "corpus")
        corpus.write(folder / name / "distinct", [kind for kind in KINDS if kind != "exact"])
    jobs = [(TOOLS[name], task) for name in programs for task in TOOLS[name].tasks]
    measured = {(tool.name, task): Measured() for tool, task in jobs}
    for tool, task in jobs:
        _run(tool, task, programs[tool.name], folder, "small", small)
    for repetition in range(repetitions):
        shift = repetition * len(jobs) // max(1, repetitions)
        for tool, task in jobs[shift:] + jobs[:shift]:
            if repetition and (tool.name, task) in ONCE:
                continue
            sample, report, outcome = _run(tool, task, programs[tool.name], folder, "full", planted)
            mine = measured[tool.name, task]
            mine.samples.append(sample)
            mine.imports.append(report["import_seconds"])
            mine.peaks.append(report["peak_mib"])
            mine.outcome = outcome | {f"{part}_seconds": round(spent, 2) for part, spent in report["parts"].items()}
            progress(f"  round {repetition + 1} of {repetitions}, {tool.name}, {task}: {sample.wall:.1f} s")
    order = sorted(measured, key=lambda each: ["read", "exact", "near", "tokenise"].index(each[1].split(",")[0]))
    titles = {(name, task): f"{TITLES.get((task, name), task)}: {name}" for name, task in order}
    return {
        "times": {title: summary(measured[key].samples) for key, title in titles.items()},
        "found": {title: measured[key].described() for key, title in titles.items()},
        "corpus": {"num_bytes": sizes["full"], "num_documents": len(planted.texts), "copies": planted.described()},
        "tools": {name: _version(TOOLS[name].package, python) for name, python in programs.items()},
    }


def _run(
    tool: Tool, task: str, python: Path, folder: Path, size: str, planted: Planted
) -> tuple[Sample, dict[str, Any], dict[str, Any]]:
    """One task in a process of its own: its time, what it reported, and what is in its output."""
    output = folder / "output"
    (output / "home").mkdir(parents=True)
    source = folder / size / ("distinct" if task == "tokenise" else "corpus")
    command = [python, PEERS / tool.script, task, source, output, folder / "tokenizer"]
    sample = timed_command([str(each) for each in command], folder, ENVIRONMENT | {"HOME": str(output / "home")})
    report = json.loads((output / "report.json").read_text())
    outcome = {"num_tokens": _num_tokens(output)}
    if pattern := tool.tasks[task]:
        outcome = planted.judged(set(_kept(output, pattern, tool.id_column)))
    shutil.rmtree(output)
    return sample, report, outcome


def _kept(output: Path, pattern: str, column: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    for path in output.glob(pattern):
        for name in pq.ParquetFile(path).read([column]).column(column).to_pylist():
            yield name.rpartition("/")[2]


def _num_tokens(output: Path) -> int:
    """Of Ropewalk's artifact, or of datatrove's files of two bytes a token."""
    artifact = output / "encode/data/artifact.json"
    if artifact.exists():
        return json.loads(artifact.read_text())["counts"]["num_tokens"]
    return sum(path.stat().st_size for path in output.glob("tokens/*.ds")) // 2


def install(names: Sequence[str], environments: Path) -> Iterator[tuple[str, Path]]:
    """The interpreter of each tool, in an environment that is made if there is none; if that fails, it is left out."""
    for name in names:
        folder = environments / name
        if not (folder / "complete").exists():
            progress(f"  installing {name}")
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*pip, "-r", str(PEERS / f"{name}.txt")], capture_output=True, text=True)
            if done.returncode:
                print(f"{name} is left out, it does not install: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            (folder / "complete").touch()
        yield name, folder / "bin/python"


def _version(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
