"""Scores of single samples and documents: the only numbers that later tables, plots and intervals are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ropewalk.stages.evaluation.backends import Backend
from ropewalk.stages.evaluation.tasks import Sample
from ropewalk.stages.schema import stable_id

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NEIGHBOURHOOD_TOKENS = 24
"""Tokens shown on either side of the asked fact."""


def exact_match(generated: Sequence[int], answer: Sequence[int]) -> float:
    """1.0 if the generated ids are the answer's ids, else 0.0.

    Equality of ids, not of substrings: a longer number that contains the answer does not score.
    """
    return float(list(generated) == list(answer))


def prediction_record(sample: Sample, generated: Sequence[int], seed: int, tokenizer: Any) -> dict[str, Any]:
    """A row of Predictions. An answer that ended early says so in `finish_reason` and scores what it deserves."""
    return {
        "sample_id": sample.sample_id,
        "task": sample.task,
        "length_tokens": sample.length_tokens,
        "depth_fraction": sample.depth_fraction,
        "seed": seed,
        "prompt_sha256": sample.prompt_sha256,
        "num_prompt_tokens": len(sample.prompt_ids),
        "prediction": tokenizer.decode(list(generated)),
        "references": [tokenizer.decode(sample.answer_ids)],
        "score": exact_match(generated, sample.answer_ids),
        "finish_reason": "length" if len(generated) == len(sample.answer_ids) else "stop",
    }


def sample_record(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """What the sample was made of: the asked fact with the text around it, and where the text came from."""
    end = sample.fact_start + sample.fact_tokens
    ids = sample.prompt_ids
    return {
        "sample_id": sample.sample_id,
        "depth": sample.depth,
        "num_documents": sample.num_documents,
        "text_before": tokenizer.decode(ids[max(1, sample.fact_start - NEIGHBOURHOOD_TOKENS) : sample.fact_start]),
        "fact": tokenizer.decode(ids[sample.fact_start : end]),
        "text_after": tokenizer.decode(ids[end : end + NEIGHBOURHOOD_TOKENS]),
    }


def loss_documents(
    documents: Sequence[np.ndarray], doc_ids: Sequence[str], *, num_documents: int, num_tokens: int, seed: int
) -> tuple[list[int], int]:
    """Indices of the documents whose losses are measured, and how many documents are long enough.

    At most `num_documents` of those with at least `num_tokens` tokens, in an order that depends on the seed and the
    ids alone. Raises ValueError if fewer than two are long enough: an interval needs two.
    """
    eligible = [index for index, document in enumerate(documents) if len(document) >= num_tokens]
    if len(eligible) < 2:
        raise ValueError(
            f"loss_tokens is {num_tokens} and {len(eligible)} of heldout's {len(documents)} documents are that long: "
            "lower loss_tokens or hold out longer documents"
        )
    eligible.sort(key=lambda index: stable_id(seed, "loss-document", doc_ids[index]))
    return eligible[:num_documents], len(eligible)


def loss_records(
    backend: Backend, sequences: Sequence[Sequence[int]], doc_ids: Sequence[str], edges: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The losses of a batch by position. Each sequence begins with a begin mark, position 0, which is never a target.

    Sums over tokens, not means of window means: a bucket's loss is later the sum over documents by their tokens.
    Raises ValueError if a loss is not a finite number.
    """
    losses_BL = backend.token_losses(sequences)
    for doc_id, losses_L in zip(doc_ids, losses_BL, strict=True):
        if not all(map(math.isfinite, losses_L)):
            raise ValueError(
                f"the model's loss on document {doc_id} is not finite: its weights or precision are broken"
            )
        for start, end in pairwise(edges):
            bucket = losses_L[max(start - 1, 0) : end - 1]
            yield {
                "doc_id": doc_id,
                "position_start": start,
                "position_end": end,
                "sum_nll": float(bucket.sum()),
                "num_tokens": len(bucket),
            }


def losses_schema() -> pa.Schema:
    """Arrow schema of the losses by document and position."""
    import pyarrow as pa

    return pa.schema(
        [
            ("doc_id", pa.string()),
            ("position_start", pa.int64()),
            ("position_end", pa.int64()),
            ("sum_nll", pa.float64()),
            ("num_tokens", pa.int64()),
        ]
    )


def samples_schema() -> pa.Schema:
    """Arrow schema of what samples are made of."""
    import pyarrow as pa

    strings = [(name, pa.string()) for name in ("text_before", "fact", "text_after")]
    return pa.schema([("sample_id", pa.string()), ("depth", pa.float64()), ("num_documents", pa.int32()), *strings])
