"""Information gain filtration: which contexts help a model most with what it is to be good at.

Reads `model` (a causal model), `objective` (Documents or Tokens: what it is to be good at) and `candidates` (Documents
or Tokens). Writes Scores of the candidates, and `oracle`: the information gains that were measured. Source: Antonello
et al., "Selecting Informative Contexts Improves Language Model Fine-tuning", ACL 2021, arXiv 2005.00175; code in
huggingface/transformers-research-projects:information-gain-filtration.

1. A document stands for itself by one window of `context_tokens` at a place drawn by its id; the objective is such a
   window of each of the first `num_objective` documents that are long enough.
2. For `num_oracle` candidates drawn by id, the exact gain: one optimiser step on the context alone, from the model as
   it is; gain = mean loss of the objective before minus after, in nats a token; then the weights are put back.
3. A small network learns the standardised gain from a context's tokens (`gain_learner`).
4. score = the network's prediction for every candidate: standard deviations above the mean gain.

How the paper selects, for the step that does (`details.selection_rule`): walk the candidates while fine-tuning, keep
scores of at least 1 until 10 batches are full, then of at least -1.

Where paper and code differ we follow the paper: the code takes the drop of the perplexity, we of the loss, as the
paper's definition. Where we differ from both: no dropout while a gain is measured (the code leaves it on, so that equal
contexts have unequal gains); windows and pairs are drawn by id, not by global random state; the held-out pairs are a
share, not the first 512. A learner that has learnt nothing still scores: look at `heldout_correlation`.

Lost, and counted: candidates shorter than a window. Cost: `num_oracle` times one step and one pass over the objective.
Memory of a worker: five times the model (weights twice, gradients, two moments); of the driver: a row a candidate.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.gain_windows import Windows, objective_windows, read_windows
from ropewalk.stages.data.selection.language_model import LanguageModel, load_model, token_losses
from ropewalk.stages.data.selection.scales import fractional_ranks
from ropewalk.stages.data.selection.scores import check_scores, scores_table, write_scores
from ropewalk.stages.schema import Record, iterate_table, read_artifact, read_table, shard_paths, write_shard
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np
    import torch

NAME = "information_gain"
VERSION = 1

PARTS = ("num_tokens",)
_CHUNK_PAIRS = 64
_BATCH_TOKENS = 8_192  # Of the objective: bounds the logits.
SELECTION_RULE = {"first_batches": 10, "batch_samples": 16, "first_least_score": 1.0, "then_least_score": -1.0}
"""The published schedule."""


class InformationGainConfig(Record):
    """How gains are measured and learnt."""

    context_tokens: int = Field(default=32, ge=2)
    """Tokens of a window, of candidates and of the objective."""
    num_objective: int = Field(default=100, ge=1)
    """Windows of the objective, at most."""
    num_oracle: int = Field(default=10_000, ge=4)
    """Candidates whose gain is measured, at most; the learner is trained on them."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Of the one step."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Of the one step."""
    max_gradient_norm: float = Field(default=3.0, gt=0)
    """Gradients of the one step are scaled down to it."""
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the measured candidates that judges the learner instead of training it, at least one."""
    learner_learning_rate: float = Field(default=1e-5, gt=0)
    """Of the learner's Adam."""
    learner_epochs: int = Field(default=15, ge=1)
    """Passes over the measured candidates; the best one on the held-out share counts."""
    learner_batch: int = Field(default=128, ge=1)
    """Contexts a step of the learner."""
    seed: int = 0
    """Of windows, of the choice of measured candidates, and of the learner."""


