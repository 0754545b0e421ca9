"""A word tokenizer, held-out text and tiny random Llama checkpoints, made on the spot."""

import hashlib
import json

import numpy as np
import pytest

from ropewalk.stages.episodes import ASK_MARKER, KEY_MARKER, EpisodeFormat, episode_writer
from ropewalk.stages.evaluation.evaluate import Material
from ropewalk.stages.evaluation.tasks import Haystack
from ropewalk.stages.schema import Artifact, TokenizerInfo, tokens_schema, write_artifact, write_table

BOS, EOS, KEY, ASK = 0, 1, 2, 3
NUM_WORDS = 160


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", KEY_MARKER, ASK_MARKER, *(f"w{index:03d}" for index in range(NUM_WORDS))]
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens([KEY_MARKER, ASK_MARKER])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def info(tokenizer):
    return TokenizerInfo(
        digest=hashlib.sha256(tokenizer.backend_tokenizer.to_str(pretty=True).encode()).hexdigest(),
        vocab_size=4 + NUM_WORDS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        added_tokens={KEY_MARKER: KEY, ASK_MARKER: ASK},
    )


@pytest.fixture(scope="session")
def writer(tokenizer, info):
    return episode_writer(EpisodeFormat(), tokenizer, info)


@pytest.fixture(scope="session")
def haystack():
    rng = np.random.default_rng(5)
    return Haystack([rng.integers(4, 4 + NUM_WORDS, size=size) for size in (900, 700, 40, 650)], EOS)


@pytest.fixture(scope="session")
def material(haystack, writer, tokenizer, info):
    return Material(haystack, [f"doc{index}" for index in range(len(haystack.documents))], writer, tokenizer, info)


@pytest.fixture(scope="session")
def heldout_folder(tmp_path_factory, haystack, info):
    folder = tmp_path_factory.mktemp("heldout")
    rows = [
        {"doc_id": f"doc{index}", "source": "made", "input_ids": ids.tolist()}
        for index, ids in enumerate(haystack.documents)
    ]
    write_table(folder, "tokens", tokens_schema(), rows)
    write_artifact(folder, Artifact(kind="tokens", tokenizer=info))
    return folder


def make_checkpoint(folder, tokenizer, info, *, seed, row_tokens, window=None):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=info.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=window or row_tokens,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_artifact(folder, Artifact(kind="checkpoint", tokenizer=info, row_tokens=row_tokens))
    steps = [{"step": step, "loss": 5.0 / step, "learning_rate": 1e-3} for step in range(1, 12)]
    (folder / "training.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


@pytest.fixture(scope="session")
def checkpoint_maker(tokenizer):
    return lambda folder, info, **settings: make_checkpoint(folder, tokenizer, info, **settings)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer, info):
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "base": make_checkpoint(root / "base", tokenizer, info, seed=1, row_tokens=64),
        "extended": make_checkpoint(root / "extended", tokenizer, info, seed=2, row_tokens=512),
    }
