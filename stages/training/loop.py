"""One rank of a training run: engine, steps, checkpoints, export.

Every rank calls every collective in the same order. A step: count the targets of all ranks (one tiny all-reduce),
forward and backward on each micro-batch, check that the loss is finite (another), update. Gradients of ZeRO are
averages over ranks, at every stage; the objective of a rank is therefore multiplied by the number of ranks and
divided by the global number of targets, which makes the sum exactly the gradient of the global mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ropewalk.stages.context import Worker
from ropewalk.stages.schema import TokenizerInfo
from ropewalk.stages.training import attention
from ropewalk.stages.training.checkpoints import Checkpoints, History, write_history
from ropewalk.stages.training.engine import (
    build_engine,
    gathered_weights,
    gradient_norm,
    partitioned_loading,
    process_group,
    set_learning_rate,
)
from ropewalk.stages.training.export import export_model
from ropewalk.stages.training.loss import MicroBatch, WeightedLoss
from ropewalk.stages.training.model import build_model, has_sliding_window, load_model, seed_everything
from ropewalk.stages.training.rotary import rotate_exactly
from ropewalk.stages.training.rows import Row, RowOrder, RowTable, micro_batches, share
from ropewalk.stages.training.schedule import learning_rate
from ropewalk.stages.training.train import TrainConfig

HISTORY_FILE = "training.jsonl"


class TrainingCancelledError(RuntimeError):
    """The run was cancelled; the state was saved before this was raised."""


@dataclass(frozen=True)
class PhaseRows:
    """The unpacked rows of one phase."""

    folder: Path
    row_tokens: int
    num_rows: int
    num_steps: int


@dataclass(frozen=True)
class Job:
    """What each rank needs. All paths are on a file system that all ranks share."""

    config: TrainConfig
    phases: tuple[PhaseRows, ...]
    tokenizer: TokenizerInfo
    tokenizer_folder: Path
    """Holds the tokenizer that made the rows."""
    checkpoint: Path | None
    work: Path
    output: Path

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def window(self) -> int:
        """The longest row, in tokens."""
        return max(phase.row_tokens for phase in self.phases)


@dataclass
class Measured:
    """What rank 0 measured in this attempt, and counted."""

    num_parameters: int = 0
    step_seconds: list[float] = field(default_factory=list)
    """One entry for each step from `first_step` on."""
    first_step: int = 0
    device: str = "cpu"
    peak_memory_bytes: int = 0
    """Of the device; 0 on a CPU."""


def train_rank(job: Job, worker: Worker) -> Measured:
    """Train and, on rank 0, write the model and its loss history into `job.output`.

    Raises RuntimeError for a loss or gradient that is not finite, and `TrainingCancelledError`.
    """
    with process_group(worker.rank, worker.world_size) as device:
        return _Rank(job, worker, device).train()


class _Rank:
    """The state of a rank that lives longer than a step."""

    def __init__(self, job: Job, worker: Worker, device: torch.device) -> None:
        self.job, self.worker, self.device = job, worker, device
        self.engine = build_engine(WeightedLoss(_model(job), job.config.loss_chunk_tokens), job.config)
        self.checkpoints = Checkpoints(job.work / "checkpoints", worker.rank, worker.world_size)
        self.tables = [RowTable(phase.folder) for phase in job.phases]
        self.orders = [RowOrder(job.config.seed, index, phase.num_rows) for index, phase in enumerate(job.phases)]
        self.history: History = []

    def train(self) -> Measured:
        config, num_steps = self.job.config, self.job.num_steps
        first, self.history = self.checkpoints.resume(self.engine)
        measured = Measured(first_step=first, device=str(self.device))
        for entry in self.history:
            self._report(entry)
        self.engine.train()
        for step in range(first, num_steps):
            started = time.perf_counter()
            entry = self._step(step)
            measured.step_seconds.append(time.perf_counter() - started)
            self.history.append(entry)
            self._report(entry, tokens_per_second=config.batch_tokens / measured.step_seconds[-1])
            self.worker.progress(step + 1, num_steps, "steps")
            if (step + 1) % config.checkpoint_every_steps == 0 and step + 1 < num_steps:
                self.checkpoints.save(self.engine, step + 1, self.history)
        measured.num_parameters = self._export()
        if self.device.type == "cuda":
            measured.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)
        return measured

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its line of the history."""
        config = self.job.config
        phase, step_in_phase = _place(step, self.job.phases)
        row_tokens = self.job.phases[phase].row_tokens
        indices = self.orders[phase].step(step_in_phase, config.batch_tokens // row_tokens)
        mine = share(indices, self.worker.rank, self.worker.world_size)
        batches = [
            [self.tables[phase][index] for index in part]
            for part in micro_batches(mine, row_tokens, config.micro_batch_tokens)
        ]
        num_targets, num_inserted = self._agree(step, batches)
        seed_everything("step", config.seed, step, self.worker.rank)
        sums = self._backward(batches, num_targets, num_inserted)
        torch.distributed.all_reduce(sums)
        loss, inserted_loss = float(sums[0]) / max(1, num_targets), float(sums[1]) / max(1, num_inserted)
        where = f"step {step + 1}, rows {indices} of phase {phase}"
        if not math.isfinite(loss + inserted_loss):
            raise RuntimeError(f"the loss is {loss} at {where}")
        rate = learning_rate(
            step,
            num_steps=self.job.num_steps,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            min_fraction=config.min_learning_rate_fraction,
        )
        set_learning_rate(self.engine, rate)
        norm = gradient_norm(self.engine)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm
        # DeepSpeed tells the norm only after the update; the spoilt weights die with this process, unsaved.
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient norm is {norm} at {where}")
        entry = {
            "step": step + 1,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "row_tokens": row_tokens,
            "tokens": (step + 1) * config.batch_tokens,
        }
        return entry | {"inserted_loss": inserted_loss} if num_inserted else entry

    def _agree(self, step: int, batches: Sequence[Sequence[Row]]) -> tuple[int, int]:
        """Global numbers of targets and inserted targets; saves and raises if any rank was told to stop."""
        rows = [row for part in batches for row in part]
        counts = torch.tensor(
            [
                sum(int(row.targets().sum()) for row in rows),
                sum(int(row.inserted_targets().sum()) for row in rows),
                int(self.worker.cancelled()),
            ],
            device=self.device,
        )
        torch.distributed.all_reduce(counts)
        num_targets, num_inserted, cancelled = counts.tolist()
        if cancelled:
            self.checkpoints.save(self.engine, step, self.history)
            raise TrainingCancelledError(
                f"cancelled after step {step}; its state is saved and the next attempt resumes there"
            )
        return num_targets, num_inserted

    def _backward(self, batches: Sequence[Sequence[Row]], num_targets: int, num_inserted: int) -> torch.Tensor:
        """Gradients of the objective; returns this rank's loss sums over targets and inserted targets ([2])."""
        world_size = self.worker.world_size
        target_weight = world_size / max(1, num_targets)
        inserted_weight = world_size * self.job.config.inserted_loss_weight / max(1, num_inserted)
        total = torch.zeros(2, device=self.device)
        for index, rows in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            batch, visibility = self._collate(rows)
            objective, sums = self.engine(batch, visibility, target_weight, inserted_weight)
            self.engine.backward(objective)
            total += sums
        return total

    def _collate(self, rows: Sequence[Row]) -> tuple[MicroBatch, dict[str, Any]]:
        row_tokens = len(rows[0].input_ids)
        positions = torch.arange(row_tokens)
        batch = MicroBatch(
            input_ids=torch.stack([torch.as_tensor(row.input_ids.astype("int64")) for row in rows]),
            position_ids=torch.stack(
                [
                    positions if row.position_ids is None else torch.as_tensor(row.position_ids.astype("int64"))
                    for row in rows
                ]
            ),
            targets=torch.stack([torch.as_tensor(row.targets()) for row in rows]),
            inserted=torch.stack([torch.as_tensor(row.inserted_targets()) for row in rows]),
        )
        return batch.to(self.device), self._visibility(rows, row_tokens)

    def _visibility(self, rows: Sequence[Row], row_tokens: int) -> dict[str, Any]:
        config = self.job.config
        policies = [row.attention if config.attention == "rows" else config.attention for row in rows]
        if (
            config.attention_implementation != attention.ATTENTION_NAME
            and set(policies) != {"causal"}
            and has_sliding_window(self.engine.module.model.config)
        ):
            raise ValueError(
                f"attention_implementation {config.attention_implementation!r} would forget the model's sliding window "
                f"in rows of policy {', '.join(sorted(set(policies)))}: use 'ropewalk'"
            )
        return attention.visibility(
            policies,
            [row.segments for row in rows],
            row_tokens,
            implementation=config.attention_implementation,
            device=self.device,
        )

    def _report(self, entry: dict[str, float], **measured: float) -> None:
        if self.worker.rank == 0:
            metrics = {name: value for name, value in entry.items() if name != "step"}
            self.worker.log(metrics | measured, step=int(entry["step"]))

    def _export(self) -> int:
        weights = gathered_weights(self.engine, self.worker.rank)
        num_parameters = 0
        if weights is not None:
            rescaled = self.job.config.rope.method != "none"
            num_parameters = export_model(self.engine.module.model, weights, self.job.output, rescaled=rescaled)
            write_history(self.job.output / HISTORY_FILE, self.history)
        torch.distributed.barrier()
        return num_parameters


def _model(job: Job) -> Any:
    config = job.config
    attention.register()
    if job.checkpoint is None:
        assert config.model is not None
        model = build_model(
            config.model, job.tokenizer, job.window, config.seed, attention=config.attention_implementation
        )
    else:
        with partitioned_loading(config):
            model = load_model(
                job.checkpoint,
                config.rope,
                window=job.window,
                vocab_size=job.tokenizer.vocab_size,
                dtype=config.dtype,
                seed=config.seed,
                trust_remote_code=config.trust_remote_code,
                attention=config.attention_implementation,
            )
    if config.enable_exact_rope:
        rotate_exactly(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _place(step: int, phases: Sequence[PhaseRows]) -> tuple[int, int]:
    """Phase of a 0-based step, and the step's number in it."""
    for index, phase in enumerate(phases):
        if step < phase.num_steps:
            return index, step
        step -= phase.num_steps
    raise ValueError(f"there is no step {step} beyond the last phase")
