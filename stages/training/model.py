"""Hugging Face models: build at random, load from a checkpoint, grow the vocabulary, change the position method.

Models run on attention "ropewalk" (`attention.py`) unless told otherwise, so that each row is masked by its own plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ropewalk.stages.schema import Record, TokenizerInfo, stable_id
from ropewalk.stages.training.attention import AttentionImplementation
from ropewalk.stages.training.rope import RopeConfig, extended_parameters, extended_window, original_window

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class ModelConfig(Record):
    """A Llama-architecture model with random weights; vocabulary and window come from the rows."""

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    intermediate_size: int = Field(gt=0)
    """Width of the gated MLP."""
    tie_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    rope_theta: float = Field(default=10_000.0, gt=1)
    """Base of the rotary frequencies."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError("model.hidden_size / model.num_heads (the head width) must be an even whole number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError("model.num_heads must be a multiple of model.num_kv_heads")
        return self


def build_model(
    config: ModelConfig,
    tokenizer: TokenizerInfo,
    window: int,
    seed: int,
    attention: AttentionImplementation = "ropewalk",
) -> PreTrainedModel:
    """A float32 model on the CPU with the same weights in every process.

    Every rank holds it whole, also under ZeRO stage 3; models too large for that start from a checkpoint.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    llama = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.initializer_range,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seed_everything("initial weights", seed)
    return AutoModelForCausalLM.from_config(llama, attn_implementation=attention)


def load_model(
    folder: Path,
    rope: RopeConfig,
    *,
    window: int,
    vocab_size: int,
    dtype: str,
    seed: int,
    trust_remote_code: bool,
    attention: AttentionImplementation = "ropewalk",
) -> PreTrainedModel:
    """A checkpoint with the position method applied and rows of embeddings for every token id.

    `window` is the longest row in tokens. Under an active `HfDeepSpeedConfig` of ZeRO stage 3 each rank keeps its
    share of the weights only. New embeddings are drawn about the mean of the old ones (Hewitt 2021), so that an
    untrained token is no likelier than an average one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = extended_config(folder, rope, window=window, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    if vocab_size > model.config.get_text_config().vocab_size:
        seed_everything("new embeddings", seed)
        model.resize_token_embeddings(vocab_size)
    return model


def extended_config(folder: Path, rope: RopeConfig, *, window: int, trust_remote_code: bool) -> PretrainedConfig:
    """The checkpoint's config with the position method and window set.

    Raises ValueError if the checkpoint's positions are not one flat `rope_parameters`, or cannot be rescaled, or are
    learned ones that end before the window.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    current = flat_rope_parameters(config)
    if rope.method == "none":
        if not getattr(config, "rope_parameters", None) and window > config.max_position_embeddings:
            raise ValueError(
                f"{folder} has learned positions for {config.max_position_embeddings} tokens; the rows have {window}"
            )
        config.max_position_embeddings = max(window, config.max_position_embeddings)
        return config
    if current is None:
        raise ValueError(f"rope.method {rope.method!r} needs one rotary embedding for all layers; {folder} has none")
    original = original_window(current, config.max_position_embeddings)
    parameters = extended_parameters(rope, current, config.max_position_embeddings, window, head_dim(config))
    config.rope_parameters = parameters
    config.max_position_embeddings = extended_window(parameters, original, window)
    return config


def flat_rope_parameters(config: Any) -> Mapping[str, Any] | None:
    """The config's `rope_parameters`, or None where it has none or one per layer type."""
    parameters = getattr(config, "rope_parameters", None)
    return parameters if parameters and "rope_theta" in parameters else None


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_sliding_window(config: Any) -> bool:
    """Whether some layers see a window alone: then a dense mask given to the model replaces theirs."""
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def rotary_embedding(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that holds the model's inverse frequencies, or None where there is not exactly one."""
    found = [module for module in model.modules() if "inv_freq" in dict(module.named_buffers(recurse=False))]
    return found[0] if len(found) == 1 else None


def seed_everything(*parts: str | int) -> None:
    """Seed torch by purpose and counter: what is drawn next depends on `parts` alone."""
    import torch

    torch.manual_seed(int(stable_id(*parts), 16) & (2**63 - 1))
