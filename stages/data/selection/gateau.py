"""GATEAU: scores long chats by how much a long window helps, and by whether attention finds what helps.

Reads `chats` (one user turn and one assistant turn each, see `long_exchange`), `short_model` and `long_model` (two
models of one family and vocabulary, the second with a longer window). Writes Scores with the parts below. Method: Si et
al., "GATEAU: Selecting Influential Samples for Long Context Alignment", EMNLP 2025, arXiv 2410.15633; code
S1s-Z/GATEAU, which cannot be run as published.

Homologous models' guidance. With context c, instruction x and response y in the template,

    ppl_m = exp(mean cross entropy of y's tokens given c and x)         m: the short and the long model
    n_m   = (ppl_m - min) / (max - min) over the data set, `perplexity_scale`
    hmg   = softmax over the data set of n_short - n_long, `scale`

Contextual awareness. With c cut into segments s_i of `segment_tokens`,

    p_i = ppl_long(y | s_i, x), each segment alone          a_i = mean attention from y's tokens to those of s_i, over
                                                                  tokens, heads and layers, in one pass over all of c
    cas = cos(softmax(a), softmax(p)), `segment_scale`

A high cas says that attention falls on segments that do not help to predict y: a hard sample. At last

    score = alpha * hmg + (1 - alpha) * cas on the same scale; higher is better.

alpha 0.8 is published for long samples mixed with short ones ("real world"), 0.7 for long ones alone ("limited").

Where we differ from the published code, which never computes cas:
* Both parts are on one scale. In the code hmg is about 1/n beside a cas of about 1, so alpha would hardly matter.
* Perplexities are clipped at a percentile, or are ranks, before min-max, which one outlier would decide; where all are
  equal, min-max gives 0.5 instead of a division by zero.
* Means run over the tokens of y alone (the code averages over ignored places too), segments are real (the code pads
  contexts to 500 segments and counts the padding in both vectors), the last one may be shorter, attention masks are
  causal and nothing else (the code masks with the ids themselves). Losses are float32 or wider.
* Both models read the same tokens. Texts over `max_tokens` lose tokens on the left, in both halves of the method;
  instruction and response are cut to `part_tokens` for the contextual half only, as published. All cuts are counted.
* Parts of two passes are joined by id, and a missing id is an error.
* The raw softmax of attention means, which are of the order of 1 over the number of tokens, is all but uniform, so the
  published cas tells how uneven p is more than where attention goes. `segment_scale` "standardised" puts both vectors
  on a spread of 1 first, so that attention counts; it is not the published method.
* The short model reads long texts with the NTK-aware base: `short_positions` "dynamic" by each text's length, as
  published, "ntk" one base for `max_tokens`.

Lost, by reason: chats that are not one exchange, have no context, no response, no room for a context beside
instruction and response, or a context of one segment (whose cas would be 1, the highest, for no reason).

Cost a sample of N tokens: N with each model, N with attention of y's rows, and N/segment_tokens passes of
(segment_tokens + x + y) tokens: at 64,000 tokens about 260,000 with the long model. Models are held one at a time, once
a worker. Memory beside the model: one pass over N tokens (see `language_model`), never N^2; a row a sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checkpoint import extends_vocabulary
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.language_model import (
    LanguageModel,
    LayerAttention,
    Precision,
    TextEncoder,
    load_model,
    observe_attention,
    perplexity,
    token_losses,
    truncate,
)
from ropewalk.stages.data.selection.long_exchange import ExchangeTokens, LongExchange, UnusableError, lay_out
from ropewalk.stages.data.selection.long_positions import stretch_positions
from ropewalk.stages.data.selection.scales import Scale, fractional_ranks, min_max, rescale, softmax, standardise
from ropewalk.stages.data.selection.scores import check_scores, records_table, with_scores, write_scores
from ropewalk.stages.schema import Record, read_artifact, shard_paths, write_shard
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "gateau"
VERSION = 1
check = check_scores

LONG_PARTS = ("ppl_long", "cas", "num_tokens", "num_response_tokens")
PARTS = ("ppl_short", "hmg", *LONG_PARTS)
REASONS = ("not_one_exchange", "no_context", "no_response", "no_room", "one_segment")
_CUTS = ("num_cut_samples", "num_cut_tokens", "num_cut_instructions", "num_cut_responses")


class GateauConfig(Record):
    """How samples are read, and how the parts make the score."""

    alpha: float = Field(default=0.8, ge=0, le=1)
    """Weight of the homologous models' part; the rest is contextual awareness."""
    max_tokens: int = Field(default=64_000, ge=16)
    """Longest text, in tokens, template and begin token included; longer ones are cut on the left."""
    segment_tokens: int = Field(default=128, ge=1)
    """Tokens of a segment of the context."""
    part_tokens: int = Field(default=500, ge=1)
    """Of instruction and response, contextual awareness reads the first so many tokens each."""
    short_positions: Literal["none", "ntk", "dynamic"] = "dynamic"
    """How the short model reads beyond its window; "none" needs a model that reads `max_tokens`."""
    perplexity_scale: Literal["clipped", "ranks"] = "clipped"
    """Before the gap is taken: min-max of perplexities clipped at `clip_percentile`, or their ranks."""
    clip_percentile: float = Field(default=99.0, gt=0, le=100)
    """For "clipped"; 100 is the published min-max."""
    scale: Scale = "softmax"
    """What both parts are put on, over the data set, before they are added."""
    segment_scale: Literal["softmax", "standardised"] = "softmax"
    """What the softmax over a sample's segments is taken of: the values themselves, or their z-scores."""
    dtype: Precision = "float32"
    """Of the models' weights and activations."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens of a batch of segments; bounds memory, and the last digits of the scores depend on it."""


