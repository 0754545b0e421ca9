"""The shared tasks in datatrove, from JSON Lines: TASK INPUT OUTPUT TOKENIZER. One task and one worker throughout."""

from __future__ import annotations

from process_report import report  # isort: skip  (starts the clock)

import time
from collections.abc import Callable
from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import ParquetWriter

NUM_BANDS, BAND_SIZE = 14, 8
"""The default: 112 permutations."""


class _SplitAtSpaces:
    """Words as Data-Juicer takes them, in place of spaCy's."""

    def word_tokenize(self, text: str) -> list[str]:
        """What stands between white space."""
        return text.split()


def _text(document: Document) -> str:
    return document.text


def _run(name: str, output: Path, steps: list, spent: dict[str, float], tasks: int = 1) -> None:
    began = time.perf_counter()
    LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(output / f"log-{name}")).run()
    spent[name] = time.perf_counter() - began


def _read(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    spent: dict[str, float] = {}
    _run("read", output, [JsonlReader(str(source)), ParquetWriter(str(output / "kept"))], spent)
    return spent


def _exact(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    spent: dict[str, float] = {}
    config = ExactDedupConfig(content_getter=_text)
    signatures, found = str(output / "signatures"), str(output / "found")
    _run("sign", output, [JsonlReader(str(source)), ExactDedupSignature(signatures, config)], spent)
    _run("find", output, [ExactFindDedups(signatures, found, config)], spent)
    steps = [JsonlReader(str(source)), ExactDedupFilter(found, config), ParquetWriter(str(output / "kept"))]
    _run("filter", output, steps, spent)
    return spent


def _near(split_at_spaces: bool) -> Callable[[Path, Path, Path], dict[str, float]]:
    def run(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
        spent: dict[str, float] = {}
        config = MinhashConfig(n_grams=5, num_buckets=NUM_BANDS, hashes_per_bucket=BAND_SIZE)
        folders = {name: str(output / name) for name in ("signatures", "buckets", "found", "kept")}
        signature = MinhashDedupSignature(folders["signatures"], config)
        if split_at_spaces:
            signature.word_tokenizer = _SplitAtSpaces()
        _run("sign", output, [JsonlReader(str(source)), signature], spent)
        pairs = MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=config)
        _run("buckets", output, [pairs], spent, tasks=NUM_BANDS)
        _run("cluster", output, [MinhashDedupCluster(folders["buckets"], folders["found"], config)], spent)
        steps = [JsonlReader(str(source)), MinhashDedupFilter(folders["found"]), ParquetWriter(folders["kept"])]
        _run("filter", output, steps, spent)
        return spent

    return run


def _tokenise(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    spent: dict[str, float] = {}
    step = DocumentTokenizer(str(output / "tokens"), str(tokenizer / "tokenizer.json"), shuffle_documents=False)
    _run("tokenise", output, [JsonlReader(str(source)), step], spent)
    return spent


if __name__ == "__main__":
    report({
        "read": _read,
        "exact": _exact,
        "near": _near(False),
        "near, words at spaces": _near(True),
        "tokenise": _tokenise,
    })  # fmt: skip
