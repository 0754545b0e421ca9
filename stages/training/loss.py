"""The objective: weighted next-token cross-entropy, without ever holding the logits of a whole long row.

Shapes: B rows, T tokens, D hidden width, V vocabulary. The loss at position t is for target t, predicted from the
tokens before it; position 0 is never a target. Logits are float32 whatever the model's type.

A row of 131,072 tokens has 62 GiB of float32 logits at a vocabulary of 128,256. So a micro-batch longer than
`chunk_tokens` is cut: each chunk's logits are made from its hidden states, reduced to losses, dropped, and made
again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass on one rank sees."""

    input_ids: torch.Tensor
    """[B, T] int64."""
    position_ids: torch.Tensor
    """[B, T] int64."""
    targets: torch.Tensor
    """[B, T] bool: token t is a target."""
    inserted: torch.Tensor
    """[B, T] bool: token t is a target that no document holds, such as a planted answer."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        tensors = (self.input_ids, self.position_ids, self.targets, self.inserted)
        return MicroBatch(*(tensor.to(device) for tensor in tensors))


class WeightedLoss(nn.Module):
    """A causal language model whose forward pass ends in the loss, so that it runs inside the engine."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.head_is_linear = False

    def forward(
        self, batch: MicroBatch, plan: Any, target_weight: float, inserted_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective, a scalar: `target_weight` x sum over targets + `inserted_weight` x sum over inserted ones.

        Also returns, detached, the two bare sums ([2], float32). `plan` says which tokens see which.
        """
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_plan": plan,
            "use_cache": False,
        }
        if batch.input_ids.numel() <= self.chunk_tokens:
            losses = _cross_entropy(self.model(**inputs).logits[:, :-1], batch.input_ids[:, 1:])
        else:
            losses = self._chunked(inputs, batch.input_ids)
        targets, inserted = batch.targets[:, 1:], batch.inserted[:, 1:]
        sums = torch.stack([losses[targets].sum(), losses[inserted].sum()])
        return target_weight * sums[0] + inserted_weight * sums[1], sums.detach()

    def _chunked(self, inputs: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
        """Loss of each prediction, [B, T-1], made `chunk_tokens` at a time."""
        body = getattr(self.model, self.model.base_model_prefix)
        head = self.model.get_output_embeddings()
        hidden = body(**inputs)[0]
        self._check_head(inputs, head, hidden)
        states, labels = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()

        def losses(states_part: torch.Tensor, labels_part: torch.Tensor) -> torch.Tensor:
            return _cross_entropy(head(states_part), labels_part)

        parts = [
            checkpoint(losses, *pair, use_reentrant=False)
            for pair in zip(states.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True)
        ]
        return torch.cat(parts).view(input_ids.shape[0], -1)

    def _check_head(self, inputs: dict[str, Any], head: nn.Module, hidden: torch.Tensor) -> None:
        """Once: the head alone must give the model's own logits, which some models scale or cap afterwards."""
        if self.head_is_linear:
            return
        with torch.no_grad():
            expected = self.model(**inputs, logits_to_keep=1).logits
            found = head(hidden[:, -1:].detach())
        if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the output embedding, so they cannot be made "
                "in chunks: set loss_chunk_tokens to micro_batch_tokens or more, and to the longest row or more"
            )
        self.head_is_linear = True


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape)
