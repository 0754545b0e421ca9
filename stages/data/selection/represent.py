"""Keeps the samples that represent the best ones: facility location over the top of a ranking (Superfiltering.D).

Reads `samples` (Chats or Documents), `scores` of them and `vectors` of them (by `sample_id`). Writes the chosen
samples, in the order of the table. Source: Superfiltering (arXiv 2402.00530, section 6; tianyi-lab/Superfiltering
code_diversity_fla/do_fla.py): the top `pool_fraction` by score, of them `fraction` by greedy facility location on
Euclidean similarity of unit embeddings. Both are shares of all samples that came in; the published selection by score
takes them of 52,002 (Alpaca's size, written into the code) whatever the data are, and we do not.

A pool beyond `part_samples` is cut into equal parts drawn by id, because the similarities are a square; each part gives
its share (largest remainder).

Lost, and counted: samples without a score, with a score below `min_score`, below the pool, with a zero
vector, and those that were not chosen. Memory: ids and scores of all samples; a worker holds one part's similarities,
4 bytes times its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.quotas import largest_remainder
from ropewalk.stages.data.selection.ranking import RankedSamples, ranked_samples
from ropewalk.stages.data.selection.representatives import Part, choose_representatives, run_positions
from ropewalk.stages.data.selection.sample_vectors import place_vectors
from ropewalk.stages.data.selection.samples import check_samples, open_samples, write_samples_artifact
from ropewalk.stages.data.selection.submodular import Similarity, split_parts
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "represent"
VERSION = 1
check = check_samples


class RepresentConfig(Record):
    """How many, and of which pool."""

    pool_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of all samples that is chosen from: those with the best scores."""
    fraction: float = Field(default=0.02, gt=0, le=1)
    """Share of all samples to keep, at least one; less where the pool is smaller."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """The pool has samples with this score or a higher one; 0 leaves out an IFD of 1 and more. None: all."""
    similarity: Similarity = "euclidean"
    part_samples: int = Field(default=8_192, ge=1)
    """Samples whose similarities are held at once, by each worker; 8,192 take 256 MiB."""

    @model_validator(mode="after")
    def _smaller_than_pool(self) -> Self:
        if self.fraction > self.pool_fraction:
            raise ValueError(f"fraction {self.fraction} is more than pool_fraction {self.pool_fraction}")
        return self


def pool_of(config: RepresentConfig, ranked: RankedSamples, num_in: int) -> tuple[np.ndarray, int]:
    """Entries of the ranking that are chosen from, best first; and how many of all have `min_score`.

    Raises ValueError if there are none.
    """
    order = ranked.order
    if config.min_score is not None:
        order = order[ranked.scores[order] >= config.min_score]
    if not len(order):
        raise ValueError(f"no score reaches min_score {config.min_score}: lower it")
    return order[: share_of(config.pool_fraction, num_in)], len(order)


def share_of(fraction: float, total: int) -> int:
    """A share of samples, rounded down, at least one."""
    # Through the decimal spelling: 0.29 of 100 is 29, although the nearest double is a little less.
    return max(1, int(Fraction(repr(fraction)) * total))


def run(config: RepresentConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the chosen samples. Raises ValueError if scores or vectors are those of other samples."""
    import numpy as np
    import pyarrow as pa

    samples = open_samples(inputs["samples"], "samples")
    ranked = ranked_samples(samples.ids, inputs["scores"])
    num_in = len(samples.ids)
    pool, num_good = pool_of(config, ranked, num_in)
    ids = ranked.ids.take(pa.array(pool))
    parts = split_parts(ids.to_pylist(), config.part_samples)
    vectors, zero = place_vectors(inputs["vectors"], ids, run_positions(parts, len(pool)), context.work)
    available = {f"{number:06d}": int((~zero[part]).sum()) for number, part in enumerate(parts)}
    budget = min(share_of(config.fraction, num_in), sum(available.values()))
    if not budget:
        raise ValueError("slot vectors holds zero vectors alone: embed the samples with an encoder that knows them")
    quotas = largest_remainder(available, budget)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    jobs = {
        name: Part(vectors, end - len(part), end, quotas[name], config.similarity)
        for name, end, part in zip(available, ends, parts, strict=True)
    }
    keep = np.zeros(num_in, dtype=np.bool_)
    for name, chosen in choose_representatives(context, jobs):
        keep[ranked.numbers[pool[parts[int(name)][chosen]]]] = True
    counts = {
        **samples.write(keep, output.data),
        "num_dropped_no_score": num_in - len(ranked.ids),
        "num_dropped_low_score": len(ranked.ids) - num_good,
        "num_dropped_below_pool": num_good - len(pool),
        "num_dropped_zero_vector": int(zero.sum()),
        "num_dropped_not_chosen": len(pool) - int(zero.sum()) - budget,
    }
    write_samples_artifact(samples, output.data, counts, {"num_parts": len(parts), "pool_samples": len(pool)})
    context.log(counts)
