"""Turns Chats into Tokens with a loss mask: rows for supervised fine-tuning.

Reads `chats`, and `tokenizer` (a model or tokenizer folder, or an artifact of encode). Writes one Tokens shard a Chats
shard, one document a chat, with `loss_mask`; and `tokenizer/`, with the chat template. The begin token that a template
may write first is left out: the stage that lays rows writes one. Rows of chats want attention policy `document`.

Which tokens are targets: every assistant turn, the last one, or everything. The last is what Effective Long-Context
Scaling (Xiong et al., 2023, arXiv 2309.16039, table 8) found better when prompts are long and answers short. How
targets are found, and why a message cannot forge a turn, is told in `ropewalk.stages.data.alignment.chat_template`.

Lost, counted by reason: chats of more than `max_tokens` (`too_long`), that the template refuses (`template_refused`),
without a target (`no_target`), or with a noncharacter that is used internally (`reserved_characters`).

Memory: one shard a worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.chat_template import ChatEncoder, ChatRefusedError, EncodedChat, Targets
from ropewalk.stages.data.alignment.conversations import Chat, chat_of
from ropewalk.stages.data.vocabulary import add_markers, describe_tokenizer, load_tokenizer, tokenizer_digest
from ropewalk.stages.schema import (
    Artifact,
    Record,
    iterate_table,
    read_artifact,
    shard_paths,
    tokens_schema,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

NAME = "chat_tokens"
VERSION = 1

REASONS = ("too_long", "template_refused", "no_target", "reserved_characters")
_SUMS = ("num_in", "num_kept", *(f"num_dropped_{reason}" for reason in REASONS))
_TOKENS = ("num_tokens", "num_target_tokens", "num_straddling_tokens", "num_spelled_controls")


class ChatTokensConfig(Record):
    """How chats become tokens."""

    targets: Targets = "assistant_turns"
    """What is learnt: each assistant message, the last one, or everything, prompts too."""
    chat_template: str | None = None
    """A Jinja template as transformers has it. None: the tokenizer's own."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens that the template writes and the tokenizer lacks, appended behind the vocabulary."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longer chats, in tokens, are dropped. None keeps them: the stage that lays rows cuts or drops."""


def prepare_tokenizer(config: ChatTokensConfig, folder: Path) -> tuple[Any, dict[str, int]]:
    """The tokenizer of a folder with what the config adds, and the ids of `added_tokens`."""
    tokenizer = load_tokenizer(folder)
    markers = add_markers(tokenizer, config.added_tokens)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    return tokenizer, markers


class ShardEncoder:
    """Encodes one Chats shard after another."""

    def __init__(self, config: ChatTokensConfig, tokenizer: Path) -> None:
        loaded, _ = prepare_tokenizer(config, tokenizer)
        self._config, self._begin = config, loaded.bos_token_id
        self._encoder = ChatEncoder(loaded)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write the Tokens of a Chats shard, given with its number; returns the counts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number, path = shard
        counts, rows = Counter(dict.fromkeys((*_SUMS, *_TOKENS), 0)), []
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for chat in map(chat_of, batch.to_pylist()):
                    counts["num_in"] += 1
                    row = self._row(chat, counts)
                    rows += [] if row is None else [row]
        write_shard(folder, "tokens", number, pa.Table.from_pylist(rows, schema=tokens_schema(loss_mask=True)))
        return dict(counts)

    def _row(self, chat: Chat, counts: Counter[str]) -> dict[str, Any] | None:
        try:
            encoded = self.encode(chat)
        except ChatRefusedError as refused:
            counts[f"num_dropped_{refused.reason}"] += 1
            return None
        counts["num_kept"] += 1
        counts["num_tokens"] += len(encoded.input_ids)
        counts["num_target_tokens"] += sum(encoded.loss_mask)
        counts["num_straddling_tokens"] += encoded.num_straddling
        counts["num_spelled_controls"] += encoded.num_spelled
        return {
            "doc_id": chat.sample_id,
            "source": chat.source,
            "input_ids": encoded.input_ids,
            "loss_mask": encoded.loss_mask,
        }

    def encode(self, chat: Chat) -> EncodedChat:
        """The tokens of a chat, without a begin token. Raises ChatRefusedError with the reason why it is dropped."""
        try:
            encoded = self._encoder(chat.messages, self._config.targets)
        except ValueError as error:
            raise ValueError(f"sample_id {chat.sample_id!r}: {error}") from None
        if self._begin is not None and encoded.input_ids[:1] == [self._begin]:
            encoded = EncodedChat(
                encoded.input_ids[1:], encoded.loss_mask[1:], encoded.num_spelled, encoded.num_straddling
            )
        if not any(encoded.loss_mask):
            raise ChatRefusedError("no_target", "it has no target")
        if self._config.max_tokens is not None and len(encoded.input_ids) > self._config.max_tokens:
            raise ChatRefusedError("too_long", f"it has {len(encoded.input_ids)} tokens")
        return encoded


