"""Train a causal language model: from random weights on short rows, or onwards from a checkpoint at a long window.

Reads   a Rows artifact for each slot that `phases` names; `checkpoint`, a Hugging Face folder, unless `model` asks
        for random weights; `tokenizer`, an artifact with a `tokenizer/` folder, for random weights and where the rows'
        tokenizer has tokens that the checkpoint's lacks.
Writes  a Hugging Face folder that stock transformers loads (config.json with `rope_parameters` and the older keys,
        model.safetensors, the tokenizer's files) with `artifact.json` and `training.jsonl`, a line for each optimiser
        step: loss (mean over targets), inserted_loss (mean over targets that no document holds), learning_rate,
        grad_norm before clipping, row_tokens, tokens seen.
Bytes   depend on the config and the inputs: also on `world_size`, which orders sums, but not on where ranks run,
        on interruptions, or on how often a checkpoint is written. Across kinds of device they differ.
Loses   rows past the last step of a phase are not read; phases longer than their rows read them again, reshuffled.

Context extension is continued training at the longer window after a change of the rotary embedding (`rope.py`), as
in YaRN (arXiv 2309.00071) and in ProLong (arXiv 2410.02660); phases of rising window are the curriculum of
Qwen2.5-1M (arXiv 2501.15383). Avoided here: masks inferred from position ids (transformers 5), gradients scaled by
the ZeRO stage, means over micro-batches instead of over targets, data order lost on resume.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_checkpoint
from ropewalk.stages.context import Context, Output
from ropewalk.stages.schema import Artifact, Record, TokenizerInfo, read_artifact, write_artifact
from ropewalk.stages.training.attention import AttentionImplementation
from ropewalk.stages.training.model import ModelConfig
from ropewalk.stages.training.rope import RopeConfig
from ropewalk.stages.training.rows import RowSpec, policies, unpack

if TYPE_CHECKING:
    from ropewalk.stages.training.loop import Job, Measured, PhaseRows

NAME = "train"
VERSION = 2
check = check_checkpoint


class Phase(Record):
    """A stretch of training on one Rows artifact."""

    rows: str
    """The input slot of the rows."""
    num_steps: int = Field(gt=0)
    """Optimiser steps."""


class TrainConfig(Record):
    """Everything that decides the weights."""

    model: ModelConfig | None = None
    """Random start; None continues the `checkpoint` input."""
    rope: RopeConfig = RopeConfig()
    """Change of the checkpoint's rotary embedding, in force from the first step."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    """In order: a curriculum of windows."""
    batch_tokens: int = Field(gt=0)
    """Tokens of one optimiser step over all ranks: row_tokens x rows."""
    micro_batch_tokens: int = Field(default=8192, gt=0)
    """Most tokens of one forward pass on one rank; a longer row goes alone. Bounds activation memory."""
    loss_chunk_tokens: int = Field(default=8192, gt=0)
    """Most targets whose logits exist at once; they are made twice. Bounds memory at long windows and large
    vocabularies."""
    learning_rate: float = Field(gt=0)
    """Peak of the schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    min_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a share of the peak; cosine between."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's, on matrices; norms and biases have none."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    inserted_loss_weight: float = Field(default=0.0, ge=0)
    """Adds this times the mean loss over targets in no segment, such as planted answers, to the mean over all targets.
    Only rows with a loss mask have such."""
    attention: Literal["rows", "causal", "document"] = "rows"
    """What each token sees. With rows, each row's own policy; the others must agree with the rows or give a reason."""
    override_attention_reason: str | None = None
    """Why `attention` may contradict the rows."""
    attention_implementation: AttentionImplementation = "ropewalk"
    """What works it out: our kernels, which skip what is not seen; torch's own; or the model's code, for what ours
    refuses (soft caps, sinks). The latter two hold a mask of row_tokens squared where rows are not causal."""
    enable_exact_rope: bool = True
    """Turn q and k by exact angles in float32, rounded once; false leaves it to the model's own code, which rounds cos
    and sin to `dtype` first."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed divides among ranks: nothing, optimiser, + gradients, + weights."""
    world_size: int = Field(default=2, gt=0)
    """Ranks. Part of the result: it orders sums."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; the optimiser's copy is float32 always."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: memory for a third more time."""
    checkpoint_every_steps: int = Field(default=100, gt=0)
    """Steps that a crash loses at most. The one field that leaves the bytes as they are."""
    seed: int = 0
    """Of weights and row order."""
    trust_remote_code: bool = False
    """Run modelling code that lies in the checkpoint."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.model is not None and self.rope.method != "none":
            raise ValueError("rope changes a checkpoint's embedding; random weights take model.rope_theta")
        if self.attention == "rows" and self.override_attention_reason is not None:
            raise ValueError("override_attention_reason has nothing to justify while attention is 'rows'")
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError("zero_stage 0 keeps no float32 weights for dtype 'bfloat16': use zero_stage 1 or more")
        num_steps = sum(phase.num_steps for phase in self.phases)
        if self.warmup_steps > num_steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but the phases have {num_steps} steps")
        return self


def run(config: TrainConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Train as configured; see the module's docstring. Resumes from `context.work` if there is something to resume."""
    from ropewalk.stages.training.export import copy_tokenizer
    from ropewalk.stages.training.loop import train_rank

    job = prepare(config, inputs, output, context)
    measured = context.gang(train_rank, job, num_workers=config.world_size)[0]
    copy_tokenizer(job.tokenizer_folder, output.data)
    write_artifact(output.data, _artifact(job, measured))
    _write_observed(output.observed, job, measured)
    context.log({"num_parameters": measured.num_parameters, "num_tokens": job.num_steps * config.batch_tokens})


