"""Causal language models that judge samples: losses of tokens, and attention one layer at a time.

A model is a Hugging Face folder. Texts are read without special tokens (their spelling stays text), nothing is cut
unless a caller cuts it with `truncate` and counts it, and a sequence beyond the model's window is an error.

Attention is observed through transformers' attention interface, so every stock model with that interface can be read:
the layer's output is computed by torch's own kernel, and an observer may ask for the weights of any rows of the layer
that is running. No more than one layer's queries and keys and one block of rows of its weights are held, so memory
grows with the sequence, not with its square: for 64K tokens of a 7B model in half precision some 4 GiB beside the
weights (the MLP's activations are the largest part), and half a GiB for a block of weights and copies of it.

Legend: B sequences, L query tokens, S key tokens, H query heads, G key/value heads, D head dimension, R rows, V ids.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.data.selection.long_positions import Extension, config_for
from ropewalk.stages.data.vocabulary import load_tokenizer, text_encoder, tokenizer_folder

if TYPE_CHECKING:
    import numpy as np
    import torch

Precision = Literal["float32", "bfloat16", "float16"]
ATTENTION_NAME = "ropewalk_observed"
_MAX_LOSS = 700.0  # exp of it is still a number.
_BLOCK_ELEMENTS = 2**25
"""Attention weights, or logits in float32, that are held at once."""


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Characters `[first, end)` that each token stands for; tokens that share a character both name it."""

    def first_token_beyond(self, place: int) -> int:
        """The first token that holds a character at or behind `place`; the number of tokens if there is none.

        A token that lies across the place counts as beyond it.
        """
        return next((number for number, (_, end) in enumerate(self.offsets) if end > place), len(self.ids))


