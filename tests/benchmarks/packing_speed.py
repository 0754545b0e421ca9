"""How fast rows are planned and laid, on one core: tables, and one JSON file with all numbers.

    python tests/benchmarks/packing_speed.py --output measurements.json
    python tests/benchmarks/packing_speed.py --only plans --documents 100000

Parts: plans (best fit, first fit, concatenate; from lengths alone), rows (laying planned rows of token ids), knots
(UtK: drawing and laying rows; with their ids, as they are written; with backtracing, whose ids a tokenizer spells).
Lengths are log-normal with a mean of about 900 tokens, as in `shared/specs/data.md` 7.1; tokens are random. Everything
runs in this one thread; what numba compiles and the caches of the operating system are warm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from measurements import write_measurements

from ropewalk.stages.data.packing.bins import RowPlan, best_fit, concatenate, first_fit
from ropewalk.stages.data.packing.knot_rules import KnotRules, RowKind, added_tokens
from ropewalk.stages.data.packing.knots import body_lengths, draw_knots, lay_knots, make_markers, stream_key
from ropewalk.stages.data.packing.row_batches import RowBatch, batches_of_rows, lay_rows
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.schema import TokenizerInfo

PARTS = ("plans", "rows", "knots")
PACKAGES = ("ropewalk", "numpy", "numba", "tokenizers")
ROW_TOKENS = (32_768, 131_072)
TARGETS = {"best fit": 3e6, "UtK": 300e6}
THREE_CHUNKS = (RowKind(rows_fraction=1.0, chunk_probabilities=(0.0, 0.0, 1.0)),)
RULES = {
    "UtK, 30 % of rows in 3 chunks": KnotRules(),
    "UtK, all rows in 3 chunks": KnotRules(row_kinds=THREE_CHUNKS),
    "UtK, all rows in hops of 1024": KnotRules(row_kinds=(RowKind(rows_fraction=1.0, hop_tokens=1024),)),
    "CIP, all rows in 3 chunks": KnotRules(
        row_kinds=(RowKind(rows_fraction=1.0, chunk_probabilities=(0.0, 0.0, 1.0), arrangement="turns"),)
    ),
    "backtracing, 30 % of rows": KnotRules(enable_backtracing=True),
    "backtracing, all rows": KnotRules(row_kinds=THREE_CHUNKS, enable_backtracing=True),
}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--documents", type=int, default=1_000_000, help="plans: number of documents")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="rows and knots: tokens of the corpus")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    asked = parser.parse_args()
    numbers: dict[str, Any] = {}
    for part in asked.only:
        if part == "plans":
            numbers[part] = measure_plans(asked.documents, asked.repetitions)
        else:
            measure = measure_rows if part == "rows" else measure_knots
            numbers[part] = measure(random_corpus(asked.tokens), asked.repetitions)
        show(part, numbers[part])
        if asked.output:
            write_measurements(asked.output, numbers, PACKAGES)


def random_lengths(num_documents: int) -> np.ndarray:
    """Tokens of each document."""
    drawn = np.exp(np.random.default_rng(0).normal(6.3, 1.0, num_documents))
    return np.minimum(drawn.astype(np.int64) + 1, 2**20)


def random_corpus(num_tokens: int) -> Corpus:
    """A corpus of about so many tokens."""
    lengths = random_lengths(num_tokens // 900)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(1).integers(300, 2**15, offsets[-1]).astype(np.int32)
    names = [f"source/document-{number:08d}" for number in range(len(lengths))]
    return Corpus(names, offsets, ids, np.zeros(len(names), np.int64))


def measure_plans(num_documents: int, repetitions: int) -> dict[str, Any]:
    """Documents a second of each planner, and how full its rows are."""
    lengths = random_lengths(num_documents)
    order = np.random.default_rng(2).permutation(num_documents)
    found: dict[str, Any] = {"corpus": {"num_documents": num_documents, "num_tokens": int(lengths.sum())}}
    for row_tokens in ROW_TOKENS:
        capacity = row_tokens - 1
        planners: dict[str, Callable[[], RowPlan]] = {
            "best fit": lambda capacity=capacity: best_fit(lengths, capacity),
            "first fit": lambda capacity=capacity: first_fit(lengths, capacity, order),
            "concatenate": lambda capacity=capacity: concatenate(lengths, capacity, order),
        }
        for name, plan in planners.items():
            rows = plan()
            rates = rates_of(plan, num_documents, repetitions, TARGETS.get(name))
            used = 1 - float(rows.room(capacity).sum()) / (rows.num_rows * capacity)
            found[f"{name}, rows of {row_tokens}"] = rates | {
                "unit": "documents/s",
                "num_rows": rows.num_rows,
                "utilisation_fraction": round(used, 6),
            }
    return found


def measure_rows(corpus: Corpus, repetitions: int) -> dict[str, Any]:
    """Tokens of rows a second that `lay_rows` copies, and with the rows' ids."""
    info = TokenizerInfo(digest="0" * 64, vocab_size=2**15, bos_token_id=0, eos_token_id=1)
    found: dict[str, Any] = {"corpus": described(corpus)}
    for row_tokens in ROW_TOKENS:
        plan = best_fit(corpus.lengths, row_tokens - 1)

        def lay(*, ids: bool, plan: RowPlan = plan, row_tokens: int = row_tokens) -> None:
            for rows in batches_of_rows(plan.num_rows, row_tokens):
                batch = lay_rows(plan.rows(rows), corpus, info, row_tokens)
                if ids:
                    batch.row_ids("pack", 0, rows.tolist(), corpus)

        total = plan.num_rows * row_tokens
        for name, ids in (("lay", False), ("lay and name", True)):
            rates = rates_of(lambda lay=lay, ids=ids: lay(ids=ids), total, repetitions)
            found[f"{name}, rows of {row_tokens}"] = rates | {"unit": "tokens/s"}
    return found


