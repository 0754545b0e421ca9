"""What is known of the checkpoints before they are asked anything, and whether they can be compared at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ropewalk.stages.schema import TokenizerInfo, read_artifact

Tree = dict[str, Any]


def describe_models(
    names: Sequence[str], lengths_tokens: Sequence[int], inputs: Mapping[str, Path]
) -> tuple[TokenizerInfo, dict[str, Tree]]:
    """The tokenizer, and what is known of each model. Raises ValueError on anything that cannot be compared."""
    for slot in ("heldout", *names):
        if slot not in inputs:
            raise ValueError(f"evaluate has no input {slot!r}: give it one, or change models")
    info = read_artifact(inputs["heldout"], "tokens").tokenizer
    if info is None:
        raise ValueError("heldout's artifact.json names no tokenizer: encode the held-out documents again")
    models = {}
    for name in names:
        artifact = read_artifact(inputs[name], "checkpoint")
        model_config = json.loads((inputs[name] / "config.json").read_text(encoding="utf-8"))
        digest = artifact.tokenizer.digest if artifact.tokenizer else _sha256(inputs[name], "tokenizer.json")
        if digest != info.digest:
            raise ValueError(
                f"{name} and heldout have different tokenizers ({digest[:12]} and {info.digest[:12]}): "
                "their token ids mean different texts"
            )
        if model_config["vocab_size"] < info.vocab_size:
            raise ValueError(f"{name} has {model_config['vocab_size']} embeddings for {info.vocab_size} token ids")
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