def gang_size(config: TrainConfig) -> int:
    """Processes that must run at once, so that a cluster without room for them is refused before anything starts."""
    return config.world_size


def prepare(config: TrainConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> Job:
    """Check that config and inputs fit together, and unpack the rows into `context.work`.

    Raises ValueError naming the field or input that does not fit.
    """
    from ropewalk.stages.training.export import choose_tokenizer
    from ropewalk.stages.training.loop import Job

    artifacts = _rows_artifacts(config, inputs)
    tokenizer = _tokenizer(artifacts)
    checkpoint = None if config.model is not None else _input(inputs, "checkpoint", "model is not set")
    tokenizer_input = _input(inputs, "tokenizer", "model is set") if checkpoint is None else inputs.get("tokenizer")
    tokenizer_folder = choose_tokenizer(tokenizer, checkpoint, tokenizer_input)
    for slot, artifact in artifacts.items():
        _check_batch(config, slot, artifact)
        _check_attention(config, slot, policies(inputs[slot]))
    return Job(
        config=config,
        phases=_unpack(config, inputs, artifacts, context),
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        checkpoint=checkpoint,
        work=context.work,
        output=output.data,
    )


def _input(inputs: Mapping[str, Path], slot: str, because: str) -> Path:
    if slot not in inputs:
        raise ValueError(f"train needs the input {slot!r} because {because}")
    return inputs[slot]


def _rows_artifacts(config: TrainConfig, inputs: Mapping[str, Path]) -> dict[str, Artifact]:
    slots = dict.fromkeys(phase.rows for phase in config.phases)
    return {slot: read_artifact(_input(inputs, slot, "phases name it"), "rows") for slot in slots}


def _tokenizer(artifacts: Mapping[str, Artifact]) -> TokenizerInfo:
    """The one tokenizer of all rows."""
    first_slot, first = next(iter(artifacts.items()))
    for slot, artifact in artifacts.items():
        if artifact.tokenizer is None or artifact.row_tokens is None:
            raise ValueError(f"the artifact.json of input {slot!r} lacks its tokenizer or row_tokens: pack it again")
        if first.tokenizer is not None and artifact.tokenizer.digest != first.tokenizer.digest:
            raise ValueError(f"inputs {first_slot!r} and {slot!r} were made with different tokenizers")
    assert first.tokenizer is not None
    return first.tokenizer


def _check_batch(config: TrainConfig, slot: str, artifact: Artifact) -> None:
    row_tokens = artifact.row_tokens or 0
    if config.batch_tokens % (row_tokens * config.world_size):
        raise ValueError(
            f"batch_tokens {config.batch_tokens} is not a whole number of rows on each rank: input {slot!r} has "
            f"row_tokens {row_tokens} and world_size is {config.world_size}"
        )


def _check_attention(config: TrainConfig, slot: str, found: set[str]) -> None:
    wrong = found - {config.attention}
    if config.attention != "rows" and wrong and config.override_attention_reason is None:
        raise ValueError(
            f"attention {config.attention!r} contradicts the rows of input {slot!r}, which need "
            f"{', '.join(sorted(wrong))}: use 'rows', or say why in override_attention_reason"
        )


def _unpack(
    config: TrainConfig, inputs: Mapping[str, Path], artifacts: Mapping[str, Artifact], context: Context
) -> tuple[PhaseRows, ...]:
    from ropewalk.stages.training.loop import PhaseRows

    tokenizer = _tokenizer(artifacts)
    num_rows: dict[str, int] = {}
    for slot, artifact in artifacts.items():
        spec = RowSpec(artifact.row_tokens or 0, tokenizer.vocab_size)
        num_rows[slot] = unpack(inputs[slot], context.work / "rows" / slot, spec, context)
    return tuple(
        PhaseRows(
            folder=context.work / "rows" / phase.rows,
            row_tokens=artifacts[phase.rows].row_tokens or 0,
            num_rows=num_rows[phase.rows],
            num_steps=phase.num_steps,
        )
        for phase in config.phases
    )


def _artifact(job: Job, measured: Measured) -> Artifact:
    config = job.config
    written = json.loads((job.output / "config.json").read_text(encoding="utf-8"))
    return Artifact(
        kind="checkpoint",
        tokenizer=job.tokenizer,
        row_tokens=job.window,
        counts={
            "num_parameters": measured.num_parameters,
            "num_steps": job.num_steps,
            "num_tokens": job.num_steps * config.batch_tokens,
            "num_rows": sum(phase.num_steps * (config.batch_tokens // phase.row_tokens) for phase in job.phases),
        },
        details={
            "rope_method": config.rope.method,
            "rope_parameters": written.get("rope_parameters"),
            "max_position_embeddings": written.get("max_position_embeddings"),
            "windows": [phase.row_tokens for phase in job.phases],
            "attention": config.attention,
            "attention_implementation": config.attention_implementation,
            "override_attention_reason": config.override_attention_reason,
        },
    )


def _write_observed(folder: Path, job: Job, measured: Measured) -> None:
    """Step times of this attempt: steps before `first_step` were done by an earlier one."""
    seconds = measured.step_seconds
    rates = [job.config.batch_tokens / value for value in seconds]
    summary = {
        "device": measured.device,
        "first_step": measured.first_step,
        "median_tokens_per_second": statistics.median(rates) if rates else None,
        "sum_step_seconds": sum(seconds),
        "step_seconds": seconds,
        "peak_memory_bytes": measured.peak_memory_bytes,
    }
    (folder / "throughput.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
