"""Keeps the best samples that are unlike each other: DEITA's score-first, diversity-aware choice.

Reads `samples` (Chats or Documents), `scores` of them and `vectors` of them (by `sample_id`). Writes the kept samples,
in the order of the table. Source: DEITA (arXiv 2312.15685, section 2.4, hkust-nlp/deita): samples are walked in order
of score, and one is kept if its cosine to every kept one is at most `max_similarity`, until `num_samples` are kept.

Where paper and code differ we follow the paper: the code walks in batches and also drops what is like a sample of its
batch that was itself dropped. Equal scores are walked in the order of ids; the code leaves their order to chance.

Lost, and counted: samples without a score (the scoring stage dropped them), with a zero vector, too like a kept one,
and those behind the last kept one (`num_dropped_after_quota`). Time: samples walked times samples kept times the
dimensions, at some 1e10 multiplications a second on one core, so 300,000 samples of 384 dimensions walked for 6,000
take about a minute. Memory: ids and scores of all samples, vectors of the kept; the others lie in scratch, two bytes a
number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.ranking import ranked_samples
from ropewalk.stages.data.selection.sample_vectors import SampleVectors, place_vectors
from ropewalk.stages.data.selection.samples import check_samples, open_samples, write_samples_artifact
from ropewalk.stages.data.selection.submodular import distinct_order
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "diversify"
VERSION = 1
check = check_samples

_READ_SAMPLES = 16_384


class DiversifyConfig(Record):
    """How unlike, and how many."""

    max_similarity: float = Field(default=0.9, ge=-1, le=1)
    """Largest cosine to a kept sample."""
    num_samples: int | None = Field(default=None, ge=1)
    """How many to keep; fewer where no more are unlike each other. None: all that are."""


def _blocks(vectors: SampleVectors, context: Context) -> Iterator[np.ndarray]:
    for begin in range(0, vectors.num_samples, _READ_SAMPLES):
        yield vectors.rows(begin, min(begin + _READ_SAMPLES, vectors.num_samples))
        context.progress(min(begin + _READ_SAMPLES, vectors.num_samples), vectors.num_samples, "samples")


def run(config: DiversifyConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the kept samples. Raises ValueError if scores or vectors are those of other samples."""
    import numpy as np

    samples = open_samples(inputs["samples"], "samples")
    ranked = ranked_samples(samples.ids, inputs["scores"])
    places = np.empty(len(ranked.ids), dtype=np.int64)
    places[ranked.order] = np.arange(len(ranked.order))
    vectors, zero = place_vectors(inputs["vectors"], ranked.ids, places, context.work)
    alive = np.flatnonzero(~zero[ranked.order])
    if not len(alive):
        raise ValueError("slot vectors holds zero vectors alone: embed the samples with an encoder that knows them")
    budget = min(config.num_samples or len(alive), len(alive))
    blocks = (block[block.any(axis=1)] for block in _blocks(vectors, context))
    kept, walked = distinct_order(blocks, config.max_similarity, budget)
    keep = np.zeros(len(samples.ids), dtype=np.bool_)
    keep[ranked.numbers[ranked.order[alive[kept]]]] = True
    counts = {
        **samples.write(keep, output.data),
        "num_dropped_no_score": len(samples.ids) - len(ranked.ids),
        "num_dropped_zero_vector": int(zero.sum()),
        "num_dropped_too_similar": walked - len(kept),
        "num_dropped_after_quota": len(alive) - walked,
    }
    lowest = float(ranked.scores[ranked.order[alive[kept[-1]]]])
    write_samples_artifact(samples, output.data, counts, {"lowest_score": lowest})
    context.log({**counts, "lowest_score": lowest})