class GainOracle:
    """Measures gains by doing the step."""

    def __init__(self, config: InformationGainConfig, model: Path, objective: list[list[int]]) -> None:
        self._config, self._objective = config, objective
        self._loaded: LanguageModel = load_model(model)
        self._parameters: list[Any] = list(self._loaded.model.parameters())
        self._before = [parameter.detach().clone() for parameter in self._parameters]
        self._base = self.objective_loss()

    def __call__(self, windows: list[list[int]], folder: Path) -> dict[str, list[float]]:
        """The gains of some windows; nothing is written."""
        return {"gains": [self.gain(window) for window in windows]}

    def objective_loss(self) -> float:
        """Nats a token of the model as it is now."""
        import numpy as np

        return float(np.concatenate(token_losses(self._loaded, self._objective, batch_tokens=_BATCH_TOKENS)).mean())

    def gain(self, window: list[int]) -> float:
        """How much one step on a window lowers the objective's loss; the model is put back."""
        import torch

        self._step(window)
        gain = self._base - self.objective_loss()
        if not math.isfinite(gain):
            raise ValueError(f"an information gain is {gain}: lower learning_rate")
        with torch.no_grad():
            for parameter, before in zip(self._parameters, self._before, strict=True):
                parameter.copy_(before)
        return gain

    def _step(self, window: list[int]) -> None:
        import torch

        self._loaded.check_ids(window)
        ids_1L = torch.tensor([window], device=self._loaded.device)
        make: Any = torch.optim.Adam if self._config.optimizer == "adam" else torch.optim.SGD
        optimizer = make(self._parameters, lr=self._config.learning_rate)
        optimizer.zero_grad()
        self._loaded.model(ids_1L, labels=ids_1L, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()


def measured_candidates(config: InformationGainConfig, folders: Sequence[Path]) -> tuple[list[str], list[list[int]]]:
    """Ids and windows of the candidates to measure: those whose hashes are smallest, in that order.

    `folders` hold the windows. Raises ValueError if there are fewer than 4.
    """

    def ids() -> Iterator[str]:
        for folder in folders:
            for batch in iterate_table(folder, "windows", ["sample_id"]):
                yield from batch.column(0).to_pylist()

    drawn = heapq.nsmallest(
        config.num_oracle, ids(), key=lambda name: hashlib.sha256(f"{config.seed}\x1f{name}".encode()).digest()
    )
    wanted = dict.fromkeys(drawn)
    if len(wanted) < 4:
        raise ValueError(
            f"slot candidates has {len(wanted)} documents of context_tokens {config.context_tokens} tokens: gains are "
            "learnt from at least 4"
        )
    found: dict[str, list[int]] = {}
    for folder in folders:
        for batch in iterate_table(folder, "windows", ["sample_id", "window"]):
            for number, name in enumerate(batch.column("sample_id").to_pylist()):
                if name in wanted:
                    found[name] = batch.column("window")[number].as_py()
    return list(wanted), [found[name] for name in wanted]


def measure(
    config: InformationGainConfig, windows: list[list[int]], objective: list[list[int]], model: Path, context: Context
) -> np.ndarray:
    """The gains of windows, measured on workers. Raises ValueError if they are all the same."""
    import numpy as np

    chunks = {f"{begin:08d}": windows[begin : begin + _CHUNK_PAIRS] for begin in range(0, len(windows), _CHUNK_PAIRS)}
    build = partial(GainOracle, config, model, objective)
    shards = map_shards(context, build, chunks, label="oracle", unit="chunks of measured gains")
    gains = np.array([gain for shard in shards for gain in shard.counts["gains"]])
    if np.ptp(gains) == 0:
        raise ValueError(f"all {len(gains)} measured candidates have one information gain: deduplicate them")
    return gains


class LearnerTrainer:
    """Trains the learner, on one worker."""

    def __init__(self, config: InformationGainConfig, model: Path) -> None:
        self._config = config
        self._embeddings = token_embeddings(model)

    def __call__(self, pairs: tuple[list[list[int]], list[float]], folder: Path) -> dict[str, Any]:
        """Write the learner of windows and standardised gains, the first of which are held out; returns how it did."""
        import torch

        from ropewalk.stages.data.selection.gain_learner import Pairs, Training, train

        config = self._config
        ids, gains = torch.tensor(pairs[0]), torch.tensor(pairs[1], dtype=torch.float64)
        num_heldout = heldout_count(config, len(gains))
        heldout = Pairs(ids[:num_heldout], gains[:num_heldout])
        training = Training(
            config.learner_learning_rate, config.learner_epochs, config.learner_batch, config.seed % 2**63
        )
        learner, errors = train(self._embeddings, training, Pairs(ids[num_heldout:], gains[num_heldout:]), heldout)
        learner.save(folder / "learner.safetensors")
        predicted = learner.predict(heldout.ids).numpy()
        return {
            "heldout_errors": errors,
            "num_heldout": num_heldout,
            "heldout_correlation": rank_correlation(predicted, heldout.gains.numpy()),
        }


def heldout_count(config: InformationGainConfig, num_pairs: int) -> int:
    """How many pairs judge the learner: at least one, and not all."""
    return min(max(1, round(config.heldout_fraction * num_pairs)), num_pairs - 1)


def rank_correlation(some: np.ndarray, others: np.ndarray) -> float:
    """Spearman's; 0 where either does not vary."""
    import numpy as np

    a, b = fractional_ranks(some), fractional_ranks(others)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def token_embeddings(model: Path) -> torch.Tensor:
    """The input embeddings of a model, which is loaded with its first layer alone."""
    return load_model(model, num_layers=1).model.get_input_embeddings().weight.detach()


class WindowScorer:
    """Predicts the gains of one shard of windows after another."""

    def __init__(self, model: Path, learner: Path) -> None:
        from ropewalk.stages.data.selection.gain_learner import GainLearner

        self._learner = GainLearner.load(learner, token_embeddings(model))

    def __call__(self, path: Path, folder: Path) -> dict[str, int]:
        """Write the scores of a shard as `parts`."""
        import numpy as np
        import pyarrow.parquet as pq
        import torch

        table = pq.read_table(path)
        windows: Any = table.column("window").combine_chunks()
        flat = np.array(windows.flatten().to_numpy(), dtype=np.int64)
        ids = torch.from_numpy(flat.reshape(table.num_rows, -1)) if table.num_rows else torch.zeros(0, 1).long()
        columns = {"score": self._learner.predict(ids).numpy(), "num_tokens": table.column("num_tokens").to_numpy()}
        names, sources = (table.column(name).to_pylist() for name in ("sample_id", "source"))
        write_shard(folder, "parts", 0, scores_table(names, sources, columns))
        return {"num_scored": table.num_rows}


def check(config: Any, output: Path) -> None:
    """The scores, and that every measured gain is there. Raises ValueError naming file and field."""
    check_scores(config, output)
    num_measured = sum(batch.num_rows for batch in iterate_table(output, "oracle"))
    if (found := read_artifact(output, "scores").counts["num_measured"]) != num_measured:
        raise ValueError(f"{output / 'artifact.json'}: counts.num_measured is {found}, but there are {num_measured}")


def _write_oracle(folder: Path, names: Sequence[str], gains: np.ndarray) -> None:
    import pyarrow as pa

    fields = [pa.field("sample_id", pa.string(), nullable=False), pa.field("gain", pa.float64(), nullable=False)]
    arrays = [pa.array(list(names), pa.string()), pa.array(gains)]
    write_shard(folder, "oracle", 0, pa.Table.from_arrays(arrays, schema=pa.schema(fields)))


def run(config: InformationGainConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every candidate. Raises ValueError on bad input, or if nothing can be learnt."""
    model = inputs["model"]
    windowing = Windows(config.context_tokens, config.seed)
    objective = objective_windows(windowing, inputs["objective"], model, config.num_objective)
    shards = read_windows(windowing, inputs["candidates"], model, context)
    names, windows = measured_candidates(config, [shard.folder for shard in shards.values()])
    gains = measure(config, windows, objective, model, context)
    _write_oracle(output.data, names, gains)
    standardised = (gains - gains.mean()) / gains.std()
    trainer = partial(LearnerTrainer, config, model)
    [trained] = map_shards(context, trainer, {"learner": (windows, standardised.tolist())}, label="learner")
    os.link(trained.folder / "learner.safetensors", output.data / "learner.safetensors")
    files = {name: shard_paths(shard.folder, "windows")[0] for name, shard in shards.items()}
    scorer = partial(WindowScorer, model, output.data / "learner.safetensors")
    tables = (read_table(shard.folder, "parts") for shard in map_shards(context, scorer, files, label="scores"))
    counts = {
        name: sum(shard.counts[name] for shard in shards.values()) for name in ("num_in", "num_dropped_too_short")
    }
    counts |= {"num_measured": len(gains), "num_objective": len(objective)}
    details = {
        "gain_mean": float(gains.mean()),
        "gain_std": float(gains.std()),
        "selection_rule": SELECTION_RULE,
        **trained.counts,
    }
    write_scores(output, context, tables, parts=PARTS, counts=counts, details=details)
    context.log({"heldout_correlation": trained.counts["heldout_correlation"]})