def cut_to_window(tokens: ExchangeTokens, prefix: list[int], max_tokens: int) -> tuple[ExchangeTokens, int]:
    """The exchange without what does not fit on the left of its context, and how many tokens that is.

    Raises UnusableError("no_room") if no token of the context would be left.
    """
    room = max_tokens - len(prefix) - (len(tokens) - len(tokens.context))
    if room < 1:
        raise UnusableError("no_room")
    context, num_cut = truncate(tokens.context, room, keep="tail")
    return ExchangeTokens(context, *_parts_behind_context(tokens)), num_cut


def _parts_behind_context(tokens: ExchangeTokens) -> tuple[list[int], list[int], list[int], list[int]]:
    return tokens.instruction_heading, tokens.instruction, tokens.response_heading, tokens.response


def segments_of(context: list[int], segment_tokens: int) -> list[list[int]]:
    """The context in order, in segments of equal length; the last may be shorter."""
    return [context[first : first + segment_tokens] for first in range(0, len(context), segment_tokens)]


def segment_perplexities(
    loaded: LanguageModel, tokens: ExchangeTokens, prefix: list[int], segment_tokens: int, batch_tokens: int
) -> np.ndarray:
    """p: the response's perplexity given each segment alone and the instruction."""
    import numpy as np

    behind = [*tokens.question, *tokens.response]
    sequences = [[*prefix, *segment, *behind] for segment in segments_of(tokens.context, segment_tokens)]
    firsts = [len(sequence) - len(tokens.response) for sequence in sequences]
    losses = token_losses(loaded, sequences, batch_tokens=batch_tokens, first_targets=firsts)
    return np.asarray([perplexity(found, "a response") for found in losses])


def segment_attention(
    loaded: LanguageModel, tokens: ExchangeTokens, prefix: list[int], segment_tokens: int
) -> np.ndarray:
    """a: attention of the response's tokens to the tokens of each segment, mean over tokens, heads and layers."""
    import numpy as np
    import torch

    ids = [*prefix, *tokens.context, *tokens.question, *tokens.response]
    first, end = len(prefix), len(prefix) + len(tokens.context)
    total = torch.zeros(len(tokens.context), dtype=torch.float64, device=loaded.device)
    num_rows = 0

    def see(layer: LayerAttention) -> None:
        nonlocal total, num_rows
        for _, weights_HRS in layer.blocks(len(ids) - len(tokens.response), len(ids)):
            total += weights_HRS[:, :, first:end].sum((0, 1), dtype=torch.float64)
            num_rows += weights_HRS.shape[0] * weights_HRS.shape[1]

    observe_attention(loaded, ids, see)
    means = (total / num_rows).cpu().numpy()
    return np.asarray([piece.mean() for piece in np.split(means, range(segment_tokens, len(means), segment_tokens))])


