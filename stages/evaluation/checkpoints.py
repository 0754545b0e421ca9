"""What is known of the checkpoints before they are asked anything, and whether they can be compared at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ropewalk.stages.checkpoint import extends_vocabulary, read_checkpoint, tokenizer_digest
from ropewalk.stages.episodes import EpisodeFormat
from ropewalk.stages.schema import TokenizerInfo, read_artifact

Tree = dict[str, Any]


def describe_models(
    names: Sequence[str], lengths_tokens: Sequence[int], inputs: Mapping[str, Path], style: EpisodeFormat
) -> tuple[TokenizerInfo, dict[str, Tree]]:
    """The tokenizer, and what is known of each model. Raises ValueError on anything that cannot be compared.

    A model may lack tokens that synthesis added to its tokenizer, as long as episodes do without them.
    """
    for slot in ("heldout", *names):
        if slot not in inputs:
            raise ValueError(f"evaluate has no input {slot!r}: give it one, or change models")
    info = read_artifact(inputs["heldout"], "tokens").tokenizer
    if info is None:
        raise ValueError("heldout's artifact.json names no tokenizer: encode the held-out documents again")
    complete = tokenizer_of(names, inputs, info)
    models = {}
    for name in names:
        artifact = read_checkpoint(inputs[name])
        model_config = json.loads((inputs[name] / "config.json").read_text(encoding="utf-8"))
        digest = tokenizer_digest(inputs[name])
        if digest != info.digest and not extends_vocabulary(complete, inputs[name]):
            raise ValueError(
                f"{name} and heldout have different tokenizers ({digest[:12]} and {info.digest[:12]}): "
                "their token ids mean different texts"
            )
        inserted = max((i for text, i in info.added_tokens.items() if text in style.fact + style.question), default=0)
        needed = max(inserted + 1, info.vocab_size if digest == info.digest else 0)
        if model_config["vocab_size"] < needed:
            raise ValueError(
                f"{name} has {model_config['vocab_size']} embeddings, but episodes need token id {needed - 1}: "
                "write `episode` without markers, in words that every model knows"
            )
        window = model_config["max_position_embeddings"]
        trained = artifact.row_tokens or window
        if window < trained:
            raise ValueError(
                f"{name} was trained on rows of {trained} tokens and its config.json says max_position_embeddings "
                f"{window}: set it to the trained window"
            )
        models[name] = {
            "trained_tokens": trained,
            "beyond_trained_window": [length for length in lengths_tokens if length > trained],
            "tokenizer_sha256": digest,
            "weights_sha256": _sha256(inputs[name], "*.safetensors"),
            "rope_parameters": model_config.get("rope_parameters"),
        }
    return info, models


def tokenizer_of(names: Sequence[str], inputs: Mapping[str, Path], info: TokenizerInfo) -> Path:
    """The checkpoint that has the tokenizer of the held-out documents. Raises ValueError if none has."""
    for name in names:
        if tokenizer_digest(inputs[name]) == info.digest:
            return inputs[name]
    digests = ", ".join(f"{name} {tokenizer_digest(inputs[name])[:12]}" for name in names)
    raise ValueError(
        f"none of the models has the tokenizer of heldout ({info.digest[:12]}; {digests}), so they have different "
        "tokenizers: their token ids mean different texts"
    )


def _sha256(folder: Path, pattern: str) -> str:
    """sha256 hex of the matching files' bytes, in name order. Raises ValueError if there is none."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise ValueError(f"{folder} has no {pattern}")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
