"""Trains, extends, loads and describes tokenizers.

A trained one is a byte-level BPE (Radford et al. 2019, "Language models are unsupervised multitask learners"): every
text can be encoded, and decoding gives it back exactly. Marker tokens are special tokens appended behind the
vocabulary, so the ids of ordinary tokens do not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ropewalk.stages import checkpoint
from ropewalk.stages.schema import TokenizerInfo


def train_tokenizer(texts: Iterable[str], vocab_size: int, bos_token: str, eos_token: str) -> Any:
    """A transformers fast tokenizer trained on `texts`: `bos_token` and `eos_token` first, then bytes, then merges.

    It has fewer than `vocab_size` ids if the texts run out of pairs that occur twice. Called as stock code calls it, it
    puts `bos_token` in front of a text, as the rows of this package have it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(dict.fromkeys([bos_token, eos_token])),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A",
        pair=f"{bos_token} $A {bos_token} $B",
        special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=eos_token, clean_up_tokenization_spaces=False
    )


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model or tokenizer folder, or of an artifact with a `tokenizer/` folder.

    Raises ValueError if there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    place = tokenizer_folder(folder)
    if not (place / "tokenizer.json").exists() and not (place / "tokenizer_config.json").exists():
        raise ValueError(f"{folder} holds no tokenizer: it has neither tokenizer.json nor tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} holds a tokenizer without tokenizer.json: convert it to a fast one first")
    return tokenizer


def tokenizer_folder(folder: Path) -> Path:
    """`folder/tokenizer` where there is one (an artifact of encode), otherwise `folder` (a model or tokenizer)."""
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def tokenizer_digest(folder: Path) -> str:
    """sha256 hex of the `tokenizer.json` in a model, tokenizer or artifact folder. Raises ValueError without one."""
    return checkpoint.tokenizer_digest(tokenizer_folder(folder))


def add_markers(tokenizer: Any, markers: Sequence[str]) -> dict[str, int]:
    """Append special tokens to the vocabulary; those that are special there already keep their id.

    Raises ValueError if a marker is an ordinary token, which running text may contain.
    """
    before = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for marker in markers:
        if marker in before and marker not in special:
            raise ValueError(f"added_tokens: {marker!r} is an ordinary token of the tokenizer: choose another text")
    tokenizer.add_tokens([marker for marker in markers if marker not in before], special_tokens=True)
    return {marker: tokenizer.convert_tokens_to_ids(marker) for marker in markers}


def describe_tokenizer(tokenizer: Any, digest: str, markers: dict[str, int]) -> TokenizerInfo:
    """What token-level stages need to know. A tokenizer without a begin token begins with its end token.

    Raises ValueError if it has no end token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos_token, which separates documents: set it in tokenizer_config.json")
    return TokenizerInfo(
        digest=digest,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        bos_token_id=eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=eos,
        added_tokens=markers,
    )


def text_encoder(tokenizer_json: str) -> Any:
    """A `tokenizers.Tokenizer` that reads everything as text: the spelling of a special token is not that token.

    Truncation and padding that `tokenizer.json` may ask for are off.
    """
    from tokenizers import Tokenizer

    encoder: Any = Tokenizer.from_str(tokenizer_json)
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder
