"""How many tokens texts have."""

from __future__ import annotations

from pathlib import Path

from ropewalk.stages.data.vocabulary import load_tokenizer, text_encoder


class TokenCounter:
    """Counts the tokens of texts by a tokenizer that reads everything as text."""

    def __init__(self, folder: Path) -> None:
        self._encoder = text_encoder(load_tokenizer(folder).backend_tokenizer.to_str())

    def __call__(self, *texts: str) -> int:
        """Tokens of all texts together, each encoded for itself."""
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings)