def contextual_awareness(
    attention: np.ndarray, perplexities: np.ndarray, segment_scale: Literal["softmax", "standardised"]
) -> float:
    """cas: the cosine of the softmaxes of both vectors over the segments."""
    import numpy as np

    prepare: Callable[[np.ndarray], np.ndarray] = standardise if segment_scale == "standardised" else np.asarray
    a, p = softmax(prepare(attention)), softmax(prepare(perplexities))
    return float(a @ p / math.sqrt((a @ a) * (p @ p)))


def combine(
    config: GateauConfig, ppl_short: np.ndarray, ppl_long: np.ndarray, cas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """hmg and the score of every sample of a data set."""

    def scaled(perplexities: np.ndarray) -> np.ndarray:
        if config.perplexity_scale == "ranks":
            return fractional_ranks(perplexities)
        return min_max(perplexities, clip_percentile=config.clip_percentile)

    hmg = rescale(scaled(ppl_short) - scaled(ppl_long), config.scale)
    return hmg, config.alpha * hmg + (1 - config.alpha) * rescale(cas, config.scale)


def read_samples(
    config: GateauConfig, path: Path, encoder: TextEncoder, counts: Counter[str]
) -> Iterator[tuple[str, str, ExchangeTokens]]:
    """Id, source and tokens of each usable chat of a shard; the others, and cuts, go into `counts`."""
    import pyarrow.parquet as pq

    for row in pq.read_table(path, columns=["sample_id", "source", "messages"]).to_pylist():
        counts["num_in"] += 1
        try:
            exchange = LongExchange.of(row["messages"])
            tokens, num_cut = cut_to_window(lay_out(exchange, encoder), encoder.prefix, config.max_tokens)
            if len(tokens.context) <= config.segment_tokens:
                raise UnusableError("one_segment")
        except UnusableError as reason:
            counts[f"num_dropped_{reason}"] += 1
            continue
        counts["num_cut_samples"] += num_cut > 0
        counts["num_cut_tokens"] += num_cut
        counts["num_cut_instructions"] += len(tokens.instruction) > config.part_tokens
        counts["num_cut_responses"] += len(tokens.response) > config.part_tokens
        yield row["sample_id"], row["source"], tokens


class ShortPass:
    """The short model's perplexities, one shard of chats after another."""

    def __init__(self, config: GateauConfig, folder: Path) -> None:
        self._config, self._encoder = config, TextEncoder(folder)
        self._loaded = load_model(
            folder, dtype=config.dtype, window=config.max_tokens, extension=config.short_positions
        )

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write `parts` with `ppl_short`; returns the counts."""
        number, path = shard
        counts: Counter[str] = Counter()
        records = [
            {"sample_id": sample_id, "source": source, "ppl_short": self._perplexity(tokens)}
            for sample_id, source, tokens in read_samples(self._config, path, self._encoder, counts)
        ]
        write_shard(folder, "parts", number, records_table(records, ["ppl_short"]))
        return dict(counts)

    def _perplexity(self, tokens: ExchangeTokens) -> float:
        if self._config.short_positions == "dynamic" and self._loaded.own_window < self._config.max_tokens:
            stretch_positions(self._loaded, len(self._encoder.prefix) + len(tokens))
        return whole_perplexity(self._loaded, tokens, self._encoder.prefix)


class LongPass:
    """The long model's perplexities and contextual awareness, one shard of chats after another."""

    def __init__(self, config: GateauConfig, folder: Path, tokenizer: Path) -> None:
        self._config, self._encoder = config, TextEncoder(tokenizer)
        self._loaded = load_model(folder, dtype=config.dtype, window=config.max_tokens)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write `parts`, all but what the short model gives; returns the counts."""
        number, path = shard
        counts: Counter[str] = Counter()
        records = [
            {"sample_id": sample_id, "source": source, **self._parts(tokens)}
            for sample_id, source, tokens in read_samples(self._config, path, self._encoder, counts)
        ]
        write_shard(folder, "parts", number, records_table(records, LONG_PARTS))
        return dict(counts)

    def _parts(self, tokens: ExchangeTokens) -> dict[str, float]:
        prefix = self._encoder.prefix
        return {
            "ppl_long": whole_perplexity(self._loaded, tokens, prefix),
            "cas": self._awareness(tokens),
            "num_tokens": len(prefix) + len(tokens),
            "num_response_tokens": len(tokens.response),
        }

    def _awareness(self, tokens: ExchangeTokens) -> float:
        config, prefix = self._config, self._encoder.prefix
        cut = ExchangeTokens(
            tokens.context,
            tokens.instruction_heading,
            truncate(tokens.instruction, config.part_tokens, keep="head")[0],
            tokens.response_heading,
            truncate(tokens.response, config.part_tokens, keep="head")[0],
        )
        attention = segment_attention(self._loaded, cut, prefix, config.segment_tokens)
        alone = segment_perplexities(self._loaded, cut, prefix, config.segment_tokens, config.batch_tokens)
        return contextual_awareness(attention, alone, config.segment_scale)


def whole_perplexity(loaded: LanguageModel, tokens: ExchangeTokens, prefix: list[int]) -> float:
    """The response's perplexity given the whole context and instruction."""
    ids = [*prefix, *tokens.context, *tokens.question, *tokens.response]
    first = len(ids) - len(tokens.response)
    return perplexity(token_losses(loaded, [ids], batch_tokens=len(ids), first_targets=[first])[0], "a response")


def _passes(config: GateauConfig, inputs: Mapping[str, Path], context: Context) -> Iterator[tuple[list[pa.Table], Any]]:
    """The tables of parts, and the counts, of the short pass and then of the long one."""
    import pyarrow.parquet as pq

    short, long = inputs["short_model"], inputs["long_model"]
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(inputs["chats"], "chats"))}
    for label, build in (
        ("short", partial(ShortPass, config, short)),
        ("long", partial(LongPass, config, long, short)),
    ):
        tables, counts = [], Counter({f"num_dropped_{reason}": 0 for reason in REASONS} | dict.fromkeys(_CUTS, 0))
        for shard in map_shards(context, build, paths, label=label):
            tables += [pq.read_table(path) for path in sorted(shard.folder.glob("parts-*.parquet"))]
            counts.update(shard.counts)
        yield tables, counts


