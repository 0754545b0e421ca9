"""Tiny tokenizers, rows and runs for the training tests, and ranks that fail or are cancelled on purpose.

It lies here, not beside the tests, because the processes of a gang import it by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.stages.context import LocalContext, LocalWorker, Output, Worker
from ropewalk.stages.schema import Artifact, TokenizerInfo, rows_schema, seeded_rng, write_artifact, write_table
from ropewalk.stages.training import train

VOCAB = 48
TINY_MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> TokenizerInfo:
    """An artifact with a word-level tokenizer; a larger one extends a smaller one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    digest = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    return TokenizerInfo(digest=digest, vocab_size=vocab_size, bos_token_id=0, eos_token_id=1)


def document(name: str, row_start: int, num_tokens: int) -> dict[str, Any]:
    return {"doc_id": name, "start": 0, "num_tokens": num_tokens, "row_start": row_start}


def counting_rows(num_rows: int, row_tokens: int, vocab_size: int = VOCAB, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that count up from a random word: the next word follows from the one before, so a model learns it fast."""
    rng = seeded_rng("counting", seed)
    rows = []
    for index in range(num_rows):
        start = int(rng.integers(0, vocab_size))
        ids = [0, *((start + step) % (vocab_size - 3) + 3 for step in range(row_tokens - 1))]
        segments = [document(f"d{index}", 1, row_tokens - 1)]
        rows.append({"row_id": f"r{index}", "input_ids": ids, "segments": segments, "attention": "causal"})
    return rows


def random_rows(
    num_rows: int, row_tokens: int, *, attention: str = "causal", masked: bool = False
) -> list[dict[str, Any]]:
    """Rows of random words in two documents; `masked` adds a loss mask with inserted targets at the end."""
    rng = seeded_rng("random", row_tokens)
    rows = []
    for index in range(num_rows):
        cut = int(rng.integers(4, row_tokens - 8))
        row = {
            "row_id": f"r{index}",
            "input_ids": rng.integers(3, VOCAB, row_tokens).tolist(),
            "segments": [document(f"a{index}", 0, cut), document(f"b{index}", cut, row_tokens - 4 - cut)],
            "attention": attention,
        }
        if masked:
            row["loss_mask"] = [
                position % 3 == index % 3 or position >= row_tokens - 3 for position in range(row_tokens)
            ]
        rows.append(row)
    return rows


def write_rows(
    folder: Path, rows: Sequence[Mapping[str, Any]], info: TokenizerInfo, *, shard_records: int = 65_536
) -> Path:
    schema = rows_schema(loss_mask="loss_mask" in rows[0], position_ids="position_ids" in rows[0])
    write_table(folder, "rows", schema, rows, shard_records=shard_records)
    write_artifact(folder, Artifact(kind="rows", tokenizer=info, row_tokens=len(rows[0]["input_ids"])))
    return folder


def config(**changes: Any) -> train.TrainConfig:
    settings: dict[str, Any] = {
        "model": TINY_MODEL,
        "phases": [{"rows": "rows", "num_steps": 4}],
        "batch_tokens": 256,
        "learning_rate": 0.01,
        "checkpoint_every_steps": 2,
    }
    return train.TrainConfig.model_validate(settings | changes)


@dataclass
class Finished:
    """What a run left behind."""

    data: Path
    observed: Path
    events: list[dict[str, Any]]

    @property
    def weights_sha256(self) -> str:
        return hashlib.sha256((self.data / "model.safetensors").read_bytes()).hexdigest()

    @property
    def history(self) -> list[dict[str, float]]:
        from ropewalk.stages.training.checkpoints import read_history

        return read_history(self.data / "training.jsonl")

    def logged(self, name: str) -> list[tuple[int, float]]:
        return [
            (event["step"], event["metrics"][name])
            for event in self.events
            if event["type"] == "metrics" and name in event["metrics"]
        ]


def run(
    folder: Path,
    settings: train.TrainConfig,
    inputs: Mapping[str, Path],
    context: Callable[..., LocalContext] = LocalContext,
) -> Finished:
    """Run the stage; the work folder stays from one call to the next, the output is new."""
    attempt = len(list(folder.glob("attempt-*")))
    data, observed = folder / f"attempt-{attempt}" / "data", folder / f"attempt-{attempt}" / "observed"
    work = folder / "work"
    for path in (data, observed, work):
        path.mkdir(parents=True, exist_ok=True)
    events: list[dict[str, Any]] = []
    train.run(settings, inputs, Output(data, observed), context(work=work, report=events.append))
    return Finished(data, observed, events)


@dataclass
class Interrupted:
    """A worker whose rank 1 dies, or whose rank 1 is told to stop, when a given number of steps is done."""

    worker: Worker
    at_step: int
    how: str
    seen: int = 0

    @property
    def rank(self) -> int:
        return self.worker.rank

    @property
    def world_size(self) -> int:
        return self.worker.world_size

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        self.worker.log(metrics, step=step)

    def progress(self, done: int, total: int, unit: str) -> None:
        self.worker.progress(done, total, unit)

    def cancelled(self) -> bool:
        """Asked once at the start of each step."""
        done, self.seen = self.seen, self.seen + 1
        if done < self.at_step or self.rank != self.world_size - 1:
            return False
        if self.how == "killed":
            os._exit(9)
        return True


def _interrupted(function: Callable[..., Any], at_step: int, how: str, payload: Any, worker: Worker) -> Any:
    return function(payload, Interrupted(worker, at_step, how))


@dataclass
class InterruptingContext(LocalContext):
    """Interrupts its gangs after `at_step` steps of the attempt."""

    at_step: int = 0
    how: str = "killed"

    def gang(self, function: Callable[..., Any], config: Any, *, num_workers: int, resources: Any = None) -> list[Any]:
        return super().gang(partial(_interrupted, function, self.at_step, self.how), config, num_workers=num_workers)


@dataclass
class InProcessContext(LocalContext):
    """Runs the one rank of its gangs here, in the process group that the caller has joined."""

    at_step: int | None = None
    how: str = "cancelled"

    def gang(self, function: Callable[..., Any], config: Any, *, num_workers: int, resources: Any = None) -> list[Any]:
        worker: Worker = LocalWorker(0, num_workers, self.report)
        return [function(config, worker if self.at_step is None else Interrupted(worker, self.at_step, self.how))]


def train_by_hand(checkpoint: Path, rows: Sequence[Mapping[str, Any]], settings: train.TrainConfig) -> Reference:
    """Plain torch, one process, dense masks, one backward pass a step over all rows, constant learning rate.

    Shares no code with the stage; each step sees all rows, so their order does not matter.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.adam_betas)
    losses, norms = [], []
    for _ in range(settings.phases[0].num_steps):
        sums = {"targets": [], "inserted": []}
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids, attention_mask=_dense_mask(row), use_cache=False).logits[0]
            for position in range(1, ids.shape[1]):
                if "loss_mask" in row and not row["loss_mask"][position]:
                    continue
                loss = cross_entropy(logits[position - 1], ids[0, position])
                sums["targets"].append(loss)
                if "loss_mask" in row and all(
                    not s["row_start"] <= position < s["row_start"] + s["num_tokens"] for s in row["segments"]
                ):
                    sums["inserted"].append(loss)
        mean = torch.stack(sums["targets"]).mean()
        extra = torch.stack(sums["inserted"]).mean() if sums["inserted"] else 0.0
        (mean + settings.inserted_loss_weight * extra).backward()
        losses.append(mean.item())
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        norms.append(norm.item())
        for parameter in model.parameters():
            parameter.grad *= min(1.0, settings.max_grad_norm / norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return Reference(losses, norms, {name: value.detach() for name, value in model.named_parameters()})


@dataclass
class Reference:
    """What `train_by_hand` found."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Any]


def _dense_mask(row: Mapping[str, Any]) -> Any:
    """Additive [1, 1, T, T] mask; a position in no segment belongs to the document before it."""
    import torch

    tokens = len(row["input_ids"])
    of = [0] * tokens
    for number, segment in enumerate(row["segments"]):
        for position in range(segment["row_start"] if number else 0, tokens):
            of[position] = number
    mask = torch.full((tokens, tokens), float("-inf"))
    for query in range(tokens):
        for key in range(query + 1):
            if row["attention"] == "causal" or of[query] == of[key]:
                mask[query, key] = 0.0
    return mask[None, None]


def train_all(jobs: Sequence[Any], worker: Worker) -> list[Any]:
    """Several jobs, one after the other, in one gang: starting processes costs more than training tiny models."""
    import torch.distributed as dist

    from ropewalk.stages.training.loop import train_rank

    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", rank=worker.rank, world_size=worker.world_size)
    try:
        return [train_rank(job, worker) for job in jobs]
    finally:
        dist.destroy_process_group()
