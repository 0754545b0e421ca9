"""Checkpoints as records: Hugging Face folders, made by a training stage here or brought by the user."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ropewalk.stages.schema import Artifact, read_artifact


def read_checkpoint(folder: Path) -> Artifact:
    """What is known of a checkpoint. One that was made elsewhere has no `artifact.json`: its window is its config's.

    Raises ValueError if the folder is no checkpoint.
    """
    if (folder / "artifact.json").is_file():
        return read_artifact(folder, "checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no checkpoint: its config.json cannot be read ({error})") from None
    return Artifact(kind="checkpoint", row_tokens=config.get("max_position_embeddings"))


def tokenizer_digest(folder: Path) -> str:
    """sha256 hex of a checkpoint's `tokenizer.json`. Raises ValueError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: only fast tokenizers are supported")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extends_vocabulary(new: Path, old: Path) -> bool:
    """Whether the tokenizer of folder `new` has every token of that of `old`, with the same id."""
    from tokenizers import Tokenizer

    vocabularies = [Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab() for path in (new, old)]
    return vocabularies[0].items() >= vocabularies[1].items()