def join_parts(short: pa.Table, long: pa.Table) -> pa.Table:
    """The parts of one shard from both passes. Raises ValueError if they are not of the same samples."""
    if short.column("sample_id") != long.column("sample_id"):
        odd = set(short.column("sample_id").to_pylist()) ^ set(long.column("sample_id").to_pylist())
        raise ValueError(f"the short and the long model scored different samples, such as {min(odd, default='')!r}")
    return long.append_column(short.schema.field("ppl_short"), short.column("ppl_short"))


def run(config: GateauConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every chat. Raises ValueError on bad input, or if no chat can be scored."""
    import numpy as np
    import pyarrow as pa

    read_artifact(inputs["chats"], "chats")
    if not extends_vocabulary(inputs["long_model"], inputs["short_model"]):
        raise ValueError(
            "slot long_model lacks tokens of slot short_model: perplexities compare only if both read the same tokens"
        )
    (short, short_counts), (long, counts) = _passes(config, inputs, context)
    if short_counts != counts:
        raise RuntimeError(f"the two passes count differently: {dict(short_counts)} and {dict(counts)}")
    tables = [join_parts(*pair) for pair in zip(short, long, strict=True)]
    whole = pa.concat_tables(tables)
    if not whole.num_rows:
        raise ValueError(f"no chat of {inputs['chats']} can be scored: {dict(counts)}")
    parts = {name: whole.column(name).to_numpy() for name in ("ppl_short", "ppl_long", "cas")}
    hmg, scores = combine(config, **parts)
    placed = np.cumsum([0, *(table.num_rows for table in tables)])
    tables = [
        table.append_column("hmg", pa.array(hmg[first:end]))
        for table, (first, end) in zip(tables, pairwise(placed), strict=True)
    ]
    write_scores(output, context, with_scores(tables, scores), parts=PARTS, counts=counts)
