"""A small convolutional network that predicts the information gain of a context from its token embeddings.

The published secondary learner (arXiv 2005.00175, section 3.2; huggingface/transformers-research-projects
information-gain-filtration/igf/igf.py): convolution of width 3 to 256 channels over the language model's input
embeddings, maximum over the positions, linear layers to 32, 32 and 1 with dropout 0.1 behind the first. Here the
embeddings are not trained along, and the epoch that did best on the held-out pairs is returned (the code saves that
one and returns the last).

Shapes: N contexts, L tokens, E embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_CHANNELS, _HIDDEN, _DROPOUT, _WIDTH = 256, 32, 0.1, 3
_READ_CONTEXTS = 1024


class GainLearner(nn.Module):
    """Contexts [N, L] to predicted gains [N]."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.convolution = nn.Conv1d(embeddings.shape[1], _CHANNELS, _WIDTH, padding=_WIDTH // 2)
        self.head = nn.Sequential(
            nn.Linear(_CHANNELS, _HIDDEN), nn.Dropout(_DROPOUT), nn.Linear(_HIDDEN, _HIDDEN), nn.Linear(_HIDDEN, 1)
        )

    def forward(self, ids_NL: torch.Tensor) -> torch.Tensor:
        """Predict standardised gains."""
        embedded_NEL = nn.functional.embedding(ids_NL, self.get_buffer("embeddings")).transpose(1, 2)
        return self.head(self.convolution(embedded_NEL).amax(2)).squeeze(1)

    def predict(self, ids_NL: torch.Tensor) -> torch.Tensor:
        """Gains [N] without dropout, some contexts at a time, float64 on the CPU."""
        self.eval()
        device = self.get_buffer("embeddings").device
        with torch.inference_mode():
            pieces = [self(piece.to(device)).double().cpu() for piece in ids_NL.split(_READ_CONTEXTS)]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)

    def save(self, path: Path) -> None:
        """Write the trained weights."""
        save_file({name: value.cpu().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path, embeddings: torch.Tensor) -> GainLearner:
        """Read what `save` wrote."""
        learner = cls(embeddings.float()).to(embeddings.device)
        learner.load_state_dict(load_file(path))
        return learner


@dataclass(frozen=True)
class Training:
    """How the learner is trained."""

    learning_rate: float
    num_epochs: int
    batch_contexts: int
    seed: int


@dataclass(frozen=True)
class Pairs:
    """Contexts [N, L] and their standardised gains [N]."""

    ids: torch.Tensor
    gains: torch.Tensor


def train(
    embeddings: torch.Tensor, training: Training, pairs: Pairs, heldout: Pairs
) -> tuple[GainLearner, list[float]]:
    """Fit a learner by Adam and mean squared error.

    Returns the learner of the epoch with the smallest error on the held-out pairs, and that error for every epoch.
    """
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        learner = GainLearner(embeddings.float()).to(embeddings.device)
        optimizer = torch.optim.Adam(learner.parameters(), lr=training.learning_rate)
        errors: list[float] = []
        best: dict[str, torch.Tensor] = {}
        for _ in range(training.num_epochs):
            learner.train()
            for batch in _shuffled(len(pairs.gains), training.batch_contexts):
                ids, gains = pairs.ids[batch].to(embeddings.device), pairs.gains[batch].to(embeddings.device)
                loss = nn.functional.mse_loss(learner(ids), gains.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            error = float((learner.predict(heldout.ids) - heldout.gains).square().mean())
            if not math.isfinite(error):
                raise ValueError("the information gain learner diverged: lower learner_learning_rate")
            if error < min(errors, default=math.inf):
                best = {name: value.clone() for name, value in learner.state_dict().items()}
            errors.append(error)
    learner.load_state_dict(best)
    return learner, errors


def _shuffled(size: int, batch: int) -> Iterator[torch.Tensor]:
    yield from torch.randperm(size).split(batch)
