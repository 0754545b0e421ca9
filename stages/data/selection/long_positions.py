"""Lets a model with rotary positions read texts beyond its window, without training, by a larger rotary base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.training.model import extended_config, flat_rope_parameters, head_dim, rotary_embedding
from ropewalk.stages.training.rope import RopeConfig, extended_parameters, frequencies

if TYPE_CHECKING:
    from ropewalk.stages.data.selection.language_model import LanguageModel

Extension = Literal["none", "ntk", "dynamic"]


def config_for(folder: Path, window: int | None, extension: Extension) -> tuple[Any, int]:
    """The config to load a model folder with, and the window of its own, in tokens.

    Raises ValueError if it cannot read `window` tokens.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model: it has no config.json")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    own_window: int | None = getattr(config, "max_position_embeddings", None)
    if own_window is None:
        raise ValueError(f"{folder / 'config.json'} has no max_position_embeddings, so its window is unknown: set it")
    if window is None or window <= own_window:
        return config, own_window
    if extension == "none":
        raise ValueError(
            f"{folder} reads {own_window} tokens, but {window} are wanted: lower max_tokens, take a model with "
            "a longer window, or extend its positions where the stage can"
        )
    if flat_rope_parameters(config) is None:
        raise ValueError(f"{folder} has no single rotary embedding that could be extended to {window} tokens")
    if extension == "ntk":
        config = extended_config(folder, RopeConfig(method="ntk"), window=window, trust_remote_code=False)
    return config, own_window


def stretch_positions(loaded: LanguageModel, num_tokens: int) -> None:
    """Give a model loaded with extension "dynamic" the NTK-aware rotary base for a sequence of this many tokens.

    Up to the model's own window that is its own base. transformers' "dynamic" embedding is not used: between sequences
    it keeps the base of the longest one so far, so that a result would depend on what was read before.
    """
    import torch

    config = loaded.model.config
    rotary, parameters = rotary_embedding(loaded.model), flat_rope_parameters(config)
    if rotary is None or parameters is None:
        raise ValueError(f"{loaded.folder} has no single rotary embedding, whose base could be changed")
    width = head_dim(config)
    if num_tokens > loaded.own_window:
        parameters = extended_parameters(RopeConfig(method="ntk"), parameters, loaded.own_window, num_tokens, width)
    frequency = torch.tensor(frequencies(parameters, width)[0], dtype=torch.float64)
    rotary.get_buffer("inv_freq").copy_(frequency)