def check(config: Any, output: Path) -> None:
    """Schema, masks as long as their ids, a target in every chat, ids in the vocabulary, the counts, the tokenizer."""
    artifact = read_artifact(output, "tokens")
    if artifact.tokenizer is None:
        raise ValueError(f"{output / 'artifact.json'}: tokenizer is missing")
    found = Counter(num_kept=0, num_tokens=0, num_target_tokens=0)
    for batch in iterate_table(output, "tokens"):
        if not batch.schema.equals(tokens_schema(loss_mask=True)):
            raise ValueError(f"{output}: the columns of tokens are {batch.schema.names}, or of other types")
        ids, mask = (batch.column(name) for name in ("input_ids", "loss_mask"))
        if not ids.value_lengths().equals(mask.value_lengths()):
            raise ValueError(f"{output}: a loss_mask is not as long as its input_ids")
        flat = ids.flatten().to_numpy()
        if len(flat) and not 0 <= flat.min() <= flat.max() < artifact.tokenizer.vocab_size:
            raise ValueError(f"{output}: input_ids holds an id outside the tokenizer's vocab_size")
        if not _all_have_targets(mask):
            raise ValueError(f"{output}: loss_mask of a chat has no target")
        found.update(num_kept=batch.num_rows, num_tokens=len(flat), num_target_tokens=mask.flatten().true_count)
    if not found["num_kept"]:
        raise ValueError(f"{output} is empty: num_kept is 0")
    for name, value in found.items():
        if artifact.counts[name] != value:
            raise ValueError(
                f"{output / 'artifact.json'}: counts.{name} is {artifact.counts[name]}, but there are {value}"
            )
    if tokenizer_digest(output) != artifact.tokenizer.digest:
        raise ValueError(f"{output / 'tokenizer'}: its digest is not tokenizer.digest of artifact.json")


def _all_have_targets(mask: Any) -> bool:
    import numpy as np

    ends = np.cumsum(mask.value_lengths().to_numpy())
    sums = np.concatenate([[0], np.cumsum(mask.flatten().to_numpy(zero_copy_only=False))])[ends]
    return bool((np.diff(sums, prepend=0) > 0).all())


def run(config: ChatTokensConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Encode every chat. Raises ValueError on bad input, or if nothing is left."""
    read_artifact(inputs["chats"], "chats")
    tokenizer, markers = prepare_tokenizer(config, inputs["tokenizer"])
    ChatEncoder(tokenizer)  # A template that cannot be used is told before the work begins.
    folder = output.data / "tokenizer"
    tokenizer.save_pretrained(str(folder))
    info = describe_tokenizer(tokenizer, tokenizer_digest(folder), markers)
    counts = Counter(dict.fromkeys((*_SUMS, *_TOKENS), 0))
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(inputs["chats"], "chats"))}
    for shard in map_shards(context, partial(ShardEncoder, config, inputs["tokenizer"]), paths):
        counts.update(shard.counts)
        shard.link_into(output.data)
    if counts["num_in"] != sum(counts[name] for name in _SUMS[1:]):
        raise RuntimeError(f"chat_tokens lost count: {dict(counts)}")
    if not counts["num_kept"]:
        raise ValueError(f"no chat of {inputs['chats']} is left: {dict(counts)}")
    write_artifact(output.data, Artifact(kind="tokens", tokenizer=info, counts=dict(counts)))
    context.log(dict(counts))
