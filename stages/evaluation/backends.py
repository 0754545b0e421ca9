"""What an evaluation asks of a model: greedy continuations and per-token losses, both from token ids.

`HuggingFaceBackend` is any causal language model that stock transformers loads. `WindowReader` is a perfect reader
with a known window: it shows what the tables and maps look like for a model whose answer is known, and calibrates
the evaluator itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ropewalk.stages.episodes import EpisodeWriter
from ropewalk.stages.training.attention import AttentionImplementation, register

if TYPE_CHECKING:
    import numpy as np

Precision = Literal["float32", "bfloat16"]


class Backend(Protocol):
    """A model under test. Prompts of one call are of equal length, so that nothing is padded."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, at most `max_new_tokens` ids, ended early by an end mark."""
        ...

    def token_losses(self, batch: Sequence[Sequence[int]]) -> np.ndarray:
        """Negative log likelihoods in nats, float64 `[batch, tokens - 1]`; column t is of token t + 1 given 0 to t."""
        ...


def equal_length(batch: Sequence[Sequence[int]]) -> int:
    """The common length of a batch. Raises ValueError if there is none."""
    lengths = {len(ids) for ids in batch}
    if len(lengths) != 1:
        raise ValueError(f"a batch needs prompts of one length, not {sorted(lengths)}: padding would change the test")
    return lengths.pop()


class HuggingFaceBackend:
    """A causal language model from a Hugging Face folder, on the GPU if there is one."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: Precision = "float32",
        attention: AttentionImplementation = "ropewalk",
        chunk_tokens: int = 8192,
    ) -> None:
        """Load the model. `chunk_tokens` bounds the logits held at once by `token_losses`, not its results.

        Raises ValueError if the folder lacks weights.
        """
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        register()
        self._chunk_tokens = chunk_tokens
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, precision),
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
        )
        model, loading = loaded
        if loading["missing_keys"]:
            # transformers would make them up at random.
            raise ValueError(f"{folder} lacks the weights {sorted(loading['missing_keys'])[:3]}: save it again")
        self._model: Any = model.to(self._device).eval()
        # The folder's own generation settings may sample or penalise repetition; the test is greedy.
        eos = self._model.config.eos_token_id
        pad = eos[0] if isinstance(eos, list) else eos
        self._model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=pad)
        self._eos = set(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """See `Backend.generate`."""
        import torch

        length = equal_length(prompts)
        ids_BL = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            if max_new_tokens == 1:
                logits_B1V = self._model(ids_BL, use_cache=False, logits_to_keep=1).logits
                return logits_B1V[:, -1].argmax(-1, keepdim=True).tolist()
            out = self._model.generate(
                ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=max_new_tokens, use_cache=True
            )
        return [self._until_end(row) for row in out[:, length:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((place for place, index in enumerate(ids) if index in self._eos), len(ids) - 1)
        return ids[: end + 1]

    def token_losses(self, batch: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Backend.token_losses`. The sequence is read in chunks through the key-value cache."""
        import torch

        num_tokens = equal_length(batch)
        ids_BL = torch.tensor(batch, device=self._device)
        losses, cache = [], None
        with torch.inference_mode():
            for start in range(0, num_tokens - 1, self._chunk_tokens):
                stop = min(start + self._chunk_tokens, num_tokens - 1)
                out = self._model(
                    ids_BL[:, start:stop], past_key_values=cache, use_cache=stop < num_tokens - 1 or cache is not None
                )
                cache = out.past_key_values
                targets_BL = ids_BL[:, start + 1 : stop + 1]
                logits_BVL = out.logits.float().transpose(1, 2)
                losses.append(torch.nn.functional.cross_entropy(logits_BVL, targets_BL, reduction="none"))
            return torch.cat(losses, dim=1).double().cpu().numpy()


class WindowReader:
    """A perfect reader of the last `window_tokens` of a prompt (all of it if None), and of nothing before them.

    It answers with the value of the fact whose key is asked, or with nothing if that fact is not wholly in sight.
    """

    def __init__(self, writer: EpisodeWriter, vocab_size: int, *, window_tokens: int | None = None) -> None:
        self._writer = writer
        self._vocab_size = vocab_size
        self._window_tokens = window_tokens

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """See `Backend.generate`."""
        equal_length(prompts)
        return [self._read(list(prompt))[:max_new_tokens] for prompt in prompts]

    def _read(self, prompt: list[int]) -> list[int]:
        writer = self._writer
        key_end = len(prompt) - len(writer.question_pieces[1])
        key = prompt[key_end - writer.key_tokens : key_end]
        before, between, after = writer.fact_pieces
        head = [*before, *key, *between]
        first = 0 if self._window_tokens is None else max(0, len(prompt) - self._window_tokens)
        for start in range(first, len(prompt) - writer.question_tokens - writer.fact_tokens + 1):
            if prompt[start : start + len(head)] == head:
                end = start + writer.fact_tokens - len(after)
                return prompt[end - writer.value_tokens : end]
        return []

    def token_losses(self, batch: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Backend.token_losses`: it knows nothing of text, so every token costs `log(vocab_size)`."""
        import numpy as np

        return np.full((len(batch), equal_length(batch) - 1), math.log(self._vocab_size))
