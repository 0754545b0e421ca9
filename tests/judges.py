"""Tiny random language models with a tokenizer of their own, for the stages that judge samples with a model."""

from __future__ import annotations

from pathlib import Path

from ropewalk.stages.data.vocabulary import train_tokenizer

SENTENCE = "the rope is laid from strands that men walk along the yard and turn by hand until it holds a ship at sea"


def judge_texts(num_texts: int = 40) -> list[str]:
    """Sentences of a small vocabulary, for the tokenizer."""
    words = SENTENCE.split()
    return [" ".join(words[(start * 7 + step * step) % len(words)] for step in range(24)) for start in range(num_texts)]


def write_judge(
    folder: Path, *, seed: int = 0, window: int = 256, num_layers: int = 2, sharpness: float = 0.3, **changes
) -> Path:
    """A Llama model folder with random weights and a byte-level tokenizer.

    `sharpness` is the standard deviation of the weights: with the usual 0.02 attention would be uniform, and a test of
    it would pass for the wrong rows.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(judge_texts(), 320, "<|bos|>", "<|eos|>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=sharpness,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(folder: Path, chats, *, shard_records: int = 3) -> Path:
    """A Chats artifact of `{sample_id: [(role, content), ...]}`; the source is what the id has before its slash."""
    from ropewalk.stages.schema import Artifact, chats_schema, write_artifact, write_table

    rows = (
        {
            "sample_id": name,
            "source": name.split("/")[0],
            "messages": [{"role": role, "content": content} for role, content in turns],
            "metadata": "{}",
        }
        for name, turns in chats.items()
    )
    num_chats = write_table(folder, "chats", chats_schema(), rows, shard_records=shard_records)
    write_artifact(folder, Artifact(kind="chats", counts={"num_kept": num_chats}))
    return folder
