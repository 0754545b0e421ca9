"""Write a trained model as a folder that stock transformers, and readers of its older formats, load right.

transformers 5 keeps all of RoPE in `rope_parameters`; older readers know only `rope_theta` and `rope_scaling` and
fall back to theta 10,000 without a word. So all three are written, and the folder is read back: the rotary
embedding made from it must have the frequencies that were trained and those of our own formulas, or the export fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropewalk.stages.checkpoint import extends_vocabulary, tokenizer_digest
from ropewalk.stages.schema import TokenizerInfo
from ropewalk.stages.training.model import flat_rope_parameters, head_dim, rotary_embedding
from ropewalk.stages.training.rope import frequencies

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
TOLERANCE = 1e-5
"""Relative; transformers computes frequencies in float32."""


def export_model(model: Any, weights: Mapping[str, Any], folder: Path, *, rescaled: bool) -> int:
    """Save config, weights and generation config, check the positions by reading back; returns parameters counted.

    `rescaled`: a position method of ours was applied, so that our formula must hold. Raises ValueError if it does not.
    """
    model.save_pretrained(folder, state_dict=dict(weights))
    _write_legacy_rope(folder / "config.json")
    check_rope(model, folder, rescaled=rescaled)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _write_legacy_rope(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters")
    if parameters and "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_rope(model: Any, folder: Path, *, rescaled: bool) -> None:
    """Compare the rotary embedding of the saved config with the trained one, and with our formula if `rescaled`.

    Raises ValueError on a difference. Models without a single rotary embedding have nothing to compare, and cannot
    have been rescaled.
    """
    from transformers import AutoConfig

    trained: Any = rotary_embedding(model)
    if trained is None:
        return
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    reread = type(trained)(config)
    wanted = {"the trained model": (trained.inv_freq.tolist(), trained.attention_scaling)}
    parameters = flat_rope_parameters(config)
    if rescaled and parameters is not None:
        wanted["the method's formula"] = frequencies(parameters, head_dim(config))
    for what, (inverse, scaling) in wanted.items():
        pairs = zip([*reread.inv_freq.tolist(), reread.attention_scaling], [*inverse, scaling], strict=True)
        if any(abs(found - expected) > TOLERANCE * abs(expected) for found, expected in pairs):
            raise ValueError(f"{folder}/config.json, read back, gives rotary frequencies other than those of {what}")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are, so that its digest stays."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def choose_tokenizer(rows: TokenizerInfo, checkpoint: Path | None, tokenizer: Path | None) -> Path:
    """The folder whose tokenizer belongs to the trained model: the one that made the rows.

    That is the checkpoint's, or the `tokenizer` input's `tokenizer/` where the rows' tokenizer adds to the
    checkpoint's. Raises ValueError if neither made the rows, or if ids of the checkpoint change their meaning.
    """
    given = None if tokenizer is None else tokenizer / "tokenizer"
    if checkpoint is not None and tokenizer_digest(checkpoint) == rows.digest:
        return checkpoint
    if given is None or tokenizer_digest(given) != rows.digest:
        where = "inputs['tokenizer']" if checkpoint is None or given is not None else "the checkpoint"
        raise ValueError(
            f"the rows were made with another tokenizer than that of {where}: give the artifact that holds theirs "
            "as input 'tokenizer'"
        )
    if checkpoint is not None and not extends_vocabulary(given, checkpoint):
        raise ValueError("the rows' tokenizer gives ids of the checkpoint's tokenizer another meaning: encode again")
    return given