def measure_knots(corpus: Corpus, repetitions: int) -> dict[str, Any]:
    """Tokens of rows a second of UtK."""
    found: dict[str, Any] = {"corpus": described(corpus)}
    for name, rules in RULES.items():
        tokenizer = small_tokenizer(added_tokens(rules)) if rules.writes_text else None
        for row_tokens in ROW_TOKENS:
            tie = Tie(rules, corpus, tokenizer, row_tokens)
            target = TARGETS["UtK"] if name.startswith("UtK") and row_tokens == max(ROW_TOKENS) else None
            unit = {"unit": "tokens/s"}
            rates = rates_of(tie.every_row, tie.num_tokens, repetitions, target)
            found[f"{name}, rows of {row_tokens}"] = rates | unit
            rates = rates_of(lambda tie=tie: tie.every_row(ids=True), tie.num_tokens, repetitions)
            found[f"{name}, with row ids, rows of {row_tokens}"] = rates | unit
    return found


class Tie:
    """UtK on a corpus in memory, as the stage does it for a unit, without writing."""

    def __init__(self, rules: KnotRules, corpus: Corpus, tokenizer: Any, row_tokens: int) -> None:
        order = np.random.default_rng(2).permutation(len(corpus.doc_ids))
        self.rules, self.corpus, self.tokenizer, self.row_tokens = rules, corpus, tokenizer, row_tokens
        self.plan = concatenate(corpus.lengths, row_tokens - 1, order)
        added = {token: 2 + number for number, token in enumerate(added_tokens(rules))}
        self.info = TokenizerInfo(digest="0" * 64, vocab_size=2**15, bos_token_id=0, eos_token_id=1, added_tokens=added)
        self.markers = make_markers(rules, row_tokens, self.info, tokenizer)
        self.num_tokens = self.plan.num_rows * row_tokens

    def every_row(self, *, ids: bool = False) -> None:
        """Make all rows, and with `ids` their ids."""
        for rows in batches_of_rows(self.plan.num_rows, self.row_tokens):
            batch = self.batch(rows)
            if ids:
                batch.row_ids("utk", 0, rows.tolist(), self.corpus)

    def batch(self, rows: np.ndarray) -> RowBatch:
        """Draw and lay some rows."""
        plan = self.plan.rows(rows)
        keys = [stream_key(0, "utk", index) for index in rows.tolist()]
        knots = draw_knots(self.rules, keys, plan.row_offsets, body_lengths(plan, self.row_tokens))
        return lay_knots(self.rules, knots, plan, self.corpus, self.info, self.markers, self.tokenizer, self.row_tokens)


def small_tokenizer(markers: tuple[str, ...]) -> Any:
    """A byte-level BPE of 8,192 ids, trained on Python's standard library."""
    from ropewalk.stages.data.vocabulary import add_markers, train_tokenizer

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    tokenizer = train_tokenizer(texts, 8192, "<|begin|>", "<|end|>")
    add_markers(tokenizer, markers)
    return tokenizer.backend_tokenizer


def described(corpus: Corpus) -> dict[str, int]:
    """How large a corpus is."""
    return {"num_documents": len(corpus.doc_ids), "num_tokens": len(corpus.ids)}


def rates_of(
    call: Callable[[], Any], amount: int, repetitions: int, target: float | None = None
) -> dict[str, float | int | None]:
    """`amount` a second of wall time over some calls, after one that is not counted; and of processor time."""
    call()
    walls, cpus = [], []
    for _ in range(repetitions):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(amount / (time.perf_counter() - wall))
        cpus.append(amount / (time.process_time() - cpu))
    return {
        "median": round(statistics.median(walls)),
        "lowest": round(min(walls)),
        "highest": round(max(walls)),
        "per_core": round(statistics.median(cpus)),
        "repetitions": repetitions,
        "target": target,
    }


def show(part: str, rows: dict[str, Any]) -> None:
    """Print rates as a table, in millions a second."""
    print(f"\n{part}, millions a second; {rows['corpus']}")
    print(f"{'':<58} {'median':>8} {'lowest':>8} {'highest':>8} {'per core':>8}   {'target':>6}")
    for name, row in rows.items():
        if name == "corpus":
            continue
        rates = " ".join(f"{row[column] / 1e6:8.1f}" for column in ("median", "lowest", "highest", "per_core"))
        target = "" if row["target"] is None else f"{row['target'] / 1e6:6.0f}"
        print(f"{name:<58} {rates}   {target}", flush=True)


if __name__ == "__main__":
    main()