class TextEncoder:
    """The tokenizer of a model or artifact folder, for plain text."""

    def __init__(self, folder: Path) -> None:
        """Load it. Raises ValueError if the folder holds no fast tokenizer."""
        tokenizer = load_tokenizer(folder)
        path = tokenizer_folder(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds a tokenizer without tokenizer.json: save it as a fast one first")
        self._encoder = text_encoder(path.read_text(encoding="utf-8"))
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id

    @property
    def prefix(self) -> list[int]:
        """What a sequence begins with: the begin token where there is one, otherwise the end token, or nothing."""
        first = self.eos_token_id if self.bos_token_id is None else self.bos_token_id
        return [] if first is None else [first]

    def encode(self, text: str) -> EncodedText:
        """The tokens of a text, without special tokens."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return EncodedText(list(encoding.ids), list(encoding.offsets))


def truncate(ids: Sequence[int], num_tokens: int, *, keep: Literal["head", "tail"]) -> tuple[list[int], int]:
    """At most `num_tokens` of the beginning or the end, and how many are left out, for the caller to count."""
    num_cut = max(0, len(ids) - num_tokens)
    if not num_cut:
        return list(ids), 0
    return list(ids[:num_tokens] if keep == "head" else ids[num_cut:]), num_cut


@dataclass(frozen=True)
class LanguageModel:
    """A model in memory, on the GPU if there is one."""

    model: Any
    folder: Path
    window: int
    """Tokens that it may read at once."""
    vocab_size: int
    """Rows of its input embeddings."""
    own_window: int
    """Tokens that it could read as it was saved."""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return self.model.config.get_text_config().num_hidden_layers

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ValueError for a sequence that the model cannot read."""
        if len(ids) > self.window:
            raise ValueError(
                f"{self.folder} reads {self.window} tokens, a sample has {len(ids)}: cut the samples shorter, or "
                "extend the model's positions"
            )
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = max(ids) if max(ids) >= self.vocab_size else min(ids)
            raise ValueError(
                f"{self.folder} has embeddings for {self.vocab_size} ids, a sample holds {wrong}: it was encoded by "
                "another tokenizer"
            )


def load_model(
    folder: Path,
    *,
    dtype: Precision = "float32",
    window: int | None = None,
    extension: Extension = "none",
    num_layers: int | None = None,
) -> LanguageModel:
    """The causal language model of a Hugging Face folder, ready to be read with.

    Args:
        folder: Where it lies.
        dtype: Of weights and activations; losses and attention weights are float32 whatever it is.
        window: Tokens that it must be able to read; None is its own window.
        extension: How it reads more than its own window: "ntk" changes the rotary base once, for `window` tokens;
            "dynamic" is changed for each sequence (`stretch_positions`).
        num_layers: Load only so many of the first layers; None is all. Losses then mean nothing.

    Raises ValueError if the folder lacks weights, or the window is beyond what it reads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _limit_threads()
    _register_attention()
    config, own_window = config_for(folder, window, extension)
    if num_layers is not None:
        if num_layers > config.num_hidden_layers:
            raise ValueError(f"{folder} has {config.num_hidden_layers} layers, not {num_layers}")
        config.num_hidden_layers = num_layers
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=ATTENTION_NAME,
        local_files_only=True,
        output_loading_info=True,
    )
    model, loading = loaded
    if loading["missing_keys"]:
        # transformers would make them up at random.
        raise ValueError(f"{folder} lacks the weights {sorted(loading['missing_keys'])[:3]}: save it again")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return LanguageModel(model, folder, window or own_window, vocab_size, own_window)


def token_losses(
    loaded: LanguageModel,
    sequences: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    first_targets: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """The negative log likelihoods, in nats, of each sequence's tokens from its first target on.

    Args:
        loaded: The model.
        sequences: Of any lengths. Shorter ones of a batch are padded behind, which no earlier token sees.
        batch_tokens: Tokens of a batch, padding included (one sequence may have more). The last digits of the losses
            depend on it. Memory: so many rows of logits in the model's dtype, fewer where only the ends are targets.
        first_targets: Place of the first token whose loss is wanted, 1 or more; None is 1 everywhere.

    Returns float64 arrays in the order of the sequences, entry t of the token at `first_target + t`. Raises ValueError
    for sequences that the model cannot read.
    """
    import numpy as np
    import torch

    firsts = list(first_targets) if first_targets is not None else [1] * len(sequences)
    if any(first < 1 for first in firsts):
        raise ValueError("the first token of a sequence has no loss: first_targets begin at 1")
    for ids in sequences:
        loaded.check_ids(ids)
    losses: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    wanted = [number for number, ids in enumerate(sequences) if firsts[number] < len(ids)]
    for batch in _batches(sequences, wanted, batch_tokens):
        length = max(len(sequences[number]) for number in batch)
        begin = min(firsts[number] for number in batch) - 1
        ids_BL = torch.zeros(len(batch), length, dtype=torch.long)
        for row, number in enumerate(batch):
            ids_BL[row, : len(sequences[number])] = torch.as_tensor(sequences[number])
        ids_BL = ids_BL.to(loaded.device)
        with torch.inference_mode():
            logits_BLV = loaded.model(ids_BL, use_cache=False, logits_to_keep=length - begin).logits
            for row, number in enumerate(batch):
                first, end = firsts[number], len(sequences[number])
                logits_LV = logits_BLV[row, first - 1 - begin : end - 1 - begin]
                losses[number] = _cross_entropies(logits_LV, ids_BL[row, first:end])
    return losses


def perplexity(losses: np.ndarray, what: str) -> float:
    """exp of the mean loss. Raises ValueError, naming what was read, where it is no finite number."""
    mean = float(losses.mean())
    if not mean < _MAX_LOSS:
        raise ValueError(f"{what} has the mean loss {mean}: the model overflows; use a wider dtype")
    return math.exp(mean)


def _batches(sequences: Sequence[Sequence[int]], wanted: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of sequences of about one length, longest last."""
    batch: list[int] = []
    for number in sorted(wanted, key=lambda number: (len(sequences[number]), number)):
        if batch and (len(batch) + 1) * len(sequences[number]) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _cross_entropies(logits_LV: torch.Tensor, targets_L: torch.Tensor) -> np.ndarray:
    import torch

    step = max(1, _BLOCK_ELEMENTS // logits_LV.shape[1])
    pieces = [
        torch.nn.functional.cross_entropy(
            logits_LV[begin : begin + step].float(), targets_L[begin : begin + step], reduction="none"
        )
        for begin in range(0, len(targets_L), step)
    ]
    return torch.cat(pieces).double().cpu().numpy()


@dataclass(frozen=True)
class LayerAttention:
    """One layer's queries and keys of one sequence, while the layer runs."""

    layer: int
    query_HLD: torch.Tensor
    key_GSD: torch.Tensor
    scaling: float
    mask_LS: torch.Tensor | None
    """What is added to the scores, or True where a key is seen; None is plain causal attention."""

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.query_HLD.shape[1]

    def weights(self, first: int, end: int, *, num_keys: int | None = None) -> torch.Tensor:
        """Attention of the rows `[first, end)`, float32 `[H, R, S]`; a row's weights sum to 1.

        `num_keys` is how many keys, from the first on, take part in the softmax; None is `end`, which is all that the
        rows may see.
        """
        import torch

        keys = end if num_keys is None else num_keys
        query_HRD, key_GSD = self.query_HLD[:, first:end], self.key_GSD[:, :keys]
        groups = len(key_GSD)
        query_GKD = query_HRD.reshape(groups, -1, query_HRD.shape[2])
        scores = torch.matmul(query_GKD, key_GSD.transpose(1, 2)).reshape(len(query_HRD), end - first, keys)
        scores = scores.float() * self.scaling
        if self.mask_LS is None:
            rows = torch.arange(first, end, device=scores.device)
            hidden = torch.arange(keys, device=scores.device) > rows[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        elif self.mask_LS.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask_LS[first:end, :keys], -torch.inf)
        else:
            scores = scores + self.mask_LS[first:end, :keys]
        return scores.softmax(-1)

    def blocks(self, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows `[first, end)` in blocks of bounded memory: the number of a block's first row, and its weights.

        A block has keys up to its own last row only.
        """
        step = max(1, _BLOCK_ELEMENTS // (len(self.query_HLD) * self.num_tokens))
        for begin in range(first, end, step):
            yield begin, self.weights(begin, min(begin + step, end))


class _EnoughError(Exception):
    """Ends a forward pass when the last layer that anybody asked for has been seen."""


@dataclass
class _Observer:
    see: Callable[[LayerAttention], None]
    layers: frozenset[int]

    def __call__(self, seen: LayerAttention) -> None:
        if seen.layer in self.layers:
            self.see(seen)
        if seen.layer >= max(self.layers):
            raise _EnoughError


_OBSERVER: ContextVar[_Observer | None] = ContextVar("ropewalk_attention_observer", default=None)


def observe_attention(
    loaded: LanguageModel,
    ids: Sequence[int],
    see: Callable[[LayerAttention], None],
    *,
    layers: Sequence[int] | None = None,
) -> None:
    """Read one sequence, and call `see` with each layer asked for (None: all) while it runs; then stop.

    Raises ValueError for a sequence that the model cannot read, layers that it does not have, or a model whose
    attention weights are more than a softmax of scaled products (soft caps, learned sinks).
    """
    import torch

    loaded.check_ids(ids)
    chosen = frozenset(range(loaded.num_layers) if layers is None else layers)
    if not chosen or not chosen <= set(range(loaded.num_layers)):
        raise ValueError(f"{loaded.folder} has the layers 0 to {loaded.num_layers - 1}, asked for were {layers}")
    token = _OBSERVER.set(_Observer(see, chosen))
    try:
        with torch.inference_mode():
            loaded.model(torch.as_tensor([list(ids)], device=loaded.device), use_cache=False, logits_to_keep=1)
    except _EnoughError:
        return
    finally:
        _OBSERVER.reset(token)
    raise ValueError(f"{loaded.folder} does not use transformers' attention interface: its attention cannot be read")


def _attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """torch's attention, shown to whoever observes it before it runs."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (observer := _OBSERVER.get()) is not None:
        unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
        if unknown:
            raise ValueError(f"attention with {unknown[0]} cannot be observed: use another model")
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = None if attention_mask is None else attention_mask[0, 0]
        observer(LayerAttention(module.layer_idx, query[0], key[0], scaling, mask))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _limit_threads() -> None:
    """One thread a worker: there are as many workers as cores. The environment's own choice stands."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
